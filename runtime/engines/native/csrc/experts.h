// A mixture of experts: a router picks some of a layer's FFNs for each token, and only their weights are read.
#pragma once

#include "expert_scratch.h"
#include "layer.h"
#include "weights.h"

namespace coreinfer {

struct Decoder;

// The experts of a token, by number: those with the largest logits, of equal ones the first. Experts that `ffn` lacks are
// not chosen, as if their logits were minus infinity. `chosen` has room for router.num_chosen.
void choose_experts(const Router& router, const FfnWeights& ffn, const float* logits, ChosenExpert* chosen);

// Bytes of a layer's router and of the experts that a token reads.
size_t mixture_bytes(const Router& router, const FfnWeights& ffn);

// The mixture of one layer, for some tokens together. All that is summed for a token has a fixed order, so that it does not
// depend on which other tokens are read with it.
class Mixture {
 public:
  // `inputs`: normalized. A token that is read alone may be another copy in each thread.
  Mixture(Decoder& decoder, const Router& router, const FfnWeights& ffn, const Batch& inputs, int thread);

  // By all threads together; `next` is what is read first after it. Ends with a barrier.
  void run(const Matrices& next);
  // Then by any thread: what the mixture puts out for a token (hidden).
  void sum(int token, float* out) const;

 private:
  void route();
  void group();
  void gather();
  void compute_neurons();
  void compute_part(int first, int last);
  void compute_units(const ExpertGroup& group, int begin, int end);
  void compute_outputs(const Matrices& next);

  int units() const;
  Batch batch_of(const ExpertGroup& group, const Activations& all) const;
  const ExpertGroup& group_of(int item, int per_group, int& rest) const;
  const FfnWeights& expert(const ExpertGroup& group) const { return ffn_.experts[group.expert]; }

  Decoder& decoder_;
  const Kernels& kernels_;
  ExpertScratch& shared_;
  ExpertScratch::PerThread& own_;
  const Router& router_;
  const FfnWeights& ffn_;
  const Batch inputs_;
  const int thread_, hidden_;
  const bool alone_;
  const Activations neurons_;
  const ChosenExpert* chosen_;
};

}  // namespace coreinfer
