// Machine state: instructions, warps, CTAs, clusters, and the engine that
// interleaves them.  Everything runs on one host thread.
#pragma once
#include <array>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <queue>
#include <random>
#include "counters.hpp"
#include "ordering.hpp"
#include "module.hpp"

namespace ptx_emulator {

struct Warp;
struct Cta;
struct Cluster;
struct Machine;
struct Inst;

enum class Status : u8 { Next, Jump, Yield, Block, Exit };
// m: lanes that execute (guard applied); never 0 for non-branches.
using Fn = Status (*)(Warp& w, const Inst& in, u32 m);

// Operand offsets are byte offsets into the warp's register file, or, with
// this bit set, into the kernel's constant pool.
constexpr u32 kConstBit = 0x80000000u;
constexpr u32 kNoOperand = 0x7fffffffu;

// Operand lists and modifiers of the wide instructions.
struct Ext {
    std::vector<u32> dst, s0, s1, s2;  // register-file offsets
    std::vector<u8> wide;              // per dst/s0 element: lane stride of the register (4, 8, 16)
    std::array<i64, 12> p{};           // instruction-specific parameters
    u32 pred = 0;                      // predicate index << 1 | negated
    std::string text;
    Fn inner = nullptr;                   // second handler of a compound instruction
    Fn asyncInner = nullptr;              // handler behind the async register check
    std::vector<u32> guarded;             // registers to test for in-flight wgmma
    std::vector<u8> guardedDef;           // ... and whether this instruction writes them
    std::vector<u32> fenceDef, fenceUse;  // registers whose values reach a wgmma: written here; sources of a mov
    std::vector<u32> fenceRead;           // accumulators that an ordinary instruction reads
    bool copy = false;                    // register-to-register mov
    bool move = false;                    // any mov
    std::vector<u32> targets;             // brx.idx
};

struct Inst {
    Fn fn = nullptr;
    u32 d = kNoOperand, a = kNoOperand, b = kNoOperand, c = kNoOperand;
    i64 imm = 0;
    u32 target = 0;
    u32 line = 0;
    u16 guard = 0xffff;          // predicate index << 1 | negated
    u16 p = 0xffff, q = 0xffff;  // predicate operands, same coding
    u8 n = 1;                    // vector width
    u8 sa = 4, sd = 4, sb = 4;   // lane strides of a, d, b where they may vary
    bool branch = false;
    bool setsPc = false;
    u8 space = 0;
    u8 cls = 0;            // Counter
    bool joins = false;    // `.sync`: orders the lanes that execute it
    bool aligned = false;  // needs every live lane of the warp
    bool poll = false;     // mbarrier wait
    Ext* x = nullptr;
};

struct Kernel {
    std::string name;
    Module* module = nullptr;
    std::vector<Inst> code;
    std::vector<std::string> text;  // mnemonic per instruction, for reports
    std::vector<u8> constants;
    u32 regBytes = 0, predCount = 0;
    u32 staticSmem = 0, localBytes = 0, paramBytes = 0;
    bool dependent = false;  // has a griddepcontrol.wait
    std::vector<std::pair<std::string, u32>> specials;  // name -> register offset
    struct Param {
        u32 offset, size;
    };
    std::vector<Param> params;
    u32 maxntid[3], reqntid[3], reqcluster[3];
    std::deque<Ext> exts;
    u32 vregs = 0;
    std::vector<std::string> maybeUninit;  // live at entry
};

// ---------------------------------------------------------------- checks ---
// Values of the initialisation shadow, one byte per shared-memory byte.
constexpr u8 kUninit = 0, kInit = 1, kInflight = 2;  // kInflight: a bulk copy is writing it

struct Granule {      // per 16 bytes of shared memory
    u32 writer = 0;   // machine-wide thread id of the last generic writer, 0 = none
    u32 readers = 0;  // async-proxy reads in flight
    u64 time = 0;     // machine.seq of that write
};
struct SmemRange {
    Cta* cta;
    u32 begin, end;
};  // offsets inside one CTA

// --------------------------------------------------------------- mbarrier ---
struct Mbarrier {
    bool live = false;
    u32 count = 0;         // arrivals expected per phase
    i64 pending = 0;       // arrivals left in this phase
    i64 tx = 0;            // tx-count
    u64 phase = 0;         // completed phases
    u64 tag = 0;           // what the 8 bytes must still contain
    u32 asyncPending = 0;  // in-flight operations that will signal this object
    u32 queue = 0;         // of the happens-before check, as are the next three
    Access init;
    Clock arriving, done;            // seen by the arrivals of this phase, of the completed ones
    const Warp* initWarp = nullptr;  // initialising thread, until a fence after it was seen
    int initLane = 0;
    u64 initTime = 0;
};

enum class Block : u8 { None, Converge, Mbarrier, NamedBarrier, WarpSync, ClusterBarrier, BulkGroup, Tmem, GridDependency };

struct Group {
    u32 pc = 0, mask = 0;
    Block block = Block::None;
    u64 info = 0;  // barrier id, mbarrier address, ...
};

struct WgmmaOp {
    std::vector<u32> granules;  // shared memory being read, 16-byte units
    const Ext* regs;            // dst: accumulators, s0: A fragment (if any)
    u64 group;                  // 0 until committed
    u64 serial;                 // issue order
};

struct BulkOp {
    bool readDone = false, done = false;
    u32 serial = 0;                               // of the happens-before check, with
    std::vector<std::pair<u64, u32>> written = {};  // ... the global memory that a store has written
};
struct LaneAsync {  // per-thread async groups
    std::vector<std::shared_ptr<BulkOp>> open;
    std::deque<std::vector<std::shared_ptr<BulkOp>>> groups;
};

struct Warp {
    u8* base[2] = {nullptr, nullptr};  // registers, constants
    u32* pred = nullptr;
    Cta* cta = nullptr;
    Machine* m = nullptr;
    u32 id = 0;  // in CTA
    u32 live = 0, initial = 0;
    u32 pc = 0;                 // of the executing group
    u32 act = 0;                // active mask of the executing group
    Block block = Block::None;  // set by handlers that return Block
    u64 blockInfo = 0;
    Group groups[kWarp];
    int ng = 0;
    bool queued = false;
    u32 slow = 0;  // 0, or a mask: run only once in about slow + 1 turns
    std::vector<u8> regs;
    std::vector<u8> local;
    std::map<int, LaneAsync> bulk, cpasync;  // lane -> groups
    // Reads of shared memory by bulk stores: released by wait_group.
    struct HeldRead {
        std::shared_ptr<BulkOp> op;
        SmemRange r;
        int lane;
    };
    std::vector<HeldRead> held;
    // Bulk stores to global memory that the thread has not waited for.
    struct Store {
        std::shared_ptr<BulkOp> op;
        int lane;
    };
    std::vector<Store> stores;
    std::list<WgmmaOp> wgmma;  // issued, not covered by a wait_group
    u64 wgmmaGroups = 0, wgmmaSerial = 0;
    // Registers that plain moves copied from accumulators in flight: (slot, serial).
    std::vector<std::pair<u32, u64>> wgmmaCopies;
    std::vector<u32> tmemPending;      // registers written by tcgen05.ld not yet waited for
    u64 clusterArrive[kWarp] = {};     // generation each lane arrived at
    u64 fenceTime[kWarp] = {};         // machine.seq of the last fence.proxy.async
    u64 initFenceTime[kWarp] = {};     // ... fence.mbarrier_init or releasing barrier.cluster.arrive
    u64 clusterFenceTime[kWarp] = {};  // ... generic fence of cluster or wider scope
    bool wgmmaFenced = false;          // has executed a wgmma.fence
    // Per register slot that a wgmma may read, since the last wgmma.fence: 0 untouched,
    // 1 written by an ordinary instruction, 2 + N / 8 by a wgmma of that width.
    std::vector<u8> wgmmaState;
    std::vector<u8> wgmmaRead;  // ... and whether an ordinary instruction read it
    std::unique_ptr<WarpCounters> counters;
    std::unique_ptr<WarpOrder> order;
    u32 maxRegisters = 0;  // of its last setmaxnreg
    u64 instrs = 0;
    u32 carry = 0;  // condition-code carry, one bit per lane

