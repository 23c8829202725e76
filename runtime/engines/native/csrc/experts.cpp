#include "experts.h"

#include <algorithm>
#include <cstring>

#include "elementary.h"
#include "residency.h"

namespace coreinfer {
namespace {

// A function of its own: both passes must add in the same way, to the bit. `bias` may be null.
void add_weighted(float* sum, const float* values, const float* bias, float weight, int size) {
  if (!bias) {
    for (int i = 0; i < size; ++i) sum[i] += weight * values[i];
    return;
  }
  for (int i = 0; i < size; ++i) sum[i] += weight * (values[i] + bias[i]);
}

}  // namespace

void allocate(ExpertScratch& scratch, const ModelWeights& weights, int expert_neurons, int num_threads, bool bf16) {
  int num_chosen = 0, num_experts = 0;
  for (const Layer& layer : weights.layers) {
    num_chosen = std::max(num_chosen, layer.router.num_chosen);
    num_experts = std::max(num_experts, layer.router.weight.rows);
  }
  if (num_chosen == 0) return;
  const int hidden = round_up(weights.hidden, kGroup), neurons = round_up(expert_neurons, kUnit);
  const size_t num_slots = size_t(kBlockTokens) * num_chosen;
  scratch.threads.resize(num_threads);
  for (auto& own : scratch.threads) {
    own.gate.resize(size_t(kBlockTokens) * kUnit);
    own.up.resize(size_t(kBlockTokens) * kUnit);
    own.chosen.resize(num_chosen);
    for (std::vector<ExpertGroup>* groups : {&own.groups, &own.wave}) groups->reserve(num_experts);
    own.slots.resize(num_slots);
    own.tokens.resize(num_slots);
    own.bounds.resize(num_experts + 1);
    own.weights.resize(num_slots);
    own.products.reserve(num_chosen);
  }
  scratch.chosen.resize(num_slots);
  scratch.logits.resize(size_t(kBlockTokens) * round_up(num_experts, kBlockRows));
  scratch.gate.resize(size_t(num_chosen) * neurons);
  scratch.up.resize(size_t(num_chosen) * neurons);
  scratch.outputs.resize(num_slots * hidden);
  // Kernels that read 32 tokens at once read beyond an expert's last one.
  const int num_rows = static_cast<int>(num_slots) + 32;
  scratch.inputs.resize(num_rows, hidden, bf16);
  scratch.neurons.resize(num_rows, neurons, bf16);
}

void choose_experts(const Router& router, const FfnWeights& ffn, const float* logits, ChosenExpert* chosen) {
  const int num_experts = router.weight.rows, num_chosen = router.num_chosen;
  std::vector<bool> taken(num_experts);
  const auto logit = [&](int e) { return router.bias ? logits[e] + router.bias[e] : logits[e]; };
  float most = 0.0f, sum = 0.0f;
  for (int number = 0; number < num_chosen; ++number) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e)
      if (!taken[e] && !ffn.experts[e].up.weight.empty() && (best < 0 || logit(e) > logit(best))) best = e;
    taken[best] = true;
    if (number == 0) most = logit(best);
  }
  int number = 0;
  for (int e = 0; e < num_experts; ++e) {
    if (ffn.experts[e].up.weight.empty() || (router.normalizes && !taken[e])) continue;
    const float share = static_cast<float>(exponential(logit(e) - most));
    sum += share;
    if (taken[e]) chosen[number++] = {e, share};
  }
  for (int i = 0; i < num_chosen; ++i) chosen[i].weight /= sum;
}

size_t mixture_bytes(const Router& router, const FfnWeights& ffn, const GroupFlags& by_rows) {
  const auto present = [](const FfnWeights& expert) { return !expert.up.weight.empty(); };
  const FfnWeights& one = *std::find_if(ffn.experts.begin(), ffn.experts.end(), present);
  size_t expert_bytes = 0;
  if (by_rows[kGateUp]) expert_bytes += one.gate.weight.num_bytes() + one.up.weight.num_bytes();
  if (by_rows[kDown]) expert_bytes += one.down.weight.num_bytes();
  return router.weight.num_bytes() + router.num_chosen * expert_bytes;
}

void watch_experts(const Decoder& decoder, int layer, int thread, const Watcher& watcher) {
  const ExpertScratch::PerThread& own = decoder.experts.threads[thread];
  const Activations& neurons = decoder.experts.neurons.view;
  for (const ExpertGroup& group : own.groups)
    watcher({layer, group.expert, neurons.token(group.first_slot).values, group.num_tokens, neurons.stride,
             own.weights.data() + group.first_slot});
}

