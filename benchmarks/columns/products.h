// Which inputs a token wants, and products with them alone.
#pragma once

#include <vector>

#include "../../runtime/engines/native/csrc/matrix.h"
#include "layout.h"

namespace columns {

// Two wanted inputs of a group. An odd one is paired with itself, with the code 0.
struct Pair {
  uint32_t first, second;  // bytes from the group's first column
  int32_t codes;           // the two inputs' codes, twice
};

// Four wanted inputs of a group. Where there are fewer, the last is repeated with the code 0.
struct Quad {
  uint32_t columns[4];  // bytes from the group's first column
  int32_t codes;
};

// The wanted inputs of some groups: as pairs or as quads.
struct Wanted {
  struct Group {
    int begin, end;   // pairs or quads
    int num_columns;  // that are read
    float scale;      // of the inputs' codes
    float sum;        // of the wanted inputs' codes / 16
  };
  int first_group = 0;
  std::vector<Group> groups;
  std::vector<Pair> pairs;
  std::vector<Quad> quads;
};

// Inputs of which some are wanted: quantized already, with one scale for all that share a group of the matrix.
struct Candidates {
  coreinfer::Activations x;
  const float* norms;
  float threshold;  // wanted where |x| * norm is above
};

// How the wanted columns of a group are gone through.
enum class Design {
  reads,    // no products: one column after the other is read, which is the least that any design takes
  tiles,    // all columns together, tile by tile; asks for the bytes some tiles later in each of them
  groups,   // the same, but asks for the next group's columns one after the other
  streams,  // eight columns at a time over all outputs of the panel; sums wait in the first-level cache
};

// The designs for one instruction set.
struct Products {
  const char* isa;
  int tile;  // of the layout
  // The wanted inputs of groups [begin, end).
  void (*choose)(const Candidates& inputs, const ColumnMatrix& w, int begin, int end, Wanted& wanted);
  // out (outputs) += the products of the wanted inputs. `memory` has room for twice as many sums as a panel has outputs.
  void (*multiply)(Design design, const ColumnMatrix& w, const Wanted& wanted, int32_t* memory, float* out);
};
const Products& avx2_products();
const Products& avx512_products();

}  // namespace columns
