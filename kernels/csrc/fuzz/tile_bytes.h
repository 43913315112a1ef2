// What the targets of packed layouts share: masks, and changes of packed tiles that only their layout explains.
#pragma once

#include "../tiles.h"
#include "fuzz.h"

namespace gossamer::fuzz {

constexpr std::int64_t kMostBytes = std::int64_t{1} << 22;  // of one input or output

// Rows and columns of a corpus: empty, small, and on both sides of a tile, a block and a panel.
constexpr std::int64_t kShapes[][2] = {{0, 5},    {5, 0},     {1, 1},     {1, 63},    {63, 1},  {4, 128},
                                       {3, 129},  {9, 300},   {8, 256},   {13, 385},  {63, 100}, {100, 63},
                                       {5, 4097}, {2, 8200},  {17, 4500}, {260, 700}, {6, 20}};
constexpr std::int64_t kKept[] = {10, 7, 5, 1, 0};  // of ten

inline std::int64_t width_of(std::int64_t cols) { return (cols + 7) / 8; }

// The first bytes, zeros where there are fewer.
tiles::Header header_of(const Bytes& bytes);

// Row bits with nothing beyond the last column, and how many are set.
Exact random_mask(Random& random, std::int64_t rows, std::int64_t cols, std::int64_t kept_of_ten, std::int64_t* nnz);

// Padding behind the offsets and the tail are never looked at.
bool equal_but_padding(const Exact& a, const Exact& b, std::int64_t offsets_end, std::int64_t stream);

// Another shape, offsets, scales, or bits elsewhere, for packed tiles of any dtype.
void twist_tiles(Random& random, Bytes& bytes);

}  // namespace gossamer::fuzz
