// Which kernels this CPU can run, and the few functions that are the same on all of them.
#include <cstring>
#include <stdexcept>

#include "kernels.h"
#include "x86_features.h"
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace coreinfer {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  const X86Features cpu;
#if defined(COREINFER_EMULATE_TILES)  // tools/kernel_tests/emulated_tiles.h
  const bool has_tiles = true;
#else
  const bool has_tiles = cpu.amx_bf16 && cpu.amx_int8 && may_use_amx();
#endif
  if (cpu.avx512vnni && cpu.avx512bf16 && has_tiles) tables.push_back(&amx_kernels());
  if (cpu.avx512vnni) tables.push_back(&avx512_kernels());
  if (cpu.avxvnni) tables.push_back(&avxvnni_kernels());
  if (cpu.avx2) tables.push_back(&avx2_kernels());
#elif defined(__aarch64__)
#if defined(__linux__)
  // What kernels_neon.cpp is compiled for: dot products of bytes, and arithmetic of half precision.
  constexpr unsigned long kNeeded = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
  const bool has_both = (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
#else
  const bool has_both = true;
#endif
  if (has_both) tables.push_back(&neon_kernels());
#endif
  tables.push_back(&portable_kernels());
  return tables;
}

const Kernels& find_kernels(const std::string& name) {
  const auto tables = available_kernels();
  if (name == "auto") return *tables.front();
  std::string names;
  for (const Kernels* table : tables) {
    if (name == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("isa: expected auto, " + names + " on this CPU, got '" + name + "'");
}

void unpack_row(const Matrix& w, int row, float* out) {
  if (!w.quantized()) {
    for (int col = 0; col < w.cols; ++col) out[col] = bf16_to_float(w.bf16[size_t(row) * w.cols + col]);
    return;
  }
  const int lane = row % kBlockRows;
  for (int g = 0; g < w.num_groups(); ++g) {
    const size_t tile = size_t(row / kBlockRows) * w.num_groups() + g;
    const uint8_t* codes = w.codes + tile * w.tile_bytes() + lane * 4;
    const float scale = half_to_float(w.scales[tile * kBlockRows + lane]);
    const bool four_bits = w.format == Format::int4;
    const float zero = four_bits ? w.zeros[tile * kBlockRows + lane] / 16.0f : 128.0f;
    for (int i = 0; i < kGroup && g * kGroup + i < w.cols; ++i) {
      const int quad = i / 4;
      if (w.format == Format::int8_planes) {
        const uint8_t* lows = w.lows + tile * w.tile_bytes() + lane * 4;
        const int at = quad / 2 * 64 + i % 4, shift = quad % 2 * 4;
        out[g * kGroup + i] = scale * (((codes[at] >> shift & 15) << 4 | (lows[at] >> shift & 15)) - zero);
        continue;
      }
      const int byte = four_bits ? codes[quad / 2 * 64 + i % 4] >> (quad % 2 * 4) & 15 : codes[quad * 64 + i % 4];
      out[g * kGroup + i] = scale * (byte - zero);
    }
  }
}

float half_to_float(uint16_t half) {
  // Multiplying by 2^112 moves the exponent's bias, subnormal halves included.
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000 | uint32_t(half & 0x3ff) << 13;
  bits |= uint32_t(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65520 or more
  if (bits < 0x38800000) {                       // subnormal: adding 0.5 rounds the bits into place
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xc8000fff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
}

}  // namespace coreinfer
