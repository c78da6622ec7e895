// Tile sizes and shared memory of tf32_hc_prenorm_gemm on SM100: plain C++, so that host and device cannot disagree.
#pragma once

#include "../device/prenorm_gemm_params.h"

namespace deep_gemm::sm100 {

struct PrenormLayout {
    int rows;        // of A: 128 for each instruction
    int col_groups;  // of 32 columns of D (rows of B)

    constexpr int cols() const { return 32 * col_groups; }
    constexpr int a_bytes() const { return rows * kPrenormBlockK * 2; }
    constexpr int b_bytes() const { return cols() * kPrenormBlockK * 4; }  // FP32, then two BF16 parts in the same place
    constexpr int num_threads() const { return 2 * 128 + 2 * 32; }
    constexpr int accumulator_cols() const { return 2 * cols(); }          // of 128 rows
    constexpr int tensor_columns() const { return rows / 128 * accumulator_cols(); }
    constexpr int num_stages() const {
        constexpr int kShared = 227 * 1024, kBarriers = 1024, kMaxStages = 16;
        const int fit = (kShared - kBarriers) / (a_bytes() + b_bytes());
        return fit < kMaxStages ? fit : kMaxStages;
    }
    constexpr int shared_bytes() const { return num_stages() * (a_bytes() + b_bytes()) + 1024; }
};

}  // namespace deep_gemm::sm100
