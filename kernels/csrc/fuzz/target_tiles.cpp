// Packed matrices of bitmask_gemv.
#include <algorithm>

#include "../bitmask.h"
#include "../tiers.h"
#include "../tiles.h"
#include "reference.h"

namespace gossamer::fuzz {
namespace {

using tiles::Header;
using tiles::Shape;

constexpr std::int64_t kMostBytes = std::int64_t{1} << 22;  // of one input or output

std::int64_t width_of(std::int64_t cols) { return (cols + 7) / 8; }

Header header_of(const Bytes& bytes) {
    Header header{};
    std::memcpy(&header, bytes.data(), std::min(bytes.size(), sizeof header));
    return header;
}

Bytes packed(Random& random, std::int64_t rows, std::int64_t cols, int dtype, std::int64_t kept_of_ten) {
    Exact mask(rows * cols, 0), bits(rows * width_of(cols), 0xFF), counts(8 * rows, 0xFF);
    for (std::int64_t i = 0; i < rows * cols; ++i) mask.as()[i] = random.below(10) < kept_of_ten;
    bitmask::pack(mask.as(), rows, cols, bits.as());
    bitmask::row_counts(bits.as(), rows, width_of(cols), counts.as<std::int64_t>());
    std::int64_t nnz = 0;
    for (std::int64_t r = 0; r < rows; ++r) nnz += counts.as<std::int64_t>()[r];
    const Exact weight = random_numbers(random, dtype, rows * cols, random.once_in(4));
    Exact values(2 * nnz, 0xFF), out(Shape(rows, cols).size(nnz), 0xFF);
    expect(bitmask::compress(weight.as(), bits.as(), rows, cols, 2, values.as(), nnz) == nnz, "compress lost values");
    expect(tiles::pack(bits.as(), values.as<std::uint16_t>(), nnz, rows, cols, dtype, out.as()), "pack refused its input");
    return out.bytes();
}

std::vector<Bytes> make_corpus(Random& random) {
    static constexpr std::int64_t kShapes[][2] = {{0, 5},    {5, 0},     {1, 1},     {1, 63},    {63, 1},  {4, 128},
                                                  {3, 129},  {9, 300},   {8, 256},   {13, 385},  {63, 100}, {100, 63},
                                                  {5, 4097}, {2, 8200},  {17, 4500}, {260, 700}, {6, 20}};
    static constexpr std::int64_t kKept[] = {10, 7, 5, 1, 0};
    std::vector<Bytes> corpus;
    for (const auto& shape : kShapes) {
        for (const std::int64_t kept : kKept) {
            corpus.push_back(packed(random, shape[0], shape[1], random.once_in(2) ? kBfloat16 : kFloat16, kept));
        }
    }
    return corpus;
}

// The layout follows from rows, columns and number of values: a header that says others consistently.
void another_shape(Random& random, Bytes& bytes, Header header) {
    constexpr std::int64_t kLongest = (std::int64_t{1} << 31) - 1;
    static constexpr std::int64_t kLengths[] = {0, 1, 4, 5, 127, 128, 129, 4096, 4097, 8193, kLongest};
    const auto change = [&](std::int64_t* length) {
        *length = random.once_in(2) ? random.pick(kLengths) : std::max<std::int64_t>(0, *length + random.between(-5, 5));
    };
    if (random.once_in(2)) change(&header.rows);
    if (random.once_in(2)) change(&header.cols);
    if (random.once_in(8)) header.rows = header.cols = kLongest;
    const Shape shape(header.rows, header.cols);
    header.panel_cols = shape.panel_cols;
    header.stream = shape.stream();
    switch (random.below(4)) {
        case 0: header.nnz = random.below(1 + std::min<std::int64_t>(header.rows * header.cols, 1 << 16)); break;
        case 1: header.nnz = header.rows * header.cols; break;
        // The number of values that makes the length fit.
        case 2: header.nnz = (static_cast<std::int64_t>(bytes.size()) - shape.size(0)) / 2; break;
        default: break;
    }
    // In unsigned numbers: those of the largest shapes do not fit.
    header.size = static_cast<std::int64_t>(static_cast<std::uint64_t>(shape.size(0)) +
                                            2 * static_cast<std::uint64_t>(header.nnz));
    if (header.size >= 0 && header.size <= kMostBytes / 4) bytes.resize(static_cast<std::size_t>(header.size));
    if (random.once_in(4)) header.size = static_cast<std::int64_t>(bytes.size());
    if (bytes.size() >= sizeof header) std::memcpy(bytes.data(), &header, sizeof header);
}

// Offsets that still rise, but lie elsewhere.
void other_offsets(Random& random, Bytes& bytes, const Header& header) {
    const Shape shape(header.rows, header.cols);
    if (shape.offsets() > (1 << 16) || bytes.size() < sizeof header + 8 * static_cast<std::size_t>(shape.offsets())) return;
    const std::int64_t first = random.below(shape.offsets()), shift = random.between(-70, 70);
    for (std::int64_t i = first; i < shape.offsets(); ++i) {
        std::int64_t offset;
        std::uint8_t* at = bytes.data() + sizeof header + 8 * i;
        std::memcpy(&offset, at, 8);
        offset = static_cast<std::int64_t>(static_cast<std::uint64_t>(offset) + static_cast<std::uint64_t>(shift));
        std::memcpy(at, &offset, 8);
        if (random.once_in(4)) break;
    }
}

// A bit moves to another place of the same masks: of the row, of another row, or outside the matrix. All counts stay.
void move_bits(Random& random, Bytes& bytes, const Header& header) {
    const std::int64_t stream = Shape(header.rows, header.cols).stream(), size = static_cast<std::int64_t>(bytes.size());
    if (stream > size - tiles::kMaskBytes) return;
    // The first tile begins the stream; others are where chance finds them.
    const std::int64_t at = stream + (random.once_in(2) ? 0 : random.below((size - stream) / 2) * 2);
    const std::int64_t reach = std::min<std::int64_t>(tiles::kMaskBytes, size - at);
    for (int tries = 0; tries < 16; ++tries) {
        std::uint8_t* from = bytes.data() + at + random.below(reach);
        std::uint8_t* to = bytes.data() + at + random.below(reach);
        const auto set = static_cast<std::uint8_t>(1 << random.below(8)), gone = static_cast<std::uint8_t>(*from & -*from);
        if (*from == 0 || (*to & set) != 0) continue;
        *from = static_cast<std::uint8_t>(*from ^ gone);
        *to = static_cast<std::uint8_t>(*to | set);
        if (random.once_in(2)) return;
    }
}

void twist(Random& random, Bytes& bytes) {
    const Header header = header_of(bytes);
    const auto sound = [](std::int64_t length) { return length >= 0 && length < std::int64_t{1} << 31; };
    if (!sound(header.rows) || !sound(header.cols)) return;
    switch (random.below(3)) {
        case 0: return another_shape(random, bytes, header);
        case 1: return other_offsets(random, bytes, header);
        default: return move_bits(random, bytes, header);
    }
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
    const Shape shape(header.rows, header.cols);
    const std::int64_t width = width_of(header.cols);
    expect(2 * header.nnz <= matrix.size() && header.rows * width <= matrix.size(), "more values or bits than bytes");
    Exact bits(header.rows * width, 0), values(2 * header.nnz, 0xFF);
    tiles::unpack(matrix.as(), bits.as(), values.as<std::uint16_t>());
    if (header.rows > kMostBytes / 64 || header.cols > kMostBytes / 64) return Outcome::kTooLarge;

    Exact again(matrix.size(), 0xFF), weight(2 * header.rows * header.cols, 0xFF);
    expect(tiles::pack(bits.as(), values.as<std::uint16_t>(), header.nnz, header.rows, header.cols, header.dtype, again.as()),
           "what was unpacked cannot be packed");
    const auto equal = [&](std::int64_t begin, std::int64_t end) {
        return std::memcmp(again.as() + begin, matrix.as() + begin, static_cast<std::size_t>(end - begin)) == 0;
    };
    // Padding behind the offsets and the tail are never looked at.
    expect(equal(0, static_cast<std::int64_t>(sizeof header) + 8 * shape.offsets()) &&
               equal(header.stream, matrix.size() - tiles::kTail),
           "packing what was unpacked gives other bytes");
    expect(bitmask::expand(values.as(), bits.as(), header.rows, header.cols, 2, weight.as(), header.nnz) == header.nnz,
           "expand found another number of values");
    multiply(random, matrix, header, weight);
    return Outcome::kRan;
}

}  // namespace

const Target kTiles = {"tiles", make_corpus, twist, run};

}  // namespace gossamer::fuzz
