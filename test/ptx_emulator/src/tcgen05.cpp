// tcgen05: tensor memory allocation and access, tcgen05.cp, tcgen05.mma and
// tcgen05.commit.
//
// mma and cp check and read their shared-memory operands at issue, then wait in
// the CTA's pipe; tensor memory changes when the pipe reaches them, at a random
// later time.  Shared memory and tensor memory they use stay marked as in
// flight until a later commit has arrived at its mbarrier.
#include <algorithm>
#include "lanes.hpp"
#include "tensorcore.hpp"
#include "tmem.hpp"

namespace ptx_emulator {
namespace {

Tmem& tmemOf(Cta* c) {
    if (!c->tmem) c->tmem = std::make_unique<Tmem>();
    return *c->tmem;
}
Cta* peerOf(Warp& w) {
    u32 r = w.cta->rank ^ 1;
    if (r >= w.cta->cluster->ctas.size())
        w.m->fault(&w, -1, "cta_group", ".cta_group::2 outside a cluster of CTA pairs");
    Cta* p = w.cta->cluster->ctas[r].get();
    if (p->launchFinished) w.m->fault(&w, -1, "cta_group", "the peer CTA has exited");
    return p;
}
// CTAs of the pair in rank order.
std::vector<Cta*> group(Warp& w, bool two) {
    if (!two) return {w.cta};
    Cta* p = peerOf(w);
    return w.cta->rank & 1 ? std::vector<Cta*>{p, w.cta} : std::vector<Cta*>{w.cta, p};
}

void checkColumns(Machine& m, Warp* w, Cta* c, u32 col, u32 n, const char* what) {
    Tmem& t = tmemOf(c);
    for (u32 k = col; k < col + n; k++)
        if (k >= kTmemCols || !t.owner[k]) {
            std::string msg = strf("%s: tensor memory column %u of CTA rank %u is not allocated", what, k, c->rank);
            if (w) m.fault(w, -1, "tmem_alloc", msg);
            m.faultAt(c, "tmem_alloc", msg);
        }
}

// --- allocation ----------------------------------------------------------------
Status allocExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    Machine& M = *w.m;
    u32 n = w.lane32(in.b, 0);
    if (n < 32 || n > 512 || (n & (n - 1)))
        M.fault(&w, -1, "tmem_alloc", strf("column count %u is not a power of two in 32..512", n));
    Tmem& t = tmemOf(w.cta);
    if (t.relinquished) M.fault(&w, -1, "tmem_alloc", "tcgen05.alloc after relinquish_alloc_permit");
    u32 base = 0;
    for (; base + n <= kTmemCols; base += n)
        if (std::all_of(t.owner.begin() + base, t.owner.begin() + base + n, [](u16 o) { return o == 0; })) break;
    if (base + n > kTmemCols) {
        w.block = Block::Tmem;
        return Status::Block;
    }
    u16 id = t.nextId++;
    const Kernel& k = *w.cta->cluster->launch->kernel;
    t.allocators.push_back(strf("warp %u at PTX line %u `%s`", w.id, k.code[w.pc].line, k.text[w.pc].c_str()));
    for (u32 col = base; col < base + n; col++) {
        t.owner[col] = id;
        for (u32 l = 0; l < kTmemLanes; l++) t.init[l * kTmemCols + col] = 0;
        t.written[col] = {};
        t.loaded[col] = t.stored[col] = {};
    }
    u64 addr = (in.sa == 8 ? w.lane64(in.a, 0) : w.lane32(in.a, 0)) + u64(in.imm);
    std::memcpy(resolve(w, 0, Space(in.space), addr, 4, true), &base, 4);
    if (w.order) orderAccess(w, in, 1, 4, true);
    return Status::Next;
}
// Everything that uses a column has to be ordered before it is freed.
void checkFree(Warp& w, const Tmem& t, u32 k) {
    const Tmem::Write& write = t.written[k];
    if (write.queue != ~0u && !orderSeen(w, ptx_emulator::Access::byQueue(write.queue, write.commit)))
        w.m->fault(&w, -1, "race",
                   strf("tcgen05.dealloc of column %u is not ordered after the tcgen05 operation that wrote it", k));
    for (auto* uses : {&t.loaded[k], &t.stored[k]})
        for (auto& u : *uses)
            if (u.warp && u.warp != &w && !orderSeen(w, u.at))
                w.m->fault(&w, -1, "race",
                           strf("tcgen05.dealloc of column %u is not ordered after its %s by warp %u", k,
                                uses == &t.loaded[k] ? "load" : "store", u.warp->id));
}
Status deallocExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    Machine& M = *w.m;
    u32 addr = w.lane32(in.a, 0), n = w.lane32(in.b, 0), col = addr & 0xffff;
    Tmem& t = tmemOf(w.cta);
    if ((addr >> 16) || col + n > kTmemCols || !t.owner[col])
        M.fault(&w, -1, "tmem_alloc",
                strf("tcgen05.dealloc of %u columns at %#x, which is not an allocation", n, addr));
    u16 id = t.owner[col];
    bool whole = (col == 0 || t.owner[col - 1] != id) && (col + n == kTmemCols || t.owner[col + n] != id);
    for (u32 k = col; k < col + n; k++) {
        if (t.owner[k] != id || !whole)
            M.fault(&w, -1, "tmem_alloc",
                    strf("tcgen05.dealloc of %u columns at %u does not match its allocation", n, col));
        if (t.writers[k] || t.readers[k])
            M.fault(&w, -1, "tmem_inflight",
                    strf("tcgen05.dealloc of column %u while a tcgen05 operation may still use it", k));
        if (w.order) checkFree(w, t, k);
        t.owner[k] = 0;
    }
    M.wakeGroups(w.cta, Block::Tmem);
    return Status::Next;
}
Status relinquishExec(Warp& w, const Inst&, u32 m) {
    if (m != w.live) return converge(w);
    tmemOf(w.cta).relinquished = true;
    return Status::Next;
}

