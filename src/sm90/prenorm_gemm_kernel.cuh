// Hyper-connection pre-norm for Hopper: in one pass over A, BF16 [M, K], and for B, FP32 [N, K] with few rows,
//   D[s, m, n] = sum_k A[m, k] B[n, k],  sqr_sum[s, m] = sum_k A[m, k]^2,  over the s-th of `num_splits` parts of K.
//
// The kernel streams A, so what counts is bytes in flight and a tile of many rows: each CTA reads its B again, from L2,
// which for N = 24 adds 19 % to 256 rows of A and 75 % to 64.
//
// The product is the BF16 instruction's, at more than the precision of TF32. A is BF16 already and goes from shared memory
// into the tensor core as TMA wrote it. An element b of B is the sum of two BF16 values, b's upper 16 bits and the rest,
// together 16 bits of mantissa (TF32 has 11). So the roles of rows and columns are exchanged: the instruction's 64 rows are
// 32 rows of B, the upper part of each 8 rows above the lower one, in registers; its N is `kRows` rows of A. A thread's
// accumulators then hold both parts of the same element of D.
//
// Warpgroup 0 sums squares of A, a thread for one or two rows (or two threads for one). Each further warpgroup multiplies
// A by 32 rows of B. The last one produces: a thread issues the TMA loads. The grid is at most one CTA per SM; the roles
// walk the same tiles and meet at mbarriers only.
//
// Where few tiles of rows leave SMs idle, K is split. The CTAs of a cluster have the parts of one tile: each puts its part of D
// where its stages were, and adds up a slice of all of them, in the order of the parts. Where the parts are more than a cluster
// has CTAs, they go to memory, and another kernel adds them up.
//
// shared memory of a stage   A  BF16 [kRows][64], rows of 128 bytes, 128-byte swizzle; rows from tile_rows on are zero
//                            B  FP32 [2][32 col groups][32], as A, one half of the 64 elements of K after the other
//
// barrier    arrivals                          guards
// full[s]    1 (the TMA thread), and the bytes stage s is filled
// empty[s]   consumer warps                    stage s may be overwritten
// named 1    consumers                         (clusters) no stage is read any more
// cluster    all threads of the cluster        (clusters) the parts are there; then: they have been read. Who has ended has
//                                              arrived: the producer, and the squares' threads the second time
#pragma once

#include "../device/pipeline.cuh"
#include "../device/prenorm_gemm.cuh"
#include "../device/prenorm_gemm_params.h"
#include "../device/ptx_cluster.cuh"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "prenorm_gemm_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

template <int kRows, int kColGroups>
class PrenormGemmKernel {
    static constexpr PrenormLayout kLayout{kRows, kColGroups};
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kCols = kLayout.cols();
    static constexpr bool kSetRegisters = kRows == 256;  // 128 accumulators a thread

    struct alignas(1024) Storage {
        uint8_t a[kStages][kLayout.a_bytes()];
        uint8_t b[kStages][kLayout.b_bytes()];
        alignas(16) float squares[kRows];  // of this CTA's part of K
        ptx::Barrier full[kStages];
        ptx::Barrier empty[kStages];

        __device__ float* part() { return reinterpret_cast<float*>(a); }  // of D, [tile_rows][part_pitch(n)]
    };
    static_assert(kStages * kLayout.a_bytes() >= kRows * (kCols + 4) * 4);
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    using State = PipelineState<kStages>;

public:
    __device__ __forceinline__ static void run(const PrenormGemmParams& params, uint8_t* memory) {
        Storage& shared = *reinterpret_cast<Storage*>(memory);
        const int warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 128, 0);

        if (threadIdx.x == 0) {
            ptx::prefetch_tensor_map(params.a_map);
            if (params.n > 0) ptx::prefetch_tensor_map(params.b_map);
            const int consumer_warps = 4 * (1 + kColGroups);
            for (int s = 0; s < kStages; ++s) {
                ptx::mbarrier_init(shared.full[s], 1);
                ptx::mbarrier_init(shared.empty[s], consumer_warps);
            }
            ptx::fence_mbarrier_init();
        }
        if (params.in_cluster && threadIdx.x < kRows) shared.squares[threadIdx.x] = 0;  // read in units of four
        // Rows that no load writes go through the tensor core like the others.
        if (params.tile_rows < kRows) {
            const int first = params.tile_rows * 8, count = kRows * 8 - first;  // in units of 16 bytes
            for (int s = 0; s < kStages; ++s) {
                uint4* rows = reinterpret_cast<uint4*>(shared.a[s]) + first;
                for (int i = threadIdx.x; i < count; i += kLayout.num_threads()) rows[i] = uint4{};
            }
            ptx::fence_async_shared();
        }
        __syncthreads();
        ptx::grid_dependency_launch();
        ptx::grid_dependency_wait();

        if (warpgroup == 0) {
            if constexpr (kSetRegisters) shrink_registers<72>();
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
            if (params.in_cluster) ptx::cluster_arrive();
        } else if (warpgroup <= kColGroups) {
            if constexpr (kSetRegisters) grow_registers<232>();
            State state;
            for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                multiply(params, shared, work, state, warpgroup - 1, threadIdx.x % 128);
            });
            if (params.in_cluster) {
                ptx::cluster_sync();
                add_parts(params, shared, threadIdx.x - 128);
                ptx::cluster_sync();
            }
        } else {
            if constexpr (kSetRegisters) shrink_registers<40>();
            if (threadIdx.x == kLayout.num_threads() - 128) {
                State state;
                for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) { load(params, shared, work, state); });
            }
        }
    }

