// What the threads of a warp have in common.
#pragma once

namespace deep_gemm {

// A number that all threads of the warp have, said in a way that the compiler understands. Where it knows that a loop is as
// long in all of them it keeps addresses and descriptors in uniform registers: 15 instructions less for a K block.
__device__ __forceinline__ int uniform(int value) { return __reduce_max_sync(0xffffffff, value); }

}  // namespace deep_gemm
