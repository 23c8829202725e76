// Scores of a head by the high halves of its weights, and how far each may be off.
// Included by kernels_body.h, on the terms that it states.

// The low halves are taken for 7.5. As if they were evenly spread, their variance is (16^2 - 1) / 12.
constexpr float kLowMean = 7.5f, kLowVariance = 21.25f;

template <int kTokens>
inline void screen_block(const Matrix& w, const Activations& x, const Screened& out, int block) {
  using T = Tile<Format::int8_planes>;
  constexpr int kChains = kTokens == 1 ? 2 : 1;
  const int num_groups = w.num_groups(), x_groups = x.stride / kGroup;
  const size_t tile = size_t(block) * num_groups;
  const uint8_t* codes = w.codes + tile * T::kBytes;
  const uint16_t* scales = w.scales + tile * kBlockRows;
  V::F total[kTokens][kVectors], variance[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) total[t][v] = variance[t][v] = V::set1(0.0f);
  for (int g = 0; g < num_groups; ++g, codes += T::kBytes, scales += kBlockRows) {
    V::I sums[kTokens][kChains][kVectors];
    clear<kTokens, kChains>(sums);
    add_nibbles<kTokens, kChains>(codes, x.codes + g * kGroup, x.stride, sums);
    prefetch_tile(codes, T::kBytes);
    for (int v = 0; v < kVectors; ++v) {
      const V::F scale = V::load_half(scales + v * V::kLanes), square = scale * scale;
      for (int t = 0; t < kTokens; ++t) {
        const int group = t * x_groups + g;
        const V::F sum = joined<true, kChains>(sums[t], v);
        const V::F value = V::fnma(V::set1(128.0f - kLowMean), V::set1(x.sums[group]), sum);
        total[t][v] = V::fma(value, scale * V::set1(16.0f * x.scales[group]), total[t][v]);
        variance[t][v] = V::fma(square, V::set1(kLowVariance * x.energies[group]), variance[t][v]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    V::F bound = V::set1(-kHuge);
    for (int v = 0; v < kVectors; ++v) {
      V::store(out.scores + t * out.stride + block * kBlockRows + v * V::kLanes, total[t][v]);
      bound = V::max(bound, V::fma(V::set1(out.deviations), V::sqrt(variance[t][v]), total[t][v]));
    }
    out.bounds[t * out.num_bounds + block] = V::reduce_max(bound);
  }
}

template <int kMost>
inline void screen_few(int num_tokens, const Matrix& w, const Activations& x, const Screened& out, int block) {
  if constexpr (kMost > 1)
    if (num_tokens < kMost) return screen_few<kMost - 1>(num_tokens, w, x, out, block);
  screen_block<kMost>(w, x, out, block);
}

void screen(const Matrix& w, const Activations& x, int num_tokens, const Screened& out, int block_begin,
            int block_end) {
  for (int block = block_begin; block < block_end; ++block)
    for (int t = 0; t < num_tokens; t += V::kTileTokens)
      screen_few<V::kTileTokens>(num_tokens - t, w, x.token(t), out.token(t), block);
}
