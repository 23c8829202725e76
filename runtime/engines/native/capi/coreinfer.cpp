// The C API for one text: sequence 0 of what coreinfer_engine.h's functions work on.
#include "coreinfer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "failure.h"
#include "guarded.h"
#include "refusals.h"
#include "residency.h"

using namespace coreinfer;

namespace {

// What this library knows of a caller's options; a caller that was built with an earlier header gives the first fields only.
coreinfer_options known(const coreinfer_options* given) {
  coreinfer_options options = {};
  if (!given) return options;
  const size_t first = offsetof(coreinfer_options, memory_bytes);
  if (given->struct_bytes != sizeof options && given->struct_bytes != first)
    refuse("struct_bytes", std::to_string(first) + " or " + std::to_string(sizeof options),
           std::to_string(given->struct_bytes));
  std::memcpy(&options, given, given->struct_bytes);
  return options;
}

void check_context(const Decoder& decoder, size_t num_ids) {
  const int room = decoder.weights.max_positions - decoder.sequences[0]->num_cached;
  if (num_ids > static_cast<size_t>(room))
    throw Failure(COREINFER_NO_ROOM, "token ids: expected at most " + std::to_string(room) +
                                         " more in the context, got " + std::to_string(num_ids));
}

// Read tokens; returns logits, which lie in the model.
const float* feed(coreinfer_model& model, const int32_t* token_ids, size_t num_ids, bool screened) {
  if (num_ids > 0) check_given(token_ids, "token_ids");
  check_ids(*model.decoder, token_ids, num_ids);
  check_context(*model.decoder, num_ids);
  PassOptions options;
  options.screened = screened;
  float* logits = own_logits(model);
  read_tokens(model, 0, token_ids, num_ids, options, logits);
  return logits;
}

int32_t likeliest(const float* logits, int vocab) {
  int best = 0;
  for (int id = 0; id < vocab; ++id) {
    if (std::isnan(logits[id])) throw Failure(COREINFER_NOT_FINITE, "logits: expected finite numbers, got NaN");
    if (logits[id] > logits[best]) best = id;
  }
  if (!std::isfinite(logits[best]))
    throw Failure(COREINFER_NOT_FINITE, "logits: expected finite numbers, got infinity");
  return best;
}

}  // namespace

int coreinfer_open(const char* folder, const coreinfer_options* options, coreinfer_model** model) {
  const int status = guarded([&] {
    check_given(folder, "folder");
    check_given(model, "model");
    std::unique_ptr<coreinfer_model> opened = open_model(folder, known(options));
    use_ffn(*opened, pack_of(*opened, opened->bundle->has_dense() ? COREINFER_DENSE : 0), nullptr);
    *model = opened.release();
  });
  return status == COREINFER_NO_ADDRESS_SPACE ? COREINFER_MEMORY : status;
}

void coreinfer_close(coreinfer_model* model) { delete model; }

const char* coreinfer_last_error(void) { return last_failure(); }

int coreinfer_vocab_size(const coreinfer_model* model) { return model->decoder->weights.vocab; }

int coreinfer_num_clusters(const coreinfer_model* model) {
  return model->bundle ? static_cast<int>(model->bundle->clusters().size()) : 0;
}

const char* coreinfer_cluster_label(const coreinfer_model* model, int cluster) {
  if (cluster < 0 || cluster >= coreinfer_num_clusters(model)) return nullptr;
  return model->bundle->clusters()[cluster].label.c_str();
}

int coreinfer_has_dense(const coreinfer_model* model) { return model->bundle && model->bundle->has_dense(); }

int coreinfer_is_end(const coreinfer_model* model, int32_t token_id) {
  return model->bundle && model->bundle->is_end(token_id);
}

const char* coreinfer_isa(const coreinfer_model* model) { return model->decoder->kernels.name; }

int coreinfer_num_threads(const coreinfer_model* model) { return model->decoder->threads.size(); }

int coreinfer_use(coreinfer_model* model, int cluster) {
  return in_turn(model, [&](coreinfer_model& own) { use_ffn(own, pack_of(own, cluster), nullptr); });
}

int coreinfer_prepare(coreinfer_model* model, int cluster) {
  return in_turn(model, [&](coreinfer_model& own) {
    const coreinfer_ffn& pack = pack_of(own, cluster);
    if (own.decoder->residency) announce(*own.decoder->residency, pack.source, *pack.ffn);
  });
}

uint64_t coreinfer_bytes_read(const coreinfer_model* model) {
  coreinfer_reads reads = {};
  coreinfer_read_figures(model, &reads);
  return reads.layer_bytes + reads.table_bytes;
}

int coreinfer_feed(coreinfer_model* model, const int32_t* token_ids, size_t num_ids, float* logits) {
  return in_turn(model, [&](coreinfer_model& own) {
    const float* found = feed(own, token_ids, num_ids, false);
    if (logits) std::copy_n(found, own.decoder->weights.vocab, logits);
  });
}

int coreinfer_feed_greedy(coreinfer_model* model, const int32_t* token_ids, size_t num_ids, int32_t* next_id) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(next_id, "next_id");
    *next_id = likeliest(feed(own, token_ids, num_ids, true), own.decoder->weights.vocab);
  });
}

int coreinfer_num_tokens(const coreinfer_model* model) { return model->decoder->sequences[0]->num_cached; }

int coreinfer_max_tokens(const coreinfer_model* model) {
  return std::min(model->decoder->weights.max_positions, model->decoder->pool.num_pages() * kPageTokens);
}

int coreinfer_truncate(coreinfer_model* model, int num_tokens) {
  return in_turn(model, [&](coreinfer_model& own) {
    const int most = coreinfer_num_tokens(&own);
    if (num_tokens < 0 || num_tokens > most)
      refuse("num_tokens", "0 to " + std::to_string(most), std::to_string(num_tokens));
    own.decoder->truncate_sequence(0, num_tokens);
  });
}
