// What the host passes to the Mega MoE kernels, and the layout of a rank's buffer. Plain C++: included on both sides.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace deep_gemm {

inline constexpr int kMegaMoeMaxRanks = 128;
inline constexpr int kMegaMoeMaxLocalExperts = 512;
inline constexpr int kMegaMoeMinBlockTokens = 16;    // of all kernels' blocks of tokens the shortest,
inline constexpr int kMegaMoeMaxBlockTokens = 128;   // and the longest
inline constexpr int kMegaMoeGranK = 128;            // elements along K that share a scale, or a word of four

// Of tokens and weights. Tokens are FP8 beside FP4 weights, too.
enum class MegaMoeType : int { kFP8, kBF16, kFP8FP4 };

// What another rank can be late for.
enum class MegaMoeStep : uint32_t { kEnter = 1, kRoute, kLeave };

// The beginning of a buffer. Zero before the first call.
struct MegaMoeHeader {
    uint32_t epoch;          // calls that are over
    uint32_t routed;         // CTAs that have sorted their tokens; back at 0 when all have
    uint32_t routed_epoch;   // the call in which all had last
    uint32_t computed;       // CTAs without tasks left; back at 0 when all have
    uint32_t finished;       // CTAs that are done with this buffer; back at 0 when all are
    uint32_t next_tile;      // tiles taken off the list, but for the first of each CTA; back at 0 at the end of a call
    uint32_t failure;        // 0, or the step and the rank of a time-out
    uint32_t unused[249];
    // Written by the ranks, each in its own place: the call in the upper half, how many tokens it has in the lower one.
    uint64_t arrived[kMegaMoeMaxRanks];
    // The call whose results the rank has written to my combine buffer.
    uint32_t combined[kMegaMoeMaxRanks];
};

// One choice of one token, of any rank.
struct MegaMoeSource {
    int rank;
    int choice;  // token * topk + which of its choices
};

struct MegaMoeShape {
    int num_ranks;
    int num_experts;
    int max_tokens;  // of a rank
    int topk;
    int hidden;
    int intermediate;
    MegaMoeType type;

    constexpr bool is_bf16() const { return type == MegaMoeType::kBF16; }
    constexpr bool is_fp4() const { return type == MegaMoeType::kFP8FP4; }
    constexpr int local_experts() const { return num_experts / num_ranks; }
    constexpr int element_bytes() const { return is_bf16() ? 2 : 1; }                 // of tokens
    constexpr int pool_element_bytes() const { return is_bf16() || is_fp4() ? 2 : 1; }  // for which the pool has room
    // Tokens that one expert can get: a token chooses an expert once.
    constexpr int64_t expert_rows() const { return int64_t{num_ranks} * max_tokens; }
    constexpr int64_t max_choices() const {
        return expert_rows() * (topk < local_experts() ? topk : local_experts());
    }
    // Rows of the pool: each expert's begin with a new block.
    constexpr int64_t pool_rows() const {
        const int64_t rows = max_choices() + int64_t{local_experts()} * (kMegaMoeMaxBlockTokens - 1);
        return (rows + kMegaMoeMaxBlockTokens - 1) / kMegaMoeMaxBlockTokens * kMegaMoeMaxBlockTokens;
    }
    constexpr int64_t max_blocks() const { return max_choices() / kMegaMoeMinBlockTokens + local_experts(); }
};

// Where things are in a rank's buffer, bytes from its beginning. The callers write what comes first, up to the weights;
// deep_gemm_ops/mega_moe.py has the same layout.
struct MegaMoeOffsets {
    int64_t x;             // [max_tokens, hidden], FP8 or BF16
    int64_t x_sf;          // [max_tokens, hidden / 128], not with BF16, as all scales: FP32, or UE8M0 words with FP4
    int64_t topk_idx;      // int64 [max_tokens, topk]
    int64_t topk_weights;  // FP32 [max_tokens, topk]
    int64_t combine;       // BF16 [max_tokens, topk, hidden], written by the experts' owners

