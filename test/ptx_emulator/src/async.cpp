// Asynchronous copies: cp.async, cp.async.bulk, cp.async.bulk.tensor and their
// groups; tensormap.replace and fences.
#include <algorithm>
#include "lanes.hpp"
#include "tma.hpp"

namespace ptx_emulator {
namespace {

using OpPtr = std::shared_ptr<BulkOp>;

u64 addrOf(Warp& w, u32 field, u8 stride, i64 disp, int l) {
    const u8* a = w.src(field);
    return (stride == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(disp);
}
// A shared::cluster operand, given as a 32-bit address or a generic pointer.
u32 sharedAddr(Warp& w, int l, u64 v, bool wide) {
    if (wide && isSharedGeneric(v)) return u32(v);
    if (wide && v >> 32) w.m->fault(&w, l, "smem_bounds", strf("%#lx is not a shared-memory address", v));
    return u32(v);
}

void commit(std::map<int, LaneAsync>& table, u32 m) {
    forLanes(m, [&](int l) {
        LaneAsync& a = table[l];
        a.groups.push_back(std::move(a.open));
        a.open.clear();
    });
}
bool groupDone(const std::vector<OpPtr>& g, bool readOnly) {
    for (auto& o : g)
        if (!(readOnly ? o->readDone : o->done)) return false;
    return true;
}
// True when at most n of the most recent groups are incomplete.
bool waited(LaneAsync& a, u64 n, bool readOnly) {
    size_t must = a.groups.size() > n ? a.groups.size() - size_t(n) : 0;
    for (size_t i = 0; i < must; i++)
        if (!groupDone(a.groups[i], readOnly)) return false;
    // Groups that are entirely done need no further bookkeeping.
    while (must && groupDone(a.groups.front(), false)) a.groups.pop_front(), must--;
    return true;
}

// --- cp.async (non-bulk) -----------------------------------------------------------
// One warp instruction is one operation; its lanes complete together.
struct CopyOp : BulkOp {
    struct Lane {
        Cta* cta = nullptr;
        u32 off = 0, bytes = 0;
        u64 from = 0;
        bool waited = false;     // its thread has waited for it
        bool claimed = false;    // the next cp.async.mbarrier.arrive of its thread was executed,
        bool signalled = false;  // ... and has been triggered: visible to who sees
        u32 queue = 0, count = 0;
    };
    u32 size = 0;
    std::array<Lane, kWarp> lane;
    std::vector<std::function<void()>> then;
};

Status cpAsyncExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const u32 size = u32(in.x->p[0]);
    u64 from[kWarp] = {};
    u32 reading = 0;  // lanes that read anything
    auto op = std::make_shared<CopyOp>();
    op->size = size;
    forLanes(m, [&](int l) {
        u64 dst = addrOf(w, in.a, in.sa, in.imm, l), src = addrOf(w, in.b, in.sb, in.x->p[1], l);
        u32 n = in.c == kNoOperand ? size : w.lane32(in.c, l);
        if (n > size) M.fault(&w, l, "cp_async", strf("src-size %u is larger than cp-size %u", n, size));
        if (in.p != 0xffff && (w.predMask(in.p) >> l & 1)) n = 0;  // ignore-src
        u32 a = sharedAddr(w, l, dst, in.sa == 8);
        if (a % size || src % size) M.fault(&w, l, "misaligned", "cp.async address");
        Cta* c = ctaOfSmem(w, l, a);
        u32 off = smemOffset(w, l, c, a, size);
        if (n) M.global(&w, l, src, n, false);
        from[l] = src;
        if (n) reading |= 1u << l;
        if (n && w.order) {
            GlobalAccess by = orderGlobalIssue(w, l);
            orderGlobalLoad(w, by, src, n, "cp.async");
        }
        smemAsyncWriteBegin(M, &w, c, off, size, "cp.async");
        orderCopyStart(w, l, c, off, size);
        op->lane[size_t(l)] = {c, off, n, src};
        w.cpasync[l].open.push_back(op);
        c->pendingAsync++;
    });
    Warp* pw = &w;
    M.schedule(M.randomDelay(), [=, &M] {
        forLanes(m, [&](int l) {
            auto& [c, off, n, src, waited, claimed, signalled, queue, count] = op->lane[size_t(l)];
            smemAsyncWriteEnd(c, off, size);
            std::memset(&c->smem[off], 0, size);
            if (n) std::memcpy(&c->smem[off], (const void*)src, n);
            smemGenericWrite(*pw, l, c, off, size);  // a generic-proxy write of this thread
            c->pendingAsync--;
        });
        op->readDone = op->done = true;
        for (auto& f : op->then) f();
        op->then.clear();
        M.wakeGroups(pw->cta, Block::BulkGroup);
    });
    if (w.counters && reading) w.counters->access(w, w.pc, reading, from, size, false);
    return Status::Next;
}
Status cpCommitExec(Warp& w, const Inst&, u32 m) {
    commit(w.cpasync, m);
    return Status::Next;
}
Status cpWaitExec(Warp& w, const Inst& in, u32 m) {
    bool ok = true;
    forLanes(m, [&](int l) {
        LaneAsync& a = w.cpasync[l];
        if (in.n && !a.open.empty()) a.groups.push_back(std::move(a.open)), a.open.clear();  // wait_all
        size_t must = a.groups.size() > size_t(in.imm) ? a.groups.size() - size_t(in.imm) : 0;
        for (; must && groupDone(a.groups.front(), false); must--) {
            for (auto& o : a.groups.front()) {
                auto& q = static_cast<CopyOp&>(*o).lane[size_t(l)];
                q.waited = true;
                if (!q.claimed) orderCopyDone(w, l, q.cta, q.off, static_cast<CopyOp&>(*o).size);
            }
            a.groups.pop_front();
        }
        ok &= !must;
    });
    if (ok) return Status::Next;
    w.block = Block::BulkGroup;
    return Status::Block;
}
// The arrive is triggered when all prior cp.async of the thread are complete, PTX ISA
// "cp.async.mbarrier.arrive".
Status cpMbarrierExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    struct Arrival {
        Cta* cta;
        u32 off;
        std::vector<OpPtr> claims, earlier;  // copies that it is the first to signal, and others
    };
    auto arrivals = std::make_shared<std::array<Arrival, kWarp>>();
    std::vector<OpPtr> ops;
    forLanes(m, [&](int l) {
        u32 a = sharedAddr(w, l, addrOf(w, in.a, in.sa, in.imm, l), in.sa == 8);
        Cta* c = ctaOfSmem(w, l, a);
        u32 off = smemOffset(w, l, c, a, 8);
        Mbarrier& b = mbarrierAt(M, &w, l, c, off, "cp.async.mbarrier.arrive");
        if (c != w.cta) M.fault(&w, l, "mbarrier_space", "cp.async.mbarrier.arrive on a remote mbarrier");
        if (w.order) orderMbarrierUse(w, l, b.init, "cp.async.mbarrier.arrive", off);
        if (!in.n) b.pending++;  // without .noinc the pending count is raised first
        b.asyncPending++;
        c->pendingAsync++;
        Arrival& mine = (*arrivals)[size_t(l)];
        mine.cta = c, mine.off = off;
        auto cover = [&](const OpPtr& o) {
            auto& q = static_cast<CopyOp&>(*o).lane[size_t(l)];
            ops.push_back(o);
            (q.claimed ? mine.earlier : mine.claims).push_back(o);
            q.claimed = true;
        };
        LaneAsync& copies = w.cpasync[l];
        // Without a wait_group copies would pile up here.
        std::erase_if(copies.open, [&](const OpPtr& o) { return static_cast<CopyOp&>(*o).lane[size_t(l)].signalled; });
        for (auto& g : copies.groups)
            for (auto& o : g) cover(o);
        for (auto& o : copies.open) cover(o);
    });
    std::sort(ops.begin(), ops.end());
    ops.erase(std::unique(ops.begin(), ops.end()), ops.end());
    std::erase_if(ops, [](const OpPtr& o) { return o->done; });
    Warp* pw = &w;
    auto arrive = [=, &M] {
        forLanes(m, [&](int l) {
            auto& [c, off, claims, earlier] = (*arrivals)[size_t(l)];
            Mbarrier& b = mbarrierAt(M, nullptr, -1, c, off, "cp.async.mbarrier.arrive");
            for (auto& o : claims) {
                auto& q = static_cast<CopyOp&>(*o).lane[size_t(l)];
                q.signalled = true;
                q.queue = b.queue, q.count = u32(b.phase) + 1;
                if (q.waited && pw->order)
                    orderRelease(*pw, 1u << l, b.arriving);
                else
                    orderCopyDone(q.cta, q.off, static_cast<CopyOp&>(*o).size, q.queue, q.count);
            }
            for (auto& o : earlier)
                if (auto& q = static_cast<CopyOp&>(*o).lane[size_t(l)]; q.signalled && pw->order)
                    b.arriving.see(q.queue, q.count);
            b.asyncPending--;
            c->pendingAsync--;
            mbarrierArrive(M, nullptr, -1, c, off, 1, "cp.async.mbarrier.arrive");
        });
    };
    if (ops.empty()) {
        M.schedule(0, arrive);
        return Status::Next;
    }
    auto left = std::make_shared<size_t>(ops.size());
    for (auto& o : ops)
        static_cast<CopyOp&>(*o).then.push_back([=, &M] {
            if (!--*left) M.schedule(0, arrive);
        });
    return Status::Next;
}

// --- completion through an mbarrier ---------------------------------------------
void expectSignal(Machine& M, Warp& w, int l, Cta* c, u32 off, const char* what) {
    mbarrierInitFence(M, w, l, c, off, true, what);
    Mbarrier& b = mbarrierAt(M, &w, l, c, off, what);
    if (w.order) orderMbarrierUse(w, l, b.init, what, off);
    b.asyncPending++;
    c->pendingAsync++;
}
// `bytes` have arrived at [dst, dst + size) of CTA `d`, from another CTA if `remote`.
void signal(Machine& M, Cta* c, u32 off, u32 bytes, Cta* d, u32 dst, u32 size, bool remote, const char* what) {
    Mbarrier& b = mbarrierAt(M, nullptr, -1, c, off, what);
    b.asyncPending--;
    if (size) orderWritten(d, dst, size, b.queue, u32(b.phase) + 1);
    if (remote) orderTouch(d, Access::byQueue(b.queue, u32(b.phase) + 1));
    c->pendingAsync--;
    mbarrierTx(M, nullptr, -1, c, off, -i64(bytes), what);
}

// Tells the happens-before check what a copy that signals this mbarrier reads from global memory,
TileReads readGlobal(Machine& M, const GlobalAccess& by, Cta* c, u32 off, const char* what) {
    if (!by.seen) return [](u64, u32) {};
    Mbarrier& b = mbarrierAt(M, nullptr, -1, c, off, what);
    return [&M, by, what, queue = b.queue, count = u32(b.phase) + 1](u64 address, u32 bytes) {
        orderGlobalRead(M, by, address, bytes, queue, count, what);
    };
}
// ... and what a bulk store writes.
void writeGlobal(Machine& M, const GlobalAccess& by, BulkOp& op, const std::vector<TileWrite>& data, bool reduce,
                 const char* what) {
    if (!by.seen) return;
    for (auto& d : data) {
        orderGlobalWrite(M, by, d.addr, u32(d.data.size()), op.serial, reduce, what);
        op.written.push_back({d.addr, u32(d.data.size())});
    }
}

// Destination CTA of a copy and where its completion is signalled.
struct Target {
    Cta* cta;
    Cta* barCta;
};
std::vector<Target> targets(Warp& w, int l, u32 dstAddr, u32 barAddr, bool multicast, u32 mask, bool pair) {
    Cluster* cl = w.cta->cluster;
    if (!multicast) {
        Cta* d = ctaOfSmem(w, l, dstAddr);
        Cta* b = ctaOfSmem(w, l, barAddr);
        if (b != d && !(pair && (b->rank ^ 1) == d->rank))
            w.m->fault(&w, l, "tma_mbarrier",
                       "the mbarrier must be in the destination CTA (or its peer with .cta_group::2)");
        return {{d, b}};
    }
    std::vector<Target> out;
    for (u32 r = 0; r < 16; r++) {
        if (!(mask >> r & 1)) continue;
        if (r >= cl->ctas.size())
            w.m->fault(&w, l, "multicast_mask",
                       strf("multicast mask %#x names CTA %u of a cluster of %zu", mask, r, cl->ctas.size()));
        // With .cta_group::2 the signal goes to the CTA of the pair that has the
        // rank parity of the mbarrier operand.
        u32 br = pair ? (r & ~1u) | ((barAddr >> kSmemRankShift) & 1) : r;
        for (u32 q : {r, br})
            if (cl->ctas[q]->launchFinished)
                w.m->fault(&w, l, "dsmem_exited", strf("multicast to CTA rank %u, which has exited", q));
        out.push_back({cl->ctas[r].get(), cl->ctas[br].get()});
    }
    return out;
}

// --- cp.async.bulk (1-D) -----------------------------------------------------------
enum BulkDir { G2S, S2S, S2G };

// in.a dst, in.b src (disp p[1]), in.c size, s0: mbarrier (disp p[2], stride p[3]),
// s1: cta mask, p[4] reduce op (-1), p[5] reduce type
Status bulkExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u64 dst = addrOf(w, in.a, in.sa, in.imm, l), src = addrOf(w, in.b, in.sb, x.p[1], l);
        u32 bytes = w.lane32(in.c, l);
        if (bytes % 16 || dst % 16 || src % 16)
            M.fault(
                &w, l, "misaligned",
                strf("cp.async.bulk needs 16-byte alignment and size (dst %#lx, src %#lx, %u bytes)", dst, src, bytes));
        M.stats.bulkOps++;
        if (in.n == S2G) {
            u32 a = sharedAddr(w, l, src, in.sb == 8);
            Cta* c = ctaOfSmem(w, l, a);
            if (!bytes) {
                w.bulk[l].open.push_back(std::make_shared<BulkOp>(BulkOp{true, true}));
                return;
            }
            u32 off = smemOffset(w, l, c, a, bytes);
            smemAsyncRead(M, &w, c, off, bytes, "cp.async.bulk");
            orderAsyncRead(w, l, c, off, bytes, "cp.async.bulk");
            M.global(&w, l, dst, bytes, true);
            countBulk(w, x.p[4] < 0 ? kBulkStore : kBulkReduce, bytes);
            auto op = std::make_shared<BulkOp>();
            w.bulk[l].open.push_back(op);
            SmemRange r{c, off, off + bytes};
            holdReads(r);
            w.held.push_back({op, r, l});
            Warp* pw = &w;
            auto keep = w.cta->cluster->shared_from_this();
            if (w.order) w.stores.push_back({op, l});
            op->serial = M.nextStore++;
            GlobalAccess by = orderGlobalIssue(w, l);
            int rop = int(x.p[4]);
            TmaType rt = TmaType(x.p[5]);
            M.schedule(M.randomDelay(), [=, &M] {
                std::vector<TileWrite> data{{dst, std::vector<u8>(&c->smem[off], &c->smem[off] + bytes)}};
                op->readDone = true;
                M.wakeGroups(pw->cta, Block::BulkGroup);
                M.schedule(M.randomDelay(), [=, &M] {
                    TensorMap t{};
                    t.type = rt;
                    writeGlobal(M, by, *op, data, rop >= 0, "cp.async.bulk");
                    tmaReduce(M, t, rop, data);
                    op->done = true;
                    M.wakeGroups(pw->cta, Block::BulkGroup);
                    (void)keep;
                });
            });
            return;
        }
        u64 bar = addrOf(w, x.s0[0], u8(x.p[3]), x.p[2], l);
        u32 dstA = sharedAddr(w, l, dst, in.sa == 8), barA = sharedAddr(w, l, bar, x.p[3] == 8);
        bool multicast = !x.s1.empty();
        if (!bytes) return;
        std::vector<u8> data;
        Cta* sc = nullptr;
        u32 srcOff = 0;
        countBulk(w, in.n == G2S ? kBulkLoad : kBulkDsmem, bytes);
        if (in.n == G2S)
            M.global(&w, l, src, bytes, false);
        else {
            u32 sa = sharedAddr(w, l, src, in.sb == 8);
            sc = ctaOfSmem(w, l, sa);
            srcOff = smemOffset(w, l, sc, sa, bytes);
            smemAsyncRead(M, &w, sc, srcOff, bytes, "cp.async.bulk");
            orderAsyncRead(w, l, sc, srcOff, bytes, "cp.async.bulk");
            holdReads({sc, srcOff, srcOff + bytes});
            sc->pendingAsync++;
        }
        for (Target t : targets(w, l, dstA, barA, multicast, multicast ? w.lane32(x.s1[0], l) & 0xffff : 0, false)) {
            u32 off = smemOffset(w, l, t.cta, dstA, bytes), barOff = smemOffset(w, l, t.barCta, barA, 8);
            if (in.n == G2S) countBulk(w, kBulkDelivered, bytes), t.cta->bulkReceived += bytes;
            smemAsyncWriteBegin(M, &w, t.cta, off, bytes, "cp.async.bulk");
            orderAsyncWrite(w, l, t.cta, off, bytes, "cp.async.bulk");
            expectSignal(M, w, l, t.barCta, barOff, "cp.async.bulk");
            t.cta->pendingAsync++;
            const Cta* self = w.cta;
            GlobalAccess by = sc ? GlobalAccess{} : orderGlobalIssue(w, l);
            M.schedule(M.randomDelay(), [=, &M] {
                if (sc) {
                    std::memcpy(&t.cta->smem[off], &sc->smem[srcOff], bytes);
                    releaseReads({sc, srcOff, srcOff + bytes});
                    sc->pendingAsync--;
                    Mbarrier& b = mbarrierAt(M, nullptr, -1, t.barCta, barOff, "cp.async.bulk");
                    orderReadDone(sc, srcOff, bytes, b.queue, u32(b.phase) + 1);
                    if (t.barCta != sc) orderTouch(sc, Access::byQueue(b.queue, u32(b.phase) + 1));
                } else {
                    readGlobal(M, by, t.barCta, barOff, "cp.async.bulk")(src, bytes);
                    std::memcpy(&t.cta->smem[off], (const void*)src, bytes);
                }
                smemAsyncWriteEnd(t.cta, off, bytes);
                t.cta->pendingAsync--;
                signal(M, t.barCta, barOff, bytes, t.cta, off, bytes, t.cta != self, "cp.async.bulk");
            });
        }
    });
    return Status::Next;
}

