// Hyper-connection pre-norm for Hopper: in one pass over A, BF16 [M, K], and for B, FP32 [N, K] with few rows,
//   D[s, m, n] = sum_k A[m, k] B[n, k],  sqr_sum[s, m] = sum_k A[m, k]^2,  over the s-th of `num_splits` parts of K.
//
// The kernel streams A. Each CTA reads its B again, from L2, which for N = 24 adds 19 % to 256 rows of A and 75 % to 64, and
// works on a block of K for 0.4 us at least, whatever its rows: so a tile has many of them.
//
// The product is the BF16 instruction's, at more than the precision of TF32. A is BF16 already and goes from shared memory
// into the tensor core as TMA wrote it. An element b of B is the sum of two BF16 values, b's upper 16 bits and the rest,
// together 16 bits of mantissa (TF32 has 11). So the roles of rows and columns are exchanged: the instruction's 64 rows are
// 32 rows of B, the upper part of each 8 rows above the lower one, in registers; its N is `kRows` rows of A. A thread's
// accumulators then hold both parts of the same element of D.
//
// Warpgroup 0 sums squares of A, eight threads for a row. One or two further warpgroups multiply A by 32 rows of B: two
// where B has more rows, or where the tile has more than 64, of which each has half then. The last one produces: a thread
// issues the TMA loads. The grid is at most one CTA per SM; the roles walk the same tiles and meet at mbarriers only.
//
// Where few tiles of rows leave SMs idle, K is split. The CTAs of a cluster have the parts of one tile: each puts its part of D
// where its stages of A were, copies a slice of it to where the stages of B were in each CTA of the cluster, and adds up the
// slices it gets, in the order of the parts. Where the parts are more than a cluster has CTAs, they go to memory, and
// another kernel adds them up.
//
// While the kernel before this one ends, each CTA asks L2 for its first block. That reads nothing: should the kernel before
// write A or B, L2 has it.
//
// shared memory of a stage   A  BF16 [kRows][64], rows of 128 bytes, 128-byte swizzle; rows from tile_rows on are zero
//                            B  FP32 [2][32 col groups][32], as A, one half of the 64 elements of K after the other
//
// barrier    arrivals                          guards
// full[s]    1 (the TMA thread), and the bytes stage s is filled
// empty[s]   consumer warps                    stage s may be overwritten
// named 3    all threads                       barriers are initialised, rows beyond the tile cleared; the producer arrives
// named 1    consumers                         (clusters) no stage is read any more
// named 2    threads of the product            (clusters) the part is where copies read it
// ready      1 from each CTA of the cluster    (clusters) they no longer read their stages
// received   1, and the bytes of the slices    (clusters) the slices are there
// done       1 from each CTA of the cluster    (clusters) they have their slices: the CTA, which copies read, may end
// cluster    all threads of the cluster        (clusters) ready, received and done are initialised: before the first use
#pragma once

#include <algorithm>

#include "../device/pipeline.cuh"
#include "../device/prenorm_gemm.cuh"
#include "../device/prenorm_gemm_params.h"
#include "../device/ptx_cluster.cuh"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "../device/warp.cuh"
#include "prenorm_gemm_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

template <int kRows, int kColGroups>
class PrenormGemmKernel {
    static constexpr PrenormLayout kLayout{kRows, kColGroups};
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kCols = kLayout.cols();
    static constexpr int kProducts = kLayout.products();
    static constexpr int kGroupRows = kRows / kLayout.row_groups();  // of a warpgroup of the product
    // More than 32 accumulators a thread, and 512 threads. Without, there are registers left for a CTA of the reduction.
    static constexpr bool kSetRegisters = kProducts == 2 && kGroupRows > 64;

    struct alignas(1024) Storage {
        uint8_t a[kStages][kLayout.a_bytes()];
        uint8_t b[kStages][kLayout.b_bytes()];
        float squares[kRows];  // of this CTA's part of K
        ptx::Barrier full[kStages];
        ptx::Barrier empty[kStages];
        ptx::Barrier ready;
        ptx::Barrier received;
        ptx::Barrier done;

