// The machine layout of a bitmask matrix: kernels/bitmask_gemv/README.md has the picture.
#pragma once

#include <cstdint>

namespace gossamer::tiles {

constexpr std::int64_t kRows = 4;        // rows of a tile
constexpr std::int64_t kCols = 128;      // columns of a tile
constexpr std::int64_t kMaskBytes = kRows * kCols / 8;
constexpr std::int64_t kMaxPanel = 4096;  // columns of a panel at most, so that x stays in the first-level cache
constexpr std::int64_t kInt8 = 3;  // dtype of a matrix of int8 values with a float16 scale per row of a tile
constexpr std::int64_t kScaleBytes = 2 * kRows;  // behind the masks
constexpr std::uint8_t kBias = 0x80;             // int8 values are stored with 128 added, 0 to 255
constexpr std::int64_t kTail = 64;        // readable bytes behind the last value: vectors load whole lines
constexpr std::int64_t kMagic = 0x31656C69746D7347;  // "Gsmtile1" in memory

// First bytes of the packed tensor. Offsets follow, then the stream, on a multiple of 64 bytes.
struct Header {
    std::int64_t magic;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t dtype;       // code of gemv.h, or kInt8
    std::int64_t nnz;
    std::int64_t panel_cols;  // a multiple of kCols
    std::int64_t stream;      // byte where the stream begins
    std::int64_t size;        // bytes of the whole tensor, tail included
};
static_assert(sizeof(Header) == 64, "the offsets follow on an aligned address");

struct Shape {
    std::int64_t rows, cols, panel_cols, panels, row_tiles;
    std::int64_t value;  // bytes of a value, and the unit of the offsets
    std::int64_t head;   // bytes of a tile before its values: masks, and scales where it has any
    // Values of 2 bytes if no dtype is given.
    explicit Shape(std::int64_t rows, std::int64_t cols, std::int64_t dtype = 1);
    bool scaled() const { return head > kMaskBytes; }
    std::int64_t offsets() const { return panels * row_tiles + 1; }
    std::int64_t stream() const;
    std::int64_t tiles() const;  // of 4 x 128
    std::int64_t size(std::int64_t nnz) const;
};

// What is wrong with `size` bytes at `packed`, or nullptr. Nothing outside them is read.
const char* find_fault(const std::uint8_t* packed, std::int64_t size);

// From the disk layout: row bits [rows, ceil(cols / 8)], values in row order, of 2 bytes or, for kInt8, of 1, and then
// float16 scales [rows, ceil(cols / 128)]. `packed` has Shape.size(nnz) bytes. False when the bits set are not `nnz`;
// nothing is written out of bounds then.
bool pack(const std::uint8_t* bits, const void* values, const std::uint16_t* scales, std::int64_t nnz,
          std::int64_t rows, std::int64_t cols, std::int64_t dtype, std::uint8_t* packed);

// The inverse, of a tensor without fault.
void unpack(const std::uint8_t* packed, std::uint8_t* bits, void* values, std::uint16_t* scales);

}  // namespace gossamer::tiles