// --- ld / st ---------------------------------------------------------------------
enum Shape { S32x32, S16x64, S16x128, S16x256, S16x32x2 };
u32 regsPerRepeat(int shape) { return shape == S16x128 ? 2 : shape == S16x256 ? 4 : 1; }
u32 colsPerRepeat(int shape) {
    return shape == S32x32 ? 1 : shape == S16x64 ? 2 : shape == S16x128 ? 4 : shape == S16x256 ? 8 : 1;
}

// Lane (within the warp's 32) and column of register r of thread l, PTX ISA
// "Data Movement Shape".
struct Cell {
    u32 lane, col;
};
Cell cellOf(int shape, u32 l, u32 r, u32 split) {
    switch (shape) {
        case S32x32: return {l, r};
        case S16x64: return {(l & 1) * 8 + l / 4, (l >> 1 & 1) + 2 * r};
        case S16x128: return {l / 4 + 8 * (r & 1), l % 4 + 4 * (r / 2)};
        case S16x256: return {l / 4 + 8 * (r >> 1 & 1), 2 * (l % 4) + (r & 1) + 8 * (r / 4)};
        default: return {l % 16, r + (l / 16) * split};
    }
}
struct Access {
    u32 laneBase, col;
};
Access accessOf(Warp& w, const Inst& in, int shape) {
    u32 addr = w.lane32(in.a, 0) + u32(in.imm);
    for (int l = 1; l < kWarp; l++)
        if (w.lane32(in.a, l) != w.lane32(in.a, 0))
            w.m->fault(&w, l, "tmem_lane", "tensor memory address is not warp-uniform");
    u32 lane = addr >> 16, quarter = w.id % 4;
    // A warp reaches only its own quarter of the lanes; lane bits 5..6 may be left zero.
    if (lane >= kTmemLanes || ((lane / 32) && lane / 32 != quarter))
        w.m->fault(&w, -1, "tmem_lane", strf("tensor memory lane %u is outside the quarter of warp %u", lane, w.id));
    if (shape == S32x32 ? lane % 32 != 0 : lane % 16 != 0)
        w.m->fault(&w, -1, "tmem_lane", strf("lane %u is misaligned for this shape", lane));
    return {quarter * 32 + lane % 32, addr & 0xffff};
}

// Lane l (-1: the warp) is about to use columns that another warp may have stored.
constexpr u32 kAllQuarters = 4;
void checkStored(Machine& m, Warp& w, int l, Cta* c, u32 col, u32 n, u32 quarter, const char* what) {
    if (!m.opt.checkFences || !w.order) return;
    for (u32 k = col; k < std::min(col + n, kTmemCols); k++)
        for (u32 q = 0; q < 4; q++) {
            auto& s = tmemOf(c).stored[k][q];
            if ((quarter == kAllQuarters || quarter == q) && s.warp && !orderTensorUsed(w, l, *s.warp, s.seq))
                m.fault(&w, l, "tcgen05_fence",
                        strf("%s column %u, which warp %u of CTA rank %u has stored, without "
                             "tcgen05.fence::before_thread_sync there and ::after_thread_sync here around what orders "
                             "the two",
                             what, k, s.warp->id, c->rank));
        }
}

