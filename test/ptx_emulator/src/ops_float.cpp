// Floating-point arithmetic and comparisons.
#include <cfenv>
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

// --- element arithmetic -------------------------------------------------------
// Narrow formats are computed so that one rounding happens: sums of a product
// and an addend are taken in double with round-to-odd, which makes the final
// rounding to <= 24 bits correct.
inline double addOdd(double p, double c) {
    double s = p + c;
    double bb = s - p, err = (p - (s - bb)) + (c - bb);
    if (err != 0 && std::isfinite(s)) {
        u64 b = std::bit_cast<u64>(s);
        if (!(b & 1)) s = std::nextafter(s, err > 0 ? INFINITY : -INFINITY);
    }
    return s;
}

template <class T>
struct Num;
template <>
struct Num<float> {
    static float in(float v) { return v; }
    static float out(float v) { return v; }
    static float add(float a, float b) { return a + b; }
    static float sub(float a, float b) { return a - b; }
    static float mul(float a, float b) { return a * b; }
    static float fma(float a, float b, float c) { return std::fma(a, b, c); }
};
template <>
struct Num<double> {
    static double add(double a, double b) { return a + b; }
    static double sub(double a, double b) { return a - b; }
    static double mul(double a, double b) { return a * b; }
    static double fma(double a, double b, double c) { return std::fma(a, b, c); }
};
template <>
struct Num<Half> {
    static double in(Half v) { return halfToFloat(v.v); }
    static Half out(double v) { return {doubleToHalf(v)}; }
    static Half add(Half a, Half b) { return out(in(a) + in(b)); }
    static Half sub(Half a, Half b) { return out(in(a) - in(b)); }
    static Half mul(Half a, Half b) { return out(in(a) * in(b)); }
    static Half fma(Half a, Half b, Half c) { return out(addOdd(in(a) * in(b), in(c))); }
};
inline Bf16 doubleToBf16(double v) {
    if (std::isnan(v)) return {0x7fff};
    return {floatToBf16(float(roundToFormat(v, 7, -126, Round::RN)))};
}
template <>
struct Num<Bf16> {
    static double in(Bf16 v) { return bf16ToFloat(v.v); }
    static Bf16 out(double v) { return doubleToBf16(v); }
    static Bf16 add(Bf16 a, Bf16 b) { return out(addOdd(in(a), in(b))); }
    static Bf16 sub(Bf16 a, Bf16 b) { return out(addOdd(in(a), -in(b))); }
    static Bf16 mul(Bf16 a, Bf16 b) { return out(in(a) * in(b)); }
    static Bf16 fma(Bf16 a, Bf16 b, Bf16 c) { return out(addOdd(in(a) * in(b), in(c))); }
};
template <class P, class E>
struct Pair {
    static E lo(P v) { return {u16(v.v)}; }
    static E hi(P v) { return {u16(v.v >> 16)}; }
    static P make(E l, E h) { return {u32(l.v) | u32(h.v) << 16}; }
    static P add(P a, P b) { return make(Num<E>::add(lo(a), lo(b)), Num<E>::add(hi(a), hi(b))); }
    static P sub(P a, P b) { return make(Num<E>::sub(lo(a), lo(b)), Num<E>::sub(hi(a), hi(b))); }
    static P mul(P a, P b) { return make(Num<E>::mul(lo(a), lo(b)), Num<E>::mul(hi(a), hi(b))); }
    static P fma(P a, P b, P c) { return make(Num<E>::fma(lo(a), lo(b), lo(c)), Num<E>::fma(hi(a), hi(b), hi(c))); }
};
template <>
struct Num<Half2> : Pair<Half2, Half> {};
template <>
struct Num<Bf162> : Pair<Bf162, Bf16> {};
template <>
struct Num<F32x2> {
    static F32x2 add(F32x2 a, F32x2 b) { return {a.x + b.x, a.y + b.y}; }
    static F32x2 sub(F32x2 a, F32x2 b) { return {a.x - b.x, a.y - b.y}; }
    static F32x2 mul(F32x2 a, F32x2 b) { return {a.x * b.x, a.y * b.y}; }
    static F32x2 fma(F32x2 a, F32x2 b, F32x2 c) { return {std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y)}; }
};

