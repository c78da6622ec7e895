// The happens-before check (option `check_order`): two accesses to shared memory, at
// least one of them a write, must be ordered by barriers, mbarriers or waits whatever
// the schedule.  A race is reported in any run that executes both accesses.
//
// Each warp counts time; a Clock says up to which time of every other warp a thread has
// synchronised.  The unit is the warp as long as its lanes act together: a release by
// some lanes only covers those lanes, until the next warp-wide `.sync` instruction.
// Asynchronous writes and reads end in a queue: a phase of an mbarrier, or a
// tcgen05.commit.  Each queue counts, so "seen up to phase n" fits a Clock as well.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include "common.hpp"

namespace ptx_emulator {

struct Cluster;
struct Cta;
struct Inst;
struct Machine;
struct Mbarrier;
struct Warp;

struct Clock {
    struct Entry {
        u32 all = 0;   // seen up to here for every lane,
        u32 some = 0;  // ... and up to here for the lanes in `mask`
        u32 mask = 0;
        u32 fenced = 0;  // of that, up to here behind a fence.proxy.async for global memory
    };
    struct View {
        std::vector<Entry> warps;  // by index of the warp in the cluster; empty: nothing seen
        std::vector<u32> queues;   // completed phases or commits seen
        void join(const View& o);
    };
    View here;                     // of the cluster that the clock belongs to
    std::map<u32, View> clusters;  // of others, by number: what came through global memory

    void join(const Clock& o);
    void see(u32 queue, u32 count);
    void clear() { here = {}, clusters.clear(); }
};

enum class Scope : u8 { Cta, Cluster, Gpu, Sys };
enum class Sem : u8 { Weak, Relaxed, Acquire, Release, AcqRel };

// One access, packed: who, when, and for warps which lane and (sub-word accesses) bytes.
struct Access {
    u64 bits = 0;
    static constexpr u32 kAllLanes = 32, kSeveralLanes = 33, kNotWaited = 0x3fff;
    static Access byWarp(u32 warp, u32 time, u32 lane, u32 instr, u32 bytes) {
        return {u64(time) << 32 | u64(warp + 1) << 18 | u64(instr & 0xff) << 10 | u64(lane) << 4 | bytes};
    }
    static Access byQueue(u32 queue, u32 count) { return {u64(count) << 32 | u64(0x1000 + queue) << 18}; }
    static Access notWaited(u32 lane, u32 serial = 0) {
        return {u64(serial) << 32 | u64(kNotWaited) << 18 | u64(lane) << 4};
    }
    u32 time() const { return u32(bits >> 32); }
    u32 who() const { return u32(bits >> 18) & 0x3fff; }
    bool isQueue() const { return who() >= 0x1000 && who() != kNotWaited; }
    u32 warp() const { return who() - 1; }
    u32 queue() const { return who() - 0x1000; }
    u32 instr() const { return u32(bits >> 10) & 0xff; }
    u32 lane() const { return u32(bits >> 4) & 63; }
    u32 bytes() const { return u32(bits) & 15; }
    explicit operator bool() const { return bits; }
};

// What a warp knows.  Lanes that have synchronised differently are in different sets.
struct WarpOrder {
    struct Lanes {
        u32 mask = 0;
        Clock seen;
        Clock fenced;   // what the last fence would publish through a relaxed arrive
        Scope fencedScope = Scope::Cta;
        Clock relaxed;  // what relaxed loads of global memory have read, for the next fence to acquire
        Clock tensorFenced;  // what the last tcgen05.fence::after_thread_sync orders before tcgen05 operations
        u64 known = 0;  // an access found to be ordered before, to save time
    };
    u32 index = 0;  // in the cluster
    u32 now = 1;
    u32 instr = 0;      // numbers shared-memory instructions, 1 to 255
    bool dirty = true;  // something happened at time `now`
    std::vector<Lanes> sets;
    // The last fence.proxy.async executed, with what their threads had seen.
    struct ProxyFence {
        u64 seq;
        u32 time, lanes;
        Clock seen;
    };
    static constexpr size_t kFences = 16;
    std::deque<ProxyFence> fences;
    // The last tcgen05.fence::before_thread_sync, numbered together with the tcgen05.ld of the warp.
    std::deque<ProxyFence> tensorFences;
    u64 tensorSeq = 0;
    // Where recent accesses were made, for reports: (time, instruction).
    std::vector<std::pair<u32, u32>> sites;
    size_t siteCount = 0;