Mixture::Mixture(Decoder& decoder, int layer, const FfnWeights& ffn, const Batch& inputs, int thread,
                 const LayerColumns* columns)
    : decoder_(decoder),
      kernels_(decoder.kernels),
      shared_(decoder.experts),
      own_(decoder.experts.threads[thread]),
      store_(decoder.residency ? decoder.residency->experts.get() : nullptr),
      wave_(store_ ? own_.wave : own_.groups),
      router_(decoder.weights.layers[layer].router),
      ffn_(ffn),
      inputs_(inputs),
      columns_(columns),
      layer_(layer),
      thread_(thread),
      hidden_(round_up(decoder.weights.hidden, kGroup)),
      alone_(inputs.num_tokens == 1),
      gathers_(!alone_ || decoder.shares),
      // Rounded as the inputs are.
      gathered_(inputs.x.bf16 ? shared_.inputs.view : Batch::in_codes(shared_.inputs.view)),
      neurons_(inputs.x.bf16 ? shared_.neurons.view : Batch::in_codes(shared_.neurons.view)),
      chosen_(alone_ ? own_.chosen.data() : shared_.chosen.data()) {}

void Mixture::run(const Matrices& next) {
  route();
  group();
  if (store_ && thread_ == 0) store_->want(layer_, own_.groups);
  if (gathers_) gather();
  if (store_) {
    compute_waves();
  } else {
    compute_neurons();
    compute_outputs();
  }
  prefetch_share(next, thread_, decoder_.threads.size());
  decoder_.threads.barrier(thread_);
}

void Mixture::sum(int token, float* out) const {
  std::fill(out, out + decoder_.weights.hidden, 0.0f);
  for (int i = 0; i < router_.num_chosen; ++i) {
    const int place = token * router_.num_chosen + i;
    add_weighted(out, shared_.outputs.get() + size_t(own_.slots[place]) * hidden_,
                 ffn_.experts[chosen_[place].expert].down.bias, chosen_[place].weight, decoder_.weights.hidden);
  }
}

// Always from the inputs as floats, whatever else they are rounded to.
void Mixture::route() {
  const int stride = round_up(router_.weight.rows, kBlockRows), num_tokens = inputs_.num_tokens;
  const Batch exact{Batch::in_codes(inputs_.x), num_tokens, 0};
  float* logits = shared_.logits.get();
  multiply_share(kernels_, {{&router_.weight, logits}}, exact, stride, thread_, decoder_.threads);
  decoder_.threads.barrier(thread_);
  if (alone_) return choose_experts(router_, ffn_, logits, own_.chosen.data());
  for (int t = thread_; t < num_tokens; t += decoder_.threads.size())
    choose_experts(router_, ffn_, logits + size_t(t) * stride, shared_.chosen.data() + size_t(t) * router_.num_chosen);
  decoder_.threads.barrier(thread_);
}

// Each thread for itself, which costs less than a barrier.
void Mixture::group() {
  const int num_slots = inputs_.num_tokens * router_.num_chosen, num_experts = router_.weight.rows;
  std::vector<int>& bounds = own_.bounds;
  std::fill(bounds.begin(), bounds.end(), 0);
  for (int i = 0; i < num_slots; ++i) ++bounds[chosen_[i].expert + 1];
  own_.groups.clear();
  for (int e = 0; e < num_experts; ++e) {
    if (bounds[e + 1] > 0) own_.groups.push_back({e, bounds[e], bounds[e + 1], 0, &ffn_.experts[e]});
    bounds[e + 1] += bounds[e];
  }
  size_t number = 0;
  for (ExpertGroup& group : own_.groups) bounds[group.expert] = static_cast<int>(number++);
  std::vector<int>& filled = own_.tokens;  // first how many slots of a group are taken
  std::fill(filled.begin(), filled.begin() + static_cast<int64_t>(own_.groups.size()), 0);
  for (int i = 0; i < num_slots; ++i) {
    ExpertGroup& group = own_.groups[bounds[chosen_[i].expert]];
    own_.slots[i] = group.first_slot + filled[bounds[chosen_[i].expert]]++;
    if (i / router_.num_chosen >= inputs_.num_fast()) ++group.num_exact;
  }
  for (int i = 0; i < num_slots; ++i) {
    own_.tokens[own_.slots[i]] = i / router_.num_chosen;
    own_.weights[own_.slots[i]] = chosen_[i].weight;
  }
}

