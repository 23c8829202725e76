#include "kv_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace coreinfer {

namespace {
constexpr size_t kPageAlignment = 4096;    // so that pages can be given back one by one
constexpr size_t kKeptBytes = 256 << 20;  // of free pages, whose memory is not given back

size_t aligned(size_t num_bytes) { return (num_bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment; }

}  // namespace

PageLayout::PageLayout(const std::vector<bool>& wide_layers, int num_kv_heads, int head_dim)
    : wide_layers_(wide_layers),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      value_stride_(round_up(head_dim, kPositions)) {
  size_t start = 0;
  for (const bool wide : wide_layers) {
    layer_starts_.push_back(start);
    start += kPageTokens * token_bytes(wide);
  }
  num_bytes_ = aligned(start);
}

size_t PageLayout::token_bytes(bool wide) const {
  return size_t(num_kv_heads_) * (head_dim_ + value_stride_) * (wide ? sizeof(float) : sizeof(uint16_t));
}

CachedHead PageLayout::head(int layer, int head) const {
  const bool wide = wide_layers_[layer];
  const size_t keys = layer_starts_[layer] + head * (kPageTokens * token_bytes(wide) / num_kv_heads_);
  return {keys, keys + size_t(kPageTokens) * head_dim_ * (wide ? sizeof(float) : sizeof(uint16_t)), wide};
}

void PageLayout::store(const Kernels& kernels, uint8_t* const* pages, int layer, int number, int position,
                       const float* key, const float* value) const {
  const CachedHead head = this->head(layer, number);
  uint8_t* page = pages[position / kPageTokens];
  const int row = position % kPageTokens;
  const size_t lane = size_t(row / kPositions) * head_dim_ * kPositions + row % kPositions;
  if (head.wide) {
    float* lanes = reinterpret_cast<float*>(page + head.keys) + lane;
    for (int i = 0; i < head_dim_; ++i) lanes[size_t(i) * kPositions] = key[i];
    float* row_values = reinterpret_cast<float*>(page + head.values) + size_t(row) * value_stride_;
    std::copy_n(value, head_dim_, row_values);
    return;
  }
  uint16_t* lanes = reinterpret_cast<uint16_t*>(page + head.keys) + lane;
  uint16_t halves[64];
  for (int start = 0; start < head_dim_; start += 64) {
    const int count = std::min(64, head_dim_ - start);
    kernels.to_half(key + start, count, halves);
    for (int i = 0; i < count; ++i) lanes[size_t(start + i) * kPositions] = halves[i];
  }
  kernels.to_half(value, head_dim_, reinterpret_cast<uint16_t*>(page + head.values) + size_t(row) * value_stride_);
}

PagePool::PagePool(size_t page_bytes, int num_pages) : page_bytes_(page_bytes) {
  const size_t num_bytes = page_bytes * num_pages;
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw NoAddressSpace("KV cache: the system does not reserve " + std::to_string(num_bytes / 1000000) + " MB");
#ifdef MADV_HUGEPAGE
  // Pages of a sequence may lie anywhere: with pages of 4 KB attention to 2,048 tokens takes an eighth longer.
  madvise(memory, num_bytes, MADV_HUGEPAGE);
#endif
  base_.reset(static_cast<uint8_t*>(memory), [num_bytes](uint8_t* base) { munmap(base, num_bytes); });
  num_holders_.resize(num_pages);
  for (int page = num_pages - 1; page >= 0; --page) empty_.push_back(base_.get() + page * page_bytes);
}

uint8_t* PagePool::take() {
  std::vector<uint8_t*>& free = kept_.empty() ? empty_ : kept_;
  uint8_t* page = free.back();
  free.pop_back();
  num_holders_[number_of(page)] = 1;
  return page;
}

void PagePool::release(uint8_t* page) {
  if (--num_holders_[number_of(page)] > 0) return;
  if ((kept_.size() + 1) * page_bytes_ <= kKeptBytes) return kept_.push_back(page);
  madvise(page, page_bytes_, MADV_DONTNEED);
  empty_.push_back(page);
}

uint8_t* PagePool::copy(uint8_t* page) {
  uint8_t* own = take();
  std::memcpy(own, page, page_bytes_);
  return own;
}

namespace {

// Whether the next token would be written to a page that others read.
bool must_copy(const PagePool& pool, const Sequence& sequence) {
  return sequence.num_cached % kPageTokens && pool.is_shared(sequence.pages[sequence.num_cached / kPageTokens]);
}

}  // namespace

int pages_to_extend(const PagePool& pool, const Sequence& sequence, int num_tokens) {
  const int missing = pages_of(sequence.num_cached + num_tokens) - static_cast<int>(sequence.pages.size());
  return std::max(missing, 0) + must_copy(pool, sequence);
}

void extend(PagePool& pool, Sequence& sequence, int num_tokens) {
  if (must_copy(pool, sequence)) {
    uint8_t*& page = sequence.pages[sequence.num_cached / kPageTokens];
    uint8_t* own = pool.copy(page);
    pool.release(page);
    page = own;
  }
  const size_t num_pages = pages_of(sequence.num_cached + num_tokens);
  while (sequence.pages.size() < num_pages) sequence.pages.push_back(pool.take());
}

void truncate(PagePool& pool, Sequence& sequence, int num_tokens) {
  sequence.num_cached = std::min(sequence.num_cached, num_tokens);
  const size_t num_pages = pages_of(sequence.num_cached);
  for (; sequence.pages.size() > num_pages; sequence.pages.pop_back()) pool.release(sequence.pages.back());
}

Sequence fork(PagePool& pool, const Sequence& source, int num_tokens) {
  Sequence sequence{{source.pages.begin(), source.pages.begin() + num_tokens / kPageTokens}, num_tokens};
  for (const uint8_t* page : sequence.pages) pool.share(page);
  if (pages_to_fork(num_tokens)) sequence.pages.push_back(pool.copy(source.pages[num_tokens / kPageTokens]));
  return sequence;
}

}  // namespace coreinfer
