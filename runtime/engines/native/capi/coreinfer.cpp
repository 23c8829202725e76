// The C API: exceptions become statuses here.
#include "coreinfer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "failure.h"
#include "model.h"
#include "refusals.h"
#include "residency.h"

using namespace coreinfer;

namespace {

thread_local std::string last_error;

int fail(int status, const char* message) {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Run `work`; what it throws becomes a status and a message.
template <class Work>
int guarded(Work work) {
  try {
    work();
    return COREINFER_OK;
  } catch (const Failure& error) {
    return fail(error.status, error.what());
  } catch (const Unsupported& error) {
    return fail(COREINFER_UNSUPPORTED, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(COREINFER_ARGUMENT, error.what());
  } catch (const PoolFull& error) {
    return fail(COREINFER_NO_ROOM, error.what());
  } catch (const NoAddressSpace& error) {
    return fail(COREINFER_MEMORY, error.what());
  } catch (const Busy& error) {
    return fail(COREINFER_BUSY, error.what());
  } catch (const std::bad_alloc&) {
    return fail(COREINFER_MEMORY, "memory: the system gives no more");
  } catch (const std::exception& error) {
    return fail(COREINFER_INTERNAL, error.what());
  } catch (...) {
    return fail(COREINFER_INTERNAL, "an unknown error");
  }
}

void check_given(const void* pointer, const char* name) {
  if (!pointer) refuse(name, "a pointer", "NULL");
}

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

void use(coreinfer_model& model, int cluster) {
  const coreinfer_model::Pack& pack = pack_of(model, cluster);
  model.decoder->ffn = pack.ffn;
  model.decoder->source = pack.source;
}

// Read tokens; logits lie in the model.
void feed(coreinfer_model& model, const int32_t* token_ids, size_t num_ids, bool screened) {
  Decoder& decoder = *model.decoder;
  if (num_ids > 0) check_given(token_ids, "token_ids");
  check_ids(decoder, token_ids, num_ids);
  const int room = decoder.weights.max_positions - decoder.sequences[0]->num_cached;
  if (num_ids > static_cast<size_t>(room))
    throw Failure(COREINFER_NO_ROOM, "token ids: expected at most " + std::to_string(room) +
                                         " more in the context, got " + std::to_string(num_ids));
  decoder.forward(0, token_ids, static_cast<int>(num_ids), false, screened, model.logits.get(), nullptr);
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
  return guarded([&] {
    check_given(folder, "folder");
    check_given(model, "model");
    std::unique_ptr<coreinfer_model> opened = open_model(folder, known(options));
    use(*opened, opened->bundle.has_dense() ? COREINFER_DENSE : 0);
    *model = opened.release();
  });
}

void coreinfer_close(coreinfer_model* model) { delete model; }

const char* coreinfer_last_error(void) { return last_error.c_str(); }

int coreinfer_vocab_size(const coreinfer_model* model) { return model->decoder->weights.vocab; }

int coreinfer_num_clusters(const coreinfer_model* model) { return static_cast<int>(model->bundle.clusters().size()); }

const char* coreinfer_cluster_label(const coreinfer_model* model, int cluster) {
  if (cluster < 0 || cluster >= coreinfer_num_clusters(model)) return nullptr;
  return model->bundle.clusters()[cluster].label.c_str();
}

int coreinfer_has_dense(const coreinfer_model* model) { return model->bundle.has_dense(); }

int coreinfer_is_end(const coreinfer_model* model, int32_t token_id) { return model->bundle.is_end(token_id); }

const char* coreinfer_isa(const coreinfer_model* model) { return model->decoder->kernels.name; }

int coreinfer_num_threads(const coreinfer_model* model) { return model->decoder->threads.size(); }

int coreinfer_use(coreinfer_model* model, int cluster) {
  return guarded([&] {
    check_given(model, "model");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    use(*model, cluster);
  });
}

int coreinfer_prepare(coreinfer_model* model, int cluster) {
  return guarded([&] {
    check_given(model, "model");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    const coreinfer_model::Pack& pack = pack_of(*model, cluster);
    if (model->decoder->residency) model->decoder->residency->store.announce(pack.source);
  });
}

uint64_t coreinfer_bytes_read(const coreinfer_model* model) {
  const Residency* residency = model->decoder->residency.get();
  return residency ? residency->store.figures().num_bytes + table_bytes_read(*residency) : 0;
}

int coreinfer_feed(coreinfer_model* model, const int32_t* token_ids, size_t num_ids, float* logits) {
  return guarded([&] {
    check_given(model, "model");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    feed(*model, token_ids, num_ids, false);
    if (logits) std::copy_n(model->logits.get(), model->decoder->weights.vocab, logits);
  });
}

int coreinfer_feed_greedy(coreinfer_model* model, const int32_t* token_ids, size_t num_ids, int32_t* next_id) {
  return guarded([&] {
    check_given(model, "model");
    check_given(next_id, "next_id");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    feed(*model, token_ids, num_ids, true);
    *next_id = likeliest(model->logits.get(), model->decoder->weights.vocab);
  });
}

int coreinfer_num_tokens(const coreinfer_model* model) { return model->decoder->sequences[0]->num_cached; }

int coreinfer_max_tokens(const coreinfer_model* model) {
  return std::min(model->decoder->weights.max_positions, model->decoder->pool.num_pages() * kPageTokens);
}

int coreinfer_truncate(coreinfer_model* model, int num_tokens) {
  return guarded([&] {
    check_given(model, "model");
    const std::unique_lock<std::mutex> lock = model->turn.take();
    const int most = coreinfer_num_tokens(model);
    if (num_tokens < 0 || num_tokens > most)
      refuse("num_tokens", "0 to " + std::to_string(most), std::to_string(num_tokens));
    model->decoder->truncate_sequence(0, num_tokens);
  });
}
