#include "block_pool.h"

#include <sys/mman.h>

#include "direct_file.h"

namespace coreinfer {
namespace {

// Memory that begins with a huge page: computing looks every address up once a token.
uint8_t* map_memory(size_t num_bytes) {
  void* mapped = mmap(nullptr, num_bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* start = static_cast<uint8_t*>(mapped);
  const size_t before = -reinterpret_cast<uintptr_t>(start) % kHugePage;
  uint8_t* memory = start + before;
  if (before) munmap(start, before);
  munmap(memory + num_bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(memory, num_bytes, MADV_HUGEPAGE);
#endif
  // Where it is not allowed, the memory is as resident as any other.
  mlock(memory, num_bytes);
  return memory;
}

}  // namespace

BlockPool::~BlockPool() {
  while (drop_spare()) {
  }
}

bool BlockPool::take_spare(size_t num_bytes, Block& block) {
  for (auto spare = spare_.begin(); spare != spare_.end(); ++spare)
    if (spare->num_bytes >= num_bytes && spare->num_bytes <= num_bytes + num_bytes / 8) {
      block = *spare;
      spare_.erase(spare);
      return true;
    }
  return false;
}

bool BlockPool::take_new(size_t num_bytes, Block& block) {
  block = {map_memory(num_bytes), num_bytes};
  if (!block.memory) return false;
  used_ += num_bytes;
  return true;
}

void BlockPool::give_back(Block& block) {
  if (block.memory) spare_.push_back(block);
  block = {};
}

bool BlockPool::drop_spare() {
  if (spare_.empty()) return false;
  munmap(spare_.back().memory, spare_.back().num_bytes);
  used_ -= spare_.back().num_bytes;
  spare_.pop_back();
  return true;
}

}  // namespace coreinfer
