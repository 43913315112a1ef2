#include "bitmask.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "words.h"

namespace gossamer::bitmask {
namespace {

// Up to eight bytes with byte k in bits 8k to 8k + 7, whatever the byte order of the machine.
inline std::uint64_t load(const std::uint8_t* bytes, std::int64_t count) {
    std::uint64_t word = 0;
    for (std::int64_t i = 0; i < count; ++i) word |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
    return word;
}

inline std::uint64_t load8(const std::uint8_t* bytes) { return load(bytes, 8); }

// Calls visit(first column, columns, word) for every 64 columns of a row; bits beyond the last column are cleared.
template <class Visit>
inline void for_words(const std::uint8_t* row, std::int64_t cols, Visit visit) {
    std::int64_t column = 0;
    for (; column + 64 <= cols; column += 64) visit(column, std::int64_t{64}, load8(row + column / 8));
    const std::int64_t left = cols - column;
    if (left > 0) {
        const std::uint64_t word = load(row + column / 8, (left + 7) / 8);
        visit(column, left, word & (~std::uint64_t{0} >> (64 - left)));
    }
}

inline std::int64_t width_of(std::int64_t cols) { return (cols + 7) / 8; }

template <class T>
std::int64_t compress_as(const T* weight, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols, T* values,
                         std::int64_t capacity) {
    std::int64_t found = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* from = weight + r * cols;
        for_words(bits + r * width_of(cols), cols, [&](std::int64_t first, std::int64_t, std::uint64_t word) {
            if (found + count_bits(word) > capacity) {
                found += count_bits(word);  // reported, never written
                return;
            }
            for (; word != 0; word &= word - 1) values[found++] = from[first + lowest_bit(word)];
        });
    }
    return found;
}

template <class T>
std::int64_t expand_as(const T* values, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols, T* weight,
                       std::int64_t count) {
    std::int64_t used = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
        T* to = weight + r * cols;
        for_words(bits + r * width_of(cols), cols, [&](std::int64_t first, std::int64_t columns, std::uint64_t word) {
            std::memset(to + first, 0, static_cast<std::size_t>(columns) * sizeof(T));
            if (used + count_bits(word) > count) {
                used += count_bits(word);
                return;
            }
            for (; word != 0; word &= word - 1) to[first + lowest_bit(word)] = values[used++];
        });
    }
    return used;
}

}  // namespace

void pack(const std::uint8_t* mask, std::int64_t rows, std::int64_t cols, std::uint8_t* bits) {
    for (std::int64_t r = 0; r < rows; ++r, mask += cols) {
        for (std::int64_t column = 0; column < cols; column += 8) {
            const std::int64_t count = std::min<std::int64_t>(8, cols - column);
            // Eight bytes 0 or 1 to eight bits: byte k moves to bit 56 + k of the product. Others must not reach it.
            const std::uint64_t bytes = load(mask + column, count) & 0x0101010101010101u;
            *bits++ = static_cast<std::uint8_t>((bytes * 0x0102040810204080u) >> 56);
        }
    }
}

void unpack(const std::uint8_t* bits, std::int64_t rows, std::int64_t cols, std::uint8_t* mask) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t column = 0; column < cols; column += 8) {
            const std::uint8_t byte = *bits++;
            const std::int64_t count = std::min<std::int64_t>(8, cols - column);
            for (std::int64_t i = 0; i < count; ++i) *mask++ = (byte >> i) & 1;
        }
    }
}

void row_counts(const std::uint8_t* bits, std::int64_t rows, std::int64_t width, std::int64_t* counts) {
    for (std::int64_t r = 0; r < rows; ++r, bits += width) {
        std::int64_t total = 0;
        for_words(bits, 8 * width, [&](std::int64_t, std::int64_t, std::uint64_t word) { total += count_bits(word); });
        counts[r] = total;
    }
}

std::int64_t compress(const void* weight, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols,
                      std::int64_t element, void* values, std::int64_t capacity) {
    const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        return compress_as(static_cast<const T*>(weight), bits, rows, cols, static_cast<T*>(values), capacity);
    };
    switch (element) {
        case 1: return run(static_cast<std::uint8_t*>(nullptr));
        case 2: return run(static_cast<std::uint16_t*>(nullptr));
        case 4: return run(static_cast<std::uint32_t*>(nullptr));
        case 8: return run(static_cast<std::uint64_t*>(nullptr));
        default: return -1;
    }
}

std::int64_t expand(const void* values, const std::uint8_t* bits, std::int64_t rows, std::int64_t cols,
                    std::int64_t element, void* weight, std::int64_t count) {
    const auto run = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        return expand_as(static_cast<const T*>(values), bits, rows, cols, static_cast<T*>(weight), count);
    };
    switch (element) {
        case 1: return run(static_cast<std::uint8_t*>(nullptr));
        case 2: return run(static_cast<std::uint16_t*>(nullptr));
        case 4: return run(static_cast<std::uint32_t*>(nullptr));
        case 8: return run(static_cast<std::uint64_t*>(nullptr));
        default: return -1;
    }
}

}  // namespace gossamer::bitmask
