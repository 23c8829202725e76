#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace coreinfer {

namespace {
constexpr int kPositionBlock = 16;
}

KvCache::KvCache(int num_layers, int num_kv_heads, int head_dim, int max_positions)
    : num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      value_stride_(round_up(head_dim, 16)),
      capacity_(round_up(max_positions, kPositionBlock)) {
  head_halves_ = size_t(capacity_) * (head_dim_ + value_stride_);
  num_bytes_ = size_t(num_layers) * num_kv_heads_ * head_halves_ * 2;
  void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint16_t*>(memory);
}

KvCache::~KvCache() { munmap(base_, num_bytes_); }

void KvCache::store(const Kernels& kernels, int layer, int head, int position, const float* key,
                    const float* value) const {
  uint16_t* lane = keys(layer, head) + size_t(position / kPositionBlock) * head_dim_ * kPositionBlock;
  lane += position % kPositionBlock;
  uint16_t halves[64];
  for (int start = 0; start < head_dim_; start += 64) {
    const int count = std::min(64, head_dim_ - start);
    kernels.to_half(key + start, count, halves);
    for (int i = 0; i < count; ++i) lane[size_t(start + i) * kPositionBlock] = halves[i];
  }
  kernels.to_half(value, head_dim_, values(layer, head) + size_t(position) * value_stride_);
}

Decoder::Decoder(ModelWeights model, const Kernels& table, int num_threads, int max_neurons)
    : weights(std::move(model)),
      kernels(table),
      cache(static_cast<int>(weights.layers.size()), weights.num_kv_heads, weights.head_dim, weights.max_positions),
      threads(num_threads) {
  if (weights.head.format == Format::int8_planes) deviations.resize(round_up(weights.vocab, kBlockRows));
  allocate(token, weights, max_neurons, num_threads);
  allocate(block, weights, max_neurons, num_threads);
}

void Decoder::forward(const int32_t* ids, int num_tokens, bool all_logits, bool screened, float* logits,
                      const Watcher& watcher) {
  if (num_tokens == 1 && !watcher) return decode_token(*this, ids[0], screened, logits);
  const size_t stride = round_up(weights.vocab, kBlockRows);
  for (int first = 0; first < num_tokens; first += kBlockTokens) {
    const int count = std::min(kBlockTokens, num_tokens - first);
    const bool last = first + count == num_tokens;
    float* out = all_logits ? logits + first * stride : last ? logits : nullptr;
    read_block(*this, ids + first, count, all_logits, screened, out, watcher);
  }
}

size_t Decoder::bytes_per_token(int num_tokens, bool screened) const {
  // What is scored again after screening is not counted.
  screened = screened && weights.head.format == Format::int8_planes;
  size_t total = (screened ? weights.head.screening_bytes() : weights.head.num_bytes()) +
                 weights.project_in.num_bytes() + weights.project_out.num_bytes();
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const AttentionWeights& attention = weights.layers[i].attention;
    for (const Linear* linear : {&attention.query, &attention.key, &attention.value, &attention.output})
      total += linear->weight.num_bytes();
    for (const Linear* linear : {&(*ffn)[i].gate, &(*ffn)[i].up, &(*ffn)[i].down}) total += linear->weight.num_bytes();
    const int seen = attention.window > 0 ? std::min(num_tokens, attention.window) : num_tokens;
    total += cache.bytes_per_token(1) * seen;
  }
  return total;
}

}  // namespace coreinfer
