// The Python module coreinfer.runtime.engines.native._native. Everything that comes from Python is checked here, nothing further in.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <functional>

#include "bandwidth.h"
#include "binding_parts.h"
#include "calls.h"
#include "column_cache.h"
#include "column_trial.h"
#include "decoder.h"
#include "gather.h"
#include "layer_plan.h"
#include "memory_plan.h"
#include "reading.h"
#include "refusals.h"
#include "residency.h"

namespace coreinfer {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<int32_t, py::array::c_style>;

void refuse_experts(const Ffn& ffn) {
  for (const FfnWeights& layer : ffn)
    if (!layer.experts.empty()) refuse("FFN", "one FFN in each layer", "experts");
}

class Model {
 public:
  // `record`: the manifest's of the model, as JSON; `base`: the whole mapped file of that name.
  Model(const std::string& record, const std::string& name, const Bytes& base, const std::string& isa, int num_threads,
        const std::function<int(size_t, std::pair<size_t, size_t>)>& count_pages) {
    const Kernels& kernels = find_kernels(isa);
    const ModelRecord model = read_record(Json::parse(record));
    ModelWeights weights = assemble_model(model, open_mapped(name, base, owners_), memory_);
    max_neurons_ = model.ffn_neurons();
    const TableBytes tables = table_bytes(weights);
    const int num_pages = count_pages(layout_for(weights).num_bytes(), {tables.all, tables.block});
    if (num_pages < 1) refuse("KV cache pages", "at least 1", std::to_string(num_pages));
    decoder_ = std::make_unique<Decoder>(std::move(weights), kernels, num_threads, max_neurons_, num_pages);
  }

  // `thresholds`: of each layer's groups of inputs (docs/token_shares.md), or nothing to read all inputs.
  void use(const FfnHandle& ffn, const std::optional<Floats>& thresholds) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_ffn(*decoder_, *ffn.ffn, max_neurons_);
    if (decoder_->residency && !ffn.source)
      refuse("FFN", "one that is read in layers, as memory is limited", "another");
    std::shared_ptr<TokenShares> shares =
        thresholds ? read_shares(*thresholds, decoder_->weights.layers.size()) : nullptr;
    if (shares && columns_) {
      shares->attention = columns_->attention();
      shares->ffn = columns_->of(ffn.whole ? ffn.whole : ffn.ffn);
    }
    decoder_->ffn = ffn.ffn;
    decoder_->source = ffn.source;
    decoder_->use_shares(std::move(shares));
    ffn_ = ffn;
  }

