// Scale factors: from global memory of any layout into the ring, and from there into the promotion.
#pragma once

#include "../device/gemm_params.h"
#include "../device/ptx_memory.cuh"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

// Feeds one operand's scale factors of a tile: loads into registers, several K blocks ahead, and from there into the
// stages. Any strides and granularities cost the same instructions. All lanes of one warp.
template <int kCount, int kGroups>
class ScaleLoader {
public:
    static constexpr int kLoads = (kCount + 31) / 32;  // of a lane, for one K group
    // K blocks in flight: a load takes about as long as one to two K blocks of a full tile, and this warpgroup has only 40
    // registers a thread.
    static constexpr int kDepth = kLoads * kGroups >= 8 ? 1 : kLoads >= 4 ? 3 : 4;

    // `first`: first entry of the tile along MN. Past the end the last entry is read again: its products are never stored.
    __device__ __forceinline__ ScaleLoader(const ScaleSource& source, int first, int k_group)
        : source_(source), k_group_(k_group) {
        k_groups_ = source.data + k_group * source.stride_k;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int entry = min(first + i * 32 + static_cast<int>(threadIdx.x % 32), source.count - 1);
            offsets_[i] = (entry >> source.shift) * static_cast<int>(source.stride_mn);
        }
    }

    // Starts to load the next K block's scales.
    template <int kAhead>
    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            // Beyond the last group of K the products are zero, and zero they must stay.
            const bool exists = kGroups == 1 || k_group_ < source_.k_groups;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) values_[kAhead][group][i] = exists ? k_groups_[offsets_[i]] : 0;
            k_groups_ += source_.stride_k;
            ++k_group_;
        }
    }

    // Writes what fetch<kAhead> loaded into `slot`, [kGroups][slot_stride].
    template <int kAhead>
    __device__ __forceinline__ void store(float* slot, int slot_stride) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int index = i * 32 + threadIdx.x % 32;
                if (kCount % 32 == 0 || index < kCount) slot[group * slot_stride + index] = values_[kAhead][group][i];
            }
        }
    }

private:
    const ScaleSource& source_;
    const float* k_groups_;
    int k_group_;
    int offsets_[kLoads];
    float values_[kDepth][kGroups][kLoads];
};

// The promotion of one 64-row accumulator: total += accumulator * row scale * column scale, in FP32.
// Thread layout of the accumulator: wgmma.cuh.
template <class Traits>
class Promotion {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kCols = kLayout.row.block_cols;
    static constexpr bool kColVector = kLayout.col_scales_are_vector();
    static constexpr int kBlocks = kColVector ? 1 : kLayout.col_scales();

public:
    // With a scale per column apply() reads shared memory; otherwise the stage may be released before it.
    static constexpr bool kReadsStage = kColVector;

    // Reads, while the tensor core works, what is few. `first_row`: this thread's upper row in the tile.
    __device__ __forceinline__ Promotion(const float* row_scales, const float* col_scales, int first_row, int lane) {
        if constexpr (kLayout.row_scales_are_vector()) {
            rows_[0] = row_scales[first_row];
            rows_[1] = row_scales[first_row + 8];
        } else {
            rows_[0] = rows_[1] = row_scales[0];
        }
        if constexpr (kColVector) {
            pairs_ = reinterpret_cast<const float2*>(col_scales) + lane % 4;
        } else {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) blocks_[block] = col_scales[block];
        }
    }

    // `col_offset`: the tile's first column modulo 128.
    __device__ __forceinline__ void apply(int col_offset, const float (&accumulator)[kCols / 2],
                                          float (&total)[kCols / 2]) const {
        if constexpr (kColVector) {
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) {
                const float2 col = pairs_[j * 4];
                total[4 * j + 0] += accumulator[4 * j + 0] * (rows_[0] * col.x);
                total[4 * j + 1] += accumulator[4 * j + 1] * (rows_[0] * col.y);
                total[4 * j + 2] += accumulator[4 * j + 2] * (rows_[1] * col.x);
                total[4 * j + 3] += accumulator[4 * j + 3] * (rows_[1] * col.y);
            }
        } else {
            constexpr int kGranule = kLayout.block_granule();
            float scale[kBlocks][2];
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                scale[block][0] = rows_[0] * blocks_[block];
                scale[block][1] = rows_[1] * blocks_[block];
            }
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) {
                // Columns of a granule lie in one block of 128: the lower or the upper of at most two candidates.
                const int granule_start = j * 8 / kGranule * kGranule;
                const int low = granule_start / 128;
                const int high = (granule_start + 128 - kGranule) / 128;
                const bool in_low = low == high || col_offset + granule_start < high * 128;
                const float upper = in_low ? scale[low][0] : scale[high][0];
                const float lower = in_low ? scale[low][1] : scale[high][1];
                total[4 * j + 0] += upper * accumulator[4 * j + 0];
                total[4 * j + 1] += upper * accumulator[4 * j + 1];
                total[4 * j + 2] += lower * accumulator[4 * j + 2];
                total[4 * j + 3] += lower * accumulator[4 * j + 3];
            }
        }
    }

private:
    float rows_[2];
    float blocks_[kBlocks];
    const float2* pairs_;
};

}  // namespace deep_gemm::sm90
