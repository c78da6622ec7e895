// Which tiles a cluster works on, and in which order. Every role of a kernel walks its own copy.
//
// A scheduler resolves all coordinates into a WorkTile; main loop and epilogue know nothing of groupings.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemm_params.h"
#include "pipeline.cuh"
#include "ptx_mbarrier.cuh"
#include "warp.cuh"

namespace deep_gemm {

// One CTA's share of one output tile. Rows and columns are those of the tensor-core instruction: with swapped
// operands, rows run along N and columns along M.
struct alignas(16) WorkTile {
    int row;          // first row of the CTA's tile
    int col;          // first column
    int k_block;      // first K block; the first element where K-grouped operands have groups start anywhere
    int num_k_blocks;

    // With groups: third coordinates in tensor maps. Schedulers of dense products leave what follows alone.
    int group;        // of B
    int token_group;  // of A, C and D; 0 where all groups share one matrix
    // M-grouped: along M, this tile's group ends before `group_end`, and what is stored before `store_end`; rows between
    // the two are zeros. K-grouped: the group ends before `group_end` along K.
    int group_end;
    int store_end;

    // K-grouped with scales of whole blocks, which are counted through all groups: the group's first one. It stores no rows
    // of zeros.
    __device__ __forceinline__ int& first_scale_block() { return store_end; }
    __device__ __forceinline__ int first_scale_block() const { return store_end; }
};

__device__ __forceinline__ int divide(int x, const FastDivisor& by) {
    return by.divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), by.multiplier) >> by.shift);
}

// Where a column of a product whose result has gaps between heads lies in the result.
__device__ __forceinline__ int column_of_result(const HeadMap& heads, int col) {
    if (heads.width.divisor == 0) return col;
    const int head = divide(col, heads.width);
    const bool is_right = col - head * heads.width.divisor >= heads.left;
    return col + (head + is_right) * heads.mid;
}

// All schedulers: next() is called by a whole warp, or, next<false>(), by one thread that has the role to itself.

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

    template <bool kWholeWarp = true>
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
template <int kBlockRows, int kBlockCols, int kRowCtas = 1>
class BatchedScheduler : DenseScheduler<kBlockRows, kBlockCols, kRowCtas, 1, 1> {
    using Dense = DenseScheduler<kBlockRows, kBlockCols, kRowCtas, 1, 1>;

public:
    __device__ __forceinline__ BatchedScheduler(const DenseSchedule& schedule, const BatchSchedule& batch,
                                                uint32_t rank = 0)
        : Dense(schedule, rank), batch_(batch) {}

