#include "binding_parts.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "elementary.h"
#include "kernels.h"
#include "reading.h"
#include "refusals.h"
#include "scratch.h"

namespace coreinfer {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

// One matrix product by one kernel table: (tokens, rows) float32.
py::array multiply(const py::object& matrix, const Floats& inputs, const std::string& isa) {
  Owners owners;
  const Kernels& kernels = find_kernels(isa);
  const Matrix w = read_matrix(matrix, "matrix", owners);
  if (inputs.ndim() != 2 || inputs.shape(1) != w.cols) refuse("inputs", "(tokens, columns)", "another shape");
  const int num_tokens = static_cast<int>(inputs.shape(0)), padded = round_up(w.rows, kBlockRows);
  ActivationBuffer x;
  x.resize(num_tokens, w.cols);
  for (int t = 0; t < num_tokens; ++t) std::copy_n(inputs.data() + size_t(t) * w.cols, w.cols, x.view.token(t).values);
  kernels.quantize(x.view, x.view.stride, num_tokens);
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

// Cosines and sines of angles: (angles, 2) float32.
py::array directions(const Floats& angles) {
  if (angles.ndim() != 1) refuse("angles", "one dimension", std::to_string(angles.ndim()));
  py::array_t<float> out({angles.size(), py::ssize_t(2)});
  for (py::ssize_t i = 0; i < angles.size(); ++i) {
    const Direction direction = direction_of(angles.data()[i]);
    out.mutable_data(i, 0)[0] = direction.cosine;
    out.mutable_data(i, 1)[0] = direction.sine;
  }
  return out;
}

}  // namespace

void bind_parts(py::module_& module) {
  module.def("multiply", &multiply, py::arg("matrix"), py::arg("inputs"), py::arg("isa"));
  module.def("unpack", &unpack, py::arg("matrix"));
  module.def("directions", &directions, py::arg("angles"));
  module.def("power", &power, py::arg("base"), py::arg("exponent"));
  module.def("exponential", &exponential, py::arg("x"));
  module.def("logarithm", &logarithm, py::arg("x"));
}

}  // namespace coreinfer
