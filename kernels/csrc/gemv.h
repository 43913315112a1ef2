// Matrix times a few vectors: what a processor tier implements, and the calls that split the work over threads.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace gossamer {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
constexpr int kDtypes = 3;
constexpr int kMaxBatch = 8;

// Prepared x: whatever a tier's inner loop reads, one row of `stride` bytes per row of the batch, zero beyond the
// columns, with the batch padded to 1, 2, 4 or 8 rows of zeros. Sums are float32 [batch, sums stride].
struct DenseCall {
    const void* weight;  // [rows, cols]
    std::int64_t rows, cols;
    const std::uint8_t* x;
    std::int64_t stride;
    int batch;
    float* sums;  // [batch, rows]
};

struct BitmaskCall {
    const std::int64_t* offsets;  // [panels * row_tiles + 1], in values of 2 bytes from the stream's begin
    const std::uint16_t* stream;
    std::int64_t rows, row_tiles, panels, panel_cols, cols;
    const std::uint8_t* x;
    std::int64_t stride;
    int batch;
    float* sums;  // [batch, rows]
};

// Groups are the columns of one tile.
struct Int8Call {
    const std::int64_t* offsets;  // [panels * row_tiles + 1], in bytes from the stream's begin
    const std::uint8_t* stream;
    std::int64_t rows, row_tiles, panels, panel_cols, cols;
    int batch;
    // Prepared x (rows_int8.h), lanes = max(4, padded batch): lane i belongs to row i modulo the padded batch.
    const std::uint8_t* x;  // [padded batch, columns up to whole tiles] quantised
    std::int64_t stride;    // bytes of a row of it
    const float* scales;    // [groups, lanes]
    const std::int32_t* corrections;  // [groups, lanes]: 128 times the sum of the quantised row
    float* sums;  // [batch, rows]
};

struct ChannelCall {
    const void* weight;  // [channels, outputs]
    std::int64_t outputs;
    const std::int32_t* active;  // [count] channels in rising order
    std::int64_t count;
    const float* x;  // [count, padded batch]; 0 where a row skips the channel
    int batch;
    void* y;  // [batch, outputs], in the weight's dtype
    const void* bias = nullptr;  // [outputs], in the weight's dtype: where the sums begin, zero without
    float* sums = nullptr;       // [batch, sums_stride(outputs)]: what to write instead of y, for channel_finish
};

// Floats of one row of unfinished sums.
static inline std::int64_t sums_stride(std::int64_t outputs) { return (outputs + 63) / 64 * 64; }

// Sums of the parts of a matrix, each part some of the channels.
struct FinishCall {
    const float* sums;  // [parts, batch, sums_stride(outputs)], in the order that a run leaves them in
    int parts, batch;
    std::int64_t outputs;
    void* y;  // [batch, outputs]: the parts added up in their order, rounded
};

struct CsrMatrix;   // csr.h
struct DualCall;    // dual.h
struct EntryRow;    // entries.h
struct NeuronCall;  // neuron.h
struct WindowPart;  // window.h
struct WindowSizes;

