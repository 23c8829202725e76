// The kernels, written once over the vector type `V` that the including file defines.
// Included inside an anonymous namespace of a file with target options of its own, after all headers: nothing here may
// be shared between files, or the linker would mix instruction sets.

constexpr int kVectors = kBlockRows / V::kLanes;  // vectors that hold one block of rows
constexpr int kSumLanes = kBlockRows;  // of sums of floats, whatever a vector has: all widths then have the same
constexpr float kHuge = 3.0e38f;

inline V::F exp_vector(V::F x) {
  // Cody-Waite reduction by ln 2 and a minimax polynomial (Cephes expf).
  // In this order of operands a NaN stays one.
  x = V::max(V::set1(-87.0f), V::min(V::set1(88.0f), x));
  const V::F n = V::round(x * V::set1(1.44269504088896341f));
  const V::F r = V::fma(n, V::set1(2.12194440e-4f), V::fma(n, V::set1(-0.693359375f), x));
  V::F p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  return V::fma(p, r * r, r + V::set1(1.0f)) * V::power_of_two(n);
}

#include "kernels_rounding.h"

// How one tile of 16 rows x 32 inputs is stored, by format.
template <Format kFormat>
struct Tile {
  static constexpr bool kNibbles = kFormat != Format::int8;
  static constexpr bool kPlanes = kFormat == Format::int8_planes;
  static constexpr int kBytes = kNibbles ? 256 : 512;
  // Zero point in sixteenths, where it is the same for all rows.
  static constexpr float kZero = kPlanes ? 16 * 128.0f : 16.0f * V::kByteOffset;
};

// Add the products of one tile of nibbles; `nibble_sums` makes whole sums of what a vector type adds up.
template <int kTokens, int kChains>
inline void add_nibbles(const uint8_t* codes, const int8_t* quads, int stride, V::I (*sums)[kChains][kVectors]) {
  for (int j = 0; j < 4; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const V::B bytes = V::load_bytes(codes + j * 64 + v * V::kLanes * 4);
      const V::B low = V::low_nibbles(bytes), high = V::high_nibbles(bytes);
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* quad = quads + size_t(t) * stride + j * 8;
        sums[t][0][v] = V::dot_nibbles(sums[t][0][v], low, quad);
        sums[t][kChains - 1][v] = V::dot_nibbles(sums[t][kChains - 1][v], high, quad + 4);
      }
    }
}

// The same of inputs of which some read the high bits alone.
template <int kTokens, int kChains>
inline void add_nibble_bits(const uint8_t* codes, const int8_t* quads, const uint8_t* bits, int stride,
                            V::I (*sums)[kChains][kVectors]) {
  for (int j = 0; j < 4; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const V::B bytes = V::load_bytes(codes + j * 64 + v * V::kLanes * 4);
      for (int t = 0; t < kTokens; ++t) {
        const size_t at = size_t(t) * stride + j * 8;
        V::I(&own)[kChains][kVectors] = sums[t];
        own[0][v] = V::dot_nibbles(own[0][v], V::low_nibbles(bytes, bits + at), quads + at);
        own[kChains - 1][v] =
            V::dot_nibbles(own[kChains - 1][v], V::high_nibbles(bytes, bits + at + 4), quads + at + 4);
      }
    }
}

template <int kTokens, int kChains>
inline void add_bytes(const uint8_t* codes, const int8_t* quads, int stride, V::I (*sums)[kChains][kVectors]) {
  for (int j = 0; j < 8; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const V::B bytes = V::load_bytes(codes + j * 64 + v * V::kLanes * 4);
      for (int t = 0; t < kTokens; ++t) {
        auto& sum = sums[t][j % kChains][v];
        sum = V::dot_bytes(sum, bytes, quads + size_t(t) * stride + j * 4);
      }
    }
}

// The same for both planes of a tile at once: where bytes multiply as fast as nibbles, putting their halves together
// first saves half of the products, which pays where several tokens share it.
template <int kTokens>
inline void add_planes(const uint8_t* codes, const uint8_t* lows, const int8_t* quads, int stride,
                       V::I (*sums)[1][kVectors]) {
  for (int j = 0; j < 4; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const int at = j * 64 + v * V::kLanes * 4;
      const V::B high_halves = V::load_bytes(codes + at), low_halves = V::load_bytes(lows + at);
      const V::B first = V::join_low(high_halves, low_halves), second = V::join_high(high_halves, low_halves);
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* quad = quads + size_t(t) * stride + j * 8;
        sums[t][0][v] = V::dot_bytes(V::dot_bytes(sums[t][0][v], first, quad), second, quad + 4);
      }
    }
}

