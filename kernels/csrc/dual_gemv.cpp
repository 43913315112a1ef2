#include "work.h"

#include "dual.h"

namespace gossamer {

void dual_gemv(const Tier& tier, const void* x, int batch, const std::uint8_t* packed, const float* threshold, void* y,
               int threads) {
    dual::Header header;
    std::memcpy(&header, packed, sizeof header);
    const dual::Shape shape(header.rows, header.cols);
    const int dtype = static_cast<int>(header.dtype);
    const Active found = compact<0>(tier, dtype, x, batch, header.cols, threshold);
    const DualCall call{reinterpret_cast<const std::int32_t*>(packed + sizeof header),
                        reinterpret_cast<const std::uint16_t*>(packed + header.stream),
                        header.cols,
                        header.rows,
                        shape.panels,
                        found.channels,
                        found.count,
                        found.x,
                        batch,
                        y};
    // The active share of the bytes.
    const std::int64_t bytes = header.cols == 0 ? 0 : (header.size - header.stream) / header.cols * found.count;
    const int parts = parts_for(bytes, threads);
    in_parts(parts, [&](int part) {
        const std::int64_t begin = shape.panels * part / parts, end = shape.panels * (part + 1) / parts;
        if (begin < end) tier.dual_run(dtype, call, begin, end);
    });
}

}  // namespace gossamer
