#include "families.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "refusals.h"
#include "rotary.h"

namespace coreinfer {
namespace {

const char kSliding[] = "sliding_attention", kFull[] = "full_attention";

using Names = std::vector<const char*>;

const Names kRotarySettings = {"model_type", "rms_norm_eps", "rope_parameters", "sliding_window"};

Names with(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

Family llama(const char* name, const Names& more_settings = {}) {
  return {name, with(kRotarySettings, more_settings), {"input_layernorm"}, {"post_attention_layernorm"}};
}

Family qwen3() {
  Family family = llama("qwen3", {"layer_types"});
  family.head_norms = true;
  return family;
}

Family gemma3() {
  Family family =
      llama("gemma3", {"attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"});
  family.attention_norms.output = "post_attention_layernorm";
  family.ffn_norms = {"pre_feedforward_layernorm", "post_feedforward_layernorm"};
  family.norm_offset = 1.0f;
  family.head_norms = true;
  family.scales_embedding = true;
  return family;
}

Family opt() {
  Family family = {"opt",
                   {"do_layer_norm_before", "layer_norm_elementwise_affine", "word_embed_proj_dim"},
                   {"self_attn_layer_norm"},
                   {"final_layer_norm"}};
  family.root = "model.decoder.";
  family.output = "out_proj";
  family.final_norm = "final_layer_norm";
  family.position_offset = 2;
  family.layer_norm = true;
  return family;
}

const Json* find_setting(const ModelRecord& record, const Family& family, const char* key) {
  const auto same = [key](const char* name) { return std::strcmp(name, key) == 0; };
  return std::any_of(family.settings.begin(), family.settings.end(), same) ? record.config.find(key) : nullptr;
}

bool is_given(const ModelRecord& record, const Family& family, const char* key) {
  return Json::is_given(find_setting(record, family, key));
}

void check_computed(const ModelRecord& record, const Family& family) {
  std::string unknown;
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"})
    if (is_given(record, family, key)) unknown += (unknown.empty() ? "" : ", ") + std::string(key);
  const Json* affine = find_setting(record, family, "layer_norm_elementwise_affine");
  if (affine && !(affine->kind == Json::Kind::boolean && affine->boolean))
    unknown += (unknown.empty() ? "" : ", ") + std::string("layer_norm_elementwise_affine");
  if (!unknown.empty()) throw Unsupported("model " + record.name + ": the native engine has no " + unknown);
}

void read_layer_kinds(const ModelRecord& record, const Family& family, Settings& settings) {
  settings.slides_always =
      find_setting(record, family, "model_type") && record.config.string("model_type") == "mistral";
  if (!is_given(record, family, "layer_types")) return;
  for (const Json& kind : record.config.array("layer_types")) {
    if (kind.text != kSliding && kind.text != kFull)
      throw Unsupported("model " + record.name + ": the native engine has no layers of type '" + kind.text + "'");
    settings.layer_kinds.push_back(kind.text);
  }
  if (settings.layer_kinds.size() != static_cast<size_t>(record.num_layers))
    refuse("layer_types", std::to_string(record.num_layers) + " layers", std::to_string(settings.layer_kinds.size()));
}

void read_rotary(const ModelRecord& record, const Family& family, Settings& settings) {
  const Json* parameters = find_setting(record, family, "rope_parameters");
  if (!parameters || parameters->kind == Json::Kind::null) return;
  parameters = &record.config.object("rope_parameters");
  const bool is_one = parameters->find("rope_theta") != nullptr;
  for (size_t i = 0; i < (is_one ? 1 : parameters->items.size()); ++i) {
    settings.rotary_kinds.push_back(is_one ? "" : parameters->keys.at(i));
    settings.rotary.push_back(rotary_table(is_one ? *parameters : parameters->items[i], record.head_dim));
  }
}

}  // namespace

const Family& family_of(const ModelRecord& record) {
  static const std::vector<Family> families = {llama("llama"), llama("qwen2", {"layer_types"}), qwen3(), gemma3(),
                                               opt()};
  for (const Family& family : families)
    if (record.family == family.name) return family;
  throw Unsupported("model " + record.name + ": the native engine has no family '" + record.family + "'");
}

Settings read_settings(const ModelRecord& record, const Family& family) {
  check_computed(record, family);
  const Json& config = record.config;
  const auto given = [&](const char* key) { return is_given(record, family, key); };
  Settings settings{};
  settings.epsilon = find_setting(record, family, "rms_norm_eps") ? config.real("rms_norm_eps") : 1e-5;
  settings.query_scalar = given("query_pre_attn_scalar") ? config.real("query_pre_attn_scalar") : record.head_dim;
  settings.embedding_width = given("word_embed_proj_dim") ? config.integer("word_embed_proj_dim") : record.hidden_size;
  settings.sliding_window = given("sliding_window") ? config.integer("sliding_window") : 0;
  const Json* before = find_setting(record, family, "do_layer_norm_before");
  settings.norms_after = before && before->kind == Json::Kind::boolean && !before->boolean;
  if (settings.embedding_width < 1) refuse("word_embed_proj_dim", "at least 1", "less");
  if (settings.sliding_window < 0) refuse("sliding_window", "at least 1", "less");
  read_layer_kinds(record, family, settings);
  read_rotary(record, family, settings);
  return settings;
}

std::string Settings::kind_of(int layer) const {
  if (!layer_kinds.empty()) return layer_kinds[layer];
  return slides_always ? kSliding : kFull;
}

int Settings::rotary_of(int layer) const {
  if (rotary.empty()) return -1;
  const auto found = std::find(rotary_kinds.begin(), rotary_kinds.end(), kind_of(layer));
  return found == rotary_kinds.end() ? 0 : static_cast<int>(found - rotary_kinds.begin());
}

int Settings::window_of(int layer) const { return kind_of(layer) == kSliding ? sliding_window : 0; }

Nonlinearity nonlinearity_of(const std::string& activation) {
  static const std::pair<const char*, Nonlinearity> known[] = {{"silu", Nonlinearity::silu},
                                                               {"swish", Nonlinearity::silu},
                                                               {"gelu_pytorch_tanh", Nonlinearity::gelu_tanh},
                                                               {"gelu_new", Nonlinearity::gelu_tanh},
                                                               {"gelu", Nonlinearity::gelu_erf},
                                                               {"relu", Nonlinearity::relu}};
  std::string names;
  for (const auto& [name, nonlinearity] : known) {
    if (activation == name) return nonlinearity;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw Unsupported("activation '" + activation + "': the native engine has " + names);
}

}  // namespace coreinfer
