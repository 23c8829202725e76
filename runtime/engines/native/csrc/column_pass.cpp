#include "column_pass.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {

namespace {

// The tiles of one panel's segment that a thread may get: the fewer bytes of a column lie in one piece, the less a hole saves.
constexpr size_t kPieceBytes = 1024;

int num_pieces(const ColumnMatrix& w) {
  return std::clamp(static_cast<int>(w.piece_bytes() / kPieceBytes), 1, w.num_tiles);
}

// The pieces [begin, end) of a product; returns the bytes that were read.
size_t add_pieces(const Kernels& kernels, const ColumnProduct& product, int begin, int end) {
  const ColumnMatrix& w = *product.weight;
  const int pieces = num_pieces(w);
  size_t num_bytes = 0;
  for (int last; begin < end; begin = last) {
    const int unit = begin / pieces, panel = unit / w.num_segments(), segment = unit % w.num_segments();
    last = std::min(end, (unit + 1) * pieces);
    const Range tiles = {share(w.num_tiles, begin - unit * pieces, pieces).begin,
                         share(w.num_tiles, last - 1 - unit * pieces, pieces).end};
    const int first_group = segment * w.segment_groups();
    const int end_group = std::min(first_group + w.segment_groups(), w.num_groups);
    float* out = product.sums + size_t(segment) * w.num_outputs() + size_t(panel) * w.panel_outputs();
    const size_t code_bytes =
        kernels.multiply_columns({w, product.x, panel, first_group, end_group, tiles.begin, tiles.end, out});
    num_bytes += (tiles.end - tiles.begin) * (code_bytes + (end_group - first_group) * w.head_bytes());
  }
  return num_bytes;
}

}  // namespace

size_t add_columns(const Kernels& kernels, const ColumnProduct* products, int count, int thread, Threads& threads) {
  size_t num_bytes = 0;
  const ColumnMatrix& first = *products[0].weight;
  const int per_product = first.num_units() * num_pieces(first);
  threads.deal(thread, per_product * count, [&](int begin, int end) {
    for (int last; begin < end; begin = last) {
      const int number = begin / per_product, offset = number * per_product;
      last = std::min(end, offset + per_product);
      num_bytes += add_pieces(kernels, products[number], begin - offset, last - offset);
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
