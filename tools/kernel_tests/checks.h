// What the kernel test's files share: random numbers, and counting what does not hold.
#pragma once

#include <cstddef>
#include <random>

#include "../../runtime/engines/native/csrc/kernels.h"

extern std::mt19937 generator;
extern int num_failures;

// From -2 to 2, the same with every C++ library.
float draw();
// `scale`: of what is computed with, where results can be much smaller.
void compare(const char* what, const float* got, const float* expected, size_t count, float scale = 1e-6f);
void expect(const char* what, bool holds);

void test_products(const coreinfer::Kernels& kernels);
void test_bits(const coreinfer::Kernels& kernels);
void test_vectors(const coreinfer::Kernels& kernels);
void test_columns(const coreinfer::Kernels& kernels);
void test_column_products(const coreinfer::Kernels& kernels);
void test_attention(const coreinfer::Kernels& kernels);
void test_experts();
void test_expert_store();
void test_hashes();
void test_neurons(const coreinfer::Kernels& kernels);
void test_pages();
void test_threads();
