// Tensor copies between global and shared memory (the bulk copy engine, TMA).
#pragma once

#include <cuda.h>

#include "ptx_mbarrier.cuh"

namespace deep_gemm::ptx {

// L2 eviction hints, in the encoding that createpolicy.fractional gives for a fraction of 1.
enum class CacheHint : uint64_t {
    kEvictNormal = 0x1000000000000000ull,
};

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at element coordinates (x innermost, y) into `destination`; its bytes count towards `barrier`.
__device__ __forceinline__ void tma_load_2d(const CUtensorMap& map, Barrier& barrier, void* destination, int x, int y,
                                            CacheHint hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(destination)),
        "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// As above, from a tensor of three dimensions.
__device__ __forceinline__ void tma_load_3d(const CUtensorMap& map, Barrier& barrier, void* destination, int x, int y,
                                            int z, CacheHint hint) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_address(destination)),
        "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(z), "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// Brings the box to L2. Reads no element: what is written before tma_load_2d reads it is what that gets.
__device__ __forceinline__ void tma_prefetch_2d(const CUtensorMap& map, int x, int y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map), "r"(x), "r"(y) : "memory");
}

// As tma_load_2d, into the CTAs of the cluster whose bit is set in `ranks`: same offsets, each CTA's own barrier.
__device__ __forceinline__ void tma_load_2d_multicast(const CUtensorMap& map, Barrier& barrier, void* destination,
                                                      int x, int y, uint16_t ranks, CacheHint hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(smem_address(destination)),
        "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "h"(ranks), "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// Stores a box; parts outside the tensor are not written.
__device__ __forceinline__ void tma_store_2d(const CUtensorMap& map, const void* source, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(smem_address(source)), "r"(x), "r"(y)
                 : "memory");
}

__device__ __forceinline__ void tma_store_3d(const CUtensorMap& map, const void* source, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(smem_address(source)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Adds a box to what is there.
__device__ __forceinline__ void tma_add_2d(const CUtensorMap& map, const void* source, int x, int y) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(smem_address(source)), "r"(x), "r"(y)
                 : "memory");
}

__device__ __forceinline__ void tma_add_3d(const CUtensorMap& map, const void* source, int x, int y, int z) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                     &map),
                 "r"(smem_address(source)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's latest store groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace deep_gemm::ptx
