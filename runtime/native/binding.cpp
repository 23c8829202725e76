// The Python module coreinfer.runtime._native. Everything that comes from Python is checked here, nothing further in.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <mutex>

#include "model.h"

namespace py = pybind11;

namespace coreinfer {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<int32_t, py::array::c_style>;

// Objects whose memory the model reads in place.
using Owners = std::vector<py::object>;

[[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(what + ": expected " + expected + ", got " + got);
}

const void* bytes_of(const py::handle& array, size_t num_bytes, const std::string& what, Owners& owners) {
  const py::array values = py::cast<py::array>(array);
  if (!(values.flags() & py::array::c_style)) refuse(what, "a contiguous array", "another");
  if (size_t(values.nbytes()) != num_bytes)
    refuse(what, std::to_string(num_bytes) + " bytes", std::to_string(values.nbytes()));
  owners.push_back(values);
  return values.data();
}

// ("bf16", rows, cols, bits) or ("int8", rows, cols, codes, scales) or ("int4", rows, cols, codes, scales, zeros)
// or ("int8-planes", rows, cols, high halves, scales, low halves).
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

Matrix read_matrix(const py::handle& object, int rows, int cols, const std::string& what, Owners& owners) {
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
  return {read_matrix(parts[0], rows, cols, what, owners), read_vector(parts[1], rows, what + " bias", owners)};
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
  for (const auto& [name, value] : {std::pair{"hidden", model.hidden}, {"num_heads", model.num_heads},
                                    {"num_kv_heads", model.num_kv_heads}, {"head_dim", model.head_dim},
                                    {"vocab", model.vocab}, {"max_positions", model.max_positions}})
    if (value < 1) refuse(name, "at least 1", std::to_string(value));
  if (model.num_heads % model.num_kv_heads)
    refuse("num_heads", "a multiple of " + std::to_string(model.num_kv_heads), std::to_string(model.num_heads));
  if (model.head_dim % 2) refuse("head_dim", "an even number", std::to_string(model.head_dim));
}

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
  model.head = read_matrix(spec["head"], model.vocab, width, "head", owners);
  if (!spec["project_in"].is_none()) {
    model.project_in = read_matrix(spec["project_in"], model.hidden, width, "project_in", owners);
    model.project_out = read_matrix(spec["project_out"], width, model.hidden, "project_out", owners);
  } else if (width != model.hidden) {
    refuse("embedding columns", std::to_string(model.hidden), std::to_string(width));
  }
  if (!spec["positions"].is_none())
    model.positions =
        read_matrix(spec["positions"], model.max_positions + model.position_offset, model.hidden, "positions", owners);
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
  return model;
}

// FFN weights of all layers, in place or gathered.
struct FfnHandle {
  std::shared_ptr<Ffn> ffn = std::make_shared<Ffn>();
  Owners owners;
  std::vector<std::shared_ptr<void>> memory;

  int max_neurons() const {
    int most = 0;
    for (const auto& layer : *ffn) most = std::max(most, layer.num_neurons());
    return most;
  }
};

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

class Model {
 public:
  Model(const py::dict& spec, const std::string& isa, int num_threads, int max_neurons) {
    const Kernels& kernels = find_kernels(isa);
    if (max_neurons < 1) refuse("max_neurons", "at least 1", std::to_string(max_neurons));
    ModelWeights weights = read_model(spec, owners_);
    max_neurons_ = max_neurons;
    decoder_ = std::make_unique<Decoder>(std::move(weights), kernels, num_threads, max_neurons);
  }

