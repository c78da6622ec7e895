// FP8 quantisation with a scale per gran_k rows and column: the scales of the transposed operand, as weight gradients
// use it.
//
// A CTA quantises 128 rows x 128 columns (64 where elements have 4 bytes), held in registers between its one read and
// the write. Column maxima go over a warp's rows in registers, then over the warps through shared memory.
//   kGrouped: the rows are those of a block of a K group, whose bounds are on the device.
//   kVector: 16 lanes of 16 bytes a row, 16 rows at a time.
//   else (any alignment, any column count): a warp a row, lane l has columns l and l + 32 of 64.
#include "cast/cast_params.cuh"
#include "cast/k_groups.cuh"
#include "cast/memory.cuh"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 128;

template <typename T, bool kVector>
struct Tile {
    static constexpr int kElems = kVector ? Elements<T>::kPer16 : 2;  // columns of a thread
    static constexpr int kLanesPerRow = kVector ? 16 : 32;
    static constexpr int kCols = kElems * kLanesPerRow;
    static constexpr int kSlots = kThreads / kLanesPerRow;            // rows at a time
    static constexpr int kRowsPerThread = kTileRows / kSlots;

    // Where a row of column values keeps column c in shared memory. With 8 columns a lane, the first four of all lanes
    // lie together and the last four 16 banks away from them: 16-byte accesses by lane and 4-byte accesses by column
    // are then both free of conflicts.
    static constexpr int kPitch = kElems == 8 ? 144 : kCols;
    static __device__ __forceinline__ int place(int c) {
        return kElems == 8 ? c / 8 * 4 + c % 4 + (c % 8 >= 4 ? 80 : 0) : c;
    }
    static __device__ __forceinline__ void store(float* row, int lane, const float (&v)[kElems]) {
        if constexpr (kVector) {
#pragma unroll
            for (int i = 0; i < kElems / 4; ++i)
                *reinterpret_cast<float4*>(row + lane * 4 + i * 80) =
                    make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
        } else {
            row[lane] = v[0], row[lane + 32] = v[1];
        }
    }
    static __device__ __forceinline__ void load(const float* row, int lane, float (&v)[kElems]) {
        if constexpr (kVector) {
#pragma unroll
            for (int i = 0; i < kElems / 4; ++i) {
                const float4 f = *reinterpret_cast<const float4*>(row + lane * 4 + i * 80);
                v[4 * i] = f.x, v[4 * i + 1] = f.y, v[4 * i + 2] = f.z, v[4 * i + 3] = f.w;
            }
        } else {
            v[0] = row[lane], v[1] = row[lane + 32];
        }
    }
};

template <typename T, bool kVector>
struct RawRow;

template <typename T>
struct RawRow<T, true> {
    uint4 raw;
    __device__ __forceinline__ void load(const T* x, int lane, int cols) {
        constexpr int kElems = Elements<T>::kPer16;
        raw = make_uint4(0, 0, 0, 0);
        if (lane * kElems < cols) raw = load_16(x + lane * kElems);
    }
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void unpack(float (&v)[Elements<T>::kPer16]) const { Elements<T>::unpack(raw, v); }
};

template <typename T>
struct RawRow<T, false> {
    uint32_t raw[2];
    __device__ __forceinline__ void load(const T* x, int lane, int cols) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            raw[e] = 0;
            if (lane + 32 * e < cols) raw[e] = load_element<sizeof(T)>(x + lane + 32 * e);
        }
    }
    __device__ __forceinline__ void clear() { raw[0] = raw[1] = 0; }
    __device__ __forceinline__ void unpack(float (&v)[2]) const {
        v[0] = Elements<T>::unpack_one(raw[0]), v[1] = Elements<T>::unpack_one(raw[1]);
    }
};

// Zeros in rows of `out` that no group owns, in the columns of this CTA.
__device__ void clear_rows(uint8_t* out, int64_t out_stride, int64_t rows, int cols) {
    for (int64_t row = threadIdx.x / 32; row < rows; row += kWarps)
        for (int col = threadIdx.x % 32; col < cols; col += 32) out[row * out_stride + col] = 0;
}

