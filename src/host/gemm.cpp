#include "gemm.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "../sm90/gemm_dispatch.h"
#include "../sm90/gemm_instances.h"
#include "../sm90/gemm_traits.h"
#include "gemm_common.h"
#include "shards.h"

namespace deep_gemm {

namespace {

static_assert(sm90::first_invalid(sm90::kGemmRows) == -1,
              "src/sm90/gemm_instances.h has a row that cannot be compiled: see invalid_reason() in gemm_traits.h");

#if DG_WITH_SM90
template <int kShard>
struct GemmShard {
    static const void* find(int row) { return sm90::gemm_kernel_in_shard<kShard>(row); }
};
const void* find_kernel(int row) { return find_in_shards<GemmShard>(row); }
#else
const void* find_kernel(int) { return nullptr; }
#endif

std::string kernel_name(int row) { return row_name(gemm_rows()[row]); }
std::string kernel_symbol(int row) { return "sm90_gemmILi" + std::to_string(row) + "E"; }

// An operand as it is stored: [mn, k], or MN-major [k, mn].
MatrixView operand_view(bool is_bf16, const void* data, int64_t mn, int64_t k, int64_t stride, bool mn_major) {
    const CUtensorMapDataType type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    return {data, mn_major ? k : mn, mn_major ? mn : k, stride, type, is_bf16 ? 2 : 1};
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

}  // namespace

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
    if (row_idx < 0 || row_idx >= static_cast<int>(table.size())) throw_no_row(table, "sm_90a", problem, limits);
    const GemmRow& row = table[row_idx];
    if (const char* reason = operand_mismatch(row, problem)) {
        throw std::runtime_error("gemm: row " + row_name(row) + " was forced, but it is for " + reason);
    }
    if (run_in_parts(problem, [&](const GemmProblem& part) { run_gemm(part, limits, row_idx, pdl, backend); })) return;
    if (row.grouping != grouping_of(problem) || !fits_alignment(row, problem)) {
        throw std::runtime_error("gemm: row " + row_name(row) + " was forced, but it does not take these groups");
    }
    check_groups(problem);
    const sm90::GemmLayout layout{row};
    const int block_k = row.block_k();
    const bool is_float = problem.d_type == DataType::kFloat32;

    MatrixView a = operand_view(row.has_bf16_a(), problem.a, problem.m, problem.k, problem.a_stride, row.a_mn_major);
    // Two elements of FP4 are one of a tensor map.
    const int b_pack = layout.is_fp4() ? 2 : 1;
    MatrixView b = operand_view(layout.is_bf16(), problem.b, problem.n, (problem.k + b_pack - 1) / b_pack, problem.b_stride / b_pack,
                                row.b_mn_major);
    const GroupDims groups = group_dims(problem);
    const MatrixView d = result_view(problem, groups.d);
    a.groups = groups.a;
    b.groups = groups.b;
    a.group_stride = problem.a_group_stride;
    b.group_stride = problem.b_group_stride / b_pack;
    const MatrixView& rows = row.swap_ab ? b : a;
    const MatrixView& cols = row.swap_ab ? a : b;
    const int64_t num_rows = row.swap_ab ? problem.n : problem.m;
    const int64_t num_cols = row.swap_ab ? problem.m : problem.n;
    const EncodeTiledFunction encode = backend.encode_tiled();

