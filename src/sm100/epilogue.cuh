// From an accumulator in tensor memory to D: optional C or bias, one rounding, store.
//
// A thread has a lane of tensor memory: a row of D, or with swapped operands a column. Each warp works for itself, 32
// columns of the accumulator at a time, and takes one of three ways:
//   boxes     D that TMA can address, without C: through swizzled shared memory; the store overlaps what follows
//   elements  C, a bias, odd strides: transposed in shared memory, so that a warp reads and writes 32 neighbours of a row
//   swapped   a register is 32 neighbours of a row of D already
#pragma once

#include <cuda_bf16.h>

#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "gemm_params.h"
#include "gemm_traits.h"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

template <class Traits>
class Epilogue {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kBlockCols = kLayout.row.block_cols;
    static constexpr int kLoadCols = kBlockCols % 32 == 0 ? 32 : 16;

public:
    // Stores the accumulator at tensor-memory address `accumulator` (of the warp's first lane), whose first element is
    // (row, col) of the instruction. `boxes`: the warp's buffers. `done()` is called once the accumulator has been read.
    template <class Element, class Done>
    __device__ __forceinline__ static void store(const GemmParams& params, uint32_t accumulator, uint8_t* boxes,
                                                 int& buffer, int row, int col, Done&& done) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int offset = 0; offset < kBlockCols; offset += kLoadCols) {
            uint32_t bits[kLoadCols];
            load_columns(accumulator + offset, bits);
            load_wait(bits);
            if (offset + kLoadCols == kBlockCols) done();
            if constexpr (kLayout.row.swap_ab) {
                store_swapped<Element>(params, row + lane, col + offset, bits);
            } else if (params.output_mode == kStoreTma) {
                store_box<Element>(params, boxes, buffer, row, col, offset, lane, bits);
            } else {
                store_elements<Element>(params, reinterpret_cast<float*>(boxes), row, col + offset, lane, bits);
            }
        }
    }

private:
    __device__ __forceinline__ static float to_float(float value) { return value; }
    __device__ __forceinline__ static float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

    template <class Element>
    __device__ __forceinline__ static void store_box(const GemmParams& params, uint8_t* boxes, int& buffer, int row,
                                                     int col, int offset, int lane, const uint32_t (&bits)[kLoadCols]) {
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
                ptx::tma_store_2d(params.d_map, box, col + offset - col_in_box, row);
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
    __device__ __forceinline__ static void store_elements(const GemmParams& params, float* staging, int row, int col,
                                                          int lane, const uint32_t (&bits)[kLoadCols]) {
        constexpr int kStride = kLoadCols + 1;  // floats between rows: neither side of the transposition has conflicts
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kLoadCols; ++i) staging[lane * kStride + i] = __uint_as_float(bits[i]);
        __syncwarp();
        col += lane;
        if (col >= params.n) return;
        const int rows = min(32, params.m - row);
        Element* d = static_cast<Element*>(params.d) + row * params.d_stride + col;
        const Element* c = static_cast<const Element*>(params.c) + row * params.c_stride + col;
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

    // `n`: this thread's column of D; registers are rows from `m` on.
    template <class Element>
    __device__ __forceinline__ static void store_swapped(const GemmParams& params, int n, int m,
                                                         const uint32_t (&bits)[kLoadCols]) {
        if (n >= params.n) return;
        float values[kLoadCols];
#pragma unroll
        for (int i = 0; i < kLoadCols; ++i) values[i] = __uint_as_float(bits[i]);
        if (params.c != nullptr) {
            const Element* c = static_cast<const Element*>(params.c) + m * params.c_stride + n;
#pragma unroll
            for (int i = 0; i < kLoadCols; ++i) {
                if (m + i < params.m) values[i] += to_float(c[i * params.c_stride]);
            }
        }
        Element* d = static_cast<Element*>(params.d) + m * params.d_stride + n;
#pragma unroll
        for (int i = 0; i < kLoadCols; ++i) {
            if (m + i < params.m) d[i * params.d_stride] = static_cast<Element>(values[i]);
        }
    }
};

}  // namespace deep_gemm::sm100
