#include "model_record.h"

#include "refusals.h"

namespace coreinfer {
namespace {

// Sizes of matrices are computed in 32 bits.
constexpr int kMost = 1 << 30;

int size_of(const Json& model, const char* key) {
  const int value = model.integer(key);
  if (value < 1 || value > kMost) refuse(key, "1 to " + std::to_string(kMost), std::to_string(value));
  return value;
}

void check_heads(const ModelRecord& record) {
  const int num_heads = record.num_heads, num_kv_heads = record.num_kv_heads;
  if (num_heads % num_kv_heads)
    refuse("num_heads", "a multiple of " + std::to_string(num_kv_heads), std::to_string(num_heads));
  if (record.head_dim % 2) refuse("head_dim", "an even number", std::to_string(record.head_dim));
  if (num_heads > kMost / record.head_dim)
    refuse("num_heads", "at most " + std::to_string(kMost / record.head_dim), std::to_string(num_heads));
}

void read_experts(const Json& model, ModelRecord& record) {
  if (!Json::is_given(model.find("experts"))) return;
  const Json& experts = model.object("experts");
  record.num_experts = size_of(experts, "num_experts");
  record.num_chosen = size_of(experts, "num_chosen");
  record.normalizes_experts = experts.flag("normalizes");
  if (record.num_chosen > record.num_experts)
    refuse("num_chosen", "1 to " + std::to_string(record.num_experts), std::to_string(record.num_chosen));
  if (record.ffn_dim % record.num_experts)
    refuse("ffn_dim", "a multiple of " + std::to_string(record.num_experts), std::to_string(record.ffn_dim));
  if (!record.gated) refuse("experts", "gates", "none");
}

}  // namespace

ModelRecord read_record(const Json& model) {
  ModelRecord record;
  record.name = model.string("name");
  record.family = model.string("family");
  record.activation = model.string("activation");
  record.num_layers = size_of(model, "num_layers");
  record.hidden_size = size_of(model, "hidden_size");
  record.ffn_dim = size_of(model, "ffn_dim");
  record.vocab_size = size_of(model, "vocab_size");
  record.num_heads = size_of(model, "num_heads");
  record.num_kv_heads = size_of(model, "num_kv_heads");
  record.head_dim = size_of(model, "head_dim");
  record.max_positions = size_of(model, "max_positions");
  record.gated = model.flag("gated");
  record.ffn_bias = model.flag("ffn_bias");
  record.tied_head = model.flag("tied_head");
  record.config = model.object("config");
  read_experts(model, record);
  check_heads(record);
  return record;
}

}  // namespace coreinfer
