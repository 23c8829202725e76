// What both passes do with the streams of their tokens, between a layer's attention and FFN; see Streams.
#pragma once

#include "decoder.h"
#include "layer.h"

namespace coreinfer {

constexpr int kMostStreams = 8;

class StreamPass {
 public:
  // The tokens of a pass. `inputs`: scratch between its phases; `states`: what layers read and add to.
  struct Tokens {
    const Row* rows;
    Batch inputs;
    float* states;
    size_t stride;
  };

  // A token that is read alone is every thread's own; of a block each thread has some.
  StreamPass(Decoder& decoder, int thread, const Tokens& tokens, bool alone);

  bool present() const { return streams_.count > 0; }
  // States are embeddings, and become streams; ends after a barrier.
  void enter();
  // Of one token: states become what the streams foretell.
  void predict(int layer, int t);
  // Of one token: remember what the attention reads, which is in `inputs`.
  void keep_normed(int t);
  // In the phase that multiplies the same inputs: a share of the way around the attention.
  void enter_low(int layer);
  // Of one token, after that phase: its inputs of the way back.
  void prepare_low(int layer, int t);
  // In the phase of the attention's output, when all tokens' inputs are ready.
  void leave_low(int layer);
  // Of one token: add both ways to its state, to which the attention's output has been added.
  void join_low(int layer, int t);
  // What is taken off the gates of each token, whose FFN reads `inputs`; null where nothing is.
  const float* cutoffs(int layer);
  // After the FFN: streams are corrected, and what the token's embedding in the layer gives is added to some of them.
  void leave(int layer);
  // States become the mean of the streams.
  void merge();

 private:
  template <class Work>
  void each(Work work) {
    for (int t = alone_ ? 0 : thread_; t < num_tokens_; t += alone_ ? 1 : num_threads_) work(t);
  }
  void barrier() { threads_.barrier(thread_); }
  // Wait until inputs of all tokens are ready, or nobody reads them any more.
  void settle() {
    if (!alone_) barrier();
  }
  void multiply_part(const Matrix& w, const Batch& batch, float* y, size_t stride) const;

  float* state(int t) const { return tokens_.states + t * tokens_.stride; }
  float* stream(int t, int number) const {
    return values_.streams.get() + (size_t(t) * streams_.count + number) * wide_;
  }
  float* product(int t, int number) const {
    return products_.streams.get() + (size_t(number - 1) * num_tokens_ + t) * wide_;
  }
  float* normed(int t) const { return values_.normed.get() + size_t(t) * wide_; }
  float* embedded(int t, int layer) const {
    return values_.embedded.get() + size_t(t) * embedded_ + layer * streams_.token_size;
  }
  float* narrow(int t) const { return products_.narrow.get() + size_t(t) * narrow_; }
  float* wide(int t) const { return products_.wide.get() + size_t(t) * wide_; }

  void begin_streams(int t);
  void embed_layers(int t);
  void correct(const StreamLayer& layer, int t);
  // What a state says about the streams: (streams) numbers from -1 to 1. `scratch`: (hidden).
  void look(const StreamLayer& layer, const float* x, float* scratch, float* out) const;
  // values = those of a stream, as long as the first one is.
  void set_length(const float* first, const float* from, float* values) const;
  void prepare_state(int t, const float* from);
  void quantize_low(int t, int size);

  const ModelWeights& weights_;
  const Streams& streams_;
  const Kernels& kernels_;
  Threads& threads_;
  StreamValues& values_;
  StreamProducts& products_;
  const Tokens tokens_;
  const int thread_, num_threads_, num_tokens_;
  const bool alone_;
  const Batch low_;
  const size_t wide_, narrow_, embedded_;  // strides
};

}  // namespace coreinfer
