// Scores of the lightning indexer for Blackwell:
//
//   logits[i, j] = sum_h relu(q[i, h] . kv[j] * kv_sf[j]) * weights[i, h],  begin(i) <= j < end(i),  FP8 q and kv, or
//   logits[i, j] = sum_h relu(sum_d q[i, h, d] q_sf[i, h, d / 32] kv[j, d] kv_sf[j, d / 32]) * weights[i, h],  FP4 q and kv
//
// Keys are the rows of the instruction, 128 to a tile; its columns are (token, head) pairs, as many as a group of tokens has.
// A thread of the epilogue has a lane of tensor memory, which is a key, so a token's heads are summed inside of it, and a
// warp stores 32 neighbours. For a scale s >= 0, relu(x s) = s relu(x): an element costs an addition and an FMA, and the
// scale is applied to the sum of the heads. A key whose scale is negative, huge, Inf or NaN has each product multiplied
// instead, as the formula says. FP4's scales are applied by the tensor core; there the factor is 1, and tiles with scales so
// large that a product may be infinite go the other way.
//
// A CTA works on a run of groups (device/mqa_logits_schedule.cuh), which count tiles of 64 keys: an odd run ends in half a
// tile, whose other half is computed and not stored. head_dim is a run-time value: it only changes descriptors. FP4 rows of
// 32 elements are 64 in shared memory, the second half zeros that TMA adds.
//
// Warp 0 issues TMA loads, warp 1 walks the groups and stages weights and ranges, warp 2 sets logits outside of the ranges to
// -inf, and warp 3 issues the tensor core's operations. Warps 4 to 7 sum and store the even tiles, warps 8 to 11 the odd
// ones, each from an accumulator of its own. FP4: warp 12 turns the words of scales of 128 keys round, which the tensor core
// wants as word 32 j + r in row r, column j of tensor memory; warp 1 does so with those of queries.
//
// barrier               arrivals                                 guards
// group_full[g]         1 (warp 1)                               query stage g says which group it is for, to warp 0
// q_full[g]             2 (warps 0, 1), and the bytes            queries, weights and ranges of the group are there
// q_empty[g]            warps 4 to 11, FP4 12,                   query stage g may be overwritten
//                       2 (warp 3, its commit)
// kv_full[s]            1 (warp 0), and the bytes                keys and scales of stage s are there
// kv_empty[s]           4 (warps that read the scales), 1 (commit)  stage s may be overwritten
// scales_ready[s]       1 (warp 12, FP4)                         stage s is full, its scales have been turned round
// accumulator_full[a]   1 (commit)                               a tile's products are complete
// accumulator_empty[a]  4 (its warps)                            they have been read
#pragma once

#include <cuda_bf16.h>

#include <utility>

#include "../device/mqa_logits_producer.cuh"
#include "../device/mqa_logits_schedule.cuh"
#include "../device/pipeline.cuh"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "mqa_logits_traits.h"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

// Whether any of a word's UE8M0 scales is 2^57 or more: below, a sum of 128 products of FP4, each with two scales, is finite,
// and so is twice that.
__device__ __forceinline__ bool has_large_scale(uint32_t word) {
    return ((word >> 1 & 0x7f7f7f7f) + 0x24242424 & 0x80808080) != 0;  // byte / 2 >= 92
}

template <int kHeads, bool kFp4>
struct alignas(1024) MqaStorage {
    static constexpr MqaType kType{kFp4};
    static constexpr int kTokens = kType.cols() / kHeads;
    static constexpr bool kQueryScales = kFp4;
    static constexpr float kWeightFactor = 0.5f;  // see add_heads()
    static constexpr bool kMarksTokens = false;
    static constexpr int kScaleGroups = 2;  // of 128 columns

