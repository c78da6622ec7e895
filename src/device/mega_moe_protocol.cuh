// What the Mega MoE kernels of all architectures have in common: the protocol between ranks and CTAs, the list of tiles, the
// pool's rows, the sum of a token's results. docs/mega_moe.md describes the protocol and why it cannot deadlock.
#pragma once

#include <cuda_bf16.h>

#include "../cast/swiglu.cuh"
#include "bf16_tokens.cuh"
#include "mega_moe_params.h"
#include "pipeline.cuh"
#include "ptx_memory.cuh"
#include "tile_scheduler.cuh"

extern "C" __device__ void __assertfail(const char* condition, const char* file, unsigned line, const char* function,
                                        size_t char_bytes);

namespace deep_gemm {

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
// Arrives, and is not expected in later phases.
__device__ __forceinline__ void arrive_for_the_last_time(ptx::Barrier& barrier) {
    asm volatile("mbarrier.arrive_drop.shared::cta.b64 _, [%0];" ::"r"(ptx::smem_address(&barrier)) : "memory");
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

// What is in this rank's buffer, and in another one's.
template <class T>
__device__ __forceinline__ T* local(const MegaMoeParams& params, int64_t offset) {
    return reinterpret_cast<T*>(params.buffer + offset);
}
template <class T>
__device__ __forceinline__ T* remote(const MegaMoeParams& params, int rank, int64_t offset) {
    return reinterpret_cast<T*>(params.peers[rank] + offset);
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
    int num_blocks, first_tiles, second_tiles, lag, tile_rows;

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

// How a kernel shares out the work.
struct MegaMoeRoles {
    int block_tokens;    // of one expert, in a tile
    int tile_rows;       // of weights: half as many gates and their ups, or so many columns of the result
    int block_k;         // elements of K in a stage
    bool has_scales;     // of tokens in the pool, a word for each 128 elements
    int threads;
    int dispatch_warps;  // all that copy rows to the pool,
    int dispatchers;     // and those of them that go on until all are there
    bool few_registers;  // for loads in flight
    int ahead;           // a tile is taken when the one so many before it is done
    bool halves_tiles = false;  // where few have work
};

// What a token is in the pool: what it was, with its scales.
struct MegaMoeSameTokens {
    static constexpr bool kConverts = false;
};

// BF16 beside FP4 weights, of FP8 and the scales of 128 of K in a word.
struct MegaMoeBf16Tokens {
    static constexpr bool kConverts = true;

    // A row, by a warp, with the loads of several parts of it in flight.
    template <int kFlight>
    __device__ __forceinline__ static void convert(const uint8_t* from, const uint32_t* words, uint8_t* to, int groups,
                                                   int lane) {
        constexpr int kStep = 32 / kBf16BlockThreads;
        const int i = lane % kBf16BlockThreads;
#pragma unroll 1
        for (int base = 0; base < groups; base += kFlight * kStep) {
            uint2 values[kFlight][4] = {};
            uint32_t word[kFlight] = {};
#pragma unroll
            for (int j = 0; j < kFlight; ++j) {
                const int group = base + j * kStep + lane / kBf16BlockThreads;
                if (group >= groups) continue;
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    values[j][t] = __ldcg(reinterpret_cast<const uint2*>(from + group * 128 + t * 32 + i * 8));
                }
                word[j] = __ldcg(words + group);
            }
#pragma unroll
            for (int j = 0; j < kFlight; ++j) {
                const int group = base + j * kStep + lane / kBf16BlockThreads;
                float scales[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) scales[t] = power_of_two(word[j] >> t * 8 & 0xff);
                uint32_t stores[4][4];
                bf16_of_tokens(values[j], scales, i % 2, stores);
                if (group >= groups) continue;
                uint8_t* at = to + group * 256 + bf16_store(i);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    *reinterpret_cast<uint4*>(at + k * 32) =
                        make_uint4(stores[k][0], stores[k][1], stores[k][2], stores[k][3]);
                }
            }
        }
    }
};

template <MegaMoeRoles kRoles, class PoolTokens = MegaMoeSameTokens>
class MegaMoeProtocol {
    static constexpr int kTokens = kRoles.block_tokens;

protected:
    using Queue = QueueOf<MegaTile>;
    using Reader = QueueReaderOf<MegaTile>;

