// Scores of the lightning indexer for Hopper:
//
//   logits[i, j] = sum_h relu(q[i, h] . kv[j] * kv_sf[j]) * weights[i, h],  begin(i) <= j < end(i),  FP8 q and kv
//
// Keys are the rows of the wgmma instruction, 64 to a warpgroup's tile; its columns are (token, head) pairs, so that a
// token's heads are summed inside of a quad of threads. K is the whole head dimension: one tile is head_dim / 32
// instructions for each of a warpgroup's accumulators. For a scale s >= 0, relu(x s) = s relu(x): an element costs a
// comparison and an FMA where it is positive, and the scale is applied to the sum of the heads. Where a warp meets a scale
// that is negative, huge, Inf or NaN it multiplies each product instead, as the formula says.
//
// Beside another warpgroup's products FP32 instructions make these wait (docs/measured.md), presumably for registers, where
// accumulators are read and written all the time. So little else is done for a tile.
//
// A CTA works on a run of groups (device/mqa_logits_schedule.cuh): the queries of a group stay in shared memory, its weights in
// registers, while tiles of keys pass. Tile n of the run belongs to consumer warpgroup n modulo their number. A warpgroup
// issues the products of its next tile, which may belong to the next group, as soon as an accumulator has been summed, and
// then reduces across the quad and stores.
//
// Warpgroup 0 produces: warp 0 issues the TMA loads, warp 1 walks the groups and stages weights and ranges, warps 2 and 3
// set logits outside of the ranges to -inf. They write what the consumers do not, so nobody waits for them. Before that, with
// a cache, they fetch into L2 what the others read first: a call of few keys is as long as its chain of loads.
//
// barrier        arrivals                      guards
// group_full[g]  1 (warp 1)                    query stage g says which group it is for, to warp 0
// q_full[g]      2 (warps 0, 1), and the bytes queries, weights and ranges of the group are there
// q_empty[g]     consumer warps                query stage g may be overwritten
// kv_full[s]     1 (warp 0), and the bytes     keys and scales of stage s are there
// kv_empty[s]    4 (warps of its warpgroup)    stage s may be overwritten
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "../device/mqa_logits_producer.cuh"
#include "../device/mqa_logits_schedule.cuh"
#include "../device/pipeline.cuh"
#include "../device/ptx_tma.cuh"
#include "../device/warp.cuh"
#include "mqa_logits_instances.h"
#include "mqa_logits_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

template <int kRowIndex>
struct MqaTraits {
    static constexpr MqaLayout kLayout{kMqaRows[kRowIndex]};
};

template <class Traits>
struct alignas(1024) MqaStorage {
    static constexpr MqaLayout kLayout = Traits::kLayout;
    static constexpr int kStages = kLayout.num_stages();
    static constexpr bool kQueryScales = false;
    static constexpr float kWeightFactor = 1;
    static constexpr bool kMarksTokens = true;

    uint8_t kv[kStages][kLayout.kv_bytes()];            // FP8 [64][head_dim], swizzled over a whole row
    uint8_t q[kMqaQueryStages][kLayout.q_bytes()];      // FP8 [tile_cols][head_dim], likewise
    alignas(128) float kv_sf[kStages][kMqaTileKeys];
    alignas(16) float weights[kMqaQueryStages][kLayout.row.tile_cols()];
    KeyRange ranges[kMqaQueryStages][kLayout.row.tile_tokens()];
    float marks[kMqaQueryStages][kLayout.row.tile_tokens()];  // added to a token's logits: NaN where a weight is not finite
    MqaGroup groups[kMqaQueryStages];
    DenseWorkStorage dense_work;
    ptx::Barrier group_full[kMqaQueryStages];
    ptx::Barrier q_full[kMqaQueryStages];
    ptx::Barrier q_empty[kMqaQueryStages];
    ptx::Barrier kv_full[kStages];
    ptx::Barrier kv_empty[kStages];
};

