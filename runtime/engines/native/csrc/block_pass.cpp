// Read a block of tokens, of one sequence or of several: each weight is read once for all of them. Tokens or matrix rows
// are shared out, phase by phase.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "experts.h"
#include "layer.h"
#include "neurons.h"
#include "residency.h"
#include "streams.h"

namespace coreinfer {

void allocate(BlockScratch& scratch, const ModelWeights& weights, int max_neurons, int num_threads, bool bf16) {
  const int hidden = round_up(weights.hidden, kGroup);
  const int widest = std::max({hidden, weights.query_size(), weights.embedding.cols});
  const int value_stride = round_up(weights.head_dim, 16);
  scratch.threads.resize(num_threads);
  for (auto& own : scratch.threads) {
    own.gate.resize(size_t(kBlockTokens) * kUnit);
    own.up.resize(size_t(kBlockTokens) * kUnit);
    const size_t group = weights.group_size();
    own.heads.resize(num_threads * group * value_stride);
    own.maxima.resize(num_threads * group);
    own.sums.resize(num_threads * group);
    for (int part = 0; part < num_threads; ++part)
      own.parts.push_back({own.heads.get() + part * group * value_stride, own.maxima.get() + part * group,
                           own.sums.get() + part * group});
    own.inputs.resize(1, widest);
  }
  scratch.angles.resize(kBlockTokens * weights.rotary.size() * weights.head_dim);
  scratch.residual.resize(size_t(kBlockTokens) * hidden);
  scratch.sublayer_out.resize(size_t(kBlockTokens) * hidden);
  const int qkv = round_up(weights.query_size(), kGroup) + 2 * round_up(weights.kv_size(), kGroup);
  scratch.qkv.resize(size_t(kBlockTokens) * qkv);
  scratch.inputs.resize(kBlockTokens, widest, bf16);
  scratch.neurons.resize(kBlockTokens, max_neurons, bf16);
  if (weights.has_zero_neurons()) {
    const int num_parts = weights.num_neuron_parts(), size = num_parts * kPartGroups * kGroup;
    scratch.neuron_inputs.resize(kBlockTokens);
    for (NeuronInputBuffer& inputs : scratch.neuron_inputs) inputs.resize(num_parts);
    scratch.neuron_sums.resize(size_t(kBlockTokens) * size);
    for (auto& own : scratch.threads) own.chunk_sums.resize(size);
  }
}

namespace {

class BlockPass {
 public:
  BlockPass(Decoder& decoder, int thread, const std::vector<Row>& rows, const BlockOptions& options)
      : decoder_(decoder),
        rows_(rows),
        options_(options),
        weights_(decoder.weights),
        kernels_(decoder.kernels),
        shared_(decoder.block),
        own_(decoder.block.threads[thread]),
        thread_(thread),
        num_threads_(decoder.threads.size()),
        num_tokens_(static_cast<int>(rows.size())),
        num_fast_(num_tokens_ - options.num_exact),
        inputs_{decoder.inputs_in(shared_.inputs), num_tokens_, options.num_exact},
        neurons_{decoder.inputs_in(shared_.neurons), num_tokens_, options.num_exact},
        hidden_(round_up(weights_.hidden, kGroup)),
        streams_(decoder, thread, {rows.data(), inputs_, shared_.residual.get(), size_t(hidden_)}, false),
        key_(round_up(weights_.query_size(), kGroup)),
        value_(key_ + round_up(weights_.kv_size(), kGroup)),
        qkv_stride_(value_ + round_up(weights_.kv_size(), kGroup)) {}

  void run(float* logits, const Watcher& watcher) {
    const int num_layers = static_cast<int>(weights_.layers.size());
    own_tokens([&](int t) {
      embed(weights_, kernels_, rows_[t].id, rows_[t].position, own_.inputs.view, residual(t));
      fill_angles(weights_, rows_[t].position, angles(t));
    });
    if (streams_.present()) streams_.enter();
    for (int layer = 0; layer < num_layers; ++layer) {
      attention(layer);
      LentLayer neurons(decoder_, layer, thread_);
      ffn(layer, neurons.weights());
      if (watcher) {
        if (thread_ == 0) watch(layer, watcher);
        barrier();
      }
    }
    if (streams_.present()) streams_.merge();
    head(logits);
  }

 private:
  // Tokens are dealt out one by one, because later ones attend to more, and always alike: what follows on a token's own
  // numbers needs no barrier.
  template <class Work>
  void own_tokens(Work work) {
    for (int t = thread_; t < num_tokens_; t += num_threads_) work(t);
  }
  void barrier() { decoder_.threads.barrier(thread_); }

