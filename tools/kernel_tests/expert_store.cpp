// Experts that are read from a file into limited memory: what is lent is what the file has, and no more is held than may be.
#include "../../runtime/engines/native/csrc/expert_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "checks.h"

using namespace coreinfer;

namespace {

// The other tests' numbers stay as they are.
std::mt19937 chance(7);

constexpr int kLayers = 3, kExperts = 7, kHidden = 48;

// A file of the system's folder for such, and its mapping, which the store must not look at.
class TemporaryFile {
 public:
  explicit TemporaryFile(size_t num_bytes) : bytes_(num_bytes) {
    for (uint8_t& byte : bytes_) byte = static_cast<uint8_t>(chance());
    descriptor_ = mkstemp(path_.data());
    write_all();
    mapping_ = static_cast<uint8_t*>(mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE, descriptor_, 0));
  }
  ~TemporaryFile() {
    munmap(mapping_, bytes_.size());
    close(descriptor_);
    unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void write_all() const {
    expect("expert store: expected a file to write",
           pwrite(descriptor_, bytes_.data(), bytes_.size(), 0) == static_cast<ssize_t>(bytes_.size()));
  }
  void cut() const { expect("expert store: expected a shorter file", ftruncate(descriptor_, 0) == 0); }
  const std::string& path() const { return path_; }
  const uint8_t* mapping() const { return mapping_; }
  size_t num_bytes() const { return bytes_.size(); }
  // What lies at a place of the mapping.
  const uint8_t* content(const void* place) const {
    return bytes_.data() + (static_cast<const uint8_t*>(place) - mapping_);
  }

 private:
  std::vector<uint8_t> bytes_;
  std::string path_ = "/tmp/coreinfer-experts-XXXXXX";
  uint8_t* mapping_ = nullptr;
  int descriptor_ = -1;
};

// Experts one after another from `offset` on, by layers; the first of each layer is left out with `lacks`.
Ffn lay_out(const TemporaryFile& file, size_t& offset, int num_neurons, bool lacks) {
  Ffn ffn(kLayers);
  const auto matrix = [&](int rows, int cols) {
    Matrix w;
    w.rows = rows;
    w.cols = cols;
    w.bf16 = reinterpret_cast<const uint16_t*>(file.mapping() + offset);
    offset += w.num_bytes() + 64;
    return w;
  };
  for (FfnWeights& layer : ffn) {
    layer.experts.resize(kExperts);
    for (int expert = lacks ? 1 : 0; expert < kExperts; ++expert) {
      FfnWeights& own = layer.experts[expert];
      own.gate.weight = matrix(num_neurons, kHidden);
      own.up.weight = matrix(num_neurons, kHidden);
      own.down.weight = matrix(kHidden, num_neurons);
    }
    num_neurons += 16;  // layers of packs are of unlike widths
  }
  return ffn;
}

bool is_as_in_file(const TemporaryFile& file, const FfnWeights& placed, const FfnWeights& lent) {
  const auto same = [&](const Linear& place, const Linear& got) {
    return std::memcmp(file.content(place.weight.bf16), got.weight.bf16, place.weight.num_bytes()) == 0;
  };
  return same(placed.gate, lent.gate) && same(placed.up, lent.up) && same(placed.down, lent.down);
}

// A file with the experts of a dense FFN and of two packs.
struct Mixtures {
  TemporaryFile file{2 << 20};
  size_t offset = 1 << 12;
  Ffn ffns[3] = {lay_out(file, offset, 80, false), lay_out(file, offset, 16, false), lay_out(file, offset, 32, true)};
  std::shared_ptr<ExpertSource> sources[3] = {source(0), source(1), source(2)};

