#include "decoder.hpp"

#include <algorithm>

namespace ptx_emulator {

namespace {
std::map<std::string, Builder>& builders() {
    static std::map<std::string, Builder> b;
    return b;
}
u32 strideOfBits(u8 bits) { return bits <= 32 ? 4 : bits == 64 ? 8 : 16; }
}  // namespace

RegisterBuilder::RegisterBuilder(const char* op, Builder b) { builders()[op] = b; }

Decoder::Decoder(Module& mod, const std::string& entry) : mod_(mod), k_(std::make_unique<Kernel>()) {
    auto it = mod.functionIndex.find(entry);
    if (it == mod.functionIndex.end() || !mod.functions[it->second].hasBody)
        throw EmuError("decode", "no entry named " + entry);
    f_ = mod.functions[it->second];
    k_->name = entry;
    k_->module = &mod;
    std::copy_n(f_.maxntid, 3, k_->maxntid);
    std::copy_n(f_.reqntid, 3, k_->reqntid);
    std::copy_n(f_.reqctapercluster, 3, k_->reqcluster);
}

void Decoder::fail(const Stmt& s, const std::string& why) const {
    throw EmuError("unsupported",
                   strf("PTX line %u: `%s`: %s (kernel %s)", s.line, s.name().c_str(), why.c_str(), k_->name.c_str()));
}

// ---------------------------------------------------------------------------
// Calls to functions with a body are expanded in place; formal parameters
// become aliases of the caller's .param variables.
void Decoder::inlineCalls() {
    for (int depth = 0;; depth++) {
        bool again = false;
        std::vector<Stmt> body;
        std::vector<int> newIndex(f_.body.size() + 1);
        std::vector<Stmt> old = std::move(f_.body);
        size_t oldScopes = f_.scopes.size();
        for (size_t i = 0; i < old.size(); i++) {
            newIndex[i] = int(body.size());
            Stmt& s = old[i];
            const Operand *rets = nullptr, *args = nullptr;
            std::string callee;
            if (s.op[0] == "call") {
                for (auto& o : s.ops) {
                    if (o.kind == Operand::Sym && callee.empty())
                        callee = o.sym;
                    else if (o.kind == Operand::Vec)
                        (callee.empty() ? rets : args) = &o;
                }
            }
            auto it = callee.empty() ? mod_.functionIndex.end() : mod_.functionIndex.find(callee);
            if (it == mod_.functionIndex.end() || !mod_.functions[it->second].hasBody) {
                body.push_back(std::move(s));
                continue;
            }
            if (depth > 32) fail(s, "recursive calls are not supported");
            again = true;
            const Function& g = mod_.functions[it->second];
            int regBase = int(f_.regs.size()), scopeBase = int(f_.scopes.size()), varBase = int(f_.vars.size());
            f_.regs.insert(f_.regs.end(), g.regs.begin(), g.regs.end());
            f_.regNames.insert(f_.regNames.end(), g.regNames.begin(), g.regNames.end());
            std::vector<int> varMap(g.vars.size());
            for (size_t v = 0; v < g.vars.size(); v++) varMap[v] = varBase + int(v);
            f_.vars.insert(f_.vars.end(), g.vars.begin(), g.vars.end());
            auto aliasParams = [&](const std::vector<int>& formals, const Operand* actuals) {
                for (size_t k = 0; k < formals.size(); k++) {
                    if (!actuals || k >= actuals->elems.size() || actuals->elems[k].kind != Operand::Var)
                        fail(s, "call argument is not a .param variable");
                    varMap[size_t(formals[k])] = actuals->elems[k].var;
                }
            };
            aliasParams(g.rets, rets);
            aliasParams(g.params, args);
            int bodyBase = int(body.size()) + (s.guard >= 0 ? 1 : 0);
            int endIndex = bodyBase + int(g.body.size());
            std::string endLabel = strf("$ptx_emulator_ret_%d_%zu", depth, i);
            for (auto sc : g.scopes) {
                sc.parent = sc.parent < 0 ? 0 : sc.parent + scopeBase;
                for (auto& [n, v] : sc.labels) v += bodyBase;
                f_.scopes.push_back(std::move(sc));
            }
            f_.scopes[size_t(scopeBase)].labels[endLabel] = endIndex;
            std::function<void(Operand&)> shift = [&](Operand& o) {
                if (o.reg >= 0) o.reg += regBase;
                if (o.reg2 >= 0) o.reg2 += regBase;
                if (o.var >= 0) o.var = varMap[size_t(o.var)];
                for (auto& e : o.elems) shift(e);
            };
            auto jump = [&](int scope, int guard, bool neg) {
                Stmt j;
                j.op = {"bra"};
                j.line = s.line;
                j.scope = scope;
                j.guard = guard;
                j.guardNeg = neg;
                Operand o;
                o.kind = Operand::Sym;
                o.sym = endLabel;
                j.ops = {o};
                return j;
            };
            if (s.guard >= 0) body.push_back(jump(scopeBase, s.guard, !s.guardNeg));
            for (Stmt t : g.body) {
                t.scope += scopeBase;
                if (t.guard >= 0) t.guard += regBase;
                for (auto& o : t.ops) shift(o);
                if (t.op[0] == "ret") t = jump(scopeBase, t.guard, t.guardNeg);
                body.push_back(std::move(t));
            }
        }
        newIndex[old.size()] = int(body.size());
        for (size_t sc = 0; sc < oldScopes; sc++)
            for (auto& [n, v] : f_.scopes[sc].labels) v = newIndex[size_t(v)];
        f_.body = std::move(body);
        if (!again) return;
    }
}

void Decoder::layout() {
    u32 off = 0;
    varOffset_.assign(f_.vars.size(), 0);
    for (int p : f_.params) {
        Variable& v = f_.vars[size_t(p)];
        off = alignUp(off, v.align);
        varOffset_[size_t(p)] = off;
        k_->params.push_back({off, u32(v.size)});
        off += u32(v.size);
    }
    k_->paramBytes = off;
    u32 local = 0, smem = kSmemReserved;
    for (size_t i = 0; i < f_.vars.size(); i++) {
        Variable& v = f_.vars[i];
        if (std::find(f_.params.begin(), f_.params.end(), int(i)) != f_.params.end()) continue;
        u32& cursor = v.space == Space::Shared ? smem : local;
        if (v.space == Space::Shared || v.space == Space::Local || v.space == Space::Param) {
            cursor = alignUp(cursor, std::max<u32>(v.align, 1));
            varOffset_[i] = cursor;
            cursor += u32(v.size);
        }
    }
    // Module-level shared variables that this kernel names.
    std::vector<std::string> used;
    std::function<void(const Operand&)> scan = [&](const Operand& o) {
        if (!o.sym.empty())
            if (auto it = mod_.varIndex.find(o.sym);
                it != mod_.varIndex.end() && mod_.vars[size_t(it->second)].space == Space::Shared)
                if (std::find(used.begin(), used.end(), o.sym) == used.end()) used.push_back(o.sym);
        for (auto& e : o.elems) scan(e);
    };
    for (auto& s : f_.body)
        for (auto& o : s.ops) scan(o);
    for (int dynamic = 0; dynamic < 2; dynamic++)
        for (auto& n : used) {
            Variable& v = mod_.vars[size_t(mod_.varIndex[n])];
            if ((v.isExtern || v.size == 0) != bool(dynamic)) continue;
            u32 at = alignUp(smem, std::max<u32>(v.align, 1));
            smemOffsets_[n] = at;
            if (dynamic) {
                k_->staticSmem = std::max(k_->staticSmem, at - kSmemReserved);
            } else
                smem = at + u32(v.size);
        }
    k_->staticSmem = std::max(k_->staticSmem, smem - kSmemReserved);
    k_->localBytes = alignUp(local, 16);
}

// ---------------------------------------------------------------------------
int Decoder::newReg(u8 bits) {
    f_.regs.push_back({bits});
    pinned_.push_back(false);
    asyncReg_.push_back(false);
    fenceReg_.push_back(false);
    accumulator_.push_back(false);
    return int(f_.regs.size()) - 1;
}

void Decoder::bind(u32& field, int vreg, bool use, bool def) {
    fix_.push_back({&field, vreg});
    if (use) uses_.back().push_back(vreg);
    if (def) defs_.back().push_back(vreg);
}

u32 Decoder::constant(u64 v, u32 stride) {
    if (stride == 4) v = u32(v);
    auto [it, fresh] = constants_.try_emplace({v, stride}, 0);
    if (fresh) {
        auto& pool = k_->constants;
        it->second = u32(pool.size()) | kConstBit;
        for (int l = 0; l < kWarp; l++)
            for (u32 b = 0; b < stride; b++) pool.push_back(b < 8 ? u8(v >> (8 * b)) : u8(i64(v) < 0 ? 0xff : 0));
    }
    return it->second;
}

u32 Decoder::regStride(const Operand& o) const {
    return o.kind == Operand::Reg ? strideOfBits(f_.regs[size_t(o.reg)].bits) : 4;
}
u8 Decoder::regBits(const Operand& o) const { return o.kind == Operand::Reg ? f_.regs[size_t(o.reg)].bits : 0; }

void Decoder::imm(u32& field, u64 v, u32 stride) { field = constant(v, stride); }

void Decoder::sink(u32& field, u32 stride) {
    int k = stride == 4 ? 0 : stride == 8 ? 1 : 2;
    if (sink_[k] < 0) sink_[k] = newReg(u8(stride * 8)), pinned_[size_t(sink_[k])] = true;
    bind(field, sink_[k], false, true);
}

void Decoder::special(u32& field, const std::string& name, u32 stride) {
    auto it = specials_.find(name);
    if (it == specials_.end()) {
        it = specials_.emplace(name, newReg(name == "%param_base" || name == "%gridid" ? 64 : 32)).first;
        pinned_[size_t(it->second)] = true;
    }
    if (strideOfBits(f_.regs[size_t(it->second)].bits) != stride)
        throw EmuError("unsupported", "special register " + name + " read with an unexpected width");
    bind(field, it->second, true, false);
}

// Address of a variable as (hidden base register or "", displacement).
bool Decoder::symbolAddress(const Operand& o, const Stmt& s, std::string& base, i64& disp) {
    disp = o.imm;
    base.clear();
    if (o.var >= 0) {
        const Variable& v = f_.vars[size_t(o.var)];
        disp += varOffset_[size_t(o.var)];
        bool kernelParam = std::find(f_.params.begin(), f_.params.end(), o.var) != f_.params.end();
        if (v.space == Space::Shared)
            base = "%smem_base";
        else if (kernelParam)
            base = "%param_base";
        else if (v.space != Space::Local && v.space != Space::Param)
            fail(s, "function-scope variable in this space");
        return true;
    }
    if (o.sym.empty()) return false;
    if (auto it = smemOffsets_.find(o.sym); it != smemOffsets_.end()) {
        base = "%smem_base";
        disp += it->second;
        return true;
    }
    if (auto it = mod_.globalAddress.find(o.sym); it != mod_.globalAddress.end()) {
        disp += i64(it->second);
        return true;
    }
    fail(s, "unknown symbol " + o.sym);
}

void Decoder::src(u32& field, const Operand& o, const Stmt& s, u32 stride) {
    switch (o.kind) {
        case Operand::Reg: {
            u8 bits = f_.regs[size_t(o.reg)].bits;
            if (bits == 1) fail(s, "predicate where a data register is expected");
            if (strideOfBits(bits) != stride)
                fail(s, "register width mismatch: " +
                            (size_t(o.reg) < f_.regNames.size() ? f_.regNames[size_t(o.reg)] : "?"));
            bind(field, o.reg, true, false);
            return;
        }
        case Operand::Imm: {
            u64 v = u64(o.imm);
            if (o.isFloat && stride == 4) v = std::bit_cast<u32>(float(std::bit_cast<double>(o.imm)));
            field = constant(v, stride);
            return;
        }
        case Operand::Special: special(field, o.sym, stride); return;
        case Operand::Sink: sink(field, stride); return;
        default: fail(s, "operand kind not supported here");
    }
}

void Decoder::dst(u32& field, const Operand& o, const Stmt& s, u32 stride) {
    if (o.kind == Operand::Sink) {
        sink(field, stride);
        return;
    }
    if (o.kind != Operand::Reg) fail(s, "destination is not a register");
    if (regStride(o) != stride || f_.regs[size_t(o.reg)].bits == 1) fail(s, "destination width mismatch");
    bind(field, o.reg, false, true);
}
void Decoder::dstSrc(u32& field, const Operand& o, const Stmt& s, u32 stride) {
    if (o.kind != Operand::Reg || regStride(o) != stride)
        fail(s, "read-write operand is not a register of the right width");
    bind(field, o.reg, true, true);
}

namespace {
template <class F>
void eachElem(std::vector<u32>& v, const Operand& o, F f) {
    if (o.kind == Operand::Vec) {
        v.assign(o.elems.size(), kNoOperand);
        for (size_t i = 0; i < o.elems.size(); i++) f(v[i], o.elems[i]);
    } else {
        v.assign(1, kNoOperand);
        f(v[0], o);
    }
}
}  // namespace
void Decoder::srcList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride) {
    eachElem(v, o, [&](u32& f, const Operand& e) { src(f, e, s, stride); });
}
void Decoder::dstList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride) {
    eachElem(v, o, [&](u32& f, const Operand& e) { dst(f, e, s, stride); });
}
void Decoder::dstSrcList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride) {
    eachElem(v, o, [&](u32& f, const Operand& e) { dstSrc(f, e, s, stride); });
}

