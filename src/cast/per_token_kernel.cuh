// Quantisation with a scale per row and gran_k columns: the kernel, for any source of values and any format of results.
//
// A tile is 32 rows x 256 columns, or less where it takes much to compute; a CTA's eight warps share out the rows. Scales are
// collected in shared memory and written along rows, the contiguous dimension of the MN-major result.
//   kVector: a lane has 16 bytes of each load, neighbouring lanes share a group. They share the work of its scales, too:
//            each computes those of one row.
//   else (any alignment, any column count): a lane has columns lane, lane + 32, ..., so that every access is coalesced.
//   kPipelined: where there is much to compute for a byte. As many CTAs as fit walk the tiles; every thread copies its part
//            of the next one into shared memory, which nobody else reads, while it computes. Else a CTA has one tile, all of
//            whose loads are in flight before the first is used.
//
// A source says what is quantised:
//   Element, Params                what x holds, and what else the source is told
//   kVectors, address(p, v)        from how many addresses 16 bytes each make kPer16 values, and where they are
//   Chunk: amax(), values(v)       those values; the largest magnitude is asked for first
//   kRowsOfWarp                    rows of a tile that a warp quantises, with vectors: all their values are held at once
//   One: load(p), value()          a single value
//   kHasRowFactor, row_factor()    a number of each row, loaded once and handed to amax() and value()
// A format (E4M3, E2M1 in scale.cuh) says what is written: kMax, bits a value, and how values are packed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cast/cast_params.cuh"
#include "cast/memory.cuh"

namespace deep_gemm::cast {

// x itself.
template <typename T>
struct PlainSource {
    using Element = T;
    struct Params {};
    static constexpr bool kHasRowFactor = false;
    static constexpr int kRowsOfWarp = 4, kVectors = 1;
    static __device__ __forceinline__ float row_factor(const Params&, int64_t) { return 1; }
    static __device__ __forceinline__ const T* address(const Params&, const T* p, int) { return p; }
    struct Chunk {
        uint4 raw[kVectors];
        __device__ __forceinline__ float amax(const Params&, float) const {
            using E = Elements<T>;
            return E::magnitude(E::larger(E::larger(raw[0].x, raw[0].y), E::larger(raw[0].z, raw[0].w)));
        }
        __device__ __forceinline__ void values(float (&v)[Elements<T>::kPer16]) const {
            Elements<T>::unpack(raw[0], v);
        }
    };
    struct One {
        uint32_t raw;
        __device__ __forceinline__ void load(const Params&, const T* p) { raw = load_element<sizeof(T)>(p); }
        __device__ __forceinline__ float value(const Params&, float) const { return Elements<T>::unpack_one(raw); }
    };
};

template <class Source>
struct PerTokenParams {
    CastParams cast;
    typename Source::Params source;
    // kPipelined: from a CTA's tile to its next, in tiles and in what lies between them in x and out. Where that is past the
    // last column, the tile is by one wrap further: in the first columns of the next row of tiles.
    uint32_t step_rows, step_cols;
    int64_t x_step, x_wrap;      // elements
    int64_t out_step, out_wrap;  // bytes
};

inline constexpr int kPerTokenThreads = 256;
inline constexpr int kPerTokenRows = 32;
inline constexpr int kPerTokenCols = 256;

// E4M3 of x itself is little to compute.
template <class Source, class Format>
inline constexpr bool kPipelined = Source::kVectors > 1 || !std::is_same_v<Format, E4M3>;
inline constexpr int kPipelinedCtas = 4;  // of an SM: 64 registers a thread
template <class Source>
inline constexpr int kPipelinedRows = Source::kRowsOfWarp * (kPerTokenThreads / 32);  // of a tile

// Scales of a tile, from shared memory, a group to a warp. Called by all threads, behind a barrier.
template <int kTileRows, int kGroups, int kPitch>
__device__ __forceinline__ void store_tile_scales(const CastParams& params, const float (&scales)[kGroups][kPitch],
                                                  int64_t row_0, uint32_t col_tile, int groups) {
    const int tile_rows = static_cast<int>(min(int64_t{kTileRows}, params.rows - row_0));
    const int sf_row = threadIdx.x % 32, sf_group = threadIdx.x / 32;
    if (sf_row >= tile_rows) return;
    if (params.sf_format != ScaleFormat::kUE8M0Packed) {
        if (sf_group < groups)
            static_cast<float*>(params.sf)[row_0 + sf_row + (int64_t{col_tile} * kGroups + sf_group) * params.sf_stride] =
                scales[sf_group][sf_row];
    } else if constexpr (kGroups >= 4) {
        if (sf_group < ceil_div(groups, 4)) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (sf_group * 4 + i < groups) word |= packed_scale(scales[sf_group * 4 + i][sf_row]) << (8 * i);
            const int64_t word_idx = int64_t{col_tile} * (kGroups / 4) + sf_group;
            static_cast<uint32_t*>(params.sf)[row_0 + sf_row + word_idx * params.sf_stride] = word;
        }
    } else if (sf_group == 0) {
        // Two tiles of two groups share a word: each writes its half, and the last tile all that follows.
        const uint32_t half =
            packed_scale(scales[0][sf_row]) | (groups > 1 ? packed_scale(scales[1][sf_row]) << 8 : 0);
        uint32_t* word = static_cast<uint32_t*>(params.sf) + row_0 + sf_row + int64_t{col_tile / 2} * params.sf_stride;
        if (col_tile % 2 == 0 && col_tile + 1 == params.col_tiles)
            *word = half;
        else
            reinterpret_cast<uint16_t*>(word)[col_tile % 2] = static_cast<uint16_t>(half);
    }
}

