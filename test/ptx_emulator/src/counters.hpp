// Counters of what a kernel executes (option `counters`).
//
// The scheduler runs diverged lanes in a seed-dependent order, so what is counted
// is canonical instead: between two `.aligned` instructions, the k-th execution of
// an instruction by one lane is the same warp instruction as the k-th execution by
// the other lanes of the warp.
#pragma once
#include <array>
#include <deque>
#include "common.hpp"

namespace ptx_emulator {

struct Warp;
struct Inst;
struct Stmt;
struct Kernel;
struct Cta;

enum Counter : u8 {
    // Instruction classes, Inst::cls.
    kTensor,
    kFp32,
    kInteger,
    kConvert,
    kMove,
    kSharedAccess,
    kGlobalAccess,
    kBulk,
    kBarrier,
    kOther,
    kPolls,
    kSmemLoads,
    kSmemLoadWavefronts,
    kSmemLoadConflicts,
    kSmemStores,
    kSmemStoreWavefronts,
    kSmemStoreConflicts,
    kGmemLoads,
    kGmemLoadSectors,
    kGmemLoadMinimum,
    kGmemStores,
    kGmemStoreSectors,
    kGmemStoreMinimum,
    kBulkLoad,
    kBulkDelivered,
    kBulkStore,
    kBulkReduce,
    kBulkDsmem,
    kCounters
};
extern const char* const kCounterNames[kCounters];
using Counts = std::array<u64, kCounters>;

struct WarpCounters {
    Counts n{};

    // `lanes` issue the instruction at pc.
    void issue(const Warp& w, const Inst& in, u32 pc, u32 lanes);
    void access(const Warp& w, u32 pc, u32 m, const u64* addr, u32 bytes, bool write);  // generic addresses
    void flush(const Kernel& k);

    u32 polling = 0;  // lanes whose last mbarrier wait failed
    u32 failed = 0;   // lanes whose wait fails in the instruction being executed

 private:
    struct Access {
        u32 mask = 0, bytes = 0;
        bool write = false;
        u64 addr[kWarp];
    };
    struct Site {  // an instruction executed by some of the lanes since the last flush
        u32 pc = 0;
        u32 n[kWarp] = {};
        std::deque<Access> acc;  // by execution
    };
    std::vector<int> at_;  // pc -> site, or -1
    std::deque<Site> sites_;
    size_t used_ = 0;
    Site& site(u32 pc, size_t code);
    void evaluate(const Access& a);
};

u8 counterClass(const Stmt& s);
// Accesses by threads, called before the handler changes registers.
void countAccess(Warp& w, const Inst& in, u32 m, u32 bytes, bool write);
void countBulk(Warp& w, Counter what, u64 bytes);

}  // namespace ptx_emulator
