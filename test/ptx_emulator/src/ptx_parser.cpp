// PTX text -> Module.  One pass; registers, function-scope variables and
// labels are scoped by `{ }` blocks, as inline assembly relies on that.
#include <cctype>
#include <cstdarg>
#include <cstdlib>
#include "module.hpp"

namespace ptx_emulator {

std::string strf(const char* fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    char buf[4096];
    vsnprintf(buf, sizeof buf, fmt, ap);
    va_end(ap);
    return buf;
}

u32 typeBytes(std::string_view t) {
    if (t == "pred") return 1;
    size_t i = 0;
    while (i < t.size() && !isdigit((unsigned char)t[i])) i++;
    std::string_view head = t.substr(0, i);
    if (head != "b" && head != "u" && head != "s" && head != "f" && head != "bf" && head != "e") return 0;
    int bits = 0;
    for (; i < t.size() && isdigit((unsigned char)t[i]); i++) bits = bits * 10 + (t[i] - '0');
    if (t == "f16x2" || t == "bf16x2") return 4;
    if (t == "f32x2" || t == "u16x2" || t == "s16x2") return t == "f32x2" ? 8 : 4;
    if (t == "tf32") return 4;
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 || bits == 128 ? u32(bits / 8) : 0;
}

std::string Stmt::name() const {
    std::string s;
    for (auto& o : op) s += (s.empty() ? "" : ".") + o;
    return s;
}

namespace {

bool identStart(char c) { return isalpha((unsigned char)c) || c == '_' || c == '$' || c == '%'; }
bool identChar(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }

class Parser {
 public:
    explicit Parser(std::string_view t) : s_(t), mod_(std::make_unique<Module>()) {}

    std::unique_ptr<Module> run() {
        for (skip(); p_ < s_.size(); skip()) topLevel();
        return std::move(mod_);
    }

 private:
    std::string_view s_;
    size_t p_ = 0;
    u32 line_ = 1;
    std::unique_ptr<Module> mod_;
    Function* fn_ = nullptr;
    int scope_ = 0;

    [[noreturn]] void fail(const std::string& m) {
        size_t e = s_.find('\n', p_);
        throw EmuError("parse", strf("PTX line %u: %s near `%.80s`", line_, m.c_str(),
                                     std::string(s_.substr(p_, std::min<size_t>(e - p_, 80))).c_str()));
    }

    void skip() {
        while (p_ < s_.size()) {
            char c = s_[p_];
            if (c == '\n')
                line_++, p_++;
            else if (isspace((unsigned char)c))
                p_++;
            else if (c == '/' && p_ + 1 < s_.size() && s_[p_ + 1] == '/')
                while (p_ < s_.size() && s_[p_] != '\n') p_++;
            else if (c == '/' && p_ + 1 < s_.size() && s_[p_ + 1] == '*') {
                p_ += 2;
                while (p_ + 1 < s_.size() && !(s_[p_] == '*' && s_[p_ + 1] == '/')) line_ += s_[p_++] == '\n';
                p_ += 2;
            } else
                break;
        }
    }
    char peek() {
        skip();
        return p_ < s_.size() ? s_[p_] : '\0';
    }
    bool accept(char c) { return peek() == c ? (p_++, true) : false; }
    void expect(char c) {
        if (!accept(c)) fail(strf("expected '%c'", c));
    }
    std::string ident() {
        skip();
        if (p_ >= s_.size() || !identStart(s_[p_])) fail("expected identifier");
        size_t b = p_;
        while (p_ < s_.size() && identChar(s_[p_])) p_++;
        return std::string(s_.substr(b, p_ - b));
    }
    // A word after '.', with '::' allowed inside (`.shared::cta`).
    std::string dotWord() {
        expect('.');
        size_t b = p_;
        while (p_ < s_.size() && (isalnum((unsigned char)s_[p_]) || s_[p_] == '_' || s_[p_] == ':')) {
            if (s_[p_] == ':' && !(p_ + 1 < s_.size() && (s_[p_ + 1] == ':' || s_[p_ - 1] == ':'))) break;
            p_++;
        }
        return std::string(s_.substr(b, p_ - b));
    }
    bool peekWord(std::string_view w) {
        skip();
        return s_.substr(p_, w.size()) == w;
    }
    void skipLine() {
        while (p_ < s_.size() && s_[p_] != '\n') p_++;
    }
    void skipBraces() {
        expect('{');
        for (int depth = 1; depth && p_ < s_.size(); p_++) {
            depth += s_[p_] == '{' ? 1 : s_[p_] == '}' ? -1 : 0;
            line_ += s_[p_] == '\n';
        }
    }

