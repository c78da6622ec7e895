// wgmma.mma_async and its fences and groups.
//
// The product is evaluated when the warp issues the instruction: operands must
// be visible by then, and whatever may still legally change the outcome later
// (touching accumulators, overwriting operands before wait_group) is reported
// as an error instead of being simulated.  Each warp of the warpgroup computes
// its own 16 rows of the 64-row tile.
#include "lanes.hpp"
#include "tensorcore.hpp"

namespace ptx_emulator {
namespace {

// p[0] N, p[1] K, p[2] elem A, p[3] elem B, p[4] scale A, p[5] scale B, p[6] trans A,
// p[7] trans B, p[8] D type (0 f32, 1 f16, 2 s32), p[9] A in registers, p[10] satfinite
Status mmaExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    Machine& M = *w.m;
    const Ext& x = *in.x;
    const u32 N = u32(x.p[0]), K = u32(x.p[1]);
    const Elem ea = Elem(x.p[2]), eb = Elem(x.p[3]);
    if (w.live != ~0u) M.fault(&w, -1, "wgmma", "warp with exited lanes");
    const u32 warpRow = (w.id % 4) * 16;
    WgmmaOp op;
    op.regs = &x;
    op.group = 0;
    op.serial = ++w.wgmmaSerial;
    M.stats.tensorOps++;

    if (M.opt.checkFences) {
        if (!w.wgmmaFenced)
            M.fault(&w, -1, "wgmma_fence", "the first wgmma.mma_async of the warp has no wgmma.fence before it");
        u8 mine = u8(2 + N / 8);
        auto check = [&](const std::vector<u32>& regs, bool accumulator) {
            for (u32 r : regs) {
                u8 s = w.wgmmaState[r / 128];
                if (!s || (accumulator && s == mine)) continue;
                M.fault(&w, -1, "wgmma_fence",
                        strf("%s register was written by %s since the last wgmma.fence",
                             accumulator ? "accumulator" : "A-fragment",
                             s == 1 ? "an ordinary instruction" : "another wgmma.mma_async"));
            }
        };
        if (w.predMask(in.p) & 1) check(x.dst, true);
        for (u32 r : x.dst)
            if (w.wgmmaRead[r / 128])
                M.fault(&w, -1, "wgmma_fence",
                        "accumulator register was read by an ordinary instruction since the last wgmma.fence");
        if (x.p[9]) check(x.s0, false);
        for (u32 r : x.dst) w.wgmmaState[r / 128] = mine;
    }

    double A[16 * 32], B[256 * 32], Bt[256 * 32], C[16 * 256];
    u64 bdesc = w.lane64(in.b, 0);
    for (int l = 1; l < kWarp; l++)
        if (w.lane64(in.b, l) != bdesc) M.fault(&w, l, "wgmma", "matrix descriptor is not warp-uniform");
    if (!x.p[9]) {
        OperandLayout la{wgmmaDesc(w.lane64(in.a, 0)), bool(x.p[6])};
        // This warp's rows: 16 of 64.
        if (!la.mnMajor) {
            la.d.start += (warpRow / 8) * la.d.sbo;
            gatherOperand(M, &w, w.cta, la, ea, 16, K, A, op.granules, "wgmma operand A");
        } else {
            double full[64 * 32];
            gatherOperand(M, &w, w.cta, la, ea, 64, K, full, op.granules, "wgmma operand A");
            std::copy_n(full + warpRow * K, 16 * K, A);
        }
    } else {
        u32 bytes = elemBytes(ea), per = 4 / bytes;  // elements per register
        for (int l = 0; l < kWarp; l++)
            for (u32 r = 0; r < 4; r++) {
                u32 v = w.lane32(x.s0[r], l);
                double t[4];
                decodeElems(ea, (const u8*)&v, per, t);
                u32 row = u32(l) / 4 + 8 * (r & 1), col = (u32(l) % 4) * per + (r >> 1) * (K / 2);
                for (u32 e = 0; e < per; e++) A[row * K + col + e] = t[e];
            }
    }
    OperandLayout lb{wgmmaDesc(bdesc), bool(x.p[7])};
    gatherOperand(M, &w, w.cta, lb, eb, N, K, B, op.granules, "wgmma operand B");
    double sign = double(x.p[4]) * double(x.p[5]);
    for (u32 n0 = 0; n0 < N; n0 += 8)  // blocked transpose
        for (u32 k = 0; k < K; k++)
            for (u32 n = n0; n < n0 + 8; n++) Bt[k * N + n] = sign * B[n * K + k];

