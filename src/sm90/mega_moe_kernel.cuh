// Mega MoE for Hopper: the whole expert layer of a rank in one persistent kernel. For each token t of any rank and each of
// its choices c that names an expert e of this rank:
//   h = quantise(silu(x_t G_e^T) * (x_t U_e^T) * weight_tc),   combine[t, c] = h D_e^T  (into the buffer of t's rank),
// then for the tokens of this rank y_t = sum_c combine[t, c], in the order of c. FP8 operands with FP32 scales, per token
// and 128 elements or per 128 x 128 block of weights, or BF16. Sums are FP32; gates and ups are rounded to BF16 before
// SwiGLU and combine[t, c] is BF16, as where every step is an operator of its own. Or tokens are FP8 and weights FP4, both
// with UE8M0 scales per 32 of K: BF16 holds either's values times their scales exactly. Tokens, and h, become BF16 on their
// way to the pool, weights in the consumers' registers, as those of single products do (bf16_fp4_rows.cuh), and nothing is
// left to scale.
//
// The weights are the instruction's M side, 256 rows of a tile, and tokens its N side, kTokens of one expert, or 64 where a
// block of 128 has no more. l1 holds eight gates, then the eight ups that belong to them, and so on: a thread's accumulators
// are a gate and its up, in the same column. A tile of the first linear is 128 of h's columns.
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
// The other warpgroups, two or, with FP4 weights, four, dispatch, too, before they begin to consume: of W warpgroups w has rows
// (W p + w) 64 .. of the tile in its part p. Where tiles have half the rows, the last two of four leave the barriers and have no
// other work.
//
// barrier        arrivals                                    guards
// full[s]        2 (weights' thread, tokens' thread), bytes  stage s is filled, scales per 32 included
// empty[s]       consumer warps                              stage s may be overwritten
// scales_full    1 (warp 2)                                  a chunk of block scales is there
// scales_empty   consumer warps                              the chunk may be overwritten
// tile full[s]   1 (a lane of warp 2)                        a tile is in slot s of the queue
// tile empty[s]  consumer warps, weights', tokens' thread    all roles are done with it
// named 1        all that consume                            results of the first linear in shared memory
//                256                                         chosen experts, before they consume
// named 2 + w    128                                         results of the second one, of warpgroup w
#pragma once

#include "../device/mega_moe_protocol.cuh"
#include "../device/ptx_tma.cuh"
#include "bf16_fp4_rows.cuh"
#include "mega_moe_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// Registers are given to the consumers where there are so many totals.
constexpr bool mega_moe_sets_registers(int tokens) { return tokens > 64; }

// Warp 3 dispatches until all is done, the consumers before they begin.
constexpr MegaMoeRoles mega_moe_roles(int tokens, MegaMoeType type) {
    const int block_k = type == MegaMoeType::kBF16 ? kMegaBlockBytes / 2 : kMegaBlockBytes;
    const MegaMoeLayout layout{tokens, type};
    const int dispatch_warps = 1 + 4 * layout.consumer_warpgroups();
    const bool sets_registers = mega_moe_sets_registers(tokens), has_scales = type == MegaMoeType::kFP8;
    return {tokens, kMegaTileRows,  block_k, has_scales, layout.threads(), dispatch_warps,
            1,      sets_registers, 2,       layout.halves_tiles()};
}

template <int kTokens, MegaMoeType kType>
using MegaMoeProtocolOf =
    MegaMoeProtocol<mega_moe_roles(kTokens, kType),
                    std::conditional_t<kType == MegaMoeType::kFP8FP4, MegaMoeBf16Tokens, MegaMoeSameTokens>>;

// What Bf16Fp4Block asks for.
template <int kTokens>
struct MegaMoeFp4Traits {
    static constexpr GemmLayout kLayout = MegaMoeLayout{kTokens, MegaMoeType::kFP8FP4}.fp4_layout();
};

