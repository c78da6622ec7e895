// The happens-before check in global memory, where threads of all clusters and launches meet.
//
// What a cluster knows of another came through a strong access: a release publishes the clock of its thread with the
// word, at its scope, and an acquire of the same word, whose scope has to hold the releasing thread, takes it over.  A
// relaxed access publishes what the last fence covers, and is acquired by the next fence.  Launches are taken for
// different devices, so that between them only .sys counts.
//
// Weak accesses to a word are races unless one is ordered after the other, and so are a weak and a strong one.  A bulk
// copy reads as a thread does that had seen what its issuer had at the issue, and needs a fence.proxy.async behind
// ordinary writes; a bulk store ends for its thread with cp.async.bulk.wait_group (not .read).
#include <algorithm>
#include "lanes.hpp"
#include "machine.hpp"

namespace ptx_emulator {

GlobalWord& GlobalOrder::word(u64 address) {
    u64 index = address / 4;
    if (index / kPage != lastPage) {
        auto& page = pages[index / kPage];
        if (!page) page = std::make_unique<GlobalWord[]>(kPage);
        last = page.get();
        lastPage = index / kPage;
    }
    return last[index % kPage];
}

namespace {
constexpr u32 kPart = 1;  // bytes of a read: less than the word

const Clock::Entry* entryOf(const GlobalAccess& by, u32 cluster, u32 warp) {
    const Clock::View* view = &by.seen->here;
    if (cluster != by.cluster) {
        auto it = by.seen->clusters.find(cluster);
        if (it == by.seen->clusters.end()) return nullptr;
        view = &it->second;
    }
    return warp < view->warps.size() ? &view->warps[warp] : nullptr;
}

// Is the access ordered before this one?
bool ordered(const GlobalAccess& by, u32 cluster, Access a) {
    if (!a) return true;
    if (a.who() == Access::kNotWaited) return false;
    if (a.isQueue()) {
        const Clock::View* view = &by.seen->here;
        if (cluster != by.cluster) {
            auto it = by.seen->clusters.find(cluster);
            if (it == by.seen->clusters.end()) return false;
            view = &it->second;
        }
        return a.queue() < view->queues.size() && view->queues[a.queue()] >= a.time();
    }
    if (cluster == by.cluster && a.warp() == by.warp &&
        (by.lane < 0 || u32(by.lane) == a.lane() || (a.instr() && a.time() == by.now && a.instr() == by.instr) ||
         (a.instr() && a.lane() >= kWarp)))
        return true;  // program order, or the same instruction
    const Clock::Entry* e = entryOf(by, cluster, a.warp());
    return e && seen(*e, a);
}

Whereabouts whereabouts(const Cluster& cl) {
    Whereabouts out{cl.number, cl.launch->kernel, cl.launch->index, {}, {}};
    for (auto& c : cl.ctas) {
        out.ctas.push_back({c->id[0], c->id[1], c->id[2]});
        for (auto& w : c->warps) out.sites.push_back(w->order->sites);
    }
    return out;
}

std::string describe(const Whereabouts& at, Access a) {
    if (a.isQueue()) return "a bulk copy whose mbarrier has not been waited for";
    size_t perCta = at.sites.size() / at.ctas.size();
    auto& id = at.ctas[a.warp() / perCta];
    std::string who = strf("warp %zu of CTA (%u,%u,%u) of launch %u", a.warp() % perCta, id[0], id[1], id[2], at.launch);
    if (a.lane() < kWarp) who += strf(" lane %u", a.lane());
    const char* sep = " (PTX line";
    std::vector<u32> shown;
    for (auto& [time, pc] : at.sites[a.warp()])
        if (time == a.time() && at.kernel->code[pc].line && std::find(shown.begin(), shown.end(), pc) == shown.end()) {
            shown.push_back(pc);
            who += strf("%s %u `%s`", sep, at.kernel->code[pc].line, at.kernel->text[pc].c_str());
            sep = ",";
        }
    return who + (*sep == ',' ? ")" : "");
}
std::string describe(Machine& m, u32 cluster, Access a) {
    if (a.who() == Access::kNotWaited)
        return "a bulk store that its thread has not waited for with cp.async.bulk.wait_group (without .read)";
    for (auto& cl : m.clusters)
        if (cl->number == cluster) return describe(whereabouts(*cl), a);
    for (auto& at : m.globalOrder.exited)
        if (at.cluster == cluster) return describe(at, a);
    return "a CTA that has exited";
}

struct Check {
    Machine& m;
    const GlobalAccess& by;
    Warp* w;  // null when a copy runs
    const char* what;

