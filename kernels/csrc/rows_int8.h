// Tiles of int8 values with a float16 scale per row (rows_bitmask.h has those of 16-bit floats) times x, which is
// quantised here: kernels/int8_gemv/reference.py defines every number. Written once for all tiers.
//
// The sums of a tile's four rows with B rows of x come in B quads: number r * B + b of all is row r with row b of x.
// A format I gives: X (an element of quantised x), Quad (4 floats), Ints (4 int32), load and store of Quads,
// scales(at) -> Quad (4 float16 at any address), spread<B>(q, Quad of the rows' scales) -> the scales of quad q,
// add(Quad sums, Ints, Quad w, Quad x) -> sums + (Ints * w) * x with every operation rounded,
// dots<B>(masks, values, x, stride, corrections, Ints[B]) -> address behind the values; it may read 64 bytes from there.
#pragma once

#include <limits>

#include "float16.h"
#include "gemv.h"
#include "unroll.h"

namespace gossamer {
namespace {

// Where the parts of prepared x lie.
struct Int8Room {
    std::int64_t groups, stride, rows, lanes;
    Int8Room(std::int64_t cols, int batch, std::int64_t element)
        : groups((cols + tiles::kCols - 1) / tiles::kCols),
          stride(groups * tiles::kCols * element),
          rows(padded_batch(batch)),
          lanes(rows < 4 ? 4 : rows) {}
    std::int64_t scales() const { return stride * rows; }
    std::int64_t corrections() const { return scales() + 4 * groups * lanes; }
    std::int64_t bytes() const { return corrections() + 4 * groups * lanes; }
};

// One group of 128 numbers, zeros beyond the matrix. Returns the scale; `total` is the sum of what was written.
template <class X>
float int8_quantise(const float* x, X* out, std::int32_t* total) {
    constexpr int kCount = static_cast<int>(tiles::kCols);
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
    std::int32_t largest = 0;              // of |x|, compared as integers: NaN above infinity above all numbers
    for (int i = 0; i < kCount; ++i) {
        const auto size = static_cast<std::int32_t>(bits_of(x[i]) & 0x7FFFFFFFu);
        largest = size > largest ? size : largest;
    }
    const float size = float_of(static_cast<std::uint32_t>(largest));
    const bool finite = largest < 0x7F800000;
    *total = 0;
    if (!finite || largest < 0x0D800000) {  // below 2^-100: zero
        for (int i = 0; i < kCount; ++i) out[i] = 0;
        return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const float inverse = 127.0f / size;
    std::int32_t sum = 0;
    for (int i = 0; i < kCount; ++i) {
        const std::int32_t q = static_cast<std::int32_t>(bits_of(x[i] * inverse + kRound)) -
                               static_cast<std::int32_t>(0x4B400000);
        out[i] = static_cast<X>(q);
        sum += q;
    }
    *total = sum;
    return size / 127.0f;
}

template <class I, class W>
void int8_prepare(const W* x, std::uint8_t* prepared, Int8Call* call) {
    using X = typename I::X;
    const Int8Room room(call->cols, call->batch, sizeof(X));
    auto* scales = reinterpret_cast<float*>(prepared + room.scales());
    auto* corrections = reinterpret_cast<std::int32_t*>(prepared + room.corrections());
    for (std::int64_t b = 0; b < room.rows; ++b) {
        auto* out = reinterpret_cast<X*>(prepared + b * room.stride);
        for (std::int64_t g = 0; g < room.groups; ++g) {
            const std::int64_t first = g * tiles::kCols, left = b < call->batch ? call->cols - first : 0;
            float group[tiles::kCols] = {};
            const W* from = left > 0 ? x + b * call->cols + first : x;
            if (left >= tiles::kCols) {
                for (int i = 0; i < tiles::kCols; ++i) group[i] = widen(from[i]);
            } else {
                for (std::int64_t i = 0; i < left; ++i) group[i] = widen(from[i]);
            }
            std::int32_t total;
            const float scale = int8_quantise(group, out + first, &total);
            for (std::int64_t lane = b; lane < room.lanes; lane += room.rows) {
                scales[g * room.lanes + lane] = scale;
                corrections[g * room.lanes + lane] = 128 * total;
            }
        }
    }
    call->x = prepared, call->stride = room.stride, call->scales = scales, call->corrections = corrections;
}

// One row tile of a panel: `count` tiles from `at` on, added to sums [4][B] in the order of their columns.
template <class I, int B>
const std::uint8_t* int8_row_tile(const std::uint8_t* at, std::int64_t count, const std::uint8_t* x,
                                  std::int64_t stride, const float* scales, const std::int32_t* corrections,
                                  float* sums) {
    constexpr int kLanes = B < 4 ? 4 : B;
    constexpr std::int64_t kBytes = tiles::kCols * sizeof(typename I::X);
    typename I::Quad acc[B];
    for (int q = 0; q < B; ++q) acc[q] = I::load(sums + 4 * q);
    for (std::int64_t t = 0; t < count; ++t, x += kBytes, scales += kLanes, corrections += kLanes) {
        typename I::Ints dots[B];
        const auto w = I::scales(at + tiles::kMaskBytes);
        at = I::template dots<B>(at, at + tiles::kMaskBytes + tiles::kScaleBytes, x, stride, corrections, dots);
        GOSSAMER_UNROLL(8)
        for (int q = 0; q < B; ++q) {
            acc[q] = I::add(acc[q], dots[q], I::template spread<B>(q, w), I::load(scales + 4 * q % kLanes));
        }
    }
    for (int q = 0; q < B; ++q) I::store(sums + 4 * q, acc[q]);
    return at;
}

template <class I, int B>
void int8_tiles_of(const Int8Call& call, std::int64_t begin, std::int64_t end) {
    constexpr int kRows = static_cast<int>(tiles::kRows), kLanes = B < 4 ? 4 : B;
    const auto for_sums = [&](std::int64_t tile, auto visit) {  // visit(sum of the call, its number in the tile)
        for (int r = 0; r < kRows && tile * kRows + r < call.rows; ++r) {
            for (int b = 0; b < B && b < call.batch; ++b) visit(call.sums + b * call.rows + tile * kRows + r, r * B + b);
        }
    };
    for (std::int64_t tile = begin; tile < end; ++tile) for_sums(tile, [](float* sum, int) { *sum = 0.0f; });
    for (std::int64_t panel = 0; panel < call.panels; ++panel) {
        const std::int64_t first = panel * call.panel_cols, left = call.cols - first;
        const std::int64_t cols = left < call.panel_cols ? left : call.panel_cols;
        const std::int64_t count = (cols + tiles::kCols - 1) / tiles::kCols, group = first / tiles::kCols;
        const std::uint8_t* x = call.x + first * static_cast<std::int64_t>(sizeof(typename I::X));
        const std::uint8_t* at = call.stream + call.offsets[panel * call.row_tiles + begin];
        for (std::int64_t tile = begin; tile < end; ++tile) {
            float sums[kRows * B] = {};
            for_sums(tile, [&](float* sum, int i) { sums[i] = *sum; });
            at = int8_row_tile<I, B>(at, count, x, call.stride, call.scales + group * kLanes,
                                     call.corrections + group * kLanes, sums);
            for_sums(tile, [&](float* sum, int i) { *sum = sums[i]; });
        }
    }
}

template <class I>
void int8_tiles(const Int8Call& call, std::int64_t begin, std::int64_t end) {
    switch (padded_batch(call.batch)) {
        case 1: return int8_tiles_of<I, 1>(call, begin, end);
        case 2: return int8_tiles_of<I, 2>(call, begin, end);
        case 4: return int8_tiles_of<I, 4>(call, begin, end);
        default: return int8_tiles_of<I, 8>(call, begin, end);
    }
}

}  // namespace
}  // namespace gossamer
