// GEMM for Hopper. FP8:   D[m, n] = sum_k sfa[m, k / g] sfb[n, k / g] A[m, k] B[n, k] (+ C),  FP32 scales and sums.
//                  BF16:  D[m, n] = sum_k A[m, k] B[n, k] (+ C),  FP32 sums.
//
// A tile is block_rows x block_cols of the wgmma instruction's M x N; its operand "rows" is A, or with swapped operands
// (small M) the weights B, and "cols" is the other. A stage holds 128 bytes of K of either, swizzled by TMA: FP8 K-major;
// BF16 K-major or, 64 values along MN at a time, MN-major, as the tensor core reads both. FP8: after every gran_k of K the
// tensor core's sum is scaled and added to FP32 totals in registers. BF16: the tensor core sums over all of K.
//
// Warpgroup 0 produces: warp 0 issues the TMA loads of operands and of scales per row or column, warp 1 loads scales per
// block. Each further warpgroup consumes 64 rows, or twice 64: wgmma, promotion, epilogue. A K block's promotion overlaps the
// next one's products where registers suffice for two accumulators, otherwise other warpgroups' products. Where few rows leave
// little to overlap, k_warpgroups of them may take turns at the K blocks of the same rows; the first of them, the finisher,
// adds up their sums and stores. All walk the same tiles; nobody waits for a whole CTA after the start.
//
// Programmatic dependent launch: a CTA starts while the kernel before is ending. Only what reads global memory waits for that
// end, the two loading warps and the one that finds tiles, each when nothing is left to do before its first access; the
// consumers' results follow from loads. Weights are asked of L2 before. A CTA of a cluster ends when its own barriers have had
// their last arrivals, not when all of the cluster have ended.
//
// Groups: M-grouped products (experts) share N and K and own rows of A and D, and a matrix B each; batched ones own all
// three. Tensor maps then have the group as a third dimension. Where group sizes are in device memory warp 2 finds the
// tiles and hands them to the other roles in a queue.
//
// barrier        arrivals                                             guards
// full[s]        1 (TMA warp), and the bytes                          stage s is filled
// empty[s]       warps that read it, of the CTAs this CTA loads for   stage s may be overwritten
// scales_full    1 (warp 1)                                           a chunk of block scales is there
// scales_empty   consumer warps of this CTA                           the chunk may be overwritten
// reduce_full    1 (a finisher), and the other CTAs' bytes (split K)  their parts of my slice are in my shared memory
// reduce_empty   finishers' warps of other CTAs with a slice (split K) my parts have been read there: send the next ones
// work full[s]   1 (a lane of warp 2, M-grouped)                      a tile is in slot s of the queue
// work empty[s]  consumer warps, warp 0, warp 1 if it loads scales    all roles are done with it
// named 1 + w    128                                                  finisher w's staging buffer
// named 5 + w    128 k_warpgroups                                     the sums of finisher w's helpers are there
// named 9 + w    128 k_warpgroups                                     they have been read
// named, last    all consumers (K-grouped BF16)                       the end of a stage is cleared
#pragma once

#include "../device/gemm_params.h"
#include "../device/pipeline.cuh"
#include "../device/ptx_cluster.cuh"
#include "../device/tile_scheduler.cuh"
#include "../device/warp.cuh"
#include "bf16_fp4_rows.cuh"
#include "epilogue.cuh"
#include "fp4_rows.cuh"
#include "gemm_instances.h"
#include "scale_policy.cuh"
#include "shared_storage.cuh"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

template <int kRowIndex>
struct GemmTraits {
    static constexpr GemmLayout kLayout{kGemmRows[kRowIndex]};
    // Groups of FP8 start where a K block does, BF16 ones anywhere.
    using KGroups = KGroupedScheduler<kLayout.row.block_rows, kLayout.row.block_cols, kLayout.row.row_ctas,
                                      kLayout.row.col_ctas, kLayout.row.block_k(), !kLayout.is_bf16()>;
};

template <class Traits>
class GemmKernel {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr GemmRow kRow = kLayout.row;
    static constexpr int kBlockCols = kRow.block_cols;
    static constexpr int kNumStages = kLayout.num_stages();
    static constexpr int kStageK = kRow.block_k();
    static constexpr int kKGroups = kLayout.k_groups();
    static constexpr int kRowElements = kLayout.is_fp4() ? 2 : 1;  // of the row operand, in one of its tensor map
    static constexpr int kConsumerWarps = kLayout.num_consumer_warpgroups() * 4;
    static constexpr int kRowWarpgroups = kLayout.row_warpgroups();
    static constexpr int kKWarpgroups = kRow.k_warpgroups;
    static constexpr int kClusterSize = kRow.cluster_size();
    static constexpr int kSplitK = kRow.split_k;
    static constexpr int kMulticastCtas = kRow.multicast_ctas();
    static constexpr int kAccumulators = kBlockCols / 2;  // registers of a thread, for 64 rows
    static constexpr int kRowParts = kLayout.row_parts();
    static constexpr int kBlockScales = kLayout.num_block_scales();
    static constexpr int kUnrollKBlocks = 4;  // so that addresses are computed during the promotion before

