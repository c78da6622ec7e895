#include "mega_moe.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>

#include "../sm90/mega_moe_dispatch.h"
#include "../sm90/mega_moe_traits.h"
#include "../sm100/mega_moe_dispatch.h"
#include "../sm100/mega_moe_traits.h"
#include "knobs.h"

namespace deep_gemm {

namespace {

// A number for each kernel of an architecture that no row of a table has, for the launcher's notes about kernels.
constexpr int kFirstRow = 300;

int row_of(int block_tokens, MegaMoeType type) { return kFirstRow + 4 * block_tokens + static_cast<int>(type); }

std::string kernel_name(const std::string& arch, int row) {
    if (row == kFirstRow) return arch + "_mega_moe_check";
    const int tokens = (row - kFirstRow) / 4, type = (row - kFirstRow) % 4;
    return arch + "_mega_moeILi" + std::to_string(tokens) + "ELi" + std::to_string(type) + "E";
}

// A kernel, its tiles, and how it reads operands.
struct LayerKernel {
    const void* layer;
    const void* check;
    std::string (*name)(int row);
    int tile_rows;
    int box_rows;        // of a tile, that TMA loads at once
    int block_k;
    int threads;
    int shared_bytes;
    bool unpacks;        // FP4: TMA puts 16 elements into 16 bytes, as the tensor core wants them
    int pool_bytes;      // of an element of tokens in the pool; those of two have no scales
    int box_tokens;      // that TMA loads at once
};

#if DG_WITH_SM90
LayerKernel sm90_kernel(int block_tokens, const MegaMoeShape& shape) {
    const sm90::MegaMoeLayout layout{block_tokens, shape.type};
    if (const char* reason = layout.invalid_reason()) throw std::runtime_error(std::string("deep_gemm: Mega MoE: ") + reason);
    return {sm90::mega_moe_kernel(layout),
            sm90::mega_moe_check_kernel(),
            [](int row) { return kernel_name("sm90", row); },
            sm90::kMegaTileRows,
            layout.box_rows(),
            sm90::kMegaBlockBytes / shape.element_bytes(),
            layout.threads(),
            layout.shared_bytes(),
            false,
            shape.pool_element_bytes(),
            layout.chunk_tokens()};
}
#else
LayerKernel sm90_kernel(int, const MegaMoeShape&) { throw std::runtime_error("deep_gemm: built without sm_90a"); }
#endif

#if DG_WITH_SM100
LayerKernel sm100_kernel(int block_tokens, const MegaMoeShape& shape) {
    const sm100::MegaMoeLayout layout{block_tokens, shape.type};
    if (const char* reason = layout.invalid_reason()) throw std::runtime_error(std::string("deep_gemm: Mega MoE: ") + reason);
    return {sm100::mega_moe_kernel(layout),
            sm100::mega_moe_check_kernel(),
            [](int row) { return kernel_name("sm100", row); },
            layout.tile_rows(),
            layout.tile_rows(),
            layout.block_k(),
            sm100::kMegaThreads,
            layout.shared_bytes(),
            true,
            shape.element_bytes(),
            block_tokens};
}
#else
LayerKernel sm100_kernel(int, const MegaMoeShape&) { throw std::runtime_error("deep_gemm: built without sm_100a"); }
#endif

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
                 launch.name(launch.row).c_str(), launch.grid);
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
    return mean <= 8 ? 16 : mean <= 20 ? 32 : mean <= 45 ? 64 : 128;
}

MegaMoeTuning& mega_moe_tuning() {
    static MegaMoeTuning tuning;
    return tuning;
}

