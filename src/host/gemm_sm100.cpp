#include "gemm_sm100.h"

#include <stdexcept>

#include "../sm100/gemm_dispatch.h"
#include "../sm100/gemm_instances.h"
#include "../sm100/gemm_params.h"
#include "../sm100/gemm_traits.h"
#include "gemm_common.h"
#include "shards.h"

namespace deep_gemm {

namespace {

static_assert(sm100::first_invalid(sm100::kGemmRows) == -1,
              "src/sm100/gemm_instances.h has a row that cannot be compiled: see invalid_reason() in gemm_traits.h");

#if DG_WITH_SM100
template <int kShard>
struct Sm100GemmShard {
    static const void* find(int row) { return sm100::gemm_kernel_in_shard<kShard>(row); }
};
const void* find_kernel(int row) { return find_in_shards<Sm100GemmShard>(row); }
#else
const void* find_kernel(int) { return nullptr; }
#endif

std::string kernel_name(int row) { return sm100_row_name(sm100_gemm_rows()[row]); }
std::string kernel_symbol(int row) { return "sm100_gemmILi" + std::to_string(row) + "E"; }

// One operand of a problem, [mn, k], or several.
struct Operand {
    const void* data;
    int64_t mn, k, stride;  // elements
    int64_t groups, group_stride;  // see MatrixView
    bool mn_major;
    bool is_fp4;
    bool is_bf16;

