// Matrices that lie input by input, against the same ones by rows.
#include <cmath>
#include <cstring>
#include <numeric>

#include "../../runtime/engines/native/csrc/column_pass.h"
#include "../../runtime/engines/native/csrc/scratch.h"
#include "checks.h"
#include "weights.h"

using namespace coreinfer;

namespace {

// Some inputs are zero, and whole groups of them.
void fill_sparse(ActivationBuffer& x, int size, int share) {
  x.resize(1, size);
  for (int i = 0; i < size; ++i) {
    const bool wanted = int(generator() % 10) < share && i / kGroup % 5 != 3;
    x.view.values[i] = wanted ? draw() : 0.0f;
  }
}

void expect_same(const Kernels& kernels, const std::vector<const Matrix*>& rows, const Activations& x) {
  Threads threads(3);
  const Columns columns = make_columns(rows, kernels.column_tile, threads);
  Buffer<float> sums, got, expected;
  sums.resize(num_segment_sums(columns.matrix));
  got.resize(columns.matrix.num_outputs());
  threads.run([&](int thread) {
    const ColumnProduct product{&columns.matrix, x, sums.get()};
    add_columns(kernels, &product, 1, thread, threads);
    threads.barrier(thread);
  });
  for (size_t i = 0; i < rows.size(); ++i) {
    const Matrix& w = *rows[i];
    const int first = columns.parts[i].first, count = round_up(w.rows, kBlockRows);
    expected.resize(count);
    sum_segments(kernels, columns.matrix, sums.get(), first, first + count, got.get());
    kernels.multiply(w, x, 1, expected.get(), count, 0, w.num_blocks());
    expect("columns as rows", std::memcmp(got.get(), expected.get(), w.rows * sizeof(float)) == 0);
  }
}

void test_bytes(const Kernels& kernels) {
  const Weights w(Format::int4, 256, 64);
  Threads threads(2);
  const Columns columns = make_columns({&w.view}, kernels.column_tile, threads);
  ActivationBuffer x;
  fill_sparse(x, 64, 0);
  x.view.values[5] = x.view.values[40] = 1.0f;
  kernels.quantize(x.view, 64, 1);
  Buffer<float> sums;
  sums.resize(num_segment_sums(columns.matrix));
  size_t num_bytes[2];
  threads.run([&](int thread) {
    const ColumnProduct product{&columns.matrix, x.view, sums.get()};
    num_bytes[thread] = add_columns(kernels, &product, 1, thread, threads);
  });
  expect("bytes of two columns", num_bytes[0] + num_bytes[1] == 2 * (128 + 256 * 3));
}

void test_keep_wanted(const Kernels& kernels) {
  float x[19], norms[19];
  for (int i = 0; i < 19; ++i) x[i] = static_cast<float>(i - 9), norms[i] = i % 2 ? 2.0f : 1.0f;
  x[3] = std::nanf("");
  kernels.keep_wanted(x, norms, 8.0f, 19);
  for (int i = 0; i < 19; ++i) {
    if (i == 3) {
      expect("a NaN stays", std::isnan(x[i]));
      continue;
    }
    const float own = static_cast<float>(i - 9);
    expect("wanted inputs", x[i] == (std::fabs(own) * norms[i] > 8.0f ? own : 0.0f));
  }
}

// Several products at once give what each gives alone, and read as many bytes.
void expect_as_alone(const Kernels& kernels, int rows, int cols, int num_threads) {
  constexpr int kCount = 3;
  Threads threads(num_threads);
  std::vector<Weights> weights;
  for (int i = 0; i < kCount; ++i) weights.emplace_back(Format::int4, rows, cols);
  std::vector<Columns> columns;
  for (const Weights& w : weights) columns.push_back(make_columns({&w.view}, kernels.column_tile, threads));
  const size_t num_sums = num_segment_sums(columns[0].matrix);
  ActivationBuffer x[kCount];
  Buffer<float> alone, together;
  alone.resize(num_sums * kCount);
  together.resize(num_sums * kCount);
  std::vector<ColumnProduct> products;
  std::vector<size_t> num_bytes(num_threads), num_alone(num_threads);
  for (int i = 0; i < kCount; ++i) {
    fill_sparse(x[i], cols, 2 + 3 * i);
    kernels.quantize(x[i].view, x[i].view.stride, 1);
    products.push_back({&columns[i].matrix, x[i].view, together.get() + i * num_sums});
  }
  threads.run([&](int thread) {
    num_bytes[thread] = add_columns(kernels, products.data(), kCount, thread, threads);
    threads.barrier(thread);
    for (int i = 0; i < kCount; ++i) {
      const ColumnProduct product{&columns[i].matrix, x[i].view, alone.get() + i * num_sums};
      num_alone[thread] += add_columns(kernels, &product, 1, thread, threads);
      threads.barrier(thread);
    }
  });
  const auto total = [](const std::vector<size_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), size_t(0));
  };
  expect("products at once as alone", std::memcmp(alone.get(), together.get(), num_sums * kCount * sizeof(float)) == 0);
  expect("bytes of products at once", total(num_bytes) > 0 && total(num_bytes) == total(num_alone));
}

}  // namespace

void test_column_products(const Kernels& kernels) {
  for (const int num_threads : {1, 3})
    for (const int rows : {48, 2100, 8300}) expect_as_alone(kernels, rows, rows == 48 ? 1056 : 70, num_threads);
}

void test_columns(const Kernels& kernels) {
  for (int cols : {32, 70, 1024, 1056, 2500})
    for (int share : {0, 1, 6, 10}) {
      const Weights first(Format::int4, 48, cols), second(Format::int4, 17, cols), third(Format::int4, 8300, cols);
      ActivationBuffer x;
      fill_sparse(x, cols, share);
      kernels.quantize(x.view, x.view.stride, 1);
      expect_same(kernels, {&first.view}, x.view);
      expect_same(kernels, {&first.view, &second.view, &first.view}, x.view);
      if (cols == 1056) expect_same(kernels, {&third.view, &second.view}, x.view);
    }
  test_bytes(kernels);
  test_keep_wanted(kernels);
}