  void use(const FfnHandle& ffn) {
    const std::unique_lock<std::mutex> lock = acquire();
    const size_t num_layers = decoder_->weights.layers.size();
    if (ffn.ffn->size() != num_layers)
      refuse("FFN layers", std::to_string(num_layers), std::to_string(ffn.ffn->size()));
    if (ffn.max_neurons() > max_neurons_)
      refuse("FFN neurons", "at most " + std::to_string(max_neurons_), std::to_string(ffn.max_neurons()));
    for (const FfnWeights& layer : *ffn.ffn)
      if (layer.up.weight.cols != decoder_->weights.hidden)
        refuse("FFN inputs", std::to_string(decoder_->weights.hidden), std::to_string(layer.up.weight.cols));
    decoder_->ffn = ffn.ffn;
    ffn_ = ffn;
  }

  FfnHandle gather(const FfnHandle& from, const std::vector<Ids>& neuron_ids) const {
    if (neuron_ids.size() != from.ffn->size())
      refuse("neuron ids", std::to_string(from.ffn->size()) + " layers", std::to_string(neuron_ids.size()));
    FfnHandle out;
    out.owners = from.owners;  // biases of the output stay where they are
    for (size_t i = 0; i < neuron_ids.size(); ++i) gather_layer((*from.ffn)[i], neuron_ids[i], out);
    return out;
  }

  int add_sequence() {
    const std::unique_lock<std::mutex> lock = acquire();
    return decoder_->add_sequence();
  }

  void drop_sequence(int number) {
    const std::unique_lock<std::mutex> lock = acquire();
    check_sequence(number);
    if (number == 0) refuse("sequence", "another than 0, which stays", "0");
    decoder_->drop_sequence(number);
  }

  py::array forward_rows(const Ids& numbers, const Ids& ids) {
    const std::unique_lock<std::mutex> lock = acquire();
    if (numbers.ndim() != 1 || numbers.size() != ids.size())
      refuse("sequences", std::to_string(ids.size()) + ", one a token", std::to_string(numbers.size()));
    std::vector<int> counts(decoder_->sequences.size());
    for (py::ssize_t i = 0; i < numbers.size(); ++i) {
      check_sequence(numbers.data()[i]);
      ++counts[numbers.data()[i]];
    }
    check_ids(ids);
    for (size_t number = 0; number < counts.size(); ++number)
      if (counts[number] > 0) check_room(static_cast<int>(number), counts[number]);
    const int num_rows = static_cast<int>(ids.size()), vocab = decoder_->weights.vocab;
    py::array_t<float> logits({num_rows, round_up(vocab, kBlockRows)});
    {
      py::gil_scoped_release release;
      decoder_->forward_rows(numbers.data(), ids.data(), num_rows, logits.mutable_data());
    }
    return logits[py::make_tuple(py::ellipsis(), py::slice(0, vocab, 1))];
  }

  py::array forward(const Ids& ids, bool all_logits, bool screened, const py::object& watcher, int sequence) {
    const std::unique_lock<std::mutex> lock = acquire();
    check_sequence(sequence);
    check_ids(ids);
    check_room(sequence, ids.size());
    const int num_tokens = static_cast<int>(ids.size()), vocab = decoder_->weights.vocab;
    const int padded = round_up(vocab, kBlockRows);
    py::array_t<float> logits({all_logits ? num_tokens : 1, padded});
    std::exception_ptr failure;
    Watcher watch;
    if (!watcher.is_none())
      watch = [&](int layer, const float* values, int count, int stride) {
        if (!failure) call_watcher(watcher, layer, values, count, stride, failure);
      };
    {
      py::gil_scoped_release release;
      decoder_->forward(sequence, ids.data(), num_tokens, all_logits, screened, logits.mutable_data(), watch);
    }
    if (failure) std::rethrow_exception(failure);
    return logits[py::make_tuple(py::ellipsis(), py::slice(0, vocab, 1))];
  }

  void truncate(int num_tokens, int sequence) {
    const std::unique_lock<std::mutex> lock = acquire();
    check_sequence(sequence);
    if (num_tokens < 0) refuse("num_tokens", "at least 0", std::to_string(num_tokens));
    int& num_cached = decoder_->sequences[sequence]->num_cached;
    num_cached = std::min(num_cached, num_tokens);
  }

