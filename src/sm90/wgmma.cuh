// The warpgroup matrix instruction: 64 x N x 32 FP8 or 64 x N x 16 BF16 products, both operands in shared memory, or the
// 64 rows of FP8 in registers.
#pragma once

#include <cstdint>

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
        WgmmaInstruction<kN>::template fp8<true>(accumulator, rows, cols);
    } else {
        WgmmaInstruction<kN>::template fp8<false>(accumulator, rows, cols);
    }
}

// As above, with the rows' E4M3 values in registers: those of row t / 4 of the warp's 16 at k = 4 (t % 4) + {0 .. 3}, of the
// row 8 below, and of both 16 further along K. They stay untouched until the instruction is done.
template <int kN>
__device__ __forceinline__ void wgmma_from_registers(const uint32_t (&rows)[4], uint64_t cols,
                                                     float (&accumulator)[kN / 2], bool accumulate) {
    if (accumulate) {
        WgmmaInstruction<kN>::template fp8<true>(accumulator, rows, cols);
    } else {
        WgmmaInstruction<kN>::template fp8<false>(accumulator, rows, cols);
    }
}

// The same with BF16: two values of row t / 4 at k = 2 (t % 4) + {0, 1}, of the row 8 below, and of both 8 further along K.
template <int kN>
__device__ __forceinline__ void wgmma_bf16_from_registers(const uint32_t (&rows)[4], uint64_t cols,
                                                          float (&accumulator)[kN / 2], bool accumulate) {
    if (accumulate) {
        WgmmaInstruction<kN>::template bf16<true>(accumulator, rows, cols);
    } else {
        WgmmaInstruction<kN>::template bf16<false>(accumulator, rows, cols);
    }
}

// accumulator += rows * cols^T of BF16 operands of either major order.
template <int kN, bool kRowsMnMajor, bool kColsMnMajor>
__device__ __forceinline__ void wgmma_bf16(uint64_t rows, uint64_t cols, float (&accumulator)[kN / 2]) {
    WgmmaInstruction<kN>::template bf16<true, kRowsMnMajor, kColsMnMajor>(accumulator, rows, cols);
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
