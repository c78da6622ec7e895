// What the host passes to the kernels of the indexer's MQA logits. Plain C++: included on both sides.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace deep_gemm {

// Tokens of one sequence that are scored together, where `indices` names the sequence of each token; also what the
// schedule counts as one.
inline constexpr int kMqaAtomTokens = 4;
inline constexpr int kMqaTileKeys = 64;  // what work is counted in; M of SM90's instruction
inline constexpr int kMqaMetadataThreads = 1024;
inline constexpr int kMqaQueryStages = 2;

// int32 vector or matrix in device memory; strides in elements.
struct IntSource {
    const int32_t* data;
    int64_t stride;        // along the first dimension
    int64_t inner_stride;  // along the second
};

// Queries and keys are FP8, a key with an FP32 scale, or both are FP4, a head and a key with a word of UE8M0 scales each.
struct MqaLogitsParams {
    CUtensorMap q_map;      // [tokens * heads, head_dim]
    CUtensorMap kv_map;     // [keys, head_dim]; paged [blocks, block_kv, head_dim]
    CUtensorMap kv_sf_map;  // [1, keys]; paged [blocks, block_kv]
    const uint32_t* q_sf;   // FP4: [tokens, heads]
    int64_t q_sf_stride;
    uint32_t used_scales;   // FP4: bytes of a word, the others may hold anything
    const float* weights;   // [tokens, heads]
    int64_t weights_stride;
    void* logits;           // [tokens, width], FP32 or BF16
    int64_t logits_stride;
    int num_tokens;
    int width;
    int logit_bytes;        // 4: FP32, 2: BF16
    bool clean;             // columns outside of a token's range are set to -inf

    // Dense: token i scores keys start[i] <= j < end[i].
    IntSource start;
    IntSource end;
    int num_keys;
    bool compressed;        // column 0 is key start[i]

    // Paged: tokens are [sequences, next_n], or, with `indices`, one after the other.
    IntSource context_lens;  // [sequences] or [sequences, next_n]
    bool lens_per_token;
    IntSource block_table;   // [table_rows, max_blocks]
    int table_rows;
    int max_blocks;
    int block_kv;            // 64 or 32
    int next_n;              // 1 with `indices`
    // What would take a division, or several instructions, in front of a call's first loads.
    int block_kv_log2;
    int num_atoms;           // sequences, or tokens with `indices`
    int max_length;          // keys that the table and the width have room for
    IntSource indices;       // data is null without it
    const int32_t* schedule;  // [CTAs + 1, 2]

    // SM100, whose kernels take any head_dim.
    int row_bytes;  // of a head, or a key, in shared memory
    int q_rows;     // of a box of q_map
};

struct MqaMetadataParams {
    IntSource context_lens;  // [atoms] or [atoms, lens_per_atom]
    IntSource indices;
    int num_lens;            // of the first dimension
    int lens_per_atom;
    int num_ctas;
    int32_t* schedule;       // [num_ctas + 1, 2]
};

}  // namespace deep_gemm
