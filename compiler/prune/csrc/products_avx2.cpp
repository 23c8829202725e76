#include <algorithm>
#include <cstring>

#include "products.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace coreinfer {
namespace {

constexpr int kLanes = 8;
constexpr int kRows = 4;
constexpr int kStepTokens = 1;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef F V;

inline F multiply_add(F sum, V left, V right) { return sum + left * right; }

#include "products_body.h"

constexpr Multiplier kMultiplier = {"avx2", kStepTokens == 1, packed_bytes, num_packs, pack, num_blocks, multiply};

}  // namespace

const Multiplier& avx2_multiplier() { return kMultiplier; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
