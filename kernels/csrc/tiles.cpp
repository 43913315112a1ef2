#include "tiles.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bitmask.h"

namespace gossamer::tiles {
namespace {

constexpr std::int64_t kMaxLength = std::int64_t{1} << 31;

std::int64_t up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::int64_t panels_for(std::int64_t cols) { return (cols + kMaxPanel - 1) / kMaxPanel; }

std::int64_t panel_for(std::int64_t cols) {
    const std::int64_t panels = panels_for(cols);
    return panels == 0 ? kCols : up((cols + panels - 1) / panels, kCols);
}

std::int64_t row_bytes(std::int64_t cols) { return (cols + 7) / 8; }

std::int64_t groups_of(std::int64_t cols) { return (cols + kCols - 1) / kCols; }

// Mask bytes of one row of a tile: 16, or what is left of the row.
std::int64_t mask_bytes(std::int64_t cols, std::int64_t column) {
    return std::min<std::int64_t>(kCols / 8, row_bytes(cols) - column / 8);
}

std::int64_t count_bits(const std::uint8_t* bytes, std::int64_t count) {
    std::int64_t total = 0;
    bitmask::row_counts(bytes, 1, count, &total);
    return total;
}

// Bytes of no values have no address, which memcpy does not allow.
void copy(void* to, const void* from, std::int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

// One number for each row: where its next value lies among the values in row order. Any number of rows without columns
// is a sound matrix of a few bytes, which must not ask for memory.
std::vector<std::int64_t> cursors(const Shape& shape) {
    return std::vector<std::int64_t>(static_cast<std::size_t>(shape.cols == 0 ? 0 : shape.rows), 0);
}

// One panel of one row tile: its columns, and its place in the table of offsets.
struct Place {
    std::int64_t panel, tile, first, last;
};

// Calls visit(Place) in the order of the stream.
template <class Visit>
void for_places(const Shape& shape, Visit visit) {
    for (std::int64_t panel = 0; panel < shape.panels; ++panel) {
        const std::int64_t first = panel * shape.panel_cols;
        const std::int64_t last = std::min(shape.cols, first + shape.panel_cols);
        for (std::int64_t tile = 0; tile < shape.row_tiles; ++tile) visit(Place{panel, tile, first, last});
    }
}

struct View {
    Header header;
    Shape shape;
    const std::int64_t* offsets;
    const std::uint8_t* stream;
    explicit View(const std::uint8_t* packed)
        : header(read(packed)),
          shape(header.rows, header.cols, header.dtype),
          offsets(reinterpret_cast<const std::int64_t*>(packed + sizeof(Header))),
          stream(packed + header.stream) {}
    static Header read(const std::uint8_t* packed) {
        Header header;
        std::memcpy(&header, packed, sizeof header);
        return header;
    }
};

// Bits of a tile's row that lie outside the matrix.
bool strays(const std::uint8_t* mask, std::int64_t columns) {
    for (std::int64_t byte = columns / 8; byte < kCols / 8; ++byte) {
        const int keep = byte == columns / 8 ? static_cast<int>(columns % 8) : 0;
        if (mask[byte] >> keep) return true;
    }
    return false;
}

// Between plain int8 and the stored form; 2-byte values are the same in both.
void copy_values(std::uint8_t* to, const std::uint8_t* from, std::int64_t count, const Shape& shape) {
    copy(to, from, count * shape.value);
    if (!shape.scaled()) return;
    for (std::int64_t i = 0; i < count; ++i) to[i] ^= kBias;
}

const char* fault_of_scales(const std::uint8_t* at, std::int64_t rows) {
    std::uint16_t scales[kRows];
    std::memcpy(scales, at, sizeof scales);
    for (std::int64_t r = 0; r < kRows; ++r) {
        if (r >= rows && scales[r] != 0) return "scales are set outside the matrix";
        if (scales[r] >= 0x7C00) return "a scale is negative or not finite";
    }
    return nullptr;
}

// Walks one row tile of a panel that claims the bytes [at, end) of the stream.
const char* fault_of_place(const View& view, const Place& place, std::int64_t at, std::int64_t end,
                           std::int64_t* values) {
    for (std::int64_t column = place.first; column < place.last; column += kCols) {
        if (end - at < view.shape.head) return "a tile reaches beyond its end";
        const std::uint8_t* masks = view.stream + at;
        const std::int64_t columns = std::min(kCols, place.last - column);
        for (std::int64_t r = 0; r < kRows; ++r) {
            const bool inside = place.tile * kRows + r < view.shape.rows;
            if (columns < kCols || !inside) {
                if (strays(masks + r * (kCols / 8), inside ? columns : 0)) return "bits are set outside the matrix";
            }
        }
        if (view.shape.scaled()) {
            const std::int64_t rows = std::min(kRows, view.shape.rows - place.tile * kRows);
            if (const char* fault = fault_of_scales(masks + kMaskBytes, rows)) return fault;
        }
        const std::int64_t count = count_bits(masks, kMaskBytes);
        at += view.shape.head + view.shape.value * count;
        *values += count;
        if (at > end) return "a tile has more bits than values";
    }
    return at == end ? nullptr : "a tile has more values than bits";
}

const char* fault_of_header(const Header& header, std::int64_t size) {
    if (header.magic != kMagic) return "it is not a packed matrix";
    if (header.rows < 0 || header.cols < 0 || header.rows >= kMaxLength || header.cols >= kMaxLength) {
        return "rows or columns are out of range";
    }
    if (header.dtype != 1 && header.dtype != 2 && header.dtype != kInt8) {
        return "the values are neither bfloat16, float16 nor int8";
    }
    const Shape shape(header.rows, header.cols, header.dtype);
    if (header.panel_cols != shape.panel_cols || header.stream != shape.stream()) return "the layout is another one";
    if (header.nnz < 0 || header.nnz > header.rows * header.cols) return "the number of values is out of range";
    // More values than bytes first: the length that the largest shapes need is no 64-bit number.
    if (header.size != size || header.nnz > size / shape.value || shape.size(header.nnz) != size) {
        return "its length does not fit its shape";
    }
    return nullptr;
}

}  // namespace

Shape::Shape(std::int64_t rows_, std::int64_t cols_, std::int64_t dtype)
    : rows(rows_),
      cols(cols_),
      panel_cols(panel_for(cols_)),
      panels((cols_ + panel_for(cols_) - 1) / panel_for(cols_)),
      row_tiles((rows_ + kRows - 1) / kRows),
      value(dtype == kInt8 ? 1 : 2),
      head(dtype == kInt8 ? kMaskBytes + kScaleBytes : kMaskBytes) {}

std::int64_t Shape::stream() const {
    return up(static_cast<std::int64_t>(sizeof(Header)) + 8 * offsets(), 64);
}

std::int64_t Shape::tiles() const {
    return row_tiles * ((cols + kCols - 1) / kCols);  // panels are whole tiles, but for the last one
}

std::int64_t Shape::size(std::int64_t nnz) const { return stream() + head * tiles() + value * nnz + kTail; }

const char* find_fault(const std::uint8_t* packed, std::int64_t size) {
    if (size < static_cast<std::int64_t>(sizeof(Header))) return "it is shorter than its header";
    const Header header = View::read(packed);
    if (const char* fault = fault_of_header(header, size)) return fault;
    const View view(packed);
    const std::int64_t end = size - header.stream - kTail, unit = view.shape.value;
    const char* fault = nullptr;
    std::int64_t at = 0, values = 0, index = 0;
    for_places(view.shape, [&](const Place& place) {
        if (fault != nullptr) return;
        const std::int64_t begin = view.offsets[index], next = view.offsets[index + 1];
        ++index;
        if (begin < 0 || next < begin || next > end / unit || unit * begin != at) {
            fault = "the offsets are out of order";
            return;
        }
        fault = fault_of_place(view, place, at, unit * next, &values);
        at = unit * next;
    });
    if (fault != nullptr) return fault;
    if (view.offsets[index] != at / unit || at != end) return "the last offset is not the end";
    return values == header.nnz ? nullptr : "the number of values is another one";
}

bool pack(const std::uint8_t* bits, const void* values, const std::uint16_t* scales, std::int64_t nnz,
          std::int64_t rows, std::int64_t cols, std::int64_t dtype, std::uint8_t* packed) {
    const Shape shape(rows, cols, dtype);
    const auto* from = static_cast<const std::uint8_t*>(values);
    const std::int64_t width = row_bytes(cols), groups = groups_of(cols);
    const Header header{kMagic, rows, cols, dtype, nnz, shape.panel_cols, shape.stream(), shape.size(nnz)};
    std::memset(packed, 0, static_cast<std::size_t>(header.stream));
    std::memcpy(packed, &header, sizeof header);
    auto* offsets = reinterpret_cast<std::int64_t*>(packed + sizeof(Header));
    std::vector<std::int64_t> next = cursors(shape);
    std::int64_t found = 0;
    for (std::size_t r = 0; r < next.size(); ++r) {
        next[r] = found;
        found += count_bits(bits + static_cast<std::int64_t>(r) * width, width);
    }
    if (found != nnz) return false;
    const std::int64_t end = header.size - kTail;
    std::int64_t at = header.stream, index = 0;
    bool fits = true;
    for_places(shape, [&](const Place& place) {
        offsets[index++] = (at - header.stream) / shape.value;
        const std::int64_t row = place.tile * kRows, here = std::min(kRows, rows - row);
        for (std::int64_t column = place.first; fits && column < place.last; column += kCols) {
            std::uint8_t* masks = packed + at;
            if (end - at < shape.head) {
                fits = false;
                break;
            }
            std::memset(masks, 0, static_cast<std::size_t>(shape.head));
            at += shape.head;
            for (std::int64_t r = 0; r < here; ++r) {
                std::uint8_t* mask = masks + r * (kCols / 8);
                copy(mask, bits + (row + r) * width + column / 8, mask_bytes(cols, column));
                if (shape.scaled()) {
                    copy(masks + kMaskBytes + 2 * r, scales + (row + r) * groups + column / kCols, 2);
                }
                const std::int64_t count = count_bits(mask, kCols / 8);
                // Else the bits changed since they were counted.
                fits = fits && shape.value * count <= end - at && next[row + r] + count <= nnz;
                if (!fits) break;
                copy_values(packed + at, from + shape.value * next[row + r], count, shape);
                at += shape.value * count;
                next[row + r] += count;
            }
        }
    });
    offsets[index] = (at - header.stream) / shape.value;
    std::memset(packed + end, 0, kTail);
    return fits && at == end;
}

void unpack(const std::uint8_t* packed, std::uint8_t* bits, void* values, std::uint16_t* scales) {
    const View view(packed);
    const Shape& shape = view.shape;
    auto* to = static_cast<std::uint8_t*>(values);
    const std::int64_t width = row_bytes(shape.cols), groups = groups_of(shape.cols);
    const auto for_rows = [&](auto visit) {  // visit(row, column, tile, its row, its values, their number)
        const std::uint8_t* at = view.stream;
        for_places(shape, [&](const Place& place) {
            const std::int64_t row = place.tile * kRows;
            for (std::int64_t column = place.first; column < place.last; column += kCols) {
                const std::uint8_t* tile = at;
                at += shape.head;
                for (std::int64_t r = 0; r < kRows; ++r) {
                    const std::int64_t count = count_bits(tile + r * (kCols / 8), kCols / 8);
                    if (row + r < shape.rows) visit(row + r, column, tile, r, at, count);
                    at += shape.value * count;
                }
            }
        });
    };
    using Bytes = const std::uint8_t*;
    std::vector<std::int64_t> next = cursors(shape);
    for_rows([&](std::int64_t row, std::int64_t column, Bytes tile, std::int64_t r, Bytes, std::int64_t n) {
        copy(bits + row * width + column / 8, tile + r * (kCols / 8), mask_bytes(shape.cols, column));
        if (shape.scaled()) copy(scales + row * groups + column / kCols, tile + kMaskBytes + 2 * r, 2);
        next[row] += n;
    });
    std::int64_t found = 0;
    for (std::int64_t& place : next) {
        const std::int64_t count = place;
        place = found;
        found += count;
    }
    for_rows([&](std::int64_t row, std::int64_t, Bytes, std::int64_t, Bytes from, std::int64_t n) {
        copy_values(to + shape.value * next[row], from, n, shape);
        next[row] += n;
    });
}

}  // namespace gossamer::tiles
