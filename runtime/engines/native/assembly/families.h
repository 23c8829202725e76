// What families call the tensors of their base, and the settings that they are computed with.
#pragma once

#include <string>
#include <vector>

#include "model_record.h"
#include "weights.h"

namespace coreinfer {

// Names in a layer: of the norm before a sublayer (or after it, see Settings), and of the norm of its output; null where
// there is none.
struct NormNames {
  const char* first;
  const char* output = nullptr;
};

struct Family {
  const char* name;
  std::vector<const char*> settings;  // those of the config that models of this family are computed with
  NormNames attention_norms, ffn_norms;
  const char* root = "model.";  // path to the decoder
  const char* embedding = "embed_tokens";
  const char* positions = nullptr;       // the table of learned positions; null where none are learned
  const char* layers = "layers.";        // path from the decoder to its layers
  const char* attention = "self_attn.";  // path from a layer to its attention
  const char* inputs = "";               // path to the attention's projections into it
  const char* output = "o_proj";         // the attention's output projection
  const char* final_norm = "norm";
  const char* epsilon = "rms_norm_eps";  // the setting of norms; without it 1e-5
  float norm_offset = 0.0f;              // added to the weight of a norm
  int position_offset = 0;               // learned positions that are free in front
  bool layer_norm = false;               // else RMS norm
  bool head_norms = false;               // of each query and key
  bool joint_head_norms = false;         // of all queries together, and of all keys
  bool scales_embedding = false;         // by the root of the width
  bool caps_scores = false;              // where attn_logit_softcapping is set
  bool rotates_part = false;             // of a head, where partial_rotary_factor says so
  bool slides_always = false;            // in all layers, where there is a sliding_window
  bool one_parallel_norm = false;        // of parallel blocks: the FFN's norm is the attention's
  const char* mixture = nullptr;         // path from a layer to its mixture of experts, where its FFN is one
  bool router_bias = false;              // of that mixture
  bool sinks = false;                    // of each head, in the softmax over positions
  bool value_norms = false;              // of each head, without weights
  bool plain_scores = false;             // not scaled by the root of a head's size
  bool streams = false;                  // several side by side, see Streams
};

// Throws Unsupported: the engine has no such family.
const Family& family_of(const ModelRecord& record);

// Of models with several streams; see Streams.
struct StreamSettings {
  int count = 0, active = 0, rank = 0, token_size = 0, table_rows = 0;
  bool scales_output = false;
  std::vector<double> cut_shares;  // of each layer, of the gates that become 0

  bool cuts_gates(int layer) const { return !cut_shares.empty() && cut_shares[layer] != 0.0; }
};

// Settings that models of the family are computed with. A config may hold any others, which transformers leaves alone too.
struct Settings {
  double epsilon;
  double attention_scale, embedding_scale, residual_scale;
  double logits_divisor;
  double score_limit, logit_limit;    // 0 for none
  double swiglu_alpha, swiglu_limit;  // of the activation clamped_swiglu
  int embedding_width;
  bool norms_after;           // norms of the residual stream after each sublayer, in place of those before it
  bool parallel;              // attention and FFN both read what enters the layer
  int sliding_window;         // 0 for none
  bool slides_always;         // where the config does not say which layers do
  std::vector<bool> rotates;  // of each layer; empty where all do
  std::vector<std::string> layer_kinds;   // empty where all are alike
  std::vector<std::string> rotary_kinds;  // of the tables; "" where one is for all
  std::vector<RotaryTable> rotary;
  StreamSettings streams;
  int num_shared_caches = 0;  // layers at the end that attend to the keys and values of earlier ones

  int rotary_of(int layer) const;  // number of the table, -1 for none
  int window_of(int layer) const;
  // The layer whose keys and values a layer attends to: itself, or the last of its kind that has any.
  int cache_of(int layer) const;

 private:
  std::string kind_of(int layer) const;
};

// Throws Unsupported: one of them asks for what the engine does not compute. std::invalid_argument: one is wrong.
Settings read_settings(const ModelRecord& record, const Family& family);

// Throws Unsupported.
Nonlinearity nonlinearity_of(const std::string& activation);

}  // namespace coreinfer
