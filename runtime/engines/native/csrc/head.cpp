// The output head. For greedy decoding it may be screened: all tokens of the vocabulary are scored by the high halves of
// the weights, and only those that could be the likeliest are scored again by the whole bytes.
#include <algorithm>

#include "decoder.h"
#include "layer.h"
#include "residency.h"

namespace coreinfer {
namespace {

// A token is scored again unless the likeliest is ahead of it by so many standard deviations of what screening leaves
// out. Over a vocabulary of 2^18 tokens a normal error beyond 8 has a probability of about 1e-10.
constexpr float kDeviations = 8.0f;

class HeadScreen {
 public:
  HeadScreen(Decoder& decoder, const Batch& batch, float* logits)
      : head_(decoder.weights.head),
        kernels_(decoder.kernels),
        threads_(decoder.threads),
        window_(decoder.residency ? decoder.residency->head_lows.get() : nullptr),
        batch_(batch),
        out_{logits, size_t(round_up(head_.rows, kBlockRows)), decoder.screen.bounds.get(), size_t(head_.num_blocks()),
             kDeviations},
        least_(decoder.screen.least.get()) {}

  void run(int thread) {
    const Activations x = batch_.token(0);
    threads_.deal(thread, head_.num_blocks(),
                  [&](int begin, int end) { kernels_.screen(head_, x, batch_.num_tokens, out_, begin, end); });
    threads_.barrier(thread);
    for (int t = thread; t < batch_.num_tokens; t += threads_.size()) least_[t] = least_of(t);
    threads_.barrier(thread);
    threads_.deal(thread, head_.num_blocks(), [&](int begin, int end) {
      for (int t = 0; t < batch_.num_tokens; ++t) score_again(t, begin, end);
    });
  }

 private:
  // What the likeliest token has at least: the exact score of the best by screening, or of another in its block.
  float least_of(int t) {
    const int best = kernels_.largest(out_.token(t).scores, head_.rows) / kBlockRows;
    float exact[kBlockRows];
    if (window_) window_->touch(best);
    kernels_.multiply(head_, batch_.token(t), 1, exact - best * kBlockRows, 0, best, best + 1);
    return exact[kernels_.largest(exact, std::min(kBlockRows, head_.rows - best * kBlockRows))];
  }

  void score_again(int t, int begin, int end) {
    const Screened out = out_.token(t);
    for (int block = begin; block < end; ++block) {
      if (out.bounds[block] < least_[t]) continue;
      if (window_) window_->touch(block);
      kernels_.multiply(head_, batch_.token(t), 1, out.scores, 0, block, block + 1);
    }
  }

  const Matrix& head_;
  const Kernels& kernels_;
  Threads& threads_;
  PageWindow* window_;
  const Batch batch_;
  const Screened out_;
  float* least_;
};

// Limit the logits of `num_rows` tokens where the model does, when all threads have computed their share.
void limit_logits(Decoder& decoder, int num_rows, int thread, float* logits) {
  const float most = decoder.weights.logit_limit;
  if (most == 0.0f) return;
  decoder.threads.barrier(thread);
  const size_t stride = round_up(decoder.weights.vocab, kBlockRows);
  const Range part = share(static_cast<int>(stride), thread, decoder.threads.size());
  for (int row = 0; row < num_rows; ++row)
    decoder.kernels.limit(logits + row * stride + part.begin, part.end - part.begin, most);
}

}  // namespace

void allocate(HeadScratch& scratch, const Matrix& head) {
  if (head.format != Format::int8_planes) return;
  scratch.bounds.resize(size_t(kScreenRows) * head.num_blocks());
  scratch.least.resize(kScreenRows);
}

void compute_head(Decoder& decoder, const Batch& batch, int thread, bool screened, float* logits) {
  const bool screens = screened && decoder.weights.head.format == Format::int8_planes;
  if (screens && batch.num_tokens <= kScreenRows)
    HeadScreen(decoder, batch, logits).run(thread);
  else
    multiply_head(decoder, batch, logits, thread);
  limit_logits(decoder, batch.num_tokens, thread, logits);
}

}  // namespace coreinfer
