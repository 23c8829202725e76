// Threads that share work, wait for each other, and outlive a fork.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "../../runtime/engines/native/csrc/scratch.h"
#include "../../runtime/engines/native/csrc/threads.h"
#include "checks.h"

using namespace coreinfer;

namespace {

// Every block of every deal is worked on once, whoever is quick, and before the barrier ends.
void test_deal() {
  constexpr int kMostBlocks = 200;
  for (int num_threads : {1, 2, 3, 7}) {
    Threads threads(num_threads);
    std::vector<int> times(kMostBlocks);
    for (int count : {0, 1, 2, 5, 16, 37, kMostBlocks}) {
      for (int slow = 0; slow < num_threads; ++slow)
        threads.run([&](int thread) {
          for (int round = 0; round < 20; ++round) {
            threads.deal(thread, count, [&](int begin, int end) {
              if (thread == slow) std::this_thread::yield();
              for (int i = begin; i < end; ++i) ++times[i];
            });
            threads.barrier(thread);
          }
        });
      for (int i = 0; i < kMostBlocks; ++i)
        if (times[i] != (i < count ? 20 * num_threads : 0)) ++num_failures;
      std::fill(times.begin(), times.end(), 0);
    }
  }
  std::printf("deals: %s\n", num_failures == 0 ? "whole" : "WRONG");
}

// No thread leaves a barrier before the last has come, whether the others spin, yield or sleep until then: on free cores,
// and beside threads that never give theirs back.
void test_waits() {
  const int before = num_failures;
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (bool beside : {false, true}) {
    for (unsigned core = 0; beside && core < std::thread::hardware_concurrency(); ++core)
      busy.emplace_back([&] {
        while (!stop) continue;
      });
    for (int num_threads : {2, 5}) {
      Threads threads(num_threads);
      std::vector<int> rounds(num_threads);
      std::atomic<int> num_early{0};
      threads.run([&](int thread) {
        for (int round = 1; round <= 60; ++round) {
          const int microseconds[] = {0, 50, 400, 3000};
          if (round % num_threads == thread)
            std::this_thread::sleep_for(std::chrono::microseconds(microseconds[round % 4]));
          rounds[thread] = round;
          threads.barrier(thread);
          for (int other : rounds) num_early += other != round;
          threads.barrier(thread);
        }
      });
      num_failures += num_early;
    }
  }
  stop = true;
  for (std::thread& thread : busy) thread.join();
  std::printf("waits: %s\n", num_failures == before ? "kept" : "WRONG");
}

// A forked process, which has but the thread that forked, goes on with threads of its own, and so does its parent.
void test_fork() {
#if defined(__unix__) || defined(__APPLE__)
  const int before = num_failures;
  Threads threads(3);
  std::atomic<int> num_calls{0};
  const auto work = [&] {
    threads.run([&](int thread) {
      threads.deal(thread, 37, [&](int begin, int end) { num_calls += end - begin; });
      threads.barrier(thread);
      threads.deal(thread, 5, [&](int begin, int end) { num_calls += end - begin; });
    });
    return num_calls.exchange(0) == 42;
  };
  if (!work()) ++num_failures;
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(work() && work() ? 0 : 1);
  }
  int status = 1;
  if (waitpid(child, &status, 0) != child || status != 0 || !work()) ++num_failures;
  std::printf("forks: %s\n", num_failures == before ? "work" : "WRONG");
#endif
}

}  // namespace

void test_threads() {
  test_deal();
  test_waits();
  test_fork();
}
