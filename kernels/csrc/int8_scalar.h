// The int8 format of the portable tier.
#pragma once

#include <cstdint>
#include <cstring>

#include "float16.h"
#include "tiles.h"

namespace gossamer {
namespace {

struct Int8 {
    using X = std::int16_t;
    struct Quad {
        float lane[4];
    };
    struct Ints {
        std::int32_t lane[4];
    };
    static Quad load(const float* at) {
        Quad quad;
        std::memcpy(quad.lane, at, sizeof quad.lane);
        return quad;
    }
    static void store(float* at, Quad quad) { std::memcpy(at, quad.lane, sizeof quad.lane); }
    static Quad scales(const std::uint8_t* at) {
        Fp16 stored[4];
        std::memcpy(stored, at, sizeof stored);
        Quad quad;
        for (int i = 0; i < 4; ++i) quad.lane[i] = widen(stored[i]);
        return quad;
    }
    template <int B>
    static Quad spread(int q, Quad w) {
        Quad quad;
        for (int i = 0; i < 4; ++i) quad.lane[i] = w.lane[(4 * q + i) / B];
        return quad;
    }
    // Each product in a variable of its own: the compiler may not join it with the addition (see CMakeLists.txt).
    static Quad add(Quad sums, Ints dots, Quad w, Quad x) {
        for (int i = 0; i < 4; ++i) {
            const float scaled = static_cast<float>(dots.lane[i]) * w.lane[i];
            const float product = scaled * x.lane[i];
            sums.lane[i] += product;
        }
        return sums;
    }
    template <int B>
    static const std::uint8_t* dots(const std::uint8_t* masks, const std::uint8_t* values, const std::uint8_t* x,
                                    std::int64_t stride, const std::int32_t*, Ints* out) {
        constexpr int kCols = static_cast<int>(tiles::kCols);
        for (int r = 0; r < static_cast<int>(tiles::kRows); ++r) {
            std::int16_t row[kCols];
            for (int i = 0; i < kCols; ++i) {
                const int kept = masks[16 * r + i / 8] >> (i % 8) & 1;
                row[i] = static_cast<std::int16_t>((*values - tiles::kBias) * kept);
                values += kept;
            }
            for (int b = 0; b < B; ++b) {
                const auto* at = reinterpret_cast<const std::int16_t*>(x + b * stride);
                std::int32_t sum = 0;
                for (int i = 0; i < kCols; ++i) sum += static_cast<std::int32_t>(row[i]) * at[i];
                out[(r * B + b) / 4].lane[(r * B + b) % 4] = sum;
            }
        }
        return values;
    }
};

}  // namespace
}  // namespace gossamer
