// What the Python module says without a model: plans of memory, and what the CPU has.
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bandwidth.h"
#include "binding_parts.h"
#include "kernels.h"
#include "layer_plan.h"
#include "memory_plan.h"

namespace py = pybind11;

namespace coreinfer {
namespace {

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
                                   uint64_t kv_cache, int num_chosen) {
  WeightSizes sizes{parts[0], parts[1], parts[2], parts[3], num_chosen, {}, {}};
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

void bind_plans(py::module_& module) {
  module.def("available_isas", &isa_names);
  module.def("ffn_sizes", &sizes_of, py::arg("record"), py::arg("ffn_format"), py::arg("ffns"));
  module.def("plan_memory", &plan_parts, py::arg("limit"), py::arg("parts"), py::arg("packs"), py::arg("dense"),
             py::arg("kv_cache"), py::arg("num_chosen"));
  module.def("kept_layers", &kept_layers, py::arg("layer_bytes"), py::arg("room"), py::arg("streams"));
  module.def("read_bandwidth", &read_bandwidth, py::call_guard<py::gil_scoped_release>(), py::arg("num_threads"),
             py::arg("num_bytes"));
}

}  // namespace coreinfer
