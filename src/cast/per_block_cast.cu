// FP8 quantisation with a scale per 128 rows and gran_k columns: weights.
//
// A CTA quantises 128 x 128, held in registers between its one read and the write.
//   kVector: 16 bytes a lane, 16 rows at a time (16 lanes a row for 2-byte elements, 32 for float32).
//   else (any alignment, any column count): a warp a row, lane l has columns l, l + 32, l + 64, l + 96.
#include "cast/cast_params.cuh"
#include "cast/memory.cuh"

namespace deep_gemm::cast {
namespace {

constexpr int kTile = 128;
constexpr int kSlots = 16;  // rows at a time
constexpr int kRowsPerThread = kTile / kSlots;

template <typename T, bool kVector>
constexpr int kLanesPerRow = kVector ? kTile / Elements<T>::kPer16 : 32;

template <typename T, int kGranK, bool kVector>
__global__ void __launch_bounds__(kSlots* kLanesPerRow<T, kVector>, 1024 / (kSlots * kLanesPerRow<T, kVector>))
    per_block_cast_kernel(const __grid_constant__ CastParams params) {
    constexpr int kLanes = kLanesPerRow<T, kVector>;
    constexpr int kWarps = kSlots * kLanes / 32;
    constexpr int kGroups = kTile / kGranK;
    constexpr int kElems = kTile / kLanes;
    __shared__ alignas(16) float maxima[kGroups][kWarps + 4];  // + 4: groups begin in different banks

    const uint32_t col_tile = blockIdx.x % params.col_tiles;
    const int64_t row_tile = blockIdx.x / params.col_tiles;
    const int64_t row_0 = row_tile * kTile, col_0 = int64_t{col_tile} * kTile;
    const int rows = static_cast<int>(min(int64_t{kTile}, params.rows - row_0));
    const int cols = static_cast<int>(min(int64_t{kTile}, params.cols - col_0));
    const int warp = threadIdx.x / 32, slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const bool ue8m0 = params.sf_format != ScaleFormat::kFloat32;
    const T* x = static_cast<const T*>(params.x) + (row_0 + slot) * params.x_stride + col_0;
    uint8_t* out = params.out + (row_0 + slot) * params.out_stride + col_0;

    launch_dependents();
    wait_for_dependencies();

    // A thread's elements of a row: one load of 16 bytes, or kElems loads 32 columns apart.
    uint4 raw[kRowsPerThread];
    static_assert(kVector || kElems == 4);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        raw[i] = make_uint4(0, 0, 0, 0);
        if (slot + i * kSlots >= rows) continue;
        const T* p = x + i * kSlots * params.x_stride;
        if constexpr (kVector) {
            if (lane * kElems < cols) raw[i] = load_16(p + lane * kElems);
        } else {
            if (lane < cols) raw[i].x = load_element<sizeof(T)>(p + lane);
            if (lane + 32 < cols) raw[i].y = load_element<sizeof(T)>(p + lane + 32);
            if (lane + 64 < cols) raw[i].z = load_element<sizeof(T)>(p + lane + 64);
            if (lane + 96 < cols) raw[i].w = load_element<sizeof(T)>(p + lane + 96);
        }
    }
    const auto unpack = [](const uint4& r, float(&v)[kElems]) {
        if constexpr (kVector) {
            Elements<T>::unpack(r, v);
        } else {
            v[0] = Elements<T>::unpack_one(r.x), v[1] = Elements<T>::unpack_one(r.y);
            v[2] = Elements<T>::unpack_one(r.z), v[3] = Elements<T>::unpack_one(r.w);
        }
    };

