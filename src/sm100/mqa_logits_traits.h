// Tile sizes and shared memory of FP8 MQA logits on SM100: plain C++, so that host and device cannot disagree.
#pragma once

#include "../device/mqa_logits_params.h"
#include "../host/mqa_logits_row.h"

namespace deep_gemm::sm100 {

inline constexpr int kMqaKeys = 128;     // of a tile: one for each lane of tensor memory
inline constexpr int kMqaCols = 256;     // (token, head) pairs of a group at most
inline constexpr int kMqaStages = 8;
inline constexpr int kMqaMaxHeadDim = 128;
inline constexpr int kMqaThreads = 12 * 32;

// Any head_dim, as many tokens as there are.
inline constexpr MqaRow kMqaRows[] = {
    // heads, head_dim, cols, parts, warpgroups, paged, arch
    {64, 0, kMqaCols, 1, 2, false, 100}, {32, 0, kMqaCols, 1, 2, false, 100},
    {16, 0, kMqaCols, 1, 2, false, 100}, {8, 0, kMqaCols, 1, 2, false, 100},
    {64, 0, kMqaCols, 1, 2, true, 100},  {32, 0, kMqaCols, 1, 2, true, 100},
    {16, 0, kMqaCols, 1, 2, true, 100},  {8, 0, kMqaCols, 1, 2, true, 100},
};

// Keys, queries, scales and weights, and what is left for ranges, groups and barriers.
constexpr int mqa_shared_bytes() {
    return kMqaStages * kMqaKeys * (kMqaMaxHeadDim + 4) + kMqaQueryStages * kMqaCols * (kMqaMaxHeadDim + 4) + 4 * 1024;
}

}  // namespace deep_gemm::sm100