  void multiply_all(std::initializer_list<Job> jobs, const Batch& batch, size_t y_stride) {
    multiply_share(kernels_, jobs, batch, y_stride, thread_, decoder_.threads);
    barrier();
  }

  float* residual(int t) const { return shared_.residual.get() + size_t(t) * hidden_; }
  float* out(int t) const { return shared_.sublayer_out.get() + size_t(t) * hidden_; }
  float* angles(int t) const { return shared_.angles.get() + t * weights_.rotary.size() * weights_.head_dim; }
  float* qkv(int t) const { return shared_.qkv.get() + size_t(t) * qkv_stride_; }

  void normalize(const Norm& norm, int t, const Filter& filter) {
    prepare_inputs(weights_, kernels_, norm, residual(t), inputs_.token(t), filter);
  }

  void finish(const SublayerNorms& norms, const float* bias, int t) {
    finish_sublayer(weights_, kernels_, norms, bias, out(t), residual(t));
  }

  void attention(int layer) {
    const Layer& weights = weights_.layers[layer];
    const AttentionWeights& attention = weights.attention;
    const Filter filter = decoder_.filter(layer, kQkv, attention.qkv_norms);
    own_tokens([&](int t) {
      if (streams_.present()) streams_.predict(layer, t);
      normalize(weights.attention_norms.before, t, filter);
      if (streams_.present()) streams_.keep_normed(t);
    });
    barrier();
    if (streams_.present()) streams_.enter_low(layer);
    multiply_all({{&attention.query.weight, qkv(0)},
                  {&attention.key.weight, qkv(0) + key_},
                  {&attention.value.weight, qkv(0) + value_}},
                 inputs_, qkv_stride_);
    own_tokens([&](int t) {
      prepare(attention, t);
      if (streams_.present()) streams_.prepare_low(layer, t);
    });
    if (options_.related) barrier();
    own_tokens([&](int t) { attend(layer, attention, t); });
    barrier();
    if (streams_.present()) streams_.leave_low(layer);
    multiply_all({{&attention.output.weight, out(0)}}, inputs_, hidden_);
  }

  void prepare(const AttentionWeights& attention, int t) {
    float* heads = qkv(t);
    const Rotation rotation = rotation_of(weights_, attention, angles(t));
    prepare_heads(weights_, kernels_, attention.query, attention.query_norm, rotation, weights_.num_heads, heads);
    for (int i = 0; i < weights_.query_size(); ++i) heads[i] *= weights_.attention_scale;
    if (!attention.has_own_cache()) return;
    prepare_heads(weights_, kernels_, attention.key, attention.key_norm, rotation, weights_.num_kv_heads, heads + key_);
    prepare_values(weights_, kernels_, attention, heads + value_);
    for (int head = 0; head < weights_.num_kv_heads; ++head)
      decoder_.pool.store(kernels_, rows_[t].pages, attention.cache, head, rows_[t].position,
                          heads + key_ + head * weights_.head_dim, heads + value_ + head * weights_.head_dim);
  }

  void attend(int layer, const AttentionWeights& attention, int t) {
    const int group = weights_.group_size(), size = weights_.head_dim;
    const Activations inputs = inputs_.token(t);
    float* out = inputs.values;
    const int padded = round_up(weights_.query_size(), kGroup);
    std::fill(out + weights_.query_size(), out + padded, 0.0f);
    for (int head = 0; head < weights_.num_kv_heads; ++head, out += group * size) {
      if (t >= num_fast_)
        attend_in_parts(attention, t, head, out);
      else
        attend_at_once(attention, t, head, out);
    }
    keep_wanted(kernels_, decoder_.filter(layer, kHeads, attention.heads_norms), inputs, 0, weights_.query_size());
    kernels_.quantize(inputs, padded, 1);
  }

  // Part `part` of the scratch takes what the queries of one key-value head see of positions [begin, end).
  void attend_part(const AttentionWeights& attention, int t, int head, int part, int begin, int end) {
    const int group = weights_.group_size(), size = weights_.head_dim, stride = decoder_.pool.layout.value_stride();
    kernels_.attend({rows_[t].pages, decoder_.pool.head(attention.cache, head), size, stride,
                     qkv(t) + head * group * size, group, begin, end, weights_.score_limit,
                     own_.heads.get() + size_t(part) * group * stride, own_.maxima.get() + part * group,
                     own_.sums.get() + part * group});
  }

  void attend_at_once(const AttentionWeights& attention, int t, int head, float* out) {
    const int position = rows_[t].position, size = weights_.head_dim, stride = decoder_.pool.layout.value_stride();
    attend_part(attention, t, head, 0, first_position(attention, position), position + 1);
    if (attention.sinks) return combine_parts(attention, head, 1, out);
    for (int query = 0; query < weights_.group_size(); ++query, out += size)
      for (int i = 0; i < size; ++i) out[i] = own_.heads.get()[query * stride + i] / own_.sums.get()[query];
  }

