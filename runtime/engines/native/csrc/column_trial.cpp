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
struct Group {
  std::vector<const Matrix*> rows;
  Columns columns;
  std::vector<Buffer<float>> outs;
};

void add_group(std::vector<Group>& groups, std::vector<const Matrix*> rows, Columns columns) {
  if (columns.empty()) return;
  rows.erase(std::remove_if(rows.begin(), rows.end(), [](const Matrix* w) { return w->empty(); }), rows.end());
  Group group{std::move(rows), std::move(columns), {}};
  for (const Matrix* w : group.rows) {
    group.outs.emplace_back();
    group.outs.back().resize(round_up(w->rows, kBlockRows));
  }
  groups.push_back(std::move(group));
}

std::vector<const Matrix*> matrices_of(const Decoder& decoder, size_t layer, InputGroup group) {
  const AttentionWeights& attention = decoder.weights.layers[layer].attention;
  const FfnWeights& ffn = (*decoder.ffn)[layer];
  if (group == kQkv) return {&attention.query.weight, &attention.key.weight, &attention.value.weight};
  if (group == kHeads) return {&attention.output.weight};
  if (group == kGateUp) return {&ffn.gate.weight, &ffn.up.weight};
  return {&ffn.down.weight};
}

std::vector<Group> first_layers(Decoder& decoder, InputGroup group) {
  std::vector<Group> groups;
  size_t num_bytes = 0;
  const ColumnLayout layout{decoder.kernels.column_tile, kLeastColumnBytes, {true, true, true, true}};
  for (size_t i = 0; i < decoder.weights.layers.size() && num_bytes < kTrialBytes; ++i) {
    const std::vector<const Matrix*> rows = matrices_of(decoder, i, group);
    add_group(groups, rows, columns_of(rows, group, layout, decoder.threads));
    if (!groups.empty()) num_bytes += groups.back().columns.matrix.num_bytes();
  }
  return groups;
}

// Inputs of which about that share is not zero.
void draw_inputs(const Kernels& kernels, double share, ActivationBuffer& x) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  for (int i = 0; i < x.view.stride; ++i) x.view.values[i] = uniform(random) < share ? 0.5f + uniform(random) : 0.0f;
  kernels.quantize(x.view, x.view.stride, 1);
}

class Trial {
 public:
  Trial(Decoder& decoder, std::vector<Group> groups, double share) : decoder_(decoder), groups_(std::move(groups)) {
    int widest = 0;
    size_t most = 0;
    for (const Group& group : groups_) {
      widest = std::max(widest, group.rows.front()->cols);
      most = std::max(most, num_segment_sums(group.columns.matrix));
    }
    x_.resize(1, widest);
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
      for (size_t i = 0; i < group.rows.size(); ++i) {
        multiply_share(decoder_.kernels, {{group.rows[i], group.outs[i].get()}}, {x_.view, 1, 0}, 0, thread,
                       decoder_.threads);
        decoder_.threads.barrier(thread);
      }
  }

  void by_columns(int thread) {
    for (Group& group : groups_) {
      const ColumnMatrix& w = group.columns.matrix;
      add_columns(decoder_.kernels, w, x_.view, sums_.get(), thread, decoder_.threads);
      decoder_.threads.barrier(thread);
      for (size_t i = 0; i < group.rows.size(); ++i) {
        const Range blocks = coreinfer::share(group.rows[i]->num_blocks(), thread, decoder_.threads.size());
        const int first = group.columns.parts[i].first + blocks.begin * kBlockRows;
        const int count = (blocks.end - blocks.begin) * kBlockRows;
        if (count > 0)
          sum_segments(decoder_.kernels, w, sums_.get(), first, first + count,
                       group.outs[i].get() + blocks.begin * kBlockRows);
      }
      decoder_.threads.barrier(thread);
    }
  }

  Decoder& decoder_;
  std::vector<Group> groups_;
  ActivationBuffer x_;
  Buffer<float> sums_;
};

}  // namespace

std::array<double, kNumInputGroups> try_columns(Decoder& decoder, double share) {
  std::array<double, kNumInputGroups> gains{};
  for (int group = 0; group < kNumInputGroups; ++group) {
    std::vector<Group> groups = first_layers(decoder, static_cast<InputGroup>(group));
    if (!groups.empty()) gains[group] = Trial(decoder, std::move(groups), share).run();
  }
  return gains;
}

}  // namespace coreinfer
