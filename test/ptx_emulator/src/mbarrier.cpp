// mbarrier objects.  The state lives beside shared memory; the eight bytes in
// shared memory hold a tag, so that a stray overwrite is noticed.
#include "lanes.hpp"

namespace ptx_emulator {

namespace {
constexpr u32 kMaxCount = (1u << 20) - 1;
constexpr i64 kMaxTx = (1 << 20) - 1;
u64 tagOf(u32 off) { return 0x6d62617272696572ull ^ (u64(off) * 0x9e3779b97f4a7c15ull); }
}  // namespace

void mbarrierInit(Machine& m, Warp& w, int lane, Cta* c, u32 off, u32 count) {
    if (off % 8) m.fault(&w, lane, "misaligned", "mbarrier is not 8-byte aligned");
    if (count == 0 || count > kMaxCount)
        m.fault(&w, lane, "mbarrier_count", strf("mbarrier.init with count %u", count));
    int& idx = c->mbarIndex[off / 8];
    if (idx < 0) {
        idx = int(c->mbars.size());
        c->mbars.emplace_back();
    }
    Mbarrier& b = c->mbars[size_t(idx)];
    if (b.live && b.asyncPending)
        m.fault(&w, lane, "mbarrier_reinit", "mbarrier.init while asynchronous operations will still signal it");
    b = Mbarrier{};
    b.live = true;
    b.count = count;
    b.pending = count;
    b.tag = tagOf(off);
    if (w.order) {
        b.queue = c->cluster->queues++;
        b.init = orderStamp(w, lane);
    }
    b.initWarp = &w;
    b.initLane = lane;
    b.initTime = ++m.seq;
    smemGenericWrite(w, lane, c, off, 8);
    c->granules[off / 16].writer =
        0;  // mbarrier.init is ordered by fence.mbarrier_init or a barrier, not by fence.proxy.async
    std::memcpy(&c->smem[off], &b.tag, 8);
}

void mbarrierInitFence(Machine& m, Warp& w, int lane, Cta* c, u32 off, bool async, const char* what) {
    Mbarrier& b = mbarrierAt(m, &w, lane, c, off, what);
    if (!b.initWarp || !m.opt.checkFences) return;
    const Warp& i = *b.initWarp;
    int l = b.initLane;
    u64 t = std::max(i.fenceTime[l], i.initFenceTime[l]);
    if (!async) t = std::max(t, i.clusterFenceTime[l]);
    if (t <= b.initTime)
        m.fault(&w, lane, "mbarrier_init_fence",
                strf("%s uses the mbarrier at shared offset %#x of CTA rank %u, which warp %u lane %d initialised "
                     "without a later fence.mbarrier_init",
                     what, off, c->rank, i.id, l));
    if (async) b.initWarp = nullptr;
}

Mbarrier& mbarrierAt(Machine& m, Warp* w, int lane, Cta* c, u32 off, const char* what) {
    auto fail = [&](const char* kind, std::string msg) {
        msg = strf("%s on mbarrier at shared offset %#x of CTA rank %u: ", what, off, c->rank) + msg;
        if (w) m.fault(w, lane, kind, msg);
        m.faultAt(c, kind, msg);
    };
    if (off % 8 || off + 8 > c->smem.size()) fail("misaligned", "bad address");
    int idx = c->mbarIndex[off / 8];
    if (idx < 0 || !c->mbars[size_t(idx)].live) fail("mbarrier_uninit", "not initialised");
    Mbarrier& b = c->mbars[size_t(idx)];
    u64 t;
    std::memcpy(&t, &c->smem[off], 8);
    if (t != b.tag) fail("mbarrier_corrupt", "its memory was overwritten");
    return b;
}

namespace {
void tryComplete(Machine& m, Warp* w, int lane, Cta* c, u32 off, Mbarrier& b) {
    if (b.pending) return;
    if (b.tx < 0) {
        std::string msg = strf(
            "mbarrier at shared offset %#x of CTA rank %u: all arrivals are in but %ld more bytes completed than were "
            "expected",
            off, c->rank, -b.tx);
        if (w) m.fault(w, lane, "mbarrier_tx", msg);
        m.faultAt(c, "mbarrier_tx", msg);
    }
    if (b.tx) return;
    b.phase++;
    b.pending = b.count;
    if (c->order) {
        b.done.join(b.arriving);
        b.done.see(b.queue, u32(b.phase));
        b.arriving.clear();
    }
    m.wakeGroups(c, Block::Mbarrier);
}
}  // namespace

void mbarrierArrive(Machine& m, Warp* w, int lane, Cta* c, u32 off, u32 count, const char* what) {
    Mbarrier& b = mbarrierAt(m, w, lane, c, off, what);
    if (i64(count) > b.pending) {
        std::string msg = strf(
            "%s: %u arrivals, only %ld are pending in this phase (mbarrier at shared offset %#x of CTA rank %u, "
            "expected count %u)",
            what, count, b.pending, off, c->rank, b.count);
        if (w) m.fault(w, lane, "mbarrier_overflow", msg);
        m.faultAt(c, "mbarrier_overflow", msg);
    }
    b.pending -= count;
    tryComplete(m, w, lane, c, off, b);
}

void mbarrierTx(Machine& m, Warp* w, int lane, Cta* c, u32 off, i64 delta, const char* what) {
    Mbarrier& b = mbarrierAt(m, w, lane, c, off, what);
    b.tx += delta;
    if (b.tx > kMaxTx || b.tx < -kMaxTx) {
        std::string msg = strf("%s: tx-count %ld out of range", what, b.tx);
        if (w) m.fault(w, lane, "mbarrier_tx", msg);
        m.faultAt(c, "mbarrier_tx", msg);
    }
    tryComplete(m, w, lane, c, off, b);
}

namespace {

struct BarRef {
    Cta* c;
    u32 off;
};
BarRef barRef(Warp& w, const Inst& in, int l) {
    const u8* a = w.src(in.a);
    u64 v = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
    if (Space(in.space) == Space::Generic && !isSharedGeneric(v))
        w.m->fault(&w, l, "mbarrier_space", strf("generic address %#lx is not shared memory", v));
    Cta* c = ctaOfSmem(w, l, u32(v));
    u32 off = smemOffset(w, l, c, u32(v), 8);
    return {c, off};
}

Status initExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        BarRef r = barRef(w, in, l);
        mbarrierInit(*w.m, w, l, r.c, r.off, w.lane32(in.b, l));
    });
    return Status::Next;
}
Status invalExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        BarRef r = barRef(w, in, l);
        Mbarrier& b = mbarrierAt(*w.m, &w, l, r.c, r.off, "mbarrier.inval");
        if (b.asyncPending)
            w.m->fault(&w, l, "mbarrier_reinit", "mbarrier.inval while asynchronous operations will still signal it");
        b.live = false;
    });
    return Status::Next;
}

