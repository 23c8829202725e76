// Which weights lie input by input in memory: attention's, and those of the FFNs that were used last.
#pragma once

#include <utility>

#include "columns.h"

namespace coreinfer {

class ColumnCache {
 public:
  // Lays out attention's weights.
  ColumnCache(const ModelWeights& weights, const ColumnLayout& layout, Threads& threads);

  std::shared_ptr<const LayerColumns> attention() const { return attention_; }
  // Lays the FFN's weights out if they are not; then the FFN that was used longest ago may go.
  std::shared_ptr<const LayerColumns> of(const std::shared_ptr<const Ffn>& ffn);
  bool in_planes() const { return layout_.in_planes; }
  size_t num_bytes() const;

 private:
  static constexpr size_t kMost = 2;  // FFNs

  const ColumnLayout layout_;
  Threads& threads_;
  std::shared_ptr<const LayerColumns> attention_;
  std::vector<std::pair<std::shared_ptr<const Ffn>, std::shared_ptr<const LayerColumns>>> ffns_;  // the last used last
};

}  // namespace coreinfer
