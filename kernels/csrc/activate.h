// Activations of gated MLPs on rows of float32, as torch computes them.
#pragma once

#include <cmath>
#include <cstdint>

#include "float16.h"
#include "neuron.h"

namespace gossamer {
namespace {

// e^x to about one unit in the last place, without branches, so that loops over it become vectors: 2^n times a
// polynomial of the rest. Beyond the range of float32 it is 0 or infinity; NaN stays NaN.
inline float exponential(float x) {
    // Comparisons that NaN fails, so that it goes through the arithmetic.
    const float low = x < -104.0f ? -104.0f : x, clamped = low > 89.0f ? 89.0f : low;
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const float shifted = clamped * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors: n reaches 128 and -150, which one exponent cannot hold.
    const auto power = static_cast<std::int32_t>(bits_of(shifted)) - 0x4B400000;
    const std::int32_t first = power >> 1, second = power - first;
    const float one = float_of(static_cast<std::uint32_t>(first + 127) << 23);
    const float two = float_of(static_cast<std::uint32_t>(second + 127) << 23);
    const float made = p * one * two;
    return x != x ? x : made;
}

// values = act(values). With NaN as torch has it: silu and gelu of minus infinity are NaN.
inline void activate(int activation, float* values, std::int64_t count) {
    switch (activation) {
        case kSilu:
            for (std::int64_t i = 0; i < count; ++i) values[i] = values[i] / (1.0f + exponential(-values[i]));
            return;
        case kGeluTanh:
            for (std::int64_t i = 0; i < count; ++i) {
                const float g = values[i];
                values[i] = 0.5f * g * (1.0f + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
            }
            return;
        case kGelu:
            for (std::int64_t i = 0; i < count; ++i) {
                values[i] = 0.5f * values[i] * (1.0f + std::erf(values[i] * 0.7071067812f));
            }
            return;
        default:
            for (std::int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
    }
}

}  // namespace
}  // namespace gossamer