    struct Number {
        i64 bits;
        bool isFloat;
    };
    Number number() {
        skip();
        bool neg = false;
        if (s_[p_] == '-')
            neg = true, p_++;
        else if (s_[p_] == '+')
            p_++;
        skip();
        if (s_[p_] == '0' && p_ + 1 < s_.size() &&
            (s_[p_ + 1] == 'f' || s_[p_ + 1] == 'F' || s_[p_ + 1] == 'd' || s_[p_ + 1] == 'D')) {
            bool dbl = s_[p_ + 1] == 'd' || s_[p_ + 1] == 'D';
            u64 v = strtoull(std::string(s_.substr(p_ + 2, dbl ? 16 : 8)).c_str(), nullptr, 16);
            p_ += dbl ? 18 : 10;
            double d = dbl ? std::bit_cast<double>(v) : double(std::bit_cast<float>(u32(v)));
            // Keep NaN payloads of float literals intact: floats are stored as f64.
            return {std::bit_cast<i64>(neg ? -d : d), true};
        }
        size_t b = p_;
        while (p_ < s_.size() && (isalnum((unsigned char)s_[p_]) || s_[p_] == '.')) {
            if ((s_[p_] == 'e' || s_[p_] == 'E') && (s_[p_ + 1] == '-' || s_[p_ + 1] == '+') && s_.substr(b, 2) != "0x")
                p_++;
            p_++;
        }
        std::string t(s_.substr(b, p_ - b));
        if (t.empty() || !isdigit((unsigned char)t[0])) fail("expected number");
        if (t.find('.') != std::string::npos) {
            double d = strtod(t.c_str(), nullptr);
            return {std::bit_cast<i64>(neg ? -d : d), true};
        }
        if (t.back() == 'U' || t.back() == 'u') t.pop_back();
        u64 v = t.size() > 1 && t[0] == '0' && (t[1] == 'b' || t[1] == 'B') ? strtoull(t.c_str() + 2, nullptr, 2)
                                                                            : strtoull(t.c_str(), nullptr, 0);
        return {neg ? -i64(v) : i64(v), false};
    }

    void topLevel() {
        if (peek() != '.') fail("expected directive");
        size_t save = p_;
        std::string d = dotWord();
        if (d == "version") {
            skipLine();
            return;
        }
        if (d == "target") {
            mod_->target = ident();
            mod_->arch = atoi(mod_->target.c_str() + 3);
            skipLine();
            return;
        }
        if (d == "address_size" || d == "file" || d == "pragma" || d == "alias") {
            skipLine();
            return;
        }
        if (d == "section") {
            while (peek() != '{') p_++;
            skipBraces();
            return;
        }
        bool isExtern = false;
        while (d == "visible" || d == "extern" || d == "weak" || d == "common") {
            isExtern |= d == "extern";
            d = dotWord();
        }
        if (d == "entry" || d == "func") {
            function(d == "entry");
            return;
        }
        if (d == "global" || d == "const" || d == "shared") {
            for (auto& v : variableList(d)) {
                v.isExtern = isExtern;
                mod_->varIndex[v.name] = int(mod_->vars.size());
                mod_->vars.push_back(std::move(v));
            }
            return;
        }
        p_ = save;
        fail("unknown directive");
    }

    static Space spaceOf(const std::string& d) {
        return d == "global"   ? Space::Global
               : d == "const"  ? Space::Const
               : d == "shared" ? Space::Shared
               : d == "local"  ? Space::Local
                               : Space::Param;
    }

