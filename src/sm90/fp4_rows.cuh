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
// Scales. Where both operands have them per 32 of K, the tensor core's sums are scaled (by FP32, or UE8M0 words of four) and
// added to the totals after every 32; with few columns there is room for an accumulator for each, and nothing waits in
// between.
//
// Where A's are per 128 of K and B's are UE8M0, one sum per 128 is scaled: B's values are expanded times
// 2^(e - largest e of the row's four + 6), which is exact from 2^-5 to 2^6, and the row's scale is that of the largest. A
// scale that is more than 2^11 times smaller than its row's largest does not fit. The tensor core then sees zeros for its 32
// values, and the threads add their products in FP32, one by one: exact, too, but slow, and nothing that a cast would write
// for weights that matter.
#pragma once

#include <cuda_fp8.h>

#include "../device/fp4.cuh"
#include "../device/ptx_memory.cuh"
#include "scale_policy.cuh"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// 2^(code - 127), of code 255 NaN.
__device__ __forceinline__ float ue8m0_to_float(uint32_t code) {
    const float power = fmaxf(__uint_as_float(code << 23), 0x1p-127f);
    return fmaf(power, 0.0f, power);  // infinity becomes NaN
}

// A consumer thread's part of K blocks. Traits::kLayout is a GemmLayout, or has those of its functions that are used here.
template <class Traits>
class Fp4Block {
    static constexpr auto kLayout = Traits::kLayout;
    static constexpr int kCols = kLayout.block_cols();
    static constexpr int kAccumulators = kCols / 2;
    static constexpr int kGroups = kBlockK / 32;  // instructions of a K block
    // Whether each 32 of K has an accumulator of its own.
    static constexpr bool kAllAtOnce = kCols <= 32;

    using Fragment = uint32_t[4];

public:
    // Of what is in stage 0: tiles of both operands, scales of rows, and those of columns from the tile's first on. The
    // warpgroup has the 64 rows from `first_row` on.
    __device__ __forceinline__ Fp4Block(const void* rows, const void* row_scales, const void* cols, const void* col_scales,
                                        int first_row, int thread)
        : cols_(cols) {
        const int lane = thread % 32;
        const int row = first_row + thread / 32 * 16 + lane / 4;  // and row + 8
        const uint32_t swizzle = row / 2 % 4 * 16;
        const uint32_t pairs = ptx::smem_address(rows) + row * kPackedBlockK + lane % 4 * 2;
        pairs_ = kept(pairs + swizzle, lane);
        row_scales_ = kept(ptx::smem_address(row_scales) + row * 4, lane);
        col_scales_ = kept(ptx::smem_address(col_scales) + lane % 4 * 2 * 4, lane);
        far_cols_ = ptx::smem_address(cols) + lane % 4 * 2 * kBlockK;
        cols_.low = kept(cols_.low, lane);
        low_magnitudes_ = kept(kLowMagnitudes + lane, 0);
    }

    // Adds a K block, of rows that are `further` ones on: a multiple of 8, and 0 where row scales are folded. Calls `release`
    // when all that is needed of the stage has been read.
    template <class Release>
    __device__ __forceinline__ void add(int stage_idx, float (&total)[kAccumulators], Release&& release,
                                        int further = 0) const {
        uint32_t pairs[kGroups][4];
        load_pairs(stage_idx, further, pairs);
        const uint32_t col_scales = col_scales_ + stage_idx * kLayout.col_scale_pitch();
        if constexpr (kLayout.folds_row_scales()) {
            add_folded(stage_idx, pairs, col_scales, total, release);
            return;
        }
        float rows[kGroups][2];
        load_row_scales(stage_idx, further, rows);

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
                multiply(stage_idx, group, fragments[group], accumulators[group], false);
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
                multiply(stage_idx, group, fragments[group % 2], accumulator, false);
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
    __device__ __forceinline__ void load_pairs(int stage_idx, int further, uint32_t (&pairs)[kGroups][4]) const {
        const uint32_t first = pairs_ + stage_idx * kLayout.row_tile_bytes();
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const uint32_t address = (first ^ group * 16) + further * kPackedBlockK;
            pairs[group][0] = ptx::load_shared_u16(address);
            pairs[group][1] = ptx::load_shared_u16(address + 8 * kPackedBlockK);
            pairs[group][2] = ptx::load_shared_u16(address + 8);
            pairs[group][3] = ptx::load_shared_u16(address + 8 * kPackedBlockK + 8);
        }
    }

