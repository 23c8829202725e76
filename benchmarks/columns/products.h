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

// The wanted inputs of some groups.
struct Wanted {
  struct Group {
    int begin, end;  // pairs
    float scale;     // of the inputs' codes
    float sum;       // of the wanted inputs' codes / 16
  };
  int first_group = 0;
  std::vector<Group> groups;
  std::vector<Pair> pairs;
};

// The inputs of groups [begin, end), quantized already, with |x| * norm > threshold. `column_stride` is the matrix's.
void choose(const coreinfer::Activations& x, const float* norms, float threshold, size_t column_stride, int begin,
            int end, Wanted& wanted);

// How the wanted columns of a group are gone through.
enum class Design {
  reads,    // no products: one column after the other is read, which is the least that any design takes
  tiles,    // all columns together, tile by tile; asks for the bytes some tiles later in each of them
  groups,   // the same, but asks for the next group's columns one after the other
  streams,  // eight columns at a time over all outputs of the panel; sums wait in the first-level cache
};

// out (outputs) += the products of the wanted inputs. `sums` is memory for twice as many sums as a panel has outputs.
void multiply(Design design, const ColumnMatrix& w, const Wanted& wanted, int16_t* sums, float* out);

}  // namespace columns
