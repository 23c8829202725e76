// Products with matrices of bfloat16 that lie input by input. Included by kernels_body.h.
//
// Floats are summed in the order of multiply_bf16_rows, so that both agree to the bit: for each output as many sums as a
// vector has lanes, each of every kLanes-th input, and in the end their sum. Each of these goes through all inputs.

constexpr int kStripOutputs = 512;  // the most whose sums are kept at once: 1 kB of each column
constexpr int kListedInputs = 128;
constexpr int kLineNumbers = 32;  // of a cache line, and of a tile

// Some outputs of a task.
struct Strip {
  const ColumnTask& task;
  int first, count;  // multiples of kLineNumbers

  const uint16_t* column(int input) const {
    const ColumnMatrix& w = task.weight;
    return (const uint16_t*)(w.codes(task.panel, input / kGroup) + input % kGroup * w.column_stride()) + first;
  }
};

struct WantedInputs {
  int ids[kListedInputs];
  int count;
};

// Those of the inputs first, first + step and so on that are not 0, without branches as in append_columns. A NaN is wanted.
inline void list_wanted(const float* x, int first, int end, int step, WantedInputs& wanted) {
  int count = 0;
  for (int input = first; input < end; input += step) {
    wanted.ids[count] = input;
    count += x[input] != 0.0f;
  }
  wanted.count = count;
}

// sums += column * x; as much of a later column is asked for.
inline void add_numbers(const uint16_t* column, const uint16_t* later, float x, int count, float* sums) {
  const V::F value = V::set1(x);
  for (int line = 0; line < count; line += kLineNumbers) {
    __builtin_prefetch(later + line);
    for (int i = line; i < line + kLineNumbers; i += V::kLanes)
      V::store(sums + i, V::fma(V::load_bf16(column + i), value, V::load(sums + i)));
  }
}

// The sums of every kLanes-th input from one on.
inline void add_lane(const Strip& strip, int lane, int end, float* sums) {
  const float* x = strip.task.x.values;
  constexpr int kSpan = kListedInputs * V::kLanes;
  WantedInputs wanted;
  for (int first = lane; first < end; first += kSpan) {
    list_wanted(x, first, first + kSpan < end ? first + kSpan : end, V::kLanes, wanted);
    for (int i = 0; i < wanted.count; ++i) {
      const int input = wanted.ids[i], later = wanted.ids[i + 1 < wanted.count ? i + 1 : i];
      add_numbers(strip.column(input), strip.column(later), x[input], strip.count, sums);
    }
  }
}

// Inputs that fill no vector: each is added to an output's sum alone, not fused, as rows have it.
inline void add_last_inputs(const Strip& strip, int begin, float* out) {
  const float* x = strip.task.x.values;
  for (int input = begin; input < strip.task.weight.num_inputs; ++input) {
    if (x[input] == 0.0f) continue;
    const uint16_t* column = strip.column(input);
    for (int i = 0; i < strip.count; i += V::kLanes)
      V::store(out + i, V::load(out + i) + V::load_bf16(column + i) * V::set1(x[input]));
  }
}

inline void multiply_strip(const Strip& strip, float* out) {
  alignas(64) float sums[V::kLanes][kStripOutputs];
  const int end = strip.task.weight.num_inputs / V::kLanes * V::kLanes;
  for (int lane = 0; lane < V::kLanes; ++lane) {
    std::memset(sums[lane], 0, sizeof(float) * strip.count);
    add_lane(strip, lane, end, sums[lane]);
  }
  for (int i = 0; i < strip.count; ++i) {
    float lanes[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) lanes[lane] = sums[lane][i];
    out[i] = V::reduce_add(V::load(lanes));
  }
  add_last_inputs(strip, end, out);
}

// Strips are as wide as each other, near enough: what lies in one piece of a column is read in one piece.
size_t multiply_bf16_columns(const ColumnTask& task) {
  const ColumnMatrix& w = task.weight;
  constexpr int kStripTiles = kStripOutputs / kLineNumbers;
  const int num_tiles = task.tile_end - task.tile_begin, num_strips = (num_tiles + kStripTiles - 1) / kStripTiles;
  for (int number = 0; number < num_strips; ++number) {
    const int begin = task.tile_begin + num_tiles * number / num_strips;
    const int end = task.tile_begin + num_tiles * (number + 1) / num_strips;
    const Strip strip{task, begin * w.tile, (end - begin) * w.tile};
    multiply_strip(strip, task.sums + strip.first);
  }
  size_t num_wanted = 0;
  for (int input = 0; input < w.num_inputs; ++input) num_wanted += task.x.values[input] != 0.0f;
  return num_wanted * w.tile_bytes();
}