// The low and high words of a descriptor of a K-major tile of 8-bit values whose rows are one swizzle span of kSpan bytes.
template <int kSpan>
struct SpanDescriptor {
    static constexpr uint32_t kSwizzle = kSpan == 128 ? 1 : kSpan == 64 ? 2 : 3;
    static constexpr uint32_t kHigh = kSwizzle << 30 | (8 * kSpan) >> 4 /* between groups of 8 rows */;

    __device__ __forceinline__ static uint32_t low(const void* tile) { return 1u << 16 | ptx::smem_address(tile) >> 4; }

    // `step`: of 32 values along K.
    __device__ __forceinline__ static uint64_t at(uint32_t low, int step) {
        return static_cast<uint64_t>(kHigh) << 32 | (low + step * (32 / 16));
    }
};

template <class Traits>
class MqaKernel {
    static constexpr MqaLayout kLayout = Traits::kLayout;
    static constexpr MqaRow kRow = kLayout.row;
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kWarpgroups = kRow.warpgroups;
    static constexpr int kHeads = kRow.heads;
    static constexpr int kHeadDim = kRow.head_dim;
    static constexpr int kCols = kRow.cols;
    static constexpr int kParts = kRow.parts;
    static constexpr int kPartTokens = kRow.part_tokens();
    static constexpr int kTokens = kRow.tile_tokens();
    static constexpr int kSums = 2 * kPartTokens;                 // of a thread's columns: a token's, for each of two keys
    static constexpr int kOutputs = kSums >= 4 ? kSums / 4 : 1;   // of a thread, once a quad's sums are added
    static constexpr int kOutputTokens = (kOutputs + 1) / 2;
    static constexpr uint32_t kMaxFactored = 0x5f800000;  // 2^64: scales up to this may be taken out of the sum
    static constexpr int kKeyStep = kWarpgroups * kMqaTileKeys;  // between the tiles of a warpgroup

    using Storage = MqaStorage<Traits>;
    using QueryState = PipelineState<kMqaQueryStages>;
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

public:
    __device__ __forceinline__ static void run(const MqaLogitsParams& params, Storage& shared) {
        const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
        if (warp == 0 && ptx::elect_one()) {
            ptx::prefetch_tensor_map(params.q_map);
            ptx::prefetch_tensor_map(params.kv_map);
            ptx::prefetch_tensor_map(params.kv_sf_map);
            for (int i = 0; i < kMqaQueryStages; ++i) {
                ptx::mbarrier_init(shared.group_full[i], 1);
                ptx::mbarrier_init(shared.q_full[i], 2);
                ptx::mbarrier_init(shared.q_empty[i], 4 * kWarpgroups);
            }
            for (int i = 0; i < kStages; ++i) {
                ptx::mbarrier_init(shared.kv_full[i], 1);
                ptx::mbarrier_init(shared.kv_empty[i], 4);
            }
            ptx::fence_mbarrier_init();
        }
        if (kRow.paged && warp >= 2 && warp < 4) prefetch_paged_inputs<64>(params, kHeads, threadIdx.x - 64);
        ptx::grid_dependency_launch();
        ptx::grid_dependency_wait();
        // On its way while the barriers are set up, where this CTA is the last to start.
        PagedShare share = {};
        if constexpr (kRow.paged) share = paged_share(params);
        __syncthreads();
        if constexpr (!kRow.paged) find_dense_work<kLayout.num_threads(), kTokens>(params, shared.dense_work);

        if (warp < 4) {
            shrink_registers<kLayout.producer_registers()>();
            if (warp == 0) load_tiles(params, shared, share);
            if (warp == 1) stage_mqa_groups<kRow.paged, kHeads, kTokens>(params, shared, share);
            if (warp >= 2 && params.clean) clean_mqa_logits<kRow.paged, 64>(params, threadIdx.x - 64);
        } else {
            grow_registers<kLayout.consumer_registers()>();
            consume(params, shared, warp / 4 - 1);
        }
    }

private:
    // ---- producer, warp 0 ----

