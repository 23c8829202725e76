// How Python hands weights over: as mapped files, and single matrices as tuples of a format and arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "assembly.h"
#include "columns.h"
#include "layer_store.h"
#include "scratch.h"
#include "weights.h"

namespace coreinfer {

namespace py = pybind11;

// Objects whose memory the model reads in place.
using Owners = std::vector<py::object>;

// ("bf16", rows, cols, bits) or ("int8", rows, cols, codes, scales) or ("int4", rows, cols, codes, scales, zeros)
// or ("int8-planes", rows, cols, high halves, scales, low halves).
Matrix read_matrix(const py::handle& object, const std::string& what, Owners& owners);

// FFN weights of all layers, in place or gathered.
// Hidden, as pybind11 has the objects that it holds.
struct __attribute__((visibility("hidden"))) FfnHandle {
  std::shared_ptr<Ffn> ffn = std::make_shared<Ffn>();
  std::shared_ptr<Ffn> whole;  // of experts that are named alone: the FFN that they are experts of
  Owners owners;
  std::vector<std::shared_ptr<void>> memory;
  std::shared_ptr<LayerSource> source;  // where memory is limited: what layers are read from
};

using Bytes = py::array_t<uint8_t, py::array::c_style>;

// A mapped file of a bundle, which must stay as long as what is taken from it.
TensorFile open_mapped(const std::string& name, const Bytes& mapping, Owners& owners);
// The dense FFN or a cluster's pack; `record` is the manifest's of the model, as JSON.
FfnHandle read_ffn(const std::string& record, const std::string& name, const Bytes& mapping,
                   const std::vector<int>& num_neurons);
// The dense FFN of a mixture of experts.
FfnHandle read_experts(const std::string& record, const std::string& name, const Bytes& mapping,
                       const std::vector<int>& num_neurons);

// (layers, groups of inputs): below which inputs are not wanted. Throws std::invalid_argument: another shape.
std::shared_ptr<TokenShares> read_shares(const py::array_t<float, py::array::c_style>& thresholds, size_t num_layers);

}  // namespace coreinfer
