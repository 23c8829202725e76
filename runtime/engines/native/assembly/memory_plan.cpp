#include "memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "direct_file.h"
#include "matrix.h"
#include "refusals.h"

namespace coreinfer {
namespace {

constexpr uint64_t kAlignmentBytes = 64;
// Two of an FFN that is streamed: one is computed with while one is read.
constexpr uint64_t kLayersAhead = 2;
constexpr uint64_t kKvShare = 8, kWindowShare = 16, kLeastBlocks = 16;

uint64_t matrix_bytes(Format format, int rows, int cols) {
  Matrix shape;
  shape.format = format;
  shape.rows = rows;
  shape.cols = cols;
  return shape.num_bytes();
}

uint64_t weight_bytes(const ModelRecord& record, const std::string& name, int count) {
  const int hidden = record.hidden_size;
  const uint64_t num_inner = record.gated ? 2 : 1;
  // Of neurons that are read alone, which ones is known from the first matrix, which is read whole.
  if (name == "int4-neurons")
    return matrix_bytes(Format::int4, count, hidden) + num_inner * matrix_bytes(Format::int4_rows, count, hidden);
  const Format format = name == "bf16"   ? Format::bf16
                        : name == "int8" ? Format::int8
                        : name == "int4" ? Format::int4
                        : name == "int8-planes"
                            ? Format::int8_planes
                            : (refuse("FFN format", "one that the engine reads", name), Format::bf16);
  return num_inner * matrix_bytes(format, count, hidden) + matrix_bytes(format, hidden, count);
}

// Of a layer, or of an expert, with so many neurons.
uint64_t part_bytes(const ModelRecord& record, const std::string& format, int count) {
  const uint64_t num_inner = record.gated ? 2 : 1;
  // Tensors that are no weights, as biases, may lie between them.
  const uint64_t others = record.ffn_bias ? 4 * (num_inner * count + record.hidden_size) : 0;
  const uint64_t num_tensors = 4 * (num_inner + 1);
  const uint64_t between = others + num_tensors * kAlignmentBytes + kSector;
  // Ranges of files are read in whole sectors.
  const uint64_t num_bytes = weight_bytes(record, format, count) + between;
  return in_huge_pages((num_bytes + kSector - 1) / kSector * kSector);
}

std::string megabytes(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", static_cast<double>(bytes) / 1e6);
  return text;
}

uint64_t largest_part(const WeightSizes& sizes) {
  uint64_t most = sizes.dense ? sizes.dense->largest : 0;
  for (const FfnSizes& pack : sizes.packs) most = std::max(most, pack.largest);
  return most;
}

uint64_t widest_pack(const WeightSizes& sizes) {
  uint64_t most = 0;
  for (const FfnSizes& pack : sizes.packs) most = std::max(most, pack.total);
  return most;
}

// What has to be in memory at once.
uint64_t least_bytes(const WeightSizes& sizes) {
  return (sizes.num_chosen > 0 ? sizes.num_chosen : kLayersAhead) * largest_part(sizes);
}

std::string least_named(const WeightSizes& sizes) {
  if (sizes.num_chosen == 0) return "two layers";
  return "the experts of a token (" + std::to_string(sizes.num_chosen) + ")";
}

}  // namespace

FfnSizes ffn_sizes(const ModelRecord& record, const std::string& format, const std::vector<int>& num_neurons) {
  if (num_neurons.empty()) refuse("layers", "at least one", "none");
  FfnSizes sizes;
  for (const int count : num_neurons) {
    // Experts as wide as they can be. How many a layer has is not known of all packs.
    const int width = record.num_experts > 0 ? std::min(record.ffn_neurons(), count / record.num_chosen) : count;
    if (width < 1) refuse("neurons of a layer", "at least one of each expert", std::to_string(count));
    const uint64_t num_bytes = part_bytes(record, format, width);
    sizes.total += uint64_t((count + width - 1) / width) * num_bytes;
    sizes.largest = std::max(sizes.largest, num_bytes);
  }
  return sizes;
}

MemoryPlan plan_memory(uint64_t limit, const WeightSizes& sizes, uint64_t kv_cache) {
  const uint64_t hot = sizes.base - sizes.tables, ahead = least_bytes(sizes);
  uint64_t window = std::min(sizes.tables, kLeastBlocks * sizes.table_block);
  const uint64_t least = hot + window + ahead;
  if (kv_cache == 0) kv_cache = std::max(sizes.page, std::min(limit / kKvShare, limit > least ? limit - least : 0));
  if (limit < least + kv_cache)
    throw std::invalid_argument("expected at least " + megabytes(least + kv_cache) + " MB (" + megabytes(hot) +
                                " for the base, " + megabytes(window) + " for rows of its tables, " +
                                megabytes(kv_cache) + " for the KV cache, " + megabytes(ahead) + " for " +
                                least_named(sizes) + "; " + megabytes(widest_pack(sizes)) +
                                " more hold a whole pack), got " + megabytes(limit) + "; raise it");
  const uint64_t left = limit - least - kv_cache;
  // What the widest pack leaves over is best spent on the tables: sampling needs all of them for each token.
  const uint64_t widest = widest_pack(sizes), spare = left + ahead > widest ? left + ahead - widest : 0;
  window = std::min(sizes.tables, window + std::max(std::min(left, limit / kWindowShare), std::min(left, spare)));
  const bool whole = window >= sizes.tables;
  return {whole ? sizes.base : hot, whole ? 0 : window, kv_cache, limit - hot - window - kv_cache};
}

}  // namespace coreinfer
