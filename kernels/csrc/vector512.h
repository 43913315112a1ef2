// Formats of both AVX-512 tiers. Needs F, BW, DQ, VL and VBMI2.
#pragma once

#define GOSSAMER_VECTORS 1
#include <immintrin.h>

#include <cstring>

#include "float16.h"
#include "split_dot.h"

namespace gossamer {
namespace {

struct Avx512 {
    using F = __m512;
    static constexpr int kLanes = 16;
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F load(const float* at) { return _mm512_loadu_ps(at); }
    static void store(float* at, F f) { _mm512_storeu_ps(at, f); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(F f) { return _mm512_reduce_add_ps(f); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
    static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
    // 16 rows of 16 words become columns.
    static void transpose(F* r) {
        F t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        const auto low = [](F a, F b) {
            return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        const auto high = [](F a, F b) {
            return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        };
        for (int i = 0; i < 16; i += 4) {  // r[i + j]: column j of every 4 lanes of 4 rows
            r[i] = low(t[i], t[i + 2]);
            r[i + 1] = high(t[i], t[i + 2]);
            r[i + 2] = low(t[i + 1], t[i + 3]);
            r[i + 3] = high(t[i + 1], t[i + 3]);
        }
        for (int j = 0; j < 4; ++j) {
            t[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
            t[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xDD);
            t[j + 8] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
            t[j + 12] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xDD);
        }
        for (int j = 0; j < 4; ++j) {
            r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
            r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD);
            r[j + 4] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88);
            r[j + 12] = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xDD);
        }
    }
    static unsigned exceed(F x, F t) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), t, _CMP_NLE_UQ); }
    // Compressed in a register and stored whole: the instruction that stores what it compresses is slow on AMD.
    static void append(unsigned bits, F f, float* out) {
        store(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), f));
    }
    static int append(unsigned bits, std::int32_t first, std::int32_t* out) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), index));
        return __builtin_popcount(bits);
    }
};

template <class Weight>
struct Channel;

template <>
struct Channel<float> {
    using S = Avx512;
    using W = float;
    static constexpr int kStep = 32;
    static __m512 row(const W* w) { return S::load(w); }
    static void widen(const W* w, __m512& a, __m512& b) { a = S::load(w), b = S::load(w + 16); }
    static void narrow(__m512 a, __m512 b, W* out) { S::store(out, a), S::store(out + 16, b); }
    static void prefetch(const W* w) {
        _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(w + 16), _MM_HINT_T1);
    }
};

template <>
struct Channel<Bf16> {
    using S = Avx512;
    using W = Bf16;
    static constexpr int kStep = 32;
    // Even elements, then odd ones: a shift and a mask, no shuffle.
    static void split(__m512i v, __m512& a, __m512& b) {
        a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    static __m512 row(const W* w) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
    static void widen(const W* w, __m512& a, __m512& b) { split(_mm512_loadu_si512(w), a, b); }
    // Nearest even in the upper half of each lane; NaN stays NaN.
    static __m512i round(__m512 f) {
        const __m512i bits = _mm512_castps_si512(f);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
        return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    }
    static void narrow(__m512 a, __m512 b, W* out) {
        const __m512i high = _mm512_and_si512(round(b), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
        _mm512_storeu_si512(out, _mm512_or_si512(high, _mm512_srli_epi32(round(a), 16)));
    }
    static void prefetch(const W* w) { _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1); }
};

template <>
struct Channel<Fp16> {
    using S = Avx512;
    using W = Fp16;
    static constexpr int kStep = 32;
    static __m512 row(const W* w) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }
    static void split(__m512i v, __m512& a, __m512& b) {
        a = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
        b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
    }
    static void widen(const W* w, __m512& a, __m512& b) {
        a = row(w), b = row(w + 16);
    }
    static void narrow(__m512 a, __m512 b, W* out) {
        auto* to = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(to, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm256_storeu_si256(to + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void prefetch(const W* w) { _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1); }
};

// 32 weights from a mask of 32 bits and as many values as it has bits.
inline __m512i expand32(std::uint64_t mask, const std::uint16_t* values) {
#if defined(GOSSAMER_EMULATED)
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), _mm512_loadu_si512(values));
#else
    __m512i v;
    // vpexpandw with zeroing still waits for the old content of its destination on AMD's Zen 4 and 5, and compilers reuse
    // one register for all of them. Clearing it first, which costs nothing, cuts that chain.
    __asm__("vpxor %x0, %x0, %x0\n\tvpexpandw %2, %0%{%1%}%{z%}"
            : "=&x"(v)
            : "Yk"(static_cast<__mmask32>(mask)), "v"(_mm512_loadu_si512(values)));
    return v;
#endif
}

// One row of a tile: four steps, whose places in `values` come from the mask by themselves.
template <class Use>
inline const std::uint16_t* expand_row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
    std::uint64_t low, high;
    std::memcpy(&low, mask, 8);
    std::memcpy(&high, mask + 8, 8);
    const auto half = static_cast<unsigned>(__builtin_popcountll(low));
    const std::uint16_t* middle = values + half;
    use(0, expand32(low, values));
    use(1, expand32(low >> 32, values + static_cast<unsigned>(__builtin_popcount(static_cast<std::uint32_t>(low)))));
    use(2, expand32(high, middle));
    use(3, expand32(high >> 32, middle + static_cast<unsigned>(__builtin_popcount(static_cast<std::uint32_t>(high)))));
    return middle + static_cast<unsigned>(__builtin_popcountll(high));
}

// Dual format of a channel format with split().
template <class C>
struct SplitDual {
    using S = Avx512;
    using W = typename C::W;
    using V = __m512i;
    static constexpr int kStep = 32, kParts = 2, kPer = 1, kHold = 4;
    template <class Use>
    static const std::uint16_t* block(std::uint64_t mask, const std::uint16_t* values, Use use) {
        use(0, expand32(mask, values));
        const auto low = static_cast<unsigned>(__builtin_popcount(static_cast<std::uint32_t>(mask)));
        use(1, expand32(mask >> 32, values + low));
        return values + static_cast<unsigned>(__builtin_popcountll(mask));
    }
    static void split(V v, __m512* parts) { C::split(v, parts[0], parts[1]); }
    static void finish(const float* sums, W* y) {
        for (int i = 0; i < 64; i += 32) C::narrow(S::load(sums + i), S::load(sums + i + 16), y + i);
    }
};

// Bitmask format of a channel format with split().
template <class C>
struct SplitMask {
    using S = Avx512;
    using W = typename C::W;
    using V = __m512i;
    static constexpr int kStep = 32, kXBytes = 4, kChains = 1, kBatch = 8;
    template <class Use>
    static const std::uint16_t* row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
        return expand_row(mask, values, use);
    }
    static __m512 mul(__m512 acc, V v, const std::uint8_t* x) {
        const auto* at = reinterpret_cast<const float*>(x);
        __m512 a, b;
        C::split(v, a, b);
        return S::fma(b, S::load(at + 16), S::fma(a, S::load(at), acc));
    }
    static void prepare_step(const W* x, std::uint8_t* out) { SplitDot<C>::prepare_step(x, out); }
};

}  // namespace
}  // namespace gossamer
