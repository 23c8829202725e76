// Tiles of AMX for several tokens whose inputs are codes: sums of products of bytes, exact in 32 bits. What follows on them
// is done in the order of the kernels for one token, so that a token's products are theirs to the bit.
//
// A product of tiles is 16 lines of inputs, a token each, by 16 rows of weights, over the 32 inputs of a group.
#include "kernels_amx.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,avx2,fma,f16c")
#endif

namespace coreinfer {
namespace {

constexpr int kLines = 16;
constexpr int kGroupBytes = kBlockRows * kGroup;

enum class Codes { nibbles, bytes, planes };

// Tiles 0 and 1 are sums, 4 and 5 inputs, 6 and 7 weights (fours of inputs x 16 rows x 4).
struct CodesConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {};
  uint8_t lines[16] = {};
  CodesConfig() {
    for (int tile = 0; tile < 8; ++tile) {
      line_bytes[tile] = tile == 4 || tile == 5 ? kGroup : 64;
      lines[tile] = tile < 6 ? kLines : kGroup / 4;
    }
  }
};

// The codes of a block of 16 rows, and what makes numbers of them.
struct BlockCodes {
  BlockCodes(const Matrix& w, int block) : num_groups(w.num_groups()) {
    const size_t tile = size_t(block) * num_groups;
    codes = w.codes + tile * w.tile_bytes();
    if (w.lows) lows = w.lows + tile * w.tile_bytes();
    scales = w.scales + tile * kBlockRows;
    if (w.zeros) zeros = w.zeros + tile * kBlockRows;
  }
  int num_groups;
  const uint8_t *codes, *lows = nullptr;
  const uint16_t* scales;
  const uint8_t* zeros = nullptr;
};

template <Codes kCodes>
constexpr int kStored = kCodes == Codes::bytes ? 512 : 256;  // bytes of a group, of one plane

// A group's bytes in the order of a tile of weights.
template <Codes kCodes>
inline void unpack(const BlockCodes& block, int group, uint8_t* out) {
  const uint8_t* codes = block.codes + size_t(group) * kStored<kCodes>;
  for (int line = 0; line < kStored<kCodes>; line += 64) __builtin_prefetch(codes + 3072 + line);
  const __m512i nibble = _mm512_set1_epi8(15), high_nibble = _mm512_set1_epi8(-16);
  for (int line = 0; line < 4; ++line) {
    const __m512i both = _mm512_loadu_si512(codes + line * 64);
    __m512i first, second;
    if (kCodes == Codes::planes) {
      const __m512i lows = _mm512_loadu_si512(block.lows + size_t(group) * 256 + line * 64);
      first = _mm512_ternarylogic_epi32(high_nibble, _mm512_slli_epi16(both, 4), lows, 0xca);
      second = _mm512_ternarylogic_epi32(high_nibble, both, _mm512_srli_epi16(lows, 4), 0xca);
    } else {
      first = _mm512_and_si512(both, nibble);
      second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
    _mm512_store_si512(out + line * 128, first);
    _mm512_store_si512(out + line * 128 + 64, second);
  }
}

inline __m512 scales_of(const BlockCodes& block, int group) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(block.scales + size_t(group) * kBlockRows)));
}

template <Codes kCodes>
inline __m512 zeros_of(const BlockCodes& block, int group) {
  if (kCodes != Codes::nibbles) return _mm512_set1_ps(16.0f * 128.0f);
  const __m128i zeros = _mm_loadu_si128((const __m128i*)(block.zeros + size_t(group) * kBlockRows));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros));
}

// One block's products with 16 tokens, of which the first `num_tokens` are wanted. The block's first pass unpacks it as it goes.
template <Codes kCodes, bool kIsFirst>
class CodesPass {
  static constexpr bool kUnpacks = kIsFirst && kCodes != Codes::bytes;

 public:
  CodesPass(const BlockCodes& block, uint8_t* panel, const Activations& x, int num_tokens, float* y, size_t y_stride)
      : block_(block),
        panel_(panel),
        x_(x),
        num_input_groups_(x.stride / kGroup),
        num_tokens_(num_tokens),
        y_(y),
        y_stride_(y_stride) {}

  void run() {
    const int num_groups = block_.num_groups;
    __m512 totals[kLines];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    if (kUnpacks) unpack<kCodes>(block_, 0, panel_);
    int group = 0;
    for (; group + 2 <= num_groups; group += 2) {
      even_turn(group, totals);
      odd_turn(group + 1, totals);
    }
    if (group < num_groups) {
      even_turn(group, totals);
      _tile_stored(0, sums_[0], 64);
    } else {
      _tile_stored(1, sums_[1], 64);
    }
    if (num_groups > 1) scale(num_groups - 2, totals);
    scale(num_groups - 1, totals);
    end_segment(totals, num_groups);
  }

