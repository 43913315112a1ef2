// A gated MLP on a subset of its neurons.
#pragma once

#include <cstdint>

#include "gemv.h"

namespace gossamer {

// Products of x with the gate and up rows of active neurons: what a tier computes.
struct NeuronCall {
    const void* gate;  // [neurons, cols]
    const void* up;    // [neurons, cols]
    std::int64_t cols;
    const std::int32_t* active;
    const std::uint8_t* x;  // prepared for dense rows
    std::int64_t stride;
    int batch;
    float* gates;  // [active, padded batch]
    float* ups;    // [active, padded batch]
};

enum Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

struct Mlp {
    const void* gate;    // [neurons, hidden]
    const void* up;      // [neurons, hidden]
    const void* down_t;  // [neurons, hidden]
    std::int64_t neurons, hidden;
    int activation;
};

// False, and nothing done, unless active [count] rises strictly within the neurons.
bool neuron_mlp(const Tier& tier, int dtype, const void* x, int batch, const Mlp& mlp, const std::int32_t* active,
                std::int64_t count, void* y, int threads);

}  // namespace gossamer
