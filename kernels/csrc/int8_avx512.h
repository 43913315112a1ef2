// The int8 format of both AVX-512 tiers. Needs VBMI2 and VNNI besides what vector512.h needs.
//
// The dot product takes unsigned times signed bytes. Here the weights are the unsigned ones: they are stored with 128
// added, and pruned ones become 128 while they are expanded. So every sum is too large by 128 times the sum of all
// quantised x of the group, which is known before the first weight is read.
#pragma once

#include <cstring>

#include "int8_quad.h"
#include "tiles.h"
#include "unroll.h"

namespace gossamer {
namespace {

struct Int8 : Quad128 {
    using X = std::int8_t;

    // 64 weights. The register that receives them begins as 128 everywhere, so it does not wait for its old content, as
    // expand32 in vector512.h has to take care of.
    static __m512i expand64(std::uint64_t mask, const std::uint8_t* values) {
        const __m512i pruned = _mm512_set1_epi8(static_cast<char>(tiles::kBias));
        return _mm512_mask_expand_epi8(pruned, static_cast<__mmask64>(mask), _mm512_loadu_si512(values));
    }

    // Lane i: the sum of the 16 lanes of a[i].
    static __m128i fold(const __m512i* a) {
        const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
        const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
        const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }

    template <int B>
    static const std::uint8_t* dots(const std::uint8_t* masks, const std::uint8_t* values, const std::uint8_t* x,
                                    std::int64_t stride, const std::int32_t* corrections, __m128i* out) {
        constexpr int kHeld = B < 4 ? 4 : B;
        __m512i acc[kHeld];
        GOSSAMER_UNROLL(4)
        for (int r = 0; r < static_cast<int>(tiles::kRows); ++r) {
            std::uint64_t low, high;
            std::memcpy(&low, masks + 16 * r, 8);
            std::memcpy(&high, masks + 16 * r + 8, 8);
            const auto half = static_cast<unsigned>(__builtin_popcountll(low));
            const __m512i a = expand64(low, values), b = expand64(high, values + half);
            values += half + static_cast<unsigned>(__builtin_popcountll(high));
            GOSSAMER_UNROLL(8)
            for (int i = 0; i < B; ++i) {
                const __m512i first = _mm512_dpbusd_epi32(_mm512_setzero_si512(), a, _mm512_loadu_si512(x + i * stride));
                acc[(r * B + i) % kHeld] = _mm512_dpbusd_epi32(first, b, _mm512_loadu_si512(x + i * stride + 64));
            }
            if ((r + 1) * B % kHeld != 0) continue;
            GOSSAMER_UNROLL(2)
            for (int q = 0; q < kHeld / 4; ++q) {
                const auto* wrong = reinterpret_cast<const __m128i*>(corrections + 4 * q);
                out[((r + 1) * B - kHeld) / 4 + q] = _mm_sub_epi32(fold(acc + 4 * q), _mm_loadu_si128(wrong));
            }
        }
        return values;
    }
};

}  // namespace
}  // namespace gossamer
