// FP8 tokens as BF16, in the order of K in which FP4 weights are expanded beside them (sm90/bf16_fp4_rows.cuh): of each 128 of K
// position 16 (2 i + h) + 8 u + 2 t + b has value 32 t + 8 i + 2 h + u + 4 b. With UE8M0 scales, these included: exact, since E4M3
// has 4 bits of mantissa and BF16 8, but for products below 2^-133, BF16's smallest number.
//
// A thread has the eight values with one i from each 32 of K, which are 64 neighbouring bytes of the result. Two threads exchange
// halves, so that they write whole sectors.
#include <cuda_fp8.h>

#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 128;
constexpr int kBlockThreads = 4;  // for 128 of K of a token

struct TokensParams {
    Bf16TokensProblem problem;
    int64_t row_threads;  // of a token
    int64_t threads;      // in all
};

__device__ __forceinline__ float power_of_two(uint32_t code) {
    return code == 255 ? __uint_as_float(0x7fc00000) : code == 0 ? 0x1p-127f : __uint_as_float(code << 23);
}

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

// Two E4M3 values of the low 16 bits, times a scale, as BF16.
__device__ __forceinline__ uint32_t convert(uint32_t pair, float scale) {
    const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    const float2 values = __half22float2(halves);
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(values.y * scale), "f"(values.x * scale));
    return result;
}

__global__ void __launch_bounds__(kThreads) bf16_tokens_kernel(const __grid_constant__ TokensParams params) {
    wait_for_dependencies();
    launch_dependents();
    const Bf16TokensProblem& problem = params.problem;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t token = thread / params.row_threads, of_row = thread - token * params.row_threads;
    const int64_t batch_idx = token / problem.rows, row = token - batch_idx * problem.rows;
    const int64_t block = of_row / kBlockThreads;
    const int i = static_cast<int>(of_row % kBlockThreads);
    bool exists = thread < params.threads;
    if (exists && problem.rows_of_group != nullptr) exists = row < static_cast<int>(load_4(problem.rows_of_group + batch_idx));

    uint32_t units[4][4] = {};  // 16 bytes each, of h and u; t in a unit
    if (exists) {
        const auto* x = static_cast<const uint8_t*>(problem.x) + batch_idx * problem.x_batch_stride + row * problem.x_stride +
                        block * 128 + i * 8;
        uint2 values[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) values[t] = load_8(x + t * 32);
        float scales[4] = {1, 1, 1, 1};
        if (problem.sf != nullptr) load_scales(problem, batch_idx, row, block, scales);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                // Values p and p + 4: p is 2 h + u.
                const uint32_t pair = __byte_perm(values[t].x, values[t].y, p | (p + 4) << 4);
                units[p][t] = convert(pair & 0xffff, scales[t]);
            }
        }
    }
    // The even thread of two writes the first 16 bytes of each 32, of its own and then of the other's.
    const bool is_odd = i % 2;
    uint32_t stores[4][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const uint32_t first = units[2 * half][t], second = units[2 * half + 1][t];
            const uint32_t received = __shfl_xor_sync(0xffffffff, is_odd ? first : second, 1);
            stores[half][t] = is_odd ? received : first;       // of the even thread's
            stores[2 + half][t] = is_odd ? second : received;  // of the odd thread's
        }
    }
    if (!exists) return;
    auto* out = static_cast<uint8_t*>(problem.out) +
                2 * (batch_idx * problem.out_batch_stride + row * problem.out_stride + block * 128) + i / 2 * 128 + is_odd * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<uint4*>(out + j * 32) = make_uint4(stores[j][0], stores[j][1], stores[j][2], stores[j][3]);
    }
}

}  // namespace

cudaError_t launch_bf16_tokens(const Bf16TokensProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    const int64_t row_threads = problem.cols / 128 * kBlockThreads;
    const int64_t threads = row_threads * problem.rows * problem.batch;
    return launch(bf16_tokens_kernel, ceil_div<int64_t>(threads, kThreads), kThreads, stream, pdl,
                  TokensParams{problem, row_threads, threads});
}

}  // namespace deep_gemm::cast