// p[0] shape, p[1] repeats, p[2] pack/unpack 16b, p[3] split
Status ldExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    Machine& M = *w.m;
    const Ext& x = *in.x;
    int shape = int(x.p[0]);
    Access a = accessOf(w, in, shape);
    u32 factor = x.p[2] ? 2 : 1;  // two 16-bit columns per register
    u32 cols = colsPerRepeat(shape) * u32(x.p[1]) * factor + (shape == S16x32x2 ? u32(x.p[3]) : 0);
    checkColumns(M, &w, w.cta, a.col, shape == S16x32x2 ? u32(x.p[1]) : cols, "tcgen05.ld");
    Tmem& t = tmemOf(w.cta);
    if (M.opt.checkInflight)
        for (u32 k = a.col; k < std::min(a.col + cols, kTmemCols); k++)
            if (t.writers[k])
                M.fault(
                    &w, -1, "tmem_inflight",
                    strf("tcgen05.ld of column %u while a tcgen05.mma or tcgen05.cp that writes it may be in flight",
                         k));
    if (M.opt.checkFences && w.order) {
        u64 seq = orderTensorUse(w);
        ptx_emulator::Access at = orderStamp(w, -1);
        for (u32 k = a.col; k < std::min(a.col + cols, kTmemCols); k++) {
            if (t.written[k].queue != ~0u && !orderTensorWritten(w, t.written[k].queue, t.written[k].commit))
                M.fault(&w, -1, "tcgen05_fence",
                        strf("tcgen05.ld of column %u, which a tcgen05 operation wrote, without a "
                             "tcgen05.fence::after_thread_sync since its commit was waited for",
                             k));
            checkStored(M, w, -1, w.cta, k, 1, w.id % 4, "tcgen05.ld of");
            t.loaded[k][w.id % 4] = {&w, seq, at};
        }
    }
    for (u32 r = 0; r < x.dst.size(); r++) {
        u32* d = (u32*)w.reg(x.dst[r]);
        bool any = false;
        for (u32 l = 0; l < kWarp; l++) {
            u32 v = 0;
            for (u32 h = 0; h < factor; h++) {
                Cell c = cellOf(shape, l, r * factor + h, u32(x.p[3]));
                u32 lane = a.laneBase + c.lane, col = a.col + c.col;
                any |= t.init[lane * kTmemCols + col];
                u32 q = t.at(lane, col);
                v = factor == 2 ? v | (q & 0xffff) << (16 * h) : q;
            }
            d[l] = v;
        }
        if (!any && M.opt.checkUninitSmem)
            M.fault(&w, -1, "uninit_tmem",
                    strf("tcgen05.ld of tensor memory that nothing has written (column %u)",
                         a.col + cellOf(shape, 0, r * factor, 0).col));
        w.tmemPending.push_back(x.dst[r]);
    }
    return Status::Next;
}
Status stExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    Machine& M = *w.m;
    const Ext& x = *in.x;
    int shape = int(x.p[0]);
    Access a = accessOf(w, in, shape);
    u32 factor = x.p[2] ? 2 : 1, cols = colsPerRepeat(shape) * u32(x.p[1]) * factor;
    checkColumns(M, &w, w.cta, a.col, cols, "tcgen05.st");
    Tmem& t = tmemOf(w.cta);
    if (M.opt.checkInflight)
        for (u32 k = a.col; k < a.col + cols; k++)
            if (t.writers[k] || t.readers[k])
                M.fault(&w, -1, "tmem_inflight",
                        strf("tcgen05.st to column %u while a tcgen05 operation that uses it may be in flight", k));
    if (M.opt.checkFences && w.order) {
        u64 seq = orderTensorUse(w);
        ptx_emulator::Access at = orderStamp(w, -1);
        for (u32 k = a.col; k < a.col + cols; k++) t.stored[k][w.id % 4] = {&w, seq, at};
    }
    for (u32 r = 0; r < x.s0.size(); r++)
        for (u32 l = 0; l < kWarp; l++)
            for (u32 h = 0; h < factor; h++) {
                Cell c = cellOf(shape, l, r * factor + h, u32(x.p[3]));
                u32 v = w.lane32(x.s0[r], int(l));
                t.set(a.laneBase + c.lane, a.col + c.col, factor == 2 ? (v >> (16 * h)) & 0xffff : v);
            }
    return Status::Next;
}
Status waitLdExec(Warp& w, const Inst&, u32 m) {
    if (m != w.live) return converge(w);
    w.tmemPending.clear();
    return Status::Next;
}
Status waitStExec(Warp& w, const Inst&, u32 m) { return m != w.live ? converge(w) : Status::Next; }
Status fenceExec(Warp& w, const Inst& in, u32 m) {
    orderTensorFence(w, m, in.n);
    return Status::Next;
}
// An operation of lane l is about to write columns that a thread may have loaded, or stored.
void checkLoaded(Machine& m, Warp& w, int l, Cta* c, u32 col, u32 n, const char* what) {
    if (!m.opt.checkFences || !w.order) return;
    for (u32 k = col; k < col + n; k++)
        for (auto& r : tmemOf(c).loaded[k]) {
            if (r.warp && !orderTensorUsed(w, l, *r.warp, r.seq))
                m.fault(&w, l, "tcgen05_fence",
                        strf("%s column %u, which warp %u of CTA rank %u has loaded, without "
                             "tcgen05.fence::before_thread_sync there and ::after_thread_sync here around what orders "
                             "the two",
                             what, k, r.warp->id, c->rank));
            r = {};
        }
    checkStored(m, w, l, c, col, n, kAllQuarters, what);
}

// --- the pipe ----------------------------------------------------------------------
void advancePipe(Machine& m, Cta* c) {
    Tmem& t = *c->tmem;
    if (t.pipeBusy || t.pipe.empty()) return;
    t.pipeBusy = true;
    u64 r = m.rng();
    u64 delay = (r & 3) ? (r >> 8) % 48 : m.randomDelay();
    auto keep = c->cluster->shared_from_this();
    m.schedule(delay, [&m, c, keep] {
        Tmem& t = *c->tmem;
        auto f = std::move(t.pipe.front());
        t.pipe.pop_front();
        t.pipeBusy = false;
        f();
        advancePipe(m, c);
    });
}
void push(Machine& m, Cta* c, std::function<void()> f) {
    tmemOf(c).pipe.push_back(std::move(f));
    advancePipe(m, c);
}
// Marks resources until the next commit of this CTA completes.
void holdUntilCommit(Machine& m, Cta* issuer, Cta* c, std::vector<u32> granules, u32 wcol, u32 wn, u32 rcol, u32 rn) {
    if (!m.opt.checkInflight) return;
    Tmem& t = tmemOf(c);
    for (u32 g : granules) c->granules[g].readers++;
    for (u32 k = wcol; k < wcol + wn; k++) t.writers[k]++;
    for (u32 k = rcol; k < rcol + rn; k++) t.readers[k]++;
    tmemOf(issuer).uncommitted.push_back([=, gs = std::move(granules)](u32 commit) {
        Tmem& t = *c->tmem;
        for (u32 g : gs) {
            c->granules[g].readers--;
            orderReadDone(c, g * 16, 16, issuer->tensorQueue, commit);
        }
        for (u32 k = wcol; k < wcol + wn; k++) t.writers[k]--, t.written[k] = {issuer->tensorQueue, commit};
        for (u32 k = rcol; k < rcol + rn; k++) t.readers[k]--;
    });
}

