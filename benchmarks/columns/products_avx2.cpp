// The products, for AVX2: byte products of two inputs are summed in 16 bits, for up to 16 inputs.
#include "products.h"

#include <immintrin.h>

#include <algorithm>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

// Calls would keep the sums out of the registers.
#define INLINE inline __attribute__((always_inline))

namespace columns {
namespace {

constexpr Layout kLayout = {64, coreinfer::kGroup};
constexpr int kTile = kLayout.tile;
constexpr int kTileBytes = kLayout.tile_bytes();
constexpr int kHeadBytes = kLayout.head_bytes();
constexpr int kVectors = 4;      // of 16-bit sums of one tile
constexpr int kMostOfPart = 16;  // inputs whose products fit 16 bits: 16 * 15 * 127 < 2^15
constexpr int kPairsOfPart = kMostOfPart / 2;
constexpr int kTilesAhead = 16;  // Design::tiles

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// GCC sums in an order of its own, holding all products back in memory: each sum passes through an empty instruction.
__m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// Products of one tile of two columns. Halves of bytes are taken apart after the columns' bytes are interleaved: four
// instructions less than before.
INLINE void add_columns(const uint8_t* one, const uint8_t* other, __m256i codes, __m256i* sums) {
  const __m256i mask = _mm256_set1_epi8(15), first = load(one), second = load(other);
  const __m256i a = _mm256_unpacklo_epi8(first, second), b = _mm256_unpackhi_epi8(first, second);
  const auto add = [&](int i, __m256i bytes) {
    sums[i] = in_order(_mm256_add_epi16(sums[i], _mm256_maddubs_epi16(_mm256_and_si256(bytes, mask), codes)));
  };
  add(0, a);
  add(1, b);
  add(2, _mm256_srli_epi16(a, 4));
  add(3, _mm256_srli_epi16(b, 4));
}

INLINE void add_pair(const uint8_t* tile, const Pair& pair, __m256i* sums) {
  add_columns(tile + pair.first, tile + pair.second, _mm256_set1_epi32(pair.codes), sums);
}

inline void clear(__m256i* sums) {
  for (int i = 0; i < kVectors; ++i) sums[i] = _mm256_setzero_si256();
}

// out += (sums - zero points) * scales: two sets of sums of 16-bit products, of one tile.
INLINE void finish(const __m256i* a, const __m256i* b, const uint8_t* head, const Wanted::Group& group, float* out) {
  const __m256 scale = _mm256_set1_ps(group.scale), sum = _mm256_set1_ps(group.sum);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kVectors; ++i) {
    const __m256i both = i % 2 ? _mm256_unpackhi_epi16(a[i / 2], b[i / 2]) : _mm256_unpacklo_epi16(a[i / 2], b[i / 2]);
    const __m256 value = _mm256_cvtepi32_ps(_mm256_madd_epi16(both, ones));
    const __m256 scales = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(head) + i));
    const __m256 zeros = _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(head + 2 * kTile + 8 * i))));
    const __m256 y = _mm256_fnmadd_ps(zeros, sum, value);
    _mm256_storeu_ps(out + 8 * i, _mm256_fmadd_ps(y, _mm256_mul_ps(scales, scale), _mm256_loadu_ps(out + 8 * i)));
  }
}

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

// One group of one panel, and what is gone through after it.
struct Step {
  const uint8_t *heads, *codes;
  const Wanted::Group* group;
  const Pair* pairs;
  int num_pairs;
};

Step step_at(const ColumnMatrix& w, const Wanted& wanted, int index) {
  const int num_groups = static_cast<int>(wanted.groups.size());
  const int panel = index / num_groups, g = index % num_groups;
  const Wanted::Group& group = wanted.groups[g];
  return {w.heads(panel, wanted.first_group + g), w.codes(panel, wanted.first_group + g), &group,
          wanted.pairs.data() + group.begin, group.end - group.begin};
}

