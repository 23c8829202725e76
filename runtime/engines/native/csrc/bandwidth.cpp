#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace coreinfer {

double read_bandwidth(int num_threads, size_t num_bytes) {
  const Kernels& kernels = find_kernels("auto");
  Threads threads(num_threads);
  Buffer<uint64_t> memory;
  memory.resize(num_bytes / 8);
  std::vector<uint64_t> sums(num_threads);
  double best_seconds = 1e30;
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    threads.run([&](int thread) {
      const size_t words = num_bytes / 8, begin = words * thread / num_threads / 64 * 64,
                   end = words * (thread + 1) / num_threads / 64 * 64;
      sums[thread] += kernels.read_sum(memory.get() + begin, end - begin);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best_seconds = std::min(best_seconds, seconds.count());
  }
  return num_bytes / best_seconds / 1e9;
}

}  // namespace coreinfer