u16 Decoder::predSrc(const Operand& o, const Stmt& s) {
    if (o.kind != Operand::Reg || f_.regs[size_t(o.reg)].bits != 1) fail(s, "expected a predicate");
    return u16(predIndex_[size_t(o.reg)] << 1 | int(o.neg));
}
u16 Decoder::predDst(const Operand& o, const Stmt& s) {
    if (o.kind == Operand::Sink) return 0;  // predicate 0 is a scratch bit mask
    return predSrc(o, s);
}

Ext& Decoder::ext(Inst& in) {
    if (!in.x) {
        k_->exts.emplace_back();
        in.x = &k_->exts.back();
    }
    return *in.x;
}

void Decoder::address(u32& field, u8& stride, i64& disp, const Operand& o, const Stmt& s) {
    if (o.kind != Operand::Addr) fail(s, "expected an address");
    if (o.reg >= 0) {
        Operand r;
        r.kind = Operand::Reg;
        r.reg = o.reg;
        stride = u8(regStride(r));
        src(field, r, s, stride);
        disp += o.imm;
        return;
    }
    std::string base;
    i64 d;
    if (symbolAddress(o, s, base, d)) {
        disp += d;
        if (base.empty())
            stride = 8, field = constant(0, 8);
        else
            stride = base == "%param_base" ? 8 : 4, special(field, base, stride);
        return;
    }
    stride = 8;
    field = constant(u64(o.imm), 8);
}

