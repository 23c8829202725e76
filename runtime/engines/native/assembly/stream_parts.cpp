#include "stream_parts.h"

#include <algorithm>

namespace coreinfer {
namespace {

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
