// What the host passes to a GEMM kernel. Plain C++: included on both sides.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "group_limits.h"

namespace deep_gemm {

// Division by a number that the host knows: x / divisor = (x * multiplier) >> 32 >> shift for 0 <= x < 2^31 and a divisor
// of 2 or more (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994).
struct FastDivisor {
    int divisor;
    uint32_t multiplier;
    uint32_t shift;
};

// Work for DenseScheduler (tile_scheduler.cuh), in units of a cluster's tile.
struct DenseSchedule {
    int num_tiles;
    int num_row_tiles;
    int num_k_blocks;
    FastDivisor row_group;        // row tiles that are walked together before the next column, for locality in L2
    FastDivisor last_row_group;   // how many the last group has
    FastDivisor tiles_per_group;
};

// Products that are alike, one after the other: `schedule` is that of one of them.
struct BatchSchedule {
    int num_tiles;  // of all
    FastDivisor tiles_per_batch;
};

// What the numbers at MGroupSchedule::layout are.
enum GroupTable : int {
    kGroupOfRow,   // for each row its group, or a number outside [0, num_groups): the row is padding
    kEndOfGroup,   // for each group where it ends; the next one starts there, rounded up to `alignment`
    kRowsOfGroup,  // for each group how many of its `rows` rows count
};

// Work for MGroupedScheduler (tile_scheduler.cuh). "Rows" are those of A and D, whatever the instruction's rows are.
struct MGroupSchedule {
    const int32_t* layout;  // in device memory, perhaps written by the kernel before this one
    GroupTable table;
    int num_groups;
    int alignment;
    int rows;          // of A and D; with kRowsOfGroup of each group
    int col_tiles;     // tiles along N
    int row_tiles;     // tiles of a group along M that are walked together before the next along N
    int num_k_blocks;
    bool zero_padding; // rows of D that belong to no group are stored as zeros, otherwise left alone
};

// Heads of `width` columns of the product, the last of which, from `left` on, lie `mid` columns further right in D.
struct HeadMap {
    FastDivisor width;  // divisor 0: none
    int left;
    int mid;
};

// Work for KGroupedScheduler (tile_scheduler.cuh): groups own parts of K, and what says which lies in device memory.
struct KGroupSchedule {
    const int32_t* layout;
    bool is_sizes;     // it holds K of each group; otherwise where each ends
    bool padded;       // SM100's FP8: in the operands each group starts on a multiple of 128
    int alignment;     // in the latter case: the next group starts there, rounded up
    int first_group;   // of this launch; those before only have their share of K
    int num_groups;    // of this launch
    int k;             // of the operands
    FastDivisor tiles_per_group;
};

// FP32 scale factors of blocks, with any strides: entry (i, g) is data[i * stride_mn + g * stride_k].
struct ScaleSource {
    const float* data;
    int64_t stride_mn;
    int64_t stride_k;
    int count;  // entries along MN
};

enum OutputMode : int {
    kStoreTma,     // BF16, of some rows FP32, through shared memory and TMA
    kAddTma,       // FP32 through shared memory and TMA, which adds it to what D holds
    kStoreDirect,  // predicated stores from registers: FP32, or BF16 rows that TMA cannot address
};

// Blocks of B, [groups, row_blocks, k_blocks], without which a product is right already.
struct BlocksToRedo {
    const uint8_t* flags;  // null: all tiles are wanted. `bytes` of them, a multiple of 16
    int bytes;
    int row_blocks;
    int k_blocks;
};

// From `block_scales` to `block_scales_group_stride` numbers that all kernels read lie within 256 bytes of the constant bank:
// with one more tensor map before them calls took 0.1 to 0.4 us longer.
struct GemmParams {
    CUtensorMap rows_map;  // FP8 operand on the instruction's M side, [rows, K]
    CUtensorMap cols_map;  // FP8 operand on the instruction's N side, [cols, K]
    CUtensorMap d_map;     // [M, N]; unused with kStoreDirect
    CUtensorMap row_scales_map;  // FP32 [K groups, rows], where each row has its scale
    CUtensorMap col_scales_map;  // FP32 [K groups, cols], where each column has its scale
    ScaleSource block_scales;    // where a block of 128 rows or columns has one
    DenseSchedule schedule;
    void* d;               // [M, N], BF16 or FP32
    const void* c;         // null, or [M, N] of D's type, or [N] with c_stride 0
    int64_t d_stride;      // elements between rows
    int64_t c_stride;
    int m;
    int n;
    int most_in_flight;    // K blocks of a CTA that are loaded at a time; 0: as many as there are stages
    int zero;              // always 0 (see in_another_register)
    OutputMode output_mode;
    bool d_is_float;
    bool d_pairs;          // two neighbours of a row of D (and of C) may be accessed at once

    // Grouped and batched rows, most of whose tensor maps have the group as a third dimension.
    int64_t d_group_stride;  // elements
    int64_t c_group_stride;
    int64_t block_scales_group_stride;

    // Operands in boxes for tiles that have less of them. Dense and batched: for the last tile of several along M, along N, and
    // along both. M-grouped: the first rows map has the tokens in boxes of 64 rows, several of which are a tile's.
    struct Operands {
        CUtensorMap rows;
        CUtensorMap cols;
    } tails[3];
    MGroupSchedule groups;
    KGroupSchedule k_groups;
    BatchSchedule batch;
    HeadMap heads;

    // Summed: all K blocks of a product, before those of the next one.
    FastDivisor k_blocks_of_product;

    BlocksToRedo redo;  // FP4 rows on SM90
};

}  // namespace deep_gemm
