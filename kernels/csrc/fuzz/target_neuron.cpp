// MLPs on lists of neurons: numbers out of range, twice, or out of order must be refused before anything is read.
#include "../neuron.h"

#include <algorithm>
#include <cmath>

#include "../tiers.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

struct Case {
    int dtype, batch, activation;
    std::int64_t neurons, hidden;
    Exact gate, up, down_t, x;
};

// A list that rises, then often one thing wrong with it.
std::vector<std::int32_t> random_list(Random& random, std::int64_t neurons) {
    std::vector<std::int32_t> list;
    const std::int64_t kept = random.below(5);
    for (std::int64_t i = 0; i < neurons; ++i) {
        if (random.below(4) < kept) list.push_back(static_cast<std::int32_t>(i));
    }
    if (list.empty() || random.once_in(3)) return list;
    const auto n = static_cast<std::int64_t>(list.size());
    std::int32_t& one = list[static_cast<std::size_t>(random.below(n))];
    std::int32_t& other = list[static_cast<std::size_t>(random.below(n))];
    static constexpr std::int32_t kFar[] = {-1, INT32_MIN, INT32_MAX, 1 << 16};
    switch (random.below(6)) {
        case 0: one = random.pick(kFar); break;
        case 1: one = static_cast<std::int32_t>(neurons); break;
        case 2: one = other; break;
        case 3: std::swap(one, other); break;
        case 4: list.insert(list.begin() + random.below(n), other); break;
        default: one = static_cast<std::int32_t>(one + random.between(-2, 2));
    }
    return list;
}

bool sound(const std::vector<std::int32_t>& list, std::int64_t neurons) {
    std::int64_t before = -1;
    for (const std::int32_t i : list) {
        if (i <= before || i >= neurons) return false;
        before = i;
    }
    return true;
}

double activate(int activation, double g) {
    switch (activation) {
        case kSilu: return g / (1 + std::exp(-g));
        case kGeluTanh: return 0.5 * g * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g)));
        case kGelu: return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0)));
        default: return g < 0 ? 0 : g;
    }
}

// A float32 sum, and how far it may be from the real one.
struct Near {
    double value = 0, size = 0, count = 0;
    void add(double term) { value += term, size += std::fabs(term), ++count; }
    double lost() const { return (2 * count + 16) * std::ldexp(size, -24); }
};

void compare(Random& random, const Case& c, const std::vector<std::int32_t>& list, const Exact& y, const char* tier) {
    const std::int64_t b = random.below(c.batch), o = random.below(c.hidden);
    Near sum;
    double inherited = 0;
    for (const std::int64_t i : list) {
        Near g, u;
        for (std::int64_t k = 0; k < c.hidden; ++k) {
            const double value = number(c.dtype, c.x.as(), b * c.hidden + k);
            g.add(number(c.dtype, c.gate.as(), i * c.hidden + k) * value);
            u.add(number(c.dtype, c.up.as(), i * c.hidden + k) * value);
        }
        const double down = number(c.dtype, c.down_t.as(), i * c.hidden + o), a = activate(c.activation, g.value);
        // No activation is steeper than 1.13; 1 + tanh and 1 + erf lose their digits near -1.
        const double doubt = 1.2 * g.lost() + std::ldexp(std::fabs(g.value), -20);
        inherited += std::fabs(down) * (doubt * (std::fabs(u.value) + u.lost()) + std::fabs(a) * u.lost());
        sum.add(down * a * u.value);
    }
    const double lost = sum.lost() + inherited + std::ldexp(1.0, -120), found = number(c.dtype, y.as(), b * c.hidden + o);
    expect(rounded(c.dtype, sum.value - lost) <= found && found <= rounded(c.dtype, sum.value + lost),
           std::string(tier) + ": output " + std::to_string(o) + " is " + std::to_string(found) + ", expected " +
               std::to_string(sum.value) + " give or take " + std::to_string(lost));
}

// Gates and ups of exactly their size, the neurons split at random: twice the same bits.
void run_split(Random& random, const Tier& tier, const Case& c, const Exact& active, std::int64_t count) {
    const std::int64_t stride = (tier.dense_row(c.dtype, c.hidden) + 63) / 64 * 64;
    const int padded = padded_batch(c.batch);
    const Exact prepared(stride * padded, 0), whole(8 * count * padded, 0xFF), split(8 * count * padded, 0x7F);
    for (int b = 0; b < c.batch; ++b) {
        tier.dense_prepare(c.dtype, c.x.as() + b * c.hidden * element_size(c.dtype), c.hidden, prepared.as() + b * stride);
    }
    const auto call = [&](const Exact& sums) {
        return NeuronCall{c.gate.as(), c.up.as(),           c.hidden,
                          active.as<std::int32_t>(), prepared.as(), stride,
                          c.batch,     sums.as<float>(),    sums.as<float>() + count * padded};
    };
    tier.neuron_run(c.dtype, call(whole), 0, count);
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
        end = random.between(begin + 1, count);
        tier.neuron_run(c.dtype, call(split), begin, end);
    }
    expect(same(kFloat32, whole.as(), split.as(), 2 * count * padded),
           std::string(tier.name) + ": another split gives other bits");
}

Outcome run(Random& random, const Bytes&) {
    const int dtype = static_cast<int>(random.below(kDtypes)), batch = static_cast<int>(random.between(1, kMaxBatch));
    const std::int64_t neurons = random.below(30), hidden = random.once_in(30) ? random.below(1500) : random.below(150);
    const bool wild = random.once_in(4);
    const auto numbers = [&](std::int64_t rows) { return random_numbers(random, dtype, rows * hidden, wild); };
    const Case c{dtype,           batch,            static_cast<int>(random.below(4)), neurons, hidden,
                 numbers(neurons), numbers(neurons), numbers(neurons),                  numbers(batch)};
    const std::vector<std::int32_t> list = random_list(random, neurons);
    const auto count = static_cast<std::int64_t>(list.size());
    const Exact active(4 * count, 0);
    if (count > 0) std::memcpy(active.as(), list.data(), 4 * list.size());
    const Mlp mlp{c.gate.as(), c.up.as(), c.down_t.as(), neurons, hidden, c.activation};
    const bool right = sound(list, neurons);
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact y(batch * hidden * element_size(dtype), 0xFF), untouched(y.size(), 0xFF);
        const bool done = neuron_mlp(*tier, dtype, c.x.as(), batch, mlp, active.as<std::int32_t>(), count, y.as(),
                                     static_cast<int>(random.between(1, 4)));
        expect(done == right, std::string(tier->name) + (done ? ": a wrong list was taken" : ": a sound list was refused"));
        if (!done) {
            expect(y == untouched, std::string(tier->name) + ": something was written before the list was refused");
            continue;
        }
        run_split(random, *tier, c, active, count);
        if (!wild && hidden > 0) compare(random, c, list, y, tier->name);
    }
    return right ? Outcome::kRan : Outcome::kRefused;
}

}  // namespace

const Target kNeuron = {"neuron", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