        // Rows of prenorm_part_pitch(n): this CTA's part, [tile_rows], and its slice of each part, [parts][slice_rows].
        __device__ float* part() { return reinterpret_cast<float*>(a); }
        __device__ float* slices() { return reinterpret_cast<float*>(b); }
    };
    static_assert(kStages * kLayout.a_bytes() >= kRows * prenorm_part_pitch(kCols) * 4);
    static_assert(kStages * kLayout.b_bytes() >= (kRows + kPrenormMaxCluster - 1) * prenorm_part_pitch(kCols) * 4);
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    using State = PipelineState<kStages>;

public:
    __device__ __forceinline__ static void run(const PrenormGemmParams& params, uint8_t* memory) {
        Storage& shared = *reinterpret_cast<Storage*>(memory);
        const int warp = uniform(static_cast<int>(threadIdx.x) / 32), warpgroup = warp / 4;

        // The warp that loads goes on at once: the last CTA to start is the last to end.
        if (warp == kProducerWarp) {
            if (ptx::elect_one()) start(params, shared);
            ptx::named_barrier_arrive(kStarted, kLayout.num_threads());
        } else {
            clear_rows_beyond_tile(params, shared);
            ptx::named_barrier_sync(kStarted, kLayout.num_threads());
        }
        if (params.in_cluster) ptx::cluster_arrive_relaxed();
        ptx::grid_dependency_launch();
        // Results follow loads, which wait, but where there are parts without a block.
        if (params.num_k_blocks < params.num_splits) ptx::grid_dependency_wait();

        if (warpgroup == 0) {
            if constexpr (kSetRegisters) shrink_registers<88>();
            State state;
            for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                if (params.in_cluster) {
                    sum_prenorm_squares<kRows>(params, shared, work, state, threadIdx.x,
                                               [&](int row, float sum) { shared.squares[row] = sum; });
                    ptx::named_barrier_arrive(1, kConsumers);
                } else {
                    sum_prenorm_squares<kRows>(params, shared, work, state, threadIdx.x);
                }
            });
            if (params.in_cluster) ptx::cluster_wait();
            if (params.in_cluster && warp == 0) {
                ptx::mbarrier_wait(shared.received, 0);
                if (threadIdx.x < params.num_splits) ptx::mbarrier_arrive_remote(shared.done, threadIdx.x);
                ptx::mbarrier_wait(shared.done, 0);
            }
        } else if (warpgroup <= kProducts) {
            if constexpr (kSetRegisters) grow_registers<168>();
            State state;
            for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                multiply(params, shared, work, state, warpgroup - 1, threadIdx.x % 128);
            });
            if (params.in_cluster) add_parts(params, shared, threadIdx.x - 128);
        } else {
            if constexpr (kSetRegisters) shrink_registers<40>();
            if (warp == kProducerWarp && ptx::elect_one()) {
                State state;
                LoadLimit<kStages> limit(kMostInFlight);
                bool is_first = true;
                for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                    if (is_first) ptx::grid_dependency_wait();
                    is_first = false;
                    load(params, shared, work, state, limit);
                });
            }
            if (params.in_cluster) {
                __syncwarp();
                ptx::cluster_wait();
            }
        }
    }

