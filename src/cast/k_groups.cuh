// Groups along K whose sizes are on the device: which rows a block of 128 rows of K is, found by every warp for itself.
#pragma once

#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {

inline constexpr int kGroupBlock = 128;  // rows of a group that share a scale

// A block of one group: rows [row_0, row_0 + rows), at most 128 of them. Where there are fewer blocks than asked for,
// the rest have no rows.
struct KBlock {
    int64_t row_0 = 0;
    int rows = 0;
    int64_t group_0 = 0, group_rows = 0;  // of the whole group
    // Rows that no group owns and that fall to this block to fill with zeros: behind its group, or behind all groups.
    int64_t gap_0 = 0, gap_rows = 0;
};

// Blocks to launch for: those of any sizes, and as many as the rows behind the last group take.
inline int64_t max_k_blocks(const KGroups& groups) {
    return ceil_div<int64_t>(groups.rows, kGroupBlock) + groups.num_groups;
}

// Called by whole warps, behind wait_for_dependencies(). What `ends` holds is clamped: groups ascend, inside the rows. Ends
// have 32 bits, and so has all that follows from them; sums stop at the last row.
__device__ __forceinline__ KBlock find_k_block(const KGroups& groups, int64_t block) {
    constexpr unsigned kAll = 0xffffffff;
    const unsigned lane = threadIdx.x % 32;
    const unsigned all_rows = static_cast<unsigned>(min(groups.rows, int64_t{0x7fffffff}));
    const auto aligned = [&](unsigned row) {
        const auto alignment = static_cast<unsigned>(groups.alignment);
        return min(ceil_div(row, alignment) * alignment, all_rows);
    };
    unsigned blocks_before = 0, end_before = 0;
    for (int64_t base = 0; base < groups.num_groups; base += 32) {
        const bool exists = base + lane < groups.num_groups;
        int value = 0;
        if (exists) value = static_cast<int>(load_4(groups.ends + (base + lane) * groups.ends_stride));
        unsigned end = min(static_cast<unsigned>(max(value, 0)), all_rows);
        if (groups.layout != GroupLayout::kSizes) end = max(end, end_before);
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const unsigned before = __shfl_up_sync(kAll, end, offset);
            if (lane < offset) continue;
            end = groups.layout == GroupLayout::kSizes ? min(end + before, all_rows) : max(end, before);
        }
        if (groups.layout == GroupLayout::kSizes) end = min(end + end_before, all_rows);
        unsigned begin = __shfl_up_sync(kAll, end, 1);
        if (lane == 0) begin = end_before;
        if (groups.layout == GroupLayout::kPsum) {
            begin = aligned(begin);
            end = max(end, begin);
        }
        const unsigned blocks = exists ? ceil_div(end - begin, unsigned{kGroupBlock}) : 0;
        unsigned blocks_end = blocks;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const unsigned before = __shfl_up_sync(kAll, blocks_end, offset);
            if (lane >= offset) blocks_end += before;
        }
        // Within this lane's group, or a number past all blocks.
        const unsigned local = static_cast<unsigned>(block) - (blocks_before + blocks_end - blocks);
        const unsigned owner = __ballot_sync(kAll, local < blocks);
        if (owner != 0) {
            const unsigned row_0 = begin + local * kGroupBlock;
            const bool has_gap = groups.layout == GroupLayout::kPsum && local == blocks - 1;
            const int source = __ffs(owner) - 1;
            KBlock result;
            result.row_0 = __shfl_sync(kAll, row_0, source);
            result.rows = static_cast<int>(__shfl_sync(kAll, min(unsigned{kGroupBlock}, end - row_0), source));
            result.group_0 = __shfl_sync(kAll, begin, source);
            result.group_rows = __shfl_sync(kAll, end - begin, source);
            result.gap_0 = __shfl_sync(kAll, end, source);
            result.gap_rows = __shfl_sync(kAll, has_gap ? aligned(end) - end : 0, source);
            return result;
        }
        blocks_before += __shfl_sync(kAll, blocks_end, 31);
        end_before = __shfl_sync(kAll, end, static_cast<int>(min(int64_t{32}, groups.num_groups - base)) - 1);
    }
    // With kPsum the last group's own block fills the rows up to the alignment.
    if (groups.layout == GroupLayout::kPsum) end_before = aligned(end_before);
    KBlock result;
    result.gap_0 = end_before + (block - blocks_before) * kGroupBlock;
    result.gap_rows = max(int64_t{0}, min(int64_t{kGroupBlock}, groups.rows - result.gap_0));
    return result;
}

}  // namespace deep_gemm::cast