    // In shared memory.
    struct Tables {
        int first_block[kMegaMoeMaxLocalExperts + 1];  // of each expert; the last entry is the number of all
        int counts[kMegaMoeMaxLocalExperts];           // tokens of each expert
        int tokens_of[kMegaMoeMaxRanks];
        uint32_t used[kMegaMoeMaxLocalExperts / 32];  // a bit for each expert that prefetch_weights() knows to be chosen
        Queue queue;
    };

    // A call from beginning to end; `compute(header, tiles)` is its middle, for all threads of a CTA.
    // `row_bytes`: of the weights of the first linear.
    template <class Compute>
    __device__ __forceinline__ static void run(const MegaMoeParams& params, Tables& tables, int warp, int64_t row_bytes,
                                               Compute&& compute) {
        if (fetches(warp) && params.prefetch_bytes > 0) prefetch_weights(params, tables, row_bytes);
        MegaMoeHeader& header = *local<MegaMoeHeader>(params, 0);
        const uint32_t call = header.epoch + 1;
        if (!enter(params, tables, header, call)) return;
        route(params, tables);
        if (!wait_for_grid(params, header, call)) return;
        find_blocks(params, tables, warp);
        const MegaTileList tiles = make_list(params, tables);

        compute(header, tiles);

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

    // ---- enter, route ----

    // Warps 4 to 11 fetch weights early, a thread for each row of a tile.
    __device__ __forceinline__ static bool fetches(int warp) { return warp >= 4 && warp < 12; }

    // By those warps: brings the beginning of the CTA's first tile of weights into L2 while the others enter. Which expert it
    // is of depends on all tokens, but mostly on whether an expert has any, and some of this rank's own tell that.
    __device__ __forceinline__ static void prefetch_weights(const MegaMoeParams& params, Tables& tables,
                                                            int64_t row_bytes) {
        static_assert(kRoles.threads >= 12 * 32 && kRoles.tile_rows <= 256);
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
        if (thread < kWords) tables.used[thread] = 0;
        ptx::named_barrier_sync(1, 256);
#pragma unroll
        for (int i = 0; i < kLooks; ++i) {
            const int64_t expert = chosen[i];
            if (expert >= 0 && expert < experts) atomicOr(&tables.used[expert / 32], 1u << expert % 32);
        }
        ptx::named_barrier_sync(1, 256);
        // As if each had one block.
        int blocks = 0;
#pragma unroll
        for (int word = 0; word < kWords; ++word) blocks += __popc(tables.used[word]);
        const int tile_rows = tile_rows_for(params, blocks);
        const int first_tiles = 2 * params.shape.intermediate / tile_rows, tile = blockIdx.x % first_tiles;
        int before = blockIdx.x / first_tiles;  // experts that come before the tile's
#pragma unroll 1
        for (int word = 0; word < kWords; ++word) {
            uint32_t used = tables.used[word];
            const int more = __popc(used);
            if (before >= more) {
                before -= more;
                continue;
            }
            for (; before > 0; --before) used &= used - 1;
            const int of_expert = (word * 32 + __ffs(used) - 1) * first_tiles;
            prefetch_tile(params, of_expert + tile, tile_rows, row_bytes, params.prefetch_bytes);
            break;
        }
    }

    // The same as if all experts were chosen, which takes no input: it may come before the wait for the kernel that writes them.
    __device__ __forceinline__ static void prefetch_early(const MegaMoeParams& params, int64_t row_bytes) {
        const int tiles = params.shape.local_experts() * (2 * params.shape.intermediate / kRoles.tile_rows);
        if (blockIdx.x < tiles) prefetch_tile(params, blockIdx.x, kRoles.tile_rows, row_bytes, params.early_bytes);
    }

    // By the same warps: the beginning of each row of a tile of the first linear, of all experts'.
    __device__ __forceinline__ static void prefetch_tile(const MegaMoeParams& params, int tile, int tile_rows,
                                                         int64_t row_bytes, int bytes) {
        const int thread = thread_index() - 128;
        if (tile_rows < 256 && thread >= tile_rows) return;
        prefetch_l2(params.l1 + (int64_t{tile} * tile_rows + thread) * row_bytes, bytes);
    }

    __device__ __forceinline__ static bool enter(const MegaMoeParams& params, Tables& tables, MegaMoeHeader& header,
                                                 uint32_t call) {
        const int ranks = params.shape.num_ranks;
        const int other = thread_index();
        if (ranks == 1) {  // whose inputs the kernel before this one has written
            if (other == 0) tables.tokens_of[0] = params.num_tokens;
            __syncthreads();
            return true;
        }
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
            tables.tokens_of[other] = min(static_cast<uint32_t>(word), static_cast<uint32_t>(params.shape.max_tokens));
        }
        return __syncthreads_and(arrived);
    }

