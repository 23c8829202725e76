// Plain C++ with the compiler's vector types: what every CPU runs, and what the other kernels are tested against.
#include <cmath>
#include <cstring>

#include "columns.h"
#include "kernels.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace coreinfer {
namespace {

struct V {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;
  static constexpr int kTileTokens = 2;
  static constexpr int kTileTokensBf16 = kTileTokens;
  static constexpr int kByteOffset = 0;  // dot_bytes takes the offset away itself
  static constexpr bool kJoinsPlanes = true;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint8_t B __attribute__((vector_size(16)));

  static F set1(float x) { return F{} + x; }
  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F load_half(const uint16_t* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
    return x;
  }
  static void store_half(uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
  }
  static F load_bf16(const uint16_t* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = bf16_to_float(p[i]);
    return x;
  }
  static F load_u8(const uint8_t* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = p[i];
    return x;
  }
  static void store_int8(int8_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(std::isfinite(x[i]) ? x[i] : 0.0f);
  }
  static B load_bytes(const uint8_t* p) {
    B x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static B low_nibbles(B x) { return x & 15; }
  static B high_nibbles(B x) { return x >> 4; }
  // Nibbles with the bits that are asked for, of each four inputs.
  static B low_nibbles(B x, const uint8_t* bits) {
    uint32_t word;
    std::memcpy(&word, bits, sizeof word);
    typedef uint32_t Words __attribute__((vector_size(16)));
    return x & (B)(Words{} + word);
  }
  static B high_nibbles(B x, const uint8_t* bits) { return low_nibbles(x >> 4, bits); }
  // The bytes whose halves are the low, or the high, nibbles of two vectors.
  static B join_low(B high, B low) { return (high << 4) | (low & 15); }
  static B join_high(B high, B low) { return (high & 0xf0) | (low >> 4); }
  static I zero() { return I{}; }
  static I add_nibble_sums(I a, I b) { return add_int(a, b); }
  static I nibble_sums(I sums) { return sums; }
  static I dot_nibbles(I sum, B codes, const int8_t* p) {
    for (int i = 0; i < kLanes; ++i)
      sum[i] += codes[4 * i] * p[0] + codes[4 * i + 1] * p[1] + codes[4 * i + 2] * p[2] + codes[4 * i + 3] * p[3];
    return sum;
  }
  // Sums of each two bits of the bytes.
  static void add_pairs(B bytes, const int8_t* p, I* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = dot_nibbles(sums[i], (bytes >> 2 * i) & 3, p);
  }
  static I times_four(I sum) { return sum << 2; }
  static void pair_sums(I*) {}
  static I dot_nibbles_lanes(I sum, B codes, I fours) {
    int8_t p[16];
    std::memcpy(p, &fours, sizeof p);
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) sum[i] += codes[4 * i + j] * p[4 * i + j];
    return sum;
  }
  static I load_fours(const int8_t* p) {
    I fours;
    std::memcpy(&fours, p, sizeof fours);
    return fours;
  }
  // Four whole numbers in each lane, as bytes of a word.
  static void store_fours(int8_t* p, const F* x) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<int8_t>(std::isfinite(x[j][i]) ? x[j][i] : 0.0f);
  }
  // Words of the four vectors' bytes: out[i] has those of the i-th four.
  static void interleave(B a, B b, B c, B d, B* out) {
    for (int i = 0; i < 16; ++i) {
      uint8_t* word = reinterpret_cast<uint8_t*>(out + i / 4) + i % 4 * 4;
      word[0] = a[i];
      word[1] = b[i];
      word[2] = c[i];
      word[3] = d[i];
    }
  }
  // One of the four lanes in the place of all.
  template <int kLane>
  static I spread(I x) {
    return I{} + x[kLane];
  }
  template <int kLane>
  static F spread(F x) {
    return F{} + x[kLane];
  }
  static I dot_bytes(I sum, B bytes, const int8_t* p) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) sum[i] += (int(bytes[4 * i + j]) - 128) * p[j];
    return sum;
  }
  static I add_int(I a, I b) { return a + b; }
  static F to_float(I x) { return __builtin_convertvector(x, F); }
#if defined(__aarch64__)
  static F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
  static F fnma(F a, F b, F c) { return (F)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
  // Fused, it would be a call of the C library where the CPU is not known to have the instruction.
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fnma(F a, F b, F c) { return c - a * b; }
#endif
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F round(F x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::nearbyint(x[i]);
    return x;
  }
  static F sqrt(F x) {
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
  }
  static F power_of_two(F n) {
    I bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = (static_cast<int32_t>(std::isfinite(n[i]) ? n[i] : 0.0f) + 127) << 23;
    F x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static float reduce_add(F x) {
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
  }
  static float reduce_lanes(const F* x) {
    const F four = (x[0] + x[2]) + (x[1] + x[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
  static float reduce_max(F x) {
    float largest = x[0];
    for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
  }
};

#include "kernels_body.h"

}  // namespace

const Kernels& portable_kernels() { return kTable; }

}  // namespace coreinfer
