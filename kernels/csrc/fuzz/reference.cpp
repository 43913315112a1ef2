#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace gossamer::fuzz {
namespace {

struct Format {
    int exponent_bits, fraction_bits;
};

Format format_of(int dtype) {
    return dtype == kFloat32 ? Format{8, 23} : dtype == kBfloat16 ? Format{8, 7} : Format{5, 10};
}

std::uint32_t raw(int dtype, const void* at, std::int64_t index) {
    std::uint32_t bits = 0;
    const auto size = static_cast<std::size_t>(element_size(dtype));
    std::memcpy(&bits, static_cast<const std::uint8_t*>(at) + static_cast<std::size_t>(index) * size, size);
    return bits;
}

double decoded(int dtype, std::uint32_t bits) {
    const Format format = format_of(dtype);
    const int largest = (1 << format.exponent_bits) - 1;
    const std::uint32_t fraction = bits & ((1u << format.fraction_bits) - 1);
    const int exponent = static_cast<int>(bits >> format.fraction_bits) & largest;
    const double sign = (bits >> (format.exponent_bits + format.fraction_bits) & 1) != 0 ? -1 : 1;
    if (exponent == largest) {
        return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    const std::uint32_t whole = exponent == 0 ? fraction : fraction | 1u << format.fraction_bits;
    return sign * std::ldexp(whole, std::max(exponent, 1) - (largest >> 1) - format.fraction_bits);
}

std::vector<double> all_halves(int dtype) {
    std::vector<double> all(65536);
    for (std::uint32_t bits = 0; bits < 65536; ++bits) all[bits] = decoded(dtype, bits);
    return all;
}

}  // namespace

double rounded(int dtype, double value) {
    if (!std::isfinite(value) || value == 0) return value;
    const Format format = format_of(dtype);
    const int bias = (1 << (format.exponent_bits - 1)) - 1;
    int exponent;
    std::frexp(value, &exponent);  // value = m 2^exponent, 0.5 <= |m| < 1
    const int unit = std::max(exponent - 1, 1 - bias) - format.fraction_bits;
    const double result = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
    const double largest = std::ldexp(2.0 - std::ldexp(1.0, -format.fraction_bits), bias);
    return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : result;
}

double number(int dtype, const void* at, std::int64_t index) {
    static const std::vector<double> kBrain = all_halves(kBfloat16), kHalf = all_halves(kFloat16);
    const std::uint32_t bits = raw(dtype, at, index);
    return dtype == kFloat32 ? decoded(dtype, bits) : (dtype == kBfloat16 ? kBrain : kHalf)[bits];
}

Exact random_numbers(Random& random, int dtype, std::int64_t count, bool wild) {
    const Format format = format_of(dtype);
    const auto bias = (1u << (format.exponent_bits - 1)) - 1, last = (1u << format.exponent_bits) - 1;
    const std::uint32_t sign = 1u << (format.exponent_bits + format.fraction_bits);
    const std::uint32_t special[] = {last << format.fraction_bits,  (last << format.fraction_bits) | 1, 1,
                                     (last << format.fraction_bits) - 1, 1u << format.fraction_bits, 0};
    Exact out(count * element_size(dtype), 0);
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t dice = random.next();
        std::uint32_t bits = static_cast<std::uint32_t>(dice) & (sign - 1) & ((1u << format.fraction_bits) - 1);
        bits |= (bias - 3 + static_cast<std::uint32_t>((dice >> 40) % 5)) << format.fraction_bits;
        if ((dice >> 48) % 16 == 0) bits = 0;
        if (wild && (dice >> 52) % 64 == 0) bits = special[random.below(6)];
        if (dice >> 63 != 0) bits |= sign;
        std::memcpy(out.as() + i * element_size(dtype), &bits, static_cast<std::size_t>(element_size(dtype)));
    }
    return out;
}

void Sum::add(double w, double x) {
    constexpr double kNormal = std::numeric_limits<float>::min();
    const double term = w * x;
    const bool small = (w != 0 && std::fabs(w) < kNormal) || (x != 0 && std::fabs(x) < kNormal);
    ++count_;
    if (std::isnan(term)) {
        nan_ = true;
    } else if (std::isinf(term)) {
        (term > 0 ? plus_ : minus_) = true;
        doubtful_ = doubtful_ || small;  // as zero times infinity it is NaN
    } else {
        sum_ += term;
        size_ += std::fabs(term);
        if (small) subnormal_ += std::fabs(term);
    }
}

bool Sum::admits(int dtype, double y) const {
    if (nan_ || (plus_ && minus_)) return std::isnan(y);
    // Finite terms may overflow on the way to a smaller sum; what follows is not defined.
    if (size_ > std::numeric_limits<float>::max() / 2) return true;
    if (plus_ || minus_) return (std::isinf(y) && (y > 0) == plus_) || (doubtful_ && std::isnan(y));
    const double n = static_cast<double>(count_);
    const double lost = (2 * n + 16) * std::ldexp(size_, -24) + subnormal_ + n * std::numeric_limits<float>::min();
    return rounded(dtype, sum_ - lost) <= y && y <= rounded(dtype, sum_ + lost);
}

std::string Sum::text() const {
    char line[160];
    std::snprintf(line, sizeof line, "sum %.9g of %lld terms, absolute %.9g%s%s%s", sum_, static_cast<long long>(count_),
                  size_, nan_ ? ", NaN" : "", plus_ ? ", +inf" : "", minus_ ? ", -inf" : "");
    return line;
}

bool same(int dtype, const void* a, const void* b, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (raw(dtype, a, i) != raw(dtype, b, i) && !(std::isnan(number(dtype, a, i)) && std::isnan(number(dtype, b, i)))) {
            return false;
        }
    }
    return true;
}

}  // namespace gossamer::fuzz
