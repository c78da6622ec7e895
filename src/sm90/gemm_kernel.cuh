// FP8 GEMM for Hopper:  D[m, n] = sum_k sfa[m, k / g] sfb[n, k / g] A[m, k] B[n, k] (+ C),  FP32 scales and sums.
//
// A tile is block_rows x block_cols of the wgmma instruction's M x N; its operand "rows" is A, or with swapped operands
// (small M) the weights B, and "cols" is the other. Both are K-major, 128 bytes of K per stage, swizzled by TMA. After
// every gran_k of K the tensor core's sum is scaled and added to FP32 totals in registers.
//
// Warpgroup 0 produces: warp 0 issues TMA loads, warps 1 and 2 bring the row and column scales. Each further warpgroup
// consumes 64 rows: wgmma, promotion, epilogue. All walk the same tiles; nobody waits for a whole CTA after the start.
//
// barrier        arrivals                                             guards
// full[s]        1 (TMA warp, with its bytes) + 2 (scale warps)       stage s is filled
// empty[s]       consumer warps of the CTAs this CTA loads for        stage s may be overwritten
// reduce_full    consumer warps of the other CTAs (split K)           their parts of my slice are in my shared memory
// reduce_empty   consumer warps of the other CTAs (split K)           my parts have been read there: send the next ones
// named 1 + w    128                                                  consumer warpgroup w's staging buffer
#pragma once

#include "../device/gemm_params.h"
#include "../device/pipeline.cuh"
#include "../device/tile_scheduler.cuh"
#include "epilogue.cuh"
#include "gemm_instances.h"
#include "scale_policy.cuh"
#include "shared_storage.cuh"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

template <int kRowIndex>
struct GemmTraits {
    static constexpr GemmLayout kLayout{kGemmRows[kRowIndex]};
};

template <class Traits>
class GemmKernel {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr GemmRow kRow = kLayout.row;
    static constexpr int kBlockCols = kRow.block_cols;
    static constexpr int kNumStages = kLayout.num_stages();
    static constexpr int kKGroups = kLayout.k_groups();
    static constexpr int kConsumerWarps = kLayout.num_consumer_warpgroups() * 4;
    static constexpr int kClusterSize = kRow.cluster_size();
    static constexpr int kSplitK = kRow.split_k;
    static constexpr int kMulticastCtas = kRow.multicast_ctas();
    static constexpr int kAccumulators = kBlockCols / 2;  // registers of a thread

    using Storage = SharedStorage<Traits>;
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    using Scheduler = DenseScheduler<kRow.block_rows, kBlockCols, kRow.row_ctas, kRow.col_ctas, kSplitK>;
    using State = PipelineState<kNumStages>;

public:
    __device__ __forceinline__ static void run(const GemmParams& params, Storage& shared) {
        const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
        const uint32_t rank = kClusterSize == 1 ? 0 : ptx::cluster_rank();

        if (warp == 0 && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.rows_map);
            ptx::prefetch_tensor_map(params.cols_map);
            ptx::prefetch_tensor_map(params.d_map);
            for (int s = 0; s < kNumStages; ++s) {
                ptx::mbarrier_init(shared.full[s], 1 + 2);
                ptx::mbarrier_init(shared.empty[s], kConsumerWarps * kMulticastCtas);
            }
            if constexpr (kSplitK > 1) {
                ptx::mbarrier_init(shared.reduce_full, (kSplitK - 1) * kConsumerWarps);
                ptx::mbarrier_init(shared.reduce_empty, (kSplitK - 1) * kConsumerWarps);
            }
            ptx::fence_mbarrier_init();
        }
        sync_cluster();
        ptx::grid_dependency_launch();
        Scheduler scheduler(params.schedule, rank);
        if constexpr (kRow.ctas_per_sm > 1) {
            if (params.pdl && warp == 3 && ptx::elect_one()) prefetch_weights(params, scheduler, rank);
        }
        ptx::grid_dependency_wait();

        if (warp < 4) {
            if constexpr (kSetRegisters) set_max_registers<40>();
            if (warp == 0 && ptx::elect_one()) load_operands(params, shared, scheduler, rank);
            if (warp == 1) load_scales<true>(params.row_scales, shared, scheduler);
            if (warp == 2) load_scales<false>(params.col_scales, shared, scheduler);
        } else {
            if constexpr (kSetRegisters) set_max_registers<kRow.ctas_per_sm == 1 ? 232 : 104>();
            consume(params, shared, scheduler, rank);
        }

