// Decode one token. Every thread keeps its own residual stream, so that norms need no barrier: five barriers a layer.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "column_pass.h"
#include "decoder.h"
#include "experts.h"
#include "layer.h"
#include "neurons.h"
#include "residency.h"
#include "streams.h"

namespace coreinfer {

void allocate(TokenScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads) {
  const int hidden = round_up(weights.hidden, kGroup);
  const int widest = std::max({hidden, weights.query_size(), weights.embedding.cols});
  const int value_stride = round_up(weights.head_dim, 16);
  scratch.threads.resize(num_threads);
  for (auto& own : scratch.threads) {
    own.residual.resize(hidden);
    own.queries.resize(round_up(weights.query_size(), kGroup));
    own.angles.resize(weights.rotary.size() * weights.head_dim);
    own.partial.resize(size_t(weights.num_heads) * value_stride);
    own.maxima.resize(weights.num_heads);
    own.sums.resize(weights.num_heads);
    own.inputs.resize(1, widest);
    if (weights.has_zero_neurons()) own.neuron_inputs.resize(weights.num_neuron_parts());
    scratch.parts.push_back({own.partial.get(), own.maxima.get(), own.sums.get()});
  }
  scratch.qkv.resize(round_up(weights.query_size(), kGroup) + 2 * round_up(weights.kv_size(), kGroup));
  scratch.attended.resize(hidden);
  scratch.gate.resize(round_up(max_neurons, kUnit));
  scratch.up.resize(round_up(max_neurons, kUnit));
  scratch.ffn_out.resize(hidden);
  scratch.neurons.resize(1, max_neurons);
  if (weights.has_zero_neurons())
    scratch.chunk_sums.resize(size_t(num_chunks(max_neurons)) * weights.num_neuron_parts() * kPartGroups * kGroup);
}

namespace {

class TokenPass {
 public:
  TokenPass(Decoder& decoder, const Row& row, int thread)
      : decoder_(decoder),
        row_(row),
        weights_(decoder.weights),
        kernels_(decoder.kernels),
        shared_(decoder.token),
        own_(decoder.token.threads[thread]),
        inputs_(decoder.inputs_in(own_.inputs)),
        neurons_(decoder.inputs_in(shared_.neurons)),
        x_(own_.residual.get()),
        thread_(thread),
        num_threads_(decoder.threads.size()),
        position_(row.position),
        streams_(decoder, thread, {&row, {inputs_, 1, 0}, x_, 0}, true),
        query_(shared_.qkv.get()),
        key_(query_ + round_up(weights_.query_size(), kGroup)),
        value_(key_ + round_up(weights_.kv_size(), kGroup)) {}

  void run(bool screened, float* logits) {
    for (ActiveNeurons& active : own_.active) active.num_found = active.num_asked = 0;
    own_.column_bytes = 0;
    embed(weights_, kernels_, row_.id, position_, inputs_.whole(), x_);
    fill_angles(weights_, position_, own_.angles.get());
    if (streams_.present()) streams_.enter();
    for (size_t layer = 0; layer < weights_.layers.size(); ++layer) {
      LentLayer neurons(decoder_, static_cast<int>(layer), thread_);
      attention(static_cast<int>(layer), {first_of(neurons.ahead())});
      ffn(static_cast<int>(layer), neurons.weights(), after_layer(layer));
    }
    if (streams_.present()) streams_.merge();
    const Activations last = inputs_.whole();
    prepare_inputs(weights_, kernels_, weights_.final_norm, x_, last);
    if (!weights_.project_out.empty()) project_out(last);
    if (screened) kernels_.measure(last, last.stride);
    compute_head(decoder_, {last, 1, 0}, thread_, screened, logits);
  }

 private:
  // One phase; `next` is what the phase after it reads first.
  void multiply(std::initializer_list<Job> jobs, const Activations& x, const Matrices& next) {
    multiply_share(kernels_, jobs, {x, 1, 0}, 0, thread_, decoder_.threads);
    prefetch_share(next, thread_, num_threads_);
    decoder_.threads.barrier(thread_);
  }

