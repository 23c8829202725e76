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

 private:
  const uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace coreinfer
