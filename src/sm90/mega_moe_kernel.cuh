// Mega MoE for Hopper: the whole expert layer of a rank in one persistent kernel. For each token t of any rank and each of
// its choices c that names an expert e of this rank:
//   h = quantise(silu(x_t G_e^T) * (x_t U_e^T) * weight_tc),   combine[t, c] = h D_e^T  (into the buffer of t's rank),
// then for the tokens of this rank y_t = sum_c combine[t, c], in the order of c. FP8 operands with FP32 scales, per token
// and 128 elements or per 128 x 128 block of weights, or BF16. Sums are FP32; gates and ups are rounded to BF16 before
// SwiGLU and combine[t, c] is BF16, as where every step is an operator of its own. Or tokens are FP8 and weights FP4, both
// with UE8M0 scales per 32 of K: consumers expand the weights as those of single products do (fp4_rows.cuh).
//
// The weights are the instruction's M side, 256 rows of a tile, and tokens its N side, kTokens of one expert. l1 holds
// eight gates, then the eight ups that belong to them, and so on: a thread's accumulators are a gate and its up, in the
// same column. A tile of the first linear is 128 of h's columns, which share a scale for each token.
//
// The protocol between ranks and between CTAs, and why it cannot deadlock: docs/mega_moe.md. In short, in this order:
//   enter     CTA 0 tells all ranks that this one's inputs are there; every CTA waits for all ranks to say so
//   route     all threads go through all ranks' choices and give those of this rank's experts a place in their lists
//   dispatch  warps copy tokens into the pool, expert by expert, padded to blocks of kTokens; a counter for each block
//   compute   CTAs take tiles off a list: those of the first linear, and of the second one some blocks later
//   leave     the last CTA tells all ranks that their results are written; every CTA waits for all to say so
//   combine   all threads sum this rank's tokens up; counters are put back to zero
//
// Warpgroup 0: thread 0 loads weights, one of warp 1 tokens and their scales, warp 2 takes tiles and loads block scales,
// warp 3 dispatches. Tiles go from warp 2 to the other roles in a queue.
// Warpgroups 1 and 2 dispatch, too, before they begin to consume: w has rows (2 p + w) 64 .. of the tile in its part p.
//
// barrier        arrivals                                    guards
// full[s]        2 (weights' thread, tokens' thread), bytes  stage s is filled, scales per 32 included
// empty[s]       consumer warps                              stage s may be overwritten
// scales_full    1 (warp 2)                                  a chunk of block scales is there
// scales_empty   consumer warps                              the chunk may be overwritten
// tile full[s]   1 (a lane of warp 2)                        a tile is in slot s of the queue
// tile empty[s]  consumer warps, weights', tokens' thread    all roles are done with it
// named 1        256                                         results of the first linear in shared memory; chosen experts
// named 2 + w    128                                         results of the second one, of warpgroup w
#pragma once

#include <cuda_bf16.h>

#include "../cast/swiglu.cuh"
#include "../device/mega_moe_params.h"
#include "../device/pipeline.cuh"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "../device/tile_scheduler.cuh"
#include "fp4_rows.cuh"
#include "mega_moe_traits.h"
#include "wgmma.cuh"

extern "C" __device__ void __assertfail(const char* condition, const char* file, unsigned line, const char* function,
                                        size_t char_bytes);

