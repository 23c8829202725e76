// Matrices of picked neurons.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "weights.h"

namespace coreinfer {

// A matrix that owns its memory: rows or columns picked from another.
struct OwnedMatrix {
  Matrix view;
  std::shared_ptr<void> memory;
};
OwnedMatrix gather_rows(const Matrix& w, const int32_t* ids, int count);
// Columns of quantized matrices become int8, whatever they were: their scales differ.
OwnedMatrix gather_columns(const Matrix& w, const int32_t* ids, int count);

// Neurons of a layer, ascending. Those of experts are numbered through: all of the first expert come first.
struct NeuronIds {
  const int32_t* ids;
  int count;
};

// An FFN of picked neurons. Biases of outputs, and experts of which all are picked, stay where they are.
struct GatheredFfn {
  Ffn ffn;
  std::vector<std::shared_ptr<void>> memory;
};
// `neurons`: of each layer. Experts of which none is picked are left out; the others must have as many each (see
// check_neurons).
GatheredFfn gather_ffn(const Ffn& from, const std::vector<NeuronIds>& neurons);

}  // namespace coreinfer