void Decoder::pendingLoad(const Operand& o) {
    if (o.kind == Operand::Reg) asyncReg_[size_t(o.reg)] = true, pendingLoads_.push_back(o.reg);
}
void Decoder::retirePendingLoads() {
    uses_.back().insert(uses_.back().end(), pendingLoads_.begin(), pendingLoads_.end());
    pendingLoads_.clear();
}

void Decoder::pin(const Operand& o, bool accumulator) {
    if (o.kind == Operand::Reg) pinned_[size_t(o.reg)] = asyncReg_[size_t(o.reg)] = fenceReg_[size_t(o.reg)] = true;
    if (o.kind == Operand::Reg && accumulator) accumulator_[size_t(o.reg)] = true;
}

int Decoder::label(int scope, const std::string& name) const {
    for (int s = scope; s >= 0; s = f_.scopes[size_t(s)].parent) {
        auto it = f_.scopes[size_t(s)].labels.find(name);
        if (it != f_.scopes[size_t(s)].labels.end()) return it->second;
    }
    return -1;
}

namespace {
// Stands in front of every instruction that names a register which some
// wgmma.mma_async or tcgen05.ld uses asynchronously.
Status asyncGuarded(Warp& w, const Inst& in, u32 m) {
    if (!w.wgmma.empty()) wgmmaRegisterCheck(w, in);
    if (!in.x->fenceDef.empty() || !in.x->fenceRead.empty()) wgmmaTrackAccesses(w, *in.x);
    if (!w.tmemPending.empty()) tmemRegisterCheck(w, in);
    return in.x->asyncInner(w, in, m);
}
}  // namespace

