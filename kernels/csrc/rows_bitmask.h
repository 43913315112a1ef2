// Tiles of 4 rows x 128 columns (masks, then kept values) times prepared x, written once for all tiers.
//
// A format M gives: S (the vector unit), kStep (columns per step), kXBytes, V (kStep weights, zeros where nothing is
// kept), row(mask, values, use), which calls use(i, V) for every step of a row's 128 columns and returns the address
// behind its values, mul(acc, V, x), prepare_step(x, out), W, kChains, kBatch.
// kChains: sums that a row's steps take turns in, added up at its end. One sum is a chain of multiplications, each of
// which waits for the one before: two were 1.2 times as fast as one with AVX2's 16 steps (Zen 3).
// kBatch: rows of x whose sums fit into registers; more of them take the tiles again, out of the cache.
// row may read 64 bytes beyond the last kept value: the packed tensor ends with that many. It should find the values of
// every step from the mask alone: adding up the steps' counts one after the other is a chain of dependent instructions,
// and was measured to take 1.5 times as long on AVX-512.
#pragma once

#include "gemv.h"
#include "unroll.h"

namespace gossamer {

template <class M>
std::int64_t bitmask_row_bytes(std::int64_t cols) {
    return (cols + tiles::kCols - 1) / tiles::kCols * tiles::kCols * M::kXBytes;
}

template <class M>
void bitmask_prepare_row(const void* x, std::int64_t cols, std::uint8_t* out) {
    using W = typename M::W;
    const W* from = static_cast<const W*>(x);
    const std::int64_t padded = (cols + tiles::kCols - 1) / tiles::kCols * tiles::kCols;
    for (std::int64_t k = 0; k < padded; k += M::kStep) {
        if (k + M::kStep <= cols) {
            M::prepare_step(from + k, out + k * M::kXBytes);
            continue;
        }
        W last[M::kStep] = {};
        for (std::int64_t i = k; i < cols; ++i) last[i - k] = from[i];
        M::prepare_step(last, out + k * M::kXBytes);
    }
}

// One row tile of a panel: `count` tiles from `values` on. Sums go to out [4][B]. Nothing is asked for ahead: at any
// distance that was 1.05 to 1.2 times as slow as what the processor's own prefetchers do.
template <class M, int B>
const std::uint16_t* bitmask_row_tile(const std::uint16_t* values, std::int64_t count, const std::uint8_t* x,
                                      std::int64_t stride, float (*out)[B]) {
    using F = typename M::S::F;
    constexpr int kSteps = static_cast<int>(tiles::kCols) / M::kStep, kBytes = M::kStep * M::kXBytes;
    constexpr int kRows = static_cast<int>(tiles::kRows);
    F acc[kRows][B];
    for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < B; ++b) acc[r][b] = M::S::zero();
    }
    for (std::int64_t t = 0; t < count; ++t, x += kSteps * kBytes) {
        const auto* masks = reinterpret_cast<const std::uint8_t*>(values);
        values += tiles::kMaskBytes / 2;
GOSSAMER_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
            F sums[B][M::kChains];
            GOSSAMER_UNROLL(8)
            for (int b = 0; b < B; ++b) {
                sums[b][0] = acc[r][b];
                for (int c = 1; c < M::kChains; ++c) sums[b][c] = M::S::zero();
            }
            values = M::row(masks + r * (tiles::kCols / 8), values, [&](int i, typename M::V v) {
                GOSSAMER_UNROLL(8)
                for (int b = 0; b < B; ++b) {
                    F& sum = sums[b][i % M::kChains];
                    sum = M::mul(sum, v, x + b * stride + i * kBytes);
                }
            });
            GOSSAMER_UNROLL(8)
            for (int b = 0; b < B; ++b) {
                acc[r][b] = sums[b][0];
                for (int c = 1; c < M::kChains; ++c) acc[r][b] = M::S::add(acc[r][b], sums[b][c]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < B; ++b) out[r][b] = M::S::sum(acc[r][b]);
    }
    return values;
}

template <class M, int B>
void bitmask_tiles_of(const BitmaskCall& call, std::int64_t begin, std::int64_t end) {
    constexpr int kPart = B < M::kBatch ? B : M::kBatch;
    if (call.panels == 0) {
        for (int b = 0; b < call.batch; ++b) {
            for (std::int64_t r = begin * tiles::kRows; r < end * tiles::kRows && r < call.rows; ++r) {
                call.sums[b * call.rows + r] = 0.0f;
            }
        }
    }
    for (std::int64_t panel = 0; panel < call.panels; ++panel) {
        const std::int64_t first = panel * call.panel_cols;
        const std::int64_t left = call.cols - first;
        const std::int64_t cols = left < call.panel_cols ? left : call.panel_cols;
        const std::int64_t count = (cols + tiles::kCols - 1) / tiles::kCols;
        const std::uint8_t* x = call.x + first * M::kXBytes;
        const std::uint16_t* values = call.stream + call.offsets[panel * call.row_tiles + begin];
        for (std::int64_t tile = begin; tile < end; ++tile) {
            float out[B / kPart][tiles::kRows][kPart];
            const std::uint16_t* next = values;
            for (int i = 0; i < B / kPart; ++i) {
                next = bitmask_row_tile<M, kPart>(values, count, x + i * kPart * call.stride, call.stride, out[i]);
            }
            values = next;
            const std::int64_t row = tile * tiles::kRows;
            for (int r = 0; r < tiles::kRows && row + r < call.rows; ++r) {
                for (int b = 0; b < B && b < call.batch; ++b) {
                    float* sum = call.sums + b * call.rows + row + r;
                    const float more = out[b / kPart][r][b % kPart];
                    *sum = panel == 0 ? more : *sum + more;
                }
            }
        }
    }
}

template <class M>
void bitmask_tiles(const BitmaskCall& call, std::int64_t begin, std::int64_t end) {
    switch (padded_batch(call.batch)) {
        case 1: return bitmask_tiles_of<M, 1>(call, begin, end);
        case 2: return bitmask_tiles_of<M, 2>(call, begin, end);
        case 4: return bitmask_tiles_of<M, 4>(call, begin, end);
        default: return bitmask_tiles_of<M, 8>(call, begin, end);
    }
}

}  // namespace gossamer
