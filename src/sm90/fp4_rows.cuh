// FP4 weights on the instruction's M side: rows of packed E2M1 pairs, expanded to E4M3 in the registers that wgmma reads its
// A operand from.
//
//   sum_k sfa[m, k / g] 2^e[n, k / 32] A[m, k] B[n, k],  A E4M3 with g = 128 or 32, B E2M1 with a scale per 32
//
// Every E2M1 value is an E4M3 value, so the products are those of FP8 and exact. Shared memory holds a stage's rows as they
// lie in device memory, 64 bytes for 128 of K, in TMA's 64-byte swizzle: half the bytes of FP8 from device memory into shared
// memory, and none written or read again for the expansion.
//
// A thread of the A fragment has four consecutive k, 4 t .. 4 t + 3 for t = lane % 4, of either 16 of an instruction's 32:
// two packed bytes each. It reads them as they lie, 16 bits at a time; the 64-byte swizzle spreads a warp's reads over all
// banks. Two table look-ups by byte permutation turn four of them into four bytes.
//
// Scales per 32 of K and row (FP32, or UE8M0 words of four) and column: after every 32 of K the tensor core's sums are scaled
// and added to the totals. With few columns there is room for an accumulator for each 32, and nothing waits in between.
#pragma once

#include "../device/fp4.cuh"
#include "../device/ptx_memory.cuh"
#include "scale_policy.cuh"
#include "shared_storage.cuh"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// 2^(code - 127), of code 255 NaN.
__device__ __forceinline__ float ue8m0_to_float(uint32_t code) {
    const float power = fmaxf(__uint_as_float(code << 23), 0x1p-127f);
    return fmaf(power, 0.0f, power);  // infinity becomes NaN
}

// A consumer thread's part of K blocks.
template <class Traits>
class Fp4Block {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kCols = kLayout.row.block_cols;
    static constexpr int kAccumulators = kCols / 2;
    static constexpr int kGroups = kBlockK / 32;  // instructions of a K block
    // Whether each 32 of K has an accumulator of its own.
    static constexpr bool kAllAtOnce = kCols <= 32;

    using Fragment = uint32_t[4];

public:
    // Addresses in stage 0.
    __device__ __forceinline__ Fp4Block(const SharedStorage<Traits>& shared, int warpgroup, int thread, int scale_start)
        : cols_(shared.cols[0]) {
        const int lane = thread % 32;
        const int row = part_row<Traits>(0, warpgroup) + thread / 32 * 16 + lane / 4;  // and row + 8
        const uint32_t swizzle = row / 2 % 4 * 16;
        const uint32_t pairs = ptx::smem_address(shared.rows[0]) + row * kPackedBlockK + lane % 4 * 2;
        pairs_ = kept(pairs + swizzle, lane);
        row_scales_ = kept(ptx::smem_address(shared.row_scales[0]) + row * 4, lane);
        col_scales_ = kept(ptx::smem_address(shared.col_scales[0]) + (scale_start + lane % 4 * 2) * 4, lane);
        cols_.low = kept(cols_.low, lane);
        low_magnitudes_ = kept(kLowMagnitudes + lane, 0);
    }

    // Adds a K block. Calls `release` when all of the stage has been read.
    template <class Release>
    __device__ __forceinline__ void add(int stage_idx, float (&total)[kAccumulators], Release&& release) const {
        uint32_t pairs[kGroups][4];
        load_pairs(stage_idx, pairs);
        float rows[kGroups][2];
        load_row_scales(stage_idx, rows);
        const uint32_t col_scales = col_scales_ + stage_idx * kLayout.col_scale_pitch();

        if constexpr (kAllAtOnce) {
            float2 cols[kGroups][kCols / 8];
            float accumulators[kGroups][kAccumulators];
            Fragment fragments[kGroups];
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
#pragma unroll
                for (int j = 0; j < kCols / 8; ++j) cols[group][j] = col_scale(col_scales, group, j);
                expand(pairs[group], fragments[group]);
                pin_registers(accumulators[group]);
            }
            wgmma_fence();
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                multiply(stage_idx, group, fragments[group], accumulators[group]);
            }
            wgmma_commit();
#pragma unroll
            for (int group = 0; group < kGroups; ++group) pin_registers(accumulators[group]);
            wgmma_wait<0>();
            release();
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                pin_registers(accumulators[group]);
                Promotion<Traits>::by_column(rows[group][0], rows[group][1], [&](int j) { return cols[group][j]; },
                                             accumulators[group], total);
            }
        } else {
            float accumulator[kAccumulators];
            Fragment fragments[2];
            expand(pairs[0], fragments[0]);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                pin_registers(accumulator);
                wgmma_fence();
                multiply(stage_idx, group, fragments[group % 2], accumulator);
                wgmma_commit();
                // While the instruction runs.
                if (group + 1 < kGroups) expand(pairs[group + 1], fragments[(group + 1) % 2]);
                pin_registers(accumulator);
                wgmma_wait<0>();
                Promotion<Traits>::by_column(rows[group][0], rows[group][1],
                                             [&](int j) { return col_scale(col_scales, group, j); }, accumulator, total);
            }
            release();
        }
    }

