// Integer, logic, bit-field, move and select instructions.
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
struct Wider;
template <>
struct Wider<i16> {
    using type = i32;
};
template <>
struct Wider<u16> {
    using type = u32;
};
template <>
struct Wider<i32> {
    using type = i64;
};
template <>
struct Wider<u32> {
    using type = u64;
};
template <>
struct Wider<i64> {
    using type = __int128;
};
template <>
struct Wider<u64> {
    using type = unsigned __int128;
};
template <class T>
using Wide = typename Wider<T>::type;

template <class T>
struct Add {
    static T f(T a, T b) { return T(U<T>(a) + U<T>(b)); }
};
template <class T>
struct Sub {
    static T f(T a, T b) { return T(U<T>(a) - U<T>(b)); }
};
template <class T>
struct MulLo {
    static T f(T a, T b) { return T(Wide<U<T>>(U<T>(a)) * Wide<U<T>>(U<T>(b))); }
};
template <class T>
struct MulHi {
    static T f(T a, T b) { return T((Wide<T>(a) * Wide<T>(b)) >> (sizeof(T) * 8)); }
};
template <class T>
struct MulWide {
    static Wide<T> f(T a, T b) { return Wide<T>(a) * Wide<T>(b); }
};
template <class T>
struct MadLo {
    static T f(T a, T b, T c) { return Add<T>::f(MulLo<T>::f(a, b), c); }
};
template <class T>
struct MadHi {
    static T f(T a, T b, T c) { return Add<T>::f(MulHi<T>::f(a, b), c); }
};
template <class T>
struct MadWide {
    static Wide<T> f(T a, T b, Wide<T> c) { return Wide<T>(U<Wide<T>>(Wide<T>(a) * Wide<T>(b)) + U<Wide<T>>(c)); }
};
template <class T>
struct Div {
    static T f(T a, T b) {
        if (b == 0) return T(-1);
        if constexpr (std::is_signed_v<T>)
            if (b == -1) return T(0 - U<T>(a));
        return T(a / b);
    }
};
template <class T>
struct Rem {
    static T f(T a, T b) {
        if (b == 0) return a;
        if constexpr (std::is_signed_v<T>)
            if (b == -1) return 0;
        return T(a % b);
    }
};
template <class T>
struct Min {
    static T f(T a, T b) { return a < b ? a : b; }
};
template <class T>
struct Max {
    static T f(T a, T b) { return a > b ? a : b; }
};
template <class T>
struct Abs {
    static T f(T a) { return a < 0 ? T(0 - U<T>(a)) : a; }
};
template <class T>
struct Neg {
    static T f(T a) { return T(0 - U<T>(a)); }
};
template <class T>
struct And {
    static T f(T a, T b) { return a & b; }
};
template <class T>
struct Or {
    static T f(T a, T b) { return a | b; }
};
template <class T>
struct Xor {
    static T f(T a, T b) { return a ^ b; }
};
template <class T>
struct Not {
    static T f(T a) { return T(~a); }
};
template <class T>
struct Cnot {
    static T f(T a) { return a == 0; }
};
template <class T>
struct Mov {
    static T f(T a) { return a; }
};
template <class T>
struct Shl {
    static T f(T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(a << n); }
};
template <class T>
struct Shr {
    static T f(T a, u32 n) {
        if (n >= sizeof(T) * 8) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
        return T(a >> n);
    }
};
template <class T>
struct Popc {
    static u32 f(T a) { return u32(std::popcount(a)); }
};
template <class T>
struct Clz {
    static u32 f(T a) { return u32(std::countl_zero(a)); }
};
template <class T>
struct Brev {
    static T f(T a) {
        T r = 0;
        for (size_t i = 0; i < sizeof(T) * 8; i++) r |= T((a >> i) & 1) << (sizeof(T) * 8 - 1 - i);
        return r;
    }
};
template <class T, bool Shift>
struct Bfind {
    static u32 f(T a) {
        U<T> v = U<T>(std::is_signed_v<T> && a < 0 ? ~a : a);
        if (!v) return ~0u;
        u32 pos = u32(sizeof(T) * 8 - 1 - std::countl_zero(v));
        return Shift ? u32(sizeof(T) * 8 - 1) - pos : pos;
    }
};
template <class T>
struct Sad {
    static T f(T a, T b, T c) { return T(U<T>(c) + (a > b ? U<T>(a) - U<T>(b) : U<T>(b) - U<T>(a))); }
};
template <class T>
struct Bfe {
    static T f(T a, u32 pos, u32 len) {
        constexpr u32 bits = sizeof(T) * 8;
        pos &= 0xff, len &= 0xff;
        if (len == 0) return 0;
        bool sign = std::is_signed_v<T> && (U<T>(a) >> std::min(pos + len - 1, bits - 1) & 1);
        U<T> v = pos >= bits ? 0 : U<T>(U<T>(a) >> pos);
        u32 have = pos >= bits ? 0 : std::min(len, bits - pos);
        if (have < bits) {
            U<T> keep = U<T>((U<T>(1) << have) - 1);
            v &= keep;
            if (sign) v |= U<T>(~keep);
        }
        return T(v);
    }
};
template <class T>
struct BfiOp {
    static T f(T a, T b, u32 pos, u32 len) {
        constexpr u32 bits = sizeof(T) * 8;
        pos &= 0xff, len &= 0xff;
        if (len == 0 || pos >= bits) return b;
        T field = len >= bits ? ~T(0) : T((T(1) << len) - 1);
        T mask = T(field << pos);
        return (b & ~mask) | (T(a << pos) & mask);
    }
};

