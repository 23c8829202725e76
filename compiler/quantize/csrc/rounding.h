// Rounding of one matrix: what it reads, and where it puts what a bundle stores (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace coreinfer {

constexpr int kBlockRows = 16;  // output rows that are interleaved
constexpr int kGroup = 32;      // inputs that share a scale

enum class Format { int4, int8, int8_planes };

struct Task {
  Format format;
  int rows;
  int cols;
  bool bf16;                              // else float
  const char* weights;                    // the first of (rows, cols)
  std::ptrdiff_t row_stride, col_stride;  // in bytes
  std::vector<float> importance;          // (32 groups): of each input; 0 in the padding
  uint8_t* codes;                         // (row blocks, groups, 256 or 512); of int8_planes the high halves
  uint8_t* lows;                          // (row blocks, groups, 256); int8_planes only
  uint16_t* scales;                       // (row blocks, groups, 16) fp16
  uint8_t* zeros;                         // (row blocks, groups, 16), zero points in sixteenths; int4 only

  int num_blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  int num_groups() const { return (cols + kGroup - 1) / kGroup; }
  size_t tile_bytes() const { return format == Format::int8 ? 512 : 256; }
};

// What exists once per instruction set. All give the same bits.
struct Rounder {
  const char* name;
  // Round a block of 16 rows; whether all its weights are finite. What is stored of others is not defined.
  bool (*round_block)(const Task& task, int block);
};

const Rounder& portable_rounder();
#if defined(__x86_64__)
const Rounder& avx2_rounder();
const Rounder& avx512_rounder();
#endif

}  // namespace coreinfer
