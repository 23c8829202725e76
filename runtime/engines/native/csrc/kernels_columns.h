// Products with matrices that lie input by input. Included by kernels_body.h.

constexpr int kTileOutputs = 8 * V::kLanes;  // the sums of four interleaved vectors of nibbles
constexpr int kGroupQuads = kGroup / 4;
constexpr int kTilesAhead = 1024 / kTileOutputs;  // whose bytes are asked for

// Four wanted inputs of a group. Where there are fewer, the last is repeated with the code 0.
struct ColumnQuad {
  uint32_t columns[4];  // bytes from the group's first column
  int8_t codes[4];
};

// What of a group a token wants.
struct WantedColumns {
  ColumnQuad quads[kGroupQuads];
  int num_quads, num_columns;
  float scale, sum;  // of the codes
};

// An input whose code is 0 adds nothing.
inline void choose_columns(const Activations& x, int group, size_t column_stride, WantedColumns& wanted) {
  const int8_t* codes = x.codes + size_t(group) * kGroup;
  int count = 0;
  uint32_t last = 0;
  for (int input = 0; input < kGroup; ++input) {
    ColumnQuad& quad = wanted.quads[count / 4 < kGroupQuads ? count / 4 : kGroupQuads - 1];
    if (codes[input] == 0) continue;
    last = static_cast<uint32_t>(input * column_stride);
    quad.columns[count % 4] = last;
    quad.codes[count % 4] = codes[input];
    ++count;
  }
  wanted.num_columns = count;
  wanted.num_quads = (count + 3) / 4;
  for (; count % 4; ++count) {
    wanted.quads[count / 4].columns[count % 4] = last;
    wanted.quads[count / 4].codes[count % 4] = 0;
  }
  wanted.scale = x.scales[group];
  wanted.sum = x.sums[group];
}

struct ColumnSums {
  V::I halves[2][4];  // of low and of high nibbles
};

inline void add_quad(const uint8_t* tile, const ColumnQuad& quad, ColumnSums& sums) {
  V::B bytes[4];
  V::interleave(V::load_bytes(tile + quad.columns[0]), V::load_bytes(tile + quad.columns[1]),
                V::load_bytes(tile + quad.columns[2]), V::load_bytes(tile + quad.columns[3]), bytes);
  for (int i = 0; i < 4; ++i) {
    sums.halves[0][i] = V::dot_nibbles(sums.halves[0][i], V::low_nibbles(bytes[i]), quad.codes);
    sums.halves[1][i] = V::dot_nibbles(sums.halves[1][i], V::high_nibbles(bytes[i]), quad.codes);
  }
}

// total += (sums - zero points) * scales, as multiply_codes has it.
inline void finish_tile(const ColumnSums& sums, const uint8_t* head, const WantedColumns& wanted, float* total) {
  const V::F scale = V::set1(wanted.scale), sum = V::set1(wanted.sum);
  for (int i = 0; i < 8; ++i, total += V::kLanes) {
    V::F value = V::to_float(V::nibble_sums(sums.halves[i / 4][i % 4]));
    value = V::fnma(V::load_u8(head + 2 * kTileOutputs + i * V::kLanes), sum, value);
    const V::F scales = V::load_half((const uint16_t*)head + i * V::kLanes);
    V::store(total, V::fma(value, scales * scale, V::load(total)));
  }
}

// A tile's bytes are asked for some tiles before; at the end those of the next group's first tiles.
inline void multiply_column_group(const ColumnMatrix& w, int panel, int group, const WantedColumns& now, int next_group,
                                  const WantedColumns& next, float* sums) {
  const uint8_t *heads = w.heads(panel, group), *codes = w.codes(panel, group);
  for (int t = 0; t < w.num_tiles; ++t) {
    const bool here = t + kTilesAhead < w.num_tiles;
    const int later = here ? t + kTilesAhead : t + kTilesAhead - w.num_tiles;
    const WantedColumns& source = here ? now : next;
    const uint8_t *later_codes = nullptr, *later_head = nullptr;
    if (later < w.num_tiles && source.num_quads > 0) {
      later_codes = w.codes(panel, here ? group : next_group) + later * w.tile_bytes();
      later_head = w.heads(panel, here ? group : next_group) + later * w.head_bytes();
      for (int line = 0; line < kTileOutputs * 3; line += 64) __builtin_prefetch(later_head + line);
    }
    ColumnSums tile_sums;
    for (auto& half : tile_sums.halves)
      for (V::I& sum : half) sum = V::zero();
    for (int i = 0; i < now.num_quads; ++i) {
      if (later_codes)
        for (const uint32_t column : source.quads[i < source.num_quads ? i : source.num_quads - 1].columns)
          __builtin_prefetch(later_codes + column);
      add_quad(codes + t * w.tile_bytes(), now.quads[i], tile_sums);
    }
    finish_tile(tile_sums, heads + t * w.head_bytes(), now, sums + t * kTileOutputs);
  }
}

int multiply_columns(const ColumnTask& task) {
  const ColumnMatrix& w = task.weight;
  std::memset(task.sums, 0, sizeof(float) * w.panel_outputs());
  WantedColumns wanted[2];
  int num_columns = 0;
  choose_columns(task.x, task.group_begin, w.column_stride(), wanted[0]);
  for (int group = task.group_begin, turn = 0; group < task.group_end; ++group, turn = 1 - turn) {
    const WantedColumns& now = wanted[turn];
    WantedColumns& next = wanted[1 - turn];
    const bool more = group + 1 < task.group_end;
    if (more)
      choose_columns(task.x, group + 1, w.column_stride(), next);
    else
      next.num_quads = 0;
    num_columns += now.num_columns;
    // What is not a number is in the scale.
    if (now.num_quads > 0 || !(now.scale - now.scale == 0.0f))
      multiply_column_group(w, task.panel, group, now, group + 1, next, task.sums);
  }
  return num_columns;
}

void keep_wanted(float* x, const float* norms, float threshold, int size) {
  // In this order a NaN stays.
  for (int i = 0; i < size; ++i) x[i] = __builtin_fabsf(x[i]) * norms[i] <= threshold ? 0.0f : x[i];
}
