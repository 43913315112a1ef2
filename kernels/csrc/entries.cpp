#include "entries.h"

#include "work.h"

namespace gossamer {
namespace {

constexpr std::int64_t kSlab = 64;  // rows whose columns are summed up by one thread, whatever the number of threads

std::int64_t slabs_of(std::int64_t rows) { return (rows + kSlab - 1) / kSlab; }

EntryRow row_of(const EntryCall& call, std::int64_t r) {
    const bool weighted = call.row_weights != nullptr;
    return {call.matrix + r * call.cols, call.col_weights, weighted ? call.row_weights[r] : 1.0f, call.floor, call.cols,
            r * call.cols};
}

template <class Body>
void by_rows(const EntryCall& call, int threads, Body body) {
    const int parts = static_cast<int>(std::min<std::int64_t>(
        std::max<std::int64_t>(1, call.rows), parts_for(4 * call.rows * call.cols, threads)));
    in_parts(parts, [&](int part) {
        for (std::int64_t r = call.rows * part / parts; r < call.rows * (part + 1) / parts; ++r) body(r);
    });
}

}  // namespace

std::int64_t square_room(std::int64_t rows, std::int64_t cols) { return slabs_of(rows) * cols; }

void channel_squares(const Tier& tier, const float* matrix, std::int64_t rows, std::int64_t cols, float* room,
                     float* row_sums, float* col_sums, int threads) {
    const std::int64_t slabs = slabs_of(rows);
    const int parts = static_cast<int>(std::min<std::int64_t>(
        std::max<std::int64_t>(1, slabs), parts_for(4 * rows * cols, threads)));
    in_parts(parts, [&](int part) {
        for (std::int64_t s = slabs * part / parts; s < slabs * (part + 1) / parts; ++s) {
            const std::int64_t first = s * kSlab, count = std::min(kSlab, rows - first);
            tier.square_sums(matrix + first * cols, count, cols, row_sums + first, room + s * cols);
        }
    });
    std::fill(col_sums, col_sums + cols, 0.0f);
    for (std::int64_t s = 0; s < slabs; ++s, room += cols) {
        for (std::int64_t c = 0; c < cols; ++c) col_sums[c] += room[c];
    }
}

std::int64_t count_entries(const Tier& tier, const EntryCall& call, std::int64_t* starts, int threads) {
    starts[0] = 0;
    by_rows(call, threads, [&](std::int64_t r) { starts[r + 1] = tier.beyond(row_of(call, r), nullptr, nullptr); });
    for (std::int64_t r = 0; r < call.rows; ++r) starts[r + 1] += starts[r];
    return starts[call.rows];
}

void find_entries(const Tier& tier, const EntryCall& call, const std::int64_t* starts, std::int64_t* position,
                  float* value, int threads) {
    by_rows(call, threads, [&](std::int64_t r) {
        if (starts[r + 1] > starts[r]) tier.beyond(row_of(call, r), position + starts[r], value + starts[r]);
    });
}

}  // namespace gossamer
