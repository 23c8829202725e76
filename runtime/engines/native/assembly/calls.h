// What is asked of a decoder, by Python or by C: it is checked here, and nothing further in.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>

#include "decoder.h"
#include "gather.h"

namespace coreinfer {

// Another thread decodes, or did when this process was forked.
struct Busy : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One caller at a time; whoever comes meanwhile is told.
class Turn {
 public:
  // Throws Busy.
  std::unique_lock<std::mutex> take();

 private:
  std::mutex mutex_;
  std::atomic<uint32_t> num_forks_{0};  // when the mutex was last taken
};

// Each throws std::invalid_argument.
void check_sequence(const Decoder& decoder, int number);
// Also that an FFN is in use.
void check_ids(const Decoder& decoder, const int32_t* ids, size_t num_ids);
void check_room(const Decoder& decoder, int sequence, size_t num_tokens);
void check_ffn(const Decoder& decoder, const Ffn& ffn, int max_neurons);
// That neurons can be gathered from an FFN: of each layer some that it has, ascending, and of its experts all, none, or as many
// as of the others.
void check_neurons(const Ffn& ffn, const std::vector<NeuronIds>& neurons);

int most_neurons(const Ffn& ffn);

}  // namespace coreinfer
