// Groups of 32 tokens times a sparse matrix in CSR, written once for all vector units S of the tiers (float32).
//
// A group lies channel by channel, so an entry of the matrix is one number times a few whole vectors. It is brought into
// that order, and sums back out of it, in blocks of 16 channels: a line of every token.
#pragma once

#include "csr.h"
#include "gemv.h"
#include "unroll.h"

namespace gossamer {
namespace {

constexpr std::int64_t kCsrBlock = 16;

// x [tokens <= 32, cols] to out [cols][32], zeros for tokens that are not there.
template <class S>
void turn_group(const float* x, std::int64_t tokens, std::int64_t cols, float* out) {
    using F = typename S::F;
    constexpr int kLanes = S::kLanes;
    std::int64_t c = 0;
    for (; c + kCsrBlock <= cols; c += kCsrBlock) {
        for (std::int64_t t = 0; t < csr::kTokens; t += kLanes) {
            for (std::int64_t h = c; h < c + kCsrBlock; h += kLanes) {
                F v[kLanes];
                for (int i = 0; i < kLanes; ++i) v[i] = t + i < tokens ? S::load(x + (t + i) * cols + h) : S::zero();
                S::transpose(v);
                for (int i = 0; i < kLanes; ++i) S::store(out + (h + i) * csr::kTokens + t, v[i]);
            }
        }
    }
    for (; c < cols; ++c) {
        for (std::int64_t t = 0; t < csr::kTokens; ++t) out[c * csr::kTokens + t] = t < tokens ? x[t * cols + c] : 0.0f;
    }
}

// y [tokens, rows] of a turned group [cols][32], of which the first vectors are looked at.
template <class S, int kVectors>
void csr_rows_of(const CsrMatrix& matrix, const float* values, const float* x, std::int64_t tokens, float* y) {
    using F = typename S::F;
    constexpr int kLanes = S::kLanes;
    const std::int64_t rows = matrix.rows;
    float block[kCsrBlock * csr::kTokens];
    for (std::int64_t first = 0; first < rows; first += kCsrBlock) {
        const std::int64_t count = rows - first < kCsrBlock ? rows - first : kCsrBlock;
        for (std::int64_t r = 0; r < count; ++r) {
            F sums[kVectors];
            GOSSAMER_UNROLL(8)
            for (int i = 0; i < kVectors; ++i) sums[i] = S::zero();
            for (std::int64_t e = matrix.rowptr[first + r]; e < matrix.rowptr[first + r + 1]; ++e) {
                const F value = S::set1(values[e]);
                const float* channel = x + matrix.columns[e] * csr::kTokens;
                GOSSAMER_UNROLL(8)
                for (int i = 0; i < kVectors; ++i) sums[i] = S::fma(value, S::load(channel + i * kLanes), sums[i]);
            }
            GOSSAMER_UNROLL(8)
            for (int i = 0; i < kVectors; ++i) S::store(block + r * csr::kTokens + i * kLanes, sums[i]);
        }
        if (count < kCsrBlock) {
            for (std::int64_t t = 0; t < tokens; ++t) {
                for (std::int64_t r = 0; r < count; ++r) y[t * rows + first + r] = block[r * csr::kTokens + t];
            }
            continue;
        }
        for (std::int64_t t = 0; t < tokens; t += kLanes) {
            for (std::int64_t h = 0; h < kCsrBlock; h += kLanes) {
                F v[kLanes];
                for (int i = 0; i < kLanes; ++i) v[i] = S::load(block + (h + i) * csr::kTokens + t);
                S::transpose(v);
                for (int i = 0; i < kLanes && t + i < tokens; ++i) S::store(y + (t + i) * rows + first + h, v[i]);
            }
        }
    }
}

template <class S>
void csr_rows(const CsrMatrix& matrix, const float* values, const float* x, std::int64_t tokens, float* y) {
    if (tokens <= S::kLanes) return csr_rows_of<S, 1>(matrix, values, x, tokens, y);
    csr_rows_of<S, static_cast<int>(csr::kTokens) / S::kLanes>(matrix, values, x, tokens, y);
}

// Products of output gradients [kGroups][rows][32] and inputs [kGroups][cols][32] at the positions of rows [begin, end),
// summed over all tokens; `more`: added to what out holds.
template <class S, int kGroups>
void csr_dots_of(const CsrMatrix& matrix, const float* gy, const float* x, std::int64_t begin, std::int64_t end, bool more,
                 float* out) {
    using F = typename S::F;
    constexpr int kLanes = S::kLanes, kVectors = static_cast<int>(csr::kTokens) / kLanes;
    const std::int64_t gy_step = matrix.rows * csr::kTokens, x_step = matrix.cols * csr::kTokens;
    for (std::int64_t r = begin; r < end; ++r) {
        std::int64_t e = matrix.rowptr[r];
        const std::int64_t last = matrix.rowptr[r + 1];
        if (e == last) continue;
        F row[kGroups][kVectors];
        for (int g = 0; g < kGroups; ++g) {
            for (int i = 0; i < kVectors; ++i) row[g][i] = S::load(gy + g * gy_step + r * csr::kTokens + i * kLanes);
        }
        for (; e < last; ++e) {
            const float* channel = x + matrix.columns[e] * csr::kTokens;
            F sums[2] = {S::zero(), S::zero()};
            GOSSAMER_UNROLL(2)
            for (int g = 0; g < kGroups; ++g) {
                GOSSAMER_UNROLL(8)
                for (int i = 0; i < kVectors; ++i) {
                    sums[i % 2] = S::fma(row[g][i], S::load(channel + g * x_step + i * kLanes), sums[i % 2]);
                }
            }
            const float sum = S::sum(S::add(sums[0], sums[1]));
            out[e] = more ? out[e] + sum : sum;
        }
    }
}

// The same of any number of groups, two at a time.
template <class S>
void csr_dots(const CsrMatrix& matrix, const float* gy, const float* x, std::int64_t groups, std::int64_t begin,
              std::int64_t end, bool more, float* out) {
    const std::int64_t gy_step = matrix.rows * csr::kTokens, x_step = matrix.cols * csr::kTokens;
    std::int64_t g = 0;
    for (; g + 2 <= groups; g += 2, more = true) {
        csr_dots_of<S, 2>(matrix, gy + g * gy_step, x + g * x_step, begin, end, more, out);
    }
    if (g < groups) csr_dots_of<S, 1>(matrix, gy + g * gy_step, x + g * x_step, begin, end, more, out);
}

}  // namespace
}  // namespace gossamer