  int num_cached(int sequence) const {
    check_sequence(sequence);
    return decoder_->sequences[sequence]->num_cached;
  }
  int num_threads() const { return decoder_->threads.size(); }
  std::string isa() const { return decoder_->kernels.name; }
  size_t bytes_per_token(int num_tokens, bool screened) const {
    if (!decoder_->ffn) refuse("FFN", "one in use", "none");
    return decoder_->bytes_per_token(num_tokens, screened);
  }

 private:
  std::unique_lock<std::mutex> acquire() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) throw std::runtime_error("the native decoder is in use by another thread");
    return lock;
  }

  void check_ids(const Ids& ids) const {
    const ModelWeights& weights = decoder_->weights;
    if (!decoder_->ffn) refuse("FFN", "one in use", "none");
    if (ids.ndim() != 1 || ids.size() == 0) refuse("token ids", "at least one", "none");
    for (py::ssize_t i = 0; i < ids.size(); ++i)
      if (ids.data()[i] < 0 || ids.data()[i] >= weights.vocab)
        refuse("token id", "0 to " + std::to_string(weights.vocab - 1), std::to_string(ids.data()[i]));
  }

  void check_sequence(int number) const {
    if (!decoder_->has(number)) refuse("sequence", "one that was added", std::to_string(number));
  }

  void check_room(int sequence, py::ssize_t num_tokens) const {
    const int room = decoder_->weights.max_positions - decoder_->sequences[sequence]->num_cached;
    if (num_tokens > room)
      refuse("token ids", "at most " + std::to_string(room) + " more in the KV cache", std::to_string(num_tokens));
  }

  static void call_watcher(const py::object& watcher, int layer, const float* values, int count, int stride,
                           std::exception_ptr& failure) {
    py::gil_scoped_acquire acquire;
    try {
      watcher(layer, py::array_t<float>({count, stride}, values));
    } catch (...) {
      failure = std::current_exception();
    }
  }

  static void gather_layer(const FfnWeights& from, const Ids& ids, FfnHandle& out) {
    const int count = static_cast<int>(ids.size());
    if (count < 1) refuse("neuron ids", "at least one a layer", "none");
    for (int i = 0; i < count; ++i)
      if (ids.data()[i] < 0 || ids.data()[i] >= from.num_neurons())
        refuse("neuron id", "0 to " + std::to_string(from.num_neurons() - 1), std::to_string(ids.data()[i]));
    FfnWeights weights;
    auto keep = [&](const OwnedMatrix& owned) {
      out.memory.push_back(owned.memory);
      return owned.view;
    };
    auto pick_bias = [&](const float* bias) -> const float* {
      if (!bias) return nullptr;
      auto picked = std::make_shared<Buffer<float>>();
      picked->resize(count);
      for (int i = 0; i < count; ++i) picked->get()[i] = bias[ids.data()[i]];
      out.memory.push_back(picked);
      return picked->get();
    };
    if (!from.gate.weight.empty())
      weights.gate = {keep(gather_rows(from.gate.weight, ids.data(), count)), pick_bias(from.gate.bias)};
    weights.up = {keep(gather_rows(from.up.weight, ids.data(), count)), pick_bias(from.up.bias)};
    weights.down = {keep(gather_columns(from.down.weight, ids.data(), count)), from.down.bias};
    out.ffn->push_back(weights);
  }

  Owners owners_;
  FfnHandle ffn_;
  std::unique_ptr<Decoder> decoder_;
  int max_neurons_ = 0;
  std::mutex mutex_;
};

