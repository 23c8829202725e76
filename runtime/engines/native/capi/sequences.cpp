// Sequences of the C API, and the pages that they share.
#include <string>

#include "guarded.h"
#include "refusals.h"

using namespace coreinfer;

int coreinfer_add_sequence(coreinfer_model* model, int* sequence) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(sequence, "sequence");
    *sequence = own.decoder->add_sequence();
  });
}

int coreinfer_fork_sequence(coreinfer_model* model, int source, int num_tokens, int* sequence) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(sequence, "sequence");
    check_sequence(*own.decoder, source);
    const int most = own.decoder->sequences[source]->num_cached;
    if (num_tokens < 0 || num_tokens > most)
      refuse("num_tokens", "0 to " + std::to_string(most) + " of the sequence", std::to_string(num_tokens));
    *sequence = own.decoder->fork_sequence(source, num_tokens);
  });
}

int coreinfer_drop_sequence(coreinfer_model* model, int sequence) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_sequence(*own.decoder, sequence);
    if (sequence == 0) refuse("sequence", "another than 0, which stays", "0");
    own.decoder->drop_sequence(sequence);
  });
}

int coreinfer_truncate_sequence(coreinfer_model* model, int sequence, int num_tokens) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_sequence(*own.decoder, sequence);
    if (num_tokens < 0) refuse("num_tokens", "at least 0", std::to_string(num_tokens));
    own.decoder->truncate_sequence(sequence, num_tokens);
  });
}

int coreinfer_num_cached(const coreinfer_model* model, int sequence, int* num_tokens) {
  return guarded([&] {
    check_given(model, "model");
    check_given(num_tokens, "num_tokens");
    check_sequence(*model->decoder, sequence);
    *num_tokens = model->decoder->sequences[sequence]->num_cached;
  });
}

int coreinfer_num_pages(const coreinfer_model* model) { return model->decoder->pool.num_pages(); }

int coreinfer_num_free_pages(const coreinfer_model* model) { return model->decoder->pool.num_free(); }

size_t coreinfer_page_bytes(const coreinfer_model* model) { return model->decoder->pool.layout.num_bytes(); }
