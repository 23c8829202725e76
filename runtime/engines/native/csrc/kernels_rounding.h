// Inputs rounded to codes with a scale for each group, and what else is known of a group. Included by kernels_body.h, on the terms
// that it states.

inline void quantize_group(const float* values, int8_t* codes, float& scale, float& sixteenth_sum) {
  constexpr int kParts = kGroup / V::kLanes;
  V::F part[kParts];
  V::F largest = V::set1(0.0f);
  for (int i = 0; i < kParts; ++i) {
    part[i] = V::load(values + i * V::kLanes);
    largest = V::max(largest, V::max(part[i], V::set1(0.0f) - part[i]));
  }
  const float amax = V::reduce_max(largest);
  const V::F inverse = V::set1(amax > 0 ? 127.0f / amax : 0.0f);
  V::F sum = V::set1(0.0f);
  for (int i = 0; i < kParts; ++i) {
    const V::F rounded = V::round(part[i] * inverse);
    V::store_int8(codes + i * V::kLanes, rounded);
    sum = sum + rounded;
  }
  const float total = V::reduce_add(sum);
  // A NaN among the values is in the sum, while the maximum and the codes may have lost it: it goes into the scale.
  scale = amax / 127.0f + (total - total);
  sixteenth_sum = total / 16.0f;
}

// kLowMean times the sum of a group's codes that read the high bits alone: exact.
inline float low_sum(const int8_t* codes, const uint8_t* bits) {
  int sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += bits[i] == kHighBits ? codes[i] : 0;
  return kLowMean * static_cast<float>(sum);
}

void quantize(const Activations& x, int num_values, int num_tokens) {
  const int x_groups = x.stride / kGroup;
  for (int t = 0; t < num_tokens; ++t)
    for (int g = 0; g < num_values / kGroup; ++g) {
      const size_t group = size_t(t) * x_groups + g, first = group * kGroup;
      quantize_group(x.values + first, x.codes + first, x.scales[group], x.sums[group]);
      if (x.bits) x.low_sums[group] = low_sum(x.codes + first, x.bits + first);
    }
}

void measure(const Activations& x, int num_values) {
  for (int g = 0; g < num_values / kGroup; ++g) {
    V::F energy[kVectors];
    for (auto& lanes : energy) lanes = V::set1(0.0f);
    for (int i = 0; i < kGroup; i += kSumLanes)
      for (int v = 0; v < kVectors; ++v) {
        const V::F part = V::load(x.values + g * kGroup + i + v * V::kLanes);
        energy[v] = V::fma(part, part, energy[v]);
      }
    x.energies[g] = V::reduce_lanes(energy);
  }
}
