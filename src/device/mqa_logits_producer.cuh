// What the kernels for MQA logits do beside multiplying: groups staged for the other roles, the block table, and -inf outside
// of the ranges.
#pragma once

#include "mqa_logits_schedule.cuh"
#include "pipeline.cuh"
#include "ptx_mbarrier.cuh"
#include "ptx_memory.cuh"

namespace deep_gemm {

// Weights are stored times the storage's kWeightFactor. Storage that has room for scales of queries takes them, too,
// for all columns that kLoads words a lane cover: see its store_query_scales(). Storage that kMarksTokens has NaN for each token
// with a weight that is not finite, else 0.
template <int kHeads, int kTokens, class Storage, class Walk>
__device__ __forceinline__ void stage_walked_groups(const MqaLogitsParams& params, Storage& shared, Walk& walk) {
    constexpr int kLoads = kTokens * kHeads / 32;
    const int lane = threadIdx.x % 32;
    PipelineState<kMqaQueryStages> state;
    MqaGroup group = {};
    KeyRange range;
    float weights[kLoads] = {};
    uint32_t scales[kLoads] = {};
    const auto load = [&](int first_token, int num_tokens) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int col = i * 32 + lane, token = col / kHeads;
            weights[i] = 0;
            scales[i] = 0;
            if (token < num_tokens) {
                const int64_t row = first_token + token;
                weights[i] = params.weights[row * params.weights_stride + col % kHeads];
                if constexpr (Storage::kQueryScales) {
                    scales[i] = params.q_sf[row * params.q_sf_stride + col % kHeads] & params.used_scales;
                }
            }
        }
    };
    bool more;
    do {
        more = walk.next(group, range, load);
        if (!more) group.num_tiles = 0;
        const int s = state.stage_idx;
        ptx::mbarrier_wait(shared.q_empty[s], state.phase ^ 1);
        if (lane < kTokens) shared.ranges[s][lane] = range;
        if (lane == 0) {
            shared.groups[s] = group;
            ptx::mbarrier_arrive(shared.group_full[s]);  // keys are loaded while the weights are on their way
        }
        if constexpr (Storage::kMarksTokens) {
            unsigned columns = 0;  // those of token `lane` whose weights are not finite
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const unsigned lanes = __ballot_sync(kAllLanes, !isfinite(weights[i]));
                if (lane * kHeads / 32 <= i && i * 32 < (lane + 1) * kHeads) {
                    columns |= kHeads >= 32 ? lanes : (lanes >> lane * kHeads % 32) & ((1u << kHeads % 32) - 1);
                }
            }
            if (lane < kTokens) shared.marks[s][lane] = columns != 0 ? __int_as_float(0x7fffffff) : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) shared.weights[s][i * 32 + lane] = weights[i] * Storage::kWeightFactor;
        if constexpr (Storage::kQueryScales) shared.store_query_scales(s, scales, lane);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(shared.q_full[s]);
        state.advance();
    } while (more);
}

// A warp that hands the groups of this CTA to the other roles: what they are, their weights and ranges, in a ring. `share` is
// for paged keys.
template <bool kPaged, int kHeads, int kTokens, class Storage>
__device__ __forceinline__ void stage_mqa_groups(const MqaLogitsParams& params, Storage& shared, const PagedShare& share) {
    if constexpr (kPaged) {
        PagedWalk<kTokens> walk(params, share);
        stage_walked_groups<kHeads, kTokens>(params, shared, walk);
    } else {
        DenseWalk<kTokens> walk(params, shared.dense_work.work);
        stage_walked_groups<kHeads, kTokens>(params, shared, walk);
    }
}

// A lane holds the block table's entry of one block, for 32 blocks at once.
struct MqaTableEntries {
    int row = -1;
    int first = -1;  // block of lane 0
    int block;

    __device__ __forceinline__ void load(const MqaLogitsParams& params, int table_row, int first_block, int lane) {
        row = table_row;
        first = first_block;
        const int column = min(first_block + lane, params.max_blocks - 1);
        block = params.block_table.data[row * params.block_table.stride + column * params.block_table.inner_stride];
    }

