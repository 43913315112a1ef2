#include "gemv.h"

#include <algorithm>
#include <cstring>

#include "work.h"

namespace gossamer {
namespace {

// Rows [begin, end) of the sums [batch, rows] to y.
void store(const Tier& tier, int dtype, const float* sums, int batch, std::int64_t rows, std::int64_t begin,
           std::int64_t end, void* y) {
    if (begin >= end) return;
    for (int b = 0; b < batch; ++b) {
        auto* to = static_cast<std::uint8_t*>(y) + (b * rows + begin) * element_size(dtype);
        tier.narrow(dtype, sums + b * rows + begin, end - begin, to);
    }
}

// First row tile whose bytes, over all panels, begin at or after `share` of all bytes.
template <class Call>
std::int64_t tile_at(const Call& call, std::int64_t part, std::int64_t parts) {
    const auto bytes_before = [&](std::int64_t tile) {
        std::int64_t total = 0;
        for (std::int64_t panel = 0; panel < call.panels; ++panel) {
            const std::int64_t* row = call.offsets + panel * call.row_tiles;
            total += row[tile] - row[0];
        }
        return total;
    };
    const std::int64_t wanted = bytes_before(call.row_tiles) / parts * part;
    std::int64_t low = 0, high = call.row_tiles;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (bytes_before(middle) < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

tiles::Header header_of(const std::uint8_t* packed) {
    tiles::Header header;
    std::memcpy(&header, packed, sizeof header);
    return header;
}

BitmaskCall bitmask_call(const std::uint8_t* packed, const Prepared& x, int batch, float* sums) {
    const tiles::Header header = header_of(packed);
    const tiles::Shape shape(header.rows, header.cols);
    BitmaskCall call{};
    call.offsets = reinterpret_cast<const std::int64_t*>(packed + sizeof header);
    call.stream = reinterpret_cast<const std::uint16_t*>(packed + header.stream);
    call.rows = shape.rows, call.cols = shape.cols, call.row_tiles = shape.row_tiles;
    call.panels = shape.panels, call.panel_cols = shape.panel_cols;
    call.x = x.rows, call.stride = x.stride, call.batch = batch, call.sums = sums;
    return call;
}

// One of `parts` shares of a matrix, with equal bytes.
void run_share(const Tier& tier, int dtype, const Matrix& matrix, const BitmaskCall& call, int part, int parts) {
    const std::int64_t begin = part == 0 ? 0 : tile_at(call, part, parts);
    const std::int64_t end = part + 1 == parts ? call.row_tiles : tile_at(call, part + 1, parts);
    tier.bitmask_run(dtype, call, begin, end);
    store(tier, dtype, call.sums, call.batch, call.rows, begin * tiles::kRows,
          std::min(call.rows, end * tiles::kRows), matrix.y);
}

void run_share(const Tier& tier, int dtype, const Matrix& matrix, const DenseCall& call, int part, int parts) {
    const std::int64_t begin = call.rows * part / parts, end = call.rows * (part + 1) / parts;
    tier.dense_run(dtype, call, begin, end);
    store(tier, dtype, call.sums, call.batch, call.rows, begin, end, matrix.y);
}

}  // namespace

void gemv(const Tier& tier, int dtype, const void* x, int batch, std::int64_t cols, const Matrix* matrices, int count,
          int threads) {
    Prepared dense, bitmask;
    std::int64_t bytes = 0, rows = 0;
    for (int i = 0; i < count; ++i) {
        const Matrix& matrix = matrices[i];
        rows += matrix.rows;
        if (matrix.packed) {
            bytes += header_of(static_cast<const std::uint8_t*>(matrix.weight)).size;
            if (bitmask.rows == nullptr) {
                bitmask = prepare<0>(tier.bitmask_row, tier.bitmask_prepare, dtype, x, batch, cols);
            }
        } else {
            bytes += matrix.rows * cols * element_size(dtype);
            if (dense.rows == nullptr) dense = prepare<2>(tier.dense_row, tier.dense_prepare, dtype, x, batch, cols);
        }
    }
    auto* all_sums = reinterpret_cast<float*>(scratch<1>(4 * rows * batch));
    const int parts = parts_for(bytes, threads);
    in_parts(parts, [&](int part) {
        float* sums = all_sums;
        for (int i = 0; i < count; ++i) {
            const Matrix& matrix = matrices[i];
            if (matrix.packed) {
                const auto* packed = static_cast<const std::uint8_t*>(matrix.weight);
                run_share(tier, dtype, matrix, bitmask_call(packed, bitmask, batch, sums), part, parts);
            } else {
                const DenseCall call{matrix.weight, matrix.rows, cols, dense.rows, dense.stride, batch, sums};
                run_share(tier, dtype, matrix, call, part, parts);
            }
            sums += matrix.rows * batch;
        }
    });
}

void expand(const Tier& tier, const std::uint8_t* packed, std::uint16_t* weight, int threads) {
    const tiles::Header header = header_of(packed);
    const BitmaskCall call = bitmask_call(packed, {}, 0, nullptr);
    if (call.panels == 0) return;
    const int parts = parts_for(2 * header.rows * header.cols, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = part == 0 ? 0 : tile_at(call, part, parts);
        const std::int64_t end = part + 1 == parts ? call.row_tiles : tile_at(call, part + 1, parts);
        std::uint16_t last[tiles::kCols];
        for (std::int64_t panel = 0; panel < call.panels && begin < end; ++panel) {
            const std::int64_t first = panel * call.panel_cols, limit = std::min(call.cols, first + call.panel_cols);
            const std::uint16_t* values = call.stream + call.offsets[panel * call.row_tiles + begin];
            for (std::int64_t row = begin * tiles::kRows; row < end * tiles::kRows; row += tiles::kRows) {
                for (std::int64_t column = first; column < limit; column += tiles::kCols) {
                    const auto* masks = reinterpret_cast<const std::uint8_t*>(values);
                    const std::int64_t columns = std::min(tiles::kCols, limit - column);
                    values += tiles::kMaskBytes / 2;
                    for (std::int64_t r = 0; r < tiles::kRows; ++r, masks += tiles::kCols / 8) {
                        if (row + r >= call.rows) break;  // rows beyond the matrix have no values
                        std::uint16_t* to = weight + (row + r) * call.cols + column;
                        values = tier.expand_row(masks, values, columns == tiles::kCols ? to : last);
                        if (columns < tiles::kCols) std::memcpy(to, last, static_cast<std::size_t>(2 * columns));
                    }
                }
            }
        }
    });
}

void int8_gemv(const Tier& tier, int dtype, const void* x, int batch, const std::uint8_t* packed, void* y,
               int threads) {
    const tiles::Header header = header_of(packed);
    const tiles::Shape shape(header.rows, header.cols, header.dtype);
    Int8Call call{};
    call.offsets = reinterpret_cast<const std::int64_t*>(packed + sizeof header);
    call.stream = packed + header.stream;
    call.rows = shape.rows, call.cols = shape.cols, call.row_tiles = shape.row_tiles;
    call.panels = shape.panels, call.panel_cols = shape.panel_cols, call.batch = batch;
    tier.int8_prepare(dtype, x, scratch<0>(tier.int8_bytes(batch, shape.cols)), &call);
    call.sums = reinterpret_cast<float*>(scratch<1>(4 * shape.rows * batch));
    const int parts = parts_for(header.size, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = part == 0 ? 0 : tile_at(call, part, parts);
        const std::int64_t end = part + 1 == parts ? call.row_tiles : tile_at(call, part + 1, parts);
        tier.int8_run(call, begin, end);
        store(tier, dtype, call.sums, batch, shape.rows, begin * tiles::kRows,
              std::min(shape.rows, end * tiles::kRows), y);
    });
}

}  // namespace gossamer