    // Everything after `.global` etc. up to the terminator, which is consumed
    // when it is ';'.
    std::vector<Variable> variableList(const std::string& space, bool isParam = false) {
        Variable proto;
        proto.space = spaceOf(space);
        bool alignGiven = false;
        u32 vec = 1;
        while (peek() == '.') {
            std::string d = dotWord();
            if (d == "align")
                proto.align = u32(number().bits), alignGiven = true;
            else if (d == "v2" || d == "v4")
                vec = d == "v2" ? 2 : 4;
            else if (u32 b = typeBytes(d)) {
                proto.type = d;
                proto.size = b * vec;
                if (!alignGiven) proto.align = u32(proto.size);
            } else if (d == "ptr" || d == "attribute" || d == "global" || d == "shared" || d == "const" ||
                       d == "local" || d == "unified") {
                if (d == "attribute") {
                    expect('(');
                    while (peek() != ')') p_++;
                    p_++;
                }
            } else if (d == "texref" || d == "samplerref" || d == "surfref")
                proto.size = 8, proto.type = "b64";
            else
                fail("unknown variable attribute ." + d);
            if (d == "ptr")
                while (peek() == '.') {  // .ptr.global.align N describes the pointee
                    std::string q = dotWord();
                    if (q == "align") number();
                }
        }
        std::vector<Variable> out;
        do {
            Variable v = proto;
            v.name = ident();
            u64 elem = v.size, count = 1;
            bool array = false, unsized = false;
            while (accept('[')) {
                array = true;
                if (peek() == ']')
                    unsized = true;
                else
                    count *= u64(number().bits);
                expect(']');
            }
            v.size = unsized ? 0 : elem * count;
            if (accept('=')) initializer(v, u32(elem));
            if (unsized && !v.init.empty()) v.size = v.init.size();
            (void)array;
            out.push_back(std::move(v));
        } while (!isParam && accept(','));
        if (!isParam) expect(';');
        return out;
    }

    void initScalar(Variable& v, u32 elem) {
        char c = peek();
        if (identStart(c)) {
            std::string name = ident();
            if (name == "generic") {
                expect('(');
                name = ident();
                expect(')');
            }
            i64 add = 0;
            if (accept('+')) add = number().bits;
            v.relocs.push_back({v.init.size(), name});
            v.relocAddends.push_back(add);
            v.init.resize(v.init.size() + 8);
            return;
        }
        Number n = number();
        u64 bits = u64(n.bits);
        if (n.isFloat && elem == 4) bits = std::bit_cast<u32>(float(std::bit_cast<double>(n.bits)));
        for (u32 i = 0; i < elem; i++) v.init.push_back(u8(bits >> (8 * i)));
    }
    void initializer(Variable& v, u32 elem) {
        if (!accept('{')) {
            initScalar(v, elem);
            return;
        }
        if (accept('}')) return;
        do {
            if (peek() == '{')
                initializer(v, elem);
            else
                initScalar(v, elem);
        } while (accept(','));
        expect('}');
    }

    int addVar(Variable v) {
        fn_->scopes[scope_].vars[v.name] = int(fn_->vars.size());
        fn_->vars.push_back(std::move(v));
        return int(fn_->vars.size()) - 1;
    }
    int addReg(const std::string& name, u8 bits) {
        fn_->regs.push_back({bits});
        fn_->regNames.push_back(name);
        return int(fn_->regs.size()) - 1;
    }

    void paramList(std::vector<int>& out) {
        expect('(');
        if (accept(')')) return;
        do {
            std::string d = dotWord();
            if (d == "param") {
                for (auto& v : variableList("param", true)) out.push_back(addVar(std::move(v)));
            } else if (d == "reg") {
                fail(".reg function parameters are not supported");
            } else
                fail("unexpected parameter space");
        } while (accept(','));
        expect(')');
    }