    Lanes& of(int lane) {
        for (Lanes& s : sets)
            if (s.mask >> lane & 1) return s;
        return sets[0];
    }
};

// Last accesses to the shared memory of one CTA.  Generic accesses are kept per word,
// asynchronous ones per 16-byte granule; reads in a column per reading warp.
class SmemOrder {
 public:
    SmemOrder(u32 bytes, u32 warps);

    template <class T>
    struct Zeroed {  // untouched pages cost nothing
        struct Free {
            void operator()(T* p) const { std::free(p); }
        };
        std::unique_ptr<T[], Free> p;
        T* get(size_t n) {
            if (!p) p.reset((T*)std::calloc(n, sizeof(T)));
            return p.get();
        }
        explicit operator bool() const { return bool(p); }
    };
    u32 words, granules;
    Zeroed<Access> wordWrite, granuleWrite;
    std::vector<Zeroed<u32>> wordRead, granuleRead;  // per warp of this CTA: time << 6 | lane
    Zeroed<Access> remoteRead;                       // per word: by a thread of another CTA
    Zeroed<Access> queueRead;                        // per granule: ends in a queue
    // Per KiB, what to look at: bit w, column of warp w; and the four others.
    enum Kind { WordWrite, GranuleWrite, RemoteRead, QueueRead };
    std::vector<u64> wordColumns, granuleColumns;
    std::vector<u8> kinds;
};

// Has a clock with this entry seen the access?
bool seen(const Clock::Entry& e, Access a);

// --- set-up
void orderStart(Cluster* cl);

// --- synchronisation
void orderRelease(Warp& w, u32 lanes, Clock& into);
void orderReleaseRelaxed(Warp& w, u32 lanes, Clock& into);  // publishes the last fence only
void orderAcquire(Warp& w, u32 lanes, const Clock& c);
void orderRelaxedRead(Warp& w, u32 lanes, const Clock& c);  // what the next fence will acquire
// What the lane has seen, its own accesses apart: what it issues now completes after all of that.
void orderIssue(Warp& w, int lane, Clock& into);
void orderFence(Warp& w, u32 lanes, Scope scope);
void orderWarpSync(Warp& w, u32 lanes);
void orderProxyFence(Warp& w, u32 lanes, bool shared, bool global);
// Does a fence.proxy.async stand between the write of `lane` of `writer` at machine.seq `seq` and the asynchronous
// read that `reader` issues: by the writer and before something the reader has synchronised with, or by the
// reader and after it had synchronised with the write?
bool orderFenced(Warp& reader, Cta* c, u32 granule, const Warp& writer, int lane, u64 seq, bool strict);

// --- tensor memory: tcgen05.fence on both sides of what orders a tcgen05.ld and an operation of another thread
void orderTensorFence(Warp& w, u32 lanes, bool after);
u64 orderTensorUse(Warp& w);  // numbers a load or a store
// Has the loading warp executed a fence after it had seen the commit of the operation that wrote the column?
bool orderTensorWritten(Warp& w, u32 queue, u32 commit);
// Is there a fence of `other` behind its load or store `seq`, and one of this lane (-1: of the warp) behind what it knows
// of that?
bool orderTensorUsed(Warp& w, int lane, const Warp& other, u64 seq);
// Plain order, for tcgen05.dealloc: has the warp seen the access, or the commit?
bool orderSeen(Warp& w, Access a);

// --- accesses; `lane` -1: the warp as a whole
void orderNote(Warp& w);  // remembers where the warp is, for reports
// By an ordinary instruction; addresses are taken from its registers.
void orderAccess(Warp& w, const Inst& in, u32 lanes, u32 bytes, bool write);
// Atomics and other strong accesses synchronise instead.
void orderStrong(Warp& w, const Inst& in, u32 lanes, bool read, bool write);
// Start of an asynchronous operation.
void orderAsyncRead(Warp& w, int lane, Cta* c, u32 off, u32 bytes, const char* what);
void orderAsyncWrite(Warp& w, int lane, Cta* c, u32 off, u32 bytes, const char* what);
// Operands of a tensor-core instruction, granules[first...].
void orderAsyncRead(Warp& w, Cta* c, const std::vector<u32>& granules, size_t first, const char* what);
void orderReadDone(Warp& w, Cta* c, const std::vector<u32>& granules);
// ... and its end: known to the lane, or to whoever sees the queue reach `count`.
void orderReadDone(Warp& w, int lane, Cta* c, u32 off, u32 bytes);
void orderReadDone(Cta* c, u32 off, u32 bytes, u32 queue, u32 count);
void orderWritten(Cta* c, u32 off, u32 bytes, u32 queue, u32 count);
// cp.async, which works on words.
void orderCopyStart(Warp& w, int lane, Cta* c, u32 off, u32 bytes);
void orderCopyDone(Warp& w, int lane, Cta* c, u32 off, u32 bytes);
void orderCopyDone(Cta* c, u32 off, u32 bytes, u32 queue, u32 count);

// Something of another CTA uses this one's memory or mbarriers, which must outlive that.
void orderTouch(Cta* c, Access a);
void orderTouch(Warp& w, int lane, Cta* c);
void orderExit(Machine& m, Cta* c);

// --- global memory (globalorder.cpp): threads of all clusters and launches
// Last accesses to a word.
struct GlobalWord {
    Access write;
    u32 writeCluster = 0;
    bool strong = false;  // an atomic or another strong access
    bool async = false;   // by a bulk copy
    u32 readCluster[2] = {};
    Access read[2];  // of two warps, those that are ordered before another read first to go
};
// What strong accesses to a word have published: at a scope, by a launch, and below .gpu by a cluster.
struct Published {
    Scope scope;
    u32 launch, cluster;
    std::map<u32, Clock::View> clock;
};
// Where the warps of a cluster were last, for reports.
struct Whereabouts {
    u32 cluster;
    const struct Kernel* kernel;
    u32 launch;
    std::vector<std::array<u32, 3>> ctas;
    std::vector<std::vector<std::pair<u32, u32>>> sites;  // by warp: (time, instruction)
};
class GlobalOrder {
 public:
    GlobalWord& word(u64 address);
    std::deque<Whereabouts> exited;  // the last clusters that have ended
    std::unordered_map<u64, std::vector<Published>> published;  // by address / 4

