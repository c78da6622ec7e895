// Products of many groups in one launch, whose sizes only the device knows.
#include "product.h"

#include <algorithm>

#include "../host/cast.h"
#include "../host/knobs.h"
#include "gemm_ops.h"

namespace deep_gemm::ops {

namespace {

constexpr int64_t kMaxGroups = 1024;  // of layouts with a number for each group, which kernels keep in shared memory

// The two operands, with scales where they are FP8.
struct Operands {
    TensorArgument a;
    std::optional<TensorArgument> sfa;
    TensorArgument b;
    std::optional<TensorArgument> sfb;

    bool is_fp8() const { return sfa.has_value(); }
};

template <bool kFP8>
Operands take_operands(Arguments& arguments) {
    TensorArgument a(arguments.take_tensor());
    std::optional<TensorArgument> sfa, sfb;
    if constexpr (kFP8) sfa.emplace(arguments.take_tensor());
    TensorArgument b(arguments.take_tensor());
    if constexpr (kFP8) sfb.emplace(arguments.take_tensor());
    return {std::move(a), std::move(sfa), std::move(b), std::move(sfb)};
}

template <bool kFP8>
Recipe take_recipe(Arguments& arguments) {
    if constexpr (kFP8) return arguments.take<Recipe>();
    return std::nullopt;
}

// A tensor of ranks that an operator accepts.
void check_ranks(const char* op, const char* arg, const TensorInfo& x, std::initializer_list<int64_t> ranks) {
    if (std::find(ranks.begin(), ranks.end(), x.dim()) != ranks.end()) return;
    std::string words;
    for (int64_t rank : ranks) words += (words.empty() ? "" : " or ") + text(rank);
    fail(op, arg, "rank", x.dim(), words);
}

void check_devices(const char* op, const Operands& operands, const char* groups_arg, const TensorInfo& groups,
                   const TensorInfo* c, const TensorInfo* out) {
    const TensorInfo& a = operands.a.info;
    check_device(op, "b", operands.b.info, a, "a");
    if (operands.is_fp8()) {
        check_device(op, "sfa", operands.sfa->info, a, "a");
        check_device(op, "sfb", operands.sfb->info, a, "a");
    }
    check_device(op, groups_arg, groups, a, "a");
    if (c) check_device(op, "c", *c, a, "a");
    if (out) check_device(op, "out", *out, a, "a");
}

void check_groups(const char* op, const char* arg, const TensorInfo& groups, const char* names, int64_t size) {
    check_shape(op, arg, groups, names, {size});
    check_inner_stride(op, arg, groups, nullptr);
}

GroupLayout find_layout(const char* op, const std::string& layout, const char* first, GroupLayout of_first) {
    if (layout == first) return of_first;
    if (layout == "psum") return GroupLayout::kPsum;
    if (layout == "offsets") return GroupLayout::kOffsets;
    fail(op, "layout", "value", layout, one_of({first, "psum", "offsets"}));
}

void set_groups(GemmProblem& problem, const TensorInfo& groups, GroupLayout layout, int64_t num_groups) {
    problem.num_groups = num_groups;
    problem.layout = layout;
    problem.group_layout = static_cast<const int32_t*>(groups.data_ptr());
    // Read now: a captured graph keeps it.
    const bool aligned = layout == GroupLayout::kIndices || layout == GroupLayout::kPsum;
    problem.group_alignment = aligned ? knobs().mk_alignment.load() : 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// M-grouped

struct MGrouped {
    const char* op;
    bool or_fp4 = false;  // K-major operands may be FP4
    bool masked = false;
    bool b_k_major = true;
    std::string layout = "indices";
    std::optional<int64_t> expected_m = {};
    ScalarType out_dtype = ScalarType::BFloat16;
    Recipe recipe = {};
};

OwnedTensor run(const MGrouped& call, const Operands& operands, const TensorInfo& groups, const TensorInfo* out);

// A tensor on the device of `like`, all of whose bytes are `byte`.
TensorArgument filled(std::span<const int64_t> sizes, ScalarType dtype, int byte, const TensorInfo& like,
                      cudaStream_t stream) {
    const std::array<int64_t, 3> strides = {sizes[1] * sizes[2], sizes[2], 1};
    TensorArgument result{OwnedTensor(new_empty_strided(sizes, strides, dtype, like.get()))};
    const int64_t bytes = sizes[0] * sizes[1] * sizes[2] * element_size(dtype);
    check_enqueued(cudaMemsetAsync(result.info.data_ptr(), byte, bytes, stream), "m_grouped_gemm", "clearing operands");
    return result;
}

// K = 0: zeros, but not in rows that do not count, and only the device knows which do. So it is K = 16, of zeros.
void write_zeros(const MGrouped& call, const Operands& operands, const TensorInfo& masked_m, const TensorInfo& out) {
    const TensorInfo &a = operands.a.info, &b = operands.b.info;
    const int device = a.get_device_index();
    const cudaStream_t stream = current_stream(device);
    const int64_t num_groups = a.size(0), m = a.size(1), n = b.size(1);
    std::optional<TensorArgument> sfa, sfb;
    if (operands.is_fp8()) {
        constexpr ScalarType kScaleType = ScalarType::Float8_e8m0fnu;
        constexpr int kOne = 127;
        sfa.emplace(filled(std::array{num_groups, m, int64_t{1}}, kScaleType, kOne, a, stream));
        sfb.emplace(filled(std::array{num_groups, (n + 127) / 128, int64_t{1}}, kScaleType, kOne, a, stream));
    }
    const ScalarType dtype = operands.is_fp8() ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
    Operands empty = {filled(std::array{num_groups, m, int64_t{16}}, dtype, 0, a, stream), std::move(sfa),
                      filled(std::array{num_groups, n, int64_t{16}}, dtype, 0, a, stream), std::move(sfb)};
    MGrouped zero_call = call;
    zero_call.recipe = {1, 128, 128};
    run(zero_call, empty, masked_m, &out);
}

// Checks everything, then runs. Returns the result, allocated here, unless `out` is there to write to.
OwnedTensor run(const MGrouped& call, const Operands& operands, const TensorInfo& groups, const TensorInfo* out) {
    const char* op = call.op;
    const char* groups_arg = call.masked ? "masked_m" : "grouped_layout";
    const char* m_name = call.masked ? "M_max" : "M";
    const TensorInfo &a = operands.a.info, &b = operands.b.info;
    const bool is_fp8 = operands.is_fp8(), masked = call.masked;
    const ScalarType dtype = is_fp8 ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;

    check_operand_dtype(op, "a", a, dtype, call.or_fp4);
    check_rank(op, "a", a, masked ? 3 : 2);
    check_operand_dtype(op, "b", b, dtype, call.or_fp4 && call.b_k_major);
    check_rank(op, "b", b, 3);
    if (is_fp8) {
        check_scales(op, "sfa", operands.sfa->info, masked ? 3 : 2);
        check_scales(op, "sfb", operands.sfb->info, 3);
    }
    check_dtype(op, groups_arg, groups, {ScalarType::Int});
    check_rank(op, groups_arg, groups, 1);
    check_devices(op, operands, groups_arg, groups, nullptr, out);
    if (!out) check_out_dtype(op, call.out_dtype);
    const GroupLayout layout =
        masked ? GroupLayout::kMasked : find_layout(op, call.layout, "indices", GroupLayout::kIndices);
    if (call.expected_m && *call.expected_m < 0) {
        fail(op, "expected_m", "value", *call.expected_m, "an integer of at least 0");
    }

    const Axes axes_a = masked ? kKMajorGroups : kKMajor, axes_b = call.b_k_major ? kKMajorGroups : kMNMajorGroups;
    if (masked) check_size(op, "a", "G", a.size(0));
    check_size(op, "a", m_name, a.size(axes_a.mn));
    check_size(op, "a", "K", a.size(axes_a.k));
    check_size(op, "b", "G", b.size(0));
    check_size(op, "b", call.b_k_major ? "N" : "K", b.size(1));
    check_size(op, "b", call.b_k_major ? "K" : "N", b.size(2));
    const int64_t m = a.size(axes_a.mn), n = b.size(axes_b.mn), k = size_along_k(a, axes_a), num_groups = b.size(0);
    if (size_along_k(b, axes_b) != k) fail(op, "b", "K", size_along_k(b, axes_b), k, "the K of a");
    if (masked && num_groups != a.size(0)) fail(op, "b", "G", num_groups, a.size(0), "the G of a");
    check_operand_layout(op, "a", a, true);
    check_operand_layout(op, "b", b, call.b_k_major || !is_fp8);
    const bool per_row = layout == GroupLayout::kIndices;
    if (!per_row && num_groups > kMaxGroups) fail(op, "b", "G", num_groups, "at most " + text(kMaxGroups));
    check_groups(op, groups_arg, groups, per_row ? "[M]" : "[G]", per_row ? m : num_groups);
    Granularities grans;
    if (is_fp8) {
        const Dim g_dim = {Dim::kGroup, "G", num_groups}, k_dim = {Dim::kK, "K", k};
        const Dim m_dim = {Dim::kMN, m_name, m}, n_dim = {Dim::kMN, "N", n};
        const std::array<Dim, 3> dims_a = {g_dim, m_dim, k_dim};
        const std::array<Dim, 3> dims_b = {g_dim, call.b_k_major ? n_dim : k_dim, call.b_k_major ? k_dim : n_dim};
        grans = match_recipe(op, operands.sfa->info, std::span(dims_a).subspan(masked ? 0 : 1), operands.sfb->info,
                             dims_b, call.recipe, is_fp4(b));
    }
    const std::array<int64_t, 3> shape = {num_groups, m, n};
    const std::span<const int64_t> result_shape = std::span(shape).subspan(masked ? 0 : 1);
    check_result(op, masked ? "[G, M_max, N]" : "[M, N]", "N", result_shape, nullptr, call.out_dtype, out);

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    Result result(result_shape, call.out_dtype, a, out);
    if (m == 0 || n == 0 || (masked && num_groups == 0)) return std::move(result.allocated);
    if (k == 0 && masked && out) {
        check_architecture(op, device);
        write_zeros(call, operands, groups, *out);
        return {};
    }
    if (k == 0 || num_groups == 0) {
        if (k == 0 || !out) result.zero();
        return std::move(result.allocated);
    }
    const bool sm100 = check_architecture(op, device);
    if (sm100) {
        check_fp4_unpackable(op, "a", a, k);
        check_fp4_unpackable(op, "b", b, k);
    }

    const cudaStream_t stream = current_stream(device);
    GemmProblem problem;
    problem.grouping = Grouping::kMGrouped;
    set_groups(problem, groups, layout, num_groups);
    problem.expected_m = call.expected_m.value_or(0);
    problem.zero_padding = !out && !masked;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    OwnedTensor scratch_a, scratch_b, scratch_sfa, scratch_sfb, tokens;
    set_operands(problem, prepare_operand(op, a, axes_a, stream, scratch_a, sm100, sm100),
                 prepare_operand(op, b, axes_b, stream, scratch_b, sm100, sm100 || sm90_keeps_fp4(grans)));
    if (is_fp8) {
        set_scales(op, problem, operands.sfa->info, axes_a, scratch_sfa, operands.sfb->info, axes_b, scratch_sfb, tokens, grans,
                   stream, sm100);
    } else {
        problem.operands = OperandType::kBF16;
        problem.b_mn_major = !call.b_k_major;
    }
    set_result(problem, result, masked ? kKMajorGroups : kKMajor, nullptr);
    run_product(op, problem, a, stream);
    return std::move(result.allocated);
}

// ---------------------------------------------------------------------------------------------------------------------
// K-grouped

struct KGrouped {
    const char* op;
    bool k_major = false;
    std::string layout = "sizes";
    ScalarType out_dtype = ScalarType::Float;
};

// K of a flat operand, nothing where MN is 0.
std::optional<int64_t> flat_rows(const char* op, const char* arg, const TensorInfo& x, const char* name, int64_t mn) {
    const int64_t size = x.size(0);
    if (mn == 0) {
        if (size != 0) fail(op, arg, "size", size, "0 (" + std::string(name) + " = 0)");
        return std::nullopt;
    }
    if (size % (mn * 128) != 0) {
        fail(op, arg, "size", size, "a multiple of 128 * " + std::string(name) + " = " + text(128 * mn));
    }
    return size / mn;
}

// "3", or "2.5": a number of K in blocks of 128, as Python's format "g" writes it.
std::string in_blocks(int64_t k) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(k) / 128);
    return digits;
}

void check_k_grouped_scales(const char* op, const char* arg, const TensorInfo& sf, const char* name, int64_t mn,
                            int64_t k, bool padded, GroupLayout layout, int64_t num_groups) {
    const int64_t rows = sf.size(0), blocks = (k + 127) / 128;
    if (sf.size(1) != mn) {
        fail(op, arg, name, sf.size(1), mn, "the " + std::string(name) + " of " + std::string(1, arg[2]));
    }
    if (padded) {
        if (rows * 128 != k) fail(op, arg, "rows", rows, "K / 128 = " + in_blocks(k));
    } else if (layout != GroupLayout::kPsum && num_groups > 0 && rows < blocks) {
        // Between groups of "psum" there are rows of a and b without scales.
        fail(op, arg, "rows", rows, "at least ceil(K / 128) = " + text(blocks));
    }
}

// An FP8 operand with each group K-major from a multiple of 128 on, in `scratch`.
Operand pad_groups(const char* op, const TensorInfo& x, int64_t mn, const cast::KGroups& groups, cudaStream_t stream,
                   OwnedTensor& scratch) {
    const int64_t columns = 128 * groups.scale_rows();
    const std::array<int64_t, 2> sizes = {mn, columns}, strides = {columns, 1};
    scratch.reset(new_empty_strided(sizes, strides, ScalarType::Float8_e4m3fn, x.get()));
    cast::KGroupedTransposeProblem problem;
    problem.x = x.data_ptr();
    problem.flat = x.dim() == 1;
    problem.x_stride = problem.flat ? 0 : x.stride(0);
    problem.mn = mn;
    problem.out = TensorInfo(scratch.get()).data_ptr();
    problem.out_stride = columns;
    check_enqueued(cast::launch_k_grouped_transpose_fp8(problem, groups, stream, knobs().pdl), op,
                   "transposing an operand");
    return {problem.out, columns, 0};
}

// A matrix whose rows TMA can read where they lie.
bool readable_by_tma(const TensorInfo& x) {
    return (x.size(0) <= 1 || x.stride(0) % 16 == 0) && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

// Checks everything, then runs. Returns the result, allocated here, unless `out` is there to write to.
OwnedTensor run(const KGrouped& call, const Operands& operands, const TensorInfo& ks, const TensorInfo* c,
                const TensorInfo* out) {
    const char* op = call.op;
    const TensorInfo &a = operands.a.info, &b = operands.b.info;
    const bool is_fp8 = operands.is_fp8();
    const ScalarType dtype = is_fp8 ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;

    check_dtype(op, "a", a, {dtype});
    call.k_major ? check_ranks(op, "a", a, {1, 2}) : check_rank(op, "a", a, 2);
    check_dtype(op, "b", b, {dtype});
    check_rank(op, "b", b, a.dim());
    if (is_fp8) {
        // Packed scales hold four K groups a word, which would straddle the products' groups.
        check_dtype(op, "sfa", operands.sfa->info, {ScalarType::Float, ScalarType::Float8_e8m0fnu});
        check_rank(op, "sfa", operands.sfa->info, 2);
        check_dtype(op, "sfb", operands.sfb->info, {ScalarType::Float, ScalarType::Float8_e8m0fnu});
        check_rank(op, "sfb", operands.sfb->info, 2);
    }
    check_dtype(op, "ks", ks, {ScalarType::Int});
    check_rank(op, "ks", ks, 1);
    check_devices(op, operands, "ks", ks, c, out);
    if (!out) check_out_dtype(op, call.out_dtype);
    const GroupLayout layout = find_layout(op, call.layout, "sizes", GroupLayout::kSizes);

    const bool flat = call.k_major && a.dim() == 1, padded = call.k_major && !flat;
    const Axes axes = padded ? kKMajor : kMNMajor;
    int64_t m = 0, n = 0, k = 0, k_of_b = 0;
    if (flat) {
        const TensorInfo &sfa = operands.sfa->info, &sfb = operands.sfb->info;
        check_size(op, "sfa", "rows", sfa.size(0));
        check_size(op, "sfa", "M", sfa.size(1));
        check_size(op, "sfb", "rows", sfb.size(0));
        check_size(op, "sfb", "N", sfb.size(1));
        m = sfa.size(1);
        n = sfb.size(1);
        const std::optional<int64_t> rows_a = flat_rows(op, "a", a, "M", m), rows_b = flat_rows(op, "b", b, "N", n);
        k = rows_a ? *rows_a : rows_b.value_or(0);
        k_of_b = rows_b.value_or(k);
        check_size(op, "a", "K", k);
    } else {
        check_size(op, "a", padded ? "M" : "K", a.size(0));
        check_size(op, "a", padded ? "K" : "M", a.size(1));
        check_size(op, "b", padded ? "N" : "K", b.size(0));
        check_size(op, "b", padded ? "K" : "N", b.size(1));
        m = a.size(axes.mn);
        n = b.size(axes.mn);
        k = a.size(axes.k);
        k_of_b = b.size(axes.k);
    }
    if (k_of_b != k) fail(op, "b", "K", k_of_b, k, "the K of a");
    if (flat) {
        check_inner_stride(op, "a", a, nullptr);
        check_inner_stride(op, "b", b, nullptr);
    } else {
        check_operand_layout(op, "a", a, padded || !is_fp8);
        check_operand_layout(op, "b", b, padded || !is_fp8);
    }
    const int64_t num_groups = ks.size(0);
    if (num_groups > kMaxGroups) fail(op, "ks", "G", num_groups, "at most " + text(kMaxGroups));
    check_groups(op, "ks", ks, "[G]", num_groups);
    if (is_fp8) {
        check_k_grouped_scales(op, "sfa", operands.sfa->info, "M", m, k, padded, layout, num_groups);
        check_k_grouped_scales(op, "sfb", operands.sfb->info, "N", n, k, padded, layout, num_groups);
    }
    const std::array<int64_t, 3> shape = {num_groups, m, n};
    check_result(op, "[G, M, N]", "N", shape, c, call.out_dtype, out);

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    Result result(shape, call.out_dtype, a, out);
    if (num_groups == 0 || m == 0 || n == 0) return std::move(result.allocated);
    if (k == 0) {
        result.fill(c);
        return std::move(result.allocated);
    }
    const bool sm100 = check_architecture(op, device);

    const cudaStream_t stream = current_stream(device);
    GemmProblem problem;
    problem.grouping = Grouping::kKGrouped;
    set_groups(problem, ks, layout, num_groups);
    problem.m = m;
    problem.n = n;
    problem.k = k;
    OwnedTensor scratch_a, scratch_b, scratch_sfa, scratch_sfb;
    if (!is_fp8) {
        problem.operands = OperandType::kBF16;
        problem.a_mn_major = problem.b_mn_major = true;
        set_operands(problem, prepare_operand(op, a, axes, stream, scratch_a),
                     prepare_operand(op, b, axes, stream, scratch_b));
    } else {
        const TensorInfo &sfa = operands.sfa->info, &sfb = operands.sfb->info;
        int64_t rows = std::min(sfa.size(0), sfb.size(0)), copied_rows = 0;
        const cast::KGroups groups = {.ends = problem.group_layout,
                                      .num_groups = num_groups,
                                      .rows = k,
                                      .layout = layout,
                                      .alignment = problem.group_alignment};
        const bool as_they_lie = sm100 && !padded && !flat && readable_by_tma(a) && readable_by_tma(b);
        if (padded) {
            set_operands(problem, prepare_operand(op, a, axes, stream, scratch_a),
                         prepare_operand(op, b, axes, stream, scratch_b));
            problem.k = rows * 128;
        } else if (as_they_lie) {
            set_operands(problem, prepare_operand(op, a, axes, stream, scratch_a, sm100),
                         prepare_operand(op, b, axes, stream, scratch_b, sm100));
            rows = copied_rows = groups.scale_rows();
        } else {
            set_operands(problem, pad_groups(op, a, m, groups, stream, scratch_a),
                         pad_groups(op, b, n, groups, stream, scratch_b));
            // The kernel takes ends of groups up to its K, and K is 128 for each row of scales: where gaps between
            // groups make them too few, they are copied to where there are enough.
            rows = std::min(rows, groups.scale_rows());
            if (rows * 128 < k) rows = copied_rows = groups.scale_rows();
            problem.k = rows * 128;
        }
        // Words of four scales may hold those of two groups: blocks of K are counted through all groups.
        if (sm100) copied_rows = (copied_rows + 3) / 4;
        problem.sfa = prepare_scales(op, sfa, kMNMajor, m, 1, true, 128, 128 * std::min(rows, sfa.size(0)), stream,
                                     scratch_sfa, copied_rows, sm100);
        problem.sfb = prepare_scales(op, sfb, kMNMajor, n, 1, true, 128, 128 * std::min(rows, sfb.size(0)), stream,
                                     scratch_sfb, copied_rows, sm100);
    }
    set_result(problem, result, kKMajorGroups, c);
    run_product(op, problem, a, stream);
    return std::move(result.allocated);
}

template <bool kFP8, Layout kLayout>
constexpr const char* k_grouped_name() {
    if (!kFP8) return "k_grouped_bf16_gemm_tn_contiguous";
    return kLayout == Layout::kTN ? "k_grouped_fp8_gemm_tn_contiguous" : "k_grouped_fp8_gemm_nt_contiguous";
}

template <bool kFP8, Layout kLayout, bool kOrFP4>
constexpr const char* m_grouped_name() {
    constexpr bool kIsNT = kLayout == Layout::kNT;
    if (kOrFP4) return kIsNT ? "m_grouped_fp8_fp4_gemm_nt_contiguous" : "m_grouped_fp8_fp4_gemm_nn_contiguous";
    if (kFP8) return kIsNT ? "m_grouped_fp8_gemm_nt_contiguous" : "m_grouped_fp8_gemm_nn_contiguous";
    return kIsNT ? "m_grouped_bf16_gemm_nt_contiguous" : "m_grouped_bf16_gemm_nn_contiguous";
}

template <bool kFP8, bool kOrFP4>
constexpr const char* masked_name() {
    if (kOrFP4) return "m_grouped_fp8_fp4_gemm_nt_masked";
    return kFP8 ? "m_grouped_fp8_gemm_nt_masked" : "m_grouped_bf16_gemm_nt_masked";
}

}  // namespace

template <bool kFP8, Layout kLayout, bool kOrFP4>
void m_grouped_gemm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument groups(arguments.take_tensor());
    MGrouped call = {
        .op = m_grouped_name<kFP8, kLayout, kOrFP4>(), .or_fp4 = kOrFP4, .b_k_major = kLayout == Layout::kNT};
    call.layout = arguments.take<std::string>();
    call.out_dtype = arguments.take<ScalarType>();
    call.recipe = take_recipe<kFP8>(arguments);
    call.expected_m = arguments.take<std::optional<int64_t>>();
    return_tensor(stack, run(call, operands, groups.info, nullptr));
}

