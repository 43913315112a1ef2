// The machine layout of a matrix for dual sparsity: kernels/dual_gemv/README.md has the picture.
#pragma once

#include <cstdint>

#include "gemv.h"

namespace gossamer {

// The part of a dual product that a tier computes.
struct DualCall {
    const std::int32_t* offsets;  // [panels + 1, channels], in values of 2 bytes from the stream's begin
    const std::uint16_t* stream;
    std::int64_t channels, outputs, panels;
    const std::int32_t* active;  // [count] channels in rising order
    std::int64_t count;
    const float* x;  // [count, padded batch]; 0 where a row skips the channel
    int batch;
    void* y;  // [batch, outputs], in the weight's dtype
    const void* bias = nullptr;  // as in ChannelCall
    float* sums = nullptr;       // the same
};

namespace dual {

constexpr std::int64_t kBlock = 64;     // outputs under one mask
constexpr std::int64_t kPanel = 256;    // outputs between two offsets: what threads are given
constexpr std::int64_t kMaskWords = 4;  // a mask in units of 2 bytes
constexpr std::int64_t kTail = 64;      // readable bytes behind the last value: vectors load whole lines
constexpr std::int64_t kMagic = 0x316C6175646D7347;  // "Gsmdual1" in memory

// First bytes of the packed tensor. Offsets follow, then the stream, on a multiple of 64 bytes.
struct Header {
    std::int64_t magic;
    std::int64_t rows;  // outputs
    std::int64_t cols;  // channels
    std::int64_t dtype;  // code of gemv.h
    std::int64_t nnz;
    std::int64_t panel;   // kPanel
    std::int64_t stream;  // byte where the stream begins
    std::int64_t size;    // bytes of the whole tensor, tail included
};
static_assert(sizeof(Header) == 64, "the offsets follow on an aligned address");

struct Shape {
    std::int64_t rows, cols, blocks, panels;
    Shape(std::int64_t rows, std::int64_t cols);
    std::int64_t stream() const;
    std::int64_t size(std::int64_t nnz) const;
};

// What is wrong with `size` bytes at `packed`, or nullptr. Nothing outside them is read.
const char* find_fault(const std::uint8_t* packed, std::int64_t size);

// From the disk layout: row bits [rows, ceil(cols / 8)] and values in row order, 2 bytes each. `packed` has
// Shape.size(nnz) bytes. False when the bits set are not `nnz`; nothing is written out of bounds then.
bool pack(const std::uint8_t* bits, const std::uint16_t* values, std::int64_t nnz, std::int64_t rows, std::int64_t cols,
          std::int64_t dtype, std::uint8_t* packed);

// The inverse, of a tensor without fault.
void unpack(const std::uint8_t* packed, std::uint8_t* bits, std::uint16_t* values);

}  // namespace dual

}  // namespace gossamer