 private:
  // While a group's tiles are multiplied, the sums of the one before it are stored and those before that are scaled. The
  // numbers of tiles are part of the instructions.
  inline void even_turn(int group, __m512 (&totals)[kLines]) {
    unpack_after(group);
    _tile_zero(0);
    _tile_loadd(4, x_.codes + group * kGroup, x_.stride);
    _tile_loadd(6, weights(group), 64);
    _tile_dpbsud(0, 4, 6);
    if (group > 0) _tile_stored(1, sums_[1], 64);
    if (group > 1) scale(group - 2, totals);
  }

  inline void odd_turn(int group, __m512 (&totals)[kLines]) {
    unpack_after(group);
    _tile_zero(1);
    _tile_loadd(5, x_.codes + group * kGroup, x_.stride);
    _tile_loadd(7, weights(group), 64);
    _tile_dpbsud(1, 5, 7);
    _tile_stored(0, sums_[0], 64);
    if (group > 1) scale(group - 2, totals);
  }

  inline void unpack_after(int group) {
    if (kUnpacks && group + 1 < block_.num_groups)
      unpack<kCodes>(block_, group + 1, panel_ + size_t(group + 1) * kGroupBytes);
  }

  // int8 lies in tiles already.
  inline const uint8_t* weights(int group) const {
    return (kCodes == Codes::bytes ? block_.codes : panel_) + size_t(group) * kGroupBytes;
  }

  // As the kernels for one token sum.
  static constexpr bool kHasSegments = has_segments(kCodes == Codes::nibbles ? Format::int4
                                                    : kCodes == Codes::bytes ? Format::int8
                                                                             : Format::int8_planes);

  // Add a segment's totals to those of the segments before it, and begin another; `group` is the one after it.
  inline void end_segment(__m512 (&totals)[kLines], int group) {
    const bool first = !kHasSegments || group <= kSegmentGroups;
    for (int t = 0; t < kLines; ++t) {
      float* to = y_ + t * y_stride_;
      if (t < num_tokens_) _mm512_storeu_ps(to, first ? totals[t] : _mm512_add_ps(_mm512_loadu_ps(to), totals[t]));
      totals[t] = _mm512_setzero_ps();
    }
  }

  // From a group's sums to products.
  inline void scale(int group, __m512 (&totals)[kLines]) {
    if (kHasSegments && group > 0 && group % kSegmentGroups == 0) end_segment(totals, group);
    const __m512 scales = scales_of(block_, group), zeros = zeros_of<kCodes>(block_, group);
    const float *input_sums = x_.sums + group, *input_scales = x_.scales + group;
    const int32_t (*sums)[kBlockRows] = sums_[group % 2];
    for (int t = 0; t < kLines; ++t, input_sums += num_input_groups_, input_scales += num_input_groups_) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[t]));
      const __m512 value = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(*input_sums), sum);
      totals[t] = _mm512_fmadd_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(*input_scales)), totals[t]);
    }
  }

  const BlockCodes& block_;
  uint8_t* panel_;  // (groups, 512)
  const Activations x_;
  const int num_input_groups_;
  const int num_tokens_;
  float* y_;
  const size_t y_stride_;
  alignas(64) int32_t sums_[2][kLines][kBlockRows];
};

template <Codes kCodes>
void multiply_tokens(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int begin,
                     int end) {
  const std::unique_ptr<uint8_t, decltype(&std::free)> memory(
      static_cast<uint8_t*>(std::aligned_alloc(64, size_t(w.num_groups()) * kGroupBytes)), &std::free);
  if (!memory) throw std::bad_alloc();
  for (int block = begin; block < end; ++block) {
    const BlockCodes codes(w, block);
    float* out = y + size_t(block) * kBlockRows;
    CodesPass<kCodes, true>(codes, memory.get(), x, std::min(kLines, num_tokens), out, y_stride).run();
    for (int t = kLines; t < num_tokens; t += kLines) {
      const int count = std::min(kLines, num_tokens - t);
      CodesPass<kCodes, false>(codes, memory.get(), x.token(t), count, out + t * y_stride, y_stride).run();
    }
  }
}

}  // namespace

void amx_multiply_codes(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int begin,
                        int end) {
  const int rest = num_tokens % kLines, num_left = rest < kAmxLeastTokens ? rest : 0, count = num_tokens - num_left;
  const auto multiply = w.format == Format::int4   ? multiply_tokens<Codes::nibbles>
                        : w.format == Format::int8 ? multiply_tokens<Codes::bytes>
                                                   : multiply_tokens<Codes::planes>;
  const CodesConfig config;
  configure_tiles(&config);
  multiply(w, x, count, y, y_stride, begin, end);
  _tile_release();
  if (num_left) avx512_kernels().multiply(w, x.token(count), num_left, y + count * y_stride, y_stride, begin, end);
}

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
