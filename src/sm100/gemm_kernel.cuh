// GEMM for Blackwell:  D[m, n] = sum_k sfa[m, k / g] sfb[n, k / g] A[m, k] B[n, k] (+ C),  FP8 or FP4 with UE8M0 scales, or
// BF16 without scales; FP32 sums in tensor memory.
//
// A tile is 128 rows of the instruction's M by block_cols of its N; its operand "rows" is A, or with swapped operands (small
// M) the weights B, and "cols" is the other. A pair of CTAs (row_ctas 2) has one instruction of 256 rows: each CTA loads its
// 128 rows and half of the columns, and gets its rows of the accumulator. With split K the CTAs of a cluster share a tile,
// each with its part of K. A stage is 128 bytes of K, K-major or MN-major.
//
// Warp 0 issues TMA loads. Warp 1 of a pair's first CTA issues all tensor-core operations, a single thread. Warp 2 turns
// scales round: TMA delivers 128 words after one another, the tensor core wants word 32 j + r in row r, column j. Warps 4 to
// 7 store; each has a quarter of tensor memory. All walk the same tiles.
//
// Groups are those of the SM90 kernel. M-grouped: warp 3 finds the tiles and hands them to the others in a queue, in each
// CTA of a pair the same ones. K-grouped: the last stage of a group holds values of the next one, perhaps NaN, which warp 3
// overwrites with zeros. K-major FP8 operands have each group padded with zeros to whole blocks, so that there are no such
// stages; a block of 128 of K of a group has its own scales, in words that may hold those of two groups.
//
// barrier               where    arrivals                              guards
// full[s]               first    1 (TMA warp), and the pair's bytes    stage s is filled
//                                of each CTA of K-grouped products, or its warp 3 where it has cleared the end of the stage
// empty[s]              each     1 (commit)                            stage s has been multiplied
// scales_full[s]        each     1 (TMA warp), and its bytes           words of scales are there
// ends_full[s]          each     1 (TMA warp), and its bytes           K-grouped: the last stage of a group is there
// scales_ready[s]       first    warp 2 of each CTA                    they have been turned round
// scales_empty[s]       each     1 (commit)                            they are in tensor memory
// accumulator_full[a]   each     1 (commit)                            accumulator a is complete
// accumulator_empty[a]  first    epilogue warps of each CTA            accumulator a has been read
// reduce_full[w]        each     1 (warp w), and other CTAs' bytes     split K: their parts of my slice are here
// reduce_empty[w]       each     warp w of the other CTAs              split K: my parts have been read, send the next ones
// work full[q]          each     1 (a lane of warp 3, M-grouped)       a tile is in slot q of the queue
// work empty[q]         each     the warps that read it                all roles are done with it
// (first: used in a pair's first CTA only; a commit arrives in both.)
#pragma once

#include "../device/pipeline.cuh"
#include "../device/tile_scheduler.cuh"
#include "epilogue.cuh"
#include "gemm_instances.h"
#include "gemm_params.h"
#include "shared_storage.cuh"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

template <int kRowIndex>
struct GemmTraits {
    static constexpr GemmLayout kLayout{kGemmRows[kRowIndex]};
    static constexpr GemmRow kRow = kLayout.row;
    using MGroups = MGroupedScheduler<kRow.tile_m(), kRow.tile_n(), kRow.swap_ab, kRow.row_ctas>;
    using KGroups =
        KGroupedScheduler<kBlockRows, kRow.block_cols, kRow.row_ctas, 1, kRow.block_k(), false, kLayout.scaled()>;
};

template <class Traits>
class GemmKernel {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr GemmRow kRow = kLayout.row;
    static constexpr int kBlockCols = kRow.block_cols;
    static constexpr int kNumStages = kLayout.num_stages();
    static constexpr int kCtas = kLayout.num_ctas();
    static constexpr int kSplitK = kRow.split_k;
    static constexpr int kClusterSize = kRow.cluster_size();
    static constexpr bool kScaled = kLayout.scaled();
    static constexpr int kBlockK = kLayout.block_k();

