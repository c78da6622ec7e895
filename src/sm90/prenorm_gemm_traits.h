// Tile sizes and shared memory of tf32_hc_prenorm_gemm: plain C++, so that host and device cannot disagree.
#pragma once

#include "../device/prenorm_gemm_params.h"

namespace deep_gemm::sm90 {

struct PrenormLayout {
    int rows;        // of A, the N of the instruction
    int col_groups;  // of 32 columns of D (rows of B), a warpgroup for each

    constexpr int cols() const { return 32 * col_groups; }
    constexpr int a_bytes() const { return rows * kPrenormBlockK * 2; }
    constexpr int b_bytes() const { return cols() * kPrenormBlockK * 4; }
    constexpr int num_threads() const { return 128 * (2 + col_groups); }
    constexpr int num_stages() const {
        constexpr int kShared = 227 * 1024, kMaxStages = 16;
        const int fit = (kShared - kRest) / (a_bytes() + b_bytes());
        return fit < kMaxStages ? fit : kMaxStages;
    }
    static constexpr int kRest = 2048;  // barriers, and a cluster's sums of squares
    constexpr int shared_bytes() const { return num_stages() * (a_bytes() + b_bytes()) + kRest; }
};

}  // namespace deep_gemm::sm90
