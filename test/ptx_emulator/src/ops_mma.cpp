// ldmatrix, stmatrix, movmatrix, mma.sync.
#include "lanes.hpp"
#include "tensorcore.hpp"

namespace ptx_emulator {
namespace {

// in.n: number of matrices; p[0]: trans; p[1]: 8-bit form (m16n8 / m16n16)
Status ldmatrixExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    const Ext& x = *in.x;
    const u8* a = w.src(in.a);
    if (w.counters) [[unlikely]]
        countAccess(w, in, u32((u64(1) << (8 * in.n)) - 1), 16, false);
    u8 rows[4][8][16];
    for (u32 k = 0; k < in.n; k++)
        for (u32 r = 0; r < 8; r++) {
            int l = int(k * 8 + r);
            u64 addr = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
            std::memcpy(rows[k][r], resolve(w, l, Space(in.space), addr, 16, false), 16);
        }
    if (w.order) orderAccess(w, in, u32((u64(1) << (8 * in.n)) - 1), 16, false);
    for (u32 k = 0; k < in.n; k++) {
        u32* d = (u32*)w.reg(x.dst[k]);
        for (u32 l = 0; l < kWarp; l++) {
            if (!x.p[0])
                std::memcpy(&d[l], &rows[k][l / 4][(l % 4) * 4], 4);
            else {
                u16 lo, hi;
                std::memcpy(&lo, &rows[k][(l % 4) * 2][(l / 4) * 2], 2);
                std::memcpy(&hi, &rows[k][(l % 4) * 2 + 1][(l / 4) * 2], 2);
                d[l] = u32(hi) << 16 | lo;
            }
        }
    }
    return Status::Next;
}
// p[1]: m16n8.trans.b8: 16 rows of 8 bytes, stored transposed.
Status stmatrixExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    const Ext& x = *in.x;
    const u8* a = w.src(in.a);
    if (w.counters) [[unlikely]]
        countAccess(w, in, u32((u64(1) << (8 * in.n)) - 1), 16, true);
    for (u32 k = 0; k < in.n; k++) {
        const u32* s = (const u32*)w.src(x.s0[k]);
        for (u32 r = 0; r < 8; r++) {
            u8 row[16];
            if (x.p[1]) {
                // Bytes 0,1 of lane l are row l/4, columns 2*(l%4) and the next; bytes 2,3
                // the same of row l/4 + 8.  Memory row r is column r, 16 bytes long.
                for (u32 c = 0; c < 16; c++) row[c] = u8(s[(c % 8) * 4 + r / 2] >> (8 * (r % 2 + 2 * (c / 8))));
            } else if (!x.p[0]) {
                for (u32 c = 0; c < 4; c++) std::memcpy(&row[4 * c], &s[r * 4 + c], 4);
            } else {
                for (u32 c = 0; c < 8; c++) {  // element (r, c) is held transposed
                    u16 v = u16(s[c * 4 + r / 2] >> (16 * (r % 2)));
                    std::memcpy(&row[2 * c], &v, 2);
                }
            }
            int l = int(k * 8 + r);
            u64 addr = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
            std::memcpy(resolve(w, l, Space(in.space), addr, 16, true), row, 16);
        }
    }
    if (w.order) orderAccess(w, in, u32((u64(1) << (8 * in.n)) - 1), 16, true);
    return Status::Next;
}
u32 matrixCount(const Stmt& s) { return s.has("x4") ? 4 : s.has("x2") ? 2 : 1; }
void buildLdmatrix(Decoder& d, const Stmt& s, Inst& in) {
    if (s.has("b8") || s.has("b8x16")) d.fail(s, "8-bit ldmatrix");
    Ext& x = d.ext(in);
    in.fn = ldmatrixExec;
    in.n = u8(matrixCount(s));
    x.p[0] = s.has("trans");
    in.space = u8(s.has("shared") || s.has("shared::cta") ? Space::Shared : Space::Generic);
    d.dstList(x.dst, s.ops[0], s, 4);
    d.address(in.a, in.sa, in.imm, s.ops[1], s);
}
void buildStmatrix(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    in.fn = stmatrixExec;
    in.n = u8(matrixCount(s));
    x.p[0] = s.has("trans");
    x.p[1] = s.has("b8");
    in.space = u8(s.has("shared") || s.has("shared::cta") ? Space::Shared : Space::Generic);
    d.address(in.a, in.sa, in.imm, s.ops[0], s);
    d.srcList(x.s0, s.ops[1], s, 4);
}
Status movmatrixExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    u32 out[kWarp];
    const u32* s = (const u32*)w.src(in.a);
    auto elem = [&](u32 r, u32 c) { return u16(s[r * 4 + c / 2] >> (16 * (c % 2))); };
    for (u32 l = 0; l < kWarp; l++) {
        u32 r = l / 4, c = (l % 4) * 2;
        out[l] = u32(elem(c + 1, r)) << 16 | elem(c, r);
    }
    std::memcpy(w.reg(in.d), out, sizeof out);
    return Status::Next;
}
void buildMovmatrix(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = movmatrixExec;
    bind3(d, s, in, 4, 1);
}

