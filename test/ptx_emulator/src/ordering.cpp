#include "ordering.hpp"

#include <algorithm>
#include "lanes.hpp"

namespace ptx_emulator {

// ----------------------------------------------------------------------------- clocks --
namespace {
void raise(Clock::Entry& e, u32 some, u32 mask) {
    if (some > e.all) {
        // Lanes seen up to different times are kept with the later one, which can only hide a race.
        e.mask |= mask;
        e.some = std::max(e.some, some);
    }
    if (e.mask == ~0u) e.all = std::max(e.all, e.some);
    if (e.some <= e.all) e.some = e.mask = 0;
}
void join(Clock::Entry& e, const Clock::Entry& o) {
    e.all = std::max(e.all, o.all);
    e.fenced = std::max(e.fenced, o.fenced);
    raise(e, o.some, o.mask);
}
bool covers(const Clock::Entry& e, const Clock::Entry& o) {
    return e.all >= o.all && e.fenced >= o.fenced && (o.some <= e.all || (e.some >= o.some && !(o.mask & ~e.mask)));
}
bool covers(const Clock::View& c, const Clock::View& o) {
    for (size_t i = 0; i < o.warps.size(); i++)
        if (i >= c.warps.size() || !covers(c.warps[i], o.warps[i])) return false;
    for (size_t i = 0; i < o.queues.size(); i++)
        if (o.queues[i] && (i >= c.queues.size() || c.queues[i] < o.queues[i])) return false;
    return true;
}
bool covers(const Clock& c, const Clock& o) {
    if (!covers(c.here, o.here)) return false;
    for (auto& [cluster, view] : o.clusters) {
        auto it = c.clusters.find(cluster);
        if (it == c.clusters.end() || !covers(it->second, view)) return false;
    }
    return true;
}
}  // namespace

void Clock::View::join(const View& o) {
    if (warps.size() < o.warps.size()) warps.resize(o.warps.size());
    for (size_t i = 0; i < o.warps.size(); i++) ptx_emulator::join(warps[i], o.warps[i]);
    if (queues.size() < o.queues.size()) queues.resize(o.queues.size());
    for (size_t i = 0; i < o.queues.size(); i++) queues[i] = std::max(queues[i], o.queues[i]);
}
void Clock::join(const Clock& o) {
    here.join(o.here);
    for (auto& [cluster, view] : o.clusters) clusters[cluster].join(view);
}
void Clock::see(u32 queue, u32 count) {
    if (queue >= here.queues.size()) here.queues.resize(queue + 1);
    here.queues[queue] = std::max(here.queues[queue], count);
}

bool seen(const Clock::Entry& e, Access a) {
    if (e.all >= a.time()) return true;
    if (e.some < a.time() || a.lane() == Access::kAllLanes) return false;
    // Of an access by several lanes nobody knows which: more than one must have synchronised.
    return a.lane() < kWarp ? e.mask >> a.lane() & 1 : (e.mask & (e.mask - 1)) != 0;
}

SmemOrder::SmemOrder(u32 bytes, u32 warps)
    : words(bytes / 4 + 4),
      granules(bytes / 16 + 1),
      wordRead(warps),
      granuleRead(warps),
      wordColumns(bytes / 1024 + 1),
      granuleColumns(bytes / 1024 + 1),
      kinds(bytes / 1024 + 1) {}

void orderStart(Cluster* cl) {
    size_t perCta = cl->ctas[0]->warps.size();
    for (auto& c : cl->ctas) {
        c->order = std::make_unique<SmemOrder>(u32(c->smem.size()), u32(perCta));
        for (auto& w : c->warps) {
            w->order = std::make_unique<WarpOrder>();
            w->order->index = u32(c->rank * perCta + w->id);
            w->order->sets.resize(1);
            w->order->sets[0].mask = ~0u;
            w->order->sets[0].seen.here.warps.resize(cl->ctas.size() * perCta);
            w->order->sites.resize(256);
        }
    }
}

// -------------------------------------------------------------------- synchronisation --
void orderRelease(Warp& w, u32 lanes, Clock& into) {
    WarpOrder& o = *w.order;
    for (auto& s : o.sets)
        if (u32 m = s.mask & lanes) {
            into.join(s.seen);
            raise(into.here.warps[o.index], o.now, m);
        }
    if (!(w.live & ~lanes)) raise(into.here.warps[o.index], o.now, ~0u);
    o.now++;
}

void orderFence(Warp& w, u32 lanes, Scope scope) {
    if (!w.order) return;
    WarpOrder& o = *w.order;
    for (size_t i = 0, n = o.sets.size(); i < n; i++)
        if (o.sets[i].mask & lanes) {
            Clock c = o.sets[i].relaxed;
            orderAcquire(w, o.sets[i].mask & lanes, c);
        }
    Clock c;
    orderRelease(w, lanes, c);
    for (auto& s : o.sets)
        if (s.mask & lanes) s.fenced = c, s.fencedScope = scope;
}

void orderIssue(Warp& w, int lane, Clock& into) {
    if (!w.order) return;
    Clock seen = w.order->of(lane).seen;
    seen.here.warps[w.order->index] = {};
    into.join(seen);
}

void orderReleaseRelaxed(Warp& w, u32 lanes, Clock& into) {
    for (auto& s : w.order->sets)
        if (s.mask & lanes) into.join(s.fenced);
}

namespace {
// Sets of lanes that will know c, and others that will not.
void learn(Warp& w, u32 lanes, const Clock& c, Clock WarpOrder::Lanes::* where) {
    WarpOrder& o = *w.order;
    for (size_t i = 0, n = o.sets.size(); i < n; i++) {
        if (!(o.sets[i].mask & lanes) || covers(o.sets[i].*where, c)) continue;
        if (u32 rest = o.sets[i].mask & ~lanes; rest & w.live) {
            WarpOrder::Lanes copy = o.sets[i];
            copy.mask = rest;
            o.sets[i].mask &= lanes;
            o.sets.push_back(std::move(copy));
        }
        (o.sets[i].*where).join(c);
    }
}
}  // namespace

void orderAcquire(Warp& w, u32 lanes, const Clock& c) { learn(w, lanes, c, &WarpOrder::Lanes::seen); }
void orderRelaxedRead(Warp& w, u32 lanes, const Clock& c) { learn(w, lanes, c, &WarpOrder::Lanes::relaxed); }

void orderWarpSync(Warp& w, u32 lanes) {
    WarpOrder& o = *w.order;
    if (o.sets.size() == 1 && !o.dirty) return;
    bool all = !(w.live & ~lanes);
    size_t first = 0;
    while (!(o.sets[first].mask & lanes)) first++;
    WarpOrder::Lanes& s = o.sets[first];
    u32 joined = s.mask & lanes;
    for (size_t i = first + 1; i < o.sets.size();) {
        u32 m = o.sets[i].mask & lanes;
        if (!m) {
            i++;
            continue;
        }
        s.seen.join(o.sets[i].seen);
        s.fenced.join(o.sets[i].fenced);
        s.fencedScope = std::max(s.fencedScope, o.sets[i].fencedScope);
        s.relaxed.join(o.sets[i].relaxed);
        s.tensorFenced.join(o.sets[i].tensorFenced);
        joined |= m;
        o.sets[i].mask &= ~lanes;
        if (!(o.sets[i].mask & w.live)) {
            if (i != o.sets.size() - 1) o.sets[i] = std::move(o.sets.back());
            o.sets.pop_back();
        } else {
            i++;
        }
    }
    s.mask |= joined;
    raise(s.seen.here.warps[o.index], o.now++, all ? ~0u : joined);
    if (all) {
        if (first) std::swap(o.sets[0], o.sets[first]);
        o.sets.resize(1);
        o.sets[0].mask = ~0u;
        o.dirty = false;
    }
}

// ----------------------------------------------------------------------------- reports --
namespace {
std::string describe(Warp& w, Access a) {
    Cluster* cl = w.cta->cluster;
    if (a.who() == Access::kNotWaited)
        return strf("a cp.async of lane %u that its thread has not waited for, nor any mbarrier", a.lane());
    if (a.isQueue()) {
        for (auto& c : cl->ctas) {
            if (c->tensorQueue == a.queue()) return strf("tcgen05.commit number %u of CTA rank %u", a.time(), c->rank);
            for (size_t i = 0; i < c->mbarIndex.size(); i++)
                if (int k = c->mbarIndex[i]; k >= 0 && c->mbars[size_t(k)].queue == a.queue())
                    return strf("phase %u of the mbarrier at shared offset %#zx of CTA rank %u", a.time() - 1, i * 8,
                                c->rank);
        }
        return "a phase of an mbarrier that no longer exists";
    }
    size_t perCta = w.cta->warps.size();
    const Warp& q = *cl->ctas[a.warp() / perCta]->warps[a.warp() % perCta];
    std::string who = strf("warp %u", q.id);
    if (q.cta != w.cta) who += strf(" of CTA rank %u", q.cta->rank);
    if (a.lane() < kWarp) who += strf(" lane %u", a.lane());
    const Kernel& k = *cl->launch->kernel;
    const char* sep = " (PTX line";
    for (auto& [time, pc] : q.order->sites)
        if (time == a.time() && k.code[pc].line) {
            who += strf("%s %u `%s`", sep, k.code[pc].line, k.text[pc].c_str());
            sep = ",";
        }
    return who + (*sep == ',' ? ")" : "");
}

[[noreturn]] void race(Warp& w, int lane, Cta* c, u32 off, const char* what, const char* other, Access a) {
    w.m->fault(&w, lane, "race",
               strf("%s at shared offset %#x of CTA rank %u is not ordered after %s by %s", what, off, c->rank, other,
                    describe(w, a).c_str()));
}

// Is `a` ordered before what `lane` (-1: the warp) does now?
bool known(WarpOrder& o, WarpOrder::Lanes& s, int lane, Access a) {
    if (!a || a.bits == s.known) return true;
    if (a.who() == Access::kNotWaited) return false;
    bool ok;
    if (a.isQueue()) {
        ok = a.queue() < s.seen.here.queues.size() && s.seen.here.queues[a.queue()] >= a.time();
    } else {
        if (a.warp() == o.index &&
            (lane < 0 || u32(lane) == a.lane() || (a.instr() && a.time() == o.now && a.instr() == o.instr) ||
             (a.instr() && a.lane() >= kWarp)))
            return true;  // program order, the same instruction, or a store of several lanes, this one or its like
        const Clock::Entry& e = s.seen.here.warps[a.warp()];
        ok = seen(e, a);
        if (a.warp() == o.index) return ok;
    }
    if (ok) s.known = a.bits;
    return ok;
}

constexpr u32 kPartOfWord = 34;  // in a column of reads
Access readBy(u32 warp, u32 stamp) {
    u32 lane = stamp & 63;
    return Access::byWarp(warp, stamp >> 6, lane == kPartOfWord ? Access::kSeveralLanes : lane, 0, 15);
}

struct Checker {
    Warp& w;
    WarpOrder& o;
    Cta* c;
    SmemOrder& s;
    const char* what;
    u32 base;  // index in the cluster of the CTA's warp 0