// in.n bit0: expect_tx, bit1: drop; in.b = count or tx; in.q: relaxed.
// The returned state token is the phase that was current before the arrive.
Status arriveExec(Warp& w, const Inst& in, u32 m) {
    BarRef first = barRef(w, in, std::countr_zero(m));
    // Lanes that arrive at one mbarrier release together, before the last of them completes the phase.
    bool together = w.order && !in.q && (m & (m - 1));
    if (together) {
        forLanes(m, [&](int l) {
            BarRef r = barRef(w, in, l);
            together &= r.c == first.c && r.off == first.off;
        });
        if (together) {
            orderTouch(w, std::countr_zero(m), first.c);
            orderRelease(w, m, mbarrierAt(*w.m, &w, -1, first.c, first.off, "mbarrier.arrive").arriving);
        }
    }
    forLanes(m, [&](int l) {
        BarRef r = barRef(w, in, l);
        Mbarrier& b = mbarrierAt(*w.m, &w, l, r.c, r.off, "mbarrier.arrive");
        if (r.c != w.cta) mbarrierInitFence(*w.m, w, l, r.c, r.off, false, "a remote mbarrier.arrive");
        u64 token = b.phase;
        u32 v = in.b == kNoOperand ? 1 : w.lane32(in.b, l);
        if (in.n & 1) {
            b.tx += v;  // expect-tx precedes the arrive, PTX ISA "mbarrier.arrive"
            if (b.tx > kMaxTx) w.m->fault(&w, l, "mbarrier_tx", "tx-count overflow");
            v = 1;
        }
        if (in.n & 2) b.count -= v;
        if (w.order) {
            orderMbarrierUse(w, l, b.init, "mbarrier.arrive", r.off);
            if (!together) orderTouch(w, l, r.c);
            if (in.q)
                orderReleaseRelaxed(w, 1u << l, b.arriving);
            else if (!together)
                orderRelease(w, 1u << l, b.arriving);
        }
        mbarrierArrive(*w.m, &w, l, r.c, r.off, v, "mbarrier.arrive");
        if (in.d != kNoOperand) wr<u64>(w.reg(in.d), l, token);
    });
    return Status::Next;
}
Status txExec(Warp& w, const Inst& in, u32 m) {
    forLanes(m, [&](int l) {
        BarRef r = barRef(w, in, l);
        i64 v = w.lane32(in.b, l);
        if (r.c != w.cta) mbarrierInitFence(*w.m, w, l, r.c, r.off, false, "a remote mbarrier operation");
        mbarrierTx(*w.m, &w, l, r.c, r.off, in.n ? -v : v, in.n ? "mbarrier.complete_tx" : "mbarrier.expect_tx");
    });
    return Status::Next;
}
// in.n bit0: parity form, bit1: potentially blocking
Status waitExec(Warp& w, const Inst& in, u32 m) {
    u32 done = 0;
    u32 first = 0;
    const Clock* seen = nullptr;
    u32 seenLanes = 0;
    forLanes(m, [&](int l) {
        BarRef r = barRef(w, in, l);
        if (r.c != w.cta) w.m->fault(&w, l, "mbarrier_space", "test_wait/try_wait on a remote mbarrier");
        Mbarrier& b = mbarrierAt(*w.m, &w, l, r.c, r.off, "mbarrier wait");
        bool ok;
        if (in.n & 1)
            ok = (b.phase & 1) != (w.lane32(in.b, l) & 1);
        else
            ok = b.phase != w.lane64(in.b, l);
        if (w.order) {
            orderMbarrierUse(w, l, b.init, "an mbarrier wait", r.off);
            if (ok && !in.q) {
                if (seen && seen != &b.done) orderAcquire(w, seenLanes, *seen), seenLanes = 0;
                seen = &b.done;
                seenLanes |= 1u << l;
            }
        }
        done |= u32(ok) << l;
        first = r.off;
    });
    if (seenLanes) orderAcquire(w, seenLanes, *seen);
    if (!done && (in.n & 2)) {
        w.block = Block::Mbarrier;
        w.blockInfo = first;
        return Status::Block;
    }
    setPred(w, in.p, m, done);
    if (w.counters) w.counters->failed = m & ~done;
    return done == m ? Status::Next : Status::Yield;
}

