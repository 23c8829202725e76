// Products with matrices that lie input by input. Included by kernels_body.h.

constexpr int kTileOutputs = 8 * V::kLanes;  // the sums of four interleaved vectors of nibbles
constexpr int kGroupQuads = kGroup / 4;
constexpr int kTilesAhead = 1024 / kTileOutputs;  // whose bytes are asked for

// What of a group a token wants: fours of inputs, first those that read all bits. Where the last has fewer, its last is
// repeated with the code 0.
struct WantedColumns {
  uint32_t columns[kGroup + 4];  // bytes from the group's first column
  int8_t codes[kGroup + 4];
  int num_quads, num_columns, num_whole;
  float scale, sum, low_sum;  // of the codes
};

// An input whose code is 0 adds nothing. All are written, and those that are wanted are counted: which they are nothing
// foresees, and a branch would be taken wrongly for half of them.
inline int choose_inputs(const Activations& x, int group, uint8_t bits, size_t column_stride, int count,
                         WantedColumns& wanted) {
  const size_t first = size_t(group) * kGroup;
  for (int input = 0; input < kGroup; ++input) {
    const int8_t code = x.codes[first + input];
    wanted.columns[count] = static_cast<uint32_t>(input * column_stride);
    wanted.codes[count] = code;
    count += (code != 0) & (!x.bits || x.bits[first + input] == bits);
  }
  return count;
}

inline void choose_columns(const Activations& x, int group, size_t column_stride, WantedColumns& wanted) {
  wanted.num_whole = choose_inputs(x, group, kAllBits, column_stride, 0, wanted);
  wanted.num_columns =
      x.bits ? choose_inputs(x, group, kHighBits, column_stride, wanted.num_whole, wanted) : wanted.num_whole;
  wanted.num_quads = (wanted.num_columns + 3) / 4;
  const uint32_t last = wanted.columns[wanted.num_columns > 0 ? wanted.num_columns - 1 : 0];
  for (int i = wanted.num_columns; i < wanted.num_quads * 4; ++i) {
    wanted.columns[i] = last;
    wanted.codes[i] = 0;
  }
  wanted.scale = x.scales[group];
  wanted.sum = x.sums[group];
  wanted.low_sum = x.bits ? x.low_sums[group] : 0.0f;
}

struct ColumnSums {
  V::I halves[2][4];  // of low and of high nibbles
};

inline void clear(ColumnSums& sums) {
  for (auto& half : sums.halves)
    for (V::I& sum : half) sum = V::zero();
}

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
  const V::F scale = V::set1(wanted.scale), sum = V::set1(wanted.sum), low_sum = V::set1(wanted.low_sum);
  for (int i = 0; i < 8; ++i, total += V::kLanes) {
    V::F value = V::to_float(V::nibble_sums(sums.halves[i / 4][i % 4])) + low_sum;
    value = V::fnma(V::load_u8(head + 2 * kTileOutputs + i * V::kLanes), sum, value);
    const V::F scales = V::load_half((const uint16_t*)head + i * V::kLanes);
    V::store(total, V::fma(value, scales * scale, V::load(total)));
  }
}

// Where the bytes of a tile, or of two in planes, and their scales are asked for; null where there are none.
struct Coming {
  const uint8_t *codes = nullptr, *heads = nullptr;
  const WantedColumns* wanted = nullptr;
};

// What is read `ahead` tiles after one: at the end that of the next group's first tiles.
inline Coming coming_after(const ColumnTask& task, int group, int tile, int ahead, const WantedColumns& now,
                           const WantedColumns& next) {
  const bool here = tile + ahead < task.tile_end;
  const int later = here ? tile + ahead : tile + ahead - task.tile_end + task.tile_begin;
  const WantedColumns& wanted = here ? now : next;
  if (later >= task.tile_end || wanted.num_quads == 0) return {};
  const ColumnMatrix& w = task.weight;
  const int from = here ? group : group + 1;
  return {w.codes(task.panel, from) + w.tile_offset(later), w.heads(task.panel, from) + later * w.head_bytes(),
          &wanted};
}

inline void prefetch_heads(const uint8_t* heads, int num_tiles) {
  for (int line = 0; line < num_tiles * kTileOutputs * 3; line += 64) __builtin_prefetch(heads + line);
}

// A tile's bytes are asked for some tiles before.
inline void multiply_column_group(const ColumnTask& task, int group, const WantedColumns& now,
                                  const WantedColumns& next) {
  const ColumnMatrix& w = task.weight;
  const uint8_t *heads = w.heads(task.panel, group), *codes = w.codes(task.panel, group);
  for (int t = task.tile_begin; t < task.tile_end; ++t) {
    const Coming coming = coming_after(task, group, t, kTilesAhead, now, next);
    if (coming.codes) prefetch_heads(coming.heads, 1);
    ColumnSums tile_sums;
    clear(tile_sums);
    for (int i = 0; i < now.num_quads; ++i) {
      if (coming.codes) {
        const WantedColumns& source = *coming.wanted;
        const uint32_t* columns = source.columns + 4 * (i < source.num_quads ? i : source.num_quads - 1);
        for (int j = 0; j < 4; ++j) __builtin_prefetch(coming.codes + columns[j]);
      }
      add_quad(codes + t * w.tile_bytes(), now.columns + 4 * i, now.codes + 4 * i, tile_sums);
    }
    finish_tile(tile_sums, heads + t * w.head_bytes(), now, task.sums + t * kTileOutputs);
  }
}

