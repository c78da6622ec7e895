// Statement -> Inst.  Each instruction family registers a builder under the
// first opcode word; the builder chooses a handler and binds the operands.
#pragma once
#include "machine.hpp"

namespace ptx_emulator {

class Decoder;
using Builder = void (*)(Decoder& d, const Stmt& s, Inst& in);
struct RegisterBuilder {
    RegisterBuilder(const char* op, Builder b);
};
#define PTX_CONCAT_(a, b) a##b
#define PTX_CONCAT(a, b) PTX_CONCAT_(a, b)
#define PTX_OP(opcode, ...) static const RegisterBuilder PTX_CONCAT(ptxReg, __COUNTER__)(opcode, __VA_ARGS__)

class Decoder {
 public:
    Decoder(Module& mod, const std::string& entry);
    std::unique_ptr<Kernel> run();

    [[noreturn]] void fail(const Stmt& s, const std::string& why) const;
    Module& module() { return mod_; }
    Kernel& kernel() { return *k_; }
    const Function& fn() const { return f_; }

    // Binding.  `stride` is the lane stride (4, 8 or 16) that the handler uses.
    // Fields must live in an Inst or Ext owned by the decoder (stable address).
    void src(u32& field, const Operand& o, const Stmt& s, u32 stride);
    void dst(u32& field, const Operand& o, const Stmt& s, u32 stride);
    void dstSrc(u32& field, const Operand& o, const Stmt& s, u32 stride);  // read-modify-write
    void imm(u32& field, u64 value, u32 stride);
    void sink(u32& field, u32 stride);
    // Lists: the vector is sized here, so that element addresses stay put.
    void srcList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride);
    void dstList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride);
    void dstSrcList(std::vector<u32>& v, const Operand& o, const Stmt& s, u32 stride);
    u16 predSrc(const Operand& o, const Stmt& s);
    u16 predDst(const Operand& o, const Stmt& s);
    u16 predIndex(int reg) { return u16(predIndex_[size_t(reg)] << 1); }
    u32 regStride(const Operand& o) const;  // lane stride of a register operand (4 default)
    u8 regBits(const Operand& o) const;     // 0 when not a register
    Ext& ext(Inst& in);
    // Address operand: base into `field` with its lane stride, displacement added
    // to `disp`.  Symbols become a hidden base register or an absolute constant.
    void address(u32& field, u8& stride, i64& disp, const Operand& o, const Stmt& s);
    void special(u32& field, const std::string& name, u32 stride);
    bool symbolAddress(const Operand& o, const Stmt& s, std::string& base, i64& disp);
    // Registers used asynchronously: accesses by other instructions are checked.
    void pin(const Operand& o, bool accumulator);  // wgmma: the register keeps a slot of its own
    void pendingLoad(const Operand& o);            // tcgen05.ld: live until ...
    void retirePendingLoads();                     // ... the next tcgen05.wait::ld

 private:
    friend void allocateRegisters(Decoder& d);
    Module& mod_;
    Function f_;  // private copy, calls inlined
    std::unique_ptr<Kernel> k_;
    struct Fix {
        u32* field;
        int vreg;
    };
    std::vector<Fix> fix_;
    std::deque<Inst> work_;  // in emission order
    std::vector<const Stmt*> workStmt_;
    std::vector<std::vector<int>> uses_, defs_;  // per instruction, vreg ids
    std::vector<bool> pinned_, asyncReg_, fenceReg_, accumulator_;
    std::map<std::pair<u64, u32>, u32> constants_;
    std::map<std::string, int> specials_;     // hidden registers
    std::map<std::string, u32> smemOffsets_;  // module-level shared variables
    std::vector<u32> varOffset_;              // function-scope variables
    std::vector<int> predIndex_;
    std::vector<u32> stmtToInst_;
    std::vector<int> pendingLoads_;
    int sink_[3] = {-1, -1, -1};

    void inlineCalls();
    void layout();
    int newReg(u8 bits);
    u32 constant(u64 v, u32 stride);
    int label(int scope, const std::string& name) const;
    void bind(u32& field, int vreg, bool use, bool def);
    void wrapAsyncChecks();
};

void allocateRegisters(Decoder& d);

}  // namespace ptx_emulator
