// out[b, c, r] = x[b, r, c], 8-bit elements.
//
// A CTA moves one 128 x 128 tile. Warp w reads rows 16w .. 16w + 15, each lane 4 bytes (4 columns) of every row, so
// that a warp-wide load is 128 contiguous bytes and needs 4-byte alignment only. 4 x 4 byte transpositions in registers
// give each lane 16 consecutive rows of 4 columns, which it writes to shared memory as 16 bytes a column. Output rows
// of 128 bytes are then read back 16 bytes a thread.
//
// Shared memory: column c is 128 bytes at 128 c; its 16-byte chunk i is at place i ^ ((c / 4) % 8). Both the write (8
// lanes: 8 values of c / 4, one chunk) and the read (8 lanes: one column, 8 chunks) then touch all 32 banks once.
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerWarp = kTile / kWarps;
// Consecutive CTAs go down this many tiles of rows, then one tile to the right: reads and writes both stay within 1 KiB
// runs of their rows at any time.
constexpr uint32_t kRasterRows = 8;

// in[i] holds columns 0..3 of row i, out[j] rows 0..3 of column j.
__device__ __forceinline__ void transpose_4x4(const uint32_t (&in)[4], uint32_t (&out)[4]) {
    const uint32_t a = __byte_perm(in[0], in[1], 0x5140), b = __byte_perm(in[2], in[3], 0x5140);  // columns 0 and 1
    const uint32_t c = __byte_perm(in[0], in[1], 0x7362), d = __byte_perm(in[2], in[3], 0x7362);  // columns 2 and 3
    out[0] = __byte_perm(a, b, 0x5410), out[1] = __byte_perm(a, b, 0x7632);
    out[2] = __byte_perm(c, d, 0x5410), out[3] = __byte_perm(c, d, 0x7632);
}

// The first `valid` bytes at p, one by one; the others are 0.
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* p, int64_t valid) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < valid) word |= load_1(p + i) << (8 * i);
    return word;
}

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
    __shared__ alignas(128) uint4 tile[kTile][kTile / 16];  // [column][rows], swizzled

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
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    launch_dependents();
    wait_for_dependencies();

    const int row = warp * kRowsPerWarp, col = lane * 4;
    const uint8_t* x =
        params.x + batch_idx * params.x_batch_stride + (row_0 + row) * params.x_stride + col_0 + col;
    uint32_t words[kRowsPerWarp];
    if constexpr (kInAligned) {
        if (row + kRowsPerWarp <= rows && col + 4 <= cols) {
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) words[i] = load_4(x + i * params.x_stride);
        } else {
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) {
                words[i] = 0;
                if (row + i < rows && col + 4 <= cols)
                    words[i] = load_4(x + i * params.x_stride);
                else if (row + i < rows)
                    words[i] = load_bytes(x + i * params.x_stride, cols - col);
            }
        }
    } else {
        // Two aligned words around the four bytes where both lie inside the row, else byte by byte.
        uint32_t high[kRowsPerWarp];
        const uint32_t shift_0 = reinterpret_cast<uintptr_t>(x) & 3, shift_step = params.x_stride & 3;
        const int64_t before = col_0 + col, valid = params.cols - before;
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
            const int shift = (shift_0 + i * shift_step) & 3;
            const uint8_t* p = x + i * params.x_stride;
            words[i] = high[i] = 0;
            if (row + i < rows && shift <= before && 8 - shift <= valid) {
                words[i] = load_4(p - shift);
                high[i] = load_4(p - shift + 4);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
            const int shift = (shift_0 + i * shift_step) & 3;
            words[i] = __funnelshift_r(words[i], high[i], 8 * shift);
            if (row + i < rows && !(shift <= before && 8 - shift <= valid))
                words[i] = load_bytes(x + i * params.x_stride, valid);
        }
    }
    uint4 columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t in[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        uint32_t out[4];
        transpose_4x4(in, out);
#pragma unroll
        for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(&columns[j])[i] = out[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[col + j][warp ^ (lane % 8)] = columns[j];
    __syncthreads();

    uint8_t* out = params.out + batch_idx * params.out_batch_stride + col_0 * params.out_stride + row_0;
    if constexpr (kOutAligned) {
        const int chunk = threadIdx.x % 8;
        const int valid = rows - chunk * 16;
#pragma unroll
        for (int i = 0; i < kTile * 8 / kThreads; ++i) {
            const int c = threadIdx.x / 8 + i * (kThreads / 8);
            if (c >= cols || valid <= 0) continue;
            const uint4 value = tile[c][chunk ^ (c / 4 % 8)];
            uint8_t* p = out + c * params.out_stride + chunk * 16;
            if (valid >= 16) {
                *reinterpret_cast<uint4*>(p) = value;
            } else {
                const uint32_t part[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int b = 0; b < 15; ++b)
                    if (b < valid) p[b] = static_cast<uint8_t>(part[b / 4] >> (8 * (b % 4)));
            }
        }
    } else {
        // A warp writes a column's 128 bytes as the aligned words that lie inside, plus the bytes at both ends. Lane l
        // has the word that starts at byte 4 l - shift of the column's 128 bytes; lane 31 adds the one after the last.
        for (int c = warp; c < cols; c += kWarps) {
            uint8_t* p = out + c * params.out_stride;
            const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(p) & 3);
            const uint32_t* column = reinterpret_cast<const uint32_t*>(&tile[c][0]);
            const int swizzle = c / 4 % 8 * 4;
            const uint32_t own = column[lane ^ swizzle];  // bytes 4 lane .. 4 lane + 3
            const uint32_t previous = __shfl_up_sync(0xffffffff, own, 1);
            const uint32_t word = shift == 0 ? own : __funnelshift_l(previous, own, 8 * shift);
            const int begin = 4 * lane - shift;
            if (begin >= 0 && begin + 4 <= rows) {
                *reinterpret_cast<uint32_t*>(p + begin) = word;
            } else {
#pragma unroll
                for (int b = 0; b < 4; ++b)
                    if (begin + b >= 0 && begin + b < rows) p[begin + b] = static_cast<uint8_t>(word >> (8 * b));
            }
            if (lane == 31) {
#pragma unroll
                for (int b = 0; b < 3; ++b)
                    if (b < shift && begin + 4 + b < rows)
                        p[begin + 4 + b] = static_cast<uint8_t>(own >> (8 * (4 - shift + b)));
            }
        }
    }
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
