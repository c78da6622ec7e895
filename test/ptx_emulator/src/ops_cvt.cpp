// cvt in all its forms, cvt.pack, and address-space conversion (cvta).
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

Round roundOf(const Stmt& s, Round def) {
    if (s.has("rn")) return Round::RN;
    if (s.has("rna")) return Round::RNA;
    if (s.has("rz")) return Round::RZ;
    if (s.has("rm")) return Round::RM;
    if (s.has("rp")) return Round::RP;
    if (s.has("rs")) return Round::RS;
    return def;
}

// --- int -> int ----------------------------------------------------------------
template <class T>
T readInt(const u8* p, int i, u32 stride) {
    if constexpr (sizeof(T) == 8)
        return ((const T*)p)[i];
    else
        return stride == 8 ? T(((const u64*)p)[i]) : T(((const u32*)p)[i]);
}
inline void writeWide(u8* p, int i, u32 stride, u64 v) {
    if (stride == 8)
        ((u64*)p)[i] = v;
    else
        ((u32*)p)[i] = u32(v);
}
template <class D, class S>
Status cvtInt(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    bool saturate = in.n & 1;
    // Values narrower than the destination register are extended to its width.
    if (!saturate && in.sa == (sizeof(S) == 8 ? 8 : 4) && in.sd == (sizeof(D) == 8 ? 8 : 4)) {
        if constexpr (sizeof(D) == 8)
            eachLane<u64>(d, m, [=](int i) { return u64(D(readInt<S>(a, i, sizeof(S) == 8 ? 8 : 4))); });
        else
            eachLane<u32>(d, m, [=](int i) {
                return u32(
                    std::conditional_t<std::is_signed_v<D>, i32, u32>(D(readInt<S>(a, i, sizeof(S) == 8 ? 8 : 4))));
            });
        return Status::Next;
    }
    forLanes(m, [&](int i) {
        S v = readInt<S>(a, i, in.sa);
        D r = D(v);
        if (saturate) {
            __int128 x = v, lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
            r = D(x < lo ? lo : x > hi ? hi : x);
        }
        writeWide(d, i, in.sd, std::is_signed_v<D> ? u64(i64(r)) : u64(r));
    });
    return Status::Next;
}

// --- float sources and sinks -----------------------------------------------------
double readFloat(const u8* p, int i, int kind) {  // 0 f32, 1 f64, 2 f16, 3 bf16
    switch (kind) {
        case 0: return rd<float>(p, i);
        case 1: return rd<double>(p, i);
        case 2: return halfToFloat(rd<u16>(p, i));
        default: return bf16ToFloat(rd<u16>(p, i));
    }
}
float roundDoubleToFloat(double v, Round r) {
    float f = float(v);
    if (r == Round::RN || std::isnan(v) || double(f) == v) return f;
    bool above = double(f) > v;
    if (r == Round::RP) return above ? f : std::nextafterf(f, INFINITY);
    if (r == Round::RM) return above ? std::nextafterf(f, -INFINITY) : f;
    if (std::fabs(double(f)) > std::fabs(v)) return std::nextafterf(f, 0.0f);
    return f;
}
void writeFloat(u8* p, int i, int kind, double v, Round r) {
    switch (kind) {
        case 0: wr<float>(p, i, roundDoubleToFloat(v, r)); break;
        case 1: wr<double>(p, i, v); break;
        case 2: wr<u16>(p, i, doubleToHalf(v, r)); break;
        default: {
            if (std::isnan(v)) {
                wr<u16>(p, i, 0x7fff);
                break;
            }
            double q = roundToFormat(v, 7, -126, r);
            wr<u16>(p, i, floatToBf16(float(q), Round::RZ));
        }
    }
}
double roundIntegral(double v, Round r) {
    switch (r) {
        case Round::RN: return std::nearbyint(v);
        case Round::RZ: return std::trunc(v);
        case Round::RM: return std::floor(v);
        case Round::RP: return std::ceil(v);
        default: return std::round(v);
    }
}
int floatKind(std::string_view t) { return t == "f32" ? 0 : t == "f64" ? 1 : t == "f16" ? 2 : t == "bf16" ? 3 : -1; }

