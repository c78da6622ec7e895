#include "../host/gemm.h"
#include "../host/gemm_sm100.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "../host/cast.h"
#include "../host/knobs.h"
#include "../host/selection_cache.h"
#include "check.h"
#include "gemm_ops.h"
#include "stream.h"
#include "tensor_info.h"

namespace deep_gemm::ops {

namespace {

using torch::stable::detail::to;

constexpr const char* kNames[][4] = {
    {"fp8_gemm_nt", "fp8_gemm_nn", "fp8_gemm_tn", "fp8_gemm_tt"},
    {"fp8_fp4_gemm_nt", "fp8_fp4_gemm_nn", "fp8_fp4_gemm_tn", "fp8_fp4_gemm_tt"},
};

constexpr bool a_is_k_major(Layout layout) { return layout == Layout::kNT || layout == Layout::kNN; }
constexpr bool b_is_k_major(Layout layout) { return layout == Layout::kNT || layout == Layout::kTT; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_launch(cudaError_t error, const char* op, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + what + " failed: " + cudaGetErrorString(error));
    }
}

// A matrix in [MN, K] terms; an operand that is stored MN-major has stride_k != 1.
struct Operand {
    int64_t mn, k;
    int64_t stride_mn, stride_k;
};

Operand view(const TensorInfo& x, bool k_major) {
    if (k_major) return {x.size(0), x.size(1), x.stride(0), x.stride(1)};
    return {x.size(1), x.size(0), x.stride(1), x.stride(0)};
}

// Two E2M1 values a byte.
bool is_fp4(const TensorInfo& x) { return x.scalar_type() != ScalarType::Float8_e4m3fn; }

void check_operand_dtype(const char* op, const char* arg, const TensorInfo& x, Operands operands, bool k_major) {
    if (operands == Operands::kFP8FP4 && k_major) {
        check_dtype(op, arg, x,
                    {ScalarType::Float8_e4m3fn, ScalarType::Float4_e2m1fn_x2, ScalarType::Char, ScalarType::Byte});
    } else {
        check_dtype(op, arg, x, {ScalarType::Float8_e4m3fn});  // FP4 is packed along K, so it is K-major
    }
}

// What TMA needs to unpack FP4 on its way to shared memory, beyond what it needs of bytes.
void check_fp4_unpackable(const char* op, const char* arg, const TensorInfo& x, int64_t k) {
    if (!is_fp4(x)) return;
    if (k % 128 != 0) fail(op, arg, "K", k, "a multiple of 128", "FP4");
    if (x.size(0) > 1 && x.stride(0) % 32 != 0) {
        fail(op, arg, "row stride", std::to_string(x.stride(0)) + " bytes", "a multiple of 32 bytes", "FP4");
    }
    const int64_t past = reinterpret_cast<uintptr_t>(x.data_ptr()) % 32;
    if (past != 0) fail(op, arg, "base address", std::to_string(past) + " modulo 32 bytes", int64_t{0}, "FP4");
}

// One or two granularities to choose from.
struct Choices {
    std::array<int64_t, 2> values = {};
    int count = 0;

