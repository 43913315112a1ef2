// Products of many rows with a sparse matrix in CSR, all in float32: what sparse deltas are trained with.
#pragma once

#include <cstdint>

namespace gossamer {

struct Tier;

namespace csr {
constexpr std::int64_t kTokens = 32;  // of a group, which lies channel by channel: [channels][kTokens]
constexpr std::int64_t kChunk = 8;    // groups that are turned before their products are added up
}  // namespace csr

// Positions, row by row.
struct CsrMatrix {
    const std::int32_t* rowptr;   // [rows + 1]
    const std::int32_t* columns;  // [count]
    std::int64_t rows, cols, count;
};

// y [tokens, rows] = x [tokens, cols] times the transposed matrix of values [count]. False, and nothing done, unless
// the positions lie within the matrix.
bool csr_linear(const Tier& tier, const CsrMatrix& matrix, const float* values, const float* x, std::int64_t tokens,
                float* y, int threads);

// out [count] = (gy^T x) at the positions, gy [tokens, rows]. False as above. room: csr_room floats.
bool csr_sampled(const Tier& tier, const CsrMatrix& matrix, const float* gy, const float* x, std::int64_t tokens,
                 float* room, float* out, int threads);

std::int64_t csr_room(std::int64_t tokens, std::int64_t rows, std::int64_t cols);

}  // namespace gossamer
