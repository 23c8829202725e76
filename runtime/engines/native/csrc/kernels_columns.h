// Products with matrices that lie input by input. Included by kernels_body.h.

constexpr int kTileOutputs = 8 * V::kLanes;  // the sums of four interleaved vectors of nibbles; half as many of bytes
constexpr int kTilesAhead =
    1024 / kTileOutputs;  // whose bytes are asked for; in planes half as many, each of two pieces

// Fours of a group's columns. Where the last has fewer, its last is repeated with the code 0.
struct ColumnQuads {
  uint32_t columns[kGroup + 4];  // bytes from the group's first column
  int8_t codes[kGroup + 4];
  int num_columns, num_quads;
};

// What of a group a token wants: all columns, in planes of their high bits; and those that are read whole, of their low ones.
struct WantedColumns {
  ColumnQuads all, whole;
  float scale, sum, low_sum;  // of the codes
};

// An input whose code is 0 adds nothing. All are written, and those that are wanted are counted: which they are nothing
// foresees, and a branch would be taken wrongly for half of them. `bits`: of inputs that are added, null for any.
inline void append_columns(const int8_t* codes, const uint8_t* bits, uint8_t wanted, size_t column_stride,
                           ColumnQuads& quads) {
  int count = quads.num_columns;
  for (int input = 0; input < kGroup; ++input) {
    quads.columns[count] = static_cast<uint32_t>(input * column_stride);
    quads.codes[count] = codes[input];
    count += (codes[input] != 0) & (!bits || bits[input] == wanted);
  }
  quads.num_columns = count;
}

inline void fill_last_quad(ColumnQuads& quads) {
  quads.num_quads = (quads.num_columns + 3) / 4;
  const uint32_t last = quads.columns[quads.num_columns > 0 ? quads.num_columns - 1 : 0];
  for (int i = quads.num_columns; i < quads.num_quads * 4; ++i) {
    quads.columns[i] = last;
    quads.codes[i] = 0;
  }
}

inline void choose_columns(const Activations& x, int group, const ColumnMatrix& w, WantedColumns& wanted) {
  const int8_t* codes = x.codes + size_t(group) * kGroup;
  const uint8_t* bits = x.bits && w.in_planes ? x.bits + size_t(group) * kGroup : nullptr;
  wanted.all.num_columns = 0;
  append_columns(codes, bits, kAllBits, w.column_stride(), wanted.all);
  if (w.in_planes) {
    wanted.whole = wanted.all;
    fill_last_quad(wanted.whole);
  }
  if (bits) append_columns(codes, bits, kHighBits, w.column_stride(), wanted.all);
  fill_last_quad(wanted.all);
  wanted.scale = x.scales[group];
  wanted.sum = x.sums[group];
  wanted.low_sum = bits ? x.low_sums[group] : 0.0f;
}

// Sums of a tile's outputs: of bytes, of low and of high nibbles, or of each two bits, of four vectors each.
template <int kParts>
struct ColumnSums {
  V::I parts[4][kParts];
};

template <int kParts>
inline void clear(ColumnSums<kParts>& sums) {
  for (auto& vector : sums.parts)
    for (V::I& sum : vector) sum = V::zero();
}

template <int kParts>
inline void add_quad(const uint8_t* tile, const uint32_t* columns, const int8_t* codes, ColumnSums<kParts>& sums) {
  V::B bytes[4];
  V::interleave(V::load_bytes(tile + columns[0]), V::load_bytes(tile + columns[1]), V::load_bytes(tile + columns[2]),
                V::load_bytes(tile + columns[3]), bytes);
  for (int i = 0; i < 4; ++i) {
    V::I* own = sums.parts[i];
    if constexpr (kParts == 4) {
      V::add_pairs(bytes[i], codes, own);
    } else if constexpr (kParts == 1) {
      own[0] = V::dot_bytes(own[0], bytes[i], codes);
    } else {
      own[0] = V::dot_nibbles(own[0], V::low_nibbles(bytes[i]), codes);
      own[1] = V::dot_nibbles(own[1], V::high_nibbles(bytes[i]), codes);
    }
  }
}

// total += (sums - zero points) * scales, as multiply_codes has it.
template <int kParts>
inline void finish_tile(ColumnSums<kParts>& sums, const uint8_t* head, const WantedColumns& wanted, float* total) {
  const V::F scale = V::set1(wanted.scale), sum = V::set1(wanted.sum), low_sum = V::set1(wanted.low_sum);
  constexpr int kOutputs = 4 * kParts * V::kLanes;
  for (int i = 0; i < 4; ++i) {
    V::I* own = sums.parts[i];
    if constexpr (kParts == 4) V::pair_sums(own);
    if constexpr (kParts == 2)
      for (int part = 0; part < kParts; ++part) own[part] = V::nibble_sums(own[part]);
  }
  for (int i = 0; i < 4 * kParts; ++i, total += V::kLanes) {
    V::F value = V::to_float(sums.parts[i % 4][i / 4]);
    if constexpr (kParts > 1)
      value = V::fnma(V::load_u8(head + 2 * kOutputs + i * V::kLanes), sum, value + low_sum);
    else if constexpr (V::kByteOffset != 0)
      value = V::fnma(V::set1(Tile<Format::int8>::kZero), sum, value);
    const V::F scales = V::load_half((const uint16_t*)head + i * V::kLanes);
    V::store(total, V::fma(value, scales * scale, V::load(total)));
  }
}

// Where the bytes of a later tile and their scales are, which are asked for; null where there are none.
struct Coming {
  const uint8_t *codes = nullptr, *head = nullptr;
  const WantedColumns* wanted = nullptr;
};

