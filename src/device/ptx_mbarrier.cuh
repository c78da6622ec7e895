// mbarriers and the other barriers of a CTA or a cluster, one instruction per function.
#pragma once

#include <cstdint>

namespace deep_gemm::ptx {

using Barrier = uint64_t;

// Shared-window address of a pointer into shared memory, the form that all instructions below take.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// base + index * kPitch: where element `index` of an array in shared memory is, or a part of a descriptor that says so. One
// instruction of PTX, as it is one of SASS; the compiler makes a shift and an addition if kPitch is a power of two.
template <uint32_t kPitch>
__device__ __forceinline__ uint32_t element_address(uint32_t base, uint32_t index) {
    uint32_t address;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(address) : "r"(index), "n"(kPitch), "r"(base));
    return address;
}

// Keeps the compiler from computing a value anew in each round of a loop, which takes no register but an instruction.
__device__ __forceinline__ uint32_t computed_once(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ void mbarrier_init(Barrier& barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to bulk copies and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At `kOffset` bytes behind an address.
template <uint32_t kOffset = 0>
__device__ __forceinline__ void mbarrier_arrive(uint32_t address) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0 + %1];" ::"r"(address), "n"(kOffset) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Barrier& barrier) { mbarrier_arrive(smem_address(&barrier)); }

__device__ __forceinline__ void mbarrier_arrive_expect_tx(Barrier& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Arrives on the barrier at the same offset in the CTA `rank` of this cluster (which may be this one). Says that this
// CTA is done with something; it does not publish writes to the other CTA. (Publishing them takes arrive.release.cluster,
// a memory barrier: 0.65 us on an H200.)
template <uint32_t kOffset = 0>
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t address, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote + %2];\n"
        "}\n" ::"r"(address),
        "r"(rank), "n"(kOffset)
        : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_remote(Barrier& barrier, uint32_t rank) {
    mbarrier_arrive_remote(smem_address(&barrier), rank);
}

__device__ __forceinline__ void mbarrier_wait(uint32_t address, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(address),
        "r"(phase)
        : "memory");
}

__device__ __forceinline__ void mbarrier_wait(Barrier& barrier, uint32_t phase) {
    mbarrier_wait(smem_address(&barrier), phase);
}

// Barrier of `threads` threads of this CTA; ids 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives on such a barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// One lane of a converged warp, the same one every time.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred is_elected;\n"
        "elect.sync _|is_elected, 0xffffffff;\n"
        "selp.b32 %0, 1, 0, is_elected;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

// Programmatic dependent launch: wait until the previous kernel's writes are visible; let the next kernel start.
__device__ __forceinline__ void grid_dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void grid_dependency_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace deep_gemm::ptx
