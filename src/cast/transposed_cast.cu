// FP8 quantisation that writes the transposed values, too, or them alone, in one read of x.
//
//   kPerToken:      values with a scale per row and 128 columns; transposed values with a scale per column and 128 rows
//   kPerBlock:      both with the scale of their 128 x 128 block
//   kGrouped:       transposed values alone, scales per column and 128 rows of a group; groups are padded to 128 rows
//   kPerChannelT, kPerBlockT: the transposed values of the first two alone
//
// A CTA quantises 128 x 128. A thread holds 8 consecutive rows of one 16-byte load each (kPer16 columns), between its one
// read and the writes. Rows are written as they lie; a column's 8 values make 8 bytes of the transposed matrix, which go
// through shared memory to become runs of 128 bytes.
//
// Shared memory of the transposition: column c is 128 bytes at 128 c; its 8-byte unit i (rows 8 i .. 8 i + 7) is at place
// i ^ (c / kPer16 % 16). A write (16 lanes: 16 values of c / kPer16, one unit) and a read (8 lanes: one column, 8 pairs of
// units) both touch all 32 banks once.
#include "cast/cast_params.cuh"
#include "cast/k_groups.cuh"
#include "cast/memory.cuh"

#include <type_traits>

namespace deep_gemm::cast {
namespace {

enum class Mode { kPerToken, kPerBlock, kGrouped, kPerChannelT, kPerBlockT };

constexpr bool writes_rows(Mode mode) { return mode == Mode::kPerToken || mode == Mode::kPerBlock; }
constexpr bool has_block_scales(Mode mode) { return mode == Mode::kPerBlock || mode == Mode::kPerBlockT; }

constexpr int kTile = 128;
constexpr int kSlots = 16;                    // threads along rows
constexpr int kRowsPerThread = kTile / kSlots;

struct TransposedParams {
    CastParams cast;
    uint8_t* out_t;
    int64_t out_t_stride;
    void* sf_t;
    int64_t sf_t_stride;
    KGroups groups;  // kGrouped
    uint32_t row_tiles;
};

template <typename T>
struct Shape {
    static constexpr int kElems = Elements<T>::kPer16;
    static constexpr int kLanes = kTile / kElems;  // threads along a row
    static constexpr int kThreads = kSlots * kLanes;
    static constexpr int kWarps = kThreads / 32;
    // 64 registers a thread. float16, which takes more to unpack, spills there in one mode: 80.
    static constexpr int kThreadsPerSM = std::is_same_v<T, __half> ? 768 : 1024;
    static constexpr int kCtas = kThreadsPerSM / kThreads;  // of an SM
};

// The byte of one 128-group in words of packed scales: `index` of `count` groups. The last one also clears what
// follows.
__device__ __forceinline__ void store_packed(uint32_t* word, int64_t index, int64_t count, float sf) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(word);
    bytes[index % 4] = static_cast<uint8_t>(packed_scale(sf));
    for (int64_t i = index % 4 + 1; index + 1 == count && i < 4; ++i) bytes[i] = 0;
}

// sf[i + group * stride], or the byte of `group` in the word there; `groups` of them in all.
__device__ __forceinline__ void store_scale(void* sf, int64_t i, int64_t group, int64_t groups, int64_t stride,
                                            ScaleFormat format, float scale) {
    if (format == ScaleFormat::kUE8M0Packed)
        store_packed(static_cast<uint32_t*>(sf) + i + group / 4 * stride, group, groups, scale);
    else
        static_cast<float*>(sf)[i + group * stride] = scale;
}

template <typename T, Mode kMode, bool kVector>
__global__ void __launch_bounds__(Shape<T>::kThreads, Shape<T>::kCtas)
    transposed_cast_kernel(const __grid_constant__ TransposedParams all_params) {
    using E = Elements<T>;
    constexpr int kElems = Shape<T>::kElems, kLanes = Shape<T>::kLanes;
    constexpr int kThreads = Shape<T>::kThreads, kWarps = Shape<T>::kWarps;
    // Inverses of all columns: the first four of each lane lie together, the others behind them and 16 banks further.
    // Accesses of 16 bytes by lane are then free of conflicts, and those of 4 bytes by column, too.
    constexpr int kPitch = kElems == 8 ? 144 : kTile;
    const auto slot_of = [](int c) {
        return kElems == 8 ? c / 8 * 4 + c % 4 + (c % 8 >= 4 ? 80 : 0) : c;
    };
    // Maxima of columns, by warp: words of the elements, four a lane. Two neighbouring rows are read at once, 16 banks apart.
    constexpr int kWordsPerElem = 4 / sizeof(T);
    constexpr int kMaximaPitch = 4 * kLanes + 16;
    __shared__ alignas(128) uint2 tile[kTile][kTile / 8];  // [column][8 rows], swizzled
    __shared__ alignas(16) uint32_t maxima[kWarps][has_block_scales(kMode) ? 1 : kMaximaPitch];
    __shared__ alignas(16) float inverses[has_block_scales(kMode) ? 1 : kPitch];

    const CastParams& params = all_params.cast;
    const int warp = threadIdx.x / 32, slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int row = slot * kRowsPerThread, col = lane * kElems;
    const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;

    launch_dependents();
    wait_for_dependencies();
    const uint32_t row_tile = blockIdx.x / params.col_tiles, col_tile = blockIdx.x % params.col_tiles;
    int64_t row_0 = int64_t{row_tile} * kTile;  // of x
    int rows = static_cast<int>(min(int64_t{kTile}, params.rows - row_0));
    if constexpr (kMode == Mode::kGrouped) {
        const KBlock block = find_k_block(all_params.groups, row_tile);
        row_0 = block.row_0, rows = block.rows;
    }
    const int64_t col_0 = int64_t{col_tile} * kTile;
    const int cols = static_cast<int>(min(int64_t{kTile}, params.cols - col_0));
    const int own_rows = col < cols ? rows - row : 0;  // what this thread has something of: kRowsPerThread or more for all
    const T* x = opaque(static_cast<const T*>(params.x) + (row_0 + row) * params.x_stride + col_0 + col);
    uint4 raw[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        raw[i] = make_uint4(0, 0, 0, 0);
        if (i >= own_rows) continue;
        if constexpr (kVector) {
            raw[i] = load_16(x + i * params.x_stride);
        } else {
            uint32_t words[4] = {};
#pragma unroll
            for (int e = 0; e < kElems; ++e)
                if (col + e < cols)
                    words[e * sizeof(T) / 4] |= load_element<sizeof(T)>(x + i * params.x_stride + e)
                                                << (8 * (e * sizeof(T) % 4));
            raw[i] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
    // ptxas would sink later rows' loads behind the first rows' arithmetic. It moves none past a barrier.
    __syncthreads();

    uint32_t col_max[4] = {}, row_max[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) col_max[w] = E::larger(col_max[w], word(raw[i], w));
        row_max[i] = E::larger(E::larger(raw[i].x, raw[i].y), E::larger(raw[i].z, raw[i].w));
    }
    if constexpr (has_block_scales(kMode)) {
        uint32_t block_max = E::larger(E::larger(col_max[0], col_max[1]), E::larger(col_max[2], col_max[3]));
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            block_max = E::larger(block_max, __shfl_xor_sync(0xffffffff, block_max, offset));
        if (threadIdx.x % 32 == 0) maxima[warp][0] = block_max;
    } else {
        if constexpr (kLanes == 16) {
#pragma unroll
            for (int w = 0; w < 4; ++w)
                col_max[w] = E::larger(col_max[w], __shfl_xor_sync(0xffffffff, col_max[w], 16));
        }
        if (threadIdx.x % 32 < kLanes)
            *reinterpret_cast<uint4*>(&maxima[warp][4 * lane]) =
                make_uint4(col_max[0], col_max[1], col_max[2], col_max[3]);
    }

    const auto store_row = [&](int i, uint8_t* p, float inverse) {
        if (i >= own_rows) return;
        float v[kElems];
        E::unpack(raw[i], v);
        const typename E4M3::template Packed<kElems> packed = E4M3::pack(v, inverse);
        if constexpr (kVector) {
            *reinterpret_cast<typename E4M3::template Packed<kElems>*>(p) = packed;
        } else {
#pragma unroll
            for (int e = 0; e < kElems; ++e)
                if (col + e < cols) p[e] = static_cast<uint8_t>(packed.words[e / 4] >> (8 * (e % 4)));
        }
    };
    uint8_t* out = nullptr;
    if constexpr (writes_rows(kMode))
        out = opaque(params.out + (row_0 + row) * params.out_stride + col_0 + col);
    if constexpr (kMode == Mode::kPerToken) {
        // A row's lanes know its scale without the other warps, and share out the rows.
        const int own_row = lane % kRowsPerThread;
        const GroupScale own =
            quick_group_scale<E4M3>(E::magnitude(max_of_own_row<kLanes>(row_max, E::larger)), ue8m0);
        if (lane < kRowsPerThread && row + own_row < rows)
            store_scale(params.sf, row_0 + row + own_row, col_tile, params.col_tiles, params.sf_stride,
                        params.sf_format, own.sf);
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i)
            store_row(i, out + i * params.out_stride, __shfl_sync(0xffffffff, own.inverse, i, kRowsPerThread));
    }
    __syncthreads();

    const int64_t row_tiles = all_params.row_tiles;
    float inverse[kElems];
    if constexpr (has_block_scales(kMode)) {
        uint32_t block_max = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) block_max = E::larger(block_max, maxima[w][0]);
        const GroupScale scale = quick_group_scale<E4M3>(E::magnitude(block_max), ue8m0);
#pragma unroll
        for (int e = 0; e < kElems; ++e) inverse[e] = scale.inverse;
        if (threadIdx.x == 0) {
            if constexpr (writes_rows(kMode))
                store_scale(params.sf, row_tile, col_tile, params.col_tiles, params.sf_stride, params.sf_format,
                            scale.sf);
            store_scale(all_params.sf_t, col_tile, row_tile, row_tiles, all_params.sf_t_stride, params.sf_format,
                        scale.sf);
        }
        if constexpr (writes_rows(kMode)) {
#pragma unroll
            for (int i = 0; i < kRowsPerThread; ++i) {
                forget_unpacked(raw[i]);
                store_row(i, out + i * params.out_stride, scale.inverse);
            }
        }
    } else {
        // Two threads for a column, each of which reads the maxima of every other warp.
        if (threadIdx.x < 2 * kTile) {
            const int c = threadIdx.x / 2, part = threadIdx.x % 2;
            uint32_t largest = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w += 2) largest = E::larger(largest, maxima[w + part][c / kWordsPerElem]);
            float amax = E::magnitude_at(largest, c % kWordsPerElem);
            amax = max_abs(amax, __shfl_xor_sync(0xffffffff, amax, 1));
            const GroupScale scale = quick_group_scale<E4M3>(amax, ue8m0);
            if (part == 0) inverses[slot_of(c)] = scale.inverse;
            if (kMode == Mode::kGrouped && part == 1 && c < cols)
                static_cast<float*>(all_params.sf_t)[row_tile * all_params.sf_t_stride + col_0 + c] =
                    rows > 0 ? scale.sf : 0;
            if (kMode != Mode::kGrouped && part == 1 && c < cols)
                store_scale(all_params.sf_t, col_0 + c, row_tile, row_tiles, all_params.sf_t_stride, params.sf_format,
                            scale.sf);
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kElems; e += 4) {
            const float4 f = *reinterpret_cast<const float4*>(&inverses[slot_of(col + e)]);
            inverse[e] = f.x, inverse[e + 1] = f.y, inverse[e + 2] = f.z, inverse[e + 3] = f.w;
        }
    }

    // Padding is zero also where the column's scale is NaN or Inf.
    const uint64_t row_mask =
        rows - row >= kRowsPerThread ? ~uint64_t{0} : rows > row ? (uint64_t{1} << (8 * (rows - row))) - 1 : 0;
    // In the grouped form every block has its 128 columns of the result.
    const int64_t t_row_0 = kMode == Mode::kGrouped ? int64_t{row_tile} * kTile : row_0;
    const int t_rows = kMode == Mode::kGrouped ? kTile : rows;
    const int chunk = threadIdx.x % 8, valid = t_rows - chunk * 16;
    uint8_t* const out_t = opaque(all_params.out_t + col_0 * all_params.out_t_stride + t_row_0 + chunk * 16);
    // Column by column, so that what is unpacked at a time is one column's 8 values.
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) forget_unpacked(raw[i]);
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
        float v[kRowsPerThread];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) v[i] = E::unpack_at(raw[i], e) * inverse[e];
        uint2 bytes = make_uint2(to_e4m3x4(v[0], v[1], v[2], v[3]), to_e4m3x4(v[4], v[5], v[6], v[7]));
        if constexpr (kMode == Mode::kGrouped)
            bytes.x &= static_cast<uint32_t>(row_mask), bytes.y &= static_cast<uint32_t>(row_mask >> 32);
        tile[col + e][slot ^ lane % 16] = bytes;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile * 8 / kThreads; ++i) {
        const int c = threadIdx.x / 8 + i * (kThreads / 8);
        if (c >= cols || valid <= 0) continue;
        const int swizzle = c / kElems % 16;
        uint4 value = *reinterpret_cast<const uint4*>(&tile[c][(chunk ^ swizzle / 2) * 2]);
        if (swizzle % 2 == 1) value = make_uint4(value.z, value.w, value.x, value.y);
        uint8_t* p = out_t + c * all_params.out_t_stride;
        if (kVector && valid >= 16) {
            *reinterpret_cast<uint4*>(p) = value;
        } else {
            const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
            for (int b = 0; b < 16; ++b)
                if (b < valid) p[b] = static_cast<uint8_t>(words[b / 4] >> (8 * (b % 4)));
        }
    }
}

