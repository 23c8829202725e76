// A model at work: weights, sequences, and the passes that read tokens.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "columns.h"
#include "expert_scratch.h"
#include "file_source.h"
#include "kv_cache.h"
#include "scratch.h"
#include "stream_scratch.h"
#include "threads.h"
#include "weights.h"

namespace coreinfer {

// What a layer's FFN, or one of its experts, did with the tokens that came to it.
struct Watched {
  int layer, expert;         // 0 where the FFN is one
  const float* activations;  // (tokens, neurons), input of the down projection; row stride in floats
  int num_tokens, stride;
  const float* weights;  // of an expert what the router multiplies its outputs by, token by token; else null
};
// Called for each layer, and for each expert of it that any token chose, outside of all phases.
using Watcher = std::function<void(const Watched& seen)>;

// Too few pages are free for what was asked; nothing was done.
struct PoolFull : std::runtime_error {
  PoolFull(int num_needed, int num_free);
};

struct Residency;

// A token to be read at a position of a sequence, whose pages have room for it.
struct Row {
  int32_t id;
  int position;
  const int32_t* pages;
};

// Weights, the FFN in use, the sequences and the threads.
struct Decoder {
  // `max_neurons`: of a layer's FFN, or of each of its experts.
  Decoder(ModelWeights weights, const Kernels& kernels, int num_threads, int max_neurons, int num_pages);

  // Sequences are named by number, 0 is always there. A dropped one's number is given out again.
  int add_sequence() { return add(Sequence()); }
  // A sequence that begins with the first tokens of another, which must have so many. Throws PoolFull.
  int fork_sequence(int source, int num_tokens);
  void drop_sequence(int number);
  void truncate_sequence(int number, int num_tokens) { truncate(pool, *sequences[number], num_tokens); }
  bool has(int number) const { return number >= 0 && number < int(sequences.size()) && sequences[number]; }

  // Append tokens to a sequence; ids and room must have been checked. `logits` is (num_tokens or 1, padded vocabulary).
  // With `screened`, logits of tokens that cannot be the likeliest are approximate where the head allows it. Throws
  // PoolFull, before anything is computed.
  void forward(int sequence, const int32_t* ids, int num_tokens, bool all_logits, bool screened, float* logits,
               const Watcher& watcher);
  // Append tokens to several sequences, those of one sequence in their order, with one read of the weights for
  // kBlockTokens of them. Each row's logits (padded vocabulary) are to the bit what `forward` gives for that token
  // alone, whatever else is read with it; `screened` as there. Throws PoolFull, before anything is computed.
  void forward_rows(const int32_t* numbers, const int32_t* ids, int num_rows, bool screened, float* logits);
  // `forward` for two or more tokens of one sequence and `forward_rows` for others, with one read of the weights where
  // kBlockTokens hold them all. `logits`: with `last_logits` first those of the block's last token, then each row's.
  void forward_beside(int sequence, const int32_t* block_ids, int num_tokens, bool last_logits, const int32_t* numbers,
                      const int32_t* ids, int num_rows, bool screened, float* logits);
  void use_shares(std::shared_ptr<const TokenShares> shares);
  // Bytes of weights and cache that one more token reads. Of weights that lie neuron by neuron or input by input, what the
  // last single token read; all before the first one. Tokens that share a pass, not `alone`, read all inputs' weights.
  size_t bytes_per_token(int num_tokens, bool screened, bool alone = true) const;

  const ModelWeights weights;
  const Kernels& kernels;
  std::shared_ptr<const Ffn> ffn;
  std::shared_ptr<const TokenShares> shares;  // null where tokens read all of their inputs
  Filter filter(int layer, InputGroup group, const float* norms) const {
    return shares ? Filter{norms, shares->thresholds[layer][group]} : Filter();
  }
  // Inputs of tokens, which may read the high bits of their weights alone.
  Activations inputs_in(const ActivationBuffer& buffer) const {
    return shares && shares->halves ? buffer.halved() : buffer.view;
  }
  // Where memory for weights is limited: what is in it, and where the FFN in use is read from.
  std::shared_ptr<Residency> residency;
  FileSource source;
  PagePool pool;
  std::vector<std::unique_ptr<Sequence>> sequences;  // empty where one was dropped
  Threads threads;
  TokenScratch token;
  BlockScratch block;
  ExpertScratch experts;
  StreamScratch streams;
  HeadScratch screen;

 private:
  size_t num_segment_sums_ = 0;  // that there is room for
  int add(Sequence sequence);
  // Give sequences the pages for so many more tokens, or throw PoolFull and change nothing.
  void extend_all(const std::map<int, int>& counts);
  Row next_row(int sequence, int32_t id);
};

// How many bytes a page of a model's cache has.
PageLayout layout_for(const ModelWeights& weights);

struct Batch;
// Logits (tokens, padded vocabulary) of final hidden states by the head, all threads together. What is screened has been
// measured, and is multiplied in codes.
void compute_head(Decoder& decoder, const Batch& batch, int thread, bool screened, float* logits);
void decode_token(Decoder& decoder, const Row& row, bool screened, float* logits);
// How a block is read.
struct BlockOptions {
  int num_exact = 0;        // rows at the end that are to the bit as decode_token computes them; others the fastest way
  bool related = true;      // whether a sequence may have several rows
  bool all_logits = false;  // of the rows before these
  bool last_logits = false;  // of the last row before these
  bool screened = false;     // logits of tokens that cannot be the likeliest may be approximate; not with all_logits
};
// `logits`: of the rows that have any, one after another; exact ones always do.
void read_block(Decoder& decoder, const std::vector<Row>& rows, const BlockOptions& options, float* logits,
                const Watcher& watcher);

}  // namespace coreinfer
