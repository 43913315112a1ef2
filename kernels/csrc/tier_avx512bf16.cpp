// AVX-512 with VBMI2, VNNI and BF16 (Zen 4, Sapphire Rapids and later): dot products of bfloat16 pairs.
// vdpbf16ps takes subnormal inputs and results as zero and rounds to nearest even, whatever the control register says.
#include "vector512.h"

#include "int8_avx512.h"
#include "rows_window.h"

namespace gossamer {
namespace {

template <class W>
struct DenseOf {
    using Type = SplitDot<Channel<W>>;
};

template <class W>
struct MaskOf {
    using Type = SplitMask<Channel<W>>;
};

// x stays bfloat16: 32 products and one addition chain per instruction.
struct Pairs {
    using S = Avx512;
    using W = Bf16;
    using V = __m512i;
    static constexpr int kStep = 32, kXBytes = 2, kTogether = 1, kChains = 1, kBatch = 8;
    static V load(const W* w) { return _mm512_loadu_si512(w); }
    template <class Use>
    static const std::uint16_t* row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
        return expand_row(mask, values, use);
    }
    static __m512 mul(__m512 acc, V v, const std::uint8_t* x) {
        const __m512i other = _mm512_loadu_si512(x);
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(v), reinterpret_cast<__m512bh>(other));
    }
    static void prepare_step(const W* x, std::uint8_t* out) { std::memcpy(out, x, 64); }
};

template <class W>
struct WordsOf {
    using Type = WideWords<Channel<W>>;
};

// A word is two neighbours of a row.
struct PairWords {
    using S = Avx512;
    using W = Bf16;
    static constexpr int kPer = 2;
    static __m512 word(const W* w) { return _mm512_loadu_ps(w); }
    static __m512 mul(__m512 acc, __m512 words, const float* q) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(words), reinterpret_cast<__m512bh>(_mm512_set1_ps(*q)));
    }
    static void query(const W* from, std::int64_t count, float* to) {
        std::memcpy(to, from, static_cast<std::size_t>(4 * count));
    }
};

template <>
struct WordsOf<Bf16> {
    using Type = PairWords;
};

template <class W>
using Words = typename WordsOf<W>::Type;

template <>
struct DenseOf<Bf16> {
    using Type = Pairs;
};

template <>
struct MaskOf<Bf16> {
    using Type = Pairs;
};

template <class W>
using Dense = typename DenseOf<W>::Type;

template <class W>
using Mask = typename MaskOf<W>::Type;

template <class W>
struct DualOf {
    using Type = SplitDual<Channel<W>>;
};

// Two channels per instruction, which adds the product of the upper halves and then that of the lower ones, each rounded
// like a multiply-add: with the first channel above, the bits of one channel after the other.
struct PairDual : SplitDual<Channel<Bf16>> {
    static constexpr int kPer = 2, kHold = 3;
    static void join(V first, V second, __m512* words) {
        words[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(second, first));
        words[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(second, first));
    }
    static void split(V v, __m512* parts) { join(v, _mm512_setzero_si512(), parts); }
    static float factor(float first, float second) {
        std::uint32_t upper, lower;
        std::memcpy(&upper, &first, 4), std::memcpy(&lower, &second, 4);
        const std::uint32_t both = upper | lower >> 16;
        float pair;
        std::memcpy(&pair, &both, 4);
        return pair;
    }
    static __m512 add(__m512 sum, __m512 words, float factor) {
        const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_ps(factor));
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(words), pair);
    }
    static void finish(const float* sums, W* y) {
        for (int i = 0; i < 64; i += 32) {
            const __m512i low = _mm512_srli_epi32(Channel<W>::round(S::load(sums + i)), 16);
            const __m512i high = _mm512_srli_epi32(Channel<W>::round(S::load(sums + i + 16)), 16);
            _mm512_storeu_si512(y + i, _mm512_packus_epi32(low, high));
        }
    }
};

template <>
struct DualOf<Bf16> {
    using Type = PairDual;
};

template <class W>
using Dual = typename DualOf<W>::Type;

}  // namespace
}  // namespace gossamer

#include "tier_table.h"

namespace gossamer {

const Tier* tier_avx512bf16() {
    static constexpr Tier tier = make_tier("avx512bf16");
    return &tier;
}

}  // namespace gossamer