    u32 scaleD = w.predMask(in.p) & 1;
    // Accumulator fragment, PTX ISA "Register fragments for wgmma.mma_async.m64nNk*".
    auto each = [N](auto f) {
        for (u32 i = 0; i < N / 2; i++)
            for (u32 l = 0; l < kWarp; l++) f(i, l, (l / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (l % 4) + i % 2);
    };
    u32* reg[128];
    for (u32 i = 0; i < x.dst.size(); i++) reg[i] = (u32*)w.reg(x.dst[i]);
    if (scaleD) {
        if (x.p[8] == 0)
            each([&](u32 i, u32 l, u32 at) { C[at] = asFloat(reg[i][l]); });
        else if (x.p[8] == 2)
            each([&](u32 i, u32 l, u32 at) { C[at] = i32(reg[i][l]); });
        else
            each([&](u32 i, u32 l, u32 at) { C[at] = halfToFloat(u16(reg[i / 2][l] >> (16 * (i % 2)))); });
    } else {
        std::fill_n(C, 16 * N, 0.0);
    }
    if (M.opt.hopper && x.p[8] == 0)
        hopperMatmulAdd(ea, eb, 16, N, K, A, Bt, C);
    else
        matmulAdd(16, N, K, A, Bt, C);
    if (x.p[8] == 0)
        each([&](u32 i, u32 l, u32 at) { reg[i][l] = asBits(float(C[at])); });
    else if (x.p[8] == 2)
        each([&](u32 i, u32 l, u32 at) {
            i64 v = i64(C[at]);
            reg[i][l] = u32(x.p[10] ? std::clamp<i64>(v, INT32_MIN, INT32_MAX) : v);
        });
    else
        each([&](u32 i, u32 l, u32 at) {
            u32& r = reg[i / 2][l];
            u32 sh = 16 * (i % 2);
            r = (r & ~(0xffffu << sh)) | u32(doubleToHalf(C[at])) << sh;
        });
    if (M.opt.checkInflight)
        for (u32 g : op.granules) w.cta->granules[g].readers++;
    w.wgmma.push_back(std::move(op));
    return Status::Next;
}

Status fenceExec(Warp& w, const Inst&, u32 m) {
    if (m != w.live) return converge(w);
    w.wgmmaFenced = true;
    std::fill(w.wgmmaState.begin(), w.wgmmaState.end(), 0);
    std::fill(w.wgmmaRead.begin(), w.wgmmaRead.end(), 0);
    return Status::Next;
}
Status commitExec(Warp& w, const Inst&, u32 m) {
    if (m != w.live) return converge(w);
    ++w.wgmmaGroups;
    for (auto& o : w.wgmma)
        if (!o.group) o.group = w.wgmmaGroups;
    return Status::Next;
}
Status waitExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    u64 n = u64(in.imm), upTo = w.wgmmaGroups > n ? w.wgmmaGroups - n : 0;
    for (auto it = w.wgmma.begin(); it != w.wgmma.end();) {
        if (!it->group || it->group > upTo) {
            ++it;
            continue;
        }
        if (w.m->opt.checkInflight)
            for (u32 g : it->granules) w.cta->granules[g].readers--;
        // The operands are read until here, whenever the product was computed.
        orderReadDone(w, w.cta, it->granules);
        it = w.wgmma.erase(it);
    }
    if (w.order) orderWarpSync(w, w.live);
    if (w.wgmma.empty()) w.wgmmaCopies.clear();
    return Status::Next;
}

void buildWgmma(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& what = s.op[1];
    if (what == "fence") {
        in.fn = fenceExec;
        return;
    }
    if (what == "commit_group") {
        in.fn = commitExec;
        return;
    }
    if (what == "wait_group") {
        in.fn = waitExec;
        in.imm = s.ops[0].imm;
        return;
    }
    if (what != "mma_async") d.fail(s, "unsupported wgmma operation");
    if (s.has("sp")) d.fail(s, "sparse wgmma");
    Ext& x = d.ext(in);
    std::string shape;
    for (auto& o : s.op)
        if (o.rfind("m64n", 0) == 0) shape = o;
    unsigned n = 0, k = 0;
    if (sscanf(shape.c_str(), "m64n%uk%u", &n, &k) != 2) d.fail(s, "unknown shape");
    std::vector<std::string> t(s.op.end() - 3, s.op.end());
    x.p[10] = s.has("satfinite");
    if (t[2] == "satfinite") t.assign(s.op.end() - 4, s.op.end() - 1);
    bool okA, okB;
    Elem ea = elemFromName(t[1], okA), eb = elemFromName(t[2], okB);
    if (!okA || !okB || (t[0] != "f32" && t[0] != "f16" && t[0] != "s32")) d.fail(s, "unknown types");
    if (k * elemBytes(ea) != 32) d.fail(s, "K does not match the element type");
    x.p[0] = n, x.p[1] = k, x.p[2] = i64(ea), x.p[3] = i64(eb);
    x.p[8] = t[0] == "f32" ? 0 : t[0] == "f16" ? 1 : 2;
    d.dstSrcList(x.dst, s.ops[0], s, 4);
    if (x.dst.size() != (x.p[8] == 1 ? n / 4 : n / 2)) d.fail(s, "accumulator list has the wrong length");
    for (auto& e : s.ops[0].elems) d.pin(e, true);
    bool regA = s.ops[1].kind == Operand::Vec;
    x.p[9] = regA;
    if (regA) {
        d.srcList(x.s0, s.ops[1], s, 4);
        for (auto& e : s.ops[1].elems) d.pin(e, false);
    } else
        d.src(in.a, s.ops[1], s, 8);
    d.src(in.b, s.ops[2], s, 8);
    in.p = s.ops[3].kind == Operand::Imm ? (s.ops[3].imm ? 0xffff : 0xfffe) : d.predSrc(s.ops[3], s);
    auto immAt = [&](size_t i, i64 def) { return i < s.ops.size() ? s.ops[i].imm : def; };
    x.p[4] = immAt(4, 1), x.p[5] = immAt(5, 1);
    bool half = elemBytes(ea) == 2;
    x.p[6] = half && !regA ? immAt(6, 0) : 0;
    x.p[7] = half ? immAt(regA ? 6 : 7, 0) : 0;
    in.fn = mmaExec;
}

PTX_OP("wgmma", buildWgmma);

}  // namespace

