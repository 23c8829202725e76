// The Python module coreinfer.compiler.models._elementwise. Everything that comes from Python is checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/shared.h"
#include "elementwise.h"
#include "x86_features.h"

namespace coreinfer {
namespace {

namespace py = pybind11;
// Exactly these, and never a copy of them: results are written in place.
using Bits = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

constexpr size_t kPartValues = 1 << 15;  // that a thread takes at a time

// What this CPU can run, best first; "portable" is always the last.
std::vector<const Elementwise*> available() {
  std::vector<const Elementwise*> found;
#if defined(__x86_64__)
  const X86Features cpu;
  if (cpu.avx512) found.push_back(&avx512_elementwise());
  if (cpu.avx2) found.push_back(&avx2_elementwise());
#endif
  found.push_back(&portable_elementwise());
  return found;
}

// An array of either kind, as the first one is; -1: any number.
py::array array_of(const py::object& object, const std::string& name, bool is_float, std::vector<py::ssize_t> shape) {
  if (!(is_float ? py::isinstance<Floats>(object) : py::isinstance<Bits>(object)))
    refuse(name, "a C-contiguous array of the first one's type", py::str(py::type::handle_of(object)));
  const py::array array = py::reinterpret_borrow<py::array>(object);
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || array.shape(i) == shape[i];
  if (!fits) refuse(name, "a shape that fits the first one's", std::to_string(array.size()) + " values of another");
  return array;
}

bool is_float(const py::object& object) { return py::isinstance<Floats>(object); }

// Call part(begin, end) for all of `count`, of which each has so many values.
template <class Part>
void in_parts(size_t count, size_t values_each, int num_threads, Part part) {
  const size_t step = std::max<size_t>(1, kPartValues / std::max<size_t>(1, values_each));
  for_each_block(static_cast<int>((count + step - 1) / step), num_threads,
                 [&](int block) { part(block * step, std::min(count, (block + 1) * step)); });
}

void norm(const py::object& x_object, const py::object& weight_object, const py::object& out_object, float eps,
          float offset, int num_threads, const std::string& isa) {
  const Elementwise& kernels = find_kernel(available(), isa);
  check_threads(num_threads);
  const bool floats = is_float(x_object);
  const py::array x = array_of(x_object, "x", floats, {-1, -1});
  const py::array weight = array_of(weight_object, "weight", floats, {x.shape(1)});
  py::array out = array_of(out_object, "out", floats, {x.shape(0), x.shape(1)});
  const NormTask task = {x.data(), weight.data(), out.mutable_data(), floats, size_t(x.shape(1)), eps, offset};
  const size_t num_rows = x.shape(0);
  const py::gil_scoped_release release;
  in_parts(num_rows, task.n, num_threads, [&](size_t begin, size_t end) { kernels.norm(task, begin, end); });
}

void gate(const py::object& gate_object, const py::object& up_object, const std::string& act, int num_threads,
          const std::string& isa) {
  const Elementwise& kernels = find_kernel(available(), isa);
  check_threads(num_threads);
  if (act != "silu" && act != "gelu_tanh") refuse("act", "silu or gelu_tanh", act);
  const bool floats = is_float(gate_object);
  py::array gate = array_of(gate_object, "gate", floats, {-1});
  const py::array up = array_of(up_object, "up", floats, {gate.shape(0)});
  const GateTask task = {gate.mutable_data(), up.data(), floats, act == "silu" ? Gate::silu : Gate::gelu_tanh};
  const size_t num_values = gate.shape(0);
  const py::gil_scoped_release release;
  in_parts(num_values, 1, num_threads, [&](size_t begin, size_t end) { kernels.gate(task, begin, end); });
}

void turn(const py::object& x_object, const py::object& cos_object, const py::object& sin_object, int num_threads,
          const std::string& isa) {
  const Elementwise& kernels = find_kernel(available(), isa);
  check_threads(num_threads);
  const bool floats = is_float(x_object);
  py::array x = array_of(x_object, "x", floats, {-1, -1, -1});
  if (x.shape(2) % 2) refuse("x", "an even number of values a head", std::to_string(x.shape(2)));
  const py::array cos = array_of(cos_object, "cos", floats, {-1, x.shape(2)});
  const py::array sin = array_of(sin_object, "sin", floats, {cos.shape(0), x.shape(2)});
  if (x.shape(0) && (!cos.shape(0) || x.shape(0) % cos.shape(0)))
    refuse("cos", "angles for each token, or for parts of these", std::to_string(cos.shape(0)) + " rows");
  const size_t heads = x.shape(1), half = x.shape(2) / 2, num_tokens = x.shape(0);
  const TurnTask task = {x.mutable_data(), cos.data(), sin.data(), floats, heads, half, size_t(cos.shape(0))};
  const py::gil_scoped_release release;
  in_parts(num_tokens, heads * 2 * half, num_threads,
           [&](size_t begin, size_t end) { kernels.turn(task, begin, end); });
}

}  // namespace

PYBIND11_MODULE(_elementwise, module) {
  module.doc() = "What a transformer layer does between its products, of bfloat16 (as uint16) or float.";
  module.def("available_isas", [] { return kernel_names(available()); });
  module.def("norm", &norm, py::arg("x"), py::arg("weight"), py::arg("out"), py::kw_only(), py::arg("eps"),
             py::arg("offset"), py::arg("num_threads"), py::arg("isa") = "auto");
  module.def("gate", &gate, py::arg("gate"), py::arg("up"), py::kw_only(), py::arg("act"), py::arg("num_threads"),
             py::arg("isa") = "auto");
  module.def("turn", &turn, py::arg("x"), py::arg("cos"), py::arg("sin"), py::kw_only(), py::arg("num_threads"),
             py::arg("isa") = "auto");
}

}  // namespace coreinfer
