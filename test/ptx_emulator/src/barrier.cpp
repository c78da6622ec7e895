// bar / barrier / bar.warp.sync / barrier.cluster / fence.
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

// in.p: bar.red source predicate, in.q: result predicate, in.n: flavour
enum BarOp { SYNC, ARRIVE, RED_POPC, RED_AND, RED_OR };

void writeRed(Warp& w, const Inst& in, u32 mask, const NamedBarrier& b, u32 total) {
    if (in.n == RED_POPC)
        eachLane<u32>(w.reg(in.d), mask, [&](int) { return b.trueCount; });
    else if (in.n >= RED_AND)
        setPred(w, in.q, mask, (in.n == RED_AND ? b.trueCount == total : b.trueCount != 0) ? ~0u : 0);
}

void release(Machine& m, Cta* c, u32 id) {
    NamedBarrier& b = c->bars[id];
    u32 total = b.arrived;
    const Kernel& k = *c->cluster->launch->kernel;
    std::vector<Warp*> ws = std::move(b.waiters);
    b.waiters.clear();
    for (Warp* w : ws)
        for (int g = 0; g < w->ng; g++) {
            Group& q = w->groups[g];
            if (q.block != Block::NamedBarrier || q.info != id) continue;
            writeRed(*w, k.code[q.pc], q.mask, b, total);
            q.block = Block::None;
            q.pc++;
            if (w->order) orderAcquire(*w, q.mask, b.arriving);
            m.wake(w);
        }
    b.arrived = b.expected = b.trueCount = 0;
    b.arriving.clear();
}

u32 liveThreads(Cta* c) {
    u32 n = 0;
    for (auto& w : c->warps) n += w->live ? kWarp : 0;
    return n;
}

Status barExec(Warp& w, const Inst& in, u32 m) {
    bool aligned = in.sa;
    if (aligned && m != w.live) return converge(w);
    int lane = std::countr_zero(m);
    u32 id = w.lane32(in.a, lane);
    if (id > 15) w.m->fault(&w, lane, "barrier_id", strf("barrier id %u", id));
    NamedBarrier& b = w.cta->bars[id];
    bool counted = in.b != kNoOperand;
    u32 expected = counted ? w.lane32(in.b, lane) : liveThreads(w.cta);
    if (counted && (expected % kWarp || expected == 0))
        w.m->fault(&w, lane, "barrier_count", strf("thread count %u is not a positive multiple of 32", expected));
    if (b.arrived && b.expected != expected)
        w.m->fault(
            &w, lane, "barrier_count",
            strf("barrier %u: count %u here, %u in an earlier arrival of the same phase", id, expected, b.expected));
    b.expected = expected;
    if (w.order) orderRelease(w, m, b.arriving);
    b.arrived += aligned ? kWarp : u32(std::popcount(m));
    if (in.n >= RED_POPC) b.trueCount += u32(std::popcount(w.predMask(in.p) & m));
    if (b.arrived > expected)
        w.m->fault(&w, lane, "barrier_count",
                   strf("barrier %u: %u threads arrived, %u expected", id, b.arrived, expected));
    if (b.arrived == expected) {
        writeRed(w, in, m, b, b.arrived);
        if (w.order && in.n != ARRIVE) orderAcquire(w, m, b.arriving);
        release(*w.m, w.cta, id);
        return Status::Next;
    }
    if (in.n == ARRIVE) return Status::Next;
    b.waiters.push_back(&w);
    w.block = Block::NamedBarrier;
    w.blockInfo = id;
    return Status::Block;
}

