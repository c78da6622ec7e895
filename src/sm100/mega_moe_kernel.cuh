// Mega MoE for Blackwell: the whole expert layer of a rank in one persistent kernel. For each token t of any rank and each of
// its choices c that names an expert e of this rank:
//   h = round(silu(x_t G_e^T) * (x_t U_e^T) * weight_tc),   combine[t, c] = h D_e^T  (into the buffer of t's rank),
// then for the tokens of this rank y_t = sum_c combine[t, c], in the order of c. Tokens, weights and h are BF16; or tokens
// and h are FP8, weights FP4, each with a UE8M0 scale per row and 32 elements, which the tensor core applies. Sums are FP32
// in tensor memory; gates and ups are rounded to BF16 before SwiGLU and combine[t, c] is BF16, as where every step is an
// operator of its own.
//
// The weights are the instruction's M side, 128 rows of each of a tile's parts, and tokens its N side, kTokens of one expert.
// l1 holds eight gates, then the eight ups that belong to them, and so on: read from tensor memory 16 lanes at a time, a
// gate and its up come to the same thread. A part of a tile of the first linear is 64 of h's columns.
//
// The steps of a call, the same as on Hopper: device/mega_moe_protocol.cuh and docs/mega_moe.md.
//
// Warp 0: a thread loads weights and their scales, warp 1: tokens and theirs, warp 2 takes tiles, warps 3, 10 and 11
// dispatch. Warp 8: a thread issues all tensor-core operations. Warp 9 turns scales round: TMA delivers a word for each row,
// the tensor core wants word 32 j + r in row r, column j. Warps 4 to 7 finish tiles; each has a quarter of tensor memory.
// They dispatch, too, before they begin. Tiles go from warp 2 to the other roles in a queue.
//
// barrier               arrivals                                    guards
// full[s]               2 (weights' thread, tokens' thread), bytes  stage s is filled
// ready[s]              1 (warp 9)                                  its scales have been turned round
// empty[s]              1 (commit)                                  stage s has been multiplied
// accumulator_full[a]   1 (commit)                                  accumulator a is complete
// accumulator_empty[a]  warps 4 to 7                                accumulator a has been read
// tile full[q]          1 (a lane of warp 2)                        a tile is in slot q of the queue
// tile empty[q]         all roles that read it                      all roles are done with it
// named 1               128; 256 at first                           results of warps 4 to 7 in shared memory; chosen experts
#pragma once

#include "../device/mega_moe_protocol.cuh"
#include "../device/ptx_tma.cuh"
#include "mega_moe_traits.h"
#include "tcgen05.cuh"

namespace deep_gemm::sm100 {

constexpr MegaMoeRoles mega_moe_roles(int tokens, MegaMoeType type) {
    const MegaMoeLayout layout{tokens, type};
    return {tokens, layout.tile_rows(), layout.block_k(), !layout.is_bf16(), kMegaThreads, 3 + kEpilogueWarps, 3, false, 3};
}

template <int kTokens, MegaMoeType kType>
class MegaMoeKernel : MegaMoeProtocol<mega_moe_roles(kTokens, kType)> {
    using Protocol = MegaMoeProtocol<mega_moe_roles(kTokens, kType)>;
    using typename Protocol::Reader;
    using Protocol::activate, Protocol::pack, Protocol::release;

    static constexpr MegaMoeLayout kLayout{kTokens, kType};
    static_assert(kLayout.invalid_reason() == nullptr);
    static constexpr bool kBF16 = kLayout.is_bf16();
    static constexpr int kStages = kLayout.num_stages();
    static constexpr int kParts = kLayout.parts();
    static constexpr int kAccumulatorsOfRing = kLayout.accumulators();
    static constexpr int kBlockK = kLayout.block_k();
    static constexpr int kChunk = kLayout.chunk_tokens();
    static constexpr int kGroup = kTokens < 32 ? kTokens : 32;  // tokens that a thread reads from tensor memory at once
    static constexpr int kScaleGroup = 32;                      // columns of h that share a scale
    static_assert(kStages >= 3 && kAccumulatorsOfRing > kParts && kLayout.used_columns() <= kTensorColumns);
    using State = PipelineState<kStages>;
    using AccumulatorState = PipelineState<kAccumulatorsOfRing>;

