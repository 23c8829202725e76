// AVX2 without VNNI: byte products are summed in 16 bits first.
#include "columns.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace coreinfer {
namespace {

#include "vector_avx2.h"

struct V : Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr int kByteOffset = 0;  // dot_bytes takes the offset away itself
  static constexpr bool kJoinsPlanes = false;

  // GCC sums in an order of its own, holding all products back in memory: each sum passes through an empty instruction.
  static I in_order(I sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }
  static I widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  // The sums of a tile's 32 products stay in 16 bits, two for each row: 8 * 2 * 15 * 127 is less than 2^15.
  static I dot_nibbles(I sum, B codes, const int8_t* p) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, quad(p))));
  }
  // Sums of each two bits of the bytes, in 16 bits even after times_four: 8 * 2 * (4 + 1) * 3 * 127 is less than 2^15.
  static void add_pairs(B bytes, const int8_t* p, I* sums) {
    const __m256i codes = quad(p);
    for (int i = 0; i < 4; ++i) {
      const B pair = _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * i), _mm256_set1_epi8(3));
      sums[i] = in_order(_mm256_add_epi16(sums[i], _mm256_maddubs_epi16(pair, codes)));
    }
  }
  static I times_four(I sum) { return _mm256_slli_epi16(sum, 2); }
  static void pair_sums(I* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = widen(sums[i]);
  }
  static I dot_nibbles_lanes(I sum, B codes, I fours) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, fours)));
  }
  static I add_nibble_sums(I a, I b) { return _mm256_add_epi16(a, b); }
  static I nibble_sums(I pairs) { return widen(pairs); }
  // Unsigned bytes would overflow 16 bits; |w| * (x with w's sign) does not: 2 * 127 * 127.
  static I dot_bytes(I sum, B bytes, const int8_t* p) {
    const __m256i weight = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(quad(p), weight));
    return in_order(add_int(sum, widen(pairs)));
  }
};

#include "kernels_body.h"

}  // namespace

const Kernels& avx2_kernels() { return kTable; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
