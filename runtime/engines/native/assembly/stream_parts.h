// The parts of models with several streams, and of gates that something is taken off.
#pragma once

#include <string>

#include "parts.h"

namespace coreinfer {

// Throws std::invalid_argument: the base does not hold what the settings ask for.
Streams assemble_streams(const Parts& parts, const ModelWeights& model);
GateCutoff gate_cutoff(const Parts& parts, const std::string& root);

}  // namespace coreinfer
