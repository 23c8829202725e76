// Four lanes of the compiler's vector types: what every CPU runs.
#include <algorithm>
#include <cstring>

#include "rounding.h"

namespace coreinfer {
namespace {

constexpr int kLanes = 4;

#include "rounding_body.h"

constexpr Rounder kRounder = {"portable", round_block};

}  // namespace

const Rounder& portable_rounder() { return kRounder; }

}  // namespace coreinfer
