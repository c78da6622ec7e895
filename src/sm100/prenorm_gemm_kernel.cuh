// Hyper-connection pre-norm for Blackwell: in one pass over A, BF16 [M, K], and for B, FP32 [N, K] with few rows,
//   D[s, m, n] = sum_k A[m, k] B[n, k],  sqr_sum[s, m] = sum_k A[m, k]^2,  over the s-th of `num_splits` parts of K.
//
// As on SM90 (src/sm90/prenorm_gemm_kernel.cuh) the kernel streams A, and the product is the BF16 instruction's: an element
// of B is the sum of two BF16 values, its upper 16 bits and the rest. Here A's rows are the instruction's 128 rows, one or two
// instructions a tile, and its columns are the upper parts of 32 rows of B (or 64), then their rests. D is the sum of the two
// halves of a row of the accumulator.
//
// Warps 0 to 3 sum squares of A, eight threads for a row. Warps 4 to 7 split B, in place, and store D. Warp 8 issues TMA
// loads, warp 9 the tensor core's operations, one thread each. The grid is at most one CTA per SM; all walk the same tiles.
//
// shared memory of a stage   A  BF16 [kRows][64], rows of 128 bytes, 128-byte swizzle; rows from tile_rows on are zero
//                            B  FP32 [2][kCols][32], as A, one half of the 64 elements of K after the other; then
//                               BF16 [2][kCols][64], upper parts and rests, as A
//
// barrier           arrivals                          guards
// full[s]           1 (the TMA thread), and the bytes stage s is filled
// parts[s]          warps 4 to 7                      B has been split; behind a tile's end: D has been read, too
// empty[s]          warps 0 to 3, 1 (commit)          stage s may be overwritten
// accumulator_full  1 (commit)                        a tile's products are complete; not where it has none
// named 1           128 (warps 4 to 7)                B has been read, its parts may be written
#pragma once

#include "../device/pipeline.cuh"
#include "../device/prenorm_gemm.cuh"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "prenorm_gemm_traits.h"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

template <int kRows, int kColGroups>
class PrenormGemmKernel {
    static constexpr PrenormLayout kLayout{kRows, kColGroups};
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kCols = kLayout.cols();
    static constexpr int kParts = kRows / 128;
    static constexpr int kAccumulatorCols = kLayout.accumulator_cols();

    struct alignas(1024) Storage {
        uint8_t a[kStages][kLayout.a_bytes()];
        uint8_t b[kStages][kLayout.b_bytes()];
        ptx::Barrier full[kStages];
        ptx::Barrier parts[kStages];
        ptx::Barrier empty[kStages];
        ptx::Barrier accumulator_full;
        uint32_t tensor_memory;
    };
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    using State = PipelineState<kStages>;

    enum Warp { kLoadWarp = 8, kMultiplyWarp = 9 };

public:
    __device__ __forceinline__ static void run(const PrenormGemmParams& params, uint8_t* memory) {
        Storage& shared = *reinterpret_cast<Storage*>(memory);
        const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);

        if (warp == kLoadWarp && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.a_map);
            if (params.n > 0) ptx::prefetch_tensor_map(params.b_map);
            for (int s = 0; s < kStages; ++s) {
                ptx::mbarrier_init(shared.full[s], 1);
                ptx::mbarrier_init(shared.parts[s], 4);
                ptx::mbarrier_init(shared.empty[s], 4 + 1);
            }
            ptx::mbarrier_init(shared.accumulator_full, 1);
            ptx::fence_mbarrier_init();
        }
        if (warp == kMultiplyWarp) {
            tensor_memory_allocate<1>(&shared.tensor_memory, kLayout.tensor_columns());
            fence_before_sync();
        }
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
        fence_after_sync();
        const uint32_t tensor_memory = shared.tensor_memory;
        ptx::grid_dependency_launch();
        ptx::grid_dependency_wait();

        State state;
        if (warp < 4) {
            for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                sum_prenorm_squares<kRows>(params, shared, work, state, threadIdx.x);
            });
        } else if (warp < kLoadWarp) {
            uint32_t phase = 0;
            if (params.n > 0) {
                for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                    split_b(params, shared, work, state, threadIdx.x - 128);
                    if (work.num_k_blocks > 0) {
                        ptx::mbarrier_wait(shared.accumulator_full, phase);
                        phase ^= 1;
                    }
                    store(params, work, tensor_memory, warp - 4);
                });
            }
        } else if (warp == kLoadWarp) {
            if (ptx::elect_one()) {
                for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) { load(params, shared, work, state); });
            }
        } else if (ptx::elect_one()) {
            for_each_prenorm_tile(params, kCols, [&](const PrenormWork& work) {
                multiply(params, shared, work, state, tensor_memory);
            });
        }

        fence_before_sync();
        __syncthreads();
        if (warp == kMultiplyWarp) tensor_memory_free<1>(tensor_memory, kLayout.tensor_columns());
    }