// GB/s of a plain read of `num_bytes` by several threads, best of three passes.
double read_bandwidth(int num_threads, size_t num_bytes) {
  const Kernels& kernels = find_kernels("auto");
  Threads threads(num_threads);
  Buffer<uint64_t> memory;
  memory.resize(num_bytes / 8);
  std::vector<uint64_t> sums(num_threads);
  double best_seconds = 1e30;
  py::gil_scoped_release release;
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    threads.run([&](int thread) {
      const size_t words = num_bytes / 8, begin = words * thread / num_threads / 64 * 64,
                   end = words * (thread + 1) / num_threads / 64 * 64;
      sums[thread] += kernels.read_sum(memory.get() + begin, end - begin);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best_seconds = std::min(best_seconds, seconds.count());
  }
  return num_bytes / best_seconds / 1e9;
}

// One matrix product by one kernel table, for tests: (tokens, rows) float32.
py::array multiply(const py::object& matrix, const Floats& inputs, const std::string& isa) {
  Owners owners;
  const Kernels& kernels = find_kernels(isa);
  const Matrix w = read_matrix(matrix, "matrix", owners);
  if (inputs.ndim() != 2 || inputs.shape(1) != w.cols) refuse("inputs", "(tokens, columns)", "another shape");
  const int num_tokens = static_cast<int>(inputs.shape(0)), padded = round_up(w.rows, kBlockRows);
  ActivationBuffer x;
  x.resize(num_tokens, w.cols);
  for (int t = 0; t < num_tokens; ++t) {
    std::copy_n(inputs.data() + size_t(t) * w.cols, w.cols, x.view.token(t).values);
    kernels.quantize(x.view.token(t), x.view.stride);
  }
  py::array_t<float> out({num_tokens, padded});
  kernels.multiply(w, x.view, num_tokens, out.mutable_data(), padded, 0, w.num_blocks());
  return out[py::make_tuple(py::ellipsis(), py::slice(0, w.rows, 1))];
}

// Rows of a matrix as float32, the way embeddings are looked up.
py::array unpack(const py::object& matrix) {
  Owners owners;
  const Matrix w = read_matrix(matrix, "matrix", owners);
  py::array_t<float> out({w.rows, w.cols});
  for (int row = 0; row < w.rows; ++row) unpack_row(w, row, out.mutable_data() + size_t(row) * w.cols);
  return out;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* table : available_kernels()) names.push_back(table->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native engine: decoding of packed weights on the CPU.";
  py::class_<FfnHandle>(module, "Ffn")
      .def(py::init(&read_ffn), py::arg("layers"), py::arg("hidden"))
      .def_property_readonly("max_neurons", &FfnHandle::max_neurons);
  py::class_<Model>(module, "Model")
      .def(py::init<const py::dict&, const std::string&, int, int>(), py::arg("spec"), py::arg("isa"),
           py::arg("num_threads"), py::arg("max_neurons"))
      .def("use", &Model::use, py::arg("ffn"))
      .def("gather", &Model::gather, py::arg("ffn"), py::arg("neuron_ids"))
      .def("forward", &Model::forward, py::arg("ids"), py::arg("all_logits") = false, py::arg("screened") = false,
           py::arg("watcher") = py::none(), py::arg("sequence") = 0)
      .def("forward_rows", &Model::forward_rows, py::arg("sequences"), py::arg("ids"))
      .def("add_sequence", &Model::add_sequence)
      .def("drop_sequence", &Model::drop_sequence, py::arg("sequence"))
      .def("truncate", &Model::truncate, py::arg("num_tokens"), py::arg("sequence") = 0)
      .def("bytes_per_token", &Model::bytes_per_token, py::arg("num_tokens"), py::arg("screened") = false)
      .def("num_cached", &Model::num_cached, py::arg("sequence") = 0)
      .def_property_readonly("num_threads", &Model::num_threads)
      .def_property_readonly("isa", &Model::isa);
  module.def("available_isas", &isa_names);
  module.def("read_bandwidth", &read_bandwidth, py::arg("num_threads"), py::arg("num_bytes"));
  module.def("multiply", &multiply, py::arg("matrix"), py::arg("inputs"), py::arg("isa"));
  module.def("unpack", &unpack, py::arg("matrix"));
}

}  // namespace coreinfer
