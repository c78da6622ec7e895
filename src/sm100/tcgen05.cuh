// The fifth-generation tensor core: tensor memory, the matrix instruction, and what orders them. One instruction per
// function; kCtas is 1, or 2 where a pair of CTAs works on one instruction. All of a kernel use the same.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../device/ptx_mbarrier.cuh"

namespace deep_gemm::sm100 {

// ---- tensor memory: 128 lanes x 512 columns of 4 bytes; an address is lane << 16 | column ----

// By one whole warp (of each CTA of a pair). Writes the first column's address to shared memory; waits until there is room.
template <int kCtas>
__device__ __forceinline__ void tensor_memory_allocate(uint32_t* address, uint32_t columns) {
    if constexpr (kCtas == 1) {
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(ptx::smem_address(address)),
                     "r"(columns)
                     : "memory");
        asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
    } else {
        asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(ptx::smem_address(address)),
                     "r"(columns)
                     : "memory");
        asm volatile("tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;");
    }
}

// By the warp that allocated, after everybody is done with it.
template <int kCtas>
__device__ __forceinline__ void tensor_memory_free(uint32_t address, uint32_t columns) {
    if constexpr (kCtas == 1) {
        asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns) : "memory");
    } else {
        asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns) : "memory");
    }
}

// Around a barrier between threads: tensor-core operations before it are not seen behind it otherwise, nor the reverse.
__device__ __forceinline__ void fence_before_sync() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void fence_after_sync() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// 32 or 16 columns of the warp's 32 lanes (quarter warp % 4 of tensor memory): thread t gets lane t. `address` names the
// quarter's first lane. The registers may be read after load_wait().
__device__ __forceinline__ void load_columns(uint32_t address, uint32_t (&r)[32]) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]), "=r"(r[8]),
          "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13]), "=r"(r[14]), "=r"(r[15]), "=r"(r[16]),
          "=r"(r[17]), "=r"(r[18]), "=r"(r[19]), "=r"(r[20]), "=r"(r[21]), "=r"(r[22]), "=r"(r[23]), "=r"(r[24]),
          "=r"(r[25]), "=r"(r[26]), "=r"(r[27]), "=r"(r[28]), "=r"(r[29]), "=r"(r[30]), "=r"(r[31])
        : "r"(address)
        : "memory");
}

__device__ __forceinline__ void load_columns(uint32_t address, uint32_t (&r)[16]) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x16.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
        " [%16];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]), "=r"(r[8]),
          "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13]), "=r"(r[14]), "=r"(r[15])
        : "r"(address)
        : "memory");
}

// 16 lanes of the warp's quarter, from that of `address` on, and 32 or 16 columns, in the form of mma's m16n8 accumulators: of
// every eight columns thread t gets 2 (t % 4) and the next one, of lanes t / 4 and t / 4 + 8.
__device__ __forceinline__ void load_fragments(uint32_t address, uint32_t (&r)[16]) {
    asm volatile(
        "tcgen05.ld.sync.aligned.16x256b.x4.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
        " [%16];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]), "=r"(r[8]),
          "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13]), "=r"(r[14]), "=r"(r[15])
        : "r"(address)
        : "memory");
}

__device__ __forceinline__ void load_fragments(uint32_t address, uint32_t (&r)[8]) {
    asm volatile("tcgen05.ld.sync.aligned.16x256b.x2.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
                 : "r"(address)
                 : "memory");
}

// The registers are operands, so that the compiler does not read them earlier.
template <int... kCounts>
__device__ __forceinline__ void load_wait(uint32_t (&... registers)[kCounts]) {
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    const auto pin = []<int kCount>(uint32_t(&r)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
    };
    (pin(registers), ...);
}

// Descriptor of an operand in shared memory: K-major, rows of 32, 64 or 128 bytes (`span`) that are one swizzle span, groups
// of 8 rows one after the other.
__device__ __forceinline__ uint64_t k_major_descriptor(const void* tile, int span) {
    const uint64_t swizzle = span == 128 ? 2 : span == 64 ? 4 : 6;
    return 1ull << 46 /* version */ | swizzle << 61 | static_cast<uint64_t>(8 * span >> 4) << 32 |
           (ptx::smem_address(tile) >> 4 & 0x3FFF);
}

// ---- operations of the tensor core's queue, issued by one thread and executed in the order of issue ----

// 32 rows of 16 bytes of shared memory (8 rows after one another, no swizzle) to four columns, the same in all four
// quarters of the lanes: scale factors of 128 rows. With a pair each CTA copies from its own shared memory.
template <int kCtas>
__device__ __forceinline__ void copy_scales(uint32_t address, const void* rows) {
    constexpr uint64_t kDescriptor = 1ull << 46 /* version */ | 128ull >> 4 << 32 /* between groups of 8 rows */;
    const uint64_t descriptor = kDescriptor | ptx::smem_address(rows) >> 4;
    if constexpr (kCtas == 1) {
        asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(address), "l"(descriptor) : "memory");
    } else {
        asm volatile("tcgen05.cp.cta_group::2.32x128b.warpx4 [%0], %1;" ::"r"(address), "l"(descriptor) : "memory");
    }
}

