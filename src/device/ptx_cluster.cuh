// What CTAs of a cluster that exchange plain values need beyond ptx_mbarrier.cuh and ptx_memory.cuh.
#pragma once

#include <cstdint>

namespace deep_gemm::ptx {

// The first half of cluster_sync(), for threads that end behind it.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// 16 bytes at an address that remote_address() gives.
__device__ __forceinline__ float4 load_remote_v4(uint32_t remote) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(remote)
                 : "memory");
    return x;
}

}  // namespace deep_gemm::ptx
