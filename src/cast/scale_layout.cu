// Scale factors from any strides to MN-major, TMA-aligned form, with conversion between float32 and UE8M0.
//
// scale_layout_kernel: a CTA moves 64 rows (MN) x 32 units (floats, E8M0 bytes, or packed words) through shared memory.
// It reads along whichever dimension is denser in memory and writes along MN. Rows of the tile are 65 words apart, so
// that both directions touch 32 different banks.
#include <algorithm>
#include <utility>

#include "cast/launch.cuh"
#include "cast/memory.cuh"
#include "cast/scale.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 64;
constexpr int kTileUnits = 32;

struct ScaleLayoutParams {
    const void* src;
    int64_t src_batch_stride, src_mn_stride, src_k_stride;
    uint32_t* dst;
    int64_t dst_batch_stride, dst_k_stride;
    int64_t mn, src_units, k_sf;
    int mn_repeat, k_repeat;
    const int32_t* row_counts;
    uint32_t row_tiles, unit_tiles;
    bool k_is_dense;
    bool round_up;
};

// The least power of two that is not below; NaN for NaN, and for what is negative or beyond 2^127.
__device__ __forceinline__ uint32_t ceil_to_ue8m0(uint32_t bits) {
    if (bits >= 0x80000000) return 0xff;
    return bits <= 0x00400000 ? 0 : min(bits + 0x7fffff >> 23, 0xffu);
}

// kRepeatK: k_repeat is not 1, and each unit is one scale, of packed words a byte.
template <ScaleType kFrom, ScaleType kDst, bool kRepeatK>
__global__ void __launch_bounds__(kThreads) scale_layout_kernel(const __grid_constant__ ScaleLayoutParams params) {
    constexpr ScaleType kSrc = kRepeatK && kFrom == ScaleType::kPackedUE8M0 ? ScaleType::kE8M0 : kFrom;
    __shared__ uint32_t tile[kTileUnits][kTileRows + 1];

    const uint32_t row_tile = blockIdx.x % params.row_tiles, rest = blockIdx.x / params.row_tiles;
    const uint32_t unit_tile = rest % params.unit_tiles, batch_idx = rest / params.unit_tiles;
    const int64_t row_0 = int64_t{row_tile} * kTileRows, unit_0 = int64_t{unit_tile} * kTileUnits;

    launch_dependents();
    wait_for_dependencies();
    if (params.row_counts != nullptr && row_0 >= params.row_counts[batch_idx]) return;

    constexpr int kLoads = kTileRows * kTileUnits / kThreads;
    uint32_t loaded[kLoads];
    const auto unit_of = [&](int i) {
        return params.k_is_dense ? threadIdx.x % kTileUnits : threadIdx.x / kTileRows + i * (kThreads / kTileRows);
    };
    const auto row_of = [&](int i) {
        return params.k_is_dense ? threadIdx.x / kTileUnits + i * (kThreads / kTileUnits) : threadIdx.x % kTileRows;
    };
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int64_t row = row_0 + row_of(i), unit = unit_0 + unit_of(i);
        loaded[i] = 0;
        if (row < params.mn && unit < params.src_units) {
            const int64_t src_row = params.mn_repeat == 1 ? row : row / params.mn_repeat;
            const int64_t src_k = kRepeatK ? unit / params.k_repeat : unit;
            const int64_t src_unit = kSrc != kFrom ? src_k / 4 : src_k;
            const int64_t offset =
                batch_idx * params.src_batch_stride + src_row * params.src_mn_stride + src_unit * params.src_k_stride;
            if constexpr (kFrom == ScaleType::kE8M0)
                loaded[i] = load_1(static_cast<const uint8_t*>(params.src) + offset);
            else
                loaded[i] = load_4(static_cast<const uint32_t*>(params.src) + offset);
            if constexpr (kSrc != kFrom) loaded[i] = loaded[i] >> (src_k % 4 * 8) & 0xff;
        }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) tile[unit_of(i)][row_of(i)] = loaded[i];
    __syncthreads();

    const int row = threadIdx.x % kTileRows;
    if (row_0 + row >= params.mn) return;
    uint32_t* dst = params.dst + batch_idx * params.dst_batch_stride + row_0 + row;
    constexpr int kStep = kThreads / kTileRows;
    if constexpr (kDst == ScaleType::kFloat32) {
        constexpr int kScalesPerUnit = kSrc == ScaleType::kPackedUE8M0 ? 4 : 1;
#pragma unroll
        for (int unit = threadIdx.x / kTileRows; unit < kTileUnits; unit += kStep) {
            const uint32_t value = tile[unit][row];
#pragma unroll
            for (int i = 0; i < kScalesPerUnit; ++i) {
                const int64_t k = (unit_0 + unit) * kScalesPerUnit + i;
                if (k < params.k_sf)
                    dst[k * params.dst_k_stride] =
                        kSrc == ScaleType::kFloat32 ? value : ue8m0_to_float_bits(value >> (8 * i) & 0xff);
            }
        }
    } else if constexpr (kSrc == ScaleType::kPackedUE8M0) {
#pragma unroll
        for (int unit = threadIdx.x / kTileRows; unit < kTileUnits; unit += kStep) {
            // The bytes after the last scale may hold anything in src; in dst they are zero.
            const int64_t scales = params.k_sf - (unit_0 + unit) * 4;
            if (scales > 0)
                dst[(unit_0 + unit) * params.dst_k_stride] =
                    tile[unit][row] & (scales >= 4 ? 0xffffffffu : (1u << (8 * scales)) - 1);
        }
    } else {
#pragma unroll
        for (int word = threadIdx.x / kTileRows; word < kTileUnits / 4; word += kStep) {
            const int64_t k = unit_0 + word * 4;
            if (k >= params.k_sf) break;
            uint32_t packed = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t value = tile[word * 4 + i][row];
                if (k + i < params.k_sf) {
                    const uint32_t byte = kSrc == ScaleType::kE8M0 ? value
                                          : params.round_up        ? ceil_to_ue8m0(value)
                                                                   : float_bits_to_ue8m0(value);
                    packed |= byte << (8 * i);
                }
            }
            dst[k / 4 * params.dst_k_stride] = packed;
        }
    }
}

