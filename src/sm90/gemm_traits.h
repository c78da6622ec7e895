// What follows from a table row: shared-memory layout, stages, threads. Plain C++, so that the host computes the same.
#pragma once

#include <algorithm>
#include <numeric>

#include "../device/group_limits.h"
#include "../host/gemm_row.h"

namespace deep_gemm::sm90 {

inline constexpr int kBlockK = 128;               // bytes of K in a stage, and elements of FP8: one swizzle span
inline constexpr int kPackedBlockK = kBlockK / 2;  // bytes of as many FP4 elements
inline constexpr int kMnMajorSpan = 64;           // elements of an MN-major row in a swizzle span: BF16
inline constexpr int kMaxSharedBytes = 227 * 1024;
inline constexpr int kMaxStages = 20;
inline constexpr int kScaleChunk = 32;            // K blocks whose block scales are loaded at once
inline constexpr int kScaleChunks = 2;            // chunks in shared memory

constexpr int align_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct GemmLayout {
    GemmRow row;

    constexpr int block_cols() const { return row.block_cols; }
    constexpr bool is_bf16() const { return row.operands == OperandType::kBF16; }
    constexpr bool is_fp4() const { return row.has_fp4(); }  // the rows
    constexpr bool has_bf16_tokens() const { return row.operands == OperandType::kBF16FP4; }  // beside FP4 rows
    constexpr bool is_k_grouped() const { return row.grouping == Grouping::kKGrouped; }
    constexpr int wgmma_k() const { return 32 / row.element_bytes(); }  // of one instruction
    constexpr bool rows_mn_major() const { return row.swap_ab ? row.b_mn_major : row.a_mn_major; }
    constexpr bool cols_mn_major() const { return row.swap_ab ? row.a_mn_major : row.b_mn_major; }

    // Warpgroups that share a tile's rows out among them; each has k_warpgroups - 1 more that help with its K blocks.
    constexpr int row_warpgroups() const { return row.block_rows == 256 ? 2 : row.block_rows / 64; }
    constexpr int row_parts() const { return row.block_rows / 64 / row_warpgroups(); }  // of a warpgroup
    constexpr int num_consumer_warpgroups() const { return row_warpgroups() * row.k_warpgroups; }
    constexpr int num_threads() const { return 128 * (1 + num_consumer_warpgroups()); }
    // What setmaxnreg gives a consumer and leaves a producer thread.
    constexpr int consumer_registers() const {
        const int warpgroups = num_consumer_warpgroups();
        return warpgroups == 1 ? 255 : warpgroups == 2 ? 232 : warpgroups == 3 ? 152 : 104;
    }
    constexpr int producer_registers() const {
        const int warpgroups = num_consumer_warpgroups();
        return warpgroups == 3 ? 56 : warpgroups > 3 ? 64 : 40;
    }

    // Tensor maps have the group as a third dimension.
    constexpr bool has_groups() const { return row.grouping == Grouping::kMGrouped || row.grouping == Grouping::kBatched; }
    // One warp finds the tiles, for all roles.
    constexpr bool has_work_queue() const { return row.grouping == Grouping::kMGrouped; }

    constexpr int k_groups() const { return has_scales() ? kBlockK / row.gran_k : 1; }

    // Where a tile has one scale for each of its rows, or columns, and where one for each block of 128 that it touches. A
    // tile starts on a multiple of block_granule() columns.
    constexpr int block_granule() const { return std::gcd(row.block_cols, 128); }
    constexpr bool has_scales() const { return row.scaling != kNoScaling; }
    constexpr bool row_scales_are_vector() const {
        return row.scaling == kScaling1D1D || row.scaling == kUE8M0Scaling ||
               (row.scaling == kScaling1D2D && !row.swap_ab);
    }
    constexpr bool col_scales_are_vector() const {
        return row.scaling == kScaling1D1D || (row.scaling == kUE8M0Scaling && !(has_bf16_tokens() && row.gran_k == 32)) ||
               (row.scaling == kScaling1D2D && row.swap_ab);
    }
    constexpr bool row_scales_are_words() const { return row.scaling == kUE8M0Scaling; }
    constexpr int row_scale_groups() const { return row_scales_are_words() ? 1 : k_groups(); }  // of a stage
    // UE8M0 scales of FP4 rows are part of the expanded values, relative to the largest of a row's K block.
    constexpr bool folds_row_scales() const {
        return row_scales_are_words() && row.gran_k == kBlockK && !has_bf16_tokens();
    }
    constexpr bool has_block_scales() const { return row.scaling == kScaling1D2D; }
    constexpr int num_block_scales() const {
        if (!has_block_scales()) return 0;
        return row.swap_ab ? 1 : (128 - block_granule() + row.block_cols + 127) / 128;
    }

    // Scales in a stage come in boxes [K group][row or column]. A group of tokens may start at any row, but TMA only reads
    // from multiples of 16 bytes on, or the instruction is illegal: so it brings up to three scales that lie before the
    // tile's. A box has at most 256 of them, hence two for 256 rows and those.
    constexpr int token_scale_slack() const { return row.grouping == Grouping::kMGrouped ? 4 : 0; }
    constexpr int row_scale_slack() const { return row.swap_ab ? 0 : token_scale_slack(); }
    constexpr int col_scale_slack() const { return row.swap_ab ? token_scale_slack() : 0; }
    constexpr int row_scale_boxes() const { return row.block_rows + row_scale_slack() > 256 ? 2 : 1; }
    constexpr int row_scale_box_rows() const { return row.block_rows / row_scale_boxes() + row_scale_slack(); }
    constexpr int col_scale_box_cols() const { return row.block_cols + col_scale_slack(); }
    constexpr int row_scale_bytes() const {
        return row_scales_are_vector() ? 4 * row_scale_groups() * row_scale_box_rows() * row_scale_boxes() : 0;
    }
    constexpr int col_scale_bytes() const { return col_scales_are_vector() ? 4 * k_groups() * col_scale_box_cols() : 0; }
    // What they take up: TMA writes to multiples of 128 bytes.
    constexpr int row_scale_box_pitch() const { return align_up(row_scale_bytes() / row_scale_boxes(), 128); }
    constexpr int row_scale_pitch() const { return row_scale_box_pitch() * row_scale_boxes(); }
    constexpr int col_scale_pitch() const { return align_up(col_scale_bytes(), 128); }

    // With split K each CTA of the cluster finishes a slice of the tile's columns.
    constexpr int num_slices() const { return std::min(row.split_k, row.block_cols / 8); }
    constexpr int store_cols() const { return row.block_cols / num_slices(); }

    // A box of D that one TMA store writes. Without swapped operands it is 64 rows high; with them it holds the 64 columns
    // of D that belong to a consumer warpgroup.
    constexpr int box_cols() const {
        return row.swap_ab || store_cols() % 64 == 0 ? 64 : store_cols() % 32 == 0 ? 32 : 16;
    }
    constexpr int box_rows() const { return row.swap_ab ? store_cols() : 64; }
    constexpr int boxes_per_part() const { return row.swap_ab ? 1 : store_cols() / box_cols(); }
    // Boxes of a part in shared memory at a time. Of a wide BF16 tile it is half of them, which leaves room for a stage.
    constexpr int staged_boxes() const {
        return is_bf16() && !row.swap_ab && row.block_rows * store_cols() == 128 * 256 ? boxes_per_part() / 2
                                                                                       : boxes_per_part();
    }

    // FP32 results, too, leave through shared memory, in boxes of as many bytes.
    constexpr bool stages_float() const { return is_k_grouped(); }

    constexpr int row_tile_bytes() const { return row.block_rows * (is_fp4() ? kPackedBlockK : kBlockK); }
    // BF16 beside FP4: two tiles, of 64 elements of K each.
    constexpr int col_tile_bytes() const { return row.block_cols * kBlockK * (has_bf16_tokens() ? 2 : 1); }
    constexpr int box_bytes() const { return box_cols() * box_rows() * 2; }
    constexpr int staging_bytes() const { return row.block_rows / 64 * staged_boxes() * box_bytes(); }
    // Split K: FP32 parts of this CTA's slice from the others.
    constexpr int reduce_bytes() const {
        return row.split_k == 1 ? 0 : (row.split_k - 1) * row.block_rows * store_cols() * 4;
    }
    // Sums of the warpgroups that help with K blocks.
    constexpr int helper_bytes() const { return (row.k_warpgroups - 1) * row.block_rows * row.block_cols * 4; }
    constexpr int stage_bytes() const {
        return row_tile_bytes() + col_tile_bytes() + row_scale_pitch() + col_scale_pitch() + 16;
    }
    constexpr int work_queue_bytes() const { return has_work_queue() ? 192 + 8 * kMaxGroups / 32 + 32 * 20 + 64 : 0; }
    constexpr int group_table_bytes() const { return is_k_grouped() ? 8 * kMaxKGroups : 0; }
    constexpr int fixed_bytes() const {
        return work_queue_bytes() + group_table_bytes() + staging_bytes() + reduce_bytes() + helper_bytes() +
               kScaleChunks * (4 * kScaleChunk * num_block_scales() + 16) + 16 + 3 * 128;
    }
    // A multiple of k_warpgroups: each of them always meets the same stages, and so misses no phase of their barriers.
    constexpr int num_stages() const {
        const int fit = std::min(kMaxStages, (kMaxSharedBytes - fixed_bytes()) / stage_bytes());
        return fit / row.k_warpgroups * row.k_warpgroups;
    }
    constexpr int shared_bytes() const {
        return align_up(fixed_bytes() + num_stages() * stage_bytes(), 1024);
    }
};

// Why a row cannot be compiled, or null.
constexpr const char* invalid_reason(GemmRow row) {
    const GemmLayout layout{row};
    if (row.block_rows % 64 != 0 || row.block_rows < 64 || row.block_rows > 256) return "block_rows must be 64, 128, 192 or 256";
    // Totals of all parts and, for promotion, one accumulator, of the registers that setmaxnreg can give.
    const int accumulators = layout.row_parts() + (layout.has_bf16_tokens() ? layout.col_scales_are_vector() : layout.has_scales());
    const int others = layout.is_fp4() ? 28 + 32 : 24;  // of FP4 also a stage's packed values and their expansion
    if (row.block_cols / 2 * accumulators > layout.consumer_registers() - others) return "too few registers";
    const int most_cols = layout.is_bf16() ? 256 : 192;
    if (row.block_cols % 8 != 0 || row.block_cols < 8 || row.block_cols > most_cols) {
        return "block_cols must be a multiple of 8 from 8 to 192, or 256 with BF16";
    }
    if (layout.is_bf16() == layout.has_scales()) return "FP8 operands have scales, BF16 ones have none";
    if (!layout.is_bf16() && (row.a_mn_major || row.b_mn_major)) return "FP8 operands are K-major";
    if (layout.has_scales() && row.gran_k != 128 && row.gran_k != 32) return "gran_k must be 128 or 32";
    if (row.gran_k == 32 && row.scaling != kScaling1D1D && row.scaling != kUE8M0Scaling) {
        return "gran_k 32 needs 1D1D or UE8M0 scaling";
    }
    if (row.scaling == kUE8M0Scaling && !layout.is_fp4()) return "UE8M0 scaling is for FP4 rows";
    if (layout.is_fp4() && (!row.swap_ab || layout.row_parts() > 1)) {
        return "FP4 operands are swapped, with one part of 64 rows per warpgroup";
    }
    if (layout.is_fp4() && row.multicast_ctas() > 1) return "FP4 rows share no panels";
    if (layout.has_bf16_tokens() && row.scaling != kUE8M0Scaling) return "BF16 beside FP4 takes UE8M0 scales";
    if (layout.is_fp4() && row.scaling == kScaling1D1D && row.gran_k != 32) {
        return "FP32 scales of FP4 rows are per 32 of K";
    }
    if (layout.rows_mn_major() && row.block_rows % (kMnMajorSpan * row.col_ctas) != 0) {
        return "MN-major rows come 64 at a time";
    }
    if (layout.cols_mn_major() && row.block_cols % (kMnMajorSpan * row.row_ctas) != 0) {
        return "MN-major columns come 64 at a time";
    }
    if (row.row_ctas > 1 && row.col_ctas > 1) return "a cluster shares one operand, not both";
    if (row.cluster_size() > 8) return "a cluster has 8 CTAs at most";
    if (row.block_cols % (8 * row.row_ctas) != 0) return "a shared column panel is loaded in parts of 8 columns or more";
    if (row.block_rows % (8 * row.col_ctas) != 0) return "a shared row panel is loaded in parts of 8 rows or more";
    if (row.block_cols / 8 % layout.num_slices() != 0) return "split K must divide the columns evenly, 8 at a time";
    if (row.split_k > 1 && layout.row_parts() > 1) return "split K takes one part of 64 rows per warpgroup";
    if (row.k_warpgroups != 1 && row.k_warpgroups != 2 && row.k_warpgroups != 4) return "k_warpgroups must be 1, 2 or 4";
    if (layout.num_consumer_warpgroups() > 4) return "at most 4 consumer warpgroups";
    if (row.k_warpgroups > 1 && (layout.row_parts() > 1 || layout.is_bf16())) {
        return "K warpgroups take FP8 and one part of 64 rows";
    }
    if (!row.swap_ab && layout.store_cols() % 16 != 0) return "stores need 16 columns at a time";
    if (layout.has_groups() && row.cluster_size() > 1) return "CTAs of grouped and batched products work alone";
    if (layout.stages_float() && (row.swap_ab || row.block_cols % 64 != 0 || row.split_k > 1)) {
        return "K-grouped products have neither swapped operands nor split K, and columns in boxes of 64";
    }
    if (layout.is_k_grouped() && layout.is_bf16() && !(row.a_mn_major && row.b_mn_major)) {
        return "BF16 K-grouped operands are MN-major";
    }
    if (row.grouping == Grouping::kSummed &&
        (!layout.is_bf16() || row.multicast_ctas() > 1 || row.a_mn_major || row.b_mn_major)) {
        return "summed products are K-major BF16 without shared panels";
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

}  // namespace deep_gemm::sm90
