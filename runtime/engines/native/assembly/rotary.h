// Frequencies of rotary embeddings, as transformers scales them.
#pragma once

#include "json.h"
#include "weights.h"

namespace coreinfer {

struct Context {
  int max_positions;  // that are read
  int stated;         // that the model's makers state, which some scalings are worked out from
};

// From a config's rope parameters (arXiv 2104.09864), for so many dimensions of each head. Throws std::invalid_argument: a
// parameter is missing or wrong. Unsupported: the scaling is none that the engine has.
RotaryTable rotary_table(const Json& parameters, int size, const Context& context);

}  // namespace coreinfer