    GemmParams params = {};
    const int clusters = set_problem(params, problem, row, limits);
    const int a_block_k = layout.has_bf16_tokens() ? block_k / 2 : block_k;
    // A shared panel is loaded in parts, one by each CTA that shares it.
    const int box_m = row.block_m() / (row.swap_ab ? row.row_ctas : row.col_ctas);
    const int box_n = row.block_n() / (row.swap_ab ? row.col_ctas : row.row_ctas);
    // The only tile along M or N may have all of its boxes smaller; of several tiles the last one has boxes of its own.
    const auto rest = [](bool skips, int64_t size, int block) { return skips ? static_cast<int>(size % block) : 0; };
    const int m_tail = rest(row.skips_tail(), problem.m, row.block_m());
    const int n_tail = rest(row.skips_weights_tail(), problem.n, row.block_n());
    const bool one_m_tile = problem.m < row.block_m(), one_n_tile = problem.n < row.block_n();
    const auto tokens_map = [&](int box) { return make_operand_map(encode, a, row.a_mn_major, a_block_k, box); };
    const auto weights_map = [&](int box) { return make_operand_map(encode, b, row.b_mn_major, block_k / b_pack, box); };
    const auto operands = [&](const CUtensorMap& tokens, const CUtensorMap& weights) {
        return row.swap_ab ? GemmParams::Operands{weights, tokens} : GemmParams::Operands{tokens, weights};
    };
    const CUtensorMap tokens = tokens_map(m_tail > 0 && one_m_tile ? m_tail : box_m);
    const CUtensorMap weights = weights_map(n_tail > 0 && one_n_tile ? n_tail : box_n);
    const GemmParams::Operands whole = operands(tokens, weights);
    params.rows_map = whole.rows;
    params.cols_map = whole.cols;
    const bool own_m = m_tail > 0 && !one_m_tile, own_n = n_tail > 0 && !one_n_tile;
    if (row.skips_row_parts()) {
        params.tails[0].rows = tokens_map(64);
    } else if (own_m || own_n) {
        const CUtensorMap last_tokens = own_m ? tokens_map(m_tail) : tokens;
        const CUtensorMap last_weights = own_n ? weights_map(n_tail) : weights;
        params.tails[0] = operands(last_tokens, weights);
        params.tails[1] = operands(tokens, last_weights);
        params.tails[2] = operands(last_tokens, last_weights);
    }

    const int element_bytes = size_of(problem.d_type);
    params.d_pairs = problem.d_stride % 2 == 0 && problem.d_group_stride % 2 == 0 &&
                     aligned(problem.d, 2 * element_bytes) && problem.head_left % 2 == 0 && problem.head_mid % 2 == 0 &&
                     problem.head_right % 2 == 0 &&
                     (problem.c == nullptr || (problem.c_stride % 2 == 0 && problem.c_group_stride % 2 == 0 &&
                                               aligned(problem.c, 2 * element_bytes)));
    const bool tma_can_store = (!is_float || layout.stages_float()) &&
                               tma_can_address_result(problem, layout.box_cols());
    params.output_mode = !tma_can_store ? kStoreDirect : adds_in_place(problem) ? kAddTma : kStoreTma;
    if (tma_can_store) params.d_map = make_tensor_map(encode, d, layout.box_rows(), layout.box_cols() * 2 / element_bytes);
    if (params.output_mode == kAddTma) params.c = nullptr;

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

    if (problem.blocks_to_redo != nullptr) {
        const int64_t blocks = (problem.n + 127) / 128 * ((problem.k + 127) / 128) * problem.num_groups;
        if (!layout.is_fp4() || !aligned(problem.blocks_to_redo, 16) || blocks > std::numeric_limits<int>::max() - 15) {
            throw std::runtime_error("gemm: blocks to redo are for FP4 rows, and as many as an int can count");
        }
        params.redo = {problem.blocks_to_redo, static_cast<int>((blocks + 15) / 16 * 16),
                       static_cast<int>((problem.n + 127) / 128), static_cast<int>((problem.k + 127) / 128)};
    }

    params.block_scales_group_stride = problem.sfb.stride_group;
    if (row.limits_loads() && params.schedule.num_tiles > clusters) {
        constexpr int64_t kMostBytes = 8 << 20;  // of the weights, for all CTAs: twice what hides the latency of memory
        const int64_t stages_bytes = int64_t{row.block_n()} * sm90::kBlockK / b_pack * clusters;
        params.most_in_flight = static_cast<int>(std::clamp<int64_t>(kMostBytes / stages_bytes, 3, layout.num_stages()));
    }
    const RowKernel kernel = {row_idx, find_kernel(row_idx), &kernel_name, &kernel_symbol};
    launch_row(kernel, problem, row, row_resources(row), clusters, &params, sizeof(params), pdl, backend);
}

}  // namespace deep_gemm
