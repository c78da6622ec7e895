// From an accumulator in tensor memory to D: optional C or bias, one rounding, store.
//
// A thread has a lane of tensor memory: a row of D, or with swapped operands a column. Each warp works for itself, 32
// columns of the accumulator at a time, and takes one of three ways:
//   boxes     D that TMA can address, without C: through swizzled shared memory; the store overlaps what follows. FP32 sums
//             in place, too: TMA adds
//   elements  C, a bias, odd strides: transposed in shared memory, so that a warp reads and writes 32 neighbours of a row
//   swapped   a register is 32 neighbours of a row of D already
// Where a group of tokens ends inside a box, the box is stored by elements: TMA would write the next group's rows.
#pragma once

#include <cuda_bf16.h>

#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "../device/tile_scheduler.cuh"
#include "gemm_params.h"
#include "gemm_traits.h"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

template <class Traits>
class Epilogue {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kBlockCols = kLayout.row.block_cols;
    static constexpr int kLoadCols = kBlockCols % 32 == 0 ? 32 : 16;
    static constexpr bool kMGrouped = kLayout.is_m_grouped();
    static constexpr bool kHasGroups = kLayout.has_groups() || kLayout.is_k_grouped();
    static constexpr bool kHasHeads = kLayout.row.grouping == Grouping::kBatched;

public:
    // Stores the accumulator at tensor-memory address `accumulator` (of the warp's first lane), whose first row of the
    // instruction is `row`. `boxes`: the warp's buffers. `done()` is called once the accumulator has been read.
    template <class Element, class Done>
    __device__ __forceinline__ static void store(const GemmParams& params, const WorkTile& work, uint32_t accumulator,
                                                 uint8_t* boxes, int& buffer, int row, Done&& done) {
        const int lane = threadIdx.x % 32;
        const int col = work.col;
        // Groups may have no K, and tiles of padding have nothing to multiply.
        const bool is_zero = (kMGrouped || kLayout.is_k_grouped()) && work.num_k_blocks == 0;
        const int end = end_of_rows(params, work);
        const bool by_elements = params.output_mode == kStoreDirect || (kMGrouped && row + 32 > end && end < params.m);
#pragma unroll 1
        for (int offset = 0; offset < kBlockCols; offset += kLoadCols) {
            uint32_t bits[kLoadCols] = {};
            if (!is_zero) {
                load_columns(accumulator + offset, bits);
                load_wait(bits);
            }
            if (offset + kLoadCols == kBlockCols) done();
            if constexpr (kMGrouped) {
#pragma unroll
                for (int i = 0; i < kLoadCols; ++i) {
                    if ((kLayout.row.swap_ab ? col + offset + i : row + lane) >= work.group_end) bits[i] = 0;
                }
            }
            if constexpr (kLayout.row.swap_ab) {
                float values[kLoadCols];
#pragma unroll
                for (int i = 0; i < kLoadCols; ++i) values[i] = __uint_as_float(bits[i]);
                store_swapped<Element>(params, work, row + lane, col + offset, values);
            } else if (by_elements) {
                store_elements<Element>(params, work, reinterpret_cast<float*>(boxes), row, col + offset, lane, bits);
            } else {
                store_box<Element>(params, work, boxes, buffer, row, col, offset, lane, bits);
            }
        }
    }

