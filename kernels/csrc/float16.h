// Scalar conversions of 16-bit floats, in plain integer arithmetic.
// Everything here is in an unnamed namespace on purpose: each file that includes it is compiled for another processor,
// and the linker must not merge their copies.
#pragma once

#include <cstdint>
#include <cstring>

namespace gossamer {
namespace {

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float widen(float value) { return value; }

inline float widen(Bf16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }

// Without branches, so that loops over it become vectors: 2^112 moves the exponent, and normalises subnormals.
inline float widen(Fp16 value) {
    const std::uint32_t rest = value.bits & 0x7FFFu;
    const std::uint32_t scaled = bits_of(float_of(rest << 13) * 5.192296858534828e33f);
    const std::uint32_t special = rest >= 0x7C00u ? 0x7F800000u : 0u;
    return float_of((value.bits & 0x8000u) << 16 | scaled | special);
}

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, Bf16* out) {
    const std::uint32_t bits = bits_of(value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    out->bits = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded >> 16);
}

inline void narrow(float value, Fp16* out) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t rest = bits & 0x7FFFFFFFu;
    std::uint32_t half;
    if (rest > 0x7F800000u) {
        half = 0x7E00u;
    } else if (rest >= 0x477FF000u) {  // 65520 and more round to infinity
        half = 0x7C00u;
    } else if (rest >= 0x38800000u) {
        const std::uint32_t rounded = rest + 0xFFFu + ((rest >> 13) & 1u);
        half = (rounded - (112u << 23)) >> 13;
    } else {
        // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the processor.
        half = bits_of(float_of(rest) + 0.5f) - 0x3F000000u;
    }
    out->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace gossamer
