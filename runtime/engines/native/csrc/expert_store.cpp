#include "expert_store.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <tuple>

namespace coreinfer {
namespace {

// Experts that other passes may have in the place of those that tokens are decoded with: one or two that are computed with and
// two that are read.
constexpr int kMostAhead = 4;

constexpr const char* kNotRead = "memory_mb: an expert could not be read from the bundle's file; check the disk";
constexpr const char* kNoMemory =
    "memory_mb: the system has no memory for an expert, though it is within the limit; give a smaller one";

}  // namespace

ExpertStore::ExpertStore(size_t limit_bytes) : pool_(limit_bytes), threads_([this] { read_jobs(); }) {}

ExpertStore::~ExpertStore() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  readers_.notify_all();
  threads_.join();
  while (!present_.empty()) release(present_.size() - 1);
}

void ExpertStore::announce(const std::shared_ptr<ExpertSource>& source, const Ffn& experts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::shared_ptr<Held> held = find(source);
  announced_.clear();
  for (size_t layer = experts.size(); layer-- > 0;)
    for (size_t expert = experts[layer].experts.size(); expert-- > 0;)
      if (!experts[layer].experts[expert].up.weight.empty())
        announced_.push_back({held, source->piece(static_cast<int>(layer), static_cast<int>(expert))});
  readers_.notify_all();
}

void ExpertStore::begin_pass(const std::shared_ptr<ExpertSource>& source, bool decodes) {
  threads_.check_there();
  const std::lock_guard<std::mutex> lock(mutex_);
  active_ = find(source);
  decodes_ = decodes;
}

void ExpertStore::end_pass() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!failure_) return;
  for (const std::vector<Wanted>* left : {&wanted_, &lent_})
    for (const Wanted& wanted : *left) wanted.place.slot().is_wanted = false;
  wanted_.clear();
  lent_.clear();
  announced_.clear();
  // Else what is still being read would fail a later pass.
  waiters_.wait(lock, [&] { return num_reading_ == 0; });
  const char* failure = failure_;
  failure_ = nullptr;
  throw std::runtime_error(failure);
}

void ExpertStore::want(int layer, const std::vector<ExpertGroup>& groups) {
  const std::lock_guard<std::mutex> lock(mutex_);
  layer_ = layer;
  if (failure_) return;
  ++clock_;
  wanted_.clear();
  bool all_there = true;
  for (const ExpertGroup& group : groups) {
    const Place place{active_, active_->source->piece(layer, group.expert)};
    Slot& slot = place.slot();
    slot.last_use = clock_;
    slot.decodes |= decodes_;
    slot.is_wanted = true;
    const bool hit = slot.state == State::present;
    ++(hit ? figures_.num_hits : figures_.num_misses);
    all_there &= hit;
    wanted_.push_back({group.expert, place});
  }
  // Threads that wake for nothing cost the token time.
  if (!all_there) readers_.notify_all();
}

void ExpertStore::lend(std::vector<LentExpert>& lent) {
  lent.clear();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_there = [](const Wanted& wanted) { return wanted.place.slot().state == State::present; };
  const auto any_there = [&] { return failure_ || std::any_of(wanted_.begin(), wanted_.end(), is_there); };
  if (!any_there()) {
    const auto begun = std::chrono::steady_clock::now();
    waiters_.wait(lock, any_there);
    figures_.waited_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  }
  if (failure_) return;
  const auto rest = std::stable_partition(wanted_.begin(), wanted_.end(), is_there);
  lent_.assign(wanted_.begin(), rest);
  wanted_.erase(wanted_.begin(), rest);
  for (const auto& [expert, place] : lent_)
    lent.push_back({expert, place.held->source->pieces().weights(place.piece, place.slot().block.memory)});
}

void ExpertStore::give_back() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Wanted& wanted : lent_) wanted.place.slot().is_wanted = false;
  lent_.clear();
  if (!wanted_.empty()) readers_.notify_all();
}

ReadFigures ExpertStore::figures() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return figures_;
}

size_t ExpertStore::used_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return pool_.used();
}

bool ExpertStore::holds(const ExpertSource& source, const Ffn& experts) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto own =
      std::find_if(all_.begin(), all_.end(), [&](const auto& held) { return held->source.get() == &source; });
  if (own == all_.end()) return false;
  for (int layer = 0; layer < static_cast<int>(experts.size()); ++layer)
    for (int expert = 0; expert < static_cast<int>(experts[layer].experts.size()); ++expert)
      if (!experts[layer].experts[expert].up.weight.empty() &&
          (*own)->slots[source.piece(layer, expert)].state != State::present)
        return false;
  return true;
}

