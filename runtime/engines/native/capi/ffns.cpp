// FFN weights as the C API hands them out, and their use.
#include <algorithm>

#include "failure.h"
#include "file_lease.h"
#include "gather.h"
#include "guarded.h"
#include "refusals.h"
#include "residency.h"

static_assert(int{COREINFER_NUM_INPUT_GROUPS} == int{coreinfer::kNumInputGroups});

namespace coreinfer {
namespace {

using Assemble = Ffn (*)(const ModelRecord& record, const TensorFile& file, const std::vector<int>& num_neurons);

int read_lent(Assemble assemble, const char* record, const coreinfer_file* file, const int* num_neurons,
              size_t num_layers, coreinfer_ffn** ffn) noexcept {
  return guarded([&] {
    check_given(record, "record");
    check_given(num_neurons, "num_neurons");
    check_given(ffn, "ffn");
    const auto lease = std::make_shared<FileLease>();
    Ffn weights = assemble(read_record(Json::parse(record)), open_lent(file, "file"),
                           std::vector<int>(num_neurons, num_neurons + num_layers));
    auto read = std::make_unique<coreinfer_ffn>();
    read->ffn = std::make_shared<const Ffn>(std::move(weights));
    read->file = {lease, file->data, file->num_bytes};
    lease->keep(*file);
    *ffn = read.release();
  });
}

// What is made of another FFN.
template <class Make>
int derived(const coreinfer_ffn* from, coreinfer_ffn** ffn, Make make) noexcept {
  return guarded([&] {
    check_given(from, "FFN");
    check_given(ffn, "ffn");
    *ffn = std::make_unique<coreinfer_ffn>(make(*from)).release();
  });
}

void check_layers(const coreinfer_ids* layers, size_t num_layers) {
  if (num_layers > 0) check_given(layers, "layers");
  for (size_t layer = 0; layer < num_layers; ++layer)
    if (layers[layer].num_ids > 0) check_given(layers[layer].ids, "ids of a layer");
}

coreinfer_ffn keeping(const coreinfer_ffn& all, const coreinfer_ids* layers, size_t num_layers) {
  check_layers(layers, num_layers);
  std::vector<std::vector<int>> experts;
  for (size_t layer = 0; layer < num_layers; ++layer)
    experts.emplace_back(layers[layer].ids, layers[layer].ids + layers[layer].num_ids);
  coreinfer_ffn kept = all;
  kept.ffn = std::make_shared<const Ffn>(keep_experts(*all.ffn, experts));
  kept.whole = all.ffn;
  return kept;
}

coreinfer_ffn gathering(const coreinfer_ffn& from, const coreinfer_ids* layers, size_t num_layers) {
  check_layers(layers, num_layers);
  std::vector<NeuronIds> neurons;
  for (size_t layer = 0; layer < num_layers; ++layer)
    neurons.push_back({layers[layer].ids, static_cast<int>(layers[layer].num_ids)});
  check_neurons(*from.ffn, neurons);
  GatheredFfn gathered = gather_ffn(*from.ffn, neurons);
  // What is not copied stays where it is.
  gathered.memory.insert(gathered.memory.end(), from.memory.begin(), from.memory.end());
  return {std::make_shared<const Ffn>(std::move(gathered.ffn)), {}, from.file, std::move(gathered.memory)};
}

coreinfer_ffn in_layers(const coreinfer_ffn& from, const char* path) {
  check_given(path, "path");
  coreinfer_ffn layered = from;
  read_in_parts(layered, path);
  return layered;
}

std::shared_ptr<TokenShares> read_shares(const float* thresholds, size_t num_layers, size_t num_expected) {
  if (!thresholds) return nullptr;
  if (num_layers != num_expected)
    refuse("thresholds", std::to_string(num_expected) + " layers of " + std::to_string(kNumInputGroups) + " pairs",
           "another shape");
  auto shares = std::make_shared<TokenShares>();
  shares->thresholds.resize(num_layers);
  for (std::array<Thresholds, kNumInputGroups>& layer : shares->thresholds)
    for (Thresholds& group : layer) {
      group = {thresholds[0], thresholds[1]};
      if (!(group.wanted <= group.whole))
        refuse("thresholds", "pairs of which the second is at least the first",
               std::to_string(group.wanted) + " and " + std::to_string(group.whole));
      shares->halves |= group.wanted < group.whole;
      thresholds += 2;
    }
  return shares;
}

// High bits can be read alone of int4 alone, and of columns that lie in planes.
void check_halves(const coreinfer_model& model, const Ffn& ffn, const TokenShares& shares) {
  const std::string expected = "pairs that are equal, so that no input reads half of the bits of ";
  for (size_t i = 0; i < ffn.size(); ++i) {
    const AttentionWeights& attention = model.decoder->weights.layers[i].attention;
    const Linear* groups[kNumInputGroups] = {&attention.query, &attention.output, &ffn[i].up, &ffn[i].down};
    for (int group = 0; group < kNumInputGroups; ++group) {
      const Thresholds& own = shares.thresholds[i][group];
      if (own.wanted == own.whole || groups[group]->weight.format == Format::int4) continue;
      refuse("thresholds", expected + (ffn[i].experts.empty() ? "weights that are not int4" : "experts"), "others");
    }
  }
  if (model.columns && !model.columns->in_planes())
    refuse("thresholds", expected + "columns without COREINFER_HALVES", "others");
}

}  // namespace

void read_in_parts(coreinfer_ffn& ffn, const std::string& path) {
  ffn.source = read_from_file(path, ffn.file.data, ffn.file.num_bytes, *ffn.ffn);
  if (ffn.source.experts) ffn.ffn = ffn.source.experts->ffn();
}

void use_ffn(coreinfer_model& model, const coreinfer_ffn& ffn, std::shared_ptr<TokenShares> shares) {
  Decoder& decoder = *model.decoder;
  check_ffn(decoder, *ffn.ffn, model.max_neurons);
  if (decoder.residency) check_fits(*decoder.residency, ffn.source);
  if (shares && shares->halves) check_halves(model, *ffn.ffn, *shares);
  if (shares && model.columns) {
    shares->attention = model.columns->attention();
    shares->ffn = model.columns->of(ffn.whole ? ffn.whole : ffn.ffn);
  }
  coreinfer_ffn next = ffn;
  decoder.use_shares(std::move(shares));
  decoder.ffn = next.ffn;
  decoder.source = next.source;
  std::swap(model.ffn, next);
}

}  // namespace coreinfer

