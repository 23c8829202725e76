#include "sha256.h"

#include <algorithm>
#include <cstring>

#include "sha256_blocks.h"

namespace coreinfer {
namespace {

constexpr size_t kPassingBytes = 1 << 20;
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
  ShaState begin;
  ShaRounds rounds;

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

// Add the rest of a text: a 1 bit, zeros, and the whole text's length in bits.
void add_end(ShaState& state, const uint8_t* rest, size_t num_left, size_t num_bytes) {
  uint8_t last[2 * kShaBlockBytes] = {};
  if (num_left > 0) std::memcpy(last, rest, num_left);
  last[num_left] = 0x80;
  const size_t num_blocks = num_left + 9 <= kShaBlockBytes ? 1 : 2, end = num_blocks * kShaBlockBytes;
  for (int i = 0; i < 8; ++i) last[end - 1 - i] = static_cast<uint8_t>(uint64_t(num_bytes) * 8 >> (8 * i));
  find_add_blocks()(state, constants().rounds, last, num_blocks);
}

}  // namespace

std::string sha256(const uint8_t* data, size_t num_bytes, const std::function<void(size_t, size_t)>& passed) {
  ShaState state = constants().begin;
  const size_t num_whole = num_bytes / kShaBlockBytes * kShaBlockBytes;
  for (size_t from = 0; from < num_whole; from += kPassingBytes) {
    const size_t count = std::min(num_whole - from, kPassingBytes);
    find_add_blocks()(state, constants().rounds, data + from, count / kShaBlockBytes);
    if (passed) passed(from, count);
  }
  add_end(state, data + num_whole, num_bytes - num_whole, num_bytes);
  std::string digits;
  for (const uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) digits.push_back("0123456789abcdef"[word >> shift & 15]);
  return digits;
}

}  // namespace coreinfer