std::shared_ptr<ExpertStore::Held> ExpertStore::find(const std::shared_ptr<ExpertSource>& source) {
  for (const auto& held : all_)
    if (held->source == source) return held;
  auto held = std::make_shared<Held>();
  held->source = source;
  held->slots.resize(source->pieces().num_layers());
  held->layers.resize(held->slots.size());
  const Ffn& ffn = *source->ffn();
  for (int layer = 0; layer < source->num_layers(); ++layer)
    for (int expert = 0; expert < static_cast<int>(ffn[layer].experts.size()); ++expert)
      if (const int piece = source->piece(layer, expert); piece >= 0) held->layers[piece] = layer;
  layer_bytes_.resize(source->num_layers());
  all_.push_back(held);
  return held;
}

// How many layers a pass computes before it comes to this one again; the most for the one that it is at.
int ExpertStore::layers_until(int layer) const {
  const int num_layers = static_cast<int>(layer_bytes_.size());
  return (layer - layer_ - 1 + num_layers) % num_layers;
}

void ExpertStore::free_block(const Place& place) {
  Slot& slot = place.slot();
  layer_bytes_[place.layer()] -= slot.block.num_bytes;
  pool_.give_back(slot.block);
  slot.state = State::absent;
  slot.decodes = false;
}

void ExpertStore::release(size_t number) {
  const Place place = present_[number];
  free_block(place);
  present_[number] = present_.back();
  present_.pop_back();
}

// What no token was decoded with: of the layer that a pass comes to last, the longest unused.
bool ExpertStore::evict_passing() {
  const auto order = [&](const Place& place) {
    return std::make_tuple(layers_until(place.layer()), ~place.slot().last_use);
  };
  size_t best = present_.size();
  for (size_t number = 0; number < present_.size(); ++number) {
    const Place& place = present_[number];
    if (place.slot().is_wanted || place.slot().decodes) continue;
    if (best == present_.size() || order(place) > order(present_[best])) best = number;
  }
  if (best == present_.size()) return false;
  release(best);
  return true;
}

// Each layer keeps as much as the others: if the longest unused of all went, then a pass that needs more than there is room
// for would find nothing that it left behind.
bool ExpertStore::evict_balanced() {
  const auto order = [&](const Place& place) {
    return std::make_tuple(layer_bytes_[place.layer()], layers_until(place.layer()), ~place.slot().last_use);
  };
  size_t best = present_.size();
  for (size_t number = 0; number < present_.size(); ++number) {
    if (present_[number].slot().is_wanted) continue;
    if (best == present_.size() || order(present_[number]) > order(present_[best])) best = number;
  }
  if (best == present_.size()) return false;
  release(best);
  return true;
}

// Of the layer, experts that have memory and that no token was decoded with.
int ExpertStore::num_passing() const {
  int count = 0;
  for (const std::vector<Wanted>* wanted : {&lent_, &wanted_})
    for (const Wanted& own : *wanted) count += !own.place.slot().decodes && own.place.slot().state != State::absent;
  return count;
}

bool ExpertStore::evict() {
  if (evict_passing()) return true;
  return (decodes_ || num_passing() < kMostAhead) && evict_balanced();
}

bool ExpertStore::take_block(const Place& place, bool may_evict) {
  const size_t num_bytes = place.num_bytes();
  Block& block = place.slot().block;
  if (!pool_.take_spare(num_bytes, block)) {
    while (!pool_.has_room(num_bytes))
      if (!pool_.drop_spare() && !(may_evict && evict())) return false;
    if (!pool_.take_new(num_bytes, block)) {
      if (may_evict) failure_ = kNoMemory;
      waiters_.notify_all();
      return false;
    }
  }
  layer_bytes_[place.layer()] += block.num_bytes;
  place.slot().state = State::reading;
  return true;
}

// The next expert to read: one that is wanted, else one that will be.
ExpertStore::Place ExpertStore::pick() {
  if (failure_) return {};
  for (const Wanted& wanted : wanted_)
    if (wanted.place.slot().state == State::absent) return take_block(wanted.place, true) ? wanted.place : Place();
  for (; !announced_.empty(); announced_.pop_back()) {
    const Place place = announced_.back();
    if (place.slot().state != State::absent) continue;
    if (!take_block(place, false)) return {};
    place.slot().decodes = true;
    return place;
  }
  return {};
}

void ExpertStore::finish(const Place& place, bool was_read) {
  figures_.num_bytes += place.held->source->pieces().num_bytes(place.piece);
  if (was_read) {
    place.slot().state = State::present;
    present_.push_back(place);
  } else {
    free_block(place);
    failure_ = kNotRead;
  }
  waiters_.notify_all();
}

void ExpertStore::read_jobs() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    const Place place = pick();
    if (!place.held) {
      readers_.wait(lock);
      continue;
    }
    uint8_t* memory = place.slot().block.memory;
    ++num_reading_;
    lock.unlock();
    const bool was_read = place.held->source->pieces().read(place.piece, memory);
    lock.lock();
    --num_reading_;
    finish(place, was_read);
  }
}

}  // namespace coreinfer
