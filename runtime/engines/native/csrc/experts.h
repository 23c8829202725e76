// A mixture of experts: a router picks some of a layer's FFNs for each token, and only their weights are read.
#pragma once

#include <algorithm>

#include "decoder.h"
#include "expert_scratch.h"
#include "layer.h"
#include "weights.h"

namespace coreinfer {

class ExpertStore;

// The experts of a token, by number: those with the largest logits, of equal ones the first. Experts that `ffn` lacks are
// not chosen, as if their logits were minus infinity. `chosen` has room for router.num_chosen.
void choose_experts(const Router& router, const FfnWeights& ffn, const float* logits, ChosenExpert* chosen);

// Bytes of a layer's router and of the experts that a token reads; of these the groups that are read by rows.
size_t mixture_bytes(const Router& router, const FfnWeights& ffn, const GroupFlags& by_rows);

// Show the neurons of each expert that any token chose in the mixture that all threads ran last.
void watch_experts(const Decoder& decoder, int layer, int thread, const Watcher& watcher);

// The mixture of one layer, for some tokens together. All that is summed for a token has a fixed order, so that it does not
// depend on which other tokens are read with it.
class Mixture {
 public:
  // `inputs`: normalized. A token that is read alone may be another copy in each thread. `columns`: of the layers' experts, for
  // such a token, where some lie input by input; else null.
  Mixture(Decoder& decoder, int layer, const FfnWeights& ffn, const Batch& inputs, int thread,
          const LayerColumns* columns);

  // By all threads together; `next` is what is read first after it. Ends with a barrier.
  void run(const Matrices& next);
  // Then by any thread: what the mixture puts out for a token (hidden).
  void sum(int token, float* out) const;

 private:
  void route();
  void group();
  void gather();
  void compute_waves();
  bool take_wave();
  void compute_neurons();
  void neurons_by_rows();
  void neurons_by_columns();
  void compute_part(int first, int last);
  void compute_units(const ExpertGroup& group, int begin, int end);
  void compute_outputs();
  void outputs_by_rows();
  void outputs_by_columns();

  // Null where matrices are read by rows; of all experts alike.
  const Columns* columns_of(const ExpertGroup& group, InputGroup inputs) const;
  bool by_columns(InputGroup inputs) const { return columns_of(own_.groups[0], inputs) != nullptr; }
  // All segments' sums of the token's experts, which all threads may use then.
  void add_columns(InputGroup inputs, const Activations& x);
  void sum_part(const ExpertGroup& group, const Columns& columns, size_t part, Range outputs, float* out) const;
  // What an expert's tokens want; their weights are those that the router gives.
  Filter filter(const ExpertGroup& group, InputGroup inputs) const;

  int units() const;
  int out_blocks() const { return expert(own_.groups[0]).down.weight.num_blocks(); }
  int num_groups() const { return static_cast<int>(wave_.size()); }
  // work(group, begin, end) for the parts [first, last) of the groups that are computed together, of which each has so many.
  template <class Work>
  void by_group(int first, int last, int per_group, Work work) const {
    for (int item = first; item < last;) {
      int begin;
      const ExpertGroup& group = group_of(item, per_group, begin);
      const int end = std::min(per_group, begin + last - item);
      work(group, begin, end);
      item += end - begin;
    }
  }
  Batch batch_of(const ExpertGroup& group, const Activations& all) const;
  const ExpertGroup& group_of(int item, int per_group, int& rest) const;
  static const FfnWeights& expert(const ExpertGroup& group) { return *group.weights; }

  Decoder& decoder_;
  const Kernels& kernels_;
  ExpertScratch& shared_;
  ExpertScratch::PerThread& own_;
  ExpertStore* const store_;              // null where all experts are in memory
  const std::vector<ExpertGroup>& wave_;  // computed together: all, or those that were lent
  const Router& router_;
  const FfnWeights& ffn_;
  const Batch inputs_;
  const LayerColumns* columns_;
  const int layer_, thread_, hidden_;
  const bool alone_, gathers_;  // gathers: each expert has inputs of its own
  const Activations gathered_, neurons_;
  const ChosenExpert* chosen_;
};

}  // namespace coreinfer
