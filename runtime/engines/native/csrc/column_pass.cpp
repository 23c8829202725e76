#include "column_pass.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {

namespace {

// The tiles of one panel's segment that a thread may get: the fewer bytes of a column lie in one piece, the less a hole saves.
constexpr size_t kPieceBytes = 1024;

int num_pieces(const ColumnMatrix& w) {
  return std::clamp(static_cast<int>(w.column_bytes() / kPieceBytes), 1, w.num_tiles);
}

}  // namespace

size_t add_columns(const Kernels& kernels, const ColumnMatrix& w, const Activations& x, float* sums, int thread,
                   Threads& threads) {
  size_t num_bytes = 0;
  const int pieces = num_pieces(w);
  threads.deal(thread, w.num_units() * pieces, [&](int begin, int end) {
    for (int last; begin < end; begin = last) {
      const int unit = begin / pieces, panel = unit / w.num_segments(), segment = unit % w.num_segments();
      last = std::min(end, (unit + 1) * pieces);
      const Range tiles = {share(w.num_tiles, begin - unit * pieces, pieces).begin,
                           share(w.num_tiles, last - 1 - unit * pieces, pieces).end};
      const int first_group = segment * kSegmentGroups,
                end_group = std::min(first_group + kSegmentGroups, w.num_groups);
      float* out = sums + size_t(segment) * w.num_outputs() + size_t(panel) * w.panel_outputs();
      const int num_columns =
          kernels.multiply_columns({w, x, panel, first_group, end_group, tiles.begin, tiles.end, out});
      num_bytes +=
          (tiles.end - tiles.begin) * (num_columns * w.tile_bytes() + (end_group - first_group) * w.head_bytes());
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