    // Where the next tile of keys goes. No more than kMostInFlight tiles are on their way at a time, about twice what hides the
    // latency of memory. Were it all stages, 26 MB of keys of all SMs would be asked for at the start, and what a CTA that
    // starts a little later reads before its keys, the schedule, lengths and weights, would wait behind them.
    struct KeyRing {
        static constexpr int kMostInFlight = 8;
        static_assert(kStages > kMostInFlight);
        PipelineState<kStages> next;
        LoadLimit<kStages> limit{kMostInFlight};

        // All lanes, for the next tile's stage.
        __device__ __forceinline__ void wait(Storage& shared) {
            limit.wait(shared.kv_full);
            ptx::mbarrier_wait(shared.kv_empty[next.stage_idx], next.phase ^ 1);
        }

        __device__ __forceinline__ void advance() { next.advance(); }
    };

    __device__ __forceinline__ static void load_tiles(const MqaLogitsParams& params, Storage& shared, const PagedShare& share) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int lane = threadIdx.x % 32;
        QueryState q_state;
        KeyRing kv_ring;
        MqaTableEntries entries;
        if constexpr (kRow.paged) entries.load_first(params, share, lane);
        while (true) {
            const int g = q_state.stage_idx;
            ptx::mbarrier_wait(shared.group_full[g], q_state.phase);
            const MqaGroup group = shared.groups[g];
            // The election also sees to it that all lanes have read the group before the keys come that let consumers give
            // it back.
            if (ptx::elect_one()) {
                if (group.num_tiles == 0) {
                    ptx::mbarrier_arrive(shared.q_full[g]);
                } else {
                    ptx::mbarrier_arrive_expect_tx(shared.q_full[g], kLayout.q_bytes());
                    ptx::tma_load_2d(params.q_map, shared.q_full[g], shared.q[g], 0, group.first_token * kHeads, kHint);
                }
            }
            if (group.num_tiles == 0) return;
            if constexpr (kRow.paged) {
                load_paged(params, shared, group, entries, kv_ring);
            } else {
#pragma unroll 1
                for (int i = 0; i < group.num_tiles; ++i) {
                    const int s = kv_ring.next.stage_idx;
                    const int key = group.first_key + i * kMqaTileKeys;
                    kv_ring.wait(shared);
                    if (ptx::elect_one()) {
                        ptx::mbarrier_arrive_expect_tx(shared.kv_full[s], kLayout.kv_bytes() + kLayout.scale_bytes());
                        ptx::tma_load_2d(params.kv_map, shared.kv_full[s], shared.kv[s], 0, key, kHint);
                        ptx::tma_load_2d(params.kv_sf_map, shared.kv_full[s], shared.kv_sf[s], key, 0, kHint);
                    }
                    kv_ring.advance();
                }
            }
            q_state.advance();
        }
    }

    // Asks for the next 32 entries before it uses these. TMA reads blocks outside of the cache as zeros, whatever the entry
    // says.
    __device__ __forceinline__ static void load_paged(const MqaLogitsParams& params, Storage& shared,
                                                      const MqaGroup& group, MqaTableEntries& entries, KeyRing& ring) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        const int lane = threadIdx.x % 32;
        const int tile_blocks = kMqaTileKeys >> params.block_kv_log2;
        const int block_bytes = params.block_kv * kHeadDim;
        const int first = group.first_key >> params.block_kv_log2;
        const int num_blocks = group.num_tiles * tile_blocks;
        if (entries.row != group.table_row || entries.first != first) entries.load(params, group.table_row, first, lane);
