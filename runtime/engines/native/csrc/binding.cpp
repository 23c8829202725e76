// The Python module coreinfer.runtime.engines.native._native. Models are those of the C API: here Python's arrays become
// pointers, and statuses exceptions.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binding_handles.h"
#include "binding_parts.h"
#include "coreinfer_engine.h"
#include "refusals.h"

namespace coreinfer {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using CountPages = std::function<int(size_t, std::pair<size_t, size_t>)>;

// A function of Python's that the C API calls, and what it raised.
template <class Function>
struct Called {
  const Function& function;
  std::exception_ptr failure = nullptr;

  void rethrow() const {
    if (failure) std::rethrow_exception(failure);
  }
};

int call_count_pages(void* user, const coreinfer_sizes* sizes) {
  auto& called = *static_cast<Called<CountPages>*>(user);
  try {
    return called.function(sizes->page, {sizes->tables, sizes->table_block});
  } catch (...) {
    called.failure = std::current_exception();
    return 0;
  }
}

int call_watcher(void* user, const coreinfer_watched* seen) {
  auto& called = *static_cast<Called<py::object>*>(user);
  const py::gil_scoped_acquire acquire;
  try {
    py::object weights = py::none();
    if (seen->weights) weights = py::array_t<float>(seen->num_tokens, seen->weights);
    called.function(seen->layer, seen->expert, py::array_t<float>({seen->num_tokens, seen->stride}, seen->activations),
                    weights);
    return 0;
  } catch (...) {
    called.failure = std::current_exception();
    return 1;
  }
}

void check_flat(const Ids& ids) {
  if (ids.ndim() != 1) refuse("token ids", "one dimension", std::to_string(ids.ndim()));
}

void check_alike(const Ids& sequences, const Ids& ids) {
  if (sequences.ndim() != 1 || sequences.size() != ids.size())
    refuse("sequences", std::to_string(ids.size()) + ", one a token", std::to_string(sequences.size()));
  check_flat(ids);
}

int screening(bool screened) { return screened ? COREINFER_SCREENED : 0; }

class Model {
 public:
  // `record`: the manifest's of the model, as JSON; `base`: the whole mapped file of that name.
  Model(const std::string& record, const std::string& name, const Bytes& base, const std::string& isa, int num_threads,
        const CountPages& count_pages) {
    const Mapped mapped(name, base);
    Called<CountPages> counted{count_pages};
    const coreinfer_engine_options options{sizeof options, num_threads, isa.c_str(), call_count_pages, &counted};
    coreinfer_model* model = nullptr;
    const int status = coreinfer_open_files(record.c_str(), &mapped.file, &options, &model);
    counted.rethrow();
    check(status);
    mapped.kept();
    model_.reset(model);
  }

  // `thresholds`: two of each layer's groups of inputs (docs/token_shares.md), or nothing to read all inputs.
  void use(const FfnHandle& ffn, const std::optional<Floats>& thresholds) {
    // An array of another shape has no layers.
    const bool fits = thresholds && thresholds->ndim() == 3 && thresholds->shape(1) == COREINFER_NUM_INPUT_GROUPS &&
                      thresholds->shape(2) == 2;
    const size_t num_layers = fits ? size_t(thresholds->shape(0)) : 0;
    check(coreinfer_use_ffn(get(), ffn.get(), thresholds ? thresholds->data() : nullptr, num_layers));
  }

  void lay_out_columns(const std::array<bool, COREINFER_NUM_INPUT_GROUPS>& groups, bool halves, size_t least_bytes) {
    int bits = halves ? COREINFER_HALVES : 0;
    for (size_t group = 0; group < groups.size(); ++group) bits |= groups[group] << group;
    check(coreinfer_lay_out_columns(get(), bits, least_bytes));
  }

  // Of each group, the time of this share of the weights by rows over the time by columns; 0 where it cannot have columns.
  std::array<double, COREINFER_NUM_INPUT_GROUPS> try_columns(double share, bool halves) {
    std::array<double, COREINFER_NUM_INPUT_GROUPS> gains{};
    const int flags = halves ? COREINFER_HALVES : 0;
    check(released([&] { return coreinfer_try_columns(get(), share, flags, gains.data()); }));
    return gains;
  }

  size_t column_bytes() const { return coreinfer_column_bytes(get()); }

  void limit(const std::string& path, size_t layer_bytes, size_t window_bytes) {
    check(coreinfer_limit_memory(get(), path.c_str(), layer_bytes, window_bytes));
  }

  void announce(const FfnHandle& ffn) { check(coreinfer_announce_ffn(get(), ffn.get())); }