// One processor tier. All functions are pure: the same numbers for the same arguments, however the range is split.
struct Tier {
    const char* name;
    // Bytes of one prepared row of x of `cols` columns, by operation.
    std::int64_t (*dense_row)(int dtype, std::int64_t cols);
    std::int64_t (*bitmask_row)(int dtype, std::int64_t cols);
    void (*dense_prepare)(int dtype, const void* x, std::int64_t cols, std::uint8_t* row);
    void (*bitmask_prepare)(int dtype, const void* x, std::int64_t cols, std::uint8_t* row);
    void (*dense_run)(int dtype, const DenseCall&, std::int64_t row_begin, std::int64_t row_end);
    void (*bitmask_run)(int dtype, const BitmaskCall&, std::int64_t tile_begin, std::int64_t tile_end);
    // Bytes of x prepared for int8 matrices; `int8_prepare` fills them and the fields of the call that point into them.
    std::int64_t (*int8_bytes)(int batch, std::int64_t cols);
    void (*int8_prepare)(int dtype, const void* x, std::uint8_t* prepared, Int8Call* call);
    void (*int8_run)(const Int8Call&, std::int64_t tile_begin, std::int64_t tile_end);
    void (*channel_run)(int dtype, const ChannelCall&, std::int64_t output_begin, std::int64_t output_end);
    // Sums [count] to y, rounded to nearest even.
    void (*narrow)(int dtype, const float* sums, std::int64_t count, void* y);
    // One row of a tile: 128 values of 16 bits to `out`, zeros where its mask of 16 bytes has none. Returns the address
    // behind its kept values; may read 64 bytes beyond it.
    const std::uint16_t* (*expand_row)(const std::uint8_t* mask, const std::uint16_t* values, std::uint16_t* out);
    // Channels that any row of x [batch, channels] needs: not |x| <= threshold, so NaN is active. Returns their number;
    // active [channels] and values [count, padded batch], both with room for one more vector.
    std::int64_t (*compact)(int dtype, const void* x, int batch, std::int64_t channels, const float* threshold,
                            std::int32_t* active, float* values);
    // x [rows, count] - center [count], rounded to x's dtype: y.
    void (*subtract)(int dtype, const void* x, const float* center, int rows, std::int64_t count, void* y);
    void (*dual_run)(int dtype, const DualCall&, std::int64_t panel_begin, std::int64_t panel_end);
    // Of unfinished sums of channel_run, and of dual_run.
    void (*channel_finish)(int dtype, const FinishCall&);
    void (*dual_finish)(int dtype, const FinishCall&);
    void (*neuron_run)(int dtype, const NeuronCall&, std::int64_t begin, std::int64_t end);
    // gates [count] = act(gates) ups, each rounded to the dtype.
    void (*gate)(int dtype, int activation, void* gates, const void* ups, std::int64_t count);
    WindowSizes (*window_sizes)(int dtype, int group, std::int64_t width);
    void (*window_prepare)(int dtype, const void* query, std::int64_t width, float* prepared);
    void (*window_run)(int dtype, const WindowPart&);
    // Sums of one query over its total to y [width].
    void (*window_finish)(int dtype, const float* sums, float total, std::int64_t width, void* y);
    // Of rows_csr.h.
    void (*turn)(const float* x, std::int64_t tokens, std::int64_t cols, float* out);
    void (*csr_rows)(const CsrMatrix&, const float* values, const float* x, std::int64_t tokens, float* y);
    void (*csr_dots)(const CsrMatrix&, const float* gy, const float* x, std::int64_t groups, std::int64_t row_begin,
                     std::int64_t row_end, bool more, float* out);
    // Of rows_entries.h.
    void (*square_sums)(const float* matrix, std::int64_t rows, std::int64_t cols, float* row_sums, float* col_sums);
    std::int64_t (*beyond)(const EntryRow&, std::int64_t* position, float* value);
};

// The same tables, defined in tier_*.cpp. A tier that was not compiled is absent from tiers().
const Tier* tier_scalar();
const Tier* tier_avx2();
const Tier* tier_avx512();
const Tier* tier_avx512bf16();
const Tier* tier_neon();

// Asks for `lines` cache lines, into the second-level cache: the first can wait for fewer at a time.
static inline void ask_for(const void* at, int lines) {
#if defined(__GNUC__) || defined(__clang__)
    for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(at) + 64 * i, 0, 2);
#else
    (void)at, (void)lines;
#endif
}

// Rows of the padded batch: 1, 2, 4 or 8.
// Static: an inline function compiled for a newer processor must never be the copy that the linker keeps.
static inline int padded_batch(int batch) { return batch <= 2 ? batch : batch <= 4 ? 4 : 8; }

// One of several matrices that are multiplied with the same x.
struct Matrix {
    const void* weight;  // dense [rows, cols], or a packed tensor of tiles.h
    std::int64_t rows;
    bool packed;
    void* y;  // [batch, rows]
};

// All of them in one parallel region, x prepared once. The same bits as one after the other.
void gemv(const Tier& tier, int dtype, const void* x, int batch, std::int64_t cols, const Matrix* matrices, int count,
          int threads);

// The dense matrix [rows, cols] of a packed tensor without fault, zeros where nothing is kept.
void expand(const Tier& tier, const std::uint8_t* packed, std::uint16_t* weight, int threads);

// x and y in the dtype given.
void int8_gemv(const Tier& tier, int dtype, const void* x, int batch, const std::uint8_t* packed, void* y, int threads);

}  // namespace gossamer