    void function(bool entry) {
        Function f;
        f.isEntry = entry;
        f.scopes.push_back({-1, {}, {}, {}, {}});
        fn_ = &f;
        scope_ = 0;
        if (peek() == '(') paramList(f.rets);
        f.name = ident();
        if (peek() == '(') paramList(f.params);
        while (true) {
            char c = peek();
            if (c == ';') {
                p_++;
                break;
            }
            if (c == '{') {
                f.hasBody = true;
                p_++;
                block();
                break;
            }
            std::string d = dotWord();
            auto dims = [&](u32* out) {
                int i = 0;
                do out[i++] = u32(number().bits);
                while (i < 3 && accept(','));
                while (i < 3) out[i++] = 1;
            };
            if (d == "maxntid")
                dims(f.maxntid);
            else if (d == "reqntid")
                dims(f.reqntid);
            else if (d == "reqnctapercluster")
                dims(f.reqctapercluster);
            else if (d == "minnctapersm" || d == "maxnctapersm" || d == "maxnreg" || d == "maxclusterrank")
                number();
            else if (d == "explicitcluster" || d == "noreturn" || d == "blocksareclusters") {
            } else if (d == "pragma")
                skipLine();
            else
                fail("unknown function directive ." + d);
        }
        fn_ = nullptr;
        auto it = mod_->functionIndex.find(f.name);
        if (it == mod_->functionIndex.end()) {
            mod_->functionIndex[f.name] = int(mod_->functions.size());
            mod_->functions.push_back(std::move(f));
        } else if (f.hasBody) {
            mod_->functions[it->second] = std::move(f);
        }
    }

    void block() {  // after '{'
        while (true) {
            char c = peek();
            if (c == '\0') fail("unterminated block");
            if (c == '}') {
                p_++;
                return;
            }
            if (c == '{') {
                p_++;
                fn_->scopes.push_back({scope_, {}, {}, {}, {}});
                int save = scope_;
                scope_ = int(fn_->scopes.size()) - 1;
                block();
                scope_ = save;
                continue;
            }
            if (c == ';') {
                p_++;
                continue;
            }
            if (c == '.') {
                directive();
                continue;
            }
            statement();
        }
    }

    void directive() {
        std::string d = dotWord();
        if (d == "loc" || d == "file") {
            skipLine();
            return;
        }
        if (d == "pragma") {
            while (peek() != ';') p_++;
            p_++;
            return;
        }
        if (d == "reg") {
            std::string type = dotWord();
            if (type == "v2" || type == "v4") fail("vector registers are not supported");
            u8 bits = type == "pred" ? 1 : u8(typeBytes(type) * 8);
            if (!bits) fail("unknown register type");
            do {
                std::string name = ident();
                if (accept('<')) {
                    int n = int(number().bits);
                    expect('>');
                    int first = int(fn_->regs.size());
                    for (int i = 0; i < n; i++) addReg(name + std::to_string(i), bits);
                    fn_->scopes[scope_].ranges[name] = {first, n};
                } else {
                    int id = addReg(name, bits);
                    fn_->scopes[scope_].regs[name] = id;
                }
            } while (accept(','));
            expect(';');
            return;
        }
        if (d == "local" || d == "shared" || d == "param" || d == "global" || d == "const") {
            for (auto& v : variableList(d)) addVar(std::move(v));
            return;
        }
        fail("unknown directive ." + d);
    }

    int findReg(const std::string& n) {
        size_t digits = n.size();
        while (digits > 0 && isdigit((unsigned char)n[digits - 1])) digits--;
        for (int s = scope_; s >= 0; s = fn_->scopes[s].parent) {
            auto& sc = fn_->scopes[s];
            if (auto it = sc.regs.find(n); it != sc.regs.end()) return it->second;
            if (digits < n.size())
                if (auto it = sc.ranges.find(std::string_view(n).substr(0, digits)); it != sc.ranges.end()) {
                    int k = atoi(n.c_str() + digits);
                    if (k < it->second.second) return it->second.first + k;
                }
        }
        return -1;
    }
    int findVar(const std::string& n) {
        for (int s = scope_; s >= 0; s = fn_->scopes[s].parent)
            if (auto it = fn_->scopes[s].vars.find(n); it != fn_->scopes[s].vars.end()) return it->second;
        return -1;
    }