// accumulator = rows * cols^T (+ accumulator), 16 BF16 products for each element.
template <int kCtas>
__device__ __forceinline__ void multiply_bf16(uint32_t accumulator, uint64_t rows, uint64_t cols, uint32_t instruction,
                                              bool accumulate) {
    if constexpr (kCtas == 1) {
        asm volatile(
            "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %4, 0;\n"
            "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, accumulate;\n}" ::"r"(accumulator),
            "l"(rows), "l"(cols), "r"(instruction), "r"(static_cast<uint32_t>(accumulate))
            : "memory");
    } else {
        asm volatile(
            "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %4, 0;\n"
            "tcgen05.mma.cta_group::2.kind::f16 [%0], %1, %2, %3, accumulate;\n}" ::"r"(accumulator),
            "l"(rows), "l"(cols), "r"(instruction), "r"(static_cast<uint32_t>(accumulate))
            : "memory");
    }
}

// The same of 32 E4M3 products, by a single CTA.
__device__ __forceinline__ void multiply_fp8(uint32_t accumulator, uint64_t rows, uint64_t cols, uint32_t instruction,
                                             bool accumulate) {
    asm volatile(
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %4, 0;\n"
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%0], %1, %2, %3, accumulate;\n}" ::"r"(accumulator),
        "l"(rows), "l"(cols), "r"(instruction), "r"(static_cast<uint32_t>(accumulate))
        : "memory");
}

// The same of 32 FP8 or FP4 products, each operand's 32 elements of K times the UE8M0 scale of their row.
template <int kCtas>
__device__ __forceinline__ void multiply_scaled(uint32_t accumulator, uint64_t rows, uint64_t cols, uint32_t instruction,
                                                uint32_t row_scales, uint32_t col_scales, bool accumulate) {
    if constexpr (kCtas == 1) {
        asm volatile(
            "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %6, 0;\n"
            "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [%0], %1, %2, %3, [%4], [%5], accumulate;\n}" ::"r"(
                accumulator),
            "l"(rows), "l"(cols), "r"(instruction), "r"(row_scales), "r"(col_scales),
            "r"(static_cast<uint32_t>(accumulate))
            : "memory");
    } else {
        asm volatile(
            "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %6, 0;\n"
            "tcgen05.mma.cta_group::2.kind::mxf8f6f4.block_scale [%0], %1, %2, %3, [%4], [%5], accumulate;\n}" ::"r"(
                accumulator),
            "l"(rows), "l"(cols), "r"(instruction), "r"(row_scales), "r"(col_scales),
            "r"(static_cast<uint32_t>(accumulate))
            : "memory");
    }
}

// The same of 64 FP4 products, two a byte, by a single CTA; scales as above, two bytes of a word for each instruction.
__device__ __forceinline__ void multiply_fp4(uint32_t accumulator, uint64_t rows, uint64_t cols, uint32_t instruction,
                                             uint32_t row_scales, uint32_t col_scales, bool accumulate) {
    asm volatile(
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %6, 0;\n"
        "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X [%0], %1, %2, %3, [%4], [%5], accumulate;\n}" ::"r"(
            accumulator),
        "l"(rows), "l"(cols), "r"(instruction), "r"(row_scales), "r"(col_scales), "r"(static_cast<uint32_t>(accumulate))
        : "memory");
}

// Arrives on the barrier (of both CTAs of a pair) once all operations that this thread has issued are done.
template <int kCtas>
__device__ __forceinline__ void commit(ptx::Barrier& barrier) {
    if constexpr (kCtas == 1) {
        asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(
                         ptx::smem_address(&barrier))
                     : "memory");
    } else {
        asm volatile(
            "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(
                ptx::smem_address(&barrier)),
            "h"(static_cast<uint16_t>(3))
            : "memory");
    }
}

// ---- TMA for a pair of CTAs ----

// Loads a box into this CTA's shared memory; its bytes count towards the barrier of the pair's first CTA.
__device__ __forceinline__ void tma_load_2d_pair(const CUtensorMap& map, ptx::Barrier& barrier, void* destination, int x,
                                                 int y) {
    asm volatile(
        "{\n"
        ".reg .b32 leader;\n"
        "mapa.shared::cluster.u32 leader, %2, 0;\n"
        "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}],"
        " [leader];\n"
        "}\n" ::"r"(ptx::smem_address(destination)),
        "l"(&map), "r"(ptx::smem_address(&barrier)), "r"(x), "r"(y)
        : "memory");
}

// As above, from a tensor of three dimensions.
__device__ __forceinline__ void tma_load_3d_pair(const CUtensorMap& map, ptx::Barrier& barrier, void* destination, int x,
                                                 int y, int z) {
    asm volatile(
        "{\n"
        ".reg .b32 leader;\n"
        "mapa.shared::cluster.u32 leader, %2, 0;\n"
        "cp.async.bulk.tensor.3d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}],"
        " [leader];\n"
        "}\n" ::"r"(ptx::smem_address(destination)),
        "l"(&map), "r"(ptx::smem_address(&barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

}  // namespace deep_gemm::sm100
