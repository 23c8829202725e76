#include "columns.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace coreinfer {
namespace {

constexpr int kPanelOutputs = 32768;  // the most: longer pieces are read faster
constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kMostTile = 256;
constexpr int kBf16Tile = 32;  // outputs: a cache line

int padded_rows(const Matrix& w) { return w.num_blocks() * kBlockRows; }

std::shared_ptr<uint8_t> allocate(size_t num_bytes) {
  const size_t rounded = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, rounded));
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return {memory, std::free};
}

// A block of 16 rows of one of the matrices; no matrix where the last panel has no more.
struct Block {
  const Matrix* matrix = nullptr;
  int index = 0;
};

std::vector<Block> blocks_of(const std::vector<const Matrix*>& rows) {
  std::vector<Block> blocks;
  for (const Matrix* w : rows)
    for (int index = 0; index < w->num_blocks(); ++index) blocks.push_back({w, index});
  return blocks;
}

// Codes of one block's 16 rows and a group's 32 inputs: codes[input][row], with `stride` between inputs.
void unpack_bytes(const uint8_t* from, uint8_t* codes, int stride) {
  for (int input = 0; input < kGroup; ++input)
    for (int row = 0; row < kBlockRows; ++row) codes[input * stride + row] = from[input / 4 * 64 + row * 4 + input % 4];
}

void unpack_nibbles(const uint8_t* from, uint8_t* codes, int stride) {
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < kBlockRows; ++row)
      for (int i = 0; i < 4; ++i) {
        const uint8_t both = from[j * 64 + row * 4 + i];
        codes[(8 * j + i) * stride + row] = both & 15;
        codes[(8 * j + 4 + i) * stride + row] = both >> 4;
      }
}

// One tile of one group: where an output lies in its column is such that words of four columns' bytes, put beside each
// other (V::interleave), have the outputs in order. A byte has as many outputs as it has codes or parts of codes, those of
// its low bits first, each of four vectors.
class TilePacker {
 public:
  TilePacker(const ColumnMatrix& w, uint8_t* data) : w_(w), data_(data), lanes_(static_cast<int>(w.tile_bytes()) / 4) {}

  void pack(const Block* blocks, int num_blocks, int panel, int group, int tile) {
    if (w_.format == Format::bf16)
      pack_numbers(blocks, num_blocks, panel, group, tile);
    else
      pack_codes(blocks, num_blocks, panel, group, tile);
  }

 private:
  // Numbers lie in the order of their outputs.
  void pack_numbers(const Block* blocks, int num_blocks, int panel, int group, int tile) {
    uint8_t* out = data_ + (w_.codes(panel, group) - w_.data) + tile * w_.tile_bytes();
    for (int i = 0; i < kGroup; ++i, out += w_.column_stride()) {
      const int input = group * kGroup + i;
      uint16_t column[kBf16Tile] = {};
      for (int output = 0; output < num_blocks * kBlockRows && input < w_.num_inputs; ++output) {
        const Block& block = blocks[output / kBlockRows];
        const int row = block.index * kBlockRows + output % kBlockRows;
        if (row < block.matrix->rows) column[output] = block.matrix->bf16[size_t(row) * block.matrix->cols + input];
      }
      std::memcpy(out, column, sizeof column);
    }
  }

