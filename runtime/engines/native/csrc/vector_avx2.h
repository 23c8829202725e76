// 256-bit vectors; the dot products differ between AVX2 and AVX-VNNI. Included like kernels_body.h.

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kTileTokens = 4;
  static constexpr int kTileTokensBf16 = 2;  // times four rows: the sums of more would not fit the registers
  using F = __m256;
  using I = __m256i;
  using B = __m256i;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store_half(uint16_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0)); }
  static F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static void store_int8(int8_t* p, F x) {
    const __m256i wide = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
  }
  static B load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static B low_nibbles(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static B high_nibbles(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  // Nibbles with the bits that are asked for, of each four inputs.
  static B low_nibbles(B x, const uint8_t* bits) { return _mm256_and_si256(x, quad((const int8_t*)bits)); }
  static B high_nibbles(B x, const uint8_t* bits) { return low_nibbles(_mm256_srli_epi16(x, 4), bits); }
  // The bytes whose halves are the low, or the high, nibbles of two vectors.
  static B join_low(B high, B low) { return halves(_mm256_slli_epi16(high, 4), low); }
  static B join_high(B high, B low) { return halves(high, _mm256_srli_epi16(low, 4)); }
  static B halves(B high, B low) {
    const B mask = _mm256_set1_epi8(15);
    return _mm256_or_si256(_mm256_andnot_si256(mask, high), _mm256_and_si256(mask, low));
  }
  static I zero() { return _mm256_setzero_si256(); }
  static I quad(const int8_t* p) { return _mm256_set1_epi32(*(const int32_t*)p); }
  static I load_fours(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  // Four whole numbers in each lane, as bytes of a word.
  static void store_fours(int8_t* p, const F* x) {
    const auto byte = [&](int i) { return _mm256_and_si256(_mm256_cvtps_epi32(x[i]), _mm256_set1_epi32(255)); };
    const __m256i low = _mm256_or_si256(byte(0), _mm256_slli_epi32(byte(1), 8));
    const __m256i high = _mm256_or_si256(byte(2), _mm256_slli_epi32(byte(3), 8));
    _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
  // Of each 16 bytes, words of the four vectors' bytes: out[i] has those of the i-th four.
  static void interleave(B a, B b, B c, B d, B* out) {
    const B ab = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    const B cd = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    out[0] = _mm256_unpacklo_epi16(ab, cd);
    out[1] = _mm256_unpackhi_epi16(ab, cd);
    out[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
    out[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
  }
  // One of each four lanes in the place of all.
  template <int kLane>
  static I spread(I x) {
    return _mm256_shuffle_epi32(x, kLane * 0x55);
  }
  template <int kLane>
  static F spread(F x) {
    return _mm256_shuffle_ps(x, x, kLane * 0x55);
  }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F sqrt(F x) { return _mm256_sqrt_ps(x); }
  static F power_of_two(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static float reduce_add(F x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static float reduce_lanes(const F* x) { return reduce_add(x[0] + x[1]); }
  static float reduce_max(F x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
};
