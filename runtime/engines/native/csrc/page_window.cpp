#include "page_window.h"

#include <sys/mman.h>

#include <algorithm>

namespace coreinfer {
namespace {

constexpr int kLeastBlocks = 16;  // of a window, whatever its limit

#ifndef MADV_POPULATE_READ
constexpr int MADV_POPULATE_READ = 22;
#endif

}  // namespace

PageWindow::PageWindow(const std::string& path, const uint8_t* mapping, std::vector<Part> parts, int num_blocks,
                       size_t limit_bytes)
    : file_(path),
      mapping_(mapping),
      parts_(std::move(parts)),
      num_blocks_(num_blocks),
      limit_(limit_bytes),
      touched_(new std::atomic<uint8_t>[num_blocks]()) {
  for (const Part& part : parts_) block_bytes_ += most_bytes(part);
  each_range(0, num_blocks_, [](uint8_t* begin, size_t num_bytes, uint64_t) {
  // Else a page that is touched brings its neighbours along.
#ifdef MADV_NOHUGEPAGE
    madvise(begin, num_bytes, MADV_NOHUGEPAGE);
#endif
    madvise(begin, num_bytes, MADV_RANDOM);
  });
  let_go(0, num_blocks_);
}

// Call visit(start, bytes, offset in the file) for the whole pages that hold blocks [begin, end) of each part.
template <class Visit>
void PageWindow::each_range(int begin, int end, Visit visit) const {
  for (const Part& part : parts_) {
    const size_t place = part.begin - mapping_;
    const size_t first = (place + part.block_bytes * begin) / kSector * kSector;
    const size_t last = (place + part.block_bytes * end + kSector - 1) / kSector * kSector;
    visit(const_cast<uint8_t*>(mapping_) + first, last - first, uint64_t(first));
  }
}

void PageWindow::touch(int block) {
  if (touched_[block].exchange(1, std::memory_order_relaxed)) return;
  num_in_.fetch_add(1, std::memory_order_relaxed);
  num_touched_.fetch_add(1, std::memory_order_relaxed);
}

void PageWindow::settle() {
  if (size_t(num_in_.load()) <= std::max<size_t>(kLeastBlocks, limit_ / block_bytes_)) return;
  let_go(0, num_blocks_);
  for (int block = 0; block < num_blocks_; ++block) touched_[block].store(0, std::memory_order_relaxed);
  num_in_ = 0;
}

int PageWindow::blocks_at_once() const {
  // Half: the next are read meanwhile.
  return static_cast<int>(std::max<size_t>(kLeastBlocks, limit_ / block_bytes_ / 2));
}

void PageWindow::ask_for(int begin, int end) const {
  end = std::min(end, num_blocks_);
  if (begin >= end) return;
  each_range(begin, end, [&](uint8_t*, size_t num_bytes, uint64_t offset) { file_.read_ahead(offset, num_bytes); });
}

void PageWindow::bring(int begin, int end) const {
  each_range(begin, end, [&](uint8_t* start, size_t num_bytes, uint64_t offset) {
    file_.read_ahead(offset, num_bytes);
    madvise(start, num_bytes, MADV_POPULATE_READ);
  });
}

void PageWindow::let_go(int begin, int end) const {
  each_range(begin, end, [&](uint8_t* start, size_t num_bytes, uint64_t offset) {
    madvise(start, num_bytes, MADV_DONTNEED);
    file_.forget(offset, num_bytes);
  });
}

std::vector<PageWindow::Part> window_parts(const Matrix& w, bool only_lows) {
  const size_t tiles = w.num_groups();
  if (only_lows) return {{w.lows, tiles * w.tile_bytes()}};
  if (!w.quantized()) return {{reinterpret_cast<const uint8_t*>(w.bf16), size_t(kBlockRows) * w.cols * 2}};
  std::vector<PageWindow::Part> parts{{w.codes, tiles * w.tile_bytes()},
                                      {reinterpret_cast<const uint8_t*>(w.scales), tiles * kBlockRows * 2}};
  if (w.zeros) parts.push_back({w.zeros, tiles * kBlockRows});
  if (w.lows) parts.push_back({w.lows, tiles * w.tile_bytes()});
  return parts;
}

}  // namespace coreinfer
