// Attacks on what reads packed bytes. A target is one thing under attack; main.cpp runs it on mutated inputs.
//
// To add a layout: write target_mine.cpp with `const Target kMine`, declare it below and put it into kTargets of main.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace gossamer::fuzz {

using Bytes = std::vector<std::uint8_t>;

// The same numbers everywhere: every input has a generator of its own, seeded by (seed, number of the input).
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {  // splitmix64
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    // A whole number of [0, count), count > 0.
    std::int64_t below(std::int64_t count) {
        return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(count));
    }
    // A whole number of [low, high].
    std::int64_t between(std::int64_t low, std::int64_t high) { return low + below(high - low + 1); }
    bool once_in(std::int64_t count) { return below(count) == 0; }
    template <class T, std::size_t n>
    T pick(const T (&from)[n]) {
        return from[below(static_cast<std::int64_t>(n))];
    }

private:
    std::uint64_t state_;
};

// Memory of exactly this many bytes on the heap, so that the sanitizer sees one byte too many. Address nullptr for none,
// as torch gives it for empty tensors.
class Exact {
public:
    Exact(std::int64_t size, std::uint8_t poison)
        : size_(size), memory_(size > 0 ? new std::uint8_t[static_cast<std::size_t>(size)] : nullptr) {
        if (size > 0) std::memset(memory_.get(), poison, static_cast<std::size_t>(size));
    }
    explicit Exact(const Bytes& bytes) : Exact(static_cast<std::int64_t>(bytes.size()), 0) {
        if (size_ > 0) std::memcpy(memory_.get(), bytes.data(), bytes.size());
    }
    template <class T = std::uint8_t>
    T* as() const {
        return reinterpret_cast<T*>(memory_.get());
    }
    std::int64_t size() const { return size_; }
    Bytes bytes() const { return Bytes(memory_.get(), memory_.get() + size_); }
    bool operator==(const Exact& other) const {
        return size_ == other.size_ && (size_ <= 0 || std::memcmp(as(), other.as(), static_cast<std::size_t>(size_)) == 0);
    }

private:
    std::int64_t size_;
    std::unique_ptr<std::uint8_t[]> memory_;
};

// Something that must not happen, short of what the sanitizers see by themselves.
struct Finding : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const std::string& otherwise) {
    if (!holds) throw Finding(otherwise);
}

enum class Outcome { kRefused, kTooLarge, kRan };

struct Target {
    const char* name;
    // Real packed tensors, by the library's own functions. nullptr: the target makes its arguments up from `random`.
    std::vector<Bytes> (*make_corpus)(Random& random);
    // A change that only someone who knows the layout makes: fields that agree with each other, but are wrong.
    void (*twist)(Random& random, Bytes& bytes);
    // Looks for a fault; where there is none, runs everything on the input. Throws Finding.
    Outcome (*run)(Random& random, const Bytes& bytes);
};

extern const Target kTiles;      // packed matrices of bitmask_gemv
extern const Target kArguments;  // packed masks, and packing, with counts that are wrong
extern const Target kInt8;       // packed matrices of int8_gemv
extern const Target kDual;       // packed matrices of dual_gemv
extern const Target kNeuron;     // MLPs on lists of neurons that are wrong
extern const Target kCsr;        // positions of sparse matrices that are wrong
extern const Target kEntries;    // matrices of awkward shapes whose large entries are found
extern const Target kWindow;     // ranges of a cache that are wrong
extern const Target kPlain;      // dense and channel products, which follow nothing but their arguments

// One to four blind changes of `bytes`, or a twist; sometimes none.
void mutate(Random& random, const Target& target, const std::vector<Bytes>& corpus, Bytes& bytes);

}  // namespace gossamer::fuzz
