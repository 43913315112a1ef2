// Dense and channel products: nothing they read decides an address, so only shapes and numbers vary.
#include <algorithm>
#include <cmath>

#include "../active.h"
#include "../tiers.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

struct Case {
    int dtype, batch;
    std::int64_t rows, cols;  // of the weight in memory
    Exact weight, x;
};

void check(const Case& c, const Sum& sum, const Exact& y, std::int64_t outputs, std::int64_t b, std::int64_t o,
           const std::string& what) {
    const double found = number(c.dtype, y.as(), b * outputs + o);
    expect(sum.admits(c.dtype, found), what + ": output " + std::to_string(o) + " is " + std::to_string(found) +
                                           ", expected " + sum.text());
}

void dense(Random& random, const Tier& tier, const Case& c) {
    const std::int64_t count = c.batch * c.rows;
    const Exact y(count * element_size(c.dtype), 0xFF), split(y.size(), 0x7F);
    const Matrix matrix{c.weight.as(), c.rows, false, y.as()};
    gemv(tier, c.dtype, c.x.as(), c.batch, c.cols, &matrix, 1, static_cast<int>(random.between(1, 4)));

    DenseCall call{c.weight.as(), c.rows, c.cols, nullptr, tier.dense_row(c.dtype, c.cols), c.batch, nullptr};
    const Exact prepared(call.stride * padded_batch(c.batch), 0), sums(4 * count, 0xFF);
    for (int b = 0; b < c.batch; ++b) {
        tier.dense_prepare(c.dtype, c.x.as() + b * c.cols * element_size(c.dtype), c.cols, prepared.as() + b * call.stride);
    }
    call.x = prepared.as(), call.sums = sums.as<float>();
    const std::int64_t middle = random.below(c.rows + 1);
    tier.dense_run(c.dtype, call, 0, middle);
    tier.dense_run(c.dtype, call, middle, c.rows);
    tier.narrow(c.dtype, call.sums, count, split.as());
    const std::string what = std::string("dense, ") + tier.name;
    expect(same(c.dtype, y.as(), split.as(), count), what + ": another split gives other bits");

    for (int n = 0; n < 4 && c.rows > 0; ++n) {
        const std::int64_t r = n == 0 ? c.rows - 1 : random.below(c.rows), b = random.below(c.batch);
        Sum sum;
        for (std::int64_t k = 0; k < c.cols; ++k) {
            sum.add(number(c.dtype, c.weight.as(), r * c.cols + k), number(c.dtype, c.x.as(), b * c.cols + k));
        }
        check(c, sum, y, c.rows, b, r, what);
    }
}

// The weight is [channels, outputs]; a row skips the channels whose |x| is not above the threshold. bias [outputs] or null.
void channel(Random& random, const Tier& tier, const Case& c, const Exact& x, const Exact& threshold, const void* bias) {
    const std::int64_t channels = c.rows, outputs = c.cols;
    const Exact y(c.batch * outputs * element_size(c.dtype), 0xFF), again(y.size(), 0x7F);
    const ActiveMatrix matrix{c.weight.as(), outputs, false, bias, y.as()};
    const std::int64_t read = active_gemv(tier, c.dtype, x.as(), c.batch, channels, threshold.as<float>(), nullptr, &matrix, 1,
                                          static_cast<int>(random.between(1, 4)));
    const auto active = [&](std::int64_t b, std::int64_t i) {
        return !(std::fabs(number(c.dtype, x.as(), b * channels + i)) <= number(kFloat32, threshold.as(), i));
    };
    std::vector<std::int64_t> needed;
    for (std::int64_t i = 0; i < channels; ++i) {
        bool any = false;
        for (std::int64_t b = 0; b < c.batch; ++b) any = any || active(b, i);
        if (any) needed.push_back(i);
    }
    const auto wanted = static_cast<std::int64_t>(needed.size());
    const std::string what = std::string("channel, ") + tier.name;
    expect(read == wanted, what + ": " + std::to_string(read) + " channels read, " + std::to_string(wanted) + " are active");

    // Lists of exactly the promised room: one more vector of 64 bytes.
    const Exact list(4 * channels + 64, 0xFF), values(4 * channels * padded_batch(c.batch) + 64, 0xFF);
    const std::int64_t count = tier.compact(c.dtype, x.as(), c.batch, channels, threshold.as<float>(),
                                            list.as<std::int32_t>(), values.as<float>());
    const Exact active_list(4 * count, 0), active_values(4 * count * padded_batch(c.batch), 0);
    if (count > 0) {
        std::memcpy(active_list.as(), list.as(), static_cast<std::size_t>(active_list.size()));
        std::memcpy(active_values.as(), values.as(), static_cast<std::size_t>(active_values.size()));
    }
    const ChannelCall call{c.weight.as(), outputs, active_list.as<std::int32_t>(), count, active_values.as<float>(), c.batch,
                           again.as(), bias};
    for (std::int64_t begin = 0, end; begin < outputs; begin = end) {
        end = std::min(outputs, begin + 64 * random.between(1, 4));
        tier.channel_run(c.dtype, call, begin, end);
    }
    expect(same(c.dtype, y.as(), again.as(), c.batch * outputs), what + ": another split gives other bits");

    for (int n = 0; n < 4 && outputs > 0; ++n) {
        const std::int64_t o = n == 0 ? outputs - 1 : random.below(outputs), b = random.below(c.batch);
        Sum sum;
        if (bias != nullptr) sum.add(number(c.dtype, bias, o), 1.0);
        for (const std::int64_t i : needed) {  // a channel that only another row needs is multiplied by 0
            const double value = active(b, i) ? number(c.dtype, x.as(), b * channels + i) : 0.0;
            sum.add(number(c.dtype, c.weight.as(), i * outputs + o), value);
        }
        check(c, sum, y, outputs, b, o, what);
    }
}

Outcome run(Random& random, const Bytes&) {
    const int dtype = static_cast<int>(random.below(kDtypes)), batch = static_cast<int>(random.between(1, kMaxBatch));
    const std::int64_t rows = random.below(20), cols = random.once_in(30) ? random.below(5000) : random.below(200);
    const bool wild = random.once_in(4);
    const Case c{dtype, batch, rows, cols, random_numbers(random, dtype, rows * cols, wild),
                 random_numbers(random, dtype, batch * cols, wild)};
    const Exact x = random_numbers(random, dtype, batch * rows, wild);
    const Exact threshold = random_numbers(random, kFloat32, rows, wild);
    const Exact bias = random_numbers(random, dtype, cols, wild);
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        dense(random, *tier, c);
        channel(random, *tier, c, x, threshold, random.once_in(2) ? bias.as() : nullptr);
    }
    return Outcome::kRan;
}

}  // namespace

const Target kPlain = {"plain", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
