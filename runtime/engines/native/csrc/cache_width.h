// Which layers' keys and values are too large for fp16.
#pragma once

#include "weights.h"

namespace coreinfer {

// Set `wide_cache` of each layer, by bounds of what its weights can make of any input.
void choose_cache_width(ModelWeights& model);

}  // namespace coreinfer