// --- cp.async.bulk.tensor ------------------------------------------------------------
// An H200 stops with an illegal instruction where a box does not start on a multiple
// of 16 bytes, though the PTX ISA does not ask for it.
void checkInnermost(Machine& M, Warp& w, int lane, const TensorMap& t, i32 coord) {
    if (!tmaStartAligned(t, coord))
        M.fault(&w, lane, "misaligned", strf("innermost coordinate %d is not on a multiple of 16 bytes", coord));
}

// Load: in.a dst, in.b tensor map, x.dst unused, x.s2 coordinates, x.s0 mbarrier
// (disp p[2], stride p[3]), x.s1 mask; p[6]: .cta_group::2
Status tensorLoadExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u32 dstA = sharedAddr(w, l, addrOf(w, in.a, in.sa, in.imm, l), in.sa == 8);
        u32 barA = sharedAddr(w, l, addrOf(w, x.s0[0], u8(x.p[3]), x.p[2], l), x.p[3] == 8);
        TensorMap t = readTensorMap(w, l, addrOf(w, in.b, in.sb, x.p[1], l));
        if (t.rank != x.s2.size())
            M.fault(&w, l, "tensormap",
                    strf("tensor map has rank %u, the instruction %zu coordinates", t.rank, x.s2.size()));
        i32 coord[5] = {};
        for (size_t k = 0; k < x.s2.size(); k++) coord[k] = i32(w.lane32(x.s2[k], l));
        checkInnermost(M, w, l, t, coord[0]);
        u32 bytes = tmaBoxBytes(t), tx = tmaTxBytes(t);
        if (dstA % 128) M.fault(&w, l, "misaligned", strf("tensor copy destination %#x is not 128-byte aligned", dstA));
        M.stats.bulkOps++;
        countBulk(w, kBulkLoad, tx);
        bool multicast = !x.s1.empty();
        for (Target g : targets(w, l, dstA, barA, multicast, multicast ? w.lane32(x.s1[0], l) & 0xffff : 0, x.p[6])) {
            u32 off = smemOffset(w, l, g.cta, dstA, bytes), barOff = smemOffset(w, l, g.barCta, barA, 8);
            countBulk(w, kBulkDelivered, tx), g.cta->bulkReceived += tx;
            smemAsyncWriteBegin(M, &w, g.cta, off, bytes, "cp.async.bulk.tensor");
            orderAsyncWrite(w, l, g.cta, off, bytes, "cp.async.bulk.tensor");
            expectSignal(M, w, l, g.barCta, barOff, "cp.async.bulk.tensor");
            g.cta->pendingAsync++;
            const Cta* self = w.cta;
            std::array<i32, 5> co;
            std::copy_n(coord, 5, co.begin());
            GlobalAccess by = orderGlobalIssue(w, l);
            M.schedule(M.randomDelay(), [=, &M] {
                try {
                    tmaLoadTile(M, t, co.data(), g.cta, off,
                                readGlobal(M, by, g.barCta, barOff, "cp.async.bulk.tensor"));
                } catch (EmuError& e) {
                    throw EmuError(
                        e.kind, std::string(e.what()) +
                                    strf("\n  tensor load into CTA (%u,%u,%u), coordinates (%d,%d,%d,%d,%d)",
                                         g.cta->id[0], g.cta->id[1], g.cta->id[2], co[0], co[1], co[2], co[3], co[4]));
                }
                smemAsyncWriteEnd(g.cta, off, bytes);
                g.cta->pendingAsync--;
                signal(M, g.barCta, barOff, tx, g.cta, off, bytes, g.cta != self, "cp.async.bulk.tensor");
            });
        }
    });
    return Status::Next;
}