// bar.warp.sync: groups of one warp may wait at different instructions.
void tryWarpSync(Warp& w) {
    for (int g = 0; g < w.ng; g++) {
        if (w.groups[g].block != Block::WarpSync) continue;
        u32 need = u32(w.groups[g].info) & w.live, have = 0;
        for (int o = 0; o < w.ng; o++)
            if (w.groups[o].block == Block::WarpSync && w.groups[o].info == w.groups[g].info) have |= w.groups[o].mask;
        if (need & ~have) continue;
        u64 info = w.groups[g].info;
        if (w.order) orderWarpSync(w, u32(info));
        for (int o = 0; o < w.ng; o++)
            if (w.groups[o].block == Block::WarpSync && w.groups[o].info == info)
                w.groups[o].block = Block::None, w.groups[o].pc++;
        w.m->wake(&w);
        return tryWarpSync(w);
    }
}
Status warpSyncExec(Warp& w, const Inst& in, u32 m) {
    int lane = std::countr_zero(m);
    u32 need = w.lane32(in.a, lane), waiting = 0;
    if (!(need >> lane & 1))
        w.m->fault(&w, lane, "membermask", strf("executing lane %d is not in membermask %#x", lane, need));
    for (int o = 0; o < w.ng; o++)
        if (w.groups[o].block == Block::WarpSync && w.groups[o].info == need) waiting |= w.groups[o].mask;
    if (!(need & w.live & ~(waiting | m))) {
        if (w.order) orderWarpSync(w, need);
        for (int o = 0; o < w.ng; o++)
            if (w.groups[o].block == Block::WarpSync && w.groups[o].info == need)
                w.groups[o].block = Block::None, w.groups[o].pc++;
        return Status::Next;
    }
    w.block = Block::WarpSync;
    w.blockInfo = need;
    return Status::Block;
}

void tryCluster(Machine& m, Cluster* cl) {
    if (!cl->liveThreads || cl->arrived < cl->liveThreads) return;
    cl->arrived = 0;
    cl->generation++;
    cl->done.join(cl->arriving);
    cl->arriving.clear();
    for (auto& c : cl->ctas) m.wakeGroups(c.get(), Block::ClusterBarrier);
}
Status clusterArrive(Warp& w, const Inst& in, u32 m) {
    if (in.sa && m != w.live) return converge(w);
    Cluster* cl = w.cta->cluster;
    forLanes(m, [&](int l) {
        if (w.clusterArrive[l] > cl->generation)
            w.m->fault(&w, l, "cluster_barrier", "second barrier.cluster.arrive before the barrier completed");
        w.clusterArrive[l] = cl->generation + 1;
    });
    if (!in.n) {  // releases
        u64 now = ++w.m->seq;
        forLanes(m, [&](int l) { w.initFenceTime[l] = now; });
    }
    if (w.order) (in.n ? orderReleaseRelaxed : orderRelease)(w, m, cl->arriving);
    cl->arrived += u32(std::popcount(m));
    tryCluster(*w.m, cl);
    return Status::Next;
}
Status clusterWait(Warp& w, const Inst& in, u32 m) {
    if (in.sa && m != w.live) return converge(w);
    Cluster* cl = w.cta->cluster;
    u32 bad = 0;
    forLanes(m, [&](int l) {
        if (!w.clusterArrive[l]) w.m->fault(&w, l, "cluster_barrier", "barrier.cluster.wait without an arrive");
        bad |= u32(cl->generation < w.clusterArrive[l]) << l;
    });
    if (!bad) {
        if (w.order) orderAcquire(w, m, cl->done);
        return Status::Next;
    }
    w.block = Block::ClusterBarrier;
    return Status::Block;
}

void buildBar(Decoder& d, const Stmt& s, Inst& in) {
    if (s.has("cluster")) {
        in.fn = s.has("arrive") ? clusterArrive : s.has("wait") ? clusterWait : nullptr;
        in.sa = s.has("aligned");
        in.n = s.has("relaxed");
        return;
    }
    if (s.has("warp")) {
        in.fn = warpSyncExec;
        d.src(in.a, s.ops[0], s, 4);
        return;
    }
    in.fn = barExec;
    in.sa = s.op[0] == "bar" || s.has("aligned");
    size_t k = 0;
    in.n = s.has("sync") ? SYNC : s.has("arrive") ? ARRIVE : s.has("popc") ? RED_POPC : s.has("and") ? RED_AND : RED_OR;
    if (in.n == RED_POPC)
        d.dst(in.d, s.ops[k++], s, 4);
    else if (in.n > RED_POPC)
        in.q = d.predDst(s.ops[k++], s);
    d.src(in.a, s.ops[k++], s, 4);
    size_t tail = in.n >= RED_POPC ? 1 : 0;
    if (k + tail < s.ops.size()) d.src(in.b, s.ops[k++], s, 4);
    if (tail) in.p = d.predSrc(s.ops[k], s);
}

