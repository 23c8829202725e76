#include <algorithm>
#include <cstring>

#include "rounding.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2")
#endif

namespace coreinfer {
namespace {

constexpr int kLanes = 16;

#include "rounding_body.h"

constexpr Rounder kRounder = {"avx512", round_block};

}  // namespace

const Rounder& avx512_rounder() { return kRounder; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
