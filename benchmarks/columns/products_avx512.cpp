// The products, for AVX-512 with VNNI: products of four inputs are summed in 32 bits.
#include <immintrin.h>

#include <algorithm>

#include "products.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")
#endif

// Calls would keep the sums out of the registers.
#define INLINE inline __attribute__((always_inline))

namespace columns {
namespace {

constexpr int kTile = 128;
constexpr int kTileBytes = kTile / 2;
constexpr int kHeadBytes = kTile * 3;
constexpr int kVectors = 4;     // of one tile's bytes of four columns, interleaved
constexpr int kTilesAhead = 8;  // Design::tiles
constexpr int kPassQuads = 2;   // Design::streams
constexpr int kPassColumns = 4 * kPassQuads;
constexpr int kAheadTiles = 16;
constexpr size_t kReadAheadBytes = 8192;  // Design::reads

// Into the second-level cache: a group is too large for the first.
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline void prefetch_near(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Sums of products with whole bytes, and with their high halves alone: what the low halves give is found from both.
struct Sums {
  __m512i all[kVectors], high[kVectors];
  INLINE void clear() {
    for (int i = 0; i < kVectors; ++i) all[i] = high[i] = _mm512_setzero_si512();
  }
  INLINE void load(const int32_t* from) {
    for (int i = 0; i < kVectors; ++i) {
      all[i] = _mm512_load_si512(from + 16 * i);
      high[i] = _mm512_load_si512(from + 16 * (kVectors + i));
    }
  }
  INLINE void store(int32_t* to) const {
    for (int i = 0; i < kVectors; ++i) {
      _mm512_store_si512(to + 16 * i, all[i]);
      _mm512_store_si512(to + 16 * (kVectors + i), high[i]);
    }
  }
};

INLINE void add_quad(const uint8_t* const* columns, ptrdiff_t offset, __m512i codes, Sums& sums) {
  const auto load = [&](int i) { return _mm512_loadu_si512(columns[i] + offset); };
  const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  const __m512i bytes[kVectors] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                                   _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)};
  const __m512i mask = _mm512_set1_epi8(15);
  for (int i = 0; i < kVectors; ++i) {
    sums.all[i] = _mm512_dpbusd_epi32(sums.all[i], bytes[i], codes);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), mask);
    sums.high[i] = _mm512_dpbusd_epi32(sums.high[i], high, codes);
  }
}

// out += (sums - zero points) * scales, of one tile.
INLINE void finish(const Sums& sums, const uint8_t* head, const Wanted::Group& group, float* out) {
  const __m512 scale = _mm512_set1_ps(group.scale), sum = _mm512_set1_ps(group.sum);
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kVectors; ++i) {
    const __m512i high = sums.high[i % kVectors];
    const __m512i whole = i < kVectors ? _mm512_sub_epi32(sums.all[i], _mm512_slli_epi32(high, 4)) : high;
    const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(head) + i));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(head + 2 * kTile) + i);
    const __m512 zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    const __m512 y = _mm512_fnmadd_ps(zeros, sum, _mm512_cvtepi32_ps(whole));
    _mm512_storeu_ps(out + 16 * i, _mm512_fmadd_ps(y, _mm512_mul_ps(scales, scale), _mm512_loadu_ps(out + 16 * i)));
  }
}

// One group of one panel.
struct Step {
  const uint8_t *heads, *codes;
  const Wanted::Group* group;
  const Quad* quads;

  int num_quads() const { return group->end - group->begin; }
  const uint8_t* column(int c) const { return codes + quads[c / 4].columns[c % 4]; }
};

Step step_at(const ColumnMatrix& w, const Wanted& wanted, int index) {
  const int num_groups = static_cast<int>(wanted.groups.size());
  const int panel = index / num_groups, g = index % num_groups;
  const Wanted::Group& group = wanted.groups[g];
  return {w.heads(panel, wanted.first_group + g), w.codes(panel, wanted.first_group + g), &group,
          wanted.quads.data() + group.begin};
}

// Goes through the lines of a step's wanted columns, one column after the other.
class Lines {
 public:
  Lines(const Step& step, size_t column_bytes) : step_(step), end_(column_bytes) {}
  INLINE void fetch(int count) {
    for (int i = 0; i < count && column_ < step_.group->num_columns; ++i) {
      prefetch(step_.column(column_) + at_);
      at_ += 64;
      if (at_ >= end_) at_ = 0, ++column_;
    }
  }

 private:
  const Step& step_;
  size_t at_ = 0, end_;
  int column_ = 0;
};

INLINE void prefetch_head(const uint8_t* head) {
  for (int line = 0; line < kHeadBytes; line += 64) prefetch(head + line);
}

