// Rows of a mapped table of which a token needs a few. Pages that were touched stay, until there are too many.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "direct_file.h"
#include "matrix.h"

namespace coreinfer {

class PageWindow {
 public:
  // Parts of the table that are read by blocks of rows: where the first begins, and bytes of a block.
  struct Part {
    const uint8_t* begin;
    size_t block_bytes;
  };

  // Most that a block of a part takes in whole pages.
  static size_t most_bytes(const Part& part) { return (part.block_bytes + kSector - 2) / kSector * kSector + kSector; }

  // Throws std::runtime_error: the file cannot be opened.
  PageWindow(const std::string& path, const uint8_t* mapping, std::vector<Part> parts, int num_blocks,
             size_t limit_bytes);

  // By any thread: a block is about to be read here and there.
  void touch(int block);
  // Between phases, by one thread: let go of all pages if those of the blocks that were touched may be over the limit.
  void settle();
  // Blocks that are read in a row, as many as the limit allows: have them read, and let go of them.
  int blocks_at_once() const;
  void ask_for(int begin, int end) const;
  void bring(int begin, int end) const;
  void let_go(int begin, int end) const;

  uint64_t num_touched() const { return num_touched_; }  // blocks that had to be read from disk, or may have
  size_t block_bytes() const { return block_bytes_; }    // most that a block takes in whole pages

 private:
  template <class Visit>
  void each_range(int begin, int end, Visit visit) const;

  DirectFile file_;
  const uint8_t* mapping_;
  std::vector<Part> parts_;
  int num_blocks_;
  size_t block_bytes_ = 0, limit_;
  std::unique_ptr<std::atomic<uint8_t>[]> touched_;
  std::atomic<int> num_in_{0};
  std::atomic<uint64_t> num_touched_{0};
};

// The parts of a matrix, or of int8-planes its low halves alone.
std::vector<PageWindow::Part> window_parts(const Matrix& w, bool only_lows);

}  // namespace coreinfer
