// Compares every kernel table that the CPU can run with the portable one, at odd sizes. Needs no Python, so that it
// also runs under an emulator (tools/test-aarch64.sh). Prints one line a table; the exit status says whether all agree.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "checks.h"

using namespace coreinfer;

std::mt19937 generator(1);
int num_failures = 0;

float draw() { return static_cast<float>(static_cast<int32_t>(generator())) * 0x1p-30f; }

void compare(const char* what, const float* got, const float* expected, size_t count, float scale) {
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

int main() {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const bool nan = (half & 0x7fff) > 0x7c00;
    if (!nan && float_to_half(half_to_float(half)) != half) ++num_failures;
  }
  test_threads();
  test_pages();
  test_experts();
  test_expert_store();
  test_hashes();
  for (const Kernels* kernels : available_kernels()) {
    const int before = num_failures;
    test_products(*kernels);
    test_vectors(*kernels);
    test_bits(*kernels);
    test_columns(*kernels);
    test_attention(*kernels);
    test_neurons(*kernels);
    std::printf("%s: %s\n", kernels->name, num_failures == before ? "agrees" : "DIFFERS");
  }
  // Last: what is drawn here would change the numbers of the tests above, of which some know digests.
  for (const Kernels* kernels : available_kernels()) test_column_products(*kernels);
  return num_failures == 0 ? 0 : 1;
}
