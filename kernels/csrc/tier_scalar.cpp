// The portable tier: eight lanes as an array, which compilers turn into whatever the target always has (SSE2, NEON).
#include <cstring>

#include "float16.h"
#include "int8_scalar.h"
#include "rows_window.h"
#include "split_dot.h"
#include "tiles.h"

namespace gossamer {
namespace {

struct Scalar {
    static constexpr int kLanes = 8;
    struct F {
        float lane[kLanes];
    };
    static F set1(float value) {
        F f;
        for (float& lane : f.lane) lane = value;
        return f;
    }
    static F zero() { return set1(0.0f); }
    static F load(const float* at) {
        F f;
        std::memcpy(f.lane, at, sizeof f.lane);
        return f;
    }
    static void store(float* at, F f) { std::memcpy(at, f.lane, sizeof f.lane); }
    static F add(F a, F b) {
        for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    static F fma(F a, F b, F c) {
        for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static F max(F a, F b) {
        for (int i = 0; i < kLanes; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        return b;
    }
    static F scale2(F a, F n) {
        for (int i = 0; i < kLanes; ++i) {
            const bool nan = a.lane[i] != a.lane[i];
            const auto power = static_cast<std::uint32_t>(nan ? 0 : static_cast<std::int32_t>(n.lane[i])) << 23;
            a.lane[i] = nan ? a.lane[i] : float_of(bits_of(a.lane[i]) + power);
        }
        return a;
    }
    static void transpose(F* r) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < i; ++j) {
                const float other = r[i].lane[j];
                r[i].lane[j] = r[j].lane[i];
                r[j].lane[i] = other;
            }
        }
    }
    static unsigned exceed(F x, F t) {
        unsigned bits = 0;
        for (int i = 0; i < kLanes; ++i) {
            const float size = x.lane[i] < 0 ? -x.lane[i] : x.lane[i];
            bits |= static_cast<unsigned>(!(size <= t.lane[i])) << i;
        }
        return bits;
    }
    // Without branches: half of them would be mispredicted.
    static void append(unsigned bits, F f, float* out) {
        for (int i = 0; i < kLanes; ++i) {
            *out = f.lane[i];
            out += bits >> i & 1;
        }
    }
    static int append(unsigned bits, std::int32_t first, std::int32_t* out) {
        int count = 0;
        for (int i = 0; i < kLanes; ++i) {
            out[count] = first + i;
            count += static_cast<int>(bits >> i & 1);
        }
        return count;
    }
    static float sum(F f) {
        return ((f.lane[0] + f.lane[4]) + (f.lane[2] + f.lane[6])) + ((f.lane[1] + f.lane[5]) + (f.lane[3] + f.lane[7]));
    }
};

template <class Weight>
struct Channel {
    using S = Scalar;
    using W = Weight;
    using F = S::F;
    static constexpr int kStep = 2 * S::kLanes;
    static F row(const W* w) {
        F f;
        for (int i = 0; i < S::kLanes; ++i) f.lane[i] = gossamer::widen(w[i]);
        return f;
    }
    static void widen(const W* w, F& a, F& b) { a = row(w), b = row(w + S::kLanes); }
    static void narrow(F a, F b, W* out) {
        for (int i = 0; i < S::kLanes; ++i) {
            gossamer::narrow(a.lane[i], out + i);
            gossamer::narrow(b.lane[i], out + i + S::kLanes);
        }
    }
};

template <class W>
using Dense = SplitDot<Channel<W>>;

template <class W>
using Words = WideWords<Channel<W>>;

template <class Weight>
struct Mask {
    using S = Scalar;
    using W = Weight;
    using V = S::F;
    static constexpr int kStep = S::kLanes, kXBytes = 4, kChains = 1, kBatch = 8;
    template <class Use>
    static const std::uint16_t* row(const std::uint8_t* mask, const std::uint16_t* values, Use use) {
        for (int i = 0; i < tiles::kCols / kStep; ++i) {
            V v;
            for (int j = 0; j < kStep; ++j) {
                const int kept = (mask[i] >> j) & 1;
                // Chosen, not multiplied by the bit: an infinite value behind a cleared bit would become NaN.
                v.lane[j] = kept ? gossamer::widen(W{*values}) : 0.0f;
                values += kept;
            }
            use(i, v);
        }
        return values;
    }
    static V mul(V acc, V v, const std::uint8_t* x) { return S::fma(v, S::load(reinterpret_cast<const float*>(x)), acc); }
    static void prepare_step(const W* x, std::uint8_t* out) {
        for (int i = 0; i < kStep; ++i) reinterpret_cast<float*>(out)[i] = gossamer::widen(x[i]);
    }
};

template <class Weight>
struct Dual : Mask<Weight> {
    using V = Scalar::F;
    static constexpr int kParts = 1, kPer = 1, kHold = 1;
    template <class Use>
    static const std::uint16_t* block(std::uint64_t mask, const std::uint16_t* values, Use use) {
        for (int i = 0; i < 8; ++i, mask >>= 8) {
            V v;
            for (int j = 0; j < 8; ++j) {
                const unsigned kept = mask >> j & 1u;
                v.lane[j] = kept ? gossamer::widen(Weight{*values}) : 0.0f;
                values += kept;
            }
            use(i, v);
        }
        return values;
    }
    static void split(V v, V* parts) { *parts = v; }
    static void finish(const float* sums, Weight* y) {
        for (int i = 0; i < 64; ++i) gossamer::narrow(sums[i], y + i);
    }
};

}  // namespace
}  // namespace gossamer

#include "tier_table.h"

namespace gossamer {

const Tier* tier_scalar() {
    static constexpr Tier tier = make_tier("scalar");
    return &tier;
}

}  // namespace gossamer