// Products of one tile with pairs [begin, end), at most kPairsOfPart; asks for the same pairs' bytes at `ahead`.
INLINE void add_pairs(const uint8_t* tile, const Pair* pairs, int begin, int end, const uint8_t* ahead,
                      const Pair* ahead_pairs, bool odd, __m256i* sums) {
  clear(sums);
  for (int i = begin; i < end; ++i) {
    // Two tiles share a line: one asks for the line of the first column, the other for that of the second.
    prefetch(ahead + (odd ? ahead_pairs[i].second : ahead_pairs[i].first));
    add_pair(tile, pairs[i], sums);
  }
}

void multiply_tiles(const ColumnMatrix& w, const Step& now, const Step& next, float* out) {
  const int num_tiles = w.num_tiles(), split = std::min(now.num_pairs, kPairsOfPart);
  for (int t = 0; t < num_tiles; ++t) {
    const int later = t + kTilesAhead;
    const bool here = later < num_tiles;
    const Step& source = here ? now : next;
    const int ahead_tile = here ? later : std::min(later - num_tiles, num_tiles - 1);
    const uint8_t* ahead = source.codes + ahead_tile * kTileBytes;
    const uint8_t* ahead_head = source.heads + ahead_tile * kHeadBytes;
    for (int line = 0; line < kHeadBytes; line += 64) prefetch(ahead_head + line);
    const uint8_t* tile = now.codes + t * kTileBytes;
    __m256i a[kVectors], b[kVectors];
    add_pairs(tile, now.pairs, 0, split, ahead, source.pairs, ahead_tile % 2, a);
    add_pairs(tile, now.pairs, split, now.num_pairs, ahead, source.pairs, ahead_tile % 2, b);
    finish(a, b, now.heads + t * kHeadBytes, *now.group, out + t * kTile);
  }
}

INLINE void add_pairs(const uint8_t* tile, const Pair* pairs, int begin, int end, __m256i* sums) {
  clear(sums);
  for (int i = begin; i < end; ++i) add_pair(tile, pairs[i], sums);
}

// Goes through the lines of a group's wanted columns, one column after the other.
class Lines {
 public:
  Lines(const Step& step, size_t column_bytes) : step_(step), end_(column_bytes) {}
  void fetch(int count) {
    for (int i = 0; i < count && column_ < 2 * step_.num_pairs; ++i) {
      const Pair& pair = step_.pairs[column_ / 2];
      prefetch(step_.codes + (column_ % 2 ? pair.second : pair.first) + at_);
      at_ += 64;
      if (at_ >= end_) at_ = 0, ++column_;
    }
  }

 private:
  const Step& step_;
  size_t at_ = 0, end_;
  int column_ = 0;
};

void multiply_groups(const ColumnMatrix& w, const Step& now, const Step& next, float* out) {
  const int num_tiles = w.num_tiles(), split = std::min(now.num_pairs, kPairsOfPart);
  Lines lines(next, w.column_bytes());
  for (int t = 0; t < num_tiles; ++t) {
    for (int line = 0; line < kHeadBytes; line += 64) prefetch(next.heads + t * kHeadBytes + line);
    const uint8_t* tile = now.codes + t * kTileBytes;
    __m256i a[kVectors], b[kVectors];
    lines.fetch((next.num_pairs + 1) / 2);
    add_pairs(tile, now.pairs, 0, split, a);
    lines.fetch(next.num_pairs - (next.num_pairs + 1) / 2);
    add_pairs(tile, now.pairs, split, now.num_pairs, b);
    finish(a, b, now.heads + t * kHeadBytes, *now.group, out + t * kTile);
  }
}

constexpr int kPass = 4;  // pairs
constexpr int kColumns = 2 * kPass;

// Up to eight columns of a group, as one pass over the panel's outputs.
struct Pass {
  const Step* step;
  const Pair* pairs;
  int count;         // of pairs
  int part;          // 0 or 1
  bool first, last;  // of its part; of its group
};

