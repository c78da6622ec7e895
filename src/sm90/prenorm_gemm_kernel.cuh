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
// shared memory of a stage   A  BF16 [kRows][64], rows of 128 bytes, 128-byte swizzle; rows from tile_rows on are zero
//                            B  FP32 [2][32 col groups][32], as A, one half of the 64 elements of K after the other
//
// barrier    arrivals                          guards
// full[s]    1 (the TMA thread), and the bytes stage s is filled
// empty[s]   consumer warps                    stage s may be overwritten
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "../device/pipeline.cuh"
#include "../device/prenorm_gemm_params.h"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "prenorm_gemm_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// accumulator += rows * cols^T: 64 rows of BF16 in registers, kN columns K-major in shared memory, 16 elements of K.
template <int kN>
struct WgmmaRegisterShape;

#define DG_WGMMA_REGISTER_SHAPE(N)                                                                              \
    template <>                                                                                                 \
    struct WgmmaRegisterShape<N> {                                                                              \
        using Instruction =                                                                                     \
            cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    };
DG_WGMMA_REGISTER_SHAPE(64)
DG_WGMMA_REGISTER_SHAPE(128)
DG_WGMMA_REGISTER_SHAPE(256)
#undef DG_WGMMA_REGISTER_SHAPE

template <int kN, size_t... kIndex>
__device__ __forceinline__ void wgmma_registers(const uint32_t (&rows)[4], uint64_t cols, float (&accumulator)[kN / 2],
                                                std::index_sequence<kIndex...>) {
    WgmmaRegisterShape<kN>::Instruction::fma(rows[0], rows[1], rows[2], rows[3], cols, accumulator[kIndex]...,
                                             cute::SM90::GMMA::ScaleOut::One);
}

template <int kRows, int kColGroups>
class PrenormGemmKernel {
    static constexpr PrenormLayout kLayout{kRows, kColGroups};
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kCols = kLayout.cols();
    static constexpr bool kSetRegisters = kRows == 256;  // 128 accumulators a thread

    struct alignas(1024) Storage {
        uint8_t a[kStages][kLayout.a_bytes()];
        uint8_t b[kStages][kLayout.b_bytes()];
        ptx::Barrier full[kStages];
        ptx::Barrier empty[kStages];
    };
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    using State = PipelineState<kStages>;

    // A tile of D, for a part of K.
    struct Work {
        int row;  // first of A
        int col;  // first of D
        int split;
        int k_block;
        int num_k_blocks;
    };

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
            for_each_tile(params, [&](const Work& work) { sum_squares(params, shared, work, state, threadIdx.x); });
        } else if (warpgroup <= kColGroups) {
            if constexpr (kSetRegisters) grow_registers<232>();
            State state;
            for_each_tile(params, [&](const Work& work) {
                multiply(params, shared, work, state, warpgroup - 1, threadIdx.x % 128);
            });
        } else {
            if constexpr (kSetRegisters) shrink_registers<40>();
            if (threadIdx.x == kLayout.num_threads() - 128) {
                State state;
                for_each_tile(params, [&](const Work& work) { load(params, shared, work, state); });
            }
        }
    }

