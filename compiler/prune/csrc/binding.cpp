// The Python module coreinfer.compiler.prune._products. Everything that comes from Python is checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <new>

#include "../../csrc/shared.h"
#include "products.h"
#include "x86_features.h"

namespace coreinfer {
namespace {

namespace py = pybind11;
// Exactly these, and never a copy of them: sums are added in place.
using Bits = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Rows = py::array_t<int64_t, py::array::c_style>;

// What this CPU can run, best first; "portable" is always the last.
std::vector<const Multiplier*> available_multipliers() {
  std::vector<const Multiplier*> multipliers;
#if defined(__x86_64__)
  const X86Features cpu;
  if (cpu.avx512bf16) multipliers.push_back(&bf16_multiplier());
  if (cpu.avx512) multipliers.push_back(&avx512_multiplier());
  if (cpu.avx2) multipliers.push_back(&avx2_multiplier());
#endif
  multipliers.push_back(&portable_multiplier());
  return multipliers;
}

template <class Array>
Array matrix(const py::object& object, const std::string& name, py::ssize_t rows, py::ssize_t columns) {
  if (!py::isinstance<Array>(object)) refuse(name, "a C-contiguous array of its type", py::str(object.get_type()));
  const Array array = py::reinterpret_borrow<Array>(object);
  if (array.ndim() != 2 || (rows >= 0 && array.shape(0) != rows) || (columns >= 0 && array.shape(1) != columns))
    refuse(name, std::to_string(rows) + " rows and " + std::to_string(columns) + " columns (-1: any)",
           std::to_string(array.size()) + " values of another shape");
  return array;
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Pack some rows, then multiply them, again and again; `task` has all rows.
void add_chunks(const Multiplier& multiplier, const Task& task, int64_t num_rows, int num_threads) {
  const int64_t num_chunks = (num_rows + kChunkTokens - 1) / kChunkTokens;
  // A pair for each chunk, so that no thread has to set them back.
  std::vector<std::atomic<int>> next(2 * num_chunks);
  run_together(num_threads, [&](Barrier& barrier) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      Task part = task;
      part.rows += chunk * kChunkTokens;
      part.num_rows = static_cast<int>(std::min<int64_t>(kChunkTokens, num_rows - chunk * kChunkTokens));
      const int num_packs = multiplier.num_packs(part), num_blocks = multiplier.num_blocks(part);
      for (int block; (block = next[2 * chunk]++) < num_packs;) multiplier.pack(part, block);
      barrier.wait();
      for (int block; (block = next[2 * chunk + 1]++) < num_blocks;) multiplier.multiply(part, block);
      barrier.wait();
    }
  });
}

// Point a task at two matrices of one kind.
template <class Array>
void take_matrices(Task& task, const py::object& activations_object, const py::object& targets_object) {
  const Array activations = matrix<Array>(activations_object, "activations", -1, -1);
  const Array targets = matrix<Array>(targets_object, "targets", activations.shape(0), -1);
  task.activations = activations.data();
  task.targets = targets.data();
  task.num_inputs = static_cast<int>(activations.shape(1));
  task.num_outputs = static_cast<int>(targets.shape(1));
}

// Those of a name, or the best that take the kind of matrices.
const Multiplier& find_multiplier(const std::string& isa, bool is_float) {
  std::vector<const Multiplier*> multipliers = available_multipliers();
  if (is_float)
    multipliers.erase(std::remove_if(multipliers.begin(), multipliers.end(),
                                     [](const Multiplier* multiplier) { return !multiplier->takes_float; }),
                      multipliers.end());
  return find_kernel(multipliers, isa);
}

// gram += sum of h h^T, on and above the diagonal; cross += sum of h y^T; over some rows of both matrices.
void add_products(const py::object& gram_object, const py::object& cross_object, const py::object& activations_object,
                  const py::object& targets_object, const Rows& rows, int num_threads, const std::string& isa) {
  Task task{};
  task.is_float = py::isinstance<Floats>(activations_object);
  const Multiplier& multiplier = find_multiplier(isa, task.is_float);
  check_threads(num_threads);
  if (task.is_float)
    take_matrices<Floats>(task, activations_object, targets_object);
  else
    take_matrices<Bits>(task, activations_object, targets_object);
  const py::ssize_t num_tokens = py::len(activations_object);
  Floats gram = matrix<Floats>(gram_object, "gram", task.num_inputs, task.num_inputs);
  Floats cross = matrix<Floats>(cross_object, "cross", task.num_inputs, task.num_outputs);
  for (py::ssize_t i = 0; i < rows.size(); ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= num_tokens)
      refuse("rows", "0 to " + std::to_string(num_tokens - 1), std::to_string(rows.data()[i]));
  task.rows = rows.data();
  task.gram = gram.mutable_data();
  task.cross = cross.mutable_data();
  const std::unique_ptr<void, Free> packed(::operator new(multiplier.packed_bytes(task), std::align_val_t(64)));
  task.packed = packed.get();
  const py::gil_scoped_release release;
  add_chunks(multiplier, task, rows.size(), num_threads);
}

}  // namespace

PYBIND11_MODULE(_products, module) {
  module.doc() = "Sums of products over tokens, of bfloat16 or float, in float.";
  module.def("available_isas", [] { return kernel_names(available_multipliers()); });
  module.def("add_products", &add_products, py::arg("gram"), py::arg("cross"), py::arg("activations"),
             py::arg("targets"), py::arg("rows"), py::kw_only(), py::arg("num_threads"), py::arg("isa") = "auto");
}

}  // namespace coreinfer
