// Which tiles a cluster works on, and in which order. Every role of a kernel walks its own copy.
//
// A scheduler resolves all coordinates into a WorkTile; main loop and epilogue know nothing of groupings.
#pragma once

#include <cstdint>

#include "gemm_params.h"

namespace deep_gemm {

// One CTA's share of one output tile. Rows and columns are those of the tensor-core instruction: with swapped
// operands, rows run along N and columns along M.
struct WorkTile {
    int row;          // first row of the CTA's tile
    int col;          // first column
    int k_block;      // first K block
    int num_k_blocks;
};

__device__ __forceinline__ int divide(int x, const FastDivisor& by) {
    return by.divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), by.multiplier) >> by.shift);
}

// Persistent walk over a dense output: cluster i takes tiles i, i + clusters, ... Tiles are numbered in groups of
// `row_group` row tiles; inside a group rows vary fastest, so a wave of CTAs shares few panels of either operand.
//   kRowCtas, kColCtas   CTAs of a cluster side by side along rows and columns
//   kSplitK              CTAs of a cluster that share one tile, each with its part of K
template <int kBlockRows, int kBlockCols, int kRowCtas, int kColCtas, int kSplitK>
class DenseScheduler {
public:
    __device__ __forceinline__ DenseScheduler(const DenseSchedule& schedule, uint32_t rank)
        : schedule_(schedule), rank_(static_cast<int>(rank)) {
        constexpr int kClusterSize = kRowCtas * kColCtas * kSplitK;
        tile_ = static_cast<int>(blockIdx.x) / kClusterSize;
        step_ = static_cast<int>(gridDim.x) / kClusterSize;
    }

    __device__ __forceinline__ bool next(WorkTile& work) {
        if (tile_ >= schedule_.num_tiles) return false;
        const int group = divide(tile_, schedule_.tiles_per_group);
        const int in_group = tile_ - group * schedule_.tiles_per_group.divisor;
        const int first_row_tile = group * schedule_.row_group.divisor;
        const bool is_last = first_row_tile + schedule_.row_group.divisor >= schedule_.num_row_tiles;
        const FastDivisor& rows = is_last ? schedule_.last_row_group : schedule_.row_group;
        const int col_tile = divide(in_group, rows);
        const int row_tile = first_row_tile + in_group - col_tile * rows.divisor;

        work.row = (row_tile * kRowCtas + rank_ % kRowCtas) * kBlockRows;
        work.col = (col_tile * kColCtas + rank_ / kRowCtas % kColCtas) * kBlockCols;
        if constexpr (kSplitK == 1) {
            work.k_block = 0;
            work.num_k_blocks = schedule_.num_k_blocks;
        } else {
            const int part = rank_ / (kRowCtas * kColCtas);
            work.k_block = schedule_.num_k_blocks * part / kSplitK;
            work.num_k_blocks = schedule_.num_k_blocks * (part + 1) / kSplitK - work.k_block;
        }
        tile_ += step_;
        return true;
    }

private:
    const DenseSchedule& schedule_;
    int rank_;
    int tile_;
    int step_;
};

}  // namespace deep_gemm
