// Dense rows times prepared x, written once for all tiers.
//
// A format D gives: W (the weight's element), S (the vector unit), kStep (weights per step), kXBytes (bytes of prepared
// x per weight), V and load(w) -> V (kStep weights), mul(acc, V, x) -> acc + partial sums of their products, and
// prepare_step(x, out), and kTogether: rows that are read side by side, with one row of x, or fewer with more.
// D is a type of the including file's unnamed namespace, so every tier gets code of its own.
#pragma once

#include "gemv.h"
#include "unroll.h"

namespace gossamer {

template <class D>
std::int64_t dense_row_bytes(std::int64_t cols) {
    return (cols + D::kStep - 1) / D::kStep * D::kStep * D::kXBytes;
}

template <class D>
void dense_prepare_row(const void* x, std::int64_t cols, std::uint8_t* out) {
    using W = typename D::W;
    const W* from = static_cast<const W*>(x);
    std::int64_t k = 0;
    for (; k + D::kStep <= cols; k += D::kStep) D::prepare_step(from + k, out + k * D::kXBytes);
    if (k == cols) return;
    W last[D::kStep] = {};
    for (std::int64_t i = k; i < cols; ++i) last[i - k] = from[i];
    D::prepare_step(last, out + k * D::kXBytes);
}

// Weights between one that is read and the one that is asked for.
template <class D>
std::int64_t scattered_ahead(std::int64_t cols) {
    constexpr std::int64_t kAhead = 8192 / sizeof(typename D::W);
    return cols < kAhead ? cols : kAhead;
}

// Chains of sums per row: as many as hide the latency of an addition and, with several rows at once, find a register each.
template <class D>
constexpr int dense_chains() {
    return D::kTogether == 1 ? 4 : 2;
}

// kRows rows side by side times B rows of x. The chains of a row are always summed in the same order, so its bits do not
// depend on its company. Rows that follow each other are left to the processor's own prefetchers: asking for memory ahead
// made them slower, 1.4 times in large pages. Other rows are not: with kScattered, memory is asked for 8 KiB ahead, or a
// row if that is less, into the second-level cache, at the end of a row in `next`.
template <class D, int B, int kRows, bool kScattered>
void dense_side_by_side(const typename D::W* const* rows, std::int64_t cols, const std::uint8_t* x, std::int64_t stride,
                        float (*out)[B], const typename D::W* const* next) {
    using W = typename D::W;
    using F = typename D::S::F;
    constexpr int kStep = D::kStep, kBytes = D::kStep * D::kXBytes, kChains = dense_chains<D>();
    const std::int64_t far = scattered_ahead<D>(cols);
    constexpr int kLines = kStep * sizeof(W) > 64 ? kStep * sizeof(W) / 64 : 1;
    F acc[kRows][B][kChains];
    for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < B; ++b) {
            for (int i = 0; i < kChains; ++i) acc[r][b][i] = D::S::zero();
        }
    }
    std::int64_t k = 0;
    for (; k + kChains * kStep <= cols; k += kChains * kStep, x += kChains * kBytes) {
        for (int i = 0; i < kChains; ++i) {
            GOSSAMER_UNROLL(4)
            for (int r = 0; r < kRows; ++r) {
                const auto v = D::load(rows[r] + k + i * kStep);
                if (kScattered && i * sizeof(W) * kStep % 64 == 0) {
                    const W* ahead = k + far < cols ? rows[r] + k + far : next[r] + (k + far - cols);
                    ask_for(ahead + i * kStep, kLines);
                }
                GOSSAMER_UNROLL(8)
                for (int b = 0; b < B; ++b) acc[r][b][i] = D::mul(acc[r][b][i], v, x + b * stride + i * kBytes);
            }
        }
    }
    for (; k + kStep <= cols; k += kStep, x += kBytes) {
        for (int r = 0; r < kRows; ++r) {
            const auto v = D::load(rows[r] + k);
            for (int b = 0; b < B; ++b) acc[r][b][0] = D::mul(acc[r][b][0], v, x + b * stride);
        }
    }
    if (k < cols) {
        for (int r = 0; r < kRows; ++r) {
            W last[kStep] = {};
            for (std::int64_t i = k; i < cols; ++i) last[i - k] = rows[r][i];
            const auto v = D::load(last);
            for (int b = 0; b < B; ++b) acc[r][b][1] = D::mul(acc[r][b][1], v, x + b * stride);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < B; ++b) {
            F sum = D::S::add(acc[r][b][0], acc[r][b][1]);
            if constexpr (kChains == 4) sum = D::S::add(sum, D::S::add(acc[r][b][2], acc[r][b][3]));
            out[r][b] = D::S::sum(sum);
        }
    }
}

// Rows [begin, end) and `B` rows of x from `first` on, kRows at a time. Returns the first row that is left.
template <class D, int B, int kRows>
std::int64_t dense_rows_of(const DenseCall& call, int first, std::int64_t begin, std::int64_t end) {
    const auto* weight = static_cast<const typename D::W*>(call.weight);
    std::int64_t r = begin;
    for (; r + kRows <= end; r += kRows) {
        const typename D::W* rows[kRows];
        for (int i = 0; i < kRows; ++i) rows[i] = weight + (r + i) * call.cols;
        float out[kRows][B];
        dense_side_by_side<D, B, kRows, false>(rows, call.cols, call.x + first * call.stride, call.stride, out, nullptr);
        for (int i = 0; i < kRows; ++i) {
            for (int b = 0; b < B && first + b < call.batch; ++b) call.sums[(first + b) * call.rows + r + i] = out[i][b];
        }
    }
    return r;
}

template <class D, int B>
void dense_rows_of(const DenseCall& call, int first, std::int64_t begin, std::int64_t end) {
    if constexpr (D::kTogether > B) begin = dense_rows_of<D, B, D::kTogether / B>(call, first, begin, end);
    dense_rows_of<D, B, 1>(call, first, begin, end);
}

template <class D>
void dense_rows(const DenseCall& call, std::int64_t begin, std::int64_t end) {
    switch (padded_batch(call.batch)) {
        case 1: return dense_rows_of<D, 1>(call, 0, begin, end);
        case 2: return dense_rows_of<D, 2>(call, 0, begin, end);
        case 4: return dense_rows_of<D, 4>(call, 0, begin, end);
        default: break;
    }
    // Eight rows of x take more accumulators than there are registers: a block of weights is read twice, the second
    // time from the cache.
    const std::int64_t block = call.cols == 0 ? end - begin : 1 + 65536 / (call.cols * sizeof(typename D::W));
    for (std::int64_t r = begin; r < end; r += block) {
        const std::int64_t last = r + block < end ? r + block : end;
        dense_rows_of<D, 4>(call, 0, r, last);
        dense_rows_of<D, 4>(call, 4, r, last);
    }
}

}  // namespace gossamer
