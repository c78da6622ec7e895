// Which tiles a cluster works on, and in which order. Every role of a kernel walks its own copy.
//
// A scheduler resolves all coordinates into a WorkTile; main loop and epilogue know nothing of groupings.
#pragma once

#include <cstdint>

#include "gemm_params.h"
#include "pipeline.cuh"
#include "ptx_mbarrier.cuh"

namespace deep_gemm {

// One CTA's share of one output tile. Rows and columns are those of the tensor-core instruction: with swapped
// operands, rows run along N and columns along M.
struct alignas(16) WorkTile {
    int row;          // first row of the CTA's tile
    int col;          // first column
    int k_block;      // first K block; of K-grouped BF16 the first element, for groups start anywhere
    int num_k_blocks;

    // With groups: third coordinates in tensor maps. Schedulers of dense products leave what follows alone.
    int group;        // of B
    int token_group;  // of A, C and D; 0 where all groups share one matrix
    // M-grouped: along M, this tile's group ends before `group_end`, and what is stored before `store_end`; rows between
    // the two are zeros. K-grouped: the group ends before `group_end` along K.
    int group_end;
    int store_end;
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

// The same walk over products that are alike, one after the other.
template <int kBlockRows, int kBlockCols>
class BatchedScheduler : DenseScheduler<kBlockRows, kBlockCols, 1, 1, 1> {
    using Dense = DenseScheduler<kBlockRows, kBlockCols, 1, 1, 1>;

public:
    __device__ __forceinline__ BatchedScheduler(const DenseSchedule& schedule, const BatchSchedule& batch)
        : Dense(schedule, 0), batch_(batch) {}

    __device__ __forceinline__ bool next(WorkTile& work) {
        const int group = divide(this->tile_, batch_.tiles_per_batch);
        if (group >= batch_.num_batches) return false;
        this->locate(this->tile_ - group * batch_.tiles_per_batch.divisor, work);
        work.group = work.token_group = group;
        this->tile_ += this->step_;
        return true;
    }

private:
    const BatchSchedule& batch_;
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
        work.group_end = part.start + part.size;
        work.k_block = kPadded ? part.start / kStageK : part.start;
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

// Tiles on their way from the warp that finds them to the roles that work on them.
struct WorkQueue {
    static constexpr int kSlots = 4;

    WorkTile tiles[kSlots];
    ptx::Barrier full[kSlots];   // 1 arrival
    ptx::Barrier empty[kSlots];  // one for each role's warp that reads

    __device__ __forceinline__ void init(int readers) {
        for (int slot = 0; slot < kSlots; ++slot) {
            ptx::mbarrier_init(full[slot], 1);
            ptx::mbarrier_init(empty[slot], readers);
        }
    }
};

// A role's position in a WorkQueue. `one_thread`: the role is one thread of its warp, not all of them.
class QueueReader {
public:
    __device__ __forceinline__ QueueReader(WorkQueue& queue, bool one_thread)
        : queue_(queue), one_thread_(one_thread) {}

    // Gives back the slot of the tile before.
    __device__ __forceinline__ bool next(WorkTile& work) {
        if (count_ > 0) {
            if (!one_thread_) __syncwarp();
            if (one_thread_ || threadIdx.x % 32 == 0) ptx::mbarrier_arrive(queue_.empty[(count_ - 1) % kSlots]);
        }
        ptx::mbarrier_wait(queue_.full[count_ % kSlots], count_ / kSlots % 2);
        ++count_;
        read(work);
        return work.num_k_blocks >= 0;
    }

    // The same tile once more, for a role that has no registers to keep it in meanwhile.
    __device__ __forceinline__ void read(WorkTile& work) const { work = queue_.tiles[(count_ - 1) % kSlots]; }

private:
    static constexpr uint32_t kSlots = WorkQueue::kSlots;