template <typename T, Mode kMode>
cudaError_t launch_kernel(const TransposedCastProblem& problem, const KGroups& groups, int64_t row_tiles,
                          cudaStream_t stream, bool pdl) {
    TransposedParams params = {};
    params.cast = make_cast_params(problem.cast, kTile);
    params.out_t = static_cast<uint8_t*>(problem.out_t);
    params.out_t_stride = problem.out_t_stride;
    params.sf_t = problem.sf_t;
    params.sf_t_stride = problem.sf_t_stride;
    params.groups = groups;
    const bool vector =
        (writes_rows(kMode) ? has_vector_access<T>(problem.cast) : has_whole_loads<T>(problem.cast)) &&
        is_aligned(problem.out_t, 16) && problem.out_t_stride % 16 == 0;
    params.row_tiles = static_cast<uint32_t>(row_tiles);
    return launch(vector ? transposed_cast_kernel<T, kMode, true> : transposed_cast_kernel<T, kMode, false>,
                  row_tiles * params.cast.col_tiles, Shape<T>::kThreads, stream, pdl, params);
}

template <Mode kMode>
cudaError_t launch_for(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for_type(problem.cast, [&]<typename T>() {
        return launch_kernel<T, kMode>(problem, {}, ceil_div<int64_t>(problem.cast.rows, kTile), stream, pdl);
    });
}

}  // namespace

cudaError_t launch_per_token_cast_with_transpose(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for<Mode::kPerToken>(problem, stream, pdl);
}

cudaError_t launch_per_block_cast_with_transpose(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for<Mode::kPerBlock>(problem, stream, pdl);
}

cudaError_t launch_per_channel_cast_transposed(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for<Mode::kPerChannelT>(problem, stream, pdl);
}

cudaError_t launch_per_block_cast_transposed(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for<Mode::kPerBlockT>(problem, stream, pdl);
}

cudaError_t launch_k_grouped_cast_k_major(const TransposedCastProblem& problem, const KGroups& groups,
                                          cudaStream_t stream, bool pdl) {
    if (problem.cast.cols <= 0) return cudaSuccess;
    if (problem.cast.x_type != InputType::kBFloat16) return cudaErrorInvalidValue;
    return launch_kernel<__nv_bfloat16, Mode::kGrouped>(problem, groups, groups.scale_rows(), stream, pdl);
}

}  // namespace deep_gemm::cast