    // Split K: sends each CTA of the cluster its slice of this CTA's accumulator, none where `is_zero`, sums this CTA's in the
    // order of the parts and stores it. Warps of the same number exchange with one another, through `reduce`.
    template <class Element, class Done>
    __device__ __forceinline__ static void reduce_and_store(const GemmParams& params, uint32_t accumulator, bool is_zero,
                                                            float4* reduce, ptx::Barrier& full, ptx::Barrier& empty,
                                                            uint32_t phase, int warp, int part, int row, int col,
                                                            Done&& done) {
        constexpr int kParts = kLayout.row.split_k;
        constexpr int kSliceCols = kLayout.slice_cols();
        constexpr int kQuads = kSliceCols / 4;
        const int lane = threadIdx.x % 32;
        if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, (kParts - 1) * kQuads * 32 * sizeof(float4));
        ptx::mbarrier_wait(empty, phase ^ 1);
#pragma unroll
        for (int offset = 0; offset < kBlockCols; offset += kLoadCols) {
            uint32_t bits[kLoadCols] = {};
            if (!is_zero) {
                load_columns(accumulator + offset, bits);
                load_wait(bits);
            }
            if (offset + kLoadCols == kBlockCols) done();
#pragma unroll
            for (int i = 0; i < kLoadCols; i += 4) {
                const int target = (offset + i) / kSliceCols;
                float4* slot = reduce + ((part * kEpilogueWarps + warp) * kQuads + (offset + i) % kSliceCols / 4) * 32 + lane;
                const float4 quad = make_float4(__uint_as_float(bits[i]), __uint_as_float(bits[i + 1]),
                                                __uint_as_float(bits[i + 2]), __uint_as_float(bits[i + 3]));
                if (target == part) {
                    *slot = quad;
                } else {
                    ptx::store_async_v4(ptx::remote_address(slot, target), ptx::remote_address(&full, target), quad);
                }
            }
        }
        ptx::mbarrier_wait(full, phase);
        float sums[kSliceCols] = {};
        for (int source = 0; source < kParts; ++source) {
#pragma unroll
            for (int quad = 0; quad < kQuads; ++quad) {
                const float4 addend = reduce[((source * kEpilogueWarps + warp) * kQuads + quad) * 32 + lane];
                sums[4 * quad + 0] += addend.x;
                sums[4 * quad + 1] += addend.y;
                sums[4 * quad + 2] += addend.z;
                sums[4 * quad + 3] += addend.w;
            }
        }
        __syncwarp();
        if (lane < kParts && lane != part) ptx::mbarrier_arrive_remote(empty, lane);
        store_swapped<Element>(params, {}, row + lane, col + part * kSliceCols, sums);
    }