template <bool kFP8, Layout kLayout, bool kOrFP4>
void m_grouped_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument groups(arguments.take_tensor());
    MGrouped call = {
        .op = m_grouped_name<kFP8, kLayout, kOrFP4>(), .or_fp4 = kOrFP4, .b_k_major = kLayout == Layout::kNT};
    call.layout = arguments.take<std::string>();
    call.recipe = take_recipe<kFP8>(arguments);
    call.expected_m = arguments.take<std::optional<int64_t>>();
    const TensorArgument out(arguments.take_tensor());
    run(call, operands, groups.info, &out.info);
}

template <bool kFP8, bool kOrFP4>
void m_grouped_gemm_masked(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument masked_m(arguments.take_tensor());
    MGrouped call = {.op = masked_name<kFP8, kOrFP4>(), .or_fp4 = kOrFP4, .masked = true};
    call.expected_m = arguments.take<int64_t>();
    call.out_dtype = arguments.take<ScalarType>();
    call.recipe = take_recipe<kFP8>(arguments);
    return_tensor(stack, run(call, operands, masked_m.info, nullptr));
}

template <bool kFP8, bool kOrFP4>
void m_grouped_gemm_masked_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument masked_m(arguments.take_tensor());
    MGrouped call = {.op = masked_name<kFP8, kOrFP4>(), .or_fp4 = kOrFP4, .masked = true};
    call.expected_m = arguments.take<int64_t>();
    call.recipe = take_recipe<kFP8>(arguments);
    const TensorArgument out(arguments.take_tensor());
    run(call, operands, masked_m.info, &out.info);
}

