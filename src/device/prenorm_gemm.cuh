// What the kernels of tf32_hc_prenorm_gemm have in common: the walk over tiles, squares of A, B in two BF16 parts, and the sum
// of parts of K.
#pragma once

#include <cuda_bf16.h>

#include <cmath>

#include "prenorm_gemm_params.h"
#include "ptx_mbarrier.cuh"

namespace deep_gemm {

// A tile of D, for a part of K.
struct PrenormWork {
    int row;  // first of A
    int col;  // first of D
    int split;
    int k_block;
    int num_k_blocks;
};

// Column tiles side by side, so that they find A in L2; then row tiles, which read the same part of B. In clusters the parts
// of K come first.
__device__ __forceinline__ PrenormWork prenorm_work(const PrenormGemmParams& params, int tile_cols, int tile) {
    const int outer = params.in_cluster ? params.num_splits : params.num_col_tiles;
    const int row_tile = tile / outer % params.num_row_tiles;
    PrenormWork work;
    work.split = params.in_cluster ? tile % outer : tile / outer / params.num_row_tiles;
    work.row = row_tile * params.tile_rows;
    work.col = params.in_cluster ? 0 : tile % outer * tile_cols;
    const int64_t blocks = params.num_k_blocks;
    work.k_block = static_cast<int>(blocks * work.split / params.num_splits);
    work.num_k_blocks = static_cast<int>(blocks * (work.split + 1) / params.num_splits) - work.k_block;
    return work;
}

template <class Visit>
__device__ __forceinline__ void for_each_prenorm_tile(const PrenormGemmParams& params, int tile_cols, Visit&& visit) {
#pragma unroll 1
    for (int tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        visit(prenorm_work(params, tile_cols, tile));
    }
}

// This warp is done with a stage.
__device__ __forceinline__ void release_stage(ptx::Barrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
}

// Sums of squares of a tile's rows in the stages of `shared`, by 128 threads: eight for a row, each with 16 bytes of every
// block, at whatever place the swizzle has put them. Handed to store(row of the tile, sum).
template <int kRows, class Storage, class State, class Store>
__device__ __forceinline__ void sum_prenorm_squares(const PrenormGemmParams& params, Storage& shared,
                                                    const PrenormWork& work, State& state, int thread, Store&& store) {
    constexpr int kRowsPerThread = kRows / 16;
    float sums[kRowsPerThread][2] = {};  // short chains, small rounding errors
#pragma unroll 1
    for (int i = 0; i < work.num_k_blocks; ++i, state.advance()) {
        ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
        const uint4* chunks = reinterpret_cast<const uint4*>(shared.a[state.stage_idx]) + thread;
#pragma unroll
        for (int r = 0; r < kRowsPerThread && work.col == 0; ++r) {
            const uint4 chunk = chunks[128 * r];
            const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float even = __uint_as_float(words[w] << 16);
                const float odd = __uint_as_float(words[w] & 0xffff0000u);
                sums[r][0] = fmaf(even, even, sums[r][0]);
                sums[r][1] = fmaf(odd, odd, sums[r][1]);
            }
        }
        release_stage(shared.empty[state.stage_idx]);
    }
    const int rows = work.col == 0 ? min(params.tile_rows, params.m - work.row) : 0;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
        float sum = sums[r][0] + sums[r][1];
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        const int row = thread / 8 + 16 * r;
        if (thread % 8 == 0 && row < rows) store(row, sum);
    }
}

template <int kRows, class Storage, class State>
__device__ __forceinline__ void sum_prenorm_squares(const PrenormGemmParams& params, Storage& shared,
                                                    const PrenormWork& work, State& state, int thread) {
    sum_prenorm_squares<kRows>(params, shared, work, state, thread, [&](int row, float sum) {
        params.output.sqr_sum[work.split * params.output.sqr_split_stride + work.row + row] = sum;
    });
}

// What a BF16 of x's upper 16 bits leaves of x. Infinity leaves itself, and what has nothing left leaves a trace, so
// that an infinite or NaN element of A meets no zero that x is not.
__device__ __forceinline__ float rest(float x) {
    const float upper = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
    return fabsf(x) == INFINITY ? x : fmaf(x, 0x1p-60f, x - upper);
}

// BF16 pairs of the upper parts and of the rests of two neighbours along K.
__device__ __forceinline__ void split_bf16(float2 x, uint32_t& upper, uint32_t& lower) {
    upper = __byte_perm(__float_as_uint(x.x), __float_as_uint(x.y), 0x7632);
    const __nv_bfloat162 rests = __floats2bfloat162_rn(rest(x.x), rest(x.y));
    lower = reinterpret_cast<const uint32_t&>(rests);
}

// A CTA has 128 elements, four a thread, and each of its warps every eighth part: then the warps' sums in their order.
__device__ __forceinline__ void prenorm_reduce(const PrenormReduceParams& params) {
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
}

}  // namespace deep_gemm
