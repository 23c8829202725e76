#include "families.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "refusals.h"
#include "rotary.h"
#include "settings_reader.h"
#include "stream_parts.h"

namespace coreinfer {
namespace {

const char kSliding[] = "sliding_attention", kFull[] = "full_attention";

using Names = std::vector<const char*>;

const Names kRotarySettings = {"max_position_embeddings", "model_type", "rms_norm_eps", "rope_parameters",
                               "sliding_window"};

Names with(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

Family llama(const char* name, const Names& more_settings = {}) {
  return {name, with(kRotarySettings, more_settings), {"input_layernorm"}, {"post_attention_layernorm"}};
}

Family granite(const char* name) {
  return llama(name, {"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"});
}

Family qwen3() {
  Family family = llama("qwen3", {"layer_types"});
  family.head_norms = true;
  return family;
}

Family gemma(const char* name) {
  Family family =
      llama(name, {"attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"});
  family.attention_norms.output = "post_attention_layernorm";
  family.ffn_norms = {"pre_feedforward_layernorm", "post_feedforward_layernorm"};
  family.norm_offset = 1.0f;
  family.scales_embedding = true;
  return family;
}

Family gemma2() {
  Family family = gemma("gemma2");
  family.caps_scores = true;
  return family;
}

Family gemma3() {
  Family family = gemma("gemma3");
  family.head_norms = true;
  return family;
}

Family gemma3n() {
  Family family = gemma("gemma3n");
  family.settings =
      with(kRotarySettings, {"activation_sparsity_pattern", "altup_active_idx", "altup_correct_scale",
                             "altup_num_inputs", "final_logit_softcapping", "hidden_size_per_layer_input",
                             "laurel_rank", "layer_types", "num_kv_shared_layers", "vocab_size_per_layer_input"});
  family.norm_offset = 0.0f;
  family.head_norms = family.value_norms = family.plain_scores = family.streams = true;
  return family;
}

Family olmo(const char* name, const Names& more_settings = {}) {
  Family family = llama(name, more_settings);
  family.attention_norms = {nullptr, "post_attention_layernorm"};
  family.ffn_norms = {nullptr, "post_feedforward_layernorm"};
  family.head_norms = family.joint_head_norms = true;
  return family;
}

Family phi3() {
  Family family = llama("phi3");
  family.inputs = "qkv_proj.";
  family.rotates_part = family.slides_always = true;
  return family;
}

Family stablelm() {
  Family family = llama("stablelm", {"layer_norm_eps", "qk_layernorm", "use_parallel_residual"});
  family.epsilon = "layer_norm_eps";
  family.layer_norm = family.rotates_part = family.one_parallel_norm = true;
  return family;
}

Family gpt_neox() {
  Family family = llama("gpt_neox", {"layer_norm_eps", "use_parallel_residual"});
  family.root = "gpt_neox.";
  family.embedding = "embed_in";
  family.attention = "attention.";
  family.inputs = "query_key_value.";
  family.output = "dense";
  family.final_norm = "final_layer_norm";
  family.epsilon = "layer_norm_eps";
  family.layer_norm = family.rotates_part = true;
  return family;
}

Family gpt2() {
  Family family = {
      "gpt2", {"layer_norm_epsilon", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"}, {"ln_1"}, {"ln_2"}};
  family.root = "transformer.";
  family.embedding = "wte";
  family.positions = "wpe";
  family.layers = "h.";
  family.attention = "attn.";
  family.inputs = "c_attn.";
  family.output = "c_proj";
  family.final_norm = "ln_f";
  family.epsilon = "layer_norm_epsilon";
  family.layer_norm = true;
  return family;
}

Family starcoder2() {
  Family family = llama("starcoder2", {"norm_epsilon"});
  family.epsilon = "norm_epsilon";
  family.layer_norm = family.slides_always = true;
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
  family.positions = "embed_positions";
  family.position_offset = 2;
  family.layer_norm = true;
  return family;
}

Family mixtral() {
  Family family = llama("mixtral");
  family.slides_always = true;
  family.mixture = "mlp.";
  return family;
}

Family qwen3_moe() {
  Family family = llama("qwen3_moe");
  family.head_norms = family.slides_always = true;
  family.mixture = "mlp.";
  return family;
}

Family olmoe() {
  Family family = llama("olmoe", {"clip_qkv"});
  family.head_norms = family.joint_head_norms = true;
  family.mixture = "mlp.";
  return family;
}

Family granitemoe() {
  Family family = granite("granitemoe");
  family.mixture = "block_sparse_moe.";
  return family;
}

Family gpt_oss() {
  Family family = llama("gpt_oss", {"layer_types", "swiglu_alpha", "swiglu_limit"});
  family.mixture = "mlp.";
  family.router_bias = family.sinks = true;
  return family;
}

const std::vector<Family>& families() {
  static const std::vector<Family> table = {
      opt(),
      llama("llama"),
      llama("ministral", {"layer_types"}),
      llama("smollm3", {"layer_types", "no_rope_layers"}),
      granite("granite"),
      llama("qwen2", {"layer_types"}),
      qwen3(),
      gemma2(),
      gemma3(),
      gemma3n(),
      olmo("olmo2"),
      olmo("olmo3", {"layer_types"}),
      phi3(),
      stablelm(),
      starcoder2(),
      gpt_neox(),
      gpt2(),
      mixtral(),
      qwen3_moe(),
      olmoe(),
      granitemoe(),
      gpt_oss(),
  };
  return table;
}

void check_computed(const ModelRecord& record, const Family& family) {
  std::string unknown;
  for (const char* key : {"attn_logit_softcapping", "clip_qkv", "qk_layernorm", "scale_attn_by_inverse_layer_idx"})
    if (is_given(record, family, key) && !(family.caps_scores && std::strcmp(key, "attn_logit_softcapping") == 0))
      unknown += (unknown.empty() ? "" : ", ") + std::string(key);
  for (const char* key : {"layer_norm_elementwise_affine", "scale_attn_weights"}) {
    const Json* setting = find_setting(record, family, key);
    if (setting && !(setting->kind == Json::Kind::boolean && setting->boolean))
      unknown += (unknown.empty() ? "" : ", ") + std::string(key) + " false";
  }
  if (!unknown.empty()) throw Unsupported("model " + record.name + ": the native engine has no " + unknown);
}

void read_layer_kinds(const ModelRecord& record, const Family& family, const SettingsReader& reader,
                      Settings& settings) {
  settings.slides_always =
      family.slides_always || (reader.has("model_type") && record.config.string("model_type") == "mistral");
  if (reader.given("no_rope_layers"))
    // Turned about: 1 where a layer has rotary embeddings.
    for (const Json& rotates : reader.per_layer("no_rope_layers")) settings.rotates.push_back(Json::is_given(&rotates));
  if (!reader.given("layer_types")) return;
  for (const Json& kind : reader.per_layer("layer_types")) {
    if (kind.text != kSliding && kind.text != kFull)
      throw Unsupported("model " + record.name + ": the native engine has no layers of type '" + kind.text + "'");
    settings.layer_kinds.push_back(kind.text);
  }
}

// How many dimensions of each head are rotated.
int rotated_size(const Json& parameters, const ModelRecord& record, const Family& family) {
  const Json* share = parameters.find("partial_rotary_factor");
  const double value = Json::is_given(share) ? parameters.real("partial_rotary_factor") : 1.0;
  if (value == 1.0) return record.head_dim;
  if (!family.rotates_part)
    throw Unsupported("model " + record.name + ": the native engine rotates whole heads of " + family.name +
                      ", not a partial_rotary_factor of them");
  const int size = static_cast<int>(record.head_dim * value);
  if (size < 2 || size > record.head_dim || size % 2)
    refuse("partial_rotary_factor", "an even number of " + std::to_string(record.head_dim) + " dimensions",
           std::to_string(size));
  return size;
}

void read_rotary(const ModelRecord& record, const Family& family, Settings& settings) {
  const Json* parameters = find_setting(record, family, "rope_parameters");
  if (!parameters || parameters->kind == Json::Kind::null) return;
  parameters = &record.config.object("rope_parameters");
  const bool is_one = parameters->find("rope_theta") != nullptr;
  for (size_t i = 0; i < (is_one ? 1 : parameters->items.size()); ++i) {
    const Json& table = is_one ? *parameters : parameters->items[i];
    settings.rotary_kinds.push_back(is_one ? "" : parameters->keys.at(i));
    const int context = SettingsReader(record, family).integer("max_position_embeddings", record.max_positions);
    settings.rotary.push_back(
        rotary_table(table, rotated_size(table, record, family), {record.max_positions, context}));
  }
}

}  // namespace

const Family& family_of(const ModelRecord& record) {
  for (const Family& family : families())
    if (record.family == family.name) return family;
  throw Unsupported("model " + record.name + ": the native engine has no family '" + record.family + "'");
}

Settings read_settings(const ModelRecord& record, const Family& family) {
  check_computed(record, family);
  const Json& config = record.config;
  const SettingsReader reader(record, family);
  Settings settings{};
  settings.epsilon = reader.has(family.epsilon) ? config.real(family.epsilon) : 1e-5;
  settings.attention_scale =
      family.plain_scores ? 1.0
                          : reader.factor("attention_multiplier",
                                          1.0 / std::sqrt(reader.real("query_pre_attn_scalar", record.head_dim)));
  settings.embedding_scale =
      reader.factor("embedding_multiplier", family.scales_embedding ? std::sqrt(double(record.hidden_size)) : 1.0);
  settings.residual_scale = reader.factor("residual_multiplier");
  settings.logits_divisor = reader.factor("logits_scaling");
  settings.score_limit = reader.real("attn_logit_softcapping", 0.0);
  settings.logit_limit = reader.real("final_logit_softcapping", 0.0);
  settings.swiglu_alpha = reader.factor("swiglu_alpha", 1.702);
  settings.swiglu_limit = reader.factor("swiglu_limit", 7.0);
  settings.embedding_width = reader.integer("word_embed_proj_dim", record.hidden_size);
  settings.sliding_window = reader.integer("sliding_window", 0);
  const Json* before = find_setting(record, family, "do_layer_norm_before");
  settings.norms_after = before && before->kind == Json::Kind::boolean && !before->boolean;
  settings.parallel = reader.given("use_parallel_residual");
  if (settings.embedding_width < 1) refuse("word_embed_proj_dim", "at least 1", "less");
  if (settings.sliding_window < 0) refuse("sliding_window", "at least 1", "less");
  if (settings.score_limit < 0) refuse("attn_logit_softcapping", "above 0", "less");
  if (settings.logit_limit < 0) refuse("final_logit_softcapping", "above 0", "less");
  if (settings.swiglu_limit < 0) refuse("swiglu_limit", "above 0", "less");
  read_layer_kinds(record, family, reader, settings);
  if (family.streams) read_streams(record, reader, settings);
  read_rotary(record, family, settings);
  return settings;
}

std::string Settings::kind_of(int layer) const {
  if (!layer_kinds.empty()) return layer_kinds[layer];
  return slides_always ? kSliding : kFull;
}

int Settings::rotary_of(int layer) const {
  if (rotary.empty() || (!rotates.empty() && !rotates[layer])) return -1;
  const auto found = std::find(rotary_kinds.begin(), rotary_kinds.end(), kind_of(layer));
  return found == rotary_kinds.end() ? 0 : static_cast<int>(found - rotary_kinds.begin());
}

int Settings::cache_of(int layer) const {
  const int first_shared = static_cast<int>(layer_kinds.size()) - num_shared_caches;
  if (num_shared_caches == 0 || layer < first_shared) return layer;
  for (int other = first_shared; other-- > 0;)
    if (layer_kinds[other] == layer_kinds[layer]) return other;
  return -1;
}

int Settings::window_of(int layer) const { return kind_of(layer) == kSliding ? sliding_window : 0; }

Nonlinearity nonlinearity_of(const std::string& activation) {
  static const std::pair<const char*, Nonlinearity> known[] = {{"silu", Nonlinearity::silu},
                                                               {"swish", Nonlinearity::silu},
                                                               {"gelu_pytorch_tanh", Nonlinearity::gelu_tanh},
                                                               {"gelu_new", Nonlinearity::gelu_tanh},
                                                               {"gelu_fast", Nonlinearity::gelu_tanh},
                                                               {"gelu", Nonlinearity::gelu_erf},
                                                               {"relu", Nonlinearity::relu},
                                                               {"clamped_swiglu", Nonlinearity::clamped_swiglu}};
  std::string names;
  for (const auto& [name, nonlinearity] : known) {
    if (activation == name) return nonlinearity;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw Unsupported("activation '" + activation + "': the native engine has " + names);
}

}  // namespace coreinfer
