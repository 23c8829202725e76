// Two tokens at a time: vdpbf16ps multiplies pairs of bfloat16 and adds both products to a float.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "products.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

namespace coreinfer {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;
constexpr int kStepTokens = 2;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef U V;

inline F multiply_add(F sum, V left, V right) {
  return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

#include "products_body.h"

constexpr Multiplier kMultiplier = {"avx512-bf16", kStepTokens == 1, packed_bytes, num_packs,
                                    pack,          num_blocks,       multiply};

}  // namespace

const Multiplier& bf16_multiplier() { return kMultiplier; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
