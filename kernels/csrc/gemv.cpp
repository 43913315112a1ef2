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
std::int64_t tile_at(const BitmaskCall& call, std::int64_t part, std::int64_t parts) {
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

}  // namespace

void dense_gemv(const Tier& tier, int dtype, const void* x, int batch, const void* weight, std::int64_t rows,
                std::int64_t cols, void* y, int threads) {
    const Prepared made = prepare<0>(tier.dense_row, tier.dense_prepare, dtype, x, batch, cols);
    auto* sums = reinterpret_cast<float*>(scratch<1>(4 * rows * batch));
    const DenseCall call{weight, rows, cols, made.rows, made.stride, batch, sums};
    const int parts = parts_for(rows * cols * element_size(dtype), threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        tier.dense_run(dtype, call, begin, end);
        store(tier, dtype, call.sums, batch, rows, begin, end, y);
    });
}

void bitmask_gemv(const Tier& tier, const void* x, int batch, const std::uint8_t* packed, void* y, int threads) {
    tiles::Header header;
    std::memcpy(&header, packed, sizeof header);
    const tiles::Shape shape(header.rows, header.cols);
    const int dtype = static_cast<int>(header.dtype);
    BitmaskCall call{};
    call.offsets = reinterpret_cast<const std::int64_t*>(packed + sizeof header);
    call.stream = reinterpret_cast<const std::uint16_t*>(packed + header.stream);
    call.rows = shape.rows, call.cols = shape.cols, call.row_tiles = shape.row_tiles;
    call.panels = shape.panels, call.panel_cols = shape.panel_cols, call.batch = batch;
    const Prepared made = prepare<0>(tier.bitmask_row, tier.bitmask_prepare, dtype, x, batch, shape.cols);
    call.x = made.rows, call.stride = made.stride;
    call.sums = reinterpret_cast<float*>(scratch<1>(4 * shape.rows * batch));
    const int parts = parts_for(header.size, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = part == 0 ? 0 : tile_at(call, part, parts);
        const std::int64_t end = part + 1 == parts ? call.row_tiles : tile_at(call, part + 1, parts);
        tier.bitmask_run(dtype, call, begin, end);
        store(tier, dtype, call.sums, batch, shape.rows, begin * tiles::kRows,
              std::min(shape.rows, end * tiles::kRows), y);
    });
}

std::int64_t channel_gemv(const Tier& tier, int dtype, const void* x, int batch, const void* weight,
                          const float* threshold, std::int64_t channels, std::int64_t outputs, void* y, int threads) {
    constexpr std::int64_t kSplit = 64;  // outputs; whole lines of the narrowest dtype
    const Active found = compact<0>(tier, dtype, x, batch, channels, threshold);
    const ChannelCall call{weight, outputs, found.channels, found.count, found.x, batch, y};
    const int parts = parts_for(found.count * outputs * element_size(dtype), threads);
    const std::int64_t blocks = (outputs + kSplit - 1) / kSplit;
    in_parts(parts, [&](int part) {
        const std::int64_t begin = blocks * part / parts * kSplit;
        const std::int64_t end = std::min(outputs, blocks * (part + 1) / parts * kSplit);
        if (begin < end) tier.channel_run(dtype, call, begin, end);
    });
    return found.count;
}

}  // namespace gossamer