// --- commit ------------------------------------------------------------------------
Status commitExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u64 v = (in.sa == 8 ? w.lane64(in.a, l) : w.lane32(in.a, l)) + u64(in.imm);
        u32 addr = u32(v);
        std::vector<Cta*> to;
        if (x.s1.empty())
            to.push_back(ctaOfSmem(w, l, addr));
        else {
            u32 mask = w.lane32(x.s1[0], l) & 0xffff;
            for (u32 r = 0; r < 16; r++)
                if (mask >> r & 1) {
                    if (r >= w.cta->cluster->ctas.size())
                        M.fault(&w, l, "multicast_mask", strf("commit mask %#x names CTA %u", mask, r));
                    to.push_back(w.cta->cluster->ctas[r].get());
                }
        }
        u32 off = 0;
        for (Cta* c : to) {
            if (c->launchFinished) M.fault(&w, l, "dsmem_exited", "tcgen05.commit to a CTA that has exited");
            off = smemOffset(w, l, c, addr, 8);
            mbarrierInitFence(M, w, l, c, off, true, "tcgen05.commit");
            mbarrierAt(M, &w, l, c, off, "tcgen05.commit").asyncPending++;
            c->pendingCommits++;
        }
        auto releases = std::make_shared<std::vector<std::function<void(u32)>>>(std::move(tmemOf(w.cta).uncommitted));
        tmemOf(w.cta).uncommitted.clear();
        auto keep = w.cta->cluster->shared_from_this();
        Cta* issuer = w.cta;
        if (issuer->tensorQueue == ~0u) issuer->tensorQueue = issuer->cluster->queues++;
        auto issued = std::make_shared<Clock>(tmemOf(issuer).issued);
        push(M, issuer, [=, &M] {
            u32 commit = ++issuer->tensorCommits;
            for (auto& f : *releases) f(commit);
            for (Cta* c : to) {
                auto arrive = [=, &M] {
                    (void)keep;
                    Mbarrier& b = mbarrierAt(M, nullptr, -1, c, off, "tcgen05.commit");
                    b.asyncPending--;
                    b.arriving.see(issuer->tensorQueue, commit);
                    b.arriving.join(*issued);
                    if (c != issuer) orderTouch(c, ptx_emulator::Access::byQueue(issuer->tensorQueue, commit));
                    c->pendingCommits--;
                    mbarrierArrive(M, nullptr, -1, c, off, 1, "tcgen05.commit");
                };
                // Successive commits arrive in order, which shipped kernels rely on;
                // the ISA text only orders each arrive after the operations it tracks.
                if (M.opt.reorderCommits)
                    M.schedule(M.randomDelay(), arrive);
                else
                    arrive();
            }
        });
    });
    return Status::Next;
}

// --- cp ----------------------------------------------------------------------------
enum CpShape { C128x256, C128x128, C4x256, C64x128_02_13, C64x128_01_23, C32x128x4 };
Status cpExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u32 addr = w.lane32(in.a, l) + u32(in.imm), col = addr & 0xffff, laneBase = addr >> 16;
        SmemDesc d = ummaDesc(w.lane64(in.b, l));
        int shape = int(x.p[0]);
        u32 rows = shape <= C128x128 ? 128 : shape == C4x256 ? 4 : shape == C32x128x4 ? 32 : 64;
        u32 bytes = shape == C128x256 || shape == C4x256 ? 32 : 16;
        for (Cta* c : group(w, x.p[1])) {
            checkColumns(M, &w, c, col, bytes / 4, "tcgen05.cp");
            auto data = std::make_shared<std::vector<u32>>(rows * bytes / 4);
            std::vector<u32> granules;
            OperandLayout lay{d, false};
            for (u32 r = 0; r < rows; r++)
                for (u32 b = 0; b < bytes; b += 16) {
                    u32 at = lay.chunk(r, b);
                    if (at % 16 || at + 16 > c->smem.size() || at < kSmemReserved)
                        M.fault(&w, l, "smem_bounds", strf("tcgen05.cp: descriptor reaches shared offset %#x", at));
                    smemAsyncRead(M, &w, c, at, 16, "tcgen05.cp");
                    orderAsyncRead(w, l, c, at, 16, "tcgen05.cp");
                    granules.push_back(at / 16);
                    std::memcpy(&(*data)[(r * bytes + b) / 4], &c->smem[at], 16);
                }
            checkLoaded(M, w, l, c, col, bytes / 4, "tcgen05.cp writes");
            holdUntilCommit(M, w.cta, c, std::move(granules), col, bytes / 4, 0, 0);
            orderIssue(w, l, tmemOf(w.cta).issued);
            push(M, w.cta, [=] {
                Tmem& t = *c->tmem;
                u32 n = bytes / 4;
                auto put = [&](u32 lane, u32 r) {
                    for (u32 k = 0; k < n; k++) t.set(lane, col + k, (*data)[r * n + k]);
                };
                for (u32 r = 0; r < rows; r++) switch (shape) {
                        case C32x128x4:
                            for (u32 q = 0; q < 4; q++) put(q * 32 + r, r);
                            break;
                        case C64x128_02_13:
                            put(r % 32 + 64 * 0 + 32 * (r / 32), r), put(r % 32 + 64 + 32 * (r / 32), r);
                            break;
                        case C64x128_01_23: put(r % 32 + 64 * (r / 32), r), put(r % 32 + 64 * (r / 32) + 32, r); break;
                        default: put((laneBase + r) % kTmemLanes, r);
                    }
            });
        }
    });
    M.stats.tensorOps++;
    return Status::Next;
}

// --- mma ---------------------------------------------------------------------------
enum Kind { F16, TF32, F8F6F4, I8, MXF8F6F4, MXF4, MXF4NVF4 };

