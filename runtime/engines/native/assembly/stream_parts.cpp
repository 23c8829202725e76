#include "stream_parts.h"

#include <algorithm>

#include "refusals.h"
#include "streams.h"

namespace coreinfer {
namespace {

constexpr int kMostRows = 1 << 30;

SmallMatrix small_matrix(const Parts& parts, const std::string& path, int rows, int cols) {
  const Matrix stored = parts.base.matrix(path + ".weight", rows, cols);
  std::vector<float> values(size_t(rows) * cols);
  for (int row = 0; row < rows; ++row) unpack_row(stored, row, values.data() + size_t(row) * cols);
  return {stored, parts.keep(std::move(values))};
}

StreamLayer stream_layer(const Parts& parts, const ModelWeights& model, const std::string& root) {
  const StreamSettings& settings = parts.settings.streams;
  const int hidden = model.hidden, count = settings.count;
  StreamLayer layer;
  layer.low_in = parts.linear(root + "laurel.linear_left", settings.rank, hidden);
  layer.low_out = parts.linear(root + "laurel.linear_right", hidden, settings.rank);
  layer.low_norm = parts.norm(root + "laurel.post_laurel_norm", hidden);
  layer.router_norm = parts.norm(root + "altup.router_norm", hidden);
  layer.router = small_matrix(parts, root + "altup.modality_router", count, hidden);
  layer.prediction = small_matrix(parts, root + "altup.prediction_coefs", count * count, count);
  layer.correction = small_matrix(parts, root + "altup.correction_coefs", count, count);
  if (settings.scales_output) layer.output_scale = parts.vector(root + "altup.correct_output_scale", hidden);
  layer.token_gate = parts.linear(root + "per_layer_input_gate", settings.token_size, hidden);
  layer.token_out = parts.linear(root + "per_layer_projection", hidden, settings.token_size);
  layer.token_norm = parts.norm(root + "post_per_layer_input_norm", hidden);
  return layer;
}

}  // namespace

void read_streams(const ModelRecord& record, const SettingsReader& reader, Settings& settings) {
  StreamSettings& streams = settings.streams;
  streams.count = reader.size("altup_num_inputs", 2, kMostStreams);
  streams.active = reader.size("altup_active_idx", 0, streams.count - 1);
  streams.rank = reader.size("laurel_rank", 1, record.hidden_size);
  streams.token_size = reader.size("hidden_size_per_layer_input", 1, record.hidden_size);
  streams.table_rows = reader.size("vocab_size_per_layer_input", 1, kMostRows);
  streams.scales_output = reader.given("altup_correct_scale");
  for (const Json& share : reader.per_layer("activation_sparsity_pattern")) streams.cut_shares.push_back(share.number);
  settings.num_shared_caches = reader.size("num_kv_shared_layers", 0, record.num_layers - 1);
  for (int layer = 0; layer < record.num_layers; ++layer)
    if (settings.cache_of(layer) < 0)
      refuse("num_kv_shared_layers", "a layer of each kind before these", std::to_string(settings.num_shared_caches));
}

Streams assemble_streams(const Parts& parts, const ModelWeights& model) {
  const StreamSettings& settings = parts.settings.streams;
  const std::string root = parts.family.root;
  const int hidden = model.hidden, num_layers = parts.record.num_layers, width = num_layers * settings.token_size;
  Streams streams;
  streams.count = settings.count;
  streams.active = settings.active;
  streams.token_size = settings.token_size;
  for (int number = 0; number + 1 < settings.count; ++number) {
    const std::string end = "." + std::to_string(number) + ".weight";
    streams.entering.push_back(parts.base.matrix(root + "altup_projections" + end, hidden, hidden));
    streams.leaving.push_back(parts.base.matrix(root + "altup_unembed_projections" + end, hidden, hidden));
  }
  streams.token_table = parts.base.matrix(root + "embed_tokens_per_layer.weight", settings.table_rows, width);
  streams.token_in = parts.base.matrix(root + "per_layer_model_projection.weight", width, hidden);
  streams.token_norm = parts.norm(root + "per_layer_projection_norm", settings.token_size);
  for (int layer = 0; layer < num_layers; ++layer)
    streams.layers.push_back(stream_layer(parts, model, root + parts.family.layers + std::to_string(layer) + "."));
  return streams;
}

GateCutoff gate_cutoff(const Parts& parts, const std::string& root) {
  const int hidden = parts.record.hidden_size;
  return {parts.base.matrix(root + "spread.weight", std::min(hidden, parts.record.ffn_dim), hidden),
          parts.vector(root + "mean", hidden)};
}

}  // namespace coreinfer
