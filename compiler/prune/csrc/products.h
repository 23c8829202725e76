// Sums of products h h^T and h y^T over tokens, of activations h and wanted outputs y in bfloat16 or float, in float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace coreinfer {

constexpr int kChunkTokens = 1024;  // that are packed at a time

struct Task {
  const void* activations;  // (tokens, num_inputs) float, or bits of bfloat16
  const void* targets;      // (tokens, num_outputs)
  bool is_float;
  int num_inputs, num_outputs;
  const int64_t* rows;  // of this chunk's tokens
  int num_rows;
  float* gram;   // (num_inputs, num_inputs), of which the blocks on and above the diagonal are added to
  float* cross;  // (num_inputs, num_outputs)
  void* packed;  // packed_bytes() of the kernel, at a multiple of 64
};

// What exists once per instruction set. Each sums the tokens in their order, so that threads change no bit.
struct Multiplier {
  const char* name;
  bool takes_float;
  size_t (*packed_bytes)(const Task& task);
  int (*num_packs)(const Task& task);
  void (*pack)(const Task& task, int block);
  int (*num_blocks)(const Task& task);
  void (*multiply)(const Task& task, int block);
};

const Multiplier& portable_multiplier();
#if defined(__x86_64__)
const Multiplier& avx2_multiplier();
const Multiplier& avx512_multiplier();
const Multiplier& bf16_multiplier();
#endif

}  // namespace coreinfer
