#include "reader_threads.h"

#include <stdexcept>

#include "threads.h"

namespace coreinfer {
namespace {

constexpr int kReaders = 2;

}  // namespace

ReaderThreads::ReaderThreads(const std::function<void()>& work) : num_forks_(num_forks()) {
  for (int i = 0; i < kReaders; ++i) threads_.emplace_back(work);
}

void ReaderThreads::check_there() const {
  if (num_forks() != num_forks_)
    throw std::runtime_error("this process was forked after a bundle was loaded with memory_mb; load it again in it");
}

void ReaderThreads::join() {
  for (std::thread& thread : threads_) {
    // A forked process has none of them.
    if (num_forks() == num_forks_)
      thread.join();
    else
      thread.detach();
  }
}

}  // namespace coreinfer
