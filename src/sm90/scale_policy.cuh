// Scale factors on their way to the promotion.
//
// A scale per row (or column) of a tile travels with the operands: a box of an MN-major matrix, loaded by TMA into the
// same stage. Loads by other means cost more than they look: registers filled by the consumers, two K blocks ahead, took
// 13 % of a large product's time on an H200, since a load waits behind all the TMA traffic that is in flight.
// Scales per block of 128 are so few that one warp loads those of kScaleChunk K blocks at once, whatever their strides.
#pragma once

#include "../device/gemm_params.h"
#include "../device/tile_scheduler.cuh"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

// First row, within the tile, of a consumer warpgroup's 64-row part.
template <class Traits>
__device__ __forceinline__ int part_row(int part, int warpgroup) {
    constexpr int kWarpgroups = Traits::kLayout.row_warpgroups();
    return (part * kWarpgroups + warpgroup) * 64;
}

// Loads the scales of blocks `block`, `block` + 1, ... for kScaleChunk K blocks from `k_block` on, a lane for each K block.
// They begin `offset` elements into the source. Blocks past the end repeat the last one: their products are never stored.
template <int kBlocks>
__device__ __forceinline__ void load_scale_chunk(const ScaleSource& source, int64_t offset, int block, int k_block, int last_k_block,
                                                 float (&chunk)[kBlocks][kScaleChunk]) {
    static_assert(kScaleChunk == 32, "a lane for each K block");
    const int lane = threadIdx.x % 32;
    const int k = min(k_block + lane, last_k_block);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
        chunk[i][lane] = source.data[offset + min(block + i, source.count - 1) * source.stride_mn + k * source.stride_k];
    }
}

// The promotion of one 64-row accumulator: total += accumulator * row scale * column scale, in FP32.
// Thread layout of the accumulator: wgmma.cuh.
template <class Traits>
struct Promotion {
    static constexpr auto kLayout = Traits::kLayout;
    static constexpr int kCols = kLayout.block_cols();

    // A scale for each column; `col(i)` gives that of the thread's i-th: two of every eight.
    template <class Col>
    __device__ __forceinline__ static void by_column(float upper_row, float lower_row, Col&& col,
                                                     const float (&accumulator)[kCols / 2], float (&total)[kCols / 2]) {
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
            const float2 scale = col(j);
            total[4 * j + 0] += accumulator[4 * j + 0] * (upper_row * scale.x);
            total[4 * j + 1] += accumulator[4 * j + 1] * (upper_row * scale.y);
            total[4 * j + 2] += accumulator[4 * j + 2] * (lower_row * scale.x);
            total[4 * j + 3] += accumulator[4 * j + 3] * (lower_row * scale.y);
        }
    }

    // A scale for each block of 128 columns; `col_offset`: the tile's first column modulo 128.
    template <int kBlocks>
    __device__ __forceinline__ static void by_block(float upper_row, float lower_row, const float (&blocks)[kBlocks],
                                                    int col_offset, const float (&accumulator)[kCols / 2],
                                                    float (&total)[kCols / 2]) {
        constexpr int kGranule = kLayout.block_granule();
        float upper[kBlocks], lower[kBlocks];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            upper[block] = upper_row * blocks[block];
            lower[block] = lower_row * blocks[block];
        }
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
            // Columns of a granule lie in one block of 128: the lower or the upper of at most two candidates.
            const int granule_start = j * 8 / kGranule * kGranule;
            const int low = granule_start / 128;
            const int high = (granule_start + 128 - kGranule) / 128;
            const bool in_low = low == high || col_offset + granule_start < high * 128;
            const float upper_scale = in_low ? upper[low] : upper[high];
            const float lower_scale = in_low ? lower[low] : lower[high];
            total[4 * j + 0] += accumulator[4 * j + 0] * upper_scale;
            total[4 * j + 1] += accumulator[4 * j + 1] * upper_scale;
            total[4 * j + 2] += accumulator[4 * j + 2] * lower_scale;
            total[4 * j + 3] += accumulator[4 * j + 3] * lower_scale;
        }
    }
};

}  // namespace deep_gemm::sm90
