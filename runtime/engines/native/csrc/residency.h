// What of the weights is in memory, where that is limited; a decoder without a limit has none of this.
#pragma once

#include <memory>

#include "decoder.h"
#include "layer_store.h"
#include "page_window.h"

namespace coreinfer {

struct Residency {
  explicit Residency(size_t layer_bytes) : store(layer_bytes) {}

  LayerStore store;
  std::unique_ptr<PageWindow> embedding, head_lows;  // null where they stay in memory as a whole
  bool embeds_from_head = false;                     // the embedding is the head
};

// A mapped file: where it lies, and its name.
struct MappedFile {
  std::string path;
  const uint8_t* begin;
  size_t num_bytes;
};

// How much memory there is.
struct MemoryLimits {
  size_t layer_bytes;   // of FFN layers
  size_t window_bytes;  // of the tables of which a token needs a few rows; 0 to keep them as a whole
};

// Keep a decoder's weights outside of the FFN in memory: all of the mapped file, or all but what has a window.
void limit_memory(Decoder& decoder, const MappedFile& base, const MemoryLimits& limits);
// Bytes of the tables of which a token needs a few rows, and the most that a block of their rows takes in whole pages.
struct TableBytes {
  size_t all, block;
};
TableBytes table_bytes(const ModelWeights& weights);

// A pass over the layers, for as long as it runs. Throws as LayerStore does.
class LimitedPass {
 public:
  // `decodes`: single tokens, after which a like pass will come.
  LimitedPass(Decoder& decoder, const Row* rows, size_t num_rows, bool decodes);
  void finish();

 private:
  Decoder& decoder_;
};

// The FFN weights of one layer, while a thread computes with them: where they always are, or as read from disk.
class LentLayer {
 public:
  LentLayer(const Decoder& decoder, int layer, int thread) : decoder_(decoder), layer_(layer), thread_(thread) {
    if (decoder.residency) read_ = decoder.residency->store.await(layer, thread == 0);
  }
  // After a barrier that all threads have passed since they were done with the weights.
  ~LentLayer() {
    if (decoder_.residency && thread_ == 0) decoder_.residency->store.done(layer_);
  }
  LentLayer(const LentLayer&) = delete;
  LentLayer& operator=(const LentLayer&) = delete;

  const FfnWeights& weights() const { return decoder_.residency ? read_ : (*decoder_.ffn)[layer_]; }

 private:
  const Decoder& decoder_;
  FfnWeights read_;
  int layer_, thread_;
};

// Logits of some tokens by the whole head, piece by piece where its low halves are not all in memory.
void multiply_head(Decoder& decoder, const Activations& x, int num_tokens, float* logits, int thread);

}  // namespace coreinfer
