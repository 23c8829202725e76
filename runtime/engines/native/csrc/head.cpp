// The output head. For greedy decoding it may be screened: all tokens are scored by the high halves of the weights, and
// only those that could be the likeliest are scored again by the whole bytes.
#include <algorithm>
#include <cmath>

#include "decoder.h"
#include "layer.h"
#include "residency.h"

namespace coreinfer {
namespace {

// A token is scored again unless the likeliest is ahead of it by so many standard deviations of what screening leaves
// out. Over a vocabulary of 2^18 tokens a normal error beyond 8 has a probability of about 1e-10.
constexpr float kDeviations = 8.0f;

}  // namespace

void compute_head(Decoder& decoder, const Activations& x, int thread, bool screened, float* logits) {
  const Matrix& head = decoder.weights.head;
  const Kernels& kernels = decoder.kernels;
  if (!screened || head.format != Format::int8_planes) return multiply_head(decoder, {x, 1, 0}, logits, thread);

  PageWindow* window = decoder.residency ? decoder.residency->head_lows.get() : nullptr;
  float* deviations = decoder.deviations.get();
  decoder.threads.deal(thread, head.num_blocks(),
                       [&](int begin, int end) { kernels.screen(head, x, logits, deviations, begin, end); });
  decoder.threads.barrier(thread);
  // Every thread looks for the best by screening and scores its block, into memory of its own.
  const int best = kernels.largest(logits, head.rows) / kBlockRows;
  float exact[kBlockRows];
  if (window) window->touch(best);
  kernels.multiply(head, x, 1, exact - best * kBlockRows, 0, best, best + 1);
  const int num_rows = std::min(kBlockRows, head.rows - best * kBlockRows);
  const float least = exact[kernels.largest(exact, num_rows)];
  decoder.threads.barrier(thread);
  decoder.threads.deal(thread, head.num_blocks(), [&](int begin, int end) {
    for (int block = begin; block < end; ++block) {
      const float *scores = logits + block * kBlockRows, *spread = deviations + block * kBlockRows;
      bool possible = false;
      for (int row = 0; row < kBlockRows; ++row) possible |= !(scores[row] + kDeviations * spread[row] < least);
      if (possible && window) window->touch(block);
      if (possible) kernels.multiply(head, x, 1, logits, 0, block, block + 1);
    }
  });
}

void limit_logits(Decoder& decoder, int num_rows, int thread, float* logits) {
  const float most = decoder.weights.logit_limit;
  if (most == 0.0f) return;
  decoder.threads.barrier(thread);
  const size_t stride = round_up(decoder.weights.vocab, kBlockRows);
  const Range part = share(static_cast<int>(stride), thread, decoder.threads.size());
  for (int row = 0; row < num_rows; ++row)
    decoder.kernels.limit(logits + row * stride + part.begin, part.end - part.begin, most);
}

}  // namespace coreinfer
