// ld, st, atom, red, address queries.
#include "lanes.hpp"

namespace ptx_emulator {

void buildStAsync(Decoder& d, const Stmt& s, Inst& in, bool reduce);  // async.cpp

namespace {

// State space and "may be polled" (ordered or volatile) from the modifiers.
struct MemMods {
    Space space = Space::Generic;
    bool cluster = false, polled = false;
    int vec = 1;
    Sem sem = Sem::Weak;
    Scope scope = Scope::Sys;  // of volatile accesses
};
MemMods memMods(const Stmt& s) {
    MemMods r;
    for (size_t i = 1; i < s.op.size(); i++) {
        const std::string& o = s.op[i];
        if (o == "global")
            r.space = Space::Global;
        else if (o == "shared" || o == "shared::cta")
            r.space = Space::Shared;
        else if (o == "shared::cluster")
            r.space = Space::Shared, r.cluster = true;
        else if (o == "local")
            r.space = Space::Local;
        else if (o == "const")
            r.space = Space::Const;
        else if (o.rfind("param", 0) == 0)
            r.space = Space::Param;
        else if (o == "v2")
            r.vec = 2;
        else if (o == "v4")
            r.vec = 4;
        else if (o == "v8")
            r.vec = 8;
        else if (o == "cta" || o == "cluster" || o == "gpu" || o == "sys")
            r.scope = o == "cta" ? Scope::Cta : o == "cluster" ? Scope::Cluster : o == "gpu" ? Scope::Gpu : Scope::Sys;
        else if (o == "volatile" || o == "relaxed" || o == "mmio")
            r.polled = true, r.sem = Sem::Relaxed;
        else if (o == "acquire" || o == "release" || o == "acq_rel")
            r.polled = true, r.sem = o == "acquire" ? Sem::Acquire : o == "release" ? Sem::Release : Sem::AcqRel;
    }
    return r;
}
// Where the modifiers are kept for the happens-before check.
constexpr size_t kSem = 8, kScope = 9;
void keepOrder(Ext& x, const MemMods& mm) { x.p[kSem] = i64(mm.sem), x.p[kScope] = i64(mm.scope); }

inline u64 laneAddress(const u8* a, const Inst& in, int l) {
    return (in.sa == 8 ? ((const u64*)a)[l] : ((const u32*)a)[l]) + u64(in.imm);
}

// Fast path for this CTA's own shared memory; null when `resolve` must decide.
inline u8* ownShared(Warp& w, u64 addr, u32 bytes) {
    Cta* c = w.cta;
    u32 a = u32(addr), off = a & kSmemOffsetMask;
    if ((a >> kSmemRankShift) != c->rank || off < kSmemReserved || off + bytes > c->smem.size() || (a & (bytes - 1)))
        return nullptr;
    return &c->smem[off];
}
inline bool allInit(const Cta* c, u32 off, u32 bytes) {
    const u8* s = &c->smemInit[off];
    switch (bytes) {
        case 1: return *s;
        case 2: return *(const u16*)s == 0x0101;
        case 4: return *(const u32*)s == 0x01010101u;
        case 8: return *(const u64*)s == 0x0101010101010101ull;
        default: return !std::memchr(s, 0, bytes);
    }
}

template <int B, bool Signed>
inline void putLoaded(u8* d, int l, u32 stride, const u8* p) {
    u64 v = 0;
    if constexpr (B == 1)
        v = Signed ? u64(i64(*(const i8*)p)) : *p;
    else if constexpr (B == 2) {
        u16 t;
        std::memcpy(&t, p, 2);
        v = Signed ? u64(i64(i16(t))) : t;
    } else if constexpr (B == 4) {
        u32 t;
        std::memcpy(&t, p, 4);
        v = Signed ? u64(i64(i32(t))) : t;
    } else if constexpr (B == 8)
        std::memcpy(&v, p, 8);
    if constexpr (B == 16)
        std::memcpy(d + l * 16, p, 16);
    else if (stride == 4)
        ((u32*)d)[l] = u32(v);
    else
        ((u64*)d)[l] = v;
}

template <int B, bool Signed>
Status load(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    const Ext& x = *in.x;
    const u32 n = in.n, bytes = B * n;
    const Space sp = Space(in.space);
    const bool check = w.m->opt.checkUninitSmem;
    if (w.counters) [[unlikely]]
        countAccess(w, in, m, bytes, false);
    // Two passes, so that a destination may alias the address register.
    const u8* ptr[kWarp];
    forLanes(m, [&](int l) {
        u64 addr = laneAddress(a, in, l);
        if (sp == Space::Shared) {
            if (u8* p = ownShared(w, addr, bytes);
                p && (!check || allInit(w.cta, u32(addr) & kSmemOffsetMask, bytes))) {
                ptr[l] = p;
                return;
            }
        }
        ptr[l] = resolve(w, l, sp, addr, bytes, false);
    });
    if (w.order) {
        if (in.q)
            orderStrong(w, in, m, true, false);
        else
            orderAccess(w, in, m, bytes, false);
        if (sp != Space::Shared) orderGlobal(w, in, m, bytes, true, false, Sem(x.p[kSem]), Scope(x.p[kScope]));
    }
    for (u32 e = 0; e < n; e++) {
        u8* d = w.reg(x.dst[e]);
        u32 stride = x.wide[e];
        forLanes(m, [&](int l) { putLoaded<B, Signed>(d, l, stride, ptr[l] + e * B); });
    }
    return in.q ? Status::Yield : Status::Next;
}
template <int B, bool Signed>
Status loadParam(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    const u8* p = w.cta->cluster->launch->params + in.imm;
    for (u32 e = 0; e < in.n; e++) {
        u8* d = w.reg(x.dst[e]);
        u32 stride = x.wide[e];
        forLanes(m, [&](int l) { putLoaded<B, Signed>(d, l, stride, p + e * B); });
    }
    return Status::Next;
}
template <int B>
Status store(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    const Ext& x = *in.x;
    const u32 n = in.n, bytes = B * n;
    const Space sp = Space(in.space);
    if (w.counters) [[unlikely]]
        countAccess(w, in, m, bytes, true);
    forLanes(m, [&](int l) {
        u64 addr = laneAddress(a, in, l);
        u8* p = resolve(w, l, sp, addr, bytes, true);
        for (u32 e = 0; e < n; e++) std::memcpy(p + e * B, w.src(x.s0[e]) + size_t(l) * x.wide[e], B);
    });
    if (w.order) {
        if (in.q)
            orderStrong(w, in, m, false, true);
        else
            orderAccess(w, in, m, bytes, true);
        if (sp != Space::Shared) orderGlobal(w, in, m, bytes, false, true, Sem(x.p[kSem]), Scope(x.p[kScope]));
    }
    return Status::Next;
}

u32 elemStride(const Decoder& d, const Operand& o, u32 bytes) {
    return o.kind == Operand::Reg ? d.regStride(o) : bytes == 16 ? 16 : bytes == 8 ? 8 : 4;
}

void buildLd(Decoder& d, const Stmt& s, Inst& in) {
    MemMods mm = memMods(s);
    const std::string& t = s.op.back();
    u32 b = typeBytes(t);
    bool sg = t[0] == 's';
    in.n = u8(mm.vec);
    in.q = mm.polled;
    in.space = u8(mm.space);
    Ext& x = d.ext(in);
    keepOrder(x, mm);
    const Operand& D = s.ops[0];
    std::vector<Operand> elems = D.kind == Operand::Vec ? D.elems : std::vector<Operand>{D};
    if (elems.size() != size_t(mm.vec)) d.fail(s, "vector size mismatch");
    x.dst.assign(elems.size(), 0);
    for (size_t i = 0; i < elems.size(); i++) {
        u32 st = elemStride(d, elems[i], b);
        x.wide.push_back(u8(st));
        d.dst(x.dst[i], elems[i], s, st);
    }
    bool kernelParam = false;
    if (mm.space == Space::Param && s.ops[1].var >= 0) {
        std::string base;
        i64 disp;
        d.symbolAddress(s.ops[1], s, base, disp);
        kernelParam = base == "%param_base";
        if (kernelParam) in.imm = disp;
    }
    if (!kernelParam) {
        d.address(in.a, in.sa, in.imm, s.ops[1], s);
        // `cvta.param` pointers and pointers into the parameter block are global.
        if (mm.space == Space::Param && s.ops[1].var < 0) in.space = u8(Space::Generic);
    }
#define PICK(F, B) in.fn = sg ? F<B, true> : F<B, false>
#define PICKB(F)                              \
    switch (b) {                              \
        case 1: PICK(F, 1); break;            \
        case 2: PICK(F, 2); break;            \
        case 4: PICK(F, 4); break;            \
        case 8: PICK(F, 8); break;            \
        case 16: in.fn = F<16, false>; break; \
    }
    if (kernelParam) {
        PICKB(loadParam)
    } else {
        PICKB(load)
    }
#undef PICKB
#undef PICK
}

// st.bulk: zero-fills a run of shared memory.
Status stBulkExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        u64 addr = laneAddress(w.src(in.a), in, l), n = in.sb == 8 ? w.lane64(in.b, l) : w.lane32(in.b, l);
        if (addr % 8 || n % 8) w.m->fault(&w, l, "misaligned", "st.bulk address or size is not a multiple of 8");
        for (u64 k = 0; k < n; k += 8) std::memset(resolve(w, l, Space(in.space), addr + k, 8, true), 0, 8);
        if (w.order && n) orderAccess(w, in, 1u << l, u32(n), true);
    });
    return Status::Next;
}