// kVector: a warp's rows of a tile, in as many chunks of 32 lanes as a row takes.
template <class Source, class Format, int kGranK>
struct VectorTile {
    using T = typename Source::Element;
    using Params = typename Source::Params;
    using Chunk = typename Source::Chunk;
    static constexpr int kElems = Elements<T>::kPer16;
    static constexpr int kChunkCols = 32 * kElems;
    static constexpr int kChunks = kPerTokenCols / kChunkCols;
    static constexpr int kLanesPerGroup = kGranK / kElems;
    static constexpr int kRows = Source::kRowsOfWarp;

    // The warp's rows of a tile, of which `rows` and columns < `cols` exist. `sf`: their scales; `out`: this lane's place in the
    // first row.
    template <int kPitch, class FactorOf>
    static __device__ __forceinline__ void quantise(const CastParams& params, const Params& source,
                                                    Chunk (&raw)[kRows][kChunks], const FactorOf& factor_of, int rows,
                                                    int cols, float (*sf)[kPitch], uint8_t* out) {
        const int lane = threadIdx.x % 32;
        const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const bool inside = c * kChunkCols + lane * kElems < cols;
            float amax[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                amax[i] = raw[i][c].amax(source, factor_of(i));
                if (!inside) amax[i] = 0;
            }
            const GroupScale own = quick_group_scale<Format>(max_of_own_row<kLanesPerGroup>(amax, max_abs), ue8m0);
            if (lane % kLanesPerGroup < kRows)
                sf[(c * 32 + lane) / kLanesPerGroup][lane % kRows] = own.sf;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float inverse = __shfl_sync(0xffffffff, own.inverse, i, kRows);
                float values[kElems];
                raw[i][c].values(values);
                const typename Format::template Packed<kElems> packed = Format::pack(values, inverse);
                if (i < rows && inside)
                    *reinterpret_cast<typename Format::template Packed<kElems>*>(
                        out + i * params.out_stride + Format::bytes(c * kChunkCols)) = packed;
            }
        }
    }
};

