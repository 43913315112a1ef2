// AVX2 with FMA, F16C and POPCNT: a table of shuffles takes the place of the expand instruction.
#define GOSSAMER_VECTORS 1
#include <immintrin.h>

#include <cstring>

#include "float16.h"
#include "int8_avx2.h"
#include "rows_bitmask.h"
#include "rows_window.h"
#include "split_dot.h"

namespace gossamer {
namespace {

// What replaces instructions that AVX2 lacks, by mask of eight bits.
struct Tables {
    // Byte shuffles: lane i takes the next 16-bit value if bit i is set, else zero (index 0x80). For bfloat16 it goes to
    // the upper half of 32-bit lane i, so the result is eight floats; for float16 to lane i of eight 16-bit lanes.
    alignas(64) std::uint8_t floats[256][32] = {};
    alignas(64) std::uint8_t halves[256][16] = {};
    // The set bits in rising order: lanes to keep.
    alignas(64) std::int32_t lanes[256][8] = {};
    constexpr Tables() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int i = 0; i < 8; ++i) {
                const bool kept = (mask >> i) & 1;
                const int low = kept ? 2 * next : 0x80, high = kept ? 2 * next + 1 : 0x80;
                floats[mask][4 * i] = floats[mask][4 * i + 1] = 0x80;
                floats[mask][4 * i + 2] = static_cast<std::uint8_t>(low);
                floats[mask][4 * i + 3] = static_cast<std::uint8_t>(high);
                halves[mask][2 * i] = static_cast<std::uint8_t>(low);
                halves[mask][2 * i + 1] = static_cast<std::uint8_t>(high);
                if (kept) lanes[mask][next++] = i;
            }
        }
    }
};
constexpr Tables kTables;

struct Avx2 {
    using F = __m256;
    static constexpr int kLanes = 8;
    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F load(const float* at) { return _mm256_loadu_ps(at); }
    static void store(float* at, F f) { _mm256_storeu_ps(at, f); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
    static F scale2(F a, F n) {
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
        const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), power));
        return _mm256_blendv_ps(scaled, a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    }
    // 8 rows of 8 words become columns.
    static void transpose(F* r) {
        F t[8];
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
            r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
        }
        for (int i = 0; i < 8; ++i) r[i] = t[i];
    }
    static unsigned exceed(F x, F t) {
        const __m256 size = _mm256_andnot_ps(set1(-0.0f), x);
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(size, t, _CMP_NLE_UQ)));
    }
    static __m256i kept(unsigned bits) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.lanes[bits])); }
    static void append(unsigned bits, F f, float* out) { store(out, _mm256_permutevar8x32_ps(f, kept(bits))); }
    static int append(unsigned bits, std::int32_t first, std::int32_t* out) {
        const __m256i index = _mm256_add_epi32(kept(bits), _mm256_set1_epi32(first));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), index);
        return __builtin_popcount(bits);
    }
    static float sum(F f) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};

template <class Weight>
struct Channel;

template <>
struct Channel<float> {
    using S = Avx2;
    using W = float;
    static constexpr int kStep = 16;
    static __m256 row(const W* w) { return S::load(w); }
    static void widen(const W* w, __m256& a, __m256& b) { a = S::load(w), b = S::load(w + 8); }
    static void narrow(__m256 a, __m256 b, W* out) { S::store(out, a), S::store(out + 8, b); }
    static void prefetch(const W* w) { _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1); }
};

template <>
struct Channel<Bf16> {
    using S = Avx2;
    using W = Bf16;
    static constexpr int kStep = 16;
    static __m256 row(const W* w) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    // Even elements, then odd ones: a shift and a mask, no shuffle.
    static void widen(const W* w, __m256& a, __m256& b) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
        b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    // Nearest even in the upper half of each lane; NaN stays NaN.
    static __m256i round(__m256 f) {
        const __m256i bits = _mm256_castps_si256(f);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
    }
    static void narrow(__m256 a, __m256 b, W* out) {
        const __m256i high = _mm256_and_si256(round(b), _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
        const __m256i both = _mm256_or_si256(high, _mm256_srli_epi32(round(a), 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
    }
    static void prefetch(const W* w) { _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1); }
};

template <>
struct Channel<Fp16> {
    using S = Avx2;
    using W = Fp16;
    static constexpr int kStep = 16;
    static __m256 row(const W* w) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))); }
    static void widen(const W* w, __m256& a, __m256& b) { a = row(w), b = row(w + 8); }
    static void narrow(__m256 a, __m256 b, W* out) {
        auto* to = reinterpret_cast<__m128i*>(out);
        _mm_storeu_si128(to, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm_storeu_si128(to + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void prefetch(const W* w) { _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T1); }
};

template <class W>
using Dense = SplitDot<Channel<W>, 4>;

template <class W>
using Words = WideWords<Channel<W>>;

inline __m256 expand8(Bf16, int mask, __m128i values) {
    const __m256i control = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.floats[mask]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), control));
}

inline __m256 expand8(Fp16, int mask, __m128i values) {
    const __m128i control = _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.halves[mask]));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(values, control));
}

template <class Weight>
struct Mask {
    using S = Avx2;
    using W = Weight;
    using V = __m256;
    static constexpr int kStep = 8, kXBytes = 4, kChains = 2, kBatch = 4;
    template <class Use>
    static const std::uint16_t* row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
        for (int word = 0; word < 2; ++word) {
            std::uint64_t bits;
            std::memcpy(&bits, mask + 8 * word, 8);
            values = block(bits, values, [&](int i, __m256 v) { use(8 * word + i, v); });
        }
        return values;
    }
    // 64 weights under one word of mask bits.
    template <class Use>
    static const std::uint16_t* block(std::uint64_t bits, const std::uint16_t* values, Use use) {
        GOSSAMER_UNROLL(8)
        for (int i = 0; i < 8; ++i) {
            // Bits below step i, by a shift of their own for every step.
            const int before = i == 0 ? 0 : __builtin_popcountll(bits << (64 - 8 * i));
            const auto* from = reinterpret_cast<const __m128i*>(values + before);
            use(i, expand8(W{}, static_cast<int>(bits >> (8 * i) & 0xFF), _mm_loadu_si128(from)));
        }
        return values + __builtin_popcountll(bits);
    }
    static __m256 mul(__m256 acc, V v, const std::uint8_t* x) {
        return S::fma(v, S::load(reinterpret_cast<const float*>(x)), acc);
    }
    static void prepare_step(const W* x, std::uint8_t* out) {
        for (int i = 0; i < kStep; ++i) reinterpret_cast<float*>(out)[i] = widen(x[i]);
    }
};

template <class Weight>
struct Dual : Mask<Weight> {
    static constexpr int kParts = 1, kPer = 1, kHold = 1;
    static void split(__m256 v, __m256* parts) { *parts = v; }
    static void finish(const float* sums, Weight* y) {
        for (int i = 0; i < 64; ++i) narrow(sums[i], y + i);
    }
};

}  // namespace
}  // namespace gossamer

#include "tier_table.h"

namespace gossamer {

const Tier* tier_avx2() {
    static constexpr Tier tier = make_tier("avx2");
    return &tier;
}

}  // namespace gossamer
