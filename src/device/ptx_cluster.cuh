// What CTAs of a cluster that exchange plain values need beyond ptx_mbarrier.cuh and ptx_memory.cuh.
#pragma once

#include <cstdint>

#include "ptx_mbarrier.cuh"

namespace deep_gemm::ptx {

// The two halves of a cluster's barrier. The first one publishes nothing, and so waits for nothing, where that of
// cluster_sync() is a memory barrier of the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Copies `bytes`, a multiple of 16, from this CTA's shared memory to an address that remote_address() gives, asynchronously;
// they count towards a barrier of the receiving CTA. The source has to stay until that CTA has waited for them.
__device__ __forceinline__ void copy_to_remote(uint32_t remote, uint32_t remote_barrier, const void* source,
                                               uint32_t bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(remote),
        "r"(smem_address(source)), "r"(bytes), "r"(remote_barrier)
        : "memory");
}

}  // namespace deep_gemm::ptx