private:
    // The value of lane `lane`, in a register. ptxas prefers to compute addresses and constants again for every K block, which was a
    // fifth of the main loop's instructions; what comes out of a shuffle it has to keep.
    __device__ __forceinline__ static uint32_t kept(uint32_t value, int lane) {
        return __shfl_sync(0xffffffff, value, lane);
    }

    // Of a thread's four registers of a fragment: row and row + 8 at the first 16 of K, then both at the others.
    __device__ __forceinline__ void load_pairs(int stage_idx, uint32_t (&pairs)[kGroups][4]) const {
        const uint32_t first = pairs_ + stage_idx * kLayout.row_tile_bytes();
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const uint32_t address = first ^ group * 16;
            pairs[group][0] = ptx::load_shared_u16(address);
            pairs[group][1] = ptx::load_shared_u16(address + 8 * kPackedBlockK);
            pairs[group][2] = ptx::load_shared_u16(address + 8);
            pairs[group][3] = ptx::load_shared_u16(address + 8 * kPackedBlockK + 8);
        }
    }

    // Of row and row + 8.
    __device__ __forceinline__ void load_row_scales(int stage_idx, float (&rows)[kGroups][2]) const {
        const uint32_t address = row_scales_ + stage_idx * kLayout.row_scale_pitch();
        if constexpr (kLayout.row_scales_are_words()) {
            const uint32_t upper = ptx::load_shared_u32(address), lower = ptx::load_shared_u32(address + 8 * 4);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                rows[group][0] = ue8m0_to_float(upper >> group * 8 & 0xff);
                rows[group][1] = ue8m0_to_float(lower >> group * 8 & 0xff);
            }
        } else {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const uint32_t of_group = address + group * kLayout.row_scale_box_rows() * 4;
                rows[group][0] = __uint_as_float(ptx::load_shared_u32(of_group));
                rows[group][1] = __uint_as_float(ptx::load_shared_u32(of_group + 8 * 4));
            }
        }
    }

    // Of the thread's two columns of eight.
    __device__ __forceinline__ static float2 col_scale(uint32_t scales, int group, int j) {
        const uint32_t address = scales + (group * kLayout.col_scale_box_cols() + j * 8) * 4;
        if constexpr (kLayout.col_scale_slack() > 0) {  // they begin anywhere
            return make_float2(__uint_as_float(ptx::load_shared_u32(address)),
                               __uint_as_float(ptx::load_shared_u32(address + 4)));
        } else {
            return ptx::load_shared_float2(address);
        }
    }

    __device__ __forceinline__ void expand(const uint32_t (&pairs)[4], Fragment& fragment) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment[i] = expand_e2m1(pairs[i], low_magnitudes_);
    }

    // accumulator = rows * cols^T over 32 of K.
    __device__ __forceinline__ void multiply(int stage_idx, int group, const Fragment& rows,
                                             float (&accumulator)[kAccumulators]) const {
        const uint32_t offset = stage_idx * (kLayout.col_tile_bytes() / 16) + group * (32 / 16);
        wgmma_from_registers<kCols>(rows, cols_.at(offset), accumulator, false);
    }

    Descriptor cols_;
    uint32_t low_magnitudes_;  // the look-up takes one constant, the other would be moved into a register each time
    uint32_t pairs_, row_scales_, col_scales_;
};

}  // namespace deep_gemm::sm90
