#include "neurons.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {
namespace {

constexpr int kFours = kGroup / 4;
constexpr size_t kFirstBytes = 192;  // of each row of the down projection
constexpr int kFirstRows = 2;        // of the up projection

void prefetch_row(const Matrix& w, int index, size_t num_bytes) {
  for (size_t offset = 0; offset < num_bytes; offset += 64) __builtin_prefetch(w.row(index) + offset);
}

}  // namespace

void NeuronInputBuffer::resize(int num_parts) {
  codes_.resize(size_t(num_parts) * kPartGroups * kGroup);
  scales_.resize(size_t(num_parts) * kPartGroups);
  sums_.resize(size_t(num_parts) * kPartGroups);
}

void interleave(const Activations& x, const Matrix& w, NeuronInputBuffer& out) {
  const int num_groups = w.num_groups();
  for (int group = 0; group < num_groups; ++group) {
    int8_t* part = out.codes() + group / kPartGroups * kPartGroups * kGroup;
    for (int four = 0; four < kFours; ++four)
      std::memcpy(part + (four * kPartGroups + group % kPartGroups) * 4, x.codes + group * kGroup + four * 4, 4);
  }
  std::copy_n(x.scales, num_groups, out.scales());
  std::copy_n(x.sums, num_groups, out.sums());
}

void find_active(const FfnWeights& ffn, int chunk, const float* gates, const float* bias, float cutoff,
                 ActiveNeurons& active) {
  const Range neurons = chunk_neurons(chunk, ffn.num_neurons());
  int count = 0;
  for (int id = neurons.begin; id < neurons.end; ++id) {
    const float gate = rest_of_gate(gates[id - neurons.begin], bias, id, cutoff);
    active.ids[count] = id;
    active.values[count] = gate;
    count += !(gate <= 0.0f);
  }
  active.count = count;
  active.num_found += count;
  active.num_asked += neurons.end - neurons.begin;
  for (int i = 0; i < count; ++i) {
    if (i < kFirstRows && !ffn.gate.weight.empty())
      prefetch_row(ffn.up.weight, active.ids[i], ffn.up.weight.row_bytes());
    prefetch_row(ffn.down.weight, active.ids[i], kFirstBytes);
  }
}

void run_active(const NeuronFunction& function, const Kernels& kernels, const FfnWeights& ffn, const NeuronInputs& x,
                ActiveNeurons& active, float* sums) {
  if (!ffn.gate.weight.empty()) {
    float ups[kChunkNeurons];
    kernels.dot_neurons({ffn.up.weight, active.ids, active.count}, x, ups);
    if (ffn.up.bias)
      for (int i = 0; i < active.count; ++i) ups[i] += ffn.up.bias[active.ids[i]];
    // Whole vectors; of what lies beyond the last neuron nothing is used.
    const int size = round_up(active.count, kUnit);
    std::fill(active.values + active.count, active.values + size, 0.0f);
    std::fill(ups + active.count, ups + size, 0.0f);
    kernels.activate(function, active.values, ups, size, 1, active.values, 0);
  }
  kernels.add_neurons({ffn.down.weight, active.ids, active.count}, active.values, sums);
}

void put_in_order(const float* sums, int begin, int end, int num_outputs, float* out) {
  for (int row = begin; row < end; ++row) {
    // Of its part: which eight, which half of it, and which group of each four.
    const int part = row / kGroup, eight = row % kGroup / 8, half = row % 8 / 4, place = row % 4;
    for (int i = 0; i < kPartGroups; ++i) {
      const int group = part * kPartGroups + i / 4 * 4 + place;
      const int output = group * kGroup + eight * 8 + half * 4 + i % 4;
      if (output < num_outputs) out[output] = *sums;
      ++sums;
    }
  }
}

}  // namespace coreinfer
