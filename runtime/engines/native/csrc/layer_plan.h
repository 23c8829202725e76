// Which layers of an FFN stay in a memory that does not hold all of them.
#pragma once

#include <cstddef>
#include <vector>

namespace coreinfer {

// Layers of a source that pass through memory together: one that is computed with and one that is read.
constexpr int kLeastAhead = 2;

// Every layer is used once in a pass, so that a byte that stays saves the same in each. Those that stay and the largest two
// that pass fit into `room`; without `streams` none need to pass. Where all fit, all stay.
std::vector<bool> kept_layers(const std::vector<size_t>& layer_bytes, size_t room, bool streams);

}  // namespace coreinfer
