// What follows from a table row: shared-memory layout, stages, threads. Plain C++, so that the host computes the same.
#pragma once

#include <algorithm>
#include <numeric>

#include "../host/gemm_row.h"

namespace deep_gemm::sm90 {

inline constexpr int kBlockK = 128;               // bytes and elements: one swizzle span
inline constexpr int kSharedBytesPerSm = 228 * 1024;  // of which each CTA reserves 1 KB
inline constexpr int kMaxStages = 12;

constexpr int align_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct GemmLayout {
    GemmRow row;

    constexpr int num_consumer_warpgroups() const { return row.block_rows / 64; }
    constexpr int num_threads() const { return 128 * (1 + num_consumer_warpgroups()); }
    constexpr int k_groups() const { return kBlockK / row.gran_k; }

    // Scale factors that one stage holds for each operand. With 1D2D, B has one for every block of 128 of its rows
    // that a tile can touch; a tile starts on a multiple of block_granule() columns.
    constexpr int block_granule() const { return std::gcd(row.block_cols, 128); }
    constexpr bool row_scales_are_vector() const { return row.scaling == kScaling1D1D || !row.swap_ab; }
    constexpr bool col_scales_are_vector() const { return row.scaling == kScaling1D1D || row.swap_ab; }
    constexpr int row_scales() const { return row_scales_are_vector() ? row.block_rows : 1; }
    constexpr int col_scales() const {
        if (col_scales_are_vector()) return row.block_cols;
        const int blocks = (128 - block_granule() + row.block_cols + 127) / 128;
        return blocks == 3 ? 4 : blocks;  // read as one vector
    }

    // With split K each CTA of the cluster finishes a slice of the tile's columns.
    constexpr int num_slices() const { return std::min(row.split_k, row.block_cols / 8); }
    constexpr int store_cols() const { return row.block_cols / num_slices(); }

    // A box of D that one TMA store writes. Without swapped operands it is 64 rows high; with them it holds the 64 columns
    // of D that belong to a consumer warpgroup.
    constexpr int box_cols() const {
        return row.swap_ab || store_cols() % 64 == 0 ? 64 : store_cols() % 32 == 0 ? 32 : 16;
    }
    constexpr int box_rows() const { return row.swap_ab ? store_cols() : 64; }

    constexpr int row_tile_bytes() const { return row.block_rows * kBlockK; }
    constexpr int col_tile_bytes() const { return row.block_cols * kBlockK; }
    constexpr int staging_bytes() const { return row.block_rows * store_cols() * 2; }
    constexpr int reduce_bytes() const {
        return row.split_k == 1 ? 0 : row.split_k * row.block_rows * store_cols() * 4;
    }
    constexpr int stage_bytes() const {
        return row_tile_bytes() + col_tile_bytes() + 4 * k_groups() * (align_up(row_scales(), 4) + align_up(col_scales(), 4)) +
               16;
    }
    constexpr int fixed_bytes() const { return staging_bytes() + std::max(reduce_bytes(), 16) + 16; }
    constexpr int num_stages() const {
        const int budget = kSharedBytesPerSm / row.ctas_per_sm - 1024;
        return std::min(kMaxStages, (budget - fixed_bytes()) / stage_bytes());
    }
    constexpr int shared_bytes() const {
        return align_up(fixed_bytes() + num_stages() * stage_bytes(), 1024);
    }
};

// Why a row cannot be compiled, or null.
constexpr const char* invalid_reason(GemmRow row) {
    const GemmLayout layout{row};
    if (row.block_rows != 64 && row.block_rows != 128) return "block_rows must be 64 or 128";
    if (row.block_cols % 8 != 0 || row.block_cols < 8 || row.block_cols > 192) {
        return "block_cols must be a multiple of 8 from 8 to 192";
    }
    if (row.gran_k != 128 && row.gran_k != 32) return "gran_k must be 128 or 32";
    if (row.gran_k == 32 && row.scaling != kScaling1D1D) return "gran_k 32 needs 1D1D scaling";
    if (row.row_ctas > 1 && row.col_ctas > 1) return "a cluster shares one operand, not both";
    if (row.cluster_size() > 8) return "a cluster has 8 CTAs at most";
    if (row.block_cols % (8 * row.row_ctas) != 0) return "a shared column panel is loaded in parts of 8 columns or more";
    if (row.block_rows % (8 * row.col_ctas) != 0) return "a shared row panel is loaded in parts of 8 rows or more";
    if (row.ctas_per_sm != 1 && row.ctas_per_sm != 2) return "ctas_per_sm must be 1 or 2";
    if (row.ctas_per_sm == 2 && row.block_cols > 64) return "two CTAs of this size do not fit into the registers";
    if (row.block_cols / 8 % layout.num_slices() != 0) return "split K must divide the columns evenly, 8 at a time";
    if (!row.swap_ab && layout.store_cols() % 16 != 0) return "stores need 16 columns at a time";
    if (layout.num_stages() < 3) return "fewer than 3 stages fit into shared memory";
    return nullptr;
}

// Index of the first invalid row, or -1.
template <int kCount>
constexpr int first_invalid(const GemmRow (&rows)[kCount]) {
    for (int i = 0; i < kCount; ++i) {
        if (invalid_reason(rows[i]) != nullptr) return i;
    }
    return -1;
}

}  // namespace deep_gemm::sm90