    using Storage = SharedStorage<Traits>;
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    static constexpr bool kKGrouped = kLayout.is_k_grouped();
    // Experts seldom fill their last tile: parts of 64 rows that have none of the group are neither loaded nor multiplied. Their
    // sums stay zero, and zeros are all that may be stored of them.
    static constexpr bool kSkipsParts = kRow.skips_row_parts();
    static_assert(!kSkipsParts || (kRowParts <= 2 && !kLayout.rows_mn_major()));
    static constexpr bool kRaggedK = kKGrouped && kLayout.is_bf16();  // groups start anywhere, and the next one follows
    static constexpr bool kSummed = kRow.grouping == Grouping::kSummed;
    using GroupScheduler = MGroupedScheduler<kRow.block_m(), kRow.block_n(), kRow.swap_ab>;
    using Scheduler = std::conditional_t<
        kRow.grouping == Grouping::kMGrouped, QueueReader,
        std::conditional_t<
            kRow.grouping == Grouping::kBatched, BatchedScheduler<kRow.block_rows, kBlockCols>,
            std::conditional_t<kKGrouped, typename Traits::KGroups,
                               DenseScheduler<kRow.block_rows, kBlockCols, kRow.row_ctas, kRow.col_ctas, kSplitK>>>>;
    using State = PipelineState<kNumStages>;

public:
    __device__ __forceinline__ static void run(const GemmParams& params, Storage& shared) {
        if constexpr (kLayout.is_fp4()) {
            if (params.redo.flags != nullptr) {
                ptx::grid_dependency_wait();
                if (!anything_to_redo(params.redo)) return;
            }
        }
        const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
        const uint32_t rank = kClusterSize == 1 ? 0 : uniform(ptx::cluster_rank());

        if (warp == 0 && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.rows_map);
            ptx::prefetch_tensor_map(params.cols_map);
            if constexpr (kSkipsParts) ptx::prefetch_tensor_map(params.tails[0].rows);
            if constexpr (kLayout.row_scales_are_vector()) ptx::prefetch_tensor_map(params.row_scales_map);
            if constexpr (kLayout.col_scales_are_vector()) ptx::prefetch_tensor_map(params.col_scales_map);
            ptx::prefetch_tensor_map(params.d_map);
            for (int s = 0; s < kNumStages; ++s) {
                ptx::mbarrier_init(shared.full[s], 1);
                ptx::mbarrier_init(shared.empty[s], kRowWarpgroups * 4 * kMulticastCtas);
            }
            for (int chunk = 0; chunk < kScaleChunks; ++chunk) {
                ptx::mbarrier_init(shared.scales_full[chunk], 1);
                ptx::mbarrier_init(shared.scales_empty[chunk], kConsumerWarps);
            }
            if constexpr (kSplitK > 1) {
                ptx::mbarrier_init(shared.reduce_full, 1);
                ptx::mbarrier_init(shared.reduce_empty, max(other_slices(rank), 1) * kRowWarpgroups * 4);
            }
            // Read by the consumers, the TMA thread and, where there is one, the warp that loads block scales.
            if constexpr (kLayout.has_work_queue()) {
                shared.groups.queue.init(kConsumerWarps + 1 + kLayout.has_block_scales());
            }
            ptx::fence_mbarrier_init();
        }
        if constexpr (kKGrouped) {
            ptx::grid_dependency_wait();
            if (warp == 1) Scheduler::build(params.k_groups, shared.k_groups);
        }
        if constexpr (kClusterSize > 1) {
            ptx::cluster_arrive_relaxed();  // mbarriers have a fence of their own
            ptx::cluster_wait();
        }
        if constexpr (kClusterSize == 1 || kKGrouped) __syncthreads();
        ptx::grid_dependency_launch();
        Scheduler scheduler = make_scheduler(params, shared, rank);

        if (warp < 4) {
            if constexpr (kSetRegisters) shrink_registers<kLayout.producer_registers()>();
            if (warp == 0) load_operands(params, shared, scheduler, rank);
            if constexpr (kLayout.has_block_scales()) {
                if (warp == 1) load_block_scales(params, shared, scheduler);
            }
            if constexpr (kLayout.has_work_queue()) {
                if (warp == 2) {
                    ptx::grid_dependency_wait();
                    GroupScheduler::run(params.groups, shared.groups);
                }
            }
        } else {
            if constexpr (kSetRegisters) grow_registers<kLayout.consumer_registers()>();
            consume(params, shared, scheduler, rank);
        }
    }

