// Four lanes of the compiler's vector types: what every CPU runs.
#include <algorithm>
#include <cstring>

#include "products.h"

namespace coreinfer {
namespace {

constexpr int kLanes = 4;
constexpr int kRows = 4;
constexpr int kStepTokens = 1;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef F V;

inline F multiply_add(F sum, V left, V right) { return sum + left * right; }

#include "products_body.h"

constexpr Multiplier kMultiplier = {"portable", kStepTokens == 1, packed_bytes, num_packs, pack, num_blocks, multiply};

}  // namespace

const Multiplier& portable_multiplier() { return kMultiplier; }

}  // namespace coreinfer
