// The engine: cluster launch, warp scheduling, divergence, events, reports.
#include "machine.hpp"

#include <algorithm>
#include <chrono>

#include "tmem.hpp"

namespace ptx_emulator {

// ----------------------------------------------------------------- reports --
void Machine::fault(Warp* w, int lane, const char* kind, const std::string& msg) {
    if (!w) throw EmuError(kind, strf("[%s] %s", kind, msg.c_str()));
    const Kernel& k = *w->cta->cluster->launch->kernel;
    u32 pc = std::min<u32>(w->pc, u32(k.code.size()) - 1);
    std::string laneText = lane >= 0 ? strf(" lane %d", lane) : "";
    throw EmuError(kind, strf("[%s] %s\n  at PTX line %u `%s`, kernel %.120s, CTA (%u,%u,%u) rank %u, warp %u%s", kind,
                              msg.c_str(), k.code[pc].line, k.text[pc].c_str(), k.name.c_str(), w->cta->id[0],
                              w->cta->id[1], w->cta->id[2], w->cta->rank, w->id, laneText.c_str()));
}
void Machine::faultAt(Cta* c, const char* kind, const std::string& msg) {
    throw EmuError(
        kind, strf("[%s] %s\n  in CTA (%u,%u,%u) rank %u, kernel %.120s (asynchronous operation)", kind, msg.c_str(),
                   c->id[0], c->id[1], c->id[2], c->rank, c->cluster->launch->kernel->name.c_str()));
}

namespace {
const char* blockName(Block b) {
    switch (b) {
        case Block::None: return "runnable";
        case Block::Converge: return "waiting for the other lanes of its warp";
        case Block::Mbarrier: return "waiting on mbarrier";
        case Block::NamedBarrier: return "waiting at barrier";
        case Block::WarpSync: return "waiting at bar.warp.sync";
        case Block::ClusterBarrier: return "waiting at barrier.cluster";
        case Block::BulkGroup: return "waiting for a bulk/cp.async group";
        case Block::Tmem: return "waiting for tensor memory";
        case Block::GridDependency: return "waiting at griddepcontrol.wait";
    }
    return "?";
}
}  // namespace

std::string Machine::deadlockReport() {
    std::string out;
    int shown = 0;
    const Launch* named = nullptr;
    for (auto& cl : clusters) {
        if (cl->launch != named) out += strf("\n  kernel %.120s", cl->launch->kernel->name.c_str());
        named = cl->launch;
        for (auto& c : cl->ctas)
            for (auto& w : c->warps)
                for (int g = 0; g < w->ng && shown < 60; g++) {
                    const Kernel& k = *cl->launch->kernel;
                    const Group& q = w->groups[g];
                    u32 pc = std::min<u32>(q.pc, u32(k.code.size()) - 1);
                    out += strf("\n  CTA (%u,%u,%u) warp %u lanes %08x: %s", c->id[0], c->id[1], c->id[2], w->id,
                                q.mask, blockName(q.block));
                    if (q.block == Block::Mbarrier) {
                        u32 off = u32(q.info) & kSmemOffsetMask;
                        int idx = c->mbarIndex[off / 8];
                        if (idx >= 0) {
                            Mbarrier& b = c->mbars[size_t(idx)];
                            out += strf(" %#x (phase %lu, %ld arrivals and %ld tx bytes missing)", off, b.phase,
                                        b.pending, b.tx);
                        }
                    } else if (q.block == Block::NamedBarrier) {
                        NamedBarrier& b = c->bars[q.info & 15];
                        out += strf(" %lu (%u of %u threads)", q.info & 15, b.arrived, b.expected);
                    }
                    out += strf(", PTX line %u `%.60s`", k.code[pc].line, k.text[pc].c_str());
                    shown++;
                }
    }
    return out;
}

// ------------------------------------------------------------------ launch --
void Machine::initSpecials(Warp& w) {
    Cta& c = *w.cta;
    Launch& l = *c.cluster->launch;
    u32 clusterSize = u32(c.cluster->ctas.size());
    u32 nclusters[3];
    for (int i = 0; i < 3; i++) nclusters[i] = l.grid[i] / l.cluster[i];
    auto axis = [](const std::string& n) { return n.back() - 'x'; };
    for (auto& [name, off] : l.kernel->specials) {
        u32* r = (u32*)w.reg(off);
        auto fill = [&](u32 v) { std::fill_n(r, kWarp, v); };
        if (name == "%param_base") {
            for (int i = 0; i < kWarp; i++) ((u64*)r)[i] = u64(l.params);
            continue;
        }
        if (name == "%gridid") {
            for (int i = 0; i < kWarp; i++) ((u64*)r)[i] = l.index;
            continue;
        }
        if (name.rfind("%tid.", 0) == 0) {
            for (u32 i = 0; i < kWarp; i++) {
                u32 t = w.id * kWarp + i;
                r[i] = axis(name) == 0   ? t % l.block[0]
                       : axis(name) == 1 ? t / l.block[0] % l.block[1]
                                         : t / l.block[0] / l.block[1];
            }
            continue;
        }
        if (name == "%laneid") {
            for (u32 i = 0; i < kWarp; i++) r[i] = i;
            continue;
        }
        if (name.rfind("%lanemask_", 0) == 0) {
            for (u32 i = 0; i < kWarp; i++) {
                u32 eq = 1u << i, lt = eq - 1;
                std::string k = name.substr(10);
                r[i] = k == "eq" ? eq : k == "lt" ? lt : k == "le" ? (lt | eq) : k == "gt" ? ~(lt | eq) : ~lt;
            }
            continue;
        }
        if (name == "%smem_base")
            fill(c.rank << kSmemRankShift);
        else if (name.rfind("%ntid.", 0) == 0)
            fill(l.block[axis(name)]);
        else if (name.rfind("%ctaid.", 0) == 0)
            fill(c.id[axis(name)]);
        else if (name.rfind("%nctaid.", 0) == 0)
            fill(l.grid[axis(name)]);
        else if (name.rfind("%clusterid.", 0) == 0)
            fill(c.cluster->id[axis(name)]);
        else if (name.rfind("%nclusterid.", 0) == 0)
            fill(nclusters[axis(name)]);
        else if (name.rfind("%cluster_ctaid.", 0) == 0)
            fill(c.id[axis(name)] % l.cluster[axis(name)]);
        else if (name.rfind("%cluster_nctaid.", 0) == 0)
            fill(l.cluster[axis(name)]);
        else if (name == "%cluster_ctarank")
            fill(c.rank);
        else if (name == "%cluster_nctarank")
            fill(clusterSize);
        else if (name == "%warpid")
            fill(w.id);
        else if (name == "%nwarpid")
            fill(u32(c.warps.size()));
        else if (name == "%smid")
            fill(c.smid);
        else if (name == "%nsmid")
            fill(opt.numSms);
        else if (name == "%dynamic_smem_size")
            fill(l.dynSmem);
        else if (name == "%total_smem_size")
            fill(u32(c.smem.size()) - kSmemReserved);
        else if (name == "%aggr_smem_size")
            fill(u32(c.smem.size()));
        else if (name == "%reserved_smem_offset_begin")
            fill(0);
        else if (name.rfind("%envreg", 0) == 0)
            fill(0);
        else
            throw EmuError("unsupported", "special register " + name);
    }
}

bool Machine::startCluster(Launch& l) {
    if (l.nextCluster >= l.numClusters) return false;
    u32 size = l.cluster[0] * l.cluster[1] * l.cluster[2];
    if (usedSms && usedSms + size > opt.numSms) return false;
    u64 idx = l.nextCluster++;
    auto cl = std::make_shared<Cluster>();
    cl->launch = &l;
    cl->index = u32(idx);
    cl->number = nextCluster++;
    u32 nx = l.grid[0] / l.cluster[0], ny = l.grid[1] / l.cluster[1];
    cl->id[0] = u32(idx % nx), cl->id[1] = u32(idx / nx % ny), cl->id[2] = u32(idx / nx / ny);
    const Kernel& k = *l.kernel;
    u32 threads = l.block[0] * l.block[1] * l.block[2];
    u32 smemBytes = kSmemReserved + k.staticSmem + l.dynSmem;
    for (u32 r = 0; r < size; r++) {
        auto c = std::make_unique<Cta>();
        c->cluster = cl.get();
        c->rank = r;
        c->id[0] = cl->id[0] * l.cluster[0] + r % l.cluster[0];
        c->id[1] = cl->id[1] * l.cluster[1] + r / l.cluster[0] % l.cluster[1];
        c->id[2] = cl->id[2] * l.cluster[2] + r / l.cluster[0] / l.cluster[1];
        u32 sm = 0;
        while (sm < smBusy.size() && smBusy[sm]) sm++;
        if (sm == smBusy.size()) smBusy.push_back(true);
        smBusy[sm] = true;
        c->smid = sm;
        u32 rounded = alignUp(smemBytes, 16);
        // Poison rather than zero, so that unchecked reads do not look right.
        c->smem.assign(rounded, 0xcd);
        c->smem.resize(smemBytes);
        c->smemInit.assign(rounded + 16, 0);
        c->granules.assign(rounded / 16 + 1, {});
        c->mbarIndex.assign(rounded / 8 + 1, -1);
        u32 nw = (threads + kWarp - 1) / kWarp;
        c->threadBase = nextThread;
        nextThread += nw * kWarp;
        c->liveWarps = nw;
        for (u32 i = 0; i < nw; i++) c->warps.push_back(std::make_unique<Warp>());
        cl->liveThreads += threads;
        cl->ctas.push_back(std::move(c));
    }
    usedSms += size;
    for (auto& c : cl->ctas)
        for (u32 i = 0; i < c->warps.size(); i++) {
            Warp& w = *c->warps[i];
            w.cta = c.get();
            w.m = this;
            w.id = i;
            w.regs.assign(k.regBytes + 64 + k.predCount * 4, 0);
            w.wgmmaState.assign(k.regBytes / 128 + 1, 0);
            w.wgmmaRead = w.wgmmaState;
            if (opt.counters) w.counters = std::make_unique<WarpCounters>();
            u8* base = (u8*)alignUp(u64(w.regs.data()), 32);
            w.base[0] = base;
            w.base[1] = const_cast<u8*>(k.constants.data());
            w.pred = (u32*)(base + k.regBytes);
            w.local.assign(size_t(k.localBytes) * kWarp, 0);
            u32 lanes = std::min<u32>(kWarp, threads - i * kWarp);
            // Some warps lag far behind the others: this finds missing waits that
            // evenly paced warps would hide.
            u64 pace = rng() % 10;
            w.slow = pace < 6 ? 0 : pace < 8 ? 7 : 63;
            w.initial = w.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
            w.ng = 1;
            w.groups[0] = {0, w.live, Block::None, 0};
            initSpecials(w);
            wake(&w);
        }
    if (opt.checkOrder) orderStart(cl.get());
    clusters.push_back(std::move(cl));
    l.liveClusters++;
    return true;
}

void Machine::startClusters() {
    for (bool any = true; any;) {
        any = false;
        for (auto& l : launches) any |= startCluster(*l);
    }
}

void Machine::finishCta(Cta* c) {
    tmemAtCtaExit(*this, c);
    if (c->pendingAsync)
        faultAt(c, "inflight_at_exit",
                strf("CTA exits while %u asynchronous operations still use its shared memory or mbarriers",
                     c->pendingAsync));
    if (opt.counters) {
        const Launch& l = *c->cluster->launch;
        CtaCounts r{l.index, c->id[0] + u64(l.grid[0]) * (c->id[1] + u64(l.grid[1]) * c->id[2]), c->bulkReceived, {}};
        for (auto& w : c->warps) {
            w->counters->flush(*l.kernel);
            r.warps.push_back(w->counters->n);
        }
        counters.push_back(std::move(r));
    }
    if (c->order && !c->touched.empty()) orderExit(*this, c);
    c->launchFinished = true;
    smBusy[c->smid] = false;
    usedSms--;
    Cluster* cl = c->cluster;
    for (auto& o : cl->ctas)
        if (!o->launchFinished) return;
    cl->launch->liveClusters--;
    // Storage goes away between slices, when no reference is held.
    schedule(0, [this, cl] {
        auto it = std::find_if(clusters.begin(), clusters.end(), [&](auto& p) { return p.get() == cl; });
        if (it != clusters.end() && opt.checkOrder) orderExited(*this, *cl);
        if (it != clusters.end()) clusters.erase(it);
        startClusters();
    });
}

// --------------------------------------------------------------- scheduling --
void Machine::wake(Warp* w) {
    if (w->queued || !w->live) return;
    w->queued = true;
    runq.push_back(w);
}
void Machine::wakeGroups(Cta* c, Block kind) {
    for (auto& w : c->warps) {
        bool any = false;
        for (int g = 0; g < w->ng; g++)
            if (w->groups[g].block == kind) w->groups[g].block = Block::None, any = true;
        if (any) wake(w.get());
    }
}
void Machine::endDependency(Launch& l) {
    l.independent = true;
    for (auto& cluster : clusters)
        if (cluster->launch == &l)
            for (auto& cta : cluster->ctas) wakeGroups(cta.get(), Block::GridDependency);
}
void Machine::schedule(u64 delay, std::function<void()> f) {
    Issuer from = issuer;  // of work that leads to more work
    if (running) {
        const Cta& c = *running->cta;
        from = {c.cluster->launch->kernel, running->pc, {c.id[0], c.id[1], c.id[2]}, c.rank, running->id};
    }
    events.push({time + delay, eventOrder++, std::move(f), from});
}

// Mostly short delays, sometimes very long ones: both ends of the legal range
// expose ordering mistakes.
u64 Machine::randomDelay() {
    u64 r = rng();
    u64 cap = opt.maxDelay ? opt.maxDelay : 1;
    switch (r & 7) {
        case 0: return 0;
        case 1:
        case 2:
        case 3: return (r >> 8) % std::min<u64>(cap, 64);
        case 4:
        case 5:
        case 6: return (r >> 8) % std::min<u64>(cap, 1500);
        default: return (r >> 8) % cap;
    }
}

int Machine::pickGroup(Warp& w) {
    int best = -1, runnable = 0;
    for (int g = 0; g < w.ng; g++) {
        if (w.groups[g].block != Block::None) continue;
        runnable++;
        if (best < 0 || w.groups[g].pc < w.groups[best].pc) best = g;
    }
    if (runnable > 1 && (rng() & 3) == 0) {
        int k = int(rng() % u64(runnable));
        for (int g = 0; g < w.ng; g++)
            if (w.groups[g].block == Block::None && k-- == 0) return g;
    }
    return best;
}

namespace {
// Block kinds whose instruction is simply executed again when the group wakes;
// only such groups may absorb another group that reaches the same instruction.
bool retries(Block b) { return b != Block::NamedBarrier && b != Block::WarpSync; }

void removeGroup(Warp& w, int g) {
    w.ng--;
    if (g != w.ng) w.groups[g] = w.groups[w.ng];
}
}  // namespace

template <bool Counting>
void Machine::slice(Warp& w, u32 budget) {
    int g = pickGroup(w);
    if (g < 0) return;
    const Kernel& kernel = *w.cta->cluster->launch->kernel;
    const Inst* code = kernel.code.data();
    const u32 budget0 = budget;
    u64 threadInstrs = 0;
    u32 pc = w.groups[g].pc, act = w.groups[g].mask;
    u32 freeRun = 64;  // instructions before min-PC order may take over again

    auto merge = [&]() -> bool {  // the running group meets another at pc
        for (int o = 0; o < w.ng; o++)
            if (o != g && w.groups[o].pc == pc && retries(w.groups[o].block)) {
                act |= w.groups[o].mask;
                removeGroup(w, o);
                if (g == w.ng) g = o;
                return true;
            }
        return false;
    };
    auto store = [&](Block b) {
        w.groups[g].pc = pc;
        w.groups[g].mask = act;
        w.groups[g].block = b;
        w.groups[g].info = w.blockInfo;
    };

    while (budget) {
        if (w.ng > 1) {
            while (merge()) {}
            if (freeRun)
                freeRun--;
            else {
                for (int o = 0; o < w.ng; o++)
                    if (o != g && w.groups[o].block == Block::None && w.groups[o].pc < pc) {
                        store(Block::None);
                        g = pickGroup(w);
                        pc = w.groups[g].pc, act = w.groups[g].mask;
                        freeRun = 16;
                        break;
                    }
            }
        }
        const Inst& in = code[pc];
        budget--;
        u32 m = act;
        if (in.guard != 0xffff) {
            u32 p = w.pred[in.guard >> 1];
            m &= (in.guard & 1) ? ~p : p;
            if (!m) {
                if constexpr (Counting) w.counters->issue(w, in, pc, act);
                pc++;
                continue;
            }
        }
        threadInstrs += u32(std::popcount(m));
        w.pc = pc;
        w.act = act;
        if (in.branch) {
            if constexpr (Counting) w.counters->issue(w, in, pc, act);
            if (m == act) {
                pc = in.target;
                continue;
            }
            // Divergence: the taken lanes become a group of their own.
            Group& n = w.groups[w.ng++];
            n = {in.target, m, Block::None, 0};
            act &= ~m;
            pc++;
            freeRun = 0;
            continue;
        }
        if constexpr (Counting) w.counters->failed = 0;
        // The lanes meet before a collective instruction of the whole warp acts.
        const bool meets = in.joins && w.order;
        if (meets && m == w.live) orderWarpSync(w, m);
        const Status status = in.fn(w, in, m);
        if (meets && m != w.live && status == Status::Next) orderWarpSync(w, m);
        if constexpr (Counting) {
            WarpCounters& c = *w.counters;
            // Blocked instructions run again, except at the two barriers that complete them.
            bool retried = status == Status::Block && w.block != Block::NamedBarrier && w.block != Block::WarpSync;
            if (in.poll) {
                c.n[kPolls] += retried || c.failed;
                c.polling &= ~(m & ~c.failed);
            }
            if (!retried && (act & ~c.failed)) c.issue(w, in, pc, act & ~c.failed);
            c.polling |= c.failed;
        }
        switch (status) {
            case Status::Next: pc++; break;
            case Status::Jump:  // brx: the handler split the lanes into groups
                pc = w.pc;
                act = w.act;
                break;
            case Status::Yield:
                pc++;
                store(Block::None);
                goto out;
            case Status::Block: store(w.block); goto out;
            case Status::Exit: {
                w.live &= ~m;
                act &= ~m;
                for (int o = 0; o < w.ng; o++)
                    if (w.groups[o].block == Block::Converge) w.groups[o].block = Block::None;
                // Exited threads count as arrived at barrier.cluster; do not count twice.
                forLanes(m, [&](int l) { w.cta->cluster->arrived -= w.clusterArrive[l] > w.cta->cluster->generation; });
                w.cta->cluster->liveThreads -= u32(std::popcount(m));
                pc++;
                if (act)
                    store(Block::None);
                else
                    removeGroup(w, g);
                if (!w.live) {
                    asyncAtWarpExit(w);
                    w.cta->liveWarps--;
                }
                barriersAfterExit(*this, w);
                if (!w.live && !w.cta->liveWarps) finishCta(w.cta);
                goto out;
            }
        }
    }
    store(Block::None);
out:
    u32 used = budget0 - budget;
    time += used;
    w.instrs += used;
    stats.warpInstrs += used;
    stats.threadInstrs += threadInstrs;
}

void Machine::run() {
    auto t0 = std::chrono::steady_clock::now();
    rng.seed(opt.seed * 0x9e3779b97f4a7c15ull + 12345);
    startClusters();
    auto anyLive = [&] {
        for (auto& l : launches)
            if (l->liveClusters || l->nextCluster < l->numClusters) return true;
        return false;
    };
    while (true) {
        while (!events.empty() && events.top().due <= time) {
            auto f = std::move(const_cast<Event&>(events.top()).run);
            issuer = events.top().issuer;
            events.pop();
            try {
                f();
            } catch (EmuError& e) {
                const Issuer& i = issuer;
                if (!i.kernel) throw;
                throw EmuError(e.kind, std::string(e.what()) +
                                           strf("\n  issued at PTX line %u `%s`, kernel %.120s, CTA (%u,%u,%u) rank %u, "
                                                "warp %u",
                                                i.kernel->code[i.pc].line, i.kernel->text[i.pc].c_str(),
                                                i.kernel->name.c_str(), i.cta[0], i.cta[1], i.cta[2], i.rank, i.warp));
            }
        }
        if (runq.empty()) {
            if (!events.empty()) {
                time = events.top().due;
                continue;
            }
            if (!anyLive()) break;
            // The kernels before end when nothing else is left to do: who does not wait for them is found out.
            for (auto& l : launches)
                if (l->awaited && !l->independent) endDependency(*l);
            if (!runq.empty()) continue;
            throw EmuError("deadlock",
                           "[deadlock] no warp can run and no asynchronous operation is pending:" + deadlockReport());
        }
        if (stats.warpInstrs > opt.budget)
            throw EmuError("budget", strf("[budget] more than %lu warp instructions executed; state:", opt.budget) +
                                         deadlockReport());
        u64 r = rng();
        size_t i = size_t((r >> 32) % runq.size());
        Warp* w = runq[i];
        u32 len = 1 + u32(r % opt.maxSlice);
        if (w->slow && (rng() & w->slow) && (runq.size() > 1 || !events.empty())) {
            // Asynchronous work overtakes a lagging warp as well.
            time = runq.size() == 1 ? std::max(time, events.top().due) : time + len;
            continue;
        }
        running = w;
        if (opt.counters)
            slice<true>(*w, len);
        else
            slice<false>(*w, len);
        running = nullptr;
        bool runnable = false;
        for (int g = 0; g < w->ng; g++) runnable |= w->groups[g].block == Block::None;
        if (!w->live || !runnable) {
            w->queued = false;
            runq[i] = runq.back();
            runq.pop_back();
        }
    }
    stats.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

}  // namespace ptx_emulator
