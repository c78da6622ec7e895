// What the host passes to a GEMM kernel. Plain C++: included on both sides.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace deep_gemm {

// Work for DenseScheduler (tile_scheduler.cuh), in units of a cluster's tile.
struct DenseSchedule {
    int num_row_tiles;
    int num_col_tiles;
    int num_k_blocks;
    int row_group;  // row tiles that are walked together before the next column, for locality in L2
};

// FP32 scale factors with any strides: entry (i, g) is data[(i >> shift) * stride_mn + g * stride_k].
struct ScaleSource {
    const float* data;
    int64_t stride_mn;
    int64_t stride_k;
    int count;     // entries along MN that exist; others read as zero
    int k_groups;  // entries along K that exist
    int shift;     // 7 where one entry serves 128 rows that are read one by one, else 0
};

enum OutputMode : int {
    kStoreTma,     // BF16 through shared memory and TMA
    kStoreDirect,  // predicated stores from registers: FP32, or BF16 rows that TMA cannot address
};

struct GemmParams {
    CUtensorMap rows_map;  // FP8 operand on the instruction's M side, [rows, K]
    CUtensorMap cols_map;  // FP8 operand on the instruction's N side, [cols, K]
    CUtensorMap d_map;     // [M, N]; unused with kStoreDirect
    ScaleSource row_scales;
    ScaleSource col_scales;
    DenseSchedule schedule;
    void* d;               // [M, N], BF16 or FP32
    const void* c;         // null, or [M, N] of D's type, or [N] with c_stride 0
    int64_t d_stride;      // elements between rows
    int64_t c_stride;
    int m;
    int n;
    OutputMode output_mode;
    bool pdl;              // launched with programmatic dependent launch
    bool d_is_float;
    bool d_pairs;          // two neighbours of a row of D (and of C) may be accessed at once
};

}  // namespace deep_gemm