  static const Matrix* first_of(const FfnWeights& ffn) { return ffn.experts.empty() ? &ffn.first().weight : nullptr; }

  Matrices after_layer(size_t layer) const {
    if (layer + 1 == weights_.layers.size()) return {&weights_.head};
    const AttentionWeights& next = weights_.layers[layer + 1].attention;
    return {&next.query.weight, &next.key.weight, &next.value.weight};
  }

  void attention(int layer, const Matrices& next) {
    const Layer& weights = weights_.layers[layer];
    const AttentionWeights& attention = weights.attention;
    if (streams_.present()) streams_.predict(layer, 0);
    prepare_inputs(weights_, kernels_, weights.attention_norms.before, x_, inputs_,
                   decoder_.filter(layer, kQkv, attention.qkv_norms));
    if (streams_.present()) streams_.keep_normed(0);
    const Range positions = attention_share(attention, position_, thread_, num_threads_);
    if (const Columns* columns = columns_of(layer, kQkv)) {
      prefetch_cache(attention.cache, positions);
      multiply_columns(*columns, inputs_, {query_, key_, value_});
    } else {
      multiply_share(
          kernels_,
          {{&attention.query.weight, query_}, {&attention.key.weight, key_}, {&attention.value.weight, value_}},
          {inputs_, 1, 0}, 0, thread_, decoder_.threads);
      if (streams_.present()) streams_.enter_low(layer);
      prefetch_cache(attention.cache, positions);
      decoder_.threads.barrier(thread_);
    }
    const Rotation rotation = rotation_of(weights_, attention, own_.angles.get());
    // Nobody else reads the new token's key and value, but other layers, of which it is the same thread.
    if (attention.has_own_cache() && positions.begin <= position_ && position_ < positions.end)
      store(attention, rotation);
    attend(attention, rotation, positions);
    if (streams_.present()) streams_.prepare_low(layer, 0);
    prefetch_share({&attention.output.weight}, thread_, num_threads_);
    decoder_.threads.barrier(thread_);
    combine(attention, decoder_.filter(layer, kHeads, attention.heads_norms));
    if (streams_.present()) streams_.leave_low(layer);
    if (const Columns* columns = columns_of(layer, kHeads))
      multiply_columns(*columns, inputs_, {shared_.attended.get()});
    else
      multiply({{&attention.output.weight, shared_.attended.get()}}, inputs_, next);
    if (!weights_.parallel) finish_attention(weights);
    if (streams_.present()) streams_.join_low(layer, 0);
  }

  // In parallel blocks after the FFN has read the residual stream; its last barrier is before any thread's next attention.
  void finish_attention(const Layer& weights) {
    finish(weights.attention_norms, weights.attention.output.bias, shared_.attended.get());
  }

  // Ask for the thread's keys and values: pieces too short for the hardware to see them coming. `layer`: of the cache.
  void prefetch_cache(int layer, Range positions) const {
    if (positions.begin >= positions.end) return;
    const PagePool& pool = decoder_.pool;
    const int32_t page = row_.pages[positions.begin / kPageTokens];
    const int first = positions.begin % kPageTokens / kPositions * kPositions;
    const int begin = positions.begin / kPositions * kPositions;
    const size_t count = std::min(kPageTokens - first, positions.end - begin);
    const size_t most = kPrefetchBytes / weights_.num_kv_heads;
    const size_t key_bytes = pool.layout.key_bytes(layer) / kPageTokens;
    const size_t value_bytes = pool.layout.value_bytes(layer) / kPageTokens;
    for (int number = 0; number < weights_.num_kv_heads; ++number) {
      const CachedHead head = pool.head(layer, number);
      const char* keys = static_cast<const char*>(head.keys) + page * head.page_bytes;
      const char* values = static_cast<const char*>(head.values) + page * head.page_bytes;
      prefetch_bytes(keys + first * key_bytes, std::min(most, count * key_bytes));
      prefetch_bytes(values + first * value_bytes, std::min(most, count * value_bytes));
    }
  }

