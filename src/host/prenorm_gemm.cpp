#include "prenorm_gemm.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../sm90/prenorm_gemm_dispatch.h"
#include "../sm90/prenorm_gemm_traits.h"

namespace deep_gemm {

namespace {

using sm90::kPrenormBlockK;
using sm90::PrenormLayout;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
    PrenormLayout layout;
    int64_t tile_rows;
    int64_t row_tiles;
    int64_t col_tiles;
    int64_t k_blocks;
    int64_t splits;
    bool reduces;
};

// Tiles, and elements that are added up, are counted in 32 bits.
constexpr int64_t kMaxCount = 1 << 30;

// Microseconds of `num_tiles` tiles of `tile_bytes` each on a grid of at most one CTA per SM, by a model of an H200: 4 TB/s
// for all SMs together, 40 GB/s for one. Neither has been measured with this kernel.
double stream_us(int64_t num_tiles, double tile_bytes, int64_t num_sms) {
    constexpr double kBytesPerUs = 4e6, kSmBytesPerUs = 4e4;
    const int64_t full_waves = num_tiles / num_sms, rest = num_tiles % num_sms;
    const auto wave_us = [&](int64_t count) {
        return tile_bytes * std::max(static_cast<double>(count) / kBytesPerUs, (count > 0) / kSmBytesPerUs);
    };
    return static_cast<double>(full_waves) * wave_us(num_sms) + wave_us(rest);
}

// Parts of K that make a problem fastest: enough CTAs to fill the device, against what writing and adding up parts costs.
int64_t choose_splits(const PrenormGemmProblem& problem, const Plan& plan, int64_t num_sms) {
    constexpr double kReduceUs = 3, kReduceBytesPerUs = 4e6;
    const int64_t elements = problem.m * (problem.n + 1);
    if (elements > kMaxCount) return 1;
    const double block_bytes = kPrenormBlockK * (2.0 * static_cast<double>(plan.tile_rows) +
                                                 4.0 * static_cast<double>(std::min<int64_t>(problem.n, plan.layout.cols())));
    int64_t best = 1;
    double best_us = std::numeric_limits<double>::infinity();
    const int64_t tiles = plan.row_tiles * plan.col_tiles;
    // More than a few waves never pay.
    const int64_t most = std::min(plan.k_blocks, std::max<int64_t>(1, 8 * num_sms / tiles));
    for (int64_t splits = 1; splits <= most; ++splits) {
        double us = stream_us(tiles * splits, static_cast<double>(ceil_div(plan.k_blocks, splits)) * block_bytes, num_sms);
        if (splits > 1) us += kReduceUs + 8.0 * static_cast<double>(elements * splits) / kReduceBytesPerUs;
        if (us < best_us) {
            best = splits;
            best_us = us;
        }
    }
    return best;
}

Plan make_plan(const PrenormGemmProblem& problem, int64_t num_sms) {
    Plan plan;
    plan.layout.col_groups = problem.n > 32 ? 2 : 1;
    const int64_t max_rows = sm90::prenorm_max_rows(plan.layout.col_groups);
    // Tiles of equal height, so that none is loaded half empty.
    plan.row_tiles = ceil_div(problem.m, max_rows);
    plan.tile_rows = ceil_div(ceil_div(problem.m, plan.row_tiles), 8) * 8;
    plan.row_tiles = ceil_div(problem.m, plan.tile_rows);
    plan.layout.rows = 64;
    while (plan.layout.rows < plan.tile_rows) plan.layout.rows *= 2;
    plan.col_tiles = std::max<int64_t>(1, ceil_div(problem.n, plan.layout.cols()));
    plan.k_blocks = ceil_div(problem.k, kPrenormBlockK);
    plan.splits = problem.num_splits > 0 ? problem.num_splits : choose_splits(problem, plan, num_sms);
    plan.reduces = problem.num_splits == 0 && plan.splits > 1;
    return plan;
}

// From one part to the next, in elements: D, then the sums of squares.
int64_t part_stride(const PrenormGemmProblem& problem) { return ceil_div(problem.m * (problem.n + 1), 4) * 4; }

#if DG_WITH_SM90
const void* product_kernel(const PrenormLayout& layout) {
    return sm90::prenorm_gemm_kernel(layout.rows, layout.col_groups);
}
const void* reduce_kernel() { return sm90::prenorm_reduce_kernel(); }
#else
const void* product_kernel(const PrenormLayout&) { throw std::runtime_error("deep_gemm: built without sm_90a"); }
const void* reduce_kernel() { throw std::runtime_error("deep_gemm: built without sm_90a"); }
#endif

// A number for each kernel that no row of the GEMM table has, for the launcher's notes about kernels.
constexpr int kFirstRow = 240;

int row_of(const PrenormLayout& layout) { return kFirstRow + layout.rows / 64 + 8 * (layout.col_groups - 1); }

std::string kernel_name(int row) {
    if (row == kFirstRow) return "sm90_prenorm_reduce";
    const int rows = (row - kFirstRow) % 8 * 64, col_groups = (row - kFirstRow) / 8 + 1;
    return "sm90_prenorm_gemmILi" + std::to_string(rows) + "ELi" + std::to_string(col_groups) + "E";
}

}  // namespace

