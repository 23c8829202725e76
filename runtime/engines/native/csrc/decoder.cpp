#include "decoder.h"

#include <algorithm>

#include "column_pass.h"
#include "experts.h"
#include "streams.h"

namespace coreinfer {

PoolFull::PoolFull(int num_needed, int num_free)
    : std::runtime_error("KV cache: expected " + std::to_string(num_needed) + " free pages of " +
                         std::to_string(kPageTokens) + " tokens, got " + std::to_string(num_free)) {}

PageLayout layout_for(const ModelWeights& weights) {
  std::vector<bool> wide_layers;
  for (const Layer& layer : weights.layers)
    if (layer.attention.has_own_cache()) wide_layers.push_back(layer.wide_cache);
  return PageLayout(wide_layers, weights.num_kv_heads, weights.head_dim);
}

namespace {

bool has_bf16(const ModelWeights& weights) {
  return std::any_of(weights.layers.begin(), weights.layers.end(), [](const Layer& layer) {
    const AttentionWeights& attention = layer.attention;
    const auto linears = {&attention.query, &attention.key, &attention.value, &attention.output};
    return std::any_of(linears.begin(), linears.end(),
                       [](const Linear* linear) { return !linear->weight.quantized(); });
  });
}

}  // namespace

Decoder::Decoder(ModelWeights model, const Kernels& table, int num_threads, int max_neurons, int num_pages)
    : weights(std::move(model)), kernels(table), pool(layout_for(weights), num_pages), threads(num_threads) {
  sequences.push_back(std::make_unique<Sequence>());
  allocate(screen, weights.head);
  allocate(token, weights, max_neurons, num_threads);
  const bool bf16 = kernels.rounds_to_bf16 && has_bf16(weights);
  allocate(block, weights, max_neurons, num_threads, bf16);
  allocate(experts, weights, max_neurons, num_threads, bf16);
  allocate(streams, weights, num_threads, bf16);
}

int Decoder::add(Sequence sequence) {
  const auto free = std::find(sequences.begin(), sequences.end(), nullptr);
  const int number = static_cast<int>(free - sequences.begin());
  if (free == sequences.end()) sequences.emplace_back();
  sequences[number] = std::make_unique<Sequence>(std::move(sequence));
  return number;
}

int Decoder::fork_sequence(int source, int num_tokens) {
  const int num_needed = pages_to_fork(num_tokens);
  if (num_needed > pool.num_free()) throw PoolFull(num_needed, pool.num_free());
  return add(fork(pool, *sequences[source], num_tokens));
}

void Decoder::drop_sequence(int number) {
  truncate_sequence(number, 0);
  sequences[number].reset();
}

void Decoder::extend_all(const std::map<int, int>& counts) {
  int num_needed = 0;
  for (const auto& [number, count] : counts) num_needed += pages_to_extend(pool, *sequences[number], count);
  if (num_needed > pool.num_free()) throw PoolFull(num_needed, pool.num_free());
  for (const auto& [number, count] : counts) extend(pool, *sequences[number], count);
}

Row Decoder::next_row(int number, int32_t id) {
  Sequence& sequence = *sequences[number];
  return {id, sequence.num_cached++, sequence.pages.data()};
}

void Decoder::forward(int number, const int32_t* ids, int num_tokens, bool all_logits, bool screened, float* logits,
                      const Watcher& watcher) {
  Sequence& sequence = *sequences[number];
  const int num_needed = pages_to_extend(pool, sequence, num_tokens);
  if (num_needed > pool.num_free()) throw PoolFull(num_needed, pool.num_free());
  extend(pool, sequence, num_tokens);
  if (num_tokens == 1 && !watcher) {
    decode_token(*this, {ids[0], sequence.num_cached, sequence.pages.data()}, screened, logits);
    ++sequence.num_cached;
    return;
  }
  const size_t stride = round_up(weights.vocab, kBlockRows);
  std::vector<Row> rows;
  for (int first = 0; first < num_tokens; first += kBlockTokens) {
    const int count = std::min(kBlockTokens, num_tokens - first);
    rows.clear();
    for (int t = 0; t < count; ++t) rows.push_back(next_row(number, ids[first + t]));
    BlockOptions options;
    options.all_logits = all_logits;
    options.last_logits = first + count == num_tokens;
    options.screened = screened;
    read_block(*this, rows, options, all_logits ? logits + first * stride : logits, watcher);
  }
}

void Decoder::forward_rows(const int32_t* numbers, const int32_t* ids, int num_rows, bool screened, float* logits) {
  std::map<int, int> counts;  // of each sequence's rows
  for (int row = 0; row < num_rows; ++row) ++counts[numbers[row]];
  extend_all(counts);
  const size_t stride = round_up(weights.vocab, kBlockRows);
  BlockOptions options;
  options.related = counts.size() < static_cast<size_t>(num_rows);
  options.screened = screened;
  std::vector<Row> rows;
  for (int first = 0; first < num_rows; first += kBlockTokens) {
    rows.clear();
    for (int row = first; row < std::min(first + kBlockTokens, num_rows); ++row)
      rows.push_back(next_row(numbers[row], ids[row]));
    options.num_exact = static_cast<int>(rows.size());
    read_block(*this, rows, options, logits + first * stride, nullptr);
  }
}

void Decoder::forward_beside(int number, const int32_t* block_ids, int num_tokens, bool last_logits,
                             const int32_t* numbers, const int32_t* ids, int num_rows, bool screened, float* logits) {
  std::map<int, int> counts{{number, num_tokens}};
  for (int row = 0; row < num_rows; ++row) ++counts[numbers[row]];
  extend_all(counts);
  if (num_tokens + num_rows > kBlockTokens) {
    const size_t stride = round_up(weights.vocab, kBlockRows);
    forward_rows(numbers, ids, num_rows, screened, logits + last_logits * stride);
    // Without a place of its own, what the block ends with goes to where nobody looks.
    std::vector<float> unwanted(last_logits ? 0 : stride);
    return forward(number, block_ids, num_tokens, false, screened, last_logits ? logits : unwanted.data(), nullptr);
  }
  std::vector<Row> rows;
  for (int t = 0; t < num_tokens; ++t) rows.push_back(next_row(number, block_ids[t]));
  for (int row = 0; row < num_rows; ++row) rows.push_back(next_row(numbers[row], ids[row]));
  BlockOptions options;
  options.num_exact = num_rows;
  options.last_logits = last_logits;
  options.screened = screened;
  read_block(*this, rows, options, logits, nullptr);
}

namespace {

// How many of a layer's FFNs a token uses.
size_t num_used(const std::vector<GroupColumns>& experts, const Layer& layer) {
  return experts.size() > 1 ? layer.router.num_chosen : 1;
}

// Of a layer's FFNs, which are alike, those of the first that is there.
const Columns& columns_of(const std::vector<GroupColumns>& experts, int group) {
  for (const GroupColumns& own : experts)
    if (!own[group % 2].empty()) return own[group % 2];
  return experts[0][group % 2];
}

// Of all that a token multiplies at once.
size_t most_segment_sums(const LayerColumns& layers, const ModelWeights& weights) {
  size_t most = 0;
  for (size_t i = 0; i < layers.size(); ++i)
    for (const int group : {0, 1})
      most = std::max(most,
                      num_used(layers[i], weights.layers[i]) * num_segment_sums(columns_of(layers[i], group).matrix));
  return most;
}

// Of all columns of the weights that a token uses.
size_t used_bytes(const LayerColumns& layers, const ModelWeights& weights) {
  size_t total = 0;
  for (size_t i = 0; i < layers.size(); ++i)
    for (const int group : {0, 1})
      total += num_used(layers[i], weights.layers[i]) * columns_of(layers[i], group).matrix.num_bytes();
  return total;
}

}  // namespace

void Decoder::use_shares(std::shared_ptr<const TokenShares> next) {
  size_t most = 0;
  if (next)
    for (const auto& layers : {next->attention, next->ffn})
      if (layers) most = std::max(most, most_segment_sums(*layers, weights));
  if (most > num_segment_sums_) token.segment_sums.resize(num_segment_sums_ = most);
  shares = std::move(next);
}

namespace {

// Of weights that lie neuron by neuron, the share that the last token read.
double active_share(const TokenScratch& token) {
  uint64_t num_found = 0, num_asked = 0;
  for (const auto& own : token.threads)
    for (const ActiveNeurons& neurons : own.active) {
      num_found += neurons.num_found;
      num_asked += neurons.num_asked;
    }
  return num_asked ? double(num_found) / double(num_asked) : 1.0;
}

// Of weights that lie input by input, what the last token read.
size_t read_columns(const TokenScratch& token, const TokenShares& shares, const ModelWeights& weights) {
  size_t num_read = 0, all = 0;
  for (const auto& own : token.threads) num_read += own.column_bytes;
  for (const auto& layers : {shares.attention, shares.ffn}) all += layers ? used_bytes(*layers, weights) : 0;
  return num_read ? num_read : all;
}

}  // namespace

size_t Decoder::bytes_per_token(int num_tokens, bool screened, bool alone) const {
  const TokenShares* used = alone ? shares.get() : nullptr;
  // What is scored again after screening is not counted.
  screened = screened && weights.head.format == Format::int8_planes;
  size_t total = (screened ? weights.head.screening_bytes() : weights.head.num_bytes()) +
                 weights.project_in.num_bytes() + weights.project_out.num_bytes();
  total += stream_bytes(weights.streams);
  const double active = alone ? active_share(token) : 1.0;
  if (used) total += read_columns(token, *used, weights);
  const auto by_rows = [&](size_t layer, int group) {
    if (!used) return true;
    const auto& columns = group < kGateUp ? used->attention : used->ffn;
    return !columns || columns_of((*columns)[layer], group).empty();
  };
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const AttentionWeights& attention = weights.layers[i].attention;
    const FfnWeights& layer = (*ffn)[i];
    // No more than three a group; null where there are fewer.
    const Linear* groups[kNumInputGroups][3] = {{&attention.query, &attention.key, &attention.value},
                                                {&attention.output},
                                                {&layer.gate, &layer.up},
                                                {&layer.down}};
    for (int group = 0; group < kNumInputGroups; ++group) {
      if (!by_rows(i, group)) continue;
      for (const Linear* linear : groups[group]) {
        if (!linear) continue;
        const size_t num_bytes = linear->weight.num_bytes();
        total += linear->weight.format == Format::int4_rows ? static_cast<size_t>(active * num_bytes) : num_bytes;
      }
    }
    if (!layer.experts.empty())
      total += mixture_bytes(weights.layers[i].router, layer, {true, true, by_rows(i, kGateUp), by_rows(i, kDown)});
    const int seen = attention.window > 0 ? std::min(num_tokens, attention.window) : num_tokens;
    total += pool.layout.bytes_per_token(attention.cache) * seen + weights.layers[i].cutoff.spread.num_bytes();
  }
  return total;
}

}  // namespace coreinfer
