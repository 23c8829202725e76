// What one token goes through besides matrix products.
#include <algorithm>
#include <cstring>

#include "elementary.h"
#include "layer.h"
#include "scratch.h"

namespace coreinfer {

void multiply(const Kernels& kernels, const Matrix& w, const Batch& batch, float* y, size_t y_stride, int begin,
              int end) {
  const int num_fast = batch.num_fast();
  // Where all are rounded alike, they need not be told apart.
  const int num_first = batch.x.bf16 ? num_fast : batch.num_tokens;
  if (num_first > 0) kernels.multiply(w, batch.x, num_first, y, y_stride, begin, end);
  if (num_first < batch.num_tokens)
    kernels.multiply(w, batch.token(num_first), batch.num_exact, y + num_first * y_stride, y_stride, begin, end);
}

void multiply_share(const Kernels& kernels, std::initializer_list<Job> jobs, const Batch& batch, size_t y_stride,
                    int thread, Threads& threads) {
  int num_blocks = 0;
  for (const Job& job : jobs) num_blocks += job.weight->num_blocks();
  const auto work = [&](int part_begin, int part_end) {
    int first = 0;
    for (const Job& job : jobs) {
      const int count = job.weight->num_blocks();
      const int begin = std::max(part_begin - first, 0), end = std::min(part_end - first, count);
      if (begin < end) multiply(kernels, *job.weight, batch, job.y, y_stride, begin, end);
      first += count;
    }
  };
  threads.deal(thread, num_blocks, work, [&](int block) {
    for (const Job& job : jobs) {
      const int count = job.weight->num_blocks();
      if (block >= 0 && block < count) prefetch_block(*job.weight, block, kPartPrefetchBytes);
      block -= count;
    }
  });
}

void prefetch_block(const Matrix& w, int block, size_t num_bytes) {
  if (!w.quantized()) return prefetch_bytes(w.bf16 + size_t(block) * kBlockRows * w.cols, num_bytes);
  const size_t tile = size_t(block) * w.num_groups(), num_tiles = num_bytes / w.tile_bytes();
  prefetch_bytes(w.codes + tile * w.tile_bytes(), num_bytes);
  prefetch_bytes(w.scales + tile * kBlockRows, num_tiles * kBlockRows * sizeof(uint16_t));
  if (w.zeros) prefetch_bytes(w.zeros + tile * kBlockRows, num_tiles * kBlockRows);
}

void prefetch_share(const Matrices& matrices, int thread, int num_threads) {
  int num_blocks = 0;
  for (const Matrix* w : matrices) num_blocks += w ? w->num_blocks() : 0;
  int block = share(num_blocks, thread, num_threads).begin;
  for (const Matrix* w : matrices) {
    if (!w) break;
    if (block >= 0 && block < w->num_blocks()) prefetch_block(*w, block, kPrefetchBytes);
    block -= w->num_blocks();
  }
}

void embed(const ModelWeights& weights, const Kernels& kernels, int32_t id, int position, const Activations& scratch,
           float* x) {
  if (weights.project_in.empty()) {
    unpack_row(weights.embedding, id, x);
  } else {
    std::fill(scratch.values, scratch.values + scratch.stride, 0.0f);
    unpack_row(weights.embedding, id, scratch.values);
    kernels.quantize(scratch, scratch.stride, 1);
    kernels.multiply(weights.project_in, scratch, 1, x, 0, 0, weights.project_in.num_blocks());
  }
  if (weights.embedding_scale != 1.0f)
    for (int i = 0; i < weights.hidden; ++i) x[i] *= weights.embedding_scale;
  if (!weights.positions.empty()) {
    unpack_row(weights.positions, position + weights.position_offset, scratch.values);
    kernels.add(x, scratch.values, weights.hidden);
  }
}

void apply_norm(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x, int size,
                float* out) {
  if (weights.layer_norm)
    kernels.layer_norm(x, norm.weight, norm.bias, weights.epsilon, size, out);
  else
    kernels.rms_norm(x, norm.weight, weights.epsilon, size, out);
}

void keep_wanted(const Kernels& kernels, const Filter& filter, const Activations& x, int first, int count) {
  uint8_t* bits = x.bits ? x.bits + first : nullptr;
  if (!filter.wants_all())
    kernels.keep_wanted(x.values + first, filter.norms + first, filter.thresholds, count, bits);
  else if (bits)
    std::fill_n(bits, count, kAllBits);
}

void prepare_inputs(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x,
                    const Activations& out, const Filter& filter) {
  if (norm.present())
    apply_norm(weights, kernels, norm, x, weights.hidden, out.values);
  else
    std::memcpy(out.values, x, sizeof(float) * weights.hidden);
  keep_wanted(kernels, filter, out, 0, weights.hidden);
  const int padded = round_up(weights.hidden, kGroup);
  std::fill(out.values + weights.hidden, out.values + padded, 0.0f);
  kernels.quantize(out, padded, 1);
}

void finish_sublayer(const ModelWeights& weights, const Kernels& kernels, const SublayerNorms& norms, const float* bias,
                     float* y, float* x) {
  if (bias) kernels.add(y, bias, weights.hidden);
  if (norms.output.present()) apply_norm(weights, kernels, norms.output, y, weights.hidden, y);
  if (weights.residual_scale != 1.0f)
    for (int i = 0; i < weights.hidden; ++i) y[i] *= weights.residual_scale;
  kernels.add(x, y, weights.hidden);
  if (norms.after.present()) apply_norm(weights, kernels, norms.after, x, weights.hidden, x);
}

void prepare_heads(const ModelWeights& weights, const Kernels& kernels, const Linear& linear, const Norm& norm,
                   const Rotation& rotation, int num_heads, float* heads) {
  const int size = weights.head_dim;
  const bool norms_each = norm.present() && !weights.joint_head_norms;
  if (linear.bias) kernels.add(heads, linear.bias, num_heads * size);
  if (norm.present() && !norms_each) apply_norm(weights, kernels, norm, heads, num_heads * size, heads);
  for (int head = 0; head < num_heads; ++head, heads += size) {
    if (norms_each) apply_norm(weights, kernels, norm, heads, size, heads);
    if (rotation.angles) kernels.rotate(heads, rotation.angles, rotation.half);
  }
}

void prepare_values(const ModelWeights& weights, const Kernels& kernels, const AttentionWeights& attention,
                    float* values) {
  prepare_heads(weights, kernels, attention.value, attention.value_norm, {nullptr, 0}, weights.num_kv_heads, values);
}

Range attention_share(const AttentionWeights& attention, int position, int thread, int num_threads) {
  const int first = first_position(attention, position), first_block = first / kBlockRows;
  const int num_blocks = position / kBlockRows + 1 - first_block;
  // Rounded up: the thread that has the last positions also stores the new token, and has the fewest.
  const auto bound = [&](int t) {
    return (first_block + (num_blocks * t + num_threads - 1) / num_threads) * kBlockRows;
  };
  const int begin = std::max(first, bound(thread));
  return {begin, std::max(begin, std::min(position + 1, bound(thread + 1)))};
}

void fill_angles(const ModelWeights& weights, int position, float* angles) {
  for (const RotaryTable& table : weights.rotary) {
    const int half = table.half();
    for (int i = 0; i < half; ++i) {
      const Direction direction = direction_of(table.inverse_frequencies[i] * static_cast<float>(position));
      angles[i] = direction.cosine * table.scale;
      angles[half + i] = direction.sine * table.scale;
    }
    angles += weights.head_dim;
  }
}

Rotation rotation_of(const ModelWeights& weights, const AttentionWeights& attention, const float* angles) {
  if (attention.rope < 0) return {nullptr, 0};
  return {angles + attention.rope * weights.head_dim, weights.rotary[attention.rope].half()};
}

namespace {

void quantize(const Kernels& kernels, const Batch& batch, int first, int size) {
  const int num_first = batch.x.bf16 ? batch.num_fast() : batch.num_tokens;
  if (num_first > 0) kernels.quantize(batch.x.from(first), size, num_first);
  if (num_first < batch.num_tokens) kernels.quantize(batch.token(num_first).from(first), size, batch.num_exact);
}

// In this order of operands a NaN stays one.
void cut_off(float* gates, int size, float cutoff) {
  for (int i = 0; i < size; ++i) {
    const float rest = gates[i] - cutoff;
    gates[i] = rest <= 0.0f ? 0.0f : rest;
  }
}

}  // namespace

void finish_neurons(const ModelWeights& weights, const Kernels& kernels, const FfnWeights& ffn, int begin, int end,
                    float* gate, float* up, const Batch& out, const Filter& filter, const float* cutoffs) {
  const int num_tokens = out.num_tokens, first = begin * kUnit, size = (end - begin) * kUnit;
  const int last = std::min(end * kUnit, ffn.num_neurons());
  for (int t = 0; t < num_tokens; ++t) {
    if (ffn.up.bias) kernels.add(up + size_t(t) * size, ffn.up.bias + first, last - first);
    if (ffn.gate.bias) kernels.add(gate + size_t(t) * size, ffn.gate.bias + first, last - first);
    if (cutoffs) cut_off(gate + size_t(t) * size, last - first, cutoffs[t]);
  }
  kernels.activate(weights.neuron_function, ffn.gate.weight.empty() ? nullptr : gate, up, size, num_tokens,
                   out.x.values + first, out.x.stride);
  for (int t = 0; t < num_tokens; ++t) keep_wanted(kernels, filter.of(t), out.token(t), first, last - first);
  if (last < end * kUnit)
    for (int t = 0; t < num_tokens; ++t) std::fill(out.token(t).values + last, out.token(t).values + end * kUnit, 0.0f);
  quantize(kernels, out, first, size);
}

void ActivationBuffer::resize(int num_tokens, int size, bool bf16) {
  const int stride = round_up(size, kGroup);
  const size_t count = size_t(num_tokens > 1 ? num_tokens + kSpareTokens : 1) * stride;
  values_.resize(count);
  codes_.resize(count);
  scales_.resize(count / kGroup);
  sums_.resize(count / kGroup);
  energies_.resize(count / kGroup);
  bits_.resize(count);
  low_sums_.resize(count / kGroup);
  if (bf16)
    for (Buffer<uint16_t>* buffer : {&bf16_, &rests_}) buffer->resize(size_t(round_up(num_tokens, 32)) * stride);
  view = {stride, values_.get(), codes_.get(), scales_.get(), sums_.get(), energies_.get(), bf16_.get(), rests_.get()};
}

}  // namespace coreinfer