// For the check of wgmma.fence.  nvcc moves values into the registers of a wgmma
// wherever it likes, also behind the fence, and ptxas makes that work; so a move
// passes on the state of its source, and a constant counts as untouched.
void wgmmaTrackAccesses(Warp& w, const Ext& x) {
    u8 s = x.move ? 0 : 1;
    for (u32 r : x.fenceUse)
        if (!(r & kConstBit)) s = std::max(s, w.wgmmaState[r / 128]);
    for (u32 r : x.fenceDef) w.wgmmaState[r / 128] = s;
    for (u32 r : x.fenceRead) w.wgmmaRead[r / 128] = 1;
}

// Accumulators and A fragments may not be touched before wait_group.  nvcc's
// PTX contains plain register copies of accumulators in flight (ptxas coalesces
// them), so a copy is not an access; its destination inherits the restriction.
void wgmmaRegisterCheck(Warp& w, const Inst& in) {
    if (!w.m->opt.checkInflight) return;
    const Ext& x = *in.x;
    auto inFlight = [&](u32 reg) -> u64 {  // serial of the youngest wgmma, 0 if none
        u64 s = 0;
        for (auto& op : w.wgmma)
            if (std::find(op.regs->dst.begin(), op.regs->dst.end(), reg) != op.regs->dst.end()) s = op.serial;
        if (!s)
            for (auto& [slot, serial] : w.wgmmaCopies)
                if (slot == reg && !w.wgmma.empty() && serial >= w.wgmma.front().serial) s = serial;
        return s;
    };
    u64 source = 0;
    for (size_t i = 0; i < x.guarded.size(); i++) {
        u64 s = inFlight(x.guarded[i]);
        if (x.guardedDef[i]) {
            std::erase_if(w.wgmmaCopies, [&](auto& c) { return c.first == x.guarded[i]; });
            for (auto& op : w.wgmma)
                if (std::find(op.regs->dst.begin(), op.regs->dst.end(), x.guarded[i]) != op.regs->dst.end())
                    w.m->fault(&w, -1, "wgmma_register",
                               "accumulator register of a wgmma in flight is written before wgmma.wait_group");
            for (auto& op : w.wgmma)
                if (std::find(op.regs->s0.begin(), op.regs->s0.end(), x.guarded[i]) != op.regs->s0.end())
                    w.m->fault(&w, -1, "wgmma_register",
                               "A-fragment register of a wgmma in flight is written before wgmma.wait_group");
        } else if (s) {
            if (!x.copy)
                w.m->fault(&w, -1, "wgmma_register",
                           "accumulator register of a wgmma in flight is read before wgmma.wait_group");
            source = s;
        }
    }
    if (x.copy && source) w.wgmmaCopies.push_back({in.d, source});
}

}  // namespace ptx_emulator
