// FP4 weights on the instruction's M side and BF16 tokens: rows of packed E2M1 pairs, expanded to BF16, scales included, in the
// registers that wgmma reads its A operand from.
//
//   sum_k A[m, k] 2^e[n, k / 32] B[n, k],  A BF16, B E2M1 with a scale per 32
//
// BF16 has 8 bits of mantissa and FP32's exponents, so a value times its scale is exact (beyond FP32's range it is infinite), and
// so are tokens that were E4M3, with their scales if these are powers of two. The tensor core sums over all of K and nothing is
// promoted, so the work of a K block hardly depends on the number of tokens. Where A's scales are any FP32 numbers, per 128 of K,
// tokens come without them, and each K block's sum is scaled by its columns'.
//
// Order of K. The instruction sums over K in any order that both operands have. A thread of the A fragment takes the 16 bytes of
// one scale's 32 values, those of 32 t .. 32 t + 31 for t = lane % 4, in one load for each of its two rows; the 64-byte swizzle
// spreads a warp's loads over all banks. Word i of the four has eight values, for the instructions 2 i and 2 i + 1 of a K block.
// Halves of a register hold values four apart: in position 16 (2 i + h) + 8 u + 2 t + b of the tokens' K there has to be value
// 32 t + 8 i + 2 h + u + 4 b (cast/bf16_tokens.cu writes it there).
//
// Expansion. With a nibble's sign in bit 15 of a half and its other three bits in 8 .. 6 that half is 2^-126 times the value in
// BF16, subnormal ones included; a product with 2^(e + 126) makes it right. Integer instructions issue every other clock, those
// of the other pipes every clock: two masks a register are integer, moving the bits is a multiplication, and so is the scale.
#pragma once

#include "../device/ptx_memory.cuh"
#include "scale_policy.cuh"
#include "shared_storage.cuh"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// A consumer thread's part of K blocks.
template <class Traits>
class Bf16Fp4Block {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kCols = kLayout.row.block_cols;
    static constexpr int kAccumulators = kCols / 2;
    static constexpr bool kScalesCols = kLayout.col_scales_are_vector();
public:
    static constexpr int kHalf = kBlockK / 16 / 2;  // of a K block's instructions

    // Addresses in stage 0; `first_row` is that of the warpgroup's 64 rows.
    __device__ __forceinline__ Bf16Fp4Block(const uint8_t* rows, const uint8_t* row_scales, const uint8_t* cols,
                                            const uint8_t* col_scales, int first_row, int thread)
        : cols_(ptx::computed_once(Descriptor(cols).low)) {
        const int lane = thread % 32;
        const int row = first_row + thread / 32 * 16 + lane / 4;  // and row + 8
        pairs_ = ptx::smem_address(rows) + row * kPackedBlockK + (lane % 4 ^ row / 2 % 4) * 16;
        codes_ = ptx::smem_address(row_scales) + row * 4 + lane % 4;
        col_scales_ = ptx::smem_address(col_scales) + lane % 4 * 2 * 4;
    }

    // A stage's packed values and scales of a thread's two rows.
    struct Rows {
        uint32_t upper[4], lower[4];
        uint32_t upper_code, lower_code;
    };

    __device__ __forceinline__ void load(int stage_idx, Rows& rows) const {
        const uint32_t pairs = pairs_ + stage_idx * kLayout.row_tile_bytes();
        const uint32_t codes = codes_ + stage_idx * kLayout.row_scale_pitch();
        ptx::load_shared_v4(pairs, rows.upper);
        ptx::load_shared_v4(pairs + 8 * kPackedBlockK, rows.lower);
        rows.upper_code = ptx::load_shared_u8(codes);
        rows.lower_code = ptx::load_shared_u8(codes + 8 * 4);
    }

