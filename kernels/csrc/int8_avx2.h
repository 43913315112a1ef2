// The int8 format of the AVX2 tier: tables of shuffles take the place of the expand instruction.
//
// The instruction that multiplies bytes takes unsigned times signed ones and cuts sums of two products off at 32767. So the
// sign of a weight goes over to x, which is -127 to 127: 2 * 128 * 127 = 32512 fits.
#pragma once

#include <cstring>

#include "int8_quad.h"
#include "tiles.h"
#include "unroll.h"

namespace gossamer {
namespace {

// Byte shuffles for 16 weights under a low and a high mask of eight bits: a byte of low[..] + high[..] is the place of the
// value that belongs there, or 0x80 and more where the bit is not set, which gives zero. Values of the high mask lie behind
// those of the low one.
struct ByteTables {
    alignas(64) std::uint8_t low[256][16] = {};
    alignas(64) std::uint8_t high[256][16] = {};
    constexpr ByteTables() {
        for (int mask = 0; mask < 256; ++mask) {
            std::uint8_t next = 0;
            for (int i = 0; i < 8; ++i) {
                const bool kept = (mask >> i) & 1;
                low[mask][i] = high[mask][8 + i] = kept ? next : 0x80;
                next = static_cast<std::uint8_t>(next + kept);
            }
            for (int i = 0; i < 8; ++i) low[mask][8 + i] = next;
        }
    }
};
constexpr ByteTables kByteTables;

struct Int8 : Quad128 {
    using X = std::int8_t;

    static __m128i load16(const std::uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
    static __m256i join(__m128i low, __m128i high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }

    // The shuffle of 16 weights, and behind which value the next ones begin.
    static __m128i control16(const std::uint8_t* mask, const std::uint8_t** values) {
        std::uint16_t bits;
        std::memcpy(&bits, mask, 2);
        // Compilers clear the destination of this instruction first, for processors on which it waits for the old content.
        std::uint64_t count;
        __asm__("popcntq %1, %0" : "=r"(count) : "r"(static_cast<std::uint64_t>(bits)));
        *values += count;
        return _mm_add_epi8(load16(kByteTables.low[mask[0]]), load16(kByteTables.high[mask[1]]));
    }

    // 32 weights.
    static __m256i expand32(const std::uint8_t* mask, const std::uint8_t** values) {
        const __m128i first = load16(*values);
        const __m128i low = control16(mask, values);
        const __m256i stored = join(first, load16(*values));
        const __m256i plain = _mm256_xor_si256(stored, _mm256_set1_epi8(static_cast<char>(tiles::kBias)));
        return _mm256_shuffle_epi8(plain, join(low, control16(mask + 2, values)));
    }

    // Lane i: the sum of the 8 lanes of a[i].
    static __m128i fold(const __m256i* a) {
        const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
        return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    }

    template <int B>
    static const std::uint8_t* dots(const std::uint8_t* masks, const std::uint8_t* values, const std::uint8_t* x,
                                    std::int64_t stride, const std::int32_t*, __m128i* out) {
        constexpr int kHeld = B < 4 ? 4 : B;
        __m256i acc[kHeld];
        GOSSAMER_UNROLL(4)
        for (int r = 0; r < static_cast<int>(tiles::kRows); ++r) {
            __m256i* row = acc + r * B % kHeld;
            GOSSAMER_UNROLL(4)
            for (int step = 0; step < 4; ++step) {
                const __m256i w = expand32(masks + 16 * r + 4 * step, &values), size = _mm256_abs_epi8(w);
                GOSSAMER_UNROLL(8)
                for (int b = 0; b < B; ++b) {
                    const auto* at = reinterpret_cast<const __m256i*>(x + b * stride + 32 * step);
                    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_loadu_si256(at), w));
                    const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                    row[b] = step == 0 ? sums : _mm256_add_epi32(row[b], sums);
                }
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
