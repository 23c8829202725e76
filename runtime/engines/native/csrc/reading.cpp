// From Python's tuples and arrays to weights in place; what does not fit is refused here.
#include "reading.h"

#include <pybind11/stl.h>

#include "cache_width.h"

namespace coreinfer {

void refuse(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(what + ": expected " + expected + ", got " + got);
}

namespace {

const void* bytes_of(const py::handle& array, size_t num_bytes, const std::string& what, Owners& owners) {
  const py::array values = py::cast<py::array>(array);
  if (!(values.flags() & py::array::c_style)) refuse(what, "a contiguous array", "another");
  if (size_t(values.nbytes()) != num_bytes)
    refuse(what, std::to_string(num_bytes) + " bytes", std::to_string(values.nbytes()));
  owners.push_back(values);
  return values.data();
}

}  // namespace

Matrix read_matrix(const py::handle& object, const std::string& what, Owners& owners) {
  const py::tuple parts = py::cast<py::tuple>(object);
  const std::string format = py::cast<std::string>(parts[0]);
  Matrix w;
  w.rows = py::cast<int>(parts[1]);
  w.cols = py::cast<int>(parts[2]);
  if (w.rows < 1 || w.cols < 1)
    refuse(what, "rows and columns", std::to_string(w.rows) + " x " + std::to_string(w.cols));
  if (format == "bf16") {
    w.bf16 = static_cast<const uint16_t*>(bytes_of(parts[3], w.num_bytes(), what, owners));
    return w;
  }
  if (format != "int8" && format != "int4" && format != "int8-planes")
    refuse(what, "bf16, int8, int8-planes or int4", format);
  w.format = format == "int8" ? Format::int8 : format == "int4" ? Format::int4 : Format::int8_planes;
  const size_t tiles = size_t(w.num_blocks()) * w.num_groups();
  w.codes = static_cast<const uint8_t*>(bytes_of(parts[3], tiles * w.tile_bytes(), what, owners));
  w.scales = static_cast<const uint16_t*>(bytes_of(parts[4], tiles * kBlockRows * 2, what + " scales", owners));
  if (w.format == Format::int4)
    w.zeros = static_cast<const uint8_t*>(bytes_of(parts[5], tiles * kBlockRows, what + " zeros", owners));
  if (w.format == Format::int8_planes)
    w.lows = static_cast<const uint8_t*>(bytes_of(parts[5], tiles * w.tile_bytes(), what + " low halves", owners));
  return w;
}

namespace {

Matrix read_shaped(const py::handle& object, int rows, int cols, const std::string& what, Owners& owners) {
  const Matrix w = read_matrix(object, what, owners);
  if (w.rows != rows || w.cols != cols)
    refuse(what, std::to_string(rows) + " x " + std::to_string(cols),
           std::to_string(w.rows) + " x " + std::to_string(w.cols));
  return w;
}

const float* read_vector(const py::handle& object, int size, const std::string& what, Owners& owners) {
  if (object.is_none()) return nullptr;
  return static_cast<const float*>(bytes_of(object, size_t(size) * sizeof(float), what, owners));
}

Norm read_norm(const py::handle& object, int size, const std::string& what, Owners& owners) {
  if (object.is_none()) return {};
  const py::tuple parts = py::cast<py::tuple>(object);
  return {read_vector(parts[0], size, what, owners), read_vector(parts[1], size, what + " bias", owners)};
}

// (matrix, bias or None)
Linear read_linear(const py::handle& object, int rows, int cols, const std::string& what, Owners& owners) {
  const py::tuple parts = py::cast<py::tuple>(object);
  return {read_shaped(parts[0], rows, cols, what, owners), read_vector(parts[1], rows, what + " bias", owners)};
}

Nonlinearity read_nonlinearity(const std::string& name) {
  if (name == "silu") return Nonlinearity::silu;
  if (name == "gelu_tanh") return Nonlinearity::gelu_tanh;
  if (name == "gelu_erf") return Nonlinearity::gelu_erf;
  if (name == "relu") return Nonlinearity::relu;
  refuse("nonlinearity", "silu, gelu_tanh, gelu_erf or relu", name);
}

Layer read_layer(const py::dict& spec, const ModelWeights& model, const std::string& name, Owners& owners) {
  Layer layer;
  auto linear = [&](const char* key, int rows, int cols) {
    return read_linear(spec[key], rows, cols, name + key, owners);
  };
  auto norm = [&](const char* key, int size) { return read_norm(spec[key], size, name + key, owners); };
  AttentionWeights& attention = layer.attention;
  attention.query = linear("query", model.query_size(), model.hidden);
  attention.key = linear("key", model.kv_size(), model.hidden);
  attention.value = linear("value", model.kv_size(), model.hidden);
  attention.output = linear("output", model.hidden, model.query_size());
  attention.query_norm = norm("query_norm", model.head_dim);
  attention.key_norm = norm("key_norm", model.head_dim);
  attention.rope = py::cast<int>(spec["rope"]);
  attention.window = py::cast<int>(spec["window"]);
  if (attention.rope >= static_cast<int>(model.rotary.size()))
    refuse(name + "rope", "less than " + std::to_string(model.rotary.size()), std::to_string(attention.rope));
  const int hidden = model.hidden;
  layer.attention_norms = {norm("attention_norm", hidden), norm("attention_output_norm", hidden),
                           norm("attention_after_norm", hidden)};
  layer.ffn_norms = {norm("ffn_norm", hidden), norm("ffn_output_norm", hidden), norm("ffn_after_norm", hidden)};
  return layer;
}

void check_sizes(const ModelWeights& model) {
  for (const auto& [name, value] : {std::pair{"hidden", model.hidden},
                                    {"num_heads", model.num_heads},
                                    {"num_kv_heads", model.num_kv_heads},
                                    {"head_dim", model.head_dim},
                                    {"vocab", model.vocab},
                                    {"max_positions", model.max_positions}})
    if (value < 1) refuse(name, "at least 1", std::to_string(value));
  if (model.num_heads % model.num_kv_heads)
    refuse("num_heads", "a multiple of " + std::to_string(model.num_kv_heads), std::to_string(model.num_heads));
  if (model.head_dim % 2) refuse("head_dim", "an even number", std::to_string(model.head_dim));
}

}  // namespace

ModelWeights read_model(const py::dict& spec, Owners& owners) {
  ModelWeights model;
  auto number = [&](const char* key) { return py::cast<int>(spec[key]); };
  model.hidden = number("hidden");
  model.num_heads = number("num_heads");
  model.num_kv_heads = number("num_kv_heads");
  model.head_dim = number("head_dim");
  model.vocab = number("vocab");
  model.max_positions = number("max_positions");
  model.position_offset = number("position_offset");
  check_sizes(model);
  model.epsilon = py::cast<float>(spec["epsilon"]);
  model.attention_scale = py::cast<float>(spec["attention_scale"]);
  model.embedding_scale = py::cast<float>(spec["embedding_scale"]);
  model.layer_norm = py::cast<bool>(spec["layer_norm"]);
  model.nonlinearity = read_nonlinearity(py::cast<std::string>(spec["nonlinearity"]));
  model.embedding = read_matrix(spec["embedding"], "embedding", owners);
  const int width = model.embedding.cols;
  if (model.embedding.rows != model.vocab)
    refuse("embedding rows", std::to_string(model.vocab), std::to_string(model.embedding.rows));
  model.head = read_shaped(spec["head"], model.vocab, width, "head", owners);
  if (!spec["project_in"].is_none()) {
    model.project_in = read_shaped(spec["project_in"], model.hidden, width, "project_in", owners);
    model.project_out = read_shaped(spec["project_out"], width, model.hidden, "project_out", owners);
  } else if (width != model.hidden) {
    refuse("embedding columns", std::to_string(model.hidden), std::to_string(width));
  }
  if (!spec["positions"].is_none())
    model.positions =
        read_shaped(spec["positions"], model.max_positions + model.position_offset, model.hidden, "positions", owners);
  model.final_norm = read_norm(spec["final_norm"], model.hidden, "final_norm", owners);
  for (const py::handle& item : py::cast<py::list>(spec["rotary"])) {
    const py::tuple table = py::cast<py::tuple>(item);
    const auto frequencies = py::cast<std::vector<float>>(table[0]);
    if (static_cast<int>(frequencies.size()) != model.head_dim / 2)
      refuse("rotary frequencies", std::to_string(model.head_dim / 2), std::to_string(frequencies.size()));
    model.rotary.push_back({frequencies, py::cast<float>(table[1])});
  }
  int index = 0;
  for (const py::handle& layer : py::cast<py::list>(spec["layers"]))
    model.layers.push_back(
        read_layer(py::cast<py::dict>(layer), model, "layer " + std::to_string(index++) + " ", owners));
  if (model.layers.empty()) refuse("layers", "at least 1", "0");
  choose_cache_width(model);
  return model;
}

FfnHandle read_ffn(const py::list& layers, int hidden) {
  FfnHandle handle;
  int index = 0;
  for (const py::handle& item : layers) {
    const py::dict spec = py::cast<py::dict>(item);
    const std::string name = "layer " + std::to_string(index++) + " ";
    FfnWeights weights;
    const py::tuple up = py::cast<py::tuple>(spec["up"]);
    const int count = py::cast<int>(py::cast<py::tuple>(up[0])[1]);
    weights.up = read_linear(up, count, hidden, name + "up", handle.owners);
    if (!spec["gate"].is_none()) weights.gate = read_linear(spec["gate"], count, hidden, name + "gate", handle.owners);
    weights.down = read_linear(spec["down"], hidden, count, name + "down", handle.owners);
    handle.ffn->push_back(weights);
  }
  return handle;
}

}  // namespace coreinfer
