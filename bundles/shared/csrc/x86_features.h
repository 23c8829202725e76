// What an x86-64 CPU and its system can run, by CPUID and XGETBV: not every C++ compiler's runtime fills in what
// __builtin_cpu_supports reads (zig's leaves it empty, and only portable kernels were found).
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

namespace coreinfer {

class X86Features {
 public:
  X86Features() {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return;
    const bool saves = bit(ecx, 27), fma = bit(ecx, 12), f16c = bit(ecx, 29);
    const uint64_t kept = saves ? kept_registers() : 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return;
    constexpr uint64_t kAvx = 0x6, kAvx512 = 0xe6;
    avx2 = (kept & kAvx) == kAvx && fma && f16c && bit(ebx, 5);
    // Foundation, and instructions on doublewords, bytes and vectors of all lengths.
    avx512 = avx2 && (kept & kAvx512) == kAvx512 && bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);
    avx512vnni = avx512 && bit(ecx, 11);
    amx_bf16 = bit(edx, 22) && bit(edx, 24);
    amx_int8 = bit(edx, 25) && bit(edx, 24);
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return;
    avxvnni = avx2 && bit(eax, 4);
    avx512bf16 = avx512 && bit(eax, 5);
  }

  bool avx2 = false, avx512 = false, avx512vnni = false, avxvnni = false, avx512bf16 = false, amx_bf16 = false,
       amx_int8 = false;

 private:
  static bool bit(uint32_t value, int place) { return (value >> place) & 1; }

  // Which registers the system keeps when it switches threads.
  static uint64_t kept_registers() {
    uint32_t low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
  }
};

}  // namespace coreinfer
#endif
