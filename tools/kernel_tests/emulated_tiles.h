// The tiles of AMX for CPUs without: tools/test-kernels.sh -DCOREINFER_EMULATE_TILES -include tools/kernel_tests/emulated_tiles.h
// builds the kernels of AMX with these in place of the instructions. Shapes follow the configuration, as on the CPU.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulated_tiles {

constexpr int kNumTiles = 8, kMostLines = 16, kMostBytes = 64;

struct Tile {
  int num_lines = 0, line_bytes = 0;
  uint8_t lines[kMostLines][kMostBytes] = {};
  template <class Number>
  Number* line(int number) {
    return reinterpret_cast<Number*>(lines[number]);
  }
  int num_columns() const { return line_bytes / 4; }
};

inline Tile& tile(int number) {
  static thread_local Tile tiles[kNumTiles];
  return tiles[number];
}

// Palette, first line and 14 bytes more; then each tile's bytes of a line, and each tile's lines.
inline void configure(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  for (int number = 0; number < kNumTiles; ++number) {
    uint16_t line_bytes;
    std::memcpy(&line_bytes, bytes + 16 + 2 * number, 2);
    tile(number) = Tile();
    tile(number).line_bytes = line_bytes;
    tile(number).num_lines = bytes[48 + number];
  }
}

inline void release() {
  for (int number = 0; number < kNumTiles; ++number) tile(number) = Tile();
}

inline void zero(int number) { std::memset(tile(number).lines, 0, sizeof tile(number).lines); }

inline void load(int number, const void* from, size_t stride) {
  zero(number);
  for (int i = 0; i < tile(number).num_lines; ++i)
    std::memcpy(tile(number).lines[i], static_cast<const uint8_t*>(from) + i * stride, tile(number).line_bytes);
}

inline void store(int number, void* to, size_t stride) {
  for (int i = 0; i < tile(number).num_lines; ++i)
    std::memcpy(static_cast<uint8_t*>(to) + i * stride, tile(number).lines[i], tile(number).line_bytes);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_bf16(int sums, int inputs, int weights) {
  for (int m = 0; m < tile(sums).num_lines; ++m)
    for (int n = 0; n < tile(sums).num_columns(); ++n)
      for (int k = 0; k < tile(inputs).num_columns(); ++k)
        for (int i = 0; i < 2; ++i)
          tile(sums).line<float>(m)[n] += from_bf16(tile(inputs).line<uint16_t>(m)[2 * k + i]) *
                                          from_bf16(tile(weights).line<uint16_t>(k)[2 * n + i]);
}

inline void multiply_bytes(int sums, int inputs, int weights) {
  for (int m = 0; m < tile(sums).num_lines; ++m)
    for (int n = 0; n < tile(sums).num_columns(); ++n)
      for (int k = 0; k < tile(inputs).num_columns(); ++k)
        for (int i = 0; i < 4; ++i)
          tile(sums).line<int32_t>(m)[n] +=
              tile(inputs).line<int8_t>(m)[4 * k + i] * tile(weights).line<uint8_t>(k)[4 * n + i];
}

}  // namespace emulated_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig emulated_tiles::configure
#define _tile_release emulated_tiles::release
#define _tile_zero emulated_tiles::zero
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_dpbf16ps emulated_tiles::multiply_bf16
#define _tile_dpbsud emulated_tiles::multiply_bytes
#endif