void Decoder::wrapAsyncChecks() {
    auto isCopy = [&](size_t i) {
        return workStmt_[i]->op[0] == "mov" && uses_[i].size() == 1 && defs_[i].size() == 1;
    };
    // Copies of such registers carry the restriction along.
    for (bool grown = true; grown;) {
        grown = false;
        for (size_t i = 0; i < work_.size(); i++)
            if (isCopy(i) && asyncReg_[size_t(uses_[i][0])] && !asyncReg_[size_t(defs_[i][0])])
                asyncReg_[size_t(defs_[i][0])] = grown = true;
    }
    // Registers whose values reach an operand of a wgmma through moves.
    for (bool grown = true; grown;) {
        grown = false;
        for (size_t i = 0; i < work_.size(); i++)
            if (workStmt_[i]->op[0] == "mov")
                for (int v : defs_[i])
                    if (fenceReg_[size_t(v)])
                        for (int u : uses_[i])
                            if (!fenceReg_[size_t(u)]) fenceReg_[size_t(u)] = grown = true;
    }
    for (size_t i = 0; i < work_.size(); i++) {
        const std::string& op = workStmt_[i]->op[0];
        if (op == "wgmma" || (op == "tcgen05" && workStmt_[i]->op[1] == "wait::ld")) continue;
        std::vector<int> regs;
        std::vector<u8> defs;
        for (auto* list : {&uses_[i], &defs_[i]})
            for (int v : *list)
                if (asyncReg_[size_t(v)]) regs.push_back(v), defs.push_back(list == &defs_[i]);
        std::vector<int> tracked;
        for (int v : defs_[i])
            if (fenceReg_[size_t(v)]) tracked.push_back(v);
        if (regs.empty() && tracked.empty()) continue;
        Ext& x = ext(work_[i]);
        auto slots = [&](std::vector<u32>& f, const std::vector<int>& vs) {
            f.assign(vs.size(), 0);
            for (size_t k = 0; k < vs.size(); k++) fix_.push_back({&f[k], vs[k]});
        };
        slots(x.fenceDef, tracked);
        x.move = op == "mov";
        if (!x.move) {
            std::vector<int> read;
            for (int v : uses_[i])
                if (accumulator_[size_t(v)]) read.push_back(v);
            slots(x.fenceRead, read);
        }
        if (x.move && !tracked.empty()) slots(x.fenceUse, uses_[i]);
        x.guardedDef = defs;
        x.copy = isCopy(i);
        x.asyncInner = work_[i].fn;
        x.guarded.assign(regs.size(), 0);
        for (size_t k = 0; k < regs.size(); k++) fix_.push_back({&x.guarded[k], regs[k]});
        work_[i].fn = asyncGuarded;
    }
}

