// The table of SM90 GEMM kernels. One line is one kernel: shards, dispatch, selection, listing and tests follow.
#pragma once

#include "../host/gemm_row.h"

namespace deep_gemm::sm90 {

using enum OperandType;
using enum Grouping;

inline constexpr GemmRow kGemmRows[] = {
    // block_rows, block_cols, row_ctas, col_ctas, split_k, swap_ab, scaling, gran_k, operands (FP8), grouping (dense),
    // a_mn_major, b_mn_major

    // Large M.
    {256, 128, 1, 1, 1, false, kScaling1D2D, 128},
    {256, 128, 2, 1, 1, false, kScaling1D2D, 128},
    {256, 128, 1, 2, 1, false, kScaling1D2D, 128},
    {128, 192, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 192, 1, 2, 1, false, kScaling1D2D, 128},
    {128, 176, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 160, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 144, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 128, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 128, 2, 1, 1, false, kScaling1D2D, 128},

    // M around 128.
    {128, 112, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 96, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 64, 1, 1, 1, false, kScaling1D2D, 128},
    {128, 64, 1, 1, 2, false, kScaling1D2D, 128},
    {128, 32, 1, 1, 1, false, kScaling1D2D, 128},

    // M around 64.
    {64, 128, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 128, 1, 1, 2, false, kScaling1D2D, 128},
    {64, 112, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 96, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 64, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 64, 1, 1, 2, false, kScaling1D2D, 128},
    {64, 64, 1, 1, 4, false, kScaling1D2D, 128},
    {64, 48, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 32, 1, 1, 1, false, kScaling1D2D, 128},
    {64, 32, 1, 1, 2, false, kScaling1D2D, 128},
    {64, 16, 1, 1, 1, false, kScaling1D2D, 128},

    // M up to 32: the weights on the instruction's M side.
    {64, 32, 1, 1, 1, true, kScaling1D2D, 128},
    {64, 32, 1, 1, 2, true, kScaling1D2D, 128},
    {64, 32, 1, 1, 8, true, kScaling1D2D, 128},
    {128, 32, 1, 1, 1, true, kScaling1D2D, 128},
    {64, 16, 1, 1, 1, true, kScaling1D2D, 128},
    {64, 16, 1, 1, 2, true, kScaling1D2D, 128},
    {64, 16, 1, 1, 4, true, kScaling1D2D, 128},
    {64, 16, 1, 1, 8, true, kScaling1D2D, 128},
    {128, 16, 1, 1, 1, true, kScaling1D2D, 128},
    {128, 16, 1, 1, 4, true, kScaling1D2D, 128},
    {64, 8, 1, 1, 1, true, kScaling1D2D, 128},
    {64, 8, 1, 1, 2, true, kScaling1D2D, 128},
    {64, 8, 1, 1, 4, true, kScaling1D2D, 128},
    {64, 8, 1, 1, 8, true, kScaling1D2D, 128},
    {128, 8, 1, 1, 1, true, kScaling1D2D, 128},
    {128, 8, 1, 1, 4, true, kScaling1D2D, 128},

    // Both operands scaled per row, such as weight gradients.
    {256, 128, 1, 2, 1, false, kScaling1D1D, 128},
    {128, 128, 1, 1, 1, false, kScaling1D1D, 128},
    {128, 128, 2, 1, 1, false, kScaling1D1D, 128},
    {64, 64, 1, 1, 1, false, kScaling1D1D, 128},
    {64, 64, 1, 1, 4, false, kScaling1D1D, 128},
    {64, 16, 1, 1, 1, true, kScaling1D1D, 128},
    {64, 16, 1, 1, 4, true, kScaling1D1D, 128},

    // Scales per 32 of K (MXFP8).
    {128, 128, 1, 1, 1, false, kScaling1D1D, 32},
    {64, 64, 1, 1, 1, false, kScaling1D1D, 32},
    {64, 16, 1, 1, 4, true, kScaling1D1D, 32},

    // M-grouped: large groups, medium ones, and those of a few rows with the weights on the instruction's M side.
    {256, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 192, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 64, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {64, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {64, 64, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kMGrouped},
    {64, 32, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 32, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kMGrouped},
    {64, 16, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 16, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kMGrouped},
    {64, 8, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kMGrouped},
    {128, 128, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kMGrouped},
    {64, 16, 1, 1, 1, true, kScaling1D1D, 128, kFP8, kMGrouped},
    {128, 128, 1, 1, 1, false, kScaling1D1D, 32, kFP8, kMGrouped},
    {64, 16, 1, 1, 1, true, kScaling1D1D, 32, kFP8, kMGrouped},

    // Batched. Also dense products whose result has gaps between heads.
    {256, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kBatched},
    {128, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kBatched},
    {128, 64, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kBatched},
    {64, 128, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kBatched},
    {64, 64, 1, 1, 1, false, kScaling1D2D, 128, kFP8, kBatched},
    {64, 32, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kBatched},
    {64, 16, 1, 1, 1, true, kScaling1D2D, 128, kFP8, kBatched},
    {128, 128, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kBatched},
    {64, 64, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kBatched},
    {64, 64, 1, 1, 1, false, kScaling1D1D, 32, kFP8, kBatched},

    // BF16, the large tiles with and without sharing a panel; those for M up to 32 have the weights on the M side.
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {128, 256, 2, 1, 1, false, kNoScaling, 0, kBF16},
    {256, 128, 1, 2, 1, false, kNoScaling, 0, kBF16},
    {128, 192, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {128, 160, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {128, 64, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {128, 64, 1, 1, 2, false, kNoScaling, 0, kBF16},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {64, 128, 1, 1, 2, false, kNoScaling, 0, kBF16},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {64, 64, 1, 1, 4, false, kNoScaling, 0, kBF16},
    {64, 32, 1, 1, 1, false, kNoScaling, 0, kBF16},
    {64, 32, 1, 1, 1, true, kNoScaling, 0, kBF16},
    {64, 32, 1, 1, 4, true, kNoScaling, 0, kBF16},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16},
    {64, 16, 1, 1, 2, true, kNoScaling, 0, kBF16},
    {64, 16, 1, 1, 8, true, kNoScaling, 0, kBF16},
    {128, 16, 1, 1, 1, true, kNoScaling, 0, kBF16},
    {64, 8, 1, 1, 1, true, kNoScaling, 0, kBF16},
    {64, 8, 1, 1, 2, true, kNoScaling, 0, kBF16},
    {64, 8, 1, 1, 8, true, kNoScaling, 0, kBF16},
    {128, 8, 1, 1, 1, true, kNoScaling, 0, kBF16},

    // BF16 with MN-major operands: B (nn), both (tn), A (tt).
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {128, 256, 2, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {128, 192, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 64, 1, 1, 4, false, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 16, 1, 1, 4, true, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 8, 1, 1, 1, true, kNoScaling, 0, kBF16, kDense, false, true},
    {64, 8, 1, 1, 4, true, kNoScaling, 0, kBF16, kDense, false, true},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {128, 256, 2, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {128, 192, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, true},
    {64, 64, 1, 1, 4, false, kNoScaling, 0, kBF16, kDense, true, true},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, false},
    {128, 256, 2, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, false},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, false},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, false},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kDense, true, false},
    {64, 64, 1, 1, 4, false, kNoScaling, 0, kBF16, kDense, true, false},

    // K-grouped: weight gradients of experts.
    {256, 128, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kKGrouped},
    {256, 128, 1, 2, 1, false, kScaling1D1D, 128, kFP8, kKGrouped},
    {128, 128, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kKGrouped},
    {64, 64, 1, 1, 1, false, kScaling1D1D, 128, kFP8, kKGrouped},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kKGrouped, true, true},
    {128, 256, 2, 1, 1, false, kNoScaling, 0, kBF16, kKGrouped, true, true},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kKGrouped, true, true},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kKGrouped, true, true},

    // M-grouped and batched BF16, with B as it is stored: [N, K] or [K, N].
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped},
    {128, 192, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped},
    {64, 32, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped},
    {128, 32, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped},
    {128, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {64, 32, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kMGrouped, false, true},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kBatched},
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched, false, true},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched, false, true},
    {64, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched, false, true},
    {64, 64, 1, 1, 1, false, kNoScaling, 0, kBF16, kBatched, false, true},
    {64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, kBatched, false, true},

    // Summed over a batch.
    {128, 256, 1, 1, 1, false, kNoScaling, 0, kBF16, kSummed},
    {128, 128, 1, 1, 1, false, kNoScaling, 0, kBF16, kSummed},
    {128, 64, 1, 1, 4, false, kNoScaling, 0, kBF16, kSummed},
    {64, 128, 1, 1, 8, false, kNoScaling, 0, kBF16, kSummed},
};
inline constexpr int kNumGemmRows = sizeof(kGemmRows) / sizeof(kGemmRows[0]);

}  // namespace deep_gemm::sm90
