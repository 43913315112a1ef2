// Bits of 64-bit words, on any processor. For files that are compiled for all of them, not for tiers.
#pragma once

#include <cstdint>

namespace gossamer {
namespace {

inline int lowest_bit(std::uint64_t word) {
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_ctzll(word);
#else
    int index = 0;
    while (!(word & 1)) {
        word >>= 1;
        ++index;
    }
    return index;
#endif
}

inline int count_bits(std::uint64_t word) {
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
    return static_cast<int>((word * 0x0101010101010101u) >> 56);
}

}  // namespace
}  // namespace gossamer