template <class Source, class Format, int kGranK>
__global__ void __launch_bounds__(kPerTokenThreads, kPipelinedCtas)
    per_token_pipelined_kernel(const __grid_constant__ PerTokenParams<Source> all_params) {
    using Vectors = VectorTile<Source, Format, kGranK>;
    using T = typename Source::Element;
    constexpr int kRows = Vectors::kRows, kChunks = Vectors::kChunks, kVectors = Source::kVectors;
    constexpr int kTileRows = kPipelinedRows<Source>;
    constexpr int kGroups = kPerTokenCols / kGranK;
    // Four words more a group: in one store a warp writes up to four rows of several groups. One tile's scales are written
    // while those of the next are collected.
    __shared__ float scales[2][kGroups][kTileRows + 4];
    __shared__ uint4 copies[kRows][kChunks][kVectors][kPerTokenThreads];

    const CastParams& params = all_params.cast;
    const typename Source::Params& source = all_params.source;
    const int row = threadIdx.x / 32 * kRows, lane = threadIdx.x % 32;  // row: the first of this warp, in a tile
    const uint32_t row_tiles = static_cast<uint32_t>(ceil_div<int64_t>(params.rows, kTileRows));
    const int last_rows = static_cast<int>(params.rows - int64_t{row_tiles - 1} * kTileRows);
    const int last_cols = static_cast<int>(params.cols - int64_t{params.col_tiles - 1} * kPerTokenCols);
    const uint32_t own_copies = shared_address(&copies[0][0][0][threadIdx.x]);

    uint32_t row_tile = blockIdx.x / params.col_tiles, col_tile = blockIdx.x % params.col_tiles;
    // Of this lane, in the first of the warp's rows. x runs a tile ahead.
    const T* x = opaque(static_cast<const T*>(params.x) + (int64_t{row_tile} * kTileRows + row) * params.x_stride +
                        int64_t{col_tile} * kPerTokenCols + lane * Vectors::kElems);
    uint8_t* out = opaque(params.out + (int64_t{row_tile} * kTileRows + row) * params.out_stride +
                          Format::bytes(int64_t{col_tile} * kPerTokenCols + lane * Vectors::kElems));
    // What exists of the warp's rows, possibly a negative number, and of a tile's columns.
    const auto rows_of = [&](uint32_t tile) { return (tile + 1 == row_tiles ? last_rows : kTileRows) - row; };
    const auto cols_of = [&](uint32_t tile) { return tile + 1 == params.col_tiles ? last_cols : kPerTokenCols; };
    const auto copy_tile = [&](int rows, int cols) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                const T* p = x + i * params.x_stride + c * Vectors::kChunkCols;
                const int bytes = i < rows && c * Vectors::kChunkCols + lane * Vectors::kElems < cols ? 16 : 0;
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    copy_16_async(own_copies + ((i * kChunks + c) * kVectors + v) * sizeof(copies[0][0][0]),
                                  Source::address(source, p, v), bytes);
                }
            }
        }
    };
    // Lane i has the factor of row i.
    const auto own_factor_of = [&](uint32_t tile) {
        if (!Source::kHasRowFactor || lane >= min(rows_of(tile), kRows)) return 1.0f;
        return Source::row_factor(source, int64_t{tile} * kTileRows + row + lane);
    };

    launch_dependents();
    wait_for_dependencies();
    int rows = rows_of(row_tile), cols = cols_of(col_tile);
    copy_tile(rows, cols);
    float next_factor = own_factor_of(row_tile);
#pragma unroll 1
    for (int buffer = 0;; buffer ^= 1) {
        uint32_t next_row = row_tile + all_params.step_rows, next_col = col_tile + all_params.step_cols;
        const bool wraps = next_col >= params.col_tiles;
        if (wraps) next_col -= params.col_tiles, ++next_row;
        const bool more = next_row < row_tiles;
        const int next_rows = more ? rows_of(next_row) : 0, next_cols = cols_of(next_col);
        x += all_params.x_step + (wraps ? all_params.x_wrap : 0);
        const float own_factor = next_factor;
        const auto factor_of = [&](int i) {
            return Source::kHasRowFactor ? __shfl_sync(0xffffffff, own_factor, i) : own_factor;
        };
        wait_for_copies();
        if (more) next_factor = own_factor_of(next_row);
        typename Source::Chunk raw[kRows][kChunks];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) raw[i][c].raw[v] = copies[i][c][v][threadIdx.x];
            }
        }
        copy_tile(next_rows, next_cols);
        Vectors::quantise(params, source, raw, factor_of, rows, cols,
                          reinterpret_cast<float (*)[kTileRows + 4]>(&scales[buffer][0][row]), out);
        __syncthreads();
        store_tile_scales<kTileRows>(params, scales[buffer], int64_t{row_tile} * kTileRows, col_tile, ceil_div(cols, kGranK));
        if (!more) return;
        row_tile = next_row, col_tile = next_col, rows = next_rows, cols = next_cols;
        out += all_params.out_step + (wraps ? all_params.out_wrap : 0);
    }
}

