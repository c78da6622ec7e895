// Numerics and operand layouts shared by mma.sync, wgmma and tcgen05.mma.
#pragma once
#include "machine.hpp"
#include "numerics.hpp"

namespace ptx_emulator {

enum class Elem : u8 { F16, BF16, TF32, E4M3, E5M2, E2M3, E3M2, E2M1, S8, U8, F64 };

inline u32 elemBytes(Elem e) {
    return e == Elem::TF32 ? 4 : e == Elem::F16 || e == Elem::BF16 ? 2 : e == Elem::F64 ? 8 : 1;
}
Elem elemFromName(std::string_view n, bool& ok);

// Decodes `count` elements stored one per elemBytes() (sub-byte ones one per
// byte).  Every format is exact in double.
void decodeElems(Elem e, const u8* p, u32 count, double* out);

// out[i*ldo + j] += sum_k a[i*k.. ] * b[k*n + j]; the sum over K and the addition
// to the accumulator are carried out in double; the caller rounds once.
void matmulAdd(u32 m, u32 n, u32 k, const double* a, const double* b, double* c);

// The same as the tensor cores of Hopper do it, bit for bit as an H200 has answered: see the definition.
void hopperMatmulAdd(Elem ea, Elem eb, u32 m, u32 n, u32 k, const double* a, const double* b, double* c);

// Shared-memory matrix descriptor, PTX ISA "Matrix Descriptor Format".
struct SmemDesc {
    u32 start, lbo, sbo, baseOffset;
    enum Swizzle : u8 { None, S32, S64, S128, S128Base32 } swizzle;
};
SmemDesc wgmmaDesc(u64 d);
SmemDesc ummaDesc(u64 d);

// Byte address (CTA offset) of the 16-byte chunk that holds element (mn, kByte)
// for a K-major operand, or (mnByte, k) for an MN-major one.
struct OperandLayout {
    SmemDesc d;
    bool mnMajor;
    u32 chunk(u32 outer, u32 innerByte) const {
        // outer: mn row (K-major) or k row (MN-major); innerByte along the contiguous dimension.
        u32 span = d.swizzle == SmemDesc::S32 ? 32 : d.swizzle == SmemDesc::S64 ? 64 : 128;
        u32 a;
        if (d.swizzle == SmemDesc::None) {
            u32 atom = (outer % 8) * 16 + innerByte % 16;
            a = mnMajor ? d.start + atom + (innerByte / 16) * d.sbo + (outer / 8) * d.lbo
                        : d.start + atom + (innerByte / 16) * d.lbo + (outer / 8) * d.sbo;
        } else {
            u32 rows = d.swizzle == SmemDesc::S128Base32 && mnMajor ? 4 : 8;
            a = d.start + (outer % rows) * span + innerByte % span + (innerByte / span) * (mnMajor ? d.lbo : 0) +
                (outer / rows) * d.sbo;
        }
        u32 s = a - d.baseOffset * 128;  // the pattern may start at a non-aligned row
        switch (d.swizzle) {
            case SmemDesc::None: break;
            case SmemDesc::S32: a ^= (s >> 3) & 0x10; break;
            case SmemDesc::S64: a ^= (s >> 3) & 0x30; break;
            case SmemDesc::S128: a ^= (s >> 3) & 0x70; break;
            case SmemDesc::S128Base32: a ^= (s >> 2) & 0x60; break;
        }
        return a;
    }
};

// Reads mn rows by k elements of `e` into out[row * k + col] (double) and appends
// the 16-byte granules that were touched.
void gatherOperand(Machine& m, Warp* w, Cta* c, const OperandLayout& l, Elem e, u32 mn, u32 k, double* out,
                   std::vector<u32>& granules, const char* what, bool packed4 = false);

}  // namespace ptx_emulator
