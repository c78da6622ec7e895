#include "prenorm_gemm.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>

#include "../sm100/prenorm_gemm_dispatch.h"
#include "../sm100/prenorm_gemm_traits.h"
#include "../sm90/prenorm_gemm_dispatch.h"
#include "../sm90/prenorm_gemm_traits.h"
#include "knobs.h"

namespace deep_gemm {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiles {
    int col_groups;  // of 32 columns
    int64_t rows;    // of a tile
    int64_t row_tiles;
    int64_t col_tiles;

    int64_t cols() const { return 32 * col_groups; }
    int64_t count() const { return row_tiles * col_tiles; }
};

// Tiles, and elements that are added up, are counted in 32 bits.
constexpr int64_t kMaxCount = 1 << 30;

// Tiles of equal height, at most `max_rows`, so that none is loaded half empty.
Tiles make_tiles(int64_t m, int64_t n, int64_t max_rows) {
    Tiles tiles;
    tiles.col_groups = n > 32 ? 2 : 1;
    const int64_t tallest = prenorm_max_rows(tiles.col_groups);
    const int64_t fewest = ceil_div(m, max_rows > 0 ? std::min(max_rows, tallest) : tallest);
    tiles.rows = ceil_div(ceil_div(m, fewest), 8) * 8;
    tiles.row_tiles = ceil_div(m, tiles.rows);
    tiles.col_tiles = std::max<int64_t>(1, ceil_div(n, tiles.cols()));
    return tiles;
}

// From one part to the next, in elements: D, then the sums of squares.
int64_t part_stride(int64_t m, int64_t n) { return ceil_div(m * (n + 1), 4) * 4; }

// The kernels of an architecture: numbers for the launcher, which knows a kernel by one.
constexpr int kReduce = 0;

int number_of(int rows, int col_groups) { return rows / 64 + 8 * (col_groups - 1); }

std::string name_of(const char* arch, int number) {
    if (number == kReduce) return std::string(arch) + "_prenorm_reduce";
    return std::string(arch) + "_prenorm_gemmILi" + std::to_string(number % 8 * 64) + "ELi" + std::to_string(number / 8 + 1) +
           "E";
}

std::string sm90_name(int number) { return name_of("sm90", number); }
std::string sm100_name(int number) { return name_of("sm100", number); }

#if DG_WITH_SM90
const void* sm90_kernel(int rows, int col_groups) {
    return rows == 0 ? sm90::prenorm_reduce_kernel() : sm90::prenorm_gemm_kernel(rows, col_groups);
}
#else
const void* sm90_kernel(int, int) { throw std::runtime_error("deep_gemm: built without sm_90a"); }
#endif

#if DG_WITH_SM100
const void* sm100_kernel(int rows, int col_groups) {
    return rows == 0 ? sm100::prenorm_reduce_kernel() : sm100::prenorm_gemm_kernel(rows, col_groups);
}
#else
const void* sm100_kernel(int, int) { throw std::runtime_error("deep_gemm: built without sm_100a"); }
#endif

// Sets what a launch of the smallest kernel for the tiles needs. `kRows`: of the smallest one, each has as many more.
template <class Layout, int kRows>
void set_kernel(KernelLaunch& launch, const Tiles& tiles, const void* (*kernel)(int, int)) {
    const Layout layout{static_cast<int>(ceil_div(tiles.rows, kRows)) * kRows, tiles.col_groups};
    launch.kernel = kernel(layout.rows, layout.col_groups);
    launch.row = number_of(layout.rows, layout.col_groups);
    launch.block = layout.num_threads();
    launch.shared_bytes = layout.shared_bytes();
}

KernelLaunch sm90_launch(const Tiles& tiles) {
    KernelLaunch launch = {};
    set_kernel<sm90::PrenormLayout, 64>(launch, tiles, &sm90_kernel);
    launch.name = launch.symbol = &sm90_name;
    return launch;
}

KernelLaunch sm100_launch(const Tiles& tiles) {
    KernelLaunch launch = {};
    set_kernel<sm100::PrenormLayout, 128>(launch, tiles, &sm100_kernel);
    launch.name = launch.symbol = &sm100_name;
    return launch;
}

void print_config(const PrenormGemmProblem& problem, const Tiles& tiles, const KernelLaunch& launch) {
    static std::mutex mutex;
    static std::set<std::tuple<int64_t, int64_t, int64_t, int64_t>> printed;
    std::lock_guard lock(mutex);
    if (!printed.insert({problem.m, problem.n, problem.k, problem.plan.num_splits}).second) return;
    std::fprintf(stderr, "deep_gemm: M = %lld, N = %lld, K = %lld: %s, %lld rows, %lld parts of K%s, grid %d\n",
                 static_cast<long long>(problem.m), static_cast<long long>(problem.n), static_cast<long long>(problem.k),
                 launch.name(launch.row).c_str(), static_cast<long long>(tiles.rows),
                 static_cast<long long>(problem.plan.num_splits), problem.plan.in_cluster ? " in a cluster" : "",
                 launch.grid);
}

}  // namespace