    WorkQueue& queue_;
    bool one_thread_;
    uint32_t count_ = 0;  // of tiles so far: the slot and its phase in one register
};

// Persistent walk over groups of rows that share N and K, whose sizes only the device knows. One warp finds this CTA's
// tiles, 32 at a time, and queues them; all other roles read the queue.
//
// Tiles are numbered group after group, empty ones having none; CTA i takes tiles i, i + CTAs, ... Inside a group tiles
// along M vary fastest, `row_tiles` of them at a time. Where the layout names the group of each row, all rows are one
// group in this respect, and a tile whose first row is padding is passed over.
//
// Whatever the layout holds, all coordinates lie inside the matrices, no row is in two tiles, and the walk is at most as
// long as with a layout that makes sense.
template <int kBlockM, int kBlockN, bool kSwapAB>
class MGroupedScheduler {
public:
    struct Storage {
        WorkQueue queue;
        // Of each group: tiles along M before it, and the largest end so far (or its rows).
        int first_tile[kMaxGroups + 1];
        int end[kMaxGroups];
    };

    // A whole warp.
    __device__ __forceinline__ static void run(const MGroupSchedule& schedule, Storage& shared) {
        const int lane = threadIdx.x % 32;
        const bool by_row = schedule.table == kGroupOfRow;
        const int row_tiles = by_row ? (schedule.rows + kBlockM - 1) / kBlockM : build_table(schedule, shared);
        const int num_tiles = row_tiles * schedule.col_tiles;
        const int step = static_cast<int>(gridDim.x);
        PipelineState<WorkQueue::kSlots> state;
#pragma unroll 1
        for (int first = static_cast<int>(blockIdx.x); first < num_tiles; first += 32 * step) {
            WorkTile work;
            const int tile = first + lane * step;
            bool is_tile = tile < num_tiles;
            bool is_ragged = false;  // by row: the tile may hold padding
            if (is_tile) is_tile = locate(schedule, shared, row_tiles, tile, work, is_ragged);
            const uint32_t ragged = __ballot_sync(0xffffffff, is_tile && is_ragged);
#pragma unroll 1
            for (uint32_t left = __ballot_sync(0xffffffff, is_tile); left != 0; left &= left - 1) {
                const int source = __ffs(left) - 1;
                if (ragged >> source & 1) {
                    const int row = __shfl_sync(0xffffffff, kSwapAB ? work.col : work.row, source);
                    const int group = __shfl_sync(0xffffffff, work.group, source);
                    const int end = row + count_rows(schedule, row, group);
                    if (lane == source) {
                        work.group_end = end;
                        if (!schedule.zero_padding) work.store_end = end;
                    }
                }
                push(shared.queue, state, lane == source, work);
            }
        }
        push(shared.queue, state, lane == 0, WorkTile{.num_k_blocks = -1});
    }

private:
    __device__ __forceinline__ static void push(WorkQueue& queue, PipelineState<WorkQueue::kSlots>& state, bool mine,
                                                const WorkTile& work) {
        ptx::mbarrier_wait(queue.empty[state.stage_idx], state.phase ^ 1);
        if (mine) {
            queue.tiles[state.stage_idx] = work;
            ptx::mbarrier_arrive(queue.full[state.stage_idx]);
        }
        state.advance();
    }

    __device__ __forceinline__ static int align(int row, const MGroupSchedule& schedule) {
        return min((row + schedule.alignment - 1) / schedule.alignment * schedule.alignment, schedule.rows);
    }

    // Fills `first_tile` and `end`; returns the number of tiles along M.
    __device__ __forceinline__ static int build_table(const MGroupSchedule& schedule, Storage& shared) {
        const int lane = threadIdx.x % 32;
        int tiles_before = 0, end_before = 0;
#pragma unroll 1
        for (int base = 0; base < schedule.num_groups; base += 32) {
            const int group = base + lane;
            int end = group < schedule.num_groups ? min(max(schedule.layout[group], 0), schedule.rows) : 0;
            int tiles = end;  // rows to cover, at first
            if (schedule.table == kEndOfGroup) {
                // The largest end so far, so that an unsorted layout makes empty groups.
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int other = __shfl_up_sync(0xffffffff, end, distance);
                    if (lane >= distance) end = max(end, other);
                }
                end = max(end, end_before);
                int previous = __shfl_up_sync(0xffffffff, end, 1);
                if (lane == 0) previous = end_before;
                const int start = align(previous, schedule);
                tiles = max(cover_end(schedule, group, end) - start, 0);
                end_before = __shfl_sync(0xffffffff, end, 31);
            }
            tiles = group < schedule.num_groups ? (tiles + kBlockM - 1) / kBlockM : 0;
            int up_to = tiles;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(0xffffffff, up_to, distance);
                if (lane >= distance) up_to += other;
            }
            if (group < schedule.num_groups) {
                shared.first_tile[group] = tiles_before + up_to - tiles;
                shared.end[group] = end;
            }
            tiles_before += __shfl_sync(0xffffffff, up_to, 31);
        }
        if (lane == 0) shared.first_tile[schedule.num_groups] = tiles_before;
        __syncwarp();
        return tiles_before;
    }

