#include "tiers.h"

#if defined(GOSSAMER_X86_TIERS)
#include <cpuid.h>
#endif

namespace gossamer {
namespace {

#if defined(GOSSAMER_X86_TIERS)
// Leaf 7.1, EAX bit 5. GCC 10 cannot be asked for it by name.
bool has_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif

// CMake defines GOSSAMER_X86_TIERS where it compiled tier_avx*.cpp with their flags, GOSSAMER_NEON_TIER where it compiled
// tier_neon.cpp, which every processor of that kind runs. The checks ask the processor and the
// operating system; nothing of a tier runs before them.
const Tier* find(int index) {
#if defined(GOSSAMER_X86_TIERS)
    __builtin_cpu_init();
#if defined(GOSSAMER_EMULATED)  // only in the fuzz driver
    if (index == 0) return tier_avx512bf16();
    if (index == 1) return tier_avx512();
#endif
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("popcnt");
    // All processors with AVX2 have F16C, which older compilers cannot ask for.
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    if (index == 0) return wide && has_bf16() ? tier_avx512bf16() : nullptr;
    if (index == 1) return wide ? tier_avx512() : nullptr;
    if (index == 2) return half ? tier_avx2() : nullptr;
#endif
#if defined(GOSSAMER_NEON_TIER)
    if (index == 3) return tier_neon();
#endif
    return index == kTiers - 1 ? tier_scalar() : nullptr;
}

}  // namespace

const Tier* tier_at(int index) { return index < 0 || index >= kTiers ? nullptr : find(index); }

}  // namespace gossamer