template <class Source, class Format, int kGranK, bool kVector>
__global__ void __launch_bounds__(kPerTokenThreads)
    per_token_cast_kernel(const __grid_constant__ PerTokenParams<Source> all_params) {
    using T = typename Source::Element;
    constexpr int kTileRows = kPerTokenRows, kTileCols = kPerTokenCols;
    constexpr int kRowsPerWarp = kTileRows / (kPerTokenThreads / 32);
    constexpr int kGroups = kTileCols / kGranK;
    __shared__ float scales[kGroups][kTileRows + 4];  // as in the pipelined kernel

    const CastParams& params = all_params.cast;
    const typename Source::Params& source = all_params.source;
    const uint32_t col_tile = blockIdx.x % params.col_tiles;
    const int64_t row_0 = int64_t{blockIdx.x / params.col_tiles} * kTileRows;
    const int64_t col_0 = int64_t{col_tile} * kTileCols;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * kRowsPerWarp;  // within the tile, the first of this warp
    const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;
    const T* x = static_cast<const T*>(params.x) + (row_0 + row) * params.x_stride + col_0;
    uint8_t* out = params.out + (row_0 + row) * params.out_stride + Format::bytes(col_0);
    const int rows = static_cast<int>(min(int64_t{kRowsPerWarp}, params.rows - row_0 - row));  // may be negative
    const int cols = static_cast<int>(min(int64_t{kTileCols}, params.cols - col_0));

    launch_dependents();
    wait_for_dependencies();

    // Lane i loads the factor of row i.
    float own_factor = 1;
    if (Source::kHasRowFactor && lane < rows) own_factor = Source::row_factor(source, row_0 + row + lane);
    const auto factor_of = [&](int i) {
        return Source::kHasRowFactor ? __shfl_sync(0xffffffff, own_factor, i) : own_factor;
    };
    if constexpr (kVector) {
        using Vectors = VectorTile<Source, Format, kGranK>;
        static_assert(Vectors::kRows == kRowsPerWarp && Source::kVectors == 1);
        const int first_col = lane * Vectors::kElems;
        x = opaque(x + first_col);
        typename Source::Chunk raw[kRowsPerWarp][Vectors::kChunks];
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int c = 0; c < Vectors::kChunks; ++c) {
                raw[i][c] = {};
                if (i < rows && c * Vectors::kChunkCols + first_col < cols)
                    raw[i][c].raw[0] = load_16(x + i * params.x_stride + c * Vectors::kChunkCols);
            }
        }
        // ptxas would sink later rows' loads behind the first row's arithmetic. It moves none past a barrier.
        __syncthreads();
        float (*sf)[kTileRows + 4] = reinterpret_cast<float (*)[kTileRows + 4]>(&scales[0][row]);
        Vectors::quantise(params, source, raw, factor_of, rows, cols, sf, opaque(out + Format::bytes(first_col)));
    } else {
        constexpr int kElems = kTileCols / 32;
        constexpr int kElemsPerGroup = kGranK / 32;
        constexpr int kRowsAtATime = 2;  // all four at once need more registers than they repay
#pragma unroll
        for (int first = 0; first < kRowsPerWarp; first += kRowsAtATime) {
            typename Source::One raw[kRowsAtATime][kElems];
#pragma unroll
            for (int i = 0; i < kRowsAtATime; ++i) {
#pragma unroll
                for (int e = 0; e < kElems; ++e) {
                    raw[i][e] = {};
                    if (first + i < rows && lane + 32 * e < cols)
                        raw[i][e].load(source, x + (first + i) * params.x_stride + lane + 32 * e);
                }
            }
#pragma unroll
            for (int i = 0; i < kRowsAtATime; ++i) {
                const float factor = factor_of(first + i);
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    float values[kElemsPerGroup], amax = 0;
#pragma unroll
                    for (int e = 0; e < kElemsPerGroup; ++e) {
                        values[e] = raw[i][g * kElemsPerGroup + e].value(source, factor);
                        if (lane + 32 * (g * kElemsPerGroup + e) >= cols) values[e] = 0;
                        amax = max_abs(amax, values[e]);
                    }
#pragma unroll
                    for (int offset = 16; offset > 0; offset /= 2)
                        amax = max_abs(amax, __shfl_xor_sync(0xffffffff, amax, offset));
                    const GroupScale scale = quick_group_scale<Format>(amax, ue8m0);
                    if (lane == 0) scales[g][row + first + i] = scale.sf;
#pragma unroll
                    for (int e = 0; e < kElemsPerGroup; ++e) {
                        const int col = lane + 32 * (g * kElemsPerGroup + e);
                        Format::store_one(out + (first + i) * params.out_stride, col, values[e], scale.inverse,
                                          first + i < rows && col < cols);
                    }
                }
            }
        }
    }
    __syncthreads();
    store_tile_scales<kTileRows>(params, scales, row_0, col_tile, ceil_div(cols, kGranK));
}

