// Tile sizes and shared memory of the Mega MoE kernels: plain C++, so that host and device cannot disagree.
#pragma once

#include <algorithm>

#include "../device/mega_moe_params.h"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

inline constexpr int kMegaBlockBytes = 128;   // of K in a stage
inline constexpr int kMegaTileRows = 256;     // of weights: 128 gates and their ups, or 256 columns of the result
inline constexpr int kMegaScaleChunk = 32;    // K blocks whose block scales are loaded at once
inline constexpr int kMegaScaleChunks = 2;    // chunks in shared memory

struct MegaMoeLayout {
    int block_tokens;  // the N of the instruction
    MegaMoeType type;

    constexpr bool is_bf16() const { return type == MegaMoeType::kBF16; }
    constexpr bool is_fp4() const { return type == MegaMoeType::kFP8FP4; }
    // Why there is no such kernel, or null.
    constexpr const char* invalid_reason() const {
        const bool is_height = block_tokens == 16 || block_tokens == 32 || block_tokens == 64 || block_tokens == 128;
        return is_height ? nullptr : "a block has 16, 32, 64 or 128 tokens";
    }
    // Tokens in the pool are BF16, with FP4 weights, too.
    constexpr bool has_bf16_tokens() const { return type != MegaMoeType::kFP8; }
    constexpr int token_bytes() const { return has_bf16_tokens() ? 2 : 1; }

    // FP4 is expanded by so many instructions, one waiting for the other, that two warps of a scheduler do not fill its slots;
    // four do better, where they have registers enough.
    constexpr int consumer_warpgroups() const { return is_fp4() && block_tokens <= 64 ? 4 : 2; }
    constexpr int parts() const { return kMegaTileRows / 64 / consumer_warpgroups(); }  // of 64 rows, of a warpgroup
    constexpr int threads() const { return 128 * (1 + consumer_warpgroups()); }
    // Where few experts have tokens, a tile is one of half the rows, for half of the warpgroups.
    constexpr bool halves_tiles() const { return consumer_warpgroups() == 4; }
    constexpr int box_rows() const { return halves_tiles() ? kMegaTileRows / 2 : kMegaTileRows; }  // that TMA loads at once

    // Tokens of a box of TMA, and of those whose results are in shared memory at a time. A block with no more tokens is a
    // short one: of two boxes only the first is loaded and multiplied.
    constexpr int chunk_tokens() const { return std::min(block_tokens, 64); }
    constexpr int box_bytes() const { return chunk_tokens() * kMegaBlockBytes; }
    // Boxes side by side along K: FP4's stage has two, of 64 elements each.
    constexpr int boxes_along_k() const { return is_fp4() ? 2 : 1; }
    constexpr int token_tile_bytes() const { return boxes_along_k() * block_tokens * kMegaBlockBytes; }
    constexpr int weight_row_bytes() const { return is_fp4() ? kPackedBlockK : kMegaBlockBytes; }
    constexpr int weight_tile_bytes() const { return kMegaTileRows * weight_row_bytes(); }
    constexpr int weight_scales() const { return is_fp4() ? kMegaTileRows : 0; }  // words of four, in a stage
    // In a stage; TMA writes them to a multiple of 128 bytes.
    constexpr int token_scales() const { return has_bf16_tokens() ? 0 : std::max(block_tokens, 32); }
    constexpr int token_scale_bytes() const { return has_bf16_tokens() ? 0 : block_tokens * 4; }
    // A stage with FP4 weights is one of single products.
    constexpr GemmLayout fp4_layout() const {
        return {{kMegaTileRows, block_tokens, 1, 1, 1, true, kUE8M0Scaling, 32, OperandType::kBF16FP4}};
    }

    // Results of the first linear, a row of 128 for each token. Rows are 16 bytes apart from a multiple of all banks, so
    // that neighbouring tokens lie in different ones.
    constexpr int activated_pitch() const { return 128 * token_bytes() + 16; }
    constexpr int activated_bytes() const { return chunk_tokens() * activated_pitch(); }
    // Of each consumer warp for each token; with FP4 those of its parts are in different 32.
    constexpr int amax_bytes() const {
        return is_bf16() ? 0 : 4 * consumer_warpgroups() * (is_fp4() ? parts() : 1) * chunk_tokens() * 4;
    }
    // Those of the second one, [warpgroup][token][64 columns] in BF16.
    constexpr int results_bytes() const { return consumer_warpgroups() * chunk_tokens() * 128; }
    constexpr int staging_bytes() const {
        const int bytes = std::max(activated_bytes() + amax_bytes(), results_bytes());
        return (bytes + 127) / 128 * 128;
    }
    constexpr int stage_bytes() const {
        return weight_tile_bytes() + token_tile_bytes() + (weight_scales() + token_scales()) * 4;
    }
    constexpr int fixed_bytes() const {
        constexpr int kBarriers = 2048, kTables = 4 * (2 * kMegaMoeMaxLocalExperts + kMegaMoeMaxRanks + 4);
        return staging_bytes() + kMegaScaleChunks * 2 * kMegaScaleChunk * 4 + kTables + kBarriers;
    }
    constexpr int num_stages() const {
        constexpr int kShared = 227 * 1024;
        return (kShared - fixed_bytes()) / stage_bytes();
    }
    constexpr int shared_bytes() const { return num_stages() * stage_bytes() + fixed_bytes(); }
};

}  // namespace deep_gemm::sm90
