// A layer whose up and down projections lie neuron by neuron: what the gate makes zero is not read, by ReLU, or as something
// is taken off all gates and what becomes negative is zero. Neurons go in chunks
// whose sums are added up in their order, so that the same floats come out on any number of threads.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "threads.h"
#include "weights.h"

namespace coreinfer {

inline int num_chunks(int num_neurons) { return (num_neurons + kChunkNeurons - 1) / kChunkNeurons; }
// The neurons of a chunk.
inline Range chunk_neurons(int chunk, int num_neurons) {
  return {chunk * kChunkNeurons, std::min((chunk + 1) * kChunkNeurons, num_neurons)};
}

// Write rounded inputs as rows of neurons take them.
void interleave(const Activations& x, const Matrix& w, NeuronInputBuffer& out);

// A gate as `find_active` takes it: what is 0 or less is zero, and what is not a number stays so.
inline float rest_of_gate(float gate, const float* bias, int id, float cutoff) {
  return gate + (bias ? bias[id] : 0.0f) - cutoff;
}

// Find the neurons of a chunk whose gate is positive or not a number, and ask for the beginning of their weights. `gates` are
// the chunk's, before the bias, if there is one, and before `cutoff` is taken off.
void find_active(const FfnWeights& ffn, int chunk, const float* gates, const float* bias, float cutoff,
                 ActiveNeurons& active);

// sums (num_sums) = what a chunk's active neurons put out; their values become the inputs of the down projection.
void run_active(const NeuronFunction& function, const Kernels& kernels, const FfnWeights& ffn, const NeuronInputs& x,
                ActiveNeurons& active, float* sums);

// Put sums, rows [begin, end) of 16, where the outputs are that they belong to; there are `num_outputs`.
void put_in_order(const float* sums, int begin, int end, int num_outputs, float* out);

}  // namespace coreinfer
