// FP8 tokens as BF16, in the order of K in which FP4 weights are expanded beside them (sm90/bf16_fp4_rows.cuh): of each 128 of K
// position 16 (2 i + h) + 8 u + 2 t + b has value 32 t + 8 i + 2 h + u + 4 b. With UE8M0 scales, these included: exact, since E4M3
// has 4 bits of mantissa and BF16 8, but for products below 2^-133, BF16's smallest number.
//
// A thread has the eight values with one i from each 32 of K, which are 64 neighbouring bytes of the result. Two threads exchange
// halves, so that they write whole sectors.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace deep_gemm {

inline constexpr int kBf16BlockThreads = 4;  // for 128 of K of a token: thread i

// Where value `column` of 128 is.
__device__ __forceinline__ constexpr int bf16_token_position(int column) {
    const int t = column / 32, i = column / 8 % 4, b = column / 4 % 2, h = column / 2 % 2, u = column % 2;
    return 16 * (2 * i + h) + 8 * u + 2 * t + b;
}

__device__ __forceinline__ float power_of_two(uint32_t code) {
    return code == 255 ? __uint_as_float(0x7fc00000) : code == 0 ? 0x1p-127f : __uint_as_float(code << 23);
}

// Two E4M3 values of the low 16 bits.
__device__ __forceinline__ float2 e4m3_to_float2(uint32_t pair) {
    const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    return __half22float2(halves);
}

// `low` in the lower half.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// All threads of a warp: `values[t]` are the thread's eight of 32 t ..., `scales[t]` theirs. stores[j] goes to where
// bf16_store() says, plus 32 j bytes.
__device__ __forceinline__ void bf16_of_tokens(const uint2 (&values)[4], const float (&scales)[4], bool is_odd,
                                               uint32_t (&stores)[4][4]) {
    uint32_t units[4][4];  // 16 bytes each, of h and u; t in a unit
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            // Values p and p + 4: p is 2 h + u.
            const float2 pair = e4m3_to_float2(__byte_perm(values[t].x, values[t].y, p | (p + 4) << 4) & 0xffff);
            units[p][t] = to_bf16x2(pair.x * scales[t], pair.y * scales[t]);
        }
    }
    // The even thread of two writes the first 16 bytes of each 32, of its own and then of the other's.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const uint32_t first = units[2 * half][t], second = units[2 * half + 1][t];
            const uint32_t received = __shfl_xor_sync(0xffffffff, is_odd ? first : second, 1);
            stores[half][t] = is_odd ? received : first;       // of the even thread's
            stores[2 + half][t] = is_odd ? second : received;  // of the odd thread's
        }
    }
}

// Bytes from the beginning of thread i's 128 of K.
__device__ __forceinline__ int bf16_store(int i) { return i / 2 * 128 + i % 2 * 16; }

}  // namespace deep_gemm