    enum Warp {
        kWeightWarp = 0,
        kTokenWarp = 1,
        kTileWarp = 2,
        kDispatchWarp = 3,
        kFirstEpilogueWarp = 4,
        kMultiplyWarp = 8,
        kScaleWarp = 9,
        kSecondDispatchWarp = 10
    };

public:
    struct alignas(1024) Storage {
        uint8_t weights[kStages][kLayout.weight_tile_bytes()];
        uint8_t tokens[kStages][kLayout.token_tile_bytes()];
        alignas(128) uint8_t staging[kLayout.staging_bytes()];
        alignas(128) uint32_t scales[kStages][kLayout.scale_words() + (kLayout.scale_words() == 0)];
        typename Protocol::Tables tables;
        ptx::Barrier full[kStages];
        ptx::Barrier ready[kStages];
        ptx::Barrier empty[kStages];
        ptx::Barrier accumulator_full[kAccumulatorsOfRing];
        ptx::Barrier accumulator_empty[kAccumulatorsOfRing];
        uint32_t tensor_memory;
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
                ptx::mbarrier_init(shared.ready[s], 1);
                ptx::mbarrier_init(shared.empty[s], 1);
            }
            for (int a = 0; a < kAccumulatorsOfRing; ++a) {
                ptx::mbarrier_init(shared.accumulator_full[a], 1);
                ptx::mbarrier_init(shared.accumulator_empty[a], kEpilogueWarps);
            }
            // Read by those that load, multiply and, if there are scales, turn them round, and the epilogue's.
            shared.tables.queue.init(3 + !kBF16 + kEpilogueWarps);
            ptx::fence_mbarrier_init();
        }
        ptx::grid_dependency_wait();
        const int64_t row_bytes = kBF16 ? params.shape.hidden * int64_t{2} : params.shape.hidden / 2;
        Protocol::run(params, shared.tables, warp, row_bytes, [&](MegaMoeHeader& header, const MegaTileList& tiles) {
            compute(params, shared, header, tiles, warp);
        });
    }

