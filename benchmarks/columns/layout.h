// A matrix of 4-bit codes whose inputs can be left out: it lies input by input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../runtime/engines/native/csrc/matrix.h"

namespace columns {

struct Layout {
  int tile;   // outputs whose sums fit the registers: 64, or 128 with AVX-512
  int group;  // inputs that share an output's scale: 32, or 64
  constexpr int tile_bytes() const { return tile / 2; }  // of one column
  constexpr int head_bytes() const { return tile * 3; }  // fp16 scales, then zero points in sixteenths
};

// (panels, groups): the heads of all tiles, then a group's columns of `panel_outputs` codes each. A panel is some of the
// outputs: what lies in one piece is one panel's part of a column.
struct ColumnMatrix {
  Layout layout;
  int inputs = 0, outputs = 0, panel_outputs = 0;
  const uint8_t* data = nullptr;

  int num_groups() const { return inputs / layout.group; }
  int num_panels() const { return outputs / panel_outputs; }
  int num_tiles() const { return panel_outputs / layout.tile; }  // of one panel
  size_t column_bytes() const { return size_t(panel_outputs) / 2; }
  // From a column to the next. Were it a multiple of 2 kB, a tile of all columns would lie in few sets of the first-level cache.
  size_t column_stride() const { return column_bytes() + (column_bytes() % 512 == 0 ? 64 : 0); }
  size_t head_bytes() const { return size_t(num_tiles()) * layout.head_bytes(); }
  size_t group_bytes() const { return head_bytes() + layout.group * column_stride(); }
  size_t num_bytes() const { return group_bytes() * num_groups() * num_panels(); }
  const uint8_t* heads(int panel, int group) const {
    return data + (size_t(panel) * num_groups() + group) * group_bytes();
  }
  const uint8_t* codes(int panel, int group) const { return heads(panel, group) + head_bytes(); }
};

// The widest panel of at most `most` outputs that the outputs can be cut into.
// Throws std::invalid_argument: there is none.
int panel_outputs(const Layout& layout, int outputs, int most);

// Write the int4 matrix `rows` (outputs, inputs) into `data`, of ColumnMatrix::num_bytes(). A wider group than the rows'
// takes the scales of the first of theirs.
ColumnMatrix pack(const Layout& layout, const coreinfer::Matrix& rows, int panel_outputs, uint8_t* data);

}  // namespace columns
