// Memory of mixtures of experts, allocated once.
#pragma once

#include <vector>

#include "column_pass.h"
#include "scratch.h"
#include "weights.h"

namespace coreinfer {

// An expert of a token, and what its output is multiplied by.
struct ChosenExpert {
  int expert;
  float weight;
};

// Tokens of one expert, whose inputs lie one after another.
struct ExpertGroup {
  int expert, first_slot, num_tokens, num_exact;
  const FfnWeights* weights;  // where memory is limited, not to be read before the expert is lent
};

// An expert where it was read to.
struct LentExpert {
  int expert;
  FfnWeights weights;
};

// A slot is a token with one of its experts: slots of an expert lie together, in the order of the tokens.
struct ExpertScratch {
  struct PerThread {
    Buffer<float> gate, up;               // (kBlockTokens, kUnit)
    std::vector<ChosenExpert> chosen;     // of a token that is read alone
    std::vector<ExpertGroup> groups;      // of all tokens, by their experts' numbers
    std::vector<ExpertGroup> wave;        // those that are computed together, where not all are in memory
    std::vector<int> slots;               // (tokens, chosen experts)
    std::vector<int> tokens;              // of each slot
    std::vector<float> weights;           // of each slot
    std::vector<ColumnProduct> products;  // of the experts of a token that is read alone
    std::vector<int> bounds;              // (experts + 1): where slots begin, then the number of each expert's group
  };
  std::vector<PerThread> threads;
  std::vector<ChosenExpert> chosen;  // (kBlockTokens, chosen experts)
  std::vector<LentExpert> lent;      // of the wave
  Buffer<float> logits;              // (kBlockTokens, experts rounded up to 16)
  Buffer<float> gate, up;            // (chosen experts, neurons): of a token that is read alone
  Buffer<float> outputs;             // (slots, hidden)
  // (slots, hidden) and (slots, neurons of an expert); of a token alone inputs are here only where experts want their own
  ActivationBuffer inputs, neurons;
};

// Nothing is allocated where no layer has a router.
void allocate(ExpertScratch& scratch, const ModelWeights& weights, int expert_neurons, int num_threads, bool bf16);

}  // namespace coreinfer
