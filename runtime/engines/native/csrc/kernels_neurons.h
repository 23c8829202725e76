// Products with single rows in int4_rows. Included by kernels_body.h.

constexpr int kPartCodes = kPartGroups * kGroup / 2;  // bytes
constexpr int kPartZeros = kPartCodes + kPartGroups * 2;
// Rows whose factors are rounded together; the sums of so many fit 16 bits, as those of a group do.
constexpr int kBatch = 32;

inline const uint16_t* part_scales(const uint8_t* part) { return (const uint16_t*)(part + kPartCodes); }

// How far ahead what is read next is asked for: rows of dot_neurons, bytes of each row of add_neurons. What each call
// begins with is asked for by its caller.
constexpr int kRowsAhead = 2;
constexpr int kBytesAhead = 128;

void dot_neurons(const NeuronRows& rows, const NeuronInputs& x, float* out) {
  const int num_parts = rows.weight.num_parts();
  for (int i = 0; i < rows.count; ++i) {
    const uint8_t* part = rows.weight.row(rows.ids[i]);
    V::F total[kVectors];
    for (auto& lanes : total) lanes = V::set1(0.0f);
    const uint8_t* later = i + kRowsAhead < rows.count ? rows.weight.row(rows.ids[i + kRowsAhead]) : part;
    for (int p = 0; p < num_parts; ++p, part += kPartBytes, later += kPartBytes) {
      for (int line = 0; line < kPartBytes; line += 64) __builtin_prefetch(later + line);
      const int8_t* codes = x.codes + p * kPartGroups * kGroup;
      for (int v = 0; v < kVectors; ++v) {
        const int lane = v * V::kLanes, group = p * kPartGroups + lane;
        V::I low_sums = V::zero(), high_sums = V::zero();
        for (int j = 0; j < 4; ++j) {
          const V::B bytes = V::load_bytes(part + j * 64 + lane * 4);
          const int8_t* fours = codes + j * 128 + lane * 4;
          low_sums = V::dot_nibbles_lanes(low_sums, V::low_nibbles(bytes), V::load_fours(fours));
          high_sums = V::dot_nibbles_lanes(high_sums, V::high_nibbles(bytes), V::load_fours(fours + 64));
        }
        V::F value = V::to_float(V::nibble_sums(V::add_nibble_sums(low_sums, high_sums)));
        value = V::fnma(V::load_u8(part + kPartZeros + lane), V::load(x.sums + group), value);
        total[v] = V::fma(value, V::load_half(part_scales(part) + lane) * V::load(x.scales + group), total[v]);
      }
    }
    out[i] = V::reduce_lanes(total);
  }
}

// One part of up to kBatch rows, and their factors times the scales of its groups, rounded.
struct PartBatch {
  const uint8_t* parts[kBatch];
  int num_fours;                                             // of rows
  alignas(64) int8_t fours[kBatch / 4][kPartGroups][4];      // factors of four rows beside each other
  alignas(64) float steps[kPartGroups], zeros[kPartGroups];  // of a rounded factor; sum of factors times zero points
};

inline void round_factors(const float* factors, PartBatch& batch) {
  constexpr float kLeast = 1e-30f;
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * V::kLanes;
    V::F scaled[kBatch], most = V::set1(kLeast), zeros = V::set1(0.0f);
    for (int i = 0; i < 4 * batch.num_fours; ++i) {
      scaled[i] = V::set1(factors[i]) * V::load_half(part_scales(batch.parts[i]) + lane);
      most = V::max(most, V::max(scaled[i], V::set1(0.0f) - scaled[i]));
    }
    const V::F inverse = V::set1(127.0f) / most;
    for (int four = 0; four < batch.num_fours; ++four) {
      V::F* rounded = scaled + 4 * four;
      for (int i = 0; i < 4; ++i) {
        rounded[i] = V::round(rounded[i] * inverse);
        // What is not a number is lost from the bytes, and kept here.
        zeros = V::fma(rounded[i], V::load_u8(batch.parts[4 * four + i] + kPartZeros + lane), zeros);
      }
      V::store_fours(batch.fours[four][lane], rounded);
    }
    V::store(batch.steps + lane, most * V::set1(1.0f / 127));
    V::store(batch.zeros + lane, zeros * V::set1(1.0f / 16));
  }
}