    // With kVector a thread's columns are in one group; without, each of its four columns is in another group of 32.
    constexpr int kOwnGroups = kVector || kGroups == 1 ? 1 : 4;
    float amax[kOwnGroups] = {};
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        float v[kElems];
        unpack(raw[i], v);
#pragma unroll
        for (int e = 0; e < kElems; ++e) amax[e % kOwnGroups] = max_abs(amax[e % kOwnGroups], v[e]);
    }
    constexpr int kLanesPerGroup = kVector ? kLanes / kGroups : 32;  // of one row
    // One value for the guarded store and the load below: given the two expressions apart, nvcc 13.0 simplifies the
    // first under its guard and, for sm_100a, uses the result for the second.
    const int own_group = lane / kLanesPerGroup;
#pragma unroll
    for (int g = 0; g < kOwnGroups; ++g) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
            if (offset < kLanesPerGroup || offset >= kLanes)
                amax[g] = max_abs(amax[g], __shfl_xor_sync(0xffffffff, amax[g], offset));
    }
    if constexpr (kOwnGroups == 1) {
        if (lane % kLanesPerGroup == 0 && threadIdx.x % 32 < kLanes) maxima[own_group][warp] = amax[0];
    } else {
        if (lane == 0) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) maxima[g][warp] = amax[g];
        }
    }
    __syncthreads();

    const auto scale_of = [&](int g) {
        float block_amax = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w += 4) {
            const float4 m = *reinterpret_cast<const float4*>(&maxima[g][w]);
            block_amax = max_abs(block_amax, max_abs(max_abs(m.x, m.y), max_abs(m.z, m.w)));
        }
        return group_scale<E4M3>(block_amax, ue8m0);
    };
    GroupScale scale[kOwnGroups];
#pragma unroll
    for (int g = 0; g < kOwnGroups; ++g) scale[g] = scale_of(kOwnGroups == 1 ? own_group : g);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
        if (slot + i * kSlots >= rows) continue;
        forget_unpacked(raw[i]);
        float v[kElems];
        unpack(raw[i], v);
        uint32_t words[kElems / 4];
#pragma unroll
        for (int e = 0; e < kElems; e += 4)
            words[e / 4] =
                to_e4m3x4(v[e] * scale[0].inverse, v[e + 1] * scale[1 % kOwnGroups].inverse,
                          v[e + 2] * scale[2 % kOwnGroups].inverse, v[e + 3] * scale[3 % kOwnGroups].inverse);
        uint8_t* p = out + i * kSlots * params.out_stride;
        if constexpr (!kVector) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (lane + 32 * e < cols) p[lane + 32 * e] = static_cast<uint8_t>(words[0] >> (8 * e));
        } else if (lane * kElems < cols) {
            if constexpr (kElems == 8)
                *reinterpret_cast<uint2*>(p + lane * 8) = make_uint2(words[0], words[1]);
            else
                *reinterpret_cast<uint32_t*>(p + lane * 4) = words[0];
        }
    }

    const int groups = ceil_div(cols, kGranK);
    if (params.sf_format != ScaleFormat::kUE8M0Packed) {
        if (static_cast<int>(threadIdx.x) < groups)
            static_cast<float*>(params.sf)[row_tile + (int64_t{col_tile} * kGroups + threadIdx.x) * params.sf_stride] =
                scale_of(threadIdx.x).sf;
    } else if (threadIdx.x == 0) {
        uint32_t* word =
            static_cast<uint32_t*>(params.sf) + row_tile + int64_t{col_tile} * kGroups / 4 * params.sf_stride;
        if constexpr (kGroups == 4) {
            uint32_t packed = 0;
            for (int g = 0; g < groups; ++g) packed |= packed_scale(scale_of(g).sf) << (8 * g);
            *word = packed;
        } else {
            // Four tiles share a word: each writes its byte, and the last tile the bytes that follow, too.
            uint8_t* bytes = reinterpret_cast<uint8_t*>(word);
            bytes[col_tile % 4] = static_cast<uint8_t>(packed_scale(scale_of(0).sf));
            for (uint32_t i = col_tile % 4 + 1; col_tile + 1 == params.col_tiles && i < 4; ++i) bytes[i] = 0;
        }
    }
}

template <typename T, bool kVector>
cudaError_t launch_kernel(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    const CastParams params = make_cast_params(problem, kTile);
    const int64_t row_tiles = ceil_div<int64_t>(problem.rows, kTile);
    const auto kernel =
        problem.gran_k == 128 ? per_block_cast_kernel<T, 128, kVector> : per_block_cast_kernel<T, 32, kVector>;
    return launch(kernel, row_tiles * params.col_tiles, kSlots * kLanesPerRow<T, kVector>, stream, pdl, params);
}

}  // namespace

cudaError_t launch_per_block_cast(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for_type(problem, [&]<typename T>() {
        return has_vector_access<T>(problem) ? launch_kernel<T, true>(problem, stream, pdl)
                                             : launch_kernel<T, false>(problem, stream, pdl);
    });
}

}  // namespace deep_gemm::cast
