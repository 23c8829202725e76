// The weights of a decoder-only transformer, which lie in mapped files.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "matrix.h"

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
  Norm query_norm, key_norm;  // of each head, or of all of them together
  Norm value_norm;            // of each head
  int cache = 0;              // whose keys and values it attends to, of the layers that have any; its own where it has
  const float* sinks = nullptr;  // (heads): scores that take their share of the softmax and have no value; may be null
  int rope = -1;                 // which rotary table, -1 for none
  int window = 0;                // positions that a token sees, itself included; 0 for all
  bool has_own_cache() const { return !key.weight.empty(); }
  // Norms of the columns of query, key and value together, and of output's; null where no input is ever left out.
  const float *qkv_norms = nullptr, *heads_norms = nullptr;
};

// Norms before a sublayer, of its output, and of the residual stream after it; families use some of them.
struct SublayerNorms {
  Norm before, output, after;
};

struct FfnWeights {
  Linear gate, up, down;                                        // no gate: ungated
  const float *gate_up_norms = nullptr, *down_norms = nullptr;  // as those of attention
  std::vector<FfnWeights> experts;  // in the place of these, one for each of the router's; empty where one is left out
  int num_neurons() const { return up.weight.rows; }
  // Whether down, and in a gated FFN up, are read neuron by neuron: in int4_rows, with down's columns as rows.
  bool by_neuron() const { return down.weight.format == Format::int4_rows; }
  // What all neurons are computed with.
  const Linear& first() const { return gate.weight.empty() ? up : gate; }
};

using Ffn = std::vector<FfnWeights>;  // one a layer

// What is taken off all gates of a token's FFN, before those that become negative are 0: the product with `mean` and the
// length of that with `spread`. None where `mean` is null.
struct GateCutoff {
  Matrix spread;                // (rows, hidden)
  const float* mean = nullptr;  // (hidden)
};

// A small matrix that all threads read as it is.
struct SmallMatrix {
  Matrix stored;
  const float* values = nullptr;  // (rows, cols); null where there is none
};

// What a layer has besides in a model of several streams.
struct StreamLayer {
  Linear low_in, low_out;  // a way around the attention through few dimensions, and the norm of what it gives
  Norm low_norm;
  Norm router_norm;
  SmallMatrix router;                   // (streams, hidden)
  SmallMatrix prediction, correction;   // (streams * streams, streams), (streams, streams)
  const float* output_scale = nullptr;  // (hidden); may be null
  Linear token_gate, token_out;         // around what the token's own embedding in this layer is multiplied by
  Norm token_norm;
};

// Streams side by side, of which layers compute with one, predict the others, and correct all by what came out
// (AltUp, arXiv 2301.13310); and embeddings of each token in each layer.
struct Streams {
  int count = 0, active = 0;              // none where a model has but a residual stream
  int token_size = 0;                     // of an embedding in a layer
  std::vector<Matrix> entering, leaving;  // (hidden, hidden), of all streams but the first
  Matrix token_table, token_in;  // (vocabulary, layers * token_size); from the embedding, (layers * token_size, hidden)
  Norm token_norm;
  std::vector<StreamLayer> layers;
  // Most inputs of the matrices that do not read `hidden` numbers.
  int low_size() const {
    int most = token_size;
    for (const StreamLayer& layer : layers) most = std::max(most, layer.low_in.weight.rows);
    return most;
  }
};

// Which experts a token uses; no weight where the FFN is one.
struct Router {
  Matrix weight;                // (experts, hidden)
  const float* bias = nullptr;  // (experts); may be null
  int num_chosen = 0;
  bool normalizes = false;  // whether the weights of those that are chosen are divided by their sum
};

struct Layer {
  AttentionWeights attention;
  Router router;
  GateCutoff cutoff;
  bool wide_cache = false;  // its keys and values are kept as float, for fp16 does not hold them
  SublayerNorms attention_norms, ffn_norms;
};

struct RotaryTable {
  std::vector<float> inverse_frequencies;  // (rotated / 2): of each head so many dimensions, the first, are rotated
  float scale = 1.0f;                      // of cos and sin
  int half() const { return static_cast<int>(inverse_frequencies.size()); }
};

struct ModelWeights {
  int hidden = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, vocab = 0, max_positions = 0;
  float epsilon = 0.0f, attention_scale = 0.0f, embedding_scale = 1.0f;
  float residual_scale = 1.0f;                   // of what a sublayer adds to the residual stream
  float score_limit = 0.0f, logit_limit = 0.0f;  // x becomes limit * tanh(x / limit); 0 for none
  bool parallel = false;                         // attention and FFN both read what enters a layer
  bool layer_norm = false;                       // else RMS norm
  bool joint_head_norms = false;                 // norms of queries and keys take all heads together
  NeuronFunction neuron_function;
  Matrix embedding, positions, project_in, project_out, head;  // positions and projections may be empty
  int position_offset = 0;
  Norm final_norm;
  std::vector<RotaryTable> rotary;
  std::vector<Layer> layers;
  Streams streams;

  int query_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
  int group_size() const { return num_heads / num_kv_heads; }
  // Whether any layer's neurons may be zero for most of a token's, so that they may lie neuron by neuron.
  bool has_zero_neurons() const {
    const auto cuts = [](const Layer& layer) { return layer.cutoff.mean != nullptr; };
    return neuron_function.kind == Nonlinearity::relu || std::any_of(layers.begin(), layers.end(), cuts);
  }
  // Of a row of a matrix that lies neuron by neuron.
  int num_neuron_parts() const { return round_up(hidden, kPartGroups * kGroup) / (kPartGroups * kGroup); }
};

}  // namespace coreinfer
