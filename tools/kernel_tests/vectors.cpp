// Norms, nonlinearities, halves and rotations.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"

using namespace coreinfer;

namespace {

// (2, size rounded up to 16).
Buffer<float> twice(const Buffer<float>& x, int size) {
  Buffer<float> both;
  const int padded = round_up(size, 16);
  both.resize(2 * padded);
  for (int i = 0; i < 2 * padded; ++i) both.get()[i] = x.get()[i % padded];
  return both;
}

// Also far beyond the limit, and NaN, which must not become a number.
void test_limit(const Kernels& kernels) {
  for (float most : {0.5f, 30.0f})
    for (int size : {1, 7, 16, 33}) {
      Buffer<float> got, expected;
      got.resize(size), expected.resize(size);
      for (int i = 0; i < size; ++i) {
        const float x = most * 40 * draw() * draw() * draw();
        got.get()[i] = x;
        expected.get()[i] = most * std::tanh(x / most);
      }
      kernels.limit(got.get(), size, most);
      compare("limit", got.get(), expected.get(), size);
      got.get()[size - 1] = std::nanf("");
      kernels.limit(got.get(), size, most);
      expect("limit: NaN became a number", std::isnan(got.get()[size - 1]));
    }
}

void test_norms_and_activations(const Kernels& kernels) {
  const Kernels& portable = portable_kernels();
  for (int size : {1, 7, 16, 33, 100}) {
    Buffer<float> x, y, got, expected;
    for (Buffer<float>* buffer : {&x, &y, &got, &expected}) buffer->resize(round_up(size, 16));
    for (int i = 0; i < size; ++i) x.get()[i] = 4 * draw(), y.get()[i] = draw();
    kernels.rms_norm(x.get(), y.get(), 1e-5f, size, got.get());
    portable.rms_norm(x.get(), y.get(), 1e-5f, size, expected.get());
    compare("rms_norm", got.get(), expected.get(), size);
    kernels.layer_norm(x.get(), y.get(), y.get(), 1e-5f, size, got.get());
    portable.layer_norm(x.get(), y.get(), y.get(), 1e-5f, size, expected.get());
    expect("layer_norm: other bits than the portable one's", std::equal(got.get(), got.get() + size, expected.get()));
    const size_t stride = round_up(size, 16) + 16;
    Buffer<float> pair;
    pair.resize(2 * stride);
    for (Nonlinearity kind :
         {Nonlinearity::silu, Nonlinearity::gelu_tanh, Nonlinearity::gelu_erf, Nonlinearity::relu}) {
      // Two tokens, the second of which is the first one's numbers again.
      kernels.activate(kind, twice(x, size).get(), twice(y, size).get(), round_up(size, 16), 2, pair.get(), stride);
      for (int i = 0; i < size; ++i) {
        const double v = x.get()[i];
        double a = v > 0 ? v : 0;
        if (kind == Nonlinearity::silu) a = v / (1 + std::exp(-v));
        if (kind == Nonlinearity::gelu_tanh)
          a = 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
        if (kind == Nonlinearity::gelu_erf) a = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
        expected.get()[i] = static_cast<float>(a * y.get()[i]);
      }
      for (int t = 0; t < 2; ++t) compare("activate", pair.get() + t * stride, expected.get(), size, 1.0f);
    }
    NeuronFunction clamped = Nonlinearity::clamped_swiglu;
    clamped.alpha = 1.702f, clamped.most = 1.5f;
    kernels.activate(clamped, x.get(), y.get(), round_up(size, 16), 1, pair.get(), stride);
    for (int i = 0; i < size; ++i) {
      const double gate = std::min(double(x.get()[i]), 1.5), up = std::clamp(double(y.get()[i]), -1.5, 1.5);
      expected.get()[i] = static_cast<float>((up + 1) * gate / (1 + std::exp(-double(clamped.alpha) * gate)));
    }
    compare("clamped_swiglu", pair.get(), expected.get(), size, 1.0f);
    uint16_t halves[112];
    kernels.to_half(x.get(), size, halves);
    for (int i = 0; i < size; ++i)
      if (halves[i] != float_to_half(x.get()[i])) {
        std::printf("to_half: expected %g, got %g\n", x.get()[i], half_to_float(halves[i]));
        ++num_failures;
      }
  }
}

void test_gelu_erf(const Kernels& kernels) {
  constexpr int kSize = 4096;
  Buffer<float> x, got;
  x.resize(kSize), got.resize(kSize);
  for (int i = 0; i < kSize; ++i) x.get()[i] = static_cast<float>(i - kSize / 2) / 200;
  kernels.activate(Nonlinearity::gelu_erf, nullptr, x.get(), kSize, 1, got.get(), kSize);
  double most = 0, most_relative = 0;
  for (int i = 0; i < kSize; ++i) {
    const double v = x.get()[i], expected = 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    const double error = std::fabs(got.get()[i] - expected);
    most = std::max(most, error / std::max(1.0, std::fabs(v)));
    if (v > -6 && v != 0) most_relative = std::max(most_relative, error / std::fabs(expected));
  }
  expect("gelu_erf: expected errors below 2e-7, and 3e-6 of the result", most < 2e-7 && most_relative < 3e-6);
}

void test_rotate(const Kernels& kernels) {
  for (int half : {1, 4, 12, 32, 40}) {
    Buffer<float> got, angles, expected;
    for (Buffer<float>* buffer : {&got, &angles, &expected}) buffer->resize(2 * half);
    for (int i = 0; i < 2 * half; ++i) got.get()[i] = draw(), angles.get()[i] = draw();
    for (int i = 0; i < half; ++i) {
      const float low = got.get()[i], high = got.get()[half + i], c = angles.get()[i], s = angles.get()[half + i];
      expected.get()[i] = low * c - high * s;
      expected.get()[half + i] = high * c + low * s;
    }
    kernels.rotate(got.get(), angles.get(), half);
    compare("rotate", got.get(), expected.get(), 2 * half);
  }
}

}  // namespace

void test_vectors(const Kernels& kernels) {
  test_norms_and_activations(kernels);
  test_limit(kernels);
  test_gelu_erf(kernels);
  test_rotate(kernels);
}
