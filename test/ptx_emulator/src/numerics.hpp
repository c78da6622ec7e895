// Conversions between float32 and the narrow floating-point formats.
#pragma once
#include <cmath>
#include "common.hpp"

namespace ptx_emulator {

enum class Round { RN, RZ, RM, RP, RNA, RS };

inline float bf16ToFloat(u16 h) { return std::bit_cast<float>(u32(h) << 16); }
inline float asFloat(u32 v) { return std::bit_cast<float>(v); }
inline u32 asBits(float v) { return std::bit_cast<u32>(v); }
inline float ftz(float x) {
    u32 b = asBits(x);
    return (b & 0x7f800000u) ? x : asFloat(b & 0x80000000u);
}

inline float halfToFloat(u16 h) {
    u32 sign = u32(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023;
    if (exp == 31) return asFloat(sign | 0x7f800000u | man << 13);
    if (exp) return asFloat(sign | (exp + 112) << 23 | man << 13);
    float v = float(man) * 0x1p-24f;
    return sign ? -v : v;
}

// Rounds |x| (finite) to a format with `manBits` stored mantissa bits and
// minimum normal exponent `minExp`; the exponent range is unbounded above, the
// caller handles overflow.  Works on doubles so that every source is exact.
inline double roundToFormat(double x, int manBits, int minExp, Round r) {
    if (x == 0 || !std::isfinite(x)) return x;
    int e;
    std::frexp(x, &e);
    e -= 1;
    if (e < minExp) e = minExp;
    double scaled = std::ldexp(x, manBits - e), f = std::floor(scaled), diff = scaled - f;
    double q = f;
    switch (r) {
        case Round::RN: q = diff > 0.5 || (diff == 0.5 && std::fmod(f, 2.0) != 0) ? f + 1 : f; break;
        case Round::RNA: q = x > 0 ? (diff >= 0.5 ? f + 1 : f) : (diff > 0.5 ? f + 1 : f); break;
        case Round::RZ: q = std::trunc(scaled); break;
        case Round::RM: q = f; break;
        case Round::RP: q = diff > 0 ? f + 1 : f; break;
        case Round::RS: q = f; break;
    }
    double v = std::ldexp(q, e - manBits);
    return v == 0 ? std::copysign(0.0, x) : v;
}

inline u16 floatToBf16(float x, Round r = Round::RN) {
    u32 b = asBits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    u32 low = b & 0xffff, hi = b >> 16;
    bool up = false;
    switch (r) {
        case Round::RN: up = low > 0x8000 || (low == 0x8000 && (hi & 1)); break;
        case Round::RNA: up = low >= 0x8000; break;
        case Round::RZ:
        case Round::RS: break;
        case Round::RM: up = low && (b >> 31); break;
        case Round::RP: up = low && !(b >> 31); break;
    }
    if ((b & 0x7f800000u) == 0x7f800000u) up = false;
    return u16(hi + up);
}

inline u16 doubleToHalf(double x, Round r = Round::RN) {
    if (std::isnan(x)) return 0x7fff;
    u16 sign = std::signbit(x) ? 0x8000 : 0;
    double v = std::fabs(roundToFormat(x, 10, -14, r));
    if (v > 65504.0) {
        bool toMax = std::isfinite(x) && (r == Round::RZ || (r == Round::RM && !sign) || (r == Round::RP && sign));
        return sign | (toMax ? 0x7bff : 0x7c00);
    }
    if (v == 0) return sign;
    int e;
    std::frexp(v, &e);
    e -= 1;
    if (e < -14) return sign | u16(std::ldexp(v, 24));
    return sign | u16((e + 15) << 10) | u16(std::ldexp(v, 10 - e) - 1024);
}
inline u16 floatToHalf(float x, Round r = Round::RN) { return doubleToHalf(x, r); }

// tf32 keeps 10 mantissa bits; the tensor core ignores the low 13 bits.
inline float tf32Truncate(u32 b) { return asFloat(b & 0xffffe000u); }

// Descriptor of a small format; `maxCode` is the code of the largest finite.
struct MiniFloat {
    int expBits, manBits, bias;
    double maxFinite;
    u8 maxCode, nanCode;
    bool hasInf, hasNan;
    u8 infCode;
};
inline constexpr MiniFloat kE4M3{4, 3, 7, 448.0, 0x7e, 0x7f, false, true, 0};
inline constexpr MiniFloat kE5M2{5, 2, 15, 57344.0, 0x7b, 0x7f, true, true, 0x7c};
inline constexpr MiniFloat kE2M1{2, 1, 1, 6.0, 0x7, 0x7, false, false, 0};
inline constexpr MiniFloat kE2M3{2, 3, 1, 7.5, 0x1f, 0x1f, false, false, 0};
inline constexpr MiniFloat kE3M2{3, 2, 3, 28.0, 0x1f, 0x1f, false, false, 0};

inline float miniToFloat(const MiniFloat& f, u8 code) {
    int width = 1 + f.expBits + f.manBits;
    u32 mag = code & ((1u << (width - 1)) - 1);
    bool neg = (code >> (width - 1)) & 1;
    if (f.hasInf && mag == f.infCode) return neg ? -INFINITY : INFINITY;
    if (f.hasNan && mag > f.maxCode) return NAN;
    u32 e = mag >> f.manBits, m = mag & ((1u << f.manBits) - 1);
    double v = e ? std::ldexp(double(m + (1u << f.manBits)), int(e) - f.bias - f.manBits)
                 : std::ldexp(double(m), 1 - f.bias - f.manBits);
    return float(neg ? -v : v);
}

// PTX cvt to fp8/fp6/fp4 with .satfinite (the only form PTX offers).
inline u8 floatToMini(const MiniFloat& f, float x, Round r = Round::RN) {
    int width = 1 + f.expBits + f.manBits;
    u8 sign = std::signbit(x) ? u8(1u << (width - 1)) : 0;
    if (std::isnan(x)) return f.hasNan ? f.nanCode : f.maxCode;
    double v = std::fabs(roundToFormat(x, f.manBits, 1 - f.bias, r));
    if (v > f.maxFinite) return sign | f.maxCode;
    if (v == 0) return sign;
    int e;
    std::frexp(v, &e);
    e -= 1;
    if (e < 1 - f.bias) return sign | u8(std::ldexp(v, f.bias - 1 + f.manBits));
    return sign | u8((e + f.bias) << f.manBits) | u8(std::ldexp(v, f.manBits - e) - (1 << f.manBits));
}

// ue8m0: value = 2^(code-127), 255 is NaN.
inline float ue8m0ToFloat(u8 code) {
    if (code == 255) return NAN;
    return float(std::ldexp(1.0, int(code) - 127));
}
inline u8 floatToUe8m0(float x, Round r) {
    if (std::isnan(x)) return 255;
    double v = std::fabs(double(x));
    if (v == 0) return 0;
    if (std::isinf(v)) return 254;
    int e;
    double m = std::frexp(v, &e);  // v = m * 2^e, m in [0.5, 1)
    e -= 1;
    if (r == Round::RP && m != 0.5) e += 1;
    int code = e + 127;
    return u8(code < 0 ? 0 : code > 254 ? 254 : code);
}

// ue4m3: unsigned e4m3, used as nvfp4 scale.
inline float ue4m3ToFloat(u8 code) { return miniToFloat(kE4M3, code & 0x7f); }

struct MiniTables {
    float e4m3[256], e5m2[256], e2m1[16], e2m3[64], e3m2[64];
    MiniTables() {
        for (int i = 0; i < 256; i++) e4m3[i] = miniToFloat(kE4M3, u8(i)), e5m2[i] = miniToFloat(kE5M2, u8(i));
        for (int i = 0; i < 16; i++) e2m1[i] = miniToFloat(kE2M1, u8(i));
        for (int i = 0; i < 64; i++) e2m3[i] = miniToFloat(kE2M3, u8(i)), e3m2[i] = miniToFloat(kE3M2, u8(i));
    }
};
inline const MiniTables kMini;

}  // namespace ptx_emulator
