#include "threads.h"

#include <climits>
#include <stdexcept>
#include <string>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace coreinfer {
namespace {

// More would draw in vain from most.
constexpr int kMostHelped = 4;

bool has_core_for_each(int num_threads) {
  const unsigned num_cores = std::thread::hardware_concurrency();  // 0 where it is not known
  return num_cores == 0 || static_cast<unsigned>(num_threads) <= num_cores;
}

int checked(int num_threads) {
  if (num_threads < 1 || num_threads > 256)
    throw std::invalid_argument("threads: expected 1 to 256, got " + std::to_string(num_threads));
  return num_threads;
}

std::atomic<uint32_t> forks{0};
#if defined(__unix__) || defined(__APPLE__)
// Runs in the child only. Without memory for it the count stays 0, and a forked process waits for threads that it lacks.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { ++forks; });
#endif

#if defined(__linux__)
// A futex is the low half of the counter.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half comes first");

template <class Counter>
void sleep_while(Counter& counter, uint32_t value) {
  syscall(SYS_futex, &counter, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
template <class Counter>
void wake_all(Counter& counter) {
  syscall(SYS_futex, &counter, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Ask the scheduler for short time slices. A thread that waits at a barrier sleeps and wakes thousands of times a second;
// with a short slice Linux 6.12 and later lets it run at once where a busy neighbour has the core, instead of when the
// neighbour's slice of some milliseconds ends. The thread's share of the core stays what it is.
void ask_for_short_slices() {
  thread_local bool asked = false;
  if (asked) return;
  asked = true;
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_nanoseconds, deadline, period;
  } attributes{};
  attributes.size = sizeof attributes;
  attributes.nice = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
  attributes.runtime_nanoseconds = 100'000;
  // Older kernels ignore the slice, and where it is forbidden nothing is lost but speed beside a neighbour.
  constexpr int kOther = 0;
  if (syscall(SYS_sched_getscheduler, 0) == kOther) syscall(SYS_sched_setattr, 0, &attributes, 0);
}
#else
void ask_for_short_slices() {}
template <class Counter>
void sleep_while(Counter&, uint32_t) {
  std::this_thread::yield();
}
template <class Counter>
void wake_all(Counter&) {}
#endif

}  // namespace

uint32_t num_forks() { return forks.load(std::memory_order_relaxed); }

void Event::advance() {
  // Sequentially consistent with the sleeper's count, so that either side sees the other.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (num_sleepers_.load(std::memory_order_seq_cst) != 0) wake_all(value_);
}

void Event::wait_beyond(uint32_t seen, Patience& patience) {
  if (patience.sees([&] { return value() != seen; })) return;
  num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == seen) sleep_while(value_, seen);
  num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

Threads::Threads(int num_threads)
    : num_threads_(checked(num_threads)),
      num_helped_(std::min(num_threads, kMostHelped)),
      tickets_(num_threads),
      own_(num_threads, {0, Patience(has_core_for_each(num_threads))}) {
  start();
}

Threads::~Threads() {
  if (num_forks_ != num_forks()) forget();
  stop_ = true;
  started_.advance();
  for (auto& worker : workers_) worker.join();
}

void Threads::start() {
  num_forks_ = num_forks();
  for (int thread = 1; thread < num_threads_; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

void Threads::forget() {
  // To join or to detach a thread of another process is undefined, so what stands for them is never destroyed.
  new std::vector<std::thread>(std::move(workers_));
  workers_.clear();
  started_.reset();
  num_arrived_ = num_sleepers_ = 0;
  for (Tickets& drawn : tickets_) drawn.value = 0;
  for (Own& own : own_) own = {0, Patience(has_core_for_each(num_threads_))};
}

void Threads::run(const std::function<void(int)>& work) {
  if (num_forks_ != num_forks()) {
    forget();
    start();
  }
  if (num_threads_ > 1) ask_for_short_slices();
  work_ = &work;
  started_.advance();
  work(0);
  barrier(0);  // nobody may still run `work` when it goes out of scope
}

void Threads::serve(int thread) {
  ask_for_short_slices();
  // Event values only grow by one a run, and no run begins before all threads ended the last.
  for (uint32_t seen = 0;; ++seen) {
    started_.wait_beyond(seen, own_[thread].patience);
    if (stop_) return;
    (*work_)(thread);
    barrier(thread);
  }
}

void Threads::barrier(int thread) {
  // Sequentially consistent with the sleepers' count, as in Event.
  const uint64_t before = num_arrived_.fetch_add(1, std::memory_order_seq_cst);
  const uint64_t target = (before / num_threads_ + 1) * num_threads_;
  if (before + 1 == target) {
    if (num_sleepers_.load(std::memory_order_seq_cst) != 0) wake_all(num_arrived_);
    return;
  }
  if (own_[thread].patience.sees([&] { return num_arrived_.load(std::memory_order_acquire) >= target; })) return;
  num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
  for (uint64_t seen; (seen = num_arrived_.load(std::memory_order_seq_cst)) < target;)
    sleep_while(num_arrived_, static_cast<uint32_t>(seen));
  num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace coreinfer
