// The schedule of paged MQA logits: an even share of all tiles of 64 keys for each CTA, from the lengths on the device.
//
//   schedule[c] = (atom, tile): CTA c starts at this tile of this atom; schedule[num_ctas] is where the last one ends
//
// An atom is a sequence, or with `indices` up to kMqaAtomTokens neighbouring tokens of one sequence, named by the first. One
// CTA goes over the atoms twice, a thread for each: for the sum of all tiles, and for the atoms that shares begin in.
#pragma once

#include "mqa_logits_schedule.cuh"

namespace deep_gemm {

namespace mqa_metadata {

constexpr int kThreads = kMqaMetadataThreads;
constexpr int kWarps = kThreads / 32;

struct Shared {
    long long warp_sums[kWarps];
    int warp_starts[kWarps];
    long long until[kThreads];  // tiles up to and with each atom of this round
};

__device__ __forceinline__ int length_of(const MqaMetadataParams& params, int i) {
    const int32_t* lens = params.context_lens.data + i * params.context_lens.stride;
    int length = 0;
    for (int j = 0; j < params.lens_per_atom; ++j) length = max(length, lens[j * params.context_lens.inner_stride]);
    return length;
}

// Tiles of the atom that starts at element i, 0 where none does. `run_start`: of the run of equal indices that i is in.
__device__ __forceinline__ long long tiles_of_atom(const MqaMetadataParams& params, int i, int run_start) {
    if (i >= params.num_lens) return 0;
    int length = length_of(params, i);
    if (params.indices.data != nullptr) {
        if ((i - run_start) % kMqaAtomTokens != 0) return 0;
        const int sequence = params.indices.data[i * params.indices.stride];
        for (int j = i + 1; j < min(i + kMqaAtomTokens, params.num_lens); ++j) {
            if (params.indices.data[j * params.indices.stride] != sequence) break;
            length = max(length, length_of(params, j));
        }
    }
    return (static_cast<long long>(length) + kMqaTileKeys - 1) / kMqaTileKeys;
}

// The latest start of a run of equal indices at or before this thread's element. All threads together.
__device__ __forceinline__ int find_run_start(const MqaMetadataParams& params, int i, int carried, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int start = -1;
    if (i < params.num_lens) {
        const bool starts = i == 0 || params.indices.data[i * params.indices.stride] !=
                                          params.indices.data[(i - 1) * params.indices.stride];
        if (starts) start = i;
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, start, offset);
        if (lane >= offset) start = max(start, other);
    }
    if (lane == 31) shared.warp_starts[warp] = start;
    __syncthreads();
    start = max(start, carried);
    for (int w = 0; w < warp; ++w) start = max(start, shared.warp_starts[w]);
    return start;
}

__device__ __forceinline__ void find_schedule(const MqaMetadataParams& params, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long total = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        long long before_round = 0;
        int carried = 0;
#pragma unroll 1
        for (int first = 0; first < params.num_lens; first += kThreads) {
            const int i = first + threadIdx.x;
            int run_start = i;
            if (params.indices.data != nullptr) run_start = find_run_start(params, i, carried, shared);
            long long until = tiles_of_atom(params, i, run_start);
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const long long other = __shfl_up_sync(kAllLanes, until, offset);
                if (lane >= offset) until += other;
            }
            if (lane == 31) shared.warp_sums[warp] = until;
            __syncthreads();
            long long round = 0;
            for (int w = 0; w < kWarps; ++w) {
                if (w < warp) until += shared.warp_sums[w];
                round += shared.warp_sums[w];
            }
            if (params.indices.data != nullptr) {
                for (int w = 0; w < kWarps; ++w) carried = max(carried, shared.warp_starts[w]);
            }
            shared.until[threadIdx.x] = until;
            __syncthreads();
            if (pass == 1) {
                for (int c = threadIdx.x; c < params.num_ctas; c += kThreads) {
                    const long long begin = total * c / params.num_ctas - before_round;
                    if (begin < 0 || begin >= round) continue;
                    int low = 0, high = kThreads - 1;  // the first atom that goes beyond `begin`
                    while (low < high) {
                        const int middle = (low + high) / 2;
                        if (shared.until[middle] > begin) {
                            high = middle;
                        } else {
                            low = middle + 1;
                        }
                    }
                    const long long before = low > 0 ? shared.until[low - 1] : 0;
                    params.schedule[2 * c] = first + low;
                    params.schedule[2 * c + 1] = static_cast<int>(begin - before);
                }
            }
            __syncthreads();
            before_round += round;
        }
        total = before_round;
    }
    // Where there is nothing to do, every CTA starts at the end.
    for (int c = threadIdx.x; c <= params.num_ctas; c += kThreads) {
        if (c == params.num_ctas || total == 0) {
            params.schedule[2 * c] = params.num_lens;
            params.schedule[2 * c + 1] = 0;
        }
    }
}

__device__ __forceinline__ void run(const MqaMetadataParams& params) {
    __shared__ Shared shared;
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    find_schedule(params, shared);
}

}  // namespace mqa_metadata

}  // namespace deep_gemm
