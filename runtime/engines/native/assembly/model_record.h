// What a manifest says of the model: its family, shapes and settings.
#pragma once

#include <string>

#include "json.h"

namespace coreinfer {

struct ModelRecord {
  std::string name, family, activation;
  int num_layers, hidden_size, ffn_dim, vocab_size, num_heads, num_kv_heads, head_dim, max_positions;
  bool gated, ffn_bias, tied_head;
  Json config;  // transformers' own
};

// Throws std::invalid_argument: fields are missing, or are what no model has.
ModelRecord read_record(const Json& model);

}  // namespace coreinfer
