#include "column_cache.h"

#include <algorithm>

namespace coreinfer {

ColumnCache::ColumnCache(const ModelWeights& weights, const ColumnLayout& layout, Threads& threads)
    : layout_(layout),
      threads_(threads),
      attention_(std::make_shared<const LayerColumns>(attention_columns(weights, layout, threads))) {}

std::shared_ptr<const LayerColumns> ColumnCache::of(const std::shared_ptr<const Ffn>& ffn) {
  const auto found = std::find_if(ffns_.begin(), ffns_.end(), [&](const auto& known) { return known.first == ffn; });
  if (found != ffns_.end()) {
    std::rotate(found, found + 1, ffns_.end());
    return ffns_.back().second;
  }
  // Before others are laid out, so that memory has one less meanwhile.
  if (ffns_.size() == kMost) ffns_.erase(ffns_.begin());
  ffns_.emplace_back(ffn, std::make_shared<const LayerColumns>(ffn_columns(*ffn, layout_, threads_)));
  return ffns_.back().second;
}

size_t ColumnCache::num_bytes() const {
  size_t total = coreinfer::num_bytes(*attention_);
  for (const auto& [ffn, columns] : ffns_) total += coreinfer::num_bytes(*columns);
  return total;
}

}  // namespace coreinfer
