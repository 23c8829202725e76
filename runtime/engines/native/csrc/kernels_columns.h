// Products with matrices that lie input by input. Included by kernels_body.h.

constexpr int kTileOutputs = 8 * V::kLanes;  // the sums of four interleaved vectors of nibbles
constexpr int kGroupQuads = kGroup / 4;
constexpr int kTilesAhead = 1024 / kTileOutputs;  // whose bytes are asked for

// What of a group a token wants: fours of inputs. Where the last has fewer, its last is repeated with the code 0.
struct WantedColumns {
  uint32_t columns[kGroup + 4];  // bytes from the group's first column
  int8_t codes[kGroup + 4];
  int num_quads, num_columns;
  float scale, sum;  // of the codes
};

// An input whose code is 0 adds nothing. All are written, and those that are wanted are counted: which they are nothing
// foresees, and a branch would be taken wrongly for half of them.
inline void choose_columns(const Activations& x, int group, size_t column_stride, WantedColumns& wanted) {
  const int8_t* codes = x.codes + size_t(group) * kGroup;
  int count = 0;
  for (int input = 0; input < kGroup; ++input) {
    wanted.columns[count] = static_cast<uint32_t>(input * column_stride);
    wanted.codes[count] = codes[input];
    count += codes[input] != 0;
  }
  wanted.num_columns = count;
  wanted.num_quads = (count + 3) / 4;
  const uint32_t last = wanted.columns[count > 0 ? count - 1 : 0];
  for (int i = count; i < wanted.num_quads * 4; ++i) {
    wanted.columns[i] = last;
    wanted.codes[i] = 0;
  }
  wanted.scale = x.scales[group];
  wanted.sum = x.sums[group];
}

struct ColumnSums {
  V::I halves[2][4];  // of low and of high nibbles
};

inline void add_quad(const uint8_t* tile, const uint32_t* columns, const int8_t* codes, ColumnSums& sums) {
  V::B bytes[4];
  V::interleave(V::load_bytes(tile + columns[0]), V::load_bytes(tile + columns[1]), V::load_bytes(tile + columns[2]),
                V::load_bytes(tile + columns[3]), bytes);
  for (int i = 0; i < 4; ++i) {
    sums.halves[0][i] = V::dot_nibbles(sums.halves[0][i], V::low_nibbles(bytes[i]), codes);
    sums.halves[1][i] = V::dot_nibbles(sums.halves[1][i], V::high_nibbles(bytes[i]), codes);
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
inline void multiply_column_group(const ColumnTask& task, int group, const WantedColumns& now,
                                  const WantedColumns& next) {
  const ColumnMatrix& w = task.weight;
  const uint8_t *heads = w.heads(task.panel, group), *codes = w.codes(task.panel, group);
  for (int t = task.tile_begin; t < task.tile_end; ++t) {
    const bool here = t + kTilesAhead < task.tile_end;
    const int later = here ? t + kTilesAhead : t + kTilesAhead - task.tile_end + task.tile_begin;
    const WantedColumns& source = here ? now : next;
    const uint8_t *later_codes = nullptr, *later_head = nullptr;
    if (later < task.tile_end && source.num_quads > 0) {
      later_codes = w.codes(task.panel, here ? group : group + 1) + later * w.tile_bytes();
      later_head = w.heads(task.panel, here ? group : group + 1) + later * w.head_bytes();
      for (int line = 0; line < kTileOutputs * 3; line += 64) __builtin_prefetch(later_head + line);
    }
    ColumnSums tile_sums;
    for (auto& half : tile_sums.halves)
      for (V::I& sum : half) sum = V::zero();
    for (int i = 0; i < now.num_quads; ++i) {
      if (later_codes) {
        const uint32_t* columns = source.columns + 4 * (i < source.num_quads ? i : source.num_quads - 1);
        for (int j = 0; j < 4; ++j) __builtin_prefetch(later_codes + columns[j]);
      }
      add_quad(codes + t * w.tile_bytes(), now.columns + 4 * i, now.codes + 4 * i, tile_sums);
    }
    finish_tile(tile_sums, heads + t * w.head_bytes(), now, task.sums + t * kTileOutputs);
  }
}

// What of a tile is asked for before it is used.
inline void prefetch_tile(const ColumnTask& task, int group, int tile, const WantedColumns& wanted) {
  const ColumnMatrix& w = task.weight;
  const uint8_t* head = w.heads(task.panel, group) + tile * w.head_bytes();
  const uint8_t* codes = w.codes(task.panel, group) + tile * w.tile_bytes();
  for (int line = 0; line < kTileOutputs * 3; line += 64) __builtin_prefetch(head + line);
  for (int i = 0; i < wanted.num_columns; ++i) __builtin_prefetch(codes + wanted.columns[i]);
}

int multiply_columns(const ColumnTask& task) {
  const ColumnMatrix& w = task.weight;
  const int num_outputs = (task.tile_end - task.tile_begin) * kTileOutputs;
  std::memset(task.sums + task.tile_begin * kTileOutputs, 0, sizeof(float) * num_outputs);
  WantedColumns wanted[2];
  int num_columns = 0;
  choose_columns(task.x, task.group_begin, w.column_stride(), wanted[0]);
  for (int tile = task.tile_begin; tile < task.tile_end && tile < task.tile_begin + kTilesAhead; ++tile)
    prefetch_tile(task, task.group_begin, tile, wanted[0]);
  for (int group = task.group_begin, turn = 0; group < task.group_end; ++group, turn = 1 - turn) {
    const WantedColumns& now = wanted[turn];
    WantedColumns& next = wanted[1 - turn];
    if (group + 1 < task.group_end)
      choose_columns(task.x, group + 1, w.column_stride(), next);
    else
      next.num_quads = 0;
    num_columns += now.num_columns;
    // What is not a number is in the scale.
    if (now.num_quads > 0 || !(now.scale - now.scale == 0.0f)) multiply_column_group(task, group, now, next);
  }
  return num_columns;
}

void keep_wanted(float* x, const float* norms, float threshold, int size) {
  // In this order a NaN stays.
  for (int i = 0; i < size; ++i) x[i] = __builtin_fabsf(x[i]) * norms[i] <= threshold ? 0.0f : x[i];
}
