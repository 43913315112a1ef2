#include "dual.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bitmask.h"
#include "words.h"

namespace gossamer::dual {
namespace {

constexpr std::int64_t kMaxLength = std::int64_t{1} << 31;

std::int64_t up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::int64_t row_bytes(std::int64_t cols) { return (cols + 7) / 8; }

Header read(const std::uint8_t* packed) {
    Header header;
    std::memcpy(&header, packed, sizeof header);
    return header;
}

std::uint64_t word_at(const std::uint8_t* at) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    return word;
}

// Bit j of word i becomes bit i of word j: squares of 32, 16, ... 1 bits change places across the diagonal.
void transpose(std::uint64_t* words) {
    std::uint64_t low = 0x00000000FFFFFFFFu;
    for (int side = 32; side != 0; side /= 2, low ^= low << side) {
        for (int i = 0; i < 64; i = (i + side + 1) & ~side) {
            const std::uint64_t moved = (words[i] >> side ^ words[i + side]) & low;
            words[i] ^= moved << side;
            words[i + side] ^= moved;
        }
    }
}

// A square of 64 rows and 64 columns of a mask in row order.
struct Square {
    std::int64_t row, rows, col, cols;  // first and number, at most 64
    Square(const Shape& shape, std::int64_t row_, std::int64_t col_)
        : row(row_),
          rows(std::min<std::int64_t>(64, shape.rows - row_)),
          col(col_),
          cols(std::min<std::int64_t>(64, shape.cols - col_)) {}

    // words[r]: bits of row r, none beyond the matrix.
    void load(const std::uint8_t* bits, std::int64_t width, std::uint64_t* words) const {
        const std::uint64_t inside = cols == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << cols) - 1;
        for (int r = 0; r < 64; ++r) {
            words[r] = 0;
            if (r >= rows) continue;
            std::memcpy(words + r, bits + (row + r) * width + col / 8, static_cast<std::size_t>((cols + 7) / 8));
            words[r] &= inside;
        }
    }
    void store(const std::uint64_t* words, std::uint8_t* bits, std::int64_t width) const {
        for (int r = 0; r < rows; ++r) {
            std::memcpy(bits + (row + r) * width + col / 8, words + r, static_cast<std::size_t>((cols + 7) / 8));
        }
    }
};

// Bands of rows; in each, 64 columns from top to bottom, then the next: every channel is walked in pieces of some lines, and
// of each row of the band the line that comes next stays in the cache. Without bands, 14336 rows took three times as long.
template <class Visit>
void for_squares(const Shape& shape, Visit visit) {
    constexpr std::int64_t kBand = 512;
    for (std::int64_t band = 0; band < shape.rows; band += kBand) {
        const std::int64_t end = std::min(band + kBand, shape.rows);
        for (std::int64_t col = 0; col < shape.cols; col += 64) {
            for (std::int64_t row = band; row < end; row += 64) visit(Square(shape, row, col));
        }
    }
}

// Where the values of each row begin, from row bits; at the end their number. Any number of rows without columns is a
// sound matrix of a few bytes, which must not ask for memory: nothing looks at its rows.
std::vector<std::int64_t> row_begins(const std::uint8_t* bits, const Shape& shape) {
    if (shape.cols == 0) return {};
    std::vector<std::int64_t> begins(static_cast<std::size_t>(shape.rows) + 1, 0);
    bitmask::row_counts(bits, shape.rows, row_bytes(shape.cols), begins.data() + 1);
    for (std::int64_t r = 0; r < shape.rows; ++r) begins[r + 1] += begins[r];
    return begins;
}

// Row `panel` of the table: where this panel of each channel begins; behind the last panel, where the channel ends.
std::int32_t* offset(std::uint8_t* packed, std::int64_t panel, std::int64_t cols) {
    return reinterpret_cast<std::int32_t*>(packed + sizeof(Header)) + panel * cols;
}

