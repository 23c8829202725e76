// AVX-512 with VNNI, and for many tokens the tiles of AMX: in codes (kernels_amx_codes.cpp), or for models that have weights
// in bfloat16 16 x 16 sums of products of such numbers, 32 inputs at a time.
//
// Weights are turned into bfloat16 as they are read, once for all tokens; groups and their scales need no care then. With
// weights that are bfloat16 anyway inputs are two of these numbers each, as good as float.
#include "kernels_amx.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((                                                                                           \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#endif

namespace coreinfer {
namespace {

constexpr int kTile = 16;                         // tokens, or rows of weights, of one tile
constexpr int kPair = 2 * kTile;                  // of the two tiles that are worked on together
constexpr int kTileHalves = kBlockRows * kGroup;  // bfloat16 numbers of a tile of inputs

// Weights of a block of 16 rows as (groups, 16 pairs of inputs, 16 rows, 2) bfloat16: one tile a group.
struct Panel {
  Panel(const Matrix& w, int block) : w(w), block(block), tile(size_t(block) * w.num_groups()) {}
  const Matrix& w;
  int block;
  size_t tile;  // number of the block's first
};

// scale * byte + offset for one byte of each row's four.
template <int kByte>
inline __m512 input(__m512i quads, __m512 scale, __m512 offset) {
  const __m512i bytes = _mm512_and_si512(_mm512_srli_epi32(quads, 8 * kByte), _mm512_set1_epi32(255));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(bytes), scale, offset);
}

// Two vectors of 16 rows side by side: the even and the odd one of a pair of inputs.
inline void store_pair(uint16_t* out, __m512 even, __m512 odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_store_si512(out, _mm512_permutexvar_epi16(order, both));
}

// Four inputs of 16 rows, a byte each.
inline void store_quads(uint16_t* out, __m512i quads, __m512 scale, __m512 offset) {
  store_pair(out, input<0>(quads, scale, offset), input<1>(quads, scale, offset));
  store_pair(out + kPair, input<2>(quads, scale, offset), input<3>(quads, scale, offset));
}

void unpack_group(const Panel& panel, int group, uint16_t* out) {
  const Matrix& w = panel.w;
  const size_t tile = panel.tile + group, tile_bytes = w.tile_bytes();
  const uint8_t* codes = w.codes + tile * tile_bytes;
  const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w.scales + tile * kBlockRows)));
  __m512 zero = _mm512_set1_ps(128.0f);
  if (w.format == Format::int4) {
    const __m128i sixteenths = _mm_loadu_si128((const __m128i*)(w.zeros + tile * kBlockRows));
    zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteenths)) * _mm512_set1_ps(1.0f / 16);
  }
  const __m512 offset = _mm512_setzero_ps() - zero * scale;
  if (w.format == Format::int8) {
    for (int quad = 0; quad < 8; ++quad, out += 4 * kTile)
      store_quads(out, _mm512_loadu_si512(codes + quad * 64), scale, offset);
    return;
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int line = 0; line < 4; ++line, out += 8 * kTile) {
    const __m512i bytes = _mm512_loadu_si512(codes + line * 64);
    __m512i first = _mm512_and_si512(bytes, nibble), second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    if (w.format == Format::int8_planes) {
      const __m512i lows = _mm512_loadu_si512(w.lows + tile * tile_bytes + line * 64);
      first = _mm512_or_si512(_mm512_slli_epi16(first, 4), _mm512_and_si512(lows, nibble));
      second = _mm512_or_si512(_mm512_slli_epi16(second, 4), _mm512_and_si512(_mm512_srli_epi16(lows, 4), nibble));
    }
    store_quads(out, first, scale, offset);
    store_quads(out + 4 * kTile, second, scale, offset);
  }
}

// Rows of bfloat16 lie one after the other: pairs of inputs are gathered, a row a lane.
void copy_group(const Panel& panel, int group, uint16_t* out) {
  const Matrix& w = panel.w;
  const int num_rows = std::min(kBlockRows, w.rows - panel.block * kBlockRows);
  const int num_inputs = std::min(kGroup, w.cols - group * kGroup);
  std::memset(out, 0, sizeof(uint16_t) * kTileHalves);
  for (int row = 0; row < num_rows; ++row) {
    const uint16_t* inputs = w.bf16 + size_t(panel.block * kBlockRows + row) * w.cols + group * kGroup;
    for (int i = 0; i < num_inputs; ++i) out[i / 2 * kPair + row * 2 + i % 2] = inputs[i];
  }
}

void unpack(const Panel& panel, uint16_t* out) {
  for (int group = 0; group < panel.w.num_groups(); ++group, out += kTileHalves)
    panel.w.quantized() ? unpack_group(panel, group, out) : copy_group(panel, group, out);
}

