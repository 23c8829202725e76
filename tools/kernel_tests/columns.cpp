// Matrices that lie input by input, against the same ones by rows.
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

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

// A third of the inputs read the high bits alone.
void fill_bits(const Activations& x) {
  for (int i = 0; i < x.stride; ++i) x.bits[i] = generator() % 3 ? kAllBits : kHighBits;
}

void expect_same(const Kernels& kernels, const std::vector<const Matrix*>& rows, const Activations& x, bool in_planes) {
  Threads threads(3);
  const Columns columns = make_columns(rows, kernels.column_tile, in_planes, threads);
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

size_t bytes_read(const Kernels& kernels, const Columns& columns, const Activations& x) {
  Threads threads(2);
  Buffer<float> sums;
  sums.resize(num_segment_sums(columns.matrix));
  size_t num_bytes[2];
  threads.run([&](int thread) {
    const ColumnProduct product{&columns.matrix, x, sums.get()};
    num_bytes[thread] = add_columns(kernels, &product, 1, thread, threads);
  });
  return num_bytes[0] + num_bytes[1];
}

void test_bytes(const Kernels& kernels) {
  const Weights w(Format::int4, 256, 64);
  Threads threads(2);
  const Columns columns = make_columns({&w.view}, kernels.column_tile, false, threads);
  const Columns planes = make_columns({&w.view}, kernels.column_tile, true, threads);
  ActivationBuffer x;
  fill_sparse(x, 64, 0);
  x.view.values[5] = x.view.values[40] = 1.0f;
  const Activations halved = x.halved();
  std::memset(halved.bits, kAllBits, 64);
  halved.bits[40] = halved.bits[41] = kHighBits;
  kernels.quantize(halved, 64, 1);
  expect("bytes of two columns", bytes_read(kernels, columns, x.view) == 2 * (128 + 256 * 3));
  expect("bytes of two columns in planes", bytes_read(kernels, planes, x.view) == 2 * (128 + 256 * 3));
  expect("bytes of a column and a half", bytes_read(kernels, planes, halved) == 128 + 64 + 2 * 256 * 3);
  const Weights bytes(Format::int8, 256, 64), numbers(Format::bf16, 256, 64);
  const Columns of_bytes = make_columns({&bytes.view}, kernels.column_tile, true, threads);
  const Columns of_numbers = make_columns({&numbers.view}, kernels.column_tile, true, threads);
  expect("bytes of two columns of int8", bytes_read(kernels, of_bytes, x.view) == 2 * (256 + 256 * 2));
  expect("bytes of two columns of bf16", bytes_read(kernels, of_numbers, x.view) == 2 * 256 * 2);
}

// Columns that some machine may gain by are as long in bytes, whatever the format; what is not of one format has none.
void test_least_bytes(const Kernels& kernels) {
  Threads threads(2);
  const ColumnLayout layout{kernels.column_tile, kLeastColumnBytes, {true, true, true, true}, false};
  const auto lies_so = [&](const std::vector<const Matrix*>& rows) {
    return !columns_of(rows, kDown, layout, threads).empty();
  };
  const std::pair<Format, int> least[] = {{Format::int4, 2048}, {Format::int8, 1024}, {Format::bf16, 512}};
  for (const auto& [format, outputs] : least) {
    const Weights all(format, outputs, 40), most(format, outputs - 16, 40), rest(format, 16, 40);
    expect("long columns", lies_so({&all.view}) && lies_so({&most.view, &rest.view}));
    expect("short columns", !lies_so({&most.view}));
  }
  const Weights planes(Format::int8_planes, 4096, 40), bytes(Format::int8, 4096, 40), numbers(Format::bf16, 4096, 40);
  expect("formats without columns", !lies_so({&planes.view}) && !lies_so({&bytes.view, &numbers.view}));
}

// What columns take in memory: of two groups of inputs the heads, and columns that lie a cache line apart.
void test_memory(const Kernels& kernels) {
  Threads threads(1);
  const auto num_bytes = [&](Format format) {
    const Weights w(format, 4096, 40);
    return make_columns({&w.view}, kernels.column_tile, true, threads).matrix.num_bytes();
  };
  expect("memory of int4", num_bytes(Format::int4) == 2 * 4096 * 3 + 2 * 64 * (1024 + 64));
  expect("memory of int8", num_bytes(Format::int8) == 2 * 4096 * 2 + 64 * (4096 + 64));
  expect("memory of bf16", num_bytes(Format::bf16) == 64 * (2 * 4096 + 64));
}

// What is not a number stays so in all formats, by columns as by rows.
void test_not_a_number(const Kernels& kernels) {
  for (const Format format : {Format::int4, Format::int8, Format::bf16}) {
    const Weights w(format, 48, 70);
    for (const int place : {3, 69}) {
      ActivationBuffer x;
      fill_sparse(x, 70, 5);
      x.view.values[place] = std::nanf("");
      kernels.quantize(x.view, x.view.stride, 1);
      Threads threads(1);
      const Columns columns = make_columns({&w.view}, kernels.column_tile, false, threads);
      Buffer<float> sums;
      sums.resize(num_segment_sums(columns.matrix));
      const ColumnProduct product{&columns.matrix, x.view, sums.get()};
      threads.run([&](int thread) { add_columns(kernels, &product, 1, thread, threads); });
      expect("a NaN among the inputs", std::isnan(sums.get()[0]) && std::isnan(sums.get()[47]));
    }
  }
}

void test_keep_wanted(const Kernels& kernels, bool halves) {
  float x[19], norms[19];
  uint8_t bits[19] = {};
  for (int i = 0; i < 19; ++i) x[i] = static_cast<float>(i - 9), norms[i] = i % 2 ? 2.0f : 1.0f;
  x[3] = std::nanf("");
  kernels.keep_wanted(x, norms, {8.0f, 12.0f}, 19, halves ? bits : nullptr);
  for (int i = 0; i < 19; ++i) {
    const float own = static_cast<float>(i - 9), score = std::fabs(own) * norms[i];
    if (i == 3)
      expect("a NaN stays", std::isnan(x[i]));
    else
      expect("wanted inputs", x[i] == (score > 8.0f ? own : 0.0f));
    if (score > 8.0f || i == 3)
      expect("bits of wanted inputs", bits[i] == (!halves ? 0 : i == 3 || score > 12.0f ? kAllBits : kHighBits));
  }
}

int code_at(const Matrix& w, int row, int input) {
  const size_t tile = size_t(row / kBlockRows) * w.num_groups() + input / kGroup;
  const int place = input % kGroup;
  const uint8_t both = w.codes[tile * w.tile_bytes() + place / 8 * 64 + row % kBlockRows * 4 + place % 4];
  return place % 8 < 4 ? both & 15 : both >> 4;
}

// Rows' products of some inputs' high bits, with the mean of the low ones, against the weights as numbers.
void expect_halves(const Kernels& kernels, const Matrix& w, const Activations& x, int num_tokens) {
  const int size = round_up(w.rows, kBlockRows);
  Buffer<float> got, expected;
  got.resize(size_t(num_tokens) * size);
  expected.resize(size_t(num_tokens) * size);
  kernels.multiply(w, x, num_tokens, got.get(), size, 0, w.num_blocks());
  for (int t = 0; t < num_tokens; ++t)
    for (int row = 0; row < w.rows; ++row) {
      double sum = 0;
      for (int j = 0; j < w.cols; ++j) {
        const size_t at = size_t(t) * x.stride + j;
        const size_t unit = (size_t(row / kBlockRows) * w.num_groups() + j / kGroup) * kBlockRows + row % kBlockRows;
        const int code = code_at(w, row, j);
        const double weight = x.bits[at] == kHighBits ? (code & 12) + 1.5 : code;
        sum += (weight - w.zeros[unit] / 16.0) * half_to_float(w.scales[unit]) * x.codes[at] * x.scales[at / kGroup];
      }
      expected.get()[size_t(t) * size + row] = static_cast<float>(sum);
    }
  for (int t = 0; t < num_tokens; ++t)
    compare("rows by high bits", got.get() + size_t(t) * size, expected.get() + size_t(t) * size, w.rows, 1.0f);
}

void test_halves(const Kernels& kernels) {
  for (const int cols : {32, 70, 1056}) {
    const Weights w(Format::int4, 49, cols);
    for (int num_tokens = 1; num_tokens <= 11; ++num_tokens) {
      ActivationBuffer buffer;
      buffer.resize(num_tokens, cols);
      const Activations x = buffer.halved();
      for (int t = 0; t < num_tokens; ++t) {
        for (int i = 0; i < cols; ++i) x.values[size_t(t) * x.stride + i] = draw();
        fill_bits(x.token(t));
      }
      kernels.quantize(x, x.stride, num_tokens);
      expect_halves(kernels, w.view, x, num_tokens);
    }
  }
}

// Several products at once give what each gives alone, and read as many bytes.
void expect_as_alone(const Kernels& kernels, Format format, int rows, int cols, int num_threads, bool in_planes) {
  constexpr int kCount = 3;
  Threads threads(num_threads);
  std::vector<Weights> weights;
  for (int i = 0; i < kCount; ++i) weights.emplace_back(format, rows, cols);
  std::vector<Columns> columns;
  for (const Weights& w : weights) columns.push_back(make_columns({&w.view}, kernels.column_tile, in_planes, threads));
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

// Columns of int8 and bf16; planes are asked for in vain, and bits of inputs mean nothing there.
void test_other_formats(const Kernels& kernels) {
  for (const Format format : {Format::int8, Format::bf16})
    for (int cols : {1, 32, 70, 1024, 1056, 2500})
      for (int share : {0, 1, 6, 10}) {
        const Weights first(format, 48, cols), second(format, 17, cols), third(format, 2100, cols);
        const Weights fourth(format, cols == 70 ? 33000 : 16, cols);  // two panels
        ActivationBuffer x;
        fill_sparse(x, cols, share);
        fill_bits(x.halved());
        for (const bool halved : {false, true}) {
          const Activations inputs = halved ? x.halved() : x.view;
          kernels.quantize(inputs, inputs.stride, 1);
          expect_same(kernels, {&first.view}, inputs, halved);
          expect_same(kernels, {&first.view, &second.view, &first.view}, inputs, halved);
          if (cols == 70) expect_same(kernels, {&fourth.view, &second.view}, inputs, halved);
          if (cols == 1056) expect_same(kernels, {&third.view, &second.view}, inputs, halved);
        }
      }
}

}  // namespace

void test_column_products(const Kernels& kernels) {
  for (const int num_threads : {1, 3})
    for (const int rows : {48, 2100, 33000})
      for (const bool in_planes : {false, true})
        expect_as_alone(kernels, Format::int4, rows, rows == 48 ? 1056 : 70, num_threads, in_planes);
  for (const int num_threads : {1, 3})
    for (const Format format : {Format::int8, Format::bf16})
      for (const int rows : {48, 2100})
        expect_as_alone(kernels, format, rows, rows == 48 ? 1056 : 70, num_threads, false);
}

void test_columns(const Kernels& kernels) {
  for (int cols : {32, 70, 1024, 1056, 2500})
    for (int share : {0, 1, 6, 10}) {
      const Weights first(Format::int4, 48, cols), second(Format::int4, 17, cols);
      const Weights third(Format::int4, cols == 1056 ? 33000 : 16, cols);  // two panels
      ActivationBuffer x;
      fill_sparse(x, cols, share);
      fill_bits(x.halved());
      kernels.quantize(x.halved(), x.view.stride, 1);
      for (const int how : {0, 1, 2}) {
        const Activations inputs = how == 2 ? x.halved() : x.view;
        expect_same(kernels, {&first.view}, inputs, how > 0);
        expect_same(kernels, {&first.view, &second.view, &first.view}, inputs, how > 0);
        if (cols == 1056) expect_same(kernels, {&third.view, &second.view}, inputs, how > 0);
      }
    }
  test_other_formats(kernels);
  test_bytes(kernels);
  test_least_bytes(kernels);
  test_memory(kernels);
  test_not_a_number(kernels);
  for (const bool halves : {false, true}) test_keep_wanted(kernels, halves);
  test_halves(kernels);
}
