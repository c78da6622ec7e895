// FP4 to FP8.
//
// Expansion: each E2M1 value as the E4M3 value that it is; its scales stay as they are. A thread turns 16 bytes into 32.
//
// Folding: scales per 32 columns become a part of the values, so that one per block of 128 x 128 is left. E4M3 has the magnitudes
// 0.5 to 6 times 2^e for all e from -8 to 6: down to -5 as normal numbers, further down as multiples of the smallest subnormal,
// 2^-9 = 0.5 * 2^-8. The block's largest scale is given e = 6, so the smallest that is exact is 2^14 times smaller. A CTA has a
// block, a thread 8 bytes of each of four rows: half a scale's values.
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

struct FoldParams {
    FoldFp4Problem problem;
    int64_t row_blocks, col_blocks;
    int64_t blocks, inexact_bytes;
};

constexpr int kFoldBytes = 8;                           // that a thread reads at a time
constexpr int kRowThreads = 128 / 2 / kFoldBytes;       // of a block's row
constexpr int kFoldRows = kThreads / kRowThreads;       // that all threads read at a time
constexpr int kFolds = 128 / kFoldRows;
constexpr int kLargestStart = -(1 << 20);               // below any scale's exponent

__device__ __forceinline__ bool has_rows(const FoldFp4Problem& problem, int64_t group) {
    if (problem.group_layout == nullptr) return true;
    const int last = static_cast<int>(load_4(problem.group_layout + group));
    // Where a group does not end behind the one before, whatever that one's end really is, it is empty.
    const int before = problem.ends && group > 0 ? static_cast<int>(load_4(problem.group_layout + group - 1)) : 0;
    return last > before;
}

__global__ void __launch_bounds__(kThreads) fold_fp4_kernel(const __grid_constant__ FoldParams params) {
    __shared__ int largest_of_warps[kThreads / 32];
    launch_dependents();
    wait_for_dependencies();
    const FoldFp4Problem& problem = params.problem;
    const int64_t block = blockIdx.x;
    const int64_t col_block = block % params.col_blocks, rest = block / params.col_blocks;
    const int64_t row_block = rest % params.row_blocks, group = rest / params.row_blocks;
    const int thread = threadIdx.x;
    if (block == 0) {
        for (int64_t i = params.blocks + thread; i < params.inexact_bytes; i += kThreads) problem.inexact[i] = 0;
    }
    if (!has_rows(problem, group)) {
        if (thread == 0) problem.inexact[block] = 0;
        return;
    }

    const int part = thread % kRowThreads;
    const int64_t first_row = row_block * 128 + thread / kRowThreads;
    const auto* x = static_cast<const uint8_t*>(problem.x) + group * problem.x_batch_stride + first_row * problem.x_stride +
                    col_block * 64 + part * kFoldBytes;
    const auto* sf = static_cast<const uint32_t*>(problem.sf) + group * problem.sf_batch_stride +
                     col_block * problem.sf_stride + first_row;
    uint2 pairs[kFolds];
    int codes[kFolds];
#pragma unroll
    for (int i = 0; i < kFolds; ++i) {
        const bool exists = first_row + i * kFoldRows < problem.rows;
        pairs[i] = exists ? load_8(x + i * kFoldRows * problem.x_stride) : make_uint2(0, 0);
        codes[i] = exists ? static_cast<int>(load_4(sf + i * kFoldRows) >> (part / 2 * 8) & 0xff) : 0;
    }
    int largest = kLargestStart;
#pragma unroll
    for (int i = 0; i < kFolds; ++i) {
        const bool counts = codes[i] != 255 && ((pairs[i].x | pairs[i].y) & 0x77777777) != 0;
        if (counts) largest = max(largest, codes[i]);
    }
    largest = __reduce_max_sync(0xffffffff, largest);
    if (thread % 32 == 0) largest_of_warps[thread / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, largest_of_warps[warp]);
    largest = max(largest, 0);  // of a block of zeros

    bool inexact = false;
    auto* out = static_cast<uint8_t*>(problem.out) + group * problem.out_batch_stride + first_row * problem.out_stride +
                col_block * 128 + part * 2 * kFoldBytes;
#pragma unroll
    for (int i = 0; i < kFolds; ++i) {
        const int exponent = codes[i] - largest + kLargestExponent;
        uint2 magnitudes = scaled_magnitudes(min(exponent, kLargestExponent));
        if (exponent < kSmallestSubnormalExponent) {
            magnitudes = make_uint2(0, 0);
            inexact |= ((pairs[i].x | pairs[i].y) & 0x77777777) != 0;
        }
        if (codes[i] == 255) magnitudes = make_uint2(0x7f7f7f7f, 0x7f7f7f7f);
        const auto expand = [&](uint32_t four) { return expand_e2m1(four, magnitudes.x, magnitudes.y); };
        if (first_row + i * kFoldRows < problem.rows) {
            *reinterpret_cast<uint4*>(out + i * kFoldRows * problem.out_stride) =
                make_uint4(expand(pairs[i].x), expand(pairs[i].x >> 16), expand(pairs[i].y), expand(pairs[i].y >> 16));
        }
    }
    const bool any_inexact = __syncthreads_or(inexact);
    if (thread == 0) {
        const int exponent = largest - 127 - kLargestExponent;  // of a subnormal number, too
        const int bits = exponent >= -126 ? (exponent + 127) << 23 : 1 << (exponent + 149);
        problem.block_sf[block] = __int_as_float(bits);
        problem.inexact[block] = any_inexact;
    }
}

}  // namespace

cudaError_t launch_fold_fp4(const FoldFp4Problem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    const int64_t blocks = problem.batch * problem.row_blocks() * problem.col_blocks();
    return launch(fold_fp4_kernel, blocks, kThreads, stream, pdl,
                  FoldParams{problem, problem.row_blocks(), problem.col_blocks(), blocks, problem.inexact_bytes()});
}

cudaError_t launch_expand_fp4(const ExpandFp4Problem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    const int64_t row_chunks = ceil_div<int64_t>(problem.cols / 2, kBytes);
    const int64_t chunks = row_chunks * problem.rows * problem.batch;
    return launch(expand_fp4_kernel, ceil_div<int64_t>(chunks, kThreads), kThreads, stream, pdl,
                  ExpandParams{problem, row_chunks, chunks});
}

}  // namespace deep_gemm::cast
