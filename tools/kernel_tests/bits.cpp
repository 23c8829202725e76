// Every table that has a fused multiply-add computes the same bits, on every processor, with every C library and compiler: a
// digest of each operation's results beside the one that is written here. bfloat16 weights are left out (docs/arithmetic.md).
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../runtime/engines/native/csrc/elementary.h"
#include "../../runtime/engines/native/csrc/kv_cache.h"
#include "../../runtime/engines/native/csrc/neurons.h"
#include "checks.h"
#include "weights.h"

using namespace coreinfer;

namespace {

// FNV-1a.
class Digest {
 public:
  template <class T>
  void add(const T* values, size_t count) {
    for (size_t i = 0; i < count * sizeof(T); ++i) {
      value_ ^= reinterpret_cast<const uint8_t*>(values)[i];
      value_ *= 0x100000001b3;
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

std::vector<float> numbers(size_t count) {
  std::vector<float> out(count);
  for (float& value : out) value = draw();
  return out;
}

constexpr int kTokens = 5, kRows = 50, kCols = 1100;  // more than a segment of int4 and int8

void fill(ActivationBuffer& x, int num_tokens, const Kernels& kernels) {
  x.resize(num_tokens, kCols);
  for (int t = 0; t < num_tokens; ++t)
    for (int i = 0; i < kCols; ++i) x.view.token(t).values[i] = draw();
  kernels.quantize(x.view, x.view.stride, num_tokens);
  for (int t = 0; t < num_tokens; ++t) kernels.measure(x.view.token(t), x.view.stride);
}

void quantize(const Kernels& kernels, Digest& digest) {
  ActivationBuffer x;
  fill(x, kTokens, kernels);
  const size_t count = size_t(kTokens) * x.view.stride;
  digest.add(x.view.codes, count);
  for (const float* groups : {x.view.scales, x.view.sums, x.view.energies}) digest.add(groups, count / kGroup);
}

template <Format kFormat>
void multiply(const Kernels& kernels, Digest& digest) {
  const Weights w(kFormat, kRows, kCols);
  for (int num_tokens : {1, kTokens}) {
    ActivationBuffer x;
    fill(x, num_tokens, kernels);
    std::vector<float> out(size_t(num_tokens) * 64);
    kernels.multiply(w.view, x.view, num_tokens, out.data(), 64, 0, w.view.num_blocks());
    for (int t = 0; t < num_tokens; ++t) digest.add(out.data() + t * 64, kRows);
  }
}

void screen(const Kernels& kernels, Digest& digest) {
  const Weights w(Format::int8_planes, 48, kCols);
  ActivationBuffer x;
  fill(x, kTokens, kernels);
  std::vector<float> scores(48 * kTokens), bounds(3 * kTokens);
  kernels.screen(w.view, x.view, kTokens, {scores.data(), 48, bounds.data(), 3, 8.0f}, 0, 3);
  digest.add(scores.data(), scores.size());
  digest.add(bounds.data(), bounds.size());
}

void norms(const Kernels& kernels, Digest& digest) {
  for (int size : {1, 7, 64, 583}) {
    const std::vector<float> x = numbers(size), weight = numbers(size), bias = numbers(size);
    std::vector<float> out(size);
    kernels.rms_norm(x.data(), weight.data(), 1e-5f, size, out.data());
    digest.add(out.data(), size);
    kernels.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, size, out.data());
    digest.add(out.data(), size);
  }
}

template <Nonlinearity kKind>
void activate(const Kernels& kernels, Digest& digest) {
  constexpr int kSize = 1024;
  std::vector<float> gate = numbers(kSize), out(kSize);
  const std::vector<float> up = numbers(kSize);
  for (float& value : gate) value *= 5.0f;
  NeuronFunction function = kKind;
  function.alpha = 1.702f, function.most = 0.75f;
  kernels.activate(function, gate.data(), up.data(), kSize, 1, out.data(), kSize);
  digest.add(out.data(), kSize);
}

void attend(const Kernels& kernels, Digest& digest) {
  constexpr int kHead = 40, kPast = 300, kQueries = 3;
  for (const bool wide : {false, true}) {
    PagePool pool(PageLayout({wide}, 1, kHead), 9);
    Sequence sequence;
    extend(pool, sequence, kPast);
    for (int position = 0; position < kPast; ++position) {
      const std::vector<float> key = numbers(kHead), value = numbers(kHead);
      pool.store(kernels, sequence.pages.data(), 0, 0, position, key.data(), value.data());
    }
    const int stride = pool.layout.value_stride();
    const std::vector<float> queries = numbers(kQueries * kHead);
    std::vector<float> out(2 * kQueries * stride), maxima(2 * kQueries), sums(2 * kQueries), joined(kQueries * kHead);
    std::vector<AttentionPart> parts;
    for (int part = 0; part < 2; ++part) {
      float *values = out.data() + part * kQueries * stride, *most = maxima.data() + part * kQueries;
      float* totals = sums.data() + part * kQueries;
      kernels.attend({sequence.pages.data(), pool.head(0, 0), kHead, stride, queries.data(), kQueries, part ? 163 : 7,
                      part ? kPast : 163, part ? 1.5f : 0.0f, values, most, totals});
      parts.push_back({values, most, totals});
    }
    for (const std::vector<float>* found : {&out, &maxima, &sums}) digest.add(found->data(), found->size());
    kernels.combine(parts.data(), 2, kQueries, kHead, nullptr, joined.data());
    digest.add(joined.data(), joined.size());
  }
}

void sinks(const Kernels& kernels, Digest& digest) {
  constexpr int kHead = 40, kHeads = 6, kStride = 48;
  const std::vector<float> values = numbers(2 * kHeads * kStride), maxima = numbers(2 * kHeads),
                           sinks = numbers(kHeads);
  std::vector<float> sums = numbers(2 * kHeads), joined(kHeads * kHead);
  for (float& sum : sums) sum = 1.0f + sum * sum;
  const AttentionPart parts[] = {{values.data(), maxima.data(), sums.data()},
                                 {values.data() + kHeads * kStride, maxima.data() + kHeads, sums.data() + kHeads}};
  kernels.combine(parts, 2, kHeads, kHead, sinks.data(), joined.data());
  digest.add(joined.data(), joined.size());
}

void rotate(const Kernels& kernels, Digest& digest) {
  for (int half : {3, 20, 32}) {
    std::vector<float> head = numbers(2 * half);
    kernels.rotate(head.data(), numbers(2 * half).data(), half);
    digest.add(head.data(), head.size());
    kernels.limit(head.data(), 2 * half, 0.7f);
    kernels.add(head.data(), numbers(2 * half).data(), 2 * half);
    digest.add(head.data(), head.size());
    std::vector<uint16_t> halves(2 * half);
    kernels.to_half(head.data(), 2 * half, halves.data());
    digest.add(halves.data(), halves.size());
  }
}

void neurons(const Kernels& kernels, Digest& digest) {
  constexpr int kCount = 37;
  Matrix w;
  w.format = Format::int4_rows;
  w.rows = kCount;
  w.cols = kCols;
  std::vector<uint8_t> bytes(w.num_bytes());
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator() % 64);  // scales are positive halves then
  w.codes = bytes.data();
  std::vector<int32_t> ids(kCount);
  for (int i = 0; i < kCount; ++i) ids[i] = i;
  ActivationBuffer x;
  fill(x, 1, kernels);
  NeuronInputBuffer inputs;
  inputs.resize(w.num_parts());
  interleave(x.view, w, inputs);
  std::vector<float> out(kCount), sums(num_sums(w));
  kernels.dot_neurons({w, ids.data(), kCount}, inputs.view(), out.data());
  kernels.add_neurons({w, ids.data(), kCount}, numbers(kCount).data(), sums.data());
  digest.add(out.data(), out.size());
  digest.add(sums.data(), sums.size());
}

void elementary(const Kernels&, Digest& digest) {
  for (int i = 0; i < 10'000; ++i) {
    const Direction direction = direction_of(draw() * static_cast<float>(i) * 53.0f);
    const float power_of = power(1e4f + 1e3f * static_cast<float>(i), 0.25f + draw() / 8);
    const double others[] = {exponential(20.0 * draw()), logarithm(3.0 + draw())};
    digest.add(&direction.cosine, 1);
    digest.add(&direction.sine, 1);
    digest.add(&power_of, 1);
    digest.add(others, 2);
  }
}

struct Operation {
  const char* name;
  void (*run)(const Kernels& kernels, Digest& digest);
  uint64_t expected;
};

constexpr Operation kOperations[] = {
    {"quantize", quantize, 0x1140de2c5f8fea6f},
    {"multiply int4", multiply<Format::int4>, 0x68e5933e86325727},
    {"multiply int8", multiply<Format::int8>, 0x6ddea7e1d2f20688},
    {"multiply int8 in planes", multiply<Format::int8_planes>, 0xb729024b1b1175b0},
    {"screen", screen, 0x64ff3ce2493f50ed},
    {"norms", norms, 0xdeaf9c55ea18ae59},
    {"silu", activate<Nonlinearity::silu>, 0x9432121f04a7be},
    {"gelu_tanh", activate<Nonlinearity::gelu_tanh>, 0x641e75febcc3c4},
    {"gelu_erf", activate<Nonlinearity::gelu_erf>, 0x7e2e8ec2e638f07e},
    {"relu", activate<Nonlinearity::relu>, 0x55f789247df7023a},
    {"clamped_swiglu", activate<Nonlinearity::clamped_swiglu>, 0xdc8aac75921a6b07},
    {"attend", attend, 0xe11642914c1c94d1},
    {"sinks", sinks, 0x42149924ba0ca367},
    {"rotate", rotate, 0x2978bbfea4d8c802},
    {"neurons", neurons, 0x9b3ce6217cfe2ec3},
    {"elementary", elementary, 0x42a4533a1e158404},
};

}  // namespace

void test_bits(const Kernels& kernels) {
#if !defined(__aarch64__)
  if (&kernels == &portable_kernels()) return;  // which has no fused multiply-add here
#endif
  for (const Operation& operation : kOperations) {
    generator.seed(1);
    Digest digest;
    operation.run(kernels, digest);
    if (digest.value() == operation.expected) continue;
    std::printf("%s: expected bits with the digest %#llx, got %#llx\n", operation.name,
                static_cast<unsigned long long>(operation.expected), static_cast<unsigned long long>(digest.value()));
    ++num_failures;
  }
}
