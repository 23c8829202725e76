// The C API: exceptions become statuses here.
#include "coreinfer.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <thread>

#include "assembly.h"
#include "bundle_folder.h"
#include "calls.h"
#include "failure.h"
#include "refusals.h"

using namespace coreinfer;

// Members are freed in the opposite order: the decoder first, what it reads last.
struct coreinfer_model {
  struct Pack {
    std::shared_ptr<MappedTensors> file;
    std::shared_ptr<const Ffn> ffn;
  };

  BundleFolder bundle;
  std::shared_ptr<MappedTensors> base;
  Memory memory;
  std::map<int, Pack> packs;  // COREINFER_DENSE among them
  std::unique_ptr<Decoder> decoder;
  Buffer<float> logits;  // (padded vocabulary)
  Turn turn;
};

namespace {

constexpr int kMostThreads = 256;
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

// Run `work`, in which what is refused is the bundle's fault.
template <class Work>
auto in_bundle(const std::string& folder, Work work) {
  try {
    return work();
  } catch (const Unsupported&) {
    throw;
  } catch (const std::invalid_argument& error) {
    throw Failure(COREINFER_CORRUPT, "bundle " + folder + ": " + error.what() + "; copy or compile it again");
  }
}

void check_given(const void* pointer, const char* name) {
  if (!pointer) refuse(name, "a pointer", "NULL");
}

// Physical cores that the process may run on. A second thread on a core adds no memory bandwidth.
int num_cores() {
#ifdef __linux__
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &cpus)) continue;
      std::string siblings = std::to_string(cpu);
      std::ifstream file("/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list");
      std::getline(file, siblings);
      cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
    }
    return std::clamp(static_cast<int>(cores.size()), 1, kMostThreads);
  }
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
}

coreinfer_options checked(const coreinfer_options* given) {
  coreinfer_options options = {};
  if (given) {
    if (given->struct_bytes != sizeof options)
      refuse("struct_bytes", std::to_string(sizeof options), std::to_string(given->struct_bytes));
    options = *given;
  }
  if (options.num_threads < 0 || options.num_threads > kMostThreads)
    refuse("num_threads", "1 to " + std::to_string(kMostThreads) + ", or 0", std::to_string(options.num_threads));
  if (options.num_threads == 0) options.num_threads = num_cores();
  if (!options.isa) options.isa = "auto";
  return options;
}

int count_pages(const ModelWeights& weights, uint64_t kv_cache_bytes) {
  const int whole = pages_of(weights.max_positions);
  const uint64_t page_bytes = layout_for(weights).num_bytes();
  if (kv_cache_bytes == 0) return whole;
  if (kv_cache_bytes < page_bytes)
    refuse("kv_cache_bytes", "at least " + std::to_string(page_bytes), std::to_string(kv_cache_bytes));
  return static_cast<int>(std::min<uint64_t>(whole, kv_cache_bytes / page_bytes));
}

coreinfer_model::Pack load_pack(const coreinfer_model& model, int cluster) {
  const BundleFolder& bundle = model.bundle;
  const ModelRecord& record = bundle.model();
  coreinfer_model::Pack pack;
  if (record.num_experts > 0) {
    const auto all = model.packs.find(COREINFER_DENSE);
    if (all != model.packs.end()) {
      pack = all->second;
    } else {
      pack.file = bundle.dense();
      pack.ffn = std::make_shared<const Ffn>(assemble_experts(record, pack.file->tensors));
    }
    if (cluster != COREINFER_DENSE)
      pack.ffn = std::make_shared<const Ffn>(keep_experts(*pack.ffn, bundle.experts(cluster)));
    return pack;
  }
  pack.file = cluster == COREINFER_DENSE ? bundle.dense() : bundle.pack(cluster);
  const std::vector<int> all(record.num_layers, record.ffn_dim);
  const std::vector<int>& counts = cluster == COREINFER_DENSE ? all : bundle.clusters()[cluster].num_neurons;
  pack.ffn = std::make_shared<const Ffn>(assemble_ffn(record, pack.file->tensors, counts));
  return pack;
}

void use(coreinfer_model& model, int cluster) {
  const BundleFolder& bundle = model.bundle;
  const int num_clusters = static_cast<int>(bundle.clusters().size());
  if (cluster < COREINFER_DENSE || cluster >= num_clusters)
    throw Failure(COREINFER_NOT_FOUND, "cluster: expected 0 to " + std::to_string(num_clusters - 1) +
                                           " or COREINFER_DENSE, got " + std::to_string(cluster));
  if (!model.packs.count(cluster))
    model.packs.emplace(cluster, in_bundle(bundle.folder(), [&] {
                          coreinfer_model::Pack pack = load_pack(model, cluster);
                          check_ffn(*model.decoder, *pack.ffn, bundle.model().ffn_neurons());
                          return pack;
                        }));
  model.decoder->ffn = model.packs.at(cluster).ffn;
}

std::unique_ptr<coreinfer_model> open_model(const std::string& folder, const coreinfer_options& options) {
  const Kernels& kernels = find_kernels(options.isa);
  std::unique_ptr<coreinfer_model> model = in_bundle(folder, [&] {
    return std::unique_ptr<coreinfer_model>(
        new coreinfer_model{{folder, !options.skip_checksums}, {}, {}, {}, {}, {}, {}});
  });
  const ModelRecord& record = model->bundle.model();
  ModelWeights weights = in_bundle(folder, [&] {
    model->base = model->bundle.base();
    return assemble_model(record, model->base->tensors, model->memory);
  });
  const int num_pages = count_pages(weights, options.kv_cache_bytes);
  model->logits.resize(round_up(weights.vocab, kBlockRows));
  model->decoder =
      std::make_unique<Decoder>(std::move(weights), kernels, options.num_threads, record.ffn_neurons(), num_pages);
  use(*model, model->bundle.has_dense() ? COREINFER_DENSE : 0);
  return model;
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
    *model = open_model(folder, checked(options)).release();
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