void run_mega_moe(const MegaMoeProblem& problem, int arch, int num_sms, int block_tokens, bool pdl, Backend& backend) {
    const MegaMoeShape shape = shape_of(problem);
    const MegaMoeOffsets offsets(shape);
    if (block_tokens == 0) block_tokens = mega_moe_block_tokens(problem);
    const LayerKernel kernel = arch == 90 ? sm90_kernel(block_tokens, shape) : sm100_kernel(block_tokens, shape);
    uint8_t* const buffer = reinterpret_cast<uint8_t*>(problem.buffers[problem.rank]);
    const EncodeTiledFunction encode = backend.encode_tiled();
    const auto type_of = [](int bytes) { return bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8; };

    MegaMoeParams params = {};
    params.offsets = offsets;
    const auto operand_map = [&](const void* data, int64_t rows, int64_t k, int bytes, int box_rows) {
        constexpr int kBoxBytes = 128;  // of K
        return make_tensor_map(encode, MatrixView{data, rows, k, k, type_of(bytes), bytes}, box_rows, kBoxBytes / bytes);
    };
    const int64_t experts = shape.local_experts(), pool_rows = shape.pool_rows();
    const auto weights_map = [&](const void* data, int64_t rows, int64_t k) {
        if (!shape.is_fp4()) return operand_map(data, rows, k, shape.element_bytes(), kernel.box_rows);
        const int64_t packed = kernel.unpacks ? 1 : 2;  // values in an element of the map; strides are in bytes
        const MatrixView view{data, rows, k / packed, k / 2,
                              kernel.unpacks ? CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B : type_of(1), 1};
        return make_tensor_map(encode, view, kernel.box_rows, static_cast<int>(kernel.block_k / packed));
    };
    params.l1_map = weights_map(problem.l1, experts * 2 * shape.intermediate, shape.hidden);
    params.l2_map = weights_map(problem.l2, experts * shape.hidden, shape.intermediate);
    params.x_map = operand_map(buffer + offsets.pool_x, pool_rows, shape.hidden, kernel.pool_bytes, kernel.box_tokens);
    params.h_map = operand_map(buffer + offsets.pool_h, pool_rows, shape.intermediate, kernel.pool_bytes, kernel.box_tokens);
    if (kernel.pool_bytes == 1) {
        const auto scales_map = [&](int64_t offset, int64_t k) {
            const MatrixView view{buffer + offset, k / kMegaMoeGranK, pool_rows, pool_rows,
                                  CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
            return make_tensor_map(encode, view, 1, block_tokens, false);
        };
        params.x_sf_map = scales_map(offsets.pool_x_sf, shape.hidden);
        params.h_sf_map = scales_map(offsets.pool_h_sf, shape.intermediate);
    }
    if (shape.is_fp4()) {
        const auto words_map = [&](const int32_t* words, int64_t k, int64_t rows) {
            const MatrixView view{words, experts * (k / kMegaMoeGranK), rows, rows, CU_TENSOR_MAP_DATA_TYPE_INT32, 4};
            return make_tensor_map(encode, view, 1, kernel.box_rows, false);
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
    // While the last tiles of the first linear are computed, a tile's rows by hidden weights each, the other CTAs have tiles of the
    // second one, hidden x intermediate of a block: as many blocks as that takes are finished before.
    const MegaMoeTuning& tuning = mega_moe_tuning();
    const int tuned_lag = tuning.lag, tuned_prefetch = tuning.prefetch_bytes;
    const int lag = (num_sms * kernel.tile_rows + shape.intermediate - 1) / shape.intermediate + 1;
    params.lag = tuned_lag >= 0 ? std::max(tuned_lag, 1) : lag;
    // What a CTA can fetch while ranks meet and tokens are sorted, about a quarter of a megabyte. Where experts have several
    // blocks, the tensor cores bound it.
    const int64_t row_bytes = int64_t{shape.hidden} * shape.element_bytes() / (shape.is_fp4() ? 2 : 1);
    const int64_t most_bytes = tuned_prefetch >= 0                    ? tuned_prefetch / 16 * 16
                               : mean_tokens(problem) <= block_tokens ? 1024
                                                                      : 0;
    params.prefetch_bytes = static_cast<int>(std::min(row_bytes, most_bytes));
    params.early_bytes = static_cast<int>(std::min<int64_t>(row_bytes, std::max(tuning.early_bytes.load(), 0) / 16 * 16));
    // A tile of half the rows takes some 0.7 of a whole one's time: it pays while the SMs hold all such tiles of the first linear.
    const int tuned_rows = tuning.tile_rows;
    params.most_half_tiles = tuned_rows < 0 ? num_sms : tuned_rows < kernel.tile_rows ? std::numeric_limits<int>::max() : 0;
    params.l1 = static_cast<const uint8_t*>(problem.l1);
    params.evicts_weights = tuning.evict_weights > 0;
    params.clamped = problem.clamped != 0;
    params.clamp = problem.clamp;

    KernelLaunch launch = {};
    launch.kernel = kernel.layer;
    launch.name = kernel.name;
    launch.symbol = kernel.name;
    launch.row = row_of(block_tokens, shape.type);
    launch.grid = num_sms;
    launch.block = kernel.threads;
    launch.cluster = 1;
    launch.shared_bytes = kernel.shared_bytes;
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, launch);
    backend.launch(launch);

    const MegaMoeCheckParams check = {reinterpret_cast<const MegaMoeHeader*>(buffer)};
    launch.kernel = kernel.check;
    launch.row = kFirstRow;
    launch.grid = 1;
    launch.block = 32;
    launch.shared_bytes = 0;
    launch.params = &check;
    launch.params_bytes = sizeof(check);
    backend.launch(launch);
}

}  // namespace deep_gemm