  bool holds(const FfnHandle& ffn) const {
    int holds = 0;
    check(coreinfer_holds_ffn(get(), ffn.get(), &holds));
    return holds;
  }

  // Bytes read of layers, layers that were there when they were needed, that were not, seconds waited for them, rows of
  // tables that were read; nothing where memory is not limited.
  py::object read_figures() const {
    coreinfer_reads reads;
    if (!coreinfer_read_figures(get(), &reads)) return py::none();
    return py::make_tuple(reads.layer_bytes, reads.num_hits, reads.num_misses, reads.waited_seconds, reads.table_bytes);
  }

  size_t layer_bytes_used() const { return coreinfer_layer_bytes_used(get()); }

  FfnHandle gather(const FfnHandle& from, const std::vector<Ids>& neuron_ids) const { return from.gather(neuron_ids); }

  int add_sequence() {
    int sequence = 0;
    check(coreinfer_add_sequence(get(), &sequence));
    return sequence;
  }

  int fork_sequence(int source, int num_tokens) {
    int sequence = 0;
    check(coreinfer_fork_sequence(get(), source, num_tokens, &sequence));
    return sequence;
  }

  void drop_sequence(int number) { check(coreinfer_drop_sequence(get(), number)); }

  py::array forward_rows(const Ids& sequences, const Ids& ids, bool screened) {
    check_alike(sequences, ids);
    py::array_t<float> logits = room_for(ids.size());
    float* out = logits.mutable_data();
    check(released([&] {
      return coreinfer_forward_rows(get(), sequences.data(), ids.data(), size_t(ids.size()), screening(screened), out);
    }));
    return without_padding(logits);
  }

  py::array forward_beside(int sequence, const Ids& block_ids, bool last_logits, const Ids& sequences, const Ids& ids,
                           bool screened) {
    check_flat(block_ids);
    check_alike(sequences, ids);
    const int flags = screening(screened) | (last_logits ? COREINFER_LAST_LOGITS : 0);
    py::array_t<float> logits = room_for(ids.size() + last_logits);
    float* out = logits.mutable_data();
    check(released([&] {
      return coreinfer_forward_beside(get(), sequence, block_ids.data(), size_t(block_ids.size()), sequences.data(),
                                      ids.data(), size_t(ids.size()), flags, out);
    }));
    return without_padding(logits);
  }

  py::array forward(const Ids& ids, bool all_logits, bool screened, const py::object& watcher, int sequence) {
    check_flat(ids);
    const int flags = screening(screened) | (all_logits ? COREINFER_ALL_LOGITS : 0);
    py::array_t<float> logits = room_for(all_logits ? ids.size() : 1);
    float* out = logits.mutable_data();
    Called<py::object> watched{watcher};
    const coreinfer_watcher watch = watcher.is_none() ? nullptr : call_watcher;
    const int status = released([&] {
      return coreinfer_forward(get(), sequence, ids.data(), size_t(ids.size()), flags, out, watch, &watched);
    });
    watched.rethrow();
    check(status);
    return without_padding(logits);
  }

  void truncate(int num_tokens, int sequence) { check(coreinfer_truncate_sequence(get(), sequence, num_tokens)); }

  int num_cached(int sequence) const {
    int num_tokens = 0;
    check(coreinfer_num_cached(get(), sequence, &num_tokens));
    return num_tokens;
  }
  int num_pages() const { return coreinfer_num_pages(get()); }
  int num_free_pages() const { return coreinfer_num_free_pages(get()); }
  size_t page_bytes() const { return coreinfer_page_bytes(get()); }
  std::vector<int> wide_layers() const {
    std::vector<int> numbers;
    for (int layer = 0; layer < coreinfer_num_layers(get()); ++layer)
      if (coreinfer_is_wide(get(), layer)) numbers.push_back(layer);
    return numbers;
  }
  int num_threads() const { return coreinfer_num_threads(get()); }
  std::string isa() const { return coreinfer_isa(get()); }
  size_t bytes_per_token(int num_tokens, bool screened, bool alone) const {
    size_t num_bytes = 0;
    check(coreinfer_bytes_per_token(get(), num_tokens, screening(screened), alone, &num_bytes));
    return num_bytes;
  }

 private:
  struct Close {
    void operator()(coreinfer_model* model) const { coreinfer_close(model); }
  };

  coreinfer_model* get() const { return model_.get(); }

  // Computing leaves Python to other threads.
  template <class Call>
  static int released(Call call) {
    const py::gil_scoped_release release;
    return call();
  }