// `vector`: chunks of the source are whole and aligned, and so is what Format makes of one.
template <class Source, class Format>
cudaError_t launch_per_token(const CastProblem& problem, const typename Source::Params& source, bool vector,
                             cudaStream_t stream, bool pdl) {
    PerTokenParams<Source> params = {make_cast_params(problem, kPerTokenCols), source};
    const int64_t tiles = ceil_div<int64_t>(problem.rows, kPerTokenRows) * params.cast.col_tiles;
    if constexpr (kPipelined<Source, Format>) {
        if (vector) {
            const auto kernel = problem.gran_k == 128 ? per_token_pipelined_kernel<Source, Format, 128>
                                                      : per_token_pipelined_kernel<Source, Format, 32>;
            constexpr int kTileRows = kPipelinedRows<Source>;
            int64_t ctas = ceil_div<int64_t>(problem.rows, kTileRows) * params.cast.col_tiles;
            if (problem.num_sms > 0) ctas = std::min<int64_t>(ctas, problem.num_sms * kPipelinedCtas);
            params.step_rows = static_cast<uint32_t>(ctas / params.cast.col_tiles);
            params.step_cols = static_cast<uint32_t>(ctas % params.cast.col_tiles);
            const int64_t row_step = params.step_rows * kTileRows, col_step = params.step_cols * kPerTokenCols;
            const int64_t all_cols = int64_t{params.cast.col_tiles} * kPerTokenCols;
            params.x_step = row_step * problem.x_stride + col_step;
            params.x_wrap = kTileRows * problem.x_stride - all_cols;
            params.out_step = row_step * problem.out_stride + Format::bytes(col_step);
            params.out_wrap = kTileRows * problem.out_stride - Format::bytes(all_cols);
            return launch(kernel, ctas, kPerTokenThreads, stream, pdl, params);
        }
        const auto kernel = problem.gran_k == 128 ? per_token_cast_kernel<Source, Format, 128, false>
                                                  : per_token_cast_kernel<Source, Format, 32, false>;
        return launch(kernel, tiles, kPerTokenThreads, stream, pdl, params);
    } else {
        const auto kernel = problem.gran_k == 128
                                ? (vector ? per_token_cast_kernel<Source, Format, 128, true>
                                          : per_token_cast_kernel<Source, Format, 128, false>)
                                : (vector ? per_token_cast_kernel<Source, Format, 32, true>
                                          : per_token_cast_kernel<Source, Format, 32, false>);
        return launch(kernel, tiles, kPerTokenThreads, stream, pdl, params);
    }
}

}  // namespace deep_gemm::cast
