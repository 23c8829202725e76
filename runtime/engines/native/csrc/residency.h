// What of the weights is in memory, where that is limited; a decoder without a limit has none of this.
#pragma once

#include <memory>
#include <optional>

#include "decoder.h"
#include "expert_store.h"
#include "layer_store.h"
#include "page_window.h"

namespace coreinfer {

struct Batch;

struct Residency {
  Residency(size_t layer_bytes, bool is_mixture);

  // One of the two: of mixtures it is experts that are read and kept.
  std::unique_ptr<LayerStore> layers;
  std::unique_ptr<ExpertStore> experts;
  std::unique_ptr<PageWindow> embedding, head_lows;  // null where they stay in memory as a whole
  bool embeds_from_head = false;                     // the embedding is the head

  ReadFigures figures() const { return layers ? layers->figures() : experts->figures(); }
  size_t used_bytes() const { return layers ? layers->used_bytes() : experts->used_bytes(); }
};

// What an FFN is read from, and its weights by their places.
void announce(Residency& residency, const FileSource& source, const Ffn& ffn);
bool holds(const Residency& residency, const FileSource& source, const Ffn& ffn);
// Throws std::invalid_argument: there is too little memory to run the FFN at all.
void check_fits(const Residency& residency, const FileSource& source);

// A mapped file: where it lies, and its name.
struct MappedFile {
  std::string path;
  const uint8_t* begin;
  size_t num_bytes;
};

// How much memory there is.
struct MemoryLimits {
  size_t layer_bytes;   // of FFN layers, or of experts
  size_t window_bytes;  // of the tables of which a token needs a few rows; 0 to keep them as a whole
};

// Keep a decoder's weights outside of the FFN in memory: all of the mapped file, or all but what has a window.
void limit_memory(Decoder& decoder, const MappedFile& base, const MemoryLimits& limits);
// Bytes of the tables of which a token needs a few rows, and the most that a block of their rows takes in whole pages.
struct TableBytes {
  size_t all, block;
};
TableBytes table_bytes(const ModelWeights& weights);

// A pass over the layers, for as long as it runs. Throws as LayerStore and ExpertStore do.
class LimitedPass {
 public:
  // `decodes`: single tokens, after which a like pass will come.
  LimitedPass(Decoder& decoder, const Row* rows, size_t num_rows, bool decodes);
  void finish();

 private:
  Decoder& decoder_;
};

// The FFN weights of one layer, while a thread computes with them: where they always are, or as read from disk. Of mixtures
// their places alone, where memory is limited: experts are lent one by one.
class LentLayer {
 public:
  LentLayer(const Decoder& decoder, int layer, int thread)
      : decoder_(decoder),
        store_(decoder.residency ? decoder.residency->layers.get() : nullptr),
        layer_(layer),
        thread_(thread) {
    if (store_ && store_->is_there(layer)) read_.emplace(take());
  }
  // After a barrier that all threads have passed since they were done with the weights.
  ~LentLayer() {
    if (read_ && thread_ == 0) store_->done(layer_);
  }
  LentLayer(const LentLayer&) = delete;
  LentLayer& operator=(const LentLayer&) = delete;

  // To ask for their first bytes ahead: where they will be, if that is known.
  const FfnWeights& ahead() const { return read_ ? *read_ : (*decoder_.ffn)[layer_]; }
  // Waits for them if they are still being read.
  const FfnWeights& weights() {
    if (store_ && !read_) read_.emplace(take());
    return ahead();
  }

 private:
  FfnWeights take() const { return store_->await(layer_, thread_ == 0); }

  const Decoder& decoder_;
  LayerStore* const store_;  // null where layers need not be waited for
  std::optional<FfnWeights> read_;
  int layer_, thread_;
};

// Bytes of rows of tables that were read so far, or may have been.
uint64_t table_bytes_read(const Residency& residency);

// Logits of some tokens by the whole head, piece by piece where its low halves are not all in memory.
void multiply_head(Decoder& decoder, const Batch& batch, float* logits, int thread);

}  // namespace coreinfer
