// Threads that read files while others compute.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace coreinfer {

class ReaderThreads {
 public:
  // Each calls work() once. Two: the disk has the next read while one is done with.
  explicit ReaderThreads(const std::function<void()>& work);
  ReaderThreads(const ReaderThreads&) = delete;
  ReaderThreads& operator=(const ReaderThreads&) = delete;

  // Throws std::runtime_error: the process was forked since they were started, and has none of them.
  void check_there() const;
  // Once, after their work has been told to return.
  void join();

 private:
  const uint32_t num_forks_;
  std::vector<std::thread> threads_;
};

}  // namespace coreinfer