    // Expands values for one half of a K block's instructions, of which each has its registers.
    __device__ __forceinline__ static void expand_half(int half, const Rows& rows, uint32_t (&fragments)[kHalf][4]) {
        const uint32_t upper = first_factor(rows.upper_code), lower = first_factor(rows.lower_code);
        uint32_t values[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            expand(rows.upper[half * 2 + i], upper, values[i][0]);
            expand(rows.lower[half * 2 + i], lower, values[i][1]);
        }
        if (((rows.upper_code | rows.lower_code) & 0x80) != 0) {  // seldom; those of 128 are one
            const uint32_t more_upper = second_factor(rows.upper_code), more_lower = second_factor(rows.lower_code);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i / 4][0][i % 4] = product(values[i / 4][0][i % 4], more_upper);
                values[i / 4][1][i % 4] = product(values[i / 4][1][i % 4], more_lower);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            fragments[i / 2][i % 2 * 2] = values[i / 4][0][i % 4];
            fragments[i / 2][i % 2 * 2 + 1] = values[i / 4][1][i % 4];
        }
    }

    // accumulator (+)= rows * cols^T over one half of a K block.
    __device__ __forceinline__ void multiply(int stage_idx, int half, const uint32_t (&fragments)[kHalf][4],
                                             float (&accumulator)[kAccumulators], bool accumulate) const {
        wgmma_fence();
        const uint64_t cols = cols_.of_stage<kLayout.col_tile_bytes()>(stage_idx).at(0);
#pragma unroll
        for (int step = 0; step < kHalf; ++step) {
            // K of a stage is in two tiles of 128 bytes a token. The sum of both words is one uniform instruction, that of the
            // low one two, with a copy of the high one.
            const uint32_t offset = half * (kCols * kBlockK / 16) + step * (32 / 16);
            wgmma_bf16_from_registers<kCols>(fragments[step], cols + offset, accumulator, accumulate || step > 0);
        }
        wgmma_commit();
    }

    // Adds a K block whose sum has scales. Calls `release` when all of the stage has been read.
    template <class Release>
    __device__ __forceinline__ void add(int stage_idx, float (&total)[kAccumulators], Release&& release) const {
        constexpr bool kEarly = kCols <= 32;  // few columns' scales have room in registers while the tensor core works
        Rows rows;
        load(stage_idx, rows);
        float2 cols[kEarly ? kCols / 8 : 1];
        if constexpr (kEarly) {
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) cols[j] = col_scale(stage_idx, j);
        }
        float accumulator[kAccumulators];
        uint32_t fragments[2][kHalf][4];
        pin_registers(accumulator);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            expand_half(half, rows, fragments[half]);  // the second while the tensor core has the first
            multiply(stage_idx, half, fragments[half], accumulator, half > 0);
        }
        pin_registers(accumulator);
        wgmma_wait<0>();
        pin_registers(accumulator);
        if constexpr (kEarly) {
            release();
            Promotion<Traits>::by_column(1, 1, [&](int j) { return cols[j]; }, accumulator, total);
        } else {
            Promotion<Traits>::by_column(1, 1, [&](int j) { return col_scale(stage_idx, j); }, accumulator, total);
            release();
        }
    }

private:
    // 2^(code - 127 + 126) as two BF16 factors, the second of which is one where the code is 128 at most, and carries NaN.
    static constexpr uint32_t kBoth = 1 << 7 | 1 << 23;  // of the exponents' last bits
    __device__ __forceinline__ static uint32_t first_factor(uint32_t code) { return min(code + 126, 254u) * kBoth; }
    __device__ __forceinline__ static uint32_t second_factor(uint32_t code) {
        return code == 255 ? 0x7fc07fc0 : max(code, 128u) * kBoth - kBoth;
    }

    __device__ __forceinline__ float2 col_scale(int stage_idx, int j) const {
        const uint32_t address = col_scales_ + stage_idx * kLayout.col_scale_pitch() + j * 8 * 4;
        if constexpr (kLayout.col_scale_slack() > 0) {  // they begin anywhere
            return make_float2(__uint_as_float(ptx::load_shared_u32(address)),
                               __uint_as_float(ptx::load_shared_u32(address + 4)));
        } else {
            return ptx::load_shared_float2(address);
        }
    }

    // Eight values, the lowest nibble first, times `scale`: values p and p + 4 in register p.
    __device__ __forceinline__ static void expand(uint32_t pairs, uint32_t scale, uint32_t (&values)[4]) {
        const uint32_t swapped = __byte_perm(pairs, 0, 0x2301);  // bytes of the halves: nibbles 2 and 3 are where 0 and 1 were
        constexpr uint32_t kNibbles = 0x000f000f, kPlaces = 0x81c081c0;
        // Each nibble twice, with its sign in bit 15 and, in the lower copy, its other bits in 8 .. 6.
        values[0] = product((pairs & kNibbles) * 0x1040 & kPlaces, scale);
        values[1] = product((pairs & kNibbles << 4) * 0x104 & kPlaces, scale);
        values[2] = product((swapped & kNibbles) * 0x1040 & kPlaces, scale);
        values[3] = product((swapped & kNibbles << 4) * 0x104 & kPlaces, scale);
    }

    __device__ __forceinline__ static uint32_t product(uint32_t x, uint32_t y) {
        uint32_t result;
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(y));
        return result;
    }

    Descriptor cols_;
    uint32_t pairs_, codes_, col_scales_;
};

}  // namespace deep_gemm::sm90
