// Compares every kernel table that the CPU can run with the portable one, at odd sizes. Needs no Python, so that it
// also runs under an emulator (tools/test-aarch64.sh). Prints one line a table; the exit status says whether all agree.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "../runtime/engines/native/csrc/kv_cache.h"
#include "../runtime/engines/native/csrc/scratch.h"
#include "../runtime/engines/native/csrc/threads.h"

using namespace coreinfer;

namespace {

std::mt19937 generator(1);
int num_failures = 0;

float draw() { return std::uniform_real_distribution<float>(-2.0f, 2.0f)(generator); }

// `scale`: of what is computed with, where results can be much smaller.
void compare(const char* what, const float* got, const float* expected, size_t count, float scale = 1e-6f) {
  for (size_t i = 0; i < count; ++i) scale = std::max(scale, std::fabs(expected[i]));
  for (size_t i = 0; i < count; ++i) {
    if (std::fabs(got[i] - expected[i]) <= 2e-5f * scale) continue;
    std::printf("%s: element %zu: expected %g, got %g\n", what, i, expected[i], got[i]);
    ++num_failures;
    return;
  }
}

void expect(const char* what, bool holds) {
  if (holds) return;
  std::printf("%s\n", what);
  ++num_failures;
}

struct Weights {
  Weights(Format format, int rows, int cols) {
    view.format = format;
    view.rows = rows;
    view.cols = cols;
    const size_t tiles = size_t(view.num_blocks()) * view.num_groups();
    bytes.resize(tiles * view.tile_bytes());
    halves.resize(std::max(tiles * kBlockRows, size_t(rows) * cols));
    zeros.resize(tiles * kBlockRows);
    for (size_t i = 0; i < tiles * view.tile_bytes(); ++i) bytes.get()[i] = 1 + generator() % 255;
    for (size_t i = 0; i < tiles * kBlockRows; ++i) {
      halves.get()[i] = float_to_half(0.01f * (1.0f + draw()));
      zeros.get()[i] = generator() % 256;
    }
    lows.resize(tiles * view.tile_bytes());
    for (size_t i = 0; i < tiles * view.tile_bytes(); ++i) lows.get()[i] = generator() % 256;
    view.codes = bytes.get();
    view.lows = lows.get();
    view.scales = halves.get();
    view.zeros = zeros.get();
    if (format != Format::bf16) return;
    for (int i = 0; i < rows * cols; ++i) halves.get()[i] = 0x3f00 + generator() % 256 + (generator() % 2 << 15);
    view.bf16 = halves.get();
  }
  Matrix view;
  Buffer<uint8_t> bytes, zeros, lows;
  Buffer<uint16_t> halves;
};

void fill(ActivationBuffer& x, int num_tokens, int size) {
  x.resize(num_tokens, size);
  for (int t = 0; t < num_tokens; ++t)
    for (int i = 0; i < size; ++i) x.view.token(t).values[i] = draw();
}

void test_multiply(const Kernels& kernels) {
  const Kernels& portable = portable_kernels();
  for (Format format : {Format::bf16, Format::int8, Format::int4, Format::int8_planes})
    for (int rows : {1, 5, 16, 17, 50})
      for (int cols : {1, 31, 32, 33, 70, 256})
        for (int num_tokens : {1, 2, 3, 9}) {
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

void test_screen(const Kernels& kernels) {
  for (int rows : {5, 16, 50})
    for (int cols : {31, 256}) {
      const Weights w(Format::int8_planes, rows, cols);
      ActivationBuffer x;
      fill(x, 1, cols);
      portable_kernels().quantize(x.view, x.view.stride, 1);
      portable_kernels().measure(x.view, x.view.stride);
      const int size = round_up(rows, kBlockRows);
      Buffer<float> got[2], expected[2];
      for (auto* pair : {got, expected}) pair[0].resize(size), pair[1].resize(size);
      kernels.screen(w.view, x.view, got[0].get(), got[1].get(), 0, w.view.num_blocks());
      portable_kernels().screen(w.view, x.view, expected[0].get(), expected[1].get(), 0, w.view.num_blocks());
      compare("screen", got[0].get(), expected[0].get(), size);
      compare("deviations", got[1].get(), expected[1].get(), size);
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

// (2, size rounded up to 16).
Buffer<float> twice(const Buffer<float>& x, int size) {
  Buffer<float> both;
  const int padded = round_up(size, 16);
  both.resize(2 * padded);
  for (int i = 0; i < 2 * padded; ++i) both.get()[i] = x.get()[i % padded];
  return both;
}

void test_vectors(const Kernels& kernels) {
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
    compare("layer_norm", got.get(), expected.get(), size);
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
    uint16_t halves[112];
    kernels.to_half(x.get(), size, halves);
    for (int i = 0; i < size; ++i)
      if (halves[i] != float_to_half(x.get()[i])) {
        std::printf("to_half: expected %g, got %g\n", x.get()[i], half_to_float(halves[i]));
        ++num_failures;
      }
  }
}

// A sequence with pages of its own, of a model of two layers and two heads.
struct Cache {
  Cache(int head_dim, int num_tokens, bool wide) : pool(PageLayout({!wide, wide}, 2, head_dim), 9) {
    pool.take();  // so that pages do not begin where the pool does
    extend(pool, sequence, num_tokens);
  }
  void store(int position, const float* key, const float* value) {
    pool.store(portable_kernels(), sequence.pages.data(), 1, 1, position, key, value);
  }
  const int32_t* pages() const { return sequence.pages.data(); }
  CachedHead head() const { return pool.head(1, 1); }

  PagePool pool;
  Sequence sequence;
};

float kept(float value, bool wide) { return wide ? value : half_to_float(float_to_half(value)); }

void test_attend(const Kernels& kernels, bool wide) {
  for (int head_dim : {2, 8, 64, 80})
    for (int num_queries : {1, 3, 5})
      for (const auto& [begin, end] : {std::pair{0, 1}, {0, 15}, {3, 40}, {16, 17}, {7, 300}, {5, 5}}) {
        Cache cache(head_dim, 300, wide);
        Buffer<float> key, value, queries, out, maxima, sums, expected;
        key.resize(size_t(300) * head_dim);
        value.resize(size_t(300) * head_dim);
        queries.resize(num_queries * head_dim);
        for (int i = 0; i < 300 * head_dim; ++i) key.get()[i] = draw(), value.get()[i] = draw();
        for (int i = 0; i < num_queries * head_dim; ++i) queries.get()[i] = draw();
        for (int p = 0; p < 300; ++p) cache.store(p, key.get() + p * head_dim, value.get() + p * head_dim);
        const int stride = cache.pool.layout.value_stride();
        out.resize(num_queries * stride);
        maxima.resize(num_queries);
        sums.resize(num_queries);
        expected.resize(num_queries * stride);
        kernels.attend({cache.pages(), cache.head(), head_dim, stride, queries.get(), num_queries, begin, end,
                        out.get(), maxima.get(), sums.get()});
        if (begin == end) continue;
        for (int q = 0; q < num_queries; ++q) {
          double total = 0;
          std::vector<double> sum(head_dim);
          for (int p = begin; p < end; ++p) {
            double score = 0;
            for (int d = 0; d < head_dim; ++d)
              score += double(queries.get()[q * head_dim + d]) * kept(key.get()[p * head_dim + d], wide);
            const double weight = std::exp(score - maxima.get()[q]);
            total += weight;
            for (int d = 0; d < head_dim; ++d) sum[d] += weight * kept(value.get()[p * head_dim + d], wide);
          }
          for (int d = 0; d < head_dim; ++d) {
            expected.get()[q * stride + d] = static_cast<float>(sum[d] / total);
            out.get()[q * stride + d] /= sums.get()[q];
          }
        }
        compare("attend", out.get(), expected.get(), num_queries * stride);
      }
}

// Attending to two ranges of positions and combining them is attending to both at once; a part may be empty.
void test_combine(const Kernels& kernels) {
  for (int head_dim : {2, 8, 24, 64, 80})
    for (int split : {1, 20, 40}) {
      const int num_heads = 3, stride = round_up(head_dim, 16), size = 40;
      Buffer<float> values[3], maxima[3], sums[3], queries, key, out, expected;
      Cache cache(head_dim, size, false);
      for (Buffer<float>* buffer : {&queries, &key, &out, &expected}) buffer->resize(size_t(size) * num_heads * stride);
      for (int i = 0; i < num_heads * head_dim; ++i) queries.get()[i] = draw();
      for (int p = 0; p < size; ++p) {
        for (int i = 0; i < head_dim; ++i) key.get()[i] = draw();
        cache.store(p, key.get(), key.get());
      }
      const int bounds[3][2] = {{0, split}, {split, size}, {0, size}};
      for (int part = 0; part < 3; ++part) {
        values[part].resize(num_heads * stride);
        maxima[part].resize(num_heads);
        sums[part].resize(num_heads);
        kernels.attend({cache.pages(), cache.head(), head_dim, stride, queries.get(), num_heads, bounds[part][0],
                        bounds[part][1], values[part].get(), maxima[part].get(), sums[part].get()});
      }
      const AttentionPart parts[3] = {{values[0].get(), maxima[0].get(), sums[0].get()},
                                      {values[1].get(), maxima[1].get(), sums[1].get()},
                                      {values[2].get(), maxima[2].get(), sums[2].get()}};
      kernels.combine(parts, 2, num_heads, head_dim, out.get());
      portable_kernels().combine(parts + 2, 1, num_heads, head_dim, expected.get());
      compare("combine", out.get(), expected.get(), num_heads * head_dim);
    }
}

bool follow_one_another(const Sequence& sequence) {
  for (size_t i = 1; i < sequence.pages.size(); ++i)
    if (sequence.pages[i] != sequence.pages[i - 1] + 1) return false;
  return true;
}

// Sequences that grow by turns keep their pages together, and no page is taken twice when the pool is full. A
// sequence alone gets the pages, and their memory, that the one before it had.
void test_pages() {
  PagePool pool(PageLayout({false}, 1, 64), 64);
  Sequence sequences[4], all;
  for (int again = 0; again < 2; ++again) {
    extend(pool, all, 5 * kPageTokens);
    expect("pages: expected the first ones again", all.pages == std::vector<int32_t>{0, 1, 2, 3, 4});
    truncate(pool, all, 0);
  }
  for (int turn = 0; turn < 8; ++turn)
    for (Sequence& sequence : sequences) {
      extend(pool, sequence, kPageTokens);
      sequence.num_cached += kPageTokens;
    }
  for (const Sequence& sequence : sequences)
    expect("pages: expected those of a sequence side by side", follow_one_another(sequence));
  extend(pool, all, pool.num_free() * kPageTokens);
  std::vector<int32_t> pages = all.pages;
  for (const Sequence& sequence : sequences) pages.insert(pages.end(), sequence.pages.begin(), sequence.pages.end());
  std::sort(pages.begin(), pages.end());
  for (int page = 0; page < 64; ++page) expect("pages: expected each of them once", pages[page] == page);
}

// Pages that are given back to the system read as zeros; others keep what they hold, also where they share 4 KB.
void test_given_back() {
  for (int head_dim : {8, 64, 80}) {
    PagePool pool(PageLayout({false, true}, 2, head_dim), 9, 0);
    Sequence sequence;
    extend(pool, sequence, 9 * kPageTokens);
    Buffer<float> ones;
    ones.resize(head_dim);
    std::fill_n(ones.get(), head_dim, 1.0f);
    for (int position = 0; position < 9 * kPageTokens; ++position)
      for (int head = 0; head < 4; ++head)
        pool.store(portable_kernels(), sequence.pages.data(), head / 2, head % 2, position, ones.get(), ones.get());
    const auto count_ones = [&](int page) {
      const size_t size = size_t(kPageTokens) * head_dim;
      const float* keys = static_cast<const float*>(pool.head(1, 1).keys) + page * size;
      return static_cast<size_t>(std::count(keys, keys + size, 1.0f));
    };
    const size_t size = size_t(kPageTokens) * head_dim;
    for (int page : {4, 0, 3, 7}) pool.release(page);
    for (int page : {1, 2, 5, 6, 8}) expect("given back: expected a held page to keep all", count_ones(page) == size);
    for (int page : {1, 2, 5, 6, 8}) pool.release(page);
    for (int page = 0; page < 9; ++page) expect("given back: expected no memory in a free page", count_ones(page) == 0);
  }
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

// Every block of every deal is worked on once, whoever is quick, and before the barrier ends.
void test_deal() {
  constexpr int kMostBlocks = 200;
  for (int num_threads : {1, 2, 3, 7}) {
    Threads threads(num_threads);
    std::vector<int> times(kMostBlocks);
    for (int count : {0, 1, 2, 5, 16, 37, kMostBlocks}) {
      for (int slow = 0; slow < num_threads; ++slow)
        threads.run([&](int thread) {
          for (int round = 0; round < 20; ++round) {
            threads.deal(thread, count, [&](int begin, int end) {
              if (thread == slow) std::this_thread::yield();
              for (int i = begin; i < end; ++i) ++times[i];
            });
            threads.barrier(thread);
          }
        });
      for (int i = 0; i < kMostBlocks; ++i)
        if (times[i] != (i < count ? 20 * num_threads : 0)) ++num_failures;
      std::fill(times.begin(), times.end(), 0);
    }
  }
  std::printf("deals: %s\n", num_failures == 0 ? "whole" : "WRONG");
}

// No thread leaves a barrier before the last has come, whether the others spin, yield or sleep until then: on free cores,
// and beside threads that never give theirs back.
void test_waits() {
  const int before = num_failures;
  std::atomic<bool> stop{false};
  std::vector<std::thread> busy;
  for (bool beside : {false, true}) {
    for (unsigned core = 0; beside && core < std::thread::hardware_concurrency(); ++core)
      busy.emplace_back([&] {
        while (!stop) continue;
      });
    for (int num_threads : {2, 5}) {
      Threads threads(num_threads);
      std::vector<int> rounds(num_threads);
      std::atomic<int> num_early{0};
      threads.run([&](int thread) {
        for (int round = 1; round <= 60; ++round) {
          const int microseconds[] = {0, 50, 400, 3000};
          if (round % num_threads == thread)
            std::this_thread::sleep_for(std::chrono::microseconds(microseconds[round % 4]));
          rounds[thread] = round;
          threads.barrier(thread);
          for (int other : rounds) num_early += other != round;
          threads.barrier(thread);
        }
      });
      num_failures += num_early;
    }
  }
  stop = true;
  for (std::thread& thread : busy) thread.join();
  std::printf("waits: %s\n", num_failures == before ? "kept" : "WRONG");
}

// A forked process, which has but the thread that forked, goes on with threads of its own, and so does its parent.
void test_fork() {
#if defined(__unix__) || defined(__APPLE__)
  const int before = num_failures;
  Threads threads(3);
  std::atomic<int> num_calls{0};
  const auto work = [&] {
    threads.run([&](int thread) {
      threads.deal(thread, 37, [&](int begin, int end) { num_calls += end - begin; });
      threads.barrier(thread);
      threads.deal(thread, 5, [&](int begin, int end) { num_calls += end - begin; });
    });
    return num_calls.exchange(0) == 42;
  };
  if (!work()) ++num_failures;
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(work() && work() ? 0 : 1);
  }
  int status = 1;
  if (waitpid(child, &status, 0) != child || status != 0 || !work()) ++num_failures;
  std::printf("forks: %s\n", num_failures == before ? "work" : "WRONG");
#endif
}

}  // namespace

int main() {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const bool nan = (half & 0x7fff) > 0x7c00;
    if (!nan && float_to_half(half_to_float(half)) != half) ++num_failures;
  }
  test_deal();
  test_waits();
  test_fork();
  test_pages();
  test_given_back();
  for (const Kernels* kernels : available_kernels()) {
    const int before = num_failures;
    test_multiply(*kernels);
    test_many(*kernels);
    test_screen(*kernels);
    test_quantize(*kernels);
    test_vectors(*kernels);
    for (bool wide : {false, true}) test_attend(*kernels, wide);
    test_combine(*kernels);
    test_rotate(*kernels);
    std::printf("%s: %s\n", kernels->name, num_failures == before ? "agrees" : "DIFFERS");
  }
  return num_failures == 0 ? 0 : 1;
}
