// SHA-256's inner loop: by instructions of the CPU that are made for it where it has them, else in plain C++.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace coreinfer {

constexpr size_t kShaBlockBytes = 64;
using ShaState = std::array<uint32_t, 8>;
using ShaRounds = std::array<uint32_t, 64>;
// Add whole blocks of a text to a state.
using AddBlocks = void (*)(ShaState& state, const ShaRounds& rounds, const uint8_t* blocks, size_t num_blocks);

void add_blocks_plain(ShaState& state, const ShaRounds& rounds, const uint8_t* blocks, size_t num_blocks);
// The fastest that this CPU has.
AddBlocks find_add_blocks();

}  // namespace coreinfer