using namespace coreinfer;

int coreinfer_read_ffn(const char* record, const coreinfer_file* file, const int* num_neurons, size_t num_layers,
                       coreinfer_ffn** ffn) {
  return read_lent(assemble_ffn, record, file, num_neurons, num_layers, ffn);
}

int coreinfer_read_experts(const char* record, const coreinfer_file* file, const int* num_neurons, size_t num_layers,
                           coreinfer_ffn** ffn) {
  return read_lent(assemble_experts, record, file, num_neurons, num_layers, ffn);
}

int coreinfer_pack(coreinfer_model* model, int cluster, coreinfer_ffn** ffn) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(ffn, "ffn");
    *ffn = std::make_unique<coreinfer_ffn>(pack_of(own, cluster)).release();
  });
}

int coreinfer_keep_experts(const coreinfer_ffn* all, const coreinfer_ids* layers, size_t num_layers,
                           coreinfer_ffn** ffn) {
  return derived(all, ffn, [&](const coreinfer_ffn& from) { return keeping(from, layers, num_layers); });
}

int coreinfer_gather_neurons(const coreinfer_ffn* from, const coreinfer_ids* layers, size_t num_layers,
                             coreinfer_ffn** ffn) {
  return derived(from, ffn, [&](const coreinfer_ffn& own) { return gathering(own, layers, num_layers); });
}

int coreinfer_read_in_layers(const coreinfer_ffn* from, const char* path, coreinfer_ffn** ffn) {
  return derived(from, ffn, [&](const coreinfer_ffn& own) { return in_layers(own, path); });
}

void coreinfer_close_ffn(coreinfer_ffn* ffn) { delete ffn; }

int coreinfer_max_neurons(const coreinfer_ffn* ffn) { return most_neurons(*ffn->ffn); }

int coreinfer_use_ffn(coreinfer_model* model, const coreinfer_ffn* ffn, const float* thresholds, size_t num_layers) {
  return in_turn(model, [&](coreinfer_model& own) {
    check_given(ffn, "FFN");
    use_ffn(own, *ffn, read_shares(thresholds, num_layers, own.decoder->weights.layers.size()));
  });
}

int coreinfer_announce_ffn(coreinfer_model* model, const coreinfer_ffn* ffn) {
  return guarded([&] {
    check_given(model, "model");
    check_given(ffn, "FFN");
    Residency* residency = model->decoder->residency.get();
    if (!residency) return;
    check_fits(*residency, ffn->source);
    announce(*residency, ffn->source, *ffn->ffn);
  });
}

int coreinfer_holds_ffn(const coreinfer_model* model, const coreinfer_ffn* ffn, int* is_held) {
  return guarded([&] {
    check_given(model, "model");
    check_given(ffn, "FFN");
    check_given(is_held, "holds");
    const Residency* residency = model->decoder->residency.get();
    if (residency) check_fits(*residency, ffn->source);
    *is_held = !residency || holds(*residency, ffn->source, *ffn->ffn);
  });
}
