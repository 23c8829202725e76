#include "residency.h"

#include <sys/mman.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <stdexcept>

#include "layer.h"

namespace coreinfer {
namespace {

#ifndef MADV_POPULATE_READ
constexpr int MADV_POPULATE_READ = 22;
#endif

bool has_own_embedding(const ModelWeights& weights) {
  return weights.embedding.codes != weights.head.codes || weights.embedding.bf16 != weights.head.bf16;
}

// Bring pages in, and lock them where that is allowed: as they come, for locking would copy those of a private mapping.
void hold(const uint8_t* begin, const uint8_t* end) {
  if (begin >= end) return;
  auto* start = const_cast<uint8_t*>(begin);
#if defined(MLOCK_ONFAULT) && defined(SYS_mlock2)
  syscall(SYS_mlock2, start, end - begin, MLOCK_ONFAULT);  // glibc has had a function for it since 2.27 only
#endif
  madvise(start, end - begin, MADV_POPULATE_READ);
}

std::unique_ptr<PageWindow> make_window(const MappedFile& base, const Matrix& table, bool only_lows, size_t bytes) {
  return std::make_unique<PageWindow>(base.path, base.begin, window_parts(table, only_lows), table.num_blocks(), bytes);
}

size_t part_bytes(const Matrix& table, bool only_lows) {
  size_t sum = 0;
  for (const PageWindow::Part& part : window_parts(table, only_lows)) sum += part.block_bytes * table.num_blocks();
  return sum;
}

bool is_mixture(const Ffn& ffn) {
  return std::any_of(ffn.begin(), ffn.end(), [](const FfnWeights& layer) { return !layer.experts.empty(); });
}

}  // namespace

Residency::Residency(size_t layer_bytes, bool is_mixture)
    : layers(is_mixture ? nullptr : std::make_unique<LayerStore>(layer_bytes)),
      experts(is_mixture ? std::make_unique<ExpertStore>(layer_bytes) : nullptr) {}

FileSource read_from_file(const std::string& path, const uint8_t* mapping, size_t mapping_bytes, const Ffn& ffn) {
  FileSource source;
  if (is_mixture(ffn))
    source.experts = std::make_shared<ExpertSource>(path, mapping, mapping_bytes, ffn);
  else
    source.layers = std::make_shared<LayerSource>(path, mapping, mapping_bytes, ffn);
  return source;
}

void announce(Residency& residency, const FileSource& source, const Ffn& ffn) {
  if (residency.layers)
    residency.layers->announce(source.layers);
  else
    residency.experts->announce(source.experts, ffn);
}

bool holds(const Residency& residency, const FileSource& source, const Ffn& ffn) {
  return residency.layers ? residency.layers->holds(*source.layers) : residency.experts->holds(*source.experts, ffn);
}

void check_fits(const Residency& residency, const FileSource& source) {
  if (residency.layers ? !source.layers : !source.experts)
    throw std::invalid_argument("FFN: expected one that is read in layers, as memory is limited, got another");
  if (!residency.experts) return;
  const size_t largest = source.experts->pieces().largest(), room = residency.experts->limit_bytes();
  if (largest > room)
    throw std::invalid_argument("layer_bytes: expected at least " + std::to_string(largest) + " for one expert, got " +
                                std::to_string(room));
}

TableBytes table_bytes(const ModelWeights& weights) {
  TableBytes bytes{0, 0};
  const auto add = [&](const Matrix& table, bool only_lows) {
    bytes.all += part_bytes(table, only_lows);
    for (const PageWindow::Part& part : window_parts(table, only_lows))
      bytes.block = std::max(bytes.block, PageWindow::most_bytes(part));
  };
  if (weights.head.format == Format::int8_planes) add(weights.head, true);
  if (has_own_embedding(weights)) add(weights.embedding, false);
  return bytes;
}

void limit_memory(Decoder& decoder, const MappedFile& base, const MemoryLimits& limits) {
  const ModelWeights& weights = decoder.weights;
  auto residency = std::make_shared<Residency>(limits.layer_bytes, weights.layers.front().router.num_chosen > 0);
  std::vector<std::pair<const uint8_t*, const uint8_t*>> apart;
  const auto window = [&](const Matrix& table, bool only_lows, size_t bytes) {
    for (const PageWindow::Part& part : window_parts(table, only_lows))
      apart.emplace_back(part.begin, part.begin + part.block_bytes * table.num_blocks());
    return make_window(base, table, only_lows, bytes);
  };
  const bool own = has_own_embedding(weights), planes = weights.head.format == Format::int8_planes;
  residency->embeds_from_head = !own;
  if (limits.window_bytes && planes)
    residency->head_lows = window(weights.head, true, limits.window_bytes / (own ? 2 : 1));
  if (limits.window_bytes && own)
    residency->embedding = window(weights.embedding, false, limits.window_bytes / (planes ? 2 : 1));
  std::sort(apart.begin(), apart.end());
  const uint8_t* from = base.begin;
  for (const auto& [begin, end] : apart) {
    // Pages that a window shares with its neighbours stay.
    hold(from, base.begin + (begin - base.begin + kSector - 1) / kSector * kSector);
    from = base.begin + (end - base.begin) / kSector * kSector;
  }
  hold(from, base.begin + base.num_bytes);
  decoder.residency = std::move(residency);
}

LimitedPass::LimitedPass(Decoder& decoder, const Row* rows, size_t num_rows, bool decodes) : decoder_(decoder) {
  if (!decoder.residency) return;
  Residency& residency = *decoder.residency;
  if (residency.layers)
    residency.layers->begin_pass(decoder.source.layers, decodes);
  else
    residency.experts->begin_pass(decoder.source.experts, decodes);
  PageWindow* window = residency.embeds_from_head ? residency.head_lows.get() : residency.embedding.get();
  if (window)
    for (size_t row = 0; row < num_rows; ++row) window->touch(rows[row].id / kBlockRows);
}

void LimitedPass::finish() {
  if (!decoder_.residency) return;
  Residency& residency = *decoder_.residency;
  for (PageWindow* window : {residency.embedding.get(), residency.head_lows.get()})
    if (window) window->settle();
  if (residency.layers)
    residency.layers->end_pass();
  else
    residency.experts->end_pass();
}

uint64_t table_bytes_read(const Residency& residency) {
  uint64_t num_bytes = 0;
  for (const PageWindow* window : {residency.embedding.get(), residency.head_lows.get()})
    if (window) num_bytes += window->num_touched() * window->block_bytes();
  return num_bytes;
}

void multiply_head(Decoder& decoder, const Batch& batch, float* logits, int thread) {
  const Matrix& head = decoder.weights.head;
  const size_t stride = round_up(decoder.weights.vocab, kBlockRows);
  PageWindow* window = decoder.residency ? decoder.residency->head_lows.get() : nullptr;
  if (!window) return multiply_share(decoder.kernels, {{&head, logits}}, batch, stride, thread, decoder.threads);
  const int step = window->blocks_at_once(), num_blocks = head.num_blocks();
  for (int begin = 0; begin < num_blocks; begin += step) {
    const int end = std::min(begin + step, num_blocks);
    if (thread == 0) {
      window->bring(begin, end);
      window->ask_for(end, end + step);
    }
    decoder.threads.barrier(thread);
    const Matrix part = head.rows_from(begin, end);
    multiply_share(decoder.kernels, {{&part, logits + begin * kBlockRows}}, batch, stride, thread, decoder.threads);
    decoder.threads.barrier(thread);
    if (thread == 0) window->let_go(begin, end);
  }
}

}  // namespace coreinfer