private:
    // Column tiles side by side, so that they find A in L2; then row tiles, which read the same part of B.
    template <class Visit>
    __device__ __forceinline__ static void for_each_tile(const PrenormGemmParams& params, Visit&& visit) {
#pragma unroll 1
        for (int tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
            const int row_tile = tile / params.num_col_tiles % params.num_row_tiles;
            Work work;
            work.split = tile / params.num_col_tiles / params.num_row_tiles;
            work.row = row_tile * params.tile_rows;
            work.col = tile % params.num_col_tiles * kCols;
            const int64_t blocks = params.num_k_blocks;
            work.k_block = static_cast<int>(blocks * work.split / params.num_splits);
            work.num_k_blocks = static_cast<int>(blocks * (work.split + 1) / params.num_splits) - work.k_block;
            visit(work);
        }
    }

    // ---- producer ----

    __device__ __forceinline__ static void load(const PrenormGemmParams& params, Storage& shared, const Work& work,
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

    __device__ __forceinline__ static void release(ptx::Barrier& empty) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
    }

    // ---- squares ----

    __device__ __forceinline__ static void sum_squares(const PrenormGemmParams& params, Storage& shared,
                                                       const Work& work, State& state, int thread) {
        constexpr int kThreadsPerRow = kRows < 128 ? 128 / kRows : 1;
        constexpr int kRowsPerThread = kRows < 128 ? 1 : kRows / 128;
        constexpr int kChunks = 8 / kThreadsPerRow;  // of 16 bytes, in a row of a stage
        const int first_row = thread / kThreadsPerRow;
        const int first_chunk = thread % kThreadsPerRow * kChunks;
        float sums[kRowsPerThread][8] = {};  // by position in a chunk: short chains, small rounding errors
#pragma unroll 1
        for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
            ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
#pragma unroll
            for (int r = 0; r < kRowsPerThread && work.col == 0; ++r) {
                const int row = first_row + 128 * r;
                const uint4* chunks = reinterpret_cast<const uint4*>(shared.a[state.stage_idx] + row * 128);
#pragma unroll
                for (int j = 0; j < kChunks; ++j) {
                    const uint4 chunk = chunks[(first_chunk + j) ^ (row % 8)];
                    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        const float even = __uint_as_float(words[w] << 16);
                        const float odd = __uint_as_float(words[w] & 0xffff0000u);
                        sums[r][2 * w] = fmaf(even, even, sums[r][2 * w]);
                        sums[r][2 * w + 1] = fmaf(odd, odd, sums[r][2 * w + 1]);
                    }
                }
            }
            release(shared.empty[state.stage_idx]);
        }
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
            float (&s)[8] = sums[r];
            float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
            if constexpr (kThreadsPerRow == 2) sum += __shfl_xor_sync(0xffffffff, sum, 1);
            const int row = first_row + 128 * r;
            const bool is_mine = work.col == 0 && thread % kThreadsPerRow == 0;
            if (is_mine && row < min(params.tile_rows, params.m - work.row)) {
                params.output.sqr_sum[work.split * params.output.sqr_split_stride + work.row + row] = sum;
            }
        }
    }

    // ---- product ----

    // What a BF16 of x's upper 16 bits leaves of x. Infinity leaves itself, and what has nothing left leaves a trace, so
    // that an infinite or NaN element of A meets no zero that x is not.
    __device__ __forceinline__ static float rest(float x) {
        const float upper = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
        return fabsf(x) == INFINITY ? x : fmaf(x, 0x1p-60f, x - upper);
    }

    // BF16 pairs of the upper parts and of the rests of two neighbours along K.
    __device__ __forceinline__ static void split(float2 x, uint32_t& upper, uint32_t& lower) {
        upper = __byte_perm(__float_as_uint(x.x), __float_as_uint(x.y), 0x7632);
        const __nv_bfloat162 rests = __floats2bfloat162_rn(rest(x.x), rest(x.y));
        lower = reinterpret_cast<const uint32_t&>(rests);
    }

    __device__ __forceinline__ static void multiply(const PrenormGemmParams& params, Storage& shared, const Work& work,
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
                    split(raw[step][0], rows[step][0], rows[step][1]);
                    split(raw[step][1], rows[step][2], rows[step][3]);
                }
            }
            const Descriptor cols(shared.a[s]);
            pin_registers(accumulator);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                wgmma_registers<kRows>(rows[step], cols.at(step * (32 / 16)), accumulator,
                                       std::make_index_sequence<kRows / 2>());
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin_registers(accumulator);
            release(shared.empty[s]);
        }

        const int col = work.col + b_row;
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

// A CTA has 128 elements, four a thread, and each of its warps every eighth part: then the warps' sums in their order.
__global__ void __launch_bounds__(kPrenormReduceThreads)
    sm90_prenorm_reduce(const __grid_constant__ PrenormReduceParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kWarps = kPrenormReduceThreads / 32;
    __shared__ float4 sums[kWarps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = blockIdx.x * kPrenormReduceElements + lane * 4;
    const uint32_t num_products = static_cast<uint32_t>(params.m) * params.n, count = num_products + params.m;
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();

    float4 sum = {};
    if (first < count) {
#pragma unroll 4
        for (int part = warp; part < params.num_parts; part += kWarps) {
            const float4 x = *reinterpret_cast<const float4*>(params.parts + part * params.part_stride + first);
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int other = 1; other < kWarps; ++other) {
        const float4 x = sums[other][lane];
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t at = first + i;
        if (at < num_products) {
            params.output.d[at / params.n * params.output.d_row_stride + at % params.n] = values[i];
        } else if (at < count) {
            params.output.sqr_sum[at - num_products] = values[i];
        }
    }
#endif
}

}  // namespace deep_gemm::sm90