private:
    static constexpr int kConsumers = 128 * (1 + kProducts);
    static constexpr int kProducerWarp = kLayout.num_threads() / 32 - 4;
    static constexpr int kStarted = 3;  // a named barrier

    // ---- start ----

    // By one thread.
    __device__ __forceinline__ static void start(const PrenormGemmParams& params, Storage& shared) {
        prefetch(params);
        ptx::prefetch_tensor_map(params.a_map);
        if (params.n > 0) ptx::prefetch_tensor_map(params.b_map);
        const int consumer_warps = 4 * (1 + kProducts);
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(shared.full[s], 1);
            ptx::mbarrier_init(shared.empty[s], consumer_warps);
        }
        if (params.in_cluster) {
            ptx::mbarrier_init(shared.ready, params.num_splits);
            ptx::mbarrier_init(shared.received, 1);
            ptx::mbarrier_init(shared.done, params.num_splits);
            ptx::mbarrier_arrive_expect_tx(shared.received, params.num_splits * slice_bytes(params, ptx::cluster_rank()));
        }
        ptx::fence_mbarrier_init();
    }

    // By all warps but one. Rows that no load writes go through the tensor core like the others.
    __device__ __forceinline__ static void clear_rows_beyond_tile(const PrenormGemmParams& params, Storage& shared) {
        constexpr int kThreads = kLayout.num_threads() - 32;
        if (params.tile_rows == kRows) return;
        const int thread = threadIdx.x < kProducerWarp * 32 ? threadIdx.x : threadIdx.x - 32;
        const int first = params.tile_rows * 8, count = kRows * 8 - first;  // in units of 16 bytes
        for (int s = 0; s < kStages; ++s) {
            uint4* rows = reinterpret_cast<uint4*>(shared.a[s]) + first;
            for (int i = thread; i < count; i += kThreads) rows[i] = uint4{};
        }
        ptx::fence_async_shared();
    }

    // ---- clusters ----

    __device__ __forceinline__ static int slice_rows(const PrenormGemmParams& params) {
        return (params.tile_rows + params.num_splits - 1) / params.num_splits;
    }

    // The last slices have fewer rows, or none.
    __device__ __forceinline__ static uint32_t slice_bytes(const PrenormGemmParams& params, int rank) {
        const int rows = min(slice_rows(params), params.tile_rows - rank * slice_rows(params));
        return max(rows, 0) * prenorm_part_pitch(params.n) * 4;
    }

    // This CTA's slice of the sums of the cluster's parts, by the threads of the product.
    __device__ __forceinline__ static void add_parts(const PrenormGemmParams& params, Storage& shared, int thread) {
        constexpr int kThreads = 128 * kProducts;
        const int parts = params.num_splits, rank = static_cast<int>(ptx::cluster_rank());
        const int pitch = prenorm_part_pitch(params.n);
        const int tile_row = blockIdx.x / parts * params.tile_rows;
        for (int row = thread; row < params.tile_rows; row += kThreads) {
            const float square = tile_row + row < params.m ? shared.squares[row] : 0;
            *reinterpret_cast<float4*>(shared.part() + row * pitch) = float4{square, 0, 0, 0};
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(2, kThreads);

        const int slice = slice_rows(params) * pitch;
        if (thread < parts && slice_bytes(params, thread) > 0) {
            ptx::mbarrier_wait(shared.ready, 0);
            ptx::copy_to_remote(ptx::remote_address(shared.slices() + rank * slice, thread),
                                ptx::remote_address(&shared.received, thread), shared.part() + thread * slice,
                                slice_bytes(params, thread));
        }
        ptx::mbarrier_wait(shared.received, 0);
        const int first_row = tile_row + rank * slice_rows(params);
        const int last_row = min(tile_row + min((rank + 1) * slice_rows(params), params.tile_rows), params.m);
        const float* slices = shared.slices();
        for (int row = thread / 8; row < last_row - first_row; row += kThreads / 8) {
            for (int quad = thread % 8; 4 * quad < pitch; quad += 8) {
                float4 x[kPrenormMaxCluster], sum = {};
#pragma unroll
                for (int part = 0; part < kPrenormMaxCluster; ++part) {
                    if (part < parts) {
                        x[part] = *reinterpret_cast<const float4*>(slices + part * slice + row * pitch + 4 * quad);
                    }
                }
#pragma unroll
                for (int part = 0; part < kPrenormMaxCluster; ++part) {
                    if (part < parts) sum.x += x[part].x, sum.y += x[part].y, sum.z += x[part].z, sum.w += x[part].w;
                }
                if (quad == 0) {
                    params.output.sqr_sum[first_row + row] = sum.x;
                    continue;
                }
                const int col = 4 * quad - 4;
                float* d = params.output.d + (first_row + row) * params.output.d_row_stride + col;
                const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (col + e < params.n) d[e] = values[e];
                }
            }
        }
    }

    // ---- producer ----

    // The first block of this CTA's first tile. More of them delay the loads, behind which they are.
    __device__ __forceinline__ static void prefetch(const PrenormGemmParams& params) {
        const PrenormWork work = prenorm_work(params, kCols, blockIdx.x);
        const int k = work.k_block * kPrenormBlockK;
        if (work.num_k_blocks == 0) return;
        ptx::tma_prefetch_2d(params.a_map, k, work.row);
        if (params.n == 0) return;
        ptx::tma_prefetch_2d(params.b_map, k, work.col);
        ptx::tma_prefetch_2d(params.b_map, k + 32, work.col);
    }

    // With 200 KB of each SM on their way the last CTA ended 5 us after the first, with 96 KB 3 us.
    static constexpr int kMostInFlight =
        std::min(kStages - 1, std::max(3, 96 * 1024 / (kLayout.a_bytes() + kLayout.b_bytes())));

    __device__ __forceinline__ static void load(const PrenormGemmParams& params, Storage& shared, const PrenormWork& work,
                                                State& state, LoadLimit<kStages>& limit) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const uint32_t bytes = params.tile_rows * 128 + (params.n > 0 ? params.b_box_rows * 256 : 0);
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            const int k = (work.k_block + i) * kPrenormBlockK;
            const uint32_t s = state.stage_idx;
            ptx::Barrier& full = shared.full[s];
            limit.wait(shared.full);
            ptx::mbarrier_wait(shared.empty[s], state.phase ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, bytes);
            ptx::tma_load_2d(params.a_map, full, shared.a[s], k, work.row, kHint);
            if (params.n > 0) {
                ptx::tma_load_2d(params.b_map, full, shared.b[s], k, work.col, kHint);
                ptx::tma_load_2d(params.b_map, full, shared.b[s] + kCols * 128, k + 32, work.col, kHint);
            }
        }
    }

    // ---- product ----

    __device__ __forceinline__ static void multiply(const PrenormGemmParams& params, Storage& shared, const PrenormWork& work,
                                                    State& state, int group, int thread) {
        constexpr int kSteps = kPrenormBlockK / 16;
        const int col_group = group % kColGroups, first_row = group / kColGroups * kGroupRows;
        const int lane = thread % 32, quad = lane / 4, in_quad = lane % 4;
        // A warp's 16 rows of the instruction are 8 rows of B, twice. They are dealt to the quads so that the four rows
        // that half a warp reads at once lie in different banks.
        const int first_b_row = col_group * 32 + thread / 32 * 8;
        const int b_row = first_b_row + quad % 4 * 2 + quad / 4;
        const bool has_cols = work.col + first_b_row < params.n;  // of the warp

        // The next block of B is in registers before this one's instructions start, for loads from shared memory would wait
        // for them; it is split while they run.
        float2 raw[kSteps][2];
        const auto load_b = [&](uint32_t s) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int chunk = (step % 2 * 4 + half * 2 + in_quad / 2) ^ (b_row % 8);
                    raw[step][half] = *reinterpret_cast<const float2*>(
                        shared.b[s] + (step / 2 * kCols + b_row) * 128 + chunk * 16 + in_quad % 2 * 8);
                }
            }
        };
        const auto pin_rows = [](uint32_t (&rows)[kSteps][4]) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
