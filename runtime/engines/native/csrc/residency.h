// What of the weights is in memory, where that is limited; a decoder without a limit has none of this.
#pragma once

#include <memory>
#include <optional>

#include "decoder.h"
#include "layer_store.h"
#include "page_window.h"

namespace coreinfer {

struct Batch;

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
    if (decoder.residency && decoder.residency->store.is_there(layer)) read_.emplace(take());
  }
  // After a barrier that all threads have passed since they were done with the weights.
  ~LentLayer() {
    if (read_ && thread_ == 0) decoder_.residency->store.done(layer_);
  }
  LentLayer(const LentLayer&) = delete;
  LentLayer& operator=(const LentLayer&) = delete;

  // To ask for their first bytes ahead: where they will be, if that is known.
  const FfnWeights& ahead() const { return read_ ? *read_ : (*decoder_.ffn)[layer_]; }
  // Waits for them if they are still being read.
  const FfnWeights& weights() {
    if (decoder_.residency && !read_) read_.emplace(take());
    return ahead();
  }

 private:
  FfnWeights take() const { return decoder_.residency->store.await(layer_, thread_ == 0); }

  const Decoder& decoder_;
  std::optional<FfnWeights> read_;
  int layer_, thread_;
};

// Bytes of rows of tables that were read so far, or may have been.
uint64_t table_bytes_read(const Residency& residency);

// Logits of some tokens by the whole head, piece by piece where its low halves are not all in memory.
void multiply_head(Decoder& decoder, const Batch& batch, float* logits, int thread);

}  // namespace coreinfer