template <int kTokens, int kChains>
inline void clear(V::I (*sums)[kChains][kVectors]) {
  for (int t = 0; t < kTokens; ++t)
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < kVectors; ++v) sums[t][c][v] = V::zero();
}

// The sums of one tile's nibbles or bytes, the chains put together.
template <bool kNibbles, int kChains>
inline V::F joined(const V::I (*chains)[kVectors], int v) {
  V::I sum = chains[0][v];
  if constexpr (kChains == 2) sum = kNibbles ? V::add_nibble_sums(sum, chains[1][v]) : V::add_int(sum, chains[1][v]);
  return V::to_float(kNibbles ? V::nibble_sums(sum) : sum);
}

inline void prefetch_tile(const uint8_t* codes, int num_bytes) {
  for (int line = 0; line < num_bytes; line += 64) __builtin_prefetch(codes + 3072 + num_bytes + line);
}

template <int kTokens>
inline void clear_totals(V::F (&totals)[kTokens][kVectors]) {
  for (auto& vectors : totals)
    for (auto& value : vectors) value = V::set1(0.0f);
}

// Add a segment's totals to those before it; `group` is the one after it.
template <int kTokens>
inline void end_segment(V::F (&totals)[kTokens][kVectors], float* y, size_t y_stride, int block, int group) {
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + t * y_stride + block * kBlockRows + v * V::kLanes;
      V::store(to, group <= kSegmentGroups ? totals[t][v] : V::load(to) + totals[t][v]);
    }
  clear_totals(totals);
}

// One block of 16 rows times kTokens tokens, from integer codes; with kBits those of int4 that each input reads.
template <Format kFormat, int kTokens, bool kBits = false>
inline void multiply_codes(const Matrix& w, const Activations& x, float* y, size_t y_stride, int block) {
  using T = Tile<kFormat>;
  constexpr int kChains = kTokens == 1 ? 2 : 1;  // independent sums hide the latency of the dot product
  constexpr bool kJoins = T::kPlanes && kTokens > 1 && V::kJoinsPlanes;
  constexpr bool kNibbles = T::kNibbles && !kJoins;
  constexpr float kZero = kJoins ? 16.0f * V::kByteOffset : T::kZero;
  const int num_groups = w.num_groups(), x_groups = x.stride / kGroup;
  const size_t tile = size_t(block) * num_groups;
  const uint8_t* codes = w.codes + tile * T::kBytes;
  const uint8_t* lows = w.lows + (T::kPlanes ? tile * T::kBytes : 0);
  const uint16_t* scales = w.scales + tile * kBlockRows;
  const uint8_t* zeros = w.zeros + (kFormat == Format::int4 ? tile * kBlockRows : 0);
  V::F total[kTokens][kVectors];
  clear_totals(total);
  for (int g = 0; g < num_groups; ++g, codes += T::kBytes, scales += kBlockRows) {
    if (has_segments(kFormat) && g > 0 && g % kSegmentGroups == 0) end_segment(total, y, y_stride, block, g);
    V::I sums[kTokens][kChains][kVectors], low_sums[kTokens][kChains][kVectors];
    const int8_t* quads = x.codes + g * kGroup;
    clear<kTokens, kChains>(sums);
    if constexpr (kBits)
      add_nibble_bits<kTokens, kChains>(codes, quads, x.bits + g * kGroup, x.stride, sums);
    else if constexpr (kJoins)
      add_planes<kTokens>(codes, lows + g * T::kBytes, quads, x.stride, sums);
    else if constexpr (kNibbles)
      add_nibbles<kTokens, kChains>(codes, quads, x.stride, sums);
    else
      add_bytes<kTokens, kChains>(codes, quads, x.stride, sums);
    if constexpr (T::kPlanes && !kJoins) {
      clear<kTokens, kChains>(low_sums);
      add_nibbles<kTokens, kChains>(lows + g * T::kBytes, quads, x.stride, low_sums);
    }
    prefetch_tile(codes, T::kBytes);
    for (int v = 0; v < kVectors; ++v) {
      const V::F scale = V::load_half(scales + v * V::kLanes);
      V::F zero = V::set1(kZero);
      if constexpr (kFormat == Format::int4) zero = V::load_u8(zeros + g * kBlockRows + v * V::kLanes);
      for (int t = 0; t < kTokens; ++t) {
        V::F value = joined<kNibbles, kChains>(sums[t], v);
        if constexpr (T::kPlanes && !kJoins)
          value = V::fma(value, V::set1(16.0f), joined<true, kChains>(low_sums[t], v));
        if constexpr (kBits) value = value + V::set1(x.low_sums[t * x_groups + g]);
        if constexpr (kFormat == Format::int4 || kZero != 0)
          value = V::fnma(zero, V::set1(x.sums[t * x_groups + g]), value);
        total[t][v] = V::fma(value, scale * V::set1(x.scales[t * x_groups + g]), total[t][v]);
      }
    }
  }
  end_segment(total, y, y_stride, block, has_segments(kFormat) ? num_groups : 0);
}