    uint8_t kv[kType.stages()][kMqaKeys * kType.max_row_bytes()];      // [128][row_bytes], swizzled over a whole row
    uint8_t q[kMqaQueryStages][kType.cols() * kType.max_row_bytes()];  // [q_rows][row_bytes], likewise
    alignas(128) uint32_t kv_sf[kType.stages()][kMqaKeys];             // FP32, or four UE8M0
    alignas(16) float weights[kMqaQueryStages][kType.cols()];
    // FP4: scales as the tensor core wants them.
    alignas(16) uint4 turned_kv_sf[kFp4 ? kType.stages() : 1][kFp4 ? 32 : 1];
    alignas(16) uint32_t turned_q_sf[kFp4 ? kMqaQueryStages : 1][kFp4 ? kScaleGroups * 128 : 1];
    bool large_queries[kMqaQueryStages];  // FP4: has_large_scale()
    KeyRange ranges[kMqaQueryStages][kTokens];
    MqaGroup groups[kMqaQueryStages];
    DenseWorkStorage dense_work;
    ptx::Barrier group_full[kMqaQueryStages];
    ptx::Barrier q_full[kMqaQueryStages];
    ptx::Barrier q_empty[kMqaQueryStages];
    ptx::Barrier kv_full[kType.stages()];
    ptx::Barrier kv_empty[kType.stages()];
    ptx::Barrier scales_ready[kType.stages()];
    ptx::Barrier accumulator_full[2];
    ptx::Barrier accumulator_empty[2];
    uint32_t tensor_memory;

    // By warp 1, words of columns 32 i + lane; the rest of the last group of 128 is copied to tensor memory, too.
    template <int kCount>
    __device__ __forceinline__ void store_query_scales(int stage, const uint32_t (&words)[kCount], int lane) {
        bool large = false;
#pragma unroll
        for (int i = 0; i < kScaleGroups * 4; ++i) {
            const uint32_t word = i < kCount ? words[i] : 0;
            turned_q_sf[stage][i / 4 * 128 + lane * 4 + i % 4] = word;
            large |= has_large_scale(word);
        }
        large = __any_sync(kAllLanes, large);
        if (lane == 0) large_queries[stage] = large;
        ptx::fence_async_shared();
    }
};

template <int kHeads, bool kPaged, bool kFp4>
class MqaKernel {
    static constexpr MqaType kType{kFp4};
    static constexpr int kTokens = kType.cols() / kHeads;
    static constexpr int kStages = kType.stages();
    static constexpr int kTensorColumns = 512;
    // Columns of tensor memory, behind those of two accumulators.
    static constexpr int kKeyScales = 2 * kType.cols();
    static constexpr int kQueryScales = kKeyScales + 4;
    static_assert(!kFp4 || kQueryScales + 8 <= kTensorColumns);
    static constexpr float kMaxFactored = 0x1p64f;  // scales up to this may be taken out of the sum

    using Storage = MqaStorage<kHeads, kFp4>;
    using QueryState = PipelineState<kMqaQueryStages>;
    using KeyState = PipelineState<kStages>;
    static_assert(sizeof(Storage) <= kType.shared_bytes(), "the host would ask for too little shared memory");

    enum Warp { kLoadWarp = 0, kGroupWarp = 1, kCleanWarp = 2, kMultiplyWarp = 3, kFirstSumWarp = 4, kTurnWarp = 12 };

public:
    __device__ __forceinline__ static void run(const MqaLogitsParams& params, Storage& shared) {
        const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
        if (warp == kLoadWarp && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.q_map);
            ptx::prefetch_tensor_map(params.kv_map);
            ptx::prefetch_tensor_map(params.kv_sf_map);
            for (int i = 0; i < kMqaQueryStages; ++i) {
                ptx::mbarrier_init(shared.group_full[i], 1);
                ptx::mbarrier_init(shared.q_full[i], 2);
                ptx::mbarrier_init(shared.q_empty[i], 8 + kFp4 + 2);
            }
            for (int i = 0; i < kStages; ++i) {
                ptx::mbarrier_init(shared.kv_full[i], 1);
                ptx::mbarrier_init(shared.kv_empty[i], 4 + 1);
                if constexpr (kFp4) ptx::mbarrier_init(shared.scales_ready[i], 1);
            }
            for (int a = 0; a < 2; ++a) {
                ptx::mbarrier_init(shared.accumulator_full[a], 1);
                ptx::mbarrier_init(shared.accumulator_empty[a], 4);
            }
            ptx::fence_mbarrier_init();
        }
        if (warp == kMultiplyWarp) {
            tensor_memory_allocate<1>(&shared.tensor_memory, kTensorColumns);
            fence_before_sync();
        }
        __syncthreads();
        fence_after_sync();
        const uint32_t tensor_memory = shared.tensor_memory;
        ptx::grid_dependency_launch();
        ptx::grid_dependency_wait();
        if constexpr (!kPaged) find_dense_work<kType.threads(), kTokens>(params, shared.dense_work);