Pass pass_at(const Step& step, int begin) {
  const int count = std::min(kPass, step.num_pairs - begin);
  return {&step,
          step.pairs + begin,
          count,
          begin / kPairsOfPart,
          begin % kPairsOfPart == 0,
          begin + kPass >= step.num_pairs};
}

// Meanwhile asks for the next pass's columns, one after the other. The sums of a group's first 16 inputs and of the others
// lie in `sums` one after the other, num_tiles * kTile each.
template <bool kFirst, bool kLast, bool kSecond>
void stream(int num_tiles, const Pass& now, const Pass& next, int16_t* sums, float* out) {
  Pair p[kPass];
  __m256i codes[kPass];
  const uint8_t *f[kPass], *g[kPass];
  for (int i = 0; i < kPass; ++i) {
    p[i] = i < now.count ? now.pairs[i] : now.count ? Pair{now.pairs[0].first, now.pairs[0].first, 0} : Pair{0, 0, 0};
    codes[i] = _mm256_set1_epi32(p[i].codes);
    f[i] = now.step->codes + p[i].first;
    g[i] = now.step->codes + p[i].second;
  }
  const __m256i zero[kVectors] = {};
  const uint8_t* head = now.step->heads;
  int16_t* second = sums + num_tiles * kTile;
  const auto run = [&](int begin, int end, const uint8_t* ahead) {
    for (int t = begin; t < end; ++t, ahead += 256) {
      __m256i a[kVectors];
      auto* kept = reinterpret_cast<__m256i*>((kSecond ? second : sums) + t * kTile);
      for (int i = 0; i < kVectors; ++i) a[i] = kFirst ? _mm256_setzero_si256() : _mm256_load_si256(kept + i);
#pragma GCC unroll 4
      for (int i = 0; i < kPass; ++i) {
        prefetch(ahead + 64 * i);
        add_columns(f[i] + t * kTileBytes, g[i] + t * kTileBytes, codes[i], a);
      }
      if (kLast) {
        const auto* others = reinterpret_cast<const __m256i*>(sums + t * kTile);
        finish(kSecond ? others : zero, a, head + t * kHeadBytes, *now.step->group, out + t * kTile);
      } else {
        for (int i = 0; i < kVectors; ++i) _mm256_store_si256(kept + i, a[i]);
        if (next.last)
          for (int line = 0; line < kHeadBytes; line += 64) prefetch(next.step->heads + t * kHeadBytes + line);
      }
    }
  };
  for (int c = 0; c < kColumns; ++c) {
    const Pair& pair = next.pairs[std::min(c / 2, std::max(0, next.count - 1))];
    run(num_tiles * c / kColumns, num_tiles * (c + 1) / kColumns,
        next.step->codes + (c % 2 ? pair.second : pair.first));
  }
}

using Stream = void (*)(int num_tiles, const Pass& now, const Pass& next, int16_t* sums, float* out);
// By Pass::first, Pass::last, Pass::part.
constexpr Stream kStreams[2][2][2] = {
    {{stream<false, false, false>, stream<false, false, true>},
     {stream<false, true, false>, stream<false, true, true>}},
    {{stream<true, false, false>, stream<true, false, true>}, {stream<true, true, false>, stream<true, true, true>}}};

void multiply_streams(const ColumnMatrix& w, const Step& now, const Step& next, int16_t* sums, float* out) {
  Pass pass = pass_at(now, 0);
  for (bool more = true; more;) {
    more = !pass.last;
    const Pass then = more ? pass_at(now, static_cast<int>(pass.pairs - now.pairs) + kPass) : pass_at(next, 0);
    kStreams[pass.first][pass.last][pass.part](w.num_tiles(), pass, then, sums, out);
    pass = then;
  }
}