constexpr int kPlaneTilesAhead = 2 * kTilesAhead;
constexpr int kVectorBytes = kTileOutputs / 2;

// Nibbles of two tiles' wanted columns, put together from their bits.
struct JoinedColumns {
  alignas(64) uint8_t tiles[2][(kGroup + 4) * kVectorBytes];
  uint32_t places[kGroup + 4];  // of columns in a tile

  JoinedColumns() {
    std::memset(tiles, 0, sizeof tiles);
    for (int i = 0; i < kGroup + 4; ++i) places[i] = i * kVectorBytes;
  }
  void store(int column, const V::B* nibbles) {
    for (int i = 0; i < 2; ++i) V::store_bytes(tiles[i] + places[column], nibbles[i]);
  }
};

// As many columns are asked for as are joined; what is left out then comes too late, but comes.
inline void join_columns(const uint8_t* highs, size_t plane_bytes, const WantedColumns& wanted, const Coming& coming,
                         JoinedColumns& joined) {
  const int num_whole = coming.codes ? coming.wanted->num_whole : 0;
  const int num_coming = coming.codes ? coming.wanted->num_columns : 0;
  for (int i = 0; i < wanted.num_columns; ++i) {
    if (i < num_coming) __builtin_prefetch(coming.codes + coming.wanted->columns[i]);
    if (i < num_whole) __builtin_prefetch(coming.codes + coming.wanted->columns[i] + plane_bytes);
    const uint8_t* column = highs + wanted.columns[i];
    V::B nibbles[2];
    if (i < wanted.num_whole)
      V::join_bits(V::load_bytes(column), V::load_bytes(column + plane_bytes), nibbles);
    else
      V::spread_bits(V::load_bytes(column), nibbles);
    joined.store(i, nibbles);
  }
}

// The same with the high and the low bits apart, of two tiles at once.
inline void multiply_plane_group(const ColumnTask& task, int group, const WantedColumns& now, const WantedColumns& next,
                                 JoinedColumns& joined) {
  const ColumnMatrix& w = task.weight;
  const uint8_t *heads = w.heads(task.panel, group), *codes = w.codes(task.panel, group);
  for (int t = task.tile_begin; t < task.tile_end; t += 2) {
    const Coming coming = coming_after(task, group, t, kPlaneTilesAhead, now, next);
    if (coming.codes) prefetch_heads(coming.heads, 2);
    join_columns(codes + w.tile_offset(t), w.plane_bytes(), now, coming, joined);
    for (int second = 0; second < 2; ++second) {
      ColumnSums tile_sums;
      clear(tile_sums);
      for (int i = 0; i < now.num_quads; ++i)
        add_quad(joined.tiles[second], joined.places + 4 * i, now.codes + 4 * i, tile_sums);
      finish_tile(tile_sums, heads + (t + second) * w.head_bytes(), now, task.sums + (t + second) * kTileOutputs);
    }
  }
}

// What of a group's first tiles is asked for before the first sum.
inline void prefetch_tiles(const ColumnTask& task, int group, const WantedColumns& wanted) {
  const ColumnMatrix& w = task.weight;
  const int step = w.num_planes(), ahead = step * kTilesAhead;
  for (int tile = task.tile_begin; tile < task.tile_end && tile < task.tile_begin + ahead; tile += step) {
    prefetch_heads(w.heads(task.panel, group) + tile * w.head_bytes(), step);
    const uint8_t* codes = w.codes(task.panel, group) + w.tile_offset(tile);
    for (int i = 0; i < wanted.num_columns; ++i) __builtin_prefetch(codes + wanted.columns[i]);
    if (!w.in_planes) continue;
    for (int i = 0; i < wanted.num_whole; ++i) __builtin_prefetch(codes + wanted.columns[i] + w.plane_bytes());
  }
}

size_t multiply_columns(const ColumnTask& task) {
  const ColumnMatrix& w = task.weight;
  const int num_outputs = (task.tile_end - task.tile_begin) * kTileOutputs;
  std::memset(task.sums + task.tile_begin * kTileOutputs, 0, sizeof(float) * num_outputs);
  WantedColumns wanted[2];
  JoinedColumns joined;
  size_t num_pieces = 0;
  choose_columns(task.x, task.group_begin, w.column_stride(), wanted[0]);
  prefetch_tiles(task, task.group_begin, wanted[0]);
  for (int group = task.group_begin, turn = 0; group < task.group_end; ++group, turn = 1 - turn) {
    const WantedColumns& now = wanted[turn];
    WantedColumns& next = wanted[1 - turn];
    if (group + 1 < task.group_end)
      choose_columns(task.x, group + 1, w.column_stride(), next);
    else
      next.num_quads = 0;
    num_pieces += now.num_columns + (w.in_planes ? now.num_whole : 0);
    // What is not a number is in the scale.
    if (now.num_quads == 0 && now.scale - now.scale == 0.0f) continue;
    if (w.in_planes)
      multiply_plane_group(task, group, now, next, joined);
    else
      multiply_column_group(task, group, now, next);
  }
  return num_pieces * (w.tile_bytes() / w.num_planes());
}

void keep_wanted(float* x, const float* norms, Thresholds thresholds, int size, uint8_t* bits) {
  if (bits)
    for (int i = 0; i < size; ++i) bits[i] = __builtin_fabsf(x[i]) * norms[i] <= thresholds.whole ? kHighBits : kAllBits;
  // In this order a NaN stays.
  for (int i = 0; i < size; ++i) x[i] = __builtin_fabsf(x[i]) * norms[i] <= thresholds.wanted ? 0.0f : x[i];
}