    using Storage = SharedStorage<Traits>;
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    static constexpr bool kMGrouped = kLayout.is_m_grouped();
    static constexpr bool kKGrouped = kLayout.is_k_grouped();
    static constexpr bool kRaggedK = kLayout.has_ragged_k();
    static constexpr bool kSummed = kRow.grouping == Grouping::kSummed;
    static constexpr bool kLoads3d = kLayout.has_groups() || kSummed;
    using Scheduler = std::conditional_t<
        kMGrouped, QueueReader,
        std::conditional_t<
            kRow.grouping == Grouping::kBatched, BatchedScheduler<kBlockRows, kBlockCols, kRow.row_ctas>,
            std::conditional_t<kKGrouped, typename Traits::KGroups,
                               DenseScheduler<kBlockRows, kBlockCols, kRow.row_ctas, kRow.col_ctas, kRow.split_k>>>>;
    using State = PipelineState<kNumStages>;
    using AccumulatorState = PipelineState<kAccumulators>;

    enum Warp { kLoadWarp = 0, kMultiplyWarp = 1, kScaleWarp = 2, kGroupWarp = 3, kFirstEpilogueWarp = 4 };

public:
    __device__ __forceinline__ static void run(const Sm100GemmParams& params, Storage& shared) {
        const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
        const uint32_t cluster_rank = kClusterSize == 1 ? 0 : ptx::cluster_rank();
        const uint32_t rank = kCtas == 1 ? 0 : cluster_rank;  // in the pair

        if (warp == kLoadWarp && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.gemm.rows_map);
            ptx::prefetch_tensor_map(params.gemm.cols_map);
            if constexpr (kScaled) {
                ptx::prefetch_tensor_map(params.gemm.row_scales_map);
                ptx::prefetch_tensor_map(params.gemm.col_scales_map);
            }
            ptx::prefetch_tensor_map(params.gemm.d_map);
            for (int s = 0; s < kNumStages; ++s) {
                ptx::mbarrier_init(shared.full[s], kRaggedK ? kCtas : 1);
                ptx::mbarrier_init(shared.empty[s], 1);
                if constexpr (kRaggedK) ptx::mbarrier_init(shared.ends_full[s], 1);
                if constexpr (kScaled) {
                    ptx::mbarrier_init(shared.scales_full[s], 1);
                    ptx::mbarrier_init(shared.scales_ready[s], kCtas);
                    ptx::mbarrier_init(shared.scales_empty[s], 1);
                }
            }
            for (int a = 0; a < kAccumulators; ++a) {
                ptx::mbarrier_init(shared.accumulator_full[a], 1);
                ptx::mbarrier_init(shared.accumulator_empty[a], kEpilogueWarps * kCtas);
            }
            if constexpr (kSplitK > 1) {
                for (int warp = 0; warp < kEpilogueWarps; ++warp) {
                    ptx::mbarrier_init(shared.reduce_full[warp], 1);
                    ptx::mbarrier_init(shared.reduce_empty[warp], kSplitK - 1);
                }
            }
            // Read by warps 0, 1 of a pair's first CTA, 2 if there are scales, and the epilogue's.
            if constexpr (kMGrouped) shared.groups.queue.init(1 + (rank == 0) + kScaled + kEpilogueWarps);
            ptx::fence_mbarrier_init();
        }
        if constexpr (kKGrouped) {
            ptx::grid_dependency_wait();
            if (warp == kGroupWarp) Scheduler::build(params.gemm.k_groups, shared.k_groups);
        }
        if (warp == kScaleWarp) {
            tensor_memory_allocate<kCtas>(&shared.tensor_memory, kLayout.allocated_columns());
            fence_before_sync();
        }
        sync_cluster();
        fence_after_sync();
        const uint32_t tensor_memory = shared.tensor_memory;
        ptx::grid_dependency_launch();
        if constexpr (!kKGrouped) ptx::grid_dependency_wait();
        Scheduler scheduler = make_scheduler(params.gemm, shared, cluster_rank);

        if (warp == kLoadWarp) {
            if (ptx::elect_one()) load(params, shared, scheduler, rank);
        } else if (warp == kMultiplyWarp) {
            if (rank == 0 && ptx::elect_one()) multiply(params, shared, scheduler, tensor_memory);
        } else if (warp == kScaleWarp) {
            if constexpr (kScaled) turn_scales(params, shared, scheduler, rank);
        } else if (warp >= kFirstEpilogueWarp) {
            store(params.gemm, shared, scheduler, warp - kFirstEpilogueWarp, cluster_rank, tensor_memory);
        } else {
            if constexpr (kMGrouped) Traits::MGroups::run(params.gemm.groups, shared.groups);
            if constexpr (kRaggedK) clear_ends(params, shared, scheduler);
        }

