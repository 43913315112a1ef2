// Products of weights that are widened to two float vectors, for units without a dot product of their own.
#pragma once

#include <cstdint>

namespace gossamer {

// The dense format of a channel format C. Prepared x is floats in C's order.
template <class C, int kRowsTogether = 1>
struct SplitDot {
    using S = typename C::S;
    using W = typename C::W;
    using F = typename S::F;
    static constexpr int kStep = C::kStep;
    static constexpr int kXBytes = 4;
    static constexpr int kTogether = kRowsTogether;
    struct V {
        F a, b;
    };
    static V load(const W* w) {
        V v;
        C::widen(w, v.a, v.b);
        return v;
    }
    static F mul(F acc, V v, const std::uint8_t* x) {
        const auto* at = reinterpret_cast<const float*>(x);
        return S::fma(v.b, S::load(at + S::kLanes), S::fma(v.a, S::load(at), acc));
    }
    static void prepare_step(const W* x, std::uint8_t* out) {
        const V v = load(x);
        S::store(reinterpret_cast<float*>(out), v.a);
        S::store(reinterpret_cast<float*>(out) + S::kLanes, v.b);
    }
};

}  // namespace gossamer
