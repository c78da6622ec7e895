#include "gemm_common.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "knobs.h"
#include "schedule.h"

namespace deep_gemm {

namespace {

// DG_PRINT_CONFIGS: prints the row that a problem runs on, once.
void print_config(const GemmProblem& problem, const GemmRow& row, const RowResources& resources, int grid) {
    static std::mutex mutex;
    static std::set<std::tuple<int64_t, int64_t, int64_t, std::string>> printed;
    const std::string name = row_name(row);
    std::lock_guard lock(mutex);
    if (!printed.insert({problem.m, problem.n, problem.k, name}).second) return;
    std::fprintf(stderr, "deep_gemm: M = %lld, N = %lld, K = %lld: %s, %d stages, %d bytes shared, grid %d\n",
                 static_cast<long long>(problem.m), static_cast<long long>(problem.n),
                 static_cast<long long>(problem.k), name.c_str(), resources.num_stages, resources.shared_bytes, grid);
}

MGroupSchedule make_group_schedule(const GemmProblem& problem, const GemmRow& row, int num_k_blocks, int clusters) {
    MGroupSchedule schedule = {};
    schedule.layout = problem.group_layout;
    schedule.table = problem.layout == GroupLayout::kIndices  ? kGroupOfRow
                     : problem.layout == GroupLayout::kMasked ? kRowsOfGroup
                                                              : kEndOfGroup;
    schedule.num_groups = static_cast<int>(problem.num_groups);
    schedule.alignment = problem.layout == GroupLayout::kPsum ? problem.group_alignment : 1;
    schedule.rows = static_cast<int>(problem.m);
    schedule.num_k_blocks = num_k_blocks;
    schedule.zero_padding = problem.zero_padding && problem.layout != GroupLayout::kMasked;
    schedule.col_tiles = static_cast<int>((problem.n + row.tile_n() - 1) / row.tile_n());
    const int row_tiles = static_cast<int>((expected_rows(problem) + row.tile_m() - 1) / row.tile_m());
    schedule.row_tiles = choose_row_group(row.tile_m(), row.tile_n(), row_tiles, schedule.col_tiles, clusters);
    return schedule;
}

KGroupSchedule make_k_group_schedule(const GemmProblem& problem, int tiles_per_group) {
    KGroupSchedule schedule = {};
    schedule.layout = problem.group_layout;
    schedule.is_sizes = problem.layout == GroupLayout::kSizes;
    schedule.padded = !problem.a_mn_major;
    schedule.alignment = problem.layout == GroupLayout::kPsum ? problem.group_alignment : 1;
    schedule.first_group = static_cast<int>(problem.first_group);
    schedule.num_groups = static_cast<int>(problem.num_groups);
    schedule.k = static_cast<int>(problem.k);
    schedule.tiles_per_group = make_divisor(tiles_per_group);
    return schedule;
}

// Tiles at most, whatever the layout holds.
int64_t most_tiles(const GemmProblem& problem, const MGroupSchedule& schedule, int tile_m) {
    const int64_t of_all = (problem.m + tile_m - 1) / tile_m;
    const int64_t row_tiles = schedule.table == kGroupOfRow    ? of_all
                              : schedule.table == kRowsOfGroup ? of_all * problem.num_groups
                                                               : of_all + problem.num_groups;
    return row_tiles * schedule.col_tiles;
}

}  // namespace

void throw_no_row(std::span<const GemmRow> rows, const char* arch, const GemmProblem& problem,
                  const SelectionLimits& limits) {
    std::ostringstream message;
    message << "gemm: no compiled kernel runs M = " << problem.m << ", N = " << problem.n << ", K = " << problem.k;
    if (problem.grouping != Grouping::kDense) message << " in " << problem.num_groups << " groups";
    if (problem.operands == OperandType::kFP8) {
        message << " with recipe [" << problem.sfa.gran_mn << ", " << problem.sfb.gran_mn << ", " << problem.gran_k
                << "]";
        if (problem.a_is_fp4 || problem.b_is_fp4) {
            message << ", FP4 " << (!problem.b_is_fp4 ? "A" : !problem.a_is_fp4 ? "B" : "A and B");
        }
    } else {
        message << " with BF16 operands";
    }
    for (const Candidate& candidate : rate_rows(rows, problem, limits)) {
        message << "\n  " << row_name(rows[candidate.row]) << ": " << candidate.reason;
    }
    if (rows.empty()) message << ": this build of deep_gemm_ops has no kernels for " << arch;
    throw std::runtime_error(message.str());
}

void check_groups(const GemmProblem& problem) {
    const auto check = [](bool fine, const char* text) {
        if (!fine) throw std::runtime_error(std::string("gemm: ") + text);
    };
    if (problem.grouping == Grouping::kMGrouped) {
        check(problem.num_groups >= 1 && (problem.layout == GroupLayout::kIndices || problem.num_groups <= kMaxGroups),
              "M-grouped products have 1 to 1024 groups");
        check(problem.layout != GroupLayout::kNone && problem.layout != GroupLayout::kSizes, "this layout is K-grouped");
        check(problem.group_alignment >= 1, "the alignment of groups must be positive");
        check(problem.m + problem.group_alignment <= std::numeric_limits<int>::max(), "M is too large");
        check(problem.c == nullptr, "M-grouped products add no C");
    }
    check(problem.head_left >= 0 && problem.head_mid >= 0 && problem.head_right >= 0, "a part of a head is negative");
    if (problem.head_left > 0 || problem.head_right > 0) {
        check(problem.grouping == Grouping::kDense && problem.c == nullptr, "gaps between heads need a dense product, no C");
        check(problem.n % (problem.head_left + problem.head_right) == 0, "N is no multiple of a head's columns");
    }
}

GroupDims group_dims(const GemmProblem& problem) {
    const int64_t groups = problem.num_groups;
    switch (grouping_of(problem)) {
        case Grouping::kDense: return {};
        case Grouping::kMGrouped: {
            const int64_t own_tokens = problem.layout == GroupLayout::kMasked ? groups : 1;
            return {own_tokens, groups, own_tokens};
        }
        case Grouping::kKGrouped: return {0, 0, groups};
        case Grouping::kBatched: return {groups, groups, groups};
        case Grouping::kSummed: return {groups, groups, 0};
    }
    return {};
}

namespace {

int64_t num_heads(const GemmProblem& problem) {
    const int64_t columns = problem.head_left + problem.head_right;
    return columns > 0 ? problem.n / columns : 0;
}

}  // namespace

MatrixView result_view(const GemmProblem& problem, int64_t groups) {
    const CUtensorMapDataType type = problem.d_type == DataType::kFloat32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return {problem.d, problem.m, problem.n + num_heads(problem) * problem.head_mid, problem.d_stride, type,
            size_of(problem.d_type), groups, problem.d_group_stride};
}

bool adds_in_place(const GemmProblem& problem) {
    return problem.d_type == DataType::kFloat32 && problem.c == problem.d && problem.c_stride == problem.d_stride &&
           problem.c_group_stride == problem.d_group_stride;
}

bool tma_can_address_result(const GemmProblem& problem, int box_cols) {
    const int64_t element_bytes = size_of(problem.d_type);
    // With gaps between heads each box has to lie in one part of one head, and to begin there on 16 bytes. TMA stores whole
    // units of 16 bytes, also at the end of a row: its columns have to fill them.
    return aligned(problem.d, 16) && problem.n * element_bytes % 16 == 0 && problem.d_stride * element_bytes % 16 == 0 &&
           problem.d_group_stride * element_bytes % 16 == 0 && problem.head_left % box_cols == 0 &&
           problem.head_right % box_cols == 0 && problem.head_mid % 8 == 0;
}

int set_problem(GemmParams& params, const GemmProblem& problem, const GemmRow& row, const SelectionLimits& limits) {
    const auto tiles = [](int64_t size, int block) { return static_cast<int>((size + block - 1) / block); };
    const int row_tiles = tiles(row.swap_ab ? problem.n : problem.m, row.tile_rows());
    const int col_tiles = tiles(row.swap_ab ? problem.m : problem.n, row.tile_cols());
    const int resident = resident_clusters(row.cluster_size(), limits.num_sms);
    int num_k_blocks = tiles(problem.k, row.block_k());
    int64_t num_tiles = static_cast<int64_t>(row_tiles) * col_tiles;
    if (row.grouping == Grouping::kMGrouped) {
        params.groups = make_group_schedule(problem, row, num_k_blocks, resident);
        num_tiles = most_tiles(problem, params.groups, row.tile_m());
    } else if (row.grouping == Grouping::kBatched) {
        const int of_one = static_cast<int>(num_tiles);
        num_tiles *= problem.num_groups;
        params.batch = {static_cast<int>(num_tiles), make_divisor(of_one)};
    } else if (row.grouping == Grouping::kKGrouped) {
        params.k_groups = make_k_group_schedule(problem, row_tiles * col_tiles);
        num_tiles *= problem.num_groups;
    } else if (row.grouping == Grouping::kSummed) {
        params.k_blocks_of_product = make_divisor(num_k_blocks);
        num_k_blocks *= static_cast<int>(problem.num_groups);
    }
    if (num_tiles > std::numeric_limits<int>::max() / 2) throw std::runtime_error("gemm: more than 2^30 output tiles");
    const int clusters = static_cast<int>(std::min<int64_t>(num_tiles, resident));
    params.schedule = make_dense_schedule(row, row_tiles, col_tiles, num_k_blocks, clusters);

    params.d = problem.d;
    params.c = problem.c;
    params.d_is_float = problem.d_type == DataType::kFloat32;
    params.d_stride = problem.d_stride;
    params.c_stride = problem.c_stride;
    params.d_group_stride = problem.d_group_stride;
    params.c_group_stride = problem.c_group_stride;
    params.m = static_cast<int>(problem.m);
    params.n = static_cast<int>(problem.n);
    if (num_heads(problem) > 0) {
        params.heads = {make_divisor(problem.head_left + problem.head_right), problem.head_left, problem.head_mid};
    }
    return clusters;
}

void launch_row(const RowKernel& kernel, const GemmProblem& problem, const GemmRow& row, const RowResources& resources,
                int clusters, const void* params, size_t params_bytes, bool pdl, Backend& backend) {
    KernelLaunch launch;
    launch.kernel = kernel.kernel;
    launch.name = kernel.name;
    launch.symbol = kernel.symbol;
    launch.row = kernel.row;
    launch.grid = clusters * row.cluster_size();
    launch.block = resources.num_threads;
    launch.cluster = row.cluster_size();
    launch.shared_bytes = resources.shared_bytes;
    launch.params = params;
    launch.params_bytes = params_bytes;
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, row, resources, launch.grid);
    backend.launch(launch);
}

}  // namespace deep_gemm