  void pack_codes(const Block* blocks, int num_blocks, int panel, int group, int tile) {
    uint8_t codes[kGroup * kMostTile] = {};
    uint8_t* head = data_ + (w_.heads(panel, group) - w_.data) + tile * w_.head_bytes();
    std::memset(head, 0, w_.head_bytes());
    for (int i = 0; i < num_blocks; ++i) {
      const Matrix& rows = *blocks[i].matrix;
      const size_t at = size_t(blocks[i].index) * rows.num_groups() + group;
      (rows.format == Format::int4 ? unpack_nibbles : unpack_bytes)(rows.codes + at * rows.tile_bytes(),
                                                                    codes + i * kBlockRows, w_.tile);
      std::memcpy(head + i * kBlockRows * 2, rows.scales + at * kBlockRows, kBlockRows * 2);
      if (rows.format == Format::int4)
        std::memcpy(head + w_.tile * 2 + i * kBlockRows, rows.zeros + at * kBlockRows, kBlockRows);
    }
    uint8_t* out = data_ + (w_.codes(panel, group) - w_.data) + tile * w_.tile_bytes();
    for (int input = 0; input < kGroup; ++input, out += w_.column_stride()) {
      const uint8_t* column = codes + input * w_.tile;
      if (w_.in_planes) {
        pack_column(column, 2, 3, 2, out);
        pack_column(column, 0, 3, 2, out + w_.plane_bytes());
      } else if (w_.format == Format::int4) {
        pack_column(column, 0, 15, 4, out);
      } else {
        pack_column(column, 0, 255, 8, out);
      }
    }
  }

  // `num_bits` of each code, those from `shift` on.
  void pack_column(const uint8_t* codes, int shift, int mask, int num_bits, uint8_t* out) const {
    for (int vector = 0; vector < 4; ++vector)
      for (int lane = 0; lane < lanes_; ++lane) {
        const int output = vector * lanes_ + lane;
        int byte = 0;
        for (int part = 0; part < 8 / num_bits; ++part)
          byte |= (codes[part * 4 * lanes_ + output] >> shift & mask) << part * num_bits;
        out[lane / 4 * 16 + vector * 4 + lane % 4] = static_cast<uint8_t>(byte);
      }
  }

  const ColumnMatrix& w_;
  uint8_t* data_;
  int lanes_;
};

int tile_of(Format format, int tile, bool in_planes) {
  if (format == Format::bf16) return kBf16Tile;
  return format == Format::int8 ? tile / 2 : tile * (in_planes ? 2 : 1);
}

ColumnMatrix shape_of(const std::vector<const Matrix*>& rows, int tile, bool in_planes) {
  int num_outputs = 0;
  for (const Matrix* w : rows) num_outputs += padded_rows(*w);
  ColumnMatrix w;
  w.format = rows.front()->format;
  w.in_planes = in_planes && w.format == Format::int4;
  w.tile = tile_of(w.format, tile, w.in_planes);
  w.num_inputs = rows.front()->cols;
  w.num_groups = rows.front()->num_groups();
  w.num_panels = (num_outputs + kPanelOutputs - 1) / kPanelOutputs;
  w.num_tiles = ((num_outputs + w.num_panels - 1) / w.num_panels + w.tile - 1) / w.tile;
  return w;
}

bool can_be_columns(const std::vector<const Matrix*>& rows, size_t least_bytes) {
  const Format format = rows.front()->format;
  if (format != Format::int4 && format != Format::int8 && format != Format::bf16) return false;
  int num_outputs = 0;
  for (const Matrix* w : rows) {
    if (w->format != format) return false;
    num_outputs += padded_rows(*w);
  }
  return column_bytes(format, num_outputs) >= least_bytes;
}

// The matrices that are laid out; none where they are not to be.
std::vector<const Matrix*> laid_out(std::vector<const Matrix*> rows, InputGroup group, const ColumnLayout& layout) {
  rows.erase(std::remove_if(rows.begin(), rows.end(), [](const Matrix* w) { return w->empty(); }), rows.end());
  if (!layout.wants[group] || rows.empty() || !can_be_columns(rows, layout.least_bytes)) rows.clear();
  return rows;
}

