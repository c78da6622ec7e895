// Runs the expert layer of one rank: Mega MoE.
#pragma once

#include <atomic>
#include <cstdint>

#include "../device/mega_moe_params.h"
#include "launcher.h"

namespace deep_gemm {

// Matrices are dense and K-major, experts one behind the other; bases are 16-byte aligned. hidden and intermediate are
// positive multiples of 128.
struct MegaMoeProblem {
    int64_t num_ranks = 1;
    int64_t rank = 0;
    int64_t num_experts = 0;  // of all ranks
    int64_t max_tokens = 0;   // of a rank
    int64_t topk = 0;
    int64_t hidden = 0;
    int64_t intermediate = 0;
    int64_t num_tokens = 0;   // of this rank
    MegaMoeType type = MegaMoeType::kFP8;
    const void* l1 = nullptr;  // [local experts, 2 * intermediate, hidden], eight gates, their ups, the next eight gates, ...
    const void* l2 = nullptr;  // [local experts, hidden, intermediate]; FP4 has two of K a byte
    MegaMoeBlockScales l1_sf = {};      // of FP8
    MegaMoeBlockScales l2_sf = {};
    const int32_t* l1_words = nullptr;  // of FP4: [local experts, hidden / 128, 2 * intermediate], 16-byte aligned
    const int32_t* l2_words = nullptr;  // [local experts, intermediate / 128, hidden], likewise
    const int64_t* buffers = nullptr;  // addresses of all ranks' buffers
    void* y = nullptr;         // BF16 [num_tokens, hidden], rows 16-byte aligned
    int64_t y_stride = 0;
    int32_t* stats = nullptr;  // [local experts] or null
    int clamped = 0;
    float clamp = 0;
    int64_t timeout_ns = 0;
    int64_t expected_m = -1;   // tokens that an expert will get, about; -1: as if all ranks had as many, none masked
};

MegaMoeShape shape_of(const MegaMoeProblem& problem);

// Tokens of a block, by which the kernels differ.
int mega_moe_block_tokens(const MegaMoeProblem& problem);

// What run_mega_moe chooses instead of its own, where it is not -1: for tests and tuning.
struct MegaMoeTuning {
    std::atomic<int> block_tokens{-1};
    std::atomic<int> lag{-1};             // blocks by which the second linear is behind the first
    std::atomic<int> prefetch_bytes{-1};  // of each row of a CTA's first tile of weights, a multiple of 16
    std::atomic<int> evict_weights{-1};   // whether L2 is to drop weights first
    std::atomic<int> early_bytes{-1};     // as prefetch_bytes, while the kernel before this one may still run
    std::atomic<int> tile_rows{-1};       // of weights, where a kernel can halve tiles: 128 or 256
};
MegaMoeTuning& mega_moe_tuning();

// `arch`: 90 or 100. `block_tokens`: 0 chooses. Throws std::runtime_error where a launch fails, or there is no kernel.
void run_mega_moe(const MegaMoeProblem& problem, int arch, int num_sms, int block_tokens, bool pdl, Backend& backend);

}  // namespace deep_gemm
