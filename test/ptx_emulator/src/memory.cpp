// Address spaces, bounds, initialisation shadow, and the proxy checks that hang
// off shared-memory accesses.
#include <algorithm>
#include "machine.hpp"

namespace ptx_emulator {

void Machine::addRegion(u64 addr, u64 bytes, bool readOnly, std::string name) {
    if (!bytes) return;
    Region r{addr, addr + bytes, readOnly, std::move(name)};
    regions.insert(
        std::upper_bound(regions.begin(), regions.end(), r, [](auto& a, auto& b) { return a.begin < b.begin; }), r);
    lastRegion = nullptr;
}

Region* Machine::findRegion(u64 addr, u64 bytes) {
    if (lastRegion && addr >= lastRegion->begin && addr + bytes <= lastRegion->end) return lastRegion;
    auto it =
        std::upper_bound(regions.begin(), regions.end(), addr, [](u64 a, const Region& r) { return a < r.begin; });
    // Regions may nest (a view inside a registered buffer): look back a little.
    for (int back = 0; back < 8 && it != regions.begin(); back++) {
        --it;
        if (addr >= it->begin && addr + bytes <= it->end) return lastRegion = &*it;
    }
    return nullptr;
}

void Machine::faultDependency(Warp& w, int lane) {
    fault(&w, lane, "grid_dependency", "access to global memory that no griddepcontrol.wait comes before");
}

u8* Machine::global(Warp* w, int lane, u64 addr, u32 bytes, bool write) {
    if (w) {
        const Launch& l = *w->cta->cluster->launch;
        const bool isParameter = addr >= u64(l.params) && addr < u64(l.params) + l.kernel->paramBytes;
        if (!isParameter) checkDependency(*w, lane);
    }
    if (!opt.checkBounds) return (u8*)addr;
    Region* r = findRegion(addr, bytes);
    if (!r) {
        std::string near;
        for (auto& q : regions)
            if (addr + bytes > q.begin && addr <= q.end + 4096)
                near = strf(" (%s is [%#lx, %#lx), access is %ld bytes past its end)", q.name.c_str(), q.begin, q.end,
                            long(addr + bytes - q.end));
        fault(w, lane, "global_bounds",
              strf("%u-byte global %s at %#lx is outside every registered allocation%s", bytes,
                   write ? "write" : "read", addr, near.c_str()));
    }
    if (write && r->readOnly)
        fault(w, lane, "global_readonly", strf("write to read-only memory %s at %#lx", r->name.c_str(), addr));
    return (u8*)addr;
}

Cta* ctaOfSmem(Warp& w, int lane, u32 addr) {
    u32 rank = addr >> kSmemRankShift;
    Cta* c = w.cta;
    if (rank == c->rank) return c;
    if (rank >= c->cluster->ctas.size())
        w.m->fault(&w, lane, "smem_bounds",
                   strf("shared::cluster address %#x names CTA rank %u of a cluster of %zu", addr, rank,
                        c->cluster->ctas.size()));
    Cta* t = c->cluster->ctas[rank].get();
    if (t->launchFinished)
        w.m->fault(&w, lane, "dsmem_exited", strf("access to shared memory of CTA rank %u, which has exited", rank));
    return t;
}

u32 smemOffset(Warp& w, int lane, Cta* c, u32 addr, u32 bytes) {
    u32 off = addr & kSmemOffsetMask;
    if (off < kSmemReserved || u64(off) + bytes > c->smem.size())
        w.m->fault(
            &w, lane, "smem_bounds",
            strf("%u-byte shared access at %#x, the CTA has [%#x, %#zx)", bytes, addr, kSmemReserved, c->smem.size()));
    return off;
}

namespace {
const char* shadowText(u8 v) {
    return v == kInflight ? "shared memory that a bulk copy in flight is writing" : "uninitialised shared memory";
}
const char* shadowKind(u8 v) { return v == kInflight ? "inflight_read" : "uninit_smem"; }
}  // namespace

void smemGenericRead(Warp& w, int lane, Cta* c, u32 off, u32 bytes) {
    if (!w.m->opt.checkUninitSmem) return;
    const u8* s = &c->smemInit[off];
    for (u32 i = 0; i < bytes; i++)
        if (s[i] != kInit)
            w.m->fault(&w, lane, shadowKind(s[i]),
                       strf("read of %s at offset %#x (%u bytes)", shadowText(s[i]), off + i, bytes));
}

void smemGenericWrite(Warp& w, int lane, Cta* c, u32 off, u32 bytes) {
    if (w.m->opt.checkInflight && std::memchr(&c->smemInit[off], kInflight, bytes))
        w.m->fault(&w, lane, "inflight_overwrite",
                   strf("store to shared offset %#x while a bulk copy is writing it", off));
    std::memset(&c->smemInit[off], kInit, bytes);
    u32 id = w.threadId(lane);
    u64 now = w.m->seq;
    for (u32 g = off / 16; g <= (off + bytes - 1) / 16; g++) {
        Granule& x = c->granules[g];
        if (x.readers && w.m->opt.checkInflight)
            w.m->fault(&w, lane, "inflight_overwrite",
                       strf("store to shared offset %#x while an asynchronous operation may still read it", off));
        x.writer = id;
        x.time = now;
    }
}

namespace {
const Warp* warpOfThread(Cluster* cl, u32 thread, int& lane) {
    for (auto& c : cl->ctas) {
        if (thread < c->threadBase || thread >= c->threadBase + c->warps.size() * kWarp) continue;
        u32 t = thread - c->threadBase;
        lane = int(t % kWarp);
        return c->warps[t / kWarp].get();
    }
    return nullptr;
}
}  // namespace

bool smemAsyncRead(Machine& m, Warp* w, Cta* c, u32 off, u32 bytes, const char* what, bool mayBeUnwritten) {
    bool written = true;
    if (m.opt.checkUninitSmem) {
        const u8* p = &c->smemInit[off];
        u32 i = 0;
        while (i + 8 <= bytes && *(const u64*)(p + i) == 0x0101010101010101ull) i += 8;
        while (i < bytes && p[i] == kInit) i++;
        written = i == bytes;
        if (!written && !(mayBeUnwritten && !std::memchr(p, kInflight, bytes))) {
            std::string msg =
                strf("%s reads %s at offset %#x of CTA rank %u", what, shadowText(p[i]), off + i, c->rank);
            if (w) m.fault(w, -1, shadowKind(p[i]), msg);
            m.faultAt(c, shadowKind(p[i]), msg);
        }
    }
    if (!m.opt.checkProxy) return written;
    for (u32 g = off / 16; g <= (off + bytes - 1) / 16; g++) {
        Granule& x = c->granules[g];
        if (!x.writer) continue;
        int lane = 0;
        const Warp* writer = warpOfThread(c->cluster, x.writer, lane);
        bool fenced = !writer || writer->fenceTime[lane] > x.time;
        bool late = false;
        // A fence by the issuing thread, after synchronising with the writer, orders
        // the write as well; shipped kernels use both forms.
        if (!fenced && w && !m.opt.strictProxy)
            for (int l = 0; l < kWarp && !fenced; l++) fenced = w->fenceTime[l] > x.time;
        if (fenced && writer && w && w->order)
            late = !(fenced = orderFenced(*w, c, g, *writer, lane, x.time, m.opt.strictProxy));
        if (!fenced) {
            std::string msg = strf(
                "%s reads shared offset %#x, written through the generic proxy by warp %u lane %d without a later "
                "fence.proxy.async%s",
                what, g * 16, writer->id, lane,
                late ? " (there is one, but nothing orders it between the write and the read)" : "");
            if (w) m.fault(w, -1, "proxy_fence", msg);
            m.faultAt(c, "proxy_fence", msg);
        }
        x.writer = 0;  // checked once; stays clean until the next generic write
    }
    return written;
}

void smemAsyncWriteBegin(Machine& m, Warp* w, Cta* c, u32 off, u32 bytes, const char* what) {
    auto fail = [&](const char* msg, u32 at) {
        std::string t = strf("%s writes shared offset %#x of CTA rank %u %s", what, at, c->rank, msg);
        if (w) m.fault(w, -1, "inflight_overwrite", t);
        m.faultAt(c, "inflight_overwrite", t);
    };
    if (m.opt.checkInflight && std::memchr(&c->smemInit[off], kInflight, bytes))
        fail("while another bulk copy is writing it", off);
    std::memset(&c->smemInit[off], kInflight, bytes);
    for (u32 g = off / 16; g <= (off + bytes - 1) / 16; g++) {
        Granule& x = c->granules[g];
        if (x.readers && m.opt.checkInflight) fail("while another asynchronous operation may still read it", g * 16);
        x.writer = 0;
    }
}
void smemAsyncWriteEnd(Cta* c, u32 off, u32 bytes) { std::memset(&c->smemInit[off], kInit, bytes); }

void holdReads(const SmemRange& r) {
    for (u32 g = r.begin / 16; g <= (r.end - 1) / 16; g++) r.cta->granules[g].readers++;
}
void releaseReads(const SmemRange& r) {
    for (u32 g = r.begin / 16; g <= (r.end - 1) / 16; g++) r.cta->granules[g].readers--;
}

u8* resolve(Warp& w, int lane, Space space, u64 addr, u32 bytes, bool write) {
    if (space == Space::Generic) {
        if (isSharedGeneric(addr))
            space = Space::Shared, addr &= 0xffffffffu;
        else if (isLocalGeneric(addr))
            space = Space::Local, addr &= 0xffffffffu;
        else
            space = Space::Global;
    }
    if (addr % bytes && std::has_single_bit(bytes))
        w.m->fault(&w, lane, "misaligned", strf("%u-byte access at misaligned address %#lx", bytes, addr));
    switch (space) {
        case Space::Shared: {
            Cta* c = ctaOfSmem(w, lane, u32(addr));
            u32 off = smemOffset(w, lane, c, u32(addr), bytes);
            if (write)
                smemGenericWrite(w, lane, c, off, bytes);
            else
                smemGenericRead(w, lane, c, off, bytes);
            return &c->smem[off];
        }
        case Space::Local:
        case Space::Param: {
            u32 per = w.cta->cluster->launch->kernel->localBytes;
            if (addr + bytes > per)
                w.m->fault(&w, lane, "local_bounds", strf("local access at %#lx, the frame has %u bytes", addr, per));
            return &w.local[size_t(lane) * per + addr];
        }
        default: return w.m->global(&w, lane, addr, bytes, write);
    }
}

}  // namespace ptx_emulator