#include "kernels_screen.h"

// kRows rows times kTokens tokens, from bfloat16.
template <int kRows, int kTokens>
inline void multiply_bf16_rows(const Matrix& w, const Activations& x, float* y, size_t y_stride, int row) {
  V::F total[kRows][kTokens];
  for (auto& vectors : total)
    for (auto& value : vectors) value = V::set1(0.0f);
  const uint16_t* weights = w.bf16 + size_t(row) * w.cols;
  int col = 0;
  for (; col + V::kLanes <= w.cols; col += V::kLanes)
    for (int r = 0; r < kRows; ++r) {
      const V::F weight = V::load_bf16(weights + size_t(r) * w.cols + col);
      for (int t = 0; t < kTokens; ++t)
        total[r][t] = V::fma(weight, V::load(x.values + size_t(t) * x.stride + col), total[r][t]);
    }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      float sum = V::reduce_add(total[r][t]);
      for (int c = col; c < w.cols; ++c)
        sum += bf16_to_float(weights[size_t(r) * w.cols + c]) * x.values[size_t(t) * x.stride + c];
      y[t * y_stride + row + r] = sum;
    }
}

template <int kTokens>
inline void multiply_bf16_block(const Matrix& w, const Activations& x, float* y, size_t y_stride, int block) {
  const int end = block * kBlockRows + kBlockRows < w.rows ? block * kBlockRows + kBlockRows : w.rows;
  int row = block * kBlockRows;
  for (; row + 4 <= end; row += 4) multiply_bf16_rows<4, kTokens>(w, x, y, y_stride, row);
  for (; row < end; ++row) multiply_bf16_rows<1, kTokens>(w, x, y, y_stride, row);
}

template <int kTokens>
inline void multiply_block(const Matrix& w, const Activations& x, float* y, size_t y_stride, int block) {
  if (w.format == Format::int4 && x.bits) return multiply_codes<Format::int4, kTokens, true>(w, x, y, y_stride, block);
  if (w.format == Format::int4) return multiply_codes<Format::int4, kTokens>(w, x, y, y_stride, block);
  if (w.format == Format::int8) return multiply_codes<Format::int8, kTokens>(w, x, y, y_stride, block);
  if (w.format == Format::int8_planes) return multiply_codes<Format::int8_planes, kTokens>(w, x, y, y_stride, block);
  constexpr int kStep = kTokens < V::kTileTokensBf16 ? kTokens : V::kTileTokensBf16;
  int t = 0;
  for (; t + kStep <= kTokens; t += kStep) multiply_bf16_block<kStep>(w, x.token(t), y + t * y_stride, y_stride, block);
  for (; t < kTokens; ++t) multiply_bf16_block<1>(w, x.token(t), y + t * y_stride, y_stride, block);
}

// As many tokens as decode together, in one pass over the block: at most kMost, at least one.
template <int kMost>
inline void multiply_few(int num_tokens, const Matrix& w, const Activations& x, float* y, size_t y_stride, int block) {
  if constexpr (kMost > 1)
    if (num_tokens < kMost) return multiply_few<kMost - 1>(num_tokens, w, x, y, y_stride, block);
  multiply_block<kMost>(w, x, y, y_stride, block);
}

void multiply(const Matrix& w, const Activations& x, int num_tokens, float* y, size_t y_stride, int block_begin,
              int block_end) {
  // A block of weights stays in the first-level cache while all tokens pass.
  for (int block = block_begin; block < block_end; ++block) {
    int t = 0;
    for (; t + V::kTileTokens <= num_tokens; t += V::kTileTokens)
      multiply_block<V::kTileTokens>(w, x.token(t), y + t * y_stride, y_stride, block);
    if (t < num_tokens)
      multiply_few<V::kTileTokens - 1>(num_tokens - t, w, x.token(t), y + t * y_stride, y_stride, block);
  }
}

