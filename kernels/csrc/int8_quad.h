// Four sums at a time with AVX and F16C, for the int8 formats of all x86 vector tiers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

struct Quad128 {
    using Quad = __m128;
    using Ints = __m128i;
    static __m128 load(const float* at) { return _mm_loadu_ps(at); }
    static void store(float* at, __m128 f) { _mm_storeu_ps(at, f); }
    static __m128 scales(const std::uint8_t* at) {
        return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    }
    // Lane i of quad q belongs to row (4 q + i) / B.
    template <int B>
    static __m128 spread(int q, __m128 w) {
        if (B == 1) return w;
        return _mm_permutevar_ps(w, _mm_setr_epi32(4 * q / B, (4 * q + 1) / B, (4 * q + 2) / B, (4 * q + 3) / B));
    }
    static __m128 add(__m128 sums, __m128i dots, __m128 w, __m128 x) {
        return _mm_add_ps(sums, _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(dots), w), x));
    }
};

}  // namespace
}  // namespace gossamer
