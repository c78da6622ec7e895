// out[b, c, r] = x[b, r, c], 8-bit elements: a CTA moves one 128 x 128 tile.
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "cast/transpose_tile.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

// Consecutive CTAs go down this many tiles of rows, then one tile to the right: reads and writes both stay within 1 KiB
// runs of their rows at any time.
constexpr uint32_t kRasterRows = 8;

struct TransposeParams {
    const uint8_t* x;
    int64_t x_stride, x_batch_stride;
    uint8_t* out;
    int64_t out_stride, out_batch_stride;
    int64_t rows, cols;
    uint32_t row_tiles, col_tiles;
};

// kInAligned: x and its strides are multiples of 4 bytes. kOutAligned: out and its strides are multiples of 16 bytes.
template <bool kInAligned, bool kOutAligned>
__global__ void __launch_bounds__(kThreads) transpose_fp8_kernel(const __grid_constant__ TransposeParams params) {
    __shared__ alignas(128) TransposeTile tile;

    const uint32_t tiles_per_matrix = params.row_tiles * params.col_tiles;
    const uint32_t batch_idx = blockIdx.x / tiles_per_matrix;
    const uint32_t tile_idx = blockIdx.x % tiles_per_matrix;
    const uint32_t group = tile_idx / (kRasterRows * params.col_tiles);
    const uint32_t in_group = tile_idx - group * (kRasterRows * params.col_tiles);
    const uint32_t group_rows = min(kRasterRows, params.row_tiles - group * kRasterRows);
    const int64_t row_0 = int64_t{group * kRasterRows + in_group % group_rows} * kTile;
    const int64_t col_0 = int64_t{in_group / group_rows} * kTile;
    const int rows = static_cast<int>(min(int64_t{kTile}, params.rows - row_0));
    const int cols = static_cast<int>(min(int64_t{kTile}, params.cols - col_0));

    launch_dependents();
    wait_for_dependencies();

    const uint8_t* x = params.x + batch_idx * params.x_batch_stride + row_0 * params.x_stride + col_0;
    uint8_t* out = params.out + batch_idx * params.out_batch_stride + col_0 * params.out_stride + row_0;
    transpose_tile<kInAligned, kOutAligned>(tile, x, params.x_stride, rows, cols, col_0, params.cols, out,
                                            params.out_stride, rows);
}

}  // namespace

cudaError_t launch_transpose_fp8(const TransposeProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0 || problem.batch <= 0) return cudaSuccess;
    TransposeParams params = {};
    params.x = static_cast<const uint8_t*>(problem.x);
    params.x_stride = problem.x_stride;
    params.x_batch_stride = problem.batch == 1 ? 0 : problem.x_batch_stride;
    params.out = static_cast<uint8_t*>(problem.out);
    params.out_stride = problem.out_stride;
    params.out_batch_stride = problem.batch == 1 ? 0 : problem.out_batch_stride;
    params.rows = problem.rows;
    params.cols = problem.cols;
    const int64_t row_tiles = ceil_div<int64_t>(problem.rows, kTile);
    const int64_t col_tiles = ceil_div<int64_t>(problem.cols, kTile);
    params.row_tiles = static_cast<uint32_t>(row_tiles);
    params.col_tiles = static_cast<uint32_t>(col_tiles);
    const bool in_aligned = is_aligned(params.x, 4) && params.x_stride % 4 == 0 && params.x_batch_stride % 4 == 0;
    const bool out_aligned =
        is_aligned(params.out, 16) && params.out_stride % 16 == 0 && params.out_batch_stride % 16 == 0;
    const auto kernel =
        in_aligned ? (out_aligned ? transpose_fp8_kernel<true, true> : transpose_fp8_kernel<true, false>)
                   : (out_aligned ? transpose_fp8_kernel<false, true> : transpose_fp8_kernel<false, false>);
    return launch(kernel, row_tiles * col_tiles * problem.batch, kThreads, stream, pdl, params);
}

}  // namespace deep_gemm::cast
