// A decoder-only transformer whose weights lie in mapped files.
#pragma once

#include <array>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "threads.h"

namespace coreinfer {

// A norm's vectors; no weight means that the norm is left out.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  bool present() const { return weight != nullptr; }
};

struct Linear {
  Matrix weight;
  const float* bias = nullptr;
};

struct AttentionWeights {
  Linear query, key, value, output;
  Norm query_norm, key_norm;  // of each head
  int rope = -1;              // which rotary table, -1 for none
  int window = 0;             // positions that a token sees, itself included; 0 for all
};

// Norms before a sublayer, of its output, and of the residual stream after it; families use some of them.
struct SublayerNorms {
  Norm before, output, after;
};

struct FfnWeights {
  Linear gate, up, down;  // no gate: ungated
  int num_neurons() const { return up.weight.rows; }
};

using Ffn = std::vector<FfnWeights>;  // one a layer

struct Layer {
  AttentionWeights attention;
  SublayerNorms attention_norms, ffn_norms;
};

struct RotaryTable {
  std::vector<float> inverse_frequencies;  // (head_dim / 2)
  float scale = 1.0f;                      // of cos and sin
};

struct ModelWeights {
  int hidden = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, vocab = 0, max_positions = 0;
  float epsilon = 0.0f, attention_scale = 0.0f, embedding_scale = 1.0f;
  bool layer_norm = false;  // else RMS norm
  Nonlinearity nonlinearity = Nonlinearity::silu;
  Matrix embedding, positions, project_in, project_out, head;  // positions and projections may be empty
  int position_offset = 0;
  Norm final_norm;
  std::vector<RotaryTable> rotary;
  std::vector<Layer> layers;

  int query_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
  int group_size() const { return num_heads / num_kv_heads; }
};

// Keys and values of one sequence's tokens, fp16. Memory is reserved for all positions and taken page by page. Copies
// share the memory.
class KvCache {
 public:
  KvCache(int num_layers, int num_kv_heads, int head_dim, int max_positions);

  uint16_t* keys(int layer, int head) const {
    return base_.get() + (size_t(layer) * num_kv_heads_ + head) * head_halves_;
  }
  uint16_t* values(int layer, int head) const { return keys(layer, head) + size_t(capacity_) * head_dim_; }
  int value_stride() const { return value_stride_; }
  // Write one token's key and value of one head.
  void store(const Kernels& kernels, int layer, int head, int position, const float* key, const float* value) const;
  size_t bytes_per_token(int num_layers) const {
    return size_t(num_layers) * num_kv_heads_ * (head_dim_ + value_stride_) * 2;
  }

 private:
  int num_kv_heads_, head_dim_, value_stride_, capacity_;
  size_t head_halves_;
  std::shared_ptr<uint16_t> base_;
};

// One text: what it keeps, and how much of it.
struct Sequence {
  KvCache cache;
  int num_cached = 0;
};

// A token to be read at a position of a sequence.
struct Row {
  int32_t id;
  int position;
  const KvCache* cache;
};

// Memory that starts at a cache line.
template <class T>
struct Buffer {
  std::unique_ptr<T[], void (*)(T*)> data{nullptr, +[](T* p) { ::operator delete[](p, std::align_val_t(64)); }};
  void resize(size_t count) {
    data.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
    for (size_t i = 0; i < count; ++i) data.get()[i] = T{};
  }
  T* get() const { return data.get(); }
};

// Activations with memory of their own.
struct ActivationBuffer {
  Activations view;
  void resize(int num_tokens, int size, bool bf16 = false);

 private:
  Buffer<float> values_, scales_, sums_, energies_;
  Buffer<int8_t> codes_;
  Buffer<uint16_t> bf16_, rests_;
};

// Called with the FFN activations (tokens, ffn_dim) of each layer, row stride in floats, outside of all phases.
using Watcher = std::function<void(int layer, const float* activations, int num_tokens, int stride)>;

// Memory of the passes, allocated once.
struct TokenScratch {
  struct PerThread {
    Buffer<float> residual, queries, angles, partial, maxima, sums;
    ActivationBuffer inputs;
  };
  std::vector<PerThread> threads;
  std::vector<AttentionPart> parts;  // what each thread attended to
  Buffer<float> qkv, attended, gate, up, ffn_out;
  ActivationBuffer neurons;
};

struct BlockScratch {
  struct PerThread {
    Buffer<float> gate, up, angles;
    Buffer<float> heads, maxima, sums;  // of one key-value head's queries, for each part of the positions
    std::vector<AttentionPart> parts;
    ActivationBuffer inputs;
  };
  std::vector<PerThread> threads;
  Buffer<float> residual, qkv, sublayer_out;
  ActivationBuffer inputs, neurons;
};

// Weights, the FFN in use, the sequences and the threads.
struct Decoder {
  Decoder(ModelWeights weights, const Kernels& kernels, int num_threads, int max_neurons);