    // Where the rows end that are stored for a group that ends at `end`.
    __device__ __forceinline__ static int cover_end(const MGroupSchedule& schedule, int group, int end) {
        if (!schedule.zero_padding) return end;
        return group == schedule.num_groups - 1 ? schedule.rows : align(end, schedule);
    }

    // Tile number `tile`; false where there is nothing to do.
    __device__ __forceinline__ static bool locate(const MGroupSchedule& schedule, const Storage& shared, int row_tiles,
                                                  int tile, WorkTile& work, bool& is_ragged) {
        const bool by_row = schedule.table == kGroupOfRow;
        int group = 0, first_tile = 0;
        if (!by_row) {
            // The last group that starts at or before the tile.
            int after = schedule.num_groups;
            const int row_tile = tile / schedule.col_tiles;
            while (after - group > 1) {
                const int middle = (group + after) / 2;
                if (shared.first_tile[middle] <= row_tile) {
                    group = middle;
                } else {
                    after = middle;
                }
            }
            first_tile = shared.first_tile[group];
            row_tiles = shared.first_tile[group + 1] - first_tile;
        }
        const int in_group = tile - first_tile * schedule.col_tiles;
        const int band = in_group / (schedule.row_tiles * schedule.col_tiles);
        const int first_of_band = band * schedule.row_tiles;
        const int in_band = in_group - first_of_band * schedule.col_tiles;
        const int band_tiles = min(schedule.row_tiles, row_tiles - first_of_band);
        const int col_tile = in_band / band_tiles;
        int row = (first_of_band + in_band - col_tile * band_tiles) * kBlockM;

        bool is_padding;
        if (by_row) {
            const int last = min(row + kBlockM, schedule.rows) - 1;
            group = schedule.layout[row];
            is_padding = group < 0 || group >= schedule.num_groups;
            is_ragged = !is_padding && schedule.layout[last] != group;
            if (is_padding && !schedule.zero_padding) return false;
            work.group_end = is_padding ? 0 : last + 1;
            work.store_end = last + 1;
            work.token_group = 0;
        } else if (schedule.table == kEndOfGroup) {
            const int start = group == 0 ? 0 : align(shared.end[group - 1], schedule);
            row += start;
            work.group_end = shared.end[group];
            work.store_end = cover_end(schedule, group, shared.end[group]);
            work.token_group = 0;
            is_padding = row >= work.group_end;
        } else {
            work.group_end = work.store_end = shared.end[group];
            work.token_group = group;
            is_padding = false;
        }
        work.row = kSwapAB ? col_tile * kBlockN : row;
        work.col = kSwapAB ? row : col_tile * kBlockN;
        work.k_block = 0;
        work.num_k_blocks = is_padding ? 0 : schedule.num_k_blocks;
        work.group = is_padding ? 0 : group;
        return true;
    }

    // By row: how many rows from `row` on, at most a tile, belong to `group`. A whole warp.
    __device__ __forceinline__ static int count_rows(const MGroupSchedule& schedule, int row, int group) {
        constexpr int kWidth = kBlockM < 32 ? kBlockM : 32;
        const int lane = threadIdx.x % 32;
        int count = 0;
#pragma unroll 1
        for (; count < kBlockM; count += kWidth) {
            const int mine = row + count + lane;
            const bool same = lane < kWidth && mine < schedule.rows && schedule.layout[mine] == group;
            const uint32_t others = ~__ballot_sync(0xffffffff, same);
            const int leading = others == 0 ? 32 : __ffs(others) - 1;
            if (leading < kWidth) return count + leading;
        }
        return count;
    }
};

}  // namespace deep_gemm
