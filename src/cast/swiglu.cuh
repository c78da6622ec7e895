// The pieces of SwiGLU as the casts and the kernels of whole experts compute it, to the bit.
#pragma once

#include "cast/scale.cuh"

namespace deep_gemm::cast {

// 1 / (1 + exp(-x)) as deep_gemm_ops.fused_casts.sigmoid has it, operation by operation: exp by a polynomial of degree
// four, since the hardware's exponential could not be reproduced elsewhere.
__device__ __forceinline__ float sigmoid(float x) {
    constexpr float kLog2E = 0x1.715476p+0f, kRange = 250;          // binary exponents from -125 to 125
    constexpr float kRound = 0x1.8p+23f - kRange / 2;               // adding it leaves an integer in the low bits
    float position;                                                 // of -x * log2(e) in that range, 0 to 1
    asm("fma.rn.sat.f32 %0, %1, %2, 0f3F000000;" : "=f"(position) : "f"(x), "f"(-kLog2E / kRange));
    const float rounded = __fmaf_rn(position, kRange, kRound);
    const float fraction = __fmaf_rn(position, kRange, -__fsub_rn(rounded, kRound));
    float power = __fmaf_rn(fraction, 0x1.3a02c4p-7f, 0x1.c9fc46p-5f);
    power = __fmaf_rn(power, fraction, 0x1.ec0378p-3f);
    power = __fmaf_rn(power, fraction, 0x1.62e12cp-1f);
    power = __fmaf_rn(power, fraction, 1.0f);
    const float exponential = __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
    const float divisor = __fadd_rn(exponential, 1.0f);
    return refine_reciprocal(divisor, rough_reciprocal(divisor));
}

__device__ __forceinline__ float silu(float x) { return __fmul_rn(x, sigmoid(x)); }

__device__ __forceinline__ float min_nan(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

__device__ __forceinline__ float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

}  // namespace deep_gemm::cast