std::unique_ptr<Kernel> Decoder::run() {
    inlineCalls();
    layout();
    pinned_.assign(f_.regs.size(), false);
    asyncReg_.assign(f_.regs.size(), false);
    fenceReg_.assign(f_.regs.size(), false);
    accumulator_.assign(f_.regs.size(), false);
    predIndex_.assign(f_.regs.size(), -1);
    int preds = 1;  // 0 is the sink
    for (size_t i = 0; i < f_.regs.size(); i++)
        if (f_.regs[i].bits == 1) predIndex_[i] = preds++;
    k_->predCount = u32(preds);

    stmtToInst_.resize(f_.body.size() + 1);
    Stmt end;
    end.op = {"ret"};
    f_.body.push_back(end);
    stmtToInst_.resize(f_.body.size() + 1);
    for (size_t i = 0; i < f_.body.size(); i++) {
        const Stmt& s = f_.body[i];
        stmtToInst_[i] = u32(work_.size());
        work_.emplace_back();
        workStmt_.push_back(&s);
        uses_.emplace_back();
        defs_.emplace_back();
        Inst& in = work_.back();
        in.line = s.line;
        in.cls = counterClass(s);
        in.aligned = s.has("aligned") || (s.op[0] == "bar" && !s.has("warp"));
        in.joins = in.aligned || (s.has("sync") && s.op[0] != "barrier");
        in.poll = s.op[0] == "mbarrier" && (s.has("test_wait") || s.has("try_wait"));
        if (s.guard >= 0) in.guard = u16(predIndex_[size_t(s.guard)] << 1 | int(s.guardNeg));
        auto it = builders().find(s.op[0]);
        if (it == builders().end()) fail(s, "unknown instruction");
        it->second(*this, s, in);
        if (!in.fn && !in.branch) fail(s, "unsupported form");
    }
    stmtToInst_[f_.body.size()] = u32(work_.size());
    for (size_t i = 0; i < work_.size(); i++) {
        const Stmt& s = *workStmt_[i];
        auto resolve = [&](const std::string& n) {
            int l = label(s.scope, n);
            if (l < 0) fail(s, "unknown label " + n);
            return stmtToInst_[size_t(l)];
        };
        if (s.op[0] == "bra") work_[i].target = resolve(s.ops[0].sym);
        if (s.op[0] == "brx") {
            auto it = f_.branchTargets.find(s.ops[1].sym);
            if (it == f_.branchTargets.end()) fail(s, "unknown branch target list");
            for (auto& n : it->second) ext(work_[i]).targets.push_back(resolve(n));
        }
    }
    wrapAsyncChecks();
    allocateRegisters(*this);
    for (size_t i = 0; i < work_.size(); i++) {
        k_->code.push_back(work_[i]);
        k_->text.push_back(workStmt_[i]->name());
    }
    return std::move(k_);
}

std::unique_ptr<Kernel> decode(Module& mod, const std::string& entry) { return Decoder(mod, entry).run(); }

std::unique_ptr<Module> loadModule(std::string_view text) {
    auto mod = parsePtx(text);
    for (auto& v : mod->vars) {
        if (v.space == Space::Shared || (v.isExtern && v.size == 0)) continue;
        u64 bytes = std::max<u64>(v.size, 1), align = std::max<u32>(v.align, 16);
        mod->storage.push_back(std::make_unique<u8[]>(bytes + align));
        u64 at = alignUp(u64(mod->storage.back().get()), align);
        std::memset((void*)at, 0, bytes);
        std::memcpy((void*)at, v.init.data(), std::min<u64>(v.init.size(), bytes));
        mod->globalAddress[v.name] = at;
    }
    for (auto& v : mod->vars)
        for (size_t i = 0; i < v.relocs.size(); i++) {
            auto it = mod->globalAddress.find(v.relocs[i].second);
            u64 a = it == mod->globalAddress.end() ? 0 : it->second + u64(v.relocAddends[i]);
            std::memcpy((u8*)mod->globalAddress[v.name] + v.relocs[i].first, &a, 8);
        }
    return mod;
}

}  // namespace ptx_emulator