#pragma unroll 1
        for (int i = 0; i < num_blocks; i += 32) {
            const int blocks = entries.block;
            if (i + 32 < num_blocks) entries.load(params, group.table_row, first + i + 32, lane);
            const int count = min(32, num_blocks - i);
#pragma unroll 1
            for (int j = 0; j < count; j += tile_blocks) {
                const int upper = __shfl_sync(kAllLanes, blocks, j);
                const int lower = __shfl_sync(kAllLanes, blocks, j + tile_blocks - 1);
                const int s = ring.next.stage_idx;
                ptx::Barrier& full = shared.kv_full[s];
                ring.wait(shared);
                // Of one thread, and the compiler knows it: from a lane that was asked for by number each copy would be a
                // loop over the lanes.
                if (ptx::elect_one()) {
                    ptx::mbarrier_arrive_expect_tx(full, kLayout.kv_bytes() + kLayout.scale_bytes());
                    ptx::tma_load_3d(params.kv_map, full, shared.kv[s], 0, 0, upper, kHint);
                    ptx::tma_load_2d(params.kv_sf_map, full, shared.kv_sf[s], 0, upper, kHint);
                    if (tile_blocks == 2) {
                        ptx::tma_load_3d(params.kv_map, full, shared.kv[s] + block_bytes, 0, 0, lower, kHint);
                        ptx::tma_load_2d(params.kv_sf_map, full, shared.kv_sf[s] + params.block_kv, 0, lower, kHint);
                    }
                }
                ring.advance();
            }
        }
    }

    // ---- consumers ----

    // What the sums of a thread's keys, two of a tile, 8 apart, are multiplied by.
    struct Scales {
        float upper, lower;
        bool factored;  // whether every scale of the warp may be taken out of the sum

        __device__ __forceinline__ float of(int key) const { return key % 2 == 0 ? upper : lower; }
    };

    // Where a thread's results of one token go: the only one that it is left with, or the upper one and that of the key 8
    // further.
    struct Output {
        char* begin;     // of the token's range
        int past;        // keys from there to that of the thread in its next tile; negative in front of the range
        unsigned count;  // keys of the range; 0 where another lane stores the same
        float mark;      // of the token: heads that are not positive are left out, so their weights are not seen
    };

    // What a thread keeps of a group, for one accumulator.
    struct Part {
        float weights[kCols / 4];  // of the thread's columns, two of every eight
        Output outputs[kOutputTokens];
    };

    // Scales are read before the tile's products are issued: behind them the read would wait until they are done.
    __device__ __forceinline__ static void read_scales(const Storage& shared, int stage, int row, Scales& scales) {
        scales.upper = shared.kv_sf[stage][row];
        scales.lower = shared.kv_sf[stage][row + 8];
    }

    // Words of scales that may be taken out are not above kMaxFactored's: others have a sign or a large exponent.
    __device__ __forceinline__ static void classify(Scales& scales) {
        const uint32_t largest = max(__float_as_uint(scales.upper), __float_as_uint(scales.lower));
        scales.factored = __reduce_max_sync(kAllLanes, largest) <= kMaxFactored;
    }

    __device__ __forceinline__ static float relu(float x) {
        float result;
        asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));  // unlike fmaxf it keeps a NaN
        return result;
    }

    // sum += relu(x) weight.
    __device__ __forceinline__ static void add_relu(float x, float weight, float& sum) {
        asm("{\n"
            ".reg .pred counts;\n"
            "setp.gtu.f32 counts, %1, 0f00000000;\n"  // or NaN
            "@counts fma.rn.f32 %0, %1, %2, %0;\n"
            "}"
            : "+f"(sum)
            : "f"(x), "f"(weight));
    }

    __device__ __forceinline__ static void read_weights(const Storage& shared, int q_stage, int index, int lane,
                                                        Part& part) {
        const auto* weights = reinterpret_cast<const float2*>(shared.weights[q_stage] + index * kCols) + lane % 4;
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
            const float2 pair = weights[4 * j];
            part.weights[2 * j] = pair.x;
            part.weights[2 * j + 1] = pair.y;
        }
    }

    // `key`: the thread's upper one in the first tile.
    __device__ __forceinline__ static void read_outputs(const MqaLogitsParams& params, const Storage& shared, int q_stage,
                                                        int index, int key, int lane, Part& part) {
#pragma unroll
        for (int i = 0; i < kOutputTokens; ++i) {
            const int sum = kSums >= 4 ? lane % 4 * kOutputs + 2 * i : lane % 4 / 2;  // see store()
            const int token = index * kPartTokens + sum / 2;
            const KeyRange range = shared.ranges[q_stage][token];
            const long long row = (shared.groups[q_stage].first_token + token) * params.logits_stride;
            const int column = params.compressed ? 0 : range.begin;
            Output& output = part.outputs[i];
            output.begin = static_cast<char*>(params.logits) + (row + column) * params.logit_bytes;
            output.past = (kOutputs > 1 ? key : key + sum % 2 * 8) - range.begin;
            output.count = kSums == 2 && lane % 2 == 1 ? 0 : max(range.end - range.begin, 0);
            output.mark = shared.marks[q_stage][token];
        }
    }

    // Low words of descriptors, which the compiler knows to be the same in all threads: so it keeps them in uniform registers.
    __device__ __forceinline__ static uint32_t rows_of_stage(const Storage& shared, int stage) {
        return uniform(SpanDescriptor<kHeadDim>::low(shared.kv[0]) + stage * (kLayout.kv_bytes() / 16));
    }
    __device__ __forceinline__ static uint32_t cols_of_stage(const Storage& shared, int q_stage) {
        return uniform(SpanDescriptor<kHeadDim>::low(shared.q[0]) + q_stage * (kLayout.q_bytes() / 16));
    }

    __device__ __forceinline__ static void multiply(uint32_t rows, uint32_t cols, int part, float (&accumulator)[kCols / 2]) {
        using Operand = SpanDescriptor<kHeadDim>;
        cols += part * (kCols * kHeadDim / 16);
        pin_registers(accumulator);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 32; ++step) {
            wgmma<kCols>(Operand::at(rows, step), Operand::at(cols, step), accumulator, step > 0);
        }
        wgmma_commit();
    }

    // Sums the weighted heads of this thread's columns: sums[2 t] for the upper key and token t, sums[2 t + 1] for the
    // lower.
    __device__ __forceinline__ static void add_heads(const Scales& scales, const Part& part,
                                                     float (&accumulator)[kCols / 2], float (&sums)[kSums]) {
        pin_registers(accumulator);
        if (!scales.factored) {
#pragma unroll
            for (int i = 0; i < kCols / 2; ++i) accumulator[i] = relu(accumulator[i] * scales.of(i / 2));
        }
#pragma unroll
        for (int t = 0; t < kPartTokens; ++t) {
            float upper, lower;
#pragma unroll
            for (int i = 0; i < kHeads / 8; ++i) {
                const int j = t * (kHeads / 8) + i;
                const float* x = accumulator + 4 * j;
                if (i == 0) {
                    upper = relu(x[0]) * part.weights[2 * j];
                    lower = relu(x[2]) * part.weights[2 * j];
                } else {
                    add_relu(x[0], part.weights[2 * j], upper);
                    add_relu(x[2], part.weights[2 * j], lower);
                }
                add_relu(x[1], part.weights[2 * j + 1], upper);
                add_relu(x[3], part.weights[2 * j + 1], lower);
            }
            sums[2 * t] = upper;
            sums[2 * t + 1] = lower;
        }
    }

    // Adds lane pairs `kLane` apart. Each lane keeps half of the sums, the upper half where its bit is set; of one sum both
    // keep it.
    template <int kLane, int kCount>
    __device__ __forceinline__ static void add_lanes(int lane, const float* in, float* out) {
        if constexpr (kCount == 1) {
            out[0] = in[0] + __shfl_xor_sync(kAllLanes, in[0], kLane);
        } else {
            const bool upper = lane & kLane;
#pragma unroll
            for (int i = 0; i < kCount / 2; ++i) {
                const float keep = upper ? in[kCount / 2 + i] : in[i];
                const float send = upper ? in[i] : in[kCount / 2 + i];
                out[i] = keep + __shfl_xor_sync(kAllLanes, send, kLane);
            }
        }
    }

    // Adds the sums of a quad and stores: lane q of it ends up with the q-th quarter of the sums, with a half of one token's
    // where there are two. A warp writes 8 consecutive keys of a token at once. Then moves on to the next tile.
    __device__ __forceinline__ static void store(const MqaLogitsParams& params, const Scales& scales, int lane, Part& part,
                                                 const float (&sums)[kSums]) {
        float half[kSums / 2];
        float values[kOutputs];
        add_lanes<2, kSums>(lane, sums, half);
        add_lanes<1, kSums / 2>(lane, half, values);
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const int key = kOutputs > 1 ? i : kSums == 4 ? lane : lane / 2;  // even: the upper one
            values[i] = fmaf(values[i], scales.factored ? scales.of(key) : 1.0f, part.outputs[i / 2].mark);
        }
        const auto store_as = [&]<class T>(T*, auto&& convert) {
#pragma unroll
            for (int i = 0; i < kOutputs; ++i) {
                const Output& output = part.outputs[i / 2];
                T* const address = reinterpret_cast<T*>(output.begin) + output.past;
                if (static_cast<unsigned>(output.past + i % 2 * 8) < output.count) address[i % 2 * 8] = convert(values[i]);
            }
        };
        if (params.logit_bytes == 4) {
            store_as(static_cast<float*>(nullptr), [](float x) { return x; });
        } else {
            store_as(static_cast<__nv_bfloat16*>(nullptr), [](float x) { return __float2bfloat16_rn(x); });
        }