void buildSt(Decoder& d, const Stmt& s, Inst& in) {
    if (s.op[1] == "bulk") {
        in.fn = stBulkExec;
        in.space = u8(memMods(s).space);
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        in.sb = u8(s.ops[1].kind == Operand::Reg ? d.regStride(s.ops[1]) : 8);
        d.src(in.b, s.ops[1], s, in.sb);
        return;
    }
    if (s.has("async")) return buildStAsync(d, s, in, false);
    MemMods mm = memMods(s);
    u32 b = typeBytes(s.op.back());
    in.n = u8(mm.vec);
    in.q = mm.polled;
    in.space = u8(mm.space);
    Ext& x = d.ext(in);
    keepOrder(x, mm);
    d.address(in.a, in.sa, in.imm, s.ops[0], s);
    const Operand& S = s.ops[1];
    std::vector<Operand> elems = S.kind == Operand::Vec ? S.elems : std::vector<Operand>{S};
    if (elems.size() != size_t(mm.vec)) d.fail(s, "vector size mismatch");
    x.s0.assign(elems.size(), 0);
    for (size_t i = 0; i < elems.size(); i++) {
        u32 st = elemStride(d, elems[i], b);
        x.wide.push_back(u8(st));
        d.src(x.s0[i], elems[i], s, st);
    }
    switch (b) {
        case 1: in.fn = store<1>; break;
        case 2: in.fn = store<2>; break;
        case 4: in.fn = store<4>; break;
        case 8: in.fn = store<8>; break;
        case 16: in.fn = store<16>; break;
    }
}