PrenormPlan prenorm_plan(int64_t m, int64_t n, int64_t k, int arch, int num_sms, Backend& backend) {
    // A model of an H200. Memory gives all SMs so much; a CTA takes so long for a block of K, measured with few CTAs at work.
    // What starting and ending take is the same for all, but for what grows with a tile. (SM100: a data sheet's memory.)
    constexpr double kBlockUs = 0.39, kBlockUsPerRow = 0.0011, kUsPerRow = 0.005;
    constexpr double kClusterUs = 0.8, kReduceUs = 2.3, kReduceBytesPerUs = 2e6;
    const double bytes_per_us = arch == 100 ? 8e6 : 4.2e6;
    const int64_t elements = m * (n + 1), k_blocks = ceil_div(k, kPrenormBlockK);
    if (elements > kMaxCount) return {};
    const double memory_us = static_cast<double>(k) * static_cast<double>(2 * m + 4 * n) / bytes_per_us;
    PrenormPlan best;
    double best_us = std::numeric_limits<double>::infinity();
    const auto consider = [&](const Tiles& tiles, int64_t splits, bool in_cluster, double us_for_sums) {
        const auto rows = static_cast<double>(ceil_div(tiles.rows, 64) * 64);  // of the kernel
        const int64_t waves = ceil_div(tiles.count() * splits, num_sms), blocks = waves * ceil_div(k_blocks, splits);
        const double work_us = static_cast<double>(blocks) * (kBlockUs + kBlockUsPerRow * rows);
        const double us = std::max(memory_us, work_us) + kUsPerRow * rows + us_for_sums;
        if (us < best_us) best = {splits, tiles.rows, in_cluster}, best_us = us;
    };

    const int64_t tallest = make_tiles(m, n, 0).rows;
    for (int64_t max_rows = arch == 90 ? 64 : tallest;; max_rows += 64) {
        const Tiles tiles = make_tiles(m, n, max_rows);
        // Parts for more than one wave pay only where there are tiles for half of one already.
        const int64_t waves = 2 * tiles.count() > num_sms ? 8 : 1;
        const int64_t most = std::min(k_blocks, std::max<int64_t>(1, waves * num_sms / tiles.count()));
        for (int64_t splits = 1; splits <= most;) {
            const double sums_us = kReduceUs + 8.0 * static_cast<double>(elements * splits) / kReduceBytesPerUs;
            consider(tiles, splits, false, splits > 1 ? sums_us : 0);
            const int64_t blocks = ceil_div(k_blocks, splits);
            splits = blocks > 1 ? ceil_div(k_blocks, blocks - 1) : most + 1;  // the fewest that leave fewer blocks
        }
        if (max_rows >= tallest) break;
    }
    if (arch != 90) return best;
    // A tile for each SM, or each cluster.
    KernelLaunch launch = sm90_launch(make_tiles(m, n, 0));
    for (launch.cluster = 1; launch.cluster <= std::min<int64_t>(kPrenormMaxCluster, k_blocks); ++launch.cluster) {
        const int limit = num_sms / launch.cluster;
        const int64_t room = launch.cluster == 1 ? limit : backend.resident_clusters(launch, limit);
        if (room == 0) continue;
        const Tiles tiles = make_tiles(m, n, ceil_div(m, 8 * room) * 8);
        if (tiles.col_tiles > 1 || tiles.row_tiles > room) continue;
        consider(tiles, launch.cluster, launch.cluster > 1, launch.cluster > 1 ? kClusterUs : 0);
    }
    return best;
}