const char* fault_of_header(const Header& header, std::int64_t size) {
    if (header.magic != kMagic) return "it is not a matrix packed for dual sparsity";
    if (header.rows < 0 || header.cols < 0 || header.rows >= kMaxLength || header.cols >= kMaxLength) {
        return "rows or columns are out of range";
    }
    if (header.dtype != 1 && header.dtype != 2) return "the values are neither bfloat16 nor float16";
    const Shape shape(header.rows, header.cols);
    if (header.panel != kPanel || header.stream != shape.stream()) return "the layout is another one";
    if (header.nnz < 0 || header.nnz > header.rows * header.cols) return "the number of values is out of range";
    const bool reached = kMaskWords * shape.blocks * shape.cols + header.nnz < kMaxLength;  // by offsets of 32 bits
    if (!reached) return "the number of values is out of range";
    if (header.size != size || shape.size(header.nnz) != size) return "its length does not fit its shape";
    return nullptr;
}

}  // namespace

Shape::Shape(std::int64_t rows_, std::int64_t cols_)
    : rows(rows_), cols(cols_), blocks((rows_ + kBlock - 1) / kBlock), panels((rows_ + kPanel - 1) / kPanel) {}

std::int64_t Shape::stream() const {
    return up(static_cast<std::int64_t>(sizeof(Header)) + 4 * (panels + 1) * cols, 64);
}

std::int64_t Shape::size(std::int64_t nnz) const { return stream() + 2 * (kMaskWords * blocks * cols + nnz) + kTail; }

const char* find_fault(const std::uint8_t* packed, std::int64_t size) {
    if (size < static_cast<std::int64_t>(sizeof(Header))) return "it is shorter than its header";
    const Header header = read(packed);
    if (const char* fault = fault_of_header(header, size)) return fault;
    const Shape shape(header.rows, header.cols);
    const auto* offsets = reinterpret_cast<const std::int32_t*>(packed + sizeof header);
    const std::uint8_t* stream = packed + header.stream;
    const std::int64_t end = (size - header.stream - kTail) / 2, cols = shape.cols;
    const std::int64_t last = shape.rows % kBlock;
    const std::uint64_t outside = last == 0 ? 0 : ~std::uint64_t{0} << last;
    std::int64_t at = 0, values = 0;
    for (std::int64_t c = 0; c < cols; ++c) {
        for (std::int64_t block = 0; block < shape.blocks; ++block) {
            if (block % (kPanel / kBlock) == 0 && offsets[block / (kPanel / kBlock) * cols + c] != at) {
                return "the offsets are out of order";
            }
            if (end - at < kMaskWords) return "a block reaches beyond its end";
            const std::uint64_t mask = word_at(stream + 2 * at);
            if (block + 1 == shape.blocks && (mask & outside) != 0) return "bits are set outside the matrix";
            const int count = count_bits(mask);
            values += count;
            at += kMaskWords + count;
            if (at > end) return "a block has more bits than values";
        }
        if (offsets[shape.panels * cols + c] != at) return "the offsets are out of order";
    }
    if (at != end) return "the last offset is not the end";
    return values == header.nnz ? nullptr : "the number of values is another one";
}

