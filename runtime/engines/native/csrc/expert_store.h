// Experts of mixtures in memory of limited size. What was computed with lately stays, as much as fits; the rest is read from
// disk when a layer's router has chosen it, while those that are there are computed with.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "block_pool.h"
#include "expert_scratch.h"
#include "layer_store.h"
#include "reader_threads.h"
#include "weights.h"

namespace coreinfer {

// A mixture in a file, of which each expert takes one range. Packs that name experts of the dense FFN share its source.
class ExpertSource {
 public:
  // Throws as LayerSource does.
  ExpertSource(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn);

  // All experts, one after another, as if each were a layer.
  const LayerSource& pieces() const { return pieces_; }
  int num_layers() const { return static_cast<int>(pieces_by_layer_.size()); }
  // -1 where the file lacks the expert.
  int piece(int layer, int expert) const { return pieces_by_layer_[layer][expert]; }
  // The weights by their places in the mapping, which are not to be read, and biases in memory.
  const std::shared_ptr<const Ffn>& ffn() const { return ffn_; }

 private:
  LayerSource pieces_;
  std::vector<std::vector<int>> pieces_by_layer_;
  std::shared_ptr<const Ffn> ffn_;
};

class ExpertStore {
 public:
  // `limit_bytes` must hold one expert of every source; less than a token's experts is slow.
  explicit ExpertStore(size_t limit_bytes);
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  // These experts will decode soon: they are read into memory that is free.
  void announce(const std::shared_ptr<ExpertSource>& source, const Ffn& experts);
  // One pass over all layers, by one caller at a time. `decodes`: what it computes with is kept before what others do.
  // Throws std::runtime_error: the process was forked since the store was made.
  void begin_pass(const std::shared_ptr<ExpertSource>& source, bool decodes);
  // Throws std::runtime_error: an expert could not be read, and the pass computed nonsense.
  void end_pass();

  // In a pass, by one thread: which experts of a layer will be computed with.
  void want(int layer, const std::vector<ExpertGroup>& groups);
  // Then, until all of them came: those that are there, at least one, which stay until they are given back. None: reading
  // has failed, and the pass is to go on without computing.
  void lend(std::vector<LentExpert>& lent);
  void give_back();

  ReadFigures figures() const;  // of experts
  size_t used_bytes() const;
  size_t limit_bytes() const { return pool_.limit(); }
  // Whether all these experts of a source are in memory.
  bool holds(const ExpertSource& source, const Ffn& experts) const;

 private:
  enum class State { absent, reading, present };
  struct Slot {
    State state = State::absent;
    Block block;
    uint64_t last_use = 0;
    bool decodes = false, is_wanted = false;
  };
  struct Held {
    std::shared_ptr<ExpertSource> source;
    std::vector<Slot> slots;  // of its pieces
    std::vector<int> layers;  // of each piece
  };
  struct Place {
    std::shared_ptr<Held> held;
    int piece = -1;
    Slot& slot() const { return held->slots[piece]; }
    int layer() const { return held->layers[piece]; }
    size_t num_bytes() const { return held->source->pieces().memory_bytes(piece); }
  };
  struct Wanted {
    int expert;
    Place place;
  };

  std::shared_ptr<Held> find(const std::shared_ptr<ExpertSource>& source);
  int layers_until(int layer) const;
  void release(size_t number);
  bool evict();
  bool evict_passing();
  bool evict_balanced();
  int num_passing() const;
  bool take_block(const Place& place, bool may_evict);
  void free_block(const Place& place);
  Place pick();
  void finish(const Place& place, bool was_read);
  void read_jobs();

  mutable std::mutex mutex_;
  std::condition_variable readers_, waiters_;
  std::vector<std::shared_ptr<Held>> all_;
  std::vector<Place> present_, announced_;
  std::shared_ptr<Held> active_;
  std::vector<Wanted> wanted_, lent_;  // of the layer: those to come, and those that are computed with
  std::vector<size_t> layer_bytes_;    // in memory, of all sources
  int layer_ = 0, num_reading_ = 0;
  uint64_t clock_ = 0;
  bool decodes_ = false, stop_ = false;
  const char* failure_ = nullptr;
  BlockPool pool_;
  ReadFigures figures_;
  ReaderThreads threads_;  // last: they use all of these
};

}  // namespace coreinfer
