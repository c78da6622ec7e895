// clusterlaunchcontrol: a running cluster takes over the work of one that has
// not started.  The 16-byte response is private to the emulator.
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

struct Response {
    u32 x, y, z, valid;
};
constexpr u32 kCanceled = 0x436c4331;

// in.a response address, x.s0[0] mbarrier (disp p[2], stride p[3]), in.n multicast
Status tryCancelExec(Warp& w, const Inst& in, u32 m) {
    Machine& M = *w.m;
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        auto at = [&](u32 field, u8 stride, i64 disp) {
            return u32((stride == 8 ? w.lane64(field, l) : w.lane32(field, l)) + u64(disp));
        };
        u32 dst = at(in.a, in.sa, in.imm), bar = at(x.s0[0], u8(x.p[3]), x.p[2]);
        if (dst % 16) M.fault(&w, l, "misaligned", "clusterlaunchcontrol.try_cancel response address");
        Cluster* cl = w.cta->cluster;
        Launch& la = *cl->launch;
        Response r{0, 0, 0, 0};
        if (la.nextCluster < la.numClusters) {
            u64 idx = la.nextCluster++;
            u32 nx = la.grid[0] / la.cluster[0], ny = la.grid[1] / la.cluster[1];
            r = {u32(idx % nx) * la.cluster[0], u32(idx / nx % ny) * la.cluster[1], u32(idx / nx / ny) * la.cluster[2],
                 kCanceled};
        }
        std::vector<Cta*> to;
        if (in.n)
            for (auto& c : cl->ctas) to.push_back(c.get());
        else
            to.push_back(ctaOfSmem(w, l, dst));
        for (Cta* c : to) {
            u32 off = smemOffset(w, l, c, dst, 16), barOff = smemOffset(w, l, c, bar, 8);
            smemAsyncWriteBegin(M, &w, c, off, 16, "clusterlaunchcontrol.try_cancel");
            orderAsyncWrite(w, l, c, off, 16, "clusterlaunchcontrol.try_cancel");
            mbarrierInitFence(M, w, l, c, barOff, true, "clusterlaunchcontrol.try_cancel");
            mbarrierAt(M, &w, l, c, barOff, "clusterlaunchcontrol.try_cancel").asyncPending++;
            c->pendingAsync++;
            M.schedule(M.randomDelay(), [=, &M] {
                std::memcpy(&c->smem[off], &r, 16);
                smemAsyncWriteEnd(c, off, 16);
                Mbarrier& b = mbarrierAt(M, nullptr, -1, c, barOff, "clusterlaunchcontrol.try_cancel");
                b.asyncPending--;
                orderWritten(c, off, 16, b.queue, u32(b.phase) + 1);
                c->pendingAsync--;
                mbarrierTx(M, nullptr, -1, c, barOff, -16, "clusterlaunchcontrol.try_cancel");
            });
        }
    });
    return Status::Next;
}
Response response(Warp& w, u32 field, int l) {
    Response r;
    std::memcpy(&r, w.src(field) + l * 16, 16);
    return r;
}
Status isCanceledExec(Warp& w, const Inst& in, u32 m) {
    u32 p = 0;
    forLanes(m, [&](int l) { p |= u32(response(w, in.a, l).valid == kCanceled) << l; });
    setPred(w, in.p, m, p);
    return Status::Next;
}
// p[0]: -1 vector form, else axis
Status firstCtaExec(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    forLanes(m, [&](int l) {
        Response r = response(w, in.a, l);
        if (r.valid != kCanceled)
            w.m->fault(&w, l, "cluster_launch", "get_first_ctaid of a request that was not cancelled");
        u32 v[4] = {r.x, r.y, r.z, 0};
        for (size_t k = 0; k < x.dst.size(); k++) wr<u32>(w.reg(x.dst[k]), l, v[x.p[0] < 0 ? k : size_t(x.p[0])]);
    });
    return Status::Next;
}

void build(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    if (s.op[1] == "try_cancel") {
        in.fn = tryCancelExec;
        in.n = s.has("multicast::cluster::all");
        d.address(in.a, in.sa, in.imm, s.ops[0], s);
        x.s0.assign(1, 0);
        u8 st;
        i64 disp = 0;
        d.address(x.s0[0], st, disp, s.ops[1], s);
        x.p[2] = disp, x.p[3] = st;
    } else if (s.has("is_canceled")) {
        in.fn = isCanceledExec;
        in.p = d.predDst(s.ops[0], s);
        d.src(in.a, s.ops[1], s, 16);
    } else {
        in.fn = firstCtaExec;
        x.p[0] = s.has("get_first_ctaid::x")   ? 0
                 : s.has("get_first_ctaid::y") ? 1
                 : s.has("get_first_ctaid::z") ? 2
                                               : -1;
        d.dstList(x.dst, s.ops[0], s, 4);
        d.src(in.a, s.ops[1], s, 16);
    }
}

PTX_OP("clusterlaunchcontrol", build);

}  // namespace
}  // namespace ptx_emulator
