// A file that is read past the system's page cache, into memory of whoever reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace coreinfer {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kSector = 4096;  // places, sizes and memory of such reads are multiples of it

// What so many bytes take in memory: whole huge pages where that wastes little.
inline size_t in_huge_pages(size_t num_bytes) {
  const size_t whole = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
  return whole - num_bytes <= num_bytes / 16 ? whole : num_bytes;
}

class DirectFile {
 public:
  // Throws std::runtime_error: it cannot be opened.
  explicit DirectFile(const std::string& path);
  ~DirectFile();
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  // Read at least `num_needed` bytes from `offset` on, and up to `num_bytes`, which may go past the end. False if it fails.
  bool read(uint64_t offset, size_t num_bytes, size_t num_needed, uint8_t* to) const;
  // Have the system forget pages of the file that it keeps, and have it read pages ahead.
  void forget(uint64_t offset, size_t num_bytes) const;
  void read_ahead(uint64_t offset, size_t num_bytes) const;
  // Whether reads go past the page cache; else what they put there is let go after each.
  bool is_direct() const { return is_direct_; }

 private:
  int descriptor_ = -1;
  bool is_direct_ = false;
};

}  // namespace coreinfer
