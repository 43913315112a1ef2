// Matrices times a few vectors whose small entries are skipped.
#pragma once

#include <cstdint>

#include "gemv.h"

namespace gossamer {

// One of several matrices that skip the same channels of the same x.
struct ActiveMatrix {
    const void* weight;  // [channels, outputs], or a packed tensor of dual.h
    std::int64_t outputs;
    bool packed;
    const void* bias;  // [outputs] in the weight's dtype, or nullptr
    void* y;           // [batch, outputs]
};

// All of them in one parallel region, the active channels of x - center (rounded; no center: of x) listed once. Returns how
// many there are. The same bits as one matrix after the other, for any number of threads.
std::int64_t active_gemv(const Tier& tier, int dtype, const void* x, int batch, std::int64_t channels,
                         const float* threshold, const float* center, const ActiveMatrix* matrices, int count, int threads);

// The dense matrix transposed, [channels, outputs], of a packed tensor of dual.h without fault, zeros where nothing is kept.
void dual_expand(const Tier& tier, const std::uint8_t* packed, std::uint16_t* weight_t, int threads);

}  // namespace gossamer
