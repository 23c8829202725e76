// The products, written once over vectors of `kLanes` floats.
//
// The including file defines kLanes; kRows, the rows of a tile; kStepTokens, the tokens that one multiplication takes;
// F and V, vectors of sums and of packed values; and multiply_add(F, V, V). Included inside an anonymous namespace of a
// file whose target options differ from the rest of the program, after all headers: nothing here may be shared between
// files, or the linker would mix instruction sets.
//
// Columns of h, then of y, are packed in panels of kLanes: [panel][step][lane]. A block of the result is kColumns wide;
// its columns of a few steps stay in the first-level cache while those of h pass by, and its sums in the second-level.

constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;
// A block's columns of h or y take 18 KB of the first-level cache, and each of its sums passes through once a block.
constexpr int kBlockSteps = 18432 / (kColumns * 4);
constexpr int kPackSteps = 32;
constexpr int kChunkSteps = kChunkTokens / kStepTokens;
// Panels a power of two apart would share the few places that a cache has for them.
constexpr int kPanelSteps = kChunkSteps + 8;

inline int blocks_of(int columns) { return (columns + kColumns - 1) / kColumns; }
inline int steps_of(const Task& task) { return (task.num_rows + kStepTokens - 1) / kStepTokens; }

size_t packed_bytes(const Task& task) {
  return size_t(blocks_of(task.num_inputs) + blocks_of(task.num_outputs)) * kVectors * kPanelSteps * sizeof(V);
}
int num_packs(const Task& task) { return (steps_of(task) + kPackSteps - 1) / kPackSteps; }
int num_blocks(const Task& task) { return blocks_of(task.num_inputs) + blocks_of(task.num_outputs); }

inline uint32_t* panel_of(const Task& task, int panel) {
  return static_cast<uint32_t*>(task.packed) + size_t(panel) * kPanelSteps * kLanes;
}

// Some columns of one step. Of one token a float, of two tokens both halves of 32 bits.
inline void pack_lanes(const float* first, const float*, int count, uint32_t* out) {
  std::memcpy(out, first, count * sizeof(float));
}
inline void pack_lanes(const uint16_t* first, const uint16_t* second, int count, uint32_t* out) {
  for (int lane = 0; lane < count; ++lane)
    out[lane] = kStepTokens == 2 ? uint32_t(second[lane]) << 16 | first[lane] : uint32_t(first[lane]) << 16;
}

// All columns of one step of one matrix.
template <class Value>
inline void pack_step(const Value* first, const Value* second, int columns, uint32_t* out) {
  for (int start = 0; start < blocks_of(columns) * kColumns; start += kLanes, out += size_t(kPanelSteps) * kLanes) {
    if (start + kLanes <= columns) {
      pack_lanes(first + start, second + start, kLanes, out);
      continue;
    }
    std::fill_n(out, kLanes, 0u);
    pack_lanes(first + start, second + start, std::max(0, columns - start), out);
  }
}

template <class Value>
void pack_values(const Task& task, int block) {
  const std::vector<Value> none(std::max(task.num_inputs, task.num_outputs));
  const int end = std::min(steps_of(task), (block + 1) * kPackSteps);
  const auto row = [&](const void* matrix, int columns, int token) {
    return token < task.num_rows ? static_cast<const Value*>(matrix) + task.rows[token] * columns : none.data();
  };
  for (int step = block * kPackSteps; step < end; ++step) {
    const int token = step * kStepTokens, next = token + kStepTokens - 1;
    pack_step(row(task.activations, task.num_inputs, token), row(task.activations, task.num_inputs, next),
              task.num_inputs, panel_of(task, 0) + step * kLanes);
    pack_step(row(task.targets, task.num_outputs, token), row(task.targets, task.num_outputs, next), task.num_outputs,
              panel_of(task, blocks_of(task.num_inputs) * kVectors) + step * kLanes);
  }
}

void pack(const Task& task, int block) {
  if (task.is_float)
    pack_values<float>(task, block);
  else
    pack_values<uint16_t>(task, block);
}

inline V load(const uint32_t* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline V all(uint32_t x) {
  V y;
  const auto lanes = U{} + x;
  std::memcpy(&y, &lanes, sizeof y);
  return y;
}

// Add kRows rows of h, each with kColumns columns, over some steps.
inline void add_tile(const uint32_t* left, const uint32_t* right, int steps, float* out, ptrdiff_t stride) {
  F sums[kRows][kVectors];
  // Of the next tile: its rows are a row of the matrix apart, which the CPU does not foresee.
  for (int i = 0; i < kRows; ++i)
    for (int start = 0; start < kColumns * 4; start += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(out + (i + kRows) * stride) + start, 1);
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) std::memcpy(&sums[i][v], out + i * stride + v * kLanes, sizeof(F));
  for (int step = 0; step < steps; ++step) {
    V columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(right + (size_t(v) * kPanelSteps + step) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V row = all(left[size_t(step) * kLanes + i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(sums[i][v], row, columns[v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) std::memcpy(out + i * stride + v * kLanes, &sums[i][v], sizeof(F));
}

// The same where the matrix ends within the tile.
inline void add_edge(const uint32_t* left, const uint32_t* right, int steps, float* out, ptrdiff_t stride, int rows,
                     int columns) {
  float tile[kRows * kColumns] = {};
  for (int i = 0; i < rows; ++i) std::memcpy(tile + i * kColumns, out + i * stride, columns * sizeof(float));
  add_tile(left, right, steps, tile, kColumns);
  for (int i = 0; i < rows; ++i) std::memcpy(out + i * stride, tile + i * kColumns, columns * sizeof(float));
}

// One block of columns: of y, then of h from the last on, whose blocks are the longer the later they are.
void multiply(const Task& task, int block) {
  const int of_targets = blocks_of(task.num_outputs), of_inputs = blocks_of(task.num_inputs);
  const bool is_cross = block < of_targets;
  const int number = is_cross ? block : of_inputs - 1 - (block - of_targets);
  const int stride = is_cross ? task.num_outputs : task.num_inputs, first = number * kColumns;
  const int columns = std::min(kColumns, stride - first);
  const int num_rows = is_cross ? task.num_inputs : std::min(task.num_inputs, first + kColumns);
  float* out = (is_cross ? task.cross : task.gram) + first;
  const uint32_t* right = panel_of(task, ((is_cross ? of_inputs : 0) + number) * kVectors);
  for (int step = 0; step < steps_of(task); step += kBlockSteps) {
    const int steps = std::min(kBlockSteps, steps_of(task) - step);
    for (int i = 0; i < num_rows; i += kRows) {
      const uint32_t* left = panel_of(task, i / kLanes) + step * kLanes + i % kLanes;
      const int rows = std::min(kRows, num_rows - i);
      float* tile = out + ptrdiff_t(i) * stride;
      if (rows == kRows && columns == kColumns)
        add_tile(left, right + step * kLanes, steps, tile, stride);
      else
        add_edge(left, right + step * kLanes, steps, tile, stride, rows, columns);
    }
  }
}
