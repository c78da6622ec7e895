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

    // With groups: third coordinates in tensor maps. Schedulers of dense products leave what follows alone.
    int token_group;  // of A, C and D
    // K-grouped: elements of K before the group, and in it.
    int k_start;
    int k_size;
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
        locate(tile_, work);
        tile_ += step_;
        return true;
    }

protected:
    __device__ __forceinline__ void locate(int tile, WorkTile& work) const {
        const int group = divide(tile, schedule_.tiles_per_group);
        const int in_group = tile - group * schedule_.tiles_per_group.divisor;
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
    }

    const DenseSchedule& schedule_;
    int rank_;
    int tile_;
    int step_;
};

// The same walk over products one after the other, each with a part of K, which only the device knows. A warp reads all
// parts into a table in shared memory when the kernel starts.
//   kStageK    elements of K in a block
//   kPadded    in the operands each group starts on a multiple of kStageK, whatever the layout says of its start
//
// Whatever the layout holds, all parts lie inside K.
template <int kBlockRows, int kBlockCols, int kRowCtas, int kColCtas, int kStageK, bool kPadded>
class KGroupedScheduler : DenseScheduler<kBlockRows, kBlockCols, kRowCtas, kColCtas, 1> {
    using Dense = DenseScheduler<kBlockRows, kBlockCols, kRowCtas, kColCtas, 1>;

    struct Part {
        int start;
        int size;
    };

public:
    struct Storage {
        Part parts[kMaxKGroups];
    };

    __device__ __forceinline__ KGroupedScheduler(const DenseSchedule& schedule, const KGroupSchedule& groups,
                                                 const Storage& table, uint32_t rank)
        : Dense(schedule, rank), groups_(groups), table_(table) {}

    // Fills the table; a whole warp.
    __device__ __forceinline__ static void build(const KGroupSchedule& groups, Storage& table) {
        const int lane = threadIdx.x % 32;
        const int end = groups.first_group + groups.num_groups;
        int64_t before = 0;  // K of all groups before these 32
#pragma unroll 1
        for (int base = 0; base < end; base += 32) {
            const int group = base + lane;
            int64_t start = 0, size = group < end ? entry(groups, group) : 0;
            if (!groups.is_sizes) {
                start = group > 0 && group < end ? entry(groups, group - 1) : 0;
                start = (start + groups.alignment - 1) / groups.alignment * groups.alignment;
                size = max(size - start, int64_t{0});
            }
            const int64_t span = kPadded ? (size + kStageK - 1) / kStageK * kStageK : size;
            int64_t up_to = span;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int64_t other = __shfl_up_sync(0xffffffff, up_to, distance);
                if (lane >= distance) up_to += other;
            }
            if (kPadded || groups.is_sizes) start = before + up_to - span;
            start = min(start, static_cast<int64_t>(groups.k));
            size = min(size, groups.k - start);
            if (group >= groups.first_group && group < end) {
                table.parts[group - groups.first_group] = {static_cast<int>(start), static_cast<int>(size)};
            }
            before += __shfl_sync(0xffffffff, up_to, 31);
        }
    }

    __device__ __forceinline__ bool next(WorkTile& work) {
        const int group = divide(this->tile_, groups_.tiles_per_group);
        if (group >= groups_.num_groups) return false;
        this->locate(this->tile_ - group * groups_.tiles_per_group.divisor, work);
        const Part part = table_.parts[group];
        work.token_group = group;
        work.k_start = part.start;
        work.k_size = part.size;
        work.k_block = part.start / kStageK;
        work.num_k_blocks = (part.size + kStageK - 1) / kStageK;
        this->tile_ += this->step_;
        return true;
    }

private:
    __device__ __forceinline__ static int64_t entry(const KGroupSchedule& groups, int group) {
        return min(max(groups.layout[group], 0), groups.k);
    }

    const KGroupSchedule& groups_;
    const Storage& table_;
};

}  // namespace deep_gemm
