// The table of SM100 GEMM kernels. One line is one kernel: shards, dispatch, selection, listing and tests follow.
#pragma once

#include "../host/gemm_row.h"

namespace deep_gemm::sm100 {

constexpr GemmRow bf16_row(int block_cols, int ctas, bool swap_ab, int split_k = 1) {
    GemmRow row = {128, block_cols, ctas, 1, split_k, swap_ab, kNoScaling, 0};
    row.operands = OperandType::kBF16;
    row.arch = 100;
    return row;
}

// FP8 and FP4 operands, with UE8M0 scales per 32 or 128 of K.
constexpr GemmRow scaled_row(int block_cols, int ctas, bool swap_ab, int split_k = 1) {
    GemmRow row = {128, block_cols, ctas, 1, split_k, swap_ab, kUE8M0Scaling, 0};
    row.arch = 100;
    return row;
}

constexpr GemmRow of_groups(Grouping grouping, GemmRow row) {
    row.grouping = grouping;
    return row;
}

using enum Grouping;

inline constexpr GemmRow kGemmRows[] = {
    // block_cols, ctas, swap_ab, split_k

    // Large M: 256 rows for a pair of CTAs.
    scaled_row(224, 2, false),
    scaled_row(192, 2, false),
    scaled_row(128, 2, false),

    // M around 128.
    scaled_row(128, 1, false),
    scaled_row(64, 1, false),
    scaled_row(32, 1, false),

    // M up to 64: the weights on the instruction's M side.
    scaled_row(64, 1, true),
    scaled_row(64, 1, true, 4),
    scaled_row(32, 2, true),
    scaled_row(32, 1, true, 8),
    scaled_row(16, 1, true),
    scaled_row(16, 1, true, 2),
    scaled_row(16, 1, true, 4),

    // The same for BF16, which needs no room for scales.
    bf16_row(256, 2, false),
    bf16_row(192, 2, false),
    bf16_row(128, 2, false),
    bf16_row(128, 1, false),
    bf16_row(64, 1, false),
    bf16_row(32, 1, false),
    bf16_row(64, 1, true),
    bf16_row(64, 1, true, 4),
    bf16_row(32, 1, true, 8),
    bf16_row(16, 1, true),
    bf16_row(16, 1, true, 2),
    bf16_row(16, 1, true, 4),

    // M-grouped. A pair with swapped operands has tiles of 128 tokens, which alignments of 128 want.
    of_groups(kMGrouped, scaled_row(192, 2, false)),
    of_groups(kMGrouped, scaled_row(128, 2, true)),
    of_groups(kMGrouped, scaled_row(128, 1, false)),
    of_groups(kMGrouped, scaled_row(64, 1, true)),
    of_groups(kMGrouped, scaled_row(32, 1, true)),
    of_groups(kMGrouped, scaled_row(16, 1, true)),
    of_groups(kMGrouped, bf16_row(256, 2, false)),
    of_groups(kMGrouped, bf16_row(128, 2, true)),
    of_groups(kMGrouped, bf16_row(128, 1, false)),
    of_groups(kMGrouped, bf16_row(64, 1, true)),
    of_groups(kMGrouped, bf16_row(16, 1, true)),

    // K-grouped: weight gradients of experts.
    of_groups(kKGrouped, scaled_row(192, 2, false)),
    of_groups(kKGrouped, scaled_row(128, 1, false)),
    of_groups(kKGrouped, bf16_row(256, 2, false)),
    of_groups(kKGrouped, bf16_row(128, 1, false)),

    // Batched. Also dense products whose result has gaps between heads.
    of_groups(kBatched, scaled_row(192, 2, false)),
    of_groups(kBatched, scaled_row(128, 1, false)),
    of_groups(kBatched, scaled_row(32, 1, true)),
    of_groups(kBatched, bf16_row(256, 2, false)),
    of_groups(kBatched, bf16_row(128, 1, false)),
    of_groups(kBatched, bf16_row(32, 1, true)),

    // Summed over a batch.
    of_groups(kSummed, bf16_row(256, 2, false)),
    of_groups(kSummed, bf16_row(128, 1, false)),
    of_groups(kSummed, bf16_row(64, 1, true, 4)),
};
inline constexpr int kNumGemmRows = sizeof(kGemmRows) / sizeof(kGemmRows[0]);

}  // namespace deep_gemm::sm100