        // Tensor memory, and the shared memory that other CTAs' arrivals and stores target, must outlive all use.
        fence_before_sync();
        sync_cluster();
        if (warp == kScaleWarp) tensor_memory_free<kCtas>(tensor_memory, kLayout.allocated_columns());
    }

private:
    // Each role has a copy.
    __device__ __forceinline__ static Scheduler make_scheduler(const GemmParams& params, Storage& shared,
                                                               uint32_t cluster_rank) {
        if constexpr (kMGrouped) {
            return QueueReader(shared.groups.queue);
        } else if constexpr (kRow.grouping == Grouping::kBatched) {
            return Scheduler(params.schedule, params.batch, cluster_rank);
        } else if constexpr (kKGrouped) {
            return Scheduler(params.schedule, params.k_groups, shared.k_groups, cluster_rank);
        } else {
            return Scheduler(params.schedule, cluster_rank);
        }
    }

    // The next tile, for a role that is a whole warp or one thread. `rank`: in the pair, for which a queue holds the pair's
    // tile.
    template <bool kWholeWarp>
    __device__ __forceinline__ static bool next(Scheduler& scheduler, WorkTile& work, uint32_t rank) {
        if (!scheduler.template next<kWholeWarp>(work)) return false;
        if constexpr (kMGrouped && kCtas > 1) work.row += static_cast<int>(rank) * kBlockRows;
        return true;
    }

    __device__ __forceinline__ static void sync_cluster() {
        if constexpr (kClusterSize > 1) {
            ptx::cluster_sync();
        } else {
            __syncthreads();
        }
    }

    // Arrives in the pair's first CTA.
    __device__ __forceinline__ static void arrive_first(ptx::Barrier& barrier) {
        if constexpr (kCtas == 1) {
            ptx::mbarrier_arrive(barrier);
        } else {
            ptx::mbarrier_arrive_remote(barrier, 0);
        }
    }

    // The block of K whose scales those of block i of a tile are.
    __device__ __forceinline__ static int scale_block(const WorkTile& work, int i) {
        return (kRaggedK ? work.first_scale_block() : work.k_block) + i;
    }

    // Whether they are the first ones of a word.
    __device__ __forceinline__ static bool begins_word(const Sm100GemmParams& params, const WorkTile& work, int i) {
        return i == 0 || scale_block(work, i) % params.blocks_per_word == 0;
    }

    // ---- warp 0 ----

    // `kPair`: the bytes count towards the barrier of the pair's first CTA. `group`: of the operand's matrices.
    template <bool kPair>
    __device__ __forceinline__ static void load_tile(const CUtensorMap& map, const OperandSource& source,
                                                     ptx::Barrier& full, uint8_t* tile, int mn, int k, int group) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
