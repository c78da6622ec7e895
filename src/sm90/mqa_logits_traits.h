// What follows from a row of the table: shared memory, stages, threads. Plain C++, so that the host computes the same.
#pragma once

#include <algorithm>

#include "../device/mqa_logits_params.h"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

inline constexpr int kMqaMaxStages = 24;

struct MqaLayout {
    MqaRow row;

    constexpr int num_threads() const { return 128 * (1 + row.warpgroups); }
    // What setmaxnreg gives a consumer and leaves a producer thread.
    constexpr int consumer_registers() const { return row.warpgroups == 2 ? 232 : 152; }
    constexpr int producer_registers() const { return row.warpgroups == 2 ? 40 : 56; }

    constexpr int q_bytes() const { return row.tile_cols() * row.head_dim; }
    constexpr int kv_bytes() const { return kMqaTileKeys * row.head_dim; }
    constexpr int scale_bytes() const { return kMqaTileKeys * 4; }
    constexpr int group_bytes() const { return row.tile_cols() * 4 + row.tile_tokens() * 12 + 32; }
    constexpr int fixed_bytes() const {
        return kMqaQueryStages * (q_bytes() + group_bytes() + 3 * 8) + 3 * 128 + 8 * 32;
    }
    constexpr int stage_bytes() const { return kv_bytes() + scale_bytes() + 16; }
    // A tile is one warpgroup's, in turns: a multiple of their number keeps each at its own stages.
    constexpr int num_stages() const {
        const int fit = std::min(kMqaMaxStages, (kMaxSharedBytes - fixed_bytes()) / stage_bytes());
        return fit / row.warpgroups * row.warpgroups;
    }
    constexpr int shared_bytes() const { return align_up(fixed_bytes() + num_stages() * stage_bytes(), 1024); }
};

// Why a row cannot be compiled, or null.
constexpr const char* invalid_reason(MqaRow row) {
    const MqaLayout layout{row};
    if (row.heads != 8 && row.heads != 16 && row.heads != 32 && row.heads != 64) return "heads must be 8, 16, 32 or 64";
    if (row.head_dim != 32 && row.head_dim != 64 && row.head_dim != 128) return "head_dim must be 32, 64 or 128";
    if (row.cols % row.heads != 0) return "a column is a (token, head) pair: cols must be a multiple of heads";
    if (row.tile_cols() > 256) return "one TMA box of queries has at most 256 columns";
    if (row.tile_tokens() > 32) return "a warp reads the ranges of all tokens of a tile at once";
    if (row.warpgroups != 2 && row.warpgroups != 3) return "two or three warpgroups consume";
    // Accumulators, weights, sums, and what addresses take.
    if (row.tile_cols() / 2 + row.tile_cols() / 4 + 2 * row.part_tokens() > layout.consumer_registers() - 24) {
        return "too few registers";
    }
    if (layout.num_stages() < 2 * row.warpgroups) return "fewer than two stages a warpgroup fit into shared memory";
    return nullptr;
}

constexpr int first_invalid_mqa_row(const MqaRow* rows, int count) {
    for (int i = 0; i < count; ++i) {
        if (invalid_reason(rows[i]) != nullptr) return i;
    }
    return -1;
}

}  // namespace deep_gemm::sm90
