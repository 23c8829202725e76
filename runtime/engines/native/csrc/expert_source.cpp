// Where the experts of a mixture lie in its file.
#include "expert_store.h"

namespace coreinfer {
namespace {

// Call visit(layer, expert, weights) for each expert that is there, in their order.
template <class Visit>
void each_expert(const Ffn& ffn, Visit visit) {
  for (size_t layer = 0; layer < ffn.size(); ++layer)
    for (size_t expert = 0; expert < ffn[layer].experts.size(); ++expert)
      if (!ffn[layer].experts[expert].up.weight.empty()) visit(layer, expert, ffn[layer].experts[expert]);
}

Ffn one_by_one(const Ffn& ffn) {
  Ffn pieces;
  each_expert(ffn, [&](size_t, size_t, const FfnWeights& weights) { pieces.push_back(weights); });
  return pieces;
}

}  // namespace

ExpertSource::ExpertSource(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn)
    : pieces_(path, mapping, mapping_bytes, one_by_one(ffn)) {
  for (const FfnWeights& layer : ffn) pieces_by_layer_.emplace_back(layer.experts.size(), -1);
  Ffn placed = ffn;
  int piece = 0;
  each_expert(ffn, [&](size_t layer, size_t expert, const FfnWeights&) {
    placed[layer].experts[expert] = pieces_.placed(piece);
    pieces_by_layer_[layer][expert] = piece++;
  });
  ffn_ = std::make_shared<const Ffn>(std::move(placed));
}

}  // namespace coreinfer