Status bfi32(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c), *e = w.src(in.x->s0[0]);
    eachLane<u32>(w.reg(in.d), m,
                  [=](int i) { return BfiOp<u32>::f(rd<u32>(a, i), rd<u32>(b, i), rd<u32>(c, i), rd<u32>(e, i)); });
    return Status::Next;
}
Status bfi64(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c), *e = w.src(in.x->s0[0]);
    eachLane<u64>(w.reg(in.d), m,
                  [=](int i) { return BfiOp<u64>::f(rd<u64>(a, i), rd<u64>(b, i), rd<u32>(c, i), rd<u32>(e, i)); });
    return Status::Next;
}

template <bool Left, bool Wrap>
struct Shf {
    static u32 f(u32 lo, u32 hi, u32 n) {
        n = Wrap ? n & 31 : std::min(n, 32u);
        u64 v = u64(hi) << 32 | lo;
        return Left ? u32((v << n) >> 32) : u32(v >> n);
    }
};

u32 lop3(u32 a, u32 b, u32 c, u32 lut) {
    u32 r = 0;
    if (lut & 0x01) r |= ~a & ~b & ~c;
    if (lut & 0x02) r |= ~a & ~b & c;
    if (lut & 0x04) r |= ~a & b & ~c;
    if (lut & 0x08) r |= ~a & b & c;
    if (lut & 0x10) r |= a & ~b & ~c;
    if (lut & 0x20) r |= a & ~b & c;
    if (lut & 0x40) r |= a & b & ~c;
    if (lut & 0x80) r |= a & b & c;
    return r;
}
Status lop3Exec(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c);
    u32 lut = u32(in.imm);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return lop3(rd<u32>(a, i), rd<u32>(b, i), rd<u32>(c, i), lut); });
    return Status::Next;
}

// prmt modes, PTX ISA "Integer Arithmetic Instructions: prmt".
Status prmtExec(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c);
    int mode = in.n;
    eachLane<u32>(w.reg(in.d), m, [=](int i) {
        u64 v = u64(rd<u32>(b, i)) << 32 | rd<u32>(a, i);
        u32 sel = rd<u32>(c, i), r = 0;
        for (u32 k = 0; k < 4; k++) {
            u32 s;
            bool sign = false;
            u32 q = sel & 3;
            switch (mode) {
                case 0:
                    s = (sel >> (4 * k)) & 7;
                    sign = (sel >> (4 * k)) & 8;
                    break;
                case 1: s = q + k; break;                   // f4e
                case 2: s = (q + 8 - k) & 7; break;         // b4e
                case 3: s = q; break;                       // rc8
                case 4: s = std::max(q, k); break;          // ecl
                case 5: s = std::min(q, k); break;          // ecr
                default: s = (q & 1) * 2 + (k & 1); break;  // rc16
            }
            u32 byte = u32(v >> (8 * s)) & 0xff;
            if (sign) byte = (byte & 0x80) ? 0xff : 0;
            r |= byte << (8 * k);
        }
        return r;
    });
    return Status::Next;
}