    u8* reg(u32 off) { return base[off >> 31] + (off & ~kConstBit); }
    const u8* src(u32 off) const { return base[off >> 31] + (off & ~kConstBit); }
    // Predicate operand; 0xffff and 0xfffe are the constants true and false.
    u32 predMask(u16 p) const { return p >= 0xfffe ? (p & 1 ? ~0u : 0u) : (p & 1) ? ~pred[p >> 1] : pred[p >> 1]; }
    u32 lane32(u32 off, int lane) const { return ((const u32*)src(off))[lane]; }
    u64 lane64(u32 off, int lane) const { return ((const u64*)src(off))[lane]; }
    u32 threadId(int lane) const;  // machine-wide, starting at 1
};

struct NamedBarrier {
    u32 arrived = 0, expected = 0;
    std::vector<Warp*> waiters;  // their groups are blocked with info == barrier id
    Clock arriving;
    u32 trueCount = 0;  // bar.red: lanes that contributed true
};

struct Tmem;

struct Cta {
    Cluster* cluster = nullptr;
    u32 rank = 0;  // in cluster
    u32 id[3] = {0, 0, 0};
    u32 smid = 0;
    u32 threadBase = 0;    // machine-wide id of thread 0
    std::vector<u8> smem;  // indexed by offset, includes the reserved KiB
    std::vector<u8> smemInit;
    std::vector<Granule> granules;
    std::vector<int> mbarIndex;  // offset / 8 -> index or -1
    std::vector<Mbarrier> mbars;
    std::vector<std::unique_ptr<Warp>> warps;
    NamedBarrier bars[16];
    u32 liveWarps = 0;
    std::unique_ptr<Tmem> tmem;
    std::unique_ptr<SmemOrder> order;
    std::unordered_map<u32, Access> touched;     // last access from another CTA, by who made it
    std::unordered_map<u32, Clock> strongWords;  // by word: what atomics and releases published
    u32 tensorQueue = ~0u;                       // counts tcgen05.commit
    u32 tensorCommits = 0;
    u32 pendingAsync = 0;    // copies and arrivals that still touch this CTA's memory
    u64 bulkReceived = 0;    // bytes of bulk copies from global memory, when counting
    u32 pendingCommits = 0;  // tcgen05.commit arrivals on their way
    bool launchFinished = false;
};

struct Launch;

struct Cluster : std::enable_shared_from_this<Cluster> {
    Launch* launch = nullptr;
    u32 index = 0;
    u32 number = 0;  // among all launches
    u32 id[3];
    std::vector<std::unique_ptr<Cta>> ctas;
    u32 liveThreads = 0;
    u32 arrived = 0;  // at barrier.cluster in this generation
    u64 generation = 0;
    Clock arriving, done;  // barrier.cluster
    u32 queues = 0;        // allotted
};

struct Launch {
    Kernel* kernel = nullptr;
    u32 grid[3], block[3], cluster[3];
    u32 dynSmem = 0;
    u8* params = nullptr;  // 128-byte aligned copy
    std::unique_ptr<u8[]> paramStorage;
    u64 nextCluster = 0, numClusters = 0;
    u64 liveClusters = 0;
    u32 index = 0;
    // The kernels before this one: somebody waits for their end, they have ended.
    bool awaited = false, independent = false;
};

struct Region {
    u64 begin, end;
    bool readOnly;
    std::string name;
};

struct Options {
    u64 seed = 0;
    u32 numSms = 132;
    u64 budget = 4000000000ull;  // warp instructions
    bool checkUninitSmem = true;
    bool nanOperands = false;  // of the tensor core, where nothing was written
    bool checkProxy = true;
    bool strictProxy = false;  // only a fence by the writing thread counts
    bool checkInflight = true;
    bool checkBounds = true;
    bool checkExit = false;
    bool checkFences = true;  // wgmma.fence, fence.mbarrier_init
    bool checkOrder = true;   // happens-before, ordering.hpp
    bool counters = false;
    bool reorderCommits = false;  // arrivals of tcgen05.commit in any order
    bool hopper = false;          // sums of tensor cores as Hopper rounds them
    bool strictRegs = false;
    u32 maxDelay = 20000;  // longest asynchronous delay in warp instructions
    u32 maxSlice = 400;
};

// The instruction that asynchronous work comes from, for reports.
struct Issuer {
    const Kernel* kernel = nullptr;
    u32 pc = 0, cta[3] = {}, rank = 0, warp = 0;
};
struct Event {
    u64 due, order;
    std::function<void()> run;
    Issuer issuer;
    bool operator>(const Event& o) const { return due != o.due ? due > o.due : order > o.order; }
};

struct Stats {
    u64 warpInstrs = 0, threadInstrs = 0, tensorOps = 0, bulkOps = 0;
    double seconds = 0;
};

struct Machine {
    Options opt;
    std::vector<Region> regions;  // sorted by begin
    std::vector<std::unique_ptr<Launch>> launches;
    std::vector<std::shared_ptr<Cluster>> clusters;
    std::vector<Warp*> runq;
    std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events;
    std::mt19937_64 rng;
    u64 time = 0, eventOrder = 0, seq = 1;
    u32 usedSms = 0, nextThread = 1, nextCluster = 1, nextStore = 1;
    GlobalOrder globalOrder;
    std::vector<bool> smBusy;
    Stats stats;
    std::map<std::string, u64> warnings;  // text -> count
    Region* lastRegion = nullptr;
    const Warp* running = nullptr;  // the warp that executes; none during an event
    Issuer issuer;                  // of the event that runs
    std::string printfOutput;
    struct CtaCounts {
        u32 launch;
        u64 cta;
        u64 received;
        std::vector<Counts> warps;
    };
    std::vector<CtaCounts> counters;