    template <bool kWholeWarp = true>
    __device__ __forceinline__ bool next(WorkTile& work) {
        // A comparison of numbers that the compiler knows to be the same in all threads: otherwise descriptors leave the
        // uniform registers.
        if (this->tile_ >= batch_.num_tiles) return false;
        const int group = divide(this->tile_, batch_.tiles_per_batch);
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
//   kScaled    operands are padded or not, as a run-time value says, and tiles know their first block of scales
//
// Whatever the layout holds, all parts lie inside K.
template <int kBlockRows, int kBlockCols, int kRowCtas, int kColCtas, int kStageK, bool kPadded, bool kScaled = false>
class KGroupedScheduler : DenseScheduler<kBlockRows, kBlockCols, kRowCtas, kColCtas, 1> {
    using Dense = DenseScheduler<kBlockRows, kBlockCols, kRowCtas, kColCtas, 1>;
    static_assert(!(kPadded && kScaled));

    // Elements of K, or, padded, blocks.
    struct PlainPart {
        int start;
        int size;
    };
    struct ScaledPart : PlainPart {
        int first_scale_block;
    };
    using Part = std::conditional_t<kScaled, ScaledPart, PlainPart>;

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
        const bool padded = kPadded || (kScaled && groups.padded);
        int64_t before = 0;  // K of all groups before these 32
        int blocks_before = 0;
#pragma unroll 1
        for (int base = 0; base < end; base += 32) {
            const int group = base + lane;
            int64_t start = 0, size = group < end ? entry(groups, group) : 0;
            if (!groups.is_sizes) {
                start = group > 0 && group < end ? entry(groups, group - 1) : 0;
                start = (start + groups.alignment - 1) / groups.alignment * groups.alignment;
                size = max(size - start, int64_t{0});
            }
            const int64_t span = padded ? (size + kStageK - 1) / kStageK * kStageK : size;
            int64_t up_to = span;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int64_t other = __shfl_up_sync(0xffffffff, up_to, distance);
                if (lane >= distance) up_to += other;
            }
            if (padded || groups.is_sizes) start = before + up_to - span;
            start = min(start, static_cast<int64_t>(groups.k));
            size = min(padded ? span : size, groups.k - start);
            constexpr int kUnit = kPadded ? kStageK : 1;
            Part part;
            part.start = static_cast<int>(start / kUnit);
            part.size = static_cast<int>(size / kUnit);
            if constexpr (kScaled) {
                // Of groups that do not make sense there may be more than an int holds: then scales are any.
                const int blocks = (part.size + kStageK - 1) / kStageK;
                int blocks_up_to = blocks;
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int other = __shfl_up_sync(0xffffffff, blocks_up_to, distance);
                    if (lane >= distance) blocks_up_to += other;
                }
                part.first_scale_block = blocks_before + blocks_up_to - blocks & 0x7fffffff;
                blocks_before += __shfl_sync(0xffffffff, blocks_up_to, 31);
            }
            if (group >= groups.first_group && group < end) table.parts[group - groups.first_group] = part;
            before += __shfl_sync(0xffffffff, up_to, 31);
        }
    }

    template <bool kWholeWarp = true>
    __device__ __forceinline__ bool next(WorkTile& work) {
        const int group = divide(this->tile_, groups_.tiles_per_group);
        if (group >= groups_.num_groups) return false;
        this->locate(this->tile_ - group * groups_.tiles_per_group.divisor, work);
        const Part part = table_.parts[group];
        work.token_group = group;
        work.group_end = part.start + part.size;
        work.k_block = part.start;
        work.num_k_blocks = kPadded ? part.size : (part.size + kStageK - 1) / kStageK;
        if constexpr (kScaled) work.first_scale_block() = part.first_scale_block;
        if constexpr (kWholeWarp) work.num_k_blocks = uniform(work.num_k_blocks);
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
template <class Tile>
struct QueueOf {
    static constexpr int kSlots = 4;

    Tile tiles[kSlots];
    ptx::Barrier full[kSlots];   // 1 arrival
    ptx::Barrier empty[kSlots];  // one for each role's warp that reads

    __device__ __forceinline__ void init(int readers) {
        for (int slot = 0; slot < kSlots; ++slot) {
            ptx::mbarrier_init(full[slot], 1);
            ptx::mbarrier_init(empty[slot], readers);
        }
    }
};
using WorkQueue = QueueOf<WorkTile>;

// A role's position in a queue.
template <class Tile>
class QueueReaderOf {
public:
    __device__ __forceinline__ explicit QueueReaderOf(QueueOf<Tile>& queue) : queue_(queue) {}

    // Gives back the slot of the tile before, if that has not been done.
    template <bool kWholeWarp = true>
    __device__ __forceinline__ bool next(Tile& work) {
        if (holds_slot_) {
            if constexpr (kWholeWarp) __syncwarp();
            give_back<kWholeWarp>();
        }
        ptx::mbarrier_wait(queue_.full[count_ % kSlots], count_ / kSlots % 2);
        ++count_;
        holds_slot_ = true;
        work = queue_.tiles[(count_ - 1) % kSlots];
        if constexpr (kWholeWarp) work.num_k_blocks = uniform(work.num_k_blocks);
        return work.num_k_blocks >= 0;
    }

    // The same tile once more, and its slot back, for a whole warp that has no registers to keep it in meanwhile.
    __device__ __forceinline__ void read_again(Tile& work) {
        work = queue_.tiles[(count_ - 1) % kSlots];
        work.row = of_first_lane(work.row);
        work.col = of_first_lane(work.col);
        work.token_group = of_first_lane(work.token_group);
        work.group_end = of_first_lane(work.group_end);
        work.store_end = of_first_lane(work.store_end);
        give_back<true>();  // the lanes have met for that
        holds_slot_ = false;
    }

private:
    static constexpr uint32_t kSlots = QueueOf<Tile>::kSlots;

    template <bool kWholeWarp>
    __device__ __forceinline__ void give_back() {
        if (!kWholeWarp || threadIdx.x % 32 == 0) ptx::mbarrier_arrive(queue_.empty[(count_ - 1) % kSlots]);
    }

    QueueOf<Tile>& queue_;
    uint32_t count_ = 0;  // of tiles so far: the slot and its phase in one register
    bool holds_slot_ = false;
};
using QueueReader = QueueReaderOf<WorkTile>;

// Persistent walk over groups of rows that share N and K, whose sizes only the device knows. One warp finds this CTA's
// tiles, 32 at a time, and queues them; all other roles read the queue.
//
// Tiles are numbered group after group, empty ones having none; CTA i takes tiles i, i + CTAs, ... (kCtas of a cluster share
// a tile, and each finds the same ones). Inside a group tiles along M vary fastest, `row_tiles` of them at a time. Where the layout names the group of each row, all rows are one
// group in this respect, and a tile whose first row is padding is passed over. Otherwise 32 groups at a time are in shared
// memory, and of all others what lies before each 32 of them, so that they can be loaded again.
//
// Whatever the layout holds, all coordinates lie inside the matrices, no row is in two tiles, and the walk is at most as
// long as with a layout that makes sense.
template <int kBlockM, int kBlockN, bool kSwapAB, int kCtas = 1>
class MGroupedScheduler {
    // What lies before a group: tiles along M, and the largest end.
    struct Before {
        int tiles;
        int end;
    };

    // Rows [start, end), stored with zeros up to store_end, in tiles from first_tile on.
    struct Group {
        int first_tile;
        int tiles;
        int start;
        int end;
        int store_end;
    };

public:
    struct Storage {
        WorkQueue queue;
        Before chunks[kMaxGroups / 32];  // of 32 groups each
        Group groups[32];                // of one chunk
    };

    // A whole warp.
    __device__ __forceinline__ static void run(const MGroupSchedule& schedule, Storage& shared) {
        const int lane = threadIdx.x % 32;
        const bool by_row = schedule.table == kGroupOfRow;
        const int num_chunks = by_row ? 0 : (schedule.num_groups + 31) / 32;
        int row_tiles = (schedule.rows + kBlockM - 1) / kBlockM;
        if (!by_row) {
            Before before = {0, 0};
#pragma unroll 1
            for (int chunk = 0; chunk < num_chunks; ++chunk) {
                if (lane == 0) shared.chunks[chunk] = before;
                load_groups(schedule, shared, chunk, before);
            }
            row_tiles = before.tiles;
        }
        int loaded = num_chunks - 1;
        const int num_tiles = row_tiles * schedule.col_tiles;
        const int step = static_cast<int>(gridDim.x) / kCtas;
        PipelineState<WorkQueue::kSlots> state;
#pragma unroll 1
        for (int first = static_cast<int>(blockIdx.x) / kCtas; first < num_tiles; first += 32 * step) {
            WorkTile work;
            const int tile = first + lane * step;
            bool is_tile = tile < num_tiles;
            if (by_row) {
                bool is_ragged = false;  // the tile may hold padding
                if (is_tile) is_tile = locate_by_row(schedule, row_tiles, tile, work, is_ragged);
                uint32_t ragged = __ballot_sync(0xffffffff, is_tile && is_ragged);
                for (; ragged != 0; ragged &= ragged - 1) {
                    const int source = __ffs(ragged) - 1;
                    const int row = __shfl_sync(0xffffffff, kSwapAB ? work.col : work.row, source);
                    const int end = row + count_rows(schedule, row, __shfl_sync(0xffffffff, work.group, source));
                    if (lane == source) {
                        work.group_end = end;
                        if (!schedule.zero_padding) work.store_end = end;
                    }
                }
            } else {
                const int row_tile = is_tile ? tile / schedule.col_tiles : 0;
                int chunk = 0;
                for (int distance = 16; distance > 0; distance /= 2) {
                    const int other = chunk + distance;
                    if (other < num_chunks && shared.chunks[other].tiles <= row_tile) chunk = other;
                }
#pragma unroll 1
                for (uint32_t left = __ballot_sync(0xffffffff, is_tile); left != 0;) {
                    const int wanted = __shfl_sync(0xffffffff, chunk, __ffs(left) - 1);
                    if (wanted != loaded) {
                        Before before = shared.chunks[wanted];
                        load_groups(schedule, shared, wanted, before);
                        loaded = wanted;
                    }
                    if (is_tile && chunk == wanted) {
                        int group = 0;  // the last one that starts at or before the tile
                        for (int distance = 16; distance > 0; distance /= 2) {
                            if (shared.groups[group + distance].first_tile <= row_tile) group += distance;
                        }
                        locate(schedule, shared.groups[group], wanted * 32 + group, tile, work);
                    }
                    left &= ~__ballot_sync(0xffffffff, chunk == wanted);
                }
            }
#pragma unroll 1
            for (uint32_t left = __ballot_sync(0xffffffff, is_tile); left != 0; left &= left - 1) {
                push(shared.queue, state, lane == __ffs(left) - 1, work);
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

    // The 32 groups from 32 * chunk on, a lane for each; `before` moves behind them. A whole warp.
    __device__ __forceinline__ static void load_groups(const MGroupSchedule& schedule, Storage& shared, int chunk,
                                                       Before& before) {
        const int lane = threadIdx.x % 32;
        const int index = chunk * 32 + lane;
        const bool exists = index < schedule.num_groups;
        Group group;
        group.start = 0;
        group.end = exists ? min(max(schedule.layout[index], 0), schedule.rows) : 0;
        group.store_end = group.end;
        if (schedule.table == kEndOfGroup) {
            // The largest end so far, so that an unsorted layout makes empty groups.
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(0xffffffff, group.end, distance);
                if (lane >= distance) group.end = max(group.end, other);
            }
            group.end = max(group.end, before.end);
            const int previous = __shfl_up_sync(0xffffffff, group.end, 1);
            group.start = align(lane == 0 ? before.end : previous, schedule);
            const bool is_last = index == schedule.num_groups - 1;
            group.store_end = !schedule.zero_padding ? group.end
                              : is_last              ? schedule.rows
                                                     : align(group.end, schedule);
            before.end = __shfl_sync(0xffffffff, group.end, 31);
        }
        group.tiles = exists ? (max(group.store_end - group.start, 0) + kBlockM - 1) / kBlockM : 0;
        int up_to = group.tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffff, up_to, distance);
            if (lane >= distance) up_to += other;
        }
        group.first_tile = before.tiles + up_to - group.tiles;
        before.tiles += __shfl_sync(0xffffffff, up_to, 31);
        __syncwarp();
        shared.groups[lane] = group;
        __syncwarp();
    }

    // Sets the coordinates of tile `tile` of a group that has `row_tiles` along M, from `first_row` on.
    __device__ __forceinline__ static int set_tile(const MGroupSchedule& schedule, int first_row, int row_tiles, int tile,
                                                   WorkTile& work) {
        const int band = tile / (schedule.row_tiles * schedule.col_tiles);
        const int first_of_band = band * schedule.row_tiles;
        const int in_band = tile - first_of_band * schedule.col_tiles;
        const int band_tiles = min(schedule.row_tiles, row_tiles - first_of_band);
        const int col_tile = in_band / band_tiles;
        const int row = first_row + (first_of_band + in_band - col_tile * band_tiles) * kBlockM;
        work.row = kSwapAB ? col_tile * kBlockN : row;
        work.col = kSwapAB ? row : col_tile * kBlockN;
        work.k_block = 0;
        return row;
    }

    __device__ __forceinline__ static void locate(const MGroupSchedule& schedule, const Group& group, int index, int tile,
                                                  WorkTile& work) {
        const int in_group = tile - group.first_tile * schedule.col_tiles;
        const int row = set_tile(schedule, group.start, group.tiles, in_group, work);
        work.num_k_blocks = row < group.end ? schedule.num_k_blocks : 0;
        work.group = index;
        work.token_group = schedule.table == kRowsOfGroup ? index : 0;
        work.group_end = group.end;
        work.store_end = group.store_end;
    }

    // False where there is nothing to do.
    __device__ __forceinline__ static bool locate_by_row(const MGroupSchedule& schedule, int row_tiles, int tile,
                                                         WorkTile& work, bool& is_ragged) {
        const int row = set_tile(schedule, 0, row_tiles, tile, work);
        const int last = min(row + kBlockM, schedule.rows) - 1;
        const int group = schedule.layout[row];
        const bool is_padding = group < 0 || group >= schedule.num_groups;
        is_ragged = !is_padding && schedule.layout[last] != group;
        work.num_k_blocks = is_padding ? 0 : schedule.num_k_blocks;
        work.group = is_padding ? 0 : group;
        work.token_group = 0;
        work.group_end = is_padding ? 0 : last + 1;
        work.store_end = last + 1;
        return !is_padding || schedule.zero_padding;
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