// --- atomics -----------------------------------------------------------------
enum AtomOp { ADD, MIN, MAX, AND, OR, XOR, EXCH, CAS, INC, DEC };

template <class T>
T atomInt(int op, T old, T b, T c) {
    switch (op) {
        case ADD: return T(old + b);
        case MIN: return std::min(old, b);
        case MAX: return std::max(old, b);
        case AND: return old & b;
        case OR: return old | b;
        case XOR: return old ^ b;
        case EXCH: return b;
        case CAS: return old == b ? c : old;
        case INC: return old >= b ? T(0) : T(old + 1);
        default: return old == 0 || old > b ? b : T(old - 1);
    }
}
enum AtomType { AU32, AS32, AU64, AS64, AF32, AF64, AF16, ABF16, AF16X2, ABF16X2, AB128, AU16 };
int atomType(std::string_view t) {
    if (t == "u32" || t == "b32") return AU32;
    if (t == "s32") return AS32;
    if (t == "u64" || t == "b64") return AU64;
    if (t == "s64") return AS64;
    if (t == "f32") return AF32;
    if (t == "f64") return AF64;
    if (t == "f16") return AF16;
    if (t == "bf16") return ABF16;
    if (t == "f16x2") return AF16X2;
    if (t == "bf16x2") return ABF16X2;
    if (t == "b128") return AB128;
    if (t == "b16") return AU16;
    return -1;
}
u16 narrowAtom(bool bf, int op, u16 a, u16 b) {
    double x = bf ? bf16ToFloat(a) : halfToFloat(a), y = bf ? bf16ToFloat(b) : halfToFloat(b);
    double r = op == ADD ? x + y : op == MIN ? std::fmin(x, y) : std::fmax(x, y);
    return bf ? floatToBf16(float(r)) : doubleToHalf(r);
}
void atomApply(int type, int op, u8* p, const u8* b, const u8* c) {
    auto go = [&]<class T>(T) {
        T o, x, y{};
        std::memcpy(&o, p, sizeof(T));
        std::memcpy(&x, b, sizeof(T));
        if (c) std::memcpy(&y, c, sizeof(T));
        T r = atomInt<T>(op, o, x, y);
        std::memcpy(p, &r, sizeof(T));
    };
    auto fl = [&]<class T>(T) {
        T o, x;
        std::memcpy(&o, p, sizeof(T));
        std::memcpy(&x, b, sizeof(T));
        T r = op == ADD ? o + x : op == MIN ? std::fmin(o, x) : op == MAX ? std::fmax(o, x) : x;
        std::memcpy(p, &r, sizeof(T));
    };
    switch (type) {
        case AU16: go(u16()); break;
        case AU32: go(u32()); break;
        case AS32: go(i32()); break;
        case AU64: go(u64()); break;
        case AS64: go(i64()); break;
        case AF32: fl(float()); break;
        case AF64: fl(double()); break;
        case AB128:
            if (op == EXCH)
                std::memcpy(p, b, 16);
            else if (std::memcmp(p, b, 16) == 0)
                std::memcpy(p, c, 16);
            break;
        default: {
            bool bf = type == ABF16 || type == ABF16X2;
            for (int k = 0; k < (type >= AF16X2 ? 2 : 1); k++) {
                u16 o, x;
                std::memcpy(&o, p + 2 * k, 2);
                std::memcpy(&x, b + 2 * k, 2);
                u16 r = op == EXCH ? x : narrowAtom(bf, op, o, x);
                std::memcpy(p + 2 * k, &r, 2);
            }
        }
    }
}

