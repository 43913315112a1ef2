#include "tile_bytes.h"

#include <algorithm>

#include "../bitmask.h"

namespace gossamer::fuzz {

using tiles::Header;
using tiles::Shape;

Header header_of(const Bytes& bytes) {
    Header header{};
    std::memcpy(&header, bytes.data(), std::min(bytes.size(), sizeof header));
    return header;
}

Exact random_mask(Random& random, std::int64_t rows, std::int64_t cols, std::int64_t kept_of_ten, std::int64_t* nnz) {
    Exact mask(rows * cols, 0), bits(rows * width_of(cols), 0xFF);
    *nnz = 0;
    for (std::int64_t i = 0; i < rows * cols; ++i) *nnz += mask.as()[i] = random.below(10) < kept_of_ten;
    bitmask::pack(mask.as(), rows, cols, bits.as());
    return bits;
}

bool equal_but_padding(const Exact& a, const Exact& b, std::int64_t offsets_end, std::int64_t stream) {
    const auto equal = [&](std::int64_t begin, std::int64_t end) {
        return std::memcmp(a.as() + begin, b.as() + begin, static_cast<std::size_t>(end - begin)) == 0;
    };
    return a.size() == b.size() && equal(0, offsets_end) && equal(stream, a.size() - tiles::kTail);
}

namespace {

// The layout follows from rows, columns and number of values: a header that says others consistently.
void another_shape(Random& random, Bytes& bytes, Header header) {
    constexpr std::int64_t kLongest = (std::int64_t{1} << 31) - 1;
    static constexpr std::int64_t kLengths[] = {0, 1, 4, 5, 127, 128, 129, 4096, 4097, 8193, kLongest};
    const auto change = [&](std::int64_t* length) {
        *length = random.once_in(2) ? random.pick(kLengths) : std::max<std::int64_t>(0, *length + random.between(-5, 5));
    };
    if (random.once_in(2)) change(&header.rows);
    if (random.once_in(2)) change(&header.cols);
    if (random.once_in(8)) header.rows = header.cols = kLongest;
    if (random.once_in(8)) header.dtype = random.between(1, tiles::kInt8);
    const Shape shape(header.rows, header.cols, header.dtype);
    header.panel_cols = shape.panel_cols;
    header.stream = shape.stream();
    switch (random.below(4)) {
        case 0: header.nnz = random.below(1 + std::min<std::int64_t>(header.rows * header.cols, 1 << 16)); break;
        case 1: header.nnz = header.rows * header.cols; break;
        // The number of values that makes the length fit.
        case 2: header.nnz = (static_cast<std::int64_t>(bytes.size()) - shape.size(0)) / shape.value; break;
        default: break;
    }
    // In unsigned numbers: those of the largest shapes do not fit.
    header.size = static_cast<std::int64_t>(static_cast<std::uint64_t>(shape.size(0)) +
                                            static_cast<std::uint64_t>(shape.value) *
                                                static_cast<std::uint64_t>(header.nnz));
    if (header.size >= 0 && header.size <= kMostBytes / 4) bytes.resize(static_cast<std::size_t>(header.size));
    if (random.once_in(4)) header.size = static_cast<std::int64_t>(bytes.size());
    if (bytes.size() >= sizeof header) std::memcpy(bytes.data(), &header, sizeof header);
}

// Offsets that still rise, but lie elsewhere.
void other_offsets(Random& random, Bytes& bytes, const Header& header) {
    const Shape shape(header.rows, header.cols, header.dtype);
    if (shape.offsets() > (1 << 16) || bytes.size() < sizeof header + 8 * static_cast<std::size_t>(shape.offsets())) return;
    const std::int64_t first = random.below(shape.offsets()), shift = random.between(-70, 70);
    for (std::int64_t i = first; i < shape.offsets(); ++i) {
        std::int64_t offset;
        std::uint8_t* at = bytes.data() + sizeof header + 8 * i;
        std::memcpy(&offset, at, 8);
        offset = static_cast<std::int64_t>(static_cast<std::uint64_t>(offset) + static_cast<std::uint64_t>(shift));
        std::memcpy(at, &offset, 8);
        if (random.once_in(4)) break;
    }
}

// A bit moves to another place of the same masks: of the row, of another row, or outside the matrix. All counts stay.
void move_bits(Random& random, Bytes& bytes, const Header& header) {
    const Shape shape(header.rows, header.cols, header.dtype);
    const std::int64_t stream = shape.stream(), size = static_cast<std::int64_t>(bytes.size());
    if (stream > size - tiles::kMaskBytes) return;
    // The first tile begins the stream; others are where chance finds them.
    const std::int64_t at = stream + (random.once_in(2) ? 0 : random.below((size - stream) / shape.value) * shape.value);
    const std::int64_t reach = std::min<std::int64_t>(tiles::kMaskBytes, size - at);
    for (int tries = 0; tries < 16; ++tries) {
        std::uint8_t* from = bytes.data() + at + random.below(reach);
        std::uint8_t* to = bytes.data() + at + random.below(reach);
        const auto set = static_cast<std::uint8_t>(1 << random.below(8)), gone = static_cast<std::uint8_t>(*from & -*from);
        if (*from == 0 || (*to & set) != 0) continue;
        *from = static_cast<std::uint8_t>(*from ^ gone);
        *to = static_cast<std::uint8_t>(*to | set);
        if (random.once_in(2)) return;
    }
}

// Scales at their borders, where int8 matrices have them.
void other_scale(Random& random, Bytes& bytes, const Header& header) {
    static constexpr std::uint16_t kScales[] = {0, 1, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7C01, 0x8000, 0x8001, 0xFC00, 0xFFFF};
    const Shape shape(header.rows, header.cols, header.dtype);
    const std::int64_t first = shape.stream() + tiles::kMaskBytes, size = static_cast<std::int64_t>(bytes.size());
    if (!shape.scaled() || first > size - tiles::kScaleBytes) return;
    const std::int64_t at = first + (random.once_in(2) ? 2 * random.below(tiles::kRows) : random.below(size - first - 1));
    const std::uint16_t scale = random.pick(kScales);
    std::memcpy(bytes.data() + at, &scale, sizeof scale);
}

}  // namespace

void twist_tiles(Random& random, Bytes& bytes) {
    const Header header = header_of(bytes);
    const auto sound = [](std::int64_t length) { return length >= 0 && length < std::int64_t{1} << 31; };
    if (!sound(header.rows) || !sound(header.cols)) return;
    switch (random.below(4)) {
        case 0: return another_shape(random, bytes, header);
        case 1: return other_offsets(random, bytes, header);
        case 2: return other_scale(random, bytes, header);
        default: return move_bits(random, bytes, header);
    }
}

}  // namespace gossamer::fuzz
