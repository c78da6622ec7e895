// Shared-memory accesses that C++ has no word for.
#pragma once

#include "ptx_mbarrier.cuh"

namespace deep_gemm::ptx {

// Orders this thread's writes to shared memory before bulk copies and tensor-core operations that read it.
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Each lane gives the 16-byte row address of one 8x8 matrix of 16-bit values (lanes 0-7 the first, and so on).
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x2_transposed(uint32_t address, uint32_t r0, uint32_t r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                                       uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

// Writes 16 bytes into the shared memory of CTA `rank` of the cluster, at the offset that `local` has here.
__device__ __forceinline__ void store_remote_v4(void* local, uint32_t rank, float x, float y, float z, float w) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
        "}\n" ::"r"(smem_address(local)),
        "r"(rank), "f"(x), "f"(y), "f"(z), "f"(w)
        : "memory");
}

}  // namespace deep_gemm::ptx