template <bool kRepeatK>
auto find_kernel(ScaleType src, bool to_float) -> void (*)(ScaleLayoutParams) {
    using enum ScaleType;
    if (to_float) {
        return src == kFloat32 ? scale_layout_kernel<kFloat32, kFloat32, kRepeatK>
               : src == kE8M0  ? scale_layout_kernel<kE8M0, kFloat32, kRepeatK>
                               : scale_layout_kernel<kPackedUE8M0, kFloat32, kRepeatK>;
    }
    return src == kFloat32 ? scale_layout_kernel<kFloat32, kPackedUE8M0, kRepeatK>
           : src == kE8M0  ? scale_layout_kernel<kE8M0, kPackedUE8M0, kRepeatK>
                           : scale_layout_kernel<kPackedUE8M0, kPackedUE8M0, kRepeatK>;
}

struct GroupedPackParams {
    const uint32_t* src;
    int64_t src_k_stride, src_mn_stride;
    int64_t sf_rows, mn;
    const int32_t* ks;
    int64_t ks_stride;
    int64_t num_groups;
    int gran_k;
    uint32_t* dst;
    int64_t dst_k_stride;
    uint32_t mn_tiles;
};

// A CTA writes 256 words of one row of dst. Its first warp finds the row's group by scanning the sizes.
__global__ void __launch_bounds__(kThreads) k_grouped_pack_kernel(const __grid_constant__ GroupedPackParams params) {
    __shared__ int64_t shared_src_row;
    __shared__ int shared_count;

    const int64_t word_row = blockIdx.x / params.mn_tiles;
    const int64_t mn = int64_t{blockIdx.x % params.mn_tiles} * kThreads + threadIdx.x;

    launch_dependents();
    wait_for_dependencies();

    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int64_t scales_before = 0, words_before = 0, src_row = 0;
        int count = 0;
        for (int64_t base = 0; base < params.num_groups && count == 0 && words_before <= word_row; base += 32) {
            int64_t scales = 0;
            if (base + lane < params.num_groups) {
                const int64_t k = static_cast<int32_t>(load_4(params.ks + (base + lane) * params.ks_stride));
                // Garbage sizes must not overflow the sums: no group is larger than all of src.
                scales = k <= 0 ? 0 : min((k - 1) / params.gran_k + 1, params.sf_rows);
            }
            const int64_t words = ceil_div<int64_t>(scales, 4);
            int64_t scales_end = scales, words_end = words;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int64_t a = __shfl_up_sync(0xffffffff, scales_end, offset);
                const int64_t b = __shfl_up_sync(0xffffffff, words_end, offset);
                if (lane >= offset) scales_end += a, words_end += b;
            }
            const int64_t local = word_row - (words_before + words_end - words);  // row within this lane's group
            const bool mine = local >= 0 && local < words;
            const unsigned owner = __ballot_sync(0xffffffff, mine);
            if (owner != 0) {
                const int64_t first = scales_before + scales_end - scales + local * 4;
                const int64_t left = min(scales - local * 4, params.sf_rows - first);
                src_row = __shfl_sync(0xffffffff, first, __ffs(owner) - 1);
                count = __shfl_sync(0xffffffff, static_cast<int>(max(int64_t{0}, min(int64_t{4}, left))),
                                    __ffs(owner) - 1);
                break;
            }
            scales_before += __shfl_sync(0xffffffff, scales_end, 31);
            words_before += __shfl_sync(0xffffffff, words_end, 31);
        }
        if (lane == 0) shared_src_row = src_row, shared_count = count;
    }
    __syncthreads();
    if (mn >= params.mn) return;
    const int count = shared_count;
    const uint32_t* src = params.src + shared_src_row * params.src_k_stride + mn * params.src_mn_stride;
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) packed |= float_bits_to_ue8m0(load_4(src + i * params.src_k_stride)) << (8 * i);
    params.dst[word_row * params.dst_k_stride + mn] = packed;
}

}  // namespace

