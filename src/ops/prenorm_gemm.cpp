#include "../host/prenorm_gemm.h"

#include <algorithm>
#include <array>
#include <vector>

#include "../host/knobs.h"
#include "cast_checks.h"
#include "prenorm_gemm_ops.h"

namespace deep_gemm::ops {

namespace {

constexpr const char* kOp = "tf32_hc_prenorm_gemm";

std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
    return strides;
}

// A result to write to: dense along its last dimension, no two of its elements in one place.
void check_output(const char* arg, const Tensor& x, const std::string& names, const std::vector<int64_t>& shape,
                  bool has_rows) {
    check_dtype(kOp, arg, x, {ScalarType::Float});
    check_shape(kOp, arg, x, names.c_str(), std::span(shape));
    if (x.numel() == 0) return;
    const int64_t inner = x.dim() - 1;
    if (x.size(inner) > 1 && x.stride(inner) != 1) fail(kOp, arg, "inner stride", x.stride(inner), int64_t{1});
    int64_t extent = x.size(inner);
    if (has_rows) {
        const int64_t row = inner - 1;
        if (x.size(row) > 1 && x.stride(row) < extent) {
            fail(kOp, arg, "row stride", x.stride(row), "at least " + std::to_string(extent));
        }
        extent += (x.size(row) - 1) * x.stride(row);
    }
    if (x.dim() > 1 + has_rows && x.size(0) > 1 && x.stride(0) < extent) {
        fail(kOp, arg, "split stride", x.stride(0), "at least " + std::to_string(extent));
    }
}

// Checks everything, then runs; outputs are allocated here when absent.
std::tuple<Tensor, Tensor> run(const Tensor& a, const Tensor& b, std::optional<int64_t> num_splits,
                               const Tensor* given_out, const Tensor* given_sqr_sum) {
    check_dtype(kOp, "a", a, {ScalarType::BFloat16});
    check_rank(kOp, "a", a, 2);
    check_dtype(kOp, "b", b, {ScalarType::Float});
    check_rank(kOp, "b", b, 2);
    check_device(kOp, "b", b, a, "a");
    if (given_out) {
        check_device(kOp, "out", *given_out, a, "a");
        check_device(kOp, "out_sqr_sum", *given_sqr_sum, a, "a");
    }
    check_size(kOp, "a", "M", a.size(0));
    check_size(kOp, "a", "K", a.size(1));
    check_size(kOp, "b", "N", b.size(0));
    check_size(kOp, "b", "K", b.size(1));
    const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
    if (b.size(1) != k) fail(kOp, "b", "K", b.size(1), k, "the K of a");
    check_tma_readable(kOp, "a", a);
    check_tma_readable(kOp, "b", b);
    if (num_splits && (*num_splits < 1 || *num_splits > kMaxSize)) {
        fail(kOp, "num_splits", "value", *num_splits, "1 to " + std::to_string(kMaxSize));
    }
    std::vector<int64_t> shape = {m, n}, sqr_shape = {m};
    if (num_splits) {
        shape.insert(shape.begin(), *num_splits);
        sqr_shape.insert(sqr_shape.begin(), *num_splits);
    }
    if (given_out) {
        check_output("out", *given_out, num_splits ? "[num_splits, M, N]" : "[M, N]", shape, true);
        check_output("out_sqr_sum", *given_sqr_sum, num_splits ? "[num_splits, M]" : "[M]", sqr_shape, false);
    }

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    Tensor out = given_out ? *given_out : empty_strided(shape, dense_strides(shape), ScalarType::Float, a);
    Tensor sqr_sum =
        given_sqr_sum ? *given_sqr_sum : empty_strided(sqr_shape, dense_strides(sqr_shape), ScalarType::Float, a);
    if (m == 0) return {std::move(out), std::move(sqr_sum)};
    if (k == 0) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(sqr_sum.get()));
        return {std::move(out), std::move(sqr_sum)};
    }
    const int arch = compute_capability(device);
    if (arch != 90 && arch != 100) fail(kOp, "a", "architecture", "sm_" + std::to_string(arch), "sm_90 or sm_100");

    PrenormGemmProblem problem;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    problem.a = a.data_ptr();
    problem.a_stride = row_stride(a);
    problem.b = b.data_ptr();
    problem.b_stride = row_stride(b);
    problem.output.d = static_cast<float*>(out.data_ptr());
    problem.output.d_row_stride = out.stride(out.dim() - 2);
    problem.output.sqr_sum = static_cast<float*>(sqr_sum.data_ptr());
    const int num_sms = usable_sms(device);
    DeviceBackend backend(device, current_stream(a));
    std::optional<Tensor> workspace;
    if (num_splits) {
        problem.plan.num_splits = *num_splits;
        problem.output.d_split_stride = out.stride(0);
        problem.output.sqr_split_stride = sqr_sum.stride(0);
    } else {
        const PrenormPlan plan = prenorm_plan(m, n, k, arch, num_sms, backend);
        problem.plan = plan;
        if (plan.num_splits > 1 && !plan.in_cluster) {
            const auto bytes = static_cast<int64_t>(prenorm_workspace_bytes(m, n, plan.num_splits));
            const std::array<int64_t, 1> size = {bytes}, stride = {1};
            workspace = empty_strided(size, stride, ScalarType::Byte, a);
            problem.workspace = workspace->data_ptr();
        }
    }
    run_prenorm_gemm(problem, arch, num_sms, knobs().pdl, backend);
    return {std::move(out), std::move(sqr_sum)};
}

}  // namespace

std::tuple<Tensor, Tensor> tf32_hc_prenorm_gemm(Tensor a, Tensor b, std::optional<int64_t> num_splits) {
    return run(a, b, num_splits, nullptr, nullptr);
}

void tf32_hc_prenorm_gemm_out(Tensor a, Tensor b, std::optional<int64_t> num_splits, Tensor out, Tensor out_sqr_sum) {
    run(a, b, num_splits, &out, &out_sqr_sum);
}

}  // namespace deep_gemm::ops
