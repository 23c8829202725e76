// Matrices that lie input by input, so that what a token does not want of its inputs need not be read. They are made of
// the row-interleaved ones, in memory, for the instruction set that reads them: a machine that does not gain does without.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "matrix.h"
#include "threads.h"
#include "weights.h"

namespace coreinfer {

// The matrices of a layer that share their inputs lie beside each other.
enum InputGroup { kQkv, kHeads, kGateUp, kDown, kNumInputGroups };
using GroupFlags = std::array<bool, kNumInputGroups>;

// Bytes of one input's weights for some outputs, in int4, int8 or bf16.
constexpr size_t column_bytes(Format format, int num_outputs) {
  return format == Format::int4 ? size_t(num_outputs) / 2 : size_t(num_outputs) * (format == Format::int8 ? 1 : 2);
}

// Which inputs of a group of matrices a token wants: those whose |x| * norm is above the first threshold; those that are not
// above the second read the high bits of their weights alone.
struct Filter {
  const float* norms = nullptr;  // of the columns, over all outputs
  Thresholds thresholds;
  const float* weights = nullptr;  // of an expert's tokens, what |x| * norm is multiplied by; null for 1
  bool wants_all() const { return !norms || thresholds.wanted < 0.0f; }
  Filter of(int token) const {
    if (!weights) return *this;
    return {norms, {thresholds.wanted / weights[token], thresholds.whole / weights[token]}};
  }
};

// (panels, groups of inputs): for each tile of outputs their scales (fp16) and, of int4, zero points, then a group's columns
// of half a byte (int4), a byte (int8) or two (bf16, which has neither scales nor zero points) for each of the panel's
// outputs. A panel's part of a column lies in one piece; or, of int4 alone, in two planes, the codes' two high bits in one
// piece and their two low ones in another, first all high pieces of the group and then all low ones.
struct ColumnMatrix {
  Format format = Format::int4;  // or int8 or bf16
  bool in_planes = false;
  int tile = 0;  // outputs whose sums are kept at once: Kernels::column_tile, twice as many in planes, half of int8
  int num_inputs = 0, num_groups = 0, num_panels = 0, num_tiles = 0;  // tiles of one panel
  const uint8_t* data = nullptr;

  bool empty() const { return num_panels == 0; }
  int panel_outputs() const { return num_tiles * tile; }
  int num_outputs() const { return num_panels * panel_outputs(); }
  int num_planes() const { return in_planes ? 2 : 1; }
  // Scales and zero points of one tile.
  size_t head_bytes() const { return format == Format::bf16 ? 0 : size_t(tile) * (format == Format::int4 ? 3 : 2); }
  size_t tile_bytes() const { return column_bytes(format, tile) / num_planes(); }  // of one tile, column and plane
  size_t piece_bytes() const { return num_tiles * tile_bytes(); }                  // of one column and plane
  // From a column to the next. A multiple of 512 would put a tile of all columns into few sets of the first-level cache.
  size_t column_stride() const { return piece_bytes() + (piece_bytes() % 512 == 0 ? 64 : 0); }
  size_t plane_bytes() const { return kGroup * column_stride(); }
  size_t heads_bytes() const { return num_tiles * head_bytes(); }
  size_t group_bytes() const { return heads_bytes() + num_planes() * plane_bytes(); }
  size_t num_bytes() const { return size_t(num_panels) * num_groups * group_bytes(); }
  const uint8_t* heads(int panel, int group) const {
    return data + (size_t(panel) * num_groups + group) * group_bytes();
  }
  // The group's columns, or their high bits; the low ones come `plane_bytes` after them.
  const uint8_t* codes(int panel, int group) const { return heads(panel, group) + heads_bytes(); }
  // What is dealt out to threads: some groups of one panel, whose sums are their own. Floats of bf16 are summed in an order
  // that goes through all inputs.
  int segment_groups() const { return has_segments(format) ? kSegmentGroups : num_groups; }
  int num_segments() const { return empty() ? 0 : (num_groups + segment_groups() - 1) / segment_groups(); }
  int num_units() const { return num_panels * num_segments(); }
};

// Several matrices with the same inputs as one; nothing where they are read by rows.
struct Columns {
  struct Part {
    int first, rows;  // outputs
  };
  ColumnMatrix matrix;
  std::vector<Part> parts;
  std::shared_ptr<uint8_t> memory;
  bool empty() const { return matrix.empty(); }
};

struct ColumnLayout {
  int tile;            // Kernels::column_tile
  size_t least_bytes;  // shorter columns are read by rows
  GroupFlags wants;    // which groups are laid out
  bool in_planes;      // int4, for inputs that read the high bits of their weights alone; not of experts
};
constexpr size_t kLeastColumnBytes = 1024;  // of a column that may be worth leaving out on some machine

// Lay matrices out input by input, on all threads. All must be of one format, int4, int8 or bf16, and have the
// same number of columns.
Columns make_columns(const std::vector<const Matrix*>& rows, int tile, bool in_planes, Threads& threads);
// The same where it is wanted, formats are such and columns long enough, without matrices that are empty.
Columns columns_of(std::vector<const Matrix*> rows, InputGroup group, const ColumnLayout& layout, Threads& threads);
// The matrices of an FFN that have the same inputs.
std::vector<const Matrix*> matrices_of(const FfnWeights& ffn, InputGroup group);

// Attention's or an FFN's groups of all layers: (layers, experts, 2), with one for the experts where a layer has none.
using GroupColumns = std::array<Columns, 2>;  // (query, key and value; heads) or (gate and up; down)
using LayerColumns = std::vector<std::vector<GroupColumns>>;
LayerColumns attention_columns(const ModelWeights& weights, const ColumnLayout& layout, Threads& threads);
LayerColumns ffn_columns(const Ffn& ffn, const ColumnLayout& layout, Threads& threads);
size_t num_bytes(const LayerColumns& layers);

// What of its inputs a token reads: of each layer and group the thresholds, and the matrices where they lie input by input.
struct TokenShares {
  std::vector<std::array<Thresholds, kNumInputGroups>> thresholds;  // one a layer
  bool halves = false;                                              // whether any input reads the high bits alone
  std::shared_ptr<const LayerColumns> attention, ffn;               // null: all weights are read by rows
};

}  // namespace coreinfer