    Choices() = default;
    Choices(std::initializer_list<int64_t> list) {
        for (int64_t value : list) push_back(value);
    }
    void push_back(int64_t value) { values[count++] = value; }
    const int64_t* begin() const { return values.data(); }
    const int64_t* end() const { return values.data() + count; }
};

struct Granularity {
    int64_t mn = 0;
    Choices fit_k;  // all that explain the columns
};

// "3", or "3 or 5" where two choices differ.
std::string unique_sizes(const std::vector<int64_t>& sizes) {
    const bool differ = sizes.size() > 1 && sizes[1] != sizes[0];
    return text(sizes[0]) + (differ ? " or " + text(sizes[1]) : "");
}

int64_t scale_columns(int64_t k, int64_t gran_k, bool packed) {
    const int64_t columns = ceil_div(k, gran_k);
    return packed ? ceil_div(columns, 4) : columns;
}

[[noreturn]] void fail_scales(const char* op, const char* arg, const TensorInfo& sf, bool k_major, int64_t mn,
                              int64_t k, const std::string& mn_name, const Choices& grans_mn, const Choices& grans_k) {
    const bool packed = sf.scalar_type() == ScalarType::Int;
    std::string names[2];
    std::vector<int64_t> sizes[2];
    for (int64_t gran : grans_mn) {
        names[0] += (names[0].empty() ? "" : " or ") +
                    (gran == 1 ? mn_name : "ceil(" + mn_name + " / " + text(gran) + ")");
        sizes[0].push_back(ceil_div(mn, gran));
    }
    for (int64_t gran : grans_k) {
        names[1] += (names[1].empty() ? "" : " or ") + ("ceil(K / " + text(packed ? gran * 4 : gran)) + ")";
        sizes[1].push_back(scale_columns(k, gran, packed));
    }
    const int first = k_major ? 0 : 1;
    fail(op, arg, "shape", text(sf.sizes()),
         "[" + names[first] + ", " + names[1 - first] + "] = [" + unique_sizes(sizes[first]) + ", " +
             unique_sizes(sizes[1 - first]) + "]");
}

// Granularities that explain the shape of the scales `sf` of an operand with `mn` rows.
Granularity match_scales(const char* op, const char* arg, const TensorInfo& sf, bool k_major, int64_t mn, int64_t k,
                         const char* mn_name, const Choices& grans_mn, const Choices& grans_k) {
    const bool packed = sf.scalar_type() == ScalarType::Int;
    const Operand scales = view(sf, k_major);
    Granularity result;
    for (int64_t gran : grans_k) {
        if (scales.k == scale_columns(k, gran, packed)) result.fit_k.push_back(gran);
    }
    for (int64_t gran : grans_mn) {
        if (scales.mn == ceil_div(mn, gran) && result.fit_k.count > 0) {
            result.mn = gran;
            return result;
        }
    }
    fail_scales(op, arg, sf, k_major, mn, k, mn_name, grans_mn, grans_k);
}

// Scales as the kernels take them (see ScaleTensor): float32, and MN-major where there is one per row; for SM100 packed
// UE8M0 words, MN-major, always per row. What is not so is brought into that form in `scratch` by one small kernel.
ScaleTensor prepare_scales(const char* op, const TensorInfo& sf, bool k_major, int64_t mn, int64_t gran_mn,
                           int64_t k_groups, bool per_row, bool packed, cudaStream_t stream, OwnedTensor& scratch) {
    const Operand scales = view(sf, k_major);
    const cast::ScaleType type = sf.scalar_type() == ScalarType::Float ? cast::ScaleType::kFloat32
                                 : sf.scalar_type() == ScalarType::Int ? cast::ScaleType::kPackedUE8M0
                                                                           : cast::ScaleType::kE8M0;
    const cast::ScaleType wanted = packed ? cast::ScaleType::kPackedUE8M0 : cast::ScaleType::kFloat32;
    const int64_t columns = packed ? ceil_div(k_groups, 4) : k_groups;
    const bool repeat = per_row && gran_mn == 128;
    const bool stride_k_fits = columns == 1 || (scales.stride_k % 4 == 0 && scales.stride_k >= mn);
    const bool tma_readable = (scales.stride_mn == 1 || mn == 1) && stride_k_fits &&
                              reinterpret_cast<uintptr_t>(sf.data_ptr()) % 16 == 0;
    if (type == wanted && !repeat && (!per_row || tma_readable)) {
        return {static_cast<const float*>(sf.data_ptr()), scales.stride_mn, scales.stride_k, static_cast<int>(gran_mn)};
    }
    cast::ScaleLayoutProblem problem;
    problem.mn = repeat ? mn : scales.mn;
    problem.mn_repeat = repeat ? 128 : 1;
    const int64_t aligned = ceil_div(problem.mn, 4) * 4;
    const std::array<int64_t, 2> sizes = {columns, aligned}, strides = {aligned, 1};
    scratch.reset(new_empty_strided(sizes, strides, packed ? ScalarType::Int : ScalarType::Float, sf.get()));
    problem.src = sf.data_ptr();
    problem.src_type = type;
    problem.src_mn_stride = scales.stride_mn;
    problem.src_k_stride = scales.stride_k;
    problem.dst = TensorInfo(scratch.get()).data_ptr();
    problem.dst_type = wanted;
    problem.dst_k_stride = aligned;
    problem.k_sf = k_groups;
    check_launch(cast::launch_scale_layout(problem, stream, knobs().pdl), op, "laying out scales");
    return {static_cast<const float*>(problem.dst), 1, aligned, repeat ? 1 : static_cast<int>(gran_mn)};
}

// An operand as the kernels read it.
struct PreparedOperand {
    const void* data;
    int64_t stride;  // elements
    bool mn_major;
};

// SM90's FP8 tensor cores read K-major operands alone, so an MN-major one is transposed into `scratch`. SM100's read both,
// where TMA can address the rows.
PreparedOperand prepare_operand(const char* op, const TensorInfo& x, bool k_major, bool sm100, cudaStream_t stream,
                                OwnedTensor& scratch) {
    // The stride of a single row is never used, but the tensor map wants a multiple of 16 (of 32 bytes with FP4).
    const int64_t stride = x.size(0) > 1 ? x.stride(0) : ceil_div(x.size(1), 32) * 32;
    if (k_major) return {x.data_ptr(), is_fp4(x) ? 2 * stride : stride, false};
    if (sm100 && stride % 16 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0) {
        return {x.data_ptr(), stride, true};
    }
    const int64_t k = x.size(0), mn = x.size(1);
    const int64_t aligned = ceil_div(k, 16) * 16;
    const std::array<int64_t, 2> sizes = {mn, aligned}, strides = {aligned, 1};
    scratch.reset(new_empty_strided(sizes, strides, ScalarType::Float8_e4m3fn, x.get()));
    cast::TransposeProblem problem;
    problem.x = x.data_ptr();
    problem.x_stride = x.stride(0);
    problem.out = TensorInfo(scratch.get()).data_ptr();
    problem.out_stride = aligned;
    problem.rows = k;
    problem.cols = mn;
    check_launch(cast::launch_transpose_fp8(problem, stream, knobs().pdl), op, "transposing an operand");
    return {problem.out, aligned, false};
}

using Recipe = std::optional<std::vector<int64_t>>;

// Checks everything, then runs. Returns the result, allocated here, unless `given_out` is there to write to.
OwnedTensor run(Operands operands, Layout layout, const TensorInfo& a, const TensorInfo& sfa, const TensorInfo& b, const TensorInfo& sfb,
                const std::optional<TensorInfo>& c, ScalarType out_dtype, const Recipe& recipe,
                const TensorInfo* given_out) {
    const char* op = kNames[static_cast<int>(operands)][static_cast<int>(layout)];
    const bool a_k_major = a_is_k_major(layout), b_k_major = b_is_k_major(layout);

    check_operand_dtype(op, "a", a, operands, a_k_major);
    check_rank(op, "a", a, 2);
    check_operand_dtype(op, "b", b, operands, b_k_major);
    check_rank(op, "b", b, 2);
    check_dtype(op, "sfa", sfa, {ScalarType::Float, ScalarType::Float8_e8m0fnu, ScalarType::Int});
    check_rank(op, "sfa", sfa, 2);
    check_dtype(op, "sfb", sfb, {ScalarType::Float, ScalarType::Float8_e8m0fnu, ScalarType::Int});
    check_rank(op, "sfb", sfb, 2);
    check_device(op, "b", b, a, "a");
    check_device(op, "sfa", sfa, a, "a");
    check_device(op, "sfb", sfb, a, "a");
    if (c) check_device(op, "c", *c, a, "a");
    if (given_out) check_device(op, "out", *given_out, a, "a");
    if (!given_out && out_dtype != ScalarType::BFloat16 && out_dtype != ScalarType::Float) {
        fail(op, "out_dtype", "value", text(out_dtype), "bfloat16 or float32");
    }

    Operand operand_a = view(a, a_k_major), operand_b = view(b, b_k_major);
    if (is_fp4(a)) operand_a.k *= 2;
    if (is_fp4(b)) operand_b.k *= 2;
    check_size(op, "a", a_k_major ? "M" : "K", a.size(0));
    check_size(op, "a", a_k_major ? "K" : "M", a.size(1));
    check_size(op, "b", b_k_major ? "N" : "K", b.size(0));
    check_size(op, "b", b_k_major ? "K" : "N", b.size(1));
    const int64_t m = operand_a.mn, n = operand_b.mn, k = operand_a.k;
    if (operand_b.k != k) fail(op, "b", "K", operand_b.k, k, "the K of a");
    a_k_major ? check_tma_readable(op, "a", a) : check_inner_stride(op, "a", a, "to_tma_aligned");
    b_k_major ? check_tma_readable(op, "b", b) : check_inner_stride(op, "b", b, "to_tma_aligned");

    Choices grans_m = {1, 128}, grans_n = {1, 128}, grans_k = {128, 32};
    if (recipe) {
        const std::vector<int64_t>& r = *recipe;
        const auto is_mn = [](int64_t gran) { return gran == 1 || gran == 128; };
        if (r.size() != 3 || !is_mn(r[0]) || !is_mn(r[1]) || (r[2] != 128 && r[2] != 32)) {
            fail(op, "recipe", "value", text(std::span(r.data(), r.size())), "[1 or 128, 1 or 128, 128 or 32]");
        }
        grans_m = {r[0]};
        grans_n = {r[1]};
        grans_k = {r[2]};
    }
    const Granularity of_a = match_scales(op, "sfa", sfa, a_k_major, m, k, "M", grans_m, grans_k);
    const Granularity of_b = match_scales(op, "sfb", sfb, b_k_major, n, k, "N", grans_n, of_a.fit_k);
    if (of_b.fit_k.count > 1 && sfa.scalar_type() == ScalarType::Int && sfb.scalar_type() == ScalarType::Int &&
        k > 32) {
        fail(op, "recipe", "value", "None", "[gran_m, gran_n, 128] or [gran_m, gran_n, 32]",
             "packed scales fit both here");
    }

    const ScalarType result_dtype = given_out ? given_out->scalar_type() : out_dtype;
    if (given_out) {
        check_dtype(op, "out", *given_out, {ScalarType::BFloat16, ScalarType::Float});
        check_shape(op, "out", *given_out, "[M, N]", {m, n});
        check_inner_stride(op, "out", *given_out, nullptr);
        check_rows_apart(op, "out", *given_out);
    }
    if (c) {
        if (c->scalar_type() != result_dtype) {
            fail(op, "c", "dtype", text(c->scalar_type()), text(result_dtype), "the dtype of the result");
        }
        const bool full = c->dim() == 2 && c->size(0) == m && c->size(1) == n;
        const bool bias = c->dim() == 1 && c->size(0) == n;
        if (!full && !bias) {
            fail(op, "c", "shape", text(c->sizes()),
                 "[M, N] or [N] = [" + text(m) + ", " + text(n) + "] or [" + text(n) + "]");
        }
        if (full) {
            check_inner_stride(op, "c", *c, nullptr);
        } else if (n > 1 && c->stride(0) != 1) {
            fail(op, "c", "inner stride", c->stride(0), int64_t{1});
        }
    }

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    OwnedTensor allocated;
    if (!given_out) {
        const std::array<int64_t, 2> sizes = {m, n}, strides = {std::max<int64_t>(n, 1), 1};
        allocated.reset(new_empty_strided(sizes, strides, result_dtype, a.get()));
    }
    const AtenTensorHandle result = given_out ? given_out->get() : allocated.get();
    if (m == 0 || n == 0) return allocated;
    if (k == 0) {
        STABLE_TORCH_ERROR_CODE_CHECK(c ? aoti_torch_copy_(result, c->get(), 0) : aoti_torch_zero_(result));
        return allocated;
    }
    const int capability = compute_capability(device);
    const bool sm100 = capability == 100, has_fp4 = is_fp4(a) || is_fp4(b);
    if (!sm100 && (capability != 90 || has_fp4)) {
        fail(op, "a", "architecture", "sm_" + std::to_string(capability), has_fp4 ? "sm_100" : "sm_90 or sm_100",
             has_fp4 ? "FP4" : "");
    }
    check_fp4_unpackable(op, "a", a, k);
    check_fp4_unpackable(op, "b", b, k);

    const cudaStream_t stream = current_stream(device);
    GemmProblem problem;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    OwnedTensor scratch_a, scratch_b, scratch_sfa, scratch_sfb;
    const PreparedOperand ready_a = prepare_operand(op, a, a_k_major, sm100, stream, scratch_a);
    const PreparedOperand ready_b = prepare_operand(op, b, b_k_major, sm100, stream, scratch_b);
    problem.a = ready_a.data;
    problem.b = ready_b.data;
    problem.a_stride = ready_a.stride;
    problem.b_stride = ready_b.stride;
    problem.a_mn_major = ready_a.mn_major;
    problem.b_mn_major = ready_b.mn_major;
    problem.a_is_fp4 = is_fp4(a);
    problem.b_is_fp4 = is_fp4(b);
    problem.gran_k = static_cast<int>(of_b.fit_k.values[0]);
    const int64_t k_groups = ceil_div(k, problem.gran_k);
    // In the recipe 1, 128, 128 SM90's kernels read B's block scales as they lie.
    const bool is_1d2d = of_a.mn == 1 && of_b.mn == 128 && problem.gran_k == 128 && !sm100;
    problem.sfa = prepare_scales(op, sfa, a_k_major, m, of_a.mn, k_groups, true, sm100, stream, scratch_sfa);
    problem.sfb = prepare_scales(op, sfb, b_k_major, n, of_b.mn, k_groups, !is_1d2d, sm100, stream, scratch_sfb);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(result, &problem.d));
    problem.d_stride = given_out && m > 1 ? given_out->stride(0) : n;
    problem.d_type = result_dtype == ScalarType::Float ? DataType::kFloat32 : DataType::kBFloat16;
    if (c) {
        problem.c = c->data_ptr();
        problem.c_stride = c->dim() == 1 ? 0 : m > 1 ? c->stride(0) : n;
    }

