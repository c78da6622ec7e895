// Tile sizes and shared memory of the Mega MoE kernels: plain C++, so that host and device cannot disagree.
#pragma once

#include <algorithm>

#include "../device/mega_moe_params.h"

namespace deep_gemm::sm90 {

inline constexpr int kMegaBlockBytes = 128;   // of K in a stage
inline constexpr int kMegaTileRows = 256;     // of weights: 128 gates and their ups, or 256 columns of the result
inline constexpr int kMegaThreads = 384;
inline constexpr int kMegaScaleChunk = 32;    // K blocks whose block scales are loaded at once
inline constexpr int kMegaScaleChunks = 2;    // chunks in shared memory

struct MegaMoeLayout {
    int block_tokens;  // the N of the instruction
    bool is_bf16;

    // Tokens whose results are in shared memory at a time.
    constexpr int chunk_tokens() const { return std::min(block_tokens, 64); }
    constexpr int token_tile_bytes() const { return block_tokens * kMegaBlockBytes; }
    constexpr int weight_tile_bytes() const { return kMegaTileRows * kMegaBlockBytes; }
    constexpr int token_scales() const { return is_bf16 ? 0 : std::max(block_tokens, 32); }  // in a stage
    // Results of the first linear, a row of 128 for each token. Rows are 16 bytes apart from a multiple of all banks, so
    // that neighbouring tokens lie in different ones.
    constexpr int activated_pitch() const { return 128 * (is_bf16 ? 2 : 1) + 16; }
    constexpr int activated_bytes() const { return chunk_tokens() * activated_pitch(); }
    constexpr int amax_bytes() const { return is_bf16 ? 0 : 8 * chunk_tokens() * 4; }
    // Those of the second one, [warpgroup][token][64 columns] in BF16.
    constexpr int staging_bytes() const {
        const int bytes = std::max(activated_bytes() + amax_bytes(), 2 * chunk_tokens() * 128);
        return (bytes + 127) / 128 * 128;
    }
    constexpr int stage_bytes() const { return weight_tile_bytes() + token_tile_bytes() + token_scales() * 4; }
    constexpr int fixed_bytes() const {
        constexpr int kBarriers = 1024, kTables = 4 * (2 * kMegaMoeMaxLocalExperts + kMegaMoeMaxRanks + 4);
        return staging_bytes() + kMegaScaleChunks * 2 * kMegaScaleChunk * 4 + kTables + kBarriers;
    }
    constexpr int num_stages() const {
        constexpr int kShared = 227 * 1024;
        return (kShared - fixed_bytes()) / stage_bytes();
    }
    constexpr int shared_bytes() const { return num_stages() * stage_bytes() + fixed_bytes(); }
};

}  // namespace deep_gemm::sm90
