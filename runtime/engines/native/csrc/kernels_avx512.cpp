// AVX-512 with VNNI: one vector is a block of 16 rows.
#include "columns.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

namespace coreinfer {
namespace {

struct V {
  static constexpr const char* kName = "avx512vnni";
  static constexpr int kLanes = 16;
  static constexpr int kTileTokens = 8;
  static constexpr int kTileTokensBf16 = kTileTokens;
  static constexpr int kByteOffset = 128;  // dot_bytes takes bytes as unsigned
  static constexpr bool kJoinsPlanes = true;
  using F = __m512;
  using I = __m512i;
  using B = __m512i;

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void store_half(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
  static F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static void store_int8(int8_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B low_nibbles(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static B high_nibbles(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  // Nibbles with the bits that are asked for, of each four inputs.
  static B low_nibbles(B x, const uint8_t* bits) { return _mm512_and_si512(x, quad((const int8_t*)bits)); }
  static B high_nibbles(B x, const uint8_t* bits) { return low_nibbles(_mm512_srli_epi16(x, 4), bits); }
  // The bytes whose halves are the low, or the high, nibbles of two vectors.
  static B join_low(B high, B low) { return halves(_mm512_slli_epi16(high, 4), low); }
  static B join_high(B high, B low) { return halves(high, _mm512_srli_epi16(low, 4)); }
  static B halves(B high, B low) { return _mm512_ternarylogic_epi32(_mm512_set1_epi8(-16), high, low, 0xca); }
  static I zero() { return _mm512_setzero_si512(); }
  static I quad(const int8_t* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
  static I add_nibble_sums(I a, I b) { return add_int(a, b); }
  static I nibble_sums(I sums) { return sums; }
  static I dot_nibbles(I sum, B codes, const int8_t* p) { return _mm512_dpbusd_epi32(sum, codes, quad(p)); }
  static I dot_bytes(I sum, B bytes, const int8_t* p) { return _mm512_dpbusd_epi32(sum, bytes, quad(p)); }
  // Sums of whole bytes, and of their highest 6, 4 and 2 bits: what each two bits give follows from these.
  static void add_pairs(B bytes, const int8_t* p, I* sums) {
    const __m512i codes = quad(p);
    sums[0] = _mm512_dpbusd_epi32(sums[0], bytes, codes);
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_and_si512(bytes, _mm512_set1_epi8(-4)), codes);
    sums[2] = _mm512_dpbusd_epi32(sums[2], _mm512_and_si512(bytes, _mm512_set1_epi8(-16)), codes);
    sums[3] = _mm512_dpbusd_epi32(sums[3], _mm512_and_si512(bytes, _mm512_set1_epi8(-64)), codes);
  }
  static I times_four(I sum) { return _mm512_slli_epi32(sum, 2); }
  static void pair_sums(I* sums) {
    for (int i = 0; i < 3; ++i) sums[i] = _mm512_srai_epi32(_mm512_sub_epi32(sums[i], sums[i + 1]), 2 * i);
    sums[3] = _mm512_srai_epi32(sums[3], 6);
  }
  static I dot_nibbles_lanes(I sum, B codes, I fours) { return _mm512_dpbusd_epi32(sum, codes, fours); }
  static I load_fours(const int8_t* p) { return _mm512_loadu_si512(p); }
  // Four whole numbers in each lane, as bytes of a word.
  static void store_fours(int8_t* p, const F* x) {
    const auto byte = [&](int i) { return _mm512_and_si512(_mm512_cvtps_epi32(x[i]), _mm512_set1_epi32(255)); };
    const __m512i low = _mm512_or_si512(byte(0), _mm512_slli_epi32(byte(1), 8));
    const __m512i high = _mm512_or_si512(byte(2), _mm512_slli_epi32(byte(3), 8));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Of each 16 bytes, words of the four vectors' bytes: out[i] has those of the i-th four.
  static void interleave(B a, B b, B c, B d, B* out) {
    const B ab = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const B cd = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  }
  // One of each four lanes in the place of all.
  template <int kLane>
  static I spread(I x) {
    return _mm512_shuffle_epi32(x, _MM_PERM_ENUM(kLane * 0x55));
  }
  template <int kLane>
  static F spread(F x) {
    return _mm512_shuffle_ps(x, x, kLane * 0x55);
  }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F sqrt(F x) { return _mm512_sqrt_ps(x); }
  static F power_of_two(F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static float reduce_lanes(const F* x) { return _mm512_reduce_add_ps(x[0]); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
};

#include "kernels_body.h"

}  // namespace

const Kernels& avx512_kernels() { return kTable; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
