// AVX-VNNI: the dot product instruction on 256-bit vectors, for CPUs without AVX-512.
#include "columns.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

namespace coreinfer {
namespace {

#include "vector_avx2.h"

struct V : Avx2 {
  static constexpr const char* kName = "avxvnni";
  static constexpr int kByteOffset = 128;  // dot_bytes takes bytes as unsigned
  static constexpr bool kJoinsPlanes = true;

  static I add_nibble_sums(I a, I b) { return add_int(a, b); }
  static I nibble_sums(I sums) { return sums; }
  static I dot_nibbles(I sum, B codes, const int8_t* p) { return _mm256_dpbusd_avx_epi32(sum, codes, quad(p)); }
  // Sums of whole bytes, and of their highest 6, 4 and 2 bits: what each two bits give follows from these.
  static void add_pairs(B bytes, const int8_t* p, I* sums) {
    const __m256i codes = quad(p);
    sums[0] = _mm256_dpbusd_avx_epi32(sums[0], bytes, codes);
    sums[1] = _mm256_dpbusd_avx_epi32(sums[1], _mm256_and_si256(bytes, _mm256_set1_epi8(-4)), codes);
    sums[2] = _mm256_dpbusd_avx_epi32(sums[2], _mm256_and_si256(bytes, _mm256_set1_epi8(-16)), codes);
    sums[3] = _mm256_dpbusd_avx_epi32(sums[3], _mm256_and_si256(bytes, _mm256_set1_epi8(-64)), codes);
  }
  static I times_four(I sum) { return _mm256_slli_epi32(sum, 2); }
  static void pair_sums(I* sums) {
    for (int i = 0; i < 3; ++i) sums[i] = _mm256_srai_epi32(_mm256_sub_epi32(sums[i], sums[i + 1]), 2 * i);
    sums[3] = _mm256_srai_epi32(sums[3], 6);
  }
  static I dot_nibbles_lanes(I sum, B codes, I fours) { return _mm256_dpbusd_avx_epi32(sum, codes, fours); }
  static I dot_bytes(I sum, B bytes, const int8_t* p) { return _mm256_dpbusd_avx_epi32(sum, bytes, quad(p)); }
};

#include "kernels_body.h"

}  // namespace

const Kernels& avxvnni_kernels() { return kTable; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
