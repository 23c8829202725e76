// Where the layers of an FFN lie in its file, and its weights where they were read to.
#include <algorithm>
#include <stdexcept>

#include "layer_store.h"

namespace coreinfer {
namespace {

// Call visit(pointer, bytes) for each part of a matrix; the pointer may be changed.
template <class Visit>
void each_part(Matrix& w, Visit visit) {
  if (w.empty()) return;
  if (!w.quantized()) return visit(w.bf16, size_t(w.rows) * w.cols * 2);
  if (w.format == Format::int4_rows) return visit(w.codes, w.num_bytes());
  const size_t num_tiles = size_t(w.num_blocks()) * w.num_groups();
  visit(w.codes, num_tiles * w.tile_bytes());
  visit(w.scales, num_tiles * kBlockRows * 2);
  if (w.zeros) visit(w.zeros, num_tiles * kBlockRows);
  if (w.lows) visit(w.lows, num_tiles * w.tile_bytes());
}

template <class Visit>
void each_part(FfnWeights& layer, Visit visit) {
  for (Linear* linear : {&layer.gate, &layer.up, &layer.down}) each_part(linear->weight, visit);
}

}  // namespace

LayerSource::LayerSource(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn)
    : file_(path), mapping_(mapping), mapped_(ffn) {
  for (FfnWeights& layer : mapped_) {
    size_t begin = mapping_bytes, end = 0;
    each_part(layer, [&](const auto*& part, size_t num_bytes) {
      const auto* place = reinterpret_cast<const uint8_t*>(part);
      if (place < mapping || place + num_bytes > mapping + mapping_bytes)
        throw std::invalid_argument(path + ": weights lie outside of the file");
      begin = std::min(begin, size_t(place - mapping));
      end = std::max(end, size_t(place - mapping) + num_bytes);
    });
    const size_t first = begin / kSector * kSector, last = (end + kSector - 1) / kSector * kSector;
    ranges_.push_back({first, last - first, end - first});
    for (Linear* linear : {&layer.gate, &layer.up, &layer.down})
      if (linear->bias) {
        const bool turned = linear == &layer.down && layer.by_neuron();
        biases_.emplace_back(linear->bias, linear->bias + (turned ? linear->weight.cols : linear->weight.rows));
        linear->bias = biases_.back().data();
      }
  }
}

size_t LayerSource::memory_bytes(int layer) const { return in_huge_pages(ranges_[layer].num_bytes); }

size_t LayerSource::largest() const {
  size_t most = 0;
  for (int layer = 0; layer < num_layers(); ++layer) most = std::max(most, memory_bytes(layer));
  return most;
}

size_t LayerSource::total() const {
  size_t sum = 0;
  for (int layer = 0; layer < num_layers(); ++layer) sum += memory_bytes(layer);
  return sum;
}

bool LayerSource::read(int layer, uint8_t* to) const {
  const Range& range = ranges_[layer];
  return file_.read(range.offset, range.num_bytes, range.num_needed, to);
}

FfnWeights LayerSource::weights(int layer, const uint8_t* memory) const {
  FfnWeights weights = mapped_[layer];
  const uint8_t* origin = mapping_ + ranges_[layer].offset;
  each_part(weights, [&](const auto*& part, size_t) {
    using Part = std::remove_reference_t<decltype(part)>;
    part = reinterpret_cast<Part>(memory + (reinterpret_cast<const uint8_t*>(part) - origin));
  });
  return weights;
}

}  // namespace coreinfer