  void store(const AttentionWeights& attention, const Rotation& rotation) {
    prepare_heads(weights_, kernels_, attention.key, attention.key_norm, rotation, weights_.num_kv_heads, key_);
    prepare_values(weights_, kernels_, attention, value_);
    for (int head = 0; head < weights_.num_kv_heads; ++head)
      decoder_.pool.store(kernels_, row_.pages, attention.cache, head, position_, key_ + head * weights_.head_dim,
                          value_ + head * weights_.head_dim);
  }

  void attend(const AttentionWeights& attention, const Rotation& rotation, Range positions) {
    float* queries = own_.queries.get();
    std::memcpy(queries, query_, sizeof(float) * weights_.query_size());
    prepare_heads(weights_, kernels_, attention.query, attention.query_norm, rotation, weights_.num_heads, queries);
    for (int i = 0; i < weights_.query_size(); ++i) queries[i] *= weights_.attention_scale;
    const int group = weights_.group_size(), stride = decoder_.pool.layout.value_stride();
    for (int head = 0; head < weights_.num_kv_heads; ++head)
      kernels_.attend({row_.pages, decoder_.pool.head(attention.cache, head), weights_.head_dim, stride,
                       queries + head * group * weights_.head_dim, group, positions.begin, positions.end,
                       weights_.score_limit, own_.partial.get() + size_t(head) * group * stride,
                       own_.maxima.get() + head * group, own_.sums.get() + head * group});
  }

  // Put the threads' parts of the softmax together; every thread does it for itself.
  void combine(const AttentionWeights& attention, const Filter& filter) {
    const int size = weights_.query_size(), padded = round_up(size, kGroup);
    kernels_.combine(shared_.parts.data(), num_threads_, weights_.num_heads, weights_.head_dim, attention.sinks,
                     inputs_.values);
    std::fill(inputs_.values + size, inputs_.values + padded, 0.0f);
    keep_wanted(kernels_, filter, inputs_, 0, size);
    kernels_.quantize(inputs_, padded, 1);
  }

  void ffn(int layer, const FfnWeights& ffn, const Matrices& next) {
    const Layer& weights = weights_.layers[layer];
    prepare_inputs(weights_, kernels_, weights.ffn_norms.before, x_, inputs_,
                   decoder_.filter(layer, kGateUp, ffn.gate_up_norms));
    if (!ffn.experts.empty()) return mixture(layer, ffn, next);
    cutoffs_ = streams_.present() ? streams_.cutoffs(layer) : nullptr;
    if (ffn.by_neuron())
      active_neurons(ffn, next);
    else
      all_neurons(layer, ffn, next);
    if (weights_.parallel) finish_attention(weights);
    finish(weights.ffn_norms, ffn.down.bias, shared_.ffn_out.get());
    if (streams_.present()) streams_.leave(layer);
  }

  void all_neurons(int layer, const FfnWeights& ffn, const Matrices& next) {
    const Filter filter = decoder_.filter(layer, kDown, ffn.down_norms);
    if (const Columns* columns = columns_of(layer, kGateUp))
      neurons_by_columns(*columns, ffn, filter);
    else
      neurons_by_rows(ffn, filter);
    const Columns* columns = columns_of(layer, kDown);
    if (!columns) prefetch_share({&ffn.down.weight}, thread_, num_threads_);
    decoder_.threads.barrier(thread_);
    if (columns)
      multiply_columns(*columns, neurons_, {shared_.ffn_out.get()});
    else
      multiply({{&ffn.down.weight, shared_.ffn_out.get()}}, neurons_, next);
  }