 private:
    static constexpr u64 kPage = 1024;  // words
    std::unordered_map<u64, std::unique_ptr<GlobalWord[]>> pages;
    GlobalWord* last = nullptr;
    u64 lastPage = ~0ull;
};
// Who accesses global memory: a thread now, or a copy with what its thread had seen.
struct GlobalAccess {
    u32 cluster = 0, warp = 0, now = 0, instr = 0, launch = 0;
    int lane = 0;
    std::shared_ptr<Clock> seen;
};
void orderExited(Machine& m, const Cluster& cl);
// By an ordinary instruction: weak, or strong with what it acquires and releases.
void orderGlobal(Warp& w, const Inst& in, u32 lanes, u32 bytes, bool read, bool write, Sem sem, Scope scope);
GlobalAccess orderGlobalIssue(Warp& w, int lane);
void orderGlobalLoad(Warp& w, const GlobalAccess& by, u64 address, u32 bytes, const char* what);  // by a thread
// A copy reads now what must have been ordered before its issue; it has read it when `queue` reaches `count`.
void orderGlobalRead(Machine& m, const GlobalAccess& by, u64 address, u32 bytes, u32 queue, u32 count,
                     const char* what);
// A bulk store writes, under a serial number, and has been waited for.
void orderGlobalWrite(Machine& m, const GlobalAccess& by, u64 address, u32 bytes, u32 serial, bool reduce,
                      const char* what);
void orderGlobalWaited(Warp& w, int lane, u64 address, u32 bytes, u32 serial);

Access orderStamp(Warp& w, int lane);
// The thread uses an mbarrier that was initialised at `init`.
void orderMbarrierUse(Warp& w, int lane, Access init, const char* what, u32 off);

}  // namespace ptx_emulator
