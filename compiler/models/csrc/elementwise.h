// What a transformer layer does between its matrix products, each in one pass over memory, of bfloat16 or float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coreinfer {

enum class Gate { silu, gelu_tanh };

// Rows of n values, all of one kind: floats, or bits of bfloat16. Results are computed in float and rounded once.
struct NormTask {
  const void *x, *weight;  // (rows, n), (n)
  void* out;               // (rows, n)
  bool is_float;
  size_t n;
  float eps, offset;  // out = x / sqrt(mean x^2 + eps) (offset + weight)
};

struct GateTask {
  void* gate;      // becomes act(gate) up
  const void* up;  // of as many values
  bool is_float;
  Gate act;
};

// x (tokens, heads, 2 half) is turned in place: (a, b) of a head becomes (a cos - b sin, b cos' + a sin').
struct TurnTask {
  void* x;
  const void *cos, *sin;  // (angles, 2 half); token t has those of t % angles
  bool is_float;
  size_t heads, half, angles;
};

// What exists once per instruction set; each works on a part [begin, end) of rows, values, or tokens.
struct Elementwise {
  const char* name;
  void (*norm)(const NormTask& task, size_t begin, size_t end);
  void (*gate)(const GateTask& task, size_t begin, size_t end);
  void (*turn)(const TurnTask& task, size_t begin, size_t end);
};

const Elementwise& portable_elementwise();
#if defined(__x86_64__)
const Elementwise& avx2_elementwise();
const Elementwise& avx512_elementwise();
#endif

}  // namespace coreinfer
