// Memory of the passes, allocated once.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "weights.h"

namespace coreinfer {

constexpr int kBlockTokens = 256;  // tokens that share one read of the weights
constexpr int kUnit = 32;          // neurons that one thread computes and quantizes together

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

// Activations with memory of their own. Where there are several tokens, kernels may read kSpareTokens more.
constexpr int kSpareTokens = 15;
struct ActivationBuffer {
  Activations view;  // of inputs that read all bits
  // The same where some may read the high ones alone, which codes are multiplied with.
  Activations halved() const {
    Activations inputs = view;
    inputs.bf16 = inputs.rests = nullptr;
    inputs.bits = bits_.get();
    inputs.low_sums = low_sums_.get();
    return inputs;
  }
  void resize(int num_tokens, int size, bool bf16 = false);

 private:
  Buffer<float> values_, scales_, sums_, energies_, low_sums_;
  Buffer<int8_t> codes_;
  Buffer<uint8_t> bits_;
  Buffer<uint16_t> bf16_, rests_;
};

// Inputs of rows in int4_rows, with memory of their own.
class NeuronInputBuffer {
 public:
  void resize(int num_parts);
  NeuronInputs view() const { return {codes_.get(), scales_.get(), sums_.get()}; }
  int8_t* codes() { return codes_.get(); }
  float* scales() { return scales_.get(); }
  float* sums() { return sums_.get(); }

 private:
  Buffer<int8_t> codes_;
  Buffer<float> scales_, sums_;
};

constexpr int kChunkNeurons = 256;  // whose sums are added up together

// The neurons of a chunk that are not zero.
struct ActiveNeurons {
  int32_t ids[kChunkNeurons];
  float values[kChunkNeurons];  // gates, then what goes into the down projection
  int count = 0;
  uint64_t num_found = 0, num_asked = 0;  // in all chunks of a token
};

struct TokenScratch {
  struct PerThread {
    Buffer<float> residual, queries, angles, partial, maxima, sums;
    ActivationBuffer inputs;
    // Where neurons are left out.
    NeuronInputBuffer neuron_inputs;
    ActiveNeurons active[2];  // of the chunk that is computed, and of the one after it
    size_t column_bytes = 0;  // read of weights that lie input by input
  };
  std::vector<PerThread> threads;
  std::vector<AttentionPart> parts;  // what each thread attended to
  Buffer<float> qkv, attended, gate, up, ffn_out;
  Buffer<float> chunk_sums;    // (chunks, num_sums)
  Buffer<float> segment_sums;  // of the largest matrix that lies input by input
  ActivationBuffer neurons;
};

struct BlockScratch {
  struct PerThread {
    Buffer<float> gate, up;
    Buffer<float> heads, maxima, sums;  // of one key-value head's queries, for each part of the positions
    std::vector<AttentionPart> parts;
    ActivationBuffer inputs;
    ActiveNeurons active;
    Buffer<float> chunk_sums;  // (num_sums)
  };
  std::vector<PerThread> threads;
  std::vector<NeuronInputBuffer> neuron_inputs;  // of each token
  Buffer<float> neuron_sums;                     // (tokens, num_sums)
  Buffer<float> angles, residual, qkv, sublayer_out;
  ActivationBuffer inputs, neurons;
};

constexpr int kScreenRows = 32;  // more at once are scored exactly

// Of a screened head, for each row that is computed at once.
struct HeadScratch {
  Buffer<float> bounds;  // (rows, row blocks): the most that a block's tokens may score
  Buffer<float> least;   // (rows): what the likeliest scores at least
};

void allocate(HeadScratch& scratch, const Matrix& head);
void allocate(TokenScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads);
// `bf16`: with room for inputs in bfloat16.
void allocate(BlockScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads, bool bf16);

}  // namespace coreinfer
