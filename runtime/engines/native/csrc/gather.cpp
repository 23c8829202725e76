// Pick rows or columns of a matrix into memory of its own, in the layout of the kernels; and so neurons of an FFN.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "gather.h"
#include "kernels.h"
#include "scratch.h"

namespace coreinfer {
namespace {

// Memory of a quantized matrix: codes, then scales, then zeros.
struct Packed {
  explicit Packed(Format format, int rows, int cols) {
    owned.view.format = format;
    owned.view.rows = rows;
    owned.view.cols = cols;
    const size_t tiles = size_t(owned.view.num_blocks()) * owned.view.num_groups();
    const size_t code_bytes = tiles * owned.view.tile_bytes(), scale_bytes = tiles * kBlockRows * 2;
    auto buffer = std::make_shared<Buffer<uint8_t>>();
    buffer->resize(code_bytes + scale_bytes + tiles * kBlockRows);
    codes = buffer->get();
    scales = reinterpret_cast<uint16_t*>(codes + code_bytes);
    zeros = codes + code_bytes + scale_bytes;
    owned.view.codes = codes;
    owned.view.scales = scales;
    owned.view.zeros = zeros;
    owned.memory = buffer;
  }
  OwnedMatrix owned;
  uint8_t* codes;
  uint16_t* scales;
  uint8_t* zeros;
};

OwnedMatrix copy_bf16(int rows, int cols, const std::function<void(int, uint16_t*)>& fill_row) {
  auto buffer = std::make_shared<Buffer<uint16_t>>();
  buffer->resize(size_t(rows) * cols);
  OwnedMatrix owned;
  owned.view.rows = rows;
  owned.view.cols = cols;
  owned.view.bf16 = buffer->get();
  owned.memory = buffer;
  for (int row = 0; row < rows; ++row) fill_row(row, buffer->get() + size_t(row) * cols);
  return owned;
}

OwnedMatrix copy_rows(const Matrix& w, const int32_t* ids, int count) {
  auto buffer = std::make_shared<Buffer<uint8_t>>();
  buffer->resize(count * w.row_bytes());
  OwnedMatrix owned;
  owned.view = w;
  owned.view.rows = count;
  owned.view.codes = buffer->get();
  owned.memory = buffer;
  for (int row = 0; row < count; ++row)
    std::memcpy(buffer->get() + row * w.row_bytes(), w.row(ids[row]), w.row_bytes());
  return owned;
}

// Symmetric int8 of one row of floats, group by group.
void pack_row(const float* values, int row, Packed& out) {
  const Matrix& view = out.owned.view;
  for (int g = 0; g < view.num_groups(); ++g) {
    const int count = std::min(kGroup, view.cols - g * kGroup);
    float largest = 0.0f;
    for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[g * kGroup + i]));
    const size_t tile = size_t(row / kBlockRows) * view.num_groups() + g;
    const uint16_t scale = float_to_half(largest / 127.0f);
    const float step = half_to_float(scale);
    out.scales[tile * kBlockRows + row % kBlockRows] = scale;
    uint8_t* codes = out.codes + tile * view.tile_bytes() + row % kBlockRows * 4;
    for (int i = 0; i < kGroup; ++i) {
      const float value = i < count && step > 0.0f ? std::nearbyint(values[g * kGroup + i] / step) : 0.0f;
      codes[i / 4 * 64 + i % 4] = static_cast<uint8_t>(128 + std::clamp(value, -127.0f, 127.0f));
    }
  }
}

// Picks neurons of FFNs, and keeps what they are copied to.
class Gatherer {
 public:
  explicit Gatherer(std::vector<std::shared_ptr<void>>& memory) : memory_(memory) {}

  FfnWeights pick(const FfnWeights& from, const NeuronIds& neurons) {
    FfnWeights picked;
    if (!from.gate.weight.empty()) picked.gate = rows(from.gate, neurons);
    picked.up = rows(from.up, neurons);
    const auto gather_down = from.by_neuron() ? gather_rows : gather_columns;
    picked.down = {keep(gather_down(from.down.weight, neurons.ids, neurons.count)), from.down.bias};
    return picked;
  }

