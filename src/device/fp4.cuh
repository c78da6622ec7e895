// E2M1 values in E4M3, which has all of them, and their products with powers of two from 2^-8 to 2^6.
#pragma once

#include <cstdint>

namespace deep_gemm {

// E4M3 codes of the magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6, the lowest byte first.
inline constexpr uint32_t kLowMagnitudes = 0x3c383000, kHighMagnitudes = 0x4c484440;

// Four values, two a byte in the low 16 bits of `pairs`, as four bytes; the low half of a byte comes first. `low` and `high`
// are the codes of their eight magnitudes.
__device__ __forceinline__ uint32_t expand_e2m1(uint32_t pairs, uint32_t low = kLowMagnitudes,
                                                uint32_t high = kHighMagnitudes) {
    const uint32_t magnitudes = __byte_perm(low, high, pairs & 0x7777);
    // Each value's sign in bit 7 of its byte: of those in low halves after a shift.
    const uint32_t signs = __byte_perm(pairs, pairs << 4, 0x1504);
    return magnitudes | (signs & 0x80808080);
}

// The codes of the magnitudes times 2^exponent, -5 <= exponent <= 6: the exponent of each but 0 grows.
__device__ __forceinline__ uint32_t scaled_low_magnitudes(int exponent) {
    return kLowMagnitudes + static_cast<uint32_t>(exponent * 8) * 0x01010100;
}
__device__ __forceinline__ uint32_t scaled_high_magnitudes(int exponent) {
    return kHighMagnitudes + static_cast<uint32_t>(exponent * 8) * 0x01010101;
}
inline constexpr int kSmallestExponent = -5, kLargestExponent = 6;

// Magnitudes times 2^exponent down to -8, where the smallest of them are subnormal and still exact.
inline constexpr int kSmallestSubnormalExponent = -8;
__device__ __forceinline__ uint2 scaled_magnitudes(int exponent) {
    if (exponent >= kSmallestExponent) return {scaled_low_magnitudes(exponent), scaled_high_magnitudes(exponent)};
    return exponent == -6   ? make_uint2(0x0c080400, 0x1c181410)
           : exponent == -7 ? make_uint2(0x06040200, 0x14100c08)
                            : make_uint2(0x03020100, 0x0c080604);
}

}  // namespace deep_gemm
