// Arithmetic of FP8 quantisation and of UE8M0 scale factors. IEEE float32 throughout: results are compared bit for bit
// with the PyTorch reference.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// 1 / x in two steps. Together they are correctly rounded for x that are normal and whose reciprocals are: __frcp_rn
// without its test for others. For Inf and NaN the first alone is right.
__device__ __forceinline__ float rough_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float refine_reciprocal(float x, float y) {
    return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

// sf is a normal number: amax / 448 >= 2e-7.
__device__ __forceinline__ float ceil_to_power_of_two(float sf) {
    return __uint_as_float((__float_as_uint(sf) + 0x7fffff) & 0x7f800000);
}

// Format: E4M3 or E2M1, below. The general division and reciprocal, for kernels that need one scale a thread: held in
// 64 registers, the call behind each is also what keeps ptxas from carrying unpacked elements past it.
template <class Format>
__device__ __forceinline__ GroupScale group_scale(float amax, bool round_to_power_of_two) {
    GroupScale scale;
    scale.sf = __fdiv_rn(max_abs(amax, 1e-4f), Format::kMax);
    if (round_to_power_of_two && scale.sf < __uint_as_float(0x7f800000)) scale.sf = ceil_to_power_of_two(scale.sf);
    scale.inverse = __frcp_rn(scale.sf);
    return scale;
}

// The same bits in a third of the instructions, without a branch: for kernels that need a scale for every few elements.
// The quotient by a constant needs one correction, which is exact (for every float32 from 1e-4 on).
template <class Format>
__device__ __forceinline__ GroupScale quick_group_scale(float amax, bool round_to_power_of_two) {
    amax = max_abs(amax, 1e-4f);
    const float quotient = __fmul_rn(amax, 1 / Format::kMax);
    const float remainder = __fmaf_rn(quotient, -Format::kMax, amax);
    const bool finite = amax < __uint_as_float(0x7f800000);  // of Inf and NaN nothing is to be corrected
    GroupScale scale;
    scale.sf = finite ? __fmaf_rn(remainder, 1 / Format::kMax, quotient) : quotient;
    if (round_to_power_of_two && finite) scale.sf = ceil_to_power_of_two(scale.sf);
    scale.inverse = rough_reciprocal(scale.sf);
    if (finite) scale.inverse = refine_reciprocal(scale.sf, scale.inverse);
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
    static __host__ __device__ constexpr int64_t bytes(int64_t values) { return values; }

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

// ... and of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), two a byte, the even column's in the low half. It
// has no NaN: one is written as 6.
struct E2M1 {
    static constexpr float kMax = 6;
    static __host__ __device__ constexpr int64_t bytes(int64_t values) { return values / 2; }

    // 0x4b000000 + the code of a magnitude up to 6 (and what rounding adds). As a function of the magnitude the code is
    // the least of three straight lines, each of which a sum with 2^23 rounds to the nearest integer, ties to even.
    static constexpr uint32_t kCodeBase = 0x4b000000;
    static __device__ __forceinline__ uint32_t based_code(float magnitude) {
        constexpr float kBase = 0x1p+23f;
        const float below_2 = __fmaf_rn(magnitude, 2.0f, kBase);
        const float below_4 = __fadd_rn(magnitude, kBase + 2);
        const float above_4 = __fmaf_rn(magnitude, 0.5f, kBase + 4);
        return __float_as_uint(fminf(below_2, fminf(below_4, above_4)));
    }
    // Only a group with NaN or Inf, whose inverse is NaN or 0, has other values: NaN, which fminf turns into 6, and
    // zeros.
    static __device__ __forceinline__ bool is_ordinary(float inverse) { return inverse > 0; }
    static __device__ __forceinline__ float limited(float value) { return fmaxf(fminf(value, 6.0f), -6.0f); }

    template <int kValues>
    struct alignas(kValues / 2) Packed {
        std::conditional_t<kValues == 8, uint32_t, uint16_t> word;
    };
    template <int kValues>
    static __device__ __forceinline__ Packed<kValues> pack(const float (&x)[kValues], float inverse) {
        uint32_t codes = codes_of(x, inverse);
        if (!is_ordinary(inverse)) {
            float values[kValues];
#pragma unroll
            for (int e = 0; e < kValues; ++e) values[e] = limited(x[e] * inverse);
            codes = codes_of(values, 1);
        }
        return {static_cast<decltype(Packed<kValues>::word)>(codes)};
    }
    // Columns are even in number and neighbouring lanes have neighbouring ones: the even one writes both.
    static __device__ __forceinline__ void store_one(uint8_t* row, int col, float x, float inverse, bool inside) {
        const float value = limited(x * inverse);
        const uint32_t own = (based_code(fabsf(value)) & 7) | (__float_as_uint(value) >> 28 & 8);
        const uint32_t next = __shfl_down_sync(0xffffffff, own, 1);
        if (inside && col % 2 == 0) row[col / 2] = static_cast<uint8_t>(own | next << 4);
    }

private:
    // Of values whose magnitudes times `inverse` are at most 6.
    template <int kValues>
    static __device__ __forceinline__ uint32_t codes_of(const float (&x)[kValues], float inverse) {
        uint32_t codes = 0;
#pragma unroll
        for (int e = 0; e < kValues; ++e)
            codes += (based_code(fabsf(x[e]) * inverse) - (e < 2 ? kCodeBase : 0)) << (4 * e);
        // The signs of even and of odd columns, the first in the lowest byte.
        uint32_t even = 0, odd = 0;
        if constexpr (kValues == 8) {
            even = high_bytes(high_bytes(x[0], x[2]), high_bytes(x[4], x[6]));
            odd = high_bytes(high_bytes(x[1], x[3]), high_bytes(x[5], x[7]));
        } else {
            even = high_bytes(x[0], x[2]), odd = high_bytes(x[1], x[3]);
        }
        return codes | (even >> 4 & 0x08080808) | (odd & 0x80808080);
    }
    static __device__ __forceinline__ uint32_t high_bytes(float x, float y) {
        return __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x73);
    }
    static __device__ __forceinline__ uint32_t high_bytes(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
};

// Maxima of kRows rows over kLanes neighbouring lanes, each of which has its own maximum of every row: lane i returns that of
// row i % kRows. An exchange halves what a lane has left to do, so there are kRows - 1 + log2(kLanes / kRows) of them; row by
// row it would take kRows * log2(kLanes).
template <int kLanes, int kRows, typename Value, typename Larger>
__device__ __forceinline__ Value max_of_own_row(Value (&row_max)[kRows], const Larger& larger) {
    static_assert(kLanes >= kRows);
#pragma unroll
    for (int half = kRows / 2; half > 0; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const Value kept = upper ? row_max[i + half] : row_max[i], sent = upper ? row_max[i] : row_max[i + half];
            row_max[i] = larger(kept, __shfl_xor_sync(0xffffffff, sent, half));
        }
    }
#pragma unroll
    for (int offset = kRows; offset < kLanes; offset *= 2)
        row_max[0] = larger(row_max[0], __shfl_xor_sync(0xffffffff, row_max[0], offset));
    return row_max[0];
}

// Makes the compiler unpack these elements again rather than hold them unpacked, at twice the registers, across a
// barrier.
__device__ __forceinline__ void forget_unpacked(uint4& raw) {
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

__device__ __forceinline__ uint32_t word(const uint4& raw, int i) {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}

// The elements of 16 loaded bytes, one of them, and one element loaded alone, as float32. Words of elements, two or one in
// each, have their larger magnitudes, element by element, and the largest one in a word; NaN where either is. The signs of
// larger() mean nothing.
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
    static __device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
        return __float_as_uint(max_abs(__uint_as_float(x), fabsf(__uint_as_float(y))));
    }
    static __device__ __forceinline__ float magnitude_at(uint32_t word, int) { return fabsf(unpack_one(word)); }
    static __device__ __forceinline__ float magnitude(uint32_t word) { return magnitude_at(word, 0); }
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
    static __device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
        uint32_t z;
        asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
        return z;
    }
    static __device__ __forceinline__ float magnitude_at(uint32_t word, int e) {
        return fabsf(__uint_as_float(e == 0 ? word << 16 : word & 0xffff0000));
    }
    static __device__ __forceinline__ float magnitude(uint32_t word) {
        return max_abs(magnitude_at(word, 0), magnitude_at(word, 1));
    }
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
    static __device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
        uint32_t z;
        asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
        return z;
    }
    static __device__ __forceinline__ float magnitude_at(uint32_t word, int e) {
        return fabsf(unpack_one(word >> (16 * e) & 0xffff));
    }
    static __device__ __forceinline__ float magnitude(uint32_t word) {
        return max_abs(magnitude_at(word, 0), magnitude_at(word, 1));
    }
};

}  // namespace deep_gemm::cast
