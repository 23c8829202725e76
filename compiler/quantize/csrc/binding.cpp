// The Python module coreinfer.compiler.quantize._kernels. Everything that comes from Python is checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../../csrc/shared.h"
#include "rounding.h"
#include "x86_features.h"

namespace coreinfer {
namespace {

namespace py = pybind11;
using Moments = py::array_t<float, py::array::c_style>;

// What this CPU can run, best first; "portable" is always the last.
std::vector<const Rounder*> available_rounders() {
  std::vector<const Rounder*> rounders;
#if defined(__x86_64__)
  const coreinfer::X86Features cpu;
  if (cpu.avx512) rounders.push_back(&avx512_rounder());
  if (cpu.avx2) rounders.push_back(&avx2_rounder());
#endif
  rounders.push_back(&portable_rounder());
  return rounders;
}

Format read_format(const std::string& name) {
  if (name == "int4") return Format::int4;
  if (name == "int8") return Format::int8;
  if (name == "int8-planes") return Format::int8_planes;
  refuse("format", "int4, int8 or int8-planes", "'" + name + "'");
}

// Importance of each input, with 0 in the padding: its moment, and a thousandth of the mean of all, for a dead input
// may still fire one day. Sums go through the inputs in their order.
std::vector<float> importance_of(const py::object& object, int cols, int num_groups) {
  std::vector<float> importance(size_t(num_groups) * kGroup);
  std::fill_n(importance.begin(), cols, 1.0f);
  if (!object.is_none()) {
    const Moments moments = py::cast<Moments>(object);
    if (moments.ndim() != 1 || moments.size() != cols)
      refuse("moments", std::to_string(cols) + ", one for each column", std::to_string(moments.size()));
    std::copy_n(moments.data(), cols, importance.begin());
  }
  double sum = 0.0;
  for (int col = 0; col < cols; ++col) {
    if (!std::isfinite(importance[col]) || importance[col] < 0.0f)
      refuse("moments", "finite numbers of at least 0", std::to_string(importance[col]));
    sum += importance[col];
  }
  const float least = 1e-3f * std::max(static_cast<float>(sum / cols), 1e-20f);
  for (int col = 0; col < cols; ++col) importance[col] += least;
  return importance;
}

Task read_task(const py::array& weights, const std::string& format, const py::object& moments) {
  Task task{};
  task.format = read_format(format);
  task.bf16 = py::isinstance<py::array_t<uint16_t>>(weights);
  if (!task.bf16 && !py::isinstance<py::array_t<float>>(weights))
    refuse("weights", "uint16 bits of bfloat16, or float32", py::str(weights.dtype()));
  if (weights.ndim() != 2 || weights.shape(0) < 1 || weights.shape(1) < 1)
    refuse("weights", "rows and columns", std::to_string(weights.size()) + " values");
  task.rows = static_cast<int>(weights.shape(0));
  task.cols = static_cast<int>(weights.shape(1));
  task.weights = static_cast<const char*>(weights.data());
  task.row_stride = weights.strides(0);
  task.col_stride = weights.strides(1);
  task.importance = importance_of(moments, task.cols, task.num_groups());
  return task;
}

// The arrays that a bundle stores, in its order: codes and scales, then zero points of int4, low halves of int8-planes.
py::tuple round_matrix(const py::array& weights, const std::string& format, const py::object& moments, int num_threads,
                       const std::string& isa) {
  const Rounder& rounder = find_kernel(available_rounders(), isa);
  check_threads(num_threads);
  Task task = read_task(weights, format, moments);
  const py::ssize_t num_blocks = task.num_blocks(), num_groups = task.num_groups();
  const auto make = [&](const char* dtype, size_t size) {
    return py::array(py::dtype(dtype), std::vector<py::ssize_t>{num_blocks, num_groups, py::ssize_t(size)});
  };
  py::array codes = make("u1", task.tile_bytes()), scales = make("f2", kBlockRows), last;
  task.codes = static_cast<uint8_t*>(codes.mutable_data());
  task.scales = static_cast<uint16_t*>(scales.mutable_data());
  if (task.format == Format::int4) {
    last = make("u1", kBlockRows);
    task.zeros = static_cast<uint8_t*>(last.mutable_data());
  } else if (task.format == Format::int8_planes) {
    last = make("u1", task.tile_bytes());
    task.lows = static_cast<uint8_t*>(last.mutable_data());
  }
  std::atomic<bool> finite{true};
  {
    py::gil_scoped_release release;
    for_each_block(task.num_blocks(), num_threads, [&](int block) {
      if (!rounder.round_block(task, block)) finite = false;
    });
  }
  if (!finite) refuse("weights", "finite numbers", "infinity or NaN among them");
  if (task.format == Format::int8) return py::make_tuple(codes, scales);
  return py::make_tuple(codes, scales, last);
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "Rounding of weights to the formats that bundles store.";
  module.def("available_isas", [] { return kernel_names(available_rounders()); });
  module.def("round_matrix", &round_matrix, py::arg("weights"), py::arg("kind"), py::arg("moments"), py::kw_only(),
             py::arg("num_threads"), py::arg("isa") = "auto");
}

}  // namespace coreinfer
