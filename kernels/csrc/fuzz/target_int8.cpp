// Packed matrices of int8_gemv. Its results are defined to the bit, so they are computed anew here and compared exactly.
#include <algorithm>
#include <cmath>

#include "../bitmask.h"
#include "../tiers.h"
#include "reference.h"
#include "tile_bytes.h"

namespace gossamer::fuzz {
namespace {

using tiles::Header;
using tiles::kCols;
using tiles::Shape;

std::int64_t groups_of(std::int64_t cols) { return (cols + kCols - 1) / kCols; }

Bytes packed(Random& random, std::int64_t rows, std::int64_t cols, std::int64_t kept_of_ten) {
    std::int64_t nnz;
    const Exact bits = random_mask(random, rows, cols, kept_of_ten, &nnz);
    Exact values(nnz, 0), scales(2 * rows * groups_of(cols), 0), out(Shape(rows, cols, tiles::kInt8).size(nnz), 0xFF);
    for (std::int64_t i = 0; i < nnz; ++i) values.as()[i] = static_cast<std::uint8_t>(random.next());
    const bool wild = random.once_in(4);
    for (std::int64_t i = 0; i < scales.size() / 2; ++i) {
        const std::int64_t scale = wild ? random.below(0x7C00) : random.between(0x1000, 0x2800);
        scales.as<std::uint16_t>()[i] = static_cast<std::uint16_t>(random.once_in(20) ? 0 : scale);
    }
    expect(tiles::pack(bits.as(), values.as(), scales.as<std::uint16_t>(), nnz, rows, cols, tiles::kInt8, out.as()),
           "pack refused its input");
    return out.bytes();
}

std::vector<Bytes> make_corpus(Random& random) {
    std::vector<Bytes> corpus;
    for (const auto& shape : kShapes) {
        for (const std::int64_t kept : kKept) corpus.push_back(packed(random, shape[0], shape[1], kept));
    }
    return corpus;
}

// The matrix as unpacked.
struct Plain {
    std::int64_t rows, cols;
    Exact weight, scales;  // int8 [rows, cols] and float16 [rows, groups]
};

// One group of a row of x times one of the weight, as kernels/int8_gemv/reference.py says.
struct Group {
    float scale = 0;
    double numbers[kCols] = {};
    Group(int dtype, const Exact& x, std::int64_t first, std::int64_t count) {
        float largest = 0, of[kCols] = {};
        bool finite = true;
        for (std::int64_t i = 0; i < count; ++i) {
            of[i] = static_cast<float>(number(dtype, x.as(), first + i));
            finite = finite && std::isfinite(of[i]);
            largest = std::max(largest, std::fabs(of[i]));
        }
        if (!finite) scale = std::nanf("");
        if (!finite || largest < std::ldexp(1.0f, -100)) return;
        const float inverse = 127.0f / largest;
        scale = largest / 127.0f;
        for (std::int64_t i = 0; i < count; ++i) numbers[i] = std::nearbyint(of[i] * inverse);
    }
};

float expected(int dtype, const Plain& plain, const Exact& x, std::int64_t b, std::int64_t r) {
    float y = 0;
    for (std::int64_t g = 0; g < groups_of(plain.cols); ++g) {
        const std::int64_t first = g * kCols, count = std::min(kCols, plain.cols - first);
        const Group group(dtype, x, b * plain.cols + first, count);
        double dot = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            dot += plain.weight.as<std::int8_t>()[r * plain.cols + first + i] * group.numbers[i];
        }
        const auto scale = static_cast<float>(number(kFloat16, plain.scales.as(), r * groups_of(plain.cols) + g));
        const float scaled = static_cast<float>(dot) * scale, product = scaled * group.scale;
        y += product;
    }
    return y;
}

// As int8_gemv does, with prepared x and sums of exactly their size, the row tiles split at random.
void run_split(Random& random, const Tier& tier, int dtype, const Exact& matrix, const Header& header, const Exact& x,
               int batch, const Exact& y) {
    const Shape shape(header.rows, header.cols, header.dtype);
    Int8Call call{};
    call.offsets = matrix.as<std::int64_t>() + sizeof header / 8;
    call.stream = matrix.as() + header.stream;
    call.rows = shape.rows, call.row_tiles = shape.row_tiles, call.panels = shape.panels;
    call.panel_cols = shape.panel_cols, call.cols = shape.cols, call.batch = batch;
    const Exact prepared(tier.int8_bytes(batch, shape.cols), 0xFF), sums(4 * shape.rows * batch, 0xFF);
    tier.int8_prepare(dtype, x.as(), prepared.as(), &call);
    call.sums = sums.as<float>();
    for (std::int64_t begin = 0, end; begin < shape.row_tiles; begin = end) {
        end = random.once_in(3) ? shape.row_tiles : random.between(begin + 1, shape.row_tiles);
        tier.int8_run(call, begin, end);
    }
    tier.narrow(dtype, sums.as<float>(), shape.rows * batch, y.as());
}

void multiply(Random& random, const Exact& matrix, const Header& header, const Plain& plain) {
    const int dtype = static_cast<int>(random.below(kDtypes)), batch = static_cast<int>(random.between(1, kMaxBatch));
    const Exact x = random_numbers(random, dtype, batch * header.cols, random.once_in(4));
    const std::int64_t outputs = batch * header.rows, bytes = outputs * element_size(dtype);
    const Exact first(bytes, 0xFF);
    int8_gemv(*tier_scalar(), dtype, x.as(), batch, matrix.as(), first.as(), 1);
    for (int n = 0; n < 4 && header.rows > 0; ++n) {
        const std::int64_t r = n == 0 ? header.rows - 1 : random.below(header.rows), b = random.below(batch);
        const double wanted = rounded(dtype, expected(dtype, plain, x, b, r));
        const double found = number(dtype, first.as(), b * header.rows + r);
        const bool equal = found == wanted && std::signbit(found) == std::signbit(wanted);
        expect(equal || (std::isnan(found) && std::isnan(wanted)),
               "row " + std::to_string(r) + " is " + std::to_string(found) + ", expected " + std::to_string(wanted));
    }
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact y(bytes, 0xFF), split(bytes, 0x7F);
        int8_gemv(*tier, dtype, x.as(), batch, matrix.as(), y.as(), static_cast<int>(random.between(1, 4)));
        expect(same(dtype, y.as(), first.as(), outputs), std::string(tier->name) + ": other bits than scalar");
        run_split(random, *tier, dtype, matrix, header, x, batch, split);
        expect(same(dtype, y.as(), split.as(), outputs), std::string(tier->name) + ": another split gives other bits");
    }
}

