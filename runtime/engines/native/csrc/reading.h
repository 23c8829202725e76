// How Python hands weights over: in place, as tuples of a format and arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "layer_store.h"
#include "scratch.h"
#include "weights.h"

namespace coreinfer {

namespace py = pybind11;

// Objects whose memory the model reads in place.
using Owners = std::vector<py::object>;

// Throws std::invalid_argument.
[[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& got);

// ("bf16", rows, cols, bits) or ("int8", rows, cols, codes, scales) or ("int4", rows, cols, codes, scales, zeros)
// or ("int8-planes", rows, cols, high halves, scales, low halves).
Matrix read_matrix(const py::handle& object, const std::string& what, Owners& owners);

ModelWeights read_model(const py::dict& spec, Owners& owners);

// FFN weights of all layers, in place or gathered.
// Hidden, as pybind11 has the objects that it holds.
struct __attribute__((visibility("hidden"))) FfnHandle {
  std::shared_ptr<Ffn> ffn = std::make_shared<Ffn>();
  Owners owners;
  std::vector<std::shared_ptr<void>> memory;
  std::shared_ptr<LayerSource> source;  // where memory is limited: what layers are read from

  int max_neurons() const {
    int most = 0;
    for (const auto& layer : *ffn) most = std::max(most, layer.num_neurons());
    return most;
  }
};

FfnHandle read_ffn(const py::list& layers, int hidden);

}  // namespace coreinfer