// in.p op, in.q type, in.sb element bytes, in.n vector length, x.dst results,
// x.s0 operands, in.c compare value
Status atomExec(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    const Ext& x = *in.x;
    u32 bytes = in.sb;
    if (w.counters) [[unlikely]]
        countAccess(w, in, m, bytes * in.n, true);
    // Bounds come first; the result may go to the register of the address.
    forLanes(m, [&](int l) { resolve(w, l, Space(in.space), laneAddress(a, in, l), bytes * in.n, true); });
    if (w.order) {
        orderStrong(w, in, m, true, true);
        if (Space(in.space) != Space::Shared)
            orderGlobal(w, in, m, bytes * in.n, true, true, Sem(x.p[kSem]), Scope(x.p[kScope]));
    }
    forLanes(m, [&](int l) {
        u8* p = resolve(w, l, Space(in.space), laneAddress(a, in, l), bytes * in.n, true);
        for (u32 e = 0; e < in.n; e++) {
            u8 old[16];
            std::memcpy(old, p + e * bytes, bytes);
            u32 st = bytes == 16 ? 16 : bytes == 8 ? 8 : 4;
            atomApply(in.q, in.p, p + e * bytes, w.src(x.s0[e]) + l * st,
                      in.c == kNoOperand ? nullptr : w.src(in.c) + l * st);
            if (!x.dst.empty()) {
                u8* d = w.reg(x.dst[e]) + l * st;
                if (st > bytes) std::memset(d, 0, st);
                std::memcpy(d, old, bytes);
            }
        }
    });
    return Status::Yield;
}
void buildAtom(Decoder& d, const Stmt& s, Inst& in, bool ret) {
    if (s.has("async")) return buildStAsync(d, s, in, true);
    MemMods mm = memMods(s);
    static const char* names[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
    int op = -1;
    for (int k = 0; k < 10; k++)
        if (s.has(names[k])) op = k;
    int type = atomType(s.op.back());
    if (op < 0 || type < 0) d.fail(s, "unknown atomic");
    in.fn = atomExec;
    in.p = u16(op);
    in.q = u16(type);
    in.n = u8(mm.vec);
    in.space = u8(mm.space);
    in.sb = u8(typeBytes(s.op.back()));
    u32 st = in.sb == 16 ? 16 : in.sb == 8 ? 8 : 4;
    size_t k = 0;
    Ext& x = d.ext(in);
    if (mm.sem == Sem::Weak) mm.sem = Sem::Relaxed;
    if (!s.has("sys")) mm.scope = std::min(mm.scope, Scope::Gpu);
    keepOrder(x, mm);
    if (ret) d.dstList(x.dst, s.ops[k++], s, st);
    d.address(in.a, in.sa, in.imm, s.ops[k++], s);
    d.srcList(x.s0, s.ops[k++], s, st);
    if (x.s0.size() != in.n) d.fail(s, "vector size mismatch");
    if (op == CAS) d.src(in.c, s.ops[k], s, st);
}

// --- address queries ------------------------------------------------------------
// in.n: result/source are generic 64-bit shared addresses rather than 32-bit.
Status mapaExec(Warp& w, const Inst& in, u32 m) {
    const u8 *a = w.src(in.a), *b = w.src(in.b);
    u8* d = w.reg(in.d);
    forLanes(m, [&](int l) {
        u64 v = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
        u32 rank = rd<u32>(b, l);
        if (rank >= w.cta->cluster->ctas.size())
            w.m->fault(&w, l, "mapa_rank",
                       strf("mapa to CTA rank %u of a cluster of %zu", rank, w.cta->cluster->ctas.size()));
        u64 r = (v & kSmemOffsetMask) | u64(rank) << kSmemRankShift;
        if (in.n) r |= kSharedWindow;
        if (in.sd == 8)
            wr<u64>(d, l, r);
        else
            wr<u32>(d, l, u32(r));
    });
    return Status::Next;
}
void buildMapa(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = mapaExec;
    in.n = !s.has("shared::cluster");
    in.sd = in.sa = s.op.back() == "u64" ? 8 : 4;
    d.dst(in.d, s.ops[0], s, in.sd);
    if (s.ops[1].kind == Operand::Reg)
        d.src(in.a, s.ops[1], s, in.sa);
    else {
        std::string base;
        d.symbolAddress(s.ops[1], s, base, in.imm);
        if (base != "%smem_base") d.fail(s, "operand is not shared");
        in.sa = 4;
        d.special(in.a, base, 4);
    }
    d.src(in.b, s.ops[2], s, 4);
}
Status getctarankExec(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    eachLane<u32>(w.reg(in.d), m,
                  [&](int l) { return u32((in.sa == 8 ? u32(rd<u64>(a, l)) : rd<u32>(a, l)) >> kSmemRankShift); });
    return Status::Next;
}
void buildGetctarank(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = getctarankExec;
    in.sa = s.op.back() == "u64" ? 8 : 4;
    d.dst(in.d, s.ops[0], s, 4);
    d.src(in.a, s.ops[1], s, in.sa);
}
Status isspacepExec(Warp& w, const Inst& in, u32 m) {
    const u8* a = w.src(in.a);
    u32 r = 0;
    forLanes(m, [&](int l) {
        u64 v = in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l);
        bool sh = isSharedGeneric(v), own = sh && ((u32(v) >> kSmemRankShift) == w.cta->rank), lo = isLocalGeneric(v);
        bool yes = in.n == 0 ? own : in.n == 1 ? sh : in.n == 2 ? lo : in.n == 3 ? !sh && !lo : false;
        r |= u32(yes) << l;
    });
    setPred(w, in.p, m, r);
    return Status::Next;
}
void buildIsspacep(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = isspacepExec;
    const std::string& sp = s.op.back();
    in.n = sp == "shared" || sp == "shared::cta" ? 0
           : sp == "shared::cluster"             ? 1
           : sp == "local"                       ? 2
           : sp == "global"                      ? 3
                                                 : 4;
    in.p = d.predDst(s.ops[0], s);
    in.sa = u8(d.regStride(s.ops[1]));
    d.src(in.a, s.ops[1], s, in.sa);
}

Status nop(Warp&, const Inst&, u32) { return Status::Next; }
void buildNop(Decoder&, const Stmt&, Inst& in) { in.fn = nop; }
void buildCreatePolicy(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = [](Warp& w, const Inst& i, u32 m) {
        eachLane<u64>(w.reg(i.d), m, [](int) { return u64(0x1000000000000000ull); });
        return Status::Next;
    };
    d.dst(in.d, s.ops[0], s, 8);
}

PTX_OP("ld", buildLd);
PTX_OP("ldu", buildLd);
PTX_OP("st", buildSt);
PTX_OP("atom", [](Decoder& d, const Stmt& s, Inst& in) { buildAtom(d, s, in, true); });
PTX_OP("red", [](Decoder& d, const Stmt& s, Inst& in) { buildAtom(d, s, in, false); });
PTX_OP("mapa", buildMapa);
PTX_OP("getctarank", buildGetctarank);
PTX_OP("isspacep", buildIsspacep);
PTX_OP("prefetch", buildNop);
PTX_OP("prefetchu", buildNop);
PTX_OP("applypriority", buildNop);
PTX_OP("discard", buildNop);
PTX_OP("createpolicy", buildCreatePolicy);

}  // namespace
}  // namespace ptx_emulator
