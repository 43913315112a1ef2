// Packed matrices of bitmask_gemv.
#include "../bitmask.h"
#include "../tiers.h"
#include "../tiles.h"
#include "reference.h"
#include "tile_bytes.h"

namespace gossamer::fuzz {
namespace {

using tiles::Header;
using tiles::Shape;

Bytes packed(Random& random, std::int64_t rows, std::int64_t cols, int dtype, std::int64_t kept_of_ten) {
    std::int64_t nnz;
    const Exact bits = random_mask(random, rows, cols, kept_of_ten, &nnz);
    const Exact weight = random_numbers(random, dtype, rows * cols, random.once_in(4));
    Exact values(2 * nnz, 0xFF), out(Shape(rows, cols).size(nnz), 0xFF);
    expect(bitmask::compress(weight.as(), bits.as(), rows, cols, 2, values.as(), nnz) == nnz, "compress lost values");
    expect(tiles::pack(bits.as(), values.as(), nullptr, nnz, rows, cols, dtype, out.as()), "pack refused its input");
    return out.bytes();
}

std::vector<Bytes> make_corpus(Random& random) {
    std::vector<Bytes> corpus;
    for (const auto& shape : kShapes) {
        for (const std::int64_t kept : kKept) {
            corpus.push_back(packed(random, shape[0], shape[1], random.once_in(2) ? kBfloat16 : kFloat16, kept));
        }
    }
    return corpus;
}

// The tier's own functions with prepared x and sums of exactly their size, the row tiles split at random.
void run_split(Random& random, const Tier& tier, const Exact& matrix, const Header& header, const Exact& x, int batch,
               const Exact& y) {
    const Shape shape(header.rows, header.cols);
    const int dtype = static_cast<int>(header.dtype);
    BitmaskCall call{};
    call.offsets = matrix.as<std::int64_t>() + sizeof header / 8;
    call.stream = reinterpret_cast<const std::uint16_t*>(matrix.as() + header.stream);
    call.rows = shape.rows, call.row_tiles = shape.row_tiles, call.panels = shape.panels;
    call.panel_cols = shape.panel_cols, call.cols = shape.cols;
    call.stride = tier.bitmask_row(dtype, shape.cols), call.batch = batch;
    const Exact prepared(call.stride * padded_batch(batch), 0), sums(4 * shape.rows * batch, 0xFF);
    for (int b = 0; b < batch; ++b) {
        tier.bitmask_prepare(dtype, x.as() + 2 * b * shape.cols, shape.cols, prepared.as() + b * call.stride);
    }
    call.x = prepared.as(), call.sums = sums.as<float>();
    for (std::int64_t begin = 0, end; begin < shape.row_tiles; begin = end) {
        end = random.once_in(3) ? shape.row_tiles : random.between(begin + 1, shape.row_tiles);
        tier.bitmask_run(dtype, call, begin, end);
    }
    tier.narrow(dtype, sums.as<float>(), shape.rows * batch, y.as());
}

void compare(Random& random, const Header& header, const Exact& weight, const Exact& x, int batch, const Exact& y,
             const char* tier) {
    const int dtype = static_cast<int>(header.dtype);
    for (int n = 0; n < 4; ++n) {
        const std::int64_t r = n == 0 ? header.rows - 1 : random.below(header.rows), b = random.below(batch);
        Sum sum;
        for (std::int64_t c = 0; c < header.cols; ++c) {
            sum.add(number(dtype, weight.as(), r * header.cols + c), number(dtype, x.as(), b * header.cols + c));
        }
        const double found = number(dtype, y.as(), b * header.rows + r);
        expect(sum.admits(dtype, found), std::string(tier) + ": row " + std::to_string(r) + " is " +
                                             std::to_string(found) + ", expected " + sum.text());
    }
}

void multiply(Random& random, const Exact& matrix, const Header& header, const Exact& weight) {
    const int dtype = static_cast<int>(header.dtype), batch = static_cast<int>(random.between(1, kMaxBatch));
    const Exact x = random_numbers(random, dtype, batch * header.cols, random.once_in(8));
    const std::int64_t outputs = batch * header.rows;
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact y(2 * outputs, 0xFF), split(2 * outputs, 0x7F);
        // Without torch in the process the parts of several threads run one after the other.
        const int threads = static_cast<int>(random.between(1, 4));
        const Matrix one{matrix.as(), header.rows, true, y.as()};
        gemv(*tier, dtype, x.as(), batch, header.cols, &one, 1, threads);
        const Exact view(weight.size(), 0xFF);
        expand(*tier, matrix.as(), view.as<std::uint16_t>(), threads);
        expect(view.size() == 0 || std::memcmp(view.as(), weight.as(), static_cast<std::size_t>(view.size())) == 0,
               std::string(tier->name) + ": expanding gives another matrix");
        run_split(random, *tier, matrix, header, x, batch, split);
        expect(same(dtype, y.as(), split.as(), outputs), std::string(tier->name) + ": another split gives other bits");
        if (header.rows > 0) compare(random, header, weight, x, batch, y, tier->name);
    }
}

Outcome run(Random& random, const Bytes& bytes) {
    const Exact matrix(bytes);
    if (tiles::find_fault(matrix.as(), matrix.size()) != nullptr) return Outcome::kRefused;
    const Header header = header_of(bytes);
    if (header.dtype == tiles::kInt8) return Outcome::kRefused;  // by Python: see target_int8.cpp
    const Shape shape(header.rows, header.cols);
    const std::int64_t width = width_of(header.cols);
    expect(2 * header.nnz <= matrix.size() && header.rows * width <= matrix.size(), "more values or bits than bytes");
    Exact bits(header.rows * width, 0), values(2 * header.nnz, 0xFF);
    tiles::unpack(matrix.as(), bits.as(), values.as(), nullptr);
    if (header.rows > kMostBytes / 64 || header.cols > kMostBytes / 64) return Outcome::kTooLarge;

    Exact again(matrix.size(), 0xFF), weight(2 * header.rows * header.cols, 0xFF);
    expect(tiles::pack(bits.as(), values.as(), nullptr, header.nnz, header.rows, header.cols, header.dtype, again.as()),
           "what was unpacked cannot be packed");
    expect(equal_but_padding(again, matrix, static_cast<std::int64_t>(sizeof header) + 8 * shape.offsets(), header.stream),
           "packing what was unpacked gives other bytes");
    expect(bitmask::expand(values.as(), bits.as(), header.rows, header.cols, 2, weight.as(), header.nnz) == header.nnz,
           "expand found another number of values");
    multiply(random, matrix, header, weight);
    return Outcome::kRan;
}

}  // namespace

const Target kTiles = {"tiles", make_corpus, twist_tiles, run};

}  // namespace gossamer::fuzz
