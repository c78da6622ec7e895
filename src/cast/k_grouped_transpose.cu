// K groups of FP8 values to the form that the k-grouped product reads: out [mn, 128 blocks], K-major, each group from a
// multiple of 128 on and zeros behind its end.
//
// A CTA moves one block of 128 of a group's K for 128 of MN: a transposition where x is [K, mn]; where x is K-major within
// each group already, 16 bytes a thread. Blocks behind the last group are left alone: nothing reads them.
#include "cast/k_groups.cuh"
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "cast/transpose_tile.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

static_assert(kTile == kGroupBlock);

struct KGroupedTransposeParams {
    const uint8_t* x;
    int64_t x_stride;
    int64_t mn;
    uint8_t* out;
    int64_t out_stride;
    KGroups groups;
    uint32_t mn_tiles;
};

// 16 bytes at p of which the first `valid` exist; the others are 0.
__device__ __forceinline__ uint4 load_up_to_16(const uint8_t* p, int64_t valid) {
    if (valid >= 16 && reinterpret_cast<uintptr_t>(p) % 16 == 0) return load_16(p);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = load_bytes(p + 4 * i, valid - 4 * i);
    return {words[0], words[1], words[2], words[3]};
}

// kInAligned: x and its stride are multiples of 4 bytes.
template <bool kFlat, bool kInAligned>
__global__ void __launch_bounds__(kThreads)
    k_grouped_transpose_kernel(const __grid_constant__ KGroupedTransposeParams params) {
    __shared__ alignas(128) TransposeTile tile;
    const int64_t block = blockIdx.x / params.mn_tiles;
    const int64_t mn_0 = int64_t{blockIdx.x % params.mn_tiles} * kTile;
    const int mn = static_cast<int>(min(int64_t{kTile}, params.mn - mn_0));

    launch_dependents();
    wait_for_dependencies();

    const KBlock k_block = find_k_block(params.groups, block);
    if (k_block.rows == 0) return;
    uint8_t* out = params.out + mn_0 * params.out_stride + block * kTile;
    if constexpr (kFlat) {
        // The group is [mn, size]; this block begins `offset` after its first column.
        const int64_t size = k_block.group_rows, offset = k_block.row_0 - k_block.group_0;
        const uint8_t* x = params.x + k_block.group_0 * params.mn + mn_0 * size + offset;
        const int chunk = threadIdx.x % (kTile / 16);
        const int64_t valid = k_block.rows - chunk * 16;
#pragma unroll
        for (int i = 0; i < kTile * (kTile / 16) / kThreads; ++i) {
            const int row = threadIdx.x / (kTile / 16) + i * (kThreads / (kTile / 16));
            if (row >= mn) break;
            *reinterpret_cast<uint4*>(out + row * params.out_stride + chunk * 16) =
                load_up_to_16(x + row * size + chunk * 16, valid);
        }
    } else {
        const uint8_t* x = params.x + k_block.row_0 * params.x_stride + mn_0;
        transpose_tile<kInAligned, true>(tile, x, params.x_stride, k_block.rows, mn, mn_0, params.mn, out,
                                         params.out_stride, kTile);
    }
}

}  // namespace

cudaError_t launch_k_grouped_transpose_fp8(const KGroupedTransposeProblem& problem, const KGroups& groups,
                                           cudaStream_t stream, bool pdl) {
    if (problem.mn <= 0 || groups.rows <= 0 || groups.num_groups <= 0) return cudaSuccess;
    if (!is_aligned(problem.out, 16) || problem.out_stride % 16 != 0) return cudaErrorInvalidValue;
    KGroupedTransposeParams params = {};
    params.x = static_cast<const uint8_t*>(problem.x);
    params.x_stride = problem.x_stride;
    params.mn = problem.mn;
    params.out = static_cast<uint8_t*>(problem.out);
    params.out_stride = problem.out_stride;
    params.groups = groups;
    const int64_t mn_tiles = ceil_div<int64_t>(problem.mn, kTile);
    params.mn_tiles = static_cast<uint32_t>(mn_tiles);
    const bool in_aligned = is_aligned(params.x, 4) && params.x_stride % 4 == 0;
    const auto kernel = problem.flat  ? k_grouped_transpose_kernel<true, true>
                        : in_aligned ? k_grouped_transpose_kernel<false, true>
                                     : k_grouped_transpose_kernel<false, false>;
    return launch(kernel, mn_tiles * groups.scale_rows(), kThreads, stream, pdl, params);
}

}  // namespace deep_gemm::cast
