// Runs the product of hyper-connections' pre-norm: D = A B^T and the sums of squares of A's rows, in one pass over A.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device/prenorm_gemm_params.h"
#include "launcher.h"

namespace deep_gemm {

// A BF16 [M, K], B FP32 [N, K], rows 16-byte aligned. M and K must be positive; N may be 0.
struct PrenormGemmProblem {
    int64_t m = 0;
    int64_t n = 0;
    int64_t k = 0;
    const void* a = nullptr;
    int64_t a_stride = 0;  // elements between rows
    const void* b = nullptr;
    int64_t b_stride = 0;
    PrenormOutput output = {};
    int64_t num_splits = 0;      // the outputs have a leading dimension of this size, for parts of K; 0: they have none
    void* workspace = nullptr;   // prenorm_workspace_bytes(), where these are more than 0; 16-byte aligned
};

// Device memory that a problem needs while it runs: 0 where K is not split, or where the caller wants the parts.
size_t prenorm_workspace_bytes(const PrenormGemmProblem& problem, int num_sms);

// Throws std::runtime_error where a launch fails or the grid is too large.
void run_prenorm_gemm(const PrenormGemmProblem& problem, int num_sms, bool pdl, Backend& backend);

}  // namespace deep_gemm