void multiply_groups(const ColumnMatrix& w, const Step& now, const Step& next, float* out) {
  const int num_tiles = w.num_tiles(), num_quads = now.num_quads();
  Lines lines(next, w.column_bytes());
  for (int t = 0; t < num_tiles; ++t) {
    prefetch_head(next.heads + t * kHeadBytes);
    const uint8_t* tile = now.codes + t * kTileBytes;
    Sums sums;
    sums.clear();
    for (int i = 0; i < num_quads; ++i) {
      lines.fetch(4);
      const Quad& quad = now.quads[i];
      const uint8_t* columns[4];
      for (int c = 0; c < 4; ++c) columns[c] = tile + quad.columns[c];
      add_quad(columns, 0, _mm512_set1_epi32(quad.codes), sums);
    }
    lines.fetch(next.group->num_columns - 4 * num_quads);
    finish(sums, now.heads + t * kHeadBytes, *now.group, out + t * kTile);
  }
}

// Asks for the same columns' bytes kTilesAhead tiles later; at the end for those of the next group's.
void multiply_tiles(const ColumnMatrix& w, const Step& now, const Step& next, float* out) {
  const int num_tiles = w.num_tiles(), num_quads = now.num_quads();
  for (int t = 0; t < num_tiles; ++t) {
    const bool here = t + kTilesAhead < num_tiles;
    const int ahead_tile = here ? t + kTilesAhead : std::min(t + kTilesAhead - num_tiles, num_tiles - 1);
    const Step& source = here ? now : next;
    const uint8_t* ahead = source.codes + ahead_tile * kTileBytes;
    for (int line = 0; line < kHeadBytes; line += 64) prefetch_near(source.heads + ahead_tile * kHeadBytes + line);
    const uint8_t* tile = now.codes + t * kTileBytes;
    Sums sums;
    sums.clear();
    for (int i = 0; i < num_quads; ++i) {
      const Quad& quad = now.quads[i];
      const Quad& later = source.quads[std::min(i, source.num_quads() - 1)];
      const uint8_t* columns[4];
      for (int c = 0; c < 4; ++c) {
        prefetch_near(ahead + later.columns[c]);
        columns[c] = tile + quad.columns[c];
      }
      add_quad(columns, 0, _mm512_set1_epi32(quad.codes), sums);
    }
    finish(sums, now.heads + t * kHeadBytes, *now.group, out + t * kTile);
  }
}

// Up to eight columns of a group, as one pass over the panel's outputs.
struct Pass {
  const Step* step;
  int quad;  // the first
  bool first() const { return quad == 0; }
  bool last() const { return quad + kPassQuads >= step->num_quads(); }
  // A column of the pass, or its first one where it has fewer.
  const uint8_t* column(int c) const {
    const int at = std::min(quad + c / 4, step->num_quads() - 1);
    return step->codes + step->quads[at].columns[c % 4];
  }
};

// Asks for the same columns' bytes kAheadTiles later; at the end for the first ones of the next pass's columns.
template <bool kFirst, bool kLast>
void stream(int num_tiles, const Pass& now, const Pass& then, int32_t* memory, float* out) {
  const uint8_t *columns[kPassColumns], *later[kPassColumns];
  for (int c = 0; c < kPassColumns; ++c) {
    columns[c] = now.column(c);
    later[c] = then.column(c);
  }
  __m512i codes[kPassQuads];
  for (int i = 0; i < kPassQuads; ++i) {
    const int quad = now.quad + i;
    codes[i] = _mm512_set1_epi32(quad < now.step->num_quads() ? now.step->quads[quad].codes : 0);
  }
  const uint8_t* head = now.step->heads;
  const auto run = [&](int begin, int end, const uint8_t* const* ahead, ptrdiff_t offset) {
    for (int t = begin; t < end; ++t) {
      Sums sums;
      int32_t* kept = memory + t * kTile;
      if (kFirst)
        sums.clear();
      else
        sums.load(kept);
#pragma GCC unroll 8
      for (int c = 0; c < kPassColumns; ++c) prefetch_near(ahead[c] + t * kTileBytes + offset);
#pragma GCC unroll 2
      for (int i = 0; i < kPassQuads; ++i) add_quad(columns + 4 * i, t * kTileBytes, codes[i], sums);
      if (kLast)
        finish(sums, head + t * kHeadBytes, *now.step->group, out + t * kTile);
      else
        sums.store(kept);
    }
  };
  const int here = std::max(0, num_tiles - kAheadTiles);
  run(0, here, columns, kAheadTiles * kTileBytes);
  run(here, num_tiles, later, -here * kTileBytes);
}