    [[noreturn]] void fail(const char* kind, u64 address, const std::string& text) const {
        Region* r = m.findRegion(address, 1);
        std::string place = r ? strf(" (%s, byte %lu)", r->name.c_str(), address - r->begin) : "";
        m.fault(w, by.lane, kind, strf("%s at global address %#lx%s %s", what, address, place.c_str(), text.c_str()));
    }
    void race(u64 address, const char* other, u32 cluster, Access a) const {
        fail("race", address, strf("is not ordered after %s by %s", other, describe(m, cluster, a).c_str()));
    }
    // After the last write, of the bytes in `mask`; between strong accesses any order is right.
    void write(u64 address, const GlobalWord& g, bool strong, u32 mask = 15) const {
        if (!g.write || (strong && g.strong) || !(g.write.bytes() & mask || g.async)) return;
        if (!ordered(by, g.writeCluster, g.write)) race(address, "the write", g.writeCluster, g.write);
    }
    // ... and after the reads; which part of a word was read is not kept, so that parts are not compared.
    void reads(u64 address, const GlobalWord& g, u32 mask = 15) const {
        for (int i = 0; i < 2; i++)
            if (g.read[i] && !(mask != 15 && g.read[i].bytes() == kPart) && !ordered(by, g.readCluster[i], g.read[i]))
                race(address, "the read", g.readCluster[i], g.read[i]);
    }
    // The asynchronous proxy reads what ordinary stores have written.
    void proxy(u64 address, const GlobalWord& g) const {
        if (!g.write || g.async || !m.opt.checkProxy) return;
        const Clock::Entry* e = entryOf(by, g.writeCluster, g.write.warp());
        if (!e || e->fenced < g.write.time())
            fail("proxy_fence", address,
                 strf("reads what was written through the generic proxy, without a fence.proxy.async for global memory "
                      "in between, by %s",
                      describe(m, g.writeCluster, g.write).c_str()));
    }
};

void addReader(const GlobalAccess& by, GlobalWord& g, Access a) {
    int slot = -1;
    for (int i = 0; i < 2 && slot < 0; i++) {
        if (!g.read[i]) {
            slot = i;
        } else if (g.readCluster[i] == by.cluster && g.read[i].who() == a.who()) {  // a later read by the same
            if (!a.isQueue() && g.read[i].time() == a.time() && g.read[i].lane() != a.lane())
                a = Access::byWarp(a.warp(), a.time(), Access::kSeveralLanes, 0, a.bytes());
            slot = i;
        }
    }
    for (int i = 0; i < 2 && slot < 0; i++)
        if (ordered(by, g.readCluster[i], g.read[i])) slot = i;
    if (slot < 0) slot = 1;
    g.read[slot] = a;
    g.readCluster[slot] = by.cluster;
}

bool readOnly(Machine& m, u64 address, u32 bytes) {
    Region* r = m.opt.checkBounds ? m.findRegion(address, bytes) : nullptr;
    return r && r->readOnly;
}

GlobalAccess threadOf(Warp& w, int lane, std::shared_ptr<Clock> seen) {
    const WarpOrder& o = *w.order;
    const Cluster& cl = *w.cta->cluster;
    return {cl.number, o.index, o.now, o.instr, cl.launch->index, lane, std::move(seen)};
}

// A clock that lives elsewhere.
std::shared_ptr<Clock> borrowed(Clock& c) { return {std::shared_ptr<Clock>(), &c}; }

template <class F>
void eachWord(u64 address, u32 bytes, F f) {
    for (u64 a = address & ~u64(3); a < address + bytes; a += 4) f(a);
}

// --- strong accesses ---------------------------------------------------------------
// Which clocks `scope` of a cluster lets it have, of what others have published.
bool reaches(const Published& p, const Cluster& cl, Scope scope) {
    bool publishedToUs = p.scope == Scope::Sys || (p.scope == Scope::Gpu && p.launch == cl.launch->index) ||
                         p.cluster == cl.number;
    bool acquiredFromThem = scope == Scope::Sys || (scope == Scope::Gpu && p.launch == cl.launch->index) ||
                            p.cluster == cl.number;
    return publishedToUs && acquiredFromThem;
}

Clock arrived(Machine& m, u64 address, const Cluster& cl, Scope scope) {
    Clock out;
    auto it = m.globalOrder.published.find(address / 4);
    if (it == m.globalOrder.published.end()) return out;
    for (auto& p : it->second) {
        if (!reaches(p, cl, scope)) continue;
        for (auto& [cluster, view] : p.clock) (cluster == cl.number ? out.here : out.clusters[cluster]).join(view);
    }
    return out;
}

// A store replaces what the word has published, a read-modify-write adds to it.
void publish(Machine& m, u64 address, const Cluster& cl, Scope scope, const Clock& c, bool add) {
    auto& all = m.globalOrder.published[address / 4];
    if (!add) all.clear();
    Published* mine = nullptr;
    for (auto& p : all)
        if (p.scope == scope && p.launch == cl.launch->index && p.cluster == cl.number) mine = &p;
    if (!mine) mine = &all.emplace_back(Published{scope, cl.launch->index, cl.number, {}});
    mine->clock[cl.number].join(c.here);
    for (auto& [cluster, view] : c.clusters) mine->clock[cluster].join(view);
}
}  // namespace

void orderGlobal(Warp& w, const Inst& in, u32 lanes, u32 bytes, bool read, bool write, Sem sem, Scope scope) {
    if (Space(in.space) != Space::Global && Space(in.space) != Space::Generic) return;
    Machine& m = *w.m;
    WarpOrder& o = *w.order;
    Cluster& cl = *w.cta->cluster;
    const u8* a = w.src(in.a);
    auto addressOf = [&](int l) { return (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm); };
    const bool strong = sem != Sem::Weak;
    bool any = false;
    forLanes(lanes, [&](int l) {
        u64 address = addressOf(l);
        if (Space(in.space) == Space::Generic && (isSharedGeneric(address) || isLocalGeneric(address))) return;
        if (readOnly(m, address, bytes)) return;
        if (!any) {
            any = true;
            o.instr = o.instr % 255 + 1;
            orderNote(w);
        }
        if (read && strong) {
            Clock c = arrived(m, address, cl, scope);
            if (sem == Sem::Acquire || sem == Sem::AcqRel)
                orderAcquire(w, 1u << l, c);
            else if (!c.clusters.empty() || !c.here.warps.empty())
                orderRelaxedRead(w, 1u << l, c);
        }
        GlobalAccess by = threadOf(w, l, borrowed(o.of(l).seen));
        Check check{m, by, &w, write ? "the store" : "the load"};
        u32 mask = bytes >= 4 ? 15u : ((1u << bytes) - 1) << (address & 3);
        eachWord(address, bytes, [&](u64 at) {
            GlobalWord& g = m.globalOrder.word(at);
            check.write(at, g, strong, mask);
            if (write) {
                check.reads(at, g, mask);
                Access now = Access::byWarp(o.index, o.now, u32(l), o.instr, mask);
                if (g.writeCluster == cl.number && g.write.who() == now.who() && g.write.time() == now.time() &&
                    g.write.lane() != now.lane())
                    now = Access::byWarp(o.index, o.now, Access::kSeveralLanes, o.instr, mask | g.write.bytes());
                g = {};
                g.write = now, g.writeCluster = cl.number, g.strong = strong;
            } else if (!strong) {
                addReader(by, g, Access::byWarp(o.index, o.now, u32(l), 0, mask == 15 ? 15 : kPart));
            }
        });
        if (write && strong) {
            Clock c;
            Scope at = scope;
            if (sem == Sem::Release || sem == Sem::AcqRel) {
                orderRelease(w, 1u << l, c);
            } else {
                orderReleaseRelaxed(w, 1u << l, c);
                at = std::min(scope, o.of(l).fencedScope);
            }
            publish(m, address, cl, at, c, read);
        }
    });
}

void orderExited(Machine& m, const Cluster& cl) {
    constexpr size_t kRemembered = 64;
    auto& exited = m.globalOrder.exited;
    if (exited.size() == kRemembered) exited.pop_front();
    exited.push_back(whereabouts(cl));
}

GlobalAccess orderGlobalIssue(Warp& w, int lane) {
    w.m->checkDependency(w, lane);
    if (!w.order) return {};
    orderNote(w);
    return threadOf(w, lane, std::make_shared<Clock>(w.order->of(lane).seen));
}

void orderGlobalLoad(Warp& w, const GlobalAccess& by, u64 address, u32 bytes, const char* what) {
    if (readOnly(*w.m, address, bytes)) return;
    Check check{*w.m, by, &w, what};
    eachWord(address, bytes, [&](u64 at) {
        GlobalWord& g = w.m->globalOrder.word(at);
        check.write(at, g, false);
        addReader(by, g, Access::byWarp(by.warp, by.now, u32(by.lane), 0, 15));
    });
}

void orderGlobalRead(Machine& m, const GlobalAccess& by, u64 address, u32 bytes, u32 queue, u32 count,
                     const char* what) {
    if (!by.seen || readOnly(m, address, bytes)) return;
    Check check{m, by, nullptr, what};
    const Access read = Access::byQueue(queue, count);
    eachWord(address, bytes, [&](u64 at) {
        GlobalWord& g = m.globalOrder.word(at);
        if (g.write) check.write(at, g, false), check.proxy(at, g);
        addReader(by, g, read);
    });
}

void orderGlobalWrite(Machine& m, const GlobalAccess& by, u64 address, u32 bytes, u32 serial, bool reduce,
                      const char* what) {
    if (!by.seen) return;
    Check check{m, by, nullptr, what};
    eachWord(address, bytes, [&](u64 at) {
        GlobalWord& g = m.globalOrder.word(at);
        check.write(at, g, reduce);
        check.reads(at, g);
        g = {};
        g.write = Access::notWaited(u32(by.lane), serial), g.writeCluster = by.cluster, g.strong = reduce, g.async = true;
    });
}

void orderGlobalWaited(Warp& w, int lane, u64 address, u32 bytes, u32 serial) {
    if (!w.order) return;
    Access now = orderStamp(w, lane);
    eachWord(address, bytes, [&](u64 at) {
        GlobalWord& g = w.m->globalOrder.word(at);
        if (g.write.who() == Access::kNotWaited && g.write.time() == serial) g.write = now;
    });
}

}  // namespace ptx_emulator
