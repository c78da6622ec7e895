// Global-memory access and programmatic dependent launch of the memory-bound kernels.
#pragma once

#include <cstdint>

namespace deep_gemm::cast {

// Returns once the kernels that this one depends on have finished and their writes are visible.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel of the stream start while this one runs; that one still waits for this one's end.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Inputs are read once: they need no place in L1. Plain loads, not .nc: under programmatic dependent launch the memory
// may still be written when this kernel starts. Volatile, so that none is moved above wait_for_dependencies().
__device__ __forceinline__ uint4 load_16(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 load_8(const void* p) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t load_4(const void* p) {
    uint32_t v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t load_2(const void* p) {
    uint16_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t load_1(const void* p) {
    uint32_t v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Starts a copy of 16 bytes to an address of shared memory, of which only the first `bytes` (0 to 16) are read and the rest
// are zeros; and waits for all that this thread has started.
__device__ __forceinline__ void copy_16_async(uint32_t target, const void* p, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(p), "r"(bytes) : "memory");
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same address in global memory, of whose origin nothing is known: what is added to it is added, where the compiler would
// rather compute each address anew from the kernel's parameters, in 64 bits.
template <typename T>
__device__ __forceinline__ T* opaque(T* p) {
    size_t address = __cvta_generic_to_global(p);
    asm volatile("" : "+l"(address));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

template <int kBytes>
__device__ __forceinline__ uint32_t load_element(const void* p) {
    static_assert(kBytes == 2 || kBytes == 4);
    return kBytes == 2 ? load_2(p) : load_4(p);
}

}  // namespace deep_gemm::cast
