// Pages of the cache: taken, shared, copied, and given back to the system.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../runtime/engines/native/csrc/kv_cache.h"
#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"

using namespace coreinfer;

namespace {

bool follow_one_another(const Sequence& sequence) {
  for (size_t i = 1; i < sequence.pages.size(); ++i)
    if (sequence.pages[i] != sequence.pages[i - 1] + 1) return false;
  return true;
}

// Sequences that grow by turns keep their pages together, and no page is taken twice when the pool is full. A
// sequence alone gets the pages, and their memory, that the one before it had.
void test_sequences() {
  PagePool pool(PageLayout({false}, 1, 64), 64);
  Sequence sequences[4], all;
  for (int again = 0; again < 2; ++again) {
    extend(pool, all, 5 * kPageTokens);
    expect("pages: expected the first ones again", all.pages == std::vector<int32_t>{0, 1, 2, 3, 4});
    truncate(pool, all, 0);
  }
  for (int turn = 0; turn < 8; ++turn)
    for (Sequence& sequence : sequences) {
      extend(pool, sequence, kPageTokens);
      sequence.num_cached += kPageTokens;
    }
  for (const Sequence& sequence : sequences)
    expect("pages: expected those of a sequence side by side", follow_one_another(sequence));
  extend(pool, all, pool.num_free() * kPageTokens);
  std::vector<int32_t> pages = all.pages;
  for (const Sequence& sequence : sequences) pages.insert(pages.end(), sequence.pages.begin(), sequence.pages.end());
  std::sort(pages.begin(), pages.end());
  for (int page = 0; page < 64; ++page) expect("pages: expected each of them once", pages[page] == page);
}

// Pages that are given back to the system read as zeros; others keep what they hold, also where they share 4 KB.
void test_given_back() {
  for (int head_dim : {8, 64, 80}) {
    PagePool pool(PageLayout({false, true}, 2, head_dim), 9, 0);
    Sequence sequence;
    extend(pool, sequence, 9 * kPageTokens);
    Buffer<float> ones;
    ones.resize(head_dim);
    std::fill_n(ones.get(), head_dim, 1.0f);
    for (int position = 0; position < 9 * kPageTokens; ++position)
      for (int head = 0; head < 4; ++head)
        pool.store(portable_kernels(), sequence.pages.data(), head / 2, head % 2, position, ones.get(), ones.get());
    const auto count_ones = [&](int page) {
      const size_t size = size_t(kPageTokens) * head_dim;
      const CachedHead head = pool.head(1, 1);
      const char* start = static_cast<const char*>(head.keys) + page * head.page_bytes;
      const float* keys = reinterpret_cast<const float*>(start);
      return static_cast<size_t>(std::count(keys, keys + size, 1.0f));
    };
    const size_t size = size_t(kPageTokens) * head_dim;
    for (int page : {4, 0, 3, 7}) pool.release(page);
    for (int page : {1, 2, 5, 6, 8}) expect("given back: expected a held page to keep all", count_ones(page) == size);
    for (int page : {1, 2, 5, 6, 8}) pool.release(page);
    for (int page = 0; page < 9; ++page) expect("given back: expected no memory in a free page", count_ones(page) == 0);
  }
}

}  // namespace

void test_pages() {
  test_sequences();
  test_given_back();
}