namespace deep_gemm::sm90 {

// ---- between CTAs and ranks ----

__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t* p) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* p) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* p) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ void store_release_gpu(uint32_t* p, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ void store_release_sys(uint32_t* p, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ void store_release_sys(uint64_t* p, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void add_release_gpu(uint32_t* p, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// Counts a CTA; true for the last of the grid, which finds what the others wrote before. The counter is at 0 again then.
__device__ __forceinline__ bool is_last_cta(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(gridDim.x - 1) : "memory");
    return before == gridDim.x - 1;
}
// Memory that other CTAs have written with ordinary stores is read by bulk copies, and the other way round: in the thread
// that wrote, and in the one that issues the copies.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Brings 16-byte aligned memory, a multiple of 16 bytes, into L2.
__device__ __forceinline__ void prefetch_l2(const void* source, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ uint64_t global_time_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Polls until `done()`; false when that takes too long.
template <class Done>
__device__ __forceinline__ bool wait_until(Done&& done, uint64_t timeout_ns) {
    if (done()) return true;
    const uint64_t start = global_time_ns();
#pragma unroll 1
    while (!done()) {
        __nanosleep(20);
        if (global_time_ns() - start > timeout_ns) return false;
    }
    return true;
}

// `rank` was late: a note for the kernel behind this one. A message from here would be a function call, beside which ptxas
// serialises wgmma. False.
__device__ __forceinline__ bool give_up(MegaMoeHeader& header, MegaMoeStep step, int rank) {
    atomicCAS(&header.failure, 0u, static_cast<uint32_t>(step) << 16 | static_cast<uint32_t>(rank));
    return false;
}

// threadIdx.x, read again each time: the compiler keeps the builtin in a register from beginning to end, or spills it.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// ---- tiles ----

// A tile of weights for a block of tokens, on its way from the warp that takes it to the roles that work on it.
struct alignas(16) MegaTile {
    int is_second;     // of the linears
    int num_k_blocks;  // -1: there are no more tiles
    int weights;       // which tile of the expert's matrix
    int weight_row;    // where it begins, in the matrices of all experts
    int expert;
    int block;         // of tokens
    int first;         // of the block's tokens, in the expert's list
    int count;
};

// All tiles in the order in which they are taken. The second linear of a block comes `lag` blocks behind its first one:
//   first(0) .. first(lag - 1), first(lag) second(0), first(lag + 1) second(1), ..., second(blocks - 1).
struct MegaTileList {
    int num_blocks, first_tiles, second_tiles, lag;

    __device__ __forceinline__ int size() const { return num_blocks * (first_tiles + second_tiles); }

    __device__ __forceinline__ void locate(int index, MegaTile& tile) const {
        const int head = lag * first_tiles, pair = first_tiles + second_tiles, both = num_blocks - lag;
        if (index < head) {
            set(tile, false, index / first_tiles, index % first_tiles);
        } else if (index < head + both * pair) {
            const int step = (index - head) / pair, of_pair = (index - head) % pair;
            const bool is_second = of_pair >= first_tiles;
            set(tile, is_second, is_second ? step : lag + step, is_second ? of_pair - first_tiles : of_pair);
        } else {
            index -= head + both * pair;
            set(tile, true, both + index / second_tiles, index % second_tiles);
        }
    }

private:
    __device__ __forceinline__ static void set(MegaTile& tile, bool is_second, int block, int weights) {
        tile.is_second = is_second;
        tile.block = block;
        tile.weights = weights;
    }
};

template <int kTokens, MegaMoeType kType>
class MegaMoeKernel {
public:
    static constexpr MegaMoeLayout kLayout{kTokens, kType};

private:
    static_assert(kLayout.invalid_reason() == nullptr);
    static constexpr bool kBF16 = kLayout.is_bf16(), kFP4 = kLayout.is_fp4();
    static constexpr bool kBlockScales = kType == MegaMoeType::kFP8;
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kBlockK = kMegaBlockBytes / (kBF16 ? 2 : 1);
    static constexpr int kWeightBlockK = kFP4 ? kPackedBlockK : kBlockK;  // elements of their tensor map
    static constexpr int kParts = 2;             // of 64 rows, of a consumer warpgroup
    static constexpr int kTotals = kTokens / 2;  // registers of a thread, for a part
    static constexpr int kChunk = kLayout.chunk_tokens();
    static constexpr int kConsumerWarps = 8;
    static constexpr int kDispatchWarps = 1 + kConsumerWarps;
    // Both parts' tiles need not fit into the registers beside the totals.
    static constexpr bool kPartsTogether = kTokens <= 64;
    // So many totals, or the accumulators of four times 32 of K beside totals.
    static constexpr bool kSetRegisters = kTokens > 64 || (kFP4 && kTokens == 32);
    static constexpr int kLaunchRegisters = 168, kProducerRegisters = 56, kConsumerRegisters = 224;
    static_assert(128 * 3 * kLaunchRegisters <= 65536 &&
                  128 * (kProducerRegisters + 2 * kConsumerRegisters) <= 128 * 3 * kLaunchRegisters);
    static_assert(kStages >= 3);
    using Queue = QueueOf<MegaTile>;
    using Reader = QueueReaderOf<MegaTile>;

public:
    struct alignas(1024) Storage {
        uint8_t weights[kStages][kLayout.weight_tile_bytes()];
        uint8_t tokens[kStages][kLayout.token_tile_bytes()];
        uint32_t weight_scales[kStages][kLayout.weight_scales() + !kFP4];
        alignas(128) uint8_t staging[kLayout.staging_bytes()];
        alignas(128) float token_scales[kStages][kLayout.token_scales() + (kLayout.token_scales() == 0)];
        alignas(16) float block_scales[kMegaScaleChunks][2][kMegaScaleChunk];
        int first_block[kMegaMoeMaxLocalExperts + 1];  // of each expert; the last entry is the number of all
        int counts[kMegaMoeMaxLocalExperts];           // tokens of each expert
        int tokens_of[kMegaMoeMaxRanks];
        uint32_t used[kMegaMoeMaxLocalExperts / 32];  // a bit for each expert that prefetch_weights() knows to be chosen
        ptx::Barrier full[kStages];
        ptx::Barrier empty[kStages];
        ptx::Barrier scales_full[kMegaScaleChunks];
        ptx::Barrier scales_empty[kMegaScaleChunks];
        Queue queue;
    };
    static_assert(sizeof(Storage) <= kLayout.shared_bytes(), "the host would ask for too little shared memory");

    __device__ __forceinline__ static void run(const MegaMoeParams& params, Storage& shared) {
        const int warp = __shfl_sync(0xffffffff, thread_index() / 32, 0);
        if (thread_index() == 0) {
            ptx::prefetch_tensor_map(params.l1_map);
            ptx::prefetch_tensor_map(params.l2_map);
            ptx::prefetch_tensor_map(params.x_map);
            ptx::prefetch_tensor_map(params.h_map);
            for (int s = 0; s < kStages; ++s) {
                ptx::mbarrier_init(shared.full[s], 2);
                ptx::mbarrier_init(shared.empty[s], kConsumerWarps);
            }
            for (int chunk = 0; chunk < kMegaScaleChunks; ++chunk) {
                ptx::mbarrier_init(shared.scales_full[chunk], 1);
                ptx::mbarrier_init(shared.scales_empty[chunk], kConsumerWarps);
            }
            shared.queue.init(kConsumerWarps + 2);
            ptx::fence_mbarrier_init();
        }
        ptx::grid_dependency_wait();

        if (warp >= 4 && params.prefetch_bytes > 0) prefetch_weights(params, shared);
        MegaMoeHeader& header = *local<MegaMoeHeader>(params, 0);
        const uint32_t call = header.epoch + 1;
        if (!enter(params, shared, header, call)) return;
        route(params, shared);
        if (!wait_for_grid(params, header, call)) return;
        find_blocks(params, shared, warp);
        const MegaTileList tiles = make_list(params, shared);

        if (warp < 4) {
            if constexpr (kSetRegisters) shrink_registers<kProducerRegisters>();
            if (warp == 0) {
                if (ptx::elect_one()) load_weights(params, shared);
            } else if (warp == 1) {
                if (ptx::elect_one()) load_tokens(params, shared, tiles.first_tiles);
            } else if (warp == 2) {
                take_tiles(params, shared, header, tiles);
            } else {
                dispatch(params, shared, tiles.num_blocks, 0, false);
            }
        } else {
            dispatch(params, shared, tiles.num_blocks, warp - 3, true);
            if constexpr (kSetRegisters) grow_registers<kConsumerRegisters>();
            consume(params, shared);
        }
        __syncwarp();
        // What follows is code for all warps alike, which needs as many registers as at the start. The producers may take
        // theirs once the consumers have no use for them any more.
        if (kSetRegisters && warp >= 4) shrink_registers<kLaunchRegisters>();
        __syncthreads();
        if (kSetRegisters && warp < 4) grow_registers<kLaunchRegisters>();

        if (!leave(params, header, call)) return;
        // Not before: what comes next could take the place of another rank's CTAs, on which these wait.
        ptx::grid_dependency_launch();
        combine(params);
        // Nobody of this rank uses the counters any more.
        clear(params, tiles.num_blocks);
        __syncthreads();
        if (thread_index() == 0 && is_last_cta(&header.finished)) {
            header.next_tile = 0;
            header.epoch = call;
        }
    }

private:
    using State = PipelineState<kStages>;

    template <class T>
    __device__ __forceinline__ static T* local(const MegaMoeParams& params, int64_t offset) {
        return reinterpret_cast<T*>(params.buffer + offset);
    }
    template <class T>
    __device__ __forceinline__ static T* remote(const MegaMoeParams& params, int rank, int64_t offset) {
        return reinterpret_cast<T*>(params.peers[rank] + offset);
    }

    // ---- enter, route ----

    // By the consumers: brings the beginning of the CTA's first tile of weights into L2 while the others enter. Which expert
    // it is of depends on all tokens, but mostly on whether an expert has any, and some of this rank's own tell that.
    __device__ __forceinline__ static void prefetch_weights(const MegaMoeParams& params, Storage& shared) {
        constexpr int kLooks = 4, kWords = kMegaMoeMaxLocalExperts / 32;
        const int thread = thread_index() - 128;
        const int experts = params.shape.local_experts(), first_expert = params.rank * experts;
        const int64_t* choices = local<const int64_t>(params, params.offsets.topk_idx);
        const int64_t count = int64_t{params.num_tokens} * params.shape.topk;
        int64_t chosen[kLooks];
#pragma unroll
        for (int i = 0; i < kLooks; ++i) {
            const int at = i * 256 + thread;
            chosen[i] = at < count ? choices[at] - first_expert : -1;
        }
        if (thread < kWords) shared.used[thread] = 0;
        ptx::named_barrier_sync(1, 256);
#pragma unroll
        for (int i = 0; i < kLooks; ++i) {
            const int64_t expert = chosen[i];
            if (expert >= 0 && expert < experts) atomicOr(&shared.used[expert / 32], 1u << expert % 32);
        }
        ptx::named_barrier_sync(1, 256);
        // As if each had one block.
        const int first_tiles = params.shape.intermediate / 128, tile = blockIdx.x % first_tiles;
        int before = blockIdx.x / first_tiles;  // experts that come before the tile's
#pragma unroll 1
        for (int word = 0; word < kWords; ++word) {
            uint32_t used = shared.used[word];
            const int more = __popc(used);
            if (before >= more) {
                before -= more;
                continue;
            }
            for (; before > 0; --before) used &= used - 1;
            const int64_t expert = word * 32 + __ffs(used) - 1;
            const int64_t row = (expert * first_tiles + tile) * kMegaTileRows + thread;
            const int64_t row_bytes = int64_t{params.shape.hidden} / kBlockK * (kFP4 ? kPackedBlockK : kMegaBlockBytes);
            prefetch_l2(params.l1 + row * row_bytes, params.prefetch_bytes);
            break;
        }
    }

    __device__ __forceinline__ static bool enter(const MegaMoeParams& params, Storage& shared, MegaMoeHeader& header,
                                                 uint32_t call) {
        const int ranks = params.shape.num_ranks;
        const int other = thread_index();
        bool arrived = true;
        if (other < ranks) {
            if (blockIdx.x == 0) {
                MegaMoeHeader& peer = *remote<MegaMoeHeader>(params, other, 0);
                store_release_sys(&peer.arrived[params.rank], static_cast<uint64_t>(call) << 32 | params.num_tokens);
            }
            uint64_t word;
            arrived = wait_until(
                [&] {
                    word = load_acquire_sys(&header.arrived[other]);
                    return static_cast<uint32_t>(word >> 32) == call;
                },
                params.timeout_ns);
            if (!arrived) give_up(header, MegaMoeStep::kEnter, other);
            shared.tokens_of[other] = min(static_cast<uint32_t>(word), static_cast<uint32_t>(params.shape.max_tokens));
        }
        return __syncthreads_and(arrived);
    }

    // Gives every choice of an expert of this rank a place in the expert's list. Which one depends on who is first; results
    // do not depend on it.
    __device__ __forceinline__ static void route(const MegaMoeParams& params, Storage& shared) {
        const int experts = params.shape.local_experts(), first_expert = params.rank * experts;
        const int64_t expert_rows = params.shape.expert_rows();
        uint32_t* counts = local<uint32_t>(params, params.offsets.counts);
        MegaMoeSource* sources = local<MegaMoeSource>(params, params.offsets.sources);
#pragma unroll 1
        for (int rank = 0; rank < params.shape.num_ranks; ++rank) {
            const int64_t* choices = remote<int64_t>(params, rank, params.offsets.topk_idx);
            const int count = shared.tokens_of[rank] * params.shape.topk;
#pragma unroll 1
            for (int i = blockIdx.x * kMegaThreads + thread_index(); i < count; i += gridDim.x * kMegaThreads) {
                const int64_t expert = choices[i] - first_expert;
                if (expert < 0 || expert >= experts) continue;
                const uint32_t place = atomicAdd(&counts[expert], 1u);
                // Only a token that chooses an expert twice gets beyond.
                if (place < expert_rows) sources[expert * expert_rows + place] = {rank, i};
            }
        }
        __syncthreads();
    }

    // All CTAs or none get beyond: one that gives up marks the counter, in which the last one would else put a 0.
    __device__ __forceinline__ static bool wait_for_grid(const MegaMoeParams& params, MegaMoeHeader& header,
                                                         uint32_t call) {
        constexpr uint32_t kGaveUp = 1u << 31;
        bool complete = true;
        if (thread_index() == 0) {
            uint32_t before;
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&header.routed) : "memory");
            const auto all_arrived = [&] { return load_acquire_gpu(&header.routed_epoch) == call; };
            if (before == gridDim.x - 1) {
                complete = atomicCAS(&header.routed, gridDim.x, 0u) == gridDim.x;
                if (complete) store_release_gpu(&header.routed_epoch, call);
            } else if (before >= kGaveUp) {
                complete = false;
            } else if (!wait_until(all_arrived, params.timeout_ns)) {
                complete = atomicOr(&header.routed, kGaveUp) == 0;
                if (complete) {  // at the last moment
                    atomicAnd(&header.routed, ~kGaveUp);
                    while (!all_arrived()) {
                    }
                }
            }
            if (!complete) give_up(header, MegaMoeStep::kRoute, params.rank);
        }
        return __syncthreads_and(complete);
    }

    // Every expert's first block.
    __device__ __forceinline__ static void find_blocks(const MegaMoeParams& params, Storage& shared, int warp) {
        if (warp == 0) {
            const int experts = params.shape.local_experts(), lane = thread_index();
            const uint32_t most = static_cast<uint32_t>(params.shape.expert_rows());
            const uint32_t* counts = local<uint32_t>(params, params.offsets.counts);
            int blocks = 0;
#pragma unroll 1
            for (int base = 0; base < experts; base += 32) {
                const int expert = base + lane;
                const int count = expert < experts ? static_cast<int>(min(__ldcg(counts + expert), most)) : 0;
                int sum = (count + kTokens - 1) / kTokens;
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int before = __shfl_up_sync(0xffffffff, sum, distance);
                    if (lane >= distance) sum += before;
                }
                if (expert < experts) {
                    shared.counts[expert] = count;
                    shared.first_block[expert + 1] = blocks + sum;
                    if (blockIdx.x == 0 && params.stats != nullptr) params.stats[expert] += count;
                }
                blocks += __shfl_sync(0xffffffff, sum, 31);
            }
            if (lane == 0) shared.first_block[0] = 0;
        }
        __syncthreads();
    }

    __device__ __forceinline__ static MegaTileList make_list(const MegaMoeParams& params, const Storage& shared) {
        MegaTileList tiles;
        tiles.num_blocks = shared.first_block[params.shape.local_experts()];
        tiles.first_tiles = params.shape.intermediate / 128;
        tiles.second_tiles = (params.shape.hidden + kMegaTileRows - 1) / kMegaTileRows;
        tiles.lag = min(params.lag, tiles.num_blocks);
        return tiles;
    }

    // Fills in what belongs to the tile's block.
    __device__ __forceinline__ static void find_block(const MegaMoeParams& params, const Storage& shared, MegaTile& tile) {
        int low = 0, high = params.shape.local_experts();  // first_block[low] <= block < first_block[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (shared.first_block[middle] <= tile.block) {
                low = middle;
            } else {
                high = middle;
            }
        }
        tile.expert = low;
        tile.first = (tile.block - shared.first_block[low]) * kTokens;
        tile.count = min(kTokens, shared.counts[low] - tile.first);
    }

    // ---- dispatch ----

    // Copies rows of the pool: `warp` of the CTA's kDispatchWarps takes one if it `helps`, else also what comes behind the
    // first row of every warp of the grid.
    __device__ __forceinline__ static void dispatch(const MegaMoeParams& params, const Storage& shared,
                                                    int num_blocks, int warp, bool helps) {
        const int rows = num_blocks * kTokens, grid = gridDim.x;
        int row = warp * grid + blockIdx.x;
        if (row < rows) dispatch_row(params, shared, row);
        if (helps) return;
#pragma unroll 1
        for (row = kDispatchWarps * grid + blockIdx.x; row < rows; row += grid) dispatch_row(params, shared, row);
    }

    __device__ __forceinline__ static void dispatch_row(const MegaMoeParams& params, const Storage& shared, int row) {
        const int lane = thread_index() % 32, in_block = row % kTokens;
        MegaTile block;
        block.block = row / kTokens;
        find_block(params, shared, block);
        if (in_block >= block.count) return;
        const MegaMoeSource source = source_of(params, block, in_block);
        const int token = source.choice / params.shape.topk;
        const int64_t row_bytes = int64_t{params.shape.hidden} * params.shape.element_bytes();
        const uint4* from = remote<const uint4>(params, source.rank, params.offsets.x + token * row_bytes);
        uint4* to = local<uint4>(params, params.offsets.pool_x + row * row_bytes);
        copy_row(from, to, static_cast<int>(row_bytes / 16), lane);
        if constexpr (!kBF16) {
            const int groups = params.shape.hidden / kMegaMoeGranK;
            const float* scales = remote<const float>(params, source.rank, params.offsets.x_sf) + int64_t{token} * groups;
            float* pool = local<float>(params, params.offsets.pool_x_sf) + row;
            const int64_t pitch = params.shape.pool_rows();
            if constexpr (kFP4) {
                for (int i = lane; i < groups; i += 32) {
                    const uint32_t word = __float_as_uint(__ldcg(scales + i));
#pragma unroll
                    for (int j = 0; j < 4; ++j) pool[(4 * i + j) * pitch] = ue8m0_to_float(word >> j * 8 & 0xff);
                }
            } else {
                for (int i = lane; i < groups; i += 32) pool[i * pitch] = __ldcg(scales + i);
            }
        }
        if (lane == 0) {
            local<float>(params, params.offsets.pool_weights)[row] =
                __ldcg(remote<const float>(params, source.rank, params.offsets.topk_weights) + source.choice);
        }
        fence_async_global();
        __syncwarp();
        if (lane == 0) add_release_gpu(local<uint32_t>(params, params.offsets.dispatched) + row / kTokens, 1);
    }

    // With several loads of a lane in flight.
    __device__ __forceinline__ static void copy_row(const uint4* from, uint4* to, int count, int lane) {
        constexpr int kFlight = kSetRegisters ? 4 : 14;
        int i = lane;
#pragma unroll 1
        for (; i + (kFlight - 1) * 32 < count; i += kFlight * 32) {
            uint4 values[kFlight];
#pragma unroll
            for (int j = 0; j < kFlight; ++j) values[j] = __ldcg(from + i + j * 32);
#pragma unroll
            for (int j = 0; j < kFlight; ++j) to[i + j * 32] = values[j];
        }
#pragma unroll 2
        for (; i < count; i += 32) to[i] = __ldcg(from + i);
    }

    __device__ __forceinline__ static MegaMoeSource source_of(const MegaMoeParams& params, const MegaTile& block, int i) {
        const int64_t index = block.expert * params.shape.expert_rows() + block.first + i;
        const int2 words = __ldcg(local<const int2>(params, params.offsets.sources) + index);
        return {words.x, words.y};
    }

    // ---- producers ----

    __device__ __forceinline__ static void load_weights(const MegaMoeParams& params, Storage& shared) {
        // As createpolicy.fractional has it.
        constexpr auto kEvictFirst = static_cast<ptx::CacheHint>(0x12f0000000000000ull);
        const ptx::CacheHint hint = params.evicts_weights ? kEvictFirst : ptx::CacheHint::kEvictNormal;
        Reader reader(shared.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.l2_map : params.l1_map;
            const CUtensorMap& scales_map = tile.is_second ? params.l2_sf_map : params.l1_sf_map;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                ptx::Barrier& full = shared.full[state.stage_idx];
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kLayout.weight_tile_bytes() + kLayout.weight_scales() * 4);
                ptx::tma_load_2d(map, full, shared.weights[state.stage_idx], k * kWeightBlockK, tile.weight_row, hint);
                if constexpr (kFP4) {
                    ptx::tma_load_2d(scales_map, full, shared.weight_scales[state.stage_idx],
                                     tile.weights * kMegaTileRows, tile.expert * tile.num_k_blocks + k, hint);
                }
            }
        }
    }

    __device__ __forceinline__ static void load_tokens(const MegaMoeParams& params, Storage& shared, int first_tiles) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        Reader reader(shared.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.h_map : params.x_map;
            const CUtensorMap& scales_map = tile.is_second ? params.h_sf_map : params.x_sf_map;
            const uint32_t* ready =
                local<uint32_t>(params, tile.is_second ? params.offsets.activated : params.offsets.dispatched) + tile.block;
            const uint32_t all = tile.is_second ? first_tiles : tile.count;
            // All CTAs of this rank are running, and get there: no time-out.
            while (load_acquire_gpu(ready) != all) __nanosleep(20);
            fence_async_global();
            const int row = tile.block * kTokens;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                ptx::Barrier& full = shared.full[state.stage_idx];
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kLayout.token_tile_bytes() + kLayout.token_scale_bytes());
                ptx::tma_load_2d(map, full, shared.tokens[state.stage_idx], k * kBlockK, row, kHint);
                if constexpr (!kBF16) {
                    ptx::tma_load_2d(scales_map, full, shared.token_scales[state.stage_idx], row, kFP4 ? 4 * k : k, kHint);
                }
            }
        }
    }

    // Takes tiles off the list, the first one by the CTA's number, and queues them, each when the tile two before it is
    // done: early enough for the loads, late enough not to leave other CTAs without work at the end.
    __device__ __forceinline__ static void take_tiles(const MegaMoeParams& params, Storage& shared, MegaMoeHeader& header,
                                                      const MegaTileList& tiles) {
        constexpr int kSlots = Queue::kSlots, kAhead = 2;
        const int lane = thread_index() % 32;
        int index = blockIdx.x;
        PipelineState<kMegaScaleChunks> scale_state;
#pragma unroll 1
        for (int taken = 0;; ++taken) {
            const int slot = taken % kSlots, before = taken - kAhead;
            const bool is_end = index >= tiles.size();
            MegaTile tile = {};
            tile.num_k_blocks = -1;
            if (!is_end) {
                tiles.locate(index, tile);
                find_block(params, shared, tile);
                const int rows_of_expert = tile.is_second ? params.shape.hidden : 2 * params.shape.intermediate;
                tile.weight_row = tile.expert * rows_of_expert + tile.weights * kMegaTileRows;
                tile.num_k_blocks = (tile.is_second ? params.shape.intermediate : params.shape.hidden) / kBlockK;
            }
            if (before >= 0) ptx::mbarrier_wait(shared.queue.empty[before % kSlots], before / kSlots % 2);
            if (lane == 0) {
                shared.queue.tiles[slot] = tile;
                ptx::mbarrier_arrive(shared.queue.full[slot]);
                if (!is_end) index = gridDim.x + atomicAdd(&header.next_tile, 1u);
            }
            if (is_end) return;
            index = __shfl_sync(0xffffffff, index, 0);
            if constexpr (kBlockScales) load_block_scales(params, shared, tile, tiles.first_tiles, scale_state);
        }
    }

    // Two of each K block: of a tile's gates and ups, or of its upper and lower 128 rows.
    __device__ __forceinline__ static void load_block_scales(const MegaMoeParams& params, Storage& shared,
                                                             const MegaTile& tile, int first_tiles,
                                                             PipelineState<kMegaScaleChunks>& state) {
        const int lane = thread_index() % 32;
        const MegaMoeBlockScales& source = tile.is_second ? params.l2_sf : params.l1_sf;
        // The second half of the last tile may have no rows.
        const int last_row = params.shape.hidden / 128 - 1;
        const int upper = tile.is_second ? 2 * tile.weights : tile.weights;
        const int lower = tile.is_second ? min(upper + 1, last_row) : tile.weights + first_tiles;
        const float* expert = source.data + tile.expert * source.stride_expert;
#pragma unroll 1
        for (int k = 0; k < tile.num_k_blocks; k += kMegaScaleChunk, state.advance()) {
            float(&chunk)[2][kMegaScaleChunk] = shared.block_scales[state.stage_idx];
            const int64_t at = min(k + lane, tile.num_k_blocks - 1) * source.stride_k;
            const float values[2] = {expert[upper * source.stride_row + at], expert[lower * source.stride_row + at]};
            ptx::mbarrier_wait(shared.scales_empty[state.stage_idx], state.phase ^ 1);
            chunk[0][lane] = values[0];
            chunk[1][lane] = values[1];
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(shared.scales_full[state.stage_idx]);
        }
    }

    // ---- consumers ----

    __device__ __forceinline__ static void consume(const MegaMoeParams& params, Storage& shared) {
        const int warpgroup = __shfl_sync(0xffffffff, thread_index() / 128 - 1, 0);
        const int lane = thread_index() % 32;
        State state;
        PipelineState<kMegaScaleChunks> scale_state;
#pragma unroll 1
        for (uint32_t taken = 0;; ++taken) {
            const uint32_t slot = taken % Queue::kSlots;
            ptx::mbarrier_wait(shared.queue.full[slot], taken / Queue::kSlots % 2);
            const int num_k_blocks = shared.queue.tiles[slot].num_k_blocks;
            if (num_k_blocks < 0) break;
            const bool is_second = shared.queue.tiles[slot].is_second;
            float total[kParts][kTotals] = {};
            if constexpr (kBF16) {
                accumulate_unscaled(shared, state, num_k_blocks, warpgroup, lane, total);
            } else if constexpr (kFP4) {
                accumulate_fp4(shared, state, num_k_blocks, warpgroup, total);
            } else {
                accumulate(shared, state, scale_state, is_second, num_k_blocks, warpgroup, lane, total);
            }
            const MegaTile tile = shared.queue.tiles[slot];
            if (is_second) {
                store_results(params, shared, tile, warpgroup, total);
            } else {
                store_activated(params, shared, tile, warpgroup, total);
            }
            release(shared.queue.empty[slot], lane);
        }
    }

    __device__ __forceinline__ static void release(ptx::Barrier& empty, int lane) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty);
    }

    __device__ __forceinline__ static Descriptor weights_of(Storage& shared, int stage_idx, int part, int warpgroup) {
        return Descriptor(shared.weights[stage_idx] + (part * 2 + warpgroup) * 64 * kMegaBlockBytes);
    }

    // Sums all K blocks of a tile into `total`.
    __device__ __forceinline__ static void accumulate(Storage& shared, State& state,
                                                      PipelineState<kMegaScaleChunks>& scale_state, bool is_second,
                                                      int num_k_blocks, int warpgroup, int lane,
                                                      float (&total)[kParts][kTotals]) {
#pragma unroll 1
        for (int left = num_k_blocks; left > 0; left -= kMegaScaleChunk, scale_state.advance()) {
            const int chunk = scale_state.stage_idx;
            ptx::mbarrier_wait(shared.scales_full[chunk], scale_state.phase);
            const int count = min(left, kMegaScaleChunk);
#pragma unroll 1
            for (int i = 0; i < count; ++i, state.advance()) {
                const float blocks[2] = {shared.block_scales[chunk][0][i], shared.block_scales[chunk][1][i]};
                add_k_block(shared, state.stage_idx, state.phase, is_second, blocks, warpgroup, lane, total);
            }
            release(shared.scales_empty[chunk], lane);
        }
    }

    // Adds one K block: total += product * scale of the weights' block * scale of the token.
    __device__ __forceinline__ static void add_k_block(Storage& shared, int s, uint32_t phase, bool is_second,
                                                       const float (&blocks)[2], int warpgroup, int lane,
                                                       float (&total)[kParts][kTotals]) {
        constexpr int kSteps = kMegaBlockBytes / 32;
        const float2* token_scales = reinterpret_cast<const float2*>(shared.token_scales[s]) + lane % 4;
        const Descriptor cols(shared.tokens[s]);
        const auto multiply = [&](int part, float (&accumulator)[kTotals]) {
            const Descriptor rows = weights_of(shared, s, part, warpgroup);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                wgmma<kTokens>(rows.at(step * 2), cols.at(step * 2), accumulator, step > 0);
            }
        };
        // Rows of a thread, upper and lower: gates and ups, or both of the part's 128 rows of the result.
        const auto promote = [&](int part, const float (&accumulator)[kTotals], auto&& scale_of) {
            const float upper = is_second ? blocks[part] : blocks[0];
            const float lower = is_second ? blocks[part] : blocks[1];
#pragma unroll
            for (int j = 0; j < kTokens / 8; ++j) {
                const float2 scale = scale_of(j);
                total[part][4 * j + 0] += accumulator[4 * j + 0] * (scale.x * upper);
                total[part][4 * j + 1] += accumulator[4 * j + 1] * (scale.y * upper);
                total[part][4 * j + 2] += accumulator[4 * j + 2] * (scale.x * lower);
                total[part][4 * j + 3] += accumulator[4 * j + 3] * (scale.y * lower);
            }
        };
        ptx::mbarrier_wait(shared.full[s], phase);
        if constexpr (kPartsTogether) {
            float2 scales[kTokens / 8];
#pragma unroll
            for (int j = 0; j < kTokens / 8; ++j) scales[j] = token_scales[j * 4];
            float accumulator[kParts][kTotals];
#pragma unroll
            for (int part = 0; part < kParts; ++part) pin_registers(accumulator[part]);
            wgmma_fence();
#pragma unroll
            for (int part = 0; part < kParts; ++part) multiply(part, accumulator[part]);
            wgmma_commit();
#pragma unroll
            for (int part = 0; part < kParts; ++part) pin_registers(accumulator[part]);
            wgmma_wait<0>();
            release(shared.empty[s], lane);
#pragma unroll
            for (int part = 0; part < kParts; ++part) promote(part, accumulator[part], [&](int j) { return scales[j]; });
        } else {
            float accumulator[kTotals];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                pin_registers(accumulator);
                wgmma_fence();
                multiply(part, accumulator);
                wgmma_commit();
                pin_registers(accumulator);
                wgmma_wait<0>();
                promote(part, accumulator, [&](int j) { return token_scales[j * 4]; });
            }
            release(shared.empty[s], lane);
        }
    }

    // FP4 weights: each 32 of K are a sum that is scaled.
    __device__ __forceinline__ static void accumulate_fp4(Storage& shared, State& state, int num_k_blocks, int warpgroup,
                                                          float (&total)[kParts][kTotals]) {
        const int thread = thread_index() % 128;
        const Fp4Block<MegaMoeKernel> block(shared.weights[0], shared.weight_scales[0], shared.tokens[0],
                                            shared.token_scales[0], warpgroup * 64, thread);
#pragma unroll 1
        for (int i = 0; i < num_k_blocks; ++i, state.advance()) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            block.add(s, total[0], [] {});
            block.add(s, total[1], [&] { release(shared.empty[s], thread % 32); }, 128);
        }
    }

    // BF16: the tensor core sums all K blocks. While a block's instructions run the next ones are issued, so a stage is
    // given back one block later.
    __device__ __forceinline__ static void accumulate_unscaled(Storage& shared, State& state, int num_k_blocks,
                                                               int warpgroup, int lane, float (&total)[kParts][kTotals]) {
        constexpr int kSteps = kMegaBlockBytes / 32;
        int before = -1;
#pragma unroll 1
        for (int i = 0; i < num_k_blocks; ++i, state.advance()) {
            const int s = state.stage_idx;
            ptx::mbarrier_wait(shared.full[s], state.phase);
            const Descriptor cols(shared.tokens[s]);
#pragma unroll
            for (int part = 0; part < kParts; ++part) pin_registers(total[part]);
            wgmma_fence();
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const Descriptor rows = weights_of(shared, s, part, warpgroup);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    wgmma_bf16<kTokens, false, false>(rows.at(step * 2), cols.at(step * 2), total[part], true);
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (before >= 0) release(shared.empty[before], lane);
            before = s;
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin_registers(total[part]);
        wgmma_wait<0>();
        release(shared.empty[before], lane);
    }

    // ---- epilogue of the first linear ----

    __device__ __forceinline__ static float to_bf16_and_back(float x) {
        return __bfloat162float(__float2bfloat16_rn(x));
    }

    __device__ __forceinline__ static float activate(const MegaMoeParams& params, float gate, float up, float weight) {
        gate = to_bf16_and_back(gate);
        up = to_bf16_and_back(up);
        if (params.clamped) {
            gate = cast::min_nan(gate, params.clamp);
            up = cast::max_nan(cast::min_nan(up, params.clamp), -params.clamp);
        }
        return __fmul_rn(__fmul_rn(cast::silu(gate), up), weight);
    }

    // SwiGLU, quantisation, and 128 columns of pool_h.
    __device__ __forceinline__ static void store_activated(const MegaMoeParams& params, Storage& shared,
                                                           const MegaTile& tile, int warpgroup,
                                                           float (&total)[kParts][kTotals]) {
        constexpr int kPairs = kChunk / 8;  // of neighbouring tokens, of a thread
        constexpr int kPitch = kLayout.activated_pitch();
        constexpr int kBytes = kBF16 ? 2 : 1;
        const int thread = thread_index() % 128;
        const int lane = thread % 32, warp = thread / 32;
        const int row = tile.block * kTokens;
        const int64_t pool_rows = params.shape.pool_rows();
        const float* weights = local<const float>(params, params.offsets.pool_weights) + row;
        uint8_t* pool = local<uint8_t>(params, params.offsets.pool_h);
        // A scale is of 128 columns, of both parts and warpgroups, or of 32, of one.
        constexpr int kScales = kFP4 ? kParts : 1;  // of a thread's values of a token
        float* amax = reinterpret_cast<float*>(shared.staging + kLayout.activated_bytes());  // [warp][scale][token]
        const int first_warp = kFP4 ? warpgroup * 4 : 0;  // of those with values under the same scale
        const int column = warpgroup * 32 + warp * 8 + lane / 4;  // of the part's 64
        // Both warpgroups may still be storing results of the second linear from this memory.
        ptx::named_barrier_sync(1, 256);
#pragma unroll
        for (int chunk = 0; chunk < kTokens; chunk += kChunk) {
            if (chunk >= tile.count) break;
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const int at = chunk / 2 + 4 * j;
                const float2 weight = __ldcg(reinterpret_cast<const float2*>(weights + chunk + 8 * j + lane % 4 * 2));
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    float(&values)[kTotals] = total[part];
                    values[at] = activate(params, values[at], values[at + 2], weight.x);
                    values[at + 1] = activate(params, values[at + 1], values[at + 3], weight.y);
                }
            }
            if constexpr (kBF16) {
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
#pragma unroll
                        for (int part = 0; part < kParts; ++part) {
                            const int token = 8 * j + lane % 4 * 2 + i;
                            *reinterpret_cast<__nv_bfloat16*>(shared.staging + token * kPitch + (part * 64 + column) * 2) =
                                __float2bfloat16_rn(total[part][chunk / 2 + 4 * j + i]);
                        }
                    }
                }
            } else {
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
#pragma unroll
                    for (int k = 0; k < kScales; ++k) {
                        float most[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int at = chunk / 2 + 4 * j + i;
                            most[i] = cast::max_abs(total[k][at], total[kFP4 ? k : 1][at]);
#pragma unroll
                            for (int distance = 4; distance < 32; distance *= 2) {
                                most[i] = cast::max_abs(most[i], __shfl_xor_sync(0xffffffff, most[i], distance));
                            }
                        }
                        if (lane < 4) {
                            float* to = amax + ((warpgroup * 4 + warp) * kScales + k) * kChunk + 8 * j + lane * 2;
                            *reinterpret_cast<float2*>(to) = make_float2(most[0], most[1]);
                        }
                    }
                }
                ptx::named_barrier_sync(1, 256);
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
                    const int at = chunk / 2 + 4 * j, token = 8 * j + lane % 4 * 2;
                    cast::GroupScale first[kScales], second[kScales];