// What is read some tiles after one: at the end that of the next group's first tiles.
inline Coming coming_after(const ColumnTask& task, int group, int tile, const WantedColumns& now,
                           const WantedColumns& next) {
  const ColumnMatrix& w = task.weight;
  const int ahead = tile + kTilesAhead / w.num_planes();
  const bool here = ahead < task.tile_end;
  const int later = here ? ahead : ahead - task.tile_end + task.tile_begin;
  const WantedColumns& wanted = here ? now : next;
  if (later >= task.tile_end || wanted.all.num_quads == 0) return {};
  const int from = here ? group : group + 1;
  return {w.codes(task.panel, from) + later * w.tile_bytes(), w.heads(task.panel, from) + later * w.head_bytes(),
          &wanted};
}

inline void prefetch_head(const ColumnMatrix& w, const uint8_t* head) {
  for (size_t line = 0; line < w.head_bytes(); line += 64) __builtin_prefetch(head + line);
}

// Add fours of columns, and ask for as many of a later tile, where there are any.
template <int kParts>
inline void add_quads(const uint8_t* tile, const ColumnQuads& quads, const uint8_t* later_tile,
                      const ColumnQuads& later, ColumnSums<kParts>& sums) {
  for (int i = 0; i < quads.num_quads; ++i) {
    if (later_tile) {
      const uint32_t* columns = later.columns + 4 * (i < later.num_quads ? i : later.num_quads - 1);
      for (int j = 0; j < 4; ++j) __builtin_prefetch(later_tile + columns[j]);
    }
    add_quad(tile, quads.columns + 4 * i, quads.codes + 4 * i, sums);
  }
}

// A tile's bytes are asked for some tiles before. In planes the high bits of all columns are added, and then, to four times
// these sums, the low ones of those that read all bits.
template <int kParts>
inline void multiply_column_group(const ColumnTask& task, int group, const WantedColumns& now,
                                  const WantedColumns& next) {
  const ColumnMatrix& w = task.weight;
  for (int t = task.tile_begin; t < task.tile_end; ++t) {
    const uint8_t* codes = w.codes(task.panel, group) + t * w.tile_bytes();
    const Coming coming = coming_after(task, group, t, now, next);
    const WantedColumns& later = coming.wanted ? *coming.wanted : now;
    if (coming.codes) prefetch_head(w, coming.head);
    ColumnSums<kParts> sums;
    clear(sums);
    add_quads(codes, now.all, coming.codes, later.all, sums);
    if constexpr (kParts == 4) {
      for (auto& vector : sums.parts)
        for (V::I& sum : vector) sum = V::times_four(sum);
      const bool comes = coming.codes && later.whole.num_quads > 0;
      add_quads(codes + w.plane_bytes(), now.whole, comes ? coming.codes + w.plane_bytes() : nullptr, later.whole,
                sums);
    }
    finish_tile(sums, w.heads(task.panel, group) + t * w.head_bytes(), now, task.sums + size_t(t) * w.tile);
  }
}

// What of a group's first tiles is asked for before the first sum.
inline void prefetch_tiles(const ColumnTask& task, int group, const WantedColumns& wanted) {
  const ColumnMatrix& w = task.weight;
  const int end = task.tile_begin + kTilesAhead / w.num_planes();
  for (int tile = task.tile_begin; tile < task.tile_end && tile < end; ++tile) {
    prefetch_head(w, w.heads(task.panel, group) + tile * w.head_bytes());
    const uint8_t* codes = w.codes(task.panel, group) + tile * w.tile_bytes();
    for (int i = 0; i < wanted.all.num_columns; ++i) __builtin_prefetch(codes + wanted.all.columns[i]);
    for (int i = 0; w.in_planes && i < wanted.whole.num_columns; ++i)
      __builtin_prefetch(codes + w.plane_bytes() + wanted.whole.columns[i]);
  }
}

size_t multiply_columns(const ColumnTask& task) {
  if (task.weight.format == Format::bf16) return multiply_bf16_columns(task);
  const ColumnMatrix& w = task.weight;
  const size_t first = size_t(task.tile_begin) * w.tile, count = size_t(task.tile_end) * w.tile - first;
  std::memset(task.sums + first, 0, sizeof(float) * count);
  WantedColumns wanted[2];
  size_t num_pieces = 0;
  choose_columns(task.x, task.group_begin, w, wanted[0]);
  prefetch_tiles(task, task.group_begin, wanted[0]);
  for (int group = task.group_begin, turn = 0; group < task.group_end; ++group, turn = 1 - turn) {
    const WantedColumns& now = wanted[turn];
    WantedColumns& next = wanted[1 - turn];
    if (group + 1 < task.group_end)
      choose_columns(task.x, group + 1, w, next);
    else
      next.all.num_quads = 0;
    num_pieces += now.all.num_columns + (w.in_planes ? now.whole.num_columns : 0);
    // What is not a number is in the scale.
    if (now.all.num_quads == 0 && now.scale - now.scale == 0.0f) continue;
    if (w.format == Format::int8)
      multiply_column_group<1>(task, group, now, next);
    else if (w.in_planes)
      multiply_column_group<4>(task, group, now, next);
    else
      multiply_column_group<2>(task, group, now, next);
  }
  return num_pieces * w.tile_bytes();
}

void keep_wanted(float* x, const float* norms, Thresholds thresholds, int size, uint8_t* bits) {
  if (bits)
    for (int i = 0; i < size; ++i)
      bits[i] = __builtin_fabsf(x[i]) * norms[i] <= thresholds.whole ? kHighBits : kAllBits;
  // In this order a NaN stays.
  for (int i = 0; i < size; ++i) x[i] = __builtin_fabsf(x[i]) * norms[i] <= thresholds.wanted ? 0.0f : x[i];
}
