// Tile sizes and shared memory of tf32_hc_prenorm_gemm: plain C++, so that host and device cannot disagree.
#pragma once

#include "../device/prenorm_gemm_params.h"

namespace deep_gemm::sm90 {

// Elements of a row of a part that a cluster adds up: the sum of squares and three zeros, then n elements of D. The four rows
// and eight columns that a warp writes at once lie in different banks.
constexpr int prenorm_part_pitch(int n) { return 4 + (n + 7) / 8 * 8; }

struct PrenormLayout {
    int rows;        // of A, the N of the instruction
    int col_groups;  // of 32 columns of D (rows of B), a warpgroup for each, or, where there is one, for half of the rows

    constexpr int cols() const { return 32 * col_groups; }
    constexpr int a_bytes() const { return rows * kPrenormBlockK * 2; }
    constexpr int b_bytes() const { return cols() * kPrenormBlockK * 4; }
    constexpr int row_groups() const { return col_groups == 1 && rows > 64 ? 2 : 1; }
    constexpr int products() const { return col_groups * row_groups(); }  // warpgroups that multiply
    constexpr int num_threads() const { return 128 * (2 + products()); }
    constexpr int num_stages() const {
        // Fewer than fit: a CTA of the kernel that adds parts up finds room beside one of this kernel, and waits there.
        constexpr int kShared = 227 * 1024, kMaxStages = 13;
        const int fit = (kShared - kRest) / (a_bytes() + b_bytes());
        return fit < kMaxStages ? fit : kMaxStages;
    }
    static constexpr int kRest = 2048;  // barriers, and the sums of squares of a cluster's part
    constexpr int shared_bytes() const { return num_stages() * (a_bytes() + b_bytes()) + kRest; }
};

}  // namespace deep_gemm::sm90
