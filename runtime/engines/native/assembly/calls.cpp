#include "calls.h"

#include <algorithm>
#include <string>

#include "refusals.h"

namespace coreinfer {
namespace {

int num_neurons_of(const FfnWeights& layer) {
  int count = layer.num_neurons();
  for (const FfnWeights& expert : layer.experts) count += expert.num_neurons();
  return count;
}

void check_ascending(const NeuronIds& neurons, int num_neurons) {
  if (neurons.count < 1) refuse("neuron ids", "at least one a layer", "none");
  for (int i = 0; i < neurons.count; ++i) {
    const int32_t id = neurons.ids[i];
    if (id < 0 || id >= num_neurons) refuse("neuron id", "0 to " + std::to_string(num_neurons - 1), std::to_string(id));
    if (i > 0 && id <= neurons.ids[i - 1])
      refuse("neuron ids", "ascending ones", std::to_string(id) + " after " + std::to_string(neurons.ids[i - 1]));
  }
}

// Kernels run all experts of a layer by the width of one.
void check_alike(const std::vector<FfnWeights>& experts, const NeuronIds& neurons) {
  int start = 0, width = 0;
  const int32_t *begin = neurons.ids, *last = neurons.ids + neurons.count;
  for (const FfnWeights& expert : experts) {
    start += expert.num_neurons();
    const int32_t* end = std::lower_bound(begin, last, start);
    const int count = static_cast<int>(end - begin);
    if (count > 0 && width > 0 && count != width)
      refuse("neuron ids of an expert", std::to_string(width) + ", as of the one before", std::to_string(count));
    if (count > 0) width = count;
    begin = end;
  }
}

}  // namespace

std::unique_lock<std::mutex> Turn::take() {
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock())
    throw Busy(num_forks_ == num_forks()
                   ? "the native decoder is in use by another thread"
                   : "this process was forked while another thread decoded; load the bundle again in this process");
  num_forks_ = num_forks();
  return lock;
}

void check_sequence(const Decoder& decoder, int number) {
  if (!decoder.has(number)) refuse("sequence", "one that was added", std::to_string(number));
}

void check_ids(const Decoder& decoder, const int32_t* ids, size_t num_ids) {
  const int vocab = decoder.weights.vocab;
  if (!decoder.ffn) refuse("FFN", "one in use", "none");
  if (num_ids == 0) refuse("token ids", "at least one", "none");
  for (size_t i = 0; i < num_ids; ++i)
    if (ids[i] < 0 || ids[i] >= vocab) refuse("token id", "0 to " + std::to_string(vocab - 1), std::to_string(ids[i]));
}

void check_room(const Decoder& decoder, int sequence, size_t num_tokens) {
  const int room = decoder.weights.max_positions - decoder.sequences[sequence]->num_cached;
  if (num_tokens > static_cast<size_t>(room))
    refuse("token ids", "at most " + std::to_string(room) + " more in the KV cache", std::to_string(num_tokens));
}

void check_ffn(const Decoder& decoder, const Ffn& ffn, int max_neurons) {
  const size_t num_layers = decoder.weights.layers.size();
  if (ffn.size() != num_layers) refuse("FFN layers", std::to_string(num_layers), std::to_string(ffn.size()));
  if (most_neurons(ffn) > max_neurons)
    refuse("FFN neurons", "at most " + std::to_string(max_neurons), std::to_string(most_neurons(ffn)));
  const auto check = [&](const FfnWeights& weights) {
    if (weights.up.weight.cols != decoder.weights.hidden)
      refuse("FFN inputs", std::to_string(decoder.weights.hidden), std::to_string(weights.up.weight.cols));
  };
  for (size_t i = 0; i < num_layers; ++i) {
    const int num_experts = decoder.weights.layers[i].router.weight.rows;
    if (ffn[i].experts.size() != static_cast<size_t>(num_experts))
      refuse("experts of a layer", std::to_string(num_experts), std::to_string(ffn[i].experts.size()));
    if (num_experts == 0) check(ffn[i]);
    int num_kept = 0;
    for (const FfnWeights& expert : ffn[i].experts) {
      if (expert.up.weight.empty()) continue;
      check(expert);
      ++num_kept;
    }
    const int num_chosen = decoder.weights.layers[i].router.num_chosen;
    if (num_kept < num_chosen)
      refuse("experts of a layer", "at least " + std::to_string(num_chosen), std::to_string(num_kept));
  }
}

void check_neurons(const Ffn& ffn, const std::vector<NeuronIds>& neurons) {
  if (neurons.size() != ffn.size())
    refuse("neuron ids", std::to_string(ffn.size()) + " layers", std::to_string(neurons.size()));
  for (size_t layer = 0; layer < ffn.size(); ++layer) {
    check_ascending(neurons[layer], num_neurons_of(ffn[layer]));
    check_alike(ffn[layer].experts, neurons[layer]);
  }
}

int most_neurons(const Ffn& ffn) {
  int most = 0;
  for (const FfnWeights& layer : ffn) {
    most = std::max(most, layer.num_neurons());
    for (const FfnWeights& expert : layer.experts) most = std::max(most, expert.num_neurons());
  }
  return most;
}

}  // namespace coreinfer
