// SHA-256: known digests, and the CPU's own instructions beside plain C++.
#include <cstring>
#include <vector>

#include "../../runtime/engines/native/capi/sha256.h"
#include "../../runtime/engines/native/capi/sha256_blocks.h"
#include "checks.h"

using namespace coreinfer;

void test_hashes() {
  const auto hash = [](const char* text) { return sha256(reinterpret_cast<const uint8_t*>(text), std::strlen(text)); };
  // Of FIPS 180-4's examples.
  expect("hashes: 'abc'", hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  expect("hashes: 448 bits", hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
                                 "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  std::mt19937 own(7);  // what other tests draw stays as it is
  std::vector<uint8_t> text(40 * kShaBlockBytes);
  for (uint8_t& byte : text) byte = static_cast<uint8_t>(own());
  ShaRounds rounds;
  for (uint32_t& round : rounds) round = static_cast<uint32_t>(own());
  for (size_t count = 0; count <= 40; ++count) {
    ShaState plain = {1, 2, 3, 4, 5, 6, 7, 8}, fast = plain;
    add_blocks_plain(plain, rounds, text.data(), count);
    find_add_blocks()(fast, rounds, text.data(), count);
    expect("hashes: the CPU's own instructions", plain == fast);
  }
}
