#include "active.h"

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

// What threads are given of a matrix: units of outputs, and the bytes of one unit for all active channels.
struct Units {
    std::int64_t count = 0, bytes = 0;
    std::int64_t all() const { return count * bytes; }
    // Units that begin before byte `at` of this matrix.
    std::int64_t before(std::int64_t at) const { return at >= all() ? count : at <= 0 ? 0 : at / bytes; }
};

Units units_of(const ActiveMatrix& matrix, int dtype, const Active& found) {
    Units units;
    if (!matrix.packed) {
        units.count = (matrix.outputs + kSplit - 1) / kSplit;
        units.bytes = found.count * kSplit * element_size(dtype);
    } else {
        const dual::Header header = header_of(matrix.weight);
        units.count = dual::Shape(header.rows, header.cols).panels;
        // The active share of the bytes.
        if (units.count > 0 && header.cols > 0) {
            units.bytes = (header.size - header.stream) / header.cols * found.count / units.count;
        }
    }
    units.bytes = std::max<std::int64_t>(units.bytes, 1);  // outputs are written even when nothing is read
    return units;
}

// Units [begin, end) of a matrix.
void run_units(const Tier& tier, int dtype, const ActiveMatrix& matrix, const Active& found, int batch, std::int64_t begin,
               std::int64_t end) {
    if (begin >= end) return;
    if (!matrix.packed) {
        const ChannelCall call{matrix.weight, matrix.outputs, found.channels, found.count,
                               found.x,       batch,          matrix.y,       matrix.bias};
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
                        found.channels,
                        found.count,
                        found.x,
                        batch,
                        matrix.y,
                        matrix.bias};
    tier.dual_run(dtype, call, begin, end);
}

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
    std::int64_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += units_of(matrices[i], dtype, found).all();
    const int parts = parts_for(bytes, threads);
    // Each thread takes one stretch of the matrices laid end to end: short ones are not cut into shorter pieces.
    in_parts(parts, [&](int part) {
        std::int64_t begin = bytes * part / parts, end = bytes * (part + 1) / parts;
        for (int i = 0; i < count; ++i) {
            const Units units = units_of(matrices[i], dtype, found);
            run_units(tier, dtype, matrices[i], found, batch, units.before(begin), units.before(end));
            begin -= units.all(), end -= units.all();
        }
    });
    return found.count;
}

}  // namespace gossamer