// In memory that is there.
Columns make_columns(const std::vector<const Matrix*>& rows, ColumnMatrix shape, std::shared_ptr<uint8_t> memory,
                     Threads& threads) {
  Columns columns;
  columns.memory = std::move(memory);
  ColumnMatrix& w = columns.matrix = shape;
  w.data = columns.memory.get();
  const int tile = w.tile;
  for (const Matrix* matrix : rows) {
    const int first = columns.parts.empty() ? 0 : columns.parts.back().first + columns.parts.back().rows;
    columns.parts.push_back({round_up(first, kBlockRows), matrix->rows});
  }
  const std::vector<Block> blocks = blocks_of(rows);
  // A small tile is a part of a block: what is packed at once has whole blocks.
  const int tile_blocks = tile / kBlockRows;
  threads.run([&](int thread) {
    TilePacker packer(w, columns.memory.get());
    threads.deal(thread, w.num_panels * w.num_groups, [&](int begin, int end) {
      for (int unit = begin; unit < end; ++unit)
        for (int t = 0; t < w.num_tiles; ++t) {
          const int panel = unit / w.num_groups, first = (panel * w.num_tiles + t) * tile_blocks;
          const int count = std::clamp(int(blocks.size()) - first, 0, tile_blocks);
          packer.pack(blocks.data() + first, count, panel, unit % w.num_groups, t);
        }
    });
  });
  return columns;
}

// One group of a layer's experts, in one piece: memory comes in pages of 2 MB, and an expert may be smaller.
void lay_out_experts(const std::vector<FfnWeights>& experts, InputGroup group, const ColumnLayout& layout,
                     Threads& threads, std::vector<GroupColumns>& out) {
  std::vector<std::vector<const Matrix*>> rows;
  std::vector<size_t> places;
  size_t num_bytes = 0;
  for (const FfnWeights& expert : experts) {
    rows.push_back(laid_out(matrices_of(expert, group), group, layout));
    places.push_back(num_bytes);
    if (!rows.back().empty()) num_bytes += (shape_of(rows.back(), layout.tile, false).num_bytes() + 63) / 64 * 64;
  }
  if (num_bytes == 0) return;
  const std::shared_ptr<uint8_t> memory = allocate(num_bytes);
  for (size_t e = 0; e < experts.size(); ++e)
    if (!rows[e].empty())
      out[e][group % 2] =
          make_columns(rows[e], shape_of(rows[e], layout.tile, false), {memory, memory.get() + places[e]}, threads);
}

}  // namespace

Columns make_columns(const std::vector<const Matrix*>& rows, int tile, bool in_planes, Threads& threads) {
  const ColumnMatrix shape = shape_of(rows, tile, in_planes);
  return make_columns(rows, shape, allocate(shape.num_bytes()), threads);
}

Columns columns_of(std::vector<const Matrix*> rows, InputGroup group, const ColumnLayout& layout, Threads& threads) {
  rows = laid_out(std::move(rows), group, layout);
  return rows.empty() ? Columns() : make_columns(rows, layout.tile, layout.in_planes, threads);
}

std::vector<const Matrix*> matrices_of(const FfnWeights& ffn, InputGroup group) {
  if (group == kDown) return {&ffn.down.weight};
  return {&ffn.gate.weight, &ffn.up.weight};
}

LayerColumns attention_columns(const ModelWeights& weights, const ColumnLayout& layout, Threads& threads) {
  LayerColumns layers;
  for (const Layer& layer : weights.layers) {
    const AttentionWeights& own = layer.attention;
    layers.push_back({{columns_of({&own.query.weight, &own.key.weight, &own.value.weight}, kQkv, layout, threads),
                       columns_of({&own.output.weight}, kHeads, layout, threads)}});
  }
  return layers;
}

LayerColumns ffn_columns(const Ffn& ffn, const ColumnLayout& layout, Threads& threads) {
  LayerColumns layers;
  for (const FfnWeights& layer : ffn) {
    layers.emplace_back(std::max<size_t>(1, layer.experts.size()));
    for (const InputGroup group : {kGateUp, kDown})
      if (layer.experts.empty())
        layers.back()[0][group % 2] = columns_of(matrices_of(layer, group), group, layout, threads);
      else
        lay_out_experts(layer.experts, group, layout, threads, layers.back());
  }
  return layers;
}

size_t num_bytes(const LayerColumns& layers) {
  size_t total = 0;
  for (const auto& experts : layers)
    for (const GroupColumns& groups : experts)
      for (const Columns& columns : groups) total += columns.matrix.num_bytes();
  return total;
}

}  // namespace coreinfer
