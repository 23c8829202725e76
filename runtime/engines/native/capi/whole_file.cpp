#include "whole_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "coreinfer.h"
#include "failure.h"

namespace coreinfer {
namespace {

constexpr size_t kPageBytes = 1 << 16;  // a multiple of every system's

}  // namespace

WholeFile::WholeFile(const std::string& path) : path_(path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0)
    throw Failure(errno == ENOENT || errno == ENOTDIR ? COREINFER_NOT_FOUND : COREINFER_CORRUPT,
                  path + ": cannot be read (" + std::strerror(errno) + ")");
  struct stat status = {};
  void* mapped = MAP_FAILED;
  if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0)
    mapped = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (mapped == MAP_FAILED)
    throw Failure(COREINFER_CORRUPT, path + ": expected a file that can be mapped, got another");
  data_ = static_cast<const uint8_t*>(mapped);
  num_bytes_ = size_t(status.st_size);
#ifdef MADV_HUGEPAGE
  madvise(mapped, num_bytes_, MADV_HUGEPAGE);  // a hint: nothing is lost but speed where it is refused
#endif
}

void WholeFile::forget(size_t from, size_t num_bytes) const {
  const size_t begin = from / kPageBytes * kPageBytes;
  madvise(const_cast<uint8_t*>(data_) + begin, from - begin + num_bytes, MADV_DONTNEED);
#ifdef POSIX_FADV_DONTNEED
  // Only out of the process would leave them in the system's cache, which counts too.
  const int descriptor = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return;
  posix_fadvise(descriptor, static_cast<off_t>(begin), static_cast<off_t>(from - begin + num_bytes),
                POSIX_FADV_DONTNEED);
  close(descriptor);
#endif
}

WholeFile::~WholeFile() { munmap(const_cast<uint8_t*>(data_), num_bytes_); }

}  // namespace coreinfer