  // From now on the weights of these groups of inputs also lie input by input in memory, where columns have so many bytes.
  void lay_out_columns(const GroupFlags& groups, size_t least_bytes) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    if (decoder_->residency) refuse("columns", "memory without a limit", "a limit");
    const ColumnLayout layout{decoder_->kernels.column_tile, least_bytes, groups};
    columns_ = std::make_unique<ColumnCache>(decoder_->weights, layout, decoder_->threads);
  }

  // Of each group, the time of this share of the inputs by rows over the time by columns; 0 where it cannot have columns.
  std::array<double, kNumInputGroups> try_columns(double share) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    if (!decoder_->ffn) refuse("FFN", "one in use", "none");
    if (decoder_->residency) return {};
    py::gil_scoped_release release;
    return coreinfer::try_columns(*decoder_, share);
  }

  size_t column_bytes() const { return columns_ ? columns_->num_bytes() : 0; }

  // Limit the memory of weights; `base` is the whole mapped file that the model's matrices lie in.
  void limit(const std::string& path, const Bytes& base, size_t layer_bytes, size_t window_bytes) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    limit_memory(*decoder_, {path, base.data(), size_t(base.size())}, {layer_bytes, window_bytes});
  }

  void announce(const FfnHandle& ffn) {
    if (decoder_->residency && ffn.source) decoder_->residency->store.announce(ffn.source);
  }

  bool holds(const FfnHandle& ffn) const {
    return !decoder_->residency || decoder_->residency->store.holds(*ffn.source);
  }

  // Bytes read of layers, layers that were there when they were needed, that were not, seconds waited for them, rows of
  // tables that were read; nothing where memory is not limited.
  py::object read_figures() const {
    if (!decoder_->residency) return py::none();
    const ReadFigures figures = decoder_->residency->store.figures();
    return py::make_tuple(figures.num_bytes, figures.num_hits, figures.num_misses, figures.waited_seconds,
                          table_bytes_read(*decoder_->residency));
  }

  size_t layer_bytes_used() const { return decoder_->residency ? decoder_->residency->store.used_bytes() : 0; }

  FfnHandle gather(const FfnHandle& from, const std::vector<Ids>& neuron_ids) const {
    std::vector<NeuronIds> neurons;
    for (const Ids& ids : neuron_ids) neurons.push_back({ids.data(), static_cast<int>(ids.size())});
    check_neurons(*from.ffn, neurons);
    GatheredFfn gathered = gather_ffn(*from.ffn, neurons);
    FfnHandle out;
    out.owners = from.owners;  // of what stays where it is
    out.ffn = std::make_shared<Ffn>(std::move(gathered.ffn));
    out.memory = std::move(gathered.memory);
    return out;
  }

  int add_sequence() {
    const std::unique_lock<std::mutex> lock = turn_.take();
    return decoder_->add_sequence();
  }

  int fork_sequence(int source, int num_tokens) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_sequence(*decoder_, source);
    const int most = decoder_->sequences[source]->num_cached;
    if (num_tokens < 0 || num_tokens > most)
      refuse("num_tokens", "0 to " + std::to_string(most) + " of the sequence", std::to_string(num_tokens));
    return decoder_->fork_sequence(source, num_tokens);
  }

  void drop_sequence(int number) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_sequence(*decoder_, number);
    if (number == 0) refuse("sequence", "another than 0, which stays", "0");
    decoder_->drop_sequence(number);
  }

  py::array forward_rows(const Ids& numbers, const Ids& ids, bool screened) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_rows(numbers, ids, std::vector<int>(decoder_->sequences.size()));
    const int num_rows = static_cast<int>(ids.size());
    py::array_t<float> logits({num_rows, round_up(decoder_->weights.vocab, kBlockRows)});
    {
      py::gil_scoped_release release;
      decoder_->forward_rows(numbers.data(), ids.data(), num_rows, screened, logits.mutable_data());
    }
    return without_padding(logits);
  }

  py::array forward_beside(int sequence, const Ids& block_ids, bool last_logits, const Ids& numbers, const Ids& ids,
                           bool screened) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_sequence(*decoder_, sequence);
    check(block_ids);
    if (block_ids.size() < 2) refuse("block_ids", "at least two tokens", std::to_string(block_ids.size()));
    const int num_tokens = static_cast<int>(block_ids.size()), num_rows = static_cast<int>(ids.size());
    std::vector<int> counts(decoder_->sequences.size());
    counts[sequence] = num_tokens;
    check_rows(numbers, ids, std::move(counts));
    py::array_t<float> logits({num_rows + last_logits, round_up(decoder_->weights.vocab, kBlockRows)});
    {
      py::gil_scoped_release release;
      decoder_->forward_beside(sequence, block_ids.data(), num_tokens, last_logits, numbers.data(), ids.data(),
                               num_rows, screened, logits.mutable_data());
    }
    return without_padding(logits);
  }

  py::array forward(const Ids& ids, bool all_logits, bool screened, const py::object& watcher, int sequence) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_sequence(*decoder_, sequence);
    check(ids);
    check_room(*decoder_, sequence, ids.size());
    const int num_tokens = static_cast<int>(ids.size());
    py::array_t<float> logits({all_logits ? num_tokens : 1, round_up(decoder_->weights.vocab, kBlockRows)});
    std::exception_ptr failure;
    Watcher watch;
    if (!watcher.is_none())
      watch = [&](const Watched& seen) {
        if (!failure) call_watcher(watcher, seen, failure);
      };
    {
      py::gil_scoped_release release;
      decoder_->forward(sequence, ids.data(), num_tokens, all_logits, screened, logits.mutable_data(), watch);
    }
    if (failure) std::rethrow_exception(failure);
    return without_padding(logits);
  }

  void truncate(int num_tokens, int sequence) {
    const std::unique_lock<std::mutex> lock = turn_.take();
    check_sequence(*decoder_, sequence);
    if (num_tokens < 0) refuse("num_tokens", "at least 0", std::to_string(num_tokens));
    decoder_->truncate_sequence(sequence, num_tokens);
  }

  int num_cached(int sequence) const {
    check_sequence(*decoder_, sequence);
    return decoder_->sequences[sequence]->num_cached;
  }
  int num_pages() const { return decoder_->pool.num_pages(); }
  int num_free_pages() const { return decoder_->pool.num_free(); }
  size_t page_bytes() const { return decoder_->pool.layout.num_bytes(); }
  std::vector<int> wide_layers() const {
    std::vector<int> numbers;
    const std::vector<Layer>& layers = decoder_->weights.layers;
    for (size_t i = 0; i < layers.size(); ++i)
      if (layers[i].wide_cache) numbers.push_back(static_cast<int>(i));
    return numbers;
  }
  int num_threads() const { return decoder_->threads.size(); }
  std::string isa() const { return decoder_->kernels.name; }
  size_t bytes_per_token(int num_tokens, bool screened, bool alone) const {
    if (!decoder_->ffn) refuse("FFN", "one in use", "none");
    return decoder_->bytes_per_token(num_tokens, screened, alone);
  }

 private:
  void check(const Ids& ids) const {
    if (ids.ndim() != 1) refuse("token ids", "one dimension", std::to_string(ids.ndim()));
    check_ids(*decoder_, ids.data(), size_t(ids.size()));
  }

  // `counts`: tokens that come to each sequence besides the rows.
  void check_rows(const Ids& numbers, const Ids& ids, std::vector<int> counts) const {
    if (numbers.ndim() != 1 || numbers.size() != ids.size())
      refuse("sequences", std::to_string(ids.size()) + ", one a token", std::to_string(numbers.size()));
    for (py::ssize_t i = 0; i < numbers.size(); ++i) {
      check_sequence(*decoder_, numbers.data()[i]);
      ++counts[numbers.data()[i]];
    }
    check(ids);
    for (size_t number = 0; number < counts.size(); ++number)
      if (counts[number] > 0) check_room(*decoder_, static_cast<int>(number), counts[number]);
  }

  py::array without_padding(const py::array_t<float>& logits) const {
    return logits[py::make_tuple(py::ellipsis(), py::slice(0, decoder_->weights.vocab, 1))];
  }

  static void call_watcher(const py::object& watcher, const Watched& seen, std::exception_ptr& failure) {
    py::gil_scoped_acquire acquire;
    try {
      py::object weights = py::none();
      if (seen.weights) weights = py::array_t<float>(seen.num_tokens, seen.weights);
      watcher(seen.layer, seen.expert, py::array_t<float>({seen.num_tokens, seen.stride}, seen.activations), weights);
    } catch (...) {
      failure = std::current_exception();
    }
  }

  Owners owners_;
  Memory memory_;
  FfnHandle ffn_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<ColumnCache> columns_;
  int max_neurons_ = 0;
  Turn turn_;
};