#define INT_TYPES(X) X("s16", i16) X("u16", u16) X("s32", i32) X("u32", u32) X("s64", i64) X("u64", u64)
#define BIT_TYPES(X) X("b16", u16) X("b32", u32) X("b64", u64)

template <template <class> class F>
Fn pickBinary(std::string_view t) {
#define X(n, T) \
    if (t == n) return binary<F<T>, T, T, T>;
    INT_TYPES(X)
    BIT_TYPES(X)
#undef X
    return nullptr;
}
template <template <class> class F>
Fn pickUnary(std::string_view t) {
#define X(n, T) \
    if (t == n) return unary<F<T>, T, T>;
    INT_TYPES(X)
    BIT_TYPES(X)
#undef X
    return nullptr;
}
template <template <class> class F>
Fn pickTernary(std::string_view t) {
#define X(n, T) \
    if (t == n) return ternary<F<T>, T, T, T, T>;
    INT_TYPES(X)
#undef X
    return nullptr;
}
template <template <class> class F>
Fn pickShift(std::string_view t) {
#define X(n, T) \
    if (t == n) return binary<F<T>, T, T, u32>;
    INT_TYPES(X)
    BIT_TYPES(X)
#undef X
    return nullptr;
}

u32 strideOf(std::string_view t) { return typeBytes(t) == 8 ? 8 : 4; }

// --- add / sub with carry -------------------------------------------------
// The carry flag lives in a per-warp lane mask.
template <bool IsSub, bool In, bool Out>
Status carry32(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    u8* d = w.reg(in.d);
    forLanes(m, [&](int i) {
        u64 x = rd<u32>(a, i), y = rd<u32>(b, i), c = In ? (w.carry >> i) & 1 : 0;
        u64 r = IsSub ? x - y - c : x + y + c;
        wr<u32>(d, i, u32(r));
        if (Out) w.carry = (w.carry & ~(1u << i)) | u32((r >> 32) & 1) << i;
    });
    return Status::Next;
}
template <bool IsSub, bool In, bool Out>
Status carry64(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    u8* d = w.reg(in.d);
    forLanes(m, [&](int i) {
        unsigned __int128 x = rd<u64>(a, i), y = rd<u64>(b, i), c = In ? (w.carry >> i) & 1 : 0;
        unsigned __int128 r = IsSub ? x - y - c : x + y + c;
        wr<u64>(d, i, u64(r));
        if (Out) w.carry = (w.carry & ~(1u << i)) | u32((r >> 64) & 1) << i;
    });
    return Status::Next;
}
template <bool IsSub>
void buildCarry(Decoder& d, const Stmt& s, Inst& in, bool cin) {
    const std::string& t = s.op.back();
    bool out = s.has("cc"), wide = strideOf(t) == 8;
    if (wide)
        in.fn = cin ? (out ? carry64<IsSub, true, true> : carry64<IsSub, true, false>) : carry64<IsSub, false, true>;
    else
        in.fn = cin ? (out ? carry32<IsSub, true, true> : carry32<IsSub, true, false>) : carry32<IsSub, false, true>;
    bind3(d, s, in, strideOf(t), 2);
}

}  // namespace

// Float forms of the shared mnemonics live in ops_float.cpp.
bool buildFloatArith(Decoder& d, const Stmt& s, Inst& in);

