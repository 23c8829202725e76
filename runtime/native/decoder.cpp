#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace coreinfer {

namespace {
constexpr int kPositionBlock = 16;

KvCache cache_for(const ModelWeights& weights) {
  return KvCache(static_cast<int>(weights.layers.size()), weights.num_kv_heads, weights.head_dim,
                 weights.max_positions);
}

}  // namespace

KvCache::KvCache(int num_layers, int num_kv_heads, int head_dim, int max_positions)
    : num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      value_stride_(round_up(head_dim, 16)),
      capacity_(round_up(max_positions, kPositionBlock)) {
  head_halves_ = size_t(capacity_) * (head_dim_ + value_stride_);
  const size_t num_bytes = size_t(num_layers) * num_kv_heads_ * head_halves_ * 2;
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_.reset(static_cast<uint16_t*>(memory), [num_bytes](uint16_t* base) { munmap(base, num_bytes); });
}

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
      cache(cache_for(weights)),
      threads(num_threads) {
  sequences.push_back(std::make_unique<Sequence>(Sequence{cache}));
  if (weights.head.format == Format::int8_planes) deviations.resize(round_up(weights.vocab, kBlockRows));
  allocate(token, weights, max_neurons, num_threads);
  allocate(block, weights, max_neurons, num_threads, kernels.rounds_to_bf16);
}

int Decoder::add_sequence() {
  auto sequence = std::make_unique<Sequence>(Sequence{cache_for(weights)});
  const auto free = std::find(sequences.begin(), sequences.end(), nullptr);
  const int number = static_cast<int>(free - sequences.begin());
  if (free == sequences.end())
    sequences.push_back(std::move(sequence));
  else
    *free = std::move(sequence);
  return number;
}

void Decoder::drop_sequence(int number) {
  sequences[number].reset();
  cache = sequences[0]->cache;  // or the memory would be kept
}

void Decoder::forward(int number, const int32_t* ids, int num_tokens, bool all_logits, bool screened, float* logits,
                      const Watcher& watcher) {
  Sequence& sequence = *sequences[number];
  if (num_tokens == 1 && !watcher) {
    cache = sequence.cache;
    num_cached = sequence.num_cached;
    decode_token(*this, ids[0], screened, logits);
    sequence.num_cached = num_cached;
    return;
  }
  const size_t stride = round_up(weights.vocab, kBlockRows);
  std::vector<Row> rows;
  for (int first = 0; first < num_tokens; first += kBlockTokens) {
    const int count = std::min(kBlockTokens, num_tokens - first);
    const bool last = first + count == num_tokens;
    float* out = all_logits ? logits + first * stride : last ? logits : nullptr;
    rows.clear();
    for (int t = 0; t < count; ++t) rows.push_back({ids[first + t], sequence.num_cached + t, &sequence.cache});
    read_block(*this, rows, {false, all_logits, screened}, out, watcher);
    sequence.num_cached += count;
  }
}

void Decoder::forward_rows(const int32_t* numbers, const int32_t* ids, int num_rows, float* logits) {
  const size_t stride = round_up(weights.vocab, kBlockRows);
  std::vector<Row> rows;
  for (int first = 0; first < num_rows; first += kBlockTokens) {
    rows.clear();
    for (int row = first; row < std::min(first + kBlockTokens, num_rows); ++row) {
      Sequence& sequence = *sequences[numbers[row]];
      rows.push_back({ids[row], sequence.num_cached++, &sequence.cache});
    }
    read_block(*this, rows, {true, true, false}, logits + first * stride, nullptr);
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
