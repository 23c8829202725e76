// The kernels of attention: scores, softmax and weighted values of some positions, their parts joined, and rotation.
// Included by kernels_body.h, on the terms that it states.

constexpr int kChunk = 128;  // positions between two rescalings of the running sums
constexpr int kQueries = 4;  // queries that share one read of the keys
constexpr int kPageBlocks = kPageTokens / kPositions;

// Numbers of the cache, `T` of which are halves (uint16_t) or floats.
inline V::F load_cached(const uint16_t* p) { return V::load_half(p); }
inline V::F load_cached(const float* p) { return V::load(p); }

template <class T>
inline const T* in_page(const AttentionTask& task, const void* first, int page) {
  const char* start = static_cast<const char*>(first) + size_t(task.pages[page]) * task.head.page_bytes;
  return reinterpret_cast<const T*>(start);
}

template <class T>
inline const T* keys_of(const AttentionTask& task, int block) {
  return in_page<T>(task, task.head.keys, block / kPageBlocks) + block % kPageBlocks * task.head_dim * kPositions;
}

template <class T>
inline const T* values_of(const AttentionTask& task, int position) {
  return in_page<T>(task, task.head.values, position / kPageTokens) + position % kPageTokens * task.value_stride;
}

template <class T, int kCount>
inline void score_block(const AttentionTask& task, int query, int block, float (*scores)[kChunk], int column) {
  // Two independent sums for even and odd dimensions hide the latency of the products.
  V::F sums[2][kCount][kVectors];
  for (auto& half : sums)
    for (auto& vectors : half)
      for (auto& value : vectors) value = V::set1(0.0f);
  const T* keys = keys_of<T>(task, block);
  const float* q = task.queries + size_t(query) * task.head_dim;
  // A head's keys and values are pieces too short for the hardware to see them coming: the keys at the same place of the
  // next page (nearer and further ones were tried, and are slower), and the values of these positions, as many bytes,
  // which are read next.
  const bool more = (block + kPageBlocks) * kPositions < task.end;
  const T* next = more ? keys_of<T>(task, block + kPageBlocks) : keys;
  const T* values = values_of<T>(task, block * kPositions);
  for (int d = 0; d < task.head_dim; d += 2) {
    if (query == 0)  // the others find them in the cache
      for (int i = d * kPositions; i < (d + 2) * kPositions; i += 64 / sizeof(T)) {
        __builtin_prefetch(next + i);
        __builtin_prefetch(values + i);
      }
    for (int odd = 0; odd < 2; ++odd)
      for (int v = 0; v < kVectors; ++v) {
        const V::F key = load_cached(keys + (d + odd) * kPositions + v * V::kLanes);
        for (int i = 0; i < kCount; ++i)
          sums[odd][i][v] = V::fma(key, V::set1(q[i * task.head_dim + d + odd]), sums[odd][i][v]);
      }
  }
  for (int i = 0; i < kCount; ++i)
    for (int v = 0; v < kVectors; ++v) V::store(scores[i] + column + v * V::kLanes, sums[0][i][v] + sums[1][i][v]);
}

inline float exp_one(float x) {
  float lanes[V::kLanes];
  V::store(lanes, exp_vector(V::set1(x)));
  return lanes[0];
}

// Turn scores into weights relative to the running maximum; returns what earlier sums shrink by.
inline float soften(float* scores, int size, float& maximum, float& sum) {
  V::F largest = V::set1(maximum);
  for (int i = 0; i < size; i += V::kLanes) largest = V::max(largest, V::load(scores + i));
  const float next = V::reduce_max(largest);
  V::F total[kVectors];
  for (auto& lanes : total) lanes = V::set1(0.0f);
  for (int i = 0; i < size; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) {
      const V::F weight = exp_vector(V::load(scores + i + v * V::kLanes) - V::set1(next));
      V::store(scores + i + v * V::kLanes, weight);
      total[v] = total[v] + weight;
    }
  const float shrink = maximum <= -kHuge ? 0.0f : exp_one(maximum - next);
  sum = sum * shrink + V::reduce_lanes(total);
  maximum = next;
  return shrink;
}

// Weighted values of kSteps x 16 dimensions from `d` on.
template <class T, int kCount, int kSteps>
inline void add_value_columns(const AttentionTask& task, int query, int begin, int end, int base,
                              const float (*weights)[kChunk], const float* shrink, int d) {
  constexpr int kColumns = kSteps * kVectors;
  V::F sums[kCount][kColumns];
  float* out = task.out + size_t(query) * task.value_stride + d;
  for (int i = 0; i < kCount; ++i)
    for (int c = 0; c < kColumns; ++c)
      sums[i][c] = V::load(out + size_t(i) * task.value_stride + c * V::kLanes) * V::set1(shrink[i]);
  for (int position = begin; position < end;) {
    const int page_end = (position / kPageTokens + 1) * kPageTokens, stop = page_end < end ? page_end : end;
    const T* values = values_of<T>(task, position) + d;
    const float* column[kCount];
    for (int i = 0; i < kCount; ++i) column[i] = weights[i] + (position - base);
    const int count = stop - position;
    for (int p = 0; p < count; ++p)
      for (int c = 0; c < kColumns; ++c) {
        const V::F value = load_cached(values + size_t(p) * task.value_stride + c * V::kLanes);
        for (int i = 0; i < kCount; ++i) sums[i][c] = V::fma(value, V::set1(column[i][p]), sums[i][c]);
      }
    position = stop;
  }
  for (int i = 0; i < kCount; ++i)
    for (int c = 0; c < kColumns; ++c) V::store(out + size_t(i) * task.value_stride + c * V::kLanes, sums[i][c]);
}