#pragma unroll
                    for (int k = 0; k < kScales; ++k) {
                        float2 most = make_float2(0, 0);
#pragma unroll
                        for (int w = 0; w < kConsumerWarps / kScales; ++w) {
                            const float2 of_warp = *reinterpret_cast<const float2*>(
                                amax + ((first_warp + w) * kScales + k) * kChunk + token);
                            most.x = cast::max_abs(most.x, of_warp.x);
                            most.y = cast::max_abs(most.y, of_warp.y);
                        }
                        first[k] = cast::quick_group_scale<cast::E4M3>(most.x, kFP4);
                        second[k] = cast::quick_group_scale<cast::E4M3>(most.y, kFP4);
                        // One warp for each pair of tokens writes their scales.
                        const int writer = kFP4 ? j % 4 : j % kConsumerWarps - warpgroup * 4;
                        if (writer == warp && lane < 4) {
                            const int64_t group = kFP4 ? tile.weights * 4 + k * 2 + warpgroup : tile.weights;
                            float* scales = local<float>(params, params.offsets.pool_h_sf) + group * pool_rows + row +
                                            chunk + token;
                            *reinterpret_cast<float2*>(scales) = make_float2(first[k].sf, second[k].sf);
                        }
                    }
                    constexpr int kLast = kScales - 1;  // of the second part
                    const uint32_t bytes =
                        cast::to_e4m3x4(total[0][at] * first[0].inverse, total[1][at] * first[kLast].inverse,
                                        total[0][at + 1] * second[0].inverse, total[1][at + 1] * second[kLast].inverse);
                    uint8_t* to = shared.staging + token * kPitch + column;
                    to[0] = static_cast<uint8_t>(bytes);
                    to[64] = static_cast<uint8_t>(bytes >> 8);
                    to[kPitch] = static_cast<uint8_t>(bytes >> 16);
                    to[kPitch + 64] = static_cast<uint8_t>(bytes >> 24);
                }
            }
            ptx::named_barrier_sync(1, 256);
            constexpr int kPerRow = 128 * kBytes / 16;
            const int count = min(kChunk, tile.count - chunk) * kPerRow;
            const int64_t row_bytes = int64_t{params.shape.intermediate} * kBytes;
