// Packed matrices of dual_gemv.
#include "../active.h"
#include "../dual.h"

#include <algorithm>
#include <cmath>

#include "../bitmask.h"
#include "../tiers.h"
#include "reference.h"
#include "tile_bytes.h"

namespace gossamer::fuzz {
namespace {

using dual::Header;
using dual::Shape;

Header dual_header(const Bytes& bytes) {
    Header header{};
    std::memcpy(&header, bytes.data(), std::min(bytes.size(), sizeof header));
    return header;
}

Bytes packed(Random& random, std::int64_t rows, std::int64_t cols, int dtype, std::int64_t kept_of_ten) {
    std::int64_t nnz;
    const Exact bits = random_mask(random, rows, cols, kept_of_ten, &nnz);
    const Exact values = random_numbers(random, dtype, nnz, random.once_in(4));
    Exact out(Shape(rows, cols).size(nnz), 0xFF);
    expect(dual::pack(bits.as(), values.as<std::uint16_t>(), nnz, rows, cols, dtype, out.as()), "pack refused its input");
    return out.bytes();
}

std::vector<Bytes> make_corpus(Random& random) {
    static constexpr std::int64_t kTall[][2] = {{256, 30}, {257, 13}, {700, 40}, {2100, 9}};
    std::vector<Bytes> corpus;
    for (const std::int64_t kept : kKept) {
        const auto add = [&](const std::int64_t (&shape)[2]) {
            corpus.push_back(packed(random, shape[0], shape[1], random.once_in(2) ? kBfloat16 : kFloat16, kept));
        };
        for (const auto& shape : kShapes) add(shape);
        for (const auto& shape : kTall) add(shape);
    }
    return corpus;
}

// A header that says another shape, dtype or number of values consistently.
void another_shape(Random& random, Bytes& bytes, Header header) {
    constexpr std::int64_t kLongest = (std::int64_t{1} << 31) - 1;
    static constexpr std::int64_t kLengths[] = {0, 1, 63, 64, 65, 255, 256, 257, 512, 2049, kLongest};
    const auto change = [&](std::int64_t* length) {
        *length = random.once_in(2) ? random.pick(kLengths) : std::max<std::int64_t>(0, *length + random.between(-5, 5));
    };
    if (random.once_in(2)) change(&header.rows);
    if (random.once_in(2)) change(&header.cols);
    if (random.once_in(8)) header.rows = header.cols = kLongest;
    if (random.once_in(8)) header.dtype = 3 - header.dtype;
    const Shape shape(header.rows, header.cols);
    header.stream = shape.stream();
    switch (random.below(5)) {
        case 0: header.nnz = random.below(1 + std::min<std::int64_t>(header.rows * header.cols, 1 << 16)); break;
        case 1: header.nnz = header.rows * header.cols; break;
        // The number of values that makes the length fit.
        case 2: header.nnz = (static_cast<std::int64_t>(bytes.size()) - shape.size(0)) / 2; break;
        case 3: header.nnz = kLongest - dual::kMaskWords * shape.blocks * shape.cols + random.between(-1, 1); break;
        default: break;
    }
    header.size = static_cast<std::int64_t>(static_cast<std::uint64_t>(shape.size(0)) +
                                            2 * static_cast<std::uint64_t>(header.nnz));
    if (header.size >= 0 && header.size <= kMostBytes / 4) bytes.resize(static_cast<std::size_t>(header.size));
    if (random.once_in(4)) header.size = static_cast<std::int64_t>(bytes.size());
    if (bytes.size() >= sizeof header) std::memcpy(bytes.data(), &header, sizeof header);
}

// Offsets that still rise, but lie elsewhere.
void other_offsets(Random& random, Bytes& bytes, const Header& header) {
    const std::int64_t count = (Shape(header.rows, header.cols).panels + 1) * header.cols;
    if (count == 0 || count > (1 << 16) || bytes.size() < sizeof header + 4 * static_cast<std::size_t>(count)) return;
    const auto shift = static_cast<std::uint32_t>(random.between(-70, 70));
    for (std::int64_t i = random.below(count); i < count; ++i) {
        std::uint32_t offset;
        std::uint8_t* at = bytes.data() + sizeof header + 4 * i;
        std::memcpy(&offset, at, 4);
        offset += shift;
        std::memcpy(at, &offset, 4);
        if (random.once_in(4)) break;
    }
}

// A bit of the first mask moves to another place of it, or outside the matrix. All counts stay.
void move_bit(Random& random, Bytes& bytes, const Header& header) {
    const std::int64_t stream = Shape(header.rows, header.cols).stream();
    if (stream > static_cast<std::int64_t>(bytes.size()) - 8) return;
    std::uint64_t mask;
    std::memcpy(&mask, bytes.data() + stream, 8);
    const std::uint64_t set = std::uint64_t{1} << random.below(64);
    if (mask == 0 || (mask & set) != 0) return;
    mask = (mask & (mask - 1)) | set;
    std::memcpy(bytes.data() + stream, &mask, 8);
}

void twist(Random& random, Bytes& bytes) {
    const Header header = dual_header(bytes);
    const auto sound = [](std::int64_t length) { return length >= 0 && length < std::int64_t{1} << 31; };
    if (!sound(header.rows) || !sound(header.cols)) return;
    switch (random.below(3)) {
        case 0: return another_shape(random, bytes, header);
        case 1: return other_offsets(random, bytes, header);
        default: return move_bit(random, bytes, header);
    }
}

struct Case {
    int dtype, batch;
    std::int64_t outputs, channels;
    const Exact& weight;  // [outputs, channels]
    const Exact& x;
    const Exact& threshold;
    const void* bias;  // [outputs] or null
    bool active(std::int64_t b, std::int64_t i) const {
        return !(std::fabs(number(dtype, x.as(), b * channels + i)) <= number(kFloat32, threshold.as(), i));
    }
};

// The tier's own function on lists of exactly their length, the panels split at random.
void run_split(Random& random, const Tier& tier, const Exact& matrix, const Header& header, const Case& c, const Exact& y) {
    const std::int64_t panels = Shape(header.rows, header.cols).panels;
    const int padded = padded_batch(c.batch);
    const Exact list(4 * c.channels + 64, 0xFF), values(4 * c.channels * padded + 64, 0xFF);
    const std::int64_t count = tier.compact(c.dtype, c.x.as(), c.batch, c.channels, c.threshold.as<float>(),
                                            list.as<std::int32_t>(), values.as<float>());
    const Exact active(4 * count, 0), x(4 * count * padded, 0);
    if (count > 0) {
        std::memcpy(active.as(), list.as(), static_cast<std::size_t>(active.size()));
        std::memcpy(x.as(), values.as(), static_cast<std::size_t>(x.size()));
    }
    const DualCall call{matrix.as<std::int32_t>() + sizeof header / 4,
                        reinterpret_cast<const std::uint16_t*>(matrix.as() + header.stream),
                        c.channels,
                        c.outputs,
                        panels,
                        active.as<std::int32_t>(),
                        count,
                        x.as<float>(),
                        c.batch,
                        y.as(),
                        c.bias};
    for (std::int64_t begin = 0, end; begin < panels; begin = end) {
        end = random.once_in(3) ? panels : random.between(begin + 1, panels);
        tier.dual_run(c.dtype, call, begin, end);
    }
}

void compare(Random& random, const Case& c, const Exact& y, const char* tier) {
    for (int n = 0; n < 4 && c.outputs > 0; ++n) {
        const std::int64_t o = n == 0 ? c.outputs - 1 : random.below(c.outputs), b = random.below(c.batch);
        Sum sum;
        if (c.bias != nullptr) sum.add(number(c.dtype, c.bias, o), 1.0);
        for (std::int64_t i = 0; i < c.channels; ++i) {
            bool any = false;
            for (std::int64_t other = 0; other < c.batch; ++other) any = any || c.active(other, i);
            if (!any) continue;
            // A channel that only another row needs is multiplied by 0.
            const double value = c.active(b, i) ? number(c.dtype, c.x.as(), b * c.channels + i) : 0.0;
            sum.add(number(c.dtype, c.weight.as(), o * c.channels + i), value);
        }
        const double found = number(c.dtype, y.as(), b * c.outputs + o);
        expect(sum.admits(c.dtype, found), std::string(tier) + ": output " + std::to_string(o) + " is " +
                                               std::to_string(found) + ", expected " + sum.text());
    }
}

void multiply(Random& random, const Exact& matrix, const Header& header, const Exact& weight) {
    const int dtype = static_cast<int>(header.dtype), batch = static_cast<int>(random.between(1, kMaxBatch));
    const Exact x = random_numbers(random, dtype, batch * header.cols, random.once_in(4));
    const Exact threshold = random_numbers(random, kFloat32, header.cols, random.once_in(4));
    const Exact bias = random_numbers(random, dtype, header.rows, false);
    const Case c{dtype, batch, header.rows, header.cols, weight, x, threshold, random.once_in(2) ? bias.as() : nullptr};
    const std::int64_t outputs = batch * header.rows;
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact y(2 * outputs, 0xFF), split(2 * outputs, 0x7F);
        const ActiveMatrix whole{matrix.as(), header.rows, true, c.bias, y.as()};
        active_gemv(*tier, dtype, x.as(), batch, header.cols, threshold.as<float>(), nullptr, &whole, 1,
                    static_cast<int>(random.between(1, 4)));
        if (header.cols < 512) {
            run_split(random, *tier, matrix, header, c, split);
        } else {  // cut into parts of its channels as well, by its shape: other threads must not show
            const ActiveMatrix again{matrix.as(), header.rows, true, c.bias, split.as()};
            active_gemv(*tier, dtype, x.as(), batch, header.cols, threshold.as<float>(), nullptr, &again, 1,
                        static_cast<int>(random.between(1, 4)));
        }
        expect(same(dtype, y.as(), split.as(), outputs), std::string(tier->name) + ": another split gives other bits");
        compare(random, c, y, tier->name);
    }
}

// The dense matrix transposed, bit for bit, on every tier and any number of threads.
void expand_whole(Random& random, const Exact& matrix, const Header& header, const Exact& weight) {
    for (int i = 0; i < kTiers; ++i) {
        const Tier* tier = tier_at(i);
        if (tier == nullptr) continue;
        const Exact weight_t(2 * header.rows * header.cols, 0xFF);
        dual_expand(*tier, matrix.as(), weight_t.as<std::uint16_t>(), static_cast<int>(random.between(1, 4)));
        for (std::int64_t o = 0; o < header.rows; ++o) {
            for (std::int64_t c = 0; c < header.cols; ++c) {
                expect(weight_t.as<std::uint16_t>()[c * header.rows + o] == weight.as<std::uint16_t>()[o * header.cols + c],
                       std::string(tier->name) + ": the dense matrix has another value");
            }
        }
    }
}

Outcome run(Random& random, const Bytes& bytes) {
    const Exact matrix(bytes);
    if (dual::find_fault(matrix.as(), matrix.size()) != nullptr) return Outcome::kRefused;
    const Header header = dual_header(bytes);
    const Shape shape(header.rows, header.cols);
    const std::int64_t width = width_of(header.cols);
    // One column takes a whole byte of each row's bits, but one bit of a mask.
    expect(2 * header.nnz <= matrix.size() && header.rows * width <= 8 * matrix.size(), "more values or bits than bytes");
    Exact bits(header.rows * width, 0), values(2 * header.nnz, 0xFF);
    dual::unpack(matrix.as(), bits.as(), values.as<std::uint16_t>());
    if (header.rows > kMostBytes / 64 || header.cols > kMostBytes / 64) return Outcome::kTooLarge;

    const Exact again(matrix.size(), 0xFF), weight(2 * header.rows * header.cols, 0xFF);
    expect(dual::pack(bits.as(), values.as<std::uint16_t>(), header.nnz, header.rows, header.cols, header.dtype, again.as()),
           "what was unpacked cannot be packed");
    const std::int64_t offsets_end = static_cast<std::int64_t>(sizeof header) + 4 * (shape.panels + 1) * shape.cols;
    expect(equal_but_padding(again, matrix, offsets_end, header.stream), "packing what was unpacked gives other bytes");
    expect(bitmask::expand(values.as(), bits.as(), header.rows, header.cols, 2, weight.as(), header.nnz) == header.nnz,
           "expand found another number of values");
    multiply(random, matrix, header, weight);
    expand_whole(random, matrix, header, weight);
    return Outcome::kRan;
}

}  // namespace

const Target kDual = {"dual", make_corpus, twist, run};

}  // namespace gossamer::fuzz
