// Attention to cached positions, and the parts of its softmax put together.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../runtime/engines/native/csrc/kv_cache.h"
#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"

using namespace coreinfer;

namespace {

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

void test_attend(const Kernels& kernels, bool wide, float limit) {
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
        kernels.attend({cache.pages(), cache.head(), head_dim, stride, queries.get(), num_queries, begin, end, limit,
                        out.get(), maxima.get(), sums.get()});
        if (begin == end) continue;
        for (int q = 0; q < num_queries; ++q) {
          double total = 0;
          std::vector<double> sum(head_dim);
          for (int p = begin; p < end; ++p) {
            double score = 0;
            for (int d = 0; d < head_dim; ++d)
              score += double(queries.get()[q * head_dim + d]) * kept(key.get()[p * head_dim + d], wide);
            if (limit > 0) score = limit * std::tanh(score / limit);
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

// A sink is one more score, whose value is 0: however large, and also of parts that are not first.
void test_sinks(const Kernels& kernels) {
  for (const float size : {0.0f, 1.0f, 40.0f})
    for (int head_dim : {8, 24, 64}) {
      const int num_heads = 3, stride = round_up(head_dim, 16);
      std::vector<float> values[2], maxima(2 * num_heads), sums(2 * num_heads), sinks(num_heads);
      std::vector<AttentionPart> parts;
      for (int part = 0; part < 2; ++part) {
        values[part].resize(num_heads * stride);
        for (float& value : values[part]) value = draw();
        for (int head = 0; head < num_heads; ++head) {
          maxima[part * num_heads + head] = 3 * draw();
          // The second part of the second head is empty.
          sums[part * num_heads + head] = part == 1 && head == 1 ? 0.0f : 2.5f + draw();
        }
        parts.push_back({values[part].data(), maxima.data() + part * num_heads, sums.data() + part * num_heads});
      }
      maxima[num_heads + 1] = -std::numeric_limits<float>::infinity();
      for (float& sink : sinks) sink = size * draw();
      std::vector<float> out(num_heads * head_dim), expected(num_heads * head_dim);
      for (int num_parts : {1, 2}) {
        kernels.combine(parts.data(), num_parts, num_heads, head_dim, sinks.data(), out.data());
        for (int head = 0; head < num_heads; ++head)
          for (int d = 0; d < head_dim; ++d) {
            double total = std::exp(double(sinks[head])), sum = 0;
            for (int p = 0; p < num_parts; ++p) {
              const double weight = std::exp(double(parts[p].maxima[head]));
              if (parts[p].sums[head] == 0.0f) continue;
              total += weight * parts[p].sums[head];
              sum += weight * values[p][head * stride + d];
            }
            expected[head * head_dim + d] = static_cast<float>(sum / total);
          }
        compare("combine with sinks", out.data(), expected.data(), out.size());
      }
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
                        bounds[part][1], 0.0f, values[part].get(), maxima[part].get(), sums[part].get()});
      }
      const AttentionPart parts[3] = {{values[0].get(), maxima[0].get(), sums[0].get()},
                                      {values[1].get(), maxima[1].get(), sums[1].get()},
                                      {values[2].get(), maxima[2].get(), sums[2].get()}};
      kernels.combine(parts, 2, num_heads, head_dim, nullptr, out.get());
      portable_kernels().combine(parts + 2, 1, num_heads, head_dim, nullptr, expected.get());
      compare("combine", out.get(), expected.get(), num_heads * head_dim);
    }
}

}  // namespace

void test_attention(const Kernels& kernels) {
  for (bool wide : {false, true})
    for (float limit : {0.0f, 1.5f}) test_attend(kernels, wide, limit);
  test_combine(kernels);
  test_sinks(kernels);
}