#pragma unroll 1
            for (int i = warpgroup * 128 + thread; i < count; i += 256) {
                const int token = i / kPerRow, piece = i % kPerRow * 16;
                const uint4 values = *reinterpret_cast<const uint4*>(shared.staging + token * kPitch + piece);
                *reinterpret_cast<uint4*>(pool + (row + chunk + token) * row_bytes + tile.weights * 128 * kBytes + piece) =
                    values;
            }
            if constexpr (kBF16 && kChunk < kTokens) ptx::named_barrier_sync(1, 256);  // else the maxima's is in between
        }
        fence_async_global();
        ptx::named_barrier_sync(1, 256);
        if (warpgroup == 0 && thread == 0) {
            add_release_gpu(local<uint32_t>(params, params.offsets.activated) + tile.block, 1);
        }
    }

    // ---- epilogue of the second linear ----

    // Up to 256 columns of each token's row in the combine buffer of its rank.
    __device__ __forceinline__ static void store_results(const MegaMoeParams& params, Storage& shared,
                                                         const MegaTile& tile, int warpgroup,
                                                         const float (&total)[kParts][kTotals]) {
        const int thread = thread_index() % 128;
        const int lane = thread % 32, warp = thread / 32;
        uint8_t* staging = shared.staging + warpgroup * (kChunk * 128);  // [token][64 columns], 16-byte pieces swizzled
        // Where this lane's row of a matrix of stmatrix goes: of token `lane % 8`, or eight further on in the upper half.
        const int in_pair = lane / 16 * 8 + lane % 8;
        const uint32_t to = ptx::smem_address(staging + in_pair * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16);
        const int piece = thread % 8;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int column = tile.weights * kMegaTileRows + (part * 2 + warpgroup) * 64;
            if (column >= params.shape.hidden) break;
#pragma unroll
            for (int chunk = 0; chunk < kTokens; chunk += kChunk) {
                if (chunk >= tile.count) break;
#pragma unroll
                for (int j = 0; j < kChunk / 8; j += 2) {
                    const float* values = &total[part][chunk / 2 + 4 * j];
                    ptx::stmatrix_x4_transposed(to + j * 8 * 128, pack(values[0], values[1]), pack(values[2], values[3]),
                                                pack(values[4], values[5]), pack(values[6], values[7]));
                }
                ptx::named_barrier_sync(2 + warpgroup, 128);
                const int count = min(kChunk, tile.count - chunk);
#pragma unroll(kSetRegisters ? 1 : 4)
                for (int token = thread / 8; token < count; token += 16) {
                    const MegaMoeSource source = source_of(params, tile, chunk + token);
                    const uint4 values =
                        *reinterpret_cast<const uint4*>(staging + token * 128 + (piece ^ token % 8) * 16);
                    __nv_bfloat16* row = remote<__nv_bfloat16>(params, source.rank, params.offsets.combine) +
                                         int64_t{source.choice} * params.shape.hidden;
                    *reinterpret_cast<uint4*>(row + column + piece * 8) = values;
                }
                ptx::named_barrier_sync(2 + warpgroup, 128);
            }
        }
    }

    __device__ __forceinline__ static uint32_t pack(float x, float y) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const uint32_t&>(both);
    }

    // ---- leave, combine ----

    __device__ __forceinline__ static bool leave(const MegaMoeParams& params, MegaMoeHeader& header, uint32_t call) {
        if (thread_index() == 0) {
            // This CTA's results, which its other threads have written, before it counts as done; all CTAs' before the word
            // to the ranks.
            __threadfence_system();
            if (is_last_cta(&header.computed)) {
                __threadfence_system();
#pragma unroll 1
                for (int rank = 0; rank < params.shape.num_ranks; ++rank) {
                    store_release_sys(&remote<MegaMoeHeader>(params, rank, 0)->combined[params.rank], call);
                }
            }
        }
        const int other = thread_index();
        bool arrived = true;
        if (other < params.shape.num_ranks) {
            arrived = wait_until([&] { return load_acquire_sys(&header.combined[other]) == call; }, params.timeout_ns);
            if (!arrived) give_up(header, MegaMoeStep::kLeave, other);
        }
        return __syncthreads_and(arrived);
    }

    // y: a warp has several hundred columns of a token at a time. A token's choices are loaded while those of the one before
    // it are summed up, and several results are on their way: what takes time is loads that wait for one another.
    __device__ __forceinline__ static void combine(const MegaMoeParams& params) {
        constexpr int kPieces = kSetRegisters ? 2 : 4;  // of eight columns, of a lane
        constexpr bool kTwoResults = !kSetRegisters;    // at once, if there is room for them
        const int lane = thread_index() % 32, topk = params.shape.topk;
        const int per_row = params.shape.hidden / 8, segments = (per_row + kPieces * 32 - 1) / (kPieces * 32);
        // In 32 bits: the combine buffer has more than 1024 bytes for each.
        const int count = params.num_tokens * segments, step = gridDim.x * (kMegaThreads / 32);
        const auto choice = [&](int task, int c) {
            const int64_t* choices = local<const int64_t>(params, params.offsets.topk_idx);
            return task < count && c < topk ? choices[int64_t{task / segments} * topk + c] : int64_t{-1};
        };
        int task = thread_index() / 32 * gridDim.x + blockIdx.x;
        int64_t expert = choice(task, lane);
#pragma unroll 1
        for (; task < count; task += step) {
            const int token = task / segments, first = task % segments * (kPieces * 32) + lane;
            const uint4* rows = local<const uint4>(params, params.offsets.combine) + int64_t{token} * topk * per_row + first;
            const auto load = [&](int c, uint4 (&row)[kPieces]) {
#pragma unroll
                for (int i = 0; i < kPieces; ++i) {
                    row[i] = first + i * 32 < per_row ? __ldcg(rows + int64_t{c} * per_row + i * 32) : uint4{};
                }
            };
            float sum[kPieces][8] = {};
            const auto add = [&](const uint4 (&row)[kPieces]) {
#pragma unroll
                for (int i = 0; i < kPieces; ++i) {
                    float values[8];
                    cast::Elements<__nv_bfloat16>::unpack(row[i], values);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum[i][e] += values[e];
                }
            };
            const int64_t next = choice(task + step, lane);
#pragma unroll 1
            for (int base = 0; base < topk; base += 32) {
                if (base > 0) expert = choice(task, base + lane);
                uint32_t chosen = __ballot_sync(0xffffffff, expert >= 0 && expert < params.shape.num_experts);
#pragma unroll 1
                while (chosen != 0) {
                    uint4 row[kPieces], other[kPieces];
                    load(base + __ffs(chosen) - 1, row);
                    chosen &= chosen - 1;
                    const bool has_other = kTwoResults && chosen != 0;
                    if (has_other) {
                        load(base + __ffs(chosen) - 1, other);
                        chosen &= chosen - 1;
                    }
                    add(row);
                    if (has_other) add(other);
                }
            }
            expert = next;
            uint4* y = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(params.y) + token * params.y_stride) + first;
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                if (first + i * 32 >= per_row) break;
                y[i * 32] = make_uint4(pack(sum[i][0], sum[i][1]), pack(sum[i][2], sum[i][3]), pack(sum[i][4], sum[i][5]),
                                       pack(sum[i][6], sum[i][7]));
            }
        }
    }

    __device__ __forceinline__ static void clear(const MegaMoeParams& params, int num_blocks) {
        uint32_t* counts = local<uint32_t>(params, params.offsets.counts);
        uint32_t* dispatched = local<uint32_t>(params, params.offsets.dispatched);
        uint32_t* activated = local<uint32_t>(params, params.offsets.activated);
        const int first = blockIdx.x * kMegaThreads + thread_index(), step = gridDim.x * kMegaThreads;
        for (int i = first; i < params.shape.local_experts(); i += step) counts[i] = 0;
        for (int i = first; i < num_blocks; i += step) dispatched[i] = activated[i] = 0;
    }
};