// in.n: Scope
Status fenceExec(Warp& w, const Inst& in, u32 m) {
    orderFence(w, m, Scope(in.n));
    if (Scope(in.n) != Scope::Cta) {
        u64 now = ++w.m->seq;
        forLanes(m, [&](int l) { w.clusterFenceTime[l] = now; });
    }
    return Status::Next;
}
// in.n bit 0: shared memory, bit 1: global memory
Status fenceProxyExec(Warp& w, const Inst& in, u32 m) {
    if (in.n & 1) {
        u64 now = ++w.m->seq;
        forLanes(m, [&](int l) { w.fenceTime[l] = now; });
    }
    orderProxyFence(w, m, in.n & 1, in.n & 2);
    return Status::Next;
}
Status fenceInitExec(Warp& w, const Inst&, u32 m) {
    orderFence(w, m, Scope::Cluster);
    u64 now = ++w.m->seq;
    forLanes(m, [&](int l) { w.initFenceTime[l] = now; });
    return Status::Next;
}
Status fenceOtherProxyExec(Warp& w, const Inst& in, u32 m) {
    orderFence(w, m, Scope(in.n));
    return Status::Next;
}
Scope scopeOf(const Stmt& s) {
    return s.has("cta")       ? Scope::Cta
           : s.has("cluster") ? Scope::Cluster
           : s.has("gpu") || s.has("gl") ? Scope::Gpu
                                         : Scope::Sys;
}
void buildFence(Decoder&, const Stmt& s, Inst& in) {
    in.n = u8(scopeOf(s));
    if (s.has("mbarrier_init")) {
        in.fn = fenceInitExec;
    } else if (!s.has("proxy")) {
        in.fn = fenceExec;
    } else {
        // fence.proxy.async orders all memory unless restricted to .global or .shared.
        bool proxy = false, shared = false;
        for (auto& o : s.op) {
            proxy |= o == "async" || o.rfind("async.", 0) == 0 || o.rfind("async::", 0) == 0;
            shared |= o.rfind("shared", 0) == 0;
        }
        in.fn = proxy ? fenceProxyExec : fenceOtherProxyExec;
        if (proxy) in.n = u8((s.has("global") ? 0 : 1) | (shared ? 0 : 2));
    }
}

PTX_OP("bar", buildBar);
PTX_OP("barrier", buildBar);
PTX_OP("fence", buildFence);
PTX_OP("membar", buildFence);

}  // namespace

// Exited threads no longer take part in barriers without an explicit count.
void barriersAfterExit(Machine& m, Warp& w) {
    tryWarpSync(w);
    tryCluster(m, w.cta->cluster);
    if (w.live) return;
    const Kernel& k = *w.cta->cluster->launch->kernel;
    for (u32 id = 0; id < 16; id++) {
        NamedBarrier& b = w.cta->bars[id];
        if (!b.arrived || b.waiters.empty()) continue;
        Warp* q = b.waiters[0];
        bool counted = true;
        for (int g = 0; g < q->ng; g++)
            if (q->groups[g].block == Block::NamedBarrier && q->groups[g].info == id)
                counted = k.code[q->groups[g].pc].b != kNoOperand;
        if (counted) continue;
        b.expected = liveThreads(w.cta);
        if (b.arrived >= b.expected) release(m, w.cta, id);
    }
}

}  // namespace ptx_emulator