  void neurons_by_rows(const FfnWeights& ffn, const Filter& filter) {
    const int num_blocks = ffn.up.weight.num_blocks();
    float *gate = shared_.gate.get(), *up = shared_.up.get();
    const auto work = [&](int first, int last) {
      const int begin = first * 2, end = std::min(last * 2, num_blocks);
      if (!ffn.gate.weight.empty()) kernels_.multiply(ffn.gate.weight, inputs_, 1, gate, 0, begin, end);
      kernels_.multiply(ffn.up.weight, inputs_, 1, up, 0, begin, end);
      finish_units(ffn, filter, first, last);
    };
    decoder_.threads.deal(thread_, num_units(ffn), work,
                          [&](int first) { prefetch_block(*first_of(ffn), first * 2, kPartPrefetchBytes); });
  }

  void neurons_by_columns(const Columns& columns, const FfnWeights& ffn, const Filter& filter) {
    add_columns(columns, inputs_);
    float *gate = shared_.gate.get(), *up = shared_.up.get();
    decoder_.threads.deal(thread_, num_units(ffn), [&](int first, int last) {
      const Range outputs = {first * kUnit, std::min(last * kUnit, round_up(ffn.num_neurons(), kBlockRows))};
      sum_part(columns, columns.parts.size() - 1, outputs, up);
      if (!ffn.gate.weight.empty()) sum_part(columns, 0, outputs, gate);
      finish_units(ffn, filter, first, last);
    });
  }

  static int num_units(const FfnWeights& ffn) { return (ffn.num_neurons() + kUnit - 1) / kUnit; }

  void finish_units(const FfnWeights& ffn, const Filter& filter, int first, int last) {
    finish_neurons(weights_, kernels_, ffn, first, last, shared_.gate.get() + first * kUnit,
                   shared_.up.get() + first * kUnit, {neurons_, 1, 0}, filter, cutoffs_);
  }

  // Null where the group's matrices are read by rows.
  const Columns* columns_of(int layer, InputGroup group) const {
    if (!decoder_.shares) return nullptr;
    const bool inside = group == kGateUp || group == kDown;
    const auto& layers = inside ? decoder_.shares->ffn : decoder_.shares->attention;
    if (!layers || (*layers)[layer][0][group % 2].empty()) return nullptr;
    return &(*layers)[layer][0][group % 2];
  }

  // All segments' sums, which all threads may use then.
  void add_columns(const Columns& columns, const Activations& x) {
    const ColumnProduct product{&columns.matrix, x, shared_.segment_sums.get()};
    own_.column_bytes += coreinfer::add_columns(kernels_, &product, 1, thread_, decoder_.threads);
    decoder_.threads.barrier(thread_);
  }

  void sum_part(const Columns& columns, size_t part, Range outputs, float* out) {
    const int first = columns.parts[part].first;
    sum_segments(kernels_, columns.matrix, shared_.segment_sums.get(), first + outputs.begin, first + outputs.end,
                 out + outputs.begin);
  }

  // One phase; `outs`: where each of the matrices' products go.
  void multiply_columns(const Columns& columns, const Activations& x, std::initializer_list<float*> outs) {
    add_columns(columns, x);
    size_t part = 0;
    for (float* out : outs) {
      const Range blocks = share((columns.parts[part].rows + kBlockRows - 1) / kBlockRows, thread_, num_threads_);
      if (blocks.begin < blocks.end) sum_part(columns, part, {blocks.begin * kBlockRows, blocks.end * kBlockRows}, out);
      ++part;
    }
    decoder_.threads.barrier(thread_);
  }

