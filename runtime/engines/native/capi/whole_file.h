// A file in memory, for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace coreinfer {

class WholeFile {
 public:
  // Throws Failure: it is missing, empty, or cannot be read.
  explicit WholeFile(const std::string& path);
  ~WholeFile();
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }
  const std::string& path() const { return path_; }

  // Let go of pages that are in memory; they are read again when they are needed.
  void forget() const { forget(0, num_bytes_); }
  void forget(size_t from, size_t num_bytes) const;

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace coreinfer