struct MmaOp {
    std::vector<Cta*> ctas;
    u32 m, n, k, rows;                   // rows per CTA
    std::vector<std::vector<double>> a;  // per CTA, rows x k; empty when A is in tensor memory
    std::vector<double> b;               // k x n
    Elem ea;
    u32 aTmem = 0, dCol, dLane, sfa = 0, sfb = 0, sfaId = 0, sfbId = 0;
    bool enable, ue8m0 = true, blockScale = false;
    double negA = 1, scaleD = 1;
    u32 block = 0;    // elements per scale factor
    int dFormat = 1;  // 0 f16, 1 f32, 2 s32
    bool saturate = false;
    std::vector<u32> disable;  // lanes not to be written
};

// Lane of row r and column offset of element (r, j) of D in one CTA, PTX ISA
// "tcgen05 Data path layout organization" (layouts A, B, D and F).
Cell dCell(const MmaOp& o, u32 r, u32 j) {
    if (o.rows == 128) return {r, j};
    if (o.ctas.size() == 2) return {r + (j >= o.n / 2 ? 64 : 0), j % (o.n / 2)};
    return {(r / 16) * 32 + r % 16, j};
}

void mmaRun(Machine& M, const MmaOp& o) {
    for (size_t p = 0; p < o.ctas.size(); p++) {
        Cta* c = o.ctas[p];
        Tmem& t = *c->tmem;
        std::vector<double> A;
        if (!o.a.empty())
            A = o.a[p];
        else {
            A.resize(o.rows * o.k);
            u32 eb = elemBytes(o.ea), cols = o.k * eb / 4;
            for (u32 r = 0; r < o.rows; r++) {
                u32 lane = o.rows == 64 && o.ctas.size() == 1 ? (r / 16) * 32 + r % 16 : r;
                u32 raw[64];
                for (u32 q = 0; q < cols; q++) {
                    if (!t.init[(lane + o.dLane) * kTmemCols + (o.aTmem & 0xffff) + q] && M.opt.checkUninitSmem)
                        M.faultAt(c, "uninit_tmem",
                                  strf("tcgen05.mma operand A: lane %u column %u was never written", lane,
                                       (o.aTmem & 0xffff) + q));
                    raw[q] = t.at(lane + o.dLane, (o.aTmem & 0xffff) + q);
                }
                decodeElems(o.ea, (const u8*)raw, o.k, &A[r * o.k]);
                for (u32 k = 0; k < o.k; k++) A[r * o.k + k] *= o.negA;
            }
        }
        std::vector<double> B = o.b;
        if (o.blockScale) {
            // Scale of row r sits in lane r % 32 of column r / 32, one byte per block, and again in the other three
            // quarters of the lanes: hardware reads the copy next to the data path that needs it.
            auto scale = [&](u32 base, u32 id, u32 r, u32 blk) {
                u32 col = (base & 0xffff) + r / 32;
                u8 v = 0;
                for (u32 lane = r % 32; lane < kTmemLanes; lane += 32) {
                    if (!t.init[lane * kTmemCols + col] && M.opt.checkUninitSmem)
                        M.faultAt(c, "uninit_tmem",
                                  strf("tcgen05.mma scale factor: lane %u column %u was never written", lane, col));
                    u8 copy = u8(t.at(lane, col) >> (8 * (id + blk)));
                    if (lane >= 32 && copy != v)
                        M.faultAt(c, "tmem_scale",
                                  strf("tcgen05.mma scale factor: byte %u of column %u is %#x in lane %u but %#x in "
                                       "lane %u; every quarter of the lanes needs the same",
                                       id + blk, col, v, lane % 32, copy, lane));
                    v = copy;
                }
                return double(o.ue8m0 ? ue8m0ToFloat(v) : ue4m3ToFloat(v));
            };
            u32 blocks = o.k / o.block;
            for (u32 blk = 0; blk < blocks; blk++) {
                for (u32 r = 0; r < o.rows; r++) {
                    double s = scale(o.sfa, o.sfaId, r, blk);
                    for (u32 k = blk * o.block; k < (blk + 1) * o.block; k++) A[r * o.k + k] *= s;
                }
                for (u32 j = 0; j < o.n; j++) {
                    double s = scale(o.sfb, o.sfbId, j, blk);
                    for (u32 k = blk * o.block; k < (blk + 1) * o.block; k++) B[k * o.n + j] *= s;
                }
            }
        }
        std::vector<double> C(o.rows * o.n, 0.0);
        auto cell = [&](u32 r, u32 j) -> u32 {
            Cell q = dCell(o, r, j);
            return (q.lane + o.dLane) * kTmemCols + o.dCol + q.col;
        };
        if (o.enable)
            for (u32 r = 0; r < o.rows; r++)
                for (u32 j = 0; j < o.n; j++) {
                    u32 at = cell(r, j);
                    if (!t.init[at] && M.opt.checkUninitSmem)
                        M.faultAt(c, "uninit_tmem",
                                  strf("tcgen05.mma accumulates into tensor memory that nothing has written (row %u, "
                                       "column %u)",
                                       r, o.dCol + j));
                    u32 v = t.cell[at];
                    C[r * o.n + j] = (o.dFormat == 1   ? double(asFloat(v))
                                      : o.dFormat == 2 ? double(i32(v))
                                                       : double(halfToFloat(u16(v)))) *
                                     o.scaleD;
                }
        matmulAdd(o.rows, o.n, o.k, A.data(), B.data(), C.data());
        for (u32 r = 0; r < o.rows; r++)
            for (u32 j = 0; j < o.n; j++) {
                u32 at = cell(r, j), lane = at / kTmemCols;
                if (!o.disable.empty()) {
                    u32 bit = lane + (o.disable.size() == 8 ? u32(p) * 128 : 0);
                    if (o.disable[bit / 32] >> (bit % 32) & 1) continue;
                }
                double v = C[r * o.n + j];
                t.cell[at] = o.dFormat == 1 ? asBits(float(v))
                             : o.dFormat == 2
                                 ? u32(i32(o.saturate ? std::clamp<i64>(i64(v), INT32_MIN, INT32_MAX) : i64(v)))
                                 : doubleToHalf(v);
                t.init[at] = 1;
            }
    }
}