#pragma unroll 1
        for (int box = 0; box < source.boxes; ++box) {
            const int box_mn = mn + box * source.box_elems;
            const int x = source.mn_major ? box_mn : k, y = source.mn_major ? k : box_mn;
            uint8_t* destination = tile + box * source.box_bytes;
            if constexpr (kLoads3d && kPair) {
                tma_load_3d_pair(map, full, destination, x, y, group);
            } else if constexpr (kLoads3d) {
                ptx::tma_load_3d(map, full, destination, x, y, group, kHint);
            } else if constexpr (kPair) {
                tma_load_2d_pair(map, full, destination, x, y);
            } else {
                ptx::tma_load_2d(map, full, destination, x, y, kHint);
            }
        }
    }

    // Words of scales of rows or columns from `mn` on.
    __device__ __forceinline__ static void load_scales(const CUtensorMap& map, ptx::Barrier& full, uint32_t* words, int mn,
                                                       int word, int slack, int group) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        if (slack > 0) mn &= ~3;
        if constexpr (kLoads3d) {
            ptx::tma_load_3d(map, full, words, mn, word, group, kHint);
        } else {
            ptx::tma_load_2d(map, full, words, mn, word, kHint);
        }
    }

    __device__ __forceinline__ static void load(const Sm100GemmParams& params, Storage& shared, Scheduler scheduler,
                                                uint32_t rank) {
        State state, scale_state, end_state;
        WorkTile work;
        while (next<false>(scheduler, work, rank)) {
            const int own_col = work.col + static_cast<int>(rank) * (kCtas == 1 ? 0 : kLayout.own_cols());
            int row_group = 0, col_group = 0;
            if constexpr (kLayout.has_groups()) {
                row_group = kRow.swap_ab ? work.group : work.token_group;
                col_group = kRow.swap_ab ? work.token_group : work.group;
            }
#pragma unroll 1
            for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
                if constexpr (kScaled) {
                    if (begins_word(params, work, i)) {
                        const int s = scale_state.stage_idx;
                        const int word = scale_block(work, i) / params.blocks_per_word;
                        ptx::mbarrier_wait(shared.scales_empty[s], scale_state.phase ^ 1);
                        ptx::mbarrier_arrive_expect_tx(shared.scales_full[s], kLayout.scale_box_bytes());
                        load_scales(params.gemm.row_scales_map, shared.scales_full[s], shared.scales[s], work.row, word,
                                    kLayout.row_scale_slack(), row_group);
                        load_scales(params.gemm.col_scales_map, shared.scales_full[s],
                                    shared.scales[s] + kLayout.row_scale_words(), work.col, word,
                                    kLayout.col_scale_slack(), col_group);
                        scale_state.advance();
                    }
                }
                const int s = state.stage_idx;
                int k = kRaggedK ? work.k_block + i * kBlockK : (work.k_block + i) * kBlockK;
                if constexpr (kSummed) {
                    row_group = col_group = divide(work.k_block + i, params.gemm.k_blocks_of_product);
                    k -= row_group * params.gemm.k_blocks_of_product.divisor * kBlockK;
                }
                ptx::mbarrier_wait(shared.empty[s], state.phase ^ 1);
                if constexpr (kRaggedK) {
                    if (work.group_end - k < kBlockK) {
                        // Warp 3 says when the stage is full: it clears its end first.
                        ptx::Barrier& full = shared.ends_full[end_state.stage_idx];
                        ptx::mbarrier_arrive_expect_tx(full, params.stage_bytes);
                        load_tile<false>(params.gemm.rows_map, params.rows, full, shared.rows[s], work.row, k, 0);
                        load_tile<false>(params.gemm.cols_map, params.cols, full, shared.cols[s], own_col, k, 0);
                        end_state.advance();
                        continue;
                    }
                    if (rank > 0) arrive_first(shared.full[s]);
                }
                // The other CTA's bytes may come first: the count is signed.
                if (rank == 0) ptx::mbarrier_arrive_expect_tx(shared.full[s], params.stage_bytes * kCtas);
                constexpr bool kPair = kCtas > 1;
                load_tile<kPair>(params.gemm.rows_map, params.rows, shared.full[s], shared.rows[s], work.row, k, row_group);
                load_tile<kPair>(params.gemm.cols_map, params.cols, shared.full[s], shared.cols[s], own_col, k, col_group);
            }
        }
    }

    // ---- warp 1 ----

    __device__ __forceinline__ static uint64_t descriptor(const OperandSource& source, const void* tile) {
        return source.descriptor | (ptx::smem_address(tile) >> 4 & 0x3FFF);
    }

    __device__ __forceinline__ static void multiply(const Sm100GemmParams& params, Storage& shared, Scheduler scheduler,
                                                    uint32_t tensor_memory) {
        const uint32_t row_scales = tensor_memory + kLayout.row_scale_column();
        const uint32_t col_scales = tensor_memory + kLayout.col_scale_column();
        const int last_block = params.gemm.schedule.num_k_blocks - 1;
        const uint64_t rows_of_ring = descriptor(params.rows, shared.rows[0]);
        const uint64_t cols_of_ring = descriptor(params.cols, shared.cols[0]);
        State state, scale_state;
        AccumulatorState accumulator_state;
        WorkTile work;
        while (next<false>(scheduler, work, 0)) {
            const uint32_t accumulator = tensor_memory + accumulator_state.stage_idx * kBlockCols;
            ptx::mbarrier_wait(shared.accumulator_empty[accumulator_state.stage_idx], accumulator_state.phase ^ 1);
#pragma unroll 1
            for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
                const bool new_word = kScaled && begins_word(params, work, i);
                const int s = state.stage_idx, scale_stage = scale_state.stage_idx;
                if (new_word) ptx::mbarrier_wait(shared.scales_ready[scale_stage], scale_state.phase);
                ptx::mbarrier_wait(shared.full[s], state.phase);
                fence_after_sync();  // behind all waits: the accumulator has been read, operands and scales are there
                if (new_word) {
                    // Instructions that are queued read the scales before they are replaced: the queue keeps its order.
                    copy_scales<kCtas>(row_scales, scale_group(shared, scale_stage, 0));
#pragma unroll
                    for (int group = 1; group < kLayout.scale_groups(); ++group) {
                        copy_scales<kCtas>(col_scales + (group - 1) * kScaleColumns, scale_group(shared, scale_stage, group));
                    }
                    commit<kCtas>(shared.scales_empty[scale_stage]);
                    scale_state.advance();
                }
                const uint64_t rows = rows_of_ring + s * (kLayout.row_tile_bytes() / 16);
                const uint64_t cols = cols_of_ring + s * (kLayout.col_tile_bytes() / 16);
                // What lies behind the end of K is not multiplied: zeros would do no harm, but their scales may be NaN.
                int steps = kSteps;
                if constexpr (kRaggedK) {
                    constexpr int kStepK = kBlockK / kSteps;
                    steps = min((work.group_end - work.k_block - i * kBlockK + kStepK - 1) / kStepK, kSteps);
                } else if constexpr (!kSummed) {
                    if (work.k_block + i == last_block) steps = params.last_steps;
                }
                const bool per_step = params.blocks_per_word == 1;  // else a scale for the whole block
                const uint32_t scale_byte = scale_block(work, i) % params.blocks_per_word;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    if (step >= steps) break;
                    const uint64_t row_step = rows + step * params.rows.step, col_step = cols + step * params.cols.step;
                    const bool accumulate = i > 0 || step > 0;
                    if constexpr (kScaled) {
                        const uint32_t byte = per_step ? step : scale_byte;
                        const uint32_t instruction = params.instruction | byte << 29 | byte << 4;
                        multiply_scaled<kCtas>(accumulator, row_step, col_step, instruction, row_scales, col_scales,
                                               accumulate);
                    } else {
                        multiply_bf16<kCtas>(accumulator, row_step, col_step, params.instruction, accumulate);
                    }
                }
                commit<kCtas>(shared.empty[s]);
            }
            commit<kCtas>(shared.accumulator_full[accumulator_state.stage_idx]);
            accumulator_state.advance();
        }
    }

    // ---- warp 2 ----

    // Words of 128 rows or columns: those of rows, then those of columns.
    __device__ __forceinline__ static uint32_t* scale_group(Storage& shared, int stage, int group) {
        return shared.scales[stage] + (group == 0 ? 0 : kLayout.row_scale_words() + (group - 1) * kScaleRows);
    }

    __device__ __forceinline__ static void turn_scales(const Sm100GemmParams& params, Storage& shared,
                                                       Scheduler scheduler, uint32_t rank) {
        const int lane = threadIdx.x % 32;
        State state;
        WorkTile work;
        while (next<true>(scheduler, work, rank)) {
            // Where the tile's scales begin in their boxes.
            const int row_start = kLayout.row_scale_slack() > 0 ? work.row % 4 : 0;
            const int col_start = kLayout.col_scale_slack() > 0 ? work.col % 4 : 0;
#pragma unroll 1
            for (int i = 0; i < work.num_k_blocks; ++i) {
                if (!begins_word(params, work, i)) continue;
                const int s = state.stage_idx;
                ptx::mbarrier_wait(shared.scales_full[s], state.phase);
                uint4 words[kLayout.scale_groups()];
#pragma unroll
                for (int group = 0; group < kLayout.scale_groups(); ++group) {
                    const uint32_t* source = scale_group(shared, s, group) + (group == 0 ? row_start : col_start) + lane;
                    words[group] = make_uint4(source[0], source[32], source[64], source[96]);
                }
                __syncwarp();
#pragma unroll
                for (int group = 0; group < kLayout.scale_groups(); ++group) {
                    reinterpret_cast<uint4*>(scale_group(shared, s, group))[lane] = words[group];
                }
                ptx::fence_async_shared();
                __syncwarp();
                if (lane == 0) arrive_first(shared.scales_ready[s]);
                state.advance();
            }
        }
    }

    // ---- warp 3 ----

    // Overwrites what follows a group in its last stage, as far as instructions read it, with zeros.
    __device__ __forceinline__ static void clear_ends(const Sm100GemmParams& params, Storage& shared, Scheduler scheduler) {
        State state, end_state;
        WorkTile work;
        while (next<true>(scheduler, work, 0)) {
            state.advance_by(work.num_k_blocks);
            const int left = (work.group_end - work.k_block) % kBlockK;
            if (left == 0) continue;
            const int s = state.stage_idx == 0 ? kNumStages - 1 : state.stage_idx - 1;
            ptx::mbarrier_wait(shared.ends_full[end_state.stage_idx], end_state.phase);
            clear_end(params.rows, shared.rows[s], left);
            clear_end(params.cols, shared.cols[s], left);
            ptx::fence_async_shared();
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive_first(shared.full[s]);
            end_state.advance();
        }
    }

    // Of an MN-major tile, whose boxes have a swizzle span for each element of K.
    __device__ __forceinline__ static void clear_end(const OperandSource& source, uint8_t* tile, int first) {
        constexpr int kStepK = kBlockK / kSteps;
        const int span = source.box_bytes / kBlockK;
        const int end = (first + kStepK - 1) / kStepK * kStepK * span;
#pragma unroll 1
        for (int box = 0; box < source.boxes; ++box) {
#pragma unroll 1
            for (int i = first * span + threadIdx.x % 32 * 16; i < end; i += 32 * 16) {
                *reinterpret_cast<uint4*>(tile + box * source.box_bytes + i) = make_uint4(0, 0, 0, 0);
            }
        }
    }

    // ---- warps 4 to 7 ----

    __device__ __forceinline__ static void store(const GemmParams& params, Storage& shared, Scheduler scheduler, int warp,
                                                 uint32_t cluster_rank, uint32_t tensor_memory) {
        const int lane = threadIdx.x % 32;
        uint8_t* boxes = shared.boxes[kRow.swap_ab ? 0 : warp][0];
        int buffer = 0;
        uint32_t reduce_phase = 0;
        AccumulatorState state;
        WorkTile work;
        while (next<true>(scheduler, work, cluster_rank)) {
            const int a = state.stage_idx;
            const uint32_t accumulator = tensor_memory + a * kBlockCols + (warp * 32 << 16);
            ptx::mbarrier_wait(shared.accumulator_full[a], state.phase);
            fence_after_sync();
            const auto done = [&] {
                fence_before_sync();
                __syncwarp();
                if (lane == 0) arrive_first(shared.accumulator_empty[a]);
            };
            const int row = work.row + warp * 32;
            const auto store_as = [&]<class Element>(Element) {
                if constexpr (kSplitK > 1) {
                    Epilogue<Traits>::template reduce_and_store<Element>(
                        params, accumulator, work.num_k_blocks == 0, shared.reduce, shared.reduce_full[warp],
                        shared.reduce_empty[warp], reduce_phase, warp, cluster_rank, row, work.col, done);
                } else {
                    Epilogue<Traits>::template store<Element>(params, work, accumulator, boxes, buffer, row, done);
                }
            };
            if (params.d_is_float) {
                store_as(float());
            } else {
                store_as(__nv_bfloat16());
            }
            reduce_phase ^= 1;
            state.advance();
        }
        if constexpr (!kRow.swap_ab) {
            // The boxes must outlive the stores that read them.
            if (lane == 0) ptx::tma_store_wait_read<0>();
        }
    }
};

// One kernel per row of the table; the row's index is the whole template argument.
template <int kRowIndex>
__global__ void __launch_bounds__(GemmTraits<kRowIndex>::kLayout.num_threads(), 1)
    sm100_gemm(const __grid_constant__ Sm100GemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Traits = GemmTraits<kRowIndex>;
    GemmKernel<Traits>::run(params, *reinterpret_cast<SharedStorage<Traits>*>(shared_memory));
#endif
}

}  // namespace deep_gemm::sm100
