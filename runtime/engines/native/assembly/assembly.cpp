#include "assembly.h"

#include <cmath>

#include "cache_width.h"
#include "families.h"
#include "parts.h"
#include "refusals.h"
#include "rotary.h"
#include "stream_parts.h"

namespace coreinfer {
namespace {

SublayerNorms sublayer_norms(const Parts& parts, const std::string& root, const NormNames& names) {
  const int hidden = parts.record.hidden_size;
  SublayerNorms norms;
  if (names.first) (parts.settings.norms_after ? norms.after : norms.before) = parts.norm(root + names.first, hidden);
  if (names.output) norms.output = parts.norm(root + names.output, hidden);
  return norms;
}

Router router(const Parts& parts, const std::string& root) {
  const ModelRecord& record = parts.record;
  if (!parts.family.mixture != (record.num_experts == 0))
    refuse("experts", parts.family.mixture ? "some in a layer" : "none", std::to_string(record.num_experts));
  if (record.num_experts == 0) return {};
  const std::string path = root + parts.family.mixture + "router";
  const Matrix weight = parts.base.matrix(path + ".weight", record.num_experts, record.hidden_size);
  const float* bias = parts.family.router_bias ? parts.vector(path + ".bias", record.num_experts) : nullptr;
  return {weight, bias, record.num_chosen, record.normalizes_experts};
}

Layer assemble_layer(const Parts& parts, const ModelWeights& model, int index) {
  const std::string root = parts.family.root + (parts.family.layers + std::to_string(index) + ".");
  const std::string attention_root = root + parts.family.attention, inputs_root = attention_root + parts.family.inputs;
  Layer layer;
  AttentionWeights& attention = layer.attention;
  attention.query = parts.linear(inputs_root + "q_proj", model.query_size(), model.hidden);
  attention.cache = parts.settings.cache_of(index);
  const bool own_cache = attention.cache == index;
  if (own_cache) {
    attention.key = parts.linear(inputs_root + "k_proj", model.kv_size(), model.hidden);
    attention.value = parts.linear(inputs_root + "v_proj", model.kv_size(), model.hidden);
  }
  attention.output = parts.linear(attention_root + parts.family.output, model.hidden, model.query_size());
  if (parts.family.head_norms) {
    const bool joint = parts.family.joint_head_norms;
    attention.query_norm = parts.norm(attention_root + "q_norm", joint ? model.query_size() : model.head_dim);
    if (own_cache) attention.key_norm = parts.norm(attention_root + "k_norm", joint ? model.kv_size() : model.head_dim);
  }
  if (parts.family.value_norms && own_cache) attention.value_norm = {parts.ones(model.head_dim)};
  if (parts.family.sinks) attention.sinks = parts.vector(attention_root + "sinks", model.num_heads);
  attention.rope = parts.settings.rotary_of(index);
  attention.window = parts.settings.window_of(index);
  const std::string shares_root = "layers." + std::to_string(index) + ".";
  attention.qkv_norms = parts.base.vector(shares_root + "qkv_norms", model.hidden);
  attention.heads_norms = parts.base.vector(shares_root + "o_norms", model.query_size());
  layer.attention_norms = sublayer_norms(parts, root, parts.family.attention_norms);
  const bool shares_norm = model.parallel && parts.family.one_parallel_norm;
  layer.ffn_norms = sublayer_norms(parts, root, shares_norm ? parts.family.attention_norms : parts.family.ffn_norms);
  layer.router = router(parts, root);
  if (parts.settings.streams.cuts_gates(index)) layer.cutoff = gate_cutoff(parts, root + "mlp.cutoff.");
  return layer;
}

void set_scalars(ModelWeights& model, const ModelRecord& record, const Family& family, const Settings& settings) {
  model.hidden = record.hidden_size;
  model.num_heads = record.num_heads;
  model.num_kv_heads = record.num_kv_heads;
  model.head_dim = record.head_dim;
  model.vocab = record.vocab_size;
  model.max_positions = record.max_positions;
  model.position_offset = family.position_offset;
  model.epsilon = static_cast<float>(settings.epsilon);
  model.attention_scale = static_cast<float>(settings.attention_scale);
  model.embedding_scale = static_cast<float>(settings.embedding_scale);
  model.residual_scale = static_cast<float>(settings.residual_scale);
  model.score_limit = static_cast<float>(settings.score_limit);
  model.logit_limit = static_cast<float>(settings.logit_limit);
  model.parallel = settings.parallel;
  model.layer_norm = family.layer_norm;
  model.joint_head_norms = family.joint_head_norms;
  model.neuron_function = nonlinearity_of(record.activation);
  model.neuron_function.alpha = static_cast<float>(settings.swiglu_alpha);
  model.neuron_function.most = static_cast<float>(settings.swiglu_limit);
  if (model.neuron_function.kind == Nonlinearity::clamped_swiglu && !record.gated)
    refuse("activation", "one of an FFN without gates", record.activation);
  model.rotary = settings.rotary;
}

void set_tables(ModelWeights& model, const Parts& parts) {
  const std::string root = parts.family.root;
  const int width = parts.settings.embedding_width;
  model.embedding = parts.base.matrix(root + parts.family.embedding + ".weight", model.vocab, width);
  model.head = parts.record.tied_head ? model.embedding : parts.base.matrix("lm_head.weight", model.vocab, width);
  if (width != model.hidden) {
    model.project_in = parts.base.matrix(root + "project_in.weight", model.hidden, width);
    model.project_out = parts.base.matrix(root + "project_out.weight", width, model.hidden);
  }
  if (parts.family.positions)
    model.positions = parts.base.matrix(root + parts.family.positions + ".weight",
                                        model.max_positions + model.position_offset, model.hidden);
}

void check_neurons(const ModelRecord& record, const std::vector<int>& num_neurons) {
  if (num_neurons.size() != static_cast<size_t>(record.num_layers))
    refuse("layers", std::to_string(record.num_layers), std::to_string(num_neurons.size()));
  for (const int count : num_neurons)
    if (count < 1 || count > record.ffn_dim)
      refuse("neurons of a layer", "1 to " + std::to_string(record.ffn_dim), std::to_string(count));
}

// Null where the FFN, or each expert, has none.
const float* ffn_bias(const ModelRecord& record, const TensorFile& file, const std::string& name, int size) {
  if (file.has(name) != record.ffn_bias) refuse(file.name(), record.ffn_bias ? name : "no " + name, "the opposite");
  return file.vector(name, size);
}

}  // namespace

ModelWeights assemble_model(const ModelRecord& record, const TensorFile& base, Memory& memory) {
  const Family& family = family_of(record);
  const Settings settings = read_settings(record, family);
  const Parts parts{record, family, settings, base, memory};
  ModelWeights model;
  set_scalars(model, record, family, settings);
  set_tables(model, parts);
  // OPT has models without one.
  const std::string final_norm = std::string(family.root) + family.final_norm;
  if (!family.layer_norm || base.has(final_norm + ".weight"))
    // What it puts out goes into the head alone, whose logits are divided.
    model.final_norm = parts.norm(final_norm, model.hidden, static_cast<float>(settings.logits_divisor));
  for (int index = 0; index < record.num_layers; ++index) model.layers.push_back(assemble_layer(parts, model, index));
  if (family.streams) model.streams = assemble_streams(parts, model);
  choose_cache_width(model);
  return model;
}

Ffn assemble_ffn(const ModelRecord& record, const TensorFile& file, const std::vector<int>& num_neurons) {
  if (record.num_experts > 0) refuse("FFN", "experts", "none");
  check_neurons(record, num_neurons);
  const Settings settings = read_settings(record, family_of(record));
  Ffn ffn;
  for (const int count : num_neurons) {
    const std::string root = "layers." + std::to_string(ffn.size()) + ".";
    const bool by_neuron = file.has(root + "down.columns4");
    if (by_neuron && nonlinearity_of(record.activation) != Nonlinearity::relu &&
        !settings.streams.cuts_gates(static_cast<int>(ffn.size())))
      refuse(file.name() + ": " + root + "down.columns4",
             "an activation that is zero for many neurons (relu), or a layer that cuts gates off", record.activation);
    const auto bias = [&](const char* role, int size) { return ffn_bias(record, file, root + role + "_bias", size); };
    const auto inner = [&](const char* role, bool rows) {
      return Linear{rows ? file.neurons(root + role + ".rows4", count, record.hidden_size)
                         : file.matrix(root + role, count, record.hidden_size),
                    bias(role, count)};
    };
    FfnWeights layer;
    if (record.gated) layer.gate = inner("gate", false);
    layer.up = inner("up", by_neuron && record.gated);
    layer.down.weight = by_neuron ? file.neurons(root + "down.columns4", count, record.hidden_size)
                                  : file.matrix(root + "down", record.hidden_size, count);
    layer.down.bias = bias("down", record.hidden_size);
    layer.gate_up_norms = file.vector(root + "gate_up_norms", record.hidden_size);
    layer.down_norms = file.vector(root + "down_norms", count);
    ffn.push_back(layer);
  }
  return ffn;
}

namespace {

// The experts of a layer that a file has: those that it lists, or all.
std::vector<int> experts_in(const ModelRecord& record, const TensorFile& file, const std::string& listed) {
  std::vector<int> numbers;
  if (!file.has(listed)) {
    for (int number = 0; number < record.num_experts; ++number) numbers.push_back(number);
    return numbers;
  }
  numbers = file.list(listed);
  int least = 0;
  for (const int number : numbers) {
    if (number < least || number >= record.num_experts)
      refuse(file.name() + ": " + listed, "ascending numbers below " + std::to_string(record.num_experts),
             std::to_string(number));
    least = number + 1;
  }
  const int count = static_cast<int>(numbers.size());
  if (count < record.num_chosen)
    refuse(file.name() + ": " + listed, std::to_string(record.num_chosen) + " experts or more", std::to_string(count));
  return numbers;
}

}  // namespace

Ffn assemble_experts(const ModelRecord& record, const TensorFile& file, const std::vector<int>& num_neurons) {
  if (record.num_experts == 0) refuse("experts", "none", "some");
  check_neurons(record, num_neurons);
  const int hidden = record.hidden_size;
  Ffn ffn(record.num_layers);
  for (int index = 0; index < record.num_layers; ++index) {
    const std::string listed = "layers." + std::to_string(index) + ".experts";
    const std::vector<int> numbers = experts_in(record, file, listed);
    const int count = static_cast<int>(numbers.size()), neurons = num_neurons[index] / count;
    if (num_neurons[index] % count || neurons < 1 || neurons > record.ffn_neurons())
      refuse("neurons of a layer",
             std::to_string(count) + " times 1 to " + std::to_string(record.ffn_neurons()) + " of them",
             std::to_string(num_neurons[index]));
    ffn[index].experts.resize(record.num_experts);
    for (const int number : numbers) {
      const std::string root = listed + "." + std::to_string(number) + ".";
      const auto linear = [&](const char* role, int rows, int cols) {
        return Linear{file.matrix(root + role, rows, cols), ffn_bias(record, file, root + role + "_bias", rows)};
      };
      FfnWeights expert;
      expert.gate = linear("gate", neurons, hidden);
      expert.up = linear("up", neurons, hidden);
      expert.down = linear("down", hidden, neurons);
      expert.gate_up_norms = file.vector(root + "gate_up_norms", hidden);
      expert.down_norms = file.vector(root + "down_norms", neurons);
      ffn[index].experts[number] = expert;
    }
  }
  return ffn;
}

Ffn keep_experts(const Ffn& all, const std::vector<std::vector<int>>& experts) {
  if (experts.size() != all.size()) refuse("layers", std::to_string(all.size()), std::to_string(experts.size()));
  Ffn kept(all.size());
  for (size_t index = 0; index < all.size(); ++index) {
    const std::vector<FfnWeights>& from = all[index].experts;
    kept[index].experts.resize(from.size());
    for (const int number : experts[index]) {
      if (number < 0 || static_cast<size_t>(number) >= from.size())
        refuse("experts of a layer", "numbers below " + std::to_string(from.size()), std::to_string(number));
      kept[index].experts[number] = from[number];
    }
  }
  return kept;
}

}  // namespace coreinfer
