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

// Called by whole warps, behind wait_for_dependencies(). What `ends` holds is clamped: groups ascend, inside the rows.
__device__ __forceinline__ KBlock find_k_block(const KGroups& groups, int64_t block) {
    const int lane = threadIdx.x % 32;
    int64_t blocks_before = 0, end_before = 0;
    for (int64_t base = 0; base < groups.num_groups; base += 32) {
        const bool exists = base + lane < groups.num_groups;
        int64_t value = 0;
        if (exists) value = static_cast<int32_t>(load_4(groups.ends + (base + lane) * groups.ends_stride));
        value = max(int64_t{0}, min(value, groups.rows));
        int64_t begin, end;
        if (groups.layout == GroupLayout::kSizes) {
            end = value;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int64_t before = __shfl_up_sync(0xffffffff, end, offset);
                if (lane >= offset) end += before;
            }
            begin = min(end_before + end - value, groups.rows);
            end = min(end_before + end, groups.rows);
        } else {
            end = max(value, end_before);
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int64_t before = __shfl_up_sync(0xffffffff, end, offset);
                if (lane >= offset) end = max(end, before);
            }
            begin = __shfl_up_sync(0xffffffff, end, 1);
            if (lane == 0) begin = end_before;
            if (groups.layout == GroupLayout::kPsum) {
                begin = min(ceil_div<int64_t>(begin, groups.alignment) * groups.alignment, groups.rows);
                end = max(end, begin);
            }
        }
        const int64_t blocks = exists && end > begin ? ceil_div<int64_t>(end - begin, kGroupBlock) : 0;
        int64_t blocks_end = blocks;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int64_t before = __shfl_up_sync(0xffffffff, blocks_end, offset);
            if (lane >= offset) blocks_end += before;
        }
        const int64_t local = block - (blocks_before + blocks_end - blocks);  // within this lane's group
        const unsigned owner = __ballot_sync(0xffffffff, local >= 0 && local < blocks);
        if (owner != 0) {
            KBlock result;
            result.row_0 = begin + local * kGroupBlock;
            result.group_0 = begin;
            result.group_rows = end - begin;
            result.rows = static_cast<int>(min(int64_t{kGroupBlock}, end - result.row_0));
            if (groups.layout == GroupLayout::kPsum && local == blocks - 1) {
                result.gap_0 = end;
                result.gap_rows =
                    min(ceil_div<int64_t>(end, groups.alignment) * groups.alignment, groups.rows) - end;
            }
            const int source = __ffs(owner) - 1;
            result.row_0 = __shfl_sync(0xffffffff, result.row_0, source);
            result.rows = __shfl_sync(0xffffffff, result.rows, source);
            result.group_0 = __shfl_sync(0xffffffff, result.group_0, source);
            result.group_rows = __shfl_sync(0xffffffff, result.group_rows, source);
            result.gap_0 = __shfl_sync(0xffffffff, result.gap_0, source);
            result.gap_rows = __shfl_sync(0xffffffff, result.gap_rows, source);
            return result;
        }
        blocks_before += __shfl_sync(0xffffffff, blocks_end, 31);
        const int last = static_cast<int>(min(int64_t{32}, groups.num_groups - base)) - 1;
        end_before = __shfl_sync(0xffffffff, end, last);
    }
    // With kPsum the last group's own block fills the rows up to the alignment.
    if (groups.layout == GroupLayout::kPsum)
        end_before = min(ceil_div<int64_t>(end_before, groups.alignment) * groups.alignment, groups.rows);
    KBlock result;
    result.gap_0 = end_before + (block - blocks_before) * kGroupBlock;
    result.gap_rows = max(int64_t{0}, min(int64_t{kGroupBlock}, groups.rows - result.gap_0));
    return result;
}

}  // namespace deep_gemm::cast
