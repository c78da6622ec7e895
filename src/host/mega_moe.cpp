#include "mega_moe.h"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>

#include "../sm90/mega_moe_dispatch.h"
#include "../sm90/mega_moe_traits.h"
#include "knobs.h"

namespace deep_gemm {

namespace {

using sm90::kMegaBlockBytes;
using sm90::kMegaTileRows;
using sm90::MegaMoeLayout;

#if DG_WITH_SM90
const void* layer_kernel(const MegaMoeLayout& layout) { return sm90::mega_moe_kernel(layout); }
const void* check_kernel() { return sm90::mega_moe_check_kernel(); }
#else
const void* layer_kernel(const MegaMoeLayout&) { throw std::runtime_error("deep_gemm: built without sm_90a"); }
const void* check_kernel() { throw std::runtime_error("deep_gemm: built without sm_90a"); }
#endif

// A number for each kernel that no row of a table has, for the launcher's notes about kernels.
constexpr int kFirstRow = 300;

int row_of(const MegaMoeLayout& layout) { return kFirstRow + 4 * layout.block_tokens + static_cast<int>(layout.type); }

std::string kernel_name(int row) {
    if (row == kFirstRow) return "sm90_mega_moe_check";
    const int tokens = (row - kFirstRow) / 4, type = (row - kFirstRow) % 4;
    return "sm90_mega_moeILi" + std::to_string(tokens) + "ELi" + std::to_string(type) + "E";
}

void print_config(const MegaMoeProblem& problem, const KernelLaunch& launch) {
    static std::mutex mutex;
    static std::set<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>> printed;
    std::lock_guard lock(mutex);
    if (!printed.insert({problem.num_tokens, problem.hidden, problem.intermediate, problem.num_experts, problem.rank}).second) {
        return;
    }
    std::fprintf(stderr,
                 "deep_gemm: Mega MoE, rank %lld of %lld, %lld tokens, %lld experts, hidden = %lld, intermediate = %lld: "
                 "%s, grid %d\n",
                 static_cast<long long>(problem.rank), static_cast<long long>(problem.num_ranks),
                 static_cast<long long>(problem.num_tokens), static_cast<long long>(problem.num_experts),
                 static_cast<long long>(problem.hidden), static_cast<long long>(problem.intermediate),
                 kernel_name(launch.row).c_str(), launch.grid);
}

// Of an expert.
double mean_tokens(const MegaMoeProblem& problem) {
    if (problem.expected_m >= 0) return static_cast<double>(problem.expected_m);
    return static_cast<double>(problem.num_ranks * problem.num_tokens * problem.topk) /
           static_cast<double>(problem.num_experts);
}

}  // namespace

MegaMoeShape shape_of(const MegaMoeProblem& problem) {
    MegaMoeShape shape = {};
    shape.num_ranks = static_cast<int>(problem.num_ranks);
    shape.num_experts = static_cast<int>(problem.num_experts);
    shape.max_tokens = static_cast<int>(problem.max_tokens);
    shape.topk = static_cast<int>(problem.topk);
    shape.hidden = static_cast<int>(problem.hidden);
    shape.intermediate = static_cast<int>(problem.intermediate);
    shape.type = problem.type;
    return shape;
}

int mega_moe_block_tokens(const MegaMoeProblem& problem) {
    if (const int tuned = mega_moe_tuning().block_tokens; tuned > 0) return tuned;
    const double mean = mean_tokens(problem);
    // Experts have more tokens than the mean or fewer, and one that needs a second block reads its weights from L2 again.
    const int tallest = problem.type == MegaMoeType::kFP8FP4 ? 64 : 128;
    return mean <= 8 ? 16 : mean <= 20 ? 32 : mean <= 45 ? 64 : tallest;
}

MegaMoeTuning& mega_moe_tuning() {
    static MegaMoeTuning tuning;
    return tuning;
}

void run_mega_moe(const MegaMoeProblem& problem, int num_sms, int block_tokens, bool pdl, Backend& backend) {
    const MegaMoeShape shape = shape_of(problem);
    const MegaMoeOffsets offsets(shape);
    const MegaMoeLayout layout{block_tokens > 0 ? block_tokens : mega_moe_block_tokens(problem), shape.type};
    if (const char* reason = layout.invalid_reason()) throw std::runtime_error(std::string("deep_gemm: Mega MoE: ") + reason);
    uint8_t* const buffer = reinterpret_cast<uint8_t*>(problem.buffers[problem.rank]);
    const EncodeTiledFunction encode = backend.encode_tiled();
    const CUtensorMapDataType type = shape.is_bf16() ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const int bytes = shape.element_bytes(), block_k = kMegaBlockBytes / bytes;

    MegaMoeParams params = {};
    params.offsets = offsets;
    const auto operand_map = [&](const void* data, int64_t rows, int64_t k, int box_rows) {
        return make_tensor_map(encode, MatrixView{data, rows, k, k, type, bytes}, box_rows, block_k);
    };
    const int64_t experts = shape.local_experts(), pool_rows = shape.pool_rows();
    const auto weights_map = [&](const void* data, int64_t rows, int64_t k) {
        if (!shape.is_fp4()) return operand_map(data, rows, k, kMegaTileRows);
        const MatrixView pairs{data, rows, k / 2, k / 2, type, 1};
        return make_tensor_map(encode, pairs, kMegaTileRows, block_k / 2);
    };
    params.l1_map = weights_map(problem.l1, experts * 2 * shape.intermediate, shape.hidden);
    params.l2_map = weights_map(problem.l2, experts * shape.hidden, shape.intermediate);
    params.x_map = operand_map(buffer + offsets.pool_x, pool_rows, shape.hidden, layout.block_tokens);
    params.h_map = operand_map(buffer + offsets.pool_h, pool_rows, shape.intermediate, layout.block_tokens);
    if (!shape.is_bf16()) {
        const auto scales_map = [&](int64_t offset, int64_t k) {
            const int groups = shape.is_fp4() ? 4 : 1;  // of a K block
            const MatrixView view{buffer + offset, k / kMegaMoeGranK * groups, pool_rows, pool_rows,
                                  CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
            return make_tensor_map(encode, view, groups, layout.block_tokens, false);
        };
        params.x_sf_map = scales_map(offsets.pool_x_sf, shape.hidden);
        params.h_sf_map = scales_map(offsets.pool_h_sf, shape.intermediate);
    }
    if (shape.is_fp4()) {
        const auto words_map = [&](const int32_t* words, int64_t k, int64_t rows) {
            const MatrixView view{words, experts * (k / kMegaMoeGranK), rows, rows, CU_TENSOR_MAP_DATA_TYPE_INT32, 4};
            return make_tensor_map(encode, view, 1, kMegaTileRows, false);
        };
        params.l1_sf_map = words_map(problem.l1_words, shape.hidden, 2 * shape.intermediate);
        params.l2_sf_map = words_map(problem.l2_words, shape.intermediate, shape.hidden);
    }
    params.l1_sf = problem.l1_sf;
    params.l2_sf = problem.l2_sf;
    params.shape = shape;
    params.buffer = buffer;
    for (int64_t rank = 0; rank < problem.num_ranks; ++rank) {
        params.peers[rank] = reinterpret_cast<uint8_t*>(problem.buffers[rank]);
    }
    params.y = problem.y;
    params.y_stride = problem.y_stride;
    params.stats = problem.stats;
    params.timeout_ns = static_cast<uint64_t>(problem.timeout_ns);
    params.rank = static_cast<int>(problem.rank);
    params.num_tokens = static_cast<int>(problem.num_tokens);
    // While the last tiles of the first linear are computed, 256 x hidden weights each, the other CTAs have tiles of the
    // second one, hidden x intermediate of a block: as many blocks as that takes are finished before.
    const MegaMoeTuning& tuning = mega_moe_tuning();
    const int tuned_lag = tuning.lag, tuned_prefetch = tuning.prefetch_bytes;
    const int lag = (num_sms * kMegaTileRows + shape.intermediate - 1) / shape.intermediate + 1;
    params.lag = tuned_lag >= 0 ? std::max(tuned_lag, 1) : lag;
    // What a CTA can fetch while ranks meet and tokens are sorted, about a quarter of a megabyte. Where experts have several
    // blocks, the tensor cores bound it.
    const int64_t row_bytes = int64_t{shape.hidden} * bytes / (shape.is_fp4() ? 2 : 1);
    const int64_t most_bytes = tuned_prefetch >= 0                             ? tuned_prefetch / 16 * 16
                               : mean_tokens(problem) <= layout.block_tokens ? 1024
                                                                              : 0;
    params.prefetch_bytes = static_cast<int>(std::min(row_bytes, most_bytes));
    params.l1 = static_cast<const uint8_t*>(problem.l1);
    params.evicts_weights = tuning.evict_weights > 0;
    params.clamped = problem.clamped != 0;
    params.clamp = problem.clamp;

    KernelLaunch launch = {};
    launch.kernel = layer_kernel(layout);
    launch.name = &kernel_name;
    launch.symbol = &kernel_name;
    launch.row = row_of(layout);
    launch.grid = num_sms;
    launch.block = sm90::kMegaThreads;
    launch.cluster = 1;
    launch.shared_bytes = layout.shared_bytes();
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, launch);
    backend.launch(launch);

    const MegaMoeCheckParams check = {reinterpret_cast<const MegaMoeHeader*>(buffer)};
    launch.kernel = check_kernel();
    launch.row = kFirstRow;
    launch.grid = 1;
    launch.block = 32;
    launch.shared_bytes = 0;
    launch.params = &check;
    launch.params_bytes = sizeof(check);
    backend.launch(launch);
}

}  // namespace deep_gemm
