// FP4 to FP8: each E2M1 value as the E4M3 value that it is. A thread turns 16 bytes into 32.
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "device/fp4.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 256;
constexpr int kBytes = 16;  // that a thread reads

struct ExpandParams {
    ExpandFp4Problem problem;
    int64_t row_chunks;  // of kBytes, in a row
    int64_t chunks;      // in all
};

__global__ void __launch_bounds__(kThreads) expand_fp4_kernel(const __grid_constant__ ExpandParams params) {
    launch_dependents();
    wait_for_dependencies();
    const ExpandFp4Problem& problem = params.problem;
    const int64_t chunk = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (chunk >= params.chunks) return;
    const int64_t row = chunk / params.row_chunks, first = (chunk - row * params.row_chunks) * kBytes;
    const int64_t batch_idx = row / problem.rows, row_idx = row - batch_idx * problem.rows;
    const auto* x = static_cast<const uint8_t*>(problem.x) + batch_idx * problem.x_batch_stride +
                    row_idx * problem.x_stride + first;
    auto* out = static_cast<uint8_t*>(problem.out) + batch_idx * problem.out_batch_stride + row_idx * problem.out_stride +
                2 * first;
    uint4 pairs = {};
    const int64_t left = problem.cols / 2 - first;
    if (left >= kBytes) {
        pairs = load_16(x);
    } else {  // the end of a row may be the end of the memory
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < kBytes; ++i) {
            if (i < left) words[i / 4] |= load_1(x + i) << (i % 4 * 8);
        }
        pairs = make_uint4(words[0], words[1], words[2], words[3]);
    }
    const auto half = [&](uint32_t low, uint32_t high) {
        return make_uint4(expand_e2m1(low), expand_e2m1(low >> 16), expand_e2m1(high), expand_e2m1(high >> 16));
    };
    auto* destination = reinterpret_cast<uint4*>(out);
    destination[0] = half(pairs.x, pairs.y);
    destination[1] = half(pairs.z, pairs.w);
}

}  // namespace

cudaError_t launch_expand_fp4(const ExpandFp4Problem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    const int64_t row_chunks = ceil_div<int64_t>(problem.cols / 2, kBytes);
    const int64_t chunks = row_chunks * problem.rows * problem.batch;
    return launch(expand_fp4_kernel, ceil_div<int64_t>(chunks, kThreads), kThreads, stream, pdl,
                  ExpandParams{problem, row_chunks, chunks});
}

}  // namespace deep_gemm::cast