// in.p = source kind, in.q = destination kind, in.target = rounding,
// in.n bit0 sat, bit1 ftz, bit2 integral rounding, bit3 relu
Status cvtFloatFloat(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    Round r = Round(in.target);
    forLanes(m, [&](int i) {
        double v = readFloat(a, i, in.p);
        if ((in.n & 2) && in.p == 0) v = ftz(float(v));
        if (in.n & 4) v = roundIntegral(v, r);
        if (in.n & 1) v = v > 0 ? std::min(v, 1.0) : 0.0;
        if ((in.n & 8) && v < 0) v = 0;
        writeFloat(d, i, in.q, v, r);
        if ((in.n & 2) && in.q == 0) wr<float>(d, i, ftz(rd<float>(d, i)));
    });
    return Status::Next;
}
Status cvtF32ToBf16(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return u32(floatToBf16(rd<float>(a, i))); });
    return Status::Next;
}

template <class D>
Status cvtFloatToInt(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    Round r = Round(in.target);
    forLanes(m, [&](int i) {
        double v = readFloat(a, i, in.p);
        if ((in.n & 2) && in.p == 0) v = ftz(float(v));
        D out;
        if (std::isnan(v)) {
            // PTX ISA "cvt": NaN gives 0 for f32 sources up to 32 bits and the most
            // significant bit set for 64-bit destinations or f64 sources.
            out = sizeof(D) == 8 || in.p == 1 ? D(u64(1) << (sizeof(D) * 8 - 1)) : D(0);
        } else {
            double q = roundIntegral(v, r);
            double lo = double(std::numeric_limits<D>::min()), hi = double(std::numeric_limits<D>::max());
            out = q <= lo ? std::numeric_limits<D>::min() : q >= hi ? std::numeric_limits<D>::max() : D(q);
        }
        writeWide(d, i, in.sd, std::is_signed_v<D> ? u64(i64(out)) : u64(out));
    });
    return Status::Next;
}
// Integers up to 64 bits to float with one rounding.
template <class S>
Status cvtIntToFloat(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    Round r = Round(in.target);
    forLanes(m, [&](int i) {
        S v = readInt<S>(a, i, in.sa);
        if (in.q == 0 && r == Round::RN)
            wr<float>(d, i, float(v));
        else if (in.q == 1)
            wr<double>(d, i, double(v));
        else
            writeFloat(d, i, in.q, double(v), r);
    });
    return Status::Next;
}

