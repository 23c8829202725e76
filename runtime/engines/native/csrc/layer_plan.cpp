#include "layer_plan.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace coreinfer {
namespace {

// So many of the largest are tried: budgets of layers differ by a few times, and a plan is made while others wait.
constexpr size_t kMostLarge = 8;

// Of some layers as many as fit into `room`, spread evenly: the disk then has work all the time. Their bytes.
size_t spread(const std::vector<size_t>& layer_bytes, const std::vector<size_t>& layers, size_t room,
              std::vector<bool>& kept) {
  const size_t num_layers = layers.size();
  for (size_t count = num_layers; count > 0; --count) {
    const auto stays = [&](size_t index) { return (index + 1) * count / num_layers > index * count / num_layers; };
    size_t total = 0;
    for (size_t index = 0; index < num_layers; ++index) total += stays(index) ? layer_bytes[layers[index]] : 0;
    if (total > room) continue;
    for (size_t index = 0; index < num_layers; ++index) kept[layers[index]] = stays(index);
    return total;
  }
  return 0;
}

}  // namespace

std::vector<bool> kept_layers(const std::vector<size_t>& layer_bytes, size_t room, bool streams) {
  const size_t num_layers = layer_bytes.size();
  if (std::accumulate(layer_bytes.begin(), layer_bytes.end(), size_t(0)) <= room)
    return std::vector<bool>(num_layers, true);
  std::vector<size_t> order(num_layers);
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return layer_bytes[a] > layer_bytes[b]; });
  std::vector<bool> best(num_layers, false);
  size_t most = 0, large_bytes = 0;
  // A large layer that stays does not pass, so that less room is left free for those that do.
  for (size_t num_large = 0; num_large < std::min(num_layers, kMostLarge + 1); ++num_large) {
    const size_t needed = large_bytes + (streams ? kLeastAhead * layer_bytes[order[num_large]] : 0);
    if (needed <= room) {
      std::vector<size_t> others(order.begin() + static_cast<int64_t>(num_large), order.end());
      std::sort(others.begin(), others.end());
      std::vector<bool> kept(num_layers, false);
      for (size_t index = 0; index < num_large; ++index) kept[order[index]] = true;
      const size_t total = large_bytes + spread(layer_bytes, others, room - needed, kept);
      if (total > most) {
        most = total;
        best = std::move(kept);
      }
    }
    large_bytes += layer_bytes[order[num_large]];
  }
  return best;
}

}  // namespace coreinfer