namespace {

template <template <class> class F>
void buildBinary(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    in.fn = pickBinary<F>(t);
    bind3(d, s, in, strideOf(t), 2);
}

void buildAdd(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    if (s.has("cc")) return buildCarry<false>(d, s, in, false);
    if (s.has("sat")) d.fail(s, "saturating integer add");
    buildBinary<Add>(d, s, in);
}
void buildSub(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    if (s.has("cc")) return buildCarry<true>(d, s, in, false);
    if (s.has("sat")) d.fail(s, "saturating integer sub");
    buildBinary<Sub>(d, s, in);
}
void buildMul(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    const std::string& t = s.op.back();
    if (s.has("wide")) {
        u32 half = strideOf(t), full = typeBytes(t) == 2 ? 4 : 8;
        if (t == "s16") in.fn = binary<MulWide<i16>, i32, i16, i16>;
        if (t == "u16") in.fn = binary<MulWide<u16>, u32, u16, u16>;
        if (t == "s32") in.fn = binary<MulWide<i32>, i64, i32, i32>;
        if (t == "u32") in.fn = binary<MulWide<u32>, u64, u32, u32>;
        d.dst(in.d, s.ops[0], s, full);
        d.src(in.a, s.ops[1], s, half);
        d.src(in.b, s.ops[2], s, half);
        return;
    }
    in.fn = s.has("hi") ? pickBinary<MulHi>(t) : pickBinary<MulLo>(t);
    bind3(d, s, in, strideOf(t), 2);
}
void buildMad(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    const std::string& t = s.op.back();
    if (s.has("wide")) {
        u32 half = strideOf(t), full = typeBytes(t) == 2 ? 4 : 8;
        if (t == "s16") in.fn = ternary<MadWide<i16>, i32, i16, i16, i32>;
        if (t == "u16") in.fn = ternary<MadWide<u16>, u32, u16, u16, u32>;
        if (t == "s32") in.fn = ternary<MadWide<i32>, i64, i32, i32, i64>;
        if (t == "u32") in.fn = ternary<MadWide<u32>, u64, u32, u32, u64>;
        d.dst(in.d, s.ops[0], s, full);
        d.src(in.a, s.ops[1], s, half);
        d.src(in.b, s.ops[2], s, half);
        d.src(in.c, s.ops[3], s, full);
        return;
    }
    in.fn = s.has("hi") ? pickTernary<MadHi>(t) : pickTernary<MadLo>(t);
    bind3(d, s, in, strideOf(t), 3);
}
void buildDiv(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    buildBinary<Div>(d, s, in);
}
template <template <class> class F>
void buildMinMax(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    buildBinary<F>(d, s, in);
}
template <template <class> class F>
void buildAbsNeg(Decoder& d, const Stmt& s, Inst& in) {
    if (buildFloatArith(d, s, in)) return;
    const std::string& t = s.op.back();
    in.fn = pickUnary<F>(t);
    bind3(d, s, in, strideOf(t), 1);
}

// and / or / xor / not, with predicate forms.
template <int Op>
Status predLogic(Warp& w, const Inst& in, u32 m) {
    u32 a = w.predMask(in.p), b = Op == 3 ? 0 : w.predMask(in.q);
    u32 r = Op == 0 ? a & b : Op == 1 ? a | b : Op == 2 ? a ^ b : Op == 3 ? ~a : a;
    setPred(w, u16(in.target), m, r);
    return Status::Next;
}
// Predicate results are not data registers: the index travels in `target`.
u16 predOrImm(Decoder& d, const Stmt& s, const Operand& o, Inst& in) {
    if (o.kind == Operand::Imm) {
        (void)in;
        return o.imm ? 0xffff : 0xfffe;
    }
    return d.predSrc(o, s);
}
template <int Op>
void buildPredLogic(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = predLogic<Op>;
    in.target = d.predDst(s.ops[0], s);
    in.p = predOrImm(d, s, s.ops[1], in);
    if (Op < 3) in.q = predOrImm(d, s, s.ops[2], in);
}
Status predConst(Warp& w, const Inst& in, u32 m) {
    setPred(w, u16(in.target), m, in.imm ? ~0u : 0);
    return Status::Next;
}

template <template <class> class F, int PredOp>
void buildLogic(Decoder& d, const Stmt& s, Inst& in) {
    if (s.op.back() == "pred") return buildPredLogic<PredOp>(d, s, in);
    buildBinary<F>(d, s, in);
}
void buildNot(Decoder& d, const Stmt& s, Inst& in) {
    if (s.op.back() == "pred") return buildPredLogic<3>(d, s, in);
    in.fn = pickUnary<Not>(s.op.back());
    bind3(d, s, in, strideOf(s.op.back()), 1);
}
void buildCnot(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = pickUnary<Cnot>(s.op.back());
    bind3(d, s, in, strideOf(s.op.back()), 1);
}
template <template <class> class F>
void buildShift(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    in.fn = pickShift<F>(t);
    d.dst(in.d, s.ops[0], s, strideOf(t));
    d.src(in.a, s.ops[1], s, strideOf(t));
    d.src(in.b, s.ops[2], s, 4);
}

template <template <class> class F>
void buildCount(Decoder& d, const Stmt& s, Inst& in) {
    bool wide = strideOf(s.op.back()) == 8;
    in.fn = wide ? unary<F<u64>, u32, u64> : unary<F<u32>, u32, u32>;
    d.dst(in.d, s.ops[0], s, 4);
    d.src(in.a, s.ops[1], s, wide ? 8 : 4);
}
void buildBrev(Decoder& d, const Stmt& s, Inst& in) {
    bool wide = strideOf(s.op.back()) == 8;
    in.fn = wide ? unary<Brev<u64>, u64, u64> : unary<Brev<u32>, u32, u32>;
    bind3(d, s, in, wide ? 8 : 4, 1);
}
void buildBfind(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    bool sh = s.has("shiftamt");
#define X(n, T) \
    if (t == n) in.fn = sh ? Fn(unary<Bfind<T, true>, u32, T>) : Fn(unary<Bfind<T, false>, u32, T>);
    X("u32", u32)
    X("s32", i32)
    X("u64", u64)
    X("s64", i64)
#undef X
    d.dst(in.d, s.ops[0], s, 4);
    d.src(in.a, s.ops[1], s, strideOf(t));
}
void buildSad(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = pickTernary<Sad>(s.op.back());
    bind3(d, s, in, strideOf(s.op.back()), 3);
}
void buildBfe(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
#define X(n, T) \
    if (t == n) in.fn = ternary<Bfe<T>, T, T, u32, u32>;
    X("u32", u32)
    X("s32", i32)
    X("u64", u64)
    X("s64", i64)
#undef X
    d.dst(in.d, s.ops[0], s, strideOf(t));
    d.src(in.a, s.ops[1], s, strideOf(t));
    d.src(in.b, s.ops[2], s, 4);
    d.src(in.c, s.ops[3], s, 4);
}
void buildBfi(Decoder& d, const Stmt& s, Inst& in) {
    u32 st = strideOf(s.op.back());
    in.fn = st == 8 ? bfi64 : bfi32;
    d.dst(in.d, s.ops[0], s, st);
    d.src(in.a, s.ops[1], s, st);
    d.src(in.b, s.ops[2], s, st);
    d.src(in.c, s.ops[3], s, 4);
    d.srcList(d.ext(in).s0, s.ops[4], s, 4);
}
struct Bmsk {
    static u32 f(u32 a, u32 b) {
        u64 n = std::min(b, 32u);
        return a >= 32 ? 0 : u32(((u64(1) << n) - 1) << a);
    }
};
void buildBmsk(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = binary<Bmsk, u32, u32, u32>;
    bind3(d, s, in, 4, 2);
}
// fns: position of the offset-th set bit of a mask, counted from base.
struct Fns {
    static u32 f(u32 mask, u32 base, u32 off) {
        i32 n = i32(off);
        if (n == 0) return base < 32 && (mask >> base & 1) ? base : ~0u;
        i32 step = n < 0 ? -1 : 1, left = n < 0 ? -n : n;
        for (i32 p = i32(base); p >= 0 && p < 32; p += step)
            if (mask >> p & 1 && --left == 0) return u32(p);
        return ~0u;
    }
};
void buildFns(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = ternary<Fns, u32, u32, u32, u32>;
    bind3(d, s, in, 4, 3);
}
void buildShf(Decoder& d, const Stmt& s, Inst& in) {
    bool l = s.has("l"), wrap = s.has("wrap");
    in.fn = l ? (wrap ? ternary<Shf<true, true>, u32, u32, u32, u32> : ternary<Shf<true, false>, u32, u32, u32, u32>)
              : (wrap ? ternary<Shf<false, true>, u32, u32, u32, u32> : ternary<Shf<false, false>, u32, u32, u32, u32>);
    bind3(d, s, in, 4, 3);
}
void buildLop3(Decoder& d, const Stmt& s, Inst& in) {
    if (s.ops.size() != 5 || s.ops[4].kind != Operand::Imm) d.fail(s, "lop3 with a predicate result");
    in.fn = lop3Exec;
    in.imm = s.ops[4].imm;
    bind3(d, s, in, 4, 3);
}
void buildPrmt(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = prmtExec;
    in.n = s.has("f4e")    ? 1
           : s.has("b4e")  ? 2
           : s.has("rc8")  ? 3
           : s.has("ecl")  ? 4
           : s.has("ecr")  ? 5
           : s.has("rc16") ? 6
                           : 0;
    bind3(d, s, in, 4, 3);
}

template <bool SA, bool SB>
struct Dp4a {
    static u32 f(u32 a, u32 b, u32 c) {
        for (int k = 0; k < 4; k++) {
            i32 x = SA ? i32(i8(a >> (8 * k))) : i32(u8(a >> (8 * k)));
            i32 y = SB ? i32(i8(b >> (8 * k))) : i32(u8(b >> (8 * k)));
            c += u32(x * y);
        }
        return c;
    }
};
void buildDp4a(Decoder& d, const Stmt& s, Inst& in) {
    bool sa = s.op[1] == "s32", sb = s.op[2] == "s32";
    in.fn =
        sa ? (sb ? ternary<Dp4a<true, true>, u32, u32, u32, u32> : ternary<Dp4a<true, false>, u32, u32, u32, u32>)
           : (sb ? ternary<Dp4a<false, true>, u32, u32, u32, u32> : ternary<Dp4a<false, false>, u32, u32, u32, u32>);
    bind3(d, s, in, 4, 3);
}

// --- mov -------------------------------------------------------------------
Status movPred(Warp& w, const Inst& in, u32 m) {
    setPred(w, u16(in.target), m, w.predMask(in.p));
    return Status::Next;
}
Status movClock(Warp& w, const Inst& in, u32 m) {
    u64 t = w.m->time + (in.imm ? u64(w.m->stats.warpInstrs) : 0);
    if (in.n == 2) t >>= 32;
    if (in.sd == 8)
        eachLane<u64>(w.reg(in.d), m, [=](int) { return t; });
    else
        eachLane<u32>(w.reg(in.d), m, [=](int) { return u32(t); });
    return Status::Yield;
}
// {lo, hi, ...} <-> one wide register, for any split of 16..128 bits.
Status movPack(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    u32 bytes = u32(x.p[0]) / u32(x.s0.size());
    forLanes(m, [&](int l) {
        u8 tmp[16] = {};
        for (size_t k = 0; k < x.s0.size(); k++) std::memcpy(tmp + k * bytes, w.src(x.s0[k]) + l * x.wide[k], bytes);
        u8* d = w.reg(in.d) + l * in.sd;
        std::memset(d, 0, in.sd);
        std::memcpy(d, tmp, size_t(x.p[0]));
    });
    return Status::Next;
}
Status movUnpack(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    u32 bytes = u32(x.p[0]) / u32(x.dst.size());
    forLanes(m, [&](int l) {
        u8 tmp[16];
        std::memcpy(tmp, w.src(in.a) + l * in.sa, size_t(x.p[0]));
        for (size_t k = 0; k < x.dst.size(); k++) {
            u8* d = w.reg(x.dst[k]) + l * x.wide[k];
            std::memset(d, 0, x.wide[k]);
            std::memcpy(d, tmp + k * bytes, bytes);
        }
    });
    return Status::Next;
}
Status mov64from2(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    eachLane<u64>(w.reg(in.d), m, [=](int i) { return u64(rd<u32>(b, i)) << 32 | rd<u32>(a, i); });
    return Status::Next;
}
Status mov2from64(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return u32(rd<u64>(a, i)); });
    eachLane<u32>(w.reg(in.b), m, [=](int i) { return u32(rd<u64>(a, i) >> 32); });
    return Status::Next;
}
Status mov128(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) { std::memmove(w.reg(in.d) + l * 16, w.src(in.a) + l * 16, 16); });
    return Status::Next;
}
Status addImm32(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u32 k = u32(in.imm);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return rd<u32>(a, i) + k; });
    return Status::Next;
}
Status addImm64(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u64 k = u64(in.imm);
    eachLane<u64>(w.reg(in.d), m, [=](int i) { return rd<u64>(a, i) + k; });
    return Status::Next;
}
Status widen32AddImm(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u64 k = u64(in.imm);
    eachLane<u64>(w.reg(in.d), m, [=](int i) { return rd<u32>(a, i) + k; });
    return Status::Next;
}
Status narrow64AddImm(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u64 k = u64(in.imm);
    eachLane<u32>(w.reg(in.d), m, [=](int i) { return u32(rd<u64>(a, i) + k); });
    return Status::Next;
}
u32 constVectorStride(const Decoder& d, const Operand& o, u32 bytes) {
    return o.kind == Operand::Reg ? d.regStride(o) : bytes > 4 ? 8 : 4;
}

