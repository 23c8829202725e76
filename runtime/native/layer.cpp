// What one token goes through besides matrix products.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace coreinfer {

void multiply_share(const Kernels& kernels, std::initializer_list<Job> jobs, const Activations& x, int num_tokens,
                    size_t y_stride, int thread, Threads& threads) {
  int num_blocks = 0;
  for (const Job& job : jobs) num_blocks += job.weight->num_blocks();
  threads.deal(thread, num_blocks, [&](int part_begin, int part_end) {
    int first = 0;
    for (const Job& job : jobs) {
      const int count = job.weight->num_blocks();
      const int begin = std::max(part_begin - first, 0), end = std::min(part_end - first, count);
      if (begin < end) kernels.multiply(*job.weight, x, num_tokens, job.y, y_stride, begin, end);
      first += count;
    }
  });
}

void prefetch_share(const Matrix& w, int thread, int num_threads) {
  const int reserved = w.num_blocks() * 3 / 4 / num_threads;  // as Threads::deal deals
  if (reserved == 0) return;
  const size_t block_bytes =
      w.quantized() ? w.num_groups() * w.tile_bytes() : size_t(kBlockRows) * w.cols * sizeof(uint16_t);
  const char* start = w.quantized() ? reinterpret_cast<const char*>(w.codes) : reinterpret_cast<const char*>(w.bf16);
  start += size_t(thread) * reserved * block_bytes;
  const size_t size = std::min(kPrefetchBytes, reserved * block_bytes);
  for (size_t offset = 0; offset < size; offset += 64) __builtin_prefetch(start + offset);
}

void embed(const ModelWeights& weights, const Kernels& kernels, int32_t id, int position, const Activations& scratch,
           float* x) {
  if (weights.project_in.empty()) {
    unpack_row(weights.embedding, id, x);
  } else {
    std::fill(scratch.values, scratch.values + scratch.stride, 0.0f);
    unpack_row(weights.embedding, id, scratch.values);
    kernels.quantize(scratch, scratch.stride);
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

void prepare_inputs(const ModelWeights& weights, const Kernels& kernels, const Norm& norm, const float* x,
                    const Activations& out) {
  if (norm.present())
    apply_norm(weights, kernels, norm, x, weights.hidden, out.values);
  else
    std::memcpy(out.values, x, sizeof(float) * weights.hidden);
  const int padded = round_up(weights.hidden, kGroup);
  std::fill(out.values + weights.hidden, out.values + padded, 0.0f);
  kernels.quantize(out, padded);
}

void finish_sublayer(const ModelWeights& weights, const Kernels& kernels, const SublayerNorms& norms, const float* bias,
                     float* y, float* x) {
  if (bias) kernels.add(y, bias, weights.hidden);
  if (norms.output.present()) apply_norm(weights, kernels, norms.output, y, weights.hidden, y);
  kernels.add(x, y, weights.hidden);
  if (norms.after.present()) apply_norm(weights, kernels, norms.after, x, weights.hidden, x);
}

void prepare_heads(const ModelWeights& weights, const Kernels& kernels, const Linear& linear, const Norm& norm,
                   const float* angles, int num_heads, float* heads) {
  const int size = weights.head_dim, half = size / 2;
  if (linear.bias) kernels.add(heads, linear.bias, num_heads * size);
  for (int head = 0; head < num_heads; ++head, heads += size) {
    if (norm.present()) apply_norm(weights, kernels, norm, heads, size, heads);
    if (!angles) continue;
    for (int i = 0; i < half; ++i) {
      const float low = heads[i], high = heads[i + half];
      heads[i] = low * angles[i] - high * angles[half + i];
      heads[i + half] = high * angles[i] + low * angles[half + i];
    }
  }
}

void fill_angles(const ModelWeights& weights, int position, float* angles) {
  const int half = weights.head_dim / 2;
  for (const RotaryTable& table : weights.rotary) {
    for (int i = 0; i < half; ++i) {
      const float angle = table.inverse_frequencies[i] * static_cast<float>(position);
      angles[i] = std::cos(angle) * table.scale;
      angles[half + i] = std::sin(angle) * table.scale;
    }
    angles += weights.head_dim;
  }
}

const float* angles_of(const ModelWeights& weights, const AttentionWeights& attention, const float* angles) {
  return attention.rope < 0 ? nullptr : angles + attention.rope * weights.head_dim;
}

Range attention_share(const AttentionWeights& attention, int position, int thread, int num_threads) {
  const int first = first_position(attention, position), first_block = first / kBlockRows;
  const Range blocks = share(position / kBlockRows + 1 - first_block, thread, num_threads);
  return {std::max(first, (first_block + blocks.begin) * kBlockRows),
          std::min(position + 1, (first_block + blocks.end) * kBlockRows)};
}

void combine(const AttentionPart* parts, int num_parts, int num_heads, int head_dim, float* out) {
  const int stride = round_up(head_dim, 16);
  std::fill(out, out + num_heads * head_dim, 0.0f);
  for (int head = 0; head < num_heads; ++head, out += head_dim) {
    float maximum = -INFINITY, total = 0.0f;
    for (int p = 0; p < num_parts; ++p) maximum = std::max(maximum, parts[p].maxima[head]);
    for (int p = 0; p < num_parts; ++p)
      if (parts[p].sums[head] > 0.0f) total += parts[p].sums[head] * std::exp(parts[p].maxima[head] - maximum);
    for (int p = 0; p < num_parts; ++p) {
      if (parts[p].sums[head] == 0.0f) continue;
      const float weight = std::exp(parts[p].maxima[head] - maximum) / total;
      const float* values = parts[p].values + size_t(head) * stride;
      for (int i = 0; i < head_dim; ++i) out[i] += weight * values[i];
    }
  }
}

void finish_neurons(const ModelWeights& weights, const Kernels& kernels, const FfnWeights& ffn, int begin, int end,
                    float* gate, float* up, const Activations& out) {
  const int first = begin * kUnit, last = std::min(end * kUnit, ffn.num_neurons());
  if (ffn.up.bias) kernels.add(up, ffn.up.bias + first, last - first);
  if (ffn.gate.bias) kernels.add(gate, ffn.gate.bias + first, last - first);
  float* values = out.values + first;
  kernels.activate(weights.nonlinearity, ffn.gate.weight.empty() ? nullptr : gate, up, (end - begin) * kUnit, values);
  std::fill(out.values + last, out.values + end * kUnit, 0.0f);
  const int group = first / kGroup;
  kernels.quantize({out.stride, values, out.codes + first, out.scales + group, out.sums + group, out.energies + group},
                   (end - begin) * kUnit);
}

void ActivationBuffer::resize(int num_tokens, int size) {
  const int stride = round_up(size, kGroup);
  const size_t count = size_t(num_tokens) * stride;
  values_.resize(count);
  codes_.resize(count);
  scales_.resize(count / kGroup);
  sums_.resize(count / kGroup);
  energies_.resize(count / kGroup);
  view = {stride, values_.get(), codes_.get(), scales_.get(), sums_.get(), energies_.get()};
}

}  // namespace coreinfer