    SelectionLimits limits;
    limits.num_sms = usable_sms(device);
    limits.block_m_multiple_of = knobs().block_m_multiple_of;
    limits.block_n_multiple_of = knobs().block_n_multiple_of;
    const std::span<const GemmRow> rows = sm100 ? sm100_gemm_rows() : gemm_rows();
    int row = knobs().forced_row;
    if (row < 0) {
        row = select_row_cached(rows, problem, limits);
    } else if (sm100) {
        row -= static_cast<int>(gemm_rows().size());  // as dg_instances() counts
        if (row < 0) throw std::runtime_error(std::string(op) + ": the forced row is one of sm_90a");
    }
    DeviceBackend backend(device, stream);
    (sm100 ? run_sm100_gemm : run_gemm)(problem, limits, row, knobs().pdl, backend);
    return allocated;
}

// Arguments as they come from the stack, which owns nothing afterwards.
OwnedTensor take_tensor(StableIValue value) { return OwnedTensor(to<AtenTensorHandle>(value)); }

// The arguments that both overloads begin with.
struct Arguments {
    OwnedTensor a, sfa, b, sfb;
    std::optional<Tensor> c;
};

Arguments take_arguments(const StableIValue* stack) {
    return {take_tensor(stack[0]), take_tensor(stack[1]), take_tensor(stack[2]), take_tensor(stack[3]),
            to<std::optional<Tensor>>(stack[4])};
}