// Experts that are there first, others as they come. Outputs have places of their own and are summed in the experts' order, so
// that it makes no difference to them.
void Mixture::compute_waves() {
  for (size_t num_done = 0; num_done < own_.groups.size(); num_done += wave_.size()) {
    if (thread_ == 0) store_->lend(shared_.lent);
    decoder_.threads.barrier(thread_);
    if (!take_wave()) return;
    compute_neurons();
    compute_outputs();
    decoder_.threads.barrier(thread_);
    if (thread_ == 0) store_->give_back();
  }
}

// False: an expert could not be read, and the pass will be thrown away.
bool Mixture::take_wave() {
  own_.wave.clear();
  for (const LentExpert& lent : shared_.lent) {
    own_.wave.push_back(own_.groups[own_.bounds[lent.expert]]);
    own_.wave.back().weights = &lent.weights;
  }
  return !own_.wave.empty();
}

void Mixture::gather() {
  for (const ExpertGroup& group : own_.groups) {
    const Filter filter = this->filter(group, kGateUp);
    for (int i = 0; i < group.num_tokens; ++i) {
      const int slot = group.first_slot + i, t = own_.tokens[slot];
      if (slot % decoder_.threads.size() != thread_) continue;
      Activations to = gathered_.token(slot);
      if (t >= inputs_.num_fast()) to = Batch::in_codes(to);
      std::memcpy(to.values, inputs_.token(t).values, sizeof(float) * hidden_);
      keep_wanted(kernels_, filter.of(i), to, 0, decoder_.weights.hidden);
      kernels_.quantize(to, hidden_, 1);
    }
  }
  decoder_.threads.barrier(thread_);
}

Filter Mixture::filter(const ExpertGroup& group, InputGroup inputs) const {
  const FfnWeights& own = expert(group);
  Filter filter = decoder_.filter(layer_, inputs, inputs == kDown ? own.down_norms : own.gate_up_norms);
  filter.weights = own_.weights.data() + group.first_slot;
  return filter;
}

const Columns* Mixture::columns_of(const ExpertGroup& group, InputGroup inputs) const {
  if (!columns_) return nullptr;
  const Columns& columns = (*columns_)[layer_][group.expert][inputs % 2];
  return columns.empty() ? nullptr : &columns;
}

void Mixture::add_columns(InputGroup inputs, const Activations& x) {
  own_.products.clear();
  for (const ExpertGroup& group : wave_) {
    const ColumnMatrix& w = columns_of(group, inputs)->matrix;
    float* sums = decoder_.token.segment_sums.get() + group.first_slot * num_segment_sums(w);
    own_.products.push_back({&w, x.token(group.first_slot), sums});
  }
  const int count = static_cast<int>(own_.products.size());
  decoder_.token.threads[thread_].column_bytes +=
      coreinfer::add_columns(kernels_, own_.products.data(), count, thread_, decoder_.threads);
  decoder_.threads.barrier(thread_);
}

void Mixture::sum_part(const ExpertGroup& group, const Columns& columns, size_t part, Range outputs, float* out) const {
  const float* sums = decoder_.token.segment_sums.get() + group.first_slot * num_segment_sums(columns.matrix);
  const int first = columns.parts[part].first;
  sum_segments(kernels_, columns.matrix, sums, first + outputs.begin, first + outputs.end, out);
}

int Mixture::units() const {
  const Matrix& up = expert(own_.groups[0]).up.weight;
  return (up.rows + kUnit - 1) / kUnit;
}

Batch Mixture::batch_of(const ExpertGroup& group, const Activations& all) const {
  return {all.token(group.first_slot), group.num_tokens, group.num_exact};
}

const ExpertGroup& Mixture::group_of(int item, int per_group, int& rest) const {
  rest = item % per_group;
  return wave_[item / per_group];
}

void Mixture::compute_neurons() {
  if (by_columns(kGateUp))
    neurons_by_columns();
  else
    neurons_by_rows();
  // The first of what is this thread's of the phase after the barrier.
  const Range blocks = share(out_blocks() * num_groups(), thread_, decoder_.threads.size());
  if (blocks.begin < blocks.end && !by_columns(kDown)) {
    int block;
    const ExpertGroup& group = group_of(blocks.begin, out_blocks(), block);
    prefetch_block(expert(group).down.weight, block, kPrefetchBytes);
  }
  decoder_.threads.barrier(thread_);
}