private:
    // With one consumer warpgroup the register file has enough for everybody at the start.
    static constexpr bool kSetRegisters = kLayout.num_consumer_warpgroups() > 1;

    // Each role has a copy.
    __device__ __forceinline__ static Scheduler make_scheduler(const GemmParams& params, Storage& shared, uint32_t rank) {
        if constexpr (kRow.grouping == Grouping::kMGrouped) {
            return QueueReader(shared.groups.queue);
        } else if constexpr (kRow.grouping == Grouping::kBatched) {
            return Scheduler(params.schedule, params.batch);
        } else if constexpr (kKGrouped) {
            return Scheduler(params.schedule, params.k_groups, shared.k_groups, rank);
        } else {
            return Scheduler(params.schedule, rank);
        }
    }

    // Whether any of the flags is set; the whole CTA.
    __device__ __forceinline__ static bool anything_to_redo(const BlocksToRedo& redo) {
        uint32_t found = 0;
        const auto* flags = reinterpret_cast<const uint4*>(redo.flags);
#pragma unroll 1
        for (int i = threadIdx.x; i < redo.bytes / 16; i += kLayout.num_threads()) {
            found |= flags[i].x | flags[i].y | flags[i].z | flags[i].w;
        }
        return __syncthreads_or(found != 0);
    }

    // The next tile that is wanted; all roles pass over the same ones.
    __device__ __forceinline__ static bool next_tile(const GemmParams& params, Scheduler& scheduler, WorkTile& work) {
        if constexpr (!kLayout.is_fp4()) {
            return scheduler.next(work);
        } else {
            while (scheduler.next(work)) {
                if (params.redo.flags == nullptr) return true;
                const int group = kLayout.has_groups() ? work.group : 0;
                const uint8_t* flags = params.redo.flags + (static_cast<int64_t>(group) * params.redo.row_blocks +
                                                            work.row / 128) * params.redo.k_blocks;
                int found = 0;
#pragma unroll 1
                for (int i = 0; i < params.redo.k_blocks; ++i) found |= flags[i];
                if (uniform(found) != 0) return true;
            }
            return false;
        }
    }

    // Of a panel that a cluster shares each CTA loads its part, into all.
    static constexpr int kRowPart = kRow.block_rows / kRow.col_ctas;
    static constexpr int kColPart = kBlockCols / kRow.row_ctas;
    static constexpr int kAllParts = kRow.block_rows / 64;
    static constexpr int kPartBytes = 64 * kBlockK;  // of 64 rows in a stage

    // ---- producer, warp 0 ----

    // The first block of weights that no other CTA loads for this one is asked of L2 while the previous kernel ends.
    static constexpr bool kAsksEarly = kRow.grouping == Grouping::kDense && !kRow.b_mn_major &&
                                       (kRow.swap_ab ? kRow.col_ctas : kRow.row_ctas) == 1;

    // What a tile that reaches past the end of M or N has less than others. What its stages hold there instead makes rows or
    // columns that are not stored.
    struct Tail {
        int missing;
        bool has_boxes;  // of its own; where it is the only tile all boxes are as small
    };
    template <bool kSkips, int kBlock>
    __device__ __forceinline__ static Tail tail_of(int size, int first) {
        if constexpr (!kSkips) return {0, false};
        const int rest = size % kBlock;
        const bool is_tail = rest > 0 && first + kBlock > size;
        return {is_tail ? kBlock - rest : 0, is_tail && size > kBlock};
    }

    // Tensor maps of the row and of the column operand. One number says which: with two, ptxas gives up uniform registers, and a
    // K block takes 60 instructions instead of 38.
    __device__ __forceinline__ static const CUtensorMap* operand_maps(const GemmParams& params, bool is_m_tail, bool is_n_tail) {
        constexpr int kSize = sizeof(CUtensorMap);
        static_assert(offsetof(GemmParams, cols_map) == offsetof(GemmParams, rows_map) + kSize);
        constexpr int kFirst = (offsetof(GemmParams, tails) - offsetof(GemmParams, rows_map)) / kSize;
        const int tail = is_m_tail + 2 * is_n_tail;
        return &params.rows_map + (tail == 0 ? 0 : kFirst + 2 * (tail - 1));
    }

    // Few tokens and several tiles for each CTA.
    static constexpr bool kLimitsLoads = kRow.limits_loads();

    __device__ __forceinline__ static void load_operands(const GemmParams& params, Storage& shared,
                                                         Scheduler scheduler, uint32_t rank) {
        constexpr uint32_t kStageBytes = kLayout.row_tile_bytes() + kLayout.col_tile_bytes() +
                                         kLayout.row_scale_bytes() + kLayout.col_scale_bytes();
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int part = rank % kMulticastCtas;
        const uint16_t sharers = ((1 << kMulticastCtas) - 1) << (rank - part);
        State state;
        LoadLimit<kNumStages> limit(params.most_in_flight);
        WorkTile work;
        for (bool is_first = true; next_tile(params, scheduler, work); is_first = false) {
            const int parts = kSkipsParts ? min((work.group_end - work.row + 63) / 64, kAllParts) : kAllParts;
            const Tail tokens = tail_of<kRow.skips_tail(), kRow.block_m()>(params.m, kRow.swap_ab ? work.col : work.row);
            const Tail weights = tail_of<kRow.skips_weights_tail(), kRow.block_n()>(params.n, kRow.swap_ab ? work.row : work.col);
            const CUtensorMap* maps = operand_maps(params, tokens.has_boxes, weights.has_boxes);
            const CUtensorMap &rows_map = maps[0], &cols_map = maps[1];
            const uint32_t bytes = kStageBytes - (kAllParts - parts) * kPartBytes - (tokens.missing + weights.missing) * kBlockK;
            if (is_first) {
                if (kAsksEarly && ptx::elect_one()) {
                    ptx::tma_prefetch_2d(kRow.swap_ab ? params.rows_map : params.cols_map,
                                         work.k_block * kStageK / kRowElements, kRow.swap_ab ? work.row : work.col);
                }
                ptx::grid_dependency_wait();
            }
            // Unrolled, as the compiler would, the producers' loops only take room in the instruction cache.
#pragma unroll 1
            for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
                const int k = kRaggedK ? work.k_block + i * kStageK : (work.k_block + i) * kStageK;
                const int k_group = (work.k_block + i) * kKGroups;
                uint8_t* rows = shared.rows[state.stage_idx];
                uint8_t* cols = shared.cols[state.stage_idx];
                ptx::Barrier& full = shared.full[state.stage_idx];
                if (kLimitsLoads && params.most_in_flight > 0) limit.wait(shared.full);
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                if (!ptx::elect_one()) continue;
                ptx::mbarrier_arrive_expect_tx(full, bytes);
                if constexpr (kSummed) {
                    const int product = divide(work.k_block + i, params.k_blocks_of_product);
                    const int k_of_product = k - product * params.k_blocks_of_product.divisor * kStageK;
                    ptx::tma_load_3d(params.rows_map, full, rows, k_of_product, work.row, product, kHint);
                    ptx::tma_load_3d(params.cols_map, full, cols, k_of_product, work.col, product, kHint);
                    continue;
                }
                if constexpr (kLayout.has_groups()) {
                    load_stage_of_group(params, rows_map, cols_map, shared, state.stage_idx, work, parts, k, k_group);
                    continue;
                }
                load_panel<kLayout.rows_mn_major(), kRowPart, (kRow.col_ctas > 1)>(rows_map, full, rows, k / kRowElements,
                                                                                   work.row, part, sharers);
                load_panel<kLayout.cols_mn_major(), kColPart, (kRow.row_ctas > 1)>(cols_map, full, cols, k, work.col, part,
                                                                                   sharers);
                if constexpr (kLayout.has_bf16_tokens()) {
                    ptx::tma_load_2d(cols_map, full, cols + kLayout.col_tile_bytes() / 2, k + kStageK / 2, work.col, kHint);
                }
                if constexpr (kLayout.row_scales_are_vector()) {
                    ptx::tma_load_2d(params.row_scales_map, full, shared.row_scales[state.stage_idx], work.row,
                                     row_scale_group(k_group), kHint);
                }
                if constexpr (kLayout.col_scales_are_vector()) {
                    ptx::tma_load_2d(params.col_scales_map, full, shared.col_scales[state.stage_idx], work.col, k_group,
                                     kHint);
                }
            }
        }
        // This CTA's shared memory must outlive what others' consumers tell its barriers.
        if constexpr (kMulticastCtas > 1) {
#pragma unroll 1
            for (int s = 0; s < kNumStages; ++s, state.advance()) {
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
            }
        }
    }

    // Where a stage's row scales begin in their tensor map: of UE8M0 words there is one for each K block.
    __device__ __forceinline__ static int row_scale_group(int k_group) {
        return kLayout.row_scales_are_words() ? k_group / kKGroups : k_group;
    }

    // A stage of an operand, or this CTA's `kPart` rows of it, which go to all `sharers`. `kHasGroups`: of matrix `group`.
    template <bool kMnMajor, int kPart, bool kShared, bool kHasGroups = false>
    __device__ __forceinline__ static void load_panel(const CUtensorMap& map, ptx::Barrier& full, uint8_t* tile, int k,
                                                      int mn, int part, uint16_t sharers, int group = 0) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        if constexpr (kShared) {
            tile += part * kPart * kBlockK;
            mn += part * kPart;
        }
        const auto load = [&](uint8_t* destination, int x, int y) {
            if constexpr (kHasGroups) {
                ptx::tma_load_3d(map, full, destination, x, y, group, kHint);
            } else if constexpr (kShared) {
                ptx::tma_load_2d_multicast(map, full, destination, x, y, sharers, kHint);
            } else {
                ptx::tma_load_2d(map, full, destination, x, y, kHint);
            }
        };
        if constexpr (kMnMajor) {
#pragma unroll
            for (int i = 0; i < kPart; i += kMnMajorSpan) load(tile + i * kBlockK, mn + i, k);
        } else {
            load(tile, k, mn);
        }
    }

    // With the group as a third coordinate. `parts` of the rows, each 64 of them.
    __device__ __forceinline__ static void load_stage_of_group(const GemmParams& params, const CUtensorMap& rows_map,
                                                               const CUtensorMap& cols_map, Storage& shared, int stage_idx,
                                                               const WorkTile& work, int parts, int k, int k_group) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int row_group = kRow.swap_ab ? work.group : work.token_group;
        const int col_group = kRow.swap_ab ? work.token_group : work.group;
        ptx::Barrier& full = shared.full[stage_idx];
        if (parts == kAllParts) {
            load_panel<kLayout.rows_mn_major(), kRow.block_rows, false, true>(rows_map, full, shared.rows[stage_idx],
                                                                              k / kRowElements, work.row, 0, 0, row_group);
        } else {
#pragma unroll 1
            for (int part = 0; part < parts; ++part) {
                ptx::tma_load_3d(params.tails[0].rows, full, shared.rows[stage_idx] + part * kPartBytes, k,
                                 work.row + part * 64, row_group, kHint);
            }
        }
        load_panel<kLayout.cols_mn_major(), kBlockCols, false, true>(cols_map, full, shared.cols[stage_idx], k, work.col, 0,
                                                                     0, col_group);
        if constexpr (kLayout.has_bf16_tokens()) {
            ptx::tma_load_3d(cols_map, full, shared.cols[stage_idx] + kLayout.col_tile_bytes() / 2, k + kStageK / 2,
                             work.col, col_group, kHint);
        }
        if constexpr (kLayout.row_scales_are_vector()) {
            const int first_row = kLayout.row_scale_slack() > 0 ? work.row & ~3 : work.row;
#pragma unroll
            for (int box = 0; box < kLayout.row_scale_boxes(); ++box) {
                ptx::tma_load_3d(params.row_scales_map, full,
                                 shared.row_scales[stage_idx] + box * kLayout.row_scale_box_pitch(),
                                 first_row + box * 128, row_scale_group(k_group), row_group, kHint);
            }
        }
        if constexpr (kLayout.col_scales_are_vector()) {
            const int first_col = kLayout.col_scale_slack() > 0 ? work.col & ~3 : work.col;
            ptx::tma_load_3d(params.col_scales_map, full, shared.col_scales[stage_idx], first_col, k_group, col_group,
                             kHint);
        }
    }

    // ---- producer, warp 1 ----

    __device__ __forceinline__ static void load_block_scales(const GemmParams& params, Storage& shared,
                                                             Scheduler scheduler) {
        PipelineState<kScaleChunks> state;
        WorkTile work;
        for (bool is_first = true; scheduler.next(work); is_first = false) {
            const int block = (kRow.swap_ab ? work.row : work.col) / 128;
            const ScaleSource& source = params.block_scales;
            int64_t of_group = 0;
            if constexpr (kLayout.has_groups()) of_group = work.group * params.block_scales_group_stride;
            const int last = work.k_block + work.num_k_blocks - 1;
            if (is_first) ptx::grid_dependency_wait();
#pragma unroll 1
            for (int k_block = work.k_block; k_block <= last; k_block += kScaleChunk, state.advance()) {
                const int chunk = state.stage_idx;
                ptx::mbarrier_wait(shared.scales_empty[chunk], state.phase ^ 1);
                load_scale_chunk(source, of_group, block, k_block, last, shared.block_scales[chunk]);
                __syncwarp();
                if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.scales_full[chunk]);
            }
        }
    }

    // ---- consumers ----

    __device__ __forceinline__ static void consume(const GemmParams& params, Storage& shared, Scheduler scheduler,
                                                   uint32_t rank) {
        const int consumer = uniform(static_cast<int>(threadIdx.x) / 128 - 1);
        const int warpgroup = consumer % kRowWarpgroups;
        const int helper = consumer / kRowWarpgroups;  // 0: the finisher
        const int thread = threadIdx.x % 128;
        State state;
        uint32_t reduce_phase = 0;
        WorkTile work;
        PipelineState<kScaleChunks> scale_state;
        for (bool is_first = true; next_tile(params, scheduler, work); is_first = false) {
            if (kKWarpgroups > 1 && helper == 0 && !is_first) {
                ptx::named_barrier_arrive(9 + warpgroup, 128 * kKWarpgroups);
            }
            float total[kRowParts][kAccumulators] = {};
            if constexpr (kLayout.is_bf16()) {
                accumulate_unscaled(shared, state, work, warpgroup, thread % 32, total);
            } else if constexpr (kLayout.is_fp4()) {
                accumulate_fp4(shared, state, work, warpgroup, helper, thread, total[0]);
            } else if constexpr (kRow.overlaps_promotion()) {
                accumulate_overlapped(shared, state, scale_state, work, warpgroup, thread, total[0]);
            } else {
                const int parts = kSkipsParts ? parts_of_group(work, warpgroup) : kRowParts;
                if (parts == kRowParts) {
                    accumulate<kRowParts>(shared, state, scale_state, work, warpgroup, helper, thread, total);
                } else if constexpr (kSkipsParts) {
                    if (parts == 0) {
                        accumulate<0>(shared, state, scale_state, work, warpgroup, helper, thread, total);
                    } else {
                        accumulate<1>(shared, state, scale_state, work, warpgroup, helper, thread, total);
                    }
                }
            }
            if constexpr (kKWarpgroups > 1) {
                combine(shared, is_first, warpgroup, helper, thread, params.zero, total[0]);
                if (helper > 0) continue;
            }
            if constexpr (kLayout.has_work_queue()) scheduler.read_again(work);
            if (is_first) ptx::grid_dependency_wait();  // there may have been no block to load

            int rows[kRowParts];
#pragma unroll
            for (int part = 0; part < kRowParts; ++part) rows[part] = work.row + part_row<Traits>(part, warpgroup);
            if constexpr (kSplitK == 1) {
                Epilogue<Traits>::store(params, work, shared.staging[warpgroup], 1 + warpgroup, rows, work.col, thread,
                                        total);
            } else {
                float slice[1][kLayout.store_cols() / 2];
                reduce(shared, rank, reduce_phase, threadIdx.x - 128, params.zero, total[0], slice[0]);
                reduce_phase ^= 1;
                const int split_part = rank / kMulticastCtas;
                if (split_part < kLayout.num_slices()) {
                    Epilogue<Traits>::store(params, work, shared.staging[warpgroup], 1 + warpgroup, rows,
                                            work.col + split_part * kLayout.store_cols(), thread, slice);
                }
            }
        }
        // The barriers must outlive the other finishers' last arrivals. One thread waits: ptxas would no longer know of a warp that
        // all its threads are at the same stage.
        if constexpr (kSplitK > 1) {
            if (threadIdx.x == 128 && other_slices(rank) > 0) ptx::mbarrier_wait(shared.reduce_empty, reduce_phase ^ 1);
        }
        // The staging memory must outlive the stores that read it; their completion is the end of the grid's business.
        if (thread == 0) ptx::tma_store_wait_read<0>();
    }

    // How many of a warpgroup's parts have rows of the tile's group, where not all may.
    __device__ __forceinline__ static int parts_of_group(const WorkTile& work, int warpgroup) {
        const int rows = uniform(work.group_end - work.row) - part_row<Traits>(0, warpgroup);
        return rows > part_row<Traits>(kRowParts - 1, 0) ? kRowParts : rows > 0;
    }

    // Adds the helpers' totals to the finisher's, in their order.
    __device__ __forceinline__ static void combine(Storage& shared, bool is_first, int warpgroup, int helper,
                                                   int thread, int zero, float (&total)[kAccumulators]) {
        constexpr int kGroups = kBlockCols / 8;
        constexpr int kThreads = kRowWarpgroups * 128;
        const int full_id = 5 + warpgroup;
        if (helper > 0) {
            if (!is_first) ptx::named_barrier_sync(9 + warpgroup, 128 * kKWarpgroups);
            float4* slots = shared.helper_sums + (helper - 1) * kGroups * kThreads + warpgroup * 128 + thread;
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                slots[j * kThreads] = vector(&total[4 * j], zero);
            }
            ptx::named_barrier_arrive(full_id, 128 * kKWarpgroups);
            return;
        }
        ptx::named_barrier_sync(full_id, 128 * kKWarpgroups);
