#include "../host/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <array>

#include "../host/cast.h"
#include "../host/knobs.h"
#include "check.h"
#include "gemm_ops.h"
#include "stream.h"

namespace deep_gemm::ops {

namespace {

constexpr const char* kNames[] = {"fp8_gemm_nt", "fp8_gemm_nn", "fp8_gemm_tn", "fp8_gemm_tt"};

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

Operand view(const Tensor& x, bool k_major) {
    if (k_major) return {x.size(0), x.size(1), x.stride(0), x.stride(1)};
    return {x.size(1), x.size(0), x.stride(1), x.stride(0)};
}

struct Granularity {
    int64_t mn;
    std::vector<int64_t> fit_k;  // all that explain the columns
};

std::string unique_sizes(const std::vector<int64_t>& values) {
    std::vector<int64_t> unique;
    std::string joined;
    for (int64_t value : values) {
        bool seen = false;
        for (int64_t other : unique) seen |= other == value;
        if (!seen) unique.push_back(value);
    }
    for (size_t i = 0; i < unique.size(); ++i) {
        joined += (i == 0 ? "" : i + 1 == unique.size() ? " or " : ", ") + std::to_string(unique[i]);
    }
    return joined;
}

// Granularities that explain the shape of the scales `sf` of an operand with `mn` rows.
Granularity match_scales(const char* op, const char* arg, const Tensor& sf, bool k_major, int64_t mn, int64_t k,
                         const char* mn_name, const std::vector<int64_t>& grans_mn,
                         const std::vector<int64_t>& grans_k) {
    const bool packed = sf.scalar_type() == ScalarType::Int;
    const auto columns_for = [&](int64_t gran) {
        const int64_t columns = ceil_div(k, gran);
        return packed ? ceil_div(columns, 4) : columns;
    };
    const Operand scales = view(sf, k_major);
    Granularity result;
    for (int64_t gran : grans_k) {
        if (scales.k == columns_for(gran)) result.fit_k.push_back(gran);
    }
    for (int64_t gran : grans_mn) {
        if (scales.mn == ceil_div(mn, gran) && !result.fit_k.empty()) {
            result.mn = gran;
            return result;
        }
    }

    std::string names[2];
    std::vector<int64_t> sizes[2];
    for (int64_t gran : grans_mn) {
        names[0] += (names[0].empty() ? "" : " or ") +
                    (gran == 1 ? std::string(mn_name) : "ceil(" + std::string(mn_name) + " / " + text(gran) + ")");
        sizes[0].push_back(ceil_div(mn, gran));
    }
    for (int64_t gran : grans_k) {
        names[1] += (names[1].empty() ? "" : " or ") + ("ceil(K / " + text(packed ? gran * 4 : gran)) + ")";
        sizes[1].push_back(columns_for(gran));
    }
    const int first = k_major ? 0 : 1;
    const std::array<int64_t, 2> shape = {sf.size(0), sf.size(1)};
    fail(op, arg, "shape", text(shape),
         "[" + names[first] + ", " + names[1 - first] + "] = [" + unique_sizes(sizes[first]) + ", " +
             unique_sizes(sizes[1 - first]) + "]");
}

// Scales as the kernels take them: FP32 of any strides. UE8M0 is expanded into `scratch`.
ScaleTensor prepare_scales(const char* op, const Tensor& sf, bool k_major, int64_t gran_mn, int64_t k_groups,
                           cudaStream_t stream, std::optional<Tensor>& scratch) {
    const Operand scales = view(sf, k_major);
    ScaleTensor result;
    result.gran_mn = static_cast<int>(gran_mn);
    if (sf.scalar_type() == ScalarType::Float) {
        result.data = static_cast<const float*>(sf.data_ptr());
        result.stride_mn = scales.stride_mn;
        result.stride_k = scales.stride_k;
        return result;
    }
    const int64_t aligned = ceil_div(scales.mn, 4) * 4;
    const std::array<int64_t, 2> sizes = {k_groups, aligned}, strides = {aligned, 1};
    scratch = empty_strided(sizes, strides, ScalarType::Float, sf);
    float* expanded = static_cast<float*>(scratch->data_ptr());
    check_launch(cast::launch_expand_ue8m0(sf.data_ptr(), sf.scalar_type() == ScalarType::Int, scales.stride_mn,
                                           scales.stride_k, expanded, aligned, scales.mn, k_groups, stream,
                                           knobs().pdl),
                 op, "expanding UE8M0 scales");
    result.data = expanded;
    result.stride_mn = 1;
    result.stride_k = aligned;
    return result;
}

// The address and row stride of a K-major operand. SM90's FP8 tensor cores read nothing else, so an MN-major one is
// transposed into `scratch`.
std::pair<const void*, int64_t> prepare_operand(const char* op, const Tensor& x, bool k_major, cudaStream_t stream,
                                                std::optional<Tensor>& scratch) {
    // The stride of a single row is never used, but the tensor map wants a multiple of 16.
    if (k_major) return {x.data_ptr(), x.size(0) > 1 ? x.stride(0) : ceil_div(x.size(1), 16) * 16};
    const int64_t k = x.size(0), mn = x.size(1);
    const int64_t aligned = ceil_div(k, 16) * 16;
    const std::array<int64_t, 2> sizes = {mn, aligned}, strides = {aligned, 1};
    scratch = empty_strided(sizes, strides, ScalarType::Float8_e4m3fn, x);
    cast::TransposeProblem problem;
    problem.x = x.data_ptr();
    problem.x_stride = x.stride(0);
    problem.out = scratch->data_ptr();
    problem.out_stride = aligned;
    problem.rows = k;
    problem.cols = mn;
    check_launch(cast::launch_transpose_fp8(problem, stream, knobs().pdl), op, "transposing an operand");
    return {problem.out, aligned};
}

// Checks everything, then runs; `out` is allocated here when absent.
Tensor run(Layout layout, const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
           const std::optional<Tensor>& c, ScalarType out_dtype, const std::optional<std::vector<int64_t>>& recipe,
           const Tensor* given_out) {
    const char* op = kNames[static_cast<int>(layout)];
    const bool a_k_major = a_is_k_major(layout), b_k_major = b_is_k_major(layout);

    check_dtype(op, "a", a, {ScalarType::Float8_e4m3fn});
    check_rank(op, "a", a, 2);
    check_dtype(op, "b", b, {ScalarType::Float8_e4m3fn});
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

    const Operand operand_a = view(a, a_k_major), operand_b = view(b, b_k_major);
    check_size(op, "a", a_k_major ? "M" : "K", a.size(0));
    check_size(op, "a", a_k_major ? "K" : "M", a.size(1));
    check_size(op, "b", b_k_major ? "N" : "K", b.size(0));
    check_size(op, "b", b_k_major ? "K" : "N", b.size(1));
    const int64_t m = operand_a.mn, n = operand_b.mn, k = operand_a.k;
    if (operand_b.k != k) fail(op, "b", "K", operand_b.k, k, "the K of a");
    a_k_major ? check_tma_readable(op, "a", a) : check_inner_stride(op, "a", a, "to_tma_aligned");
    b_k_major ? check_tma_readable(op, "b", b) : check_inner_stride(op, "b", b, "to_tma_aligned");

    std::vector<int64_t> grans_m = {1, 128}, grans_n = {1, 128}, grans_k = {128, 32};
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
    if (of_b.fit_k.size() > 1 && sfa.scalar_type() == ScalarType::Int && sfb.scalar_type() == ScalarType::Int &&
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
            const auto sizes = c->sizes();
            fail(op, "c", "shape", text(std::span(sizes.data(), sizes.size())),
                 "[M, N] or [N] = [" + text(m) + ", " + text(n) + "] or [" + text(n) + "]");
        }
        if (full) {
            check_inner_stride(op, "c", *c, nullptr);
        } else if (n > 1 && c->stride(0) != 1) {
            fail(op, "c", "inner stride", c->stride(0), int64_t{1});
        }
    }

