// Packed masks, and packing, with counts that do not fit the bits: bits that another thread changes after Python counted
// them look like this. Buffers have the sizes that Python makes from the arguments.
#include <algorithm>

#include "../bitmask.h"
#include "../dual.h"
#include "../gemv.h"
#include "tile_bytes.h"

namespace gossamer::fuzz {
namespace {

// Bits anywhere, also beyond the last column, from none to all.
Exact random_bits(Random& random, std::int64_t size) {
    Exact bits(size, 0);
    const std::int64_t kept = random.below(9);
    for (std::int64_t i = 0; i < 8 * size; ++i) {
        if (random.below(8) < kept) bits.as()[i / 8] = static_cast<std::uint8_t>(bits.as()[i / 8] | 1 << i % 8);
    }
    return bits;
}

bool bit(const Exact& bits, std::int64_t row, std::int64_t col, std::int64_t cols) {
    return (bits.as()[row * width_of(cols) + col / 8] >> (col % 8) & 1) != 0;
}

// The right number, one near it, or any.
std::int64_t wrong(Random& random, std::int64_t right, std::int64_t most) {
    switch (random.below(4)) {
        case 0: return right;
        case 1: return std::max<std::int64_t>(0, right + random.between(-3, 3));
        case 2: return random.below(right + 1);
        default: return random.below(most + 10);
    }
}

void masks(const Exact& bits, std::int64_t rows, std::int64_t cols) {
    Exact mask(rows * cols, 0xFF), again(bits.size(), 0xFF), counts(8 * rows, 0xFF);
    bitmask::unpack(bits.as(), rows, cols, mask.as());
    bitmask::pack(mask.as(), rows, cols, again.as());
    bitmask::row_counts(bits.as(), rows, width_of(cols), counts.as<std::int64_t>());
    for (std::int64_t r = 0; r < rows; ++r) {
        std::int64_t count = 0;
        for (std::int64_t c = 0; c < 8 * width_of(cols); ++c) {
            const bool set = (bits.as()[r * width_of(cols) + c / 8] >> (c % 8) & 1) != 0;
            const bool kept = (again.as()[r * width_of(cols) + c / 8] >> (c % 8) & 1) != 0;
            count += set;
            expect(kept == (set && c < cols), "a mask came back changed");
            if (c < cols) expect(mask.as()[r * cols + c] == set, "unpack found another bit");
        }
        expect(counts.as<std::int64_t>()[r] == count, "row_counts is wrong");
    }
}

// Both stop at the announced number, and give the right answer where it is right.
void values_of(Random& random, const Exact& bits, std::int64_t rows, std::int64_t cols, std::int64_t inside) {
    static constexpr std::int64_t kElements[] = {1, 2, 4, 8};
    const std::int64_t element = random.pick(kElements), count = wrong(random, inside, rows * cols);
    Exact weight(rows * cols * element, 0), values(count * element, 0xFF), back(rows * cols * element, 0xFF);
    for (std::int64_t i = 0; i < weight.size(); ++i) weight.as()[i] = static_cast<std::uint8_t>(random.next());
    const std::int64_t found = bitmask::compress(weight.as(), bits.as(), rows, cols, element, values.as(), count);
    expect(found == inside, "compress counted " + std::to_string(found) + " of " + std::to_string(inside) + " bits");
    const std::int64_t used = bitmask::expand(values.as(), bits.as(), rows, cols, element, back.as(), count);
    expect(used == inside, "expand counted " + std::to_string(used) + " of " + std::to_string(inside) + " bits");
    for (std::int64_t r = 0; r < rows && count >= inside; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
            for (std::int64_t i = (r * cols + c) * element; i < (r * cols + c + 1) * element; ++i) {
                expect(back.as()[i] == (bit(bits, r, c, cols) ? weight.as()[i] : 0), "a value came back changed");
            }
        }
    }
}

// 16-bit values, or int8 with scales.
void tiles_of(Random& random, const Exact& bits, std::int64_t rows, std::int64_t cols, std::int64_t set, bool strays) {
    static constexpr std::int64_t kValues[] = {kBfloat16, kFloat16, tiles::kInt8};
    const std::int64_t nnz = wrong(random, set, 8 * bits.size()), dtype = random.pick(kValues);
    const tiles::Shape shape(rows, cols, dtype);
    const std::int64_t scaled = dtype == tiles::kInt8 ? rows * ((cols + tiles::kCols - 1) / tiles::kCols) : 0;
    Exact values(shape.value * nnz, 0x55), scales(2 * scaled, 0x55), packed(shape.size(nnz), 0xFF);
    const bool done = tiles::pack(bits.as(), values.as(), scales.as<std::uint16_t>(), nnz, rows, cols, dtype, packed.as());
    expect(done == (nnz == set), "pack says " + std::to_string(done) + " to " + std::to_string(nnz) + " values for " +
                                     std::to_string(set) + " bits");
    const char* fault = done ? tiles::find_fault(packed.as(), packed.size()) : nullptr;
    expect(!done || (fault != nullptr) == strays, "after packing: " + std::string(fault == nullptr ? "no fault" : fault));
}

// Bits outside the matrix are not packed, and never counted as values.
void dual_of(Random& random, const Exact& bits, std::int64_t rows, std::int64_t cols, std::int64_t inside, bool strays) {
    const std::int64_t nnz = wrong(random, inside, 8 * bits.size());
    const std::int64_t dtype = random.once_in(2) ? kBfloat16 : kFloat16;
    Exact values(2 * nnz, 0x55), packed(dual::Shape(rows, cols).size(nnz), 0xFF);
    const bool done = dual::pack(bits.as(), values.as<std::uint16_t>(), nnz, rows, cols, dtype, packed.as());
    expect(done ? nnz == inside : nnz != inside || strays, "dual pack says " + std::to_string(done) + " to " +
                                                               std::to_string(nnz) + " values for " +
                                                               std::to_string(inside) + " bits");
    const char* fault = done ? dual::find_fault(packed.as(), packed.size()) : nullptr;
    expect(fault == nullptr, "after dual packing: " + std::string(fault == nullptr ? "" : fault));
}

Outcome run(Random& random, const Bytes&) {
    const std::int64_t rows = random.below(12), cols = random.once_in(40) ? random.below(9000) : random.below(300);
    const Exact bits = random_bits(random, rows * width_of(cols));
    const bool tidy = random.once_in(2);
    std::int64_t inside = 0, beyond = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < 8 * width_of(cols); ++c) {
            std::uint8_t& byte = bits.as()[r * width_of(cols) + c / 8];
            if (c >= cols && tidy) byte = static_cast<std::uint8_t>(byte & ~(1 << c % 8));
            (c < cols ? inside : beyond) += byte >> (c % 8) & 1;
        }
    }
    masks(bits, rows, cols);
    values_of(random, bits, rows, cols, inside);
    tiles_of(random, bits, rows, cols, inside + beyond, beyond > 0);
    dual_of(random, bits, rows, cols, inside, beyond > 0);
    return Outcome::kRan;
}

}  // namespace

const Target kArguments = {"arguments", nullptr, nullptr, run};

}  // namespace gossamer::fuzz
