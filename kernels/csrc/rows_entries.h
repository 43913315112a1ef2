// Of rows of a float32 matrix: sums of squares, and which entries are beyond a limit. Written once for all vector units S
// of the tiers.
#pragma once

#include <cmath>

#include "entries.h"
#include "gemv.h"
#include "unroll.h"

namespace gossamer {
namespace {

// Sums of squares of rows [rows] and of columns [cols].
template <class S>
void square_sums(const float* matrix, std::int64_t rows, std::int64_t cols, float* row_sums, float* col_sums) {
    using F = typename S::F;
    constexpr int kChains = 4, kLanes = S::kLanes;
    for (std::int64_t c = 0; c < cols; ++c) col_sums[c] = 0.0f;
    for (std::int64_t r = 0; r < rows; ++r, matrix += cols) {
        F sums[kChains];
        for (F& sum : sums) sum = S::zero();
        std::int64_t c = 0;
        for (; c + kChains * kLanes <= cols; c += kChains * kLanes) {
            GOSSAMER_UNROLL(4)
            for (int i = 0; i < kChains; ++i) {
                const F v = S::load(matrix + c + i * kLanes);
                sums[i] = S::fma(v, v, sums[i]);
                S::store(col_sums + c + i * kLanes, S::fma(v, v, S::load(col_sums + c + i * kLanes)));
            }
        }
        float rest = 0.0f;
        for (; c < cols; ++c) {
            const float square = matrix[c] * matrix[c];
            rest += square;
            col_sums[c] += square;
        }
        row_sums[r] = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]))) + rest;
    }
}

// Entries of one row with |v w| > floor, rising, and their v w; w is 1 or (of the column) times (of the row). Returns
// their number; without `position` that is all.
template <class S, bool kWeighted>
std::int64_t beyond_of(const EntryRow& row, std::int64_t* position, float* value) {
    using F = typename S::F;
    constexpr int kLanes = S::kLanes;
    const F limit = S::set1(row.floor), scale = S::set1(row.weight);
    std::int64_t count = 0;
    const auto look = [&](std::int64_t c) {
        const float weighted = kWeighted ? row.values[c] * row.weights[c] * row.weight : row.values[c];
        if (!(std::fabs(weighted) > row.floor)) return;  // vectors let pass what is not a number
        if (position != nullptr) position[count] = row.first + c, value[count] = weighted;
        ++count;
    };
    std::int64_t c = 0;
    for (; c + kLanes <= row.cols; c += kLanes) {
        F v = S::load(row.values + c);
        if (kWeighted) v = S::fma(S::fma(v, S::load(row.weights + c), S::zero()), scale, S::zero());
        const unsigned bits = S::exceed(v, limit);
        for (int i = 0; bits >> i != 0; ++i) {
            if (bits >> i & 1u) look(c + i);
        }
    }
    for (; c < row.cols; ++c) look(c);
    return count;
}

template <class S>
std::int64_t beyond(const EntryRow& row, std::int64_t* position, float* value) {
    return row.weights == nullptr ? beyond_of<S, false>(row, position, value) : beyond_of<S, true>(row, position, value);
}

}  // namespace
}  // namespace gossamer
