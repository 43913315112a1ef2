// AArch64: NEON is part of every such processor. Byte shuffles from a table take the place of an expand instruction.
#define GOSSAMER_VECTORS 1
#include <arm_neon.h>

#include <cstring>

#include "float16.h"
#include "int8_scalar.h"
#include "rows_bitmask.h"
#include "rows_window.h"
#include "split_dot.h"

namespace gossamer {
namespace {

struct Tables {
    // By mask of eight bits: lane i of eight 16-bit lanes takes the next value if bit i is set, else zero (an index
    // beyond the register).
    alignas(16) std::uint8_t halves[256][16] = {};
    // By mask of four bits: the bytes of its lanes of 32 bits in rising order, and the numbers of the lanes.
    alignas(16) std::uint8_t words[16][16] = {};
    alignas(16) std::int32_t lanes[16][4] = {};
    constexpr Tables() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int i = 0; i < 8; ++i) {
                const bool kept = (mask >> i) & 1;
                halves[mask][2 * i] = static_cast<std::uint8_t>(kept ? 2 * next : 0xFF);
                halves[mask][2 * i + 1] = static_cast<std::uint8_t>(kept ? 2 * next + 1 : 0xFF);
                next += kept;
            }
        }
        for (int mask = 0; mask < 16; ++mask) {
            int next = 0;
            for (int i = 0; i < 4; ++i) {
                if (!((mask >> i) & 1)) continue;
                for (int byte = 0; byte < 4; ++byte) words[mask][4 * next + byte] = static_cast<std::uint8_t>(4 * i + byte);
                lanes[mask][next++] = i;
            }
        }
    }
};
constexpr Tables kTables;

struct Neon {
    using F = float32x4_t;
    static constexpr int kLanes = 4;
    static F zero() { return vdupq_n_f32(0.0f); }
    static F set1(float value) { return vdupq_n_f32(value); }
    static F load(const float* at) { return vld1q_f32(at); }
    static void store(float* at, F f) { vst1q_f32(at, f); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F scale2(F a, F n) {
        const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
        const F scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), power));
        return vbslq_f32(vceqq_f32(a, a), scaled, a);
    }
    // 4 rows of 4 words become columns.
    static void transpose(F* r) {
        const float32x4x2_t low = vtrnq_f32(r[0], r[1]), high = vtrnq_f32(r[2], r[3]);
        r[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
        r[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
        r[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
        r[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
    }
    static unsigned exceed(F x, F t) {
        static constexpr std::uint32_t kBits[4] = {1, 2, 4, 8};
        return vaddvq_u32(vbicq_u32(vld1q_u32(kBits), vcleq_f32(vabsq_f32(x), t)));
    }
    static void append(unsigned bits, F f, float* out) {
        const uint8x16_t kept = vqtbl1q_u8(vreinterpretq_u8_f32(f), vld1q_u8(kTables.words[bits]));
        store(out, vreinterpretq_f32_u8(kept));
    }
    static int append(unsigned bits, std::int32_t first, std::int32_t* out) {
        vst1q_s32(out, vaddq_s32(vld1q_s32(kTables.lanes[bits]), vdupq_n_s32(first)));
        return __builtin_popcount(bits);
    }
    static float sum(F f) { return vaddvq_f32(f); }
};

inline uint16x8_t halves(const void* at) {
    uint16x8_t v;  // elements lie on multiples of two bytes, so not as an array of 16-bit integers
    std::memcpy(&v, at, sizeof v);
    return v;
}

template <class Weight>
struct Channel;

template <>
struct Channel<float> {
    using S = Neon;
    using W = float;
    static constexpr int kStep = 8;
    static float32x4_t row(const W* w) { return S::load(w); }
    static void widen(const W* w, float32x4_t& a, float32x4_t& b) { a = S::load(w), b = S::load(w + 4); }
    static void narrow(float32x4_t a, float32x4_t b, W* out) { S::store(out, a), S::store(out + 4, b); }
    static void prefetch(const W* w) { __builtin_prefetch(w, 0, 2); }
};

template <>
struct Channel<Bf16> {
    using S = Neon;
    using W = Bf16;
    static constexpr int kStep = 8;
    static void split(uint16x8_t v, float32x4_t& a, float32x4_t& b) {
        a = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16));
        b = vreinterpretq_f32_u32(vshll_high_n_u16(v, 16));
    }
    static float32x4_t row(const W* w) {
        uint16x4_t v;
        std::memcpy(&v, w, sizeof v);
        return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
    }
    static void widen(const W* w, float32x4_t& a, float32x4_t& b) { split(halves(w), a, b); }
    // Nearest even in the upper half of each lane; NaN stays NaN.
    static uint32x4_t round(float32x4_t f) {
        const uint32x4_t bits = vreinterpretq_u32_f32(f);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        return vbslq_u32(vceqq_f32(f, f), up, vorrq_u32(bits, vdupq_n_u32(0x400000)));
    }
    static void narrow(float32x4_t a, float32x4_t b, W* out) {
        const uint16x8_t both = vshrn_high_n_u32(vshrn_n_u32(round(a), 16), round(b), 16);
        std::memcpy(out, &both, sizeof both);
    }
    static void prefetch(const W* w) { __builtin_prefetch(w, 0, 2); }
};

template <>
struct Channel<Fp16> {
    using S = Neon;
    using W = Fp16;
    static constexpr int kStep = 8;
    static void split(uint16x8_t v, float32x4_t& a, float32x4_t& b) {
        a = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(v)));
        b = vcvt_high_f32_f16(vreinterpretq_f16_u16(v));
    }
    static float32x4_t row(const W* w) {
        uint16x4_t v;
        std::memcpy(&v, w, sizeof v);
        return vcvt_f32_f16(vreinterpret_f16_u16(v));
    }
    static void widen(const W* w, float32x4_t& a, float32x4_t& b) { split(halves(w), a, b); }
    static void narrow(float32x4_t a, float32x4_t b, W* out) {
        const float16x8_t both = vcvt_high_f16_f32(vcvt_f16_f32(a), b);
        std::memcpy(out, &both, sizeof both);
    }
    static void prefetch(const W* w) { __builtin_prefetch(w, 0, 2); }
};

