// One token's products with matrices that lie input by input, by all threads together.
#pragma once

#include "columns.h"
#include "kernels.h"
#include "threads.h"

namespace coreinfer {

// Sums of all segments: (segments, outputs). The floats are those of the row-interleaved matrices, to the bit.
inline size_t num_segment_sums(const ColumnMatrix& w) { return size_t(w.num_segments()) * w.num_outputs(); }

// A matrix, its inputs, and where its sums go.
struct ColumnProduct {
  const ColumnMatrix* weight;
  Activations x;
  float* sums;
};
// The thread's part of the sums of some products, all of one shape; returns the bytes that it read of the weights. No sum
// may be used before a barrier.
size_t add_columns(const Kernels& kernels, const ColumnProduct* products, int count, int thread, Threads& threads);

// out = the products of outputs [begin, end), multiples of 16: the segments' sums, added up in their order.
void sum_segments(const Kernels& kernels, const ColumnMatrix& w, const float* sums, int begin, int end, float* out);

}  // namespace coreinfer