    // identifier operand: register, variable, special register, or symbol/label
    void nameOperand(Operand& o) {
        std::string n = ident();
        if (n == "_") {
            o.kind = Operand::Sink;
            return;
        }
        if (int r = findReg(n); r >= 0) {
            o.kind = Operand::Reg;
            o.reg = r;
            return;
        }
        if (int v = findVar(n); v >= 0) {
            o.kind = Operand::Var;
            o.var = v;
            return;
        }
        if (n == "WARP_SZ") {
            o.kind = Operand::Imm;
            o.imm = 32;
            return;
        }
        if (n[0] == '%') {
            o.kind = Operand::Special;
            o.sym = n;
            if (p_ < s_.size() && s_[p_] == '.') o.sym += "." + dotWord();
            return;
        }
        o.kind = Operand::Sym;
        o.sym = n;
    }

    Operand operand() {
        Operand o;
        char c = peek();
        if (c == '{') {
            p_++;
            o.kind = Operand::Vec;
            if (accept('}')) return o;
            do o.elems.push_back(operand());
            while (accept(','));
            expect('}');
        } else if (c == '[') {
            p_++;
            Operand base;
            if (isdigit((unsigned char)peek())) {
                base.kind = Operand::Imm;
                base.imm = number().bits;
            } else
                nameOperand(base);
            o.kind = Operand::Addr;
            if (base.kind == Operand::Reg)
                o.reg = base.reg;
            else if (base.kind == Operand::Var)
                o.var = base.var;
            else if (base.kind == Operand::Imm)
                o.imm = base.imm;
            else
                o.sym = base.sym;
            while (peek() == '+' || peek() == '-') {
                if (s_[p_] == '+') p_++;
                o.imm += number().bits;
            }
            if (accept(',')) o.elems.push_back(operand());
            while (accept(',')) o.elems.push_back(operand());
            expect(']');
        } else if (c == '!') {
            p_++;
            nameOperand(o);
            o.neg = true;
        } else if (c == '(') {
            p_++;
            o.kind = Operand::Vec;
            if (accept(')')) return o;
            do o.elems.push_back(operand());
            while (accept(','));
            expect(')');
        } else if (isdigit((unsigned char)c) ||
                   ((c == '-' || c == '+') && (isdigit((unsigned char)s_[p_ + 1]) || s_[p_ + 1] == ' '))) {
            Number n = number();
            o.kind = Operand::Imm;
            o.imm = n.bits;
            o.isFloat = n.isFloat;
        } else if (c == '-') {
            p_++;
            nameOperand(o);
            o.neg = true;
        } else {
            nameOperand(o);
            if (accept('|')) {
                Operand q;
                nameOperand(q);
                if (q.kind == Operand::Reg)
                    o.reg2 = q.reg;
                else
                    o.sink2 = true;
            } else if ((o.kind == Operand::Sym || o.kind == Operand::Var) && (peek() == '+' || peek() == '-')) {
                if (s_[p_] == '+') p_++;
                o.imm = number().bits;
            }
        }
        return o;
    }

    void statement() {
        Stmt st;
        st.line = line_;
        st.scope = scope_;
        if (accept('@')) {
            st.guardNeg = accept('!');
            Operand g;
            nameOperand(g);
            if (g.kind != Operand::Reg) fail("guard is not a register");
            st.guard = g.reg;
        }
        std::string first = ident();
        if (st.guard < 0 && peek() == ':' && s_.substr(p_, 2) != "::") {
            p_++;
            fn_->scopes[scope_].labels[first] = int(fn_->body.size());
            if (peek() == '.') {
                size_t save = p_;
                std::string d = dotWord();
                if (d == "branchtargets") {
                    auto& t = fn_->branchTargets[first];
                    do t.push_back(ident());
                    while (accept(','));
                    expect(';');
                } else if (d == "callprototype" || d == "calltargets") {
                    while (peek() != ';') p_++;
                    p_++;
                } else
                    p_ = save;
            }
            return;
        }
        st.line = line_;
        st.op.push_back(first);
        while (p_ < s_.size() && s_[p_] == '.') st.op.push_back(dotWord());
        if (peek() != ';') {
            do st.ops.push_back(operand());
            while (accept(','));
        }
        expect(';');
        fn_->body.push_back(std::move(st));
    }
};

}  // namespace

std::unique_ptr<Module> parsePtx(std::string_view text) { return Parser(text).run(); }

}  // namespace ptx_emulator
