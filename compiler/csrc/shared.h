// What the compiler's C++ modules have in common.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace coreinfer {

constexpr int kMaxThreads = 256;

[[noreturn]] inline void refuse(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(what + ": expected " + expected + ", got " + got);
}

inline void check_threads(int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads)
    refuse("threads", "1 to " + std::to_string(kMaxThreads), std::to_string(num_threads));
}

// Of the kernels that a CPU runs, best first, the one of a name, or the first for "auto".
template <class Kernel>
const Kernel& find_kernel(const std::vector<const Kernel*>& kernels, const std::string& isa) {
  if (isa == "auto") return *kernels.front();
  std::string names;
  for (const Kernel* kernel : kernels) {
    if (isa == kernel->name) return *kernel;
    names += ", " + std::string(kernel->name);
  }
  refuse("isa", "auto" + names + " on this CPU", "'" + isa + "'");
}

template <class Kernel>
std::vector<std::string> kernel_names(const std::vector<const Kernel*>& kernels) {
  std::vector<std::string> names;
  for (const Kernel* kernel : kernels) names.push_back(kernel->name);
  return names;
}

// Call work(block) for each of some blocks on several threads. It must not throw.
template <class Work>
void for_each_block(int num_blocks, int num_threads, Work work) {
  std::atomic<int> next{0};
  const auto serve = [&] {
    for (int block; (block = next.fetch_add(1)) < num_blocks;) work(block);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads);
  try {
    while (static_cast<int>(helpers.size()) + 1 < std::min(num_threads, num_blocks)) helpers.emplace_back(serve);
  } catch (const std::system_error&) {
    // Where the system starts no more threads, those that there are do the work.
  }
  serve();
  for (std::thread& helper : helpers) helper.join();
}

// Where some threads wait for each other, again and again.
class Barrier {
 public:
  // How many threads there are; those that wait go on from then on.
  void open(int num_threads) { num_threads_ = num_threads; }

  void wait() {
    int expected;
    while ((expected = num_threads_) == 0) std::this_thread::yield();
    const int round = round_;
    if (++num_waiting_ == expected) {
      num_waiting_ = 0;
      ++round_;
      return;
    }
    while (round_ == round) std::this_thread::yield();
  }

 private:
  std::atomic<int> num_threads_{0}, num_waiting_{0}, round_{0};
};

// Call work(barrier) on several threads at once, fewer where the system starts no more. It must not throw.
template <class Work>
void run_together(int num_threads, Work work) {
  Barrier barrier;
  std::vector<std::thread> helpers;
  helpers.reserve(num_threads);
  try {
    while (static_cast<int>(helpers.size()) + 1 < num_threads)
      helpers.emplace_back([&] {
        barrier.wait();
        work(barrier);
      });
  } catch (const std::system_error&) {
    // Those that there are do the work.
  }
  barrier.open(static_cast<int>(helpers.size()) + 1);
  barrier.wait();
  work(barrier);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace coreinfer