#pragma unroll
        for (int source = 0; source < kKWarpgroups - 1; ++source) {
            const float4* slots = shared.helper_sums + source * kGroups * kThreads + warpgroup * 128 + thread;
#pragma unroll
            for (int j = 0; j < kGroups; ++j) add(slots[j * kThreads], &total[4 * j]);
        }
    }

    __device__ __forceinline__ static float4 vector(const float* totals, int zero) {
        return make_float4(in_another_register(totals[0], zero), in_another_register(totals[1], zero),
                           in_another_register(totals[2], zero), in_another_register(totals[3], zero));
    }

    __device__ __forceinline__ static void add(const float4& addend, float* sum) {
        sum[0] += addend.x;
        sum[1] += addend.y;
        sum[2] += addend.z;
        sum[3] += addend.w;
    }

    // What a thread of a consumer warpgroup needs of stage 0, as addresses in shared memory; other stages are at multiples of
    // a pitch behind it.
    struct FirstStage {
        uint32_t full;        // the barrier
        uint32_t row_scales;  // of the thread's first row, where each row has one
        uint32_t col_scales;  // of the thread's first column, likewise
        uint32_t rows, cols;  // low words of descriptors, of the warpgroup's first row

        __device__ __forceinline__ FirstStage(Storage& shared, int warpgroup, int thread, int scale_start) {
            const int row = part_row<Traits>(0, warpgroup);
            const int scale_row = row + thread % 128 / 32 * 16 + thread % 32 / 4;
            const int row_start = kLayout.row_scale_slack() > 0 ? scale_start : 0;
            const int col_start = kLayout.col_scale_slack() > 0 ? scale_start : 0;
            full = ptx::computed_once(ptx::smem_address(&shared.full[0]));
            row_scales = ptx::computed_once(ptx::smem_address(shared.row_scales[0]) + 4 * (scale_row + row_start));
            col_scales = ptx::computed_once(ptx::smem_address(shared.col_scales[0]) + 4 * (thread % 4 * 2 + col_start));
            rows = ptx::computed_once(Descriptor(shared.rows[0] + row * kBlockK).low);
            cols = ptx::computed_once(Descriptor(shared.cols[0]).low);
        }
    };
    // From a stage's barrier that says it is full to the one that says it is empty.
    static constexpr uint32_t kFullToEmpty = kNumStages * sizeof(ptx::Barrier);

    // Scales in shared memory at an address.
    __device__ __forceinline__ static const float* scales_at(uint32_t address) {
        return static_cast<const float*>(__cvta_shared_to_generic(address));
    }

    // accumulator = rows * cols^T over `kSteps` instructions from `first_step` of a stage on.
    template <int kSteps>
    __device__ __forceinline__ static void multiply(Descriptor rows, Descriptor cols, int part, int first_step,
                                                    float (&accumulator)[kAccumulators]) {
        const uint32_t first_row = part_row<Traits>(part, 0) * (kBlockK / 16);
        pin_registers(accumulator);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const uint32_t advance = (first_step + step) * (32 / 16);
            wgmma<kBlockCols>(rows.at(first_row + advance), cols.at(advance), accumulator, step > 0);
        }
        wgmma_commit();
    }

    // The first of a tile's K blocks that are this warpgroup's: those in its own stages, whatever the tile. Were they dealt
    // out anew with each tile, a warpgroup could come to a stage that another one had in the round before, and where that
    // one is not even filled yet take the phase before for the one to wait for.
    __device__ __forceinline__ static int first_k_block(const State& state, int helper) {
        if constexpr (kKWarpgroups == 1) return 0;
        static_assert(kNumStages % kKWarpgroups == 0 && kScaleChunk % kKWarpgroups == 0);
        return (helper + kNumStages - static_cast<int>(state.stage_idx)) % kKWarpgroups;
    }

    // Sums all K blocks of a tile into `total`: `kParts` of it.
    template <int kParts>
    __device__ __forceinline__ static void accumulate(Storage& shared, State& state,
                                                      PipelineState<kScaleChunks>& scale_state, const WorkTile& work,
                                                      int warpgroup, int helper, int thread,
                                                      float (&total)[kRowParts][kAccumulators]) {
        const int col_offset = work.col % 128;
        // Where the tile's scales begin in their boxes.
        const int scale_start = kLayout.token_scale_slack() == 0 ? 0 : (kRow.swap_ab ? work.col : work.row) % 4;
        const FirstStage first_stage(shared, warpgroup, thread, scale_start);
        const State first_state = state;
        const int first = first_k_block(state, helper);
        if constexpr (kKWarpgroups > 1) state.advance_by(first);
        const auto add_next = [&](const float* block_scales) {
            if constexpr (kParts == 0) {
                pass_over(first_stage, state, thread % 32);
            } else {
                add_k_block<kParts>(first_stage, state, block_scales, thread % 32, col_offset, total);
            }
        };
        if constexpr (kBlockScales == 0) {
            for (int i = first; i < work.num_k_blocks; i += kKWarpgroups) {
                add_next(nullptr);
            }
        } else {
            for (int left = work.num_k_blocks; left > 0; left -= kScaleChunk) {
                const int chunk = scale_state.stage_idx;
                ptx::mbarrier_wait(shared.scales_full[chunk], scale_state.phase);
                uint32_t blocks = ptx::smem_address(shared.block_scales[chunk][0] + first);
                const int count = min(left, kScaleChunk);
#pragma unroll(kUnrollKBlocks)
                for (int i = first; i < count; i += kKWarpgroups, blocks += kKWarpgroups * sizeof(float)) {
                    add_next(scales_at(blocks));
                }
                __syncwarp();
                if (thread % 32 == 0) ptx::mbarrier_arrive(shared.scales_empty[chunk]);
                scale_state.advance();
            }
        }
        if constexpr (kKWarpgroups > 1) {
            state = first_state;
            state.advance_by(work.num_k_blocks);
        }
    }

    struct BlockScales {
        float upper_row, lower_row;
        float blocks[kBlockScales + (kBlockScales == 0)];
    };

    // Waits for a stage, reads its scales, since a load would wait behind the products, and issues these.
    __device__ __forceinline__ static void issue_k_block(const FirstStage& first_stage, State& state, const float* blocks,
                                                         BlockScales& scales, float (&accumulator)[kAccumulators]) {
        const uint32_t s = state.stage_idx;
        ptx::mbarrier_wait(ptx::element_address<sizeof(ptx::Barrier)>(first_stage.full, s), state.phase);
#pragma unroll
        for (int j = 0; j < kBlockScales; ++j) scales.blocks[j] = blocks[j * kScaleChunk];
        const float* rows = scales_at(ptx::element_address<kLayout.row_scale_pitch()>(first_stage.row_scales, s));
        scales.upper_row = rows[0];
        scales.lower_row = rows[8];
        multiply<kStageK / 32>(Descriptor(first_stage.rows).template of_stage<kLayout.row_tile_bytes()>(s),
                               Descriptor(first_stage.cols).template of_stage<kLayout.col_tile_bytes()>(s), 0, 0, accumulator);
        state.advance();
    }

    // Promotes the oldest block on its way; `kPending` have been issued behind it.
    template <int kPending>
    __device__ __forceinline__ static void promote_k_block(const FirstStage& first_stage, State& state, int lane, int col_offset,
                                                           const BlockScales& scales, float (&accumulator)[kAccumulators],
                                                           float (&total)[kAccumulators]) {
        wgmma_wait<kPending>();
        pin_registers(accumulator);
        release<kFullToEmpty>(ptx::element_address<sizeof(ptx::Barrier)>(first_stage.full, state.stage_idx), lane);
        state.advance();
        Promotion<Traits>::by_block(scales.upper_row, scales.lower_row, scales.blocks, col_offset, accumulator, total);
    }

    // As accumulate(), with two accumulators: while one is promoted, the tensor core works on the next K block. Where registers
    // suffice this is 2 to 13 % faster.
    __device__ __forceinline__ static void accumulate_overlapped(Storage& shared, State& state,
                                                                 PipelineState<kScaleChunks>& scale_state, const WorkTile& work,
                                                                 int warpgroup, int thread, float (&total)[kAccumulators]) {
        const int col_offset = work.col % 128;
        const int lane = thread % 32;
        const FirstStage first_stage(shared, warpgroup, thread, 0);
        State promoted = state;
        float even[kAccumulators], odd[kAccumulators];
        BlockScales even_scales, odd_scales;
        for (int left = work.num_k_blocks; left > 0; left -= kScaleChunk) {
            const int chunk = scale_state.stage_idx;
            ptx::mbarrier_wait(shared.scales_full[chunk], scale_state.phase);
            const int count = min(left, kScaleChunk);
            uint32_t blocks = ptx::smem_address(shared.block_scales[chunk][0]);
            const auto issue = [&](BlockScales& scales, float(&accumulator)[kAccumulators]) {
                issue_k_block(first_stage, state, scales_at(blocks), scales, accumulator);
                blocks += sizeof(float);
            };
            issue(even_scales, even);
            int i = 0;
#pragma unroll(kUnrollKBlocks / 2)
            for (; i + 2 < count; i += 2) {
                issue(odd_scales, odd);
                promote_k_block<1>(first_stage, promoted, lane, col_offset, even_scales, even, total);
                issue(even_scales, even);
                promote_k_block<1>(first_stage, promoted, lane, col_offset, odd_scales, odd, total);
            }
            // Nothing is left on its way to the next chunk: ptxas would let no products overlap at all.
            if (i + 1 < count) {
                issue(odd_scales, odd);
                promote_k_block<1>(first_stage, promoted, lane, col_offset, even_scales, even, total);
                promote_k_block<0>(first_stage, promoted, lane, col_offset, odd_scales, odd, total);
            } else {
                promote_k_block<0>(first_stage, promoted, lane, col_offset, even_scales, even, total);
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(shared.scales_empty[chunk]);
            scale_state.advance();
        }
    }

    // Gives back a stage that has nothing for this warpgroup.
    __device__ __forceinline__ static void pass_over(const FirstStage& first_stage, State& state, int lane) {
        const uint32_t full = ptx::element_address<sizeof(ptx::Barrier)>(first_stage.full, state.stage_idx);
        ptx::mbarrier_wait(full, state.phase);
        release<kFullToEmpty>(full, lane);
        state.advance();
    }

    // The same where the rows are FP4.
    __device__ __forceinline__ static void accumulate_fp4(Storage& shared, State& state, const WorkTile& work,
                                                          int warpgroup, int helper, int thread,
                                                          float (&total)[kAccumulators]) {
        const int scale_start = kLayout.token_scale_slack() == 0 ? 0 : work.col % 4;
        if constexpr (kLayout.has_bf16_tokens() && !kLayout.col_scales_are_vector()) {
            accumulate_bf16_fp4(shared, state, work, warpgroup, helper, thread, total);
        } else {
            using Block = std::conditional_t<kLayout.has_bf16_tokens(), Bf16Fp4Block<Traits>, Fp4Block<Traits>>;
            const Block block(shared.rows[0], shared.row_scales[0], shared.cols[0], shared.col_scales[0] + scale_start * 4,
                              part_row<Traits>(0, warpgroup), thread);
            State next = state;
            const int first = first_k_block(state, helper);
            next.advance_by(first);
            for (int i = first; i < work.num_k_blocks; i += kKWarpgroups) {
                const int s = next.stage_idx;
                ptx::mbarrier_wait(shared.full[s], next.phase);
                block.add(s, total, [&] { release(shared.empty[s], thread % 32); });
                next.template advance_few<kKWarpgroups>();
            }
        }
        state.advance_by(work.num_k_blocks);
    }

    // Where nothing is left to scale the tensor core sums over all K blocks. It has one half of a block while the other is
    // expanded, so a stage is given back half a block later.
    __device__ __forceinline__ static void accumulate_bf16_fp4(Storage& shared, const State& state, const WorkTile& work,
                                                               int warpgroup, int helper, int thread,
                                                               float (&total)[kAccumulators]) {
        const Bf16Fp4Block<Traits> block(shared.rows[0], shared.row_scales[0], shared.cols[0], shared.col_scales[0],
                                         part_row<Traits>(0, warpgroup), thread);
        State next = state;
        const int first = first_k_block(state, helper);
        next.advance_by(first);
        int before = -1;
        pin_registers(total);
        for (int i = first; i < work.num_k_blocks; i += kKWarpgroups) {
            const int s = next.stage_idx;
            ptx::mbarrier_wait(shared.full[s], next.phase);
            typename Bf16Fp4Block<Traits>::Rows rows;
            block.load(s, rows);
            uint32_t fragments[2][Bf16Fp4Block<Traits>::kHalf][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                block.expand_half(half, rows, fragments[half]);
                block.multiply(s, half, fragments[half], total, true);
                wgmma_wait<1>();
                if (half == 0 && before >= 0) release(shared.empty[before], thread % 32);
            }
            before = s;
            next.template advance_few<kKWarpgroups>();
        }
        pin_registers(total);
        wgmma_wait<0>();
        pin_registers(total);
        if (before >= 0) release(shared.empty[before], thread % 32);
    }

    // Adds one K block. `blocks`: its first block scale, the others are kScaleChunk apart.
    template <int kParts>
    __device__ __forceinline__ static void add_k_block(const FirstStage& first_stage, State& state, const float* blocks,
                                                       int lane, int col_offset,
                                                       float (&total)[kRowParts][kAccumulators]) {
        constexpr int kSteps = kRow.gran_k / 32;  // instructions per scale
        constexpr bool kColVector = kLayout.col_scales_are_vector();
        const uint32_t s = state.stage_idx;
        const uint32_t full = ptx::element_address<sizeof(ptx::Barrier)>(first_stage.full, s);
        ptx::mbarrier_wait(full, state.phase);

        // Scales are read before the tensor core's instructions are issued, those of a further part during the promotion
        // before: a load behind the instructions waits until they are done, which cost 13 % of a large product.
        float block_scales[kBlockScales + (kBlockScales == 0)];
#pragma unroll
        for (int j = 0; j < kBlockScales; ++j) block_scales[j] = blocks[j * kScaleChunk];
        float row_scales[kRowParts][kKGroups][2];  // of the thread's two rows
        const auto read_rows = [&](int part) {
#pragma unroll
            for (int group = 0; group < kKGroups; ++group) {
                if constexpr (kLayout.row_scales_are_vector()) {
                    const int box = kLayout.row_scale_boxes() > 1 ? part : 0;  // of 128 rows, as a part
                    const float* scales =
                        scales_at(ptx::element_address<kLayout.row_scale_pitch()>(first_stage.row_scales, s)) +
                        box * (kLayout.row_scale_box_pitch() / 4 - 128) + group * kLayout.row_scale_box_rows() +
                        part_row<Traits>(part, 0);
                    row_scales[part][group][0] = scales[0];
                    row_scales[part][group][1] = scales[8];
                } else {
                    row_scales[part][group][0] = row_scales[part][group][1] = block_scales[0];
                }
            }
        };
        read_rows(0);

        const Descriptor rows = Descriptor(first_stage.rows).template of_stage<kLayout.row_tile_bytes()>(s);
        const Descriptor cols = Descriptor(first_stage.cols).template of_stage<kLayout.col_tile_bytes()>(s);
        float accumulator[kAccumulators];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int group = 0; group < kKGroups; ++group) {
                multiply<kSteps>(rows, cols, part, group * kSteps, accumulator);
                pin_registers(accumulator);
                wgmma_wait<0>();
                const bool part_done = group == kKGroups - 1;
                const bool all_done = part_done && part == kParts - 1;
                if (part_done && !all_done) read_rows(part + 1);
                const float upper = row_scales[part][group][0], lower = row_scales[part][group][1];
                if constexpr (kColVector) {
                    const float* scales =
                        scales_at(ptx::element_address<kLayout.col_scale_pitch()>(first_stage.col_scales, s)) +
                        group * kLayout.col_scale_box_cols();
                    const auto col_scales = [&](int j) {
                        if constexpr (kLayout.col_scale_slack() > 0) {  // they start anywhere
                            return make_float2(scales[j * 8], scales[j * 8 + 1]);
                        } else {
                            return reinterpret_cast<const float2*>(scales)[j * 4];
                        }
                    };
                    Promotion<Traits>::by_column(upper, lower, col_scales, accumulator, total[part]);
                    if (all_done) release<kFullToEmpty>(full, lane);
                } else {
                    if (all_done) release<kFullToEmpty>(full, lane);
                    Promotion<Traits>::by_block(upper, lower, block_scales, col_offset, accumulator, total[part]);
                }
            }
        }
        state.template advance_few<kKWarpgroups>();
    }

    // BF16: the tensor core sums all K blocks of a tile. While a block's instructions run the next ones are issued, so a
    // stage is given back one block later.
    __device__ __forceinline__ static void accumulate_unscaled(Storage& shared, State& state, const WorkTile& work,
                                                               int warpgroup, int lane,
                                                               float (&total)[kRowParts][kAccumulators]) {
        int before = -1;
        for (int i = 0; i < work.num_k_blocks; ++i) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            if constexpr (kRaggedK) {
                const int left = work.group_end - work.k_block - i * kStageK;
                if (left < kStageK) clear_end_of_stage(shared, s, left);
            }
            multiply_unscaled(shared, s, warpgroup, total);
            wgmma_wait<1>();
            if (before >= 0) release(shared.empty[before], lane);
            before = s;
            state.advance();
        }
