// The warpgroup matrix instruction: 64 x N x 32 FP8 or 64 x N x 16 BF16 products, both operands in shared memory, or the
// 64 rows of FP8 in registers.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cstdint>
#include <utility>

#include "../device/ptx_mbarrier.cuh"
#include "wgmma_instruction.cuh"

namespace deep_gemm::sm90 {

// Descriptor of a tile of 128-byte rows with 128-byte swizzle, which starts on a multiple of 1024 bytes: groups of 8 rows
// are 1024 bytes apart. K-major, a row holds 128 bytes of K; MN-major it holds 64 values along MN of one k, and further
// ones `leading_bytes` on. Only the low word holds the address, in units of 16 bytes: adding 2 to it moves 32 bytes along
// K of a K-major tile, adding 128 moves 16 rows along K of an MN-major one.
struct Descriptor {
    static constexpr uint32_t kHigh = 1u << 30 /* 128-byte swizzle */ | 1024u >> 4 /* between groups of 8 rows */;
    static constexpr uint32_t kLeadingStride = 1u << 16;  // unused K-major with this swizzle

    uint32_t low;

    __device__ __forceinline__ explicit Descriptor(uint32_t low) : low(low) {}

    // The field for the address has 14 bits. In a cluster the shared window of a CTA may begin at a multiple of 16 MB, which
    // would else change the stride.
    __device__ __forceinline__ Descriptor(const void* tile, uint32_t leading_bytes)
        : low(leading_bytes >> 4 << 16 | (ptx::smem_address(tile) >> 4 & 0x3fff)) {}

    __device__ __forceinline__ explicit Descriptor(const void* tile)
        : low(kLeadingStride | ptx::smem_address(tile) >> 4) {}

    // The tile of stage `stage_idx` of a ring whose first one this is, `kPitch` bytes apart.
    template <uint32_t kPitch>
    __device__ __forceinline__ Descriptor of_stage(uint32_t stage_idx) const {
        return Descriptor(ptx::element_address<kPitch / 16>(low, stage_idx));
    }

    // `offset` in units of 16 bytes. A move of two words in PTX, as it is two registers in SASS: the compiler makes a
    // conversion and an or of a shift, which nothing but a count of PTX instructions would notice.
    __device__ __forceinline__ uint64_t at(uint32_t offset) const {
        uint64_t descriptor;
        asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + offset), "n"(kHigh));
        return descriptor;
    }
};

// accumulator = rows * cols^T (+ accumulator), asynchronously; thread layout as in the PTX ISA, "wgmma D fragment":
// element 4 j + {0, 1} is (row t / 4 of the warp's 16, column 8 j + 2 (t % 4) + {0, 1}), 4 j + {2, 3} is 8 rows below.
// `accumulate` is a constant once loops are unrolled.
template <int kN>
__device__ __forceinline__ void wgmma(uint64_t rows, uint64_t cols, float (&accumulator)[kN / 2], bool accumulate) {
    if (accumulate) {
        WgmmaInstruction<kN>::template run<true>(accumulator, rows, cols);
    } else {
        WgmmaInstruction<kN>::template run<false>(accumulator, rows, cols);
    }
}

// As above, with the rows' E4M3 values in registers: those of row t / 4 of the warp's 16 at k = 4 (t % 4) + {0 .. 3}, of the
// row 8 below, and of both 16 further along K. They stay untouched until the instruction is done.
template <int kN>
__device__ __forceinline__ void wgmma_from_registers(const uint32_t (&rows)[4], uint64_t cols,
                                                     float (&accumulator)[kN / 2], bool accumulate) {
    if (accumulate) {
        WgmmaInstruction<kN>::template run<true>(accumulator, rows, cols);
    } else {
        WgmmaInstruction<kN>::template run<false>(accumulator, rows, cols);
    }
}

// BF16's instructions, from CUTLASS.
template <int kN, bool kRowsMnMajor, bool kColsMnMajor>
struct WgmmaBf16;

#define DG_WGMMA_BF16(N)                                                                                              \
    template <bool kRowsMnMajor, bool kColsMnMajor>                                                                   \
    struct WgmmaBf16<N, kRowsMnMajor, kColsMnMajor> {                                                                 \
        using Major = cute::SM90::GMMA::Major;                                                                        \
        static constexpr Major kRows = kRowsMnMajor ? Major::MN : Major::K, kCols = kColsMnMajor ? Major::MN : Major::K; \
        using FromShared = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kRows, kCols>;                            \
        using FromRegisters = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<kRows, kCols>;                         \
    };
DG_WGMMA_BF16(8)
DG_WGMMA_BF16(16)
DG_WGMMA_BF16(32)
DG_WGMMA_BF16(64)
DG_WGMMA_BF16(96)
DG_WGMMA_BF16(128)
DG_WGMMA_BF16(144)
DG_WGMMA_BF16(160)
DG_WGMMA_BF16(176)
DG_WGMMA_BF16(192)
DG_WGMMA_BF16(256)
#undef DG_WGMMA_BF16

template <class Instruction, class... Operands, size_t... kIndex>
__device__ __forceinline__ void wgmma_bf16(float (&accumulator)[sizeof...(kIndex)], bool accumulate,
                                           std::index_sequence<kIndex...>, Operands... operands) {
    using cute::SM90::GMMA::ScaleOut;
    Instruction::fma(operands..., accumulator[kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}

// accumulator = rows * cols^T (+ accumulator). Two values of row t / 4 at k = 2 (t % 4) + {0, 1}, of the row 8 below, and of both 8 further along
// K are in the thread's registers; columns are K-major.
template <int kN>
__device__ __forceinline__ void wgmma_bf16_from_registers(const uint32_t (&rows)[4], uint64_t cols,
                                                          float (&accumulator)[kN / 2], bool accumulate) {
    wgmma_bf16<typename WgmmaBf16<kN, false, false>::FromRegisters>(
        accumulator, accumulate, std::make_index_sequence<kN / 2>(), rows[0], rows[1], rows[2], rows[3], cols);
}

// accumulator += rows * cols^T, both in shared memory, of either major order.
template <int kN, bool kRowsMnMajor, bool kColsMnMajor>
__device__ __forceinline__ void wgmma_bf16(uint64_t rows, uint64_t cols, float (&accumulator)[kN / 2]) {
    wgmma_bf16<typename WgmmaBf16<kN, kRowsMnMajor, kColsMnMajor>::FromShared>(
        accumulator, true, std::make_index_sequence<kN / 2>(), rows, cols);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// A copy of a total for a vector store, whose operands have to be neighbouring registers. Without it ptxas keeps the total
// itself in such a register, of the same parity as the accumulator that is added to it for every K block, and an FFMA whose
// operands share a register bank issues slower: 2 to 3 % of a large product. `zero` is 0, which ptxas cannot know.
__device__ __forceinline__ float in_another_register(float total, int zero) {
    return __int_as_float(__float_as_int(total) ^ zero);
}

// Hands registers from the producer to the consumers. Growing waits until there are enough: what all warpgroups end up with
// must not exceed what the CTA was launched with, or it waits for ever.
template <int kCount>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace deep_gemm::sm90
