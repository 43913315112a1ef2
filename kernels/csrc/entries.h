// Which entries of a dense float32 matrix are large, and how large its channels are: what growing sparse deltas look at.
#pragma once

#include <cstdint>

namespace gossamer {

struct Tier;

// One row of those below.
struct EntryRow {
    const float* values;   // [cols]
    const float* weights;  // [cols], of the columns, or nullptr: nothing is weighted
    float weight;          // of the row
    float floor;
    std::int64_t cols, first;  // first: position of values[0]
};

struct EntryCall {
    const float* matrix;  // [rows, cols]
    std::int64_t rows, cols;
    const float *row_weights, *col_weights;  // [rows], [cols], or both nullptr
    float floor;
};

// Sums of squares of rows and columns, in float32. room: square_room floats.
void channel_squares(const Tier& tier, const float* matrix, std::int64_t rows, std::int64_t cols, float* room,
                     float* row_sums, float* col_sums, int threads);

std::int64_t square_room(std::int64_t rows, std::int64_t cols);

// starts [rows + 1]: how many entries with |weighted| > floor lie before each row. Returns their number.
std::int64_t count_entries(const Tier& tier, const EntryCall& call, std::int64_t* starts, int threads);

// These entries, rising: position row * cols + column, and weighted value.
void find_entries(const Tier& tier, const EntryCall& call, const std::int64_t* starts, std::int64_t* position,
                  float* value, int threads);

}  // namespace gossamer
