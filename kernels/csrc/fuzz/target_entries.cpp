// Large entries and squares of dense matrices: nothing in them can be malformed, but shapes are awkward, memory ends where
// the matrix does, and numbers are wild.
#include "../entries.h"

#include <cmath>

#include "../tiers.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

// Every entry by itself, in the order of the matrix: the same products, so the same bits.
void compare_entries(const EntryCall& call, std::int64_t found, const Exact& position, const Exact& value,
                     const char* tier) {
    const std::string name = tier;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < call.rows * call.cols; ++i) {
        float weighted = call.matrix[i];
        if (call.col_weights != nullptr) {
            weighted *= call.col_weights[i % call.cols];
            weighted *= call.row_weights[i / call.cols];
        }
        if (!(std::fabs(weighted) > call.floor)) continue;
        expect(at < found && position.as<std::int64_t>()[at] == i, name + ": an entry is not where it is");
        expect(std::memcmp(value.as<float>() + at, &weighted, sizeof weighted) == 0, name + ": a value is another");
        ++at;
    }
    expect(at == found, name + ": more entries than there are");
}

void compare_squares(const EntryCall& call, const Exact& row_sums, const Exact& col_sums, const char* tier) {
    std::vector<double> rows(static_cast<std::size_t>(call.rows)), cols(static_cast<std::size_t>(call.cols));
    for (std::int64_t i = 0; i < call.rows * call.cols; ++i) {
        const double square = static_cast<double>(call.matrix[i]) * call.matrix[i];
        rows[static_cast<std::size_t>(i / call.cols)] += square;
        cols[static_cast<std::size_t>(i % call.cols)] += square;
    }
    const auto near = [&](const std::vector<double>& wanted, const float* found, std::int64_t terms) {
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            const double lost = static_cast<double>(terms + 4) * std::ldexp(wanted[i], -24) + std::ldexp(1.0, -120);
            expect(std::fabs(found[i] - wanted[i]) <= lost, std::string(tier) + ": a sum of squares is wrong");
        }
    };
    near(rows, row_sums.as<float>(), call.cols);
    near(cols, col_sums.as<float>(), call.rows);
}

Outcome run(Random& random, const Bytes&) {
    static constexpr float kFloors[] = {0.0f, 0.1f, 1.0f, 1e30f};
    const std::int64_t rows = random.below(random.once_in(5) ? 300 : 30), cols = random.below(random.once_in(5) ? 300 : 30);
    const bool wild = random.once_in(4), weighted = random.once_in(2);
    const Exact matrix = random_numbers(random, kFloat32, rows * cols, wild);
    const Exact row_weights = random_numbers(random, kFloat32, weighted ? rows : 0, wild);
    const Exact col_weights = random_numbers(random, kFloat32, weighted ? cols : 0, wild);
    const EntryCall call{matrix.as<float>(), rows, cols, row_weights.as<float>(), col_weights.as<float>(), random.pick(kFloors)};
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const int threads = static_cast<int>(random.between(1, 4));
        const Exact starts(8 * (rows + 1), 0xFF);
        const std::int64_t found = count_entries(*tier, call, starts.as<std::int64_t>(), threads);
        const Exact position(8 * found, 0xFF), value(4 * found, 0xFF);
        find_entries(*tier, call, starts.as<std::int64_t>(), position.as<std::int64_t>(), value.as<float>(), threads);
        compare_entries(call, found, position, value, tier->name);
        const Exact room(4 * square_room(rows, cols), 0xFF), row_sums(4 * rows, 0xFF), col_sums(4 * cols, 0xFF);
        channel_squares(*tier, call.matrix, rows, cols, room.as<float>(), row_sums.as<float>(), col_sums.as<float>(), threads);
        if (!wild) compare_squares(call, row_sums, col_sums, tier->name);
    }
    return Outcome::kRan;
}

}  // namespace

const Target kEntries = {"entries", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