void buildMbarrier(Decoder& d, const Stmt& s, Inst& in) {
    in.space = u8(Space::Generic);
    for (auto& o : s.op)
        if (o.rfind("shared", 0) == 0) in.space = u8(Space::Shared);
    const std::string& what = s.op[1];
    auto addr = [&](size_t k) { d.address(in.a, in.sa, in.imm, s.ops[k], s); };
    if (what == "init") {
        in.fn = initExec;
        addr(0);
        d.src(in.b, s.ops[1], s, 4);
    } else if (what == "inval") {
        in.fn = invalExec;
        addr(0);
    } else if (what == "arrive" || what == "arrive_drop") {
        in.fn = arriveExec;
        in.q = s.has("relaxed");
        in.n = u8((s.has("expect_tx") ? 1 : 0) | (what == "arrive_drop" ? 2 : 0));
        // The state operand is optional in some forms.
        size_t k = 0;
        if (s.ops[0].kind != Operand::Addr) {
            if (s.ops[0].kind == Operand::Reg) d.dst(in.d, s.ops[0], s, 8);
            k = 1;
        }
        addr(k);
        if (k + 1 < s.ops.size()) d.src(in.b, s.ops[k + 1], s, 4);
    } else if (what == "expect_tx" || what == "complete_tx") {
        in.fn = txExec;
        in.n = what == "complete_tx";
        addr(0);
        d.src(in.b, s.ops[1], s, 4);
    } else if (what == "test_wait" || what == "try_wait") {
        in.fn = waitExec;
        in.q = s.has("relaxed");
        in.n = u8((s.has("parity") ? 1 : 0) | (what == "try_wait" ? 2 : 0));
        in.p = d.predDst(s.ops[0], s);
        addr(1);
        d.src(in.b, s.ops[2], s, s.has("parity") ? 4 : 8);
    } else {
        d.fail(s, "unsupported mbarrier operation");
    }
}

PTX_OP("mbarrier", buildMbarrier);

}  // namespace
}  // namespace ptx_emulator
