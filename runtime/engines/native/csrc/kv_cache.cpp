#include "kv_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace coreinfer {

namespace {
constexpr size_t kGranule = 4096;  // what the system gives and takes back
constexpr size_t kHugePage = 2 << 20;

size_t aligned(size_t num_bytes, size_t unit = kGranule) { return (num_bytes + unit - 1) / unit * unit; }

}  // namespace

PageLayout::PageLayout(const std::vector<bool>& wide_layers, int num_kv_heads, int head_dim)
    : wide_layers_(wide_layers),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      value_stride_(round_up(head_dim, kPositions)) {}

size_t PageLayout::num_bytes() const {
  size_t total = 0;
  for (int layer = 0; layer < num_layers(); ++layer) total += num_kv_heads_ * (key_bytes(layer) + value_bytes(layer));
  return total;
}

PagePool::PagePool(const PageLayout& page_layout, int num_pages, size_t kept_bytes)
    : layout(page_layout),
      page_bytes_(layout.num_bytes()),
      num_holders_(num_pages),
      kept_(num_pages),
      kept_bytes_(kept_bytes),
      num_free_(num_pages) {
  size_t start = 0;
  for (int layer = 0; layer < layout.num_layers(); ++layer)
    for (int head = 0; head < layout.num_kv_heads(); ++head) {
      places_.push_back({start, start + layout.key_bytes(layer)});
      start += layout.key_bytes(layer) + layout.value_bytes(layer);
    }
  const size_t num_bytes = aligned(page_bytes_ * num_pages, kHugePage) + kHugePage;
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw NoAddressSpace("KV cache: the system does not reserve " + std::to_string(num_bytes / 1000000) + " MB");
  const std::shared_ptr<uint8_t> whole(static_cast<uint8_t*>(memory),
                                       [num_bytes](uint8_t* base) { munmap(base, num_bytes); });
  base_ = {whole, reinterpret_cast<uint8_t*>(aligned(reinterpret_cast<size_t>(memory), kHugePage))};
#ifdef MADV_HUGEPAGE
  // A hint, which a system without huge pages refuses.
  madvise(base_.get(), num_bytes - kHugePage, MADV_HUGEPAGE);
#endif
}

CachedHead PagePool::head(int layer, int head) const {
  const Place& place = places_[size_t(layer) * layout.num_kv_heads() + head];
  return {base_.get() + place.keys, base_.get() + place.values, page_bytes_, layout.is_wide(layer)};
}

void PagePool::store(const Kernels& kernels, const int32_t* pages, int layer, int head, int position, const float* key,
                     const float* value) const {
  const int head_dim = layout.head_dim(), row = position % kPageTokens;
  const Place& place = places_[size_t(layer) * layout.num_kv_heads() + head];
  uint8_t* keys = page(pages[position / kPageTokens]) + place.keys;
  uint8_t* values = page(pages[position / kPageTokens]) + place.values;
  const size_t lane = size_t(row / kPositions) * head_dim * kPositions + row % kPositions;
  if (layout.is_wide(layer)) {
    float* lanes = reinterpret_cast<float*>(keys) + lane;
    for (int i = 0; i < head_dim; ++i) lanes[size_t(i) * kPositions] = key[i];
    std::copy_n(value, head_dim, reinterpret_cast<float*>(values) + size_t(row) * layout.value_stride());
    return;
  }
  uint16_t* lanes = reinterpret_cast<uint16_t*>(keys) + lane;
  uint16_t halves[64];
  for (int start = 0; start < head_dim; start += 64) {
    const int count = std::min(64, head_dim - start);
    kernels.to_half(key + start, count, halves);
    for (int i = 0; i < count; ++i) lanes[size_t(start + i) * kPositions] = halves[i];
  }
  kernels.to_half(value, head_dim, reinterpret_cast<uint16_t*>(values) + size_t(row) * layout.value_stride());
}

int32_t PagePool::take(int32_t before) {
  const int32_t next = before + 1;
  const bool is_free = next >= 0 && next < num_pages() && num_holders_[next] == 0;
  const int32_t page = is_free ? next : roomiest();
  num_holders_[page] = 1;
  --num_free_;
  num_kept_ -= kept_[page];
  kept_[page] = false;
  return page;
}

// The middle of the longest run of free pages, so that the sequence whose pages end before it has room to grow too.
int32_t PagePool::roomiest() const {
  int32_t first = 0, longest = 0;
  for (int32_t page = 0, length = 0; page < num_pages(); ++page) {
    length = num_holders_[page] ? 0 : length + 1;
    if (length > longest) longest = length, first = page + 1 - length;
  }
  return first ? first + longest / 2 : 0;
}

void PagePool::release(int32_t page) {
  if (--num_holders_[page] > 0) return;
  ++num_free_;
  if ((num_kept_ + 1) * layout.num_bytes() <= kept_bytes_) {
    kept_[page] = true;
    ++num_kept_;
    return;
  }
  give_back(page);
}

// Granules that other pages have parts of are given back with the last of these.
void PagePool::give_back(int32_t number) const {
  const auto all_empty = [&](size_t begin, size_t end) {
    const int32_t last = std::min<int32_t>((end - 1) / page_bytes_, num_pages() - 1);
    for (int32_t other = begin / page_bytes_; other <= last; ++other)
      if (!is_empty(other)) return false;
    return true;
  };
  size_t begin = number * page_bytes_ / kGranule * kGranule;
  size_t end = aligned((number + 1) * page_bytes_);
  if (!all_empty(begin, begin + kGranule)) begin += kGranule;
  if (begin < end && !all_empty(end - kGranule, end)) end -= kGranule;
  if (begin < end) madvise(base_.get() + begin, end - begin, MADV_DONTNEED);
}

int32_t PagePool::copy(int32_t source, int32_t before) {
  const int32_t own = take(before);
  std::memcpy(page(own), page(source), page_bytes_);
  return own;
}

namespace {

// The page before the one at `index`.
int32_t page_before(const std::vector<int32_t>& pages, size_t index) { return index ? pages[index - 1] : kNoPage; }

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
    const size_t index = sequence.num_cached / kPageTokens;
    int32_t& page = sequence.pages[index];
    const int32_t own = pool.copy(page, page_before(sequence.pages, index));
    pool.release(page);
    page = own;
  }
  const size_t num_pages = pages_of(sequence.num_cached + num_tokens);
  while (sequence.pages.size() < num_pages)
    sequence.pages.push_back(pool.take(page_before(sequence.pages, sequence.pages.size())));
}

void truncate(PagePool& pool, Sequence& sequence, int num_tokens) {
  sequence.num_cached = std::min(sequence.num_cached, num_tokens);
  const size_t num_pages = pages_of(sequence.num_cached);
  // The first ones first: their memory is kept, for the next sequence there.
  for (size_t index = num_pages; index < sequence.pages.size(); ++index) pool.release(sequence.pages[index]);
  sequence.pages.resize(std::min(num_pages, sequence.pages.size()));
}

Sequence fork(PagePool& pool, const Sequence& source, int num_tokens) {
  Sequence sequence{{source.pages.begin(), source.pages.begin() + num_tokens / kPageTokens}, num_tokens};
  for (const int32_t page : sequence.pages) pool.share(page);
  const size_t index = sequence.pages.size();
  if (pages_to_fork(num_tokens))
    sequence.pages.push_back(pool.copy(source.pages[index], page_before(sequence.pages, index)));
  return sequence;
}

}  // namespace coreinfer
