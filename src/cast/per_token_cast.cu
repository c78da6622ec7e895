// FP8 quantisation with a scale per row and gran_k columns.
//
// A CTA quantises 32 rows x 256 columns; each warp 4 rows, all of whose loads are in flight at once. Scales are
// collected in shared memory and written along rows, the contiguous dimension of the MN-major result.
//   kVector: a lane has 16 bytes of each load, neighbouring lanes share a group.
//   else (any alignment, any column count): a lane has columns lane, lane + 32, ..., so that every access is coalesced.
#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "cast/scale.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 32;
constexpr int kTileCols = 256;
constexpr int kRowsPerWarp = kTileRows / (kThreads / 32);

struct PerTokenParams {
    const void* x;
    int64_t x_stride;
    uint8_t* out;
    int64_t out_stride;
    void* sf;
    int64_t sf_stride;
    int64_t rows, cols;
    uint32_t col_tiles;
    ScaleFormat sf_format;
};

template <typename T, int kGranK, bool kVector>
__global__ void __launch_bounds__(kThreads) per_token_cast_kernel(const __grid_constant__ PerTokenParams params) {
    constexpr int kGroups = kTileCols / kGranK;
    // One word more a row: in one store a warp writes one row of several groups.
    __shared__ float scales[kGroups][kTileRows + 1];

    const uint32_t col_tile = blockIdx.x % params.col_tiles;
    const int64_t row_0 = int64_t{blockIdx.x / params.col_tiles} * kTileRows;
    const int64_t col_0 = int64_t{col_tile} * kTileCols;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * kRowsPerWarp;  // within the tile, the first of this warp
    const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;
    const T* x = static_cast<const T*>(params.x) + (row_0 + row) * params.x_stride + col_0;
    uint8_t* out = params.out + (row_0 + row) * params.out_stride + col_0;
    const int rows = static_cast<int>(min(int64_t{kRowsPerWarp}, params.rows - row_0 - row));  // may be negative
    const int cols = static_cast<int>(min(int64_t{kTileCols}, params.cols - col_0));

    launch_dependents();
    wait_for_dependencies();

    if constexpr (kVector) {
        constexpr int kElems = Elements<T>::kPer16;
        constexpr int kChunks = kTileCols / (32 * kElems);
        constexpr int kLanesPerGroup = kGranK / kElems;
        uint4 raw[kRowsPerWarp][kChunks];
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int col = (c * 32 + lane) * kElems;
                raw[i][c] = make_uint4(0, 0, 0, 0);
                if (i < rows && col < cols) raw[i][c] = load_16(x + i * params.x_stride + col);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const int col = (c * 32 + lane) * kElems;
                float values[kElems];
                Elements<T>::unpack(raw[i][c], values);
                float amax = 0;
#pragma unroll
                for (int e = 0; e < kElems; ++e) amax = max_abs(amax, values[e]);
#pragma unroll
                for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2)
                    amax = max_abs(amax, __shfl_xor_sync(0xffffffff, amax, offset));
                const GroupScale scale = group_scale(amax, ue8m0);
                if (lane % kLanesPerGroup == 0) scales[(c * 32 + lane) / kLanesPerGroup][row + i] = scale.sf;
                uint32_t packed[kElems / 4];
#pragma unroll
                for (int e = 0; e < kElems; e += 4)
                    packed[e / 4] = to_e4m3x4(values[e] * scale.inverse, values[e + 1] * scale.inverse,
                                              values[e + 2] * scale.inverse, values[e + 3] * scale.inverse);
                if (i < rows && col < cols) {
                    uint8_t* p = out + i * params.out_stride + col;
                    if constexpr (kElems == 8)
                        *reinterpret_cast<uint2*>(p) = make_uint2(packed[0], packed[1]);
                    else
                        *reinterpret_cast<uint32_t*>(p) = packed[0];
                }
            }
        }
    } else {
        constexpr int kElems = kTileCols / 32;
        constexpr int kElemsPerGroup = kGranK / 32;
        constexpr int kRowsAtATime = 2;  // all four at once need more registers than they repay
#pragma unroll 1
        for (int first = 0; first < kRowsPerWarp; first += kRowsAtATime) {
            uint32_t raw[kRowsAtATime][kElems];
#pragma unroll
            for (int i = 0; i < kRowsAtATime; ++i) {
#pragma unroll
                for (int e = 0; e < kElems; ++e) {
                    raw[i][e] = 0;
                    if (first + i < rows && lane + 32 * e < cols)
                        raw[i][e] = load_element<sizeof(T)>(x + (first + i) * params.x_stride + lane + 32 * e);
                }
            }
#pragma unroll
            for (int i = 0; i < kRowsAtATime; ++i) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    float amax = 0;
#pragma unroll
                    for (int e = g * kElemsPerGroup; e < (g + 1) * kElemsPerGroup; ++e)
                        amax = max_abs(amax, Elements<T>::unpack_one(raw[i][e]));
#pragma unroll
                    for (int offset = 16; offset > 0; offset /= 2)
                        amax = max_abs(amax, __shfl_xor_sync(0xffffffff, amax, offset));
                    const GroupScale scale = group_scale(amax, ue8m0);
                    if (lane == 0) scales[g][row + first + i] = scale.sf;
#pragma unroll
                    for (int e = g * kElemsPerGroup; e < (g + 1) * kElemsPerGroup; ++e) {
                        const float value = Elements<T>::unpack_one(raw[i][e]) * scale.inverse;
                        if (first + i < rows && lane + 32 * e < cols)
                            out[(first + i) * params.out_stride + lane + 32 * e] =
                                static_cast<uint8_t>(to_e4m3x4(value, 0, 0, 0));
                    }
                }
            }
        }
    }
    __syncthreads();

    const int tile_rows = static_cast<int>(min(int64_t{kTileRows}, params.rows - row_0));
    const int groups = ceil_div(cols, kGranK);
    const int sf_row = threadIdx.x % kTileRows, sf_group = threadIdx.x / kTileRows;
    if (sf_row >= tile_rows) return;
    if (params.sf_format != ScaleFormat::kUE8M0Packed) {
        if (sf_group < groups)
            static_cast<float*>(params.sf)[row_0 + sf_row + (col_tile * kGroups + sf_group) * params.sf_stride] =
                scales[sf_group][sf_row];
    } else if constexpr (kGroups >= 4) {
        if (sf_group < ceil_div(groups, 4)) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (sf_group * 4 + i < groups) word |= packed_scale(scales[sf_group * 4 + i][sf_row]) << (8 * i);
            const int64_t word_idx = col_tile * (kGroups / 4) + sf_group;
            static_cast<uint32_t*>(params.sf)[row_0 + sf_row + word_idx * params.sf_stride] = word;
        }
    } else if (sf_group == 0) {
        // Two tiles of two groups share a word: each writes its half, and the last tile all that follows.
        const uint32_t half =
            packed_scale(scales[0][sf_row]) | (groups > 1 ? packed_scale(scales[1][sf_row]) << 8 : 0);
        uint32_t* word = static_cast<uint32_t*>(params.sf) + row_0 + sf_row + (col_tile / 2) * params.sf_stride;
        if (col_tile % 2 == 0 && col_tile + 1 == params.col_tiles)
            *word = half;
        else
            reinterpret_cast<uint16_t*>(word)[col_tile % 2] = static_cast<uint16_t>(half);
    }
}

