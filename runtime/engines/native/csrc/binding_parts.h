// Single parts of the engine as functions of the Python module, for tests.
#pragma once

#include <pybind11/pybind11.h>

namespace coreinfer {

void bind_parts(pybind11::module_& module);

}  // namespace coreinfer