  // Sequences are named by number, 0 is always there. A dropped one's number is given out again.
  int add_sequence();
  void drop_sequence(int number);
  bool has(int number) const { return number >= 0 && number < int(sequences.size()) && sequences[number]; }

  // Append tokens to a sequence; ids and room must have been checked. `logits` is (num_tokens or 1, padded vocabulary).
  // With `screened`, logits of tokens that cannot be the likeliest are approximate where the head allows it.
  void forward(int sequence, const int32_t* ids, int num_tokens, bool all_logits, bool screened, float* logits,
               const Watcher& watcher);
  // Append tokens to several sequences, those of one sequence in their order, with one read of the weights for
  // kBlockTokens of them. Each row's logits (padded vocabulary) are to the bit what `forward` gives for that token
  // alone, whatever else is read with it.
  void forward_rows(const int32_t* numbers, const int32_t* ids, int num_rows, float* logits);
  // Bytes of weights and cache that one more token reads.
  size_t bytes_per_token(int num_tokens, bool screened) const;

  const ModelWeights weights;
  const Kernels& kernels;
  std::shared_ptr<const Ffn> ffn;
  std::vector<std::unique_ptr<Sequence>> sequences;  // empty where one was dropped
  // Of the sequence that `forward` is appending to.
  int num_cached = 0;
  KvCache cache;
  Threads threads;
  TokenScratch token;
  BlockScratch block;
  Buffer<float> deviations;  // (padded vocabulary), of a screened head
};

constexpr int kBlockTokens = 256;  // tokens that share one read of the weights
constexpr size_t kPrefetchBytes = 8192;      // of the next phase's codes, asked for before its barrier
constexpr size_t kPartPrefetchBytes = 1536;  // of the next part's codes, asked for before the one before it is done
constexpr int kUnit = 32;          // neurons that one thread computes and quantizes together

void allocate(TokenScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads);
// `bf16`: with room for inputs in bfloat16.
void allocate(BlockScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads, bool bf16);
// Logits of one token's final hidden state by the head, all threads together.
void compute_head(Decoder& decoder, const Activations& x, int thread, bool screened, float* logits);
void decode_token(Decoder& decoder, int32_t id, bool screened, float* logits);
// How a block is read.
struct BlockOptions {
  bool exact = false;       // attention to the bit as decode_token computes it; else in the fastest way
  bool all_logits = false;  // else the last row's, if `logits` is not null
  bool screened = false;
};
void read_block(Decoder& decoder, const std::vector<Row>& rows, const BlockOptions& options, float* logits,
                const Watcher& watcher);

// Parts that both passes share (layer.cpp). Vectors of one token.
struct Job {  // rows of one matrix into y, as one of several matrices with the same inputs
  const Matrix* weight;
  float* y;
};
void multiply_share(const Kernels& kernels, std::initializer_list<Job> jobs, const Activations& x, int num_tokens,
                    size_t y_stride, int thread, Threads& threads);
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
// out = norm(x), rounded as the matrices want it.
void prepare_inputs(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x,
                    const Activations& out);
// x += norms.output(y + bias), then norms.after in place; y is overwritten.
void finish_sublayer(const ModelWeights& weights, const Kernels& kernels, const SublayerNorms& norms, const float* bias,
                     float* y, float* x);
// Bias, norm and rotation of one token's heads, in place.
void prepare_heads(const ModelWeights& weights, const Kernels& kernels, const Linear& linear, const Norm& norm,
                   const float* angles, int num_heads, float* heads);
// head_dim / 2 cosines, then as many sines, for each rotary table.
void fill_angles(const ModelWeights& weights, int position, float* angles);
const float* angles_of(const ModelWeights& weights, const AttentionWeights& attention, const float* angles);
// act(gate) * up for units [begin, end) of one token; what lies beyond the last neuron becomes 0.
void finish_neurons(const ModelWeights& weights, const Kernels& kernels, const FfnWeights& ffn, int begin, int end,
                    float* gate, float* up, const Activations& out);
inline int first_position(const AttentionWeights& attention, int position) {
  return attention.window > 0 && position >= attention.window ? position - attention.window + 1 : 0;
}

// The positions that one of several threads attends to for the token at `position`; may be empty.
Range attention_share(const AttentionWeights& attention, int position, int thread, int num_threads);

// A matrix that owns its memory: rows or columns picked from another (gather.cpp).
struct OwnedMatrix {
  Matrix view;
  std::shared_ptr<void> memory;
};
OwnedMatrix gather_rows(const Matrix& w, const int32_t* ids, int count);
// Columns of quantized matrices become int8, whatever they were: their scales differ.
OwnedMatrix gather_columns(const Matrix& w, const int32_t* ids, int count);

}  // namespace coreinfer