template <class T>
struct FAdd {
    static T f(T a, T b) { return Num<T>::add(a, b); }
};
template <class T>
struct FSub {
    static T f(T a, T b) { return Num<T>::sub(a, b); }
};
template <class T>
struct FMul {
    static T f(T a, T b) { return Num<T>::mul(a, b); }
};
template <class T>
struct FFma {
    static T f(T a, T b, T c) { return Num<T>::fma(a, b, c); }
};
template <class T>
struct FDiv {
    static T f(T a, T b) { return a / b; }
};

inline float sat(float v) { return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f; }
template <class T>
T satT(T v) {
    return v;
}
template <>
inline float satT(float v) {
    return sat(v);
}
template <>
inline double satT(double v) {
    return v > 0 ? (v < 1 ? v : 1.0) : 0.0;
}
template <class T>
T ftzT(T v) {
    return v;
}
template <>
inline float ftzT(float v) {
    return ftz(v);
}
template <>
inline F32x2 ftzT(F32x2 v) {
    return {ftz(v.x), ftz(v.y)};
}

template <class F, class T>
struct Ftz {
    static T f(T a) { return ftzT(F::f(ftzT(a))); }
    static T f(T a, T b) { return ftzT(F::f(ftzT(a), ftzT(b))); }
    static T f(T a, T b, T c) { return ftzT(F::f(ftzT(a), ftzT(b), ftzT(c))); }
};
template <class F, class T>
struct Sat {
    static T f(T a) { return satT(F::f(a)); }
    static T f(T a, T b) { return satT(F::f(a, b)); }
    static T f(T a, T b, T c) { return satT(F::f(a, b, c)); }
};

// Directed rounding of f32/f64 through the host's rounding mode.
template <class T>
Status directed(Warp& w, const Inst& in, u32 m) {
    int mode = in.q == 0 ? FE_TOWARDZERO : in.q == 1 ? FE_DOWNWARD : FE_UPWARD;
    int old = fegetround();
    fesetround(mode);
    const u8 *a = w.src(in.a), *b = in.b == kNoOperand ? a : w.src(in.b), *c = in.c == kNoOperand ? a : w.src(in.c);
    u8* d = w.reg(in.d);
    bool z = in.n & 1, s = in.n & 2;
    forLanes(m, [&](int i) {
        volatile T x = z ? ftzT(rd<T>(a, i)) : rd<T>(a, i), y = z ? ftzT(rd<T>(b, i)) : rd<T>(b, i),
                   v = z ? ftzT(rd<T>(c, i)) : rd<T>(c, i), r;
        switch (in.p) {
            case 0: r = x + y; break;
            case 1: r = x - y; break;
            case 2: r = x * y; break;
            case 3: {
                T t = std::fma(T(x), T(y), T(v));
                r = t;
                break;
            }
            case 4: r = x / y; break;
            case 5: r = T(1) / x; break;
            default: {
                T t = std::sqrt(T(x));
                r = t;
                break;
            }
        }
        T out = r;
        if (z) out = ftzT(out);
        if (s) out = satT(out);
        wr<T>(d, i, out);
    });
    fesetround(old);
    return Status::Next;
}