    // Of row and row + 8.
    __device__ __forceinline__ void load_row_scales(int stage_idx, int further, float (&rows)[kGroups][2]) const {
        const uint32_t address = row_scales_ + stage_idx * kLayout.row_scale_pitch() + further * 4;
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
                                             float (&accumulator)[kAccumulators], bool accumulate) const {
        const uint32_t offset = stage_idx * (kLayout.col_tile_bytes() / 16) + group * (32 / 16);
        wgmma_from_registers<kCols>(rows, cols_.at(offset), accumulator, accumulate);
    }

    // ---- scales of rows as a part of the values ----

    // What a row's word of scales makes of its values.
    struct Fold {
        float scale;  // of the K block
        uint32_t low[kGroups], high[kGroups];
        uint32_t far = 0;  // a bit for each 32 whose scale is too small
    };

    __device__ __forceinline__ static Fold fold(uint32_t word) {
        int codes[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) codes[group] = word >> group * 8 & 0xff;
        const int largest = max(max(codes[0], codes[1]), max(codes[2], codes[3]));
        const int smallest = min(min(codes[0], codes[1]), min(codes[2], codes[3]));
        Fold result;
        result.scale = ue8m0_to_float(largest) * exp2i<-kLargestExponent>();
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int exponent = codes[group] - largest + kLargestExponent;
            result.low[group] = scaled_low_magnitudes(exponent);
            result.high[group] = scaled_high_magnitudes(exponent);
        }
        constexpr int kRange = kLargestExponent - kSmallestExponent;
        if (largest - smallest > kRange) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                if (largest - codes[group] <= kRange) continue;
                result.low[group] = result.high[group] = 0;
                result.far |= 1 << group;
            }
        }
        return result;
    }

    template <int kExponent>
    __device__ __forceinline__ static float exp2i() {
        return __int_as_float((127 + kExponent) << 23);
    }

    template <class Release>
    __device__ __forceinline__ void add_folded(int stage_idx, const uint32_t (&pairs)[kGroups][4], uint32_t col_scales,
                                               float (&total)[kAccumulators], Release&& release) const {
        constexpr bool kEarly = kAllAtOnce;  // few columns' scales have room in registers while the tensor core works
        const uint32_t words = row_scales_ + stage_idx * kLayout.row_scale_pitch();
        const uint32_t upper_word = ptx::load_shared_u32(words), lower_word = ptx::load_shared_u32(words + 8 * 4);
        float2 cols[kEarly ? kCols / 8 : 1];
        if constexpr (kEarly) {
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) cols[j] = col_scale(col_scales, 0, j);
        }
        const Fold upper = fold(upper_word), lower = fold(lower_word);
        Fragment fragments[kGroups];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Fold& row = i % 2 == 0 ? upper : lower;
                fragments[group][i] = expand_e2m1(pairs[group][i], row.low[group], row.high[group]);
            }
        }
        float accumulator[kAccumulators];
        pin_registers(accumulator);
        wgmma_fence();
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            multiply(stage_idx, group, fragments[group], accumulator, group > 0);
        }
        wgmma_commit();
        pin_registers(accumulator);
        wgmma_wait<0>();
        pin_registers(accumulator);
        if (upper.far | lower.far) add_far(stage_idx, upper_word, lower_word, upper.far, lower.far, col_scales, total);
        if constexpr (kEarly) {
            release();
            Promotion<Traits>::by_column(upper.scale, lower.scale, [&](int j) { return cols[j]; }, accumulator, total);
        } else {
            Promotion<Traits>::by_column(upper.scale, lower.scale, [&](int j) { return col_scale(col_scales, 0, j); },
                                         accumulator, total);
            release();
        }
    }

    // Products of values whose scales are too small to be folded. Loops are not unrolled: this takes hardly any room.
    __device__ __forceinline__ void add_far(int stage_idx, uint32_t upper_word, uint32_t lower_word, uint32_t upper_far,
                                            uint32_t lower_far, uint32_t col_scales, float (&total)[kAccumulators]) const {
        const int lane = threadIdx.x % 32;
        const uint32_t rows = pairs_ + stage_idx * kLayout.row_tile_bytes() - lane % 4 * 2;
        const uint32_t cols = far_cols_ + stage_idx * kLayout.col_tile_bytes();
#pragma unroll 1
        for (int group = 0; group < kGroups; ++group) {
            const bool has_upper = upper_far >> group & 1, has_lower = lower_far >> group & 1;
            if (!has_upper && !has_lower) continue;
            const float upper_scale = ue8m0_to_float(upper_word >> group * 8 & 0xff);
            const float lower_scale = ue8m0_to_float(lower_word >> group * 8 & 0xff);
#pragma unroll 1
            for (int j = 0; j < kCols / 8; ++j) {
                float sums[4] = {};
#pragma unroll 1
                for (int k = 0; k < 32; k += 4) {
                    const uint32_t pairs = (rows ^ group * 16) + k / 2;
                    const uint32_t upper = has_upper ? expand_e2m1(ptx::load_shared_u16(pairs)) : 0;
                    const uint32_t lower =
                        has_lower ? expand_e2m1(ptx::load_shared_u16(pairs + 8 * kPackedBlockK)) : 0;
                    // Two columns; TMA's 128-byte swizzle: 16 bytes of K are elsewhere in each of eight rows.
                    const int chunk = group * 2 + k / 16, col = lane % 4 * 2;
                    const uint32_t row_of_cols = cols + j * 8 * kBlockK + k % 16;
                    const uint32_t left = ptx::load_shared_u32(row_of_cols + (chunk ^ col) * 16);
                    const uint32_t right = ptx::load_shared_u32(row_of_cols + kBlockK + (chunk ^ (col + 1)) * 16);
                    sums[0] = dot(upper, left, sums[0]);
                    sums[1] = dot(upper, right, sums[1]);
                    sums[2] = dot(lower, left, sums[2]);
                    sums[3] = dot(lower, right, sums[3]);
                }
                const float2 scale = col_scale(col_scales, 0, j);
                // The columns' totals take turns in the first registers: after all of them each is where it was.
                float first[4];
                first[0] = total[0] + (has_upper ? sums[0] * (upper_scale * scale.x) : 0);
                first[1] = total[1] + (has_upper ? sums[1] * (upper_scale * scale.y) : 0);
                first[2] = total[2] + (has_lower ? sums[2] * (lower_scale * scale.x) : 0);
                first[3] = total[3] + (has_lower ? sums[3] * (lower_scale * scale.y) : 0);
#pragma unroll
                for (int i = 0; i < kAccumulators - 4; ++i) total[i] = total[i + 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) total[kAccumulators - 4 + i] = first[i];
            }
        }
    }

    // sum + the products of four E4M3 values each.
    __device__ __forceinline__ static float dot(uint32_t x, uint32_t y, float sum) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 a = to_float2(x >> i * 8), b = to_float2(y >> i * 8);
            sum = fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
        }
        return sum;
    }

    __device__ __forceinline__ static float2 to_float2(uint32_t pair) {
        const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
        return __half22float2(halves);
    }

    Descriptor cols_;
    uint32_t low_magnitudes_;  // the look-up takes one constant, the other would be moved into a register each time
    uint32_t pairs_, row_scales_, col_scales_;
    uint32_t far_cols_;  // of the thread's two columns
};

}  // namespace deep_gemm::sm90