OwnedTensor run(Operands operands, Layout layout, const Arguments& arguments, ScalarType out_dtype, const Recipe& recipe,
                const TensorInfo* out) {
    const TensorInfo a(arguments.a.get()), sfa(arguments.sfa.get()), b(arguments.b.get()), sfb(arguments.sfb.get());
    std::optional<TensorInfo> c;
    if (arguments.c) c.emplace(*arguments.c);
    return run(operands, layout, a, sfa, b, sfb, c, out_dtype, recipe, out);
}

}  // namespace

template <Operands kOperands, Layout kLayout>
void scaled_gemm(StableIValue* stack, uint64_t, uint64_t) {
    const Arguments arguments = take_arguments(stack);
    const auto out_dtype = to<ScalarType>(stack[5]);
    const auto recipe = to<Recipe>(stack[6]);
    stack[0] = torch::stable::detail::from(run(kOperands, kLayout, arguments, out_dtype, recipe, nullptr).release());
}

template <Operands kOperands, Layout kLayout>
void scaled_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    const Arguments arguments = take_arguments(stack);
    const auto recipe = to<Recipe>(stack[5]);
    const OwnedTensor out = take_tensor(stack[6]);
    const TensorInfo out_info(out.get());
    run(kOperands, kLayout, arguments, ScalarType::BFloat16, recipe, &out_info);
}

#define DG_INSTANTIATE(LAYOUT)                                                              \
    template void scaled_gemm<Operands::kFP8, LAYOUT>(StableIValue*, uint64_t, uint64_t);        \
    template void scaled_gemm_out<Operands::kFP8, LAYOUT>(StableIValue*, uint64_t, uint64_t);    \
    template void scaled_gemm<Operands::kFP8FP4, LAYOUT>(StableIValue*, uint64_t, uint64_t);     \
    template void scaled_gemm_out<Operands::kFP8FP4, LAYOUT>(StableIValue*, uint64_t, uint64_t);
DG_INSTANTIATE(Layout::kNT)
DG_INSTANTIATE(Layout::kNN)
DG_INSTANTIATE(Layout::kTN)
DG_INSTANTIATE(Layout::kTT)
#undef DG_INSTANTIATE

}  // namespace deep_gemm::ops
