// Views of weights and activations in the layouts that the kernels read (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace coreinfer {

constexpr int kBlockRows = 16;  // output rows that are interleaved
constexpr int kGroup = 32;      // inputs that share a scale
// Groups whose products are summed by themselves: sums of int4 and int8 are sums of these, in their order, whoever computes
// them (`has_segments`).
constexpr int kSegmentGroups = 32;

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kPartGroups = 16;  // groups of a row that lie beside each other, in int4_rows
constexpr int kPartBytes = 304;  // 256 of codes, 32 of scales, 16 of zero points

// int8_planes is int8 with the high and the low halves of the bytes apart, so that the high ones can be read alone.
// int4_rows is int4 with each row in one piece, so that some rows can be read alone.
enum class Format { bf16, int8, int4, int8_planes, int4_rows };

constexpr bool has_segments(Format format) { return format == Format::int4 || format == Format::int8; }

// A weight matrix (rows, cols) of a mapped file, or of memory that the owner keeps alive.
struct Matrix {
  Format format = Format::bf16;
  int rows = 0;
  int cols = 0;
  const uint16_t* bf16 = nullptr;    // (rows, cols), row-major
  const uint8_t* codes = nullptr;    // (row blocks, groups, 256 or 512); of int8_planes the high halves, as of int4; of
                                     // int4_rows (rows, parts, 304), and nothing else
  const uint8_t* lows = nullptr;     // (row blocks, groups, 256); int8_planes only
  const uint16_t* scales = nullptr;  // (row blocks, groups, 16) fp16
  const uint8_t* zeros = nullptr;    // (row blocks, groups, 16), zero points in sixteenths; int4 only

  bool empty() const { return rows == 0; }
  int num_blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  int num_groups() const { return (cols + kGroup - 1) / kGroup; }
  int num_parts() const { return (num_groups() + kPartGroups - 1) / kPartGroups; }  // of a row; int4_rows only
  size_t row_bytes() const { return size_t(num_parts()) * kPartBytes; }
  const uint8_t* row(int index) const { return codes + index * row_bytes(); }
  bool quantized() const { return format != Format::bf16; }
  size_t tile_bytes() const { return format == Format::int8 ? 512 : 256; }
  size_t num_bytes() const {
    if (empty()) return 0;
    if (!quantized()) return size_t(rows) * cols * 2;
    if (format == Format::int4_rows) return rows * row_bytes();
    const size_t tiles = size_t(num_blocks()) * num_groups();
    const size_t low_bytes = format == Format::int8_planes ? tile_bytes() : 0;
    return tiles * (tile_bytes() + low_bytes + kBlockRows * (format == Format::int4 ? 3 : 2));
  }
  // Blocks of rows [begin, end) as a matrix of their own.
  Matrix rows_from(int begin, int end) const {
    Matrix part = *this;
    part.rows = (end < num_blocks() ? end * kBlockRows : rows) - begin * kBlockRows;
    if (!quantized()) {
      part.bf16 += size_t(begin) * kBlockRows * cols;
      return part;
    }
    const size_t tile = size_t(begin) * num_groups();
    part.codes += tile * tile_bytes();
    part.scales += tile * kBlockRows;
    if (zeros) part.zeros += tile * kBlockRows;
    if (lows) part.lows += tile * tile_bytes();
    return part;
  }
  // What reading the high halves and the scales alone takes.
  size_t screening_bytes() const { return size_t(num_blocks()) * num_groups() * (tile_bytes() + kBlockRows * 2); }
};

// What an input reads of its int4 weights: all four bits of each code, or the two high ones, with the mean of what the low
// ones may be in their place.
constexpr uint8_t kAllBits = 15, kHighBits = 12;
constexpr float kLowMean = 1.5f;
// What an input's |x| times its column's norm must pass to be wanted, and to read all bits.
struct Thresholds {
  float wanted = -1.0f, whole = -1.0f;  // below 0: all are wanted
};

// Inputs of a matrix for one or more tokens. `stride` is a multiple of 32, padded with zeros.
struct Activations {
  int stride = 0;
  float* values = nullptr;    // (tokens, stride)
  int8_t* codes = nullptr;    // (tokens, stride)
  float* scales = nullptr;    // (tokens, stride / 32)
  float* sums = nullptr;      // (tokens, stride / 32): sum of a group's codes / 16
  float* energies = nullptr;  // (tokens, stride / 32): sum of a group's squared inputs
  uint16_t* bf16 = nullptr;   // (tokens, stride); in the place of codes where it is not null (Kernels::rounds_to_bf16)
  uint16_t* rests = nullptr;  // (tokens, stride): what that rounding leaves, for weights that are not quantized
  uint8_t* bits = nullptr;    // (tokens, stride): kAllBits or kHighBits; null where all inputs read all bits
  float* low_sums = nullptr;  // (tokens, stride / 32): of codes that read kHighBits, times kLowMean; null as `bits`

  // The same inputs where all of them read all bits.
  Activations whole() const {
    Activations all = *this;
    all.bits = nullptr;
    return all;
  }
  Activations token(int index) const { return from(size_t(index) * stride); }
  // From a value on, whose number is a multiple of 32.
  Activations from(size_t first) const {
    const size_t group = first / kGroup;
    return {stride,
            values + first,
            codes + first,
            scales + group,
            sums + group,
            energies + group,
            bf16 ? bf16 + first : nullptr,
            bf16 ? rests + first : nullptr,
            bits ? bits + first : nullptr,
            bits ? low_sums + group : nullptr};
  }
};

}  // namespace coreinfer
