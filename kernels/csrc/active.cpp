#include "active.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "dual.h"
#include "work.h"

namespace gossamer {
namespace {

constexpr std::int64_t kSplit = 64;  // outputs; whole lines of the narrowest dtype

dual::Header header_of(const void* packed) {
    dual::Header header;
    std::memcpy(&header, packed, sizeof header);
    return header;
}

// Matrices of up to this many outputs are cut into parts of their channels, so that a thread reads whole rows: rows of 4 KiB
// in halves took 1.5 times as long. The parts depend on the shape alone, and so do the sums: bits are the same for
// any number of threads. Wider matrices are cut by outputs only.
constexpr std::int64_t kNarrow = 4096, kFewChannels = 512;
constexpr int kParts = 4;

// One part of a matrix: some of its channels, all of its outputs.
struct Piece {
    const ActiveMatrix* matrix;
    const void* bias;  // of the first part only
    std::int64_t first, count;       // active channels
    std::int64_t units, unit_bytes;  // what threads are given: units of outputs, and the bytes of one
    float* sums;                     // nullptr: of a matrix in one part, whose y is written at once
    std::int64_t all() const { return units * unit_bytes; }
    // Units that begin before byte `at` of this piece.
    std::int64_t before(std::int64_t at) const { return at >= all() ? units : at <= 0 ? 0 : at / unit_bytes; }
};

int parts_of(const ActiveMatrix& matrix, std::int64_t channels) {
    return matrix.outputs <= kNarrow && channels >= kFewChannels ? kParts : 1;
}

// Part number `part` of `parts` of a matrix.
Piece piece_of(const ActiveMatrix& matrix, int dtype, const Active& found, std::int64_t channels, int part, int parts) {
    const auto at = [&](int p) {
        return std::lower_bound(found.channels, found.channels + found.count, channels * p / parts) - found.channels;
    };
    Piece piece{&matrix, part == 0 ? matrix.bias : nullptr, at(part), 0, 0, 0, nullptr};
    piece.count = (part + 1 == parts ? found.count : at(part + 1)) - piece.first;
    if (!matrix.packed) {
        piece.units = (matrix.outputs + kSplit - 1) / kSplit;
        piece.unit_bytes = piece.count * kSplit * element_size(dtype);
    } else {
        const dual::Header header = header_of(matrix.weight);
        piece.units = dual::Shape(header.rows, header.cols).panels;
        // The active share of the bytes.
        if (piece.units > 0 && header.cols > 0) {
            piece.unit_bytes = (header.size - header.stream) / header.cols * piece.count / piece.units;
        }
    }
    piece.unit_bytes = std::max<std::int64_t>(piece.unit_bytes, 1);  // outputs are written even when nothing is read
    return piece;
}

// Units [begin, end) of a piece.
void run_units(const Tier& tier, int dtype, const Piece& piece, const Active& found, int batch, std::int64_t begin,
               std::int64_t end) {
    if (begin >= end) return;
    const ActiveMatrix& matrix = *piece.matrix;
    const std::int32_t* active = found.channels + piece.first;
    const float* x = found.x + piece.first * padded_batch(batch);
    if (!matrix.packed) {
        const ChannelCall call{matrix.weight, matrix.outputs, active,      piece.count, x,
                               batch,         matrix.y,       piece.bias,  piece.sums};
        tier.channel_run(dtype, call, begin * kSplit, std::min(matrix.outputs, end * kSplit));
        return;
    }
    const dual::Header header = header_of(matrix.weight);
    const auto* packed = static_cast<const std::uint8_t*>(matrix.weight);
    const DualCall call{reinterpret_cast<const std::int32_t*>(packed + sizeof header),
                        reinterpret_cast<const std::uint16_t*>(packed + header.stream),
                        header.cols,
                        header.rows,
                        dual::Shape(header.rows, header.cols).panels,
                        active,
                        piece.count,
                        x,
                        batch,
                        matrix.y,
                        piece.bias,
                        piece.sums};
    tier.dual_run(dtype, call, begin, end);
}

// Pieces in the order in which threads take them: first the first part of every matrix.
struct Plan {
    std::vector<Piece> pieces;
    std::vector<std::int64_t> edges;  // bytes behind all first parts, all second ones, ...
    std::int64_t bytes = 0;
    // Where the stretch of thread `part` begins: at a near edge, rather than with a sliver of the part before it.
    std::int64_t cut(int part, int parts) const {
        const std::int64_t even = bytes * part / parts;
        for (const std::int64_t edge : edges) {
            if (std::abs(edge - even) <= bytes / (16 * parts)) return edge;
        }
        return even;
    }
};

}  // namespace

std::int64_t active_gemv(const Tier& tier, int dtype, const void* x, int batch, std::int64_t channels,
                         const float* threshold, const float* center, const ActiveMatrix* matrices, int count,
                         int threads) {
    if (center != nullptr) {
        std::uint8_t* moved = scratch<2>(batch * channels * element_size(dtype));
        tier.subtract(dtype, x, center, batch, channels, moved);
        x = moved;
    }
    const Active found = compact<0>(tier, dtype, x, batch, channels, threshold);
    std::int64_t floats = 0;
    for (int i = 0; i < count; ++i) {
        const int parts = parts_of(matrices[i], channels);
        if (parts > 1) floats += parts * batch * sums_stride(matrices[i].outputs);
    }
    auto* const all_sums = reinterpret_cast<float*>(scratch<3>(4 * floats));
    Plan plan;
    for (int part = 0; part < kParts; ++part) {
        float* sums = all_sums;
        for (int i = 0; i < count; ++i) {
            const int parts = parts_of(matrices[i], channels);
            const std::int64_t size = batch * sums_stride(matrices[i].outputs);
            if (part < parts) {
                plan.pieces.push_back(piece_of(matrices[i], dtype, found, channels, part, parts));
                if (parts > 1) plan.pieces.back().sums = sums + part * size;
                plan.bytes += plan.pieces.back().all();
            }
            if (parts > 1) sums += parts * size;
        }
        plan.edges.push_back(plan.bytes);
    }
    const int parts = parts_for(plan.bytes, threads);
    // Each thread takes one stretch of the pieces laid end to end.
    in_parts(parts, [&](int part) {
        std::int64_t begin = part == 0 ? 0 : plan.cut(part, parts);
        std::int64_t end = part + 1 == parts ? plan.bytes : plan.cut(part + 1, parts);
        for (const Piece& piece : plan.pieces) {
            run_units(tier, dtype, piece, found, batch, piece.before(begin), piece.before(end));
            begin -= piece.all(), end -= piece.all();
        }
    });
    const float* sums = all_sums;
    for (int i = 0; i < count; ++i) {
        const int made = parts_of(matrices[i], channels);
        if (made == 1) continue;
        const FinishCall call{sums, made, batch, matrices[i].outputs, matrices[i].y};
        (matrices[i].packed ? tier.dual_finish : tier.channel_finish)(dtype, call);
        sums += made * batch * sums_stride(matrices[i].outputs);
    }
    return found.count;
}

void dual_expand(const Tier& tier, const std::uint8_t* packed, std::uint16_t* weight_t, int threads) {
    const dual::Header header = header_of(packed);
    const auto* offsets = reinterpret_cast<const std::int32_t*>(packed + sizeof header);
    const auto* stream = reinterpret_cast<const std::uint16_t*>(packed + header.stream);
    const int parts = parts_for(2 * header.rows * header.cols, threads);
    in_parts(parts, [&](int part) {
        for (std::int64_t c = header.cols * part / parts; c < header.cols * (part + 1) / parts; ++c) {
            const std::uint16_t* at = stream + offsets[c];
            std::uint16_t* row = weight_t + c * header.rows;
            for (std::int64_t o = 0; o < header.rows; o += dual::kBlock) {
                std::uint8_t mask[tiles::kCols / 8] = {};  // of a longer row, whose rest is empty
                std::uint16_t values[tiles::kCols];
                std::memcpy(mask, at, 2 * dual::kMaskWords);
                at = tier.expand_row(mask, at + dual::kMaskWords, values);
                std::memcpy(row + o, values, static_cast<std::size_t>(2 * std::min(dual::kBlock, header.rows - o)));
            }
        }
    });
}

}  // namespace gossamer
