// Runs the product of hyper-connections' pre-norm: D = A B^T and the sums of squares of A's rows, in one pass over A.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device/prenorm_gemm_params.h"
#include "launcher.h"

namespace deep_gemm {

// How M and K are divided.
struct PrenormPlan {
    int64_t num_splits = 1;   // parts of K, counted in blocks of 64
    int64_t tile_rows = 0;    // a multiple of 8, at most prenorm_max_rows; 0: as high as possible
    bool in_cluster = false;  // the CTAs of a cluster add the parts up: SM90, at most kPrenormMaxCluster of them
};

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
    PrenormPlan plan;
    void* workspace = nullptr;  // null: the parts are the result. Else they are added up there, 16-byte aligned
};

// What makes a problem fastest on `num_sms` SMs whose result is one sum. `arch` as below; `backend` knows how many clusters
// the device has room for.
PrenormPlan prenorm_plan(int64_t m, int64_t n, int64_t k, int arch, int num_sms, Backend& backend);

// Device memory that adding up so many parts needs; 0 for one.
size_t prenorm_workspace_bytes(int64_t m, int64_t n, int64_t num_splits);

// `arch`: 90 or 100. Throws std::runtime_error where a launch fails or there are too many tiles.
void run_prenorm_gemm(const PrenormGemmProblem& problem, int arch, int num_sms, bool pdl, Backend& backend);

}  // namespace deep_gemm
