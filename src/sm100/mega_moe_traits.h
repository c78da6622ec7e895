// Tile sizes, shared memory and tensor memory of the Mega MoE kernels: plain C++, so that host and device cannot disagree.
#pragma once

#include <algorithm>

#include "../device/mega_moe_params.h"
#include "gemm_traits.h"

namespace deep_gemm::sm100 {

inline constexpr int kMegaThreads = 384;

struct MegaMoeLayout {
    int block_tokens;  // the N of the instruction
    MegaMoeType type;

    constexpr bool is_bf16() const { return type == MegaMoeType::kBF16; }  // else FP8 tokens, FP4 weights and their scales
    // Why there is no such kernel, or null.
    constexpr const char* invalid_reason() const {
        const bool is_height = block_tokens == 16 || block_tokens == 32 || block_tokens == 64 || block_tokens == 128;
        if (!is_height) return "a block has 16, 32, 64 or 128 tokens";
        return type == MegaMoeType::kFP8 ? "SM100 has no kernel for FP8 weights with FP32 scales" : nullptr;
    }

    constexpr int block_k() const { return kBlockBytes / (is_bf16() ? 2 : 1); }
    // Weights of a tile: 64 gates and their ups, or 128 columns of the result, in each part, which is the M of an instruction.
    // With many tokens two parts share them, which halves what their loads cost.
    constexpr int parts() const { return block_tokens == 128 ? 2 : 1; }
    constexpr int tile_rows() const { return parts() * kBlockRows; }
    constexpr int weight_tile_bytes() const { return tile_rows() * kBlockBytes; }
    constexpr int token_tile_bytes() const { return block_tokens * kBlockBytes; }
    // Of a stage, words: those of each part's rows, then those of tokens, with room for 128.
    constexpr int scale_groups() const { return is_bf16() ? 0 : parts() + 1; }
    constexpr int scale_words() const { return scale_groups() * kScaleRows; }

    // Tokens whose results are in shared memory at a time.
    constexpr int chunk_tokens() const { return std::min(block_tokens, 64); }
    // Results of the first linear, a row of 64 FP32 for each token. Rows are 16 bytes apart from a multiple of all banks, so
    // that neighbouring tokens lie in different ones. Those of the second one are 128 BF16 for each token.
    constexpr int activated_pitch() const { return kBlockRows / 2 + 4; }
    constexpr int staging_bytes() const { return chunk_tokens() * activated_pitch() * 4; }

    // Columns of tensor memory: accumulators first, a ring of them of which each part of a tile takes one, then the scales of
    // each part and of tokens. There is one at least that the next tile need not wait for.
    constexpr int accumulators() const {
        const int room = (kTensorColumns - scale_groups() * kScaleColumns) / block_tokens;
        return std::min(room, kAccumulators * parts());
    }
    constexpr int scale_column() const { return accumulators() * block_tokens; }
    constexpr int used_columns() const { return scale_column() + scale_groups() * kScaleColumns; }
    constexpr int allocated_columns() const {
        int columns = 32;
        while (columns < used_columns()) columns *= 2;
        return columns;
    }

    constexpr int stage_bytes() const { return weight_tile_bytes() + token_tile_bytes() + 4 * scale_words(); }
    constexpr int fixed_bytes() const {
        constexpr int kBarriers = 2048, kTables = 4 * (2 * kMegaMoeMaxLocalExperts + kMegaMoeMaxRanks + 4);
        return staging_bytes() + kTables + kBarriers;
    }
    constexpr int num_stages() const { return std::min(kMaxStages, (kMaxSharedBytes - fixed_bytes()) / stage_bytes()); }
    constexpr int shared_bytes() const { return align_up(fixed_bytes() + num_stages() * stage_bytes(), 1024); }
};

}  // namespace deep_gemm::sm100