private:
    __device__ __forceinline__ static float to_float(float value) { return value; }
    __device__ __forceinline__ static float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

    // The group's part of C or D.
    template <class Element>
    __device__ __forceinline__ static Element* of_group(Element* matrix, int64_t group_stride, const WorkTile& work) {
        if constexpr (kHasGroups) return matrix + work.token_group * group_stride;
        return matrix;
    }

    // Where the rows of D end that this tile may store.
    __device__ __forceinline__ static int end_of_rows(const GemmParams& params, const WorkTile& work) {
        if constexpr (kMGrouped) return work.store_end;
        return params.m;
    }

    // Where a column of the product lies in D.
    __device__ __forceinline__ static int d_col(const GemmParams& params, int col) {
        if constexpr (kHasHeads) return column_of_result(params.heads, col);
        return col;
    }

    template <class Element>
    __device__ __forceinline__ static void store_box(const GemmParams& params, const WorkTile& work, uint8_t* boxes,
                                                     int& buffer, int row, int col, int offset, int lane,
                                                     const uint32_t (&bits)[kLoadCols]) {
        constexpr int kBoxCols = kLayout.box_cols(sizeof(Element));
        constexpr int kRowBytes = kBoxCols * sizeof(Element);
        const int col_in_box = offset % kBoxCols;
        uint8_t* box = boxes + buffer * kStoreBufferBytes;
        if (col_in_box == 0) {
            // The buffer is free once the store before the last has read it.
            if (lane == 0) ptx::tma_store_wait_read<kStoreBuffers - 1>();
            __syncwarp();
        }
        const int swizzle = lane / (128 / kRowBytes) % (kRowBytes / 16);
        const int first_chunk = col_in_box * static_cast<int>(sizeof(Element)) / 16;
#pragma unroll
        for (int chunk = 0; chunk < kLoadCols * static_cast<int>(sizeof(Element)) / 16; ++chunk) {
            uint4 words;
            if constexpr (sizeof(Element) == 4) {
                words = make_uint4(bits[4 * chunk], bits[4 * chunk + 1], bits[4 * chunk + 2], bits[4 * chunk + 3]);
            } else {
                words = make_uint4(pack(bits, 8 * chunk), pack(bits, 8 * chunk + 2), pack(bits, 8 * chunk + 4),
                                   pack(bits, 8 * chunk + 6));
            }
            *reinterpret_cast<uint4*>(box + lane * kRowBytes + (((first_chunk + chunk) ^ swizzle) * 16)) = words;
        }
        if (col_in_box + kLoadCols == kBoxCols) {
            ptx::fence_async_shared();
            __syncwarp();
            if (lane == 0) {
                const int first_col = d_col(params, col + offset - col_in_box);
                const bool adds = sizeof(Element) == 4 && params.output_mode == kAddTma;
                if constexpr (kHasGroups) {
                    if (adds) {
                        ptx::tma_add_3d(params.d_map, box, first_col, row, work.token_group);
                    } else {
                        ptx::tma_store_3d(params.d_map, box, first_col, row, work.token_group);
                    }
                } else if (adds) {
                    ptx::tma_add_2d(params.d_map, box, first_col, row);
                } else {
                    ptx::tma_store_2d(params.d_map, box, first_col, row);
                }
                ptx::tma_store_commit();
            }
            buffer ^= 1;
        }
    }

    __device__ __forceinline__ static uint32_t pack(const uint32_t (&bits)[kLoadCols], int first) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(__uint_as_float(bits[first]), __uint_as_float(bits[first + 1]));
        return reinterpret_cast<const uint32_t&>(pair);
    }

    template <class Element>
    __device__ __forceinline__ static void store_elements(const GemmParams& params, const WorkTile& work, float* staging,
                                                          int row, int col, int lane, const uint32_t (&bits)[kLoadCols]) {
        constexpr int kStride = kLoadCols + 1;  // floats between rows: neither side of the transposition has conflicts
        if constexpr (kMGrouped) {
            // Boxes of the tile before.
            if (lane == 0) ptx::tma_store_wait_read<0>();
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kLoadCols; ++i) staging[lane * kStride + i] = __uint_as_float(bits[i]);
        __syncwarp();
        col += lane;
        if (col >= params.n) return;
        const int rows = min(32, end_of_rows(params, work) - row);
        Element* d = of_group(static_cast<Element*>(params.d), params.d_group_stride, work) + row * params.d_stride +
                     d_col(params, col);
        const Element* c = of_group(static_cast<const Element*>(params.c), params.c_group_stride, work) +
                           row * params.c_stride + col;
        constexpr int kBatch = 8;  // loads of C in flight; C may be D
#pragma unroll 1
        for (int first = 0; first < rows; first += kBatch) {
            float values[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                values[i] = staging[(first + i) * kStride + lane];
                if (params.c != nullptr && first + i < rows) values[i] += to_float(c[(first + i) * params.c_stride]);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (first + i < rows) d[(first + i) * params.d_stride] = static_cast<Element>(values[i]);
            }
        }
    }

    // `n`: this thread's column of D; values are those of rows from `m` on.
    template <class Element, int kRows>
    __device__ __forceinline__ static void store_swapped(const GemmParams& params, const WorkTile& work, int n, int m,
                                                         float (&values)[kRows]) {
        if (n >= params.n) return;
        const int end = end_of_rows(params, work);
        if (params.c != nullptr) {
            const Element* c = of_group(static_cast<const Element*>(params.c), params.c_group_stride, work) +
                               m * params.c_stride + n;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                if (m + i < end) values[i] += to_float(c[i * params.c_stride]);
            }
        }
        Element* d = of_group(static_cast<Element*>(params.d), params.d_group_stride, work) + m * params.d_stride +
                     d_col(params, n);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (m + i < end) d[i * params.d_stride] = static_cast<Element>(values[i]);
        }
    }
};

}  // namespace deep_gemm::sm100