// p[0] kind, p[1] cta_group::2, p[2] A in tensor memory, p[3] block scale,
// p[4] block size (0: default), p[5] scale-input-d; s0: disable lanes;
// in.a D, in.b A, in.c B, x.s1: idesc, x.s2: scale addresses
Status mmaExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        auto o = std::make_shared<MmaOp>();
        bool two = x.p[1];
        Kind kind = Kind(x.p[0]);
        u32 id = w.lane32(x.s1[0], l);
        auto bits = [&](u32 lo, u32 n) { return id >> lo & ((1u << n) - 1); };
        auto bad = [&](const std::string& msg) {
            M.fault(&w, l, "idesc", msg + strf(" (instruction descriptor %#x)", id));
        };
        o->blockScale = x.p[3];
        o->ctas = group(w, two);
        o->n = bits(17, 6) * 8;
        o->m = bits(24, 5) * 16;
        if (bits(2, 1)) bad("sparse tcgen05.mma is not modelled");
        u32 fa = bits(7, 3), fb = bits(10, 3);
        auto elem = [&](u32 f) -> Elem {
            switch (kind) {
                case F16:
                    if (f > 1) bad("operand format");
                    return f ? Elem::BF16 : Elem::F16;
                case TF32:
                    if (f != 2) bad("operand format");
                    return Elem::TF32;
                case I8: return f ? Elem::S8 : Elem::U8;
                case MXF4:
                case MXF4NVF4:
                    if (f != 1) bad("operand format");
                    return Elem::E2M1;
                default: break;
            }
            switch (f) {
                case 0: return Elem::E4M3;
                case 1: return Elem::E5M2;
                case 3: return Elem::E2M3;
                case 4: return Elem::E3M2;
                case 5: return Elem::E2M1;
            }
            bad("operand format");
            return Elem::E4M3;
        };
        o->ea = elem(fa);
        Elem eb = elem(fb);
        bool packed4 = kind == MXF4 || kind == MXF4NVF4;
        o->k = packed4 ? 64 : kind == F16 ? 16 : kind == TF32 ? 8 : 32;
        o->rows = o->m / u32(o->ctas.size());
        if (o->blockScale) {
            o->dFormat = 1;
            o->sfbId = bits(4, 2), o->sfaId = bits(29, 2);
            o->ue8m0 = bits(23, 1);
            o->block = x.p[4] ? u32(x.p[4]) : kind == MXF4NVF4 ? 16 : 32;
            o->sfa = w.lane32(x.s2[0], l), o->sfb = w.lane32(x.s2[1], l);
            // "Valid combinations of scale_vectorsize with types and MMA-Kind", "Scale Factor A ID", "... B ID".
            u32 perRow = o->k / o->block;
            if (!o->ue8m0 && perRow != 4) bad("scale factors of this vector size must be UE8M0");
            if (kind == MXF4 && perRow != 2) bad("scale vector size");
            if (o->sfaId % perRow || o->sfbId % perRow) bad("scale factor ID");
            if (bits(24, 3) || bits(31, 1)) bad("reserved bit, or K = 96, which is not modelled");
        } else {
            o->dFormat = int(bits(4, 2));
            o->saturate = bits(3, 1);
            if (o->dFormat > 2 || (o->dFormat == 2) != (kind == I8)) bad("D format");
        }
        bool okM = two ? (o->m == 128 || o->m == 256) : (o->m == 64 || o->m == 128);
        u32 stepN = o->m == 64 || (o->blockScale && !two) ? 8 : 16;
        if (!okM || o->n < 8 || o->n > 256 || o->n % stepN)
            bad(strf("shape M=%u N=%u (multiple of %u) is not valid for .cta_group::%d", o->m, o->n, stepN,
                     two ? 2 : 1));
        u32 d = w.lane32(in.a, l);
        o->dCol = d & 0xffff, o->dLane = d >> 16;
        if (o->dLane && !(o->rows == 64 && !two && o->dLane == 16))
            M.fault(&w, l, "tmem_lane", strf("accumulator address %#x", d));
        o->enable = w.predMask(in.p) >> l & 1;
        o->negA = bits(13, 1) ? -1 : 1;
        double negB = bits(14, 1) ? -1 : 1;
        o->scaleD = std::ldexp(1.0, -int(x.p[5]));
        for (u32 f : x.s0) o->disable.push_back(w.lane32(f, l));

        u32 dCols = o->rows == 64 && two ? o->n / 2 : o->n;
        bool aMn = bits(15, 1), bMn = bits(16, 1);
        // "Valid Combinations of Type-Size, Major-ness and Swizzling", also of N for a transposed 8-bit B.
        auto transposed = [&](Elem e, u64 desc) {
            if (packed4 || e == Elem::E2M1 || e == Elem::E2M3 || e == Elem::E3M2)
                bad("transposed operand of this type");
            if ((ummaDesc(desc).swizzle == SmemDesc::S128Base32) != (e == Elem::TF32))
                bad("swizzle of a transposed operand of this type");
        };
        if (aMn && !x.p[2]) transposed(o->ea, w.lane64(in.b, l));
        if (bMn) {
            transposed(eb, w.lane64(in.c, l));
            if (elemBytes(eb) == 1 && o->n % (two ? 32 : 16)) bad("N of a transposed 8-bit B");
        }
        o->b.resize(o->n * o->k);
        std::vector<double> tmp;
        u32 nPer = o->n / u32(o->ctas.size());
        for (size_t p = 0; p < o->ctas.size(); p++) {
            Cta* c = o->ctas[p];
            std::vector<u32> granules;
            checkColumns(M, &w, c, o->dCol, dCols, "tcgen05.mma accumulator");
            u32 aCol = 0, aCols = 0;
            if (x.p[2]) {
                o->aTmem = w.lane32(in.b, l) + u32(x.p[6]);
                aCol = o->aTmem & 0xffff, aCols = o->k * elemBytes(o->ea) / 4;
                checkColumns(M, &w, c, aCol, aCols, "tcgen05.mma operand A");
            } else {
                OperandLayout la{ummaDesc(w.lane64(in.b, l)), aMn};
                o->a.emplace_back(o->rows * o->k);
                gatherOperand(M, &w, c, la, o->ea, o->rows, o->k, o->a.back().data(), granules, "tcgen05.mma operand A",
                              packed4);
                for (double& v : o->a.back()) v *= o->negA;
            }
            OperandLayout lb{ummaDesc(w.lane64(in.c, l)), bMn};
            tmp.resize(nPer * o->k);
            gatherOperand(M, &w, c, lb, eb, nPer, o->k, tmp.data(), granules, "tcgen05.mma operand B", packed4);
            for (u32 j = 0; j < nPer; j++)
                for (u32 k = 0; k < o->k; k++) o->b[k * o->n + p * nPer + j] = negB * tmp[j * o->k + k];
            if (o->blockScale) {
                checkColumns(M, &w, c, o->sfa & 0xffff, (o->rows + 31) / 32, "tcgen05.mma scale factors of A");
                checkColumns(M, &w, c, o->sfb & 0xffff, (o->n + 31) / 32, "tcgen05.mma scale factors of B");
            }
            checkLoaded(M, w, l, c, o->dCol, dCols, "tcgen05.mma writes");
            checkStored(M, w, l, c, aCol, aCols, kAllQuarters, "tcgen05.mma reads");
            if (o->blockScale)
                for (u32 sf : {o->sfa & 0xffff, o->sfb & 0xffff})
                    checkStored(M, w, l, c, sf, ((sf == (o->sfa & 0xffff) ? o->rows : o->n) + 31) / 32, kAllQuarters,
                                "tcgen05.mma reads");
            holdUntilCommit(M, w.cta, c, std::move(granules), o->dCol, dCols, aCol, aCols);
            orderIssue(w, l, tmemOf(w.cta).issued);
        }
        M.stats.tensorOps++;
        push(M, w.cta, [&M, o] { mmaRun(M, *o); });
    });
    return Status::Next;
}

