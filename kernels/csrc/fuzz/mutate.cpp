// Blind mutations: nothing here knows a layout, only that headers come first and integers have 1, 2, 4 or 8 bytes.
#include <algorithm>

#include "fuzz.h"

namespace gossamer::fuzz {
namespace {

constexpr std::int64_t kLongest = std::int64_t{1} << 20;

std::int64_t length(const Bytes& bytes) { return static_cast<std::int64_t>(bytes.size()); }

// Headers and offsets are few among many bytes of values, so they are hit on purpose.
std::int64_t position(Random& random, const Bytes& bytes) {
    static constexpr std::int64_t kReach[] = {64, 64, 256, 1 << 12, kLongest};
    return random.below(std::min(length(bytes), random.pick(kReach)));
}

std::uint64_t interesting(Random& random, const Bytes& bytes, std::uint64_t old) {
    static constexpr std::uint64_t kBorders[] = {
        0, 1, 2, 3, 4, 63, 64, 127, 128, 255, 256, 4095, 4096, 32767, 32768, 65535, 65536,
        0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000, std::uint64_t{1} << 60, std::uint64_t{1} << 61,
        std::uint64_t{1} << 62, 0x7FFFFFFFFFFFFFFF, std::uint64_t{1} << 63, 0xFFFFFFFFFFFFFFFF,
    };
    switch (random.below(6)) {
        case 0: return old + static_cast<std::uint64_t>(random.between(-4, 4));
        case 1: return static_cast<std::uint64_t>(random.between(-64, 64));
        case 2: return static_cast<std::uint64_t>(length(bytes) + random.between(-130, 130));
        case 3: return old ^ std::uint64_t{1} << random.below(64);
        default: return random.pick(kBorders) + static_cast<std::uint64_t>(random.once_in(3) ? random.between(-2, 2) : 0);
    }
}

// Replaces the integer of 1, 2, 4 or 8 bytes at an aligned place.
void overwrite(Random& random, Bytes& bytes) {
    static constexpr std::int64_t kWidths[] = {1, 1, 2, 4, 8, 8, 8, 8};
    const std::int64_t width = random.pick(kWidths);
    const std::int64_t at = position(random, bytes) / width * width;
    const auto size = static_cast<std::size_t>(std::min(width, length(bytes) - at));
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, size);
    word = interesting(random, bytes, word);
    std::memcpy(bytes.data() + at, &word, size);
}

// Bytes of another place or another input over those here, inserted before them, or both swapped.
void splice(Random& random, const std::vector<Bytes>& corpus, Bytes& bytes) {
    const bool foreign = random.once_in(2);
    const Bytes from = foreign ? corpus[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(corpus.size())))]
                               : bytes;
    if (from.empty()) return;
    const std::int64_t at = position(random, from), to = position(random, bytes);
    const std::int64_t most = std::min<std::int64_t>(length(from) - at, random.once_in(2) ? 16 : 4096);
    const std::int64_t count = random.between(1, most);
    if (random.once_in(3) && length(bytes) + count <= kLongest) {
        bytes.insert(bytes.begin() + to, from.begin() + at, from.begin() + at + count);
        return;
    }
    const std::int64_t fitting = std::min(count, length(bytes) - to);
    if (!foreign && random.once_in(2)) {
        std::copy_n(from.begin() + to, std::min(fitting, length(bytes) - at), bytes.begin() + at);
    }
    std::copy_n(from.begin() + at, fitting, bytes.begin() + to);
}

void change(Random& random, const std::vector<Bytes>& corpus, Bytes& bytes) {
    if (bytes.empty()) {
        bytes.assign(static_cast<std::size_t>(random.between(1, 200)), 0);
        return;
    }
    switch (random.below(8)) {
        case 0: bytes[static_cast<std::size_t>(position(random, bytes))] ^= static_cast<std::uint8_t>(1 << random.below(8)); break;
        case 1:
        case 2:
        case 3: overwrite(random, bytes); break;
        case 4: splice(random, corpus, bytes); break;
        case 5: {  // shorter: by a little, or to any length
            const std::int64_t cut = random.once_in(2) ? random.between(1, 130) : random.between(1, length(bytes));
            bytes.resize(static_cast<std::size_t>(std::max<std::int64_t>(0, length(bytes) - cut)));
            break;
        }
        case 6: {  // longer
            const std::int64_t more = random.once_in(2) ? random.between(1, 130) : random.between(1, 5000);
            bytes.resize(bytes.size() + static_cast<std::size_t>(more), static_cast<std::uint8_t>(random.pick({0, 0, 1, 255})));
            break;
        }
        default: {  // a range is taken out
            const std::int64_t at = position(random, bytes);
            const std::int64_t count = random.between(1, std::min<std::int64_t>(length(bytes) - at, 128));
            bytes.erase(bytes.begin() + at, bytes.begin() + at + count);
        }
    }
}

}  // namespace

void mutate(Random& random, const Target& target, const std::vector<Bytes>& corpus, Bytes& bytes) {
    if (random.once_in(20)) return;  // healthy inputs in between: what ran before must not have broken anything
    if (target.twist != nullptr && random.once_in(2)) {
        target.twist(random, bytes);
        if (!random.once_in(4)) return;
    }
    do {
        change(random, corpus, bytes);
    } while (random.once_in(2));
}

}  // namespace gossamer::fuzz
