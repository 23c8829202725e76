// A few persistent threads that work in phases.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace coreinfer {

// Waits for a counter to change: spins for some microseconds, then sleeps in the kernel, so that a busy neighbour on
// the same core is not kept from finishing what is waited for.
class Event {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  void wait_beyond(uint32_t seen);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> num_sleepers_{0};
};

class Threads {
 public:
  // `num_threads` in all, the caller's included. Throws std::invalid_argument: less than 1 or more than 256.
  explicit Threads(int num_threads);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int size() const { return num_threads_; }

  // Call work(thread) on every thread and return when all are done. `work` must not throw.
  void run(const std::function<void(int)>& work);

  // Inside `run`: call work(begin, end) so that all threads' calls together cover [0, count). Each thread has most of
  // its share for sure; the last quarter goes to whoever is free, because cores are never equally fast. A part is drawn
  // while the one before it is still to be done, and announced by ahead(begin): what it reads first can be asked for.
  // All threads must deal the same counts in the same order.
  template <class Work, class Ahead>
  void deal(int thread, int count, Work work, Ahead ahead) {
    const int reserved = reserved_share(count, num_threads_), first = reserved * num_threads_;
    const int size = std::max(1, (count - first) / (4 * num_threads_));
    const int num_parts = (count - first + size - 1) / size;
    uint32_t& base = bases_[thread].value;
    int begin = thread * reserved, end = begin + reserved;
    for (;;) {
      const int part = static_cast<int>(tickets_.fetch_add(1, std::memory_order_relaxed) - base);
      const int next = first + part * size;
      if (part < num_parts) ahead(next);
      if (begin < end) work(begin, end);
      if (part >= num_parts) break;
      begin = next;
      end = std::min(next + size, count);
    }
    // Every thread drew one ticket in vain.
    base += num_parts + num_threads_;
  }
  template <class Work>
  void deal(int thread, int count, Work work) {
    deal(thread, count, work, [](int) {});
  }
  // How many of `count` each thread has for sure.
  static int reserved_share(int count, int num_threads) { return count * 3 / 4 / num_threads; }

  // Inside `run`: wait until all threads have come here.
  void barrier();

 private:
  void serve(int thread);

  int num_threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) Event started_;
  // Arrivals at all barriers so far: one cache line tells the last thread that it is the last, and all others that it came.
  alignas(64) std::atomic<uint64_t> num_arrived_{0};
  std::atomic<uint32_t> num_sleepers_{0};
  alignas(64) std::atomic<uint32_t> tickets_{0};
  struct alignas(64) Base {
    uint32_t value = 0;
  };
  std::vector<Base> bases_;
};

// The part of [0, count) that belongs to one of several threads.
struct Range {
  int begin, end;
};
inline Range share(int count, int thread, int num_threads) {
  return {static_cast<int>(int64_t(count) * thread / num_threads),
          static_cast<int>(int64_t(count) * (thread + 1) / num_threads)};
}

}  // namespace coreinfer
