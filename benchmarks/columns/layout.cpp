#include "layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace columns {
namespace {

// Where an output of a tile lies in each of its columns, so that what products of two columns' bytes (four with AVX-512)
// leave is in order.
struct Place {
  int byte, shift;
};
Place place_of(const Layout& layout, int output) {
  if (layout.tile == 128) return {output % 16 / 4 * 16 + output / 16 % 4 * 4 + output % 4, output / 64 * 4};
  const int eight = output / 8, lane = output % 8;
  const int pair = eight / 2, half = eight % 2;  // the sums' vector, and which half of each of its lanes
  return {pair % 2 * 8 + half * 4 + lane % 4 + lane / 4 * 16, pair / 2 * 4};
}

int code_of(const coreinfer::Matrix& rows, int output, int input) {
  const size_t tile = size_t(output / coreinfer::kBlockRows) * rows.num_groups() + input / coreinfer::kGroup;
  const int quad = input % coreinfer::kGroup / 4;
  const uint8_t byte =
      rows.codes[tile * rows.tile_bytes() + quad / 2 * 64 + output % coreinfer::kBlockRows * 4 + input % 4];
  return quad % 2 ? byte >> 4 : byte & 15;
}

void pack_head(const Layout& layout, const coreinfer::Matrix& rows, int first_output, int group, uint8_t* head) {
  auto* scales = reinterpret_cast<uint16_t*>(head);
  const int row_group = group * (layout.group / coreinfer::kGroup);
  for (int i = 0; i < layout.tile; ++i) {
    const int output = first_output + i;
    const size_t at = (size_t(output / coreinfer::kBlockRows) * rows.num_groups() + row_group) * coreinfer::kBlockRows +
                      output % coreinfer::kBlockRows;
    scales[i] = rows.scales[at];
    head[2 * layout.tile + i] = rows.zeros[at];
  }
}

}  // namespace

int panel_outputs(const Layout& layout, int outputs, int most) {
  for (int panels = std::max(1, outputs / most); panels <= outputs / layout.tile; ++panels)
    if (outputs % (panels * layout.tile) == 0 && outputs / panels <= most) return outputs / panels;
  throw std::invalid_argument("outputs: expected panels of " + std::to_string(layout.tile) + " to " +
                              std::to_string(most) + " outputs, got " + std::to_string(outputs));
}

ColumnMatrix pack(const Layout& layout, const coreinfer::Matrix& rows, int panel_outputs, uint8_t* data) {
  const ColumnMatrix w{layout, rows.cols, rows.rows, panel_outputs, data};
  std::memset(data, 0, w.num_bytes());
  for (int panel = 0; panel < w.num_panels(); ++panel)
    for (int group = 0; group < w.num_groups(); ++group)
      for (int tile = 0; tile < w.num_tiles(); ++tile) {
        uint8_t* heads = data + (w.heads(panel, group) - w.data);
        const int first_output = panel * panel_outputs + tile * layout.tile;
        pack_head(layout, rows, first_output, group, heads + tile * layout.head_bytes());
        for (int i = 0; i < layout.tile; ++i) {
          const Place place = place_of(layout, i);
          uint8_t* at = heads + w.head_bytes() + tile * layout.tile_bytes() + place.byte;
          for (int j = 0; j < layout.group; ++j)
            at[j * w.column_stride()] |= code_of(rows, first_output + i, group * layout.group + j) << place.shift;
        }
      }
  return w;
}

}  // namespace columns