size_t prenorm_workspace_bytes(const PrenormGemmProblem& problem, int num_sms) {
    const Plan plan = make_plan(problem, num_sms);
    return plan.reduces ? static_cast<size_t>(plan.splits * part_stride(problem)) * sizeof(float) : 0;
}

void run_prenorm_gemm(const PrenormGemmProblem& problem, int num_sms, bool pdl, Backend& backend) {
    const Plan plan = make_plan(problem, num_sms);
    const int64_t tiles = plan.row_tiles * plan.col_tiles;
    if (tiles > kMaxCount / plan.splits) throw std::runtime_error("tf32_hc_prenorm_gemm: more than 2^30 tiles");

    PrenormGemmParams params = {};
    params.b_box_rows = static_cast<int>(ceil_div(std::min<int64_t>(problem.n, plan.layout.cols()), 8) * 8);
    const MatrixView a{problem.a, problem.m, problem.k, problem.a_stride, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2};
    const MatrixView b{problem.b, problem.n, problem.k, problem.b_stride, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
    params.a_map = make_tensor_map(backend.encode_tiled(), a, static_cast<int>(plan.tile_rows), kPrenormBlockK);
    if (problem.n > 0) params.b_map = make_tensor_map(backend.encode_tiled(), b, params.b_box_rows, 32);
    params.output = problem.output;
    if (plan.reduces) {
        float* parts = static_cast<float*>(problem.workspace);
        params.output = {parts, part_stride(problem), problem.n, parts + problem.m * problem.n, part_stride(problem)};
    }
    params.m = static_cast<int>(problem.m);
    params.n = static_cast<int>(problem.n);
    params.num_k_blocks = static_cast<int>(plan.k_blocks);
    params.num_splits = static_cast<int>(plan.splits);
    params.num_tiles = static_cast<int>(tiles * plan.splits);
    params.num_row_tiles = static_cast<int>(plan.row_tiles);
    params.num_col_tiles = static_cast<int>(plan.col_tiles);
    params.tile_rows = static_cast<int>(plan.tile_rows);

    KernelLaunch launch = {};
    launch.kernel = product_kernel(plan.layout);
    launch.name = &kernel_name;
    launch.row = row_of(plan.layout);
    launch.grid = std::min(params.num_tiles, num_sms);
    launch.block = plan.layout.num_threads();
    launch.cluster = 1;
    launch.shared_bytes = plan.layout.shared_bytes();
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    backend.launch(launch);
    if (!plan.reduces) return;

    const int64_t elements = problem.m * (problem.n + 1);
    PrenormReduceParams reduce = {};
    reduce.parts = params.output.d;
    reduce.part_stride = part_stride(problem);
    reduce.num_parts = params.num_splits;
    reduce.m = params.m;
    reduce.n = params.n;
    reduce.output = problem.output;
    launch.kernel = reduce_kernel();
    launch.row = kFirstRow;
    launch.grid = static_cast<int>(ceil_div(elements, sm90::kPrenormReduceElements));
    launch.block = sm90::kPrenormReduceThreads;
    launch.shared_bytes = 0;
    launch.params = &reduce;
    launch.params_bytes = sizeof(reduce);
    backend.launch(launch);
}

}  // namespace deep_gemm
