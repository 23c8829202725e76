// Opening of files that the caller manages.
#include <cstdint>

#include "failure.h"
#include "file_lease.h"
#include "guarded.h"
#include "refusals.h"
#include "residency.h"

namespace coreinfer {
namespace {

constexpr uintptr_t kAlignment = 64;

coreinfer_engine_options known(const coreinfer_engine_options* given) {
  if (!given) return {};
  if (given->struct_bytes != sizeof *given)
    refuse("struct_bytes", std::to_string(sizeof *given), std::to_string(given->struct_bytes));
  return *given;
}

int count_pages(const ModelWeights& weights, const coreinfer_engine_options& options) {
  if (!options.count_pages) return pages_of(weights.max_positions);
  const TableBytes tables = table_bytes(weights);
  const coreinfer_sizes sizes{layout_for(weights).num_bytes(), tables.all, tables.block};
  const int num_pages = options.count_pages(options.user, &sizes);
  if (num_pages < 1) refuse("KV cache pages", "at least 1", std::to_string(num_pages));
  return num_pages;
}

std::unique_ptr<coreinfer_model> open_files(const char* record, const coreinfer_file* base,
                                            const coreinfer_engine_options& options) {
  const Kernels& kernels = find_kernels(options.isa ? options.isa : "auto");
  const int num_threads = num_threads_of(options.num_threads);
  const ModelRecord manifest_record = read_record(Json::parse(record));
  auto model = std::make_unique<coreinfer_model>();
  ModelWeights weights = assemble_model(manifest_record, open_lent(base, "base"), model->memory);
  const int num_pages = count_pages(weights, options);
  model->max_neurons = manifest_record.ffn_neurons();
  model->decoder = std::make_unique<Decoder>(std::move(weights), kernels, num_threads, model->max_neurons, num_pages);
  return model;
}

void limit(coreinfer_model& model, const char* path, const MemoryLimits& limits) {
  if (model.decoder->residency) refuse("memory", "no limit yet", "another limit");
  if (model.decoder->ffn) refuse("FFN", "none in use", "one");
  if (model.columns) refuse("columns", "none", "some");
  limit_memory(*model.decoder, {path, model.base.data, model.base.num_bytes}, limits);
}

}  // namespace

TensorFile open_lent(const coreinfer_file* file, const char* what) {
  check_given(file, what);
  check_given(file->name, "name of a file");
  check_given(file->data, file->name);
  if (reinterpret_cast<uintptr_t>(file->data) % kAlignment)
    refuse(file->name, "an address that is a multiple of " + std::to_string(kAlignment), "another");
  return {file->name, file->data, file->num_bytes};
}

}  // namespace coreinfer

using namespace coreinfer;

int coreinfer_open_files(const char* record, const coreinfer_file* base, const coreinfer_engine_options* options,
                         coreinfer_model** model) {
  return guarded([&] {
    check_given(record, "record");
    check_given(model, "model");
    const auto lease = std::make_shared<FileLease>();
    std::unique_ptr<coreinfer_model> opened = open_files(record, base, known(options));
    opened->base = {lease, base->data, base->num_bytes};
    lease->keep(*base);
    *model = opened.release();
  });
}

int coreinfer_limit_memory(coreinfer_model* model, const char* path, size_t layer_bytes, size_t window_bytes) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(path, "path");
    limit(own, path, {layer_bytes, window_bytes});
  });
}
