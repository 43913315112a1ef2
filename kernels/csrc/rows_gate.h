// act(gate) * up on rows of a gated MLP, written once for all tiers: plain loops, which the compiler makes vectors of.
#pragma once

#include <algorithm>

#include "activate.h"

namespace gossamer {
namespace {  // of the including tier: shared, the linker would take one processor's code for all

// gates = act(gates) ups, both rounded.
template <class W>
void gate_rows(int activation, W* gates, const W* ups, std::int64_t count) {
    constexpr std::int64_t kPiece = 256;
    float wide[kPiece];
    for (std::int64_t i = 0; i < count; i += kPiece) {
        const std::int64_t n = std::min(kPiece, count - i);
        for (std::int64_t k = 0; k < n; ++k) wide[k] = widen(gates[i + k]);
        activate(activation, wide, n);
        for (std::int64_t k = 0; k < n; ++k) {
            W rounded;
            narrow(wide[k], &rounded);
            narrow(widen(rounded) * widen(ups[i + k]), &gates[i + k]);
        }
    }
}

}  // namespace
}  // namespace gossamer
