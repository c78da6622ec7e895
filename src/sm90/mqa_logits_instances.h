// The table of SM90 kernels for FP8 MQA logits. Of several rows that fit a problem, the first one with the fewest columns
// that hold a sequence's tokens is taken, and without a cache the first one.
#pragma once

#include "../host/mqa_logits_row.h"

namespace deep_gemm::sm90 {

inline constexpr MqaRow kMqaRows[] = {
    // heads, head_dim, cols, parts, warpgroups, paged
    {64, 128, 256, 1, 2, false},
    {64, 128, 128, 2, 2, false},
    {64, 128, 128, 1, 3, false},
    {32, 128, 128, 2, 2, false},
    {32, 128, 256, 1, 2, false},
    {16, 128, 128, 1, 3, false},
    {8, 128, 128, 1, 2, false},
    {64, 64, 128, 2, 2, false},
    {32, 64, 128, 2, 2, false},
    {16, 64, 128, 1, 3, false},
    {8, 64, 128, 1, 2, false},
    {64, 32, 128, 2, 2, false},
    {32, 32, 128, 2, 2, false},
    {16, 32, 128, 1, 3, false},
    {8, 32, 128, 1, 2, false},

    {64, 128, 64, 1, 2, true},
    {64, 128, 64, 1, 3, true},
    {64, 128, 128, 1, 2, true},
    {64, 128, 128, 1, 3, true},
    {64, 128, 128, 2, 2, true},
    {32, 128, 64, 1, 2, true},
    {32, 128, 128, 1, 2, true},
    {16, 128, 64, 1, 2, true},
    {16, 128, 128, 1, 2, true},
    {8, 128, 64, 1, 2, true},
    {64, 64, 64, 1, 2, true},
    {64, 64, 128, 2, 2, true},
    {32, 64, 128, 1, 2, true},
    {16, 64, 128, 1, 2, true},
    {8, 64, 64, 1, 2, true},
    {64, 32, 64, 1, 2, true},
    {64, 32, 128, 2, 2, true},
    {32, 32, 128, 1, 2, true},
    {16, 32, 128, 1, 2, true},
    {8, 32, 64, 1, 2, true},
};
inline constexpr int kNumMqaRows = sizeof(kMqaRows) / sizeof(kMqaRows[0]);

}  // namespace deep_gemm::sm90