// Store / reduce: in.b tensor map, in.a source, x.s2 coordinates, p[4] op
Status tensorStoreExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u32 srcA = sharedAddr(w, l, addrOf(w, in.a, in.sa, in.imm, l), in.sa == 8);
        TensorMap t = readTensorMap(w, l, addrOf(w, in.b, in.sb, x.p[1], l));
        if (t.rank != x.s2.size())
            M.fault(&w, l, "tensormap",
                    strf("tensor map has rank %u, the instruction %zu coordinates", t.rank, x.s2.size()));
        std::array<i32, 5> co{};
        for (size_t k = 0; k < x.s2.size(); k++) co[k] = i32(w.lane32(x.s2[k], l));
        checkInnermost(M, w, l, t, co[0]);
        // An H200 stops with an illegal instruction, whichever coordinate it is; loads may start there.
        for (size_t k = 0; k < x.s2.size(); k++) {
            if (co[k] >= 0) continue;
            M.fault(&w, l, "tma_coordinate", strf("tensor store to a box with %d as coordinate %zu", co[k], k));
        }
        u32 bytes = tmaBoxBytes(t);
        if (srcA % 128) M.fault(&w, l, "misaligned", strf("tensor copy source %#x is not 128-byte aligned", srcA));
        Cta* c = ctaOfSmem(w, l, srcA);
        u32 off = smemOffset(w, l, c, srcA, bytes);
        tmaBoxPieces(t, off, [&](u32 at, u32 n) {
            smemAsyncRead(M, &w, c, at, n, "cp.async.bulk.tensor store");
            orderAsyncRead(w, l, c, at, n, "cp.async.bulk.tensor store");
        });
        countBulk(w, x.p[4] < 0 ? kBulkStore : kBulkReduce, tmaTxBytes(t));
        M.stats.bulkOps++;
        auto op = std::make_shared<BulkOp>();
        w.bulk[l].open.push_back(op);
        SmemRange r{c, off, off + bytes};
        holdReads(r);
        w.held.push_back({op, r, l});
        Warp* pw = &w;
        auto keep = w.cta->cluster->shared_from_this();
        if (w.order) w.stores.push_back({op, l});
        op->serial = M.nextStore++;
        GlobalAccess by = orderGlobalIssue(w, l);
        int rop = int(x.p[4]);
        M.schedule(M.randomDelay(), [=, &M] {
            auto data = std::make_shared<std::vector<TileWrite>>(tmaGatherTile(M, t, co.data(), c, off));
            op->readDone = true;
            M.wakeGroups(pw->cta, Block::BulkGroup);
            M.schedule(M.randomDelay(), [=, &M] {
                try {
                    writeGlobal(M, by, *op, *data, rop >= 0, "cp.async.bulk.tensor");
                    tmaReduce(M, t, rop, *data);
                } catch (EmuError& e) {
                    throw EmuError(e.kind,
                                   std::string(e.what()) + strf("\n  tensor store, coordinates (%d,%d,%d,%d,%d)", co[0],
                                                                co[1], co[2], co[3], co[4]));
                }
                op->done = true;
                M.wakeGroups(pw->cta, Block::BulkGroup);
                (void)keep;
            });
        });
    });
    return Status::Next;
}

