// Four lanes of the compiler's vector types: what every CPU runs.
#include <cmath>
#include <cstring>

#include "elementwise.h"

namespace coreinfer {
namespace {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

#include "elementwise_body.h"

constexpr Elementwise kElementwise = {"portable", norm, gate, turn};

}  // namespace

const Elementwise& portable_elementwise() { return kElementwise; }

}  // namespace coreinfer
