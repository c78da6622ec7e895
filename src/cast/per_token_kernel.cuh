// Quantisation with a scale per row and gran_k columns: the kernel, for any source of values and any format of results.
//
// A CTA quantises 32 rows x 256 columns; each warp 4 rows, all of whose loads are in flight at once. Scales are
// collected in shared memory and written along rows, the contiguous dimension of the MN-major result.
//   kVector: a lane has 16 bytes of each load, neighbouring lanes share a group. They share the work of its scales, too:
//            each computes those of one row.
//   else (any alignment, any column count): a lane has columns lane, lane + 32, ..., so that every access is coalesced.
//
// A source says what is quantised:
//   Element, Params                what x holds, and what else the source is told
//   Chunk: load(p), amax(), values(v)   the kPer16 values from a 16-byte address on; the largest magnitude is asked for first
//   kRowsAtATime                   rows whose values are needed at once, from amax() to values()
//   One: load(p), value()          a single value
//   kHasRowFactor, row_factor()    a number of each row, loaded once and handed to amax() and value()
// A format (E4M3, E2M1 in scale.cuh) says what is written: kMax, bits a value, and how values are packed.
#pragma once

#include "cast/cast_params.cuh"
#include "cast/memory.cuh"

namespace deep_gemm::cast {

// x itself.
template <typename T>
struct PlainSource {
    using Element = T;
    struct Params {};
    static constexpr bool kHasRowFactor = false;
    static constexpr int kRowsAtATime = 4;
    static __device__ __forceinline__ float row_factor(const Params&, int64_t) { return 1; }
    struct Chunk {
        uint4 raw;
        __device__ __forceinline__ void load(const Params&, const T* p) { raw = load_16(p); }
        __device__ __forceinline__ float amax(const Params&, float) const {
            using E = Elements<T>;
            return E::magnitude(E::larger(E::larger(raw.x, raw.y), E::larger(raw.z, raw.w)));
        }
        __device__ __forceinline__ void values(float (&v)[Elements<T>::kPer16]) const { Elements<T>::unpack(raw, v); }
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
};

inline constexpr int kPerTokenThreads = 256;
inline constexpr int kPerTokenRows = 32;
inline constexpr int kPerTokenCols = 256;

template <class Source, class Format, int kGranK, bool kVector>
__global__ void __launch_bounds__(kPerTokenThreads)
    per_token_cast_kernel(const __grid_constant__ PerTokenParams<Source> all_params) {
    using T = typename Source::Element;
    constexpr int kTileRows = kPerTokenRows, kTileCols = kPerTokenCols;
    constexpr int kRowsPerWarp = kTileRows / (kPerTokenThreads / 32);
    constexpr int kGroups = kTileCols / kGranK;
    // Four words more a group: in one store a warp writes up to four rows of several groups.
    __shared__ float scales[kGroups][kTileRows + 4];

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
        constexpr int kElems = Elements<T>::kPer16;
        constexpr int kChunks = kTileCols / (32 * kElems);
        constexpr int kLanesPerGroup = kGranK / kElems;
        constexpr int kAtATime = Source::kRowsAtATime;
        const int first_col = lane * kElems;
        x = opaque(x + first_col);
        out = opaque(out + Format::bytes(first_col));
        typename Source::Chunk raw[kRowsPerWarp][kChunks];
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i, x += params.x_stride) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                constexpr int kStep = 32 * kElems;
                raw[i][c] = {};
                if (i < rows && c * kStep + first_col < cols) raw[i][c].load(source, x + c * kStep);
            }
        }
        // ptxas would sink later rows' loads behind the first row's arithmetic. It moves none past a barrier.
        __syncthreads();
#pragma unroll
        for (int first = 0; first < kRowsPerWarp; first += kAtATime) {
            const auto quantise = [&](int c) {
                const int col = c * 32 * kElems + first_col, own_row = lane % kAtATime;
                float amax[kAtATime];
#pragma unroll
                for (int i = 0; i < kAtATime; ++i) {
                    amax[i] = raw[first + i][c].amax(source, factor_of(first + i));
                    if (col >= cols) amax[i] = 0;
                }
                const GroupScale own = quick_group_scale<Format>(max_of_own_row<kLanesPerGroup>(amax, max_abs), ue8m0);
                if (lane % kLanesPerGroup < kAtATime)
                    scales[(c * 32 + lane) / kLanesPerGroup][row + first + own_row] = own.sf;
#pragma unroll
                for (int i = 0; i < kAtATime; ++i) {
                    const float inverse = __shfl_sync(0xffffffff, own.inverse, i, kAtATime);
                    float values[kElems];
                    raw[first + i][c].values(values);
                    const typename Format::template Packed<kElems> packed = Format::pack(values, inverse);
                    if (first + i < rows && col < cols)
                        *reinterpret_cast<typename Format::template Packed<kElems>*>(
                            out + (first + i) * params.out_stride + Format::bytes(c * 32 * kElems)) = packed;
                }
            };
#pragma unroll
            for (int c = 0; c < kChunks; ++c) quantise(c);
        }
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

// `vector`: chunks of the source are whole and aligned, and so is what Format makes of one.
template <class Source, class Format>
cudaError_t launch_per_token(const CastProblem& problem, const typename Source::Params& source, bool vector,
                             cudaStream_t stream, bool pdl) {
    const PerTokenParams<Source> params = {make_cast_params(problem, kPerTokenCols), source};
    const auto kernel =
        problem.gran_k == 128
            ? (vector ? per_token_cast_kernel<Source, Format, 128, true>
                      : per_token_cast_kernel<Source, Format, 128, false>)
            : (vector ? per_token_cast_kernel<Source, Format, 32, true>
                      : per_token_cast_kernel<Source, Format, 32, false>);
    const int64_t row_tiles = ceil_div<int64_t>(problem.rows, kPerTokenRows);
    return launch(kernel, row_tiles * params.cast.col_tiles, kPerTokenThreads, stream, pdl, params);
}

}  // namespace deep_gemm::cast