  // The gates of a chunk come before the active neurons of the chunk before it, so that those of this one can be asked for
  // meanwhile.
  void active_neurons(const FfnWeights& ffn, const Matrices& next) {
    const Linear& first = ffn.first();
    const int count = num_chunks(ffn.num_neurons()), size = num_sums(ffn.down.weight);
    interleave(inputs_, ffn.down.weight, own_.neuron_inputs);
    int waiting = -1, turn = 0;
    const auto run_waiting = [&] {
      if (waiting >= 0)
        run_active(weights_.neuron_function, kernels_, ffn, own_.neuron_inputs.view(), own_.active[1 - turn],
                   shared_.chunk_sums.get() + size_t(waiting) * size);
    };
    const auto work = [&](int begin, int end) {
      for (int chunk = begin; chunk < end; ++chunk) {
        const Range neurons = chunk_neurons(chunk, ffn.num_neurons());
        const int last_block = (neurons.end + kBlockRows - 1) / kBlockRows;
        kernels_.multiply(first.weight, inputs_, 1, shared_.gate.get(), 0, neurons.begin / kBlockRows, last_block);
        find_active(ffn, chunk, shared_.gate.get() + neurons.begin, first.bias, cutoffs_ ? cutoffs_[0] : 0.0f,
                    own_.active[turn]);
        run_waiting();
        waiting = chunk;
        turn = 1 - turn;
      }
    };
    decoder_.threads.deal(thread_, count, work, [&](int chunk) {
      prefetch_block(first.weight, chunk * (kChunkNeurons / kBlockRows), kPartPrefetchBytes);
    });
    run_waiting();
    decoder_.threads.barrier(thread_);
    add_chunks(count, size);
    prefetch_share(next, thread_, num_threads_);
    decoder_.threads.barrier(thread_);
  }

  // The thread's share of the outputs: all chunks' sums, in their order.
  void add_chunks(int count, int size) {
    const Range rows = share(size / kPartGroups, thread_, num_threads_);
    for (int row = rows.begin; row < rows.end; ++row) {
      float sums[kPartGroups] = {};
      const float* from = shared_.chunk_sums.get() + row * kPartGroups;
      for (int chunk = 0; chunk < count; ++chunk, from += size)
        for (int i = 0; i < kPartGroups; ++i) sums[i] += from[i];
      put_in_order(sums, row, row + 1, weights_.hidden, shared_.ffn_out.get());
    }
  }

  void mixture(int layer, const FfnWeights& ffn, const Matrices& next) {
    const Layer& weights = weights_.layers[layer];
    const LayerColumns* columns = decoder_.shares ? decoder_.shares->ffn.get() : nullptr;
    Mixture mixture(decoder_, layer, ffn, {inputs_, 1, 0}, thread_, columns);
    mixture.run(next);
    if (weights_.parallel) finish_attention(weights);
    mixture.sum(0, inputs_.values);
    finish_sublayer(weights_, kernels_, weights.ffn_norms, nullptr, inputs_.values, x_);
  }

  // The output is shared, so that it is copied before norms change it.
  void finish(const SublayerNorms& norms, const float* bias, const float* out) {
    std::memcpy(inputs_.values, out, sizeof(float) * weights_.hidden);
    finish_sublayer(weights_, kernels_, norms, bias, inputs_.values, x_);
  }

  void project_out(const Activations& inputs) {
    float* out = own_.residual.get();  // done with
    kernels_.multiply(weights_.project_out, inputs, 1, out, 0, 0, weights_.project_out.num_blocks());
    const int size = weights_.project_out.rows, padded = round_up(size, kGroup);
    std::memcpy(inputs.values, out, sizeof(float) * size);
    std::fill(inputs.values + size, inputs.values + padded, 0.0f);
    kernels_.quantize(inputs, padded, 1);
  }

  Decoder& decoder_;
  const Row& row_;
  const ModelWeights& weights_;
  const Kernels& kernels_;
  TokenScratch& shared_;
  TokenScratch::PerThread& own_;
  const Activations inputs_, neurons_;
  float* x_;
  int thread_, num_threads_, position_;
  StreamPass streams_;
  const float* cutoffs_ = nullptr;  // taken off the layer's gates; null where nothing is
  float *query_, *key_, *value_;
};

}  // namespace

void decode_token(Decoder& decoder, const Row& row, bool screened, float* logits) {
  LimitedPass limited(decoder, &row, 1, true);
  decoder.threads.run([&](int thread) { TokenPass(decoder, row, thread).run(screened, logits); });
  limited.finish();
}

}  // namespace coreinfer
