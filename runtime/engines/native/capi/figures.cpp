// What of a model can be counted, and columns, which are made where counting says that they gain.
#include <algorithm>
#include <string>

#include "column_trial.h"
#include "guarded.h"
#include "refusals.h"
#include "residency.h"

static_assert(COREINFER_HALVES == 1 << coreinfer::kNumInputGroups);
static_assert(COREINFER_LEAST_COLUMN_BYTES == coreinfer::kLeastColumnBytes);

namespace coreinfer {
namespace {

void lay_out(coreinfer_model& model, int groups, size_t least_bytes) {
  const Decoder& decoder = *model.decoder;
  if (groups < 0 || groups >= COREINFER_HALVES << 1)
    refuse("groups", "0 to " + std::to_string((COREINFER_HALVES << 1) - 1), std::to_string(groups));
  if (decoder.residency) refuse("columns", "memory without a limit", "a limit");
  ColumnLayout layout{decoder.kernels.column_tile, least_bytes, {}, (groups & COREINFER_HALVES) != 0};
  for (int group = 0; group < kNumInputGroups; ++group) layout.wants[group] = groups >> group & 1;
  model.columns = std::make_unique<ColumnCache>(decoder.weights, layout, model.decoder->threads);
}

void try_groups(Decoder& decoder, double share, bool halves, double* gains) {
  if (!decoder.ffn) refuse("FFN", "one in use", "none");
  std::array<double, kNumInputGroups> found{};
  if (!decoder.residency) found = try_columns(decoder, share, halves);
  std::copy(found.begin(), found.end(), gains);
}

}  // namespace
}  // namespace coreinfer

using namespace coreinfer;

int coreinfer_lay_out_columns(coreinfer_model* model, int groups, size_t least_bytes) {
  return in_turn(model, [&](coreinfer_model& own) { lay_out(own, groups, least_bytes); });
}

int coreinfer_try_columns(coreinfer_model* model, double share, int flags, double* gains) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(gains, "gains");
    if (!(share > 0.0 && share <= 1.0)) refuse("share", "above 0 and at most 1", std::to_string(share));
    if (flags != 0 && flags != COREINFER_HALVES) refuse("flags", "0 or COREINFER_HALVES", std::to_string(flags));
    try_groups(*own.decoder, share, flags != 0, gains);
  });
}

size_t coreinfer_column_bytes(const coreinfer_model* model) { return model->columns ? model->columns->num_bytes() : 0; }

int coreinfer_num_layers(const coreinfer_model* model) {
  return static_cast<int>(model->decoder->weights.layers.size());
}

int coreinfer_is_wide(const coreinfer_model* model, int layer) {
  return layer >= 0 && layer < coreinfer_num_layers(model) && model->decoder->weights.layers[layer].wide_cache;
}

int coreinfer_read_figures(const coreinfer_model* model, coreinfer_reads* reads) {
  const Residency* residency = model->decoder->residency.get();
  if (!residency) return 0;
  const ReadFigures figures = residency->figures();
  *reads = {figures.num_bytes, figures.num_hits, figures.num_misses, figures.waited_seconds,
            table_bytes_read(*residency)};
  return 1;
}

size_t coreinfer_layer_bytes_used(const coreinfer_model* model) {
  const Residency* residency = model->decoder->residency.get();
  return residency ? residency->used_bytes() : 0;
}

int coreinfer_bytes_per_token(const coreinfer_model* model, int num_tokens, int flags, int alone, size_t* num_bytes) {
  return guarded([&] {
    check_given(model, "model");
    check_given(num_bytes, "num_bytes");
    check_flags(flags, COREINFER_SCREENED);
    if (num_tokens < 0) refuse("num_tokens", "at least 0", std::to_string(num_tokens));
    if (!model->decoder->ffn) refuse("FFN", "one in use", "none");
    *num_bytes = model->decoder->bytes_per_token(num_tokens, flags & COREINFER_SCREENED, alone);
  });
}