  FfnWeights pick_of_experts(const FfnWeights& from, const NeuronIds& neurons) {
    FfnWeights picked;
    picked.experts.resize(from.experts.size());
    int32_t start = 0;
    const int32_t *begin = neurons.ids, *last = neurons.ids + neurons.count;
    for (size_t number = 0; number < from.experts.size(); ++number) {
      const FfnWeights& expert = from.experts[number];
      const int32_t* end = std::lower_bound(begin, last, start + expert.num_neurons());
      picked.experts[number] = pick_of_expert(expert, start, {begin, static_cast<int>(end - begin)});
      start += expert.num_neurons();
      begin = end;
    }
    return picked;
  }

 private:
  FfnWeights pick_of_expert(const FfnWeights& expert, int32_t start, const NeuronIds& neurons) {
    if (neurons.count == 0) return {};
    if (neurons.count == expert.num_neurons()) return expert;
    std::vector<int32_t> own(neurons.ids, neurons.ids + neurons.count);
    for (int32_t& id : own) id -= start;
    return pick(expert, {own.data(), neurons.count});
  }

  Matrix keep(const OwnedMatrix& owned) {
    memory_.push_back(owned.memory);
    return owned.view;
  }

  Linear rows(const Linear& from, const NeuronIds& neurons) {
    return {keep(gather_rows(from.weight, neurons.ids, neurons.count)), bias(from.bias, neurons)};
  }

  const float* bias(const float* from, const NeuronIds& neurons) {
    if (!from) return nullptr;
    auto picked = std::make_shared<Buffer<float>>();
    picked->resize(neurons.count);
    for (int i = 0; i < neurons.count; ++i) picked->get()[i] = from[neurons.ids[i]];
    memory_.push_back(picked);
    return picked->get();
  }

  std::vector<std::shared_ptr<void>>& memory_;
};

}  // namespace

OwnedMatrix gather_rows(const Matrix& w, const int32_t* ids, int count) {
  if (!w.quantized())
    return copy_bf16(count, w.cols, [&](int row, uint16_t* out) {
      std::memcpy(out, w.bf16 + size_t(ids[row]) * w.cols, size_t(w.cols) * 2);
    });
  if (w.format == Format::int4_rows) return copy_rows(w, ids, count);
  Packed out(w.format, count, w.cols);
  for (int row = 0; row < count; ++row)
    for (int g = 0; g < w.num_groups(); ++g) {
      const size_t from = size_t(ids[row] / kBlockRows) * w.num_groups() + g;
      const size_t to = size_t(row / kBlockRows) * w.num_groups() + g;
      const int from_lane = ids[row] % kBlockRows, to_lane = row % kBlockRows;
      out.scales[to * kBlockRows + to_lane] = w.scales[from * kBlockRows + from_lane];
      if (w.format == Format::int4) out.zeros[to * kBlockRows + to_lane] = w.zeros[from * kBlockRows + from_lane];
      for (size_t quad = 0; quad < w.tile_bytes() / 64; ++quad)
        std::memcpy(out.codes + to * w.tile_bytes() + quad * 64 + to_lane * 4,
                    w.codes + from * w.tile_bytes() + quad * 64 + from_lane * 4, 4);
    }
  return out.owned;
}

OwnedMatrix gather_columns(const Matrix& w, const int32_t* ids, int count) {
  if (!w.quantized())
    return copy_bf16(w.rows, count, [&](int row, uint16_t* out) {
      for (int i = 0; i < count; ++i) out[i] = w.bf16[size_t(row) * w.cols + ids[i]];
    });
  Packed out(Format::int8, w.rows, count);
  std::vector<float> whole(w.cols), picked(count);
  for (int row = 0; row < w.rows; ++row) {
    unpack_row(w, row, whole.data());
    for (int i = 0; i < count; ++i) picked[i] = whole[ids[i]];
    pack_row(picked.data(), row, out);
  }
  return out.owned;
}

GatheredFfn gather_ffn(const Ffn& from, const std::vector<NeuronIds>& neurons) {
  GatheredFfn gathered;
  Gatherer gatherer(gathered.memory);
  for (size_t layer = 0; layer < from.size(); ++layer)
    gathered.ffn.push_back(from[layer].experts.empty() ? gatherer.pick(from[layer], neurons[layer])
                                                       : gatherer.pick_of_experts(from[layer], neurons[layer]));
  return gathered;
}

}  // namespace coreinfer
