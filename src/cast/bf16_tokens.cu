// FP8 tokens as BF16 for products with FP4 weights: device/bf16_tokens.cuh.
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "device/bf16_tokens.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 128;

struct TokensParams {
    Bf16TokensProblem problem;
    int64_t row_threads;  // of a token
    int64_t threads;      // in all
};

// The scales of values 32 t ... of a block of 128.
__device__ __forceinline__ void load_scales(const Bf16TokensProblem& problem, int64_t batch_idx, int64_t row, int64_t block,
                                            float (&scales)[4]) {
    const int64_t of_row = batch_idx * problem.sf_batch_stride + row / problem.gran_mn * problem.sf_mn_stride;
    const bool is_fine = problem.gran_k == 32;
    if (problem.sf_is_packed) {
        const auto* words = static_cast<const uint32_t*>(problem.sf) + of_row;
        const uint32_t word = load_4(words + (is_fine ? block : block / 4) * problem.sf_k_stride);
#pragma unroll
        for (int t = 0; t < 4; ++t) scales[t] = power_of_two(word >> ((is_fine ? t : block % 4) * 8) & 0xff);
    } else {
        const auto* bytes = static_cast<const uint8_t*>(problem.sf) + of_row;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            scales[t] = t == 0 || is_fine ? power_of_two(load_1(bytes + (is_fine ? block * 4 + t : block) * problem.sf_k_stride))
                                          : scales[0];
        }
    }
}

__global__ void __launch_bounds__(kThreads) bf16_tokens_kernel(const __grid_constant__ TokensParams params) {
    wait_for_dependencies();
    launch_dependents();
    const Bf16TokensProblem& problem = params.problem;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t token = thread / params.row_threads, of_row = thread - token * params.row_threads;
    const int64_t batch_idx = token / problem.rows, row = token - batch_idx * problem.rows;
    const int64_t block = of_row / kBf16BlockThreads;
    const int i = static_cast<int>(of_row % kBf16BlockThreads);
    bool exists = thread < params.threads;
    if (exists && problem.rows_of_group != nullptr) exists = row < static_cast<int>(load_4(problem.rows_of_group + batch_idx));

    uint2 values[4] = {};
    float scales[4] = {1, 1, 1, 1};
    if (exists) {
        const auto* x = static_cast<const uint8_t*>(problem.x) + batch_idx * problem.x_batch_stride + row * problem.x_stride +
                        block * 128 + i * 8;
#pragma unroll
        for (int t = 0; t < 4; ++t) values[t] = load_8(x + t * 32);
        if (problem.sf != nullptr) load_scales(problem, batch_idx, row, block, scales);
    }
    uint32_t stores[4][4];
    bf16_of_tokens(values, scales, i % 2, stores);
    if (!exists) return;
    auto* out = static_cast<uint8_t*>(problem.out) +
                2 * (batch_idx * problem.out_batch_stride + row * problem.out_stride + block * 128) + bf16_store(i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<uint4*>(out + j * 32) = make_uint4(stores[j][0], stores[j][1], stores[j][2], stores[j][3]);
    }
}

}  // namespace

cudaError_t launch_bf16_tokens(const Bf16TokensProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    const int64_t row_threads = problem.cols / 128 * kBf16BlockThreads;
    const int64_t threads = row_threads * problem.rows * problem.batch;
    return launch(bf16_tokens_kernel, ceil_div<int64_t>(threads, kThreads), kThreads, stream, pdl,
                  TokensParams{problem, row_threads, threads});
}

}  // namespace deep_gemm::cast