Status bulkCommitExec(Warp& w, const Inst&, u32 m) {
    commit(w.bulk, m);
    return Status::Next;
}
Status bulkWaitExec(Warp& w, const Inst& in, u32 m) {
    bool ok = true;
    forLanes(m, [&](int l) { ok &= waited(w.bulk[l], u64(in.imm), in.n); });
    if (!ok) {
        w.block = Block::BulkGroup;
        return Status::Block;
    }
    // Only this wait makes the source reusable, however early the copy ran.
    forLanes(m, [&](int l) {
        LaneAsync& a = w.bulk[l];
        size_t keep = size_t(in.imm);
        auto pendingOp = [&](const OpPtr& o) {
            for (auto& q : a.open)
                if (q == o) return true;
            for (size_t i = a.groups.size() > keep ? a.groups.size() - keep : 0; i < a.groups.size(); i++)
                for (auto& q : a.groups[i])
                    if (q == o) return true;
            return false;
        };
        std::erase_if(w.held, [&](Warp::HeldRead& h) {
            if (!h.op->readDone || h.lane != l || pendingOp(h.op)) return false;
            releaseReads(h.r);
            orderReadDone(w, l, h.r.cta, h.r.begin, h.r.end - h.r.begin);
            return true;
        });
        if (!in.n)
            std::erase_if(w.stores, [&](Warp::Store& s) {
                if (!s.op->done || s.lane != l || pendingOp(s.op)) return false;
                for (auto& [address, bytes] : s.op->written) orderGlobalWaited(w, l, address, bytes, s.op->serial);
                return true;
            });
    });
    return Status::Next;
}

