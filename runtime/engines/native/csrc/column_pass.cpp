#include "column_pass.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {

size_t add_columns(const Kernels& kernels, const ColumnMatrix& w, const Activations& x, float* sums, int thread,
                   Threads& threads) {
  size_t num_bytes = 0;
  threads.deal(thread, w.num_units(), [&](int begin, int end) {
    for (int unit = begin; unit < end; ++unit) {
      const int panel = unit / w.num_segments(), segment = unit % w.num_segments();
      const int first = segment * kSegmentGroups, last = std::min(first + kSegmentGroups, w.num_groups);
      float* out = sums + size_t(segment) * w.num_outputs() + size_t(panel) * w.panel_outputs();
      const int num_columns = kernels.multiply_columns({w, x, panel, first, last, out});
      num_bytes += num_columns * w.column_bytes() + (last - first) * w.heads_bytes();
    }
  });
  return num_bytes;
}

void sum_segments(const Kernels& kernels, const ColumnMatrix& w, const float* sums, int begin, int end, float* out) {
  std::memcpy(out, sums + begin, sizeof(float) * (end - begin));
  for (int segment = 1; segment < w.num_segments(); ++segment)
    kernels.add(out, sums + size_t(segment) * w.num_outputs() + begin, end - begin);
}

}  // namespace coreinfer
