// What families call the tensors of their base, and the settings that they are computed with.
#pragma once

#include <string>
#include <vector>

#include "model_record.h"
#include "weights.h"

namespace coreinfer {

// Names in a layer: of the norm before a sublayer (or after it, see Settings), and of the norm of its output.
struct NormNames {
  const char* first;
  const char* output = nullptr;
};

struct Family {
  const char* name;
  std::vector<const char*> settings;  // those of the config that models of this family are computed with
  NormNames attention_norms, ffn_norms;
  const char* root = "model.";    // path to the decoder
  const char* output = "o_proj";  // the attention's output projection
  const char* final_norm = "norm";
  float norm_offset = 0.0f;       // added to the weight of a norm
  int position_offset = 0;        // learned positions that are free in front; 0 where none are learned
  bool layer_norm = false;        // else RMS norm
  bool head_norms = false;        // of each query and key
  bool scales_embedding = false;  // by the root of the width
};

// Throws Unsupported: the engine has no such family.
const Family& family_of(const ModelRecord& record);

// Settings that models of the family are computed with. A config may hold any others, which transformers leaves alone too.
struct Settings {
  double epsilon;
  double query_scalar;  // whose root the scores are divided by
  int embedding_width;
  bool norms_after;    // norms of the residual stream after each sublayer, in place of those before it
  int sliding_window;  // 0 for none
  bool slides_always;  // where the config does not say which layers do
  std::vector<std::string> layer_kinds;   // empty where all are alike
  std::vector<std::string> rotary_kinds;  // of the tables; "" where one is for all
  std::vector<RotaryTable> rotary;

  int rotary_of(int layer) const;  // number of the table, -1 for none
  int window_of(int layer) const;

 private:
  std::string kind_of(int layer) const;
};

// Throws Unsupported: one of them asks for what the engine does not compute. std::invalid_argument: one is wrong.
Settings read_settings(const ModelRecord& record, const Family& family);

// Throws Unsupported.
Nonlinearity nonlinearity_of(const std::string& activation);

}  // namespace coreinfer