Status nopExec(Warp&, const Inst&, u32) { return Status::Next; }
int reduceOp(const Stmt& s) {
    static const char* names[] = {"add", "min", "max", "and", "or", "xor"};
    for (int k = 0; k < 6; k++)
        if (s.has(names[k])) return k;
    return -1;
}
TmaType reduceType(const Stmt& s) {
    const std::string& t = s.op.back();
    return t == "f32"                 ? TmaType::F32
           : t == "f64"               ? TmaType::F64
           : t == "bf16"              ? TmaType::BF16
           : t == "f16"               ? TmaType::F16
           : t == "s32"               ? TmaType::S32
           : t == "u64" || t == "b64" ? TmaType::U64
           : t == "s64"               ? TmaType::S64
                                      : TmaType::U32;
}
bool hasPrefix(const Stmt& s, const char* p) {
    for (auto& o : s.op)
        if (o.rfind(p, 0) == 0) return true;
    return false;
}

// The space after which the destination or source is named, in order.
std::vector<std::string> spaces(const Stmt& s) {
    std::vector<std::string> v;
    for (auto& o : s.op)
        if (o == "global" || o == "shared::cluster" || o == "shared::cta" || o == "shared") v.push_back(o);
    return v;
}

void bindMbarrier(Decoder& d, const Stmt& s, Ext& x, const Operand& o) {
    x.s0.assign(1, 0);
    u8 st;
    i64 disp = 0;
    d.address(x.s0[0], st, disp, o, s);
    x.p[2] = disp;
    x.p[3] = st;
}

