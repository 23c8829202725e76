// The parts of models with several streams, and of gates that something is taken off.
#pragma once

#include <string>

#include "parts.h"
#include "settings_reader.h"

namespace coreinfer {

// Throws std::invalid_argument: one of the settings is wrong.
void read_streams(const ModelRecord& record, const SettingsReader& reader, Settings& settings);
// Throws std::invalid_argument: the base does not hold what the settings ask for.
Streams assemble_streams(const Parts& parts, const ModelWeights& model);
GateCutoff gate_cutoff(const Parts& parts, const std::string& root);

}  // namespace coreinfer
