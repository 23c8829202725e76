// Reading past the page cache where the file system can, and after it where it cannot.
#include "direct_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace coreinfer {
namespace {

// Whether a direct read works: some file systems open a file so and then refuse to read it.
bool can_read(int descriptor) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kSector, kSector) != 0) return false;
  const bool can = pread(descriptor, memory, kSector, 0) >= 0;
  free(memory);
  return can;
}

}  // namespace

DirectFile::DirectFile(const std::string& path) {
#ifdef O_DIRECT
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  is_direct_ = descriptor_ >= 0 && can_read(descriptor_);
  if (descriptor_ >= 0 && !is_direct_) close(descriptor_);
#endif
  if (!is_direct_) descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw std::runtime_error(path + ": cannot be opened (" + std::strerror(errno) + ")");
}

DirectFile::~DirectFile() { close(descriptor_); }

bool DirectFile::read(uint64_t offset, size_t num_bytes, size_t num_needed, uint8_t* to) const {
  size_t done = 0;
  while (done < num_needed) {
    const ssize_t count = pread(descriptor_, to + done, num_bytes - done, static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    // A direct read that stops within a sector has come to the end of the file.
    if (is_direct_ && count % kSector && done + count < num_needed) return false;
    done += static_cast<size_t>(count);
  }
  if (!is_direct_) forget(offset, num_bytes);
  return true;
}

void DirectFile::forget(uint64_t offset, size_t num_bytes) const {
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(num_bytes), POSIX_FADV_DONTNEED);
#endif
}

void DirectFile::read_ahead(uint64_t offset, size_t num_bytes) const {
#ifdef POSIX_FADV_WILLNEED
  posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(num_bytes), POSIX_FADV_WILLNEED);
#endif
}

}  // namespace coreinfer