// A mixture's pack: the same weights, but for experts that are left out.
FfnHandle keeping(const FfnHandle& all, const std::vector<std::vector<int>>& experts) {
  FfnHandle out = all;
  out.ffn = std::make_shared<Ffn>(keep_experts(*all.ffn, experts));
  out.whole = all.ffn;
  return out;
}

// The same weights, to be read layer by layer from the file that `mapping` is all of.
FfnHandle read_in_layers(const FfnHandle& ffn, const std::string& path, const Bytes& mapping) {
  refuse_experts(*ffn.ffn);
  FfnHandle out = ffn;
  out.source = std::make_shared<LayerSource>(path, mapping.data(), size_t(mapping.size()), *ffn.ffn);
  return out;
}

using SizePair = std::pair<uint64_t, uint64_t>;  // FfnSizes

// Of several FFNs, each by the number of neurons in its layers.
std::vector<SizePair> sizes_of(const std::string& record, const std::string& format,
                               const std::vector<std::vector<int>>& ffns) {
  const ModelRecord model = read_record(Json::parse(record));
  std::vector<SizePair> found;
  for (const std::vector<int>& num_neurons : ffns) {
    const FfnSizes sizes = ffn_sizes(model, format, num_neurons);
    found.emplace_back(sizes.total, sizes.largest);
  }
  return found;
}