struct PerChannelParams {
    CastParams cast;
    KGroups groups;  // kGrouped
};

template <typename T, int kGranK, bool kVector, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 4)
    per_channel_cast_kernel(const __grid_constant__ PerChannelParams all_params) {
    using Tile = Tile<T, kVector>;
    constexpr int kElems = Tile::kElems;
    constexpr int kGroups = kTileRows / kGranK;
    constexpr int kRowsPerGroup = Tile::kRowsPerThread / kGroups;  // of a thread
    __shared__ alignas(16) float maxima[kGroups][kWarps][Tile::kPitch];
    __shared__ alignas(16) float inverses[kGroups][Tile::kPitch];
    __shared__ alignas(4) uint8_t packed[Tile::kCols][4];

    const CastParams& params = all_params.cast;
    const int64_t row_tile = blockIdx.x / params.col_tiles;
    const int64_t col_0 = int64_t{blockIdx.x % params.col_tiles} * Tile::kCols;
    const int cols = static_cast<int>(min(int64_t{Tile::kCols}, params.cols - col_0));
    const int warp = threadIdx.x / 32;
    const int slot = threadIdx.x / Tile::kLanesPerRow, lane = threadIdx.x % Tile::kLanesPerRow;
    const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;

    launch_dependents();
    wait_for_dependencies();

    int64_t row_0 = row_tile * kTileRows;
    int rows = static_cast<int>(min(int64_t{kTileRows}, params.rows - row_0));
    if constexpr (kGrouped) {
        const KBlock block = find_k_block(all_params.groups, row_tile);
        row_0 = block.row_0, rows = block.rows;
        if (block.gap_rows > 0)
            clear_rows(params.out + block.gap_0 * params.out_stride + col_0, params.out_stride, block.gap_rows, cols);
        if (rows == 0) {
            if (row_tile < all_params.groups.scale_rows() && static_cast<int>(threadIdx.x) < cols)
                static_cast<float*>(params.sf)[row_tile * params.sf_stride + col_0 + threadIdx.x] = 0;
            return;
        }
    }
    const T* x = static_cast<const T*>(params.x) + (row_0 + slot) * params.x_stride + col_0;
    RawRow<T, kVector> raw[Tile::kRowsPerThread];
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerThread; ++i) {
        if (slot + i * Tile::kSlots < rows)
            raw[i].load(x + i * Tile::kSlots * params.x_stride, lane, cols);
        else
            raw[i].clear();
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        float amax[kElems] = {};
#pragma unroll
        for (int i = g * kRowsPerGroup; i < (g + 1) * kRowsPerGroup; ++i) {
            float v[kElems];
            raw[i].unpack(v);
#pragma unroll
            for (int e = 0; e < kElems; ++e) amax[e] = max_abs(amax[e], v[e]);
        }
        if constexpr (Tile::kLanesPerRow == 16) {
#pragma unroll
            for (int e = 0; e < kElems; ++e) amax[e] = max_abs(amax[e], __shfl_xor_sync(0xffffffff, amax[e], 16));
        }
        if (threadIdx.x % 32 < Tile::kLanesPerRow) Tile::store(maxima[g][warp], lane, amax);
    }
    __syncthreads();

    const int64_t first_group = row_tile * kGroups;
    const int groups = ceil_div(rows, kGranK);
    for (int i = threadIdx.x; i < kGroups * Tile::kCols; i += kThreads) {
        const int g = i / Tile::kCols, c = i % Tile::kCols;
        float amax = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) amax = max_abs(amax, maxima[g][w][Tile::place(c)]);
        const GroupScale scale = group_scale<E4M3>(amax, ue8m0);
        inverses[g][Tile::place(c)] = scale.inverse;
        if (params.sf_format == ScaleFormat::kUE8M0Packed)
            packed[c][g] = g < groups ? packed_scale(scale.sf) : 0;
        else if (g < groups && c < cols)
            static_cast<float*>(params.sf)[(first_group + g) * params.sf_stride + col_0 + c] = scale.sf;
    }
    __syncthreads();

    uint8_t* out = params.out + (row_0 + slot) * params.out_stride + col_0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        float inverse[kElems];
        Tile::load(inverses[g], lane, inverse);
