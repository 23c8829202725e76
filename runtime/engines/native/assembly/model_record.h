// What a manifest says of the model: its family, shapes and settings.
#pragma once

#include <string>

#include "json.h"

namespace coreinfer {

struct ModelRecord {
  std::string name, family, activation;
  int num_layers, hidden_size, ffn_dim, vocab_size, num_heads, num_kv_heads, head_dim, max_positions;
  int num_experts = 0, num_chosen = 0;  // of a layer, and of these for a token; 0 where the FFN is one
  bool gated, ffn_bias, tied_head, normalizes_experts = false;
  Json config;  // transformers' own

  // Of a layer, or of each of its experts.
  int ffn_neurons() const { return num_experts > 0 ? ffn_dim / num_experts : ffn_dim; }
};

// Throws std::invalid_argument: fields are missing, or are what no model has.
ModelRecord read_record(const Json& model);

}  // namespace coreinfer