    // Gives every choice of an expert of this rank a place in the expert's list. Which one depends on who is first; results
    // do not depend on it.
    __device__ __forceinline__ static void route(const MegaMoeParams& params, Tables& tables) {
        const int experts = params.shape.local_experts(), first_expert = params.rank * experts;
        const int64_t expert_rows = params.shape.expert_rows();
        uint32_t* counts = local<uint32_t>(params, params.offsets.counts);
        MegaMoeSource* sources = local<MegaMoeSource>(params, params.offsets.sources);
#pragma unroll 1
        for (int rank = 0; rank < params.shape.num_ranks; ++rank) {
            const int64_t* choices = remote<int64_t>(params, rank, params.offsets.topk_idx);
            const int count = tables.tokens_of[rank] * params.shape.topk;
#pragma unroll 1
            for (int i = blockIdx.x * kRoles.threads + thread_index(); i < count; i += gridDim.x * kRoles.threads) {
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
    __device__ __forceinline__ static void find_blocks(const MegaMoeParams& params, Tables& tables, int warp) {
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
                    tables.counts[expert] = count;
                    tables.first_block[expert + 1] = blocks + sum;
                    if (blockIdx.x == 0 && params.stats != nullptr) params.stats[expert] += count;
                }
                blocks += __shfl_sync(0xffffffff, sum, 31);
            }
            if (lane == 0) tables.first_block[0] = 0;
        }
        __syncthreads();
    }

    // Rows of weights of a tile, with so many blocks of tokens: the same in all CTAs, which find the same blocks.
    __device__ __forceinline__ static int tile_rows_for(const MegaMoeParams& params, int num_blocks) {
        if constexpr (kRoles.halves_tiles) {
            constexpr int kHalf = kRoles.tile_rows / 2;
            if (num_blocks * (2 * params.shape.intermediate / kHalf) <= params.most_half_tiles) return kHalf;
        }
        return kRoles.tile_rows;
    }

    __device__ __forceinline__ static MegaTileList make_list(const MegaMoeParams& params, const Tables& tables) {
        MegaTileList tiles;
        tiles.num_blocks = tables.first_block[params.shape.local_experts()];
        tiles.tile_rows = tile_rows_for(params, tiles.num_blocks);
        tiles.first_tiles = 2 * params.shape.intermediate / tiles.tile_rows;
        tiles.second_tiles = (params.shape.hidden + tiles.tile_rows - 1) / tiles.tile_rows;
        tiles.lag = min(params.lag, tiles.num_blocks);
        return tiles;
    }