template <int kTokens, MegaMoeType kType>
class MegaMoeKernel : MegaMoeProtocolOf<kTokens, kType> {
    using Protocol = MegaMoeProtocolOf<kTokens, kType>;
    using typename Protocol::Queue;
    using typename Protocol::Reader;
    using Protocol::activate, Protocol::pack, Protocol::release;

public:
    static constexpr MegaMoeLayout kLayout{kTokens, kType};

private:
    static_assert(kLayout.invalid_reason() == nullptr);
    static constexpr bool kBF16 = kLayout.is_bf16(), kFP4 = kLayout.is_fp4();
    static constexpr bool kScaled = kType == MegaMoeType::kFP8;  // sums, by scales in the pool and of weights
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kBlockK = kMegaBlockBytes / (kBF16 ? 2 : 1);
    static constexpr int kWeightBlockK = kFP4 ? kPackedBlockK : kBlockK;  // elements of their tensor map
    static constexpr int kWarpgroups = kLayout.consumer_warpgroups();
    static constexpr int kParts = kLayout.parts();  // of 64 rows, of a consumer warpgroup
    static constexpr int kTotals = kTokens / 2;     // registers of a thread, for a part
    static constexpr int kChunk = kLayout.chunk_tokens();
    static constexpr int kConsumerWarps = 4 * kWarpgroups, kConsumers = 32 * kConsumerWarps;
    // Both parts' tiles need not fit into the registers beside the totals.
    static constexpr bool kPartsTogether = kTokens <= 64;
    static constexpr bool kSetRegisters = mega_moe_sets_registers(kTokens);
    static constexpr int kLaunchRegisters = 168, kProducerRegisters = 56, kConsumerRegisters = 224;
    static_assert(128 * 3 * kLaunchRegisters <= 65536 &&
                  128 * (kProducerRegisters + 2 * kConsumerRegisters) <= 128 * 3 * kLaunchRegisters);
    static_assert(kStages >= 3);
    static_assert(!kFP4 || (kLayout.fp4_layout().row_tile_bytes() == kLayout.weight_tile_bytes() &&
                            kLayout.fp4_layout().row_scale_pitch() == kLayout.weight_scales() * 4 &&
                            kLayout.fp4_layout().col_tile_bytes() == kLayout.token_tile_bytes()));

public:
    struct alignas(1024) Storage {
        uint8_t weights[kStages][kLayout.weight_tile_bytes()];
        uint8_t tokens[kStages][kLayout.token_tile_bytes()];
        uint32_t weight_scales[kStages][kLayout.weight_scales() + !kFP4];
        alignas(128) uint8_t staging[kLayout.staging_bytes()];
        alignas(128) float token_scales[kStages][kLayout.token_scales() + (kLayout.token_scales() == 0)];
        alignas(16) float block_scales[kMegaScaleChunks][2][kMegaScaleChunk];
        typename Protocol::Tables tables;
        ptx::Barrier full[kStages];
        ptx::Barrier empty[kStages];
        ptx::Barrier scales_full[kMegaScaleChunks];
        ptx::Barrier scales_empty[kMegaScaleChunks];
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
            shared.tables.queue.init(kConsumerWarps + 2);
            ptx::fence_mbarrier_init();
        }
        const int64_t row_bytes = int64_t{params.shape.hidden} / kBlockK * (kFP4 ? kPackedBlockK : kMegaBlockBytes);
        if (Protocol::fetches(warp) && params.early_bytes > 0) Protocol::prefetch_early(params, row_bytes);
        ptx::grid_dependency_wait();

        Protocol::run(params, shared.tables, warp, row_bytes, [&](MegaMoeHeader& header, const MegaTileList& tiles) {
            compute(params, shared, header, tiles, warp);
        });
    }

