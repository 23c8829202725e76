#include "layer_store.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "layer_plan.h"

namespace coreinfer {

LayerStore::LayerStore(size_t limit_bytes) : pool_(limit_bytes), threads_([this] { read_jobs(); }) {}

LayerStore::~LayerStore() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  readers_.notify_all();
  threads_.join();
  for (const auto& held : all_)
    for (Slot& slot : held->slots) release(slot);
}

void LayerStore::announce(std::shared_ptr<LayerSource> source) {
  const std::lock_guard<std::mutex> lock(mutex_);
  announced_ = find(source);
  decoded_since_announced_ = false;
  plan_all();
  readers_.notify_all();
}

void LayerStore::begin_pass(const std::shared_ptr<LayerSource>& source, bool decodes) {
  threads_.check_there();
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::shared_ptr<Held> held = find(source);
  const std::shared_ptr<Held> before[] = {active_, keeper_};
  if (decodes) {
    note_decoding(held);
  } else if (announced_ && !decoded_since_announced_) {
    // Nobody has decoded since: the pack that did has had its day.
    keeper_ = announced_;
  }
  if (active_ != held) {
    if (active_) release_passing(*active_);
    active_ = held;
    all_.erase(std::find(all_.begin(), all_.end(), held));
    all_.push_back(held);
  }
  if (before[0] != active_ || before[1] != keeper_) plan_all();
  position_ = 0;
  wraps_ = decodes;
  // Threads that wake for nothing cost the token time.
  if (!is_whole(*active_) || (keeper_ && !is_whole(*keeper_)) || (announced_ && !is_whole(*announced_)))
    readers_.notify_all();
}

void LayerStore::end_pass() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_) return;
  failed_ = false;
  for (const auto& held : all_)
    for (Slot& slot : held->slots)
      if (slot.state == State::present) release(slot);
  throw std::runtime_error("memory_mb: a layer could not be read from the bundle's file; check the disk");
}

FfnWeights LayerStore::await(int layer, bool counts) {
  Slot& slot = active_->slots[layer];
  uint8_t* memory = slot.ready.load(std::memory_order_acquire);
  const bool hit = memory != nullptr;
  if (!hit) {
    const auto begun = std::chrono::steady_clock::now();
    std::unique_lock<std::mutex> lock(mutex_);
    // What had no room while the pass was elsewhere may have it now that the pass waits for it.
    readers_.notify_all();
    waiters_.wait(lock, [&] { return slot.ready.load(std::memory_order_acquire) != nullptr; });
    memory = slot.ready;
    if (counts)
      figures_.waited_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  }
  // By one thread only, and read between passes.
  if (counts) ++(hit ? figures_.num_hits : figures_.num_misses);
  return active_->source->weights(layer, memory);
}

void LayerStore::done(int layer) {
  // Who is announced meanwhile changes what is kept.
  const std::lock_guard<std::mutex> lock(mutex_);
  position_ = layer + 1;
  Slot& slot = active_->slots[layer];
  if (slot.kept) return;
  release(slot);
  readers_.notify_all();
}

ReadFigures LayerStore::figures() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return figures_;
}

size_t LayerStore::used_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return pool_.used();
}

bool LayerStore::holds(const LayerSource& source) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& held : all_)
    if (held->source.get() == &source) return is_whole(*held);
  return false;
}

bool LayerStore::is_whole(const Held& held) {
  return std::all_of(held.slots.begin(), held.slots.end(),
                     [](const Slot& slot) { return slot.state == State::present; });
}

std::shared_ptr<LayerStore::Held> LayerStore::find(const std::shared_ptr<LayerSource>& source) {
  for (const auto& held : all_)
    if (held->source == source) return held;
  all_.push_back(std::make_shared<Held>(source));
  return all_.back();
}

// Who decodes twice in a row keeps its layers, and who was announced does at once. Sources that decode in turn, as those of
// several generations do, leave the memory to one of them.
void LayerStore::note_decoding(const std::shared_ptr<Held>& held) {
  if (!keeper_ || held == announced_ || held == last_decoder_) keeper_ = held;
  if (held == announced_) announced_ = nullptr;
  last_decoder_ = held;
  decoded_since_announced_ = true;
}

void LayerStore::plan(Held& held, size_t room, bool streams) {
  std::vector<size_t> layer_bytes(held.slots.size());
  for (size_t layer = 0; layer < layer_bytes.size(); ++layer)
    layer_bytes[layer] = held.source->memory_bytes(static_cast<int>(layer));
  const std::vector<bool> kept = kept_layers(layer_bytes, room, streams);
  for (size_t layer = 0; layer < kept.size(); ++layer) held.slots[layer].kept = kept[layer];
}

void LayerStore::plan_all() {
  const size_t kept = keeper_ ? std::min(keeper_->source->total(), pool_.limit()) : 0;
  for (const auto& held : all_) plan(*held, 0, true);
  if (keeper_) plan(*keeper_, pool_.limit(), true);
  if (announced_ && announced_ != keeper_) plan(*announced_, pool_.limit() - kept, announced_ == active_);
  if (active_ && active_ != keeper_ && active_ != announced_) plan(*active_, pool_.limit() - kept, true);
}

