// A few persistent threads that work in phases.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace coreinfer {

// The part of [0, count) that belongs to one of several threads.
struct Range {
  int begin, end;
};
inline Range share(int count, int thread, int num_threads) {
  return {static_cast<int>(int64_t(count) * thread / num_threads),
          static_cast<int>(int64_t(count) * (thread + 1) / num_threads)};
}

// How one thread waits before it sleeps. It spins for a few microseconds, as long as a phase's imbalance. Then it offers its
// core to others between two looks: a thread that it waits for may want that very core, as with more threads than cores
// or another engine beside this one, and that one gives it back as soon as it waits itself. A program that computes without
// a pause does not: it keeps the core for a whole time slice. A thread that loses slices in a row is wary for a while: it
// spins instead, for longer than it takes to wake a thread, so that one sleep does not bring on the next.
class Patience {
 public:
  // With more threads than cores none has a core to spin on.
  explicit Patience(bool may_be_wary) : may_be_wary_(may_be_wary) {}

  // Look at done() until it holds or it is time to sleep; whether it holds.
  template <class Done>
  bool sees(Done done) {
    if (spin(done)) return true;
    Clock::time_point now = Clock::now();
    for (int offer = 0; now >= wary_until_ && offer < kOffers; ++offer) {
      if (done()) return true;
      std::this_thread::yield();
      const Clock::time_point back = Clock::now();
      if (back - now > kSlice) lose_slice(back);
      now = back;
    }
    if (now < wary_until_)
      for (const Clock::time_point end = now + kWarySpin; now < end; now = Clock::now())
        if (spin(done)) return true;
    return done();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kSpins = 100, kOffers = 500, kMostLost = 3;
  static constexpr std::chrono::microseconds kWarySpin{160};
  static constexpr std::chrono::milliseconds kSlice{1}, kInARow{20}, kWaryFor{200};

  template <class Done>
  static bool spin(Done done) {
    for (int turn = 0; turn < kSpins; ++turn) {
      if (done()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
    return false;
  }

  void lose_slice(Clock::time_point now) {
    num_lost_ = now - last_lost_ < kInARow ? num_lost_ + 1 : 1;
    last_lost_ = now;
    if (may_be_wary_ && num_lost_ >= kMostLost) wary_until_ = now + kWaryFor;
  }

  bool may_be_wary_;
  int num_lost_ = 0;
  Clock::time_point last_lost_{}, wary_until_{};
};

// How often this process or one that it comes from was forked while it had the engine. A forked process has one thread only.
uint32_t num_forks();

// Waits for a counter to change, in the end asleep in the kernel.
class Event {
 public:
  void reset() { value_ = num_sleepers_ = 0; }
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  void wait_beyond(uint32_t seen, Patience& patience);

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

  // Call work(thread) on every thread and return when all are done. `work` must not throw. In a process that was forked
  // since the last run the threads are started anew.
  void run(const std::function<void(int)>& work);

  // Inside `run`: call work(begin, end) so that all threads' calls together cover [0, count). Each thread goes through an
  // unbroken range of its own, so that its reads run on; the last quarter of it is cut into parts that another thread may
  // take when it has done its own, because cores are never equally fast. A part is drawn while the one before it is still
  // to be done, and announced by ahead(begin) where it is another thread's: what it reads first can be asked for.
  // All threads must deal the same counts in the same order, with a barrier between two deals.
  template <class Work, class Ahead>
  void deal(int thread, int count, Work work, Ahead ahead) {
    uint32_t& base = own_[thread].base;
    int helped = 0;
    const auto draw = [&]() -> Range {
      for (; helped < num_helped_; ++helped) {
        const int owner = (thread + helped) % num_threads_;
        const int part = static_cast<int>(tickets_[owner].value.fetch_add(1, std::memory_order_relaxed) - base);
        if (part < kParts) return open_part(share(count, owner, num_threads_), part);
      }
      return {0, 0};
    };
    const Range own = share(count, thread, num_threads_);
    Range now = {own.begin, reserved_end(own)};
    for (bool more = true; more;) {
      const Range next = draw();
      more = helped < num_helped_;
      if (more && helped > 0) ahead(next.begin);
      if (now.begin < now.end) work(now.begin, now.end);
      now = next;
    }
    // Every thread that draws from a range does so in vain once.
    base += kParts + num_helped_;
  }
  template <class Work>
  void deal(int thread, int count, Work work) {
    deal(thread, count, work, [](int) {});
  }

  // Inside `run`: wait until all threads have come here.
  void barrier(int thread);

 private:
  static constexpr int kParts = 4;  // that the last quarter of a thread's range is cut into

  void start();
  // In a forked process: let go of the parent's threads, and of what had been counted.
  void forget();
  void serve(int thread);
  static int reserved_end(Range own) { return own.begin + (own.end - own.begin) * 3 / 4; }
  static Range open_part(Range own, int part) {
    const int first = reserved_end(own);
    const Range within = share(own.end - first, part, kParts);
    return {first + within.begin, first + within.end};
  }

  int num_threads_;
  int num_helped_;  // ranges that a thread draws from, its own among them
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  uint32_t num_forks_;  // when the workers were started
  alignas(64) Event started_;
  // Arrivals at all barriers so far: one cache line tells the last thread that it is the last, and all others that it came.
  alignas(64) std::atomic<uint64_t> num_arrived_{0};
  std::atomic<uint32_t> num_sleepers_{0};
  struct alignas(64) Tickets {
    std::atomic<uint32_t> value{0};
  };
  std::vector<Tickets> tickets_;  // a thread's: how many of its parts were drawn
  // What only the thread itself reads and writes.
  struct alignas(64) Own {
    uint32_t base;  // where the tickets of its next deal begin
    Patience patience;
  };
  std::vector<Own> own_;
};

}  // namespace coreinfer