bool pack(const std::uint8_t* bits, const std::uint16_t* values, std::int64_t nnz, std::int64_t rows, std::int64_t cols,
          std::int64_t dtype, std::uint8_t* packed) {
    const Shape shape(rows, cols);
    const std::int64_t width = row_bytes(cols);
    const Header header{kMagic, rows, cols, dtype, nnz, kPanel, shape.stream(), shape.size(nnz)};
    std::memset(packed, 0, static_cast<std::size_t>(header.stream));
    std::memcpy(packed, &header, sizeof header);
    std::uint64_t words[64];
    // Where the next block of each channel goes, from the number of its values, and where it must end.
    std::vector<std::int64_t> at(static_cast<std::size_t>(cols) + 1, 0);
    for_squares(shape, [&](const Square& square) {
        square.load(bits, width, words);
        transpose(words);
        for (int c = 0; c < square.cols; ++c) at[square.col + c + 1] += count_bits(words[c]);
    });
    for (std::int64_t c = 0; c < cols; ++c) at[c + 1] += at[c] + kMaskWords * shape.blocks;
    if (at[cols] != kMaskWords * shape.blocks * cols + nnz) return false;
    const std::vector<std::int64_t> ends(at.begin() + 1, at.end());
    for (std::int64_t c = 0; c < cols; ++c) *(offset(packed, shape.panels, cols) + c) = static_cast<std::int32_t>(ends[c]);
    std::vector<std::int64_t> begins = row_begins(bits, shape);  // of what is left of each row's values
    bool fits = true;
    for_squares(shape, [&](const Square& square) {
        if (!fits) return;
        std::uint64_t masks[64];
        square.load(bits, width, words);
        std::int64_t* next = begins.data() + square.row;
        for (int r = 0; r < square.rows; ++r) fits = fits && next[r] + count_bits(words[r]) <= nnz;
        std::memcpy(masks, words, sizeof masks);
        transpose(masks);
        std::uint8_t* to[64];
        for (int c = 0; c < square.cols; ++c) {
            std::int64_t& here = at[square.col + c];
            if (square.row % kPanel == 0) {
                *(offset(packed, square.row / kPanel, cols) + square.col + c) = static_cast<std::int32_t>(here);
            }
            const std::int64_t length = kMaskWords + count_bits(masks[c]);
            fits = fits && here + length <= ends[square.col + c];  // else the bits changed since they were counted
            to[c] = packed + header.stream + 2 * here;
            here += length;
        }
        if (!fits) return;
        for (int c = 0; c < square.cols; ++c) std::memcpy(to[c], masks + c, 8), to[c] += 8;
        for (int r = 0; r < square.rows; ++r) {
            const std::uint16_t* from = values + next[r];
            for (std::uint64_t word = words[r]; word != 0; word &= word - 1, ++from) {
                std::uint8_t*& place = to[lowest_bit(word)];
                std::memcpy(place, from, 2);
                place += 2;
            }
            next[r] = from - values;
        }
    });
    std::memset(packed + header.size - kTail, 0, kTail);
    for (std::int64_t c = 0; c < cols; ++c) fits = fits && at[c] == ends[c];
    return fits;
}

void unpack(const std::uint8_t* packed, std::uint8_t* bits, std::uint16_t* values) {
    const Header header = read(packed);
    const Shape shape(header.rows, header.cols);
    const std::int64_t width = row_bytes(shape.cols);
    const auto* offsets = reinterpret_cast<const std::int32_t*>(packed + sizeof header);
    std::vector<const std::uint8_t*> at(static_cast<std::size_t>(shape.cols));
    for (std::int64_t c = 0; c < shape.cols; ++c) {
        at[c] = packed + header.stream + 2 * std::int64_t{offsets[c]};
    }
    const auto for_masks = [&](auto visit) {  // visit(square, masks of its channels, their addresses)
        std::vector<const std::uint8_t*> next = at;
        for_squares(shape, [&](const Square& square) {
            std::uint64_t masks[64];
            for (int c = 0; c < 64; ++c) masks[c] = c < square.cols ? word_at(next[square.col + c]) : 0;
            visit(square, masks, next.data() + square.col);
            for (int c = 0; c < square.cols; ++c) next[square.col + c] += 8 + 2 * count_bits(masks[c]);
        });
    };
    for_masks([&](const Square& square, const std::uint64_t* masks, const std::uint8_t* const*) {
        std::uint64_t words[64];
        std::memcpy(words, masks, sizeof words);
        transpose(words);
        square.store(words, bits, width);
    });
    std::vector<std::int64_t> begins = row_begins(bits, shape);  // of what is left of each row's values
    for_masks([&](const Square& square, const std::uint64_t* masks, const std::uint8_t* const* channels) {
        std::uint64_t words[64];
        std::memcpy(words, masks, sizeof words);
        transpose(words);
        const std::uint8_t* from[64];
        for (int c = 0; c < square.cols; ++c) from[c] = channels[c] + 8;
        for (int r = 0; r < square.rows; ++r) {
            std::uint16_t* to = values + begins[square.row + r];
            for (std::uint64_t word = words[r]; word != 0; word &= word - 1, ++to) {
                const std::uint8_t*& place = from[lowest_bit(word)];
                std::memcpy(to, place, 2);
                place += 2;
            }
            begins[square.row + r] = to - values;
        }
    });
}

}  // namespace gossamer::dual
