// Random weights for the kernel test's files.
#pragma once

#include <algorithm>

#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"

namespace coreinfer {

struct Weights {
  Weights(Format format, int rows, int cols) {
    view.format = format;
    view.rows = rows;
    view.cols = cols;
    const size_t tiles = size_t(view.num_blocks()) * view.num_groups();
    bytes.resize(tiles * view.tile_bytes());
    halves.resize(std::max(tiles * kBlockRows, size_t(rows) * cols));
    zeros.resize(tiles * kBlockRows);
    for (size_t i = 0; i < tiles * view.tile_bytes(); ++i) bytes.get()[i] = 1 + generator() % 255;
    for (size_t i = 0; i < tiles * kBlockRows; ++i) {
      halves.get()[i] = float_to_half(0.01f * (1.0f + draw()));
      zeros.get()[i] = generator() % 256;
    }
    lows.resize(tiles * view.tile_bytes());
    for (size_t i = 0; i < tiles * view.tile_bytes(); ++i) lows.get()[i] = generator() % 256;
    view.codes = bytes.get();
    view.lows = lows.get();
    view.scales = halves.get();
    view.zeros = zeros.get();
    if (format != Format::bf16) return;
    for (int i = 0; i < rows * cols; ++i) halves.get()[i] = 0x3f00 + generator() % 256 + (generator() % 2 << 15);
    view.bf16 = halves.get();
  }
  Matrix view;
  Buffer<uint8_t> bytes, zeros, lows;
  Buffer<uint16_t> halves;
};

}  // namespace coreinfer
