// Bit-packed masks and kept values. Layout and meaning: kernels/bitmask/README.md.
// Plain functions on addresses: the caller has checked dtypes, sizes and contiguity.
#pragma once

#include <cstdint>

namespace gossamer::bitmask {

// bool [rows, cols] -> bits [rows, ceil(cols / 8)].
void pack(const std::uint8_t* mask, std::int64_t rows, std::int64_t cols, std::uint8_t* bits);

// bits -> bool [rows, cols].
void unpack(const std::uint8_t* bits, std::int64_t rows, std::int64_t cols, std::uint8_t* mask);

// Set bits of each row of [rows, width] bytes.
void row_counts(const std::uint8_t* bits, std::int64_t rows, std::int64_t width, std::int64_t* counts);

// Kept entries of weight [rows, cols] in row order. `element` is 1, 2, 4 or 8 bytes. Writes at most `capacity` entries;
// returns how many bits are set inside the columns.
std::int64_t compress(const void* weight, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols,
                      std::int64_t element, void* values, std::int64_t capacity);

// The inverse: zeros where no bit is set. Reads at most `count` entries; returns how many bits are set.
std::int64_t expand(const void* values, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols,
                    std::int64_t element, void* weight, std::int64_t count);

}  // namespace gossamer::bitmask
