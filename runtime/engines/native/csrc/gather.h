// Matrices of picked neurons.
#pragma once

#include <memory>

#include "matrix.h"

namespace coreinfer {

// A matrix that owns its memory: rows or columns picked from another.
struct OwnedMatrix {
  Matrix view;
  std::shared_ptr<void> memory;
};
OwnedMatrix gather_rows(const Matrix& w, const int32_t* ids, int count);
// Columns of quantized matrices become int8, whatever they were: their scales differ.
OwnedMatrix gather_columns(const Matrix& w, const int32_t* ids, int count);

}  // namespace coreinfer