    // Fills in what belongs to the tile's block.
    __device__ __forceinline__ static void find_block(const MegaMoeParams& params, const Tables& tables, MegaTile& tile) {
        int low = 0, high = params.shape.local_experts();  // first_block[low] <= block < first_block[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (tables.first_block[middle] <= tile.block) {
                low = middle;
            } else {
                high = middle;
            }
        }
        tile.expert = low;
        tile.first = (tile.block - tables.first_block[low]) * kTokens;
        tile.count = min(kTokens, tables.counts[low] - tile.first);
    }

    // ---- dispatch ----

    // Copies rows of the pool: each of the CTA's warps that dispatch takes one if it `helps`, else (the first of them) also
    // what comes behind the first row of every warp of the grid.
    __device__ __forceinline__ static void dispatch(const MegaMoeParams& params, const Tables& tables, int num_blocks,
                                                    int warp, bool helps) {
        const int rows = num_blocks * kTokens, grid = gridDim.x;
        int row = warp * grid + blockIdx.x;
        if (row < rows) dispatch_row(params, tables, row);
        if (helps) return;
#pragma unroll 1
        for (row = (kRoles.dispatch_warps + warp) * grid + blockIdx.x; row < rows; row += kRoles.dispatchers * grid) {
            dispatch_row(params, tables, row);
        }
    }

    __device__ __forceinline__ static void dispatch_row(const MegaMoeParams& params, const Tables& tables, int row) {
        const int lane = thread_index() % 32, in_block = row % kTokens;
        MegaTile block;
        block.block = row / kTokens;
        find_block(params, tables, block);
        if (in_block >= block.count) return;
        const MegaMoeSource source = source_of(params, block, in_block);
        const int token = source.choice / params.shape.topk;
        const int64_t row_bytes = int64_t{params.shape.hidden} * params.shape.element_bytes();
        const uint8_t* from = remote<const uint8_t>(params, source.rank, params.offsets.x) + token * row_bytes;
        uint8_t* pool = local<uint8_t>(params, params.offsets.pool_x);
        const int groups = params.shape.hidden / kMegaMoeGranK;
        const auto* scales = remote<const uint32_t>(params, source.rank, params.offsets.x_sf) + int64_t{token} * groups;
        if constexpr (PoolTokens::kConverts) {
            PoolTokens::template convert<kRoles.few_registers ? 2 : 4>(from, scales, pool + 2 * row * row_bytes, groups, lane);
        } else {
            copy_row(reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(pool + row * row_bytes),
                     static_cast<int>(row_bytes / 16), lane);
        }
        if constexpr (kRoles.has_scales) {
            uint32_t* pool_scales = local<uint32_t>(params, params.offsets.pool_x_sf) + row;
            const int64_t pitch = params.shape.pool_rows();
            for (int i = lane; i < groups; i += 32) pool_scales[i * pitch] = __ldcg(scales + i);
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
        constexpr int kFlight = kRoles.few_registers ? 4 : 14;
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

    // ---- tiles of a CTA ----

    // One warp: takes tiles off the list, the first one by the CTA's number, and queues them, each when the tile kRoles.ahead
    // before it is done: early enough for the loads, late enough not to leave other CTAs without work at the end.
    // `loads(tile)` is what the warp does for each.
    template <class Loads>
    __device__ __forceinline__ static void take_tiles(const MegaMoeParams& params, Tables& tables, MegaMoeHeader& header,
                                                      const MegaTileList& tiles, Loads&& loads) {
        constexpr int kSlots = Queue::kSlots, kAhead = kRoles.ahead;
        static_assert(kAhead <= kSlots);
        const int lane = thread_index() % 32;
        int index = blockIdx.x;
#pragma unroll 1
        for (int taken = 0;; ++taken) {
            const int slot = taken % kSlots, before = taken - kAhead;
            const bool is_end = index >= tiles.size();
            MegaTile tile = {};
            tile.num_k_blocks = -1;
            if (!is_end) {
                tiles.locate(index, tile);
                find_block(params, tables, tile);
                const int rows_of_expert = tile.is_second ? params.shape.hidden : 2 * params.shape.intermediate;
                tile.weight_row = tile.expert * rows_of_expert + tile.weights * tiles.tile_rows;
                tile.num_k_blocks = (tile.is_second ? params.shape.intermediate : params.shape.hidden) / kRoles.block_k;
            }
            if (before >= 0) ptx::mbarrier_wait(tables.queue.empty[before % kSlots], before / kSlots % 2);
            if (lane == 0) {
                tables.queue.tiles[slot] = tile;
                ptx::mbarrier_arrive(tables.queue.full[slot]);
                if (!is_end) index = gridDim.x + atomicAdd(&header.next_tile, 1u);
            }
            if (is_end) return;
            index = __shfl_sync(0xffffffff, index, 0);
            loads(tile);
        }
    }

    // Until bulk copies find the tokens of a tile's block, or what their first linear has made of them. All CTAs of this rank
    // are running, and get there: no time-out.
    __device__ __forceinline__ static void wait_for_tokens(const MegaMoeParams& params, const MegaTile& tile,
                                                           int first_tiles) {
        const uint32_t* ready =
            local<uint32_t>(params, tile.is_second ? params.offsets.activated : params.offsets.dispatched) + tile.block;
        const uint32_t all = tile.is_second ? first_tiles : tile.count;
        while (load_acquire_gpu(ready) != all) __nanosleep(20);
        fence_async_global();
    }

    // By a whole warp.
    __device__ __forceinline__ static void release(ptx::Barrier& empty, int lane) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(empty);
    }

    // ---- SwiGLU ----

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

    // ---- results of the second linear ----

    // 64 columns, from `column` on, of `count` tokens from the tile's `first` on: to the combine buffers of the tokens' ranks,
    // by 128 threads. In shared memory they lie as [token][64 columns], 16-byte pieces swizzled.
    template <int kUnroll>
    __device__ __forceinline__ static void send_results(const MegaMoeParams& params, const MegaTile& tile,
                                                        const uint8_t* staging, int first, int count, int column,
                                                        int thread) {
        const int piece = thread % 8;
#pragma unroll(kUnroll)
        for (int token = thread / 8; token < count; token += 16) {
            const MegaMoeSource source = source_of(params, tile, first + token);
            const uint4 values = *reinterpret_cast<const uint4*>(staging + token * 128 + (piece ^ token % 8) * 16);
            __nv_bfloat16* row = remote<__nv_bfloat16>(params, source.rank, params.offsets.combine) +
                                 int64_t{source.choice} * params.shape.hidden;
            *reinterpret_cast<uint4*>(row + column + piece * 8) = values;
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
            // to the ranks. To this rank alone the counter tells it all.
            const bool has_peers = params.shape.num_ranks > 1;
            if (has_peers) __threadfence_system();
            if (is_last_cta(&header.computed)) {
                if (has_peers) __threadfence_system();
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
        constexpr int kPieces = kRoles.few_registers ? 2 : 4;  // of eight columns, of a lane
        constexpr bool kTwoResults = !kRoles.few_registers;    // at once, if there is room for them
        const int lane = thread_index() % 32, topk = params.shape.topk;
        const int per_row = params.shape.hidden / 8, segments = (per_row + kPieces * 32 - 1) / (kPieces * 32);
        // In 32 bits: the combine buffer has more than 1024 bytes for each.
        const int count = params.num_tokens * segments, step = gridDim.x * (kRoles.threads / 32);
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
        const int first = blockIdx.x * kRoles.threads + thread_index(), step = gridDim.x * kRoles.threads;
        for (int i = first; i < params.shape.local_experts(); i += step) counts[i] = 0;
        for (int i = first; i < num_blocks; i += step) dispatched[i] = activated[i] = 0;
    }
};

// The kernel behind each layer, for the message that its own cannot print: `kernel` is its name. (assert() without room for
// a printf's arguments: the file's name is the message, and the line the rank.)
__device__ __forceinline__ void report_time_out(const MegaMoeCheckParams& params, const char* kernel) {
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    const uint32_t failure = __ldcg(&params.header->failure);
    if (failure == 0 || thread_index() > 0) return;
    const uint32_t rank = failure & 0xffff;
    constexpr const char* kMessage = "deep_gemm Mega MoE: timed out waiting for rank";
    switch (static_cast<MegaMoeStep>(failure >> 16)) {
        case MegaMoeStep::kEnter: __assertfail("enter: its inputs are there", kMessage, rank, kernel, 1);
        case MegaMoeStep::kRoute: __assertfail("route: all its CTAs are running", kMessage, rank, kernel, 1);
        case MegaMoeStep::kLeave: __assertfail("leave: its results are there", kMessage, rank, kernel, 1);
    }
}

}  // namespace deep_gemm
