// From a folder to a model: its base and dense FFN at once, packs when they are first used, under a limit of memory if one is
// given.
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <thread>

#include "failure.h"
#include "memory_plan.h"
#include "model.h"
#include "refusals.h"
#include "residency.h"

namespace coreinfer {
namespace {

constexpr int kMostThreads = 256;
constexpr int kMostContexts = 64;  // that a KV cache has room for

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

int count_pages(const ModelWeights& weights, uint64_t kv_cache_bytes) {
  const int whole = pages_of(weights.max_positions);
  const uint64_t page_bytes = layout_for(weights).num_bytes();
  if (kv_cache_bytes == 0) return whole;
  if (kv_cache_bytes < page_bytes)
    refuse("kv_cache_bytes", "at least " + std::to_string(page_bytes), std::to_string(kv_cache_bytes));
  return static_cast<int>(std::min<uint64_t>(uint64_t{kMostContexts} * whole, kv_cache_bytes / page_bytes));
}

std::vector<int> neurons_of(const BundleFolder& bundle, int cluster) {
  const ModelRecord& record = bundle.model();
  if (cluster == COREINFER_DENSE) return std::vector<int>(record.num_layers, record.ffn_dim);
  return bundle.clusters()[cluster].num_neurons;
}

// How a limit of memory is shared out.
MemoryPlan plan_for(const coreinfer_model& model, const ModelWeights& weights, const coreinfer_options& options) {
  const BundleFolder& bundle = *model.bundle;
  const ModelRecord& record = bundle.model();
  const TableBytes tables = table_bytes(weights);
  WeightSizes sizes{
      model.base.num_bytes, tables.all, tables.block, layout_for(weights).num_bytes(), record.num_chosen, {}, {}};
  const auto size = [&](int cluster) { return ffn_sizes(record, bundle.ffn_format(), neurons_of(bundle, cluster)); };
  for (size_t cluster = 0; cluster < bundle.clusters().size(); ++cluster)
    sizes.packs.push_back(size(bundle.weights_of(static_cast<int>(cluster))));
  if (bundle.has_dense()) sizes.dense = size(COREINFER_DENSE);
  try {
    return plan_memory(options.memory_bytes, sizes, options.kv_cache_bytes);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("memory_bytes: ") + error.what());
  }
}

using OpenFile = std::shared_ptr<MappedTensors>;

FileBytes bytes_of(const OpenFile& file) { return {file, file->file->data(), file->file->num_bytes()}; }

coreinfer_ffn read_pack(const BundleFolder& bundle, int cluster, const OpenFile& file) {
  const auto assemble = bundle.model().num_experts > 0 ? assemble_experts : assemble_ffn;
  Ffn ffn = assemble(bundle.model(), file->tensors, neurons_of(bundle, cluster));
  return {std::make_shared<const Ffn>(std::move(ffn)), {}, bytes_of(file), {}};
}

// Of a mixture whose packs name experts of the dense FFN.
coreinfer_ffn named_experts(coreinfer_model& model, int cluster) {
  // Kept, so that all packs share what is read of it.
  coreinfer_ffn pack = pack_of(model, COREINFER_DENSE);
  pack.whole = pack.ffn;
  pack.ffn = std::make_shared<const Ffn>(keep_experts(*pack.whole, model.bundle->experts(cluster)));
  return pack;
}

coreinfer_ffn load_pack(coreinfer_model& model, int cluster) {
  const BundleFolder& bundle = *model.bundle;
  if (bundle.model().num_experts > 0 && cluster != COREINFER_DENSE && !bundle.narrows_experts())
    return named_experts(model, cluster);
  const OpenFile opened = cluster == COREINFER_DENSE ? bundle.dense() : bundle.pack(cluster);
  coreinfer_ffn pack = read_pack(bundle, cluster, opened);
  if (model.decoder->residency) {
    read_in_parts(pack, opened->file->path());
    opened->file->forget();
  }
  return pack;
}

}  // namespace

int num_threads_of(int given) {
  if (given < 0 || given > kMostThreads)
    refuse("num_threads", "1 to " + std::to_string(kMostThreads) + ", or 0", std::to_string(given));
  return given == 0 ? num_cores() : given;
}

const coreinfer_ffn& pack_of(coreinfer_model& model, int cluster) {
  if (!model.bundle)
    throw Failure(COREINFER_NOT_FOUND,
                  "cluster: expected none of a model whose files the caller opened, got " + std::to_string(cluster));
  const BundleFolder& bundle = *model.bundle;
  const int num_clusters = static_cast<int>(bundle.clusters().size());
  if (cluster < COREINFER_DENSE || cluster >= num_clusters)
    throw Failure(COREINFER_NOT_FOUND, "cluster: expected 0 to " + std::to_string(num_clusters - 1) +
                                           " or COREINFER_DENSE, got " + std::to_string(cluster));
  cluster = bundle.weights_of(cluster);
  const auto found = model.packs.find(cluster);
  if (found != model.packs.end()) return found->second;
  coreinfer_ffn pack = in_bundle(bundle.folder(), [&] {
    coreinfer_ffn loaded = load_pack(model, cluster);
    check_ffn(*model.decoder, *loaded.ffn, model.max_neurons);
    return loaded;
  });
  return model.packs.emplace(cluster, std::move(pack)).first->second;
}

std::unique_ptr<coreinfer_model> open_model(const std::string& folder, const coreinfer_options& options) {
  const Kernels& kernels = find_kernels(options.isa ? options.isa : "auto");
  const int num_threads = num_threads_of(options.num_threads);
  const bool is_limited = options.memory_bytes > 0;
  auto model = std::make_unique<coreinfer_model>();
  model->bundle = in_bundle(
      folder, [&] { return std::make_unique<const BundleFolder>(folder, !options.skip_checksums, is_limited); });
  const ModelRecord& record = model->bundle->model();
  OpenFile base;
  ModelWeights weights = in_bundle(folder, [&] {
    base = model->bundle->base();
    return assemble_model(record, base->tensors, model->memory);
  });
  model->base = bytes_of(base);
  model->max_neurons = record.ffn_neurons();
  MemoryPlan plan{};
  if (is_limited) plan = plan_for(*model, weights, options);
  const int num_pages = count_pages(weights, is_limited ? plan.kv_cache : options.kv_cache_bytes);
  model->decoder = std::make_unique<Decoder>(std::move(weights), kernels, num_threads, model->max_neurons, num_pages);
  if (is_limited) {
    const WholeFile& file = *base->file;
    file.forget();
    limit_memory(*model->decoder, {file.path(), file.data(), file.num_bytes()}, {plan.layers, plan.window});
  }
  return model;
}

}  // namespace coreinfer