  py::array_t<float> room_for(py::ssize_t num_rows) const {
    return py::array_t<float>({num_rows, py::ssize_t(coreinfer_logits_stride(get()))});
  }

  py::array without_padding(const py::array_t<float>& logits) const {
    return logits[py::make_tuple(py::ellipsis(), py::slice(0, coreinfer_vocab_size(get()), 1))];
  }

  std::unique_ptr<coreinfer_model, Close> model_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native engine: decoding of packed weights on the CPU.";
  module.attr("BLOCK_TOKENS") = int{COREINFER_BLOCK_TOKENS};
  module.attr("LEAST_COLUMN_BYTES") = int{COREINFER_LEAST_COLUMN_BYTES};
  module.attr("PAGE_TOKENS") = int{COREINFER_PAGE_TOKENS};
  py::register_exception<StatusError<COREINFER_NO_ROOM>>(module, "PoolFull", PyExc_RuntimeError);
  py::register_exception<Unsupported>(module, "Unsupported", PyExc_ValueError);
  py::register_exception<StatusError<COREINFER_NO_ADDRESS_SPACE>>(module, "NoAddressSpace", PyExc_RuntimeError);
  py::class_<FfnHandle>(module, "Ffn")
      .def(py::init(&FfnHandle::read), py::arg("record"), py::arg("name"), py::arg("mapping"), py::arg("num_neurons"))
      .def_static("of_experts", &FfnHandle::read_experts, py::arg("record"), py::arg("name"), py::arg("mapping"),
                  py::arg("num_neurons"))
      .def("keeping", &FfnHandle::keeping, py::arg("experts"))
      .def("in_layers", &FfnHandle::in_layers, py::arg("path"))
      .def_property_readonly("max_neurons", &FfnHandle::max_neurons);
  py::class_<Model>(module, "Model")
      .def(py::init<const std::string&, const std::string&, const Bytes&, const std::string&, int, const CountPages&>(),
           py::arg("record"), py::arg("name"), py::arg("base"), py::arg("isa"), py::arg("num_threads"),
           py::arg("count_pages"))
      .def("use", &Model::use, py::arg("ffn"), py::arg("thresholds") = py::none())
      .def("lay_out_columns", &Model::lay_out_columns, py::arg("groups"), py::arg("halves") = false,
           py::arg("least_bytes") = int{COREINFER_LEAST_COLUMN_BYTES})
      .def("try_columns", &Model::try_columns, py::arg("share"), py::arg("halves") = false)
      .def_property_readonly("column_bytes", &Model::column_bytes)
      .def("limit", &Model::limit, py::arg("path"), py::arg("layer_bytes"), py::arg("window_bytes"))
      .def("announce", &Model::announce, py::arg("ffn"))
      .def("holds", &Model::holds, py::arg("ffn"))
      .def("read_figures", &Model::read_figures)
      .def("gather", &Model::gather, py::arg("ffn"), py::arg("neuron_ids"))
      .def("forward", &Model::forward, py::arg("ids"), py::arg("all_logits") = false, py::arg("screened") = false,
           py::arg("watcher") = py::none(), py::arg("sequence") = 0)
      .def("forward_rows", &Model::forward_rows, py::arg("sequences"), py::arg("ids"), py::arg("screened") = false)
      .def("forward_beside", &Model::forward_beside, py::arg("sequence"), py::arg("block_ids"), py::arg("last_logits"),
           py::arg("sequences"), py::arg("ids"), py::arg("screened") = false)
      .def("add_sequence", &Model::add_sequence)
      .def("fork_sequence", &Model::fork_sequence, py::arg("source"), py::arg("num_tokens"))
      .def("drop_sequence", &Model::drop_sequence, py::arg("sequence"))
      .def("truncate", &Model::truncate, py::arg("num_tokens"), py::arg("sequence") = 0)
      .def("bytes_per_token", &Model::bytes_per_token, py::arg("num_tokens"), py::arg("screened") = false,
           py::arg("alone") = true)
      .def("num_cached", &Model::num_cached, py::arg("sequence") = 0)
      .def_property_readonly("layer_bytes_used", &Model::layer_bytes_used)
      .def_property_readonly("num_pages", &Model::num_pages)
      .def_property_readonly("num_free_pages", &Model::num_free_pages)
      .def_property_readonly("page_bytes", &Model::page_bytes)
      .def_property_readonly("wide_layers", &Model::wide_layers)
      .def_property_readonly("num_threads", &Model::num_threads)
      .def_property_readonly("isa", &Model::isa);
  bind_plans(module);
  bind_parts(module);
}

}  // namespace coreinfer