// --- builders ----------------------------------------------------------------------
bool twoCtas(const Stmt& s) { return s.has("cta_group::2"); }
bool sharedSpace(const Stmt& s) { return s.has("shared::cta") || s.has("shared") || s.has("shared::cluster"); }

void buildLdSt(Decoder& d, const Stmt& s, Inst& in, bool load) {
    Ext& x = d.ext(in);
    static const std::pair<const char*, int> shapes[] = {
        {"32x32b", S32x32}, {"16x64b", S16x64}, {"16x128b", S16x128}, {"16x256b", S16x256}, {"16x32bx2", S16x32x2}};
    x.p[0] = -1;
    for (auto& [n, v] : shapes)
        if (s.has(n)) x.p[0] = v;
    if (x.p[0] < 0) d.fail(s, "unknown shape");
    for (auto& o : s.op)
        if (o[0] == 'x' && isdigit((unsigned char)o[1])) x.p[1] = atoi(o.c_str() + 1);
    if (s.has("red")) d.fail(s, "tcgen05.ld.red");
    x.p[2] = s.has("pack::16b") || s.has("unpack::16b");
    const Operand& addr = s.ops[load ? 1 : 0];
    bool split = x.p[0] == S16x32x2;
    const Operand& regs = s.ops[load ? 0 : split ? 2 : 1];
    if (split) x.p[3] = s.ops[load ? 2 : 1].imm;
    d.address(in.a, in.sa, in.imm, addr, s);
    if (in.sa != 4) d.fail(s, "tensor memory addresses are 32-bit");
    if (load) {
        in.fn = ldExec;
        d.dstList(x.dst, regs, s, 4);
        if (regs.kind == Operand::Vec)
            for (auto& e : regs.elems) d.pendingLoad(e);
        else
            d.pendingLoad(regs);
    } else {
        in.fn = stExec;
        d.srcList(x.s0, regs, s, 4);
    }
    size_t n = load ? x.dst.size() : x.s0.size();
    if (n != regsPerRepeat(int(x.p[0])) * size_t(x.p[1])) d.fail(s, "register list has the wrong length");
}

