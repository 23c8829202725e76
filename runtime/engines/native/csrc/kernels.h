// The operations that exist once per instruction set, as a table of functions.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"

namespace coreinfer {

enum class Nonlinearity { silu, gelu_tanh, gelu_erf, relu, clamped_swiglu };

// What gate and up become: act(gate) * up. For clamped_swiglu (up + 1) * gate * sigmoid(alpha * gate), where gate is at most
// `most` and up within plus and minus that.
struct NeuronFunction {
  NeuronFunction(Nonlinearity nonlinearity = Nonlinearity::silu) : kind(nonlinearity) {}
  Nonlinearity kind;
  float alpha = 1.0f, most = 0.0f;  // of clamped_swiglu alone
};

constexpr int kPositions = 16;   // positions whose keys are interleaved
constexpr int kPageTokens = 64;  // positions of one page of the cache

// Where the cache keeps the keys and values of one key-value head.
struct CachedHead {
  const void* keys;    // of page 0: (kPageTokens / 16, head_dim, 16)
  const void* values;  // of page 0: (kPageTokens, value_stride)
  size_t page_bytes;   // from a page's to those of the page after it
  bool wide;           // float, else fp16
};

// One key-value head's part of the cache, and the queries that share it.
struct AttentionTask {
  const int32_t* pages;  // of a sequence, kPageTokens positions each
  CachedHead head;
  int head_dim;
  int value_stride;      // head_dim rounded up to 16
  const float* queries;  // (num_queries, head_dim), scaled already
  int num_queries;
  int begin, end;     // positions
  float score_limit;  // scores become limit * tanh(score / limit); 0 for none
  float* out;         // (num_queries, value_stride): sum of exp(score - max) * value
  float* maxima;      // (num_queries); minus infinity where there are no positions
  float* sums;        // (num_queries): sum of exp(score - max)
};

// What `attend` wrote for all heads of some of the positions.
struct AttentionPart {
  const float* values;  // (num_heads, head_dim rounded up to 16)
  const float* maxima;  // (num_heads)
  const float* sums;    // (num_heads); 0 where there were no positions
};

// What `screen` writes: scores of all rows, and for each block of 16 the most that any of its rows may reach, if what was
// left out is at most so many standard deviations.
struct Screened {
  float* scores;  // (tokens, stride)
  size_t stride;
  float* bounds;  // (tokens, num_bounds)
  size_t num_bounds;
  float deviations;

  Screened token(int t) const { return {scores + t * stride, stride, bounds + t * num_bounds, num_bounds, deviations}; }
};

// One token's inputs as rows in int4_rows take them: parts of 16 groups, whose fours lie beside each other as those of codes
// do; padded with zeros.
struct NeuronInputs {
  const int8_t* codes;  // (parts, 8, 16, 4)
  const float* scales;  // (parts, 16)
  const float* sums;    // (parts, 16): sum of a group's codes / 16
};

// Some rows of a matrix in int4_rows.
struct NeuronRows {
  const Matrix& weight;
  const int32_t* ids;
  int count;
};
// Sums over rows lie in the order in which they are computed: (parts, 4, 2, 4, 4, 4), that is part, eight of the group's
// outputs, four of these, the group's place in its four, its four, and the output's place.
inline int num_sums(const Matrix& w) { return w.num_parts() * kPartGroups * kGroup; }

struct ColumnMatrix;
// Some groups of inputs and some tiles of one panel of a matrix that lies input by input, and one token's inputs.
struct ColumnTask {
  const ColumnMatrix& weight;
  const Activations& x;
  int panel, group_begin, group_end, tile_begin, tile_end;
  float* sums;  // (panel_outputs): what these inputs give, for these tiles
};

struct Kernels {
  const char* name;
  // Whether `quantize` and `multiply` also take inputs in bfloat16, which is faster for many tokens where weights are
  // bfloat16. These inputs must have memory for a multiple of 32 tokens.
  bool rounds_to_bf16;
  // Round groups of 32 values to int8 with a scale each, or to bfloat16 where there is room for it: of each token the
  // first `num_values`, a multiple of 32.
  void (*quantize)(const Activations& x, int num_values, int num_tokens);
  // Fill in the energies of one token's groups, which `screen` needs.
  void (*measure)(const Activations& x, int num_values);
  // y[token * y_stride + row] for the rows of blocks [block_begin, block_end); y is padded to whole blocks. Where there are
  // several tokens, inputs have memory for kSpareTokens more.
  void (*multiply)(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int block_begin,
                   int block_end);
  // For measured tokens and int8_planes: products from the high halves alone. A NaN may be lost from the bounds, never from
  // the scores.
  void (*screen)(const Matrix& w, const Activations& x, int num_tokens, const Screened& out, int block_begin,
                 int block_end);
  // RMS norm (no bias) or layer norm.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int size, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int size, float* out);
  // out = act(gate) * up, or act(up) where gate is null, both (num_tokens, size); `size` is a multiple of 16. There is a
  // gate for clamped_swiglu.
  void (*activate)(const NeuronFunction& function, const float* gate, const float* up, int size, int num_tokens,
                   float* out, size_t out_stride);
  // Index of the first of the largest values.
  int (*largest)(const float* values, int size);
  void (*attend)(const AttentionTask& task);
  // Put parts of the softmax over different positions together: (num_heads, head_dim). `sinks` (num_heads) are scores that
  // take their share and have no value; null where there are none.
  void (*combine)(const AttentionPart* parts, int num_parts, int num_heads, int head_dim, const float* sinks,
                  float* out);
  // Rotate the first 2 * half dimensions of one head in place by (half) cosines, then as many sines.
  void (*rotate)(float* head, const float* angles, int half);
  void (*add)(float* x, const float* y, int size);  // x += y
  void (*limit)(float* x, int size, float most);    // x = most * tanh(x / most)
  void (*to_half)(const float* x, int size, uint16_t* out);
  // Sum of 64-bit words, as plain a read as there is.
  uint64_t (*read_sum)(const uint64_t* words, size_t num_words);
  // out[i] = the product of the i-th row with one token's inputs.
  void (*dot_neurons)(const NeuronRows& rows, const NeuronInputs& x, float* out);
  // sums (num_sums) = the rows, each times its factor, added up.
  void (*add_neurons)(const NeuronRows& rows, const float* factors, float* sums);
  // Outputs of a tile of ColumnMatrix.
  int column_tile;
  // Inputs whose code is 0 are not read. Returns the bytes of codes that were read of each of the tiles.
  size_t (*multiply_columns)(const ColumnTask& task);
  // x[i] = 0 where |x[i]| * norms[i] is at most the first threshold; a NaN stays. Where `bits` is not null, bits[i] becomes
  // kHighBits where it is at most the second one, else kAllBits.
  void (*keep_wanted)(float* x, const float* norms, Thresholds thresholds, int size, uint8_t* bits);
};

// Tables that this build has and this CPU can run, best first; "portable" is always the last.
std::vector<const Kernels*> available_kernels();

// The table of a name, or the best one for "auto".
// Throws std::invalid_argument: the CPU or the build has no such table.
const Kernels& find_kernels(const std::string& name);

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
// Ask the system for the memory of tiles; whether the CPU has any must be known.
bool may_use_amx();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
#endif

// Write row `row` of a matrix as float: (cols,).
void unpack_row(const Matrix& w, int row, float* out);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);
inline float bf16_to_float(uint16_t bits) {
  union {
    uint32_t word;
    float value;
  } cast{uint32_t(bits) << 16};
  return cast.value;
}

}  // namespace coreinfer
