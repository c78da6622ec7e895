// What the host passes to the kernels of tf32_hc_prenorm_gemm. Plain C++: included on both sides.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace deep_gemm {

inline constexpr int kPrenormBlockK = 64;  // 128 bytes of A, twice 128 bytes of B
inline constexpr int kPrenormReduceThreads = 256;
inline constexpr int kPrenormReduceElements = 128;  // of a CTA

// Rows of the tallest kernel: with two groups of 32 columns SM90's threads have half the registers for accumulators.
constexpr int prenorm_max_rows(int col_groups) { return col_groups == 1 ? 256 : 128; }

// CTAs of a cluster that can share a row tile, each with its part of K: the portable limit.
inline constexpr int kPrenormMaxCluster = 8;

// D[s, m, n] and the sums of squares [s, m], s the part of K. FP32, strides in elements.
struct PrenormOutput {
    float* d;
    int64_t d_split_stride;
    int64_t d_row_stride;
    float* sqr_sum;
    int64_t sqr_split_stride;
};

struct PrenormGemmParams {
    CUtensorMap a_map;  // BF16 [M, K], boxes of tile_rows x 64
    CUtensorMap b_map;  // FP32 [N, K], boxes of b_box_rows x 32; unset where N is 0
    PrenormOutput output;
    int m;
    int n;
    int num_k_blocks;   // of 64
    int num_splits;
    int num_tiles;      // of rows, columns and parts of K
    int num_row_tiles;
    int num_col_tiles;
    int tile_rows;      // rows of A that a CTA has: a multiple of 8, no more than the kernel's kRows
    int b_box_rows;     // a multiple of 8
    bool in_cluster;    // the CTAs of a cluster have the parts of K of one tile, and add them up; one tile a cluster
};

// Sums the parts of K in their order: element i is parts[i] + parts[i + part_stride] + ... The first m * n elements are
// D, the next m the sums of squares.
struct PrenormReduceParams {
    const float* parts;
    int64_t part_stride;  // a multiple of 4
    int num_parts;
    int m;
    int n;
    PrenormOutput output;
};

}  // namespace deep_gemm