template <bool kFP8, Layout kLayout>
void k_grouped_gemm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument ks(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    KGrouped call = {.op = k_grouped_name<kFP8, kLayout>(), .k_major = kLayout == Layout::kNT};
    call.out_dtype = arguments.take<ScalarType>();
    call.layout = arguments.take<std::string>();
    return_tensor(stack, run(call, operands, ks.info, c.get(), nullptr));
}

template <bool kFP8, Layout kLayout>
void k_grouped_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Operands operands = take_operands<kFP8>(arguments);
    const TensorArgument ks(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    KGrouped call = {.op = k_grouped_name<kFP8, kLayout>(), .k_major = kLayout == Layout::kNT};
    call.layout = arguments.take<std::string>();
    const TensorArgument out(arguments.take_tensor());
    run(call, operands, ks.info, c.get(), &out.info);
}

#define DG_INSTANTIATE(FP8, FUNCTION, ...)                                      \
    template void FUNCTION<FP8, ##__VA_ARGS__>(StableIValue*, uint64_t, uint64_t); \
    template void FUNCTION##_out<FP8, ##__VA_ARGS__>(StableIValue*, uint64_t, uint64_t);
DG_INSTANTIATE(true, m_grouped_gemm, Layout::kNT, false)
DG_INSTANTIATE(true, m_grouped_gemm, Layout::kNN, false)
DG_INSTANTIATE(true, m_grouped_gemm, Layout::kNT, true)
DG_INSTANTIATE(true, m_grouped_gemm, Layout::kNN, true)
DG_INSTANTIATE(false, m_grouped_gemm, Layout::kNT, false)
DG_INSTANTIATE(false, m_grouped_gemm, Layout::kNN, false)
DG_INSTANTIATE(true, m_grouped_gemm_masked, false)
DG_INSTANTIATE(true, m_grouped_gemm_masked, true)
DG_INSTANTIATE(false, m_grouped_gemm_masked, false)
DG_INSTANTIATE(true, k_grouped_gemm, Layout::kTN)
DG_INSTANTIATE(true, k_grouped_gemm, Layout::kNT)
DG_INSTANTIATE(false, k_grouped_gemm, Layout::kTN)
#undef DG_INSTANTIATE

}  // namespace deep_gemm::ops