void multiply_streams(const ColumnMatrix& w, const Step& now, const Step& next, int32_t* memory, float* out) {
  for (int quad = 0; quad < now.num_quads(); quad += kPassQuads) {
    const Pass pass{&now, quad};
    const Pass then = pass.last() ? Pass{&next, 0} : Pass{&now, quad + kPassQuads};
    const auto run = pass.first() ? (pass.last() ? stream<true, true> : stream<true, false>)
                                  : (pass.last() ? stream<false, true> : stream<false, false>);
    run(w.num_tiles(), pass, then, memory, out);
  }
}

// No product: what reading alone takes. Asks for the same columns' bytes that come some thousand bytes later.
void read_columns(const ColumnMatrix& w, const Step& now, const Step& next, float* out) {
  __m512i sum = _mm512_setzero_si512(), other = sum;
  const int ahead = static_cast<int>((kReadAheadBytes + w.column_bytes() - 1) / w.column_bytes());
  const auto read = [&](const uint8_t* from, size_t count, const uint8_t* later) {
    for (size_t i = 0; i < count; i += 128) {
      prefetch(later + i);
      prefetch(later + i + 64);
      sum = _mm512_xor_si512(sum, _mm512_loadu_si512(from + i));
      other = _mm512_xor_si512(other, _mm512_loadu_si512(from + i + 64));
    }
  };
  read(now.heads, w.head_bytes(), next.heads);
  const int count = now.group->num_columns;
  for (int c = 0; c < count; ++c) {
    const int later = c + ahead;
    const uint8_t* from = later < count ? now.column(later) : now.column(c);
    if (later >= count && later - count < next.group->num_columns) from = next.column(later - count);
    read(now.column(c), w.column_bytes(), from);
  }
  out[0] += static_cast<float>(_mm512_reduce_and_epi32(_mm512_xor_si512(sum, other)) & 1);
}

void choose(const Candidates& inputs, const ColumnMatrix& w, int begin, int end, Wanted& wanted) {
  const int size = w.layout.group;
  wanted.first_group = begin;
  wanted.groups.resize(end - begin);
  wanted.quads.resize(size_t(end - begin) * (size / 4));
  Quad* quad = wanted.quads.data();
  const __m512 limit = _mm512_set1_ps(inputs.threshold);
  for (int g = begin; g < end; ++g) {
    uint64_t mask = 0;
    for (int i = 0; i < size; i += 16) {
      const __m512 weight = _mm512_mul_ps(_mm512_abs_ps(_mm512_loadu_ps(inputs.x.values + g * size + i)),
                                          _mm512_loadu_ps(inputs.norms + g * size + i));
      mask |= uint64_t(_mm512_cmp_ps_mask(weight, limit, _CMP_GT_OQ)) << i;
    }
    Wanted::Group& group = wanted.groups[g - begin];
    group.begin = static_cast<int>(quad - wanted.quads.data());
    group.num_columns = __builtin_popcountll(mask);
    const int8_t* codes = inputs.x.codes + g * size;
    int sum = 0;
    for (; mask; ++quad) {
      uint32_t both = 0, column = 0;
      for (int i = 0; i < 4; ++i, mask &= mask - 1) {
        if (mask) {
          const int input = __builtin_ctzll(mask);
          column = static_cast<uint32_t>(input * w.column_stride());
          both |= uint32_t(uint8_t(codes[input])) << 8 * i;
          sum += codes[input];
        }
        quad->columns[i] = column;
      }
      quad->codes = static_cast<int32_t>(both);
    }
    group.end = static_cast<int>(quad - wanted.quads.data());
    group.scale = inputs.x.scales[size_t(g) * size / coreinfer::kGroup];
    group.sum = sum / 16.0f;
  }
}

void multiply(Design design, const ColumnMatrix& w, const Wanted& wanted, int32_t* memory, float* out) {
  const int num_groups = static_cast<int>(wanted.groups.size()), count = num_groups * w.num_panels();
  if (count == 0) return;
  Step now = step_at(w, wanted, 0);
  for (int index = 0; index < count; ++index) {
    const Step next = index + 1 < count ? step_at(w, wanted, index + 1) : now;
    float* panel_out = out + size_t(index / num_groups) * w.panel_outputs;
    if (design == Design::reads) read_columns(w, now, next, panel_out);
    if (design == Design::tiles) multiply_tiles(w, now, next, panel_out);
    if (design == Design::groups) multiply_groups(w, now, next, panel_out);
    if (design == Design::streams) multiply_streams(w, now, next, memory, panel_out);
    now = next;
  }
}

}  // namespace

const Products& avx512_products() {
  static constexpr Products kProducts = {"avx512", kTile, choose, multiply};
  return kProducts;
}

}  // namespace columns
#if defined(__clang__)
#pragma clang attribute pop
#endif