    void run();
    void wake(Warp* w);
    void wakeGroups(Cta* c, Block kind);
    void schedule(u64 delay, std::function<void()> f);
    u64 randomDelay();
    // Global-memory access check; returns the host pointer.
    u8* global(Warp* w, int lane, u64 addr, u32 bytes, bool write);
    // What a thread accesses in global memory may be the work of kernels that have not ended.
    void checkDependency(Warp& w, int lane) {
        const Launch& l = *w.cta->cluster->launch;
        if (l.kernel->dependent && !l.independent) faultDependency(w, lane);
    }
    Region* findRegion(u64 addr, u64 bytes);
    void addRegion(u64 addr, u64 bytes, bool readOnly, std::string name);

    [[noreturn]] void fault(Warp* w, int lane, const char* kind, const std::string& msg);
    void warn(const char* kind, const std::string& msg) { warnings[strf("[%s] ", kind) + msg]++; }
    void endDependency(Launch& l);
    [[noreturn]] void faultDependency(Warp& w, int lane);
    [[noreturn]] void faultAt(Cta* c, const char* kind, const std::string& msg);

 private:
    void startClusters();
    bool startCluster(Launch& l);
    void finishCta(Cta* c);
    template <bool Counting>
    void slice(Warp& w, u32 budget);
    int pickGroup(Warp& w);
    std::string deadlockReport();
    void initSpecials(Warp& w);
};

// memory.cpp
Cta* ctaOfSmem(Warp& w, int lane, u32 addr);                     // shared::cluster address -> CTA
u32 smemOffset(Warp& w, int lane, Cta* c, u32 addr, u32 bytes);  // bounds check -> offset
void smemGenericWrite(Warp& w, int lane, Cta* c, u32 off, u32 bytes);
void smemGenericRead(Warp& w, int lane, Cta* c, u32 off, u32 bytes);
// Async-proxy accesses; `w` may be null when the operation runs detached.
// Whether all was written before; if not, it is an error unless that may be.
bool smemAsyncRead(Machine& m, Warp* w, Cta* c, u32 off, u32 bytes, const char* what, bool mayBeUnwritten = false);
void smemAsyncWriteBegin(Machine& m, Warp* w, Cta* c, u32 off, u32 bytes, const char* what);
void smemAsyncWriteEnd(Cta* c, u32 off, u32 bytes);
void holdReads(const SmemRange& r);
void releaseReads(const SmemRange& r);
// Any state space; returns a host pointer valid for `bytes`.
u8* resolve(Warp& w, int lane, Space space, u64 addr, u32 bytes, bool write);

// mbarrier.cpp
Mbarrier& mbarrierAt(Machine& m, Warp* w, int lane, Cta* c, u32 off, const char* what);
void mbarrierArrive(Machine& m, Warp* w, int lane, Cta* c, u32 off, u32 count, const char* what);
void mbarrierTx(Machine& m, Warp* w, int lane, Cta* c, u32 off, i64 bytes, const char* what);

void mbarrierInit(Machine& m, Warp& w, int lane, Cta* c, u32 off, u32 count);
// The object is used by the async proxy, or by a thread of another CTA.
void mbarrierInitFence(Machine& m, Warp& w, int lane, Cta* c, u32 off, bool async, const char* what);

// barrier.cpp
void barriersAfterExit(Machine& m, Warp& w);

// async.cpp, wgmma.cpp, tcgen05.cpp
void asyncAtWarpExit(Warp& w);
void wgmmaRegisterCheck(Warp& w, const Inst& in);
void wgmmaTrackAccesses(Warp& w, const Ext& x);
void tmemAtCtaExit(Machine& m, Cta* c);
void tmemRegisterCheck(Warp& w, const Inst& in);

std::unique_ptr<Kernel> decode(Module& mod, const std::string& entry);
std::unique_ptr<Module> loadModule(std::string_view text);

inline u32 Warp::threadId(int lane) const { return cta->threadBase + id * kWarp + u32(lane); }

template <class F>
inline void forLanes(u32 m, F&& f) {
    while (m) {
        int l = std::countr_zero(m);
        m &= m - 1;
        f(l);
    }
}

}  // namespace ptx_emulator
