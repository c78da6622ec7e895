// What follows from a table row: layout of shared and tensor memory, stages, threads. Plain C++, so that the host computes
// the same.
#pragma once

#include <algorithm>

#include "../host/gemm_row.h"

namespace deep_gemm::sm100 {

inline constexpr int kBlockBytes = 128;      // of K in a stage: 128 FP8 or FP4 elements (FP4 unpacked), 64 BF16
inline constexpr int kBlockRows = 128;       // of a CTA: one for each lane of tensor memory
inline constexpr int kStepBytes = 32;        // of K in an instruction
inline constexpr int kSteps = kBlockBytes / kStepBytes;
inline constexpr int kMaxSharedBytes = 227 * 1024;
inline constexpr int kMaxStages = 12;
inline constexpr int kAccumulators = 2;      // in tensor memory: one is multiplied while the other one is stored
inline constexpr int kTensorColumns = 512;
inline constexpr int kScaleRows = 128;       // whose scales one copy brings to tensor memory, four columns of it
inline constexpr int kScaleColumns = 4;
inline constexpr int kNumThreads = 256;
inline constexpr int kEpilogueWarps = 4;
inline constexpr int kStoreBuffers = 2;      // of an epilogue warp
inline constexpr int kStoreBufferBytes = 32 * 128;

constexpr int align_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct GemmLayout {
    GemmRow row;

    // row_ctas 2: a pair of CTAs shares one instruction of 256 rows. Each has its 128 rows and half of the columns in
    // shared memory, and its 128 rows of the accumulator, of all columns, in tensor memory.
    constexpr int num_ctas() const { return row.row_ctas; }
    constexpr bool scaled() const { return row.scaling == kUE8M0Scaling; }
    constexpr int element_bytes() const { return row.operands == OperandType::kBF16 ? 2 : 1; }
    constexpr int block_k() const { return kBlockBytes / element_bytes(); }
    constexpr int num_threads() const { return kNumThreads; }

    constexpr int own_cols() const { return row.block_cols / num_ctas(); }
    constexpr int row_tile_bytes() const { return kBlockRows * kBlockBytes; }
    constexpr int col_tile_bytes() const { return own_cols() * kBlockBytes; }

    // Tensor maps have the group as a third dimension. One warp finds the tiles of M-grouped products, for all roles.
    constexpr bool is_m_grouped() const { return row.grouping == Grouping::kMGrouped; }
    constexpr bool is_k_grouped() const { return row.grouping == Grouping::kKGrouped; }
    constexpr bool has_groups() const { return is_m_grouped() || row.grouping == Grouping::kBatched; }
    // K-grouped: groups of MN-major operands start anywhere along K, and the next one's values follow in the last stage.
    constexpr bool has_ragged_k() const { return is_k_grouped(); }

    // Scales of a K word: one word for each row, and for each column of the whole instruction, 128 at a time. A group of
    // tokens may start at any row, but TMA only reads from multiples of 16 bytes on: its box has 4 words more.
    constexpr int row_scale_groups() const { return scaled() ? 1 : 0; }
    constexpr int col_scale_groups() const { return scaled() ? align_up(row.block_cols, kScaleRows) / kScaleRows : 0; }
    constexpr int scale_groups() const { return row_scale_groups() + col_scale_groups(); }
    constexpr int row_scale_slack() const { return scaled() && is_m_grouped() && !row.swap_ab ? 4 : 0; }
    constexpr int col_scale_slack() const { return scaled() && is_m_grouped() && row.swap_ab ? 4 : 0; }
    constexpr int row_scale_box() const { return kScaleRows * row_scale_groups() + row_scale_slack(); }
    constexpr int col_scale_box() const { return kScaleRows * col_scale_groups() + col_scale_slack(); }
    constexpr int scale_box_bytes() const { return 4 * (row_scale_box() + col_scale_box()); }
    // In shared memory, where boxes start on multiples of 128 bytes.
    constexpr int row_scale_words() const { return align_up(row_scale_box(), 32); }
    constexpr int scale_words() const { return row_scale_words() + align_up(col_scale_box(), 32); }

    // Columns of tensor memory: accumulators first, then the scales of rows and of columns.
    constexpr int row_scale_column() const { return kAccumulators * row.block_cols; }
    constexpr int col_scale_column() const { return row_scale_column() + row_scale_groups() * kScaleColumns; }
    constexpr int used_columns() const { return col_scale_column() + col_scale_groups() * kScaleColumns; }
    constexpr int allocated_columns() const {
        int columns = 32;
        while (columns < used_columns()) columns *= 2;
        return columns;
    }

    // The result goes through shared memory in boxes of 32 rows; BF16 of 64 columns where these divide the tile. With swapped
    // operands it does not: a warp's values of one row of D lie side by side.
    constexpr int box_cols(int d_bytes) const { return d_bytes == 2 && row.block_cols % 64 == 0 ? 64 : 32; }
    constexpr int staging_bytes() const { return row.swap_ab ? 0 : kEpilogueWarps * kStoreBuffers * kStoreBufferBytes; }

    // Split K: each CTA of a cluster multiplies a part of K and finishes a slice of the tile's columns, FP32 parts of which
    // the others send.
    constexpr int slice_cols() const { return row.block_cols / row.split_k; }
    constexpr int reduce_bytes() const { return row.split_k == 1 ? 0 : kBlockRows * row.block_cols * 4; }

    constexpr int stage_bytes() const {
        return row_tile_bytes() + col_tile_bytes() + 4 * scale_words() + 6 * 8;
    }
    // What schedulers keep of groups, at most: gemm_kernel.cuh checks the sum.
    constexpr int group_bytes() const { return is_m_grouped() ? 1280 : is_k_grouped() ? (scaled() ? 3072 : 2048) : 0; }
    constexpr int fixed_bytes() const {
        return staging_bytes() + reduce_bytes() + group_bytes() + 4 * 8 + 2 * kEpilogueWarps * 8 + 16 + 3 * 1024;
    }
    constexpr int num_stages() const {
        return std::min(kMaxStages, (kMaxSharedBytes - fixed_bytes()) / stage_bytes());
    }
    constexpr int shared_bytes() const { return align_up(fixed_bytes() + num_stages() * stage_bytes(), 1024); }
};

// Bytes of an MN-major operand's swizzle span, for a tile of `elems` rows or columns: the widest that divides it; 0 where
// none does.
constexpr int mn_major_span(int elems, int element_bytes) {
    const int bytes = elems * element_bytes;
    return bytes % 128 == 0 ? 128 : bytes % 64 == 0 ? 64 : bytes % 32 == 0 ? 32 : 0;
}

// Why a row cannot be compiled, or null.
constexpr const char* invalid_reason(GemmRow row) {
    const GemmLayout layout{row};
    if (row.arch != 100) return "arch must be 100";
    if (row.block_rows != kBlockRows) return "block_rows must be 128";
    if (row.row_ctas != 1 && row.row_ctas != 2) return "row_ctas must be 1, or 2 for instructions of a pair of CTAs";
    if (row.col_ctas != 1) return "col_ctas must be 1";
    if (row.split_k > 1 && (!row.swap_ab || row.row_ctas > 1)) return "split K takes single CTAs and swapped operands";
    if (row.cluster_size() > 8) return "a cluster has 8 CTAs at most";
    if (row.split_k > 1 && row.block_cols % (4 * row.split_k) != 0) return "split K must divide the columns, 4 at a time";
    if (row.split_k > 1 && 32 % layout.slice_cols() != 0) return "split K: a slice of columns must divide 32";
    if ((row.operands == OperandType::kBF16) != (row.scaling == kNoScaling)) return "8-bit operands have scales, BF16 has none";
    if (row.operands != OperandType::kBF16 && row.scaling != kUE8M0Scaling) return "scales must be UE8M0";
    if (row.block_cols % (16 * row.row_ctas) != 0 || row.block_cols < 16 || row.block_cols > 256) {
        return "block_cols must be a multiple of 16 (of 32 with pairs) from 16 to 256";
    }
    if (row.block_cols > 16 && row.block_cols % 32 != 0) return "the epilogue reads 32 columns at a time";
    if (!row.swap_ab && row.block_cols % 32 != 0) return "stores need 32 columns at a time";
    if (layout.used_columns() > kTensorColumns) return "two accumulators and the scales do not fit into tensor memory";
    if (row.split_k > 1 && row.grouping != Grouping::kDense && row.grouping != Grouping::kSummed) {
        return "CTAs of grouped and batched products do not split K";
    }
    if (row.grouping == Grouping::kSummed && layout.scaled()) return "summed products are BF16";
    if (row.swap_ab && layout.col_scale_slack() > 0 && layout.col_scale_groups() > 1) {
        return "groups of tokens along the columns have scales of 128";
    }
    if (layout.num_stages() < 3) return "fewer than 3 stages fit into shared memory";
    return nullptr;
}

// Index of the first invalid row, or -1.
template <int kCount>
constexpr int first_invalid(const GemmRow (&rows)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
        if (invalid_reason(rows[i]) != nullptr) return i;
    }
    return -1;
}

}  // namespace deep_gemm::sm100