// cp.async..., cp.reduce.async...
void buildCp(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    x.p[4] = s.op[1] == "reduce" ? reduceOp(s) : -1;
    if (!s.has("bulk")) {
        if (s.has("commit_group")) {
            in.fn = cpCommitExec;
            return;
        }
        if (s.has("wait_group")) {
            in.fn = cpWaitExec;
            in.imm = s.ops[0].imm;
            return;
        }
        if (s.has("wait_all")) {
            in.fn = cpWaitExec;
            in.n = 1;
            return;
        }
        if (s.has("mbarrier")) {
            in.fn = cpMbarrierExec;
            in.n = s.has("noinc");
            d.address(in.a, in.sa, in.imm, s.ops[0], s);
            return;
        }
        in.fn = cpAsyncExec;
        in.n = 0;
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        i64 disp = 0;
        d.address(in.b, in.sb, disp, s.ops[1], s);
        x.p[1] = disp;
        x.p[0] = s.ops[2].imm;
        if (s.ops.size() > 3 && !(hasPrefix(s, "L2::cache_hint") && s.ops.size() == 4)) {
            if (d.regBits(s.ops[3]) == 1)
                in.p = d.predSrc(s.ops[3], s);
            else
                d.src(in.c, s.ops[3], s, 4);
        }
        return;
    }
    if (s.has("commit_group")) {
        in.fn = bulkCommitExec;
        return;
    }
    if (s.has("wait_group")) {
        in.fn = bulkWaitExec;
        in.n = s.has("read");
        in.imm = s.ops[0].imm;
        return;
    }
    if (s.has("prefetch")) {
        in.fn = nopExec;
        return;
    }
    auto sp = spaces(s);
    if (sp.size() < 2) d.fail(s, "missing state spaces");
    if (s.has("tensor")) {
        if (hasPrefix(s, "im2col") || hasPrefix(s, "tile::gather") || hasPrefix(s, "tile::scatter"))
            d.fail(s, "only tile mode is supported");
        bool load = sp[0] != "global";
        const Operand &mapOp = s.ops[load ? 1 : 0], &smem = s.ops[load ? 0 : 1];
        d.address(in.a, in.sa, in.imm, smem, s);
        i64 disp = 0;
        d.address(in.b, in.sb, disp, mapOp, s);
        x.p[1] = disp;
        d.srcList(x.s2, mapOp.elems.at(0), s, 4);
        if (load) {
            in.fn = tensorLoadExec;
            bindMbarrier(d, s, x, s.ops[2]);
            if (s.has("multicast::cluster")) {
                u32 st = d.regStride(s.ops[3]);
                d.srcList(x.s1, s.ops[3], s, st);
            }
            x.p[6] = s.has("cta_group::2");
        } else {
            in.fn = tensorStoreExec;
        }
        return;
    }
    in.fn = bulkExec;
    in.n = sp[0] == "global" ? S2G : sp[1] == "global" ? G2S : S2S;
    d.address(in.a, in.sa, in.imm, s.ops[0], s);
    i64 disp = 0;
    d.address(in.b, in.sb, disp, s.ops[1], s);
    x.p[1] = disp;
    d.src(in.c, s.ops[2], s, 4);
    if (in.n != S2G) {
        if (x.p[4] >= 0) d.fail(s, "bulk reduction into shared memory");
        bindMbarrier(d, s, x, s.ops[3]);
        if (s.has("multicast::cluster")) d.srcList(x.s1, s.ops[4], s, 4);
    } else {
        x.p[5] = i64(reduceType(s));
    }
}