Outcome run(Random& random, const Bytes& bytes) {
    const Exact matrix(bytes);
    if (tiles::find_fault(matrix.as(), matrix.size()) != nullptr) return Outcome::kRefused;
    const Header header = header_of(bytes);
    if (header.dtype != tiles::kInt8) return Outcome::kRefused;  // by Python: see target_tiles.cpp
    const Shape shape(header.rows, header.cols, header.dtype);
    const std::int64_t width = width_of(header.cols), scaled = 2 * header.rows * groups_of(header.cols);
    expect(header.nnz <= matrix.size() && header.rows * width <= matrix.size() && scaled <= matrix.size(),
           "more values, bits or scales than bytes");
    Exact bits(header.rows * width, 0), values(header.nnz, 0xFF), scales(scaled, 0xFF);
    tiles::unpack(matrix.as(), bits.as(), values.as(), scales.as<std::uint16_t>());
    if (header.rows > kMostBytes / 64 || header.cols > kMostBytes / 64) return Outcome::kTooLarge;

    const Exact again(matrix.size(), 0xFF);
    expect(tiles::pack(bits.as(), values.as(), scales.as<std::uint16_t>(), header.nnz, header.rows, header.cols,
                       header.dtype, again.as()),
           "what was unpacked cannot be packed");
    expect(equal_but_padding(again, matrix, static_cast<std::int64_t>(sizeof header) + 8 * shape.offsets(), header.stream),
           "packing what was unpacked gives other bytes");
    const Plain plain{header.rows, header.cols, Exact(header.rows * header.cols, 0xFF), Exact(scales.bytes())};
    expect(bitmask::expand(values.as(), bits.as(), header.rows, header.cols, 1, plain.weight.as(), header.nnz) == header.nnz,
           "expand found another number of values");
    multiply(random, matrix, header, plain);
    return Outcome::kRan;
}

}  // namespace

const Target kInt8 = {"int8", make_corpus, twist_tiles, run};

}  // namespace gossamer::fuzz