size_t prenorm_workspace_bytes(int64_t m, int64_t n, int64_t num_splits) {
    return num_splits > 1 ? static_cast<size_t>(num_splits * part_stride(m, n)) * sizeof(float) : 0;
}

void run_prenorm_gemm(const PrenormGemmProblem& problem, int arch, int num_sms, bool pdl, Backend& backend) {
    const PrenormPlan& plan = problem.plan;
    const Tiles tiles = make_tiles(problem.m, problem.n, plan.tile_rows);
    if (tiles.count() > kMaxCount / plan.num_splits) {
        throw std::runtime_error("tf32_hc_prenorm_gemm: more than 2^30 tiles");
    }

    PrenormGemmParams params = {};
    params.b_box_rows = static_cast<int>(ceil_div(std::min<int64_t>(problem.n, tiles.cols()), 8) * 8);
    const MatrixView a{problem.a, problem.m, problem.k, problem.a_stride, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2};
    const MatrixView b{problem.b, problem.n, problem.k, problem.b_stride, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
    params.a_map = make_tensor_map(backend.encode_tiled(), a, static_cast<int>(tiles.rows), kPrenormBlockK);
    if (problem.n > 0) params.b_map = make_tensor_map(backend.encode_tiled(), b, params.b_box_rows, 32);
    const int64_t stride = part_stride(problem.m, problem.n);
    params.output = problem.output;
    if (problem.workspace != nullptr) {
        float* parts = static_cast<float*>(problem.workspace);
        params.output = {parts, stride, problem.n, parts + problem.m * problem.n, stride};
    }
    params.m = static_cast<int>(problem.m);
    params.n = static_cast<int>(problem.n);
    params.num_k_blocks = static_cast<int>(ceil_div(problem.k, kPrenormBlockK));
    params.num_splits = static_cast<int>(plan.num_splits);
    params.num_tiles = static_cast<int>(tiles.count() * plan.num_splits);
    params.num_row_tiles = static_cast<int>(tiles.row_tiles);
    params.num_col_tiles = static_cast<int>(tiles.col_tiles);
    params.tile_rows = static_cast<int>(tiles.rows);
    params.in_cluster = plan.in_cluster;

    KernelLaunch launch = arch == 100 ? sm100_launch(tiles) : sm90_launch(tiles);
    launch.grid = std::min(params.num_tiles, num_sms);
    launch.cluster = plan.in_cluster ? params.num_splits : 1;
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, tiles, launch);
    backend.launch(launch);
    if (problem.workspace == nullptr) return;

    const int64_t elements = problem.m * (problem.n + 1);
    PrenormReduceParams reduce = {};
    reduce.parts = params.output.d;
    reduce.part_stride = stride;
    reduce.num_parts = params.num_splits;
    reduce.m = params.m;
    reduce.n = params.n;
    reduce.output = problem.output;
    launch.kernel = arch == 100 ? sm100_kernel(0, 0) : sm90_kernel(0, 0);
    launch.row = kReduce;
    launch.grid = static_cast<int>(ceil_div(elements, kPrenormReduceElements));
    launch.block = kPrenormReduceThreads;
    launch.shared_bytes = 0;
    launch.cluster = 1;
    launch.params = &reduce;
    launch.params_bytes = sizeof(reduce);
    backend.launch(launch);
}

}  // namespace deep_gemm