private:
    // ---- warp 8 ----

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

    // ---- warps 4 to 7 ----

    // A thread has 16 neighbours along K of a row of B, or of two. Of the two halves of K, which lie in the same banks, one
    // is read and written in another order.
    __device__ __forceinline__ static void split_b(const PrenormGemmParams& params, Storage& shared,
                                                   const PrenormWork& work, State& state, int thread) {
        const int quarter = thread % 4, half = quarter / 2;
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            uint8_t* b = shared.b[state.stage_idx];
            ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
            float4 raw[kColGroups][4] = {};
#pragma unroll
            for (int group = 0; group < kColGroups; ++group) {
                const int row = group * 32 + thread / 4;
                if (row >= params.b_box_rows) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int chunk = (quarter % 2 * 4 + (j ^ (half * 2))) ^ (row % 8);
                    raw[group][j] = *reinterpret_cast<const float4*>(b + (half * kCols + row) * 128 + chunk * 16);
                }
            }
            ptx::named_barrier_sync(1, 128);
#pragma unroll
            for (int group = 0; group < kColGroups; ++group) {
                const int row = group * 32 + thread / 4;
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const float4 &x = raw[group][2 * pair], &y = raw[group][2 * pair + 1];
                    uint4 upper, rest;
                    split_bf16(make_float2(x.x, x.y), upper.x, rest.x);
                    split_bf16(make_float2(x.z, x.w), upper.y, rest.y);
                    split_bf16(make_float2(y.x, y.y), upper.z, rest.z);
                    split_bf16(make_float2(y.z, y.w), upper.w, rest.w);
                    const int chunk = (quarter * 2 + (pair ^ half)) ^ (row % 8);
                    *reinterpret_cast<uint4*>(b + row * 128 + chunk * 16) = upper;
                    *reinterpret_cast<uint4*>(b + (kCols + row) * 128 + chunk * 16) = rest;
                }
            }
            ptx::fence_async_shared();
            release_stage(shared.parts[state.stage_idx]);
        }
    }

    __device__ __forceinline__ static void store(const PrenormGemmParams& params, const PrenormWork& work,
                                                 uint32_t tensor_memory, int warp) {
        fence_after_sync();
        const int rows_left = min(params.tile_rows, params.m - work.row);
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
            const int row = part * 128 + warp * 32 + threadIdx.x % 32;
            float* d = params.output.d + work.split * params.output.d_split_stride +
                       (work.row + row) * params.output.d_row_stride + work.col;
#pragma unroll 1
            for (int group = 0; group < kColGroups; ++group) {
                uint32_t upper[32] = {}, rest[32] = {};
                if (work.num_k_blocks > 0) {
                    const uint32_t address = tensor_memory + (warp * 32 << 16) + part * kAccumulatorCols + group * 32;
                    load_columns(address, upper);
                    load_columns(address + kCols, rest);
                    load_wait(upper, rest);
                }
                if (row >= rows_left) continue;
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    const int col = group * 32 + i;
                    if (work.col + col < params.n) d[col] = __uint_as_float(upper[i]) + __uint_as_float(rest[i]);
                }
            }
        }
        fence_before_sync();
    }

    // ---- warp 9 ----

    __device__ __forceinline__ static void multiply(const PrenormGemmParams& params, Storage& shared,
                                                    const PrenormWork& work, State& state, uint32_t tensor_memory) {
        constexpr uint32_t kInstruction =
            1u << 4 /* FP32 */ | 1u << 7 | 1u << 10 /* BF16 */ | uint32_t{kAccumulatorCols} >> 3 << 17 | 128u >> 4 << 24;
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            if (kColGroups == 1 && params.n == 0) {
                ptx::mbarrier_arrive(shared.empty[s]);
                continue;
            }
            ptx::mbarrier_wait(shared.parts[s], state.phase);
            fence_after_sync();
            const uint64_t rows = k_major_descriptor(shared.a[s], 128), cols = k_major_descriptor(shared.b[s], 128);
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
                for (int step = 0; step < kPrenormBlockK / 16; ++step) {
                    multiply_bf16<1>(tensor_memory + part * kAccumulatorCols, rows + part * (128 * 128 / 16) + step * 2,
                                     cols + step * 2, kInstruction, i > 0 || step > 0);
                }
            }
            commit<1>(shared.empty[s]);
        }
        // The next tile's B is not split before D has been read, so this waits for nothing.
        if (params.n > 0 && work.num_k_blocks > 0) commit<1>(shared.accumulator_full);
    }
};

template <int kRows, int kColGroups>
__global__ void __launch_bounds__(PrenormLayout{kRows, kColGroups}.num_threads(), 1)
    sm100_prenorm_gemm(const __grid_constant__ PrenormGemmParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    PrenormGemmKernel<kRows, kColGroups>::run(params, shared_memory);
#endif
}

__global__ void __launch_bounds__(kPrenormReduceThreads)
    sm100_prenorm_reduce(const __grid_constant__ PrenormReduceParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    prenorm_reduce(params);
#endif
}

}  // namespace deep_gemm::sm100
