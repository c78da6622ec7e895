// Liveness and linear scan.  nvcc's PTX is in SSA style with thousands of
// virtual registers; packing them keeps a warp's register file in the L1 cache.
#include <algorithm>
#include <queue>
#include "decoder.hpp"

namespace ptx_emulator {

namespace {
struct Bits {
    std::vector<u64> w;
    explicit Bits(size_t n = 0) : w((n + 63) / 64) {}
    void set(size_t i) { w[i / 64] |= u64(1) << (i % 64); }
    void reset(size_t i) { w[i / 64] &= ~(u64(1) << (i % 64)); }
    bool test(size_t i) const { return w[i / 64] >> (i % 64) & 1; }
    template <class F>
    void each(F f) const {
        for (size_t k = 0; k < w.size(); k++)
            for (u64 b = w[k]; b; b &= b - 1) f(k * 64 + size_t(std::countr_zero(b)));
    }
};
}  // namespace

void allocateRegisters(Decoder& d) {
    size_t n = d.work_.size(), regs = d.f_.regs.size();

    // Basic blocks.
    std::vector<bool> leader(n + 1);
    leader[0] = leader[n] = true;
    for (size_t i = 0; i < n; i++) {
        const Inst& in = d.work_[i];
        if (!in.setsPc) continue;
        leader[i + 1] = true;
        if (in.branch) leader[in.target] = true;
        if (in.x)
            for (u32 t : in.x->targets) leader[t] = true;
    }
    std::vector<size_t> start, blockOf(n + 1);
    for (size_t i = 0; i < n; i++) {
        if (leader[i]) start.push_back(i);
        blockOf[i] = start.size() - 1;
    }
    size_t nb = start.size();
    start.push_back(n);
    std::vector<std::vector<size_t>> succ(nb), preds(nb);
    std::vector<Bits> gen(nb, Bits(regs)), kill(nb, Bits(regs)), in(nb, Bits(regs)), out(nb, Bits(regs));
    for (size_t b = 0; b < nb; b++) {
        const Inst& last = d.work_[start[b + 1] - 1];
        bool falls = !last.setsPc || last.guard != 0xffff;
        if (falls && b + 1 < nb) succ[b].push_back(b + 1);
        if (last.setsPc && last.branch) succ[b].push_back(blockOf[last.target]);
        if (last.setsPc && last.x)
            for (u32 t : last.x->targets) succ[b].push_back(blockOf[t]);
        for (size_t s : succ[b]) preds[s].push_back(b);
        for (size_t i = start[b + 1]; i-- > start[b];) {
            if (d.work_[i].guard == 0xffff)
                for (int v : d.defs_[i]) kill[b].set(size_t(v)), gen[b].reset(size_t(v));
            for (int v : d.uses_[i]) gen[b].set(size_t(v));
        }
    }
    std::vector<bool> queued(nb, true);
    std::deque<size_t> work;
    for (size_t b = nb; b-- > 0;) work.push_back(b);
    while (!work.empty()) {
        size_t b = work.front();
        work.pop_front();
        queued[b] = false;
        for (size_t s : succ[b])
            for (size_t k = 0; k < out[b].w.size(); k++) out[b].w[k] |= in[s].w[k];
        bool changed = false;
        for (size_t k = 0; k < in[b].w.size(); k++) {
            u64 v = gen[b].w[k] | (out[b].w[k] & ~kill[b].w[k]);
            changed |= v != in[b].w[k];
            in[b].w[k] = v;
        }
        if (changed)
            for (size_t p : preds[b])
                if (!queued[p]) queued[p] = true, work.push_back(p);
    }

    in[0].each([&](size_t v) {
        if (v < d.f_.regNames.size()) d.k_->maybeUninit.push_back(d.f_.regNames[v]);
    });

    constexpr u32 kNever = ~0u;
    std::vector<u32> first(regs, kNever), last(regs, 0);
    auto touch = [&](size_t v, size_t at) {
        first[v] = std::min(first[v], u32(at));
        last[v] = std::max(last[v], u32(at));
    };
    for (size_t b = 0; b < nb; b++) {
        in[b].each([&](size_t v) { touch(v, start[b]); });
        out[b].each([&](size_t v) { touch(v, start[b + 1] - 1); });
    }
    for (size_t i = 0; i < n; i++) {
        for (int v : d.uses_[i]) touch(size_t(v), i);
        for (int v : d.defs_[i]) touch(size_t(v), i);
    }
    for (size_t v = 0; v < regs; v++)
        if (d.pinned_[v] && first[v] != kNever) first[v] = 0, last[v] = u32(n);

    std::vector<u32> order, offset(regs, kNoOperand);
    for (size_t v = 0; v < regs; v++)
        if (first[v] != kNever && d.f_.regs[v].bits != 1) order.push_back(u32(v));
    std::sort(order.begin(), order.end(),
              [&](u32 a, u32 b) { return first[a] != first[b] ? first[a] < first[b] : a < b; });
    struct Pool {
        u32 slots = 0;
        std::vector<u32> free;
        std::priority_queue<std::pair<u32, u32>, std::vector<std::pair<u32, u32>>, std::greater<>> active;
    };
    Pool pool[3];
    std::vector<u8> cls(regs);
    for (u32 v : order) {
        u8 bits = d.f_.regs[v].bits;
        int c = bits <= 32 ? 0 : bits == 64 ? 1 : 2;
        cls[v] = u8(c);
        Pool& p = pool[c];
        while (!p.active.empty() && p.active.top().first < first[v]) {
            p.free.push_back(p.active.top().second);
            p.active.pop();
        }
        u32 slot;
        if (p.free.empty())
            slot = p.slots++;
        else
            slot = p.free.back(), p.free.pop_back();
        offset[v] = slot;
        p.active.push({last[v], slot});
    }
    u32 base[3], cursor = 0;
    for (int c = 2; c >= 0; c--) {
        base[c] = cursor;
        cursor += pool[c].slots * (128u << c);
    }
    d.k_->regBytes = cursor;
    d.k_->vregs = u32(order.size());
    for (auto& f : d.fix_) {
        if (offset[size_t(f.vreg)] == kNoOperand) continue;
        *f.field = base[cls[size_t(f.vreg)]] + offset[size_t(f.vreg)] * (128u << cls[size_t(f.vreg)]);
    }
    for (auto& [name, v] : d.specials_)
        d.k_->specials.push_back({name, base[cls[size_t(v)]] + offset[size_t(v)] * (128u << cls[size_t(v)])});
}

}  // namespace ptx_emulator
