// Memory of models with several streams, allocated once.
#pragma once

#include <vector>

#include "scratch.h"
#include "weights.h"

namespace coreinfer {

// Of the tokens of a pass; a token that is read alone has them once for each thread.
struct StreamValues {
  Buffer<float> streams;   // (tokens, streams, hidden)
  Buffer<float> normed;    // (tokens, hidden): what a layer's attention read
  Buffer<float> embedded;  // (tokens, layers * token_size), and 16 more
  Buffer<float> cutoffs;   // (tokens): what is taken off a layer's gates
  ActivationBuffer low;    // (tokens, Streams::low_size)
};

// What matrices gave, of which each thread computes a part.
struct StreamProducts {
  Buffer<float> streams;   // (streams - 1, tokens, hidden)
  Buffer<float> embedded;  // (tokens, layers * token_size)
  Buffer<float> narrow;    // (tokens, low_size or rows of a cutoff's spread)
  Buffer<float> wide;      // (tokens, hidden)
};

struct StreamScratch {
  std::vector<StreamValues> alone;  // of each thread
  StreamValues block;
  StreamProducts products, block_products;
};

// Nothing is allocated where a model has but a residual stream.
void allocate(StreamScratch& scratch, const ModelWeights& weights, int num_threads, bool bf16);

// Of all weights that a token reads of them.
size_t stream_bytes(const Streams& streams);

}  // namespace coreinfer
