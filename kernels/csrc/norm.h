// Root mean square norms of a few rows.
#pragma once

#include <cstdint>

namespace gossamer {

// y = weight * x / sqrt(mean(x^2) + epsilon), row by row; x and y [rows, cols], weight [cols], of one dtype. The quotient
// is rounded to the dtype before the weight multiplies it, as models were trained.
void rms_norm(int dtype, const void* x, const void* weight, std::int64_t rows, std::int64_t cols, float epsilon, void* y);

}  // namespace gossamer