template <int kTokens, int kType>
__global__ void __launch_bounds__(kMegaThreads, 1) sm90_mega_moe(const __grid_constant__ MegaMoeParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Kernel = MegaMoeKernel<kTokens, static_cast<MegaMoeType>(kType)>;
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared_memory));
#endif
}

// Runs behind the kernel above, for the message that it cannot print. (assert() without room for a printf's arguments: the
// file's name is the message, and the line the rank.)
__global__ void __launch_bounds__(32) sm90_mega_moe_check(const __grid_constant__ MegaMoeCheckParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    const uint32_t failure = __ldcg(&params.header->failure);
    if (failure == 0 || thread_index() > 0) return;
    const uint32_t rank = failure & 0xffff;
    constexpr const char* kMessage = "deep_gemm Mega MoE: timed out waiting for rank";
    switch (static_cast<MegaMoeStep>(failure >> 16)) {
        case MegaMoeStep::kEnter: __assertfail("enter: its inputs are there", kMessage, rank, "sm90_mega_moe", 1);
        case MegaMoeStep::kRoute: __assertfail("route: all its CTAs are running", kMessage, rank, "sm90_mega_moe", 1);
        case MegaMoeStep::kLeave: __assertfail("leave: its results are there", kMessage, rank, "sm90_mega_moe", 1);
    }
#endif
}

}  // namespace deep_gemm::sm90