void Mixture::neurons_by_rows() {
  const int per_group = units(), num_items = per_group * num_groups();
  decoder_.threads.deal(
      thread_, num_items, [&](int first, int last) { compute_part(first, last); },
      [&](int first) {
        int unit;
        const ExpertGroup& group = group_of(first, per_group, unit);
        prefetch_block(expert(group).gate.weight, unit * 2, kPartPrefetchBytes);
      });
}

void Mixture::neurons_by_columns() {
  add_columns(kGateUp, gathered_);
  decoder_.threads.deal(thread_, units() * num_groups(), [&](int first, int last) {
    by_group(first, last, units(), [&](const ExpertGroup& group, int begin, int end) {
      const FfnWeights& weights = expert(group);
      const Columns& columns = *columns_of(group, kGateUp);
      const Range outputs = {begin * kUnit, std::min(end * kUnit, round_up(weights.num_neurons(), kBlockRows))};
      const size_t place = size_t(group.first_slot) * neurons_.stride + outputs.begin;
      float *gate = shared_.gate.get() + place, *up = shared_.up.get() + place;
      sum_part(group, columns, columns.parts.size() - 1, outputs, up);
      if (!weights.gate.weight.empty()) sum_part(group, columns, 0, outputs, gate);
      finish_neurons(decoder_.weights, kernels_, weights, begin, end, gate, up, batch_of(group, neurons_),
                     filter(group, kDown));
    });
  });
}

// As many units of an expert at once as there is room for, but not so many that their numbers leave the cache; of a token
// that is read alone all.
void Mixture::compute_part(int first, int last) {
  const int per_group = units();
  for (int item = first; item < last;) {
    int unit;
    const ExpertGroup& group = group_of(item, per_group, unit);
    const int most = alone_ ? per_group : std::clamp(kBlockTokens / 2 / group.num_tokens, 1, 8);
    const int end = std::min({per_group, unit + last - item, unit + most});
    compute_units(group, unit, end);
    item += end - unit;
  }
}

void Mixture::compute_units(const ExpertGroup& group, int begin, int end) {
  const FfnWeights& weights = expert(group);
  const int first_block = begin * 2, last_block = std::min(end * 2, weights.up.weight.num_blocks());
  const size_t row = size_t(first_block) * kBlockRows;
  const size_t place = size_t(group.first_slot) * neurons_.stride;
  float* gate = alone_ ? shared_.gate.get() + place + row : own_.gate.get();
  float* up = alone_ ? shared_.up.get() + place + row : own_.up.get();
  const Batch inputs = gathers_ ? batch_of(group, gathered_) : inputs_;
  // Kernels write at the rows' own numbers.
  const size_t stride = size_t(end - begin) * kUnit;
  multiply(kernels_, weights.gate.weight, inputs, gate - row, stride, first_block, last_block);
  multiply(kernels_, weights.up.weight, inputs, up - row, stride, first_block, last_block);
  const Batch neurons = batch_of(group, neurons_);
  finish_neurons(decoder_.weights, kernels_, weights, begin, end, gate, up, neurons, filter(group, kDown));
}

void Mixture::compute_outputs() {
  if (by_columns(kDown))
    outputs_by_columns();
  else
    outputs_by_rows();
}

void Mixture::outputs_by_rows() {
  const auto work = [&](int first, int last) {
    by_group(first, last, out_blocks(), [&](const ExpertGroup& group, int begin, int end) {
      multiply(kernels_, expert(group).down.weight, batch_of(group, neurons_),
               shared_.outputs.get() + size_t(group.first_slot) * hidden_, hidden_, begin, end);
    });
  };
  decoder_.threads.deal(thread_, out_blocks() * num_groups(), work, [&](int first) {
    int block;
    const ExpertGroup& group = group_of(first, out_blocks(), block);
    prefetch_block(expert(group).down.weight, block, kPartPrefetchBytes);
  });
}

void Mixture::outputs_by_columns() {
  add_columns(kDown, neurons_);
  decoder_.threads.deal(thread_, out_blocks() * num_groups(), [&](int first, int last) {
    by_group(first, last, out_blocks(), [&](const ExpertGroup& group, int begin, int end) {
      const Range outputs = {begin * kBlockRows, end * kBlockRows};
      float* out = shared_.outputs.get() + size_t(group.first_slot) * hidden_ + outputs.begin;
      sum_part(group, *columns_of(group, kDown), 0, outputs, out);
    });
  });
}

}  // namespace coreinfer
