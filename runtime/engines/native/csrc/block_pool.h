// Memory of limited size that files are read into, in blocks that are used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace coreinfer {

struct Block {
  uint8_t* memory = nullptr;
  size_t num_bytes = 0;
};

// Not for several threads at once.
class BlockPool {
 public:
  explicit BlockPool(size_t limit_bytes) : limit_(limit_bytes) {}
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  bool has_room(size_t num_bytes) const { return used_ + num_bytes <= limit_; }
  // One that was given back, of so many bytes or a few more; false if there is none.
  bool take_spare(size_t num_bytes, Block& block);
  // Memory that nobody had, for which there is room. False: the system gives none.
  bool take_new(size_t num_bytes, Block& block);
  void give_back(Block& block);
  // Let go of one that was given back; false if there is none.
  bool drop_spare();

  size_t limit() const { return limit_; }
  size_t used() const { return used_; }  // what was given back included

 private:
  const size_t limit_;
  size_t used_ = 0;
  std::vector<Block> spare_;
};

}  // namespace coreinfer
