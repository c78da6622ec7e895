#include "gemm_sm100.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "../sm100/gemm_dispatch.h"
#include "../sm100/gemm_instances.h"
#include "../sm100/gemm_params.h"
#include "../sm100/gemm_traits.h"
#include "knobs.h"
#include "schedule.h"

namespace deep_gemm {

namespace {

static_assert(sm100::first_invalid(sm100::kGemmRows) == -1,
              "src/sm100/gemm_instances.h has a row that cannot be compiled: see invalid_reason() in gemm_traits.h");

#if DG_WITH_SM100
template <int... kShard>
const void* find_kernel(int row, std::integer_sequence<int, kShard...>) {
    static constexpr const void* (*kFind[])(int) = {&sm100::gemm_kernel_in_shard<kShard>...};
    return kFind[row % DG_NUM_SHARDS](row);
}

const void* find_kernel(int row) { return find_kernel(row, std::make_integer_sequence<int, DG_NUM_SHARDS>()); }
#else
const void* find_kernel(int) { return nullptr; }
#endif

std::string kernel_name(int row) { return sm100_row_name(sm100_gemm_rows()[row]); }
std::string kernel_symbol(int row) { return "sm100_gemmILi" + std::to_string(row) + "E"; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// One operand of a problem, [mn, k].
struct Operand {
    const void* data;
    int64_t mn, k, stride;  // elements
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
        const int64_t stride = operand.is_fp4 ? operand.stride / 2 : operand.stride;
        return make_tensor_map(encode, {operand.data, operand.mn, operand.k, stride, type, item}, tile, block_k);
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
    return make_tensor_map(encode, {operand.data, operand.k, operand.mn, operand.stride, type, item}, block_k,
                           source.box_elems);
}

// Scales per row, packed words [K words, MN].
CUtensorMap make_scale_map(EncodeTiledFunction encode, const ScaleTensor& scales, int64_t mn, int64_t words, int box_mn) {
    // The stride of a single row of words is never used, but the tensor map wants a multiple of 16 bytes.
    const int64_t stride = words > 1 ? scales.stride_k : (mn + 3) / 4 * 4;
    if ((scales.stride_mn != 1 && mn > 1) || stride % 4 != 0 || !aligned(scales.data, 16)) {
        throw std::runtime_error("gemm: packed scales must be MN-major with a 16-byte aligned stride");
    }
    return make_tensor_map(encode, {scales.data, words, mn, stride, CU_TENSOR_MAP_DATA_TYPE_INT32, 4}, 1, box_mn, false);
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
    if (row_idx < 0 || row_idx >= static_cast<int>(table.size())) throw_no_row(table, problem, limits);
    const GemmRow& row = table[row_idx];
    if (const char* reason = sm100_reason_against(row, problem, limits)) {
        throw std::runtime_error("gemm: row " + sm100_row_name(row) + " was forced, but: " + reason);
    }
    const sm100::GemmLayout layout{row};
    const bool is_bf16 = problem.operands == OperandType::kBF16;

    const Operand a{problem.a, problem.m, problem.k, problem.a_stride, problem.a_mn_major, problem.a_is_fp4, is_bf16};
    const Operand b{problem.b, problem.n, problem.k, problem.b_stride, problem.b_mn_major, problem.b_is_fp4, is_bf16};
    const Operand& rows = row.swap_ab ? b : a;
    const Operand& cols = row.swap_ab ? a : b;
    const EncodeTiledFunction encode = backend.encode_tiled();

    sm100::Sm100GemmParams params = {};
    GemmParams& gemm = params.gemm;
    gemm.rows_map = make_operand(encode, rows, sm100::kBlockRows, params.rows);
    gemm.cols_map = make_operand(encode, cols, layout.own_cols(), params.cols);
    params.instruction = instruction_descriptor(row, rows, cols);
    params.stage_bytes = layout.row_tile_bytes() / (rows.is_fp4 ? 2 : 1) + layout.col_tile_bytes() / (cols.is_fp4 ? 2 : 1);

    const int num_k_blocks = static_cast<int>((problem.k + layout.block_k() - 1) / layout.block_k());
    const int64_t last_k = problem.k - static_cast<int64_t>(num_k_blocks - 1) * layout.block_k();
    const int step_k = layout.block_k() / sm100::kSteps;
    params.last_steps = static_cast<int>((last_k + step_k - 1) / step_k);
    params.blocks_per_word = 1;
    if (layout.scaled()) {
        params.blocks_per_word = problem.gran_k == 128 ? 4 : 1;
        const int64_t words = (problem.k + 4 * problem.gran_k - 1) / (4 * problem.gran_k);
        gemm.row_scales_map =
            make_scale_map(encode, row.swap_ab ? problem.sfb : problem.sfa, rows.mn, words, layout.row_scale_bytes() / 4);
        gemm.col_scales_map =
            make_scale_map(encode, row.swap_ab ? problem.sfa : problem.sfb, cols.mn, words, layout.col_scale_bytes() / 4);
    }

    const int element_bytes = size_of(problem.d_type);
    gemm.d_is_float = problem.d_type == DataType::kFloat32;
    // Sums in place, such as gradients: TMA adds, and the kernel does not wait for what it adds to.
    const bool adds_in_place = gemm.d_is_float && problem.c == problem.d && problem.c_stride == problem.d_stride;
    // TMA stores whole units of 16 bytes, also at the end of a row: its columns have to fill them.
    const bool tma_can_store = !row.swap_ab && (problem.c == nullptr || adds_in_place) && aligned(problem.d, 16) &&
                               problem.n * element_bytes % 16 == 0 && problem.d_stride * element_bytes % 16 == 0;
    gemm.output_mode = !tma_can_store ? kStoreDirect : problem.c ? kAddTma : kStoreTma;
    if (tma_can_store) {
        const CUtensorMapDataType type =
            gemm.d_is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        gemm.d_map = make_tensor_map(encode, {problem.d, problem.m, problem.n, problem.d_stride, type, element_bytes}, 32,
                                     layout.box_cols(element_bytes));
    }
    gemm.d = problem.d;
    gemm.c = problem.c;
    gemm.d_stride = problem.d_stride;
    gemm.c_stride = problem.c_stride;
    gemm.m = static_cast<int>(problem.m);
    gemm.n = static_cast<int>(problem.n);
    const int64_t row_tiles = (rows.mn + row.tile_rows() - 1) / row.tile_rows();
    const int64_t col_tiles = (cols.mn + row.tile_cols() - 1) / row.tile_cols();
    if (row_tiles * col_tiles > std::numeric_limits<int>::max() / 2) {
        throw std::runtime_error("gemm: more than 2^30 output tiles");
    }
    const int clusters = static_cast<int>(
        std::min<int64_t>(row_tiles * col_tiles, resident_clusters(row.cluster_size(), limits.num_sms)));
    gemm.schedule = make_dense_schedule(row, static_cast<int>(row_tiles), static_cast<int>(col_tiles), num_k_blocks,
                                        clusters);

    const RowResources resources = sm100_row_resources(row);
    KernelLaunch launch;
    launch.kernel = find_kernel(row_idx);
    launch.symbol = &kernel_symbol;
    launch.name = &kernel_name;
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
