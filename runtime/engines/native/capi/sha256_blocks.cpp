#include "sha256_blocks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace coreinfer {
namespace {

uint32_t rotate(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

void add_block(ShaState& state, const ShaRounds& rounds, const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t first = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + rounds[i] + w[i];
    const uint32_t second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
  }
  const ShaState added = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < state.size(); ++i) state[i] += added[i];
}

#if defined(__x86_64__)

bool has_sha() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}

// Intel's SHA extensions: the state lies as (f, e, b, a) and (h, g, d, c), four rounds take two instructions.
__attribute__((target("sha,sse4.1,ssse3"))) void add_blocks_fast(ShaState& state, const ShaRounds& rounds,
                                                                 const uint8_t* blocks, size_t num_blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  auto* lanes = reinterpret_cast<__m128i*>(state.data());
  const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(lanes), 0xB1);
  const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(lanes + 1), 0x1B);
  __m128i abef = _mm_alignr_epi8(badc, hgfe, 8), cdgh = _mm_blend_epi16(hgfe, badc, 0xF0);
  for (; num_blocks > 0; --num_blocks, blocks += kShaBlockBytes) {
    const __m128i before_abef = abef, before_cdgh = cdgh;
    __m128i words[4];
    for (int i = 0; i < 16; ++i) {
      __m128i& now = words[i & 3];
      const __m128i last = words[(i + 3) & 3];
      if (i < 4) {
        now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks) + i), swap);
      } else {
        const __m128i seventh = _mm_alignr_epi8(last, words[(i + 2) & 3], 4);
        now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, words[(i + 1) & 3]), seventh), last);
      }
      const __m128i sum = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rounds.data()) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
    }
    abef = _mm_add_epi32(abef, before_abef);
    cdgh = _mm_add_epi32(cdgh, before_cdgh);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(lanes, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(lanes + 1, _mm_alignr_epi8(dchg, feba, 8));
}

#elif defined(__aarch64__) && defined(__linux__)

bool has_sha() { return getauxval(AT_HWCAP) & (1ul << 6); }  // HWCAP_SHA2

#ifdef __clang__
#define COREINFER_SHA_TARGET "sha2"
#else
#define COREINFER_SHA_TARGET "+crypto"
#endif

__attribute__((target(COREINFER_SHA_TARGET))) void add_blocks_fast(ShaState& state, const ShaRounds& rounds,
                                                                   const uint8_t* blocks, size_t num_blocks) {
  uint32x4_t abcd = vld1q_u32(state.data()), efgh = vld1q_u32(state.data() + 4);
  for (; num_blocks > 0; --num_blocks, blocks += kShaBlockBytes) {
    const uint32x4_t before_abcd = abcd, before_efgh = efgh;
    uint32x4_t words[4];
    for (int i = 0; i < 16; ++i) {
      uint32x4_t& now = words[i & 3];
      if (i < 4)
        now = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(blocks + 16 * i)));
      else
        now = vsha256su1q_u32(vsha256su0q_u32(now, words[(i + 1) & 3]), words[(i + 2) & 3], words[(i + 3) & 3]);
      const uint32x4_t sum = vaddq_u32(now, vld1q_u32(rounds.data() + 4 * i)), old = abcd;
      abcd = vsha256hq_u32(abcd, efgh, sum);
      efgh = vsha256h2q_u32(efgh, old, sum);
    }
    abcd = vaddq_u32(abcd, before_abcd);
    efgh = vaddq_u32(efgh, before_efgh);
  }
  vst1q_u32(state.data(), abcd);
  vst1q_u32(state.data() + 4, efgh);
}

#else

bool has_sha() { return false; }
constexpr AddBlocks add_blocks_fast = add_blocks_plain;

#endif

}  // namespace

void add_blocks_plain(ShaState& state, const ShaRounds& rounds, const uint8_t* blocks, size_t num_blocks) {
  for (; num_blocks > 0; --num_blocks, blocks += kShaBlockBytes) add_block(state, rounds, blocks);
}

AddBlocks find_add_blocks() {
  static const AddBlocks found = has_sha() ? add_blocks_fast : add_blocks_plain;
  return found;
}

}  // namespace coreinfer
