// Attention over ranges of a cache: ranges and slots beyond its rows must be refused before anything is read or stored.
#include "../window.h"

#include <cmath>

#include "../tiers.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

struct Case {
    int dtype;
    std::int64_t batch, kv_heads, group, width, rows;
    float scale;
    Exact query, key, value, ranges, slots;
    bool step;
};

constexpr std::int64_t kFar[] = {-1, INT64_MIN, INT64_MAX, std::int64_t{1} << 62, -(std::int64_t{1} << 62), 1 << 20};

// Ranges within the rows, then sometimes one number wrong.
void fill(Random& random, const Case& c) {
    const std::int64_t heads = c.batch * c.kv_heads;
    for (std::int64_t i = 0; i < 2 * heads; ++i) {
        auto* range = c.ranges.as<std::int64_t>() + 2 * i;
        range[0] = random.between(0, c.rows);
        range[1] = random.once_in(4) ? 0 : random.between(0, c.rows - range[0]);
    }
    for (std::int64_t i = 0; i < heads; ++i) c.slots.as<std::int64_t>()[i] = random.below(c.rows);
    if (random.once_in(2)) return;
    auto& one = random.once_in(3) ? c.slots.as<std::int64_t>()[random.below(heads)]
                                  : c.ranges.as<std::int64_t>()[random.below(4 * heads)];
    one = random.once_in(2) ? random.pick(kFar) : c.rows + random.between(-1, 1);
}

bool sound(const Case& c) {
    const std::int64_t heads = c.batch * c.kv_heads;
    for (std::int64_t i = 0; i < 2 * heads; ++i) {
        const auto* range = c.ranges.as<std::int64_t>() + 2 * i;
        if (range[0] < 0 || range[1] < 0 || range[0] > c.rows || range[1] > c.rows - range[0]) return false;
    }
    for (std::int64_t i = 0; c.step && i < heads; ++i) {
        const std::int64_t slot = c.slots.as<std::int64_t>()[i];
        if (slot < 0 || slot >= c.rows) return false;
    }
    return true;
}

// One output against float64.
void compare(Random& random, const Case& c, const Exact& keys, const Exact& values, const Exact& y, const char* tier) {
    const std::int64_t b = random.below(c.batch), h = random.below(c.kv_heads), g = random.below(c.group);
    const std::int64_t o = random.below(c.width), q = ((b * c.kv_heads + h) * c.group + g) * c.width;
    const auto* range = c.ranges.as<std::int64_t>() + 4 * (b * c.kv_heads + h);
    std::vector<std::int64_t> rows;
    for (int run = 0; run < 2; ++run) {
        for (std::int64_t i = 0; i < range[2 * run + 1]; ++i) rows.push_back(range[2 * run] + i);
    }
    std::vector<double> scores;
    double greatest = -INFINITY, doubt = 0;
    for (const std::int64_t row : rows) {
        double score = 0, size = 0;
        for (std::int64_t k = 0; k < c.width; ++k) {
            const double term = number(c.dtype, c.query.as(), q + k) * number(c.dtype, keys.as(), row * c.width + k);
            score += term, size += std::fabs(term);
        }
        scores.push_back(c.scale * score);
        greatest = std::fmax(greatest, c.scale * score);
        doubt = std::fmax(doubt, c.scale * std::ldexp((2.0 * c.width + 16) * size, -24));
    }
    double total = 0, sum = 0, absolute = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const double weight = std::exp(scores[i] - greatest), value = number(c.dtype, values.as(), rows[i] * c.width + o);
        total += weight, sum += weight * value, absolute += weight * std::fabs(value);
    }
    const double exact = rows.empty() ? 0 : sum / total, found = number(c.dtype, y.as(), q + o);
    doubt += std::ldexp(std::fabs(greatest) + 64 + 2.0 * static_cast<double>(rows.size()), -23);
    const double lost = rows.empty() ? 0 : (std::expm1(2 * doubt) * absolute / total) + std::ldexp(1.0, -100);
    expect(rounded(c.dtype, exact - lost) <= found && found <= rounded(c.dtype, exact + lost),
           std::string(tier) + ": output is " + std::to_string(found) + ", expected " + std::to_string(exact) +
               " give or take " + std::to_string(lost));
}

Outcome run(Random& random, const Bytes&) {
    const int dtype = static_cast<int>(random.below(kDtypes));
    const std::int64_t batch = random.between(1, 3), kv_heads = random.between(1, 3), group = random.between(1, 11);
    const std::int64_t width = random.once_in(4) ? 64 : random.between(1, 70);
    const std::int64_t rows = random.once_in(8) ? random.between(500, 1200) : random.between(1, 60);
    const bool wild = random.once_in(4);
    const std::int64_t heads = batch * kv_heads;
    const auto numbers = [&](std::int64_t count) { return random_numbers(random, dtype, count * width, wild); };
    const Exact keys = numbers(rows), values = numbers(rows);
    const Case c{dtype, batch, kv_heads, group, width, rows, 0.125f,
                 numbers(heads * group), numbers(heads), numbers(heads), Exact(32 * heads, 0), Exact(8 * heads, 0),
                 random.once_in(2)};
    fill(random, c);
    const bool right = sound(c);
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact stored_keys(keys.bytes()), stored_values(values.bytes());
        const auto call = [&](const Exact& y, int threads) {
            const Window window{c.query.as(), c.step ? c.key.as() : nullptr, c.value.as(), c.slots.as<std::int64_t>(),
                                stored_keys.as(), stored_values.as(), c.ranges.as<std::int64_t>(), batch, kv_heads,
                                group, width, rows, c.scale, y.as()};
            return window_attention(*tier, dtype, window, threads);
        };
        const Exact y(c.query.size(), 0xFF), again(c.query.size(), 0x7F), untouched(c.query.size(), 0xFF);
        const bool done = call(y, 1);
        expect(done == right, std::string(tier->name) + (done ? ": wrong rows were taken" : ": sound rows were refused"));
        if (!done) {
            expect(y == untouched && stored_keys == keys && stored_values == values,
                   std::string(tier->name) + ": something was written before the rows were refused");
            continue;
        }
        call(again, static_cast<int>(random.between(2, 4)));
        expect(same(dtype, y.as(), again.as(), heads * group * width),
               std::string(tier->name) + ": more threads give other bits");
        if (!wild) compare(random, c, stored_keys, stored_values, y, tier->name);
    }
    return right ? Outcome::kRan : Outcome::kRefused;
}

}  // namespace

const Target kWindow = {"window", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