private:
    using State = PipelineState<kStages>;

    __device__ __forceinline__ static void compute(const MegaMoeParams& params, Storage& shared, MegaMoeHeader& header,
                                                   const MegaTileList& tiles, int warp) {
        if (warp < 4) {
            if constexpr (kSetRegisters) shrink_registers<kProducerRegisters>();
            if (warp == 0) {
                if (ptx::elect_one()) load_weights(params, shared, tiles.tile_rows);
            } else if (warp == 1) {
                if (ptx::elect_one()) load_tokens(params, shared, tiles.first_tiles);
            } else if (warp == 2) {
                PipelineState<kMegaScaleChunks> scale_state;
                Protocol::take_tiles(params, shared.tables, header, tiles, [&](const MegaTile& tile) {
                    if constexpr (kScaled) load_block_scales(params, shared, tile, tiles.first_tiles, scale_state);
                });
            } else {
                Protocol::dispatch(params, shared.tables, tiles.num_blocks, 0, false);
            }
        } else {
            Protocol::dispatch(params, shared.tables, tiles.num_blocks, warp - 3, true);
            if constexpr (kSetRegisters) grow_registers<kConsumerRegisters>();
            if (kLayout.halves_tiles() && (warp - 4) / 4 * 64 >= tiles.tile_rows) {
                leave_barriers(shared);
            } else {
                consume(params, shared, tiles.tile_rows);
            }
        }
        __syncwarp();
        // What follows is code for all warps alike, which needs as many registers as at the start. The producers may take
        // theirs once the consumers have no use for them any more.
        if (kSetRegisters && warp >= 4) shrink_registers<kLaunchRegisters>();
        __syncthreads();
        if (kSetRegisters && warp < 4) grow_registers<kLaunchRegisters>();
    }

    // ---- producers ----

    __device__ __forceinline__ static void load_weights(const MegaMoeParams& params, Storage& shared, int tile_rows) {
        // As createpolicy.fractional has it.
        constexpr auto kEvictFirst = static_cast<ptx::CacheHint>(0x12f0000000000000ull);
        const ptx::CacheHint hint = params.evicts_weights ? kEvictFirst : ptx::CacheHint::kEvictNormal;
        Reader reader(shared.tables.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.l2_map : params.l1_map;
            const CUtensorMap& scales_map = tile.is_second ? params.l2_sf_map : params.l1_sf_map;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                ptx::Barrier& full = shared.full[state.stage_idx];
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, tile_rows * (kLayout.weight_row_bytes() + (kFP4 ? 4 : 0)));
#pragma unroll
                for (int row = 0; row < kMegaTileRows; row += kLayout.box_rows()) {
                    if (row >= tile_rows) break;
                    uint8_t* to = shared.weights[state.stage_idx] + row * kLayout.weight_row_bytes();
                    ptx::tma_load_2d(map, full, to, k * kWeightBlockK, tile.weight_row + row, hint);
                    if constexpr (kFP4) {
                        ptx::tma_load_2d(scales_map, full, shared.weight_scales[state.stage_idx] + row,
                                         tile.weights * tile_rows + row, tile.expert * tile.num_k_blocks + k, hint);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ static void load_tokens(const MegaMoeParams& params, Storage& shared, int first_tiles) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        constexpr int kBoxesAlongK = kLayout.boxes_along_k();
        Reader reader(shared.tables.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.h_map : params.x_map;
            const CUtensorMap& scales_map = tile.is_second ? params.h_sf_map : params.x_sf_map;
            Protocol::wait_for_tokens(params, tile, first_tiles);
            const int row = tile.block * kTokens;
            const int boxes = is_short(tile.count) ? 1 : kTokens / kChunk;  // along tokens
            const int bytes = boxes * kBoxesAlongK * kLayout.box_bytes() + kLayout.token_scale_bytes();
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                ptx::Barrier& full = shared.full[state.stage_idx];
                ptx::mbarrier_wait(shared.empty[state.stage_idx], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, bytes);
                uint8_t* to = shared.tokens[state.stage_idx];
#pragma unroll
                for (int along_k = 0; along_k < kBoxesAlongK; ++along_k) {
                    const int x = (k * kBoxesAlongK + along_k) * (kBlockK / kBoxesAlongK);
#pragma unroll 1
                    for (int box = 0; box < boxes; ++box, to += kLayout.box_bytes()) {
                        ptx::tma_load_2d(map, full, to, x, row + box * kChunk, kHint);
                    }
                }
                if constexpr (kScaled) {
                    ptx::tma_load_2d(scales_map, full, shared.token_scales[state.stage_idx], row, k, kHint);
                }
            }
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

    // By a warp that does not consume: nothing waits for it.
    __device__ __forceinline__ static void leave_barriers(Storage& shared) {
        static_assert(kStages <= 32 && Queue::kSlots <= 32 && (!kLayout.halves_tiles() || !kScaled));
        const int lane = thread_index() % 32;
        if (lane < kStages) arrive_for_the_last_time(shared.empty[lane]);
        if (lane < Queue::kSlots) arrive_for_the_last_time(shared.tables.queue.empty[lane]);
    }

    __device__ __forceinline__ static void consume(const MegaMoeParams& params, Storage& shared, int tile_rows) {
        const int warpgroup = __shfl_sync(0xffffffff, thread_index() / 128 - 1, 0);
        const int lane = thread_index() % 32;
        State state;
        PipelineState<kMegaScaleChunks> scale_state;
#pragma unroll 1
        for (uint32_t taken = 0;; ++taken) {
            const uint32_t slot = taken % Queue::kSlots;
            ptx::mbarrier_wait(shared.tables.queue.full[slot], taken / Queue::kSlots % 2);
            const int num_k_blocks = shared.tables.queue.tiles[slot].num_k_blocks;
            if (num_k_blocks < 0) break;
            const bool is_second = shared.tables.queue.tiles[slot].is_second;
            float total[kParts][kTotals] = {};
            const auto accumulate = [&]<int kCols>() {
                if constexpr (kBF16) {
                    accumulate_unscaled<kCols>(shared, state, num_k_blocks, warpgroup, lane, total);
                } else if constexpr (kFP4) {
                    accumulate_fp4<kCols>(shared, state, num_k_blocks, warpgroup, total);
                } else {
                    accumulate_scaled<kCols>(shared, state, scale_state, is_second, num_k_blocks, warpgroup, lane, total);
                }
            };
            if (is_short(shared.tables.queue.tiles[slot].count)) {
                accumulate.template operator()<kChunk>();
            } else {
                accumulate.template operator()<kTokens>();
            }
            const MegaTile tile = shared.tables.queue.tiles[slot];
            if (is_second) {
                store_results(params, shared, tile, tile_rows, warpgroup, total);
            } else {
                store_activated(params, shared, tile, tile_rows, warpgroup, total);
            }
            release(shared.tables.queue.empty[slot], lane);
        }
    }

    __device__ __forceinline__ static Descriptor weights_of(Storage& shared, int stage_idx, int part, int warpgroup) {
        return Descriptor(shared.weights[stage_idx] + (part * kWarpgroups + warpgroup) * 64 * kMegaBlockBytes);
    }

    // Of a block's tokens.
    __device__ __forceinline__ static bool is_short(int count) { return kChunk < kTokens && count <= kChunk; }

    // The registers of the first kCols tokens.
    template <int kCols>
    __device__ __forceinline__ static float (&first(float (&total)[kTotals]))[kCols / 2] {
        return reinterpret_cast<float(&)[kCols / 2]>(total);
    }

    // Sums all K blocks of a tile's first kCols tokens into `total`.
    template <int kCols>
    __device__ __forceinline__ static void accumulate_scaled(Storage& shared, State& state,
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
                add_k_block<kCols>(shared, state.stage_idx, state.phase, is_second, blocks, warpgroup, lane, total);
            }
            release(shared.scales_empty[chunk], lane);
        }
    }

    // Adds one K block: total += product * scale of the weights' block * scale of the token.
    template <int kCols>
    __device__ __forceinline__ static void add_k_block(Storage& shared, int s, uint32_t phase, bool is_second,
                                                       const float (&blocks)[2], int warpgroup, int lane,
                                                       float (&total)[kParts][kTotals]) {
        constexpr int kSteps = kMegaBlockBytes / 32;
        const float2* token_scales = reinterpret_cast<const float2*>(shared.token_scales[s]) + lane % 4;
        const Descriptor cols(shared.tokens[s]);
        const auto multiply = [&](int part, float (&accumulator)[kCols / 2]) {
            const Descriptor rows = weights_of(shared, s, part, warpgroup);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                wgmma<kCols>(rows.at(step * 2), cols.at(step * 2), accumulator, step > 0);
            }
        };
        // Rows of a thread, upper and lower: gates and ups, or both of the part's 128 rows of the result.
        const auto promote = [&](int part, const float (&accumulator)[kCols / 2], auto&& scale_of) {
            const float upper = is_second ? blocks[part] : blocks[0];
            const float lower = is_second ? blocks[part] : blocks[1];
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) {
                const float2 scale = scale_of(j);
                total[part][4 * j + 0] += accumulator[4 * j + 0] * (scale.x * upper);
                total[part][4 * j + 1] += accumulator[4 * j + 1] * (scale.y * upper);
                total[part][4 * j + 2] += accumulator[4 * j + 2] * (scale.x * lower);
                total[part][4 * j + 3] += accumulator[4 * j + 3] * (scale.y * lower);
            }
        };
        ptx::mbarrier_wait(shared.full[s], phase);
        if constexpr (kPartsTogether) {
            float2 scales[kCols / 8];
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j) scales[j] = token_scales[j * 4];
            float accumulator[kParts][kCols / 2];
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
            float accumulator[kCols / 2];
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

    // FP4 weights: the tensor core sums all K blocks, and has one half of a part's while the next one is expanded. A part's
    // packed values are read when all of the part before are expanded, in front of the instructions that take these: behind
    // them a load would wait. A stage is given back half a part later than its last instructions are issued.
    template <int kCols>
    __device__ __forceinline__ static void accumulate_fp4(Storage& shared, State& state, int num_k_blocks, int warpgroup,
                                                          float (&total)[kParts][kTotals]) {
        using Block = Bf16Fp4Block<MegaMoeFp4Traits<kCols>>;
        constexpr int kTiles = kTokens / kCols;  // of kCols tokens, for which a stage has room
        const int thread = thread_index() % 128;
        const auto block_of = [&](int part) {
            return Block(shared.weights[0], reinterpret_cast<const uint8_t*>(shared.weight_scales[0]), shared.tokens[0],
                         nullptr, (part * kWarpgroups + warpgroup) * 64, thread);
        };
        const Block blocks[2] = {block_of(0), block_of(kParts - 1)};
        typename Block::Rows rows;
        ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
        blocks[0].load(state.stage_idx, rows);
        int before = -1;
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin_registers(first<kCols>(total[part]));
#pragma unroll 1
        for (int i = 0; i < num_k_blocks; ++i) {
            const int s = state.stage_idx;
            state.advance();
            uint32_t fragments[2][Block::kHalf][4];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Block::expand_half(half, rows, fragments[half]);
                    if (half == 1 && part + 1 < kParts) {
                        blocks[1].load(s, rows);
                    } else if (half == 1 && i + 1 < num_k_blocks) {
                        ptx::mbarrier_wait(shared.full[state.stage_idx], state.phase);
                        blocks[0].load(state.stage_idx, rows);
                    }
                    blocks[part].multiply(s * kTiles, half, fragments[half], first<kCols>(total[part]), true);
                    wgmma_wait<1>();
                    if (part == 0 && half == 0 && before >= 0) release(shared.empty[before], thread % 32);
                }
            }
            before = s;
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin_registers(first<kCols>(total[part]));
        wgmma_wait<0>();
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin_registers(first<kCols>(total[part]));
        release(shared.empty[before], thread % 32);
    }

    // BF16: the tensor core sums all K blocks. While a block's instructions run the next ones are issued, so a stage is
    // given back one block later.
    template <int kCols>
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
            for (int part = 0; part < kParts; ++part) pin_registers(first<kCols>(total[part]));
            wgmma_fence();
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const Descriptor rows = weights_of(shared, s, part, warpgroup);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    wgmma_bf16<kCols, false, false>(rows.at(step * 2), cols.at(step * 2), first<kCols>(total[part]));
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (before >= 0) release(shared.empty[before], lane);
            before = s;
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) pin_registers(first<kCols>(total[part]));
        wgmma_wait<0>();
        release(shared.empty[before], lane);
    }

    // ---- epilogue of the first linear ----

    // SwiGLU, quantisation, and 128 columns of pool_h, or one half of them.
    __device__ __forceinline__ static void store_activated(const MegaMoeParams& params, Storage& shared,
                                                           const MegaTile& tile, int tile_rows, int warpgroup,
                                                           float (&total)[kParts][kTotals]) {
        constexpr int kPairs = kChunk / 8;  // of neighbouring tokens, of a thread
        constexpr int kPitch = kLayout.activated_pitch();
        constexpr int kBytes = kLayout.token_bytes();
        const int thread = thread_index() % 128;
        const int lane = thread % 32, warp = thread / 32;
        const int row = tile.block * kTokens;
        const int64_t pool_rows = params.shape.pool_rows();
        const float* weights = local<const float>(params, params.offsets.pool_weights) + row;
        uint8_t* pool = local<uint8_t>(params, params.offsets.pool_h);
        // A scale is of 128 columns, of all parts and warpgroups, or of 32, of one.
        constexpr int kScales = kFP4 ? kParts : 1;  // of a thread's values of a token
        float* amax = reinterpret_cast<float*>(shared.staging + kLayout.activated_bytes());  // [warp][scale][token]
        constexpr int kSharers = kFP4 ? 4 : kConsumerWarps;  // warps with values under the same scale
        const int first_warp = kFP4 ? warpgroup * 4 : 0;
        const int first_column = tile.weights * (tile_rows / 2), half = first_column / 64 % 2;
        const int column = half * 64 + warpgroup * 32 + warp * 8 + lane / 4;  // of 128, in the first part
        const int consumers = tile_rows / 64 / kParts * 128;
        // All warpgroups may still be storing results of the second linear from this memory; not from where maxima are, if they
        // lie behind all of it.
        if constexpr (kBF16 || kLayout.activated_bytes() < kLayout.results_bytes()) ptx::named_barrier_sync(1, consumers);
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
                ptx::named_barrier_sync(1, consumers);
#pragma unroll
                for (int j = 0; j < kPairs; ++j) {
                    const int at = chunk / 2 + 4 * j, token = 8 * j + lane % 4 * 2;
                    cast::GroupScale first[kScales], second[kScales];
#pragma unroll
                    for (int k = 0; k < kScales; ++k) {
                        float2 most = make_float2(0, 0);
#pragma unroll
                        for (int w = 0; w < kSharers; ++w) {
                            const float2 of_warp = *reinterpret_cast<const float2*>(
                                amax + ((first_warp + w) * kScales + k) * kChunk + token);
                            most.x = cast::max_abs(most.x, of_warp.x);
                            most.y = cast::max_abs(most.y, of_warp.y);
                        }
                        first[k] = cast::quick_group_scale<cast::E4M3>(most.x, kFP4);
                        second[k] = cast::quick_group_scale<cast::E4M3>(most.y, kFP4);
                        if constexpr (kScaled) {
                            // One warp for each pair of tokens writes their scales.
                            if (j % kConsumerWarps - warpgroup * 4 == warp && lane < 4) {
                                float* scales = local<float>(params, params.offsets.pool_h_sf) + tile.weights * pool_rows +
                                                row + chunk + token;
                                *reinterpret_cast<float2*>(scales) = make_float2(first[k].sf, second[k].sf);
                            }
                        }
                    }
                    constexpr int kLast = kScales - 1;  // of the second part
                    constexpr int kOther = kParts - 1;   // the second part, where there is one
                    const uint32_t bytes = cast::to_e4m3x4(
                        total[0][at] * first[0].inverse, total[kOther][at] * first[kLast].inverse,
                        total[0][at + 1] * second[0].inverse, total[kOther][at + 1] * second[kLast].inverse);
                    if constexpr (kFP4) {
                        const float2 upper = e4m3_to_float2(bytes & 0xffff), lower = e4m3_to_float2(bytes >> 16);
                        uint8_t* to = shared.staging + token * kPitch + bf16_token_position(column) * 2;
                        store_pair(to, upper.x * first[0].sf, upper.y * first[kLast].sf);
                        store_pair(to + kPitch, lower.x * second[0].sf, lower.y * second[kLast].sf);
                    } else {
                        uint8_t* to = shared.staging + token * kPitch + column;
                        to[0] = static_cast<uint8_t>(bytes);
                        to[64] = static_cast<uint8_t>(bytes >> 8);
                        to[kPitch] = static_cast<uint8_t>(bytes >> 16);
                        to[kPitch + 64] = static_cast<uint8_t>(bytes >> 24);
                    }
                }
            }
            ptx::named_barrier_sync(1, consumers);
            // Half of 128 columns are, in the order of K beside FP4, every other eight bytes.
            using Piece = std::conditional_t<kLayout.halves_tiles(), uint2, uint4>;
            constexpr int kPieceBytes = sizeof(Piece), kPerRow = 128 * kBytes / kPieceBytes;
            const int count = min(kChunk, tile.count - chunk) * kPerRow, step = kMegaTileRows / tile_rows;
            const int64_t row_bytes = int64_t{params.shape.intermediate} * kBytes;