// --- st.async, red.async: remote shared memory, completion by mbarrier ---------------
// in.a address, x.s0 values, x.s1[0] mbarrier (disp p[2], stride p[3]), in.sb bytes
// per element, in.n elements; p[4]: 1 for a reduction (add)
Status stAsyncExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        u32 a = sharedAddr(w, l, addrOf(w, in.a, in.sa, in.imm, l), in.sa == 8),
            b = sharedAddr(w, l, addrOf(w, x.s1[0], u8(x.p[3]), x.p[2], l), x.p[3] == 8);
        u32 bytes = in.sb * in.n;
        Cta *c = ctaOfSmem(w, l, a), *bc = ctaOfSmem(w, l, b);
        if (c != bc) M.fault(&w, l, "tma_mbarrier", "the mbarrier must be in the destination CTA");
        u32 off = smemOffset(w, l, c, a, bytes), barOff = smemOffset(w, l, bc, b, 8);
        std::array<u8, 16> v{};
        for (u32 e = 0; e < in.n; e++)
            std::memcpy(&v[e * in.sb], w.src(x.s0[e]) + size_t(l) * (in.sb == 8 ? 8 : 4), in.sb);
        if (!x.p[4])
            smemAsyncWriteBegin(M, &w, c, off, bytes, "st.async"), orderAsyncWrite(w, l, c, off, bytes, "st.async");
        else
            smemAsyncRead(M, &w, c, off, bytes, "red.async");
        expectSignal(M, w, l, bc, barOff, "st.async");
        countBulk(w, kBulkDsmem, bytes);
        bool add = x.p[4];
        const Cta* self = w.cta;
        u32 eb = in.sb;
        M.schedule(M.randomDelay(), [=, &M] {
            if (!add)
                std::memcpy(&c->smem[off], v.data(), bytes), smemAsyncWriteEnd(c, off, bytes);
            else if (eb == 8) {
                u64 o, n;
                std::memcpy(&o, &c->smem[off], 8);
                std::memcpy(&n, v.data(), 8);
                o += n;
                std::memcpy(&c->smem[off], &o, 8);
            } else {
                u32 o, n;
                std::memcpy(&o, &c->smem[off], 4);
                std::memcpy(&n, v.data(), 4);
                o += n;
                std::memcpy(&c->smem[off], &o, 4);
            }
            signal(M, bc, barOff, bytes, c, off, add ? 0 : bytes, c != self, "st.async");
        });
    });
    return Status::Next;
}

}  // namespace