// --- packed and 8-bit formats ----------------------------------------------------
enum Fmt8 { E4M3, E5M2, E2M1, UE8M0, E2M3, E3M2 };
int fmt8(std::string_view t) {
    if (t == "e4m3x2" || t == "e4m3x4") return E4M3;
    if (t == "e5m2x2" || t == "e5m2x4") return E5M2;
    if (t == "e2m1x2" || t == "e2m1x4") return E2M1;
    if (t == "ue8m0x2") return UE8M0;
    if (t == "e2m3x2" || t == "e2m3x4") return E2M3;
    if (t == "e3m2x2" || t == "e3m2x4") return E3M2;
    return -1;
}
u32 encode8(int f, float v, Round r, bool relu) {
    if (relu && (v < 0 || std::isnan(v))) v = 0;
    switch (f) {
        case E4M3: return floatToMini(kE4M3, v, r);
        case E5M2: return floatToMini(kE5M2, v, r);
        case E2M1: return floatToMini(kE2M1, v, r);
        case E2M3: return floatToMini(kE2M3, v, r);
        case E3M2: return floatToMini(kE3M2, v, r);
        default: return floatToUe8m0(v, r);
    }
}
float decode8(int f, u8 c) {
    switch (f) {
        case E4M3: return kMini.e4m3[c];
        case E5M2: return kMini.e5m2[c];
        case E2M1: return kMini.e2m1[c & 15];
        case E2M3: return kMini.e2m3[c & 63];
        case E3M2: return kMini.e3m2[c & 63];
        default: return ue8m0ToFloat(c);
    }
}
// d = {a -> upper half, b -> lower half}
Status cvtPackTo8(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = in.b == kNoOperand ? nullptr : w.src(in.b);
    Round r = Round(in.target);
    int f = in.q;
    u32 shift = f == E2M1 ? 4 : 8;
    bool relu = in.n & 8;
    u8* d = w.reg(in.d);
    forLanes(m, [&](int i) {
        float hi, lo;
        if (in.p == 0)
            hi = rd<float>(a, i), lo = rd<float>(b, i);
        else {
            u32 v = rd<u32>(a, i);
            hi = in.p == 2 ? halfToFloat(u16(v >> 16)) : bf16ToFloat(u16(v >> 16));
            lo = in.p == 2 ? halfToFloat(u16(v)) : bf16ToFloat(u16(v));
        }
        wr<u32>(d, i, encode8(f, hi, r, relu) << shift | encode8(f, lo, r, relu));
    });
    return Status::Next;
}
Status cvtUnpackFrom8(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    int f = in.p;
    u32 shift = f == E2M1 ? 4 : 8, mask = f == E2M1 ? 15 : 255;
    forLanes(m, [&](int i) {
        u32 v = rd<u32>(a, i);
        float lo = decode8(f, u8(v & mask)), hi = decode8(f, u8((v >> shift) & mask));
        u32 out =
            in.q == 2 ? u32(floatToHalf(hi)) << 16 | floatToHalf(lo) : u32(floatToBf16(hi)) << 16 | floatToBf16(lo);
        wr<u32>(d, i, out);
    });
    return Status::Next;
}
Status cvtPackTo16(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    Round r = Round(in.target);
    if (in.q == 3 && r == Round::RN && !(in.n & 8)) {
        eachLane<u32>(w.reg(in.d), m,
                      [=](int i) { return u32(floatToBf16(rd<float>(a, i))) << 16 | floatToBf16(rd<float>(b, i)); });
        return Status::Next;
    }
    auto conv = [&](float v) -> u32 {
        if ((in.n & 8) && v < 0) v = 0;
        return in.q == 2 ? floatToHalf(v, r) : floatToBf16(v, r);
    };
    u8* d = w.reg(in.d);
    forLanes(m, [&](int i) { wr<u32>(d, i, conv(rd<float>(a, i)) << 16 | conv(rd<float>(b, i))); });
    return Status::Next;
}
Status cvtTf32(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    forLanes(m, [&](int i) {
        float v = rd<float>(a, i);
        if ((in.n & 8) && v < 0) v = 0;
        if (std::isnan(v) || std::isinf(v))
            wr<float>(d, i, v);
        else
            wr<float>(d, i, float(roundToFormat(v, 10, -126, Round(in.target))));
    });
    return Status::Next;
}
// cvt.rn.satfinite.{e4m3x4,e5m2x4,...}.f32 d, {a,b,e,f}, rbits and stochastic
// rounding are not implemented.

#define INTS(X) \
    X("s8", i8) X("u8", u8) X("s16", i16) X("u16", u16) X("s32", i32) X("u32", u32) X("s64", i64) X("u64", u64)
template <class S>
Fn intIntTo(std::string_view dt) {
#define X(n, D) \
    if (dt == n) return cvtInt<D, S>;
    INTS(X)
#undef X
    return nullptr;
}
Fn intInt(std::string_view dt, std::string_view st) {
#define X(n, S) \
    if (st == n) return intIntTo<S>(dt);
    INTS(X)
#undef X
    return nullptr;
}
Fn floatInt(std::string_view dt) {
#define X(n, D) \
    if (dt == n) return cvtFloatToInt<D>;
    INTS(X)
#undef X
    return nullptr;
}
Fn intFloat(std::string_view st) {
#define X(n, S) \
    if (st == n) return cvtIntToFloat<S>;
    INTS(X)
#undef X
    return nullptr;
}