void buildMov(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& t = s.op.back();
    const Operand &D = s.ops[0], &S = s.ops[1];
    if (t == "pred") {
        in.target = d.predDst(D, s);
        if (S.kind == Operand::Imm)
            in.fn = predConst, in.imm = S.imm;
        else
            in.fn = movPred, in.p = d.predSrc(S, s);
        return;
    }
    u32 bytes = typeBytes(t), st = bytes == 16 ? 16 : bytes == 8 ? 8 : 4;
    if (S.kind == Operand::Vec) {
        bool simple = bytes == 8 && S.elems.size() == 2;
        if (simple) {
            in.fn = mov64from2;
            d.dst(in.d, D, s, 8);
            d.src(in.a, S.elems[0], s, 4);
            d.src(in.b, S.elems[1], s, 4);
            return;
        }
        Ext& x = d.ext(in);
        in.fn = movPack;
        in.sd = u8(st);
        x.p[0] = bytes;
        d.dst(in.d, D, s, st);
        x.s0.assign(S.elems.size(), 0);
        for (size_t k = 0; k < S.elems.size(); k++) {
            u32 es = constVectorStride(d, S.elems[k], bytes / u32(S.elems.size()));
            x.wide.push_back(u8(es));
            d.src(x.s0[k], S.elems[k], s, es);
        }
        return;
    }
    if (D.kind == Operand::Vec) {
        if (bytes == 8 && D.elems.size() == 2 && S.kind == Operand::Reg) {
            in.fn = mov2from64;
            d.dst(in.d, D.elems[0], s, 4);
            d.dst(in.b, D.elems[1], s, 4);
            d.src(in.a, S, s, 8);
            return;
        }
        Ext& x = d.ext(in);
        in.fn = movUnpack;
        x.p[0] = bytes;
        in.sa = u8(S.kind == Operand::Reg ? d.regStride(S) : st);
        d.src(in.a, S, s, in.sa);
        x.dst.assign(D.elems.size(), 0);
        for (size_t k = 0; k < D.elems.size(); k++) {
            u32 es = constVectorStride(d, D.elems[k], bytes / u32(D.elems.size()));
            x.wide.push_back(u8(es));
            d.dst(x.dst[k], D.elems[k], s, es);
        }
        return;
    }
    d.dst(in.d, D, s, st);
    if (S.kind == Operand::Special && (S.sym.rfind("%clock", 0) == 0 || S.sym.rfind("%globaltimer", 0) == 0)) {
        in.fn = movClock;
        in.sd = u8(st);
        in.imm = S.sym[1] == 'g';
        in.n = S.sym.size() > 3 && S.sym.substr(S.sym.size() - 3) == "_hi" ? 2 : 1;
        return;
    }
    if (S.kind == Operand::Special && S.sym == "%is_explicit_cluster") {
        d.imm(in.a, 1, 4);
        in.fn = unary<Mov<u32>, u32, u32>;
        return;
    }
    if (S.kind == Operand::Var || S.kind == Operand::Sym) {
        std::string base;
        i64 disp;
        d.symbolAddress(S, s, base, disp);
        if (base.empty()) {
            d.imm(in.a, u64(disp), st);
            in.fn = st == 8 ? Fn(unary<Mov<u64>, u64, u64>) : Fn(unary<Mov<u32>, u32, u32>);
        } else {
            in.imm = disp;
            bool base64 = base == "%param_base";
            d.special(in.a, base, base64 ? 8 : 4);
            in.fn = st == 8 ? (base64 ? addImm64 : widen32AddImm) : base64 ? narrow64AddImm : addImm32;
        }
        return;
    }
    if (S.kind == Operand::Special && st == 8 && S.sym != "%gridid") {
        d.special(in.a, S.sym, 4);
        in.fn = widen32AddImm;
        return;
    }
    d.src(in.a, S, s, st);
    in.fn = st == 16 ? Fn(mov128) : st == 8 ? Fn(unary<Mov<u64>, u64, u64>) : Fn(unary<Mov<u32>, u32, u32>);
}