#pragma unroll
        for (int part = 0; part < kRowParts; ++part) pin_registers(total[part]);
        wgmma_wait<0>();
        if (before >= 0) release(shared.empty[before], lane);
    }

    // MN-major stages whose last rows of K, from `first` on, are the next group's: what they hold may be NaN.
    __device__ __forceinline__ static void clear_end_of_stage(Storage& shared, int stage_idx, int first) {
        constexpr int kThreads = kConsumerWarps * 32;
        constexpr int kSpanBytes = kMnMajorSpan * kBlockK;  // of a box
        const int thread = static_cast<int>(threadIdx.x) - 128;
        const auto clear = [&](uint8_t* box) {
            for (int i = first * kBlockK + thread * 16; i < kSpanBytes; i += kThreads * 16) {
                *reinterpret_cast<uint4*>(box + i) = make_uint4(0, 0, 0, 0);
            }
        };
#pragma unroll 1
        for (int i = 0; i < kLayout.row_tile_bytes(); i += kSpanBytes) clear(shared.rows[stage_idx] + i);
#pragma unroll 1
        for (int i = 0; i < kLayout.col_tile_bytes(); i += kSpanBytes) clear(shared.cols[stage_idx] + i);
        ptx::fence_async_shared();
        ptx::named_barrier_sync(1 + kConsumerWarps / 4, kThreads);
    }

    // total += rows * cols^T over a stage of BF16.
    __device__ __forceinline__ static void multiply_unscaled(Storage& shared, int stage_idx, int warpgroup,
                                                             float (&total)[kRowParts][kAccumulators]) {
        constexpr bool kRowsMnMajor = kLayout.rows_mn_major(), kColsMnMajor = kLayout.cols_mn_major();
        // Units of 16 bytes: 16 rows of an MN-major tile, 32 bytes of the rows of a K-major one.
        constexpr uint32_t kRowStep = kRowsMnMajor ? kLayout.wgmma_k() * kBlockK / 16 : 32 / 16;
        constexpr uint32_t kColStep = kColsMnMajor ? kLayout.wgmma_k() * kBlockK / 16 : 32 / 16;
        const Descriptor cols(shared.cols[0], kMnMajorSpan * kBlockK);
        const uint32_t row_stage = stage_idx * (kLayout.row_tile_bytes() / 16);
        const uint32_t col_stage = stage_idx * (kLayout.col_tile_bytes() / 16);
#pragma unroll
        for (int part = 0; part < kRowParts; ++part) pin_registers(total[part]);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kRowParts; ++part) {
            const Descriptor rows(shared.rows[0] + part_row<Traits>(part, warpgroup) * kBlockK, kMnMajorSpan * kBlockK);
#pragma unroll
            for (int step = 0; step < kStageK / kLayout.wgmma_k(); ++step) {
                wgmma_bf16<kBlockCols, kRowsMnMajor, kColsMnMajor>(rows.at(row_stage + step * kRowStep),
                                                                   cols.at(col_stage + step * kColStep), total[part]);
            }
        }
        wgmma_commit();
    }

    // This warp is done with a stage: tells every CTA that fills it. The barrier is `kOffset` bytes behind an address.
    template <uint32_t kOffset>
    __device__ __forceinline__ static void release(uint32_t address, int lane) {
        __syncwarp();
        if constexpr (kMulticastCtas > 1) {
            const uint32_t first = kSplitK == 1 ? 0 : ptx::cluster_rank() / kMulticastCtas * kMulticastCtas;
            if (lane < kMulticastCtas) ptx::mbarrier_arrive_remote<kOffset>(address, first + lane);
        } else {
            if (lane == 0) ptx::mbarrier_arrive<kOffset>(address);
        }
    }

    __device__ __forceinline__ static void release(ptx::Barrier& empty, int lane) {
        release<0>(ptx::smem_address(&empty), lane);
    }

    // Split K: how many of the tile's other CTAs finish a slice of its columns.
    __device__ __forceinline__ static int other_slices(uint32_t rank) {
        const int part = rank / kMulticastCtas;
        return kLayout.num_slices() - (part < kLayout.num_slices());
    }

    // Split K: sends each other CTA of the tile its slice of my totals, and sums my slice in the order of the parts.
    __device__ __forceinline__ static void reduce(Storage& shared, uint32_t rank, uint32_t phase, int thread, int zero,
                                                  const float (&total)[kAccumulators],
                                                  float (&slice)[kLayout.store_cols() / 2]) {
        constexpr int kGroups = kLayout.store_cols() / 8;
        constexpr int kThreads = kRowWarpgroups * 128;
        const int lane = thread % 32;
        const int part = rank / kMulticastCtas;
        // Part p of this tile is in the CTA base + p * kMulticastCtas, and there my values are in the slots of source
        // p < part ? part - 1 : part.
        const uint32_t base = rank % kMulticastCtas;
        const bool has_slice = part < kLayout.num_slices();

        if (thread == 0 && has_slice) {
            ptx::mbarrier_arrive_expect_tx(shared.reduce_full, (kSplitK - 1) * kGroups * kThreads * sizeof(float4));
        }
        if (other_slices(rank) > 0) ptx::mbarrier_wait(shared.reduce_empty, phase ^ 1);
#pragma unroll
        for (int target = 0; target < kLayout.num_slices(); ++target) {
            const float* values = total + target * kGroups * 4;
            if (target == part) {
#pragma unroll
                for (int i = 0; i < kGroups * 4; ++i) slice[i] = values[i];
            } else {
                const int source = target < part ? part - 1 : part;
                const uint32_t peer = base + target * kMulticastCtas;
                const uint32_t slots = ptx::remote_address(shared.reduce + source * kGroups * kThreads + thread, peer);
                const uint32_t barrier = ptx::remote_address(&shared.reduce_full, peer);
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    ptx::store_async_v4(slots + j * kThreads * sizeof(float4), barrier, vector(values + 4 * j, zero));
                }
            }
        }
        if (has_slice) {
            ptx::mbarrier_wait(shared.reduce_full, phase);
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const float4 own = make_float4(slice[4 * j], slice[4 * j + 1], slice[4 * j + 2], slice[4 * j + 3]);
#pragma unroll
                for (int i = 0; i < 4; ++i) slice[4 * j + i] = 0;
                for (int source = 0; source < kSplitK; ++source) {
                    const int slot = source < part ? source : source - 1;
                    add(source == part ? own : shared.reduce[(slot * kGroups + j) * kThreads + thread], &slice[4 * j]);
                }
            }
            __syncwarp();
            if (lane < kSplitK && lane != part) {
                ptx::mbarrier_arrive_remote(shared.reduce_empty, base + lane * kMulticastCtas);
            }
        }
    }
};

// One kernel per row of the table; the row's index is the whole template argument.
template <int kRowIndex>
__global__ void __launch_bounds__(GemmTraits<kRowIndex>::kLayout.num_threads(), 1)
    sm90_gemm(const __grid_constant__ GemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Traits = GemmTraits<kRowIndex>;
    GemmKernel<Traits>::run(params, *reinterpret_cast<SharedStorage<Traits>*>(shared_memory));
#endif
}

}  // namespace deep_gemm::sm90
