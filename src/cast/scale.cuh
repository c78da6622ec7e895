// Arithmetic of FP8 quantisation and of UE8M0 scale factors. IEEE float32 throughout: results are compared bit for bit
// with the PyTorch reference.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace deep_gemm::cast {

// A byte b of UE8M0 is 2^(b - 127); 0xFF is NaN. Only a positive power of two has one.
__device__ __forceinline__ uint32_t float_bits_to_ue8m0(uint32_t bits) {
    if (bits == 0x00400000) return 0;  // 2^-127, a subnormal of float32
    const uint32_t exponent = bits >> 23;  // with the sign: negative numbers fail the test below
    return (bits & 0x7fffff) == 0 && exponent >= 1 && exponent <= 254 ? exponent : 0xff;
}

__device__ __forceinline__ uint32_t ue8m0_to_float_bits(uint32_t byte) {
    return byte == 0xff ? 0x7fc00000 : byte == 0 ? 0x00400000 : byte << 23;
}

// max(|x|, |y|); NaN where either is. fmaxf would drop it.
__device__ __forceinline__ float max_abs(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(fabsf(x)), "f"(fabsf(y)));
    return z;
}

struct GroupScale {
    float sf;
    float inverse;
};

__device__ __forceinline__ GroupScale group_scale(float amax, bool round_to_power_of_two) {
    GroupScale scale;
    scale.sf = __fdiv_rn(max_abs(amax, 1e-4f), 448.0f);
    if (round_to_power_of_two) {
        // sf is a normal number: amax / 448 >= 2e-7. Inf and NaN stay.
        const uint32_t bits = __float_as_uint(scale.sf);
        if (bits < 0x7f800000) scale.sf = __uint_as_float((bits + 0x7fffff) & 0x7f800000);
    }
    scale.inverse = __frcp_rn(scale.sf);
    return scale;
}

// The scale's byte of the packed format: NaN and Inf, which UE8M0 does not have, are 0xFF. sf is a power of two.
__device__ __forceinline__ uint32_t packed_scale(float sf) { return (__float_as_uint(sf) >> 23) & 0xff; }

// Four E4M3 values, the first in the lowest byte.
__device__ __forceinline__ uint32_t to_e4m3x4(float x, float y, float z, float w) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(y), "f"(x));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(w), "f"(z));
    return low | uint32_t{high} << 16;
}

// Makes the compiler unpack these elements again rather than hold them unpacked, at twice the registers, across a
// barrier.
__device__ __forceinline__ void forget_unpacked(uint4& raw) {
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

// The elements of 16 loaded bytes, and one element loaded alone, as float32.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
    static constexpr int kPer16 = 4;
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[4]) {
        x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
        x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
    }
    static __device__ __forceinline__ float unpack_one(uint32_t raw) { return __uint_as_float(raw); }
};

template <>
struct Elements<__nv_bfloat16> {
    static constexpr int kPer16 = 8;
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
        }
    }
    static __device__ __forceinline__ float unpack_one(uint32_t raw) { return __uint_as_float(raw << 16); }
};

template <>
struct Elements<__half> {
    static constexpr int kPer16 = 8;
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[8]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = unpack_one(words[i] & 0xffff);
            x[2 * i + 1] = unpack_one(words[i] >> 16);
        }
    }
    static __device__ __forceinline__ float unpack_one(uint32_t raw) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
    }
};

}  // namespace deep_gemm::cast