        if (warp == kLoadWarp) {
            load_tiles(params, shared);
        } else if (warp == kGroupWarp) {
            stage_mqa_groups<kPaged, kHeads, kTokens>(params, shared, kPaged ? paged_share(params) : PagedShare{});
        } else if (warp == kCleanWarp) {
            if (params.clean) clean_mqa_logits<kPaged, 32>(params, threadIdx.x % 32);
        } else if (warp == kMultiplyWarp) {
            if (ptx::elect_one()) multiply(params, shared, tensor_memory);
        } else if (kFp4 && warp == kTurnWarp) {
            turn_scales(params, shared);
        } else {
            sum_tiles(params, shared, (warp - kFirstSumWarp) / 4, warp % 4, tensor_memory);
        }

        fence_before_sync();
        __syncthreads();
        if (warp == kMultiplyWarp) tensor_memory_free<1>(tensor_memory, kTensorColumns);
    }

private:
    __device__ __forceinline__ static int tiles_of(const MqaGroup& group) {
        return (group.num_tiles * kMqaTileKeys + kMqaKeys - 1) / kMqaKeys;
    }

    // ---- warp 0 ----

    __device__ __forceinline__ static void load_tiles(const MqaLogitsParams& params, Storage& shared) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int lane = threadIdx.x % 32;
        QueryState q_state;
        KeyState kv_state;
        MqaTableEntries entries;
        if constexpr (kPaged) entries.load_first(params, paged_share(params), lane);
        while (true) {
            const int g = q_state.stage_idx;
            ptx::mbarrier_wait(shared.group_full[g], q_state.phase);
            const MqaGroup group = shared.groups[g];
            if (lane == 0) {
                if (group.num_tiles == 0) {
                    ptx::mbarrier_arrive(shared.q_full[g]);
                } else {
                    ptx::mbarrier_arrive_expect_tx(shared.q_full[g], params.q_rows * params.row_bytes);
                    ptx::tma_load_2d(params.q_map, shared.q_full[g], shared.q[g], 0, group.first_token * kHeads, kHint);
                }
            }
            if (group.num_tiles == 0) return;
            // All lanes have read the group before the keys come that let others give it back.
            __syncwarp();
            if constexpr (kPaged) {
                load_paged(params, shared, group, entries, kv_state);
            } else {
#pragma unroll 1
                for (int i = 0; i < tiles_of(group); ++i, kv_state.advance()) {
                    if (lane == 0) {
                        const int s = kv_state.stage_idx;
                        const int key = group.first_key + i * kMqaKeys;
                        expect_keys(params, shared, kv_state);
                        ptx::tma_load_2d(params.kv_map, shared.kv_full[s], shared.kv[s], 0, key, kHint);
                        ptx::tma_load_2d(params.kv_sf_map, shared.kv_full[s], shared.kv_sf[s], key, 0, kHint);
                    }
                }
            }
            q_state.advance();
        }
    }

    __device__ __forceinline__ static void expect_keys(const MqaLogitsParams& params, Storage& shared,
                                                       const KeyState& state) {
        ptx::mbarrier_wait(shared.kv_empty[state.stage_idx], state.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(shared.kv_full[state.stage_idx], kMqaKeys * (params.row_bytes + 4));
    }

    // Asks for the next 32 entries before it uses these. TMA reads blocks outside of the cache as zeros, whatever the entry
    // says.
    __device__ __forceinline__ static void load_paged(const MqaLogitsParams& params, Storage& shared,
                                                      const MqaGroup& group, MqaTableEntries& entries, KeyState& state) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int lane = threadIdx.x % 32;
        const int tile_blocks = kMqaKeys >> params.block_kv_log2;
        const int first = group.first_key >> params.block_kv_log2;
        const int num_blocks = tiles_of(group) * tile_blocks;
        if (entries.row != group.table_row || entries.first != first) entries.load(params, group.table_row, first, lane);
#pragma unroll 1
        for (int i = 0; i < num_blocks; i += 32) {
            const int blocks = entries.block;
            if (i + 32 < num_blocks) entries.load(params, group.table_row, first + i + 32, lane);
            const int count = min(32, num_blocks - i);
#pragma unroll 1
            for (int j = 0; j < count; j += tile_blocks, state.advance()) {
                const int s = state.stage_idx;
                if (lane == 0) expect_keys(params, shared, state);
#pragma unroll 1
                for (int part = 0; part < tile_blocks; ++part) {
                    const int block = __shfl_sync(kAllLanes, blocks, j + part);
                    if (lane != 0) continue;
                    const int key = part * params.block_kv;
                    ptx::tma_load_3d(params.kv_map, shared.kv_full[s], shared.kv[s] + key * params.row_bytes, 0, 0, block, kHint);
                    ptx::tma_load_2d(params.kv_sf_map, shared.kv_full[s], shared.kv_sf[s] + key, 0, block, kHint);
                }
            }
        }
    }

    // ---- warp 3 ----

    __device__ __forceinline__ static void multiply(const MqaLogitsParams& params, Storage& shared, uint32_t tensor_memory) {
        QueryState q_state;
        KeyState kv_state;
        PipelineState<2> accumulator;
        while (true) {
            const int g = q_state.stage_idx;
            ptx::mbarrier_wait(shared.q_full[g], q_state.phase);
            const int num_tiles = tiles_of(shared.groups[g]);
            if (num_tiles == 0) return;
            // Columns that are read from tensor memory 32 at a time.
            const int cols = (shared.groups[g].num_tokens * kHeads + 31) / 32 * 32;
            constexpr uint32_t kTypes = kFp4 ? 1u << 7 | 1u << 10 /* E2M1 */ | 1u << 23 /* UE8M0 */ : 1u << 4 /* FP32 */;
            const uint32_t instruction = kTypes | static_cast<uint32_t>(cols) >> 3 << 17 | 128u >> 4 << 24;
            const uint64_t queries = k_major_descriptor(shared.q[g], params.row_bytes);
            ptx::mbarrier_arrive(shared.q_empty[g]);  // for what this thread has read; the commit is for the queries
#pragma unroll 1
            for (int i = 0; i < num_tiles; ++i, kv_state.advance(), accumulator.advance()) {
                const int s = kv_state.stage_idx, a = accumulator.stage_idx;
                ptx::mbarrier_wait(shared.accumulator_empty[a], accumulator.phase ^ 1);
                ptx::mbarrier_wait(kFp4 ? shared.scales_ready[s] : shared.kv_full[s], kv_state.phase);
                fence_after_sync();
                if constexpr (kFp4) {
                    // Instructions that are queued read the scales before they are replaced: the queue keeps its order.
                    copy_scales<1>(tensor_memory + kKeyScales, shared.turned_kv_sf[s]);
                    if (i == 0) {
#pragma unroll
                        for (int group = 0; group < Storage::kScaleGroups; ++group) {
                            copy_scales<1>(tensor_memory + kQueryScales + group * 4, shared.turned_q_sf[g] + group * 128);
                        }
                    }
                }
                const uint32_t sums = tensor_memory + a * kType.cols();
                const uint64_t keys = k_major_descriptor(shared.kv[s], params.row_bytes);
#pragma unroll 1
                for (int step = 0; step < params.row_bytes / 32; ++step) {
                    const uint64_t row_step = keys + step * 2, col_step = queries + step * 2;
                    if constexpr (kFp4) {
                        const uint32_t byte = step * 2;
                        multiply_fp4(sums, row_step, col_step, instruction | byte << 29 | byte << 4,
                                     tensor_memory + kKeyScales, tensor_memory + kQueryScales, step > 0);
                    } else {
                        multiply_fp8(sums, row_step, col_step, instruction, step > 0);
                    }
                }
                commit<1>(shared.kv_empty[s]);
                if (i == num_tiles - 1) commit<1>(shared.q_empty[g]);
                commit<1>(shared.accumulator_full[a]);
            }
            q_state.advance();
        }
    }

    // ---- warp 12 ----

    __device__ __forceinline__ static void turn_scales(const MqaLogitsParams& params, Storage& shared) {
        const int lane = threadIdx.x % 32;
        QueryState q_state;
        KeyState kv_state;
        while (true) {
            const int g = q_state.stage_idx;
            ptx::mbarrier_wait(shared.group_full[g], q_state.phase);
            const int num_tiles = tiles_of(shared.groups[g]);
            if (num_tiles == 0) return;
#pragma unroll 1
            for (int i = 0; i < num_tiles; ++i, kv_state.advance()) {
                const int s = kv_state.stage_idx;
                ptx::mbarrier_wait(shared.kv_full[s], kv_state.phase);
                const uint32_t* words = shared.kv_sf[s] + lane;
                const uint32_t used = params.used_scales;
                shared.turned_kv_sf[s][lane] = make_uint4(words[0] & used, words[32] & used, words[64] & used, words[96] & used);
                ptx::fence_async_shared();
                release(shared.scales_ready[s]);
            }
            if (lane == 0) ptx::mbarrier_arrive(shared.q_empty[g]);  // the warp has met since all lanes read the group
            q_state.advance();
        }
    }

    // ---- warps 4 to 11 ----

    // Tiles of one parity, counted through all groups. `quarter`: of tensor memory's lanes.
    __device__ __forceinline__ static void sum_tiles(const MqaLogitsParams& params, Storage& shared, int parity, int quarter,
                                                     uint32_t tensor_memory) {
        const int lane = threadIdx.x % 32;
        const uint32_t accumulator = tensor_memory + (quarter * 32 << 16) + parity * kType.cols();
        QueryState q_state;
        KeyState kv_state;
        uint32_t phase = 0;
        int turn = 0;  // parity of the next tile
        while (true) {
            const int g = q_state.stage_idx;
            ptx::mbarrier_wait(shared.q_full[g], q_state.phase);
            const MqaGroup group = shared.groups[g];
            if (group.num_tiles == 0) return;
            const int end_key = group.first_key + group.num_tiles * kMqaTileKeys;
#pragma unroll 1
            for (int i = 0; i < tiles_of(group); ++i, kv_state.advance(), turn ^= 1) {
                if (turn != parity) continue;
                const int s = kv_state.stage_idx;
                ptx::mbarrier_wait(shared.kv_full[s], kv_state.phase);
                const uint32_t word = shared.kv_sf[s][quarter * 32 + lane];
                release(shared.kv_empty[s]);
                ptx::mbarrier_wait(shared.accumulator_full[parity], phase);
                phase ^= 1;
                fence_after_sync();
                const int key = group.first_key + i * kMqaKeys + quarter * 32 + lane;
                float scale = 1;
                bool factored;
                if constexpr (kFp4) {
                    factored = !has_large_scale(word & params.used_scales) && !shared.large_queries[g];
                } else {
                    scale = __uint_as_float(word);
                    factored = scale >= 0 && scale <= kMaxFactored;  // comparisons with a NaN are false
                }
                const auto done = [&] {
                    fence_before_sync();
                    release(shared.accumulator_empty[parity]);
                };
                if (__all_sync(kAllLanes, factored)) {
                    sum_tile<true>(params, shared, g, group, key, end_key, accumulator, scale, true, done);
                } else {
                    sum_tile<false>(params, shared, g, group, key, end_key, accumulator, scale, factored, done);
                }
            }
            release(shared.q_empty[g]);
            q_state.advance();
        }
    }

    __device__ __forceinline__ static void release(ptx::Barrier& barrier) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
    }

    // relu(x s) / 2, for scales that cannot be taken out: halved so that add_heads cannot make it infinite.
    __device__ __forceinline__ static float scaled_relu(float x, float scale) {
        float result;
        asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x * scale));  // unlike fmaxf it keeps a NaN
        return result * 0.5f;
    }

    // A tile of the thread's key: 32 columns at a time, of which the next ones are on their way while these are summed.
    template <bool kAllFactored, class Done>
    __device__ __forceinline__ static void sum_tile(const MqaLogitsParams& params, const Storage& shared, int q_stage,
                                                    const MqaGroup& group, int key, int end_key, uint32_t accumulator,
                                                    float scale, bool factored, Done&& done) {
        constexpr int kChunkTokens = kHeads < 32 ? 32 / kHeads : 1;
        constexpr int kTokenChunks = kHeads > 32 ? kHeads / 32 : 1;
        const int chunks = (group.num_tokens * kHeads + 31) / 32;
        const float factor = factored ? scale : 2;
        float sums[kChunkTokens];
        const auto add_heads = [&](int chunk, bool is_first, bool is_last, const uint32_t(&bits)[32]) {
            const auto* weights = reinterpret_cast<const float4*>(shared.weights[q_stage]) + chunk * 8;
            if (is_first) {
#pragma unroll
                for (int t = 0; t < kChunkTokens; ++t) sums[t] = 0;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 w = weights[i];
                const float each[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float x = __uint_as_float(bits[4 * i + j]);
                    if (!kAllFactored && !factored) x = scaled_relu(x, scale);
                    float& sum = sums[kHeads < 32 ? (4 * i + j) / kHeads : 0];
                    // x + |x| is 2 relu(x), and the weights are halved.
                    sum = fmaf(x + fabsf(x), each[j], sum);
                }
            }
            // Before the next wait: the compiler would add up behind it, where nothing is on its way.
#pragma unroll
            for (int t = 0; t < kChunkTokens; ++t) asm volatile("" : "+f"(sums[t])::"memory");
            if (!is_last) return;
#pragma unroll
            for (int t = 0; t < kChunkTokens; ++t) {
                const int token = kHeads < 32 ? chunk * kChunkTokens + t : chunk / kTokenChunks;
                if (token < group.num_tokens) store(params, shared, q_stage, group.first_token, token, key, end_key, sums[t] * factor);
            }
        };
        uint32_t even[32], odd[32];
        load_columns(accumulator, even);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk += 2) {
            load_wait(even);
            const bool is_odd_end = kTokenChunks == 1 && chunk + 1 == chunks;
            if (is_odd_end) {
                done();
            } else {
                load_columns(accumulator + (chunk + 1) * 32, odd);
            }
            add_heads(chunk, true, kTokenChunks == 1, even);
            if (is_odd_end) break;
            load_wait(odd);
            if (chunk + 2 < chunks) load_columns(accumulator + (chunk + 2) * 32, even);
            if (chunk + 2 >= chunks) done();
            add_heads(chunk + 1, kTokenChunks == 1, true, odd);
        }
    }

    __device__ __forceinline__ static void store(const MqaLogitsParams& params, const Storage& shared, int q_stage,
                                                 int first_token, int token, int key, int end_key, float value) {
        const KeyRange range = shared.ranges[q_stage][token];
        if (key < range.begin || key >= min(range.end, end_key)) return;
        const long long at = (first_token + token) * params.logits_stride + key - (params.compressed ? range.begin : 0);
        if (params.logit_bytes == 4) {
            static_cast<float*>(params.logits)[at] = value;
        } else {
            static_cast<__nv_bfloat16*>(params.logits)[at] = __float2bfloat16_rn(value);
        }
    }
};

template <int kHeads, bool kPaged, bool kFp4>
__global__ void __launch_bounds__(MqaType{kFp4}.threads(), 1)
    sm100_mqa_logits(const __grid_constant__ MqaLogitsParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    MqaKernel<kHeads, kPaged, kFp4>::run(params, *reinterpret_cast<MqaStorage<kHeads, kFp4>*>(shared_memory));
#endif
}

}  // namespace deep_gemm::sm100
