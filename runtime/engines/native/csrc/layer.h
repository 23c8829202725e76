// Parts that both passes share: what one token goes through besides matrix products (layer.cpp).
#pragma once

#include <array>
#include <initializer_list>

#include "columns.h"
#include "kernels.h"
#include "threads.h"
#include "weights.h"

namespace coreinfer {

constexpr size_t kPrefetchBytes = 8192;      // of the next phase's codes, asked for before its barrier
constexpr size_t kPartPrefetchBytes = 1536;  // of the next part's codes, asked for before the one before it is done

struct Job {  // rows of one matrix into y, as one of several matrices with the same inputs
  const Matrix* weight;
  float* y;
};
struct Batch {  // tokens that are multiplied together
  Activations x;
  int num_tokens;
  int num_exact;  // at the end, rounded to codes as a single token is, whatever the others are rounded to
  int num_fast() const { return num_tokens - num_exact; }
  Activations token(int t) const { return t < num_fast() ? x.token(t) : in_codes(x.token(t)); }
  // Inputs that are rounded to codes.
  static Activations in_codes(Activations x) {
    x.bf16 = nullptr;
    return x;
  }
};
// The blocks [begin, end) of rows of a product.
void multiply(const Kernels& kernels, const Matrix& w, const Batch& batch, float* y, size_t y_stride, int begin,
              int end);
void multiply_share(const Kernels& kernels, std::initializer_list<Job> jobs, const Batch& batch, size_t y_stride,
                    int thread, Threads& threads);
inline void prefetch_bytes(const void* start, size_t size) {
  for (size_t offset = 0; offset < size; offset += 64) __builtin_prefetch(static_cast<const char*>(start) + offset);
}
// Ask for the first `num_bytes` of codes from a block on, and for their scales.
void prefetch_block(const Matrix& w, int block, size_t num_bytes);
// Matrices that one phase multiplies together; null where there are fewer.
using Matrices = std::array<const Matrix*, 3>;
// Ask for the first weights of a thread's share of a phase, just before it waits for the others.
void prefetch_share(const Matrices& matrices, int thread, int num_threads);
void embed(const ModelWeights& weights, const Kernels& kernels, int32_t id, int position, const Activations& scratch,
           float* x);
void apply_norm(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x, int size,
                float* out);
// out = norm(x) without what is not wanted, rounded as the matrices want it.
void prepare_inputs(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x,
                    const Activations& out, const Filter& filter = {});
// Make one token's inputs [first, first + count) 0 that are not wanted, and say of the others which bits they read.
void keep_wanted(const Kernels& kernels, const Filter& filter, const Activations& x, int first, int count);
// x += norms.output(y + bias), then norms.after in place; y is overwritten.
void finish_sublayer(const ModelWeights& weights, const Kernels& kernels, const SublayerNorms& norms, const float* bias,
                     float* y, float* x);
// How a layer rotates the heads of a token: `half` cosines, then as many sines; none where it does not.
struct Rotation {
  const float* angles;
  int half;
};
// Bias, norm and rotation of one token's heads, in place.
void prepare_heads(const ModelWeights& weights, const Kernels& kernels, const Linear& linear, const Norm& norm,
                   const Rotation& rotation, int num_heads, float* heads);
// Bias and norm of one token's values, in place.
void prepare_values(const ModelWeights& weights, const Kernels& kernels, const AttentionWeights& attention,
                    float* values);
// For each rotary table head_dim numbers, of which it fills as many as it rotates.
void fill_angles(const ModelWeights& weights, int position, float* angles);
Rotation rotation_of(const ModelWeights& weights, const AttentionWeights& attention, const float* angles);
// act(gate) * up for units [begin, end) without what the down projection does not want, rounded; `gate` and `up` are
// (tokens, neurons of these units). What lies beyond the last neuron becomes 0. `cutoffs` (tokens) are taken off the gates;
// null where none are.
void finish_neurons(const ModelWeights& weights, const Kernels& kernels, const FfnWeights& ffn, int begin, int end,
                    float* gate, float* up, const Batch& out, const Filter& filter = {},
                    const float* cutoffs = nullptr);
inline int first_position(const AttentionWeights& attention, int position) {
  return attention.window > 0 && position >= attention.window ? position - attention.window + 1 : 0;
}

// The positions that one of several threads attends to for the token at `position`; may be empty.
Range attention_share(const AttentionWeights& attention, int position, int thread, int num_threads);

}  // namespace coreinfer