  std::shared_ptr<ExpertSource> source(int number) const {
    return std::make_shared<ExpertSource>(file.path(), file.mapping(), file.num_bytes(), ffns[number]);
  }
  size_t largest() const { return sources[0]->pieces().largest(); }
};

// Some experts of a layer, in their order.
std::vector<ExpertGroup> draw_groups(const FfnWeights& layer, unsigned most) {
  std::vector<ExpertGroup> groups;
  for (int expert = 0; expert < kExperts; ++expert)
    if (!layer.experts[expert].up.weight.empty() && chance() % kExperts < most)
      groups.push_back({expert, 0, 1, 0, &layer.experts[expert]});
  return groups;
}

// Whether all experts were lent once and as they are in the file; false too where reading failed.
bool run_layer(ExpertStore& store, const Mixtures& mixtures, int layer, const std::vector<ExpertGroup>& groups) {
  std::vector<int> came;
  std::vector<LentExpert> lent;
  store.want(layer, groups);
  while (came.size() < groups.size()) {
    store.lend(lent);
    if (lent.empty()) return false;
    for (const LentExpert& own : lent) {
      const auto group =
          std::find_if(groups.begin(), groups.end(), [&](const ExpertGroup& one) { return one.expert == own.expert; });
      if (group == groups.end() || !is_as_in_file(mixtures.file, *group->weights, own.weights)) return false;
      came.push_back(own.expert);
    }
    if (store.used_bytes() > store.limit_bytes()) return false;
    store.give_back();
  }
  std::sort(came.begin(), came.end());
  return std::adjacent_find(came.begin(), came.end()) == came.end();
}

bool run_pass(ExpertStore& store, const Mixtures& mixtures, int number, bool decodes) {
  bool right = true;
  store.begin_pass(mixtures.sources[number], decodes);
  for (int layer = 0; layer < kLayers; ++layer)
    right &= run_layer(store, mixtures, layer, draw_groups(mixtures.ffns[number][layer], decodes ? 2 : 6));
  store.end_pass();
  return right;
}

// Passes of all kinds, by themselves: nobody else wakes the readers.
void test_alone(const Mixtures& mixtures, size_t limit_bytes) {
  ExpertStore store(limit_bytes);
  bool right = true;
  for (int pass = 0; pass < 50; ++pass) right &= run_pass(store, mixtures, chance() % 3, chance() % 2);
  expect("expert store: expected what the file has", right);
}

// The same while another thread announces packs.
void test_any_order(const Mixtures& mixtures, size_t limit_bytes) {
  ExpertStore store(limit_bytes);
  std::atomic<bool> done{false};
  std::thread other([&] {
    for (int turn = 0; !done; ++turn) {
      store.announce(mixtures.sources[turn % 3], mixtures.ffns[turn % 3]);
      std::this_thread::yield();
    }
  });
  bool right = true;
  for (int pass = 0; pass < 200; ++pass) right &= run_pass(store, mixtures, chance() % 3, chance() % 2);
  done = true;
  other.join();
  expect("expert store: expected what the file has", right);
  const ReadFigures figures = store.figures();
  expect("expert store: expected reads", figures.num_bytes > 0 && figures.num_hits + figures.num_misses > 0);
}

// Experts that decode stay where there is room for them, whatever a prompt reads.
void test_what_stays(const Mixtures& mixtures) {
  ExpertStore store(mixtures.sources[1]->pieces().total() + 5 * mixtures.largest());
  const auto pass = [&](int number, bool decodes) {
    store.begin_pass(mixtures.sources[number], decodes);
    for (int layer = 0; layer < kLayers; ++layer)
      run_layer(store, mixtures, layer, draw_groups(mixtures.ffns[number][layer], kExperts));
    store.end_pass();
  };
  pass(1, true);
  expect("expert store: expected all of a pack", store.holds(*mixtures.sources[1], mixtures.ffns[1]));
  pass(0, false);
  pass(0, false);
  const uint64_t before = store.figures().num_misses;
  pass(1, true);
  expect("expert store: expected the pack after a prompt", store.figures().num_misses == before);
}

void test_failed_reads(const Mixtures& mixtures) {
  ExpertStore store(3 * mixtures.largest());
  const auto fails = [&] {
    try {
      run_pass(store, mixtures, 0, true);
    } catch (const std::runtime_error& error) {
      return std::string(error.what()).find("an expert could not be read") != std::string::npos;
    }
    return false;
  };
  run_pass(store, mixtures, 1, true);
  mixtures.file.cut();
  store.announce(mixtures.sources[2], mixtures.ffns[2]);
  for (int turn = 0; turn < 3; ++turn) {
    bool failed = false;
    for (int pass = 0; pass < 5; ++pass) failed |= fails();
    expect("expert store: expected a failed read to be told", failed);
  }
  mixtures.file.write_all();
  // What was announced may have failed since.
  fails();
  for (int pass = 0; pass < 5; ++pass)
    expect("expert store: expected all to be right again", run_pass(store, mixtures, pass % 3, true));
}

}  // namespace

void test_expert_store() {
  const int before = num_failures;
  const Mixtures mixtures;
  for (const int num_experts : {1, 2, 3, 9, 100}) {
    test_alone(mixtures, num_experts * mixtures.largest());
    test_any_order(mixtures, num_experts * mixtures.largest());
  }
  test_what_stays(mixtures);
  test_failed_reads(mixtures);
  std::printf("expert store: %s\n", num_failures == before ? "works" : "WRONG");
}