template <typename T>
cudaError_t launch_for(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    constexpr int kElems = Elements<T>::kPer16;
    PerTokenParams params = {};
    params.x = problem.x;
    params.x_stride = problem.x_stride;
    params.out = static_cast<uint8_t*>(problem.out);
    params.out_stride = problem.out_stride;
    params.sf = problem.sf;
    params.sf_stride = problem.sf_stride;
    params.rows = problem.rows;
    params.cols = problem.cols;
    params.sf_format = problem.sf_format;
    const int64_t row_tiles = ceil_div<int64_t>(problem.rows, kTileRows);
    const int64_t col_tiles = ceil_div<int64_t>(problem.cols, kTileCols);
    params.col_tiles = static_cast<uint32_t>(col_tiles);
    const bool vector = is_aligned(problem.x, 16) && problem.x_stride % kElems == 0 && problem.cols % kElems == 0 &&
                        is_aligned(problem.out, kElems) && problem.out_stride % kElems == 0;
    const auto kernel =
        problem.gran_k == 128 ? (vector ? per_token_cast_kernel<T, 128, true> : per_token_cast_kernel<T, 128, false>)
                              : (vector ? per_token_cast_kernel<T, 32, true> : per_token_cast_kernel<T, 32, false>);
    return launch(kernel, row_tiles * col_tiles, kThreads, stream, pdl, params);
}

}  // namespace

cudaError_t launch_per_token_cast(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0 || problem.cols <= 0) return cudaSuccess;
    if (problem.gran_k != 128 && problem.gran_k != 32) return cudaErrorInvalidValue;
    switch (problem.x_type) {
        case InputType::kBFloat16: return launch_for<__nv_bfloat16>(problem, stream, pdl);
        case InputType::kFloat16: return launch_for<__half>(problem, stream, pdl);
        case InputType::kFloat32: return launch_for<float>(problem, stream, pdl);
    }
    return cudaErrorInvalidValue;
}

}  // namespace deep_gemm::cast
