// Layers of random weights, in both layouts, and inputs for them.
#pragma once

#include <array>
#include <memory>
#include <random>
#include <vector>

#include "../../runtime/engines/native/csrc/scratch.h"
#include "layout.h"

namespace columns {

// The matrices of a layer; inputs that share them lie beside each other.
enum Kind { kQkv, kOut, kGateUp, kDown, kNumKinds };

struct Shape {
  int hidden, qkv, ffn, layers;
  int inputs(int kind) const { return kind == kDown ? ffn : hidden; }
  int outputs(int kind) const { return kind == kQkv ? qkv : kind == kGateUp ? 2 * ffn : hidden; }
};

// Memory in huge pages.
using Memory = std::unique_ptr<uint8_t, void (*)(void*)>;
Memory allocate(size_t num_bytes);

// All layers hold the same weights, each in memory of its own.
struct Layers {
  Layers(const Shape& shape, const Layout& layout, int most_panel_outputs);
  Shape shape;
  std::vector<std::array<coreinfer::Matrix, kNumKinds>> rows;
  std::vector<std::array<ColumnMatrix, kNumKinds>> columns;
  size_t row_bytes = 0;  // of all layers, lying in one piece
  const uint8_t* row_memory() const { return row_memory_.get(); }

 private:
  Memory row_memory_, column_memory_;
};

// Some tokens' inputs of one matrix: random values, the columns' norms, and what to compare their products with.
struct Inputs {
  Inputs(int num_inputs, int num_tokens, std::mt19937& random);
  // The threshold that this share of a token's inputs passes.
  float threshold(int token, double share) const;
  int num_inputs;
  coreinfer::ActivationBuffer values;
  std::vector<float> norms;
  std::vector<std::vector<float>> sorted;  // (tokens, inputs): |x| * norm, largest first
};

}  // namespace columns
