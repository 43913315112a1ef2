#include "window.h"

#include <cmath>
#include <limits>

#include "work.h"

namespace gossamer {
namespace {

bool within(const Window& window) {
    const std::int64_t heads = window.batch * window.kv_heads, rows = window.rows;
    bool wrong = false;
    for (std::int64_t i = 0; i < 2 * heads; ++i) {
        const std::int64_t begin = window.ranges[2 * i], count = window.ranges[2 * i + 1];
        wrong |= begin < 0 || count < 0 || count > rows || begin > rows - count;
    }
    if (window.key != nullptr) {
        for (std::int64_t i = 0; i < heads; ++i) wrong |= window.slots[i] < 0 || window.slots[i] >= rows;
    }
    return !wrong;
}

struct Rows {
    std::uint8_t* data;
    std::int64_t bytes;  // of one row
    std::uint8_t* at(std::int64_t row) const { return data + row * bytes; }
};

// Keys of one head in chunks: chunk c has those from c * kWindowChunk on, the first range before the second.
WindowPart part_of(const std::int64_t* ranges, std::int64_t chunk, const Rows& keys, const Rows& values) {
    WindowPart part{};
    const std::int64_t begin = chunk * kWindowChunk, end = begin + kWindowChunk;
    std::int64_t before = 0;
    for (int run = 0; run < 2; ++run) {
        const std::int64_t count = ranges[2 * run + 1];
        const std::int64_t from = std::max<std::int64_t>(begin - before, 0), to = std::min(end - before, count);
        const std::int64_t row = from < to ? ranges[2 * run] + from : 0;
        part.keys[run] = keys.at(row);
        part.values[run] = values.at(row);
        part.count[run] = std::max<std::int64_t>(to - from, 0);
        before += count;
    }
    return part;
}

}  // namespace

bool window_attention(const Tier& tier, int dtype, const Window& window, int threads) {
    if (!within(window)) return false;
    const std::int64_t heads = window.batch * window.kv_heads, group = window.group, width = window.width;
    const std::int64_t row = width * element_size(dtype);
    const Rows keys{static_cast<std::uint8_t*>(window.keys), row}, values{static_cast<std::uint8_t*>(window.values), row};
    if (window.key != nullptr) {
        const auto* key = static_cast<const std::uint8_t*>(window.key);
        const auto* value = static_cast<const std::uint8_t*>(window.value);
        for (std::int64_t i = 0; i < heads; ++i) {
            std::memcpy(keys.at(window.slots[i]), key + i * row, static_cast<std::size_t>(row));
            std::memcpy(values.at(window.slots[i]), value + i * row, static_cast<std::size_t>(row));
        }
    }
    const WindowSizes sizes = tier.window_sizes(dtype, static_cast<int>(group), width);
    // Chunks of all heads in one line: firsts[i] is the first one of head i.
    auto* firsts = reinterpret_cast<std::int64_t*>(scratch<0>(8 * (heads + 1)));
    std::int64_t chunks = 0, seen = 0;
    for (std::int64_t i = 0; i < heads; ++i) {
        firsts[i] = chunks;
        const std::int64_t count = window.ranges[4 * i + 1] + window.ranges[4 * i + 3];
        chunks += (count + kWindowChunk - 1) / kWindowChunk;
        seen += count;
    }
    firsts[heads] = chunks;
    auto* queries = reinterpret_cast<float*>(scratch<1>(4 * heads * group * sizes.query));
    for (std::int64_t i = 0; i < heads * group; ++i) {
        tier.window_prepare(dtype, static_cast<const std::uint8_t*>(window.query) + i * row, width,
                            queries + i * sizes.query);
    }
    const std::int64_t size = group * (sizes.sums + 2);  // sums, then the greatest scores, then the totals
    auto* results = reinterpret_cast<float*>(scratch<2>(4 * chunks * size));
    const int parts = parts_for(2 * seen * row, threads);
    // A chunk belongs to the part in whose share of all keys its first one lies.
    in_parts(parts, [&](int part) {
        std::uint8_t* room = scratch<3>(4 * sizes.room);
        std::int64_t before = 0;
        for (std::int64_t head = 0; head < heads; ++head) {
            for (std::int64_t chunk = firsts[head]; chunk < firsts[head + 1]; ++chunk) {
                WindowPart call = part_of(window.ranges + 4 * head, chunk - firsts[head], keys, values);
                const bool mine = before * parts / seen == part;
                before += call.count[0] + call.count[1];
                if (!mine) continue;
                call.width = width;
                call.group = static_cast<int>(group);
                call.scale = window.scale;
                call.query = queries + head * group * sizes.query;
                call.room = room;
                call.sums = results + chunk * size;
                call.best = call.sums + group * sizes.sums;
                call.total = call.best + group;
                tier.window_run(dtype, call);
            }
        }
    });
    // Chunks of a head are merged in order, into the first.
    auto* out = static_cast<std::uint8_t*>(window.out);
    for (std::int64_t i = 0; i < heads; ++i) {
        const std::int64_t count = firsts[i + 1] - firsts[i];
        if (count == 0) {
            std::memset(out + i * group * row, 0, static_cast<std::size_t>(group * row));
            continue;
        }
        float* first = results + firsts[i] * size;
        for (std::int64_t q = 0; q < group; ++q) {
            float* sums = first + q * sizes.sums;
            const auto best = [&](std::int64_t c) { return first[c * size + group * sizes.sums + q]; };
            const auto total = [&](std::int64_t c) { return first[c * size + group * (sizes.sums + 1) + q]; };
            float greatest = best(0), sum = total(0);
            for (std::int64_t c = 1; c < count; ++c) greatest = best(c) > greatest ? best(c) : greatest;
            if (count > 1) {
                const float weight = std::exp(best(0) - greatest);
                sum *= weight;
                for (std::int64_t k = 0; k < sizes.sums; ++k) sums[k] *= weight;
            }
            for (std::int64_t c = 1; c < count; ++c) {
                const float weight = std::exp(best(c) - greatest);
                const float* other = sums + c * size;
                sum += weight * total(c);
                for (std::int64_t k = 0; k < sizes.sums; ++k) sums[k] += weight * other[k];
            }
            tier.window_finish(dtype, sums, sum, width, out + (i * group + q) * row);
        }
    }
    return true;
}

}  // namespace gossamer
