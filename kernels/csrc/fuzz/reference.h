// What a product may be: float64 sums of the same terms, and how far float32 sums in any order may be from them.
// Written anew, without the library's conversions.
#pragma once

#include <cstdint>
#include <string>

#include "../gemv.h"
#include "fuzz.h"

namespace gossamer::fuzz {

inline std::int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Element `index` of `at` as a double, exactly.
double number(int dtype, const void* at, std::int64_t index);

// The nearest number of the dtype, ties to even, infinite beyond the largest.
double rounded(int dtype, double value);

// Rows of x, [batch, cols]: numbers of moderate size and both zeros; sometimes infinities, NaN, subnormals, the largest.
Exact random_numbers(Random& random, int dtype, std::int64_t count, bool wild);

// One output.
class Sum {
public:
    void add(double w, double x);
    // Whether y, an element of `dtype`, is what float32 sums of these terms, rounded once, may give. One chain of n
    // fused or unfused steps loses at most 2n units of 2^-24 of the sum of absolute terms. bfloat16 products of newer
    // processors take subnormal factors as zero.
    bool admits(int dtype, double y) const;
    std::string text() const;

private:
    double sum_ = 0, size_ = 0, subnormal_ = 0;
    std::int64_t count_ = 0;
    bool nan_ = false, plus_ = false, minus_ = false, doubtful_ = false;
};

// Elements of both are equal: the same bits, or NaN.
bool same(int dtype, const void* a, const void* b, std::int64_t count);

}  // namespace gossamer::fuzz
