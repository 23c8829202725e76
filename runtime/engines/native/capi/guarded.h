// How functions of the C API end: what is thrown in them becomes a status and a message.
#pragma once

#include <mutex>

#include "coreinfer_engine.h"
#include "model.h"

namespace coreinfer {

// Status of the exception that is being handled; its message is the calling thread's last error from now on.
int report_failure() noexcept;
const char* last_failure() noexcept;

template <class Work>
int guarded(Work work) noexcept {
  try {
    work();
    return COREINFER_OK;
  } catch (...) {
    return report_failure();
  }
}

// Each throws std::invalid_argument.
void check_given(const void* pointer, const char* name);
void check_flags(int flags, int known);

// What changes a model or decodes: one caller at a time.
template <class Work>
int in_turn(coreinfer_model* model, Work work) noexcept {
  return guarded([&] {
    check_given(model, "model");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    work(*model);
  });
}

}  // namespace coreinfer
