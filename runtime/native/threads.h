// A few persistent threads that work in phases.
#pragma once

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

  // Inside `run`: wait until all threads have come here.
  void barrier();

 private:
  void serve(int thread);

  int num_threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) Event started_;
  alignas(64) Event phase_;
  alignas(64) std::atomic<int> num_arrived_{0};
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
