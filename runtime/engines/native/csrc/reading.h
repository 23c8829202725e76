// How Python hands single matrices over, for tests: as tuples of a format and arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "matrix.h"

namespace coreinfer {

namespace py = pybind11;

// Objects whose memory is read in place.
using Owners = std::vector<py::object>;

// ("bf16", rows, cols, bits) or ("int8", rows, cols, codes, scales) or ("int4", rows, cols, codes, scales, zeros)
// or ("int8-planes", rows, cols, high halves, scales, low halves).
Matrix read_matrix(const py::handle& object, const std::string& what, Owners& owners);

}  // namespace coreinfer
