// What the host passes to a GEMM kernel of SM100. Plain C++: included on both sides.
#pragma once

#include <cstdint>

#include "../device/gemm_params.h"

namespace deep_gemm::sm100 {

// How a CTA's tile of an operand gets to shared memory, and how the tensor core finds it there. Layouts are run-time
// values, so that one kernel reads K-major and MN-major operands, FP8 and FP4.
struct OperandSource {
    uint64_t descriptor;  // matrix descriptor without its address
    uint32_t step;        // from one instruction's part of K to the next, in units of 16 bytes
    int boxes;            // that make a tile: 1 where K-major, else one for each swizzle span along rows or columns
    int box_elems;        // rows or columns from box to box
    uint32_t box_bytes;   // in shared memory
    bool mn_major;
};

struct Sm100GemmParams {
    // rows_map, cols_map: boxes of the operands. row_scales_map, col_scales_map: packed UE8M0 words [K words, rows or cols].
    // d_map: boxes of 32 rows of D, BF16 or FP32. block_scales is not used.
    GemmParams gemm;
    OperandSource rows, cols;
    uint32_t instruction;     // instruction descriptor; the kernel adds which scale factors to use
    uint32_t stage_bytes;     // that TMA reports for a stage of one CTA; FP4 counts half
    int last_steps;           // instructions of the last K block
    int blocks_per_word;      // K blocks whose scales are in one word: 4 of granularity 128, 1 of granularity 32
};

}  // namespace deep_gemm::sm100
