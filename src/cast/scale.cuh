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

// Format: E4M3 or E2M1, below.
template <class Format>
__device__ __forceinline__ GroupScale group_scale(float amax, bool round_to_power_of_two) {
    GroupScale scale;
    scale.sf = __fdiv_rn(max_abs(amax, 1e-4f), Format::kMax);
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

// Formats of results: the value `x * inverse` of E4M3, nearest even, saturating; NaN is written as 0x7F.
struct E4M3 {
    static constexpr float kMax = 448;
    static __device__ __forceinline__ int64_t bytes(int64_t values) { return values; }

    template <int kValues>
    struct alignas(kValues) Packed {
        uint32_t words[kValues / 4];
    };
    template <int kValues>
    static __device__ __forceinline__ Packed<kValues> pack(const float (&x)[kValues], float inverse) {
        Packed<kValues> packed;
#pragma unroll
        for (int e = 0; e < kValues; e += 4)
            packed.words[e / 4] = to_e4m3x4(x[e] * inverse, x[e + 1] * inverse, x[e + 2] * inverse,
                                            x[e + 3] * inverse);
        return packed;
    }
    static __device__ __forceinline__ void store_one(uint8_t* row, int col, float x, float inverse,
                                                     bool inside) {
        if (inside) row[col] = static_cast<uint8_t>(to_e4m3x4(x * inverse, 0, 0, 0));
    }
};

// ... and of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two a byte, the even column's in the low half. It has
// no NaN: one is written as 6.
struct E2M1 {
    static constexpr float kMax = 6;
    static __device__ __forceinline__ int64_t bytes(int64_t values) { return values / 2; }

    // The code of a value between -6 and 6. The sum below ends in whole steps of the format at that magnitude: 0.5 below
    // 2, 1 below 4, 2 above. Steps and exponent together are the code; what 6 adds makes the exponent's offset vanish
    // modulo 16. Rounding may leave a value a little above 6, which does no harm.
    static __device__ __forceinline__ uint32_t code(float value) {
        const uint32_t bits = __float_as_uint(value);
        const uint32_t power = max(bits & 0x7f800000, 0x3f800000);
        const uint32_t sum = __float_as_uint(__fadd_rn(fabsf(value), __uint_as_float(power + 0x0b000006)));
        return ((sum + (sum >> 22)) & 7) | (bits >> 28 & 8);
    }
    // Only a group with NaN or Inf, whose inverse is NaN or 0, has other values: NaN, which fminf turns into 6, and zeros.
    static __device__ __forceinline__ float limited(float value) { return fmaxf(fminf(value, 6.0f), -6.0f); }

    template <int kValues>
    struct alignas(kValues / 2) Packed {
        uint16_t quads[kValues / 4];
    };
    template <int kValues>
    static __device__ __forceinline__ Packed<kValues> pack(const float (&x)[kValues], float inverse) {
        Packed<kValues> packed;
        float value[kValues];
#pragma unroll
        for (int e = 0; e < kValues; ++e) value[e] = x[e] * inverse;
        if (!(inverse > 0)) {
#pragma unroll
            for (int e = 0; e < kValues; ++e) value[e] = limited(value[e]);
        }
#pragma unroll
        for (int e = 0; e < kValues; e += 4)
            packed.quads[e / 4] = static_cast<uint16_t>(code(value[e]) | code(value[e + 1]) << 4 |
                                                        code(value[e + 2]) << 8 | code(value[e + 3]) << 12);
        return packed;
    }
    // Columns are even in number and neighbouring lanes have neighbouring ones: the even one writes both.
    static __device__ __forceinline__ void store_one(uint8_t* row, int col, float x, float inverse,
                                                     bool inside) {
        const uint32_t own = code(limited(x * inverse)), next = __shfl_down_sync(0xffffffff, own, 1);
        if (inside && col % 2 == 0) row[col / 2] = static_cast<uint8_t>(own | next << 4);
    }
};

// Makes the compiler unpack these elements again rather than hold them unpacked, at twice the registers, across a
// barrier.
__device__ __forceinline__ void forget_unpacked(uint4& raw) {
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

__device__ __forceinline__ uint32_t word(const uint4& raw, int i) {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}

// The elements of 16 loaded bytes, one of them, and one element loaded alone, as float32.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
    static constexpr int kPer16 = 4;
    static __device__ __forceinline__ void unpack(const uint4& raw, float (&x)[4]) {
        x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
        x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
    }
    static __device__ __forceinline__ float unpack_at(const uint4& raw, int e) { return unpack_one(word(raw, e)); }
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
    static __device__ __forceinline__ float unpack_at(const uint4& raw, int e) {
        const uint32_t pair = word(raw, e / 2);
        return __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xffff0000);
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
    static __device__ __forceinline__ float unpack_at(const uint4& raw, int e) {
        return unpack_one(word(raw, e / 2) >> (e % 2 * 16) & 0xffff);
    }
    static __device__ __forceinline__ float unpack_one(uint32_t raw) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
    }
};

}  // namespace deep_gemm::cast