#pragma unroll
        for (Output& output : part.outputs) output.past += kKeyStep;
    }

    __device__ __forceinline__ static void release(ptx::Barrier& empty, int lane) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty);
    }

    // The stage of this warpgroup's next tile.
    struct Position {
        int stage;
        uint32_t phase;

        __device__ __forceinline__ Position next() const {
            const int further = stage + kWarpgroups;
            return further >= kStages ? Position{further - kStages, phase ^ 1} : Position{further, phase};
        }
    };

    __device__ __forceinline__ static void consume(const MqaLogitsParams& params, Storage& shared, int warpgroup) {
        const int lane = threadIdx.x % 32;
        const int warp = uniform(static_cast<int>(threadIdx.x) / 32 % 4);
        const int row = warp * 16 + lane / 4;  // of a tile: the thread's upper key
        float accumulators[kParts][kCols / 2];
        Part parts[kParts];
        Scales scales;
        QueryState q_state;
        Position position = {uniform(warpgroup), 0};
        int in_group = position.stage;  // the warpgroup's next tile, counted from the group's first
        const auto first_key = [&](int q_stage) {
            return shared.groups[q_stage].first_key + in_group * kMqaTileKeys + row;
        };

        // One tile, whose first products are on their way, and nothing else: the assembler takes no more than that around
        // a loop. Issues those of the next tile, in query stage `next_q`.
        const auto step = [&](auto is_new_group, int next_q) {
            constexpr bool kNewGroup = decltype(is_new_group)::value;
            const Position next = position.next();
            const uint32_t rows = rows_of_stage(shared, next.stage), cols = cols_of_stage(shared, next_q);
            Scales next_scales;
            float sums[kSums];
            wgmma_wait<0>();
            pin_registers(accumulators[0]);
            if constexpr (kParts == 2) {
                multiply(rows_of_stage(shared, position.stage), cols_of_stage(shared, q_state.stage_idx), 1, accumulators[1]);
            }
            add_heads(scales, parts[0], accumulators[0], sums);
            ptx::mbarrier_wait(shared.kv_full[next.stage], next.phase);
            read_scales(shared, next.stage, row, next_scales);
            if constexpr (kNewGroup) read_weights(shared, next_q, 0, lane, parts[0]);
            multiply(rows, cols, 0, accumulators[0]);
            if constexpr (kParts == 1) release(shared.kv_empty[position.stage], lane);
            store(params, scales, lane, parts[0], sums);
            if constexpr (kNewGroup) read_outputs(params, shared, next_q, 0, first_key(next_q), lane, parts[0]);
            if constexpr (kParts == 2) {
                wgmma_wait<1>();
                add_heads(scales, parts[1], accumulators[1], sums);
                release(shared.kv_empty[position.stage], lane);
                if constexpr (kNewGroup) read_weights(shared, next_q, 1, lane, parts[1]);
                store(params, scales, lane, parts[1], sums);
                if constexpr (kNewGroup) read_outputs(params, shared, next_q, 1, first_key(next_q), lane, parts[1]);
            }
            classify(next_scales);
            scales = next_scales;
            position = next;
        };

        while (true) {
            ptx::mbarrier_wait(shared.q_full[q_state.stage_idx], q_state.phase);
            int num_tiles = uniform(shared.groups[q_state.stage_idx].num_tiles);
            if (num_tiles == 0) return;
            if (in_group >= num_tiles) {
                in_group -= num_tiles;
                release(shared.q_empty[q_state.stage_idx], lane);
                q_state.advance();
                continue;
            }
            ptx::mbarrier_wait(shared.kv_full[position.stage], position.phase);
            read_scales(shared, position.stage, row, scales);
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                read_weights(shared, q_state.stage_idx, p, lane, parts[p]);
                read_outputs(params, shared, q_state.stage_idx, p, first_key(q_state.stage_idx), lane, parts[p]);
            }
            classify(scales);
            multiply(rows_of_stage(shared, position.stage), cols_of_stage(shared, q_state.stage_idx), 0, accumulators[0]);

            while (true) {
#pragma unroll 1
                for (; in_group + kWarpgroups < num_tiles; in_group += kWarpgroups) {
                    step(std::false_type(), q_state.stage_idx);
                }
                in_group += kWarpgroups - num_tiles;
                QueryState next_state = q_state;
                next_state.advance();
                ptx::mbarrier_wait(shared.q_full[next_state.stage_idx], next_state.phase);
                num_tiles = uniform(shared.groups[next_state.stage_idx].num_tiles);
                // None of its tiles may be this warpgroup's: then this one has to be given back before a further one.
                if (in_group >= num_tiles) break;
                step(std::true_type(), next_state.stage_idx);
                release(shared.q_empty[q_state.stage_idx], lane);
                q_state = next_state;
            }

            float sums[kSums];
            wgmma_wait<0>();
            pin_registers(accumulators[0]);
            if constexpr (kParts == 2) {
                multiply(rows_of_stage(shared, position.stage), cols_of_stage(shared, q_state.stage_idx), 1, accumulators[1]);
            }
            add_heads(scales, parts[0], accumulators[0], sums);
            store(params, scales, lane, parts[0], sums);
            if constexpr (kParts == 2) {
                wgmma_wait<0>();
                add_heads(scales, parts[1], accumulators[1], sums);
                store(params, scales, lane, parts[1], sums);
            }
            release(shared.kv_empty[position.stage], lane);
            position = position.next();
            release(shared.q_empty[q_state.stage_idx], lane);
            q_state.advance();
        }
    }
};

// One kernel per row of the table; the row's index is the whole template argument.
template <int kRowIndex>
__global__ void __launch_bounds__(MqaTraits<kRowIndex>::kLayout.num_threads(), 1)
    sm90_fp8_mqa_logits(const __grid_constant__ MqaLogitsParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Traits = MqaTraits<kRowIndex>;
    MqaKernel<Traits>::run(params, *reinterpret_cast<MqaStorage<Traits>*>(shared_memory));
#endif
}

}  // namespace deep_gemm::sm90
