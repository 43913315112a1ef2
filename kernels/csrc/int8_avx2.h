// The int8 format of the AVX2 tier: a table of shuffles takes the place of the expand instruction, and products are of
// 16-bit integers, because the instruction that multiplies bytes cuts its sums off at 32767.
#pragma once

#include <cstring>

#include "int8_quad.h"
#include "tiles.h"
#include "unroll.h"

namespace gossamer {
namespace {

// By mask of eight bits: 16-bit lane i takes the next byte into its upper half if bit i is set, else zero (index 0x80).
struct ByteTable {
    alignas(64) std::uint8_t control[256][16] = {};
    constexpr ByteTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int i = 0; i < 8; ++i) {
                control[mask][2 * i] = 0x80;
                control[mask][2 * i + 1] = static_cast<std::uint8_t>((mask >> i) & 1 ? next++ : 0x80);
            }
        }
    }
};
constexpr ByteTable kByteTable;

struct Int8 : Quad128 {
    using X = std::int16_t;

    // Eight weights as 16-bit integers, 256 times too large: sums of 128 products stay below 2^30.
    static __m128i expand8(unsigned mask, const std::uint8_t* values) {
        const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        const __m128i plain = _mm_xor_si128(stored, _mm_set1_epi8(static_cast<char>(tiles::kBias)));
        return _mm_shuffle_epi8(plain, _mm_load_si128(reinterpret_cast<const __m128i*>(kByteTable.control[mask])));
    }

    static __m128i fold(const __m128i* a) {
        const __m128i sums = _mm_hadd_epi32(_mm_hadd_epi32(a[0], a[1]), _mm_hadd_epi32(a[2], a[3]));
        return _mm_srai_epi32(sums, 8);
    }

    template <int B>
    static const std::uint8_t* dots(const std::uint8_t* masks, const std::uint8_t* values, const std::uint8_t* x,
                                    std::int64_t stride, const std::int32_t*, __m128i* out) {
        constexpr int kHeld = B < 4 ? 4 : B;
        __m128i acc[kHeld];
        GOSSAMER_UNROLL(4)
        for (int r = 0; r < static_cast<int>(tiles::kRows); ++r) {
            __m128i* row = acc + r * B % kHeld;
            for (int b = 0; b < B; ++b) row[b] = _mm_setzero_si128();
            GOSSAMER_UNROLL(2)
            for (int word = 0; word < 2; ++word) {
                std::uint64_t bits;
                std::memcpy(&bits, masks + 16 * r + 8 * word, 8);
                GOSSAMER_UNROLL(8)
                for (int i = 0; i < 8; ++i) {
                    // Bits below step i, by a shift of their own for every step.
                    const int before = i == 0 ? 0 : __builtin_popcountll(bits << (64 - 8 * i));
                    const __m128i v = expand8(static_cast<unsigned>(bits >> (8 * i) & 0xFF), values + before);
                    GOSSAMER_UNROLL(8)
                    for (int b = 0; b < B; ++b) {
                        const auto* at = reinterpret_cast<const __m128i*>(x + b * stride + 128 * word + 16 * i);
                        row[b] = _mm_add_epi32(row[b], _mm_madd_epi16(v, _mm_loadu_si128(at)));
                    }
                }
                values += __builtin_popcountll(bits);
            }
            if ((r + 1) * B % kHeld != 0) continue;
            GOSSAMER_UNROLL(2)
            for (int q = 0; q < kHeld / 4; ++q) out[((r + 1) * B - kHeld) / 4 + q] = fold(acc + 4 * q);
        }
        return values;
    }
};

}  // namespace
}  // namespace gossamer