// --- cvta, mapa's cousin isspacep is in ops_mem.cpp -------------------------
template <class T>
Status selpExec(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    u32 p = w.predMask(in.p);
    eachLane<T>(w.reg(in.d), m, [=](int i) { return (p >> i) & 1 ? rd<T>(a, i) : rd<T>(b, i); });
    return Status::Next;
}
void buildSelp(Decoder& d, const Stmt& s, Inst& in) {
    u32 st = strideOf(s.op.back());
    in.fn = st == 8 ? selpExec<u64> : selpExec<u32>;
    d.dst(in.d, s.ops[0], s, st);
    d.src(in.a, s.ops[1], s, st);
    d.src(in.b, s.ops[2], s, st);
    in.p = s.ops[3].kind == Operand::Imm ? (s.ops[3].imm ? 0xffff : 0xfffe) : d.predSrc(s.ops[3], s);
}
template <class T, class C>
struct Slct {
    static T f(T a, T b, C c) { return c >= 0 ? a : b; }
};
void buildSlct(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& ct = s.op.back();
    u32 st = strideOf(s.op[s.op.size() - 2]);
    if (ct == "s32")
        in.fn =
            st == 8 ? Fn(ternary<Slct<u64, i32>, u64, u64, u64, i32>) : Fn(ternary<Slct<u32, i32>, u32, u32, u32, i32>);
    else
        in.fn = st == 8 ? Fn(ternary<Slct<u64, float>, u64, u64, u64, float>)
                        : Fn(ternary<Slct<u32, float>, u32, u32, u32, float>);
    d.dst(in.d, s.ops[0], s, st);
    d.src(in.a, s.ops[1], s, st);
    d.src(in.b, s.ops[2], s, st);
    d.src(in.c, s.ops[3], s, 4);
}

