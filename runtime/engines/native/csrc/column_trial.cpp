#include "column_trial.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "column_pass.h"
#include "layer.h"

namespace coreinfer {
namespace {

constexpr size_t kTrialBytes = size_t(96) << 20;  // of a group's weights: more than most caches hold
constexpr int kRounds = 5;

// Matrices with the same inputs, in both layouts.
struct Member {
  std::vector<const Matrix*> rows;
  Columns columns;
  std::vector<Buffer<float>> outs;
};
// What a token multiplies at once: of a mixture as many experts as it uses, else one.
using Group = std::vector<Member>;
using Rows = std::vector<const Matrix*>;

// Of a layer, or of each of its experts.
std::vector<Rows> matrices_of(const Decoder& decoder, size_t layer, InputGroup group) {
  const AttentionWeights& attention = decoder.weights.layers[layer].attention;
  const FfnWeights& ffn = (*decoder.ffn)[layer];
  if (group == kQkv) return {{&attention.query.weight, &attention.key.weight, &attention.value.weight}};
  if (group == kHeads) return {{&attention.output.weight}};
  if (ffn.experts.empty()) return {coreinfer::matrices_of(ffn, group)};
  std::vector<Rows> found;
  for (const FfnWeights& expert : ffn.experts)
    if (!expert.up.weight.empty()) found.push_back(coreinfer::matrices_of(expert, group));
  return found;
}

Member member_of(Rows rows, InputGroup group, const ColumnLayout& layout, Threads& threads) {
  rows.erase(std::remove_if(rows.begin(), rows.end(), [](const Matrix* w) { return w->empty(); }), rows.end());
  Member member{rows, columns_of(rows, group, layout, threads), {}};
  for (const Matrix* w : member.rows) {
    member.outs.emplace_back();
    member.outs.back().resize(round_up(w->rows, kBlockRows));
  }
  return member;
}

std::vector<Group> first_layers(Decoder& decoder, InputGroup group, bool in_planes) {
  std::vector<Group> groups;
  size_t num_bytes = 0;
  const ColumnLayout layout{decoder.kernels.column_tile, kLeastColumnBytes, {true, true, true, true}, in_planes};
  for (size_t i = 0; i < decoder.weights.layers.size(); ++i) {
    const std::vector<Rows> all = matrices_of(decoder, i, group);
    const size_t at_once = all.size() == 1 ? 1 : decoder.weights.layers[i].router.num_chosen;
    for (size_t first = 0; first + at_once <= all.size() && num_bytes < kTrialBytes; first += at_once) {
      Group members;
      for (size_t number = first; number < first + at_once; ++number)
        members.push_back(member_of(all[number], group, layout, decoder.threads));
      if (members[0].columns.empty()) break;
      for (const Member& member : members) num_bytes += member.columns.matrix.num_bytes();
      groups.push_back(std::move(members));
    }
  }
  return groups;
}

// Of inputs that follow a normal distribution and thresholds that are 2.5 times as high for all bits, so many in twice the
// smaller of what is read and what is not read the high bits alone, near enough.
constexpr double kHalvedShare = 0.35;

// Inputs of whose weights about that share is read.
void draw_inputs(const Kernels& kernels, double share, const Activations& x) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  const double halved = x.bits ? 2 * kHalvedShare * std::min(share, 1 - share) : 0.0;
  for (int i = 0; i < x.stride; ++i) {
    const double place = uniform(random);
    x.values[i] = place < share + halved / 2 ? 0.5f + uniform(random) : 0.0f;
    if (x.bits) x.bits[i] = place < share - halved / 2 ? kAllBits : kHighBits;
  }
  kernels.quantize(x, x.stride, 1);
}

class Trial {
 public:
  Trial(Decoder& decoder, std::vector<Group> groups, double share) : decoder_(decoder), groups_(std::move(groups)) {
    int widest = 0;
    size_t most = 0;
    for (const Group& group : groups_) {
      widest = std::max(widest, group[0].rows.front()->cols);
      most = std::max(most, group.size() * num_segment_sums(group[0].columns.matrix));
    }
    buffer_.resize(1, widest);
    x_ = groups_[0][0].columns.matrix.in_planes ? buffer_.halved() : buffer_.view;
    sums_.resize(most);
    draw_inputs(decoder.kernels, share, x_);
  }

  double run() {
    double best_rows = 1e30, best_columns = 1e30;
    for (int round = 0; round < kRounds; ++round) {
      best_rows = std::min(best_rows, seconds_of([&](int thread) { by_rows(thread); }));
      best_columns = std::min(best_columns, seconds_of([&](int thread) { by_columns(thread); }));
    }
    return best_rows / best_columns;
  }

 private:
  double seconds_of(const std::function<void(int)>& work) {
    const auto start = std::chrono::steady_clock::now();
    decoder_.threads.run(work);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void by_rows(int thread) {
    for (Group& group : groups_)
      for (size_t i = 0; i < group[0].rows.size(); ++i) {
        const int per_member = group[0].rows[i]->num_blocks();
        const auto work = [&](int first, int last) {
          for (int end; first < last; first = end) {
            Member& member = group[first / per_member];
            const int offset = first / per_member * per_member;
            end = std::min(last, offset + per_member);
            multiply(decoder_.kernels, *member.rows[i], {x_.whole(), 1, 0}, member.outs[i].get(), 0, first - offset,
                     end - offset);
          }
        };
        decoder_.threads.deal(thread, per_member * static_cast<int>(group.size()), work, [&](int block) {
          prefetch_block(*group[block / per_member].rows[i], block % per_member, kPartPrefetchBytes);
        });
        decoder_.threads.barrier(thread);
      }
  }

  void by_columns(int thread) {
    std::vector<ColumnProduct> products;
    for (Group& group : groups_) {
      const size_t num_sums = num_segment_sums(group[0].columns.matrix);
      products.clear();
      for (size_t i = 0; i < group.size(); ++i)
        products.push_back({&group[i].columns.matrix, x_, sums_.get() + i * num_sums});
      add_columns(decoder_.kernels, products.data(), static_cast<int>(products.size()), thread, decoder_.threads);
      decoder_.threads.barrier(thread);
      for (size_t i = 0; i < group.size(); ++i) add_up(group[i], products[i], thread);
      decoder_.threads.barrier(thread);
    }
  }

  void add_up(Member& member, const ColumnProduct& product, int thread) {
    for (size_t i = 0; i < member.rows.size(); ++i) {
      const Range blocks = coreinfer::share(member.rows[i]->num_blocks(), thread, decoder_.threads.size());
      const int first = member.columns.parts[i].first + blocks.begin * kBlockRows;
      const int count = (blocks.end - blocks.begin) * kBlockRows;
      if (count > 0)
        sum_segments(decoder_.kernels, *product.weight, product.sums, first, first + count,
                     member.outs[i].get() + blocks.begin * kBlockRows);
    }
  }

  Decoder& decoder_;
  std::vector<Group> groups_;
  ActivationBuffer buffer_;
  Activations x_;
  Buffer<float> sums_;
};

}  // namespace

std::array<double, kNumInputGroups> try_columns(Decoder& decoder, double share, bool in_planes) {
  std::array<double, kNumInputGroups> gains{};
  for (int group = 0; group < kNumInputGroups; ++group) {
    std::vector<Group> groups = first_layers(decoder, static_cast<InputGroup>(group), in_planes);
    if (!groups.empty()) gains[group] = Trial(decoder, std::move(groups), share).run();
  }
  return gains;
}

}  // namespace coreinfer