template <class T>
struct FMin {
    static T f(T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
};
template <class T>
struct FMax {
    static T f(T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; }
};
inline float canonNan() { return asFloat(0x7fffffffu); }
struct FMinNan {
    static float f(float a, float b) { return a != a || b != b ? canonNan() : FMin<float>::f(a, b); }
};
struct FMaxNan {
    static float f(float a, float b) { return a != a || b != b ? canonNan() : FMax<float>::f(a, b); }
};
template <class F>
struct Via3 {
    static float f(float a, float b, float c) { return F::f(F::f(a, b), c); }
};
template <class F>
struct XorSign {
    static float f(float a, float b) {
        float r = F::f(std::fabs(a), std::fabs(b));
        return asFloat((asBits(r) & 0x7fffffffu) | ((asBits(a) ^ asBits(b)) & 0x80000000u));
    }
};
template <class E, class F>
struct Narrow {  // through float
    static E f(E a) { return Num<E>::out(F::f(float(Num<E>::in(a)))); }
    static E f(E a, E b) { return Num<E>::out(F::f(float(Num<E>::in(a)), float(Num<E>::in(b)))); }
};
template <class P, class E, class F>
struct Narrow2 {
    using Q = Pair<P, E>;
    static P f(P a) { return Q::make(Narrow<E, F>::f(Q::lo(a)), Narrow<E, F>::f(Q::hi(a))); }
    static P f(P a, P b) { return Q::make(Narrow<E, F>::f(Q::lo(a), Q::lo(b)), Narrow<E, F>::f(Q::hi(a), Q::hi(b))); }
};

template <class T>
struct FAbs {
    static T f(T a) { return std::fabs(a); }
};
template <class T>
struct FNeg {
    static T f(T a) { return -a; }
};
struct Bits16Abs {
    static u16 f(u16 a) { return a & 0x7fff; }
};
struct Bits16Neg {
    static u16 f(u16 a) { return a ^ 0x8000; }
};
struct Bits32Abs2 {
    static u32 f(u32 a) { return a & 0x7fff7fffu; }
};
struct Bits32Neg2 {
    static u32 f(u32 a) { return a ^ 0x80008000u; }
};

template <class T>
struct FSqrt {
    static T f(T a) { return std::sqrt(a); }
};
template <class T>
struct FRcp {
    static T f(T a) { return T(1) / a; }
};
struct FRsqrt {
    static float f(float a) { return float(1.0 / std::sqrt(double(a))); }
};
struct FRsqrt64 {
    static double f(double a) { return 1.0 / std::sqrt(a); }
};
struct FEx2 {
    static float f(float a) { return float(std::exp2(double(a))); }
};
struct FLg2 {
    static float f(float a) { return float(std::log2(double(a))); }
};
struct FSin {
    static float f(float a) { return float(std::sin(double(a))); }
};
struct FCos {
    static float f(float a) { return float(std::cos(double(a))); }
};
struct FTanh {
    static float f(float a) { return float(std::tanh(double(a))); }
};
// Fast path for the common case: exp2f is within 1 ulp of the hardware's 2 ulp.
struct Copysign32 {
    static u32 f(u32 a, u32 b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
};
struct Copysign64 {
    static u64 f(u64 a, u64 b) { return (a & (u64(1) << 63)) | (b & ~(u64(1) << 63)); }
};

u32 strideOf(std::string_view t) { return typeBytes(t) == 8 ? 8 : 4; }

int directedMode(const Stmt& s) { return s.has("rz") ? 0 : s.has("rm") ? 1 : s.has("rp") ? 2 : -1; }

template <class F, class T>
Fn mods2(const Stmt& s) {
    bool z = s.has("ftz"), st = s.has("sat");
    if (z && st) return binary<Sat<Ftz<F, T>, T>, T, T, T>;
    if (z) return binary<Ftz<F, T>, T, T, T>;
    if (st) return binary<Sat<F, T>, T, T, T>;
    return binary<F, T, T, T>;
}
template <class F, class T>
Fn mods3(const Stmt& s) {
    bool z = s.has("ftz"), st = s.has("sat");
    if (z && st) return ternary<Sat<Ftz<F, T>, T>, T, T, T, T>;
    if (z) return ternary<Ftz<F, T>, T, T, T, T>;
    if (st) return ternary<Sat<F, T>, T, T, T, T>;
    return ternary<F, T, T, T, T>;
}
struct Relu16 {
    static u16 half(u16 v) { return (v & 0x7fff) > 0x7c00 ? 0x7fff : (v & 0x8000) ? 0 : v; }
};
template <template <class> class F>
Fn narrow2(std::string_view t) {
    if (t == "f16") return binary<F<Half>, Half, Half, Half>;
    if (t == "bf16") return binary<F<Bf16>, Bf16, Bf16, Bf16>;
    if (t == "f16x2") return binary<F<Half2>, Half2, Half2, Half2>;
    if (t == "bf16x2") return binary<F<Bf162>, Bf162, Bf162, Bf162>;
    return nullptr;
}
Fn narrow3(std::string_view t) {
    if (t == "f16") return ternary<FFma<Half>, Half, Half, Half, Half>;
    if (t == "bf16") return ternary<FFma<Bf16>, Bf16, Bf16, Bf16, Bf16>;
    if (t == "f16x2") return ternary<FFma<Half2>, Half2, Half2, Half2, Half2>;
    if (t == "bf16x2") return ternary<FFma<Bf162>, Bf162, Bf162, Bf162, Bf162>;
    return nullptr;
}
template <class F>
Fn narrowUnary(std::string_view t) {
    if (t == "f16") return unary<Narrow<Half, F>, Half, Half>;
    if (t == "bf16") return unary<Narrow<Bf16, F>, Bf16, Bf16>;
    if (t == "f16x2") return unary<Narrow2<Half2, Half, F>, Half2, Half2>;
    if (t == "bf16x2") return unary<Narrow2<Bf162, Bf16, F>, Bf162, Bf162>;
    return nullptr;
}
template <class F>
Fn narrowBinary(std::string_view t) {
    if (t == "f16") return binary<Narrow<Half, F>, Half, Half, Half>;
    if (t == "bf16") return binary<Narrow<Bf16, F>, Bf16, Bf16, Bf16>;
    if (t == "f16x2") return binary<Narrow2<Half2, Half, F>, Half2, Half2, Half2>;
    if (t == "bf16x2") return binary<Narrow2<Bf162, Bf16, F>, Bf162, Bf162, Bf162>;
    return nullptr;
}

void setDirected(const Stmt& s, Inst& in, int op, int mode, bool wide) {
    in.fn = wide ? directed<double> : directed<float>;
    in.p = u16(op);
    in.q = u16(mode);
    in.n = u8((s.has("ftz") ? 1 : 0) | (s.has("sat") ? 2 : 0));
}

// Mixed-precision add, sub, fma: narrow operands, f32 addend and result.
template <class E>
struct MixAdd {
    static float f(E a, float c) { return float(Num<E>::in(a)) + c; }
};
template <class E>
struct MixSub {
    static float f(E a, float c) { return float(Num<E>::in(a)) - c; }
};
template <class E>
struct MixFma {
    static float f(E a, E b, float c) { return std::fma(float(Num<E>::in(a)), float(Num<E>::in(b)), c); }
};
template <class E>
void buildMixed(Decoder& d, const Stmt& s, Inst& in) {
    if (directedMode(s) >= 0 || s.has("sat")) d.fail(s, "rounding or saturation of a mixed-precision operation");
    const std::string& o = s.op[0];
    if (o == "add")
        in.fn = binary<MixAdd<E>, float, E, float>;
    else if (o == "sub")
        in.fn = binary<MixSub<E>, float, E, float>;
    else if (o == "fma")
        in.fn = ternary<MixFma<E>, float, E, E, float>;
    bind3(d, s, in, 4, o == "fma" ? 3 : 2);
}

bool floatType(std::string_view t) {
    return t == "f32" || t == "f64" || t == "f16" || t == "bf16" || t == "f16x2" || t == "bf16x2" || t == "f32x2";
}

}  // namespace

bool buildFloatArith(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    const std::string& o = s.op[0];
    if (!floatType(t)) return false;
    if (s.op.size() > 2 && floatType(s.op[s.op.size() - 2])) {
        if (s.op[s.op.size() - 2] != "f32") d.fail(s, "unsupported type combination");
        if (t == "f16")
            buildMixed<Half>(d, s, in);
        else if (t == "bf16")
            buildMixed<Bf16>(d, s, in);
        return true;
    }
    int dir = directedMode(s);
    bool wide = t == "f64";
    u32 st = strideOf(t);
    bool mad = o == "mad" || o == "fma";
    if (dir >= 0 && (t == "f32" || t == "f64")) {
        int op = o == "add" ? 0 : o == "sub" ? 1 : o == "mul" ? 2 : mad ? 3 : o == "div" ? 4 : -1;
        if (op < 0) return false;
        setDirected(s, in, op, dir, wide);
        bind3(d, s, in, st, op == 3 ? 3 : 2);
        return true;
    }
    if (dir >= 0) d.fail(s, "directed rounding of this type");
    if (o == "add" || o == "sub" || o == "mul") {
#define PICK(F)                                   \
    (t == "f32"     ? mods2<F<float>, float>(s)   \
     : wide         ? mods2<F<double>, double>(s) \
     : t == "f32x2" ? mods2<F<F32x2>, F32x2>(s)   \
                    : narrow2<F>(t))
        in.fn = o == "add" ? PICK(FAdd) : o == "sub" ? PICK(FSub) : PICK(FMul);
#undef PICK
        bind3(d, s, in, st, 2);
        return true;
    }
    if (mad) {
        in.fn = t == "f32"     ? mods3<FFma<float>, float>(s)
                : wide         ? mods3<FFma<double>, double>(s)
                : t == "f32x2" ? mods3<FFma<F32x2>, F32x2>(s)
                               : narrow3(t);
        if (s.has("relu")) d.fail(s, "fma.relu");
        bind3(d, s, in, st, 3);
        return true;
    }
    if (o == "div") {
        in.fn = wide ? mods2<FDiv<double>, double>(s) : mods2<FDiv<float>, float>(s);
        bind3(d, s, in, st, 2);
        return true;
    }
    if (o == "min" || o == "max") {
        bool mn = o == "min", nan = s.has("NaN"), xs = s.has("xorsign");
        if (t == "f32") {
            bool three = s.ops.size() == 4;
            if (three)
                in.fn = mn ? (nan ? ternary<Via3<FMinNan>, float, float, float, float>
                                  : ternary<Via3<FMin<float>>, float, float, float, float>)
                           : (nan ? ternary<Via3<FMaxNan>, float, float, float, float>
                                  : ternary<Via3<FMax<float>>, float, float, float, float>);
            else if (xs && nan)
                in.fn = mn ? binary<XorSign<FMinNan>, float, float, float>
                           : binary<XorSign<FMaxNan>, float, float, float>;
            else if (xs)
                in.fn = mn ? binary<XorSign<FMin<float>>, float, float, float>
                           : binary<XorSign<FMax<float>>, float, float, float>;
            else if (nan)
                in.fn = mn ? mods2<FMinNan, float>(s) : mods2<FMaxNan, float>(s);
            else
                in.fn = mn ? mods2<FMin<float>, float>(s) : mods2<FMax<float>, float>(s);
            bind3(d, s, in, st, three ? 3 : 2);
        } else {
            if (wide)
                in.fn =
                    mn ? binary<FMin<double>, double, double, double> : binary<FMax<double>, double, double, double>;
            else if (xs && nan)
                in.fn = mn ? narrowBinary<XorSign<FMinNan>>(t) : narrowBinary<XorSign<FMaxNan>>(t);
            else if (xs)
                in.fn = mn ? narrowBinary<XorSign<FMin<float>>>(t) : narrowBinary<XorSign<FMax<float>>>(t);
            else if (nan)
                in.fn = mn ? narrowBinary<FMinNan>(t) : narrowBinary<FMaxNan>(t);
            else
                in.fn = mn ? narrowBinary<FMin<float>>(t) : narrowBinary<FMax<float>>(t);
            bind3(d, s, in, st, 2);
        }
        return true;
    }
    if (o == "abs" || o == "neg") {
        bool ab = o == "abs";
        if (t == "f32")
            in.fn =
                s.has("ftz")
                    ? (ab ? unary<Ftz<FAbs<float>, float>, float, float> : unary<Ftz<FNeg<float>, float>, float, float>)
                    : (ab ? unary<FAbs<float>, float, float> : unary<FNeg<float>, float, float>);
        else if (wide)
            in.fn = ab ? unary<FAbs<double>, double, double> : unary<FNeg<double>, double, double>;
        else if (st == 4 && typeBytes(t) == 2)
            in.fn = ab ? unary<Bits16Abs, u16, u16> : unary<Bits16Neg, u16, u16>;
        else
            in.fn = ab ? unary<Bits32Abs2, u32, u32> : unary<Bits32Neg2, u32, u32>;
        bind3(d, s, in, st, 1);
        return true;
    }
    return false;
}

namespace {

void buildFma(Decoder& d, const Stmt& s, Inst& in) {
    if (!buildFloatArith(d, s, in)) d.fail(s, "unsupported type");
}

template <class F32, class F64>
void buildRoot(Decoder& d, const Stmt& s, Inst& in, int directedOp) {
    const std::string& t = s.op.back();
    int dir = directedMode(s);
    if (dir >= 0 && directedOp >= 0)
        setDirected(s, in, directedOp, dir, t == "f64");
    else if (t == "f64")
        in.fn = unary<F64, double, double>;
    else if (t == "f32")
        in.fn = s.has("ftz") ? Fn(unary<Ftz<F32, float>, float, float>) : Fn(unary<F32, float, float>);
    bind3(d, s, in, strideOf(t), 1);
}
template <class F>
void buildApprox(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    if (t == "f32")
        in.fn = s.has("ftz") ? Fn(unary<Ftz<F, float>, float, float>) : Fn(unary<F, float, float>);
    else
        in.fn = narrowUnary<F>(t);
    bind3(d, s, in, 4, 1);
}
void buildCopysign(Decoder& d, const Stmt& s, Inst& in) {
    bool wide = s.op.back() == "f64";
    in.fn = wide ? Fn(binary<Copysign64, u64, u64, u64>) : Fn(binary<Copysign32, u32, u32, u32>);
    bind3(d, s, in, wide ? 8 : 4, 2);
}

Status testpExec(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    bool wide = in.sa == 8;
    int what = in.n;
    u32 r = maskOf([=](int i) {
        double v = wide ? rd<double>(a, i) : rd<float>(a, i);
        bool normal = wide ? std::isnormal(v) : std::isnormal(rd<float>(a, i));
        bool sub = !normal && v != 0 && std::isfinite(v);
        return what == 0   ? std::isfinite(v)
               : what == 1 ? std::isinf(v)
               : what == 2 ? !std::isnan(v)
               : what == 3 ? std::isnan(v)
               : what == 4 ? normal
                           : sub;
    });
    setPred(w, in.p, m, r);
    return Status::Next;
}
void buildTestp(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = testpExec;
    in.n = s.has("finite")       ? 0
           : s.has("infinite")   ? 1
           : s.has("number")     ? 2
           : s.has("notanumber") ? 3
           : s.has("normal")     ? 4
                                 : 5;
    in.p = d.predDst(s.ops[0], s);
    in.sa = u8(strideOf(s.op.back()));
    d.src(in.a, s.ops[1], s, in.sa);
}

// --- setp / set ----------------------------------------------------------------
enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC };

template <int C, class T>
bool compare(T a, T b) {
    if constexpr (C == EQ)
        return a == b;
    else if constexpr (C == NE)
        return a < b || a > b;  // ordered, also right for integers
    else if constexpr (C == LT)
        return a < b;
    else if constexpr (C == LE)
        return a <= b;
    else if constexpr (C == GT)
        return a > b;
    else if constexpr (C == GE)
        return a >= b;
    else if constexpr (C == EQU)
        return !(a < b || a > b);
    else if constexpr (C == NEU)
        return !(a == b);
    else if constexpr (C == LTU)
        return !(a >= b);
    else if constexpr (C == LEU)
        return !(a > b);
    else if constexpr (C == GTU)
        return !(a <= b);
    else if constexpr (C == GEU)
        return !(a < b);
    else if constexpr (C == NUM)
        return a == a && b == b;
    else
        return a != a || b != b;
}
template <class T>
struct CmpType {
    static T in(T v) { return v; }
};
template <>
struct CmpType<Half> {
    static float in(Half v) { return halfToFloat(v.v); }
};
template <>
struct CmpType<Bf16> {
    static float in(Bf16 v) { return bf16ToFloat(v.v); }
};

// Predicate result r = cmp BoolOp c; the second destination gets !cmp BoolOp c.
inline void finishSetp(Warp& w, const Inst& in, u32 m, u32 r) {
    u32 r2 = ~r;
    if (in.n) {
        u32 c = w.predMask(in.q);
        if (in.n == 1)
            r &= c, r2 &= c;
        else if (in.n == 2)
            r |= c, r2 |= c;
        else
            r ^= c, r2 ^= c;
    }
    setPred(w, in.p, m, r);
    if (in.target) setPred(w, u16(in.target), m, r2);
}
template <int C, class T>
Status setpExec(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    u32 r = maskOf([=](int i) { return compare<C>(CmpType<T>::in(rd<T>(a, i)), CmpType<T>::in(rd<T>(b, i))); });
    finishSetp(w, in, m, r);
    return Status::Next;
}
template <class T, bool Float>
Fn pickCmp(std::string_view c) {
    if (c == "eq") return setpExec<EQ, T>;
    if (c == "ne") return setpExec < Float ? NE : NEU, T > ;
    if (c == "lt" || c == "lo") return setpExec<LT, T>;
    if (c == "le" || c == "ls") return setpExec<LE, T>;
    if (c == "gt" || c == "hi") return setpExec<GT, T>;
    if (c == "ge" || c == "hs") return setpExec<GE, T>;
    if constexpr (Float) {
        if (c == "equ") return setpExec<EQU, T>;
        if (c == "neu") return setpExec<NEU, T>;
        if (c == "ltu") return setpExec<LTU, T>;
        if (c == "leu") return setpExec<LEU, T>;
        if (c == "gtu") return setpExec<GTU, T>;
        if (c == "geu") return setpExec<GEU, T>;
        if (c == "num") return setpExec<NUM, T>;
        if (c == "nan") return setpExec<NANC, T>;
    }
    return nullptr;
}
Fn pickSetp(std::string_view c, std::string_view t) {
    if (t == "s16") return pickCmp<i16, false>(c);
    if (t == "u16" || t == "b16") return pickCmp<u16, false>(c);
    if (t == "s32") return pickCmp<i32, false>(c);
    if (t == "u32" || t == "b32") return pickCmp<u32, false>(c);
    if (t == "s64") return pickCmp<i64, false>(c);
    if (t == "u64" || t == "b64") return pickCmp<u64, false>(c);
    if (t == "f32") return pickCmp<float, true>(c);
    if (t == "f64") return pickCmp<double, true>(c);
    if (t == "f16") return pickCmp<Half, true>(c);
    if (t == "bf16") return pickCmp<Bf16, true>(c);
    return nullptr;
}
void buildSetp(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    in.fn = pickSetp(s.op[1], t);
    in.n = s.has("and") ? 1 : s.has("or") ? 2 : s.has("xor") ? 3 : 0;
    in.p = d.predDst(s.ops[0], s);
    if (s.ops[0].reg2 >= 0) in.target = d.predIndex(s.ops[0].reg2);
    u32 st = strideOf(t);
    d.src(in.a, s.ops[1], s, st);
    d.src(in.b, s.ops[2], s, st);
    if (in.n) in.q = s.ops[3].kind == Operand::Imm ? (s.ops[3].imm ? 0xffff : 0xfffe) : d.predSrc(s.ops[3], s);
}
// set: mask or 1.0 in a register; evaluated through the predicate form into
// the scratch predicate.
Status setExec(Warp& w, const Inst& in, u32 m) {
    in.x->inner(w, in, m);
    u32 r = w.pred[0];
    u32 one = u32(in.imm);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return (r >> i) & 1 ? one : 0u; });
    return Status::Next;
}
void buildSet(Decoder& d, const Stmt& s, Inst& in) {
    const std::string &t = s.op.back(), &dt = s.op[s.op.size() - 2];
    d.ext(in).inner = pickSetp(s.op[1], t);
    if (!in.x->inner) return;
    in.fn = setExec;
    in.p = 0;
    in.n = s.has("and") ? 1 : s.has("or") ? 2 : s.has("xor") ? 3 : 0;
    in.imm = dt == "f32" ? 0x3f800000 : dt == "f16" ? 0x3c00 : dt == "bf16" ? 0x3f80 : i64(0xffffffffu);
    d.dst(in.d, s.ops[0], s, 4);
    d.src(in.a, s.ops[1], s, strideOf(t));
    d.src(in.b, s.ops[2], s, strideOf(t));
    if (in.n) in.q = d.predSrc(s.ops[3], s);
}

PTX_OP("fma", buildFma);
PTX_OP("sqrt", [](Decoder& d, const Stmt& s, Inst& in) { buildRoot<FSqrt<float>, FSqrt<double>>(d, s, in, 6); });
PTX_OP("rcp", [](Decoder& d, const Stmt& s, Inst& in) { buildRoot<FRcp<float>, FRcp<double>>(d, s, in, 5); });
PTX_OP("rsqrt", [](Decoder& d, const Stmt& s, Inst& in) { buildRoot<FRsqrt, FRsqrt64>(d, s, in, -1); });
PTX_OP("ex2", buildApprox<FEx2>);
PTX_OP("lg2", buildApprox<FLg2>);
PTX_OP("sin", buildApprox<FSin>);
PTX_OP("cos", buildApprox<FCos>);
PTX_OP("tanh", buildApprox<FTanh>);
PTX_OP("copysign", buildCopysign);
PTX_OP("testp", buildTestp);
PTX_OP("setp", buildSetp);
PTX_OP("set", buildSet);

}  // namespace
}  // namespace ptx_emulator
