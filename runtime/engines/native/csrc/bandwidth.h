// How fast this machine's memory is read.
#pragma once

#include <cstddef>

namespace coreinfer {

// GB/s of a plain read of `num_bytes` by several threads, best of three passes.
double read_bandwidth(int num_threads, size_t num_bytes);

}  // namespace coreinfer