PTX_OP("add", buildAdd);
PTX_OP("sub", buildSub);
PTX_OP("addc", [](Decoder& d, const Stmt& s, Inst& in) { buildCarry<false>(d, s, in, true); });
PTX_OP("subc", [](Decoder& d, const Stmt& s, Inst& in) { buildCarry<true>(d, s, in, true); });
PTX_OP("mul", buildMul);
PTX_OP("mad", buildMad);
PTX_OP("div", buildDiv);
PTX_OP("rem", (buildBinary<Rem>));
PTX_OP("min", (buildMinMax<Min>));
PTX_OP("max", (buildMinMax<Max>));
PTX_OP("abs", (buildAbsNeg<Abs>));
PTX_OP("neg", (buildAbsNeg<Neg>));
PTX_OP("and", (buildLogic<And, 0>));
PTX_OP("or", (buildLogic<Or, 1>));
PTX_OP("xor", (buildLogic<Xor, 2>));
PTX_OP("not", buildNot);
PTX_OP("cnot", buildCnot);
PTX_OP("shl", (buildShift<Shl>));
PTX_OP("shr", (buildShift<Shr>));
PTX_OP("popc", (buildCount<Popc>));
PTX_OP("clz", (buildCount<Clz>));
PTX_OP("brev", buildBrev);
PTX_OP("bfind", buildBfind);
PTX_OP("sad", buildSad);
PTX_OP("bfe", buildBfe);
PTX_OP("bfi", buildBfi);
PTX_OP("bmsk", buildBmsk);
PTX_OP("shf", buildShf);
PTX_OP("fns", buildFns);
PTX_OP("lop3", buildLop3);
PTX_OP("prmt", buildPrmt);
PTX_OP("dp4a", buildDp4a);
PTX_OP("mov", buildMov);
PTX_OP("selp", buildSelp);
PTX_OP("slct", buildSlct);

}  // namespace
}  // namespace ptx_emulator