    Checker(Warp& w, Cta* c, const char* what)
        : w(w), o(*w.order), c(c), s(*c->order), what(what), base(u32(c->rank * c->warps.size())) {}

    // After every write that touches [off, end), inside one KiB.
    void writes(WarpOrder::Lanes& l, int lane, u32 off, u32 end, u32 bytes = 15) {
        u8 k = s.kinds[off / 1024];
        if (k & 1 << SmemOrder::WordWrite) {
            Access* p = s.wordWrite.get(s.words);
            for (u32 i = off / 4; i <= (end - 1) / 4; i++)
                if (p[i].bits != l.known &&
                    (p[i].bytes() & bytes || p[i].isQueue() || p[i].who() == Access::kNotWaited) &&
                    !known(o, l, lane, p[i]))
                    race(w, lane, c, i * 4, what, "the write", p[i]);
        }
        if (k & 1 << SmemOrder::GranuleWrite) {
            Access* p = s.granuleWrite.get(s.granules);
            for (u32 i = off / 16; i <= (end - 1) / 16; i++)
                if (p[i].bits != l.known && !known(o, l, lane, p[i]))
                    race(w, lane, c, std::max(off, i * 16), what, "the write that completes", p[i]);
        }
    }
    // ... and every read.
    void reads(WarpOrder::Lanes& l, int lane, u32 off, u32 end, bool partial = false) {
        u32 kib = off / 1024;
        auto column = [&](u32 warp, const u32* p, u32 size) {
            u32 from = off / size, to = (end - 1) / size + 1, top = 0;
            for (u32 i = from; i < to; i++) top = std::max(top, p[i]);
            if (!top || (l.seen.here.warps[base + warp].all >= top >> 6)) return;
            for (u32 i = from; i < to; i++)
                if (p[i] && !(partial && (p[i] & 63) == kPartOfWord) && !known(o, l, lane, readBy(base + warp, p[i])))
                    race(w, lane, c, std::max(off, i * size), what, "the read", readBy(base + warp, p[i]));
        };
        for (u64 m = s.wordColumns[kib]; m; m &= m - 1) {
            u32 q = u32(std::countr_zero(m));
            column(q, s.wordRead[q].get(s.words), 4);
        }
        for (u64 m = s.granuleColumns[kib]; m; m &= m - 1) {
            u32 q = u32(std::countr_zero(m));
            column(q, s.granuleRead[q].get(s.granules), 16);
        }
        if (s.kinds[kib] & 1 << SmemOrder::RemoteRead)
            for (u32 i = off / 4; i <= (end - 1) / 4; i++)
                if (Access a = s.remoteRead.get(s.words)[i]; !known(o, l, lane, a))
                    race(w, lane, c, i * 4, what, "the read", a);
        if (s.kinds[kib] & 1 << SmemOrder::QueueRead)
            for (u32 i = off / 16; i <= (end - 1) / 16; i++)
                if (Access a = s.queueRead.get(s.granules)[i]; !known(o, l, lane, a))
                    race(w, lane, c, i * 16, what, "the read that completes", a);
    }
    template <class F>
    static void eachKib(u32 off, u32 bytes, F f) {
        for (u32 end = off + bytes; off < end;) {
            u32 stop = std::min(end, (off / 1024 + 1) * 1024);
            f(off, stop);
            off = stop;
        }
    }
    void mark(u32 off, u32 bytes, SmemOrder::Kind k) {
        for (u32 i = off / 1024; i <= (off + bytes - 1) / 1024; i++) s.kinds[i] |= u8(1 << k);
    }
};

// Shared memory that a lane's address names; false when the access itself will fail.
bool locate(Warp& w, const Inst& in, int l, u32 bytes, Cta*& c, u32& off) {
    const u8* a = w.src(in.a);
    u64 addr = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
    if (Space(in.space) == Space::Generic ? !isSharedGeneric(addr) : Space(in.space) != Space::Shared) return false;
    u32 rank = u32(addr) >> kSmemRankShift;
    if (rank >= w.cta->cluster->ctas.size()) return false;
    c = w.cta->cluster->ctas[rank].get();
    off = u32(addr) & kSmemOffsetMask;
    return u64(off) + bytes <= c->smem.size();
}
}  // namespace

void orderNote(Warp& w) {
    WarpOrder& o = *w.order;
    o.dirty = true;
    std::pair<u32, u32> site{o.now, w.pc};
    if (o.siteCount && o.sites[(o.siteCount - 1) % o.sites.size()] == site) return;
    o.sites[o.siteCount++ % o.sites.size()] = site;
}

// ------------------------------------------------------------------------- proxy fences --
void orderProxyFence(Warp& w, u32 lanes, bool shared, bool global) {
    if (!w.order) return;
    WarpOrder& o = *w.order;
    o.dirty = true;
    if (global) {
        // All that the thread has seen, and what it has written itself.
        auto fence = [](Clock::Entry& e) { e.fenced = std::max({e.fenced, e.all, e.some}); };
        for (auto& s : o.sets) {
            if (!(s.mask & lanes)) continue;
            for (auto& e : s.seen.here.warps) fence(e);
            for (auto& [cluster, view] : s.seen.clusters)
                for (auto& e : view.warps) fence(e);
            s.seen.here.warps[o.index].fenced = o.now;
        }
    }
    if (!shared) {
        if (global) o.now++;
        return;
    }
    if (o.fences.size() == WarpOrder::kFences) o.fences.pop_front();
    o.fences.push_back({w.m->seq, o.now, lanes, {}});
    for (auto& s : o.sets)
        if (s.mask & lanes) o.fences.back().seen.join(s.seen);
    if (global) o.now++;
}

bool orderFenced(Warp& reader, Cta* c, u32 granule, const Warp& writer, int lane, u64 seq, bool strict) {
    WarpOrder &mine = *reader.order, &theirs = *writer.order;
    auto forgotten = [&](const WarpOrder& o) { return o.fences.size() == WarpOrder::kFences && o.fences[0].seq > seq; };
    for (auto& f : theirs.fences) {
        if (f.seq <= seq || !(f.lanes >> lane & 1)) continue;
        Access fence = Access::byWarp(theirs.index, f.time, u32(lane), 0, 15);
        if (&reader == &writer) return true;
        for (auto& s : mine.sets)
            if (seen(s.seen.here.warps[theirs.index], fence)) return true;
    }
    if (forgotten(theirs)) return true;
    if (strict) return false;
    const Access* words = c->order->wordWrite.get(c->order->words) + size_t(granule) * 4;
    for (auto& f : mine.fences) {
        if (f.seq <= seq) continue;
        bool all = true;
        for (u32 i = 0; i < 4 && all; i++) {
            Access a = words[i];
            if (!a || (!a.isQueue() && a.warp() == mine.index)) continue;
            all = a.isQueue() ? a.queue() < f.seen.here.queues.size() && f.seen.here.queues[a.queue()] >= a.time()
                              : a.who() != Access::kNotWaited && seen(f.seen.here.warps[a.warp()], a);
        }
        if (all) return true;
    }
    return forgotten(mine);
}

// ------------------------------------------------------------------------ tensor memory --
void orderTensorFence(Warp& w, u32 lanes, bool after) {
    if (!w.order) return;
    WarpOrder& o = *w.order;
    o.dirty = true;
    if (after) {
        for (auto& s : o.sets)
            if (s.mask & lanes) s.tensorFenced = s.seen;
        return;
    }
    if (o.tensorFences.size() == WarpOrder::kFences) o.tensorFences.pop_front();
    o.tensorFences.push_back({++o.tensorSeq, o.now, lanes, {}});
}
u64 orderTensorUse(Warp& w) { return w.order ? ++w.order->tensorSeq : 0; }

bool orderTensorWritten(Warp& w, u32 queue, u32 commit) {
    if (!w.order) return true;
    for (auto& s : w.order->sets)
        if ((s.mask & w.live) && (queue >= s.tensorFenced.here.queues.size() || s.tensorFenced.here.queues[queue] < commit))
            return false;
    return true;
}
bool orderTensorUsed(Warp& w, int lane, const Warp& other, u64 seq) {
    if (!w.order || &w == &other) return true;
    const WarpOrder& theirs = *other.order;
    if (theirs.tensorFences.size() == WarpOrder::kFences && theirs.tensorFences[0].seq > seq) return true;
    const Clock& known = w.order->of(lane < 0 ? std::countr_zero(w.live) : lane).tensorFenced;
    if (theirs.index >= known.here.warps.size()) return false;
    for (auto& f : theirs.tensorFences)
        if (f.seq > seq && seen(known.here.warps[theirs.index], Access::byWarp(theirs.index, f.time, Access::kAllLanes, 0, 15)))
            return true;
    return false;
}

bool orderSeen(Warp& w, Access a) {
    for (auto& s : w.order->sets)
        if ((s.mask & w.live) && !known(*w.order, s, -1, a)) return false;
    return true;
}

// ---------------------------------------------------------------------------- accesses --
Access orderStamp(Warp& w, int lane) {
    WarpOrder& o = *w.order;
    o.dirty = true;
    return Access::byWarp(o.index, o.now, lane < 0 ? Access::kAllLanes : u32(lane), 0, 15);
}

void orderAccess(Warp& w, const Inst& in, u32 lanes, u32 bytes, bool write) {
    WarpOrder& o = *w.order;
    Cta* c;
    u32 off = 0;
    u32 firstLane = u32(std::countr_zero(lanes));
    if (!locate(w, in, int(firstLane), bytes, c, off)) return;
    o.instr = o.instr % 255 + 1;
    orderNote(w);
    // One word wanted by the whole warp counts once, for all lanes.
    bool uniform = lanes == w.live && (lanes & (lanes - 1));
    u32 first = off;
    forLanes(lanes, [&](int l) {
        Cta* q;
        u32 at;
        uniform &= locate(w, in, l, bytes, q, at) && q == c && at == first;
    });
    u32 shape = bytes >= 4 ? 15u : ((1u << bytes) - 1);
    forLanes(uniform ? 1u << firstLane : lanes, [&](int l) {
        if (!locate(w, in, l, bytes, c, off)) return;
        Checker k(w, c, write ? "the store" : "the load");
        orderTouch(w, l, c);
        WarpOrder::Lanes& s = o.sets.size() == 1 ? o.sets[0] : o.of(l);
        u32 mask = bytes >= 4 ? 15u : shape << (off & 3);
        k.writes(s, l, off, off + bytes, mask);
        if (write) k.reads(s, l, off, off + bytes, bytes < 4);
        u32 lane = uniform ? Access::kAllLanes : u32(l);
        u32 from = off / 4, to = (off + bytes - 1) / 4;
        if (write) {
            Access a = Access::byWarp(o.index, o.now, lane, o.instr, mask);
            Access* p = k.s.wordWrite.get(k.s.words);
            k.s.kinds[off / 1024] |= 1 << SmemOrder::WordWrite;
            for (u32 i = from; i <= to; i++) {
                Access old = p[i];
                p[i] = a;
                if (old.who() == a.who() && old.time() == a.time() && old.lane() != a.lane())
                    p[i] = Access::byWarp(o.index, o.now, Access::kSeveralLanes, o.instr, mask | old.bytes());
            }
        } else if (c == w.cta) {
            u32* p = k.s.wordRead[w.id].get(k.s.words);
            k.s.wordColumns[off / 1024] |= u64(1) << w.id;
            u32 stamp = o.now << 6 | (bytes < 4 ? kPartOfWord : lane);
            for (u32 i = from; i <= to; i++) {
                bool shared = p[i] >> 6 == o.now && p[i] != stamp;
                p[i] = shared
                           ? o.now << 6 | ((p[i] & 63) == Access::kAllLanes ? Access::kAllLanes : Access::kSeveralLanes)
                           : stamp;
            }
        } else {
            k.mark(off, bytes, SmemOrder::RemoteRead);
            for (u32 i = from; i <= to; i++)
                k.s.remoteRead.get(k.s.words)[i] = Access::byWarp(o.index, o.now, lane, 0, 15);
        }
    });
}

void orderStrong(Warp& w, const Inst& in, u32 lanes, bool read, bool write) {
    forLanes(lanes, [&](int l) {
        Cta* c;
        u32 off;
        if (!locate(w, in, l, 4, c, off)) return;
        Clock& word = c->strongWords[off / 4];
        if (read) orderAcquire(w, 1u << l, word);
        if (write) orderRelease(w, 1u << l, word);
    });
}

void orderAsyncRead(Warp& w, int lane, Cta* c, u32 off, u32 bytes, const char* what) {
    if (!w.order) return;
    Checker k(w, c, what);
    auto& s = k.o.of(lane < 0 ? std::countr_zero(w.live) : lane);
    k.eachKib(off, bytes, [&](u32 from, u32 to) { k.writes(s, lane, from, to); });
}

void orderAsyncWrite(Warp& w, int lane, Cta* c, u32 off, u32 bytes, const char* what) {
    if (!w.order) return;
    Checker k(w, c, what);
    auto& s = k.o.of(lane < 0 ? std::countr_zero(w.live) : lane);
    k.eachKib(off, bytes, [&](u32 from, u32 to) {
        k.writes(s, lane, from, to);
        k.reads(s, lane, from, to);
    });
}

void orderReadDone(Warp& w, int lane, Cta* c, u32 off, u32 bytes) {
    if (!w.order) return;
    WarpOrder& o = *w.order;
    SmemOrder& s = *c->order;
    orderNote(w);
    u32 from = off / 16, to = (off + bytes - 1) / 16;
    u32 code = lane < 0 ? Access::kAllLanes : u32(lane);
    for (u32 i = off / 1024; i <= (off + bytes - 1) / 1024; i++) {
        if (c == w.cta)
            s.granuleColumns[i] |= u64(1) << w.id;
        else
            s.kinds[i] |= 1 << SmemOrder::QueueRead;
    }
    if (c == w.cta) {
        u32* p = s.granuleRead[w.id].get(s.granules);
        std::fill(p + from, p + to + 1, o.now << 6 | code);
    } else {
        Access* p = s.queueRead.get(s.granules);
        std::fill(p + from, p + to + 1, Access::byWarp(o.index, o.now, code, 0, 15));
    }
}

void orderAsyncRead(Warp& w, Cta* c, const std::vector<u32>& granules, size_t first, const char* what) {
    if (!w.order) return;
    Checker k(w, c, what);
    auto& s = k.o.of(std::countr_zero(w.act));
    for (size_t i = first; i < granules.size(); i++) k.writes(s, -1, granules[i] * 16, granules[i] * 16 + 16);
}
void orderReadDone(Warp& w, Cta* c, const std::vector<u32>& granules) {
    if (!w.order) return;
    orderNote(w);
    u32* p = c->order->granuleRead[w.id].get(c->order->granules);
    u32 stamp = w.order->now << 6 | Access::kAllLanes;
    for (u32 g : granules) {
        p[g] = stamp;
        c->order->granuleColumns[g / 64] |= u64(1) << w.id;
    }
}

void orderReadDone(Cta* c, u32 off, u32 bytes, u32 queue, u32 count) {
    if (!c->order) return;
    SmemOrder& s = *c->order;
    for (u32 i = off / 1024; i <= (off + bytes - 1) / 1024; i++) s.kinds[i] |= 1 << SmemOrder::QueueRead;
    Access* p = s.queueRead.get(s.granules);
    std::fill(p + off / 16, p + (off + bytes - 1) / 16 + 1, Access::byQueue(queue, count));
}

void orderWritten(Cta* c, u32 off, u32 bytes, u32 queue, u32 count) {
    if (!c->order) return;
    if (off % 16 || bytes % 16) return orderCopyDone(c, off, bytes, queue, count);
    SmemOrder& s = *c->order;
    for (u32 i = off / 1024; i <= (off + bytes - 1) / 1024; i++) s.kinds[i] |= 1 << SmemOrder::GranuleWrite;
    Access* p = s.granuleWrite.get(s.granules);
    std::fill(p + off / 16, p + (off + bytes) / 16, Access::byQueue(queue, count));
}

namespace {
void stampWords(Cta* c, u32 off, u32 bytes, Access a) {
    SmemOrder& s = *c->order;
    Access* p = s.wordWrite.get(s.words);
    s.kinds[off / 1024] |= 1 << SmemOrder::WordWrite;
    for (u32 i = off / 4; i <= (off + bytes - 1) / 4; i++) p[i] = a;
}
}  // namespace

void orderCopyStart(Warp& w, int lane, Cta* c, u32 off, u32 bytes) {
    if (!w.order) return;
    Checker k(w, c, "cp.async");
    auto& s = k.o.of(lane);
    k.writes(s, lane, off, off + bytes);
    k.reads(s, lane, off, off + bytes);
    orderNote(w);
    stampWords(c, off, bytes, Access::notWaited(u32(lane)));
}
void orderCopyDone(Warp& w, int lane, Cta* c, u32 off, u32 bytes) {
    if (w.order) stampWords(c, off, bytes, orderStamp(w, lane));
}
void orderCopyDone(Cta* c, u32 off, u32 bytes, u32 queue, u32 count) {
    if (c->order) stampWords(c, off, bytes, Access::byQueue(queue, count));
}

void orderTouch(Cta* c, Access a) {
    if (c->order) c->touched[a.who()] = a;
}
void orderTouch(Warp& w, int lane, Cta* c) {
    if (w.order && c != w.cta) c->touched[w.order->index + 1] = orderStamp(w, lane);
}

void orderExit(Machine& m, Cta* c) {
    Clock last;  // what any thread of the CTA has seen
    for (auto& w : c->warps)
        for (auto& s : w->order->sets) last.join(s.seen);
    for (auto& [who, a] : c->touched) {
        bool ok = a.isQueue() ? a.queue() < last.here.queues.size() && last.here.queues[a.queue()] >= a.time()
                              : seen(last.here.warps[a.warp()], a);
        if (!ok)
            m.faultAt(c, "dsmem_exited",
                      strf("the CTA exits without being ordered after the use of its shared memory or mbarriers by %s",
                           describe(*c->warps[0], a).c_str()));
    }
}

void orderMbarrierUse(Warp& w, int lane, Access init, const char* what, u32 off) {
    WarpOrder& o = *w.order;
    if (!known(o, o.of(lane < 0 ? std::countr_zero(w.live) : lane), lane, init))
        w.m->fault(
            &w, lane, "race",
            strf("%s uses the mbarrier at shared offset %#x without being ordered after its initialisation by %s", what,
                 off, describe(w, init).c_str()));
}

}  // namespace ptx_emulator
