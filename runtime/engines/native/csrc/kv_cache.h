// Keys and values of all sequences: pages of one pool, which sequences share where they begin alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace coreinfer {

// How many bytes a page takes, which keeps kPageTokens positions of all layers.
class PageLayout {
 public:
  // `wide_layers`: of each layer, whether its keys and values are float; else they are fp16.
  PageLayout(const std::vector<bool>& wide_layers, int num_kv_heads, int head_dim);

  int num_layers() const { return static_cast<int>(wide_layers_.size()); }
  int num_kv_heads() const { return num_kv_heads_; }
  int head_dim() const { return head_dim_; }
  int value_stride() const { return value_stride_; }
  bool is_wide(int layer) const { return wide_layers_[layer]; }
  // Of one head's keys or values in a page.
  size_t key_bytes(int layer) const { return size_t(kPageTokens) * head_dim_ * number_bytes(layer); }
  size_t value_bytes(int layer) const { return size_t(kPageTokens) * value_stride_ * number_bytes(layer); }
  size_t num_bytes() const;  // of a page
  size_t bytes_per_token(int layer) const {
    return num_kv_heads_ * (key_bytes(layer) + value_bytes(layer)) / kPageTokens;
  }

 private:
  size_t number_bytes(int layer) const { return is_wide(layer) ? sizeof(float) : sizeof(uint16_t); }

  std::vector<bool> wide_layers_;
  int num_kv_heads_, head_dim_, value_stride_;
};

constexpr int32_t kNoPage = -2;  // not one before page 0 either

struct NoAddressSpace : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Pages that several sequences may hold at once. A page is one piece of memory: with heads' keys and values far apart, as
// one array of all pages for each head, a token's attention touched thousands of places of 4 kB, each of which the
// CPU has to look up. Address space is reserved for all pages, memory is taken when a page is first written; some of it
// is kept for the next who takes that page, the rest goes back to the system.
class PagePool {
 public:
  // `kept_bytes`: of free pages, whose memory is not given back.
  // Throws NoAddressSpace: the system does not give so much.
  PagePool(const PageLayout& layout, int num_pages, size_t kept_bytes = 256 << 20);

  CachedHead head(int layer, int head) const;
  // Write one token's key and value of one head into a sequence's pages.
  void store(const Kernels& kernels, const int32_t* pages, int layer, int head, int position, const float* key,
             const float* value) const;

  int num_pages() const { return static_cast<int>(num_holders_.size()); }
  int num_free() const { return num_free_; }
  // A free page, of which there must be one: page `before` + 1, or else one where there is room for pages after it.
  int32_t take(int32_t before = kNoPage);
  void share(int32_t page) { ++num_holders_[page]; }
  bool is_shared(int32_t page) const { return num_holders_[page] > 1; }
  // One holder less; the last one's page is free.
  void release(int32_t page);
  // `take`, and a page's content with it.
  int32_t copy(int32_t source, int32_t before);

  const PageLayout layout;

 private:
  uint8_t* page(int32_t number) const { return base_.get() + number * page_bytes_; }
  int32_t roomiest() const;
  bool is_empty(int32_t page) const { return num_holders_[page] == 0 && !kept_[page]; }
  void give_back(int32_t page) const;

  // Where a head's keys and values begin in a page.
  struct Place {
    size_t keys, values;
  };
  std::vector<Place> places_;  // by layer and head
  size_t page_bytes_;
  std::shared_ptr<uint8_t> base_;
  std::vector<int> num_holders_;  // of each page
  std::vector<bool> kept_;        // of each page, whether it is free and has memory
  size_t kept_bytes_;
  int num_free_, num_kept_ = 0;
};

// One text: where its keys and values are, and how many there are.
struct Sequence {
  std::vector<int32_t> pages;  // page i has positions [i, i + 1) * kPageTokens
  int num_cached = 0;
};

inline int pages_of(int num_tokens) { return (num_tokens + kPageTokens - 1) / kPageTokens; }
// Pages that must be free so that a sequence can be extended.
int pages_to_extend(const PagePool& pool, const Sequence& sequence, int num_tokens);
// Have pages of its own where the next tokens will be written.
void extend(PagePool& pool, Sequence& sequence, int num_tokens);
void truncate(PagePool& pool, Sequence& sequence, int num_tokens);
// Pages that must be free for a sequence that begins with so many tokens of another.
inline int pages_to_fork(int num_tokens) { return num_tokens % kPageTokens ? 1 : 0; }
// Whole pages are shared, the last one is copied where it is not full.
Sequence fork(PagePool& pool, const Sequence& source, int num_tokens);

}  // namespace coreinfer