cudaError_t launch_scale_layout(const ScaleLayoutProblem& given, cudaStream_t stream, bool pdl) {
    ScaleLayoutProblem problem = given;
    if (problem.batch <= 0 || problem.mn <= 0 || problem.k_sf <= 0) return cudaSuccess;
    // Words are made of four scales along K, and the count of rows depends on the batch; where floats only move, K and the
    // batch may be one dimension, or change places, so that tiles go along the denser one: heads between tokens and K.
    const bool moves = problem.src_type == ScaleType::kFloat32 && problem.dst_type == ScaleType::kFloat32 &&
                       problem.k_repeat == 1 && problem.row_counts == nullptr;
    if (moves && problem.src_batch_stride == problem.k_sf * problem.src_k_stride &&
        problem.dst_batch_stride == problem.k_sf * problem.dst_k_stride) {
        problem.k_sf *= problem.batch;
        problem.batch = 1;
    } else if (moves && problem.batch > 1 &&
               problem.src_batch_stride < std::min(problem.src_mn_stride, problem.src_k_stride)) {
        std::swap(problem.batch, problem.k_sf);
        std::swap(problem.src_batch_stride, problem.src_k_stride);
        std::swap(problem.dst_batch_stride, problem.dst_k_stride);
    }
    ScaleLayoutParams params = {};
    params.src = problem.src;
    params.src_batch_stride = problem.src_batch_stride;
    params.src_mn_stride = problem.src_mn_stride;
    params.src_k_stride = problem.src_k_stride;
    params.dst = static_cast<uint32_t*>(problem.dst);
    params.dst_batch_stride = problem.dst_batch_stride;
    params.dst_k_stride = problem.dst_k_stride;
    params.mn = problem.mn;
    const bool repeats_k = problem.k_repeat != 1;
    const bool is_packed = problem.src_type == ScaleType::kPackedUE8M0;
    params.src_units = is_packed && !repeats_k ? ceil_div<int64_t>(problem.k_sf, 4) : problem.k_sf;
    params.k_sf = problem.k_sf;
    params.mn_repeat = problem.mn_repeat;
    params.k_repeat = problem.k_repeat;
    params.row_counts = problem.row_counts;
    const int64_t row_tiles = ceil_div<int64_t>(problem.mn, kTileRows);
    const int64_t unit_tiles = ceil_div<int64_t>(params.src_units, kTileUnits);
    params.row_tiles = static_cast<uint32_t>(row_tiles);
    params.unit_tiles = static_cast<uint32_t>(unit_tiles);
    params.k_is_dense = problem.src_k_stride <= problem.src_mn_stride;
    params.round_up = problem.round_up;

    if (problem.dst_type == ScaleType::kE8M0) return cudaErrorInvalidValue;
    const bool to_float = problem.dst_type == ScaleType::kFloat32;
    const auto kernel = repeats_k ? find_kernel<true>(problem.src_type, to_float)
                                  : find_kernel<false>(problem.src_type, to_float);
    return launch(kernel, row_tiles * unit_tiles * problem.batch, kThreads, stream, pdl, params);
}

cudaError_t launch_k_grouped_pack_ue8m0(const GroupedPackProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.mn <= 0 || problem.dst_rows <= 0) return cudaSuccess;
    GroupedPackParams params = {};
    params.src = reinterpret_cast<const uint32_t*>(problem.src);
    params.src_k_stride = problem.src_k_stride;
    params.src_mn_stride = problem.src_mn_stride;
    params.sf_rows = problem.sf_rows;
    params.mn = problem.mn;
    params.ks = problem.ks;
    params.ks_stride = problem.ks_stride;
    params.num_groups = problem.num_groups;
    params.gran_k = problem.gran_k;
    params.dst = static_cast<uint32_t*>(problem.dst);
    params.dst_k_stride = problem.dst_k_stride;
    const int64_t mn_tiles = ceil_div<int64_t>(problem.mn, kThreads);
    params.mn_tiles = static_cast<uint32_t>(mn_tiles);
    return launch(k_grouped_pack_kernel, mn_tiles * problem.dst_rows, kThreads, stream, pdl, params);
}

}  // namespace deep_gemm::cast
