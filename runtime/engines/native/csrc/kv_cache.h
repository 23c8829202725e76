// Keys and values of all sequences: pages of one pool, which sequences share where they begin alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace coreinfer {

// What a page keeps of kPageTokens positions, all layers: by layer and head first the keys, then the values.
class PageLayout {
 public:
  // `wide_layers`: of each layer, whether its keys and values are float; else they are fp16.
  PageLayout(const std::vector<bool>& wide_layers, int num_kv_heads, int head_dim);

  CachedHead head(int layer, int head) const;
  int value_stride() const { return value_stride_; }
  size_t num_bytes() const { return num_bytes_; }  // of a page
  size_t bytes_per_token(int layer) const { return token_bytes(wide_layers_[layer]); }
  // Write one token's key and value of one head into a sequence's pages.
  void store(const Kernels& kernels, uint8_t* const* pages, int layer, int head, int position, const float* key,
             const float* value) const;

 private:
  size_t token_bytes(bool wide) const;

  std::vector<bool> wide_layers_;
  std::vector<size_t> layer_starts_;
  int num_kv_heads_, head_dim_, value_stride_;
  size_t num_bytes_;
};

struct NoAddressSpace : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Pages that several sequences may hold at once. Address space is reserved for all of them, memory is taken when a page
// is first written; some of it is kept for the next who takes a page, the rest goes back to the system.
class PagePool {
 public:
  // Throws NoAddressSpace: the system does not give so much.
  PagePool(size_t page_bytes, int num_pages);

  int num_pages() const { return static_cast<int>(num_holders_.size()); }
  int num_free() const { return static_cast<int>(kept_.size() + empty_.size()); }
  // There must be a free page.
  uint8_t* take();
  void share(const uint8_t* page) { ++num_holders_[number_of(page)]; }
  bool is_shared(const uint8_t* page) const { return num_holders_[number_of(page)] > 1; }
  // One holder less; the last one's page is free.
  void release(uint8_t* page);
  // A page of one's own with the same content, in the place of one that was shared. There must be a free page.
  uint8_t* copy(uint8_t* page);

 private:
  size_t number_of(const uint8_t* page) const { return (page - base_.get()) / page_bytes_; }

  size_t page_bytes_;
  std::shared_ptr<uint8_t> base_;
  std::vector<int> num_holders_;           // of each page
  std::vector<uint8_t*> kept_, empty_;  // free pages, with memory and without
};

// One text: where its keys and values are, and how many there are.
struct Sequence {
  std::vector<uint8_t*> pages;  // page i has positions [i, i + 1) * kPageTokens
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