  // As decode_token shares the positions out over its threads, so that floats are added up in the same order.
  void attend_in_parts(const AttentionWeights& attention, int t, int head, float* out) {
    for (int part = 0; part < num_threads_; ++part) {
      const Range positions = attention_share(attention, rows_[t].position, part, num_threads_);
      attend_part(attention, t, head, part, positions.begin, positions.end);
    }
    combine_parts(attention, head, num_threads_, out);
  }

  void combine_parts(const AttentionWeights& attention, int head, int num_parts, float* out) {
    const int group = weights_.group_size();
    const float* sinks = attention.sinks ? attention.sinks + head * group : nullptr;
    kernels_.combine(own_.parts.data(), num_parts, group, weights_.head_dim, sinks, out);
  }

  void ffn(int layer, const FfnWeights& ffn) {
    const Layer& weights = weights_.layers[layer];
    leave_attention(layer, decoder_.filter(layer, kGateUp, ffn.gate_up_norms));
    if (!ffn.experts.empty()) return mixture(layer, ffn);
    cutoffs_ = streams_.present() ? streams_.cutoffs(layer) : nullptr;
    if (ffn.by_neuron())
      active_neurons(ffn);
    else
      all_neurons(ffn, decoder_.filter(layer, kDown, ffn.down_norms));
    own_tokens([&](int t) { finish(weights.ffn_norms, ffn.down.bias, t); });
    if (streams_.present()) streams_.leave(layer);
  }

  // Add the attention's output to the residual stream; the FFN reads that before or after.
  void leave_attention(int layer, const Filter& filter) {
    const Layer& weights = weights_.layers[layer];
    own_tokens([&](int t) {
      if (weights_.parallel) normalize(weights.ffn_norms.before, t, filter);
      finish(weights.attention_norms, weights.attention.output.bias, t);
      if (streams_.present()) streams_.join_low(layer, t);
      if (!weights_.parallel) normalize(weights.ffn_norms.before, t, filter);
    });
    barrier();
  }

  void all_neurons(const FfnWeights& ffn, const Filter& filter) {
    decoder_.threads.deal(thread_, (ffn.num_neurons() + kUnit - 1) / kUnit, [&](int begin, int end) {
      for (int unit = begin; unit < end; unit += units_at_once())
        compute_units(ffn, unit, std::min(unit + units_at_once(), end), filter);
    });
    barrier();
    multiply_all({{&ffn.down.weight, out(0)}}, neurons_, hidden_);
  }

  // First all gates, then each thread its own tokens' active neurons, chunk by chunk: what several of them want is read from
  // memory once.
  void active_neurons(const FfnWeights& ffn) {
    decoder_.threads.deal(thread_, (ffn.num_neurons() + kUnit - 1) / kUnit, [&](int begin, int end) {
      for (int unit = begin; unit < end; ++unit) compute_gates(ffn, unit);
    });
    const int size = num_sums(ffn.down.weight);
    const auto sums = [&](int t) { return shared_.neuron_sums.get() + size_t(t) * size; };
    own_tokens([&](int t) {
      const Activations inputs = Batch::in_codes(inputs_.token(t));
      if (inputs_.token(t).bf16) kernels_.quantize(inputs, round_up(weights_.hidden, kGroup), 1);
      interleave(inputs, ffn.down.weight, shared_.neuron_inputs[t]);
      std::fill_n(sums(t), size, 0.0f);
    });
    barrier();
    for (int chunk = 0; chunk < num_chunks(ffn.num_neurons()); ++chunk)
      own_tokens([&](int t) {
        ActiveNeurons& active = own_.active;
        float* values = neurons_.token(t).values;
        find_active(ffn, chunk, values + chunk * kChunkNeurons, nullptr, 0.0f, active);
        run_active(weights_.neuron_function, kernels_, ffn, shared_.neuron_inputs[t].view(), active,
                   own_.chunk_sums.get());
        kernels_.add(sums(t), own_.chunk_sums.get(), size);
        for (int i = 0; i < active.count; ++i) values[active.ids[i]] = active.values[i];
      });
    own_tokens([&](int t) { put_in_order(sums(t), 0, size / kPartGroups, weights_.hidden, out(t)); });
    // Others look at the neurons, and give the layer's memory back.
    barrier();
  }

