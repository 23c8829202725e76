// Products with single rows, and sums over them, beside plain sums in double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../runtime/engines/native/csrc/neurons.h"
#include "checks.h"

using namespace coreinfer;

namespace {

struct Rows {
  Rows(int rows, int cols) {
    weight.format = Format::int4_rows;
    weight.rows = rows;
    weight.cols = cols;
    bytes.resize(weight.num_bytes());
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(std::fabs(draw()) * 1e4f);
    for (int row = 0; row < rows; ++row)
      for (int group = 0; group < weight.num_parts() * kPartGroups; ++group) {
        const uint16_t scale = float_to_half(group < weight.num_groups() ? 0.01f + 0.1f * std::fabs(draw()) : 0.0f);
        std::memcpy(part(row, group) + 256 + group % kPartGroups * 2, &scale, 2);
      }
    weight.codes = bytes.data();
  }
  uint8_t* part(int row, int group) {
    return bytes.data() + row * weight.row_bytes() + group / kPartGroups * size_t(kPartBytes);
  }
  double value(int row, int col) {
    const int group = col / kGroup, inner = col % kGroup;
    const uint8_t* from = part(row, group);
    const int byte = from[inner / 8 * 64 + group % kPartGroups * 4 + inner % 4];
    uint16_t scale;
    std::memcpy(&scale, from + 256 + group % kPartGroups * 2, 2);
    return half_to_float(scale) * ((inner % 8 < 4 ? byte & 15 : byte >> 4) - from[288 + group % kPartGroups] / 16.0);
  }
  Matrix weight;
  std::vector<uint8_t> bytes;
};

void test_rows(const Kernels& kernels, int cols, int count) {
  Rows rows(count + 3, cols);
  std::vector<int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back(i + (i > count / 2 ? 3 : 0));
  ActivationBuffer x;
  x.resize(1, cols);
  for (int i = 0; i < cols; ++i) x.view.values[i] = draw();
  kernels.quantize(x.view, x.view.stride, 1);
  NeuronInputBuffer inputs;
  inputs.resize(rows.weight.num_parts());
  interleave(x.view, rows.weight, inputs);
  std::vector<float> out(count), expected(count), factors(count);
  kernels.dot_neurons({rows.weight, ids.data(), count}, inputs.view(), out.data());
  for (int i = 0; i < count; ++i) {
    double sum = 0;
    for (int col = 0; col < cols; ++col)
      sum += rows.value(ids[i], col) * x.view.codes[col] * x.view.scales[col / kGroup];
    expected[i] = static_cast<float>(sum);
    factors[i] = draw();
  }
  // Products are of order 1 and cancel.
  compare("dot_neurons", out.data(), expected.data(), count, 1.0f);
  Buffer<float> sums;
  sums.resize(num_sums(rows.weight));
  kernels.add_neurons({rows.weight, ids.data(), count}, factors.data(), sums.get());
  std::vector<float> ordered(cols);
  put_in_order(sums.get(), 0, num_sums(rows.weight) / kPartGroups, cols, ordered.data());
  // Factors times scales are rounded to a byte for 32 rows, as inputs are for 32 of them.
  double squares = 0, errors = 0;
  for (int col = 0; col < cols; ++col) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += factors[i] * rows.value(ids[i], col);
    squares += sum * sum;
    errors += (ordered[col] - sum) * (ordered[col] - sum);
  }
  expect("add_neurons: expected an error below 0.02 of the sums", errors < 4e-4 * squares);
  factors[count / 2] = NAN;
  kernels.add_neurons({rows.weight, ids.data(), count}, factors.data(), sums.get());
  put_in_order(sums.get(), 0, num_sums(rows.weight) / kPartGroups, cols, ordered.data());
  expect("add_neurons: expected what is not a number in all sums",
         std::all_of(ordered.begin(), ordered.end(), [](float sum) { return std::isnan(sum); }));
}

}  // namespace

void test_neurons(const Kernels& kernels) {
  for (int cols : {32, 70, 512, 544, 1100})
    for (int count : {1, 3, 32, 33, 100}) test_rows(kernels, cols, count);
}
