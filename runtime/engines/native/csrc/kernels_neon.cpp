// AArch64 with the dot product extension: four vectors are a block of 16 rows.
#include "columns.h"
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+fp16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+fp16")
#endif

namespace coreinfer {
namespace {

struct V {
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  static constexpr int kTileTokens = 4;
  static constexpr int kTileTokensBf16 = kTileTokens;
  static constexpr int kByteOffset = 0;  // dot_bytes takes the offset away itself
  static constexpr bool kJoinsPlanes = true;
  using F = float32x4_t;
  using I = int32x4_t;
  using B = uint8x16_t;

  static F set1(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_half(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static F load_u8(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word)))));
  }
  static void store_int8(int8_t* p, F x) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(bytes), 0);
  }
  static B load_bytes(const uint8_t* p) { return vld1q_u8(p); }
  static B low_nibbles(B x) { return vandq_u8(x, vdupq_n_u8(15)); }
  static B high_nibbles(B x) { return vshrq_n_u8(x, 4); }
  // Nibbles with the bits that are asked for, of each four inputs.
  static B low_nibbles(B x, const uint8_t* bits) {
    return vandq_u8(x, vreinterpretq_u8_s8(quad(reinterpret_cast<const int8_t*>(bits))));
  }
  static B high_nibbles(B x, const uint8_t* bits) { return low_nibbles(vshrq_n_u8(x, 4), bits); }
  // The bytes whose halves are the low, or the high, nibbles of two vectors.
  static B join_low(B high, B low) { return vorrq_u8(vshlq_n_u8(high, 4), low_nibbles(low)); }
  static B join_high(B high, B low) { return vorrq_u8(vandq_u8(high, vdupq_n_u8(0xf0)), vshrq_n_u8(low, 4)); }
  static I zero() { return vdupq_n_s32(0); }
  static int8x16_t quad(const int8_t* p) {
    return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)));
  }
  static I add_nibble_sums(I a, I b) { return add_int(a, b); }
  static I nibble_sums(I sums) { return sums; }
  static I dot_nibbles(I sum, B codes, const int8_t* p) { return vdotq_s32(sum, vreinterpretq_s8_u8(codes), quad(p)); }
  // Sums of each two bits of the bytes.
  static void add_pairs(B bytes, const int8_t* p, I* sums) {
    const B three = vdupq_n_u8(3);
    sums[0] = dot_nibbles(sums[0], vandq_u8(bytes, three), p);
    sums[1] = dot_nibbles(sums[1], vandq_u8(vshrq_n_u8(bytes, 2), three), p);
    sums[2] = dot_nibbles(sums[2], vandq_u8(vshrq_n_u8(bytes, 4), three), p);
    sums[3] = dot_nibbles(sums[3], vshrq_n_u8(bytes, 6), p);
  }
  static I times_four(I sum) { return vshlq_n_s32(sum, 2); }
  static void pair_sums(I*) {}
  static I dot_nibbles_lanes(I sum, B codes, I fours) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), vreinterpretq_s8_s32(fours));
  }
  static I load_fours(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
  // Four whole numbers in each lane, as bytes of a word.
  static void store_fours(int8_t* p, const F* x) {
    const auto byte = [&](int i) { return vandq_s32(vcvtnq_s32_f32(x[i]), vdupq_n_s32(255)); };
    const int32x4_t low = vorrq_s32(byte(0), vshlq_n_s32(byte(1), 8));
    const int32x4_t high = vorrq_s32(byte(2), vshlq_n_s32(byte(3), 8));
    vst1q_s8(p, vreinterpretq_s8_s32(vorrq_s32(low, vshlq_n_s32(high, 16))));
  }
  // Words of the four vectors' bytes: out[i] has those of the i-th four.
  static void interleave(B a, B b, B c, B d, B* out) {
    const auto pairs = [](B one, B other) { return vreinterpretq_u16_u8(vzip1q_u8(one, other)); };
    const auto high_pairs = [](B one, B other) { return vreinterpretq_u16_u8(vzip2q_u8(one, other)); };
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(pairs(a, b), pairs(c, d)));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(pairs(a, b), pairs(c, d)));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(high_pairs(a, b), high_pairs(c, d)));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(high_pairs(a, b), high_pairs(c, d)));
  }
  // One of the four lanes in the place of all.
  template <int kLane>
  static I spread(I x) {
    return vdupq_laneq_s32(x, kLane);
  }
  template <int kLane>
  static F spread(F x) {
    return vdupq_laneq_f32(x, kLane);
  }
  static I dot_bytes(I sum, B bytes, const int8_t* p) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128))), quad(p));
  }
  static I add_int(I a, I b) { return vaddq_s32(a, b); }
  static F to_float(I x) { return vcvtq_f32_s32(x); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F round(F x) { return vrndnq_f32(x); }
  static F sqrt(F x) { return vsqrtq_f32(x); }
  static F power_of_two(F n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static float reduce_add(F x) { return vaddvq_f32(x); }
  static float reduce_lanes(const F* x) {
    const F four = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static float reduce_max(F x) { return vmaxvq_f32(x); }
};

#include "kernels_body.h"

}  // namespace

const Kernels& neon_kernels() { return kTable; }

}  // namespace coreinfer
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
