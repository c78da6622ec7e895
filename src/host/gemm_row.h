// One row of a table of compiled GEMM kernels.
#pragma once

namespace deep_gemm {

enum Scaling : int {
    kScaling1D2D,  // A: one scale per row and 128 of K; B: one per 128 x 128 block
    kScaling1D1D,  // a scale per row of either operand (a block scale is read once per row), per gran_k of K
    kNoScaling,    // BF16
    kUE8M0Scaling, // SM100: a power of two per row of either operand and 32 or 128 of K, applied by the tensor core.
                   // SM90's FP4 rows: B's scales are UE8M0 words, a row's four of 128 of K; A's FP32 per row and gran_k,
                   // but BF16 A with gran_k 32 has none
};

// The latter two are A and B, on SM90.
enum class OperandType : int { kFP8 = 0, kBF16 = 1, kFP8FP4 = 2, kBF16FP4 = 3 };

// How a kernel finds the products that share its launch; one tile scheduler each (src/device/tile_scheduler.cuh).
enum class Grouping : int {
    kDense = 0,
    kMGrouped = 1,  // groups own rows of A and D, each has its own B
    kKGrouped = 2,  // groups own parts of K, each has its own D
    kBatched = 3,   // each group has its own A, B and D
    kSummed = 4,    // each group has its own A and B, D is the sum of their products. BF16, both operands K-major
};

// Rows and columns are those of the tensor-core instruction (see WorkTile): with swapped operands, rows are B's (the
// weights) and columns A's (the tokens), which is for small M.
struct GemmRow {
    int block_rows;   // 64, 128, 192: one consumer warpgroup per 64; 256: two, each with two parts of 64
    int block_cols;   // multiple of 8, at most 192, or 256 with BF16
    int row_ctas;     // CTAs of a cluster side by side along rows: they share the column operand by multicast
    int col_ctas;     // ... along columns: they share the row operand
    int split_k;      // CTAs of a cluster that share one tile, each with its part of K, reduced in shared memory
    bool swap_ab;
    Scaling scaling;
    int gran_k;       // 128, or 32 (1D1D and UE8M0 only); 0 without scales
    OperandType operands = OperandType::kFP8;
    Grouping grouping = Grouping::kDense;
    bool a_mn_major = false;  // BF16 only: the tensor core reads it as it lies
    bool b_mn_major = false;
    int k_warpgroups = 1;     // consumer warpgroups that share 64 rows and take turns at the K blocks
    int arch = 90;            // 100: sm100/gemm_instances.h, whose rows take any gran_k and layout at run time

    constexpr bool has_fp4() const { return operands == OperandType::kFP8FP4 || operands == OperandType::kBF16FP4; }
    constexpr bool has_bf16_a() const { return operands == OperandType::kBF16 || operands == OperandType::kBF16FP4; }
    constexpr int element_bytes() const { return has_bf16_a() ? 2 : 1; }  // of A
    constexpr int block_k() const { return operands == OperandType::kBF16 ? 64 : 128; }  // elements of K in a stage
    constexpr int multicast_ctas() const { return row_ctas * col_ctas; }
    constexpr int cluster_size() const { return multicast_ctas() * split_k; }
    constexpr int tile_rows() const { return block_rows * row_ctas; }  // of a cluster
    constexpr int tile_cols() const { return block_cols * col_ctas; }
    constexpr int tile_m() const { return swap_ab ? tile_cols() : tile_rows(); }
    constexpr int tile_n() const { return swap_ab ? tile_rows() : tile_cols(); }
    constexpr int block_m() const { return swap_ab ? block_cols : block_rows; }
    constexpr int block_n() const { return swap_ab ? block_rows : block_cols; }
    // SM90, FP8: parts of 64 rows that a tile has beyond the end of its group are neither loaded nor multiplied. In BF16 that
    // made 32 x 192 rows 8 and 21 % slower: presumably half a tile runs ahead of the other tiles of its weights, which then
    // find them in L2 no more.
    constexpr bool skips_row_parts() const {
        return grouping == Grouping::kMGrouped && operands == OperandType::kFP8 && !swap_ab && block_rows > 64;
    }
    // SM90: what a tile has past the end of M, or N, is not loaded. TMA would fill it with zeros, which is slower than bringing
    // values: (4096, 7168) took 20.4 us at M 200 instead of 17. Not of an operand that CTAs share, and not in FP4 rows, which
    // read tokens in shared memory themselves where scales are far apart.
    constexpr bool skips_tail() const { return has_tails() && !a_mn_major && (swap_ab ? row_ctas : col_ctas) == 1; }
    constexpr bool skips_weights_tail() const { return has_tails() && !b_mn_major && (swap_ab ? col_ctas : row_ctas) == 1; }
    constexpr bool has_tails() const {
        return (grouping == Grouping::kDense || grouping == Grouping::kBatched) && !has_fp4();
    }
    // SM90: each consumer warpgroup has two accumulators, for which registers suffice up to 128 columns. Not where four CTAs share
    // tokens or warpgroups take turns at the K blocks, which were 2 and up to 7 % slower with it, nor for M-grouped products,
    // whose tiles of that size are seldom chosen.
    constexpr bool overlaps_promotion() const {
        return (grouping == Grouping::kDense || grouping == Grouping::kBatched) && operands == OperandType::kFP8 &&
               scaling == kScaling1D2D && !swap_ab && block_rows <= 128 && block_cols <= (split_k == 1 ? 128 : 64) &&
               k_warpgroups == 1 && col_ctas <= 2;
    }
    // SM90: the host may limit how much of the weights is on its way. Where tokens are more that gained nothing.
    constexpr bool limits_loads() const { return grouping == Grouping::kDense && swap_ab && cluster_size() == 1; }
};

// A row of the table with several warpgroups for the same 64 rows.
constexpr GemmRow k_warpgroups(int count, GemmRow row) {
    row.k_warpgroups = count;
    return row;
}

}  // namespace deep_gemm
