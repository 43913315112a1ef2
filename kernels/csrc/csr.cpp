#include "csr.h"

#include "work.h"

namespace gossamer {
namespace {

// Waking a second thread is not worth less than this many multiplications for each.
constexpr std::int64_t kWorkPerThread = 64 * 1024;

bool fits(const CsrMatrix& matrix) {
    bool wrong = matrix.rowptr[0] != 0 || matrix.rowptr[matrix.rows] != matrix.count;
    for (std::int64_t r = 0; r < matrix.rows; ++r) wrong |= matrix.rowptr[r + 1] < matrix.rowptr[r];
    for (std::int64_t i = 0; i < matrix.count; ++i) {
        wrong |= static_cast<std::uint32_t>(matrix.columns[i]) >= static_cast<std::uint64_t>(matrix.cols);
    }
    return !wrong;
}

std::int64_t groups_of(std::int64_t tokens) { return (tokens + csr::kTokens - 1) / csr::kTokens; }

int parts_of(const CsrMatrix& matrix, std::int64_t tokens, int threads) {
    const std::int64_t work = tokens * (matrix.count + matrix.rows + matrix.cols);
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, work / kWorkPerThread)));
}

// The first row behind the given share of the entries.
std::int64_t row_at(const CsrMatrix& matrix, int part, int parts) {
    if (part == parts) return matrix.rows;
    const auto entry = static_cast<std::int32_t>(matrix.count * part / parts);
    return std::lower_bound(matrix.rowptr, matrix.rowptr + matrix.rows, entry) - matrix.rowptr;
}

}  // namespace

bool csr_linear(const Tier& tier, const CsrMatrix& matrix, const float* values, const float* x, std::int64_t tokens,
                float* y, int threads) {
    if (!fits(matrix)) return false;
    const std::int64_t groups = groups_of(tokens);
    const int parts = static_cast<int>(std::min<std::int64_t>(groups, parts_of(matrix, tokens, threads)));
    if (groups == 0) return true;
    in_parts(parts, [&](int part) {
        auto* turned = reinterpret_cast<float*>(scratch<0>(4 * csr::kTokens * matrix.cols));
        for (std::int64_t g = groups * part / parts; g < groups * (part + 1) / parts; ++g) {
            const std::int64_t first = g * csr::kTokens, count = std::min(csr::kTokens, tokens - first);
            tier.turn(x + first * matrix.cols, count, matrix.cols, turned);
            tier.csr_rows(matrix, values, turned, count, y + first * matrix.rows);
        }
    });
    return true;
}

std::int64_t csr_room(std::int64_t tokens, std::int64_t rows, std::int64_t cols) {
    return std::min(csr::kChunk, groups_of(tokens)) * csr::kTokens * (rows + cols) + kLine / 4;
}

bool csr_sampled(const Tier& tier, const CsrMatrix& matrix, const float* gy, const float* x, std::int64_t tokens,
                 float* room, float* out, int threads) {
    if (!fits(matrix)) return false;
    if (tokens == 0) std::fill(out, out + matrix.count, 0.0f);
    const auto address = reinterpret_cast<std::uintptr_t>(room);
    float* outputs = room + (kLine - address % kLine) % kLine / 4;
    float* inputs = outputs + std::min(csr::kChunk, groups_of(tokens)) * csr::kTokens * matrix.rows;
    for (std::int64_t first = 0; first < tokens; first += csr::kChunk * csr::kTokens) {
        const std::int64_t count = std::min(csr::kChunk * csr::kTokens, tokens - first), groups = groups_of(count);
        const int parts = parts_of(matrix, count, threads);
        const auto turn = [&](const float* from, std::int64_t width, std::int64_t g, float* to) {
            const std::int64_t begin = g * csr::kTokens;
            tier.turn(from + (first + begin) * width, std::min(csr::kTokens, count - begin), width, to + begin * width);
        };
        in_parts(parts, [&](int part) {
            for (std::int64_t g = 2 * groups * part / parts; g < 2 * groups * (part + 1) / parts; ++g) {
                g < groups ? turn(gy, matrix.rows, g, outputs) : turn(x, matrix.cols, g - groups, inputs);
            }
        });
        in_parts(parts, [&](int part) {
            const std::int64_t begin = row_at(matrix, part, parts), end = row_at(matrix, part + 1, parts);
            tier.csr_dots(matrix, outputs, inputs, groups, begin, end, first > 0, out);
        });
    }
    return true;
}

}  // namespace gossamer
