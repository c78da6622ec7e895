#include <utility>

#include "../host/knobs.h"
#include "cast_checks.h"
#include "cast_ops.h"

namespace deep_gemm::ops {

namespace {

constexpr const char* kNames[] = {"per_token_cast_to_fp8", "per_channel_cast_to_fp8", "per_block_cast_to_fp8"};

// Checks everything, then runs; outputs are allocated here when absent.
std::tuple<Tensor, Tensor> run(CastKind kind, const Tensor& x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0,
                               const Tensor* given_out, const Tensor* given_sf) {
    const char* op = kNames[static_cast<int>(kind)];
    check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
    check_rank(op, "x", x, 2);
    check_size(op, "x", "dimension 0", x.size(0));
    check_size(op, "x", "dimension 1", x.size(1));
    check_inner_stride(op, "x", x, "to_tma_aligned");
    check_gran_k(op, gran_k);

    const int64_t rows = x.size(0), cols = x.size(1);
    const MatrixLayout values = dense_layout(rows, cols);
    const MatrixLayout scales = scale_layout(kind, rows, cols, gran_k, use_packed_ue8m0);
    if (given_out) {
        check_values_out(op, "out", *given_out, x, "the shape of x", values);
        check_scales_out(op, "out_sf", *given_sf, x, use_packed_ue8m0, scales);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(values, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given_sf ? *given_sf : empty_matrix(scales, scale_dtype(use_packed_ue8m0), x);
    if (rows == 0 || cols == 0) return {std::move(out), std::move(sf)};

    const cast::CastProblem problem =
        cast_problem(x, cols, out, sf, kind == CastKind::kPerChannel ? scales.strides[0] : scales.strides[1], gran_k,
                     scale_format(use_ue8m0, use_packed_ue8m0));
    const auto launch = kind == CastKind::kPerToken     ? cast::launch_per_token_cast
                        : kind == CastKind::kPerChannel ? cast::launch_per_channel_cast
                                                        : cast::launch_per_block_cast;
    check_launch(launch(problem, current_stream(x), knobs().pdl), op, "x");
    return {std::move(out), std::move(sf)};
}

Tensor run_transpose(const Tensor& x, const Tensor* given_out) {
    const char* op = "transpose_fp8";
    check_dtype(op, "x", x, {ScalarType::Float8_e4m3fn});
    check_rank(op, "x", x, 2);
    check_size(op, "x", "dimension 0", x.size(0));
    check_size(op, "x", "dimension 1", x.size(1));
    check_inner_stride(op, "x", x, "to_tma_aligned");
    const int64_t rows = x.size(0), cols = x.size(1);
    const MatrixLayout layout = dense_layout(cols, rows);
    if (given_out) check_values_out(op, "out", *given_out, x, "the shape of the result", layout);

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(layout, ScalarType::Float8_e4m3fn, x);
    if (rows == 0 || cols == 0) return out;
    cast::TransposeProblem problem;
    problem.x = x.data_ptr();
    problem.x_stride = row_stride(x);
    problem.out = out.data_ptr();
    problem.out_stride = row_stride(out);
    problem.rows = rows;
    problem.cols = cols;
    check_launch(cast::launch_transpose_fp8(problem, current_stream(x), knobs().pdl), op, "x");
    return out;
}

}  // namespace

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run(CastKind::kPerToken, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> per_channel_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run(CastKind::kPerChannel, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> per_block_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run(CastKind::kPerBlock, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void per_token_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf) {
    run(CastKind::kPerToken, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

void per_channel_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                 Tensor out_sf) {
    run(CastKind::kPerChannel, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

void per_block_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf) {
    run(CastKind::kPerBlock, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

Tensor transpose_fp8(Tensor x) { return run_transpose(x, nullptr); }

void transpose_fp8_out(Tensor x, Tensor out) { run_transpose(x, &out); }

}  // namespace deep_gemm::ops
