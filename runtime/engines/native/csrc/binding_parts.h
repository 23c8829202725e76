// Functions of the Python module that are not about a model. They call the C++ itself.
#pragma once

#include <pybind11/pybind11.h>

namespace coreinfer {

void bind_plans(pybind11::module_& module);
// Single parts of the engine, for tests.
void bind_parts(pybind11::module_& module);

}  // namespace coreinfer
