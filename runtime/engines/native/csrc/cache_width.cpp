#include "cache_width.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace coreinfer {
namespace {

// Beyond it fp16 has no numbers; half of that leaves room for rotations and for the rounding of inputs.
constexpr float kMost = 65504.0f / 2;
// Rounded to fp16, larger keys move scores by more than hundredths. Ordinary keys are below 6; biases of Qwen2.5-Coder-0.5B's
// reach 211 in five of its layers, a few in a head, and fp16 costs it a KL of 0.000002. Values are averaged: of them only the
// share counts.
constexpr float kMostTypicalKey = 256.0f;
constexpr float kUnknown = std::numeric_limits<float>::infinity();

float length(const float* x, int size) {
  double squares = 0.0;
  for (int i = 0; i < size; ++i) squares += double(x[i]) * x[i];
  return static_cast<float>(std::sqrt(squares));
}

float largest(const float* x, int size) {
  float most = 0.0f;
  for (int i = 0; i < size; ++i) most = std::max(most, std::fabs(x[i]));
  return most;
}

// What a matrix is given, or a row of it gives.
struct Size {
  float most;     // that it can be
  float typical;  // root mean square
};

// Lengths of vectors (size) that come out of a norm, as long as its weights allow.
Size norm_size(const Norm& norm, int size) {
  const float root = std::sqrt(static_cast<float>(size)), bias = norm.bias ? length(norm.bias, size) : 0.0f;
  return {root * largest(norm.weight, size) + bias, length(norm.weight, size) + bias};
}

// Length of a row of weights, or where they are quantized a bound of it by the scales alone.
float row_bound(const Matrix& w, int row) {
  double squares = 0.0;
  if (!w.quantized()) {
    for (int i = 0; i < w.cols; ++i) {
      const float value = bf16_to_float(w.bf16[size_t(row) * w.cols + i]);
      squares += double(value) * value;
    }
    return static_cast<float>(std::sqrt(squares));
  }
  for (int g = 0; g < w.num_groups(); ++g) {
    const size_t at = (size_t(row / kBlockRows) * w.num_groups() + g) * kBlockRows + row % kBlockRows;
    const float zero = w.format == Format::int4 ? w.zeros[at] / 16.0f : 128.0f;
    const float code = w.format == Format::int4 ? std::max(zero, 15.0f - zero) : 128.0f;
    const double most = double(half_to_float(w.scales[at])) * code;
    squares += kGroup * most * most;
  }
  return static_cast<float>(std::sqrt(squares));
}

float row_length(const Matrix& w, int row, std::vector<float>& scratch) {
  scratch.resize(w.cols);
  unpack_row(w, row, scratch.data());
  return length(scratch.data(), w.cols);
}

// Whether a row of a linear layer can give more than `limit`, given lengths of inputs.
bool exceeds(const Linear& linear, int row, const Size& input, const Size& limit, std::vector<float>& scratch) {
  const float bias = linear.bias ? std::fabs(linear.bias[row]) : 0.0f;
  const float mean = 1.0f / std::sqrt(static_cast<float>(linear.weight.cols));
  const auto over = [&](float weights) {
    return !(bias + weights * input.most < limit.most) || !(bias + weights * input.typical * mean < limit.typical);
  };
  // The weights themselves are read only where their scales leave it open.
  return over(row_bound(linear.weight, row)) && over(row_length(linear.weight, row, scratch));
}

bool any_exceeds(const Linear& linear, const Size& input, const Size& limit) {
  std::vector<float> scratch;
  for (int row = 0; row < linear.weight.rows; ++row)
    if (exceeds(linear, row, input, limit, scratch)) return true;
  return false;
}

// Lengths of the residual stream before the first layer, where some layer reads it as it is.
Size embedded_size(const ModelWeights& model) {
  const auto norms_inputs = [](const Layer& layer) { return layer.attention_norms.before.present(); };
  const bool wanted = !std::all_of(model.layers.begin(), model.layers.end(), norms_inputs);
  if (!wanted || !model.project_in.empty() || !model.positions.empty()) return {kUnknown, kUnknown};
  float most = 0.0f;
  for (int row = 0; row < model.embedding.rows; ++row) most = std::max(most, row_bound(model.embedding, row));
  return {most * model.embedding_scale, most * model.embedding_scale};
}

// The same after a layer: bounded where all that it adds is, or where it ends in a norm.
Size after_layer(const ModelWeights& model, const Layer& layer, Size stream) {
  if (layer.ffn_norms.after.present()) return norm_size(layer.ffn_norms.after, model.hidden);
  for (const Norm* norm : {&layer.attention_norms.output, &layer.ffn_norms.output}) {
    const Size added = norm->present() ? norm_size(*norm, model.hidden) : Size{kUnknown, kUnknown};
    const float scale = std::fabs(model.residual_scale);
    stream = {stream.most + added.most * scale, stream.typical + added.typical * scale};
  }
  return stream;
}

}  // namespace

void choose_cache_width(ModelWeights& model) {
  float scale = 1.0f;  // of rotations
  for (const RotaryTable& table : model.rotary) scale = std::max(scale, table.scale);
  const Size key_limit = {kMost / scale, kMostTypicalKey / scale}, value_limit = {kMost, kUnknown};
  Size stream = embedded_size(model);
  for (Layer& layer : model.layers) {
    const AttentionWeights& attention = layer.attention;
    const Norm& before = layer.attention_norms.before;
    const Size input = before.present() ? norm_size(before, model.hidden) : stream;
    // A norm bounds values by the root of their number.
    bool wide = !attention.value_norm.present() && any_exceeds(attention.value, input, value_limit);
    if (attention.key_norm.present()) {
      const int size = model.joint_head_norms ? model.kv_size() : model.head_dim;
      const Size key = norm_size(attention.key_norm, size);
      wide |= !(key.most < key_limit.most) || !(largest(attention.key_norm.weight, size) < key_limit.typical);
    } else {
      wide = wide || any_exceeds(attention.key, input, key_limit);
    }
    layer.wide_cache = wide;
    stream = after_layer(model, layer, stream);
  }
}

}  // namespace coreinfer
