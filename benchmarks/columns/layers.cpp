#include "layers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace columns {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLine = 64;

size_t in_lines(size_t num_bytes) { return (num_bytes + kLine - 1) / kLine * kLine; }

coreinfer::Matrix row_matrix(int outputs, int inputs, uint8_t* memory) {
  coreinfer::Matrix w;
  w.format = coreinfer::Format::int4;
  w.rows = outputs;
  w.cols = inputs;
  const size_t tiles = size_t(w.num_blocks()) * w.num_groups();
  w.codes = memory;
  w.scales = reinterpret_cast<const uint16_t*>(memory + tiles * w.tile_bytes());
  w.zeros = memory + tiles * (w.tile_bytes() + coreinfer::kBlockRows * 2);
  return w;
}

void fill(const coreinfer::Matrix& w, const Layout& layout, uint8_t* memory, std::mt19937& random) {
  const size_t tiles = size_t(w.num_blocks()) * w.num_groups();
  for (size_t i = 0; i < w.num_bytes(); i += 4) {
    const uint32_t bits = random();
    std::memcpy(memory + i, &bits, std::min<size_t>(4, w.num_bytes() - i));
  }
  auto* scales = reinterpret_cast<uint16_t*>(memory + tiles * w.tile_bytes());
  for (size_t i = 0; i < tiles * coreinfer::kBlockRows; ++i) scales[i] = 0x2000 + scales[i] % 0x800;  // 1/128 to 1/32
  // Groups of the rows that are one of the columns' have the same scales.
  uint8_t* zeros = memory + tiles * (w.tile_bytes() + coreinfer::kBlockRows * 2);
  const size_t step = layout.group / coreinfer::kGroup;
  for (size_t tile = 0; tile < tiles; ++tile) {
    const size_t to = tile * coreinfer::kBlockRows, from = tile / step * step * coreinfer::kBlockRows;
    std::memmove(scales + to, scales + from, coreinfer::kBlockRows * 2);
    std::memmove(zeros + to, zeros + from, coreinfer::kBlockRows);
  }
}

}  // namespace

Memory allocate(size_t num_bytes) {
  const size_t rounded = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, rounded));
  if (!memory) throw std::bad_alloc();
  madvise(memory, rounded, MADV_HUGEPAGE);
  return {memory, std::free};
}

Layers::Layers(const Shape& shape, const Layout& layout, int most_panel_outputs)
    : shape(shape), row_memory_(nullptr, std::free), column_memory_(nullptr, std::free) {
  std::array<size_t, kNumKinds> sizes, column_sizes;
  size_t layer_bytes = 0, column_layer_bytes = 0;
  for (int kind = 0; kind < kNumKinds; ++kind) {
    sizes[kind] = in_lines(row_matrix(shape.outputs(kind), shape.inputs(kind), nullptr).num_bytes());
    column_sizes[kind] = in_lines(ColumnMatrix{layout, shape.inputs(kind), shape.outputs(kind),
                                               panel_outputs(layout, shape.outputs(kind), most_panel_outputs)}
                                      .num_bytes());
    layer_bytes += sizes[kind];
    column_layer_bytes += column_sizes[kind];
  }
  row_bytes = layer_bytes * shape.layers;
  row_memory_ = allocate(row_bytes);
  column_memory_ = allocate(column_layer_bytes * shape.layers);
  rows.resize(shape.layers);
  columns.resize(shape.layers);
  std::mt19937 random(1);
  for (int layer = 0; layer < shape.layers; ++layer) {
    size_t at = layer_bytes * layer, column_at = column_layer_bytes * layer;
    for (int kind = 0; kind < kNumKinds; column_at += column_sizes[kind], at += sizes[kind++]) {
      uint8_t *row_data = row_memory_.get() + at, *column_data = column_memory_.get() + column_at;
      auto& w = rows[layer][kind] = row_matrix(shape.outputs(kind), shape.inputs(kind), row_data);
      if (layer == 0) {
        fill(w, layout, row_data, random);
        columns[0][kind] = pack(layout, w, panel_outputs(layout, w.rows, most_panel_outputs), column_data);
        continue;
      }
      std::memcpy(row_data, rows[0][kind].codes, sizes[kind]);
      columns[layer][kind] = columns[0][kind];
      columns[layer][kind].data = column_data;
      std::memcpy(column_data, columns[0][kind].data, columns[0][kind].num_bytes());
    }
  }
}

Inputs::Inputs(int num_inputs, int num_tokens, std::mt19937& random) : num_inputs(num_inputs), norms(num_inputs) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> norm(0.5f, 2.0f);
  values.resize(num_tokens, num_inputs);
  for (float& value : norms) value = norm(random);
  for (int token = 0; token < num_tokens; ++token) {
    float* x = values.view.token(token).values;
    std::vector<float> weights(num_inputs);
    for (int i = 0; i < num_inputs; ++i) {
      x[i] = normal(random);
      weights[i] = std::fabs(x[i]) * norms[i];
    }
    std::sort(weights.begin(), weights.end(), std::greater<>());
    sorted.push_back(std::move(weights));
  }
}

float Inputs::threshold(int token, double share) const {
  const size_t count = static_cast<size_t>(std::lround(share * num_inputs));
  return count < sorted[token].size() ? sorted[token][count] : -1.0f;
}

}  // namespace columns