void buildMma(Decoder& d, const Stmt& s, Inst& in) {
    if (s.has("ws")) d.fail(s, "tcgen05.mma.ws");
    if (s.has("sp")) d.fail(s, "sparse tcgen05.mma");
    Ext& x = d.ext(in);
    static const std::pair<const char*, int> kinds[] = {
        {"kind::f16", F16},           {"kind::tf32", TF32}, {"kind::f8f6f4", F8F6F4},    {"kind::i8", I8},
        {"kind::mxf8f6f4", MXF8F6F4}, {"kind::mxf4", MXF4}, {"kind::mxf4nvf4", MXF4NVF4}};
    x.p[0] = -1;
    for (auto& [n, v] : kinds)
        if (s.has(n)) x.p[0] = v;
    if (x.p[0] < 0) d.fail(s, "unknown kind");
    x.p[1] = twoCtas(s);
    x.p[3] = s.has("block_scale");
    x.p[4] = s.has("block32") || s.has("scale_vec::2X") ? 32 : s.has("block16") || s.has("scale_vec::4X") ? 16 : 0;
    if (x.p[0] == MXF8F6F4) x.p[4] = 32;
    u8 st;
    i64 disp = 0;
    d.address(in.a, st, disp, s.ops[0], s);
    if (disp) d.fail(s, "displacement on the accumulator address");
    x.p[2] = s.ops[1].kind == Operand::Addr;
    if (x.p[2]) {
        disp = 0;
        d.address(in.b, st, disp, s.ops[1], s);
        x.p[6] = disp;
    } else
        d.src(in.b, s.ops[1], s, 8);
    d.src(in.c, s.ops[2], s, 8);
    d.srcList(x.s1, s.ops[3], s, 4);
    size_t k = 4;
    if (x.p[3]) {
        x.s2.assign(2, 0);
        disp = 0;
        d.address(x.s2[0], st, disp, s.ops[k++], s);
        d.address(x.s2[1], st, disp, s.ops[k++], s);
        if (disp) d.fail(s, "displacement on a scale-factor address");
    } else if (s.ops[k].kind == Operand::Vec) {
        d.srcList(x.s0, s.ops[k++], s, 4);
    }
    const Operand& e = s.ops.at(k++);
    in.p = e.kind == Operand::Imm ? (e.imm ? 0xffff : 0xfffe) : d.predSrc(e, s);
    if (k < s.ops.size()) x.p[5] = s.ops[k].imm;
    in.fn = mmaExec;
}

void buildTcgen05(Decoder& d, const Stmt& s, Inst& in) {
    const std::string& what = s.op[1];
    Ext& x = d.ext(in);
    if (what == "alloc") {
        in.fn = allocExec;
        in.space = u8(sharedSpace(s) ? Space::Shared : Space::Generic);
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        d.src(in.b, s.ops[1], s, 4);
    } else if (what == "dealloc") {
        in.fn = deallocExec;
        d.src(in.a, s.ops[0], s, 4);
        d.src(in.b, s.ops[1], s, 4);
    } else if (what == "relinquish_alloc_permit") {
        in.fn = relinquishExec;
    } else if (what == "ld" || what == "st") {
        buildLdSt(d, s, in, what == "ld");
    } else if (what == "wait::ld") {
        in.fn = waitLdExec;
        d.retirePendingLoads();
    } else if (what == "wait::st") {
        in.fn = waitStExec;
    } else if (what.rfind("fence::", 0) == 0) {
        in.fn = fenceExec;
        in.n = what == "fence::after_thread_sync";
    } else if (what == "commit") {
        in.fn = commitExec;
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        if (s.ops.size() > 1) d.srcList(x.s1, s.ops[1], s, 4);
    } else if (what == "cp") {
        in.fn = cpExec;
        x.p[0] = s.has("128x256b")        ? C128x256
                 : s.has("128x128b")      ? C128x128
                 : s.has("4x256b")        ? C4x256
                 : s.has("32x128b")       ? C32x128x4
                 : s.has("warpx2::02_13") ? C64x128_02_13
                 : s.has("warpx2::01_23") ? C64x128_01_23
                                          : -1;
        if (x.p[0] < 0) d.fail(s, "unknown shape");
        if (s.has("b8x16")) d.fail(s, "decompressing tcgen05.cp");
        x.p[1] = twoCtas(s);
        u8 st;
        d.address(in.a, st, in.imm, s.ops[0], s);
        d.src(in.b, s.ops[1], s, 8);
    } else if (what == "mma") {
        buildMma(d, s, in);
    } else {
        d.fail(s, "unsupported tcgen05 operation");
    }
}

PTX_OP("tcgen05", buildTcgen05);

}  // namespace

void tmemAtCtaExit(Machine& m, Cta* c) {
    if (!c->tmem) return;
    Tmem& t = *c->tmem;
    for (u32 k = 0; k < kTmemCols; k++)
        if (t.owner[k])
            m.faultAt(c, "tmem_leak",
                      strf("CTA exits with tensor memory column %u still allocated, by %s", k,
                           t.allocators[t.owner[k] - 1u].c_str()));
    if (t.pipe.empty() && !c->pendingCommits) return;
    // Shipped kernels leave the last commits to "empty" barriers unobserved.
    const char* msg = "CTA exits while tcgen05 operations or commits are in flight";
    if (m.opt.checkExit) m.faultAt(c, "inflight_at_exit", msg);
    m.warn("inflight_at_exit", msg);
}

void tmemRegisterCheck(Warp& w, const Inst& in) {
    const Ext& x = *in.x;
    bool source = false;
    auto pending = [&](u32 r) {
        return std::find(w.tmemPending.begin(), w.tmemPending.end(), r) != w.tmemPending.end();
    };
    for (size_t i = 0; i < x.guarded.size(); i++) {
        if (!pending(x.guarded[i])) continue;
        if (!x.copy || x.guardedDef[i])
            w.m->fault(&w, -1, "tcgen05_ld_wait",
                       strf("destination register of a tcgen05.ld is %s before tcgen05.wait::ld",
                            x.guardedDef[i] ? "written" : "read"));
        source = true;
    }
    if (source) w.tmemPending.push_back(in.d);  // a copy inherits the restriction
}

}  // namespace ptx_emulator