#pragma unroll
        for (int i = g * kRowsPerGroup; i < (g + 1) * kRowsPerGroup; ++i) {
            if constexpr (kVector) forget_unpacked(raw[i].raw);
            float v[kElems];
            raw[i].unpack(v);
#pragma unroll
            for (int e = 0; e < kElems; ++e) v[e] *= inverse[e];
            if (slot + i * Tile::kSlots >= rows) continue;
            uint8_t* p = out + i * Tile::kSlots * params.out_stride;
            if constexpr (kVector) {
                if (lane * kElems >= cols) continue;
                uint32_t words[kElems / 4];
#pragma unroll
                for (int e = 0; e < kElems; e += 4) words[e / 4] = to_e4m3x4(v[e], v[e + 1], v[e + 2], v[e + 3]);
                if constexpr (kElems == 8)
                    *reinterpret_cast<uint2*>(p + lane * 8) = make_uint2(words[0], words[1]);
                else
                    *reinterpret_cast<uint32_t*>(p + lane * 4) = words[0];
            } else {
                const uint32_t pair = to_e4m3x4(v[0], v[1], 0, 0);
                if (lane < cols) p[lane] = static_cast<uint8_t>(pair);
                if (lane + 32 < cols) p[lane + 32] = static_cast<uint8_t>(pair >> 8);
            }
        }
    }

    if (params.sf_format == ScaleFormat::kUE8M0Packed && static_cast<int>(threadIdx.x) < cols) {
        const int c = threadIdx.x;
        uint32_t* word = static_cast<uint32_t*>(params.sf) + first_group / 4 * params.sf_stride + col_0 + c;
        if constexpr (kGroups == 4) {
            *word = *reinterpret_cast<const uint32_t*>(packed[c]);
        } else {
            // Four tiles share a word: each writes its byte, and the last tile the bytes that follow, too.
            const bool last = row_0 + kTileRows >= params.rows;
            uint8_t* bytes = reinterpret_cast<uint8_t*>(word);
            bytes[first_group % 4] = packed[c][0];
            for (int i = first_group % 4 + 1; last && i < 4; ++i) bytes[i] = 0;
        }
    }
}

template <typename T, bool kVector>
cudaError_t launch_kernel(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    const PerChannelParams params = {make_cast_params(problem, Tile<T, kVector>::kCols), {}};
    const int64_t row_tiles = ceil_div<int64_t>(problem.rows, kTileRows);
    const auto kernel = problem.gran_k == 128 ? per_channel_cast_kernel<T, 128, kVector, false>
                                              : per_channel_cast_kernel<T, 32, kVector, false>;
    return launch(kernel, row_tiles * params.cast.col_tiles, kThreads, stream, pdl, params);
}

template <bool kVector>
cudaError_t launch_grouped(const CastProblem& problem, const KGroups& groups, cudaStream_t stream, bool pdl) {
    using T = __nv_bfloat16;
    static_assert(kTileRows == kGroupBlock);
    const PerChannelParams params = {make_cast_params(problem, Tile<T, kVector>::kCols), groups};
    return launch(per_channel_cast_kernel<T, kGroupBlock, kVector, true>,
                  max_k_blocks(groups) * params.cast.col_tiles, kThreads, stream, pdl, params);
}

}  // namespace

cudaError_t launch_per_channel_cast(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for_type(problem, [&]<typename T>() {
        return has_vector_access<T>(problem) ? launch_kernel<T, true>(problem, stream, pdl)
                                             : launch_kernel<T, false>(problem, stream, pdl);
    });
}

cudaError_t launch_k_grouped_per_channel_cast(const CastProblem& problem, const KGroups& groups, cudaStream_t stream,
                                              bool pdl) {
    if (problem.cols <= 0) return cudaSuccess;
    if (problem.x_type != InputType::kBFloat16) return cudaErrorInvalidValue;
    return has_vector_access<__nv_bfloat16>(problem) ? launch_grouped<true>(problem, groups, stream, pdl)
                                                     : launch_grouped<false>(problem, groups, stream, pdl);
}

}  // namespace deep_gemm::cast