    const DeviceGuard guard(a.get_device_index());
    Tensor out = given_out ? *given_out : [&] {
        const std::array<int64_t, 2> sizes = {m, n}, strides = {std::max<int64_t>(n, 1), 1};
        return empty_strided(sizes, strides, result_dtype, a);
    }();
    if (m == 0 || n == 0) return out;
    if (k == 0) {
        if (c) {
            torch::stable::copy_(out, *c);
        } else {
            torch::stable::zero_(out);
        }
        return out;
    }
    if (compute_capability() != 90) {
        fail(op, "a", "architecture", "sm_" + std::to_string(compute_capability()), "sm_90");
    }

    const cudaStream_t stream = current_stream(a);
    GemmProblem problem;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    std::optional<Tensor> scratch_a, scratch_b, scratch_sfa, scratch_sfb;
    std::tie(problem.a, problem.a_stride) = prepare_operand(op, a, a_k_major, stream, scratch_a);
    std::tie(problem.b, problem.b_stride) = prepare_operand(op, b, b_k_major, stream, scratch_b);
    problem.gran_k = static_cast<int>(of_b.fit_k[0]);
    const int64_t k_groups = ceil_div(k, problem.gran_k);
    problem.sfa = prepare_scales(op, sfa, a_k_major, of_a.mn, k_groups, stream, scratch_sfa);
    problem.sfb = prepare_scales(op, sfb, b_k_major, of_b.mn, k_groups, stream, scratch_sfb);
    problem.d = out.data_ptr();
    problem.d_stride = m > 1 ? out.stride(0) : n;
    problem.d_type = result_dtype == ScalarType::Float ? DataType::kFloat32 : DataType::kBFloat16;
    if (c) {
        problem.c = c->data_ptr();
        problem.c_stride = c->dim() == 1 ? 0 : m > 1 ? c->stride(0) : n;
    }

    SelectionLimits limits;
    limits.num_sms = usable_sms();
    limits.block_m_multiple_of = knobs().block_m_multiple_of;
    limits.block_n_multiple_of = knobs().block_n_multiple_of;
    DeviceBackend backend(stream);
    run_fp8_gemm(problem, limits, knobs().forced_row, knobs().pdl, backend);
    return out;
}

}  // namespace

template <Layout kLayout>
Tensor fp8_gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, std::optional<Tensor> c, ScalarType out_dtype,
                std::optional<std::vector<int64_t>> recipe) {
    return run(kLayout, a, sfa, b, sfb, c, out_dtype, recipe, nullptr);
}

template <Layout kLayout>
void fp8_gemm_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, std::optional<Tensor> c,
                  std::optional<std::vector<int64_t>> recipe, Tensor out) {
    run(kLayout, a, sfa, b, sfb, c, ScalarType::BFloat16, recipe, &out);
}

#define DG_INSTANTIATE(LAYOUT)                                                                                        \
    template Tensor fp8_gemm<LAYOUT>(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, ScalarType,               \
                                     std::optional<std::vector<int64_t>>);                                            \
    template void fp8_gemm_out<LAYOUT>(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>,                         \
                                       std::optional<std::vector<int64_t>>, Tensor);
DG_INSTANTIATE(Layout::kNT)
DG_INSTANTIATE(Layout::kNN)
DG_INSTANTIATE(Layout::kTN)
DG_INSTANTIATE(Layout::kTT)
#undef DG_INSTANTIATE

}  // namespace deep_gemm::ops