// No product: what reading alone takes.
void read_columns(const ColumnMatrix& w, const Step& now, float* out) {
  __m256i sum = _mm256_setzero_si256(), other = sum;
  const auto read = [&](const uint8_t* from, size_t count) {
    for (size_t i = 0; i < count; i += 64) {
      sum = _mm256_xor_si256(sum, load(from + i));
      other = _mm256_xor_si256(other, load(from + i + 32));
    }
  };
  read(now.heads, w.head_bytes());
  for (int c = 0; c < 2 * now.num_pairs; ++c)
    read(now.codes + (c % 2 ? now.pairs[c / 2].second : now.pairs[c / 2].first), w.column_bytes());
  out[0] += _mm256_extract_epi8(_mm256_xor_si256(sum, other), 0);
}

void choose(const Candidates& inputs, const ColumnMatrix& w, int begin, int end, Wanted& wanted) {
  const coreinfer::Activations& x = inputs.x;
  const size_t column_stride = w.column_stride();
  wanted.first_group = begin;
  wanted.groups.resize(end - begin);
  wanted.pairs.resize(size_t(end - begin) * (coreinfer::kGroup / 2));
  Pair* pair = wanted.pairs.data();
  const __m256 limit = _mm256_set1_ps(inputs.threshold), sign = _mm256_set1_ps(-0.0f);
  for (int g = begin; g < end; ++g) {
    uint32_t mask = 0;
    for (int i = 0; i < coreinfer::kGroup; i += 8) {
      const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(x.values + g * coreinfer::kGroup + i));
      const __m256 weight = _mm256_mul_ps(size, _mm256_loadu_ps(inputs.norms + g * coreinfer::kGroup + i));
      mask |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(weight, limit, _CMP_GT_OQ))) << i;
    }
    Wanted::Group& group = wanted.groups[g - begin];
    group.begin = static_cast<int>(pair - wanted.pairs.data());
    group.num_columns = __builtin_popcount(mask);
    const int8_t* codes = x.codes + g * coreinfer::kGroup;
    int sum = 0;
    for (; mask; ++pair) {
      const int first = __builtin_ctz(mask);
      mask &= mask - 1;
      const int second = mask ? __builtin_ctz(mask) : first;
      const int second_code = mask ? codes[second] : 0;
      mask &= mask - 1;
      sum += codes[first] + second_code;
      const uint32_t both = uint8_t(codes[first]) | uint32_t(uint8_t(second_code)) << 8;
      *pair = {uint32_t(first * column_stride), uint32_t(second * column_stride), int32_t(both | both << 16)};
    }
    group.end = static_cast<int>(pair - wanted.pairs.data());
    group.scale = x.scales[g];
    group.sum = sum / 16.0f;
  }
}

void multiply(Design design, const ColumnMatrix& w, const Wanted& wanted, int32_t* memory, float* out) {
  auto* sums = reinterpret_cast<int16_t*>(memory);
  const int num_groups = static_cast<int>(wanted.groups.size()), count = num_groups * w.num_panels();
  if (count == 0) return;
  Step now = step_at(w, wanted, 0);
  for (int index = 0; index < count; ++index) {
    const Step next = index + 1 < count ? step_at(w, wanted, index + 1) : now;
    float* panel_out = out + size_t(index / num_groups) * w.panel_outputs;
    if (design == Design::reads) read_columns(w, now, panel_out);
    if (design == Design::tiles) multiply_tiles(w, now, next, panel_out);
    if (design == Design::groups) multiply_groups(w, now, next, panel_out);
    if (design == Design::streams) multiply_streams(w, now, next, sums, panel_out);
    now = next;
  }
}

}  // namespace

const Products& avx2_products() {
  static constexpr Products kProducts = {"avx2", kLayout.tile, choose, multiply};
  return kProducts;
}

}  // namespace columns
#if defined(__clang__)
#pragma clang attribute pop
#endif
