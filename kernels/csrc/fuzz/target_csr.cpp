// Sparse matrices in CSR: positions that fall, end elsewhere or lie beyond the matrix must be refused before anything is
// read by them.
#include "../csr.h"

#include <algorithm>
#include <cmath>

#include "../tiers.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

struct Positions {
    std::vector<std::int32_t> rowptr, columns;
};

// Rows of rising columns, then often one thing wrong with them.
Positions random_positions(Random& random, std::int64_t rows, std::int64_t cols) {
    Positions made{{0}, {}};
    const std::int64_t kept = random.below(5);
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
            if (random.below(8) < kept) made.columns.push_back(static_cast<std::int32_t>(c));
        }
        made.rowptr.push_back(static_cast<std::int32_t>(made.columns.size()));
    }
    if (random.once_in(3)) return made;
    static constexpr std::int32_t kFar[] = {-1, INT32_MIN, INT32_MAX, 1 << 16};
    std::vector<std::int32_t>& list = made.columns.empty() || random.once_in(2) ? made.rowptr : made.columns;
    std::int32_t& one = list[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(list.size())))];
    switch (random.below(3)) {
        case 0: one = random.pick(kFar); break;
        case 1: one = static_cast<std::int32_t>(cols); break;
        default: one = static_cast<std::int32_t>(one + random.between(-2, 2));
    }
    return made;
}

bool sound(const Positions& positions, std::int64_t cols) {
    std::int32_t before = 0;
    for (const std::int32_t end : positions.rowptr) {
        if (end < before) return false;
        before = end;
    }
    const auto inside = [&](std::int32_t c) { return c >= 0 && c < cols; };
    return positions.rowptr.front() == 0 && before == static_cast<std::int32_t>(positions.columns.size()) &&
           std::all_of(positions.columns.begin(), positions.columns.end(), inside);
}

Exact copied(const std::vector<std::int32_t>& list) {
    Exact made(4 * static_cast<std::int64_t>(list.size()), 0);
    if (!list.empty()) std::memcpy(made.as(), list.data(), 4 * list.size());
    return made;
}

// Sums of `count` products in float32, whose sizes add up to `size`.
void compare(double wanted, double size, std::int64_t count, float found, const char* tier, const char* what) {
    const double lost = static_cast<double>(count + 4) * std::ldexp(size, -24) + std::ldexp(1.0, -120);
    expect(std::fabs(found - wanted) <= lost, std::string(tier) + ": " + what + " is " + std::to_string(found) +
                                                  ", expected " + std::to_string(wanted));
}

Outcome run(Random& random, const Bytes&) {
    const std::int64_t rows = random.below(40), cols = random.below(40), tokens = random.below(random.once_in(9) ? 400 : 40);
    const Positions positions = random_positions(random, rows, cols);
    const auto count = static_cast<std::int64_t>(positions.columns.size());
    const Exact rowptr = copied(positions.rowptr), columns = copied(positions.columns);
    const bool wild = random.once_in(4), right = sound(positions, cols);
    const Exact values = random_numbers(random, kFloat32, count, wild);
    const Exact x = random_numbers(random, kFloat32, tokens * cols, wild);
    const Exact gy = random_numbers(random, kFloat32, tokens * rows, wild);
    const CsrMatrix matrix{rowptr.as<std::int32_t>(), columns.as<std::int32_t>(), rows, cols, count};
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact y(4 * tokens * rows, 0xFF), out(4 * count, 0xFF), room(4 * csr_room(tokens, rows, cols), 0xFF);
        const int threads = static_cast<int>(random.between(1, 4));
        const bool first = csr_linear(*tier, matrix, values.as<float>(), x.as<float>(), tokens, y.as<float>(), threads);
        const bool second = csr_sampled(*tier, matrix, gy.as<float>(), x.as<float>(), tokens, room.as<float>(),
                                        out.as<float>(), threads);
        expect(first == right && second == right,
               std::string(tier->name) + (right ? ": sound positions were refused" : ": wrong positions were taken"));
        if (!right) {
            expect(y == Exact(y.size(), 0xFF) && out == Exact(out.size(), 0xFF),
                   std::string(tier->name) + ": something was written before positions were refused");
            continue;
        }
        if (wild) continue;
        if (tokens > 0 && rows > 0) {
            const std::int64_t t = random.below(tokens), r = random.below(rows);
            double sum = 0, size = 0;
            for (std::int32_t e = positions.rowptr[r]; e < positions.rowptr[r + 1]; ++e) {
                const double term = static_cast<double>(values.as<float>()[e]) * x.as<float>()[t * cols + positions.columns[e]];
                sum += term, size += std::fabs(term);
            }
            compare(sum, size, cols, y.as<float>()[t * rows + r], tier->name, "an output");
        }
        if (count > 0) {
            const auto e = static_cast<std::int32_t>(random.below(count));
            const auto above = std::upper_bound(positions.rowptr.begin(), positions.rowptr.end(), e);
            const std::int64_t r = above - positions.rowptr.begin() - 1;
            double sum = 0, size = 0;
            for (std::int64_t t = 0; t < tokens; ++t) {
                const double term = static_cast<double>(gy.as<float>()[t * rows + r]) * x.as<float>()[t * cols + positions.columns[e]];
                sum += term, size += std::fabs(term);
            }
            compare(sum, size, tokens, out.as<float>()[e], tier->name, "a sampled product");
        }
    }
    return right ? Outcome::kRan : Outcome::kRefused;
}

}  // namespace

const Target kCsr = {"csr", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