#pragma unroll 1
            for (int i = (warpgroup * 128 + thread) * step + half; i < count; i += kConsumers) {
                const int token = i / kPerRow, piece = i % kPerRow * kPieceBytes;
                const Piece values = *reinterpret_cast<const Piece*>(shared.staging + token * kPitch + piece);
                uint8_t* to = pool + (row + chunk + token) * row_bytes + first_column / 128 * 128 * kBytes + piece;
                *reinterpret_cast<Piece*>(to) = values;
            }
            if constexpr (kBF16 && kChunk < kTokens) ptx::named_barrier_sync(1, consumers);  // else the maxima's is in between
        }
        fence_async_global();
        ptx::named_barrier_sync(1, consumers);
        if (warpgroup == 0 && thread == 0) {
            add_release_gpu(local<uint32_t>(params, params.offsets.activated) + tile.block, 1);
        }
    }

    // BF16 values of a column of both parts, if there are two, 64 columns apart, in the order of K for FP4 weights.
    __device__ __forceinline__ static void store_pair(uint8_t* to, float first, float second) {
        constexpr int kApart = 2 * (bf16_token_position(64) - bf16_token_position(0));
        *reinterpret_cast<__nv_bfloat16*>(to) = __float2bfloat16_rn(first);
        if constexpr (kParts == 2) *reinterpret_cast<__nv_bfloat16*>(to + kApart) = __float2bfloat16_rn(second);
    }

    // ---- epilogue of the second linear ----

    // Up to 256 columns of each token's row in the combine buffer of its rank.
    __device__ __forceinline__ static void store_results(const MegaMoeParams& params, Storage& shared,
                                                         const MegaTile& tile, int tile_rows, int warpgroup,
                                                         const float (&total)[kParts][kTotals]) {
        const int thread = thread_index() % 128;
        const int lane = thread % 32, warp = thread / 32;
        uint8_t* staging = shared.staging + warpgroup * (kChunk * 128);  // [token][64 columns], 16-byte pieces swizzled
        // Where this lane's row of a matrix of stmatrix goes: of token `lane % 8`, or eight further on in the upper half.
        const int in_pair = lane / 16 * 8 + lane % 8;
        const uint32_t to = ptx::smem_address(staging + in_pair * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int column = tile.weights * tile_rows + (part * kWarpgroups + warpgroup) * 64;
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
                Protocol::template send_results<kSetRegisters ? 1 : 4>(params, tile, staging, chunk, count, column, thread);
                ptx::named_barrier_sync(2 + warpgroup, 128);
            }
        }
    }
};

template <int kTokens, int kType>
__global__ void __launch_bounds__(MegaMoeLayout{kTokens, static_cast<MegaMoeType>(kType)}.threads(), 1)
    sm90_mega_moe(const __grid_constant__ MegaMoeParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Kernel = MegaMoeKernel<kTokens, static_cast<MegaMoeType>(kType)>;
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared_memory));
#endif
}

// Runs behind the kernel above.
__global__ void __launch_bounds__(32) sm90_mega_moe_check(const __grid_constant__ MegaMoeCheckParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    report_time_out(params, "sm90_mega_moe");
#endif
}

}  // namespace deep_gemm::sm90