// mma.sync m16n8kK.  x.s0 A, x.s1 B, x.s2 C, x.dst D.
// p[0] K, p[1] elem A, p[2] elem B, p[3] C/D type (0 f32, 1 f16, 2 s32)
Status mmaExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    const Ext& x = *in.x;
    u32 K = u32(x.p[0]);
    Elem ea = Elem(x.p[1]), eb = Elem(x.p[2]);
    double A[16 * 32], B[32 * 8], C[16 * 8];
    u32 per = 4 / elemBytes(ea);
    for (u32 l = 0; l < kWarp; l++) {
        double t[4];
        for (u32 r = 0; r < x.s0.size(); r++) {
            u32 v = w.lane32(x.s0[r], int(l));
            decodeElems(ea, (const u8*)&v, per, t);
            u32 row = l / 4 + 8 * (r & 1), col = (l % 4) * per + (r >> 1) * 4 * per;
            for (u32 e = 0; e < per; e++) A[row * K + col + e] = t[e];
        }
        for (u32 r = 0; r < x.s1.size(); r++) {
            u32 v = w.lane32(x.s1[r], int(l));
            decodeElems(eb, (const u8*)&v, per, t);
            u32 row = (l % 4) * per + r * 4 * per;
            for (u32 e = 0; e < per; e++) B[(row + e) * 8 + l / 4] = t[e];
        }
        for (u32 i = 0; i < 4; i++) {
            u32 at = (l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2;
            C[at] = x.p[3] == 0   ? asFloat(w.lane32(x.s2[i], int(l)))
                    : x.p[3] == 2 ? double(i32(w.lane32(x.s2[i], int(l))))
                                  : halfToFloat(u16(w.lane32(x.s2[i / 2], int(l)) >> (16 * (i % 2))));
        }
    }
    if (w.m->opt.hopper && x.p[3] == 0 && elemBytes(ea) > 1)
        hopperMatmulAdd(ea, eb, 16, 8, K, A, B, C);
    else
        matmulAdd(16, 8, K, A, B, C);
    for (u32 l = 0; l < kWarp; l++)
        for (u32 i = 0; i < 4; i++) {
            double v = C[(l / 4 + 8 * (i / 2)) * 8 + 2 * (l % 4) + i % 2];
            if (x.p[3] == 0)
                ((float*)w.reg(x.dst[i]))[l] = float(v);
            else if (x.p[3] == 2)
                ((i32*)w.reg(x.dst[i]))[l] = i32(i64(v));
            else {
                u32& r = ((u32*)w.reg(x.dst[i / 2]))[l];
                r = i % 2 ? (r & 0xffffu) | u32(doubleToHalf(v)) << 16 : doubleToHalf(v);
            }
        }
    w.m->stats.tensorOps++;
    return Status::Next;
}
void buildMma(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    std::string shape;
    for (auto& o : s.op)
        if (o.rfind("m16n8k", 0) == 0) shape = o;
    unsigned k = 0;
    if (shape.empty() || sscanf(shape.c_str(), "m16n8k%u", &k) != 1) d.fail(s, "only m16n8k* shapes are supported");
    if (s.has("sp") || s.has("block_scale")) d.fail(s, "sparse or block-scaled mma.sync");
    const std::string &dt = s.op[s.op.size() - 4], &at = s.op[s.op.size() - 3], &bt = s.op[s.op.size() - 2];
    bool okA, okB;
    Elem ea = elemFromName(at, okA), eb = elemFromName(bt, okB);
    if (!okA || !okB || elemBytes(ea) > 4) d.fail(s, "unsupported element types");
    if (ea == Elem::E2M1 || ea == Elem::E2M3 || ea == Elem::E3M2) d.fail(s, "sub-byte mma.sync");
    x.p[0] = k, x.p[1] = i64(ea), x.p[2] = i64(eb);
    x.p[3] = dt == "f32" ? 0 : dt == "f16" ? 1 : 2;
    d.dstList(x.dst, s.ops[0], s, 4);
    d.srcList(x.s0, s.ops[1], s, 4);
    d.srcList(x.s1, s.ops[2], s, 4);
    d.srcList(x.s2, s.ops[3], s, 4);
    if (x.s0.size() * 4 / elemBytes(ea) * 32 != 16 * k) d.fail(s, "fragment sizes do not match the shape");
    in.fn = mmaExec;
}

PTX_OP("ldmatrix", buildLdmatrix);
PTX_OP("stmatrix", buildStmatrix);
PTX_OP("movmatrix", buildMovmatrix);
PTX_OP("mma", buildMma);

}  // namespace
}  // namespace ptx_emulator
