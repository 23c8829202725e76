// Layers of FFN weights in memory of limited size. The layers of the FFN that decodes are kept, as many as fit; all others
// are read from disk ahead of the computation and let go after it. What a pass will read is known before it begins.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "block_pool.h"
#include "direct_file.h"
#include "reader_threads.h"
#include "weights.h"

namespace coreinfer {

// An FFN in a file, of which each layer takes one range. The file is mapped too, but its pages are not touched: weights are
// found by their distance from where the mapping begins.
class LayerSource {
 public:
  // Throws std::runtime_error: the file cannot be opened. std::invalid_argument: weights lie outside of the mapping.
  LayerSource(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn);

  int num_layers() const { return static_cast<int>(ranges_.size()); }
  size_t num_bytes(int layer) const { return ranges_[layer].num_bytes; }
  // What a layer takes in memory: whole huge pages where that wastes little.
  size_t memory_bytes(int layer) const;
  size_t largest() const;  // in memory
  size_t total() const;
  bool read(int layer, uint8_t* to) const;
  // The layer's weights where its range lies in memory.
  FfnWeights weights(int layer, const uint8_t* memory) const;
  // The same by their places in the mapping, which are not to be read, and biases in memory.
  const FfnWeights& placed(int layer) const { return mapped_[layer]; }

 private:
  struct Range {
    uint64_t offset;
    size_t num_bytes, num_needed;  // of whole sectors, and without what lies past the end of the file
  };

  DirectFile file_;
  const uint8_t* mapping_;
  Ffn mapped_;
  std::vector<Range> ranges_;
  std::vector<std::vector<float>> biases_;  // outlive a layer's memory
};

// What was read from disk so far.
struct ReadFigures {
  uint64_t num_bytes = 0;
  uint64_t num_hits = 0;    // layers, or experts, that were there when a pass came to them
  uint64_t num_misses = 0;  // that a pass waited for
  double waited_seconds = 0.0;
};

class LayerStore {
 public:
  // `limit_bytes` must hold two layers of every source, one that is computed with and one that is read.
  explicit LayerStore(size_t limit_bytes);
  ~LayerStore();
  LayerStore(const LayerStore&) = delete;
  LayerStore& operator=(const LayerStore&) = delete;

  // `source` will decode soon: its layers are read into memory that is free, and into that of the source that decoded
  // last, unless that one still does.
  void announce(std::shared_ptr<LayerSource> source);
  // One pass over all layers in their order, by one caller at a time. `decodes`: a like pass will follow.
  // Throws std::runtime_error: the process was forked since the store was made.
  void begin_pass(const std::shared_ptr<LayerSource>& source, bool decodes);
  // Throws std::runtime_error: a layer could not be read, and the pass computed nonsense.
  void end_pass();
  // In a pass, by any thread: whether a layer need not be waited for.
  bool is_there(int layer) const { return active_->slots[layer].ready.load(std::memory_order_acquire) != nullptr; }
  // In a pass, by any thread: wait for a layer, which stays until done(layer).
  FfnWeights await(int layer, bool counts);
  void done(int layer);

  ReadFigures figures() const;
  size_t used_bytes() const;
  size_t limit_bytes() const { return pool_.limit(); }
  // Whether all layers of a source are in memory.
  bool holds(const LayerSource& source) const;

 private:
  enum class State { absent, reading, present };
  struct Slot {
    State state = State::absent;
    Block block;
    std::atomic<uint8_t*> ready{nullptr};
    bool kept = false;
  };
  struct Held {
    explicit Held(std::shared_ptr<LayerSource> of) : source(std::move(of)), slots(source->num_layers()) {}
    std::shared_ptr<LayerSource> source;
    std::vector<Slot> slots;
  };
  struct Job {
    std::shared_ptr<Held> held;
    int layer = -1;
  };

  static bool is_whole(const Held& held);
  std::shared_ptr<Held> find(const std::shared_ptr<LayerSource>& source);
  void note_decoding(const std::shared_ptr<Held>& held);
  // Which layers of a source stay, if they are to fit into `room`.
  void plan(Held& held, size_t room, bool streams);
  void plan_all();
  void release(Slot& slot);
  void release_passing(Held& held);
  static int num_passing(const Held& held);
  bool evict_for_position(Held& active, int layer);
  bool make_room(size_t num_bytes, Held& wanting, int layer);
  bool evict_from(Held& held);
  bool take_block(Held& wanting, int layer);
  Job pick();
  Job pick_kept(const std::shared_ptr<Held>& held);
  void read_jobs();

  mutable std::mutex mutex_;
  std::condition_variable readers_, waiters_;
  std::vector<std::shared_ptr<Held>> all_;  // the longest unused first
  std::shared_ptr<Held> active_, keeper_, announced_, last_decoder_;
  bool decoded_since_announced_ = false, wraps_ = false, failed_ = false, stop_ = false;
  std::atomic<int> position_{0};  // of the pass
  BlockPool pool_;
  ReadFigures figures_;
  ReaderThreads threads_;  // last: they use all of these
};

}  // namespace coreinfer
