// Where an FFN is read from that is not in memory as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "weights.h"

namespace coreinfer {

class LayerSource;
class ExpertSource;

// One of the two, or none where an FFN is in memory.
struct FileSource {
  std::shared_ptr<LayerSource> layers{};
  std::shared_ptr<ExpertSource> experts{};
  bool present() const { return layers || experts; }
};

// By layers, or of a mixture by experts. Throws std::runtime_error: the file cannot be opened. std::invalid_argument: weights
// lie outside of the mapping.
FileSource read_from_file(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn);

}  // namespace coreinfer