// Tiles 0 to 3 are sums (two tiles of tokens by two of rows), 4 and 5 inputs, 6 and 7 weights; all 16 lines of 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {};
  uint8_t lines[16] = {};
  TileConfig() {
    for (int tile = 0; tile < 8; ++tile) line_bytes[tile] = 64, lines[tile] = kTile;
  }
};

// 32 tokens by two panels (or one, where the second is null).
struct Product {
  int stride;  // of the inputs
  const uint16_t* panels[2];
  int num_groups;
};

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void add_products(const Product& p, const uint16_t* inputs) {
  const size_t line = size_t(p.stride) * 2;
  const uint16_t* second_inputs = inputs + size_t(kTile) * p.stride;
  for (int group = 0; group < p.num_groups; ++group) {
    _tile_loadd(4, inputs + group * kGroup, line);
    _tile_loadd(6, p.panels[0] + size_t(group) * kTileHalves, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second_inputs + group * kGroup, line);
    _tile_dpbf16ps(2, 5, 6);
    if (!p.panels[1]) continue;
    _tile_loadd(7, p.panels[1] + size_t(group) * kTileHalves, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums of `num_tokens` tokens (up to 32) by 16 or 32 rows.
inline void store_sums(float* y, size_t y_stride, int num_tokens, int num_panels) {
  if (num_tokens == kPair) {
    _tile_stored(0, y, y_stride * 4);
    _tile_stored(2, y + kTile * y_stride, y_stride * 4);
    if (num_panels == 1) return;
    _tile_stored(1, y + kTile, y_stride * 4);
    _tile_stored(3, y + kTile * y_stride + kTile, y_stride * 4);
    return;
  }
  alignas(64) float sums[kPair][kPair];
  _tile_stored(0, sums[0], sizeof(sums[0]));
  _tile_stored(1, sums[0] + kTile, sizeof(sums[0]));
  _tile_stored(2, sums[kTile], sizeof(sums[0]));
  _tile_stored(3, sums[kTile] + kTile, sizeof(sums[0]));
  for (int t = 0; t < num_tokens; ++t) std::memcpy(y + t * y_stride, sums[t], sizeof(float) * kTile * num_panels);
}

void multiply(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int block_begin,
              int block_end) {
  if (!x.bf16) {
    // A tile of weights is that of all tokens, which may read other bits of it.
    const bool in_tiles = w.quantized() && num_tokens >= kAmxLeastTokens && !x.bits;
    const auto multiply_codes = in_tiles ? amx_multiply_codes : avx512_kernels().multiply;
    return multiply_codes(w, x, num_tokens, y, y_stride, block_begin, block_end);
  }
  const size_t panel_halves = size_t(w.num_groups()) * kTileHalves;
  const std::unique_ptr<uint16_t, decltype(&std::free)> memory(
      static_cast<uint16_t*>(std::aligned_alloc(64, 2 * panel_halves * sizeof(uint16_t))), &std::free);
  uint16_t* panels = memory.get();
  if (!panels) throw std::bad_alloc();
  const TileConfig config;
  configure_tiles(&config);
  for (int block = block_begin; block < block_end; block += 2) {
    const int num_panels = std::min(2, block_end - block);
    for (int i = 0; i < num_panels; ++i) unpack(Panel(w, block + i), panels + i * panel_halves);
    const Product product = {x.stride, {panels, num_panels == 2 ? panels + panel_halves : nullptr}, w.num_groups()};
    for (int t = 0; t < num_tokens; t += kPair) {
      const size_t first = size_t(t) * x.stride;
      clear();
      add_products(product, x.bf16 + first);
      if (!w.quantized()) add_products(product, x.rests + first);
      store_sums(y + t * y_stride + block * kBlockRows, y_stride, std::min(kPair, num_tokens - t), num_panels);
    }
  }
  _tile_release();
}

void round_token(const Activations& x, int num_values) {
  for (int i = 0; i < num_values; i += kTile) {
    const __m512 values = _mm512_loadu_ps(x.values + i);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(values);
    const __m512 floats = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    _mm256_storeu_si256((__m256i*)(x.bf16 + i), rounded);
    _mm256_storeu_si256((__m256i*)(x.rests + i), (__m256i)_mm512_cvtneps_pbh(values - floats));
  }
}

void quantize(const Activations& all, int num_values, int num_tokens) {
  if (!all.bf16) return avx512_kernels().quantize(all, num_values, num_tokens);
  for (int t = 0; t < num_tokens; ++t) round_token(all.token(t), num_values);
}

}  // namespace

bool may_use_amx() {
#if defined(__linux__)
  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux gives tiles' memory only to those who ask.
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels kernels = avx512_kernels();
    kernels.name = "amx";
    kernels.quantize = quantize;
    kernels.multiply = multiply;
    kernels.rounds_to_bf16 = true;
    return kernels;
  }();
  return table;
}

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
