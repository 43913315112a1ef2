// Runs every target on mutated inputs. Inputs run in a child process, so that a crash, a sanitizer's report or an endless
// loop still ends with the number of the input. Exit status: 0 nothing found, 1 a finding, 2 wrong arguments.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <new>

#include "../tiers.h"
#include "fuzz.h"

// Memory for what a header of a few bytes claims is a finding, too.
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=512:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

namespace gossamer::fuzz {
namespace {

const Target* const kTargets[] = {&kTiles, &kInt8, &kDual, &kArguments, &kNeuron, &kCsr, &kEntries, &kWindow, &kPlain};
constexpr unsigned kSeconds = 60;  // for one input

struct Options {
    std::uint64_t seed = 1;
    std::int64_t first = 0, count = 100000;
    std::string target;
    std::vector<std::string> files;  // TARGET.anything: more inputs to start from
};

// Shared with the child process.
struct Progress {
    std::int64_t input, refused, large, ran;
    bool in_corpus;
};

std::vector<Bytes> corpus_of(const Target& target, const Options& options) {
    std::vector<Bytes> corpus;
    if (target.make_corpus == nullptr) return corpus;
    Random random(options.seed);
    corpus = target.make_corpus(random);
    for (const std::string& path : options.files) {
        const std::string file = path.substr(path.find_last_of('/') + 1);
        if (file.substr(0, file.find('.')) != target.name) continue;
        std::ifstream stream(path, std::ios::binary);
        expect(stream.good(), "cannot read " + path);
        corpus.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    }
    return corpus;
}

void run_one(const Target& target, const std::vector<Bytes>& corpus, const Options& options, Progress& progress) {
    Random random(Random(options.seed).next() ^ Random(static_cast<std::uint64_t>(progress.input)).next());
    Bytes bytes;
    if (!corpus.empty()) {
        // The smaller of two: large inputs take the time of many small ones.
        const auto size = static_cast<std::int64_t>(corpus.size());
        const Bytes& one = corpus[static_cast<std::size_t>(random.below(size))];
        const Bytes& other = corpus[static_cast<std::size_t>(random.below(size))];
        bytes = one.size() < other.size() ? one : other;
        mutate(random, target, corpus, bytes);
    }
    switch (target.run(random, bytes)) {
        case Outcome::kRefused: ++progress.refused; break;
        case Outcome::kTooLarge: ++progress.large; break;
        case Outcome::kRan: ++progress.ran; break;
    }
}

int run_all(const Target& target, const Options& options, Progress& progress) {
    try {
        progress.in_corpus = true;
        const std::vector<Bytes> corpus = corpus_of(target, options);
        Random random(options.seed);
        for (const Bytes& bytes : corpus) {
            expect(target.run(random, bytes) == Outcome::kRan, "a tensor of the corpus was refused");
        }
        progress.in_corpus = false;
        for (progress.input = options.first; progress.input < options.first + options.count; ++progress.input) {
            alarm(kSeconds);
            run_one(target, corpus, options, progress);
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", target.name, error.what());
    }
    return 1;
}

// True when nothing was found.
bool attack(const Target& target, const Options& options) {
    void* shared = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) throw std::bad_alloc();
    Progress& progress = *new (shared) Progress{};
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) std::_Exit(run_all(target, options, progress));
    int status = 1;
    const bool lost = child < 0 || waitpid(child, &status, 0) != child;
    const Progress end = progress;
    munmap(shared, sizeof(Progress));
    const auto number = [](std::int64_t value) { return static_cast<long long>(value); };
    if (!lost && status == 0) {
        std::printf("%s: %lld inputs, %lld refused, %lld run and compared, %lld sound but too large to run: no finding\n",
                    target.name, number(options.count), number(end.refused), number(end.ran), number(end.large));
        return true;
    }
    if (WIFSIGNALED(status)) std::fprintf(stderr, "%s: killed by signal %d\n", target.name, WTERMSIG(status));
    std::fprintf(stderr, "FINDING in %s, %s %lld; again with: --seed %llu --target %s --first %lld --count 1\n",
                 target.name, end.in_corpus ? "the corpus before input" : "input", number(end.input),
                 static_cast<unsigned long long>(options.seed), target.name, number(end.input));
    return false;
}

bool parse(int count, char** words, Options& options) {
    for (int i = 1; i < count; i += 2) {
        const std::string name = words[i];
        if (name == "--corpus") {
            options.files.assign(words + i + 1, words + count);
            return true;
        }
        if (i + 1 == count) return false;
        const char* value = words[i + 1];
        if (name == "--target") {
            options.target = value;
            continue;
        }
        char* end = nullptr;
        const long long parsed = std::strtoll(value, &end, 10);
        if (end == value || *end != '\0' || parsed < 0) return false;
        if (name == "--seed") options.seed = static_cast<std::uint64_t>(parsed);
        else if (name == "--first") options.first = parsed;
        else if (name == "--count") options.count = parsed;
        else return false;
    }
    return true;
}

int main_of(int count, char** words) {
    Options options;
    const auto named = [&](const Target* target) { return options.target.empty() || options.target == target->name; };
    if (!parse(count, words, options) || std::none_of(std::begin(kTargets), std::end(kTargets), named)) {
        std::fprintf(stderr, "usage: fuzz [--seed N] [--first N] [--count N] [--target NAME] [--corpus FILE...]\ntargets:");
        for (const Target* target : kTargets) std::fprintf(stderr, " %s", target->name);
        std::fprintf(stderr, "\n");
        return 2;
    }
    std::printf("seed %llu, tiers:", static_cast<unsigned long long>(options.seed));
    for (int i = 0; i < kTiers; ++i) {
        if (tier_at(i) != nullptr) std::printf(" %s", tier_at(i)->name);
    }
    std::printf("\n");
    bool clean = true;
    for (const Target* target : kTargets) {
        if (named(target)) clean = attack(*target, options) && clean;
    }
    return clean ? 0 : 1;
}

}  // namespace
}  // namespace gossamer::fuzz

int main(int count, char** words) { return gossamer::fuzz::main_of(count, words); }
