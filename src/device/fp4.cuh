// E2M1 values in E4M3, which has all of them.
#pragma once

#include <cstdint>

namespace deep_gemm {

// E4M3 codes of the magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6, the lowest byte first.
inline constexpr uint32_t kLowMagnitudes = 0x3c383000, kHighMagnitudes = 0x4c484440;

// Four values, two a byte in the low 16 bits of `pairs`, as four bytes; the low half of a byte comes first. `low` is
// kLowMagnitudes, perhaps in a register.
__device__ __forceinline__ uint32_t expand_e2m1(uint32_t pairs, uint32_t low = kLowMagnitudes) {
    const uint32_t magnitudes = __byte_perm(low, kHighMagnitudes, pairs & 0x7777);
    // Each value's sign in bit 7 of its byte: of those in low halves after a shift.
    const uint32_t signs = __byte_perm(pairs, pairs << 4, 0x1504);
    return magnitudes | (signs & 0x80808080);
}

}  // namespace deep_gemm