    int element_bytes() const { return is_bf16 ? 2 : 1; }  // in shared memory
};

// Fills `source` and returns the tensor map for a CTA's tile of `tile` rows or columns.
CUtensorMap make_operand(EncodeTiledFunction encode, const Operand& operand, int tile, sm100::OperandSource& source) {
    constexpr uint64_t kVersion = 1ull << 46;
    const int item = operand.element_bytes();
    const int block_k = sm100::kBlockBytes / item;
    const CUtensorMapDataType type = operand.is_bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : operand.is_fp4 ? CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B
                                                      : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    source.mn_major = operand.mn_major;
    if (!operand.mn_major) {
        // Rows of 128 bytes of K, 128-byte swizzle, groups of 8 rows 1024 bytes apart.
        source.descriptor = kVersion | 2ull << 61 | static_cast<uint64_t>(1024 >> 4) << 32;
        source.step = sm100::kStepBytes >> 4;
        source.boxes = 1;
        source.box_elems = tile;
        source.box_bytes = tile * sm100::kBlockBytes;
        // FP4: TMA puts 16 elements into 16 bytes, as the tensor core wants them. Strides are in bytes.
        const int64_t packed = operand.is_fp4 ? 2 : 1;
        const MatrixView view{operand.data,   operand.mn, operand.k, operand.stride / packed,
                              type,           item,       operand.groups, operand.group_stride / packed};
        return make_tensor_map(encode, view, tile, block_k);
    }
    // Panels of one swizzle span along MN and a stage's K; groups of 8 along K follow one another.
    const int span = sm100::mn_major_span(tile, item);
    const uint64_t swizzle = span == 128 ? 2 : span == 64 ? 4 : 6;
    source.box_bytes = span * block_k;
    source.box_elems = span / item;
    source.boxes = tile / source.box_elems;
    source.descriptor = kVersion | swizzle << 61 | static_cast<uint64_t>(8 * span >> 4) << 32 |
                        static_cast<uint64_t>(source.box_bytes >> 4) << 16;
    source.step = sm100::kStepBytes / item * span >> 4;
    const MatrixView view{operand.data, operand.k, operand.mn, operand.stride, type, item, operand.groups, operand.group_stride};
    return make_tensor_map(encode, view, block_k, source.box_elems);
}

// Scales per row, packed words [K words, MN], or `groups` of them.
CUtensorMap make_scale_map(EncodeTiledFunction encode, const ScaleTensor& scales, int64_t mn, int64_t words,
                           int64_t groups, int box_mn) {
    // The stride of a single row of words is never used, but the tensor map wants a multiple of 16 bytes.
    const int64_t stride = words > 1 ? scales.stride_k : (mn + 3) / 4 * 4;
    if ((scales.stride_mn != 1 && mn > 1) || stride % 4 != 0 || !aligned(scales.data, 16)) {
        throw std::runtime_error("gemm: packed scales must be MN-major with a 16-byte aligned stride");
    }
    const MatrixView view{scales.data, words, mn, stride, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, groups, scales.stride_group};
    return make_tensor_map(encode, view, 1, box_mn, false);
}

// "Instruction descriptor" of tcgen05.mma: FP32 accumulators, and UE8M0 scales for 8-bit operands.
uint32_t instruction_descriptor(const GemmRow& row, const Operand& rows, const Operand& cols) {
    const auto format = [](const Operand& operand) { return operand.is_bf16 ? 1u : operand.is_fp4 ? 5u : 0u; };
    const uint32_t m = sm100::kBlockRows * row.row_ctas;
    uint32_t bits = format(rows) << 7 | format(cols) << 10 | uint32_t{rows.mn_major} << 15 |
                    uint32_t{cols.mn_major} << 16 | static_cast<uint32_t>(row.block_cols) >> 3 << 17;
    bits |= row.scaling == kNoScaling ? 1u << 4 | m >> 4 << 24 : 1u << 23 | m >> 7 << 27;
    return bits;
}

}  // namespace

std::span<const GemmRow> sm100_gemm_rows() {
#if DG_WITH_SM100
    return sm100::kGemmRows;
#else
    return {};
#endif
}

RowResources sm100_row_resources(const GemmRow& row) {
    const sm100::GemmLayout layout{row};
    return {layout.num_stages(), layout.shared_bytes(), layout.num_threads()};
}

void run_sm100_gemm(const GemmProblem& problem, const SelectionLimits& limits, int row_idx, bool pdl,
                    Backend& backend) {
    const std::span<const GemmRow> table = sm100_gemm_rows();
    if (row_idx < 0) row_idx = select_row(table, problem, limits);
    if (row_idx < 0 || row_idx >= static_cast<int>(table.size())) throw_no_row(table, "sm_100a", problem, limits);
    const GemmRow& row = table[row_idx];
    if (const char* reason = sm100_reason_against(row, problem, limits)) {
        throw std::runtime_error("gemm: row " + sm100_row_name(row) + " was forced, but: " + reason);
    }
    if (run_in_parts(problem, [&](const GemmProblem& part) { run_sm100_gemm(part, limits, row_idx, pdl, backend); })) {
        return;
    }
    check_groups(problem);
    const sm100::GemmLayout layout{row};
    const bool is_bf16 = problem.operands == OperandType::kBF16;

    const GroupDims groups = group_dims(problem);
    const Operand a{problem.a, problem.m, problem.k, problem.a_stride, groups.a, problem.a_group_stride,
                    problem.a_mn_major, problem.a_is_fp4, is_bf16};
    const Operand b{problem.b, problem.n, problem.k, problem.b_stride, groups.b, problem.b_group_stride,
                    problem.b_mn_major, problem.b_is_fp4, is_bf16};
    const Operand& rows = row.swap_ab ? b : a;
    const Operand& cols = row.swap_ab ? a : b;
    const EncodeTiledFunction encode = backend.encode_tiled();

    sm100::Sm100GemmParams params = {};
    GemmParams& gemm = params.gemm;
    const int clusters = set_problem(gemm, problem, row, limits);
    gemm.rows_map = make_operand(encode, rows, sm100::kBlockRows, params.rows);
    gemm.cols_map = make_operand(encode, cols, layout.own_cols(), params.cols);
    params.instruction = instruction_descriptor(row, rows, cols);
    params.stage_bytes = layout.row_tile_bytes() / (rows.is_fp4 ? 2 : 1) + layout.col_tile_bytes() / (cols.is_fp4 ? 2 : 1);

    const int64_t last_k = (problem.k - 1) % layout.block_k() + 1;
    const int step_k = layout.block_k() / sm100::kSteps;
    params.last_steps = static_cast<int>((last_k + step_k - 1) / step_k);
    params.blocks_per_word = 1;
    if (layout.scaled()) {
        params.blocks_per_word = problem.gran_k == 128 ? 4 : 1;
        int64_t words = (problem.k + 4 * problem.gran_k - 1) / (4 * problem.gran_k);
        // Each group has its own last block.
        if (row.grouping == Grouping::kKGrouped && problem.a_mn_major) {
            words = (problem.k / problem.gran_k + problem.first_group + problem.num_groups + 3) / 4;
        }
        gemm.row_scales_map = make_scale_map(encode, row.swap_ab ? problem.sfb : problem.sfa, rows.mn, words, rows.groups,
                                             layout.row_scale_box());
        gemm.col_scales_map = make_scale_map(encode, row.swap_ab ? problem.sfa : problem.sfb, cols.mn, words, cols.groups,
                                             layout.col_scale_box());
    }

    const int box_cols = layout.box_cols(size_of(problem.d_type));
    const bool tma_can_store = !row.swap_ab && (problem.c == nullptr || adds_in_place(problem)) &&
                               tma_can_address_result(problem, box_cols);
    gemm.output_mode = !tma_can_store ? kStoreDirect : problem.c ? kAddTma : kStoreTma;
    if (tma_can_store) gemm.d_map = make_tensor_map(encode, result_view(problem, groups.d), 32, box_cols);

    const RowKernel kernel = {row_idx, find_kernel(row_idx), &kernel_name, &kernel_symbol};
    launch_row(kernel, problem, row, sm100_row_resources(row), clusters, &params, sizeof(params), pdl, backend);
}

}  // namespace deep_gemm
