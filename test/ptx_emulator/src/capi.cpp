#include "capi.hpp"

#include "machine.hpp"
#include "tma.hpp"

using namespace ptx_emulator;

struct ptx_emulator_module {
    std::unique_ptr<Module> mod;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    std::string entries, info;
    Kernel* kernel(const std::string& name) {
        auto& k = kernels[name];
        if (!k) k = decode(*mod, name);
        return k.get();
    }
};
struct ptx_emulator_session {
    Machine m;
    std::string stats;
};

namespace {
thread_local std::string lastError, lastKind;
template <class F>
auto guarded(F f, decltype(f()) bad) -> decltype(f()) {
    try {
        lastError.clear();
        lastKind.clear();
        return f();
    } catch (EmuError& e) {
        lastError = e.what();
        lastKind = e.kind;
    } catch (std::exception& e) {
        lastError = e.what();
        lastKind = "internal";
    }
    return bad;
}
}  // namespace

extern "C" {

const char* ptx_emulator_error(void) { return lastError.c_str(); }
const char* ptx_emulator_error_kind(void) { return lastKind.c_str(); }

ptx_emulator_module* ptx_emulator_module_load(const char* text, size_t bytes) {
    return guarded(
        [&] {
            auto m = std::make_unique<ptx_emulator_module>();
            m->mod = loadModule({text, bytes});
            return m.release();
        },
        nullptr);
}
void ptx_emulator_module_free(ptx_emulator_module* m) { delete m; }
const char* ptx_emulator_module_entries(ptx_emulator_module* m) {
    m->entries.clear();
    for (auto& f : m->mod->functions)
        if (f.isEntry && f.hasBody) m->entries += f.name + "\n";
    return m->entries.c_str();
}
uint64_t ptx_emulator_module_global(ptx_emulator_module* m, const char* name) {
    auto it = m->mod->globalAddress.find(name);
    return it == m->mod->globalAddress.end() ? 0 : it->second;
}
const char* ptx_emulator_kernel_info(ptx_emulator_module* m, const char* entry) {
    return guarded(
        [&]() -> const char* {
            Kernel* k = m->kernel(entry);
            m->info = "params";
            for (auto& p : k->params) m->info += strf(" %u", p.size);
            m->info +=
                strf("\ninstructions %zu\nvirtual_registers %u\nregister_bytes %u\nstatic_smem %u\nlocal_bytes %u\n",
                     k->code.size(), k->vregs, k->regBytes, k->staticSmem, k->localBytes);
            return m->info.c_str();
        },
        nullptr);
}

ptx_emulator_session* ptx_emulator_session_new(void) { return new ptx_emulator_session; }
void ptx_emulator_session_free(ptx_emulator_session* s) { delete s; }
int ptx_emulator_session_option(ptx_emulator_session* s, const char* name, int64_t v) {
    Options& o = s->m.opt;
    std::string n = name;
    if (n == "seed")
        o.seed = u64(v);
    else if (n == "num_sms")
        o.numSms = u32(v);
    else if (n == "budget")
        o.budget = u64(v);
    else if (n == "check_uninit_smem")
        o.checkUninitSmem = v;
    else if (n == "nan_operands")
        o.nanOperands = v;
    else if (n == "check_proxy")
        o.checkProxy = v;
    else if (n == "check_inflight")
        o.checkInflight = v;
    else if (n == "check_bounds")
        o.checkBounds = v;
    else if (n == "strict_proxy")
        o.strictProxy = v;
    else if (n == "reorder_commits")
        o.reorderCommits = v;
    else if (n == "strict_regs")
        o.strictRegs = v;
    else if (n == "check_exit")
        o.checkExit = v;
    else if (n == "check_fences")
        o.checkFences = v;
    else if (n == "check_order")
        o.checkOrder = v;
    else if (n == "counters")
        o.counters = v;
    else if (n == "hopper_sums")
        o.hopper = v;
    else if (n == "max_delay")
        o.maxDelay = u32(v);
    else if (n == "max_slice")
        o.maxSlice = std::max<u32>(1, u32(v));
    else {
        lastError = "unknown option " + n;
        return 1;
    }
    return 0;
}
int ptx_emulator_session_region(ptx_emulator_session* s, uint64_t a, uint64_t bytes, int ro, const char* name) {
    s->m.addRegion(a, bytes, ro, name);
    return 0;
}

int ptx_emulator_session_launch(ptx_emulator_session* s, ptx_emulator_module* m, const char* entry,
                                const uint32_t grid[3], const uint32_t block[3], const uint32_t cluster[3],
                                uint32_t dyn, const void* const* params, const uint32_t* sizes, uint32_t count) {
    return guarded(
        [&] {
            Kernel* k = m->kernel(entry);
            if (s->m.opt.strictRegs && !k->maybeUninit.empty())
                throw EmuError("uninit_register",
                               strf("[uninit_register] %zu registers may be read before they are written, first %s",
                                    k->maybeUninit.size(), k->maybeUninit[0].c_str()));
            auto l = std::make_unique<Launch>();
            l->kernel = k;
            l->dynSmem = dyn;
            l->index = u32(s->m.launches.size());
            u32 threads = 1, maxThreads = 1;
            l->numClusters = 1;
            for (int i = 0; i < 3; i++) {
                l->grid[i] = grid[i];
                l->block[i] = block[i];
                l->cluster[i] = cluster[i] ? cluster[i] : k->reqcluster[i] ? k->reqcluster[i] : 1;
                if (!grid[i] || !block[i] || grid[i] % l->cluster[i])
                    throw EmuError("launch",
                                   strf("[launch] grid %u is not a positive multiple of cluster %u in dimension %d",
                                        grid[i], l->cluster[i], i));
                if (k->reqcluster[i] && k->reqcluster[i] != l->cluster[i])
                    throw EmuError("launch", "[launch] cluster size differs from the kernel's required one");
                if (k->reqntid[0] && k->reqntid[i] != block[i])
                    throw EmuError("launch", "[launch] block size differs from .reqntid");
                threads *= block[i];
                maxThreads *= std::max<u32>(k->maxntid[i], 1);
                l->numClusters *= grid[i] / l->cluster[i];
            }
            if (threads > 1024 || (k->maxntid[0] && threads > maxThreads))
                throw EmuError("launch", strf("[launch] %u threads per block exceed .maxntid or 1024", threads));
            if (l->cluster[0] * l->cluster[1] * l->cluster[2] > 16)
                throw EmuError("launch", "[launch] cluster larger than 16");
            if (k->staticSmem + dyn > 227 * 1024)
                throw EmuError("launch",
                               strf("[launch] %u bytes of shared memory exceed 227 KiB", k->staticSmem + dyn));
            if (count != k->params.size())
                throw EmuError("launch", strf("[launch] kernel has %zu parameters, %u given", k->params.size(), count));
            l->paramStorage = std::make_unique<u8[]>(k->paramBytes + 256);
            l->params = (u8*)alignUp(u64(l->paramStorage.get()), 128);
            std::memset(l->params, 0, k->paramBytes);
            for (u32 i = 0; i < count; i++) {
                if (sizes[i] != k->params[i].size)
                    throw EmuError(
                        "launch", strf("[launch] parameter %u has %u bytes, %u given", i, k->params[i].size, sizes[i]));
                std::memcpy(l->params + k->params[i].offset, params[i], sizes[i]);
            }
            s->m.addRegion(u64(l->params), alignUp(k->paramBytes, 128), true, "kernel parameters");
            for (auto& v : m->mod->vars)
                if (auto it = m->mod->globalAddress.find(v.name); it != m->mod->globalAddress.end())
                    s->m.addRegion(it->second, std::max<u64>(v.size, 1), v.space == Space::Const, v.name);
            s->m.launches.push_back(std::move(l));
            return 0;
        },
        1);
}

int ptx_emulator_session_run(ptx_emulator_session* s) {
    return guarded(
        [&] {
            s->m.run();
            return 0;
        },
        1);
}
const char* ptx_emulator_session_stats(ptx_emulator_session* s) {
    const Stats& t = s->m.stats;
    s->stats = strf("warp_instrs %lu\nthread_instrs %lu\ntensor_ops %lu\nbulk_ops %lu\nseconds %.6f\n", t.warpInstrs,
                    t.threadInstrs, t.tensorOps, t.bulkOps, t.seconds);
    return s->stats.c_str();
}
const char* ptx_emulator_session_counters(ptx_emulator_session* s) {
    s->stats = "names";
    for (auto* n : kCounterNames) s->stats += std::string(" ") + n;
    for (auto& c : s->m.counters) {
        s->stats += strf("\ncta %u %lu %lu", c.launch, c.cta, c.received);
        for (auto& w : c.warps) {
            s->stats += "\nwarp";
            for (u64 v : w) s->stats += strf(" %lu", v);
        }
    }
    return s->stats.c_str();
}
const char* ptx_emulator_session_warnings(ptx_emulator_session* s) {
    s->stats.clear();
    for (auto& [text, n] : s->m.warnings) s->stats += text + strf(" (%lu times)\n", n);
    return s->stats.c_str();
}
const char* ptx_emulator_session_output(ptx_emulator_session* s) { return s->m.printfOutput.c_str(); }

int ptx_emulator_encode_tiled(void* map, int type, uint32_t rank, uint64_t address, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* es, int interleave,
                              int swizzle, int l2, int oob) {
    lastKind = "tensormap";
    lastError = encodeTiled(map, type, rank, address, dims, strides, box, es, interleave, swizzle, l2, oob);
    return lastError.empty() ? 0 : 1;
}

}  // extern "C"
