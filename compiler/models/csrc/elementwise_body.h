// The arithmetic, in vectors F of kLanes floats; included once per instruction set, which defines F, U, H, I and kLanes.

inline F load(const float* from, size_t count) {
  F values = {};
  if (count >= kLanes)
    std::memcpy(&values, from, sizeof(F));
  else
    std::memcpy(&values, from, count * sizeof(float));
  return values;
}

inline F load(const uint16_t* from, size_t count) {
  H bits = {};
  if (count >= kLanes)
    std::memcpy(&bits, from, sizeof(H));
  else
    std::memcpy(&bits, from, count * sizeof(uint16_t));
  return F(__builtin_convertvector(bits, U) << 16);
}

inline void store(F values, float* to, size_t count) {
  if (count >= kLanes)
    std::memcpy(to, &values, sizeof(F));
  else
    std::memcpy(to, &values, count * sizeof(float));
}

// To the nearest bfloat16, of two equally near ones to the even; what is no number stays none.
inline void store(F values, uint16_t* to, size_t count) {
  const U bits = U(values);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U is_number = U(values == values);
  const H halves = __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), H);
  if (count >= kLanes)
    std::memcpy(to, &halves, sizeof(H));
  else
    std::memcpy(to, &halves, count * sizeof(uint16_t));
}

inline F fill(float value) { return F{} + value; }

inline F least(F a, F b) { return a < b ? a : b; }

inline F most(F a, F b) { return a > b ? a : b; }

// e^x to 2e-7 of itself: a power of two times a polynomial of what is left, at most ln 2 / 2.
inline F exponential(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  x = most(least(x, fill(88.0f)), fill(-87.0f));
  const F whole = (x * 1.44269504f + kRound) - kRound;
  const F rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  F sum = fill(1.0f / 720);
  constexpr float kFactors[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float factor : kFactors) sum = sum * rest + factor;
  return sum * F((__builtin_convertvector(whole, I) + 127) << 23);
}

inline F activate(Gate act, F x) {
  // GELU by tanh is x sigmoid(2 u).
  const F u = act == Gate::silu ? x : (x + x * x * x * 0.044715f) * (2 * 0.797884561f);
  return x / (exponential(-u) + 1.0f);
}

template <class T>
void norm_rows(const NormTask& task, size_t begin, size_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  for (size_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * task.n;
    T* out = static_cast<T*>(task.out) + row * task.n;
    F squares = {};
    for (size_t i = 0; i < task.n; i += kLanes) {
      const F values = load(x + i, task.n - i);
      squares += values * values;
    }
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
    const float scale = 1.0f / std::sqrt(sum / task.n + task.eps);
    for (size_t i = 0; i < task.n; i += kLanes)
      store(load(x + i, task.n - i) * scale * (load(weight + i, task.n - i) + task.offset), out + i, task.n - i);
  }
}

template <class T>
void gate_values(const GateTask& task, size_t begin, size_t end) {
  T* gate = static_cast<T*>(task.gate);
  const T* up = static_cast<const T*>(task.up);
  for (size_t i = begin; i < end; i += kLanes)
    store(activate(task.act, load(gate + i, end - i)) * load(up + i, end - i), gate + i, end - i);
}

template <class T>
void turn_tokens(const TurnTask& task, size_t begin, size_t end) {
  const size_t half = task.half;
  for (size_t token = begin; token < end; ++token) {
    const T* cos = static_cast<const T*>(task.cos) + token % task.angles * 2 * half;
    const T* sin = static_cast<const T*>(task.sin) + token % task.angles * 2 * half;
    for (size_t head = 0; head < task.heads; ++head) {
      T* x = static_cast<T*>(task.x) + (token * task.heads + head) * 2 * half;
      for (size_t i = 0; i < half; i += kLanes) {
        const size_t left = half - i;
        const F a = load(x + i, left), b = load(x + half + i, left);
        store(a * load(cos + i, left) - b * load(sin + i, left), x + i, left);
        store(b * load(cos + half + i, left) + a * load(sin + half + i, left), x + half + i, left);
      }
    }
  }
}

void norm(const NormTask& task, size_t begin, size_t end) {
  task.is_float ? norm_rows<float>(task, begin, end) : norm_rows<uint16_t>(task, begin, end);
}

void gate(const GateTask& task, size_t begin, size_t end) {
  task.is_float ? gate_values<float>(task, begin, end) : gate_values<uint16_t>(task, begin, end);
}

void turn(const TurnTask& task, size_t begin, size_t end) {
  task.is_float ? turn_tokens<float>(task, begin, end) : turn_tokens<uint16_t>(task, begin, end);
}
