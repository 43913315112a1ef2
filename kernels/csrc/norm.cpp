#include "norm.h"

#include <cmath>

#include "float16.h"
#include "gemv.h"

namespace gossamer {
namespace {

constexpr std::int64_t kLanes = 16;  // sums beside each other: a fixed order, and vectors for the compiler

template <class W>
void rows_of(const W* x, const W* weight, std::int64_t rows, std::int64_t cols, float epsilon, W* y) {
    const std::int64_t whole = cols - cols % kLanes;
    for (std::int64_t r = 0; r < rows; ++r, x += cols, y += cols) {
        float lanes[kLanes] = {};
        for (std::int64_t i = 0; i < whole; i += kLanes) {
            for (std::int64_t k = 0; k < kLanes; ++k) {
                const float value = widen(x[i + k]);
                lanes[k] += value * value;
            }
        }
        for (std::int64_t i = whole; i < cols; ++i) lanes[i - whole] += widen(x[i]) * widen(x[i]);
        for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
            for (std::int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
        }
        const float scale = 1.0f / std::sqrt(lanes[0] / static_cast<float>(cols) + epsilon);
        for (std::int64_t i = 0; i < cols; ++i) {
            W scaled;
            narrow(widen(x[i]) * scale, &scaled);
            narrow(widen(weight[i]) * widen(scaled), &y[i]);
        }
    }
}

template <class W>
void typed(const void* x, const void* weight, std::int64_t rows, std::int64_t cols, float epsilon, void* y) {
    rows_of(static_cast<const W*>(x), static_cast<const W*>(weight), rows, cols, epsilon, static_cast<W*>(y));
}

}  // namespace

void rms_norm(int dtype, const void* x, const void* weight, std::int64_t rows, std::int64_t cols, float epsilon, void* y) {
    if (dtype == kFloat32) return typed<float>(x, weight, rows, cols, epsilon, y);
    if (dtype == kBfloat16) return typed<Bf16>(x, weight, rows, cols, epsilon, y);
    typed<Fp16>(x, weight, rows, cols, epsilon, y);
}

}  // namespace gossamer
