// Takes the place of the compiler's header in the AVX-512 tiers for `make emulate-avx512`: SIMDe computes what a processor
// without these instructions lacks, and the functions below what SIMDe 0.7.4 lacks, in plain loops.
#pragma once
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

namespace gossamer::emulated {

template <class To, class From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T, int kCount>
struct Lanes {
    T at[kCount];
};

inline simde__m512i cvtepu16_epi32(simde__m256i a) {
    const auto from = bits<Lanes<std::uint16_t, 16>>(a);
    Lanes<std::uint32_t, 16> to;
    for (int i = 0; i < 16; ++i) to.at[i] = from.at[i];
    return bits<simde__m512i>(to);
}

inline simde__m512 cvtph_ps(simde__m256i a) {
    const auto from = bits<Lanes<__m128i, 2>>(a);
    const Lanes<__m256, 2> to = {{_mm256_cvtph_ps(from.at[0]), _mm256_cvtph_ps(from.at[1])}};
    return bits<simde__m512>(to);
}

inline simde__m256i cvtps_ph(simde__m512 a, int) {
    const auto from = bits<Lanes<__m256, 2>>(a);
    const Lanes<__m128i, 2> to = {{_mm256_cvtps_ph(from.at[0], 0), _mm256_cvtps_ph(from.at[1], 0)}};  // 0: nearest even
    return bits<simde__m256i>(to);
}

template <class T>
simde__m512i expand(simde__m512i under, std::uint64_t mask, simde__m512i a) {
    constexpr int kCount = 64 / sizeof(T);
    auto to = bits<Lanes<T, kCount>>(under);
    const auto from = bits<Lanes<T, kCount>>(a);
    for (int i = 0, next = 0; i < kCount; ++i) {
        if (mask >> i & 1) to.at[i] = from.at[next++];
    }
    return bits<simde__m512i>(to);
}

inline simde__m512i mask_expand_epi8(simde__m512i under, std::uint64_t mask, simde__m512i a) {
    return expand<std::uint8_t>(under, mask, a);
}

inline simde__m512i maskz_expand_epi16(std::uint32_t mask, simde__m512i a) {
    return expand<std::uint16_t>(simde_mm512_setzero_si512(), mask, a);
}

inline float reduce_add_ps(simde__m512 a) {
    auto sums = bits<Lanes<float, 16>>(a);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums.at[i] += sums.at[i + half];
    }
    return sums.at[0];
}

}  // namespace gossamer::emulated

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_mask_expand_epi8
#undef _mm512_maskz_expand_epi16
#undef _mm512_reduce_add_ps
#undef _mm512_shuffle_f32x4
#define _mm512_cvtepu16_epi32 gossamer::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps gossamer::emulated::cvtph_ps
#define _mm512_cvtps_ph gossamer::emulated::cvtps_ph
#define _mm512_mask_expand_epi8 gossamer::emulated::mask_expand_epi8
#define _mm512_maskz_expand_epi16 gossamer::emulated::maskz_expand_epi16
#define _mm512_reduce_add_ps gossamer::emulated::reduce_add_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
