// Files that callers of the C API open themselves.
#pragma once

#include <memory>
#include <string>

#include "coreinfer_engine.h"
#include "model.h"
#include "tensor_file.h"

namespace coreinfer {

// Gives a file back when it is destroyed, once the call that the file came with has kept it.
class FileLease {
 public:
  FileLease() = default;
  ~FileLease() {
    if (release_) release_(owner_);
  }
  FileLease(const FileLease&) = delete;
  FileLease& operator=(const FileLease&) = delete;

  // The last step of a call, which must not fail after it.
  void keep(const coreinfer_file& file) {
    release_ = file.release;
    owner_ = file.owner;
  }

 private:
  void (*release_)(void* owner) = nullptr;
  void* owner_ = nullptr;
};

// `what`: the argument's name. Throws std::invalid_argument: it is no file in memory, or a damaged one.
TensorFile open_lent(const coreinfer_file* file, const char* what);

}  // namespace coreinfer
