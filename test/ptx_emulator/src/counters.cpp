#include "counters.hpp"

#include <algorithm>

#include "lanes.hpp"

namespace ptx_emulator {

const char* const kCounterNames[kCounters] = {"tensor",
                                              "fp32",
                                              "integer",
                                              "convert",
                                              "move",
                                              "shared",
                                              "global",
                                              "bulk",
                                              "barrier",
                                              "other",
                                              "polls",
                                              "smem_loads",
                                              "smem_load_wavefronts",
                                              "smem_load_conflicts",
                                              "smem_stores",
                                              "smem_store_wavefronts",
                                              "smem_store_conflicts",
                                              "gmem_loads",
                                              "gmem_load_sectors",
                                              "gmem_load_min_sectors",
                                              "gmem_stores",
                                              "gmem_store_sectors",
                                              "gmem_store_min_sectors",
                                              "bulk_load_bytes",
                                              "bulk_delivered_bytes",
                                              "bulk_store_bytes",
                                              "bulk_reduce_bytes",
                                              "bulk_dsmem_bytes"};

u8 counterClass(const Stmt& s) {
    const std::string& op = s.op[0];
    auto is = [&](std::initializer_list<const char*> l) {
        return std::any_of(l.begin(), l.end(), [&](const char* x) { return op == x; });
    };
    auto prefix = [&](const char* p) {
        return std::any_of(s.op.begin() + 1, s.op.end(), [&](const std::string& o) { return o.rfind(p, 0) == 0; });
    };
    if (op == "mma" || (op == "wgmma" && s.has("mma_async")) || (op == "tcgen05" && s.op[1] == "mma")) return kTensor;
    if (op == "mbarrier" || op == "bar" || op == "barrier") return kBarrier;
    if (op == "mov") return kMove;
    if (op == "cvt") return kConvert;
    if (op == "ldmatrix" || op == "stmatrix") return kSharedAccess;
    if (op == "cp") {
        if (s.has("mbarrier")) return kBarrier;
        if (s.has("commit_group") || s.has("wait_group") || s.has("wait_all")) return kOther;
        return s.has("bulk") ? kBulk : kGlobalAccess;
    }
    if (is({"ld", "ldu", "st", "atom", "red"})) {
        if (s.has("async")) return kBulk;
        if (prefix("shared")) return kSharedAccess;
        return prefix("param") || prefix("local") || prefix("const") ? kOther : kGlobalAccess;
    }
    if (s.has("f32") || s.has("f32x2"))
        return is({"add", "sub", "mul", "fma", "mad", "min", "max"}) ? kFp32
               : is({"setp", "set", "selp", "slct"})                 ? kInteger
                                                                     : kOther;
    if (s.has("f16") || s.has("f16x2") || s.has("bf16") || s.has("bf16x2") || s.has("f64"))
        return is({"setp", "set", "selp", "slct"}) ? kInteger : kOther;
    if (is({"add", "addc", "sub",  "subc", "mul",  "mad",  "div",   "rem",  "min",        "max",
            "abs", "neg",  "sad",  "and",  "or",   "xor",  "not",   "cnot", "shl",        "shr",
            "shf", "lop3", "prmt", "popc", "clz",  "brev", "bfind", "bfe",  "bfi",        "bmsk",
            "fns", "dp4a", "setp", "set",  "selp", "slct", "cvta",  "mapa", "getctarank", "isspacep"}))
        return kInteger;
    return kOther;
}

WarpCounters::Site& WarpCounters::site(u32 pc, size_t code) {
    if (at_.size() < code) at_.assign(code, -1);
    if (at_[pc] < 0) {
        if (used_ == sites_.size()) sites_.emplace_back();
        at_[pc] = int(used_);
        sites_[used_++].pc = pc;
    }
    return sites_[size_t(at_[pc])];
}

void WarpCounters::issue(const Warp& w, const Inst& in, u32 pc, u32 lanes) {
    if (polling & lanes) {
        // The loop around a failed wait is part of the polling.
        if (in.cls == kInteger || in.cls == kMove || in.cls == kOther || in.poll)
            lanes &= ~polling;
        else
            polling &= ~lanes;
        if (!lanes) return;
    }
    const Kernel& k = *w.cta->cluster->launch->kernel;
    if (lanes == w.live && !used_) {
        n[in.cls]++;
        return;
    }
    Site& s = site(pc, k.code.size());
    for (int l = 0; l < kWarp; l++) s.n[l] += lanes >> l & 1;
    if (in.aligned && lanes == w.live) flush(k);
}

void WarpCounters::flush(const Kernel& k) {
    for (size_t i = 0; i < used_; i++) {
        Site& s = sites_[i];
        n[k.code[s.pc].cls] += *std::max_element(s.n, s.n + kWarp);
        for (auto& a : s.acc) evaluate(a);
        s.acc.clear();
        std::fill_n(s.n, kWarp, 0);
        at_[s.pc] = -1;
    }
    used_ = 0;
}

void WarpCounters::access(const Warp& w, u32 pc, u32 m, const u64* addr, u32 bytes, bool write) {
    if (m && w.act == w.live && !used_) {
        Access a;
        a.mask = m, a.bytes = bytes, a.write = write;
        std::copy_n(addr, kWarp, a.addr);
        evaluate(a);
        return;
    }
    Site& s = site(pc, w.cta->cluster->launch->kernel->code.size());
    forLanes(m, [&](int l) {
        while (s.acc.size() <= s.n[l]) s.acc.emplace_back();
        Access& a = s.acc[s.n[l]];
        a.mask |= 1u << l;
        a.bytes = bytes, a.write = write;
        a.addr[l] = addr[l];
    });
}

void WarpCounters::evaluate(const Access& a) {
    u32 shared = 0, global = 0;
    forLanes(a.mask, [&](int l) {
        if (isSharedGeneric(a.addr[l]))
            shared |= 1u << l;
        else if (!isLocalGeneric(a.addr[l]))
            global |= 1u << l;
    });
    if (shared) {
        // 32 banks of 4 bytes; 8-byte accesses are served per half warp, 16-byte ones per
        // quarter warp; a word wanted by several lanes of a phase is read once.
        u32 lanes = a.bytes <= 4 ? 32 : a.bytes <= 8 ? 16 : 8, wavefronts = 0, phases = 0;
        for (u32 first = 0; first < kWarp; first += lanes) {
            u64 words[64];
            u32 count = 0;
            for (u32 l = first; l < first + lanes; l++)
                if (shared >> l & 1)
                    for (u64 word = a.addr[l] / 4; word <= (a.addr[l] + a.bytes - 1) / 4 && count < 64; word++)
                        words[count++] = word;
            if (!count) continue;
            std::sort(words, words + count);
            count = u32(std::unique(words, words + count) - words);
            u32 bank[32] = {}, most = 0;
            for (u32 i = 0; i < count; i++) most = std::max(most, ++bank[words[i] % 32]);
            wavefronts += most;
            phases++;
        }
        int k = a.write ? kSmemStores : kSmemLoads;
        n[k]++, n[k + 1] += wavefronts, n[k + 2] += wavefronts - phases;
    }
    if (global) {
        std::pair<u64, u64> span[kWarp];
        u32 count = 0;
        forLanes(global, [&](int l) { span[count++] = {a.addr[l], a.addr[l] + a.bytes}; });
        std::sort(span, span + count);
        u64 sectors = 0, unique = 0, lastSector = ~u64(0), end = 0;
        for (u32 i = 0; i < count; i++) {
            for (u64 s = span[i].first / 32; s <= (span[i].second - 1) / 32; s++)
                if (lastSector == ~u64(0) || s > lastSector) sectors++, lastSector = s;
            unique += span[i].second - std::min(span[i].second, std::max(span[i].first, end));
            end = std::max(end, span[i].second);
        }
        int k = a.write ? kGmemStores : kGmemLoads;
        n[k]++, n[k + 1] += sectors, n[k + 2] += (unique + 31) / 32;
    }
}

void countAccess(Warp& w, const Inst& in, u32 m, u32 bytes, bool write) {
    Space sp = Space(in.space);
    if (sp != Space::Shared && sp != Space::Global && sp != Space::Generic) return;
    const u8* a = w.src(in.a);
    const Launch& launch = *w.cta->cluster->launch;
    const u64 params = u64(launch.params), paramBytes = launch.kernel->paramBytes;
    u64 addr[kWarp] = {};
    forLanes(m, [&](int l) {
        u64 v = (in.sa == 8 ? rd<u64>(a, l) : rd<u32>(a, l)) + u64(in.imm);
        addr[l] = sp == Space::Shared ? (v & 0xffffffffu) | kSharedWindow : v;
        // Kernel parameters live in constant memory, also when their address was computed.
        if (v - params < paramBytes) m &= ~(1u << l);
    });
    if (m) w.counters->access(w, w.pc, m, addr, bytes, write);
}

void countBulk(Warp& w, Counter what, u64 bytes) {
    if (w.counters) w.counters->n[what] += bytes;
}

}  // namespace ptx_emulator