        // A CTA's shared memory must outlive the multicasts and remote arrivals that target it.
        if constexpr (kClusterSize > 1) ptx::cluster_sync();
    }

#ifndef DG_MAINLOOP
#define DG_MAINLOOP 0
#endif
private:
    // With one consumer warpgroup the register file has enough for everybody at the start.
    static constexpr bool kSetRegisters = kLayout.num_consumer_warpgroups() > 1;

    __device__ __forceinline__ static void sync_cluster() {
        if constexpr (kClusterSize > 1) {
            ptx::cluster_sync();
        } else {
            __syncthreads();
        }
    }

    // Of a panel that a cluster shares each CTA loads its part, into all.
    static constexpr int kRowPart = kRow.block_rows / kRow.col_ctas;
    static constexpr int kColPart = kBlockCols / kRow.row_ctas;

    // Starts to fetch the first weights into L2 while the kernel before this one still runs. Only the other data may
    // depend on that kernel in practice, but a load into shared memory must not rely on it; L2 is coherent.
    __device__ __forceinline__ static void prefetch_weights(const GemmParams& params, Scheduler scheduler,
                                                            uint32_t rank) {
        WorkTile work;
        if (!scheduler.next(work)) return;
        const int part = rank % kMulticastCtas;
        for (int i = 0; i < min(work.num_k_blocks, kNumStages); ++i) {
            const int k = (work.k_block + i) * kBlockK;
            if constexpr (kRow.swap_ab) {
                ptx::tma_prefetch_2d(params.rows_map, k, work.row + (kRow.col_ctas > 1 ? part * kRowPart : 0));
            } else {
                ptx::tma_prefetch_2d(params.cols_map, k, work.col + (kRow.row_ctas > 1 ? part * kColPart : 0));
            }
        }
    }

    // ---- producer, warp 0 ----

    __device__ __forceinline__ static void load_operands(const GemmParams& params, Storage& shared,
                                                         Scheduler scheduler, uint32_t rank) {
        constexpr uint32_t kStageBytes = kLayout.row_tile_bytes() + kLayout.col_tile_bytes();
#ifndef DG_HINT
#define DG_HINT 0
#endif
        constexpr auto kHint = DG_HINT && kRow.swap_ab ? ptx::CacheHint::kEvictFirst : ptx::CacheHint::kEvictNormal;
        const int part = rank % kMulticastCtas;
        const uint16_t sharers = ((1 << kMulticastCtas) - 1) << (rank - part);
        State state;
        WorkTile work;
        while (scheduler.next(work)) {
            for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
                const int k = (work.k_block + i) * kBlockK;
                uint8_t* rows = shared.rows[state.stage_idx];
                uint8_t* cols = shared.cols[state.stage_idx];
                ptx::Barrier& full = shared.full[state.stage_idx];
#ifndef DG_BATCH
#define DG_BATCH 1
#endif
                if (DG_BATCH > 1 && kRow.swap_ab && i % DG_BATCH == 0) {
                    State ahead = state;
                    for (int j = 0; j < DG_BATCH && i + j < work.num_k_blocks; ++j, ahead.advance()) ptx::mbarrier_wait(shared.empty[ahead.stage_idx], ahead.phase ^ 1);
                }

                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                if constexpr (kRow.col_ctas > 1) {
                    ptx::tma_load_2d_multicast(params.rows_map, full, rows + part * kRowPart * kBlockK, k,
                                               work.row + part * kRowPart, sharers, kHint);
                } else {
                    ptx::tma_load_2d(params.rows_map, full, rows, k, work.row, kHint);
                }
                if constexpr (kRow.row_ctas > 1) {
                    ptx::tma_load_2d_multicast(params.cols_map, full, cols + part * kColPart * kBlockK, k,
                                               work.col + part * kColPart, sharers, ptx::CacheHint::kEvictNormal);
                } else {
                    ptx::tma_load_2d(params.cols_map, full, cols, k, work.col, ptx::CacheHint::kEvictNormal);
                }
            }
        }
    }

    // ---- producer, warps 1 and 2 ----

    template <bool kOfRows>
    __device__ __forceinline__ static void load_scales(const ScaleSource& source, Storage& shared,
                                                       Scheduler scheduler) {
        constexpr int kCount = kOfRows ? kLayout.row_scales() : kLayout.col_scales();
        constexpr bool kVector = kOfRows ? kLayout.row_scales_are_vector() : kLayout.col_scales_are_vector();
        using Loader = ScaleLoader<kCount, kKGroups>;
        State state;
        WorkTile work;
        while (scheduler.next(work)) {
            const int first = kOfRows ? work.row : work.col;
            Loader loader(source, kVector ? first : first / 128, work.k_block * kKGroups);
            // Calls visit<0>, visit<1>, ..., visit<kDepth - 1>: which registers are meant has to be known when compiling.
            const auto for_each_ahead = [](auto&& visit) {
                [&]<int... kAhead>(std::integer_sequence<int, kAhead...>) {
                    (visit.template operator()<kAhead>(), ...);
                }(std::make_integer_sequence<int, Loader::kDepth>());
            };
            for_each_ahead([&]<int kAhead>() {
                if (kAhead < work.num_k_blocks) loader.template fetch<kAhead>();
            });
            for (int i = 0; i < work.num_k_blocks; i += Loader::kDepth) {
                for_each_ahead([&]<int kAhead>() {
                    if (i + kAhead >= work.num_k_blocks) return;
                    const int s = state.stage_idx;
                    ptx::mbarrier_wait(shared.empty[s], state.phase ^ 1);
                    loader.template store<kAhead>(kOfRows ? shared.row_scales[s][0] : shared.col_scales[s][0],
                                                  align_up(kCount, 4));
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.full[s]);
                    state.advance();
                    if (i + kAhead + Loader::kDepth < work.num_k_blocks) loader.template fetch<kAhead>();
                });
            }
        }
    }

    // ---- consumers ----

    __device__ __forceinline__ static void consume(const GemmParams& params, Storage& shared, Scheduler scheduler,
                                                   uint32_t rank) {
        const int warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 128 - 1, 0);
        const int thread = threadIdx.x % 128;
        if constexpr (DG_MAINLOOP == 1 && kLayout.num_consumer_warpgroups() == 2) { if (warpgroup == 1) ptx::named_barrier_arrive(4, 256); }
        State state;
        uint32_t reduce_phase = 0;
        WorkTile work;
        while (scheduler.next(work)) {
            float total[kAccumulators] = {};
            accumulate(shared, state, work, warpgroup, thread, total);

            const int row = work.row + warpgroup * 64;
            if constexpr (kSplitK == 1) {
                Epilogue<Traits>::store(params, shared.staging[warpgroup], 1 + warpgroup, row, work.col, thread, total);
            } else {
                float slice[kLayout.store_cols() / 2];
                reduce(shared, rank, reduce_phase, threadIdx.x - 128, total, slice);
                reduce_phase ^= 1;
                const int part = rank / kMulticastCtas;
                if (part < kLayout.num_slices()) {
                    Epilogue<Traits>::store(params, shared.staging[warpgroup], 1 + warpgroup, row,
                                            work.col + part * kLayout.store_cols(), thread, slice);
                }
            }
        }
        // Stores still read the staging buffer, which must outlive them.
        if (thread == 0) ptx::tma_store_wait_all();
    }

    // Sums all K blocks of a tile into `total`.
    __device__ __forceinline__ static void accumulate(Storage& shared, State& state, const WorkTile& work,
                                                      int warpgroup, int thread, float (&total)[kAccumulators]) {
        constexpr int kSteps = kRow.gran_k / 32;  // instructions per scale
        const int lane = thread % 32;
        const int first_row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
        const int col_offset = work.col % 128;
        float accumulator[kAccumulators];
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            if constexpr (DG_MAINLOOP == 1 && kConsumerWarps == 8) ptx::named_barrier_sync(4 + warpgroup, 256);
            const uint64_t rows = make_descriptor(shared.rows[s] + warpgroup * 64 * kBlockK);
            const uint64_t cols = make_descriptor(shared.cols[s]);
#pragma unroll
            for (int group = 0; group < kKGroups; ++group) {
                pin_registers(accumulator);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const int advance = (group * kSteps + step) * (32 >> 4);
                    wgmma<kBlockCols>(rows + advance, cols + advance, accumulator, step > 0);
                }
                wgmma_commit();
                if constexpr (DG_MAINLOOP == 1 && kConsumerWarps == 8) { if (group == kKGroups - 1) ptx::named_barrier_arrive(4 + (1 - warpgroup), 256); }
                const Promotion<Traits> promotion(shared.row_scales[s][group], shared.col_scales[s][group], first_row, lane);
                pin_registers(accumulator);
                wgmma_wait<0>();
                const bool last = group == kKGroups - 1;
                if (last && !Promotion<Traits>::kReadsStage) release(shared.empty[s], lane);
                promotion.apply(col_offset, accumulator, total);
                if (last && Promotion<Traits>::kReadsStage) release(shared.empty[s], lane);
            }
        }
    }

    // This warp is done with a stage: tells every CTA that fills it.
    __device__ __forceinline__ static void release(ptx::Barrier& empty, int lane) {
        __syncwarp();
        if constexpr (kMulticastCtas > 1) {
            const uint32_t first = kSplitK == 1 ? 0 : ptx::cluster_rank() / kMulticastCtas * kMulticastCtas;
            if (lane < kMulticastCtas) ptx::mbarrier_arrive_remote(empty, first + lane);
        } else {
            if (lane == 0) ptx::mbarrier_arrive(empty);
        }
    }

    // Split K: sends each other CTA of the tile its slice of my totals, and sums my slice in the order of the parts.
    __device__ __forceinline__ static void reduce(Storage& shared, uint32_t rank, uint32_t phase, int thread,
                                                  const float (&total)[kAccumulators],
                                                  float (&slice)[kLayout.store_cols() / 2]) {
        constexpr int kGroups = kLayout.store_cols() / 8;
        constexpr int kThreads = kConsumerWarps * 32;
        const int lane = thread % 32;
        const int part = rank / kMulticastCtas;
        // Part p of this tile is in the CTA base + p * kMulticastCtas.
        const uint32_t base = rank % kMulticastCtas;
        const bool reaches_peer = lane < kSplitK && lane != part;
        const uint32_t peer = base + lane * kMulticastCtas;

        ptx::mbarrier_wait_cluster(shared.reduce_empty, phase ^ 1);
#pragma unroll
        for (int target = 0; target < kLayout.num_slices(); ++target) {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const float* value = total + (target * kGroups + j) * 4;
                float4* slot = shared.reduce + (part * kGroups + j) * kThreads + thread;
                if (target == part) {
                    *slot = make_float4(value[0], value[1], value[2], value[3]);
                } else {
                    ptx::store_remote_v4(slot, base + target * kMulticastCtas, value[0], value[1], value[2], value[3]);
                }
            }
        }
        __syncwarp();
        if (reaches_peer) ptx::mbarrier_arrive_remote_release(shared.reduce_full, peer);
        ptx::mbarrier_wait_cluster(shared.reduce_full, phase);

        if (part < kLayout.num_slices()) {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                float4 sum = shared.reduce[j * kThreads + thread];
                for (int source = 1; source < kSplitK; ++source) {
                    const float4 addend = shared.reduce[(source * kGroups + j) * kThreads + thread];
                    sum.x += addend.x;
                    sum.y += addend.y;
                    sum.z += addend.z;
                    sum.w += addend.w;
                }
                slice[4 * j + 0] = sum.x;
                slice[4 * j + 1] = sum.y;
                slice[4 * j + 2] = sum.z;
                slice[4 * j + 3] = sum.w;
            }
        }
        __syncwarp();
        if (reaches_peer) ptx::mbarrier_arrive_remote(shared.reduce_empty, peer);
    }
};

// One kernel per row of the table; the row's index is the whole template argument.
template <int kRowIndex>
__global__ void __launch_bounds__(GemmTraits<kRowIndex>::kLayout.num_threads(),
                                 GemmTraits<kRowIndex>::kLayout.row.ctas_per_sm)
    sm90_fp8_gemm(const __grid_constant__ GemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Traits = GemmTraits<kRowIndex>;
    GemmKernel<Traits>::run(params, *reinterpret_cast<SharedStorage<Traits>*>(shared_memory));
#endif
}

}  // namespace deep_gemm::sm90