// `parts`: of the base, its tables, a block of them, a page of the KV cache.
std::array<uint64_t, 4> plan_parts(uint64_t limit, const std::array<uint64_t, 4>& parts,
                                   const std::vector<SizePair>& packs, const std::optional<SizePair>& dense,
                                   uint64_t kv_cache) {
  WeightSizes sizes{parts[0], parts[1], parts[2], parts[3], {}, {}};
  for (const auto& [total, largest] : packs) sizes.packs.push_back({total, largest});
  if (dense) sizes.dense = FfnSizes{dense->first, dense->second};
  const MemoryPlan plan = plan_memory(limit, sizes, kv_cache);
  return {plan.base, plan.window, plan.kv_cache, plan.layers};
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* table : available_kernels()) names.push_back(table->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native engine: decoding of packed weights on the CPU.";
  module.attr("BLOCK_TOKENS") = kBlockTokens;
  module.attr("LEAST_COLUMN_BYTES") = kLeastColumnBytes;
  module.attr("PAGE_TOKENS") = kPageTokens;
  py::register_exception<PoolFull>(module, "PoolFull", PyExc_RuntimeError);
  py::register_exception<Unsupported>(module, "Unsupported", PyExc_ValueError);
  py::register_exception<NoAddressSpace>(module, "NoAddressSpace", PyExc_RuntimeError);
  py::class_<FfnHandle>(module, "Ffn")
      .def(py::init(&read_ffn), py::arg("record"), py::arg("name"), py::arg("mapping"), py::arg("num_neurons"))
      .def_static("of_experts", &read_experts, py::arg("record"), py::arg("name"), py::arg("mapping"),
                  py::arg("num_neurons"))
      .def("keeping", &keeping, py::arg("experts"))
      .def("in_layers", &read_in_layers, py::arg("path"), py::arg("mapping"))
      .def_property_readonly("max_neurons", [](const FfnHandle& ffn) { return most_neurons(*ffn.ffn); });
  py::class_<Model>(module, "Model")
      .def(py::init<const std::string&, const std::string&, const Bytes&, const std::string&, int,
                    const std::function<int(size_t, std::pair<size_t, size_t>)>&>(),
           py::arg("record"), py::arg("name"), py::arg("base"), py::arg("isa"), py::arg("num_threads"),
           py::arg("count_pages"))
      .def("use", &Model::use, py::arg("ffn"), py::arg("thresholds") = py::none())
      .def("lay_out_columns", &Model::lay_out_columns, py::arg("groups"), py::arg("least_bytes") = kLeastColumnBytes)
      .def("try_columns", &Model::try_columns, py::arg("share"))
      .def_property_readonly("column_bytes", &Model::column_bytes)
      .def("limit", &Model::limit, py::arg("path"), py::arg("base"), py::arg("layer_bytes"), py::arg("window_bytes"))
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
  module.def("available_isas", &isa_names);
  module.def("ffn_sizes", &sizes_of, py::arg("record"), py::arg("ffn_format"), py::arg("ffns"));
  module.def("plan_memory", &plan_parts, py::arg("limit"), py::arg("parts"), py::arg("packs"), py::arg("dense"),
             py::arg("kv_cache"));
  module.def("kept_layers", &kept_layers, py::arg("layer_bytes"), py::arg("room"), py::arg("streams"));
  module.def("read_bandwidth", &read_bandwidth, py::call_guard<py::gil_scoped_release>(), py::arg("num_threads"),
             py::arg("num_bytes"));
  bind_parts(module);
}

}  // namespace coreinfer