  // Gates of 32 neurons of all tokens, with what is not positive as zero.
  void compute_gates(const FfnWeights& ffn, int unit) {
    const Linear& first = ffn.first();
    const int begin = unit * 2, end = std::min(begin + 2, first.weight.num_blocks());
    const int offset = begin * kBlockRows, count = std::min(kUnit, ffn.num_neurons() - offset);
    float* gate = own_.gate.get();
    multiply(kernels_, first.weight, inputs_, gate - offset, kUnit, begin, end);
    for (int t = 0; t < num_tokens_; ++t, gate += kUnit) {
      float* values = neurons_.token(t).values + offset;
      for (int i = 0; i < count; ++i) {
        const float value = rest_of_gate(gate[i], first.bias, offset + i, cutoffs_ ? cutoffs_[t] : 0.0f);
        values[i] = value <= 0.0f ? 0.0f : value;
      }
    }
  }

  void mixture(int layer, const FfnWeights& ffn) {
    Mixture mixture(decoder_, layer, ffn, inputs_, thread_, nullptr);
    mixture.run({});
    own_tokens([&](int t) {
      mixture.sum(t, out(t));
      finish(weights_.layers[layer].ffn_norms, nullptr, t);
    });
  }

  // The neurons of the layer that was computed last.
  void watch(int layer, const Watcher& watcher) const {
    if (weights_.layers[layer].router.num_chosen > 0) return watch_experts(decoder_, layer, thread_, watcher);
    const Activations& neurons = shared_.neurons.view;
    watcher({layer, 0, neurons.values, num_tokens_, neurons.stride, nullptr});
  }

  // As many units as there is room for, but not so many that their numbers leave the cache.
  int units_at_once() const { return std::clamp(kBlockTokens / 2 / num_tokens_, 1, 8); }

  // Units of 32 neurons, of all tokens.
  void compute_units(const FfnWeights& ffn, int first, int last, const Filter& filter) {
    const int begin = first * 2, end = std::min(last * 2, ffn.up.weight.num_blocks()), size = (last - first) * kUnit;
    // The kernel writes at the rows' own numbers; these buffers begin with the first unit's first row.
    const int offset = begin * kBlockRows;
    float *gate = own_.gate.get(), *up = own_.up.get();
    if (!ffn.gate.weight.empty()) multiply(kernels_, ffn.gate.weight, inputs_, gate - offset, size, begin, end);
    multiply(kernels_, ffn.up.weight, inputs_, up - offset, size, begin, end);
    finish_neurons(weights_, kernels_, ffn, first, last, gate, up, neurons_, filter, cutoffs_);
  }

  void head(float* logits) {
    const int first = options_.all_logits ? 0 : options_.last_logits ? num_fast_ - 1 : num_fast_;
    if (first == num_tokens_) return;
    const bool screened = options_.screened && !options_.all_logits;
    // Single tokens, and what is projected first, are multiplied in codes.
    const int num_fast = options_.all_logits && weights_.project_out.empty() ? num_fast_ : 0;
    const Batch all{inputs_.x.whole(), num_tokens_, num_tokens_ - num_fast};
    own_tokens([&](int t) {
      if (t < first) return;
      const Activations inputs = all.token(t);
      prepare_inputs(weights_, kernels_, weights_.final_norm, residual(t), inputs);
      if (!weights_.project_out.empty()) project_out(inputs);
      if (screened) kernels_.measure(inputs, inputs.stride);
    });
    barrier();
    const int count = num_tokens_ - first;
    const Batch batch{num_fast ? all.x : all.token(first), count, count - num_fast};
    compute_head(decoder_, batch, thread_, screened, logits);
  }

  void project_out(const Activations& inputs) {
    float* out = own_.inputs.view.values;
    kernels_.multiply(weights_.project_out, inputs, 1, out, 0, 0, weights_.project_out.num_blocks());
    const int size = weights_.project_out.rows, padded = round_up(size, kGroup);
    std::memcpy(inputs.values, out, sizeof(float) * size);
    std::fill(inputs.values + size, inputs.values + padded, 0.0f);
    kernels_.quantize(inputs, padded, 1);
  }

  Decoder& decoder_;
  const std::vector<Row>& rows_;
  const BlockOptions& options_;
  const ModelWeights& weights_;
  const Kernels& kernels_;
  BlockScratch& shared_;
  BlockScratch::PerThread& own_;
  int thread_, num_threads_, num_tokens_, num_fast_;
  const Batch inputs_, neurons_;
  int hidden_;
  StreamPass streams_;
  const float* cutoffs_ = nullptr;  // of each token, taken off the layer's gates; null where nothing is
  int key_, value_, qkv_stride_;
};

}  // namespace

void read_block(Decoder& decoder, const std::vector<Row>& rows, const BlockOptions& options, float* logits,
                const Watcher& watcher) {
  LimitedPass limited(decoder, rows.data(), rows.size(), options.num_exact > 0);
  decoder.threads.run([&](int thread) { BlockPass(decoder, thread, rows, options).run(logits, watcher); });
  limited.finish();
}

}  // namespace coreinfer