private:
    static constexpr int kConsumers = 128 * (1 + kColGroups);

    // ---- clusters ----

    // From one row of a part to the next: the four rows and eight columns that a warp writes at once lie in different banks.
    __device__ __forceinline__ static int part_pitch(int n) { return n + (12 - n % 8) % 8; }

    // This CTA's slice of the sums of the cluster's parts, by the threads of the product.
    __device__ __forceinline__ static void add_parts(const PrenormGemmParams& params, Storage& shared, int thread) {
        constexpr int kThreads = 128 * kColGroups;
        const int parts = params.num_splits, rank = static_cast<int>(ptx::cluster_rank());
        const int first_row = blockIdx.x / parts * params.tile_rows;
        const int rows = min(params.tile_rows, params.m - first_row);
        const auto sum_at = [&](const float* local) {
            float4 x[kPrenormMaxCluster], sum = {};
#pragma unroll
            for (int part = 0; part < kPrenormMaxCluster; ++part) {
                if (part < parts) x[part] = ptx::load_remote_v4(ptx::remote_address(local, part));
            }
#pragma unroll
            for (int part = 0; part < kPrenormMaxCluster; ++part) {
                if (part >= parts) continue;
                sum.x += x[part].x, sum.y += x[part].y, sum.z += x[part].z, sum.w += x[part].w;
            }
            return sum;
        };
        float* d = params.output.d + static_cast<int64_t>(first_row) * params.output.d_row_stride;
        // A slice is whole rows, a multiple of 4 of them.
        const int slice = (rows + 4 * parts - 1) / (4 * parts) * 4;
        const int begin = rank * slice, end = min(rows, begin + slice);
        const int quads_of_row = (params.n + 3) / 4;
        for (int i = begin * quads_of_row + thread; i < end * quads_of_row; i += kThreads) {
            const int row = i / quads_of_row, col = i % quads_of_row * 4;
            const float4 sum = sum_at(shared.part() + row * part_pitch(params.n) + col);
            const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (col + e < params.n) d[row * params.output.d_row_stride + col + e] = values[e];
            }
        }
        for (int i = begin / 4 + thread; 4 * i < end; i += kThreads) {
            const float4 sum = sum_at(shared.squares + 4 * i);
            const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (4 * i + e < end) params.output.sqr_sum[first_row + 4 * i + e] = values[e];
            }
        }
    }

    // ---- producer ----

    __device__ __forceinline__ static void load(const PrenormGemmParams& params, Storage& shared, const PrenormWork& work,
                                                State& state) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const uint32_t bytes = params.tile_rows * 128 + (params.n > 0 ? params.b_box_rows * 256 : 0);
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            const int k = (work.k_block + i) * kPrenormBlockK;
            ptx::Barrier& full = shared.full[state.stage_idx];
            uint8_t* b = shared.b[state.stage_idx];
            ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, bytes);
            ptx::tma_load_2d(params.a_map, full, shared.a[state.stage_idx], k, work.row, kHint);
            if (params.n > 0) {
                ptx::tma_load_2d(params.b_map, full, b, k, work.col, kHint);
                ptx::tma_load_2d(params.b_map, full, b + kCols * 128, k + 32, work.col, kHint);
            }
        }
    }

    // ---- product ----

    __device__ __forceinline__ static void multiply(const PrenormGemmParams& params, Storage& shared, const PrenormWork& work,
                                                    State& state, int col_group, int thread) {
        constexpr int kSteps = kPrenormBlockK / 16;
        const int lane = thread % 32, quad = lane / 4, in_quad = lane % 4;
        // A warp's 16 rows of the instruction are 8 rows of B, twice. They are dealt to the quads so that the four rows
        // that half a warp reads at once lie in different banks.
        const int first_b_row = col_group * 32 + thread / 32 * 8;
        const int b_row = first_b_row + quad % 4 * 2 + quad / 4;
        const bool has_cols = work.col + first_b_row < params.n;  // of the warp

        float accumulator[kRows / 2] = {};
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            uint32_t rows[kSteps][4] = {};
            if (has_cols) {
                float2 raw[kSteps][2];
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int chunk = (step % 2 * 4 + half * 2 + in_quad / 2) ^ (b_row % 8);
                        raw[step][half] = *reinterpret_cast<const float2*>(
                            shared.b[s] + (step / 2 * kCols + b_row) * 128 + chunk * 16 + in_quad % 2 * 8);
                    }
                }
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    split_bf16(raw[step][0], rows[step][0], rows[step][1]);
                    split_bf16(raw[step][1], rows[step][2], rows[step][3]);
                }
            }
            const Descriptor cols(shared.a[s]);
            pin_registers(accumulator);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                wgmma_bf16_from_registers<kRows>(rows[step], cols.at(step * (32 / 16)), accumulator, true);
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin_registers(accumulator);
            release_stage(shared.empty[s]);
        }

        const int col = work.col + b_row;
        if (params.in_cluster) {
            ptx::named_barrier_sync(1, kConsumers);
            if (col >= (params.n + 3) / 4 * 4) return;
            const int pitch = part_pitch(params.n);
            float* part = shared.part() + 2 * in_quad * pitch + col;
#pragma unroll
            for (int j = 0; j < kRows / 8; ++j) {
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
        for (int j = 0; j < kRows / 8; ++j) {
            const int row = 8 * j + 2 * in_quad;
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