void buildStAsync(Decoder& d, const Stmt& s, Inst& in, bool reduce) {
    Ext& x = d.ext(in);
    if (reduce && !s.has("add")) d.fail(s, "only red.async.add is supported");
    const std::string& t = s.op.back();
    if (reduce && t[0] == 'f') d.fail(s, "floating-point red.async");
    in.fn = stAsyncExec;
    in.sb = u8(typeBytes(t));
    in.n = s.has("v4") ? 4 : s.has("v2") ? 2 : 1;
    x.p[4] = reduce;
    d.address(in.a, in.sa, in.imm, s.ops[0], s);
    d.srcList(x.s0, s.ops[1], s, in.sb == 8 ? 8 : 4);
    x.s1.assign(1, 0);
    u8 st;
    i64 disp = 0;
    d.address(x.s1[0], st, disp, s.ops[2], s);
    x.p[2] = disp, x.p[3] = st;
}

namespace {

// --- tensormap ---------------------------------------------------------------------
enum Field { ADDRESS, RANK, BOX, DIM, STRIDE, ELEM_STRIDE, ELEMTYPE, INTERLEAVE, SWIZZLE, ATOMICITY, FILL };

Status tensormapReplaceExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        u64 a = addrOf(w, in.a, in.sa, in.imm, l);
        u8* p = resolve(w, l, Space(in.space), a, 64, true);
        resolve(w, l, Space(in.space), a + 64, 64, true);
        TensorMap t;
        std::memcpy(&t, p, sizeof t);
        if (t.magic != TensorMap::kMagic)
            w.m->fault(&w, l, "tensormap", "tensormap.replace on memory that holds no tensor map");
        u64 v = in.sb == 8 ? w.lane64(in.b, l) : w.lane32(in.b, l);
        u32 k = u32(in.x->p[1]);
        switch (in.x->p[0]) {
            case ADDRESS: t.address = v; break;
            case RANK: t.rank = u8(v + 1); break;
            case BOX: t.box[k] = u16(v); break;
            case DIM: t.dim[k] = u32(v - 1); break;
            case STRIDE: t.stride[k + 1] = v; break;
            case ELEM_STRIDE: t.elementStride[k] = u8(v); break;
            case SWIZZLE: t.swizzle = TmaSwizzle(v); break;
            case FILL: t.nanFill = u8(v); break;
            default: w.m->fault(&w, l, "unsupported", "tensormap.replace of this field");
        }
        std::memcpy(p, &t, sizeof t);
    });
    return Status::Next;
}
Status tensormapCopyExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        u64 dst = addrOf(w, in.a, in.sa, in.imm, l), src = addrOf(w, in.b, in.sb, in.x->p[1], l);
        u8* d = w.m->global(&w, l, dst, 128, true);
        std::memcpy(d, resolve(w, l, Space::Shared, src, 64, false), 64);
        std::memcpy(d + 64, resolve(w, l, Space::Shared, src + 64, 64, false), 64);
    });
    return Status::Next;
}
void buildTensormap(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    if (s.op[1] == "cp_fenceproxy") {
        in.fn = tensormapCopyExec;
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        i64 disp = 0;
        d.address(in.b, in.sb, disp, s.ops[1], s);
        x.p[1] = disp;
        return;
    }
    static const std::pair<const char*, int> fields[] = {{"global_address", ADDRESS},
                                                         {"rank", RANK},
                                                         {"box_dim", BOX},
                                                         {"global_dim", DIM},
                                                         {"global_stride", STRIDE},
                                                         {"element_stride", ELEM_STRIDE},
                                                         {"elemtype", ELEMTYPE},
                                                         {"interleave_layout", INTERLEAVE},
                                                         {"swizzle_mode", SWIZZLE},
                                                         {"swizzle_atomicity", ATOMICITY},
                                                         {"fill_mode", FILL}};
    x.p[0] = -1;
    for (auto& [n, f] : fields)
        if (s.has(n)) x.p[0] = f;
    if (x.p[0] < 0) d.fail(s, "unknown field");
    in.fn = tensormapReplaceExec;
    in.space = u8(hasPrefix(s, "shared") ? Space::Shared : hasPrefix(s, "global") ? Space::Global : Space::Generic);
    d.address(in.a, in.sa, in.imm, s.ops[0], s);
    size_t k = 1;
    if (s.ops.size() > 2) x.p[1] = s.ops[k++].imm;
    in.sb = u8(s.ops[k].kind == Operand::Reg ? d.regStride(s.ops[k]) : 8);
    d.src(in.b, s.ops[k], s, in.sb);
}

PTX_OP("cp", buildCp);
PTX_OP("tensormap", buildTensormap);

}  // namespace

// A thread that exits should have waited for the reads of its bulk stores.
// Shipped kernels omit the wait (the hardware keeps the CTA's memory until the
// copy has read it), so this is an error only with check_exit.
void asyncAtWarpExit(Warp& w) {
    for (auto& h : w.held) {
        const char* msg = "a thread exits without cp.async.bulk.wait_group for a bulk store that reads shared memory";
        if (w.m->opt.checkExit) w.m->fault(&w, h.lane, "inflight_at_exit", msg);
        w.m->warn("inflight_at_exit", msg);
        releaseReads(h.r);
    }
    w.held.clear();
    w.stores.clear();
}

}  // namespace ptx_emulator
