// Dense rows times prepared x, written once for all tiers.
//
// A format D gives: W (the weight's element), S (the vector unit), kStep (weights per step), kXBytes (bytes of prepared
// x per weight), V and load(w) -> V (kStep weights), mul(acc, V, x) -> acc + partial sums of their products, and
// prepare_step(x, out).
// D is a type of the including file's unnamed namespace, so every tier gets code of its own.
#pragma once

#include "gemv.h"

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
template <class W>
inline std::int64_t scattered_ahead(std::int64_t cols) {
    constexpr std::int64_t kAhead = 8192 / sizeof(W);
    return cols < kAhead ? cols : kAhead;
}

// One row times B rows of x. Four chains of sums per row of x, always summed in the same order. Rows that follow each other
// are left to the processor's own prefetchers: asking for memory ahead made them slower, 1.4 times in large pages. Other
// rows are not: with kScattered, memory is asked for 8 KiB ahead, or a row if that is less, into the second-level cache,
// at the end of this row in `next`.
template <class D, int B, bool kScattered>
void dense_row(const typename D::W* w, std::int64_t cols, const std::uint8_t* x, std::int64_t stride, float* out,
               const typename D::W* next) {
    using F = typename D::S::F;
    constexpr int kStep = D::kStep, kBytes = D::kStep * D::kXBytes, kChains = 4;
    const std::int64_t far = scattered_ahead<typename D::W>(cols);
    constexpr int kLines = kStep * sizeof(typename D::W) > 64 ? kStep * sizeof(typename D::W) / 64 : 1;
    F acc[B][kChains];
    for (int b = 0; b < B; ++b) {
        for (int i = 0; i < kChains; ++i) acc[b][i] = D::S::zero();
    }
    std::int64_t k = 0;
    for (; k + kChains * kStep <= cols; k += kChains * kStep, x += kChains * kBytes) {
        const auto* ahead = !kScattered ? nullptr : k + far < cols ? w + k + far : next + (k + far - cols);
        for (int i = 0; i < kChains; ++i) {
            const auto v = D::load(w + k + i * kStep);
            if (kScattered && i * sizeof(typename D::W) * kStep % 64 == 0) ask_for(ahead + i * kStep, kLines);
            for (int b = 0; b < B; ++b) acc[b][i] = D::mul(acc[b][i], v, x + b * stride + i * kBytes);
        }
    }
    for (; k + kStep <= cols; k += kStep, x += kBytes) {
        const auto v = D::load(w + k);
        for (int b = 0; b < B; ++b) acc[b][0] = D::mul(acc[b][0], v, x + b * stride);
    }
    if (k < cols) {
        typename D::W last[D::kStep] = {};
        for (std::int64_t i = k; i < cols; ++i) last[i - k] = w[i];
        const auto v = D::load(last);
        for (int b = 0; b < B; ++b) acc[b][1] = D::mul(acc[b][1], v, x + b * stride);
    }
    for (int b = 0; b < B; ++b) {
        out[b] = D::S::sum(D::S::add(D::S::add(acc[b][0], acc[b][1]), D::S::add(acc[b][2], acc[b][3])));
    }
}

template <class D, int B>
void dense_rows_of(const DenseCall& call, int first, std::int64_t begin, std::int64_t end) {
    const auto* weight = static_cast<const typename D::W*>(call.weight);
    for (std::int64_t r = begin; r < end; ++r) {
        float out[B];
        const auto* x = call.x + first * call.stride;
        dense_row<D, B, false>(weight + r * call.cols, call.cols, x, call.stride, out, nullptr);
        for (int b = 0; b < B && first + b < call.batch; ++b) call.sums[(first + b) * call.rows + r] = out[b];
    }
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