template <int kGroupOfFour>
inline void add_words(V::B bytes, V::I fours, V::I (*sums)[4]) {
  const V::I factors = V::template spread<kGroupOfFour>(fours);
  sums[0][kGroupOfFour] = V::dot_nibbles_lanes(sums[0][kGroupOfFour], V::low_nibbles(bytes), factors);
  sums[1][kGroupOfFour] = V::dot_nibbles_lanes(sums[1][kGroupOfFour], V::high_nibbles(bytes), factors);
}

template <int kGroupOfFour>
inline void finish_words(const PartBatch& batch, int lane, const V::I (*sums)[4], float* out) {
  const V::F step = V::template spread<kGroupOfFour>(V::load(batch.steps + lane));
  const V::F zero = V::template spread<kGroupOfFour>(V::load(batch.zeros + lane));
  for (int half = 0; half < 2; ++half) {
    float* to = out + (half * 4 + kGroupOfFour) * kPartGroups;
    const V::F value = V::to_float(V::nibble_sums(sums[half][kGroupOfFour])) - zero;
    V::store(to, V::fma(value, step, V::load(to)));
  }
}

// The bytes of four rows are put beside each other: a word then holds what one output takes of each of them.
inline void add_part(const PartBatch& batch, int j, bool more, float* out) {
  if (more)
    for (int i = 0; i < 4 * batch.num_fours; ++i) __builtin_prefetch(batch.parts[i] + j * 64 + kBytesAhead);
  if (more && j == 2)
    for (int i = 0; i < 4 * batch.num_fours; ++i) __builtin_prefetch(batch.parts[i] + kPartBytes + kPartCodes);
  for (int v = 0; v < kVectors; ++v) {
    const int lane = v * V::kLanes, at = j * 64 + lane * 4;
    V::I sums[2][4];
    for (auto& half : sums)
      for (V::I& sum : half) sum = V::zero();
    for (int four = 0; four < batch.num_fours; ++four) {
      const uint8_t* const* parts = batch.parts + 4 * four;
      V::B bytes[4];
      V::interleave(V::load_bytes(parts[0] + at), V::load_bytes(parts[1] + at), V::load_bytes(parts[2] + at),
                    V::load_bytes(parts[3] + at), bytes);
      const V::I fours = V::load_fours(batch.fours[four][lane]);
      add_words<0>(bytes[0], fours, sums);
      add_words<1>(bytes[1], fours, sums);
      add_words<2>(bytes[2], fours, sums);
      add_words<3>(bytes[3], fours, sums);
    }
    finish_words<0>(batch, lane, sums, out + lane);
    finish_words<1>(batch, lane, sums, out + lane);
    finish_words<2>(batch, lane, sums, out + lane);
    finish_words<3>(batch, lane, sums, out + lane);
  }
}

void add_neurons(const NeuronRows& rows, const float* factors, float* sums) {
  const int num_parts = rows.weight.num_parts();
  for (int i = 0; i < num_sums(rows.weight); i += V::kLanes) V::store(sums + i, V::set1(0.0f));
  for (int first = 0; first < rows.count; first += kBatch) {
    const int count = rows.count - first < kBatch ? rows.count - first : kBatch;
    PartBatch batch;
    float own[kBatch] = {};
    batch.num_fours = (count + 3) / 4;
    for (int i = 0; i < 4 * batch.num_fours; ++i) {
      batch.parts[i] = rows.weight.row(rows.ids[first + (i < count ? i : count - 1)]);
      own[i] = i < count ? factors[first + i] : 0.0f;
    }
    for (int p = 0; p < num_parts; ++p) {
      round_factors(own, batch);
      for (int j = 0; j < 4; ++j) add_part(batch, j, p + 1 < num_parts || j < 2, sums + (p * 4 + j) * 8 * kPartGroups);
      for (int i = 0; i < 4 * batch.num_fours; ++i) batch.parts[i] += kPartBytes;
    }
  }
}
