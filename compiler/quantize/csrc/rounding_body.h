// The rounding, written once over vectors of `kLanes` floats, a constant of the including file: the lanes are rows.
//
// Every row is rounded by itself, and sums over a group's 32 inputs go through them in their order. With that, and
// without fused multiply-add (setup.py forbids it), all vectors and the reference in Python give the same bits
// (tests/reference_rounding.py has the same formulas).
//
// Included inside an anonymous namespace of a file whose target options differ from the rest of the program, after all
// headers: nothing here may be shared between files, or the linker would mix instruction sets.

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

// Shrunken ranges that are tried: shares of the lowest and of the highest weight of a group.
constexpr float kRanges[][2] = {{1.0f, 1.0f}, {0.95f, 0.95f}, {0.9f, 0.9f}, {0.85f, 0.85f}, {0.78f, 0.78f},
                                {1.0f, 0.9f}, {0.9f, 1.0f},   {1.0f, 0.8f}, {0.8f, 1.0f}};
constexpr int kNumRanges = sizeof kRanges / sizeof kRanges[0];
constexpr float kInt8Ranges[] = {float(1.0 / 127), float(0.97 / 127), float(0.93 / 127)};
constexpr int kNumInt8Ranges = sizeof kInt8Ranges / sizeof kInt8Ranges[0];

constexpr float kLeastNormal = 6.103515625e-05f;  // of fp16

// One group of the rows of a block, transposed.
typedef float Tile[kGroup][kBlockRows];

inline F all(float x) { return x - F{}; }
inline F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline F as_float(I x) {
  F y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline I as_int(F x) {
  I y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// In this order of operands a NaN stays one.
inline F at_least(F x, F least) { return x < least ? least : x; }
inline F at_most(F x, F most) { return x > most ? most : x; }
inline F clamp(F x, float least, float most) { return at_most(at_least(x, all(least)), all(most)); }

// To the nearest whole number, ties to even, of -2^22 to 2^22: floats from 2^23 on are whole.
inline F rounded(F x) { return (x + 12582912.0f) - 12582912.0f; }

// To the nearest positive fp16, ties to even; of 0.5 to 1 the floats lie as close together as the subnormal halves.
inline F to_half(F x) {
  x = clamp(x, 6.0e-8f, 65504.0f);
  const I bits = as_int(x);
  const F normal = as_float((bits + (0xfff + (bits >> 13 & 1))) & ~0x1fff);
  return x < all(kLeastNormal) ? (x + 0.5f) - 0.5f : normal;
}

// The bits of what is a half already.
inline I half_bits(F x) {
  const I subnormal = __builtin_convertvector(at_most(x, all(kLeastNormal)) * 16777216.0f, I);
  return x < all(kLeastNormal) ? subnormal : (as_int(x) >> 13) - 0x1c000;
}

// w = scale * (code - zero); zeros are whole sixteenths.
struct Grid {
  F scales, zeros, errors;

  F code(F weight) const { return rounded(clamp(weight / scales + zeros, 0.0f, 15.0f)); }
};

// Take for each row the grid with the smaller error.
inline void take_better(Grid& best, const Grid& other) {
  const I better = other.errors < best.errors;
  best.scales = better ? other.scales : best.scales;
  best.zeros = better ? other.zeros : best.zeros;
  best.errors = better ? other.errors : best.errors;
}

// The grid of w = scale * code - offset, with scale and zero point as they will be stored.
inline Grid grid_of(const float* weights, const float* importance, F scales, F offsets) {
  Grid grid;
  grid.scales = to_half(scales);
  grid.zeros = rounded(clamp(offsets / grid.scales * 16.0f, 0.0f, 255.0f)) / 16.0f;
  grid.errors = F{};
  for (int i = 0; i < kGroup; ++i) {
    const F weight = load(weights + i * kBlockRows);
    const F error = weight - grid.scales * (grid.code(weight) - grid.zeros);
    grid.errors += importance[i] * (error * error);
  }
  return grid;
}

inline Grid best_range(const float* weights, const float* importance) {
  // Zero points lie inside the codes, so that a range always holds 0.
  F low = F{}, high = F{};
  for (int i = 0; i < kGroup; ++i) {
    const F weight = load(weights + i * kBlockRows);
    low = at_most(low, weight);
    high = at_least(high, weight);
  }
  Grid best;
  for (int range = 0; range < kNumRanges; ++range) {
    const F offsets = -low * kRanges[range][0];
    const Grid grid = grid_of(weights, importance, (high * kRanges[range][1] + offsets) / 15.0f, offsets);
    if (range == 0)
      best = grid;
    else
      take_better(best, grid);
  }
  return best;
}

// Fit scale and offset to the codes by weighted least squares, and round again.
inline Grid refitted(const float* weights, const float* importance, const Grid& grid) {
  F codes[kGroup], code_sum = F{}, weight_sum = F{}, variance = F{}, covariance = F{};
  float total = 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const F weight = load(weights + i * kBlockRows);
    codes[i] = grid.code(weight);
    total += importance[i];
    code_sum += importance[i] * codes[i];
    weight_sum += importance[i] * weight;
  }
  const F mean_code = code_sum / total, mean_weight = weight_sum / total;
  for (int i = 0; i < kGroup; ++i) {
    const F centred = codes[i] - mean_code;
    variance += importance[i] * (centred * centred);
    covariance += importance[i] * centred * load(weights + i * kBlockRows);
  }
  const F slope = covariance / at_least(variance, all(1e-30f));
  const F scales = ((slope > F{}) & (variance > F{})) ? slope : grid.scales;
  return grid_of(weights, importance, scales, scales * mean_code - mean_weight);
}

// What is stored for the rows of one vector: from row `first` of the block on.
inline void store_scales(const Task& task, int block, size_t tile, int first, F scales, F sixteenths) {
  const I halves = half_bits(scales), zeros = __builtin_convertvector(sixteenths, I);
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool padding = block * kBlockRows + first + lane >= task.rows;
    const size_t at = tile * kBlockRows + first + lane;
    task.scales[at] = padding ? 0 : static_cast<uint16_t>(halves[lane]);
    if (task.format == Format::int4) task.zeros[at] = padding ? 0 : static_cast<uint8_t>(zeros[lane]);
  }
}

