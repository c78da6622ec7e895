// What the threads of a warp have in common.
#pragma once

namespace deep_gemm {

// A number that all threads of the warp have, said in a way that the compiler understands. Where it knows that a loop is as
// long in all of them it keeps addresses and descriptors in uniform registers: 15 instructions less for a K block.
__device__ __forceinline__ int uniform(int value) { return __reduce_max_sync(0xffffffff, value); }

// The same for coordinates of TMA copies, which are otherwise issued in a loop over lanes. (`uniform` there made ptxas give
// up the uniform registers of the main loop.)
__device__ __forceinline__ int of_first_lane(int value) { return __shfl_sync(0xffffffff, value, 0); }

}  // namespace deep_gemm
