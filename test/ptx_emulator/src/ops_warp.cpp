// Warp-level exchange (shfl, vote, match, redux, elect, ...) and control flow.
#include "lanes.hpp"

namespace ptx_emulator {
namespace {

// `.sync` with a member mask: every live member must have arrived here.  Groups
// that name different masks at one instruction are handled together, provided
// that each mask is covered.
bool membersHere(Warp& w, const u8* maskReg, u32 m) {
    bool ok = true;
    forLanes(m, [&](int l) {
        u32 need = rd<u32>(maskReg, l);
        if (!(need >> l & 1))
            w.m->fault(&w, l, "membermask", strf("executing lane %d is not in its own membermask %#x", l, need));
        if (need & w.live & ~m) ok = false;
    });
    return ok;
}

// in.n: 0 up, 1 down, 2 bfly, 3 idx
Status shflExec(Warp& w, const Inst& in, u32 m) {
    if (in.x && !membersHere(w, w.src(in.x->s0[0]), m)) return converge(w);
    const u8 *a = w.src(in.a), *b = w.src(in.b), *c = w.src(in.c);
    u32 tmp[kWarp], valid = 0;
    forLanes(m, [&](int l) {
        u32 bv = rd<u32>(b, l) & 31, cv = rd<u32>(c, l);
        u32 segmask = (cv >> 8) & 31, clamp = cv & 31;
        int maxLane = int((u32(l) & segmask) | (clamp & ~segmask)), minLane = int(u32(l) & segmask), j = 0;
        bool p = false;
        switch (in.n) {
            case 0:
                j = l - int(bv);
                p = j >= maxLane;
                break;
            case 1:
                j = l + int(bv);
                p = j <= maxLane;
                break;
            case 2:
                j = l ^ int(bv);
                p = j <= maxLane;
                break;
            default:
                j = minLane | int(bv & ~segmask);
                p = j <= maxLane;
                break;
        }
        if (!p) j = l;
        tmp[l] = rd<u32>(a, j);
        valid |= u32(p) << l;
    });
    u8* d = w.reg(in.d);
    forLanes(m, [&](int l) { wr<u32>(d, l, tmp[l]); });
    if (in.p != 0xffff) setPred(w, in.p, m, valid);
    return Status::Next;
}
void buildShfl(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = shflExec;
    in.n = s.has("up") ? 0 : s.has("down") ? 1 : s.has("bfly") ? 2 : 3;
    d.dst(in.d, s.ops[0], s, 4);
    if (s.ops[0].reg2 >= 0) in.p = d.predIndex(s.ops[0].reg2);
    d.src(in.a, s.ops[1], s, 4);
    d.src(in.b, s.ops[2], s, 4);
    d.src(in.c, s.ops[3], s, 4);
    if (s.has("sync")) d.srcList(d.ext(in).s0, s.ops[4], s, 4);
}

// vote.sync.{all,any,uni,ballot}
Status voteExec(Warp& w, const Inst& in, u32 m) {
    if (!membersHere(w, w.src(in.c), m)) return converge(w);
    u32 v = w.predMask(in.p);
    u32 result = 0;
    u32 out[kWarp];
    forLanes(m, [&](int l) {
        u32 mem = rd<u32>(w.src(in.c), l) & w.live, t = v & mem;
        out[l] = t;
        bool r = in.n == 0 ? t == mem : in.n == 1 ? t != 0 : t == 0 || t == mem;
        result |= u32(r) << l;
    });
    if (in.n == 3)
        forLanes(m, [&](int l) { wr<u32>(w.reg(in.d), l, out[l]); });
    else
        setPred(w, in.q, m, result);
    return Status::Next;
}
void buildVote(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = voteExec;
    in.n = s.has("all") ? 0 : s.has("any") ? 1 : s.has("uni") ? 2 : 3;
    if (in.n == 3)
        d.dst(in.d, s.ops[0], s, 4);
    else
        in.q = d.predDst(s.ops[0], s);
    in.p = s.ops[1].kind == Operand::Imm ? (s.ops[1].imm ? 0xffff : 0xfffe) : d.predSrc(s.ops[1], s);
    d.src(in.c, s.ops[2], s, 4);
}

Status matchExec(Warp& w, const Inst& in, u32 m) {
    if (!membersHere(w, w.src(in.c), m)) return converge(w);
    u32 out[kWarp], allMask = 0;
    auto val = [&](int l) { return in.sa == 8 ? rd<u64>(w.src(in.a), l) : u64(rd<u32>(w.src(in.a), l)); };
    forLanes(m, [&](int l) {
        u32 mem = rd<u32>(w.src(in.c), l) & w.live, same = 0;
        forLanes(mem, [&](int k) { same |= u32(val(k) == val(l)) << k; });
        if (in.n) {
            bool all = same == mem;
            out[l] = all ? mem : 0;
            allMask |= u32(all) << l;
        } else
            out[l] = same;
    });
    forLanes(m, [&](int l) { wr<u32>(w.reg(in.d), l, out[l]); });
    if (in.p != 0xffff) setPred(w, in.p, m, allMask);
    return Status::Next;
}
void buildMatch(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = matchExec;
    in.n = s.has("all");
    d.dst(in.d, s.ops[0], s, 4);
    if (s.ops[0].reg2 >= 0) in.p = d.predIndex(s.ops[0].reg2);
    in.sa = typeBytes(s.op.back()) == 8 ? 8 : 4;
    d.src(in.a, s.ops[1], s, in.sa);
    d.src(in.c, s.ops[2], s, 4);
}

Status reduxExec(Warp& w, const Inst& in, u32 m) {
    if (!membersHere(w, w.src(in.c), m)) return converge(w);
    u32 out[kWarp];
    forLanes(m, [&](int l) {
        u32 mem = rd<u32>(w.src(in.c), l) & w.live;
        bool first = true;
        u32 r = 0;
        forLanes(mem, [&](int k) {
            u32 v = rd<u32>(w.src(in.a), k);
            if (first) {
                r = in.n == 9 || in.n == 10 ? asBits(in.q & 1 ? std::fabs(asFloat(v)) : asFloat(v)) : v;
                first = false;
                return;
            }
            switch (in.n) {
                case 0: r += v; break;
                case 1: r = std::min(r, v); break;
                case 2: r = std::max(r, v); break;
                case 3: r = u32(std::min(i32(r), i32(v))); break;
                case 4: r = u32(std::max(i32(r), i32(v))); break;
                case 5: r &= v; break;
                case 6: r |= v; break;
                case 7: r ^= v; break;
                default: {
                    float x = asFloat(r), y = in.q & 1 ? std::fabs(asFloat(v)) : asFloat(v);
                    if ((in.q & 2) && (std::isnan(x) || std::isnan(y)))
                        r = 0x7fffffff;
                    else
                        r = asBits(in.n == 9 ? std::fmin(x, y) : std::fmax(x, y));
                }
            }
        });
        out[l] = r;
    });
    forLanes(m, [&](int l) { wr<u32>(w.reg(in.d), l, out[l]); });
    return Status::Next;
}
void buildRedux(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = reduxExec;
    const std::string& t = s.op.back();
    bool sg = t == "s32", fl = t == "f32";
    in.n = s.has("add")   ? 0
           : s.has("min") ? (fl   ? 9
                             : sg ? 3
                                  : 1)
           : s.has("max") ? (fl   ? 10
                             : sg ? 4
                                  : 2)
           : s.has("and") ? 5
           : s.has("or")  ? 6
                          : 7;
    in.q = u16((s.has("abs") ? 1 : 0) | (s.has("NaN") ? 2 : 0));
    d.dst(in.d, s.ops[0], s, 4);
    d.src(in.a, s.ops[1], s, 4);
    d.src(in.c, s.ops[2], s, 4);
}

Status activemaskExec(Warp& w, const Inst& in, u32 m) {
    eachLane<u32>(w.reg(in.d), m, [=](int) { return m; });
    return Status::Next;
}
void buildActivemask(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = activemaskExec;
    d.dst(in.d, s.ops[0], s, 4);
}

Status electExec(Warp& w, const Inst& in, u32 m) {
    if (!membersHere(w, w.src(in.c), m)) return converge(w);
    u32 p = 0;
    forLanes(m, [&](int l) {
        u32 leader = u32(std::countr_zero(rd<u32>(w.src(in.c), l) & w.live));
        wr<u32>(w.reg(in.d), l, leader);
        p |= u32(u32(l) == leader) << l;
    });
    setPred(w, in.p, m, p);
    return Status::Next;
}
void buildElect(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = electExec;
    d.dst(in.d, s.ops[0], s, 4);
    in.p = s.ops[0].reg2 >= 0 ? d.predIndex(s.ops[0].reg2) : 0;
    d.src(in.c, s.ops[1], s, 4);
}

// --- control ----------------------------------------------------------------------
void buildBra(Decoder&, const Stmt&, Inst& in) { in.branch = in.setsPc = true; }
Status exitExec(Warp&, const Inst&, u32) { return Status::Exit; }
void buildExit(Decoder&, const Stmt&, Inst& in) {
    in.fn = exitExec;
    in.setsPc = true;
}
Status trapExec(Warp& w, const Inst&, u32 m) {
    w.m->fault(&w, std::countr_zero(m), "trap",
               "trap executed" + (w.m->printfOutput.empty() ? std::string() : "; device printf: " + w.m->printfOutput));
}
void buildTrap(Decoder&, const Stmt&, Inst& in) { in.fn = trapExec; }

Status brxExec(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    std::map<u32, u32> dest;
    forLanes(m, [&](int l) {
        u32 k = rd<u32>(w.src(in.a), l);
        if (k >= x.targets.size())
            w.m->fault(&w, l, "brx_range", strf("brx.idx index %u, the list has %zu targets", k, x.targets.size()));
        dest[x.targets[k]] |= 1u << l;
    });
    if (w.act & ~m) dest[w.pc + 1] |= w.act & ~m;
    auto it = dest.begin();
    w.pc = it->first;
    w.act = it->second;
    for (++it; it != dest.end(); ++it) w.groups[w.ng++] = {it->first, it->second, Block::None, 0};
    return Status::Jump;
}
void buildBrx(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = brxExec;
    in.setsPc = true;
    d.src(in.a, s.ops[0], s, 4);
}

Status nanosleepExec(Warp&, const Inst&, u32) { return Status::Yield; }
Status nopExec(Warp&, const Inst&, u32) { return Status::Next; }

Status gridWaitExec(Warp& w, const Inst&, u32) {
    constexpr u64 kLate = 200000;  // warp instructions: other launches may poll until this one goes on
    Machine& m = *w.m;
    Launch& l = *w.cta->cluster->launch;
    if (l.independent) return Status::Next;
    if (!l.awaited && m.launches.size() > 1) m.schedule(kLate, [&m, &l] { m.endDependency(l); });
    l.awaited = true;
    w.block = Block::GridDependency;
    return Status::Block;
}
void buildGridDependency(Decoder& d, const Stmt& s, Inst& in) {
    in.fn = nopExec;
    if (!s.has("wait")) return;
    in.fn = gridWaitExec;
    d.kernel().dependent = true;
}

// setmaxnreg: registers are not limited, but the counts must fit the register file, where it would wait for ever.
Status setmaxnregExec(Warp& w, const Inst& in, u32 m) {
    if (m != w.live) return converge(w);
    w.maxRegisters = u32(in.imm);
    u32 total = 0;
    for (auto& q : w.cta->warps) total += q->maxRegisters * kWarp;
    if (total > 65536)
        w.m->fault(&w, -1, "setmaxnreg", strf("the warps of the CTA ask for %u registers, an SM has 65536", total));
    return Status::Next;
}
void buildSetmaxnreg(Decoder& d, const Stmt& s, Inst& in) {
    i64 n = s.ops[0].imm;
    if (n < 24 || n > 256 || n % 8) d.fail(s, "register count must be 24..256 and a multiple of 8");
    in.fn = setmaxnregExec;
    in.imm = n;
}

// --- vprintf and __assertfail, the only externals device code calls -----------------
std::string formatPrintf(const char* fmt, const u8* args) {
    std::string out;
    u32 off = 0;
    auto take = [&](u32 bytes) {
        off = alignUp(off, bytes);
        const u8* p = args + off;
        off += bytes;
        return p;
    };
    for (const char* p = fmt; *p; p++) {
        if (*p != '%') {
            out += *p;
            continue;
        }
        if (p[1] == '%') {
            out += '%';
            p++;
            continue;
        }
        std::string spec = "%";
        p++;
        bool lng = false;
        while (*p && std::strchr("-+ #0123456789.lhzjt", *p)) {
            lng |= *p == 'l' || *p == 'z' || *p == 'j';
            if (!std::strchr("hlzjt", *p)) spec += *p;
            p++;
        }
        char conv = *p;
        if (std::strchr("feEgGaA", conv)) {
            double v;
            std::memcpy(&v, take(8), 8);
            out += strf((spec + conv).c_str(), v);
        } else if (conv == 's') {
            const char* v;
            std::memcpy(&v, take(8), 8);
            out += v ? v : "(null)";
        } else if (conv == 'p') {
            void* v;
            std::memcpy(&v, take(8), 8);
            out += strf("%p", v);
        } else if (conv == 'c') {
            int v;
            std::memcpy(&v, take(4), 4);
            out += char(v);
        } else if (lng) {
            u64 v;
            std::memcpy(&v, take(8), 8);
            out += strf((spec + "l" + conv).c_str(), v);
        } else {
            u32 v;
            std::memcpy(&v, take(4), 4);
            out += strf((spec + conv).c_str(), v);
        }
    }
    return out;
}
Status callExec(Warp& w, const Inst& in, u32 m) {
    const Ext& x = *in.x;
    u32 per = w.cta->cluster->launch->kernel->localBytes;
    forLanes(m, [&](int l) {
        const u8* frame = &w.local[size_t(l) * per];
        auto arg = [&](size_t k) {
            u64 v;
            std::memcpy(&v, frame + x.p[k + 1], 8);
            return v;
        };
        auto deref = [&](u64 a) -> const u8* { return isLocalGeneric(a) ? frame + (a & 0xffffffffu) : (const u8*)a; };
        if (x.text == "vprintf") {
            std::string t = formatPrintf((const char*)deref(arg(0)), deref(arg(1)));
            w.m->printfOutput += t;
            if (x.p[0] >= 0) {
                i32 n = i32(t.size());
                std::memcpy(&w.local[size_t(l) * per + size_t(x.p[0])], &n, 4);
            }
        } else {
            i32 line;
            std::memcpy(&line, frame + x.p[3], 4);
            w.m->fault(&w, l, "assert",
                       strf("device assertion `%s` failed at %s:%d", (const char*)arg(0), (const char*)arg(1), line));
        }
    });
    return Status::Next;
}
void buildCall(Decoder& d, const Stmt& s, Inst& in) {
    Ext& x = d.ext(in);
    const Operand *rets = nullptr, *args = nullptr;
    for (auto& o : s.ops) {
        if (o.kind == Operand::Sym && x.text.empty())
            x.text = o.sym;
        else if (o.kind == Operand::Vec)
            (x.text.empty() ? rets : args) = &o;
    }
    if (x.text != "vprintf" && x.text != "__assertfail") d.fail(s, "call to external function " + x.text);
    auto at = [&](const Operand& o) {
        std::string base;
        i64 disp;
        d.symbolAddress(o, s, base, disp);
        return disp;
    };
    x.p[0] = rets && !rets->elems.empty() ? at(rets->elems[0]) : -1;
    if (args)
        for (size_t k = 0; k < args->elems.size() && k < 8; k++) x.p[k + 1] = at(args->elems[k]);
    in.fn = callExec;
}

PTX_OP("shfl", buildShfl);
PTX_OP("vote", buildVote);
PTX_OP("match", buildMatch);
PTX_OP("redux", buildRedux);
PTX_OP("activemask", buildActivemask);
PTX_OP("elect", buildElect);
PTX_OP("bra", buildBra);
PTX_OP("brx", buildBrx);
PTX_OP("exit", buildExit);
PTX_OP("ret", buildExit);
PTX_OP("trap", buildTrap);
PTX_OP("brkpt", buildTrap);
PTX_OP("call", buildCall);
PTX_OP("setmaxnreg", buildSetmaxnreg);
PTX_OP("nanosleep", [](Decoder&, const Stmt&, Inst& in) { in.fn = nanosleepExec; });
PTX_OP("griddepcontrol", buildGridDependency);
PTX_OP("pmevent", [](Decoder&, const Stmt&, Inst& in) { in.fn = nopExec; });

}  // namespace
}  // namespace ptx_emulator