// The last, partial vector of a row: buffers need no padding.
inline void load_tail(const float* x, int size, float* padded) {
  for (int i = 0; i < V::kLanes; ++i) padded[i] = i < size ? x[i] : 0.0f;
}

void rms_norm(const float* x, const float* weight, float epsilon, int size, float* out) {
  V::F squares[kVectors];
  for (auto& lanes : squares) lanes = V::set1(0.0f);
  int i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) {
      const V::F value = V::load(x + i + v * V::kLanes);
      squares[v] = V::fma(value, value, squares[v]);
    }
  float sum = V::reduce_lanes(squares);
  for (int j = i; j < size; ++j) sum += x[j] * x[j];
  const float scale = 1.0f / __builtin_sqrtf(sum / size + epsilon);
  for (i = 0; i + V::kLanes <= size; i += V::kLanes)
    V::store(out + i, V::load(x + i) * V::set1(scale) * V::load(weight + i));
  for (; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int size, float* out) {
  float mean = 0.0f, variance = 0.0f;
  for (int i = 0; i < size; ++i) mean += x[i];
  mean /= size;
  for (int i = 0; i < size; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(variance / size + epsilon);
  for (int i = 0; i < size; ++i) out[i] = (x[i] - mean) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

#include "kernels_activations.h"

int largest(const float* values, int size) {
  constexpr int kStep = 1024;
  float best = values[0];
  int start = 0;
  for (int first = 0; first < size; first += kStep) {
    const int last = first + kStep < size ? first + kStep : size;
    V::F most = V::set1(best);
    int i = first;
    for (; i + V::kLanes <= last; i += V::kLanes) most = V::max(V::load(values + i), most);
    float found = V::reduce_max(most);
    for (; i < last; ++i) found = values[i] > found ? values[i] : found;
    if (found > best) {
      best = found;
      start = first;
    }
  }
  while (start + 1 < size && values[start] < best) ++start;
  return start;
}

void add(float* x, const float* y, int size) {
  int i = 0;
  for (; i + V::kLanes <= size; i += V::kLanes) V::store(x + i, V::load(x + i) + V::load(y + i));
  for (; i < size; ++i) x[i] += y[i];
}

// tanh(u) = 1 - 2 / (1 + exp(2 u)), whose error is that of a number near 1: small beside the limit.
inline V::F limited(V::F x, float most) {
  const V::F one = V::set1(1.0f), two = V::set1(2.0f);
  return V::set1(most) * (one - two / (one + exp_vector(x * V::set1(2.0f / most))));
}

void limit(float* x, int size, float most) {
  int i = 0;
  for (; i + V::kLanes <= size; i += V::kLanes) V::store(x + i, limited(V::load(x + i), most));
  if (i == size) return;
  float padded[V::kLanes];
  load_tail(x + i, size - i, padded);
  V::store(padded, limited(V::load(padded), most));
  for (int j = 0; i < size; ++i, ++j) x[i] = padded[j];
}

#include "kernels_attention.h"

void to_half(const float* x, int size, uint16_t* out) {
  int i = 0;
  for (; i + V::kLanes <= size; i += V::kLanes) V::store_half(out + i, V::load(x + i));
  if (i == size) return;
  float padded[V::kLanes];
  uint16_t halves[V::kLanes];
  load_tail(x + i, size - i, padded);
  V::store_half(halves, V::load(padded));
  for (int j = 0; i < size; ++i, ++j) out[i] = halves[j];
}

uint64_t read_sum(const uint64_t* words, size_t num_words) {
  typedef uint64_t Words __attribute__((vector_size(V::kLanes * 4)));
  constexpr size_t kStep = V::kLanes / 2;
  Words sums[4] = {};
  for (size_t i = 0; i + 4 * kStep <= num_words; i += 4 * kStep)
    for (int j = 0; j < 4; ++j) sums[j] += *reinterpret_cast<const Words*>(words + i + j * kStep);
  const Words all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t total = 0;
  for (size_t i = 0; i < kStep; ++i) total += all[i];
  return total;
}

#include "kernels_neurons.h"

#include "kernels_columns_bf16.h"

#include "kernels_columns.h"

const Kernels kTable = {V::kName,   false,    quantize, measure,     multiply,    screen,       rms_norm,
                        layer_norm, activate, largest,  attend,      combine,     rotate,       add,
                        limit,      to_half,  read_sum, dot_neurons, add_neurons, kTileOutputs, multiply_columns,
                        keep_wanted};
