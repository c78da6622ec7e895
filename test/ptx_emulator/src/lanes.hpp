// Lane-wise execution templates used by the arithmetic instructions.
// Registers of up to 32 bits occupy 4 bytes per lane, 64-bit ones 8.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include "decoder.hpp"
#include "numerics.hpp"

namespace ptx_emulator {

struct Half {
    u16 v;
};
struct Bf16 {
    u16 v;
};
struct Half2 {
    u32 v;
};
struct Bf162 {
    u32 v;
};
struct F32x2 {
    float x, y;
};

template <class T>
inline T rd(const u8* p, int i) {
    if constexpr (sizeof(T) == 8)
        return ((const T*)p)[i];
    else if constexpr (sizeof(T) == 4)
        return ((const T*)p)[i];
    else if constexpr (sizeof(T) == 2)
        return std::bit_cast<T>(u16(((const u32*)p)[i]));
    else
        return std::bit_cast<T>(u8(((const u32*)p)[i]));
}
template <class T>
inline void wr(u8* p, int i, T v) {
    if constexpr (sizeof(T) >= 4)
        ((T*)p)[i] = v;
    else if constexpr (sizeof(T) == 2)
        ((u32*)p)[i] = std::bit_cast<u16>(v);
    else
        ((u32*)p)[i] = std::bit_cast<u8>(v);
}

template <class D, class F>
inline void eachLane(u8* d, u32 m, F f) {
    if (m == ~0u) {
#pragma GCC ivdep
        for (int i = 0; i < kWarp; i++) wr<D>(d, i, f(i));
    } else {
        forLanes(m, [&](int i) { wr<D>(d, i, f(i)); });
    }
}

template <class F, class D, class A>
Status unary(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    eachLane<D>(w.reg(in.d), m, [=](int i) { return F::f(rd<A>(a, i)); });
    return Status::Next;
}
template <class F, class D, class A, class B>
Status binary(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    eachLane<D>(w.reg(in.d), m, [=](int i) { return F::f(rd<A>(a, i), rd<B>(b, i)); });
    return Status::Next;
}
template <class F, class D, class A, class B, class C>
Status ternary(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c);
    eachLane<D>(w.reg(in.d), m, [=](int i) { return F::f(rd<A>(a, i), rd<B>(b, i), rd<C>(c, i)); });
    return Status::Next;
}

// Collects one bit per lane from a lane predicate.
template <class F>
inline u32 maskOf(F f) {
#ifdef __AVX2__
    alignas(32) i32 t[kWarp];
    for (int i = 0; i < kWarp; i++) t[i] = f(i) ? -1 : 0;
    u32 m = 0;
    for (int k = 0; k < 4; k++) m |= u32(_mm256_movemask_ps(_mm256_load_ps((const float*)t + 8 * k))) << (8 * k);
    return m;
#else
    u32 m = 0;
    for (int i = 0; i < kWarp; i++) m |= u32(bool(f(i))) << i;
    return m;
#endif
}

inline void setPred(Warp& w, u16 p, u32 m, u32 bits) {
    u32& r = w.pred[p >> 1];
    r = (r & ~m) | (bits & m);
}

// An instruction that needs lanes which are not here yet: it is executed again when they are.
inline Status converge(Warp& w) {
    w.block = Block::Converge;
    return Status::Block;
}

inline bool isType(std::string_view t) { return typeBytes(t) != 0; }

// Binds d, a[, b[, c]] with the same stride.
inline void bind3(Decoder& d, const Stmt& s, Inst& in, u32 stride, size_t sources) {
    if (s.ops.size() < sources + 1) d.fail(s, "too few operands");
    d.dst(in.d, s.ops[0], s, stride);
    d.src(in.a, s.ops[1], s, stride);
    if (sources > 1) d.src(in.b, s.ops[2], s, stride);
    if (sources > 2) d.src(in.c, s.ops[3], s, stride);
}

}  // namespace ptx_emulator
