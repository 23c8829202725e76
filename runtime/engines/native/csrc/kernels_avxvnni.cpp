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
