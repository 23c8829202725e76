// Passes of the C API over the tokens of one sequence or several.
#include <string>

#include "failure.h"
#include "guarded.h"
#include "refusals.h"

static_assert(COREINFER_BLOCK_TOKENS == coreinfer::kBlockTokens);
static_assert(COREINFER_PAGE_TOKENS == coreinfer::kPageTokens);

namespace coreinfer {
namespace {

// Tokens of several sequences.
struct Rows {
  const int32_t *sequences, *ids;
  size_t count;
};

// Takes back what a pass that fails has appended.
class Appending {
 public:
  explicit Appending(Decoder& decoder) : decoder_(decoder) {
    for (const auto& sequence : decoder.sequences) lengths_.push_back(sequence ? sequence->num_cached : 0);
  }
  ~Appending() {
    if (is_done_) return;
    for (size_t number = 0; number < lengths_.size(); ++number)
      if (decoder_.has(static_cast<int>(number)))
        decoder_.truncate_sequence(static_cast<int>(number), lengths_[number]);
  }
  Appending(const Appending&) = delete;
  Appending& operator=(const Appending&) = delete;
  void done() { is_done_ = true; }

 private:
  Decoder& decoder_;
  std::vector<int> lengths_;
  bool is_done_ = false;
};

void check_block(const Decoder& decoder, const int32_t* ids, size_t num_ids, const char* name) {
  if (num_ids > 0) check_given(ids, name);
  check_ids(decoder, ids, num_ids);
}

// `counts`: tokens that come to each sequence besides the rows.
void check_rows(const Decoder& decoder, const Rows& rows, std::vector<size_t> counts) {
  if (rows.count > 0) check_given(rows.sequences, "sequences");
  for (size_t row = 0; row < rows.count; ++row) {
    check_sequence(decoder, rows.sequences[row]);
    ++counts[rows.sequences[row]];
  }
  check_block(decoder, rows.ids, rows.count, "ids");
  for (size_t number = 0; number < counts.size(); ++number)
    if (counts[number] > 0) check_room(decoder, static_cast<int>(number), counts[number]);
}

void read_rows(Decoder& decoder, const Rows& rows, bool screened, float* logits) {
  check_rows(decoder, rows, std::vector<size_t>(decoder.sequences.size()));
  check_given(logits, "logits");
  Appending appending(decoder);
  decoder.forward_rows(rows.sequences, rows.ids, static_cast<int>(rows.count), screened, logits);
  appending.done();
}

void read_beside(Decoder& decoder, int sequence, const coreinfer_ids& block, const Rows& rows, int flags,
                 float* logits) {
  check_sequence(decoder, sequence);
  check_block(decoder, block.ids, block.num_ids, "block_ids");
  if (block.num_ids < 2) refuse("block_ids", "at least two tokens", std::to_string(block.num_ids));
  std::vector<size_t> counts(decoder.sequences.size());
  counts[sequence] = block.num_ids;
  check_rows(decoder, rows, std::move(counts));
  check_given(logits, "logits");
  Appending appending(decoder);
  decoder.forward_beside(sequence, block.ids, static_cast<int>(block.num_ids), flags & COREINFER_LAST_LOGITS,
                         rows.sequences, rows.ids, static_cast<int>(rows.count), flags & COREINFER_SCREENED, logits);
  appending.done();
}

}  // namespace

float* own_logits(coreinfer_model& model) {
  if (!model.logits.get()) model.logits.resize(coreinfer_logits_stride(&model));
  return model.logits.get();
}

void read_tokens(coreinfer_model& model, int sequence, const int32_t* ids, size_t num_ids, const PassOptions& options,
                 float* logits) {
  Decoder& decoder = *model.decoder;
  check_sequence(decoder, sequence);
  check_block(decoder, ids, num_ids, "ids");
  check_room(decoder, sequence, num_ids);
  bool is_stopped = false;
  Watcher watch;
  if (options.watcher)
    watch = [&](const Watched& own) {
      const coreinfer_watched seen{own.layer, own.expert, own.num_tokens, own.stride, own.activations, own.weights};
      if (!is_stopped) is_stopped = options.watcher(options.user, &seen) != 0;
    };
  Appending appending(decoder);
  decoder.forward(sequence, ids, static_cast<int>(num_ids), options.all_logits, options.screened, logits, watch);
  if (is_stopped) throw Failure(COREINFER_STOPPED, "pass: the watcher ended it");
  appending.done();
}

}  // namespace coreinfer

using namespace coreinfer;

size_t coreinfer_logits_stride(const coreinfer_model* model) {
  return round_up(model->decoder->weights.vocab, kBlockRows);
}

int coreinfer_forward(coreinfer_model* model, int sequence, const int32_t* ids, size_t num_ids, int flags,
                      float* logits, coreinfer_watcher watcher, void* user) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_flags(flags, COREINFER_ALL_LOGITS | COREINFER_SCREENED);
    PassOptions options;
    options.all_logits = flags & COREINFER_ALL_LOGITS;
    options.screened = flags & COREINFER_SCREENED;
    options.watcher = watcher;
    options.user = user;
    if (options.all_logits) check_given(logits, "logits");
    read_tokens(own, sequence, ids, num_ids, options, logits ? logits : own_logits(own));
  });
}

int coreinfer_forward_rows(coreinfer_model* model, const int32_t* sequences, const int32_t* ids, size_t num_rows,
                           int flags, float* logits) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_flags(flags, COREINFER_SCREENED);
    read_rows(*own.decoder, {sequences, ids, num_rows}, flags & COREINFER_SCREENED, logits);
  });
}

int coreinfer_forward_beside(coreinfer_model* model, int sequence, const int32_t* block_ids, size_t num_block_ids,
                             const int32_t* sequences, const int32_t* ids, size_t num_rows, int flags, float* logits) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_flags(flags, COREINFER_LAST_LOGITS | COREINFER_SCREENED);
    read_beside(*own.decoder, sequence, {block_ids, num_block_ids}, {sequences, ids, num_rows}, flags, logits);
  });
}
