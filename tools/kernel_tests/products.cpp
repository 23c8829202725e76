// Products of matrices and inputs, and how inputs are rounded for them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"
#include "weights.h"

using namespace coreinfer;

namespace {

void fill(ActivationBuffer& x, int num_tokens, int size) {
  x.resize(num_tokens, size);
  for (int t = 0; t < num_tokens; ++t)
    for (int i = 0; i < size; ++i) x.view.token(t).values[i] = draw();
}

// Several tokens as each alone, to the bit; more than one tile of 16, whole and not.
void expect_as_alone(const Kernels& kernels, const Matrix& w, const Activations& x, int num_tokens,
                     const float* together) {
  const size_t stride = round_up(w.rows, kBlockRows);
  Buffer<float> alone;
  alone.resize(stride);
  for (int t = 0; t < num_tokens; ++t) {
    kernels.multiply(w, x.token(t), 1, alone.get(), stride, 0, w.num_blocks());
    expect("multiply as alone", std::memcmp(alone.get(), together + t * stride, w.rows * sizeof(float)) == 0);
  }
}

void test_multiply(const Kernels& kernels) {
  const Kernels& portable = portable_kernels();
  for (Format format : {Format::bf16, Format::int8, Format::int4, Format::int8_planes})
    for (int rows : {1, 5, 16, 17, 50})
      for (int cols : {1, 31, 32, 33, 70, 256, 2100})
        for (int num_tokens : {1, 2, 3, 9, 16, 27, 35}) {
          const Weights w(format, rows, cols);
          ActivationBuffer x;
          fill(x, num_tokens, cols);
          portable.quantize(x.view, x.view.stride, num_tokens);
          const size_t stride = round_up(rows, kBlockRows);
          Buffer<float> got, expected;
          got.resize(num_tokens * stride);
          expected.resize(num_tokens * stride);
          kernels.multiply(w.view, x.view, num_tokens, got.get(), stride, 0, w.view.num_blocks());
          portable.multiply(w.view, x.view, num_tokens, expected.get(), stride, 0, w.view.num_blocks());
          compare("multiply", got.get(), expected.get(), num_tokens * stride);
          if (w.view.quantized()) expect_as_alone(kernels, w.view, x.view, num_tokens, got.get());
        }
}

float to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bf16_to_float(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// Products of inputs and weights that are both rounded to bfloat16, or of unrounded inputs with weights that are.
void multiply_bf16(const Weights& w, const Activations& x, int num_tokens, float* y, size_t y_stride) {
  Buffer<float> row;
  row.resize(x.stride);
  for (int r = 0; r < w.view.rows; ++r) {
    unpack_row(w.view, r, row.get());
    for (int t = 0; t < num_tokens; ++t) {
      double sum = 0;
      for (int i = 0; i < w.view.cols; ++i) {
        const float input = x.token(t).values[i];
        sum += double(to_bf16(row.get()[i])) * (w.view.quantized() ? to_bf16(input) : input);
      }
      y[t * y_stride + r] = static_cast<float>(sum);
    }
  }
}

// Some blocks of many tokens, into the columns of a wider matrix; what lies around must stay.
void test_many(const Kernels& kernels) {
  if (!kernels.rounds_to_bf16) return;
  for (Format format : {Format::bf16, Format::int8, Format::int4, Format::int8_planes})
    for (int rows : {1, 16, 17, 80})
      for (int cols : {31, 32, 70, 256})
        for (int num_tokens : {1, 16, 31, 32, 71}) {
          const Weights w(format, rows, cols);
          ActivationBuffer x;
          x.resize(num_tokens, cols, true);
          for (int t = 0; t < num_tokens; ++t)
            for (int i = 0; i < cols; ++i) x.view.token(t).values[i] = draw();
          kernels.quantize(x.view, x.view.stride, num_tokens);
          const int begin = w.view.num_blocks() > 2 ? 1 : 0, first = begin * kBlockRows;
          const size_t stride = round_up(rows, kBlockRows) + 16, count = size_t(num_tokens) * stride;
          Buffer<float> got, expected;
          got.resize(count);
          expected.resize(count);
          multiply_bf16(w, x.view, num_tokens, expected.get(), stride);
          for (int t = 0; t < num_tokens; ++t) std::fill_n(expected.get() + t * stride, first, 0.0f);
          kernels.multiply(w.view, x.view, num_tokens, got.get(), stride, begin, w.view.num_blocks());
          // Rows that fill up the last block may hold anything.
          for (int t = 0; t < num_tokens; ++t)
            std::fill(got.get() + t * stride + rows, got.get() + t * stride + stride - 16, 0.0f);
          // Two bfloat16 numbers have 16 bits, a product of inputs and weights is 8 at most.
          compare("multiply many", got.get(), expected.get(), count, 8.0f);
        }
}

struct ScreenBuffer {
  ScreenBuffer(const Weights& w, int num_tokens) : stride(w.view.num_blocks() * kBlockRows + 16) {
    scores.resize(num_tokens * stride);
    bounds.resize(num_tokens * num_bounds(w));
  }
  static size_t num_bounds(const Weights& w) { return w.view.num_blocks() + 3; }
  Screened view(const Weights& w) { return {scores.get(), stride, bounds.get(), num_bounds(w), 8.0f}; }
  size_t stride;
  Buffer<float> scores, bounds;
};

// Several tokens at once: as the portable kernels do it, and to the bit as each token alone.
void test_screen(const Kernels& kernels) {
  for (int rows : {5, 16, 50})
    for (int cols : {31, 256})
      for (int num_tokens : {1, 2, 3, 7, 9}) {
        const Weights w(Format::int8_planes, rows, cols);
        const int num_blocks = w.view.num_blocks();
        ActivationBuffer x;
        fill(x, num_tokens, cols);
        portable_kernels().quantize(x.view, x.view.stride, num_tokens);
        for (int t = 0; t < num_tokens; ++t) portable_kernels().measure(x.view.token(t), x.view.stride);
        ScreenBuffer got(w, num_tokens), expected(w, num_tokens), alone(w, num_tokens);
        kernels.screen(w.view, x.view, num_tokens, got.view(w), 0, num_blocks);
        portable_kernels().screen(w.view, x.view, num_tokens, expected.view(w), 0, num_blocks);
        const int size = num_blocks * kBlockRows;
        for (int t = 0; t < num_tokens; ++t) {
          kernels.screen(w.view, x.view.token(t), 1, alone.view(w).token(t), 0, num_blocks);
          const Screened a = got.view(w).token(t), b = expected.view(w).token(t), c = alone.view(w).token(t);
          compare("screen", a.scores, b.scores, size);
          compare("bounds", a.bounds, b.bounds, num_blocks);
          expect("screen: differs beside other tokens", std::equal(a.scores, a.scores + size, c.scores));
          expect("bounds: differ beside other tokens", std::equal(a.bounds, a.bounds + num_blocks, c.bounds));
        }
      }
}

void test_quantize(const Kernels& kernels) {
  constexpr int kTokens = 3;
  for (int size : {32, 96, 320}) {
    ActivationBuffer got, expected;
    fill(got, kTokens, size + kGroup);
    std::fill(got.view.values, got.view.values + 32, 0.0f);  // a group of zeros
    expected.resize(kTokens, size + kGroup);
    std::memcpy(expected.view.values, got.view.values, sizeof(float) * kTokens * got.view.stride);
    // The last group of each token is left alone.
    kernels.quantize(got.view, size, kTokens);
    portable_kernels().quantize(expected.view, size, kTokens);
    const int num_values = kTokens * got.view.stride, num_groups = num_values / kGroup;
    expect("quantize: the same codes", std::memcmp(got.view.codes, expected.view.codes, num_values) == 0);
    expect("quantize: no more than was asked for", got.view.scales[size / kGroup] == 0.0f);
    compare("scales", got.view.scales, expected.view.scales, num_groups);
    compare("sums", got.view.sums, expected.view.sums, num_groups);
    kernels.measure(got.view.token(1), size);
    portable_kernels().measure(expected.view.token(1), size);
    compare("energies", got.view.energies, expected.view.energies, num_groups);
  }
}

}  // namespace

void test_products(const Kernels& kernels) {
  test_multiply(kernels);
  test_many(kernels);
  test_screen(kernels);
  test_quantize(kernels);
}