// Store (32) codes of 4 bits: a byte holds inputs i and i + 4 of eight, a word of a row four such bytes.
inline void store_nibbles(const I* codes, uint8_t* out) {
  for (int quad = 0; quad < kGroup / 8; ++quad) {
    U word = U{};
    for (int i = 0; i < 4; ++i) word |= (U)(codes[quad * 8 + i] | codes[quad * 8 + 4 + i] << 4) << 8 * i;
    std::memcpy(out + quad * 64, &word, sizeof word);
  }
}

inline void store_bytes(const I* codes, uint8_t* out) {
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    U word = U{};
    for (int i = 0; i < 4; ++i) word |= (U)codes[quad * 4 + i] << 8 * i;
    std::memcpy(out + quad * 64, &word, sizeof word);
  }
}

inline void round_int4(const Task& task, int block, int group, const float* weights, int first) {
  const float* importance = task.importance.data() + group * kGroup;
  Grid best = best_range(weights, importance);
  take_better(best, refitted(weights, importance, best));
  I codes[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const F code = best.code(load(weights + i * kBlockRows));
    codes[i] = group * kGroup + i < task.cols ? __builtin_convertvector(code, I) : I{};
  }
  const size_t tile = size_t(block) * task.num_groups() + group;
  store_scales(task, block, tile, first, best.scales, best.zeros * 16.0f);
  store_nibbles(codes, task.codes + tile * task.tile_bytes() + first * 4);
}

inline F signed_code(F weight, F scales) { return rounded(clamp(weight / scales, -127.0f, 127.0f)); }

inline F best_int8_scales(const float* weights, const float* importance) {
  F largest = F{}, best_scales = F{}, best_errors = F{};
  for (int i = 0; i < kGroup; ++i) {
    const F weight = load(weights + i * kBlockRows);
    largest = at_least(at_least(largest, weight), -weight);
  }
  for (int range = 0; range < kNumInt8Ranges; ++range) {
    const F scales = to_half(largest * kInt8Ranges[range]);
    F errors = F{};
    for (int i = 0; i < kGroup; ++i) {
      const F weight = load(weights + i * kBlockRows);
      const F error = weight - scales * signed_code(weight, scales);
      errors += importance[i] * (error * error);
    }
    const I better = range == 0 ? ~I{} : errors < best_errors;
    best_scales = better ? scales : best_scales;
    best_errors = better ? errors : best_errors;
  }
  return best_scales;
}

inline void round_int8(const Task& task, int block, int group, const float* weights, int first) {
  const F scales = best_int8_scales(weights, task.importance.data() + group * kGroup);
  const size_t tile = size_t(block) * task.num_groups() + group, at = tile * task.tile_bytes() + first * 4;
  I codes[kGroup], lows[kGroup];
  for (int i = 0; i < kGroup; ++i)
    codes[i] = __builtin_convertvector(signed_code(load(weights + i * kBlockRows), scales), I) + 128;
  store_scales(task, block, tile, first, scales, F{});
  if (task.format == Format::int8) return store_bytes(codes, task.codes + at);
  for (int i = 0; i < kGroup; ++i) {
    lows[i] = codes[i] & 15;
    codes[i] >>= 4;
  }
  store_nibbles(codes, task.codes + at);
  store_nibbles(lows, task.lows + at);
}

// Read one tile, with zeros around the matrix.
template <class Word>
inline void read_tile(const Task& task, int block, int group, Tile& tile) {
  const int num_rows = std::min(kBlockRows, task.rows - block * kBlockRows);
  const int num_cols = std::min(kGroup, task.cols - group * kGroup);
  if (num_rows < kBlockRows || num_cols < kGroup) std::memset(tile, 0, sizeof tile);
  const char* from = task.weights + block * kBlockRows * task.row_stride + group * kGroup * task.col_stride;
  for (int row = 0; row < num_rows; ++row)
    for (int col = 0; col < num_cols; ++col) {
      Word word;
      std::memcpy(&word, from + row * task.row_stride + col * task.col_stride, sizeof word);
      const uint32_t bits = uint32_t(word) << (sizeof(uint32_t) - sizeof word) * 8;
      std::memcpy(&tile[col][row], &bits, sizeof bits);
    }
}

inline bool is_finite(const Tile& tile) {
  F sum = F{};
  for (int i = 0; i < kGroup; ++i)
    for (int first = 0; first < kBlockRows; first += kLanes) sum += load(tile[i] + first) * 0.0f;
  const I same = sum == sum;
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) finite = finite && same[lane] != 0;
  return finite;
}

bool round_block(const Task& task, int block) {
  alignas(64) Tile tile;
  bool finite = true;
  for (int group = 0; group < task.num_groups(); ++group) {
    if (task.bf16)
      read_tile<uint16_t>(task, block, group, tile);
    else
      read_tile<uint32_t>(task, block, group, tile);
    finite = finite && is_finite(tile);
    for (int first = 0; first < kBlockRows; first += kLanes) {
      if (task.format == Format::int4)
        round_int4(task, block, group, tile[0] + first, first);
      else
        round_int8(task, block, group, tile[0] + first, first);
    }
  }
  return finite;
}