#pragma unroll
                for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(rows[step][e])::"memory");
            }
        };
        const auto split_b = [&](uint32_t (&rows)[kSteps][4]) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                split_bf16(raw[step][0], rows[step][0], rows[step][1]);
                split_bf16(raw[step][1], rows[step][2], rows[step][3]);
            }
        };
        float accumulator[kGroupRows / 2] = {};
        uint32_t rows[kSteps][4] = {};
        if (work.num_k_blocks > 0) {
            ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
            if (has_cols) load_b(state.stage_idx), split_b(rows);
        }
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i) {
            const uint32_t s = state.stage_idx;
            const bool has_next = i + 1 < work.num_k_blocks;
            state.advance();
            if (has_next) {
                ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
                if (has_cols) load_b(state.stage_idx);
            }
            const Descriptor cols(shared.a[s] + first_row * 128);
            pin_registers(accumulator);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                wgmma_bf16_from_registers<kGroupRows>(rows[step], cols.at(step * (32 / 16)), accumulator, true);
            }
            wgmma_commit();
            uint32_t next_rows[kSteps][4] = {};
            if (has_next && has_cols) split_b(next_rows);
            pin_rows(next_rows);
            wgmma_wait<0>();
            pin_registers(accumulator);
            pin_rows(rows);
            release_stage(shared.empty[s]);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
#pragma unroll
                for (int e = 0; e < 4; ++e) rows[step][e] = next_rows[step][e];
            }
        }

        const int col = work.col + b_row;
        if (params.in_cluster) {
            ptx::cluster_wait();
            ptx::named_barrier_sync(1, kConsumers);
            if (group == 0 && thread < params.num_splits) ptx::mbarrier_arrive_remote(shared.ready, thread);
            if (!has_cols) return;
            const int pitch = prenorm_part_pitch(params.n);
            float* part = shared.part() + (first_row + 2 * in_quad) * pitch + 4 + col;
#pragma unroll
            for (int j = 0; j < kGroupRows / 8; ++j) {
                part[8 * j * pitch] = accumulator[4 * j] + accumulator[4 * j + 2];
                part[(8 * j + 1) * pitch] = accumulator[4 * j + 1] + accumulator[4 * j + 3];
            }
            return;
        }
        if (col >= params.n) return;
        const int rows_left = min(params.tile_rows, params.m - work.row);
        float* d = params.output.d + work.split * params.output.d_split_stride +
                   work.row * params.output.d_row_stride + col;
#pragma unroll
        for (int j = 0; j < kGroupRows / 8; ++j) {
            const int row = first_row + 8 * j + 2 * in_quad;
            if (row < rows_left) d[row * params.output.d_row_stride] = accumulator[4 * j] + accumulator[4 * j + 2];
            if (row + 1 < rows_left) {
                d[(row + 1) * params.output.d_row_stride] = accumulator[4 * j + 1] + accumulator[4 * j + 3];
            }
        }
    }
};

template <int kRows, int kColGroups>
__global__ void __launch_bounds__(PrenormLayout{kRows, kColGroups}.num_threads(), 1)
    sm90_prenorm_gemm(const __grid_constant__ PrenormGemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    PrenormGemmKernel<kRows, kColGroups>::run(params, shared_memory);
#endif
}

__global__ void __launch_bounds__(kPrenormReduceThreads)
    sm90_prenorm_reduce(const __grid_constant__ PrenormReduceParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    prenorm_reduce(params);
#endif
}

}  // namespace deep_gemm::sm90