private:
    __device__ __forceinline__ static void compute(const MegaMoeParams& params, Storage& shared, MegaMoeHeader& header,
                                                   const MegaTileList& tiles, int warp) {
        if (warp == kMultiplyWarp) {
            tensor_memory_allocate<1>(&shared.tensor_memory, kLayout.allocated_columns());
            fence_before_sync();
        }
        __syncthreads();
        fence_after_sync();
        const uint32_t tensor_memory = shared.tensor_memory;

        if (warp == kWeightWarp) {
            if (ptx::elect_one()) load_weights(params, shared);
        } else if (warp == kTokenWarp) {
            if (ptx::elect_one()) load_tokens(params, shared, tiles.first_tiles);
        } else if (warp == kTileWarp) {
            Protocol::take_tiles(params, shared.tables, header, tiles, [](const MegaTile&) {});
        } else if (warp == kMultiplyWarp) {
            if (ptx::elect_one()) multiply(shared, tensor_memory);
        } else if (warp == kScaleWarp) {
            if constexpr (!kBF16) turn_scales(shared);
        } else if (warp == kDispatchWarp || warp >= kSecondDispatchWarp) {
            const int dispatcher = warp == kDispatchWarp ? 0 : warp - kSecondDispatchWarp + 1;
            Protocol::dispatch(params, shared.tables, tiles.num_blocks, dispatcher, false);
        } else {
            Protocol::dispatch(params, shared.tables, tiles.num_blocks, 3 + warp - kFirstEpilogueWarp, true);
            finish(params, shared, warp - kFirstEpilogueWarp, tensor_memory);
        }

        fence_before_sync();
        __syncwarp();
        __syncthreads();
        if (warp == kMultiplyWarp) tensor_memory_free<1>(tensor_memory, kLayout.allocated_columns());
    }

    // ---- producers ----

    // Words of a part's rows, or with `part` kParts of tokens.
    __device__ __forceinline__ static uint32_t* scales_of(Storage& shared, int stage, int part) {
        return shared.scales[stage] + part * kScaleRows;
    }

    __device__ __forceinline__ static void load_weights(const MegaMoeParams& params, Storage& shared) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        // FP4: 16 values take 8 bytes in memory, and 16 in shared memory.
        constexpr int kBytes =
            kBF16 ? kLayout.weight_tile_bytes() : kLayout.weight_tile_bytes() / 2 + kLayout.tile_rows() * 4;
        Reader reader(shared.tables.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.l2_map : params.l1_map;
            const CUtensorMap& scales_map = tile.is_second ? params.l2_sf_map : params.l1_sf_map;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                const int s = state.stage_idx;
                ptx::mbarrier_wait(shared.empty[s], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(shared.full[s], kBytes);
                ptx::tma_load_2d(map, shared.full[s], shared.weights[s], k * kBlockK, tile.weight_row, kHint);
                if constexpr (!kBF16) {
                    ptx::tma_load_2d(scales_map, shared.full[s], scales_of(shared, s, 0), tile.weights * kLayout.tile_rows(),
                                     tile.expert * tile.num_k_blocks + k, kHint);
                }
            }
        }
    }

    __device__ __forceinline__ static void load_tokens(const MegaMoeParams& params, Storage& shared, int first_tiles) {
        constexpr auto kHint = ptx::CacheHint::kEvictNormal;
        Reader reader(shared.tables.queue);
        State state;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            const CUtensorMap& map = tile.is_second ? params.h_map : params.x_map;
            const CUtensorMap& scales_map = tile.is_second ? params.h_sf_map : params.x_sf_map;
            Protocol::wait_for_tokens(params, tile, first_tiles);
            const int row = tile.block * kTokens;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                const int s = state.stage_idx;
                ptx::mbarrier_wait(shared.empty[s], state.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(shared.full[s], kLayout.token_tile_bytes() + (kBF16 ? 0 : kTokens * 4));
                ptx::tma_load_2d(map, shared.full[s], shared.tokens[s], k * kBlockK, row, kHint);
                if constexpr (!kBF16) {
                    ptx::tma_load_2d(scales_map, shared.full[s], scales_of(shared, s, kParts), row, k, kHint);
                }
            }
        }
    }

    // ---- tensor core ----

    __device__ __forceinline__ static void turn_scales(Storage& shared) {
        const int lane = thread_index() % 32;
        Reader reader(shared.tables.queue);
        State state;
        MegaTile tile;
        while (reader.next(tile)) {
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                const int s = state.stage_idx;
                ptx::mbarrier_wait(shared.full[s], state.phase);
                uint4 words[kParts + 1];
#pragma unroll
                for (int part = 0; part <= kParts; ++part) {
                    const auto at = [&](int i) {
                        return part < kParts || i + lane < kTokens ? scales_of(shared, s, part)[i + lane] : 0u;
                    };
                    words[part] = make_uint4(at(0), at(32), at(64), at(96));
                }
                __syncwarp();
#pragma unroll
                for (int part = 0; part <= kParts; ++part) {
                    reinterpret_cast<uint4*>(scales_of(shared, s, part))[lane] = words[part];
                }
                ptx::fence_async_shared();
                release(shared.ready[s], lane);
            }
        }
    }

    __device__ __forceinline__ static void multiply(Storage& shared, uint32_t tensor_memory) {
        constexpr uint32_t kShape = uint32_t{kTokens} >> 3 << 17;
        constexpr uint32_t kInstruction =
            kBF16 ? kShape | 1u << 4 /* FP32 */ | 1u << 7 | 1u << 10 /* BF16 */ | 128u >> 4 << 24
                  : kShape | 5u << 7 /* rows are E2M1, columns E4M3 */ | 1u << 23 /* UE8M0 */ | 128u >> 7 << 27;
        const uint32_t scales = tensor_memory + kLayout.scale_column();
        Reader reader(shared.tables.queue);
        State state;
        AccumulatorState accumulators;
        MegaTile tile;
        while (reader.template next<false>(tile)) {
            uint32_t accumulator[kParts];
            AccumulatorState of_part = accumulators;
#pragma unroll
            for (int part = 0; part < kParts; ++part, of_part.advance()) accumulator[part] = of_part.stage_idx * kTokens;
#pragma unroll 1
            for (int k = 0; k < tile.num_k_blocks; ++k, state.advance()) {
                const int s = state.stage_idx;
                if constexpr (!kBF16) ptx::mbarrier_wait(shared.ready[s], state.phase);
                ptx::mbarrier_wait(shared.full[s], state.phase);
                fence_after_sync();
                if constexpr (!kBF16) {
                    // Instructions that are queued read the scales before they are replaced: the queue keeps its order.
#pragma unroll
                    for (int part = 0; part <= kParts; ++part) {
                        copy_scales<1>(scales + part * kScaleColumns, scales_of(shared, s, part));
                    }
                }
                const uint64_t cols = k_major_descriptor(shared.tokens[s], kBlockBytes);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    if (k == 0) {
                        const int a = accumulators.stage_idx;
                        ptx::mbarrier_wait(shared.accumulator_empty[a], accumulators.phase ^ 1);
                        fence_after_sync();
                        accumulators.advance();
                    }
                    const uint64_t rows =
                        k_major_descriptor(shared.weights[s] + part * (kBlockRows * kBlockBytes), kBlockBytes);
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        const uint64_t row_step = rows + step * (kStepBytes >> 4), col_step = cols + step * (kStepBytes >> 4);
                        const bool accumulate = k > 0 || step > 0;
                        if constexpr (kBF16) {
                            multiply_bf16<1>(tensor_memory + accumulator[part], row_step, col_step, kInstruction, accumulate);
                        } else {
                            const uint32_t byte = step;  // of the words: the scale of 32 elements
                            multiply_scaled<1>(tensor_memory + accumulator[part], row_step, col_step,
                                               kInstruction | byte << 29 | byte << 4, scales + part * kScaleColumns,
                                               scales + kParts * kScaleColumns, accumulate);
                        }
                    }
                }
                commit<1>(shared.empty[s]);
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) commit<1>(shared.accumulator_full[accumulator[part] / kTokens]);
        }
    }

    // ---- warps 4 to 7 ----

    __device__ __forceinline__ static void finish(const MegaMoeParams& params, Storage& shared, int warp,
                                                  uint32_t tensor_memory) {
        Reader reader(shared.tables.queue);
        AccumulatorState state;
        MegaTile tile;
        while (reader.next(tile)) {
#pragma unroll 1
            for (int part = 0; part < kParts; ++part, state.advance()) {
                const int a = state.stage_idx;
                const uint32_t accumulator = tensor_memory + a * kTokens + (warp * 32 << 16);
                ptx::mbarrier_wait(shared.accumulator_full[a], state.phase);
                fence_after_sync();
                if (tile.is_second) {
                    const int column = (tile.weights * kParts + part) * kBlockRows;
                    store_results(params, shared, tile, column, warp, accumulator, shared.accumulator_empty[a]);
                } else {
                    const int column = (tile.weights * kParts + part) * (kBlockRows / 2);
                    store_activated(params, shared, tile, column, warp, accumulator, shared.accumulator_empty[a]);
                }
            }
            if (!tile.is_second) {
                fence_async_global();
                ptx::named_barrier_sync(1, 128);
                if (warp == 0 && thread_index() % 32 == 0) {
                    add_release_gpu(local<uint32_t>(params, params.offsets.activated) + tile.block, 1);
                }
            }
        }
    }

    // Goes through the tile's tokens, chunk by chunk: `stage(half, chunk, group, values)` for what this thread has of each half
    // of the warp's 32 rows, of kGroup tokens from `group` of the chunk on; then `send(chunk, count)`, when all warps' parts
    // of the chunk are in shared memory. Says when the accumulator has been read.
    template <class Stage, class Send>
    __device__ __forceinline__ static void for_chunks(int num_tokens, uint32_t accumulator, ptx::Barrier& accumulator_empty,
                                                      Stage&& stage, Send&& send) {
#pragma unroll 1
        for (int chunk = 0; chunk < num_tokens; chunk += kChunk) {
            // What was there before has been sent.
            ptx::named_barrier_sync(1, 128);
#pragma unroll 1
            for (int group = 0; group < kChunk && chunk + group < num_tokens; group += kGroup) {
                uint32_t upper[kGroup / 2], lower[kGroup / 2];
                load_fragments(accumulator + chunk + group, upper);
                load_fragments(accumulator + (16 << 16) + chunk + group, lower);
                load_wait(upper, lower);
                if (chunk + group + kGroup >= num_tokens) {
                    fence_before_sync();
                    release(accumulator_empty, thread_index() % 32);
                }
                stage(0, chunk, group, upper);
                stage(1, chunk, group, lower);
            }
            ptx::named_barrier_sync(1, 128);
            send(chunk, min(kChunk, num_tokens - chunk));
        }
    }

    // SwiGLU, rounding or quantisation, and 64 columns of pool_h from `first_column` on.
    __device__ __forceinline__ static void store_activated(const MegaMoeParams& params, Storage& shared,
                                                           const MegaTile& tile, int first_column, int warp,
                                                           uint32_t accumulator, ptx::Barrier& accumulator_empty) {
        constexpr int kPitch = kLayout.activated_pitch();
        const int thread = thread_index() % 128, lane = thread % 32;
        const int row = tile.block * kTokens;
        const float* weights = local<const float>(params, params.offsets.pool_weights) + row;
        float* const staging = reinterpret_cast<float*>(shared.staging);  // [token][column]
        for_chunks(
            tile.count, accumulator, accumulator_empty,
            [&](int half, int chunk, int group, const uint32_t(&values)[kGroup / 2]) {
                const int column = warp * 16 + half * 8 + lane / 4;
#pragma unroll
                for (int j = 0; j < kGroup / 8; ++j) {
                    const int token = group + 8 * j + lane % 4 * 2;
                    const float2 weight = __ldcg(reinterpret_cast<const float2*>(weights + chunk + token));
                    staging[token * kPitch + column] =
                        activate(params, __uint_as_float(values[4 * j]), __uint_as_float(values[4 * j + 2]), weight.x);
                    staging[(token + 1) * kPitch + column] =
                        activate(params, __uint_as_float(values[4 * j + 1]), __uint_as_float(values[4 * j + 3]), weight.y);
                }
            },
            [&](int chunk, int count) {
#pragma unroll 1
                for (int i = thread; i < 2 * kChunk; i += 128) {
                    const int token = i % kChunk, column = i / kChunk * kScaleGroup;
                    if (token >= count) continue;
                    float values[kScaleGroup];
#pragma unroll
                    for (int e = 0; e < kScaleGroup; e += 4) {
                        *reinterpret_cast<float4*>(values + e) =
                            *reinterpret_cast<const float4*>(staging + token * kPitch + column + e);
                    }
                    store_group(params, first_column + column, row + chunk + token, values);
                }
            });
    }

    // 32 columns of a row of pool_h, and their scale.
    __device__ __forceinline__ static void store_group(const MegaMoeParams& params, int column, int64_t row,
                                                       const float (&values)[kScaleGroup]) {
        const int64_t at = row * params.shape.intermediate + column;
        uint8_t* pool = local<uint8_t>(params, params.offsets.pool_h);
        if constexpr (kBF16) {
            uint4* to = reinterpret_cast<uint4*>(pool + at * 2);
#pragma unroll
            for (int e = 0; e < kScaleGroup; e += 8) {
                to[e / 8] = make_uint4(pack(values[e], values[e + 1]), pack(values[e + 2], values[e + 3]),
                                       pack(values[e + 4], values[e + 5]), pack(values[e + 6], values[e + 7]));
            }
        } else {
            float most = 0;
#pragma unroll
            for (int e = 0; e < kScaleGroup; ++e) most = cast::max_abs(most, values[e]);
            const cast::GroupScale scale = cast::quick_group_scale<cast::E4M3>(most, true);
            const auto packed = cast::E4M3::pack(values, scale.inverse);
            uint4* to = reinterpret_cast<uint4*>(pool + at);
#pragma unroll
            for (int e = 0; e < kScaleGroup / 4; e += 4) {
                to[e / 4] = make_uint4(packed.words[e], packed.words[e + 1], packed.words[e + 2], packed.words[e + 3]);
            }
            // A byte of the word that four groups share.
            const int group = column / kScaleGroup;
            uint8_t* scales = local<uint8_t>(params, params.offsets.pool_h_sf);
            scales[(group / 4 * params.shape.pool_rows() + row) * 4 + group % 4] =
                static_cast<uint8_t>(cast::packed_scale(scale.sf));
        }
    }

    // 128 columns, from `first_column` on, of each token's row in the combine buffer of its rank.
    __device__ __forceinline__ static void store_results(const MegaMoeParams& params, Storage& shared,
                                                         const MegaTile& tile, int first_column, int warp,
                                                         uint32_t accumulator, ptx::Barrier& accumulator_empty) {
        const int thread = thread_index() % 128, lane = thread % 32;
        constexpr int kBytes = kChunk * 128;  // of 64 columns: [token][64 columns], 16-byte pieces swizzled
        // Where this lane's row of a matrix of stmatrix goes: of token `lane % 8`, or eight further on in the upper half.
        const int in_pair = lane / 16 * 8 + lane % 8;
        const uint32_t to = ptx::smem_address(shared.staging + warp / 2 * kBytes + in_pair * 128);
        for_chunks(
            tile.count, accumulator, accumulator_empty,
            [&](int half, int, int group, const uint32_t(&values)[kGroup / 2]) {
                const int piece = (warp % 2 * 4 + half * 2 + lane / 8 % 2) ^ lane % 8;
#pragma unroll
                for (int j = 0; j < kGroup / 8; j += 2) {
                    const auto both = [&](int i) {
                        return pack(__uint_as_float(values[4 * j + i]), __uint_as_float(values[4 * j + i + 1]));
                    };
                    ptx::stmatrix_x4_transposed(to + piece * 16 + (group + j * 8) * 128, both(0), both(2), both(4), both(6));
                }
            },
            [&](int chunk, int count) {
                // The last tile of an expert may have a part beyond its rows.
                if (first_column >= params.shape.hidden) return;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Protocol::template send_results<4>(params, tile, shared.staging + half * kBytes, chunk, count,
                                                       first_column + half * 64, thread);
                }
            });
    }
};

// kType: MegaMoeType.
template <int kTokens, int kType>
__global__ void __launch_bounds__(kMegaThreads, 1) sm100_mega_moe(const __grid_constant__ MegaMoeParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    using Kernel = MegaMoeKernel<kTokens, static_cast<MegaMoeType>(kType)>;
    Kernel::run(params, *reinterpret_cast<typename Kernel::Storage*>(shared_memory));
#endif
}

// Runs behind the kernel above.
__global__ void __launch_bounds__(32) sm100_mega_moe_check(const __grid_constant__ MegaMoeCheckParams params) {
#if defined(__CUDA_ARCH_FEAT_SM100_ALL)
    report_time_out(params, "sm100_mega_moe");
#endif
}

}  // namespace deep_gemm::sm100
