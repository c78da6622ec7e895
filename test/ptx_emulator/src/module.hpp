// Parsed PTX, before decoding.
#pragma once
#include <map>
#include "common.hpp"

namespace ptx_emulator {

enum class Space : u8 { Reg, Global, Const, Shared, Local, Param, Generic };

struct Operand {
    enum Kind : u8 { None, Reg, Imm, Var, Sym, Addr, Vec, Sink, Special } kind = None;
    int reg = -1;      // Reg, Addr with register base
    int reg2 = -1;     // second half of `%r|%p`
    bool neg = false;  // !pred, or unary minus on a register
    bool sink2 = false;
    bool isFloat = false;        // Imm written as floating point; f64 bits in imm
    int var = -1;                // Var / Addr: function-scope variable
    i64 imm = 0;                 // Imm bits, or displacement of Addr / Var / Sym
    std::string sym;             // Sym / Addr: module symbol or label; Special: name
    std::vector<Operand> elems;  // Vec, or coordinates of a tensor Addr
};

struct Stmt {
    int guard = -1;
    bool guardNeg = false;
    u32 line = 0;
    int scope = 0;
    std::vector<std::string> op;  // opcode and modifiers
    std::vector<Operand> ops;
    bool has(std::string_view m) const {
        for (size_t i = 1; i < op.size(); i++)
            if (op[i] == m) return true;
        return false;
    }
    std::string name() const;
};

struct Variable {
    std::string name;
    Space space = Space::Global;
    u32 align = 1;
    u64 size = 0;
    bool isExtern = false;
    std::vector<u8> init;
    std::vector<std::pair<u64, std::string>> relocs;  // 64-bit addresses inside init
    std::vector<i64> relocAddends;
    std::string type;
};

struct RegDecl {
    u8 bits = 32;  // 1 for predicates
};

struct Function {
    std::string name;
    bool isEntry = false, hasBody = false;
    std::vector<int> params, rets;  // indices into vars
    std::vector<Variable> vars;
    std::vector<RegDecl> regs;
    std::vector<std::string> regNames;
    std::vector<Stmt> body;
    struct Scope {
        int parent;
        std::map<std::string, int, std::less<>> regs, vars, labels;      // label -> statement index
        std::map<std::string, std::pair<int, int>, std::less<>> ranges;  // %r<n> -> first id, n
    };
    std::vector<Scope> scopes;
    u32 maxntid[3] = {0, 0, 0}, reqntid[3] = {0, 0, 0}, reqctapercluster[3] = {0, 0, 0};
    std::map<std::string, std::vector<std::string>> branchTargets;
};

struct Module {
    std::string target;
    int arch = 0;  // 90, 100, ...
    std::vector<Function> functions;
    std::map<std::string, int> functionIndex;
    std::vector<Variable> vars;
    std::map<std::string, int> varIndex;
    std::map<std::string, u64> globalAddress;  // filled at load
    std::vector<std::unique_ptr<u8[]>> storage;
};

std::unique_ptr<Module> parsePtx(std::string_view text);
u32 typeBytes(std::string_view type);  // "b32" -> 4; 0 when not a type

}  // namespace ptx_emulator
