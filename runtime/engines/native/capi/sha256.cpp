#include "sha256.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace coreinfer {
namespace {

constexpr size_t kBlockBytes = 64, kPassingBytes = 1 << 20;
using State = std::array<uint32_t, 8>;
using Wide = unsigned __int128;

// The first 32 bits of the fraction of a small prime's square root or cube root.
uint32_t root_fraction(int prime, bool cube) {
  uint64_t root = 0;  // times 2^32
  for (int bit = 36; bit >= 0; --bit) {
    const Wide next = root | uint64_t(1) << bit;
    if ((cube ? next * next * next : next * next << 32) <= Wide(prime) << 96) root = static_cast<uint64_t>(next);
  }
  return static_cast<uint32_t>(root);
}

// Square roots are where a text begins, cube roots go into the rounds.
struct Constants {
  State begin;
  std::array<uint32_t, 64> rounds;

  Constants() {
    size_t count = 0;
    for (int number = 2; count < rounds.size(); ++number) {
      bool prime = true;
      for (int divisor = 2; divisor * divisor <= number; ++divisor) prime &= number % divisor != 0;
      if (!prime) continue;
      if (count < begin.size()) begin[count] = root_fraction(number, false);
      rounds[count++] = root_fraction(number, true);
    }
  }
};

const Constants& constants() {
  static const Constants made;
  return made;
}

uint32_t rotate(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

void add_block(State& state, const uint8_t* block) {
  const std::array<uint32_t, 64>& rounds = constants().rounds;
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
  const State added = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < state.size(); ++i) state[i] += added[i];
}

}  // namespace

std::string sha256(const uint8_t* data, size_t num_bytes, const std::function<void(size_t, size_t)>& passed) {
  State state = constants().begin;
  const size_t num_whole = num_bytes / kBlockBytes * kBlockBytes, num_left = num_bytes - num_whole;
  for (size_t from = 0; from < num_whole; from += kPassingBytes) {
    const size_t to = std::min(num_whole, from + kPassingBytes);
    for (size_t at = from; at < to; at += kBlockBytes) add_block(state, data + at);
    if (passed) passed(from, to - from);
  }
  // The rest, a 1 bit, zeros, and the length in bits.
  uint8_t last[2 * kBlockBytes] = {};
  if (num_left > 0) std::memcpy(last, data + num_whole, num_left);
  last[num_left] = 0x80;
  const size_t end = num_left + 9 <= kBlockBytes ? kBlockBytes : 2 * kBlockBytes;
  for (int i = 0; i < 8; ++i) last[end - 1 - i] = static_cast<uint8_t>(uint64_t(num_bytes) * 8 >> (8 * i));
  for (size_t at = 0; at < end; at += kBlockBytes) add_block(state, last + at);
  std::string digits;
  for (const uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) digits.push_back("0123456789abcdef"[word >> shift & 15]);
  return digits;
}

}  // namespace coreinfer