template <class W>
using Dense = SplitDot<Channel<W>>;

template <class W>
using Words = WideWords<Channel<W>>;

template <class Weight>
struct Mask {
    using S = Neon;
    using W = Weight;
    using V = typename SplitDot<Channel<W>>::V;
    static constexpr int kStep = 8, kXBytes = 4, kChains = 1, kBatch = 8;
    template <class Use>
    static const std::uint16_t* row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
        const uint64x2_t counts = vreinterpretq_u64_u8(vcntq_u8(vld1q_u8(mask)));
        for (int word = 0; word < 2; ++word) {
            // Byte i of the product is the number of bits set in bytes 0 to i, at most 64.
            const std::uint64_t through = (word == 0 ? vgetq_lane_u64(counts, 0) : vgetq_lane_u64(counts, 1)) *
                                          std::uint64_t{0x0101010101010101};
            GOSSAMER_UNROLL(8)
            for (int i = 0; i < 8; ++i) {
                const std::uint16_t* from = values + (i == 0 ? 0 : through >> (8 * (i - 1)) & 0xFF);
                const uint8x16_t control = vld1q_u8(kTables.halves[mask[8 * word + i]]);
                V v;
                Channel<W>::split(vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(halves(from)), control)), v.a, v.b);
                use(8 * word + i, v);
            }
            values += through >> 56;
        }
        return values;
    }
    static float32x4_t mul(float32x4_t acc, V v, const std::uint8_t* x) { return SplitDot<Channel<W>>::mul(acc, v, x); }
    static void prepare_step(const W* x, std::uint8_t* out) { SplitDot<Channel<W>>::prepare_step(x, out); }
};

template <class Weight>
struct Dual {
    using S = Neon;
    using W = Weight;
    using V = typename SplitDot<Channel<W>>::V;
    static constexpr int kStep = 8, kParts = 2, kPer = 1, kHold = 1;
    template <class Use>
    static const std::uint16_t* block(std::uint64_t mask, const std::uint16_t* values, Use use) {
        for (int i = 0; i < 8; ++i, mask >>= 8) {
            const auto bits = static_cast<unsigned>(mask & 0xFF);
            const uint8x16_t control = vld1q_u8(kTables.halves[bits]);
            V v;
            Channel<W>::split(vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(halves(values)), control)), v.a, v.b);
            use(i, v);
            values += __builtin_popcount(bits);
        }
        return values;
    }
    static void split(V v, float32x4_t* parts) { parts[0] = v.a, parts[1] = v.b; }
    static void finish(const float* sums, W* y) {
        for (int i = 0; i < 64; i += 8) Channel<W>::narrow(S::load(sums + i), S::load(sums + i + 4), y + i);
    }
};

}  // namespace
}  // namespace gossamer

#include "tier_table.h"

namespace gossamer {

const Tier* tier_neon() {
    static constexpr Tier tier = make_tier("neon");
    return &tier;
}

}  // namespace gossamer
