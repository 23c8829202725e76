// What the files of AMX kernels have in common.
#pragma once

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace coreinfer {

// From so many tokens on tiles are faster than vectors.
constexpr int kAmxLeastTokens = 11;

// As Kernels::multiply, for quantized weights and inputs in codes, which must have memory for a multiple of 16 tokens after
// the first.
void amx_multiply_codes(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int begin,
                        int end);

// The intrinsic names the first bytes of the configuration alone as what it reads: all of it must be in memory.
__attribute__((target("amx-tile"))) inline void configure_tiles(const void* config) {
  __asm__ volatile("" : : "r"(config) : "memory");
  _tile_loadconfig(config);
}

}  // namespace coreinfer
#endif
