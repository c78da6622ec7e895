// Tile sizes and shared memory of MQA logits on SM100: plain C++, so that host and device cannot disagree.
#pragma once

#include "../device/mqa_logits_params.h"
#include "../host/mqa_logits_row.h"

namespace deep_gemm::sm100 {

inline constexpr int kMqaKeys = 128;     // of a tile: one for each lane of tensor memory

// What depends on the type of queries and keys.
struct MqaType {
    bool fp4;

    constexpr int max_row_bytes() const { return fp4 ? 64 : 128; }  // of a head or a key of 128 elements
    // (token, head) pairs of a group at most. Two accumulators of 256 columns leave tensor memory no room for scales.
    constexpr int cols() const { return fp4 ? 192 : 256; }
    constexpr int stages() const { return fp4 ? 12 : 8; }
    constexpr int threads() const { return (fp4 ? 13 : 12) * 32; }
    // FP4: scales of keys and queries once more, as the tensor core wants them.
    constexpr int turned_scale_bytes() const { return fp4 ? stages() * kMqaKeys * 4 + kMqaQueryStages * 256 * 4 : 0; }
    // Keys, queries, scales and weights, and what is left for ranges, groups and barriers.
    constexpr int shared_bytes() const {
        return (stages() * kMqaKeys + kMqaQueryStages * cols()) * (max_row_bytes() + 4) + turned_scale_bytes() + 4 * 1024;
    }
};

inline constexpr int kMqaFp8Cols = MqaType{false}.cols(), kMqaFp4Cols = MqaType{true}.cols();

// Any head_dim, as many tokens as there are.
inline constexpr MqaRow kMqaRows[] = {
    // heads, head_dim, cols, parts, warpgroups, paged, arch, fp4
    {64, 0, kMqaFp8Cols, 1, 2, false, 100}, {32, 0, kMqaFp8Cols, 1, 2, false, 100},
    {16, 0, kMqaFp8Cols, 1, 2, false, 100}, {8, 0, kMqaFp8Cols, 1, 2, false, 100},
    {64, 0, kMqaFp8Cols, 1, 2, true, 100},  {32, 0, kMqaFp8Cols, 1, 2, true, 100},
    {16, 0, kMqaFp8Cols, 1, 2, true, 100},  {8, 0, kMqaFp8Cols, 1, 2, true, 100},
    {64, 0, kMqaFp4Cols, 1, 2, false, 100, true}, {32, 0, kMqaFp4Cols, 1, 2, false, 100, true},
    {16, 0, kMqaFp4Cols, 1, 2, false, 100, true}, {8, 0, kMqaFp4Cols, 1, 2, false, 100, true},
    {64, 0, kMqaFp4Cols, 1, 2, true, 100, true},  {32, 0, kMqaFp4Cols, 1, 2, true, 100, true},
    {16, 0, kMqaFp4Cols, 1, 2, true, 100, true},  {8, 0, kMqaFp4Cols, 1, 2, true, 100, true},
};

}  // namespace deep_gemm::sm100
