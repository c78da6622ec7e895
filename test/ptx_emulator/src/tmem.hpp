// Tensor memory of one CTA: 128 lanes by 512 columns of 32-bit cells.
#pragma once
#include "machine.hpp"

namespace ptx_emulator {

constexpr u32 kTmemLanes = 128, kTmemCols = 512;

struct Tmem {
    std::vector<u32> cell = std::vector<u32>(kTmemLanes * kTmemCols, 0xcdcdcdcdu);
    std::vector<u8> init = std::vector<u8>(kTmemLanes * kTmemCols, 0);
    std::array<u16, kTmemCols> owner{};    // allocation id per column, 0 = free
    std::array<u16, kTmemCols> writers{};  // tcgen05.mma/cp issued but not known complete
    std::array<u16, kTmemCols> readers{};  // A operands of such tcgen05.mma
    std::vector<std::string> allocators;   // by allocation id - 1: the warp and its instruction, for reports
    // For the checks of order, by column: the commit that ended the last write, the last load and the last store of each
    // quarter.
    struct Write {
        u32 queue = ~0u, commit = 0;
    };
    struct Use {
        const Warp* warp = nullptr;
        u64 seq = 0;
        Access at;
    };
    std::array<Write, kTmemCols> written{};
    std::array<std::array<Use, 4>, kTmemCols> loaded{}, stored{};
    u16 nextId = 1;
    bool relinquished = false;
    // tcgen05.mma, .cp and .commit of one CTA execute in issue order.
    std::deque<std::function<void()>> pipe;
    bool pipeBusy = false;
    std::vector<std::function<void(u32)>> uncommitted;  // releases to run at the next commit, given its number
    Clock issued;  // what the threads that issued operations had seen: before the completion of these
    u32 at(u32 lane, u32 col) const { return cell[lane * kTmemCols + col]; }
    void set(u32 lane, u32 col, u32 v) { cell[lane * kTmemCols + col] = v, init[lane * kTmemCols + col] = 1; }
};

}  // namespace ptx_emulator
