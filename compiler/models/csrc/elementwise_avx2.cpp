#include <cmath>
#include <cstring>

#include "elementwise.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace coreinfer {
namespace {

constexpr int kLanes = 8;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

#include "elementwise_body.h"

constexpr Elementwise kElementwise = {"avx2", norm, gate, turn};

}  // namespace

const Elementwise& avx2_elementwise() { return kElementwise; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