    // Those that the CTA starts with, by its schedule: before the lengths are known, which take as long to read.
    __device__ __forceinline__ void load_first(const MqaLogitsParams& params, const PagedShare& share, int lane) {
        if (params.indices.data != nullptr || params.max_blocks == 0) return;
        if (share.index < 0 || share.index >= params.table_rows || share.tile < 0 || share.tile >= params.max_blocks) return;
        load(params, share.index, share.tile * (kMqaTileKeys >> params.block_kv_log2), lane);
    }
};

// Brings to L2 what a call with a cache reads first, one after the other: schedule, lengths, block table, weights. All CTAs
// together, kThreads each, while the previous kernel may still be running: what that one writes replaces what has been
// fetched.
template <int kThreads>
__device__ __forceinline__ void prefetch_paged_inputs(const MqaLogitsParams& params, int num_heads, int thread) {
    constexpr int kMostRounds = 4;  // of a thread, for each tensor
    constexpr int kLine = 128 / 4;  // elements
    const int threads = gridDim.x * kThreads, first = blockIdx.x * kThreads + thread;
    const auto prefetch = [&](const void* data, int64_t stride, int rows, int cols) {
        const int lines = (cols + kLine - 1) / kLine;
        const int64_t count = min(static_cast<int64_t>(rows) * lines, static_cast<int64_t>(kMostRounds) * threads);
        for (int i = first; i < count; i += threads) {
            const int row = i / lines;
            ptx::prefetch_l2(static_cast<const uint32_t*>(data) + row * stride + (i - row * lines) * kLine);
        }
    };
    if (thread == 0) ptx::prefetch_l2(params.schedule + 2 * blockIdx.x);
    const IntSource& lens = params.context_lens;
    const IntSource& table = params.block_table;
    prefetch(lens.data, lens.stride, params.num_atoms, 1);
    if (table.inner_stride == 1) prefetch(table.data, table.stride, params.table_rows, params.max_blocks);
    prefetch(params.weights, params.weights_stride, params.num_tokens, num_heads);
}

// Element stores up to a multiple of 16 bytes and from the last one on.
template <int kThreads, class T>
__device__ __forceinline__ void fill_columns_with(T* row, int from, int to, uint32_t value, int thread) {
    constexpr int kVector = 16 / sizeof(T);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row + from) % 16 / sizeof(T));
    const int head = min(from + (kVector - past) % kVector, to);
    const int vectors = max(to - head, 0) / kVector;
    if (from + thread < head) row[from + thread] = static_cast<T>(value);
    auto* wide = reinterpret_cast<uint4*>(row + head);
#pragma unroll 4
    for (int i = thread; i < vectors; i += kThreads) wide[i] = make_uint4(value, value, value, value);
    const int tail = head + vectors * kVector + thread;
    if (tail < to) row[tail] = static_cast<T>(value);
}

// Columns [from, to) of a row.
template <int kThreads>
__device__ __forceinline__ void fill_columns(const MqaLogitsParams& params, long long row, int from, int to, int thread) {
    if (params.logit_bytes == 4) {
        fill_columns_with<kThreads>(static_cast<uint32_t*>(params.logits) + row, from, to, 0xff800000u, thread);
    } else {
        fill_columns_with<kThreads>(static_cast<uint16_t*>(params.logits) + row, from, to, 0xff80ff80u, thread);
    }
}

// Sets logits outside of the ranges to -inf, by kThreads threads: rows in pieces, over all CTAs.
template <bool kPaged, int kThreads>
__device__ __forceinline__ void clean_mqa_logits(const MqaLogitsParams& params, int thread) {
    constexpr int kPiece = 8192;
    const int pieces = (params.width + kPiece - 1) / kPiece;
    const long long count = static_cast<long long>(params.num_tokens) * pieces;
#pragma unroll 1
    for (long long i = blockIdx.x; i < count; i += gridDim.x) {
        const int token = static_cast<int>(i / pieces);
        const int from = static_cast<int>(i - static_cast<long long>(token) * pieces) * kPiece;
        const int to = min(params.width - from, kPiece) + from;
        KeyRange range;
        if constexpr (kPaged) {
            range = paged_range(params, token, token / params.next_n);
        } else {
            range = dense_range(params, token);
            if (params.compressed) range = {0, range.end - range.begin};
        }
        const long long row = token * params.logits_stride;
        fill_columns<kThreads>(params, row, from, min(to, range.begin), thread);
        fill_columns<kThreads>(params, row, max(from, range.end), to, thread);
    }
}

}  // namespace deep_gemm
