// One row of the table of compiled kernels for MQA logits.
#pragma once

namespace deep_gemm {

// A warpgroup multiplies 64 keys by `parts` groups of `cols` columns; a column is a (token, head) pair.
struct MqaRow {
    int heads;       // 8, 16, 32 or 64
    int head_dim;    // 32, 64 or 128; 0: any
    int cols;        // N of the instruction, a multiple of heads
    int parts;       // accumulators of a warpgroup: while one is reduced the tensor core fills the other
    int warpgroups;  // that consume
    bool paged;      // keys come from the blocks of a cache
    int arch = 90;   // 100: sm100/mqa_logits_traits.h, whose kernels take up to `cols` columns and any head_dim
    bool fp4 = false;  // queries and keys, with a scale for each 32 elements

    constexpr int tile_cols() const { return cols * parts; }
    constexpr int part_tokens() const { return cols / heads; }
    constexpr int tile_tokens() const { return tile_cols() / heads; }
};

}  // namespace deep_gemm
