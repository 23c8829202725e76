// The nonlinearities between the matrices of an FFN. Included by kernels_body.h, on the terms that it states.

// x times the normal distribution's share below x: max(x, 0) - a Q(a), a = |x|, where Q(a) = exp(-a^2 / 2) t P(t) is the share
// above a, t = 1 / (1 + a / 4), P fitted to a relative error of 1.3e-8 for a from 0 to 20. Absolute error below 3e-7, relative
// error below 2e-6 down to -6.
inline V::F gelu_erf(V::F x) {
  constexpr float kTail[] = {0.0189839266f, -0.0759845451f, 0.0830154195f, -0.0138779702f, 0.0483392999f,
                             0.0672846735f, 0.0787874907f,  0.0940405205f, 0.09967269f,    0.0997384936f};
  const V::F zero = V::set1(0.0f), one = V::set1(1.0f);
  // In this order of operands a NaN stays one.
  const V::F a = V::min(V::set1(20.0f), V::max(x, zero - x));
  const V::F t = one / V::fma(V::set1(0.25f), a, one);
  V::F p = V::set1(kTail[0]);
  for (int i = 1; i < 10; ++i) p = V::fma(p, t, V::set1(kTail[i]));
  return V::max(zero, x) - (a * t) * (p * exp_vector(V::set1(-0.5f) * a * a));
}

inline V::F apply(Nonlinearity kind, V::F x) {
  const V::F one = V::set1(1.0f), zero = V::set1(0.0f);
  if (kind == Nonlinearity::relu) return V::max(zero, x);
  if (kind == Nonlinearity::silu) return x / (one + exp_vector(zero - x));
  if (kind == Nonlinearity::gelu_tanh) {
    // x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
    const V::F u = V::set1(0.7978845608f) * V::fma(V::set1(0.044715f) * x, x * x, x);
    return x / (one + exp_vector(V::set1(-2.0f) * u));
  }
  return gelu_erf(x);
}

inline V::F clamped_swiglu(const NeuronFunction& function, V::F gate, V::F up) {
  const V::F one = V::set1(1.0f), zero = V::set1(0.0f), most = V::set1(function.most);
  // In this order of operands a NaN stays one.
  gate = V::min(most, gate);
  up = V::max(zero - most, V::min(most, up));
  return (up + one) * (gate / (one + exp_vector(V::set1(-function.alpha) * gate)));
}

void activate(const NeuronFunction& function, const float* gate, const float* up, int size, int num_tokens, float* out,
              size_t out_stride) {
  const Nonlinearity kind = function.kind;
  for (int t = 0; t < num_tokens; ++t, up += size, out += out_stride)
    for (int i = 0; i < size; i += V::kLanes) {
      const float* gates = gate ? gate + size_t(t) * size + i : nullptr;
      if (kind == Nonlinearity::clamped_swiglu) {
        V::store(out + i, clamped_swiglu(function, V::load(gates), V::load(up + i)));
        continue;
      }
      V::store(out + i, gates ? apply(kind, V::load(gates)) * V::load(up + i) : apply(kind, V::load(up + i)));
    }
}