void buildCvt(Decoder& d, const Stmt& s, Inst& in) {
    if (s.op[1] == "pack") d.fail(s, "cvt.pack");
    std::string st = s.op.back(), dt = s.op[s.op.size() - 2];
    in.n = u8((s.has("sat") ? 1 : 0) | (s.has("ftz") ? 2 : 0) | (s.has("relu") ? 8 : 0));
    if (s.has("rs")) d.fail(s, "stochastic rounding");
    int df = floatKind(dt), sf = floatKind(st);
    in.p = u16(sf), in.q = u16(df);
    if (dt == "tf32") {
        in.fn = cvtTf32;
        in.target = u32(roundOf(s, Round::RNA));
        bind3(d, s, in, 4, 1);
        return;
    }
    if (dt == "bf16x2" || dt == "f16x2") {
        in.q = dt == "f16x2" ? 2 : 3;
        in.target = u32(roundOf(s, Round::RN));
        if (st == "f32") {
            in.fn = cvtPackTo16;
            bind3(d, s, in, 4, 2);
        } else if (fmt8(st) >= 0) {
            in.fn = cvtUnpackFrom8;
            in.p = u16(fmt8(st));
            bind3(d, s, in, 4, 1);
        }
        return;
    }
    if (fmt8(dt) >= 0) {
        if (dt.back() == '4') d.fail(s, "four-element conversion");
        in.fn = cvtPackTo8;
        in.q = u16(fmt8(dt));
        in.p = st == "f32" ? 0 : st == "f16x2" ? 2 : 3;
        in.target = u32(roundOf(s, Round::RN));
        d.dst(in.d, s.ops[0], s, 4);
        d.src(in.a, s.ops[1], s, 4);
        if (in.p == 0) d.src(in.b, s.ops[2], s, 4);
        return;
    }
    // Scalar: integer operands may be held in wider registers.
    in.sa = u8(s.ops[1].kind == Operand::Reg ? d.regStride(s.ops[1]) : typeBytes(st) == 8 ? 8 : 4);
    in.sd = u8(s.ops[0].kind == Operand::Reg ? d.regStride(s.ops[0]) : typeBytes(dt) == 8 ? 8 : 4);
    if (df >= 0 && sf >= 0) {
        bool integral = s.has("rni") || s.has("rzi") || s.has("rmi") || s.has("rpi");
        Round r = s.has("rni")   ? Round::RN
                  : s.has("rzi") ? Round::RZ
                  : s.has("rmi") ? Round::RM
                  : s.has("rpi") ? Round::RP
                                 : roundOf(s, Round::RN);
        in.n |= integral ? 4 : 0;
        in.target = u32(r);
        in.fn = sf == 0 && df == 3 && r == Round::RN && !in.n ? cvtF32ToBf16 : cvtFloatFloat;
    } else if (sf >= 0) {
        in.target = u32(s.has("rni") ? Round::RN : s.has("rmi") ? Round::RM : s.has("rpi") ? Round::RP : Round::RZ);
        in.fn = floatInt(dt);
    } else if (df >= 0) {
        in.target = u32(roundOf(s, Round::RN));
        in.fn = intFloat(st);
    } else {
        in.fn = intInt(dt, st);
    }
    d.dst(in.d, s.ops[0], s, in.sd);
    d.src(in.a, s.ops[1], s, in.sa);
}

// --- cvta ------------------------------------------------------------------------
Status cvtaExec(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u8* d = w.reg(in.d);
    u64 add = u64(in.imm);
    bool to = in.n;
    forLanes(m, [&](int i) {
        u64 v = in.sa == 8 ? rd<u64>(a, i) : rd<u32>(a, i);
        v = to ? (add ? v & 0xffffffffu : v) : v + add;
        writeWide(d, i, in.sd, v);
    });
    return Status::Next;
}
void buildCvta(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = cvtaExec;
    in.n = s.has("to");
    for (auto& o : s.op) {
        if (o.rfind("shared", 0) == 0) in.imm = i64(kSharedWindow);
        if (o == "local") in.imm = i64(kLocalWindow);
    }
    u32 st = s.op.back() == "u64" ? 8 : 4;
    in.sa = in.sd = u8(st);
    if (s.ops[1].kind == Operand::Reg) {
        d.dst(in.d, s.ops[0], s, st);
        d.src(in.a, s.ops[1], s, st);
        return;
    }
    std::string base;
    i64 disp;
    d.symbolAddress(s.ops[1], s, base, disp);
    d.dst(in.d, s.ops[0], s, st);
    if (base.empty())
        d.imm(in.a, u64(disp), st);
    else
        d.fail(s, "cvta of a relocatable symbol");
}

PTX_OP("cvt", buildCvt);
PTX_OP("cvta", buildCvta);

}  // namespace
}  // namespace ptx_emulator