void LayerStore::release(Slot& slot) {
  if (slot.state == State::reading) return;  // whoever reads it lets it go
  slot.ready = nullptr;
  slot.state = State::absent;
  pool_.give_back(slot.block);
}

void LayerStore::release_passing(Held& held) {
  for (Slot& slot : held.slots)
    if (!slot.kept) release(slot);
}

bool LayerStore::evict_from(Held& held) {
  for (auto slot = held.slots.rbegin(); slot != held.slots.rend(); ++slot)
    if (slot->state == State::present) {
      release(*slot);
      return true;
    }
  return false;
}

int LayerStore::num_passing(const Held& held) {
  return static_cast<int>(std::count_if(held.slots.begin(), held.slots.end(),
                                        [](const Slot& slot) { return slot.state != State::absent && !slot.kept; }));
}

// The layer that the pass waits for comes before all but those that threads may have: the one at the position and the next.
bool LayerStore::evict_for_position(Held& active, int layer) {
  const int position = position_;
  if (layer != position) return false;
  if (keeper_ && keeper_.get() != &active && evict_from(*keeper_)) return true;
  for (int other = static_cast<int>(active.slots.size()) - 1; other >= 0; --other)
    if (active.slots[other].state == State::present && other != position && other != position + 1) {
      release(active.slots[other]);
      return true;
    }
  return false;
}

// Let go of what is needed least until so many bytes are free. The source that decodes gives layers to a pass of another
// one, but no more than that needs to run at all.
bool LayerStore::make_room(size_t num_bytes, Held& wanting, int layer) {
  while (!pool_.has_room(num_bytes)) {
    if (pool_.drop_spare()) continue;
    bool evicted = false;
    for (const auto& held : all_)
      if (held != active_ && held != keeper_ && held != announced_ && held.get() != &wanting)
        if ((evicted = evict_from(*held))) break;
    if (evicted) continue;
    if (&wanting != active_.get()) return false;
    if (announced_ && announced_ != keeper_ && announced_ != active_ && evict_from(*announced_)) continue;
    if (keeper_ && keeper_ != active_ && num_passing(wanting) < kLeastAhead && evict_from(*keeper_)) continue;
    if (!evict_for_position(wanting, layer)) return false;
  }
  return true;
}

bool LayerStore::take_block(Held& wanting, int layer) {
  const size_t num_bytes = wanting.source->memory_bytes(layer);
  Block& block = wanting.slots[layer].block;
  if (pool_.take_spare(num_bytes, block)) return true;
  return make_room(num_bytes, wanting, layer) && pool_.take_new(num_bytes, block);
}

// The next layer to read: one that the pass comes to, else one that shall stay.
LayerStore::Job LayerStore::pick() {
  if (active_) {
    const int num_layers = active_->source->num_layers(), position = position_;
    const int end = wraps_ ? position + num_layers : num_layers;
    for (int at = position; at < end; ++at) {
      Slot& slot = active_->slots[at % num_layers];
      if (slot.state != State::absent) continue;
      if (!take_block(*active_, at % num_layers)) break;
      slot.state = State::reading;
      return {active_, at % num_layers};
    }
  }
  for (const auto& held : {keeper_, announced_}) {
    if (!held || held == active_) continue;
    const Job job = pick_kept(held);
    if (job.held) return job;
  }
  return {};
}

LayerStore::Job LayerStore::pick_kept(const std::shared_ptr<Held>& held) {
  // What the pass needs to run stays free.
  const size_t num_there = active_ ? num_passing(*active_) : 0;
  const bool streams =
      active_ && std::any_of(active_->slots.begin(), active_->slots.end(), [](const Slot& slot) { return !slot.kept; });
  const size_t reserve =
      streams && num_there < kLeastAhead ? (kLeastAhead - num_there) * active_->source->largest() : 0;
  for (int layer = 0; layer < held->source->num_layers(); ++layer) {
    Slot& slot = held->slots[layer];
    const size_t num_bytes = held->source->memory_bytes(layer);
    if (slot.state != State::absent || !slot.kept) continue;
    if (!make_room(num_bytes + reserve, *held, layer) || !take_block(*held, layer)) return {};
    slot.state = State::reading;
    return {held, layer};
  }
  return {};
}

void LayerStore::read_jobs() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    const Job job = pick();
    if (!job.held) {
      readers_.wait(lock);
      continue;
    }
    Slot& slot = job.held->slots[job.layer];
    uint8_t* memory = slot.block.memory;
    lock.unlock();
    const bool read = job.held->source->read(job.layer, memory);
    lock.lock();
    if (!read) failed_ = true;
    figures_.num_bytes += job.held->source->num_bytes(job.layer);
    slot.state = State::present;
    slot.ready.store(memory, std::memory_order_release);
    if (job.held != active_ && !slot.kept) release(slot);
    waiters_.notify_all();
  }
}

}  // namespace coreinfer