template <class T, int kCount>
inline void add_values(const AttentionTask& task, int query, int begin, int end, int base,
                       const float (*weights)[kChunk], const float* shrink) {
  // As many sums side by side as the registers hold.
  constexpr int kSteps = kVectors == 1 ? 4 : 1;
  int d = 0;
  for (; d + kSteps * kPositions <= task.value_stride; d += kSteps * kPositions)
    add_value_columns<T, kCount, kSteps>(task, query, begin, end, base, weights, shrink, d);
  for (; d < task.value_stride; d += kPositions)
    add_value_columns<T, kCount, 1>(task, query, begin, end, base, weights, shrink, d);
}

template <class T, int kCount>
inline void attend_queries(const AttentionTask& task, int query) {
  float scores[kCount][kChunk], shrink[kCount];
  for (int i = 0; i < kCount; ++i) {
    task.maxima[query + i] = -__builtin_inff();
    task.sums[query + i] = 0.0f;
    for (int d = 0; d < task.value_stride; ++d) task.out[size_t(query + i) * task.value_stride + d] = 0.0f;
  }
  if (task.begin >= task.end) return;
  // Whole blocks of positions are scored; what lies outside [begin, end) is masked.
  for (int base = task.begin / kPositions * kPositions; base < task.end; base += kChunk) {
    const int last = base + kChunk < task.end ? base + kChunk : task.end;
    const int size = (last - base + kPositions - 1) / kPositions * kPositions;
    for (int column = 0; column < size; column += kPositions)
      score_block<T, kCount>(task, query, (base + column) / kPositions, scores, column);
    for (int i = 0; i < kCount; ++i) {
      if (task.score_limit > 0.0f) limit(scores[i], size, task.score_limit);
      for (int position = base; position < task.begin; ++position) scores[i][position - base] = -__builtin_inff();
      for (int column = last - base; column < size; ++column) scores[i][column] = -__builtin_inff();
      shrink[i] = soften(scores[i], size, task.maxima[query + i], task.sums[query + i]);
    }
    add_values<T, kCount>(task, query, base < task.begin ? task.begin : base, last, base, scores, shrink);
  }
}

template <class T>
inline void attend_all(const AttentionTask& task) {
  int query = 0;
  for (; query + kQueries <= task.num_queries; query += kQueries) attend_queries<T, kQueries>(task, query);
  switch (task.num_queries - query) {
    case 3: attend_queries<T, 3>(task, query); break;
    case 2: attend_queries<T, 2>(task, query); break;
    case 1: attend_queries<T, 1>(task, query); break;
    default: break;
  }
}

void attend(const AttentionTask& task) { task.head.wide ? attend_all<float>(task) : attend_all<uint16_t>(task); }

void combine(const AttentionPart* parts, int num_parts, int num_heads, int head_dim, const float* sinks, float* out) {
  const int stride = (head_dim + kPositions - 1) / kPositions * kPositions;
  for (int head = 0; head < num_heads; ++head, out += head_dim) {
    float maximum = -__builtin_inff(), total = 0.0f;
    for (int p = 0; p < num_parts; ++p)
      if (parts[p].maxima[head] > maximum) maximum = parts[p].maxima[head];
    if (sinks && sinks[head] > maximum) maximum = sinks[head];
    for (int i = 0; i < head_dim; ++i) out[i] = 0.0f;
    for (int p = 0; p < num_parts; ++p) {
      if (parts[p].sums[head] == 0.0f) continue;
      const float weight = exp_one(parts[p].maxima[head] - maximum);
      total += weight * parts[p].sums[head];
      const float* values = parts[p].values + size_t(head) * stride;
      int i = 0;
      for (; i + V::kLanes <= head_dim; i += V::kLanes)
        V::store(out + i, V::fma(V::load(values + i), V::set1(weight), V::load(out + i)));
      if (i == head_dim) continue;
      float padded[V::kLanes];  // of the values there is a whole vector
      load_tail(out + i, head_dim - i, padded);
      V::store(padded, V::fma(V::load(values + i), V::set1(weight), V::load(padded)));
      for (int j = 0; i < head_dim; ++i, ++j) out[i] = padded[j];
    }
    if (sinks) total += exp_one(sinks[head] - maximum);
    const float scale = 1.0f / total;
    for (int i = 0; i < head_dim; ++i) out[i] *= scale;
  }
}

inline void rotate_vector(float* lows, float* highs, const float* cosines, const float* sines) {
  const V::F low = V::load(lows), high = V::load(highs), cosine = V::load(cosines), sine = V::load(sines);
  V::store(lows, V::fnma(high, sine, low * cosine));
  V::store(highs, V::fma(low, sine, high * cosine));
}

void rotate(float* head, const float* angles, int half) {
  int i = 0;
  for (; i + V::kLanes <= half; i += V::kLanes) rotate_vector(head + i, head + half + i, angles + i, angles + half + i);
  if (i == half) return;
  float low[V::kLanes], high[V::kLanes], cosine[V::kLanes], sine[V::kLanes];
  load_tail(head + i, half - i, low);
  load_tail(head + half + i, half - i, high);
  load_tail(angles + i, half - i, cosine);
  load_tail(angles + half + i, half - i, sine);
  rotate_vector(low, high, cosine, sine);
  for (int j = 0; i < half; ++i, ++j) {
    head[i] = low[j];
    head[half + i] = high[j];
  }
}