    // From here on this rank's own business.
    int64_t counts;        // int32 [local experts], tokens of each
    int64_t dispatched;    // int32 [blocks], tokens of the block that are in the pool
    int64_t activated;     // int32 [blocks], tiles of its first linear that are done
    int64_t sources;       // MegaMoeSource [local experts, expert_rows]
    int64_t pool_weights;  // FP32 [pool rows]
    int64_t pool_x;        // [pool rows, hidden]; beside FP4 weights BF16 without scales on SM90, FP8 on SM100
    int64_t pool_x_sf;     // FP32 [hidden / 128, pool rows], or words
    int64_t pool_h;        // [pool rows, intermediate], likewise
    int64_t pool_h_sf;     // [intermediate / 128, pool rows], likewise
    int64_t bytes;         // of all

    MegaMoeOffsets() = default;
    constexpr explicit MegaMoeOffsets(const MegaMoeShape& shape) : MegaMoeOffsets() {
        const int64_t tokens = shape.max_tokens, pool = shape.pool_rows(), experts = shape.local_experts();
        const int64_t scale = shape.is_bf16() ? 0 : 4;
        const int64_t hidden_groups = shape.hidden / kMegaMoeGranK, groups = shape.intermediate / kMegaMoeGranK;
        bytes = align(sizeof(MegaMoeHeader));
        x = take(tokens * shape.hidden * shape.element_bytes());
        x_sf = take(tokens * hidden_groups * scale);
        topk_idx = take(tokens * shape.topk * 8);
        topk_weights = take(tokens * shape.topk * 4);
        combine = take(tokens * shape.topk * shape.hidden * 2);
        counts = take(experts * 4);
        dispatched = take(shape.max_blocks() * 4);
        activated = take(shape.max_blocks() * 4);
        sources = take(experts * shape.expert_rows() * static_cast<int64_t>(sizeof(MegaMoeSource)));
        pool_weights = take(pool * 4);
        pool_x = take(pool * shape.hidden * shape.pool_element_bytes());
        pool_x_sf = take(pool * hidden_groups * scale);
        pool_h = take(pool * shape.intermediate * shape.pool_element_bytes());
        pool_h_sf = take(pool * groups * scale);
    }

private:
    static constexpr int64_t align(int64_t bytes) { return (bytes + 1023) / 1024 * 1024; }
    constexpr int64_t take(int64_t size) {
        const int64_t offset = bytes;
        bytes += align(size);
        return offset;
    }
};

// Scales of FP8 weights, a block of 128 x 128 each: FP32, any strides, in elements.
struct MegaMoeBlockScales {
    const float* data;
    int64_t stride_expert;
    int64_t stride_row;
    int64_t stride_k;
};

struct MegaMoeParams {
    CUtensorMap l1_map;    // [local experts * 2 * intermediate, hidden], boxes of 256 rows or, of tiles that can be halved, 128
    CUtensorMap l2_map;    // [local experts * hidden, intermediate], likewise
    CUtensorMap x_map;     // pool_x, boxes of a block of tokens
    CUtensorMap h_map;     // pool_h, likewise
    CUtensorMap x_sf_map;  // pool_x_sf, a block's of 128 of K; unset where there are no scales
    CUtensorMap h_sf_map;  // pool_h_sf, likewise
    CUtensorMap l1_sf_map;     // FP4's UE8M0 words, [local experts * hidden / 128, 2 * intermediate], likewise; else unset
    CUtensorMap l2_sf_map;     // [local experts * intermediate / 128, hidden], likewise
    MegaMoeBlockScales l1_sf;  // FP8: a row for each 128 gates, then one for each 128 ups
    MegaMoeBlockScales l2_sf;
    MegaMoeOffsets offsets;
    MegaMoeShape shape;
    uint8_t* buffer;                   // of this rank
    uint8_t* peers[kMegaMoeMaxRanks];  // of all ranks, this one too
    void* y;                           // BF16 [num_tokens, hidden]
    int64_t y_stride;
    int* stats;                        // int32 [local experts] or null: the tokens of this call are added
    uint64_t timeout_ns;
    int rank;
    int num_tokens;
    int lag;                           // blocks by which the second linear is behind the first
    int prefetch_bytes;                // of each row of a CTA's first tile of weights; 0: none, otherwise a multiple of 16
    int early_bytes;                   // SM90: likewise, before it is known which experts are chosen
    int most_half_tiles;               // SM90, FP4: tiles have half the rows where the first linear has no more of those
    const uint8_t* l1;                 // what l1_map maps
    bool evicts_weights;               // first from L2
    bool clamped;
    float clamp;
};

struct MegaMoeCheckParams {
    const MegaMoeHeader* header;
};

}  // namespace deep_gemm
