#include "streams.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementary.h"

namespace coreinfer {
namespace {

constexpr float kRootHalf = 0.70710678f;
constexpr float kLeastSquare = 1e-5f;  // of what is brought to a length
constexpr int kSumLanes = 16, kChunk = 64;

// In an order of its own, which no compiler changes.
float dot(const float* a, const float* b, int size) {
  float lanes[kSumLanes] = {};
  int i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  for (int lane = 0; i + lane < size; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

float tanh_of(float x) {
  const auto rest = static_cast<float>(exponential(-2.0 * std::fabs(x)));
  return std::copysign((1.0f - rest) / (1.0f + rest), x);
}

size_t wide_stride(const ModelWeights& weights) { return round_up(weights.hidden, kGroup); }

size_t embedded_stride(const ModelWeights& weights) {
  return round_up(weights.streams.token_size * static_cast<int>(weights.layers.size()), kBlockRows);
}

size_t narrow_stride(const ModelWeights& weights) {
  int most = weights.streams.low_size();
  for (const Layer& layer : weights.layers) most = std::max(most, layer.cutoff.spread.rows);
  return round_up(most, kBlockRows);
}

void allocate(StreamValues& values, const ModelWeights& weights, int num_tokens, bool bf16) {
  const size_t wide = wide_stride(weights);
  values.streams.resize(num_tokens * weights.streams.count * wide);
  values.normed.resize(num_tokens * wide);
  values.embedded.resize(num_tokens * embedded_stride(weights) + kSumLanes);
  values.cutoffs.resize(num_tokens);
  values.low.resize(num_tokens, weights.streams.low_size(), bf16);
}

void allocate(StreamProducts& products, const ModelWeights& weights, int num_tokens) {
  const size_t wide = wide_stride(weights);
  products.streams.resize((weights.streams.count - 1) * num_tokens * wide);
  products.embedded.resize(num_tokens * embedded_stride(weights));
  products.narrow.resize(num_tokens * narrow_stride(weights));
  products.wide.resize(num_tokens * wide);
}

}  // namespace

void allocate(StreamScratch& scratch, const ModelWeights& weights, int num_threads, bool bf16) {
  if (weights.streams.count == 0) return;
  scratch.alone.resize(num_threads);
  for (StreamValues& values : scratch.alone) allocate(values, weights, 1, false);
  allocate(scratch.block, weights, kBlockTokens, bf16);
  allocate(scratch.products, weights, 1);
  allocate(scratch.block_products, weights, kBlockTokens);
}

size_t stream_bytes(const Streams& streams) {
  size_t total = streams.token_in.num_bytes();
  for (const auto& matrices : {streams.entering, streams.leaving})
    for (const Matrix& matrix : matrices) total += matrix.num_bytes();
  for (const StreamLayer& layer : streams.layers) {
    for (const Linear* linear : {&layer.low_in, &layer.low_out, &layer.token_gate, &layer.token_out})
      total += linear->weight.num_bytes();
    for (const SmallMatrix* matrix : {&layer.router, &layer.prediction, &layer.correction})
      total += matrix->stored.num_bytes();
  }
  return total;
}

StreamPass::StreamPass(Decoder& decoder, int thread, const Tokens& tokens, bool alone)
    : weights_(decoder.weights),
      streams_(weights_.streams),
      kernels_(decoder.kernels),
      threads_(decoder.threads),
      values_(alone && streams_.count > 0 ? decoder.streams.alone[thread] : decoder.streams.block),
      products_(alone ? decoder.streams.products : decoder.streams.block_products),
      tokens_(tokens),
      thread_(thread),
      num_threads_(decoder.threads.size()),
      num_tokens_(tokens.inputs.num_tokens),
      alone_(alone),
      low_{values_.low.view, num_tokens_, tokens.inputs.num_exact},
      wide_(wide_stride(weights_)),
      narrow_(streams_.count > 0 ? narrow_stride(weights_) : 0),
      embedded_(embedded_stride(weights_)) {}

void StreamPass::multiply_part(const Matrix& w, const Batch& batch, float* y, size_t stride) const {
  const Range blocks = share(w.num_blocks(), thread_, num_threads_);
  if (blocks.begin < blocks.end) multiply(kernels_, w, batch, y, stride, blocks.begin, blocks.end);
}

void StreamPass::prepare_state(int t, const float* from) {
  prepare_inputs(weights_, kernels_, {}, from, tokens_.inputs.token(t));
}

void StreamPass::quantize_low(int t, int size) {
  const Activations x = low_.token(t);
  std::fill(x.values + size, x.values + x.stride, 0.0f);
  kernels_.quantize(x, x.stride, 1);
}

void StreamPass::set_length(const float* first, const float* from, float* values) const {
  const int size = weights_.hidden;
  const float wanted = std::sqrt(dot(first, first, size) / size);
  const float length = std::sqrt(std::max(dot(from, from, size) / size, kLeastSquare));
  for (int i = 0; i < size; ++i) values[i] = from[i] * wanted / length;
}

void StreamPass::enter() {
  each([&](int t) { prepare_state(t, state(t)); });
  settle();
  multiply_part(streams_.token_in, tokens_.inputs, products_.embedded.get(), embedded_);
  for (int number = 1; number < streams_.count; ++number)
    multiply_part(streams_.entering[number - 1], tokens_.inputs, product(0, number), wide_);
  barrier();
  each([&](int t) {
    begin_streams(t);
    embed_layers(t);
  });
}

void StreamPass::begin_streams(int t) {
  std::memcpy(stream(t, 0), state(t), sizeof(float) * weights_.hidden);
  for (int number = 1; number < streams_.count; ++number) set_length(state(t), product(t, number), stream(t, number));
}

// A token's row of the table, of all layers, and what its embedding gives for each.
void StreamPass::embed_layers(int t) {
  const int size = streams_.token_size, id = tokens_.rows[t].id;
  const float table_scale = std::sqrt(static_cast<float>(size));
  const float scale = 1.0f / std::sqrt(static_cast<float>(weights_.hidden));
  float* scratch = low_.token(t).values;
  unpack_row(streams_.token_table, id < streams_.token_table.rows ? id : 0, embedded(t, 0));
  for (size_t layer = 0; layer < weights_.layers.size(); ++layer) {
    float* values = embedded(t, static_cast<int>(layer));
    const float* from = products_.embedded.get() + t * embedded_ + layer * size;
    for (int i = 0; i < size; ++i) scratch[i] = from[i] * scale;
    apply_norm(weights_, kernels_, streams_.token_norm, scratch, size, scratch);
    for (int i = 0; i < size; ++i) values[i] = (scratch[i] + values[i] * table_scale) * kRootHalf;
  }
}

void StreamPass::look(const StreamLayer& layer, const float* x, float* scratch, float* out) const {
  const int size = weights_.hidden;
  apply_norm(weights_, kernels_, layer.router_norm, x, size, scratch);
  for (int number = 0; number < streams_.count; ++number)
    out[number] = tanh_of(dot(layer.router.values + size_t(number) * size, scratch, size) / size);
}

void StreamPass::predict(int layer, int t) {
  const StreamLayer& weights = streams_.layers[layer];
  const int count = streams_.count, size = weights_.hidden;
  float seen[kMostStreams], factors[kMostStreams * kMostStreams], old[kMostStreams][kChunk];
  look(weights, stream(t, streams_.active), tokens_.inputs.token(t).values, seen);
  for (int i = 0; i < count * count; ++i) factors[i] = dot(weights.prediction.values + i * count, seen, count);
  for (int begin = 0; begin < size; begin += kChunk) {
    const int length = std::min(kChunk, size - begin);
    for (int number = 0; number < count; ++number)
      std::memcpy(old[number], stream(t, number) + begin, sizeof(float) * length);
    for (int number = 0; number < count; ++number) {
      float* values = stream(t, number) + begin;
      for (int other = 0; other < count; ++other)
        for (int i = 0; i < length; ++i) values[i] += factors[number * count + other] * old[other][i];
    }
  }
  std::memcpy(state(t), stream(t, streams_.active), sizeof(float) * size);
}

void StreamPass::keep_normed(int t) {
  std::memcpy(normed(t), tokens_.inputs.token(t).values, sizeof(float) * weights_.hidden);
}

void StreamPass::enter_low(int layer) {
  multiply_part(streams_.layers[layer].low_in.weight, tokens_.inputs, narrow(0), narrow_);
}

void StreamPass::prepare_low(int layer, int t) {
  const int size = streams_.layers[layer].low_in.weight.rows;
  std::memcpy(low_.token(t).values, narrow(t), sizeof(float) * size);
  quantize_low(t, size);
}

void StreamPass::leave_low(int layer) { multiply_part(streams_.layers[layer].low_out.weight, low_, wide(0), wide_); }

void StreamPass::join_low(int layer, int t) {
  float *values = tokens_.inputs.token(t).values, *x = state(t);
  const float* from = normed(t);
  apply_norm(weights_, kernels_, streams_.layers[layer].low_norm, wide(t), weights_.hidden, values);
  for (int i = 0; i < weights_.hidden; ++i) x[i] = (x[i] + (from[i] + values[i])) * kRootHalf;
}

const float* StreamPass::cutoffs(int layer) {
  const GateCutoff& cutoff = weights_.layers[layer].cutoff;
  if (!cutoff.mean) return nullptr;
  multiply_part(cutoff.spread, tokens_.inputs, narrow(0), narrow_);
  barrier();
  each([&](int t) {
    const float mean = dot(cutoff.mean, tokens_.inputs.token(t).values, weights_.hidden);
    values_.cutoffs.get()[t] = mean + std::sqrt(dot(narrow(t), narrow(t), cutoff.spread.rows));
  });
  settle();
  return values_.cutoffs.get();
}

void StreamPass::correct(const StreamLayer& layer, int t) {
  const int count = streams_.count;
  float *x = state(t), seen[kMostStreams];
  look(layer, x, tokens_.inputs.token(t).values, seen);
  const float* foretold = stream(t, streams_.active);
  for (int i = 0; i < weights_.hidden; ++i) x[i] -= foretold[i];
  for (int number = 0; number < count; ++number) {
    const float factor = dot(layer.correction.values + number * count, seen, count) + 1.0f;
    float* values = stream(t, number);
    for (int i = 0; i < weights_.hidden; ++i) values[i] += x[i] * factor;
  }
}

void StreamPass::leave(int layer) {
  const StreamLayer& weights = streams_.layers[layer];
  const int size = streams_.token_size;
  each([&](int t) {
    correct(weights, t);
    float* x = state(t);
    std::memcpy(x, stream(t, streams_.active), sizeof(float) * weights_.hidden);
    if (weights.output_scale)
      for (int i = 0; i < weights_.hidden; ++i) x[i] *= weights.output_scale[i];
    prepare_state(t, x);
  });
  settle();
  multiply_part(weights.token_gate.weight, tokens_.inputs, narrow(0), narrow_);
  barrier();
  each([&](int t) {
    float* values = low_.token(t).values;
    kernels_.activate(weights_.neuron_function, narrow(t), embedded(t, layer), round_up(size, kBlockRows), 1, values,
                      0);
    quantize_low(t, size);
  });
  settle();
  multiply_part(weights.token_out.weight, low_, wide(0), wide_);
  barrier();
  each([&](int t) {
    float* values = tokens_.inputs.token(t).values;
    apply_norm(weights_, kernels_, weights.token_norm, wide(t), weights_.hidden, values);
    for (int number = 1; number < streams_.count; ++number) kernels_.add(stream(t, number), values, weights_.hidden);
  });
}

void StreamPass::merge() {
  for (int number = 1; number < streams_.count; ++number) {
    each([&](int t) { prepare_state(t, stream(t, number)); });
    settle();
    multiply_part(streams_.leaving[number - 1], tokens_.inputs, product(0, number), wide_);
    settle();
  }
  if (alone_) barrier();
  each([&](int t) {
    float *x = state(t), *values = tokens_.inputs.token(t).values;
    std::memcpy(x, stream(t, 0), sizeof(float) * weights_.hidden);
    for (int number = 1; number < streams_.count; ++number) {
      set_length(stream(t, 0), product(t, number), values);
      kernels_.add(x, values, weights_.hidden);
    }
    for (int i = 0; i < weights_.hidden; ++i) x[i] /= static_cast<float>(streams_.count);
  });
}

}  // namespace coreinfer
