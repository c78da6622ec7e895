#include "gemm.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../device/gemm_params.h"
#include "../sm90/gemm_dispatch.h"
#include "../sm90/gemm_instances.h"
#include "../sm90/gemm_traits.h"
#include "knobs.h"
#include "schedule.h"

namespace deep_gemm {

namespace {

static_assert(sm90::first_invalid(sm90::kGemmRows) == -1,
              "src/sm90/gemm_instances.h has a row that cannot be compiled: see invalid_reason() in gemm_traits.h");

#if DG_WITH_SM90
template <int... kShard>
const void* find_kernel(int row, std::integer_sequence<int, kShard...>) {
    static constexpr const void* (*kFind[])(int) = {&sm90::gemm_kernel_in_shard<kShard>...};
    return kFind[row % DG_NUM_SHARDS](row);
}

const void* find_kernel(int row) { return find_kernel(row, std::make_integer_sequence<int, DG_NUM_SHARDS>()); }
#else
const void* find_kernel(int) { return nullptr; }
#endif

std::string kernel_name(int row) { return row_name(gemm_rows()[row]); }
std::string kernel_symbol(int row) { return "sm90_gemmILi" + std::to_string(row) + "E"; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

void throw_no_row(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits) {
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
    if (rows.empty()) message << ": this build of deep_gemm_ops has no kernels for sm_90a";
    throw std::runtime_error(message.str());
}

namespace {

// An operand as it is stored: [mn, k], or MN-major [k, mn].
MatrixView operand_view(const GemmRow& row, const void* data, int64_t mn, int64_t k, int64_t stride,
                        bool mn_major) {
    const CUtensorMapDataType type =
        row.operands == OperandType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    return {data, mn_major ? k : mn, mn_major ? mn : k, stride, type, row.element_bytes()};
}

// A stage of `block_k` of an operand, `block_mn` along MN: in one box, or MN-major in several of one swizzle span each.
// `block_k` counts elements of `operand`: pairs of FP4.
CUtensorMap make_operand_map(EncodeTiledFunction encode, const MatrixView& operand, bool mn_major, int block_k,
                             int block_mn) {
    return mn_major ? make_tensor_map(encode, operand, block_k, sm90::kMnMajorSpan)
                    : make_tensor_map(encode, operand, block_mn, block_k);
}

// Scales per row, as a matrix [K groups, MN], or `groups` of them.
CUtensorMap make_scale_map(EncodeTiledFunction encode, const ScaleTensor& scales, int64_t mn, int64_t k_groups,
                           int64_t groups, int box_mn, int box_groups) {
    // The stride of a single row of groups is never used, but the tensor map wants a multiple of 16 bytes.
    const int64_t stride = k_groups > 1 ? scales.stride_k : (mn + 3) / 4 * 4;
    if ((scales.stride_mn != 1 && mn > 1) || stride % 4 != 0 || !aligned(scales.data, 16)) {
        throw std::runtime_error("gemm: scales per row must be MN-major with a 16-byte aligned stride");
    }
    const MatrixView view{scales.data, k_groups, mn, stride, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, groups,
                          scales.stride_group};
    return make_tensor_map(encode, view, box_groups, box_mn, false);
}


// What the kernels count on; the ops see to it.
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

MGroupSchedule make_group_schedule(const GemmProblem& problem, const GemmRow& row, int num_k_blocks, int num_sms) {
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
    schedule.col_tiles = static_cast<int>((problem.n + row.block_n() - 1) / row.block_n());
    const int row_tiles = static_cast<int>((expected_rows(problem) + row.block_m() - 1) / row.block_m());
    schedule.row_tiles = choose_row_group(row.block_m(), row.block_n(), row_tiles, schedule.col_tiles, num_sms);
    return schedule;
}

KGroupSchedule make_k_group_schedule(const GemmProblem& problem, int tiles_per_group) {
    KGroupSchedule schedule = {};
    schedule.layout = problem.group_layout;
    schedule.is_sizes = problem.layout == GroupLayout::kSizes;
    schedule.alignment = problem.layout == GroupLayout::kPsum ? problem.group_alignment : 1;
    schedule.first_group = static_cast<int>(problem.first_group);
    schedule.num_groups = static_cast<int>(problem.num_groups);
    schedule.k = static_cast<int>(problem.k);
    schedule.tiles_per_group = make_divisor(tiles_per_group);
    return schedule;
}

// Tiles at most, whatever the layout holds.
int64_t most_tiles(const GemmProblem& problem, const MGroupSchedule& schedule, int block_m) {
    const int64_t of_all = (problem.m + block_m - 1) / block_m;
    const int64_t row_tiles = schedule.table == kGroupOfRow    ? of_all
                              : schedule.table == kRowsOfGroup ? of_all * problem.num_groups
                                                               : of_all + problem.num_groups;
    return row_tiles * schedule.col_tiles;
}

}  // namespace

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

std::span<const GemmRow> gemm_rows() {
#if DG_WITH_SM90
    return sm90::kGemmRows;
#else
    return {};
#endif
}

RowResources row_resources(const GemmRow& row) {
    const sm90::GemmLayout layout{row};
    return {layout.num_stages(), layout.shared_bytes(), layout.num_threads()};
}

void run_gemm(const GemmProblem& problem, const SelectionLimits& limits, int row_idx, bool pdl, Backend& backend) {
    const std::span<const GemmRow> table = gemm_rows();
    if (row_idx < 0) row_idx = select_row(table, problem, limits);
    if (row_idx < 0 || row_idx >= static_cast<int>(table.size())) throw_no_row(table, problem, limits);
    const GemmRow& row = table[row_idx];
    if (const char* reason = operand_mismatch(row, problem)) {
        throw std::runtime_error("gemm: row " + row_name(row) + " was forced, but it is for " + reason);
    }
    if (row.grouping == Grouping::kKGrouped && problem.num_groups > kMaxKGroups) {
        const int64_t element_bytes = size_of(problem.d_type);
        for (int64_t first = 0; first < problem.num_groups; first += kMaxKGroups) {
            GemmProblem part = problem;
            part.first_group += first;
            part.num_groups = std::min<int64_t>(problem.num_groups - first, kMaxKGroups);
            part.d = static_cast<char*>(problem.d) + first * problem.d_group_stride * element_bytes;
            if (problem.c != nullptr) {
                part.c = static_cast<const char*>(problem.c) + first * problem.c_group_stride * element_bytes;
            }
            run_gemm(part, limits, row_idx, pdl, backend);
        }
        return;
    }
    if (row.grouping != grouping_of(problem) || !fits_alignment(row, problem)) {
        throw std::runtime_error("gemm: row " + row_name(row) + " was forced, but it does not take these groups");
    }
    check_groups(problem);
    const sm90::GemmLayout layout{row};
    const int block_k = row.block_k();
    const bool is_float = problem.d_type == DataType::kFloat32;

    MatrixView a = operand_view(row, problem.a, problem.m, problem.k, problem.a_stride, row.a_mn_major);
    // Two elements of FP4 are one of a tensor map.
    const int b_pack = layout.is_fp4() ? 2 : 1;
    MatrixView b = operand_view(row, problem.b, problem.n, (problem.k + b_pack - 1) / b_pack, problem.b_stride / b_pack,
                                row.b_mn_major);
    const int64_t heads = problem.head_left + problem.head_right > 0 ? problem.n / (problem.head_left + problem.head_right) : 0;
    MatrixView d{problem.d, problem.m, problem.n + heads * problem.head_mid, problem.d_stride,
                 is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, size_of(problem.d_type)};
    if (layout.has_groups()) {
        b.groups = problem.num_groups;
        b.group_stride = problem.b_group_stride / b_pack;
        const bool own_tokens = row.grouping == Grouping::kBatched || problem.layout == GroupLayout::kMasked;
        a.groups = d.groups = own_tokens ? problem.num_groups : 1;
        a.group_stride = problem.a_group_stride;
        d.group_stride = problem.d_group_stride;
    } else if (row.grouping == Grouping::kKGrouped) {
        d.groups = problem.num_groups;
        d.group_stride = problem.d_group_stride;
    } else if (row.grouping == Grouping::kSummed) {
        a.groups = b.groups = problem.num_groups;
        a.group_stride = problem.a_group_stride;
        b.group_stride = problem.b_group_stride;
    }
    const MatrixView& rows = row.swap_ab ? b : a;
    const MatrixView& cols = row.swap_ab ? a : b;
    const int64_t num_rows = row.swap_ab ? problem.n : problem.m;
    const int64_t num_cols = row.swap_ab ? problem.m : problem.n;
    const EncodeTiledFunction encode = backend.encode_tiled();

    GemmParams params = {};
    // A shared panel is loaded in halves, one by each CTA of the pair.
    params.rows_map = make_operand_map(encode, rows, layout.rows_mn_major(), block_k / (row.swap_ab ? b_pack : 1),
                                       row.block_rows / row.col_ctas);
    params.cols_map = make_operand_map(encode, cols, layout.cols_mn_major(), block_k,
                                       row.block_cols / row.row_ctas);

    const int element_bytes = size_of(problem.d_type);
    params.d_is_float = is_float;
    params.d_pairs = problem.d_stride % 2 == 0 && d.group_stride % 2 == 0 && aligned(problem.d, 2 * element_bytes) &&
                     problem.head_left % 2 == 0 && problem.head_mid % 2 == 0 && problem.head_right % 2 == 0 &&
                     (problem.c == nullptr || (problem.c_stride % 2 == 0 && problem.c_group_stride % 2 == 0 &&
                                               aligned(problem.c, 2 * element_bytes)));
    // With gaps between heads each box has to lie in one part of one head, and to begin there on 16 bytes.
    // TMA stores whole units of 16 bytes, also at the end of a row: its columns have to fill them.
    const bool tma_can_store = (!is_float || layout.stages_float()) && aligned(problem.d, 16) &&
                               problem.n * element_bytes % 16 == 0 && problem.d_stride * element_bytes % 16 == 0 &&
                               d.group_stride * element_bytes % 16 == 0 &&
                               problem.head_left % layout.box_cols() == 0 &&
                               problem.head_right % layout.box_cols() == 0 && problem.head_mid % 8 == 0;
    params.output_mode = tma_can_store ? kStoreTma : kStoreDirect;
    if (tma_can_store) params.d_map = make_tensor_map(encode, d, layout.box_rows(), layout.box_cols() * 2 / element_bytes);
    // Sums in place, such as gradients: TMA adds, and the kernel does not wait for what it adds to.
    const bool adds_in_place = tma_can_store && is_float && problem.c == problem.d &&
                               problem.c_stride == problem.d_stride && problem.c_group_stride == problem.d_group_stride;
    if (adds_in_place) params.output_mode = kAddTma;

    const int64_t k_groups = layout.has_scales() ? (problem.k + problem.gran_k - 1) / problem.gran_k : 0;
    const ScaleTensor& row_scales = row.swap_ab ? problem.sfb : problem.sfa;
    const ScaleTensor& col_scales = row.swap_ab ? problem.sfa : problem.sfb;
    if (layout.row_scales_are_vector()) {
        const int64_t row_k_groups = layout.row_scales_are_words() ? (problem.k + block_k - 1) / block_k : k_groups;
        params.row_scales_map =
            make_scale_map(encode, row_scales, num_rows, row_k_groups, rows.groups, layout.row_scale_box_rows(),
                           layout.row_scale_groups());
    }
    if (layout.col_scales_are_vector()) {
        params.col_scales_map =
            make_scale_map(encode, col_scales, num_cols, k_groups, cols.groups, layout.col_scale_box_cols(),
                           layout.k_groups());
    }
    if (layout.has_block_scales()) {
        params.block_scales = {problem.sfb.data, problem.sfb.stride_mn, problem.sfb.stride_k,
                               static_cast<int>((problem.n + 127) / 128)};
    }

    const auto tiles = [](int64_t size, int block) { return static_cast<int>((size + block - 1) / block); };
    const int row_tiles = tiles(num_rows, row.block_rows * row.row_ctas);
    const int col_tiles = tiles(num_cols, row.block_cols * row.col_ctas);
    int num_k_blocks = tiles(problem.k, block_k);
    int64_t num_tiles = static_cast<int64_t>(row_tiles) * col_tiles;
    if (row.grouping == Grouping::kMGrouped) {
        params.groups = make_group_schedule(problem, row, num_k_blocks, limits.num_sms);
        num_tiles = most_tiles(problem, params.groups, row.block_m());
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
    const int clusters =
        static_cast<int>(std::min<int64_t>(num_tiles, resident_clusters(row.cluster_size(), limits.num_sms)));
    params.schedule = make_dense_schedule(row, row_tiles, col_tiles, num_k_blocks, clusters);

    params.d = problem.d;
    params.c = adds_in_place ? nullptr : problem.c;
    params.d_stride = problem.d_stride;
    params.c_stride = problem.c_stride;
    params.m = static_cast<int>(problem.m);
    params.n = static_cast<int>(problem.n);
    params.d_group_stride = d.group_stride;
    params.c_group_stride = problem.c_group_stride;
    params.block_scales_group_stride = problem.sfb.stride_group;
    if (heads > 0) {
        params.heads = {make_divisor(problem.head_left + problem.head_right), problem.head_left, problem.head_mid};
    }

    const RowResources resources = row_resources(row);
    KernelLaunch launch;
    launch.kernel = find_kernel(row_idx);
    launch.name = &kernel_name;
    launch.symbol = &kernel_symbol;
    launch.row = row_idx;
    launch.grid = clusters * row.cluster_size();
    launch.block = resources.num_threads;
    launch.cluster = row.cluster_size();
    launch.shared_bytes = resources.shared_bytes;
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, row, resources, launch.grid);
    backend.launch(launch);
}

}  // namespace deep_gemm
