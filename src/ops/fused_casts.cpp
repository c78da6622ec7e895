#include "fused_cast_ops.h"

#include <utility>

#include "../host/knobs.h"
#include "cast_checks.h"

namespace deep_gemm::ops {

namespace {

void check_input(const char* op, const Tensor& x, std::initializer_list<ScalarType> dtypes, const char* rows_name,
                 const char* cols_name) {
    check_dtype(op, "x", x, dtypes);
    check_rank(op, "x", x, 2);
    check_size(op, "x", rows_name, x.size(0));
    check_size(op, "x", cols_name, x.size(1));
    check_inner_stride(op, "x", x, "to_tma_aligned");
}

std::tuple<Tensor, Tensor> run_fp4(const Tensor& x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0,
                                   const Tensor* given_out, const Tensor* given_sf) {
    const char* op = "per_token_cast_to_fp4";
    check_input(op, x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, "M", "K");
    const int64_t rows = x.size(0), cols = x.size(1);
    if (cols % 2 != 0) fail(op, "x", "K", cols, "an even number");
    check_gran_k(op, gran_k);
    const MatrixLayout values = dense_layout(rows, cols / 2);
    const MatrixLayout scales = scale_layout(CastKind::kPerToken, rows, cols, gran_k, use_packed_ue8m0);
    if (given_out) {
        check_values_out(op, "out", *given_out, x, "[M, K / 2]", values,
                         {ScalarType::Byte, ScalarType::Char, ScalarType::Float4_e2m1fn_x2});
        check_scales_out(op, "out_sf", *given_sf, x, use_packed_ue8m0, scales);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(values, ScalarType::Byte, x);
    Tensor sf = given_sf ? *given_sf : empty_matrix(scales, scale_dtype(use_packed_ue8m0), x);
    if (rows == 0 || cols == 0) return {std::move(out), std::move(sf)};
    const cast::CastProblem problem = cast_problem(x, cols, out, sf, scales.strides[1], gran_k,
                                                   scale_format(use_ue8m0, use_packed_ue8m0));
    check_launch(cast::launch_per_token_cast_fp4(problem, current_stream(x), knobs().pdl), op, "x");
    return {std::move(out), std::move(sf)};
}

std::tuple<Tensor, Tensor> run_swiglu(const Tensor& x, const std::optional<Tensor>& topk_weights,
                                      std::optional<double> clamp, int64_t gran_k, bool use_ue8m0,
                                      bool use_packed_ue8m0, const Tensor* given_out, const Tensor* given_sf) {
    const char* op = "swiglu_cast_to_fp8";
    check_input(op, x, {ScalarType::BFloat16}, "M", "2 * H");
    const int64_t rows = x.size(0), hidden = x.size(1) / 2;
    if (x.size(1) % 2 != 0) fail(op, "x", "2 * H", x.size(1), "an even number");
    if (topk_weights) {
        check_device(op, "topk_weights", *topk_weights, x, "x");
        check_dtype(op, "topk_weights", *topk_weights, {ScalarType::Float});
        check_shape(op, "topk_weights", *topk_weights, "[M]", {rows});
    }
    if (clamp && !(*clamp > 0)) fail(op, "clamp", "value", float_text(*clamp), "a positive number");
    check_gran_k(op, gran_k);
    const MatrixLayout values = dense_layout(rows, hidden);
    const MatrixLayout scales = scale_layout(CastKind::kPerToken, rows, hidden, gran_k, use_packed_ue8m0);
    if (given_out) {
        check_values_out(op, "out", *given_out, x, "[M, H]", values);
        check_scales_out(op, "out_sf", *given_sf, x, use_packed_ue8m0, scales);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(values, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given_sf ? *given_sf : empty_matrix(scales, scale_dtype(use_packed_ue8m0), x);
    if (rows == 0 || hidden == 0) return {std::move(out), std::move(sf)};
    cast::SwigluProblem problem;
    problem.cast = cast_problem(x, hidden, out, sf, scales.strides[1], gran_k,
                                scale_format(use_ue8m0, use_packed_ue8m0));
    if (topk_weights) {
        problem.topk_weights = static_cast<const float*>(topk_weights->data_ptr());
        problem.weight_stride = topk_weights->stride(0);
    }
    problem.clamped = clamp.has_value();
    problem.clamp = static_cast<float>(clamp.value_or(0));
    check_launch(cast::launch_swiglu_cast(problem, current_stream(x), knobs().pdl), op, "x");
    return {std::move(out), std::move(sf)};
}

struct SwigluBackwardOuts {
    const Tensor& grad_x;
    const Tensor& weighted;
    const Tensor& row_weights;
};

std::tuple<Tensor, Tensor, Tensor> run_swiglu_backward(const Tensor& x, const Tensor& grad,
                                                       const std::optional<Tensor>& row_weights,
                                                       const SwigluBackwardOuts* given) {
    const char* op = "swiglu_backward";
    check_input(op, x, {ScalarType::BFloat16}, "M", "2 * H");
    const int64_t rows = x.size(0), hidden = x.size(1) / 2;
    if (x.size(1) % 2 != 0) fail(op, "x", "2 * H", x.size(1), "an even number");
    check_device(op, "grad", grad, x, "x");
    check_dtype(op, "grad", grad, {ScalarType::BFloat16});
    const std::array<int64_t, 2> grad_shape = {rows, hidden};
    check_shape(op, "grad", grad, "[M, H]", grad_shape);
    check_inner_stride(op, "grad", grad, "to_tma_aligned");
    const std::array<int64_t, 1> rows_shape = {rows};
    if (row_weights) {
        check_device(op, "row_weights", *row_weights, x, "x");
        check_dtype(op, "row_weights", *row_weights, {ScalarType::Float});
        check_shape(op, "row_weights", *row_weights, "[M]", rows_shape);
    }
    const MatrixLayout both = dense_layout(rows, 2 * hidden), half = dense_layout(rows, hidden);
    if (given) {
        check_values_out(op, "out", given->grad_x, x, "[M, 2 * H]", both, {ScalarType::BFloat16});
        check_values_out(op, "out_weighted", given->weighted, x, "[M, H]", half, {ScalarType::BFloat16});
        check_device(op, "out_row_weights", given->row_weights, x, "x");
        check_dtype(op, "out_row_weights", given->row_weights, {ScalarType::Float});
        check_shape(op, "out_row_weights", given->row_weights, "[M]", rows_shape);
        check_inner_stride(op, "out_row_weights", given->row_weights, nullptr);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor grad_x = given ? given->grad_x : empty_matrix(both, ScalarType::BFloat16, x);
    Tensor weighted = given ? given->weighted : empty_matrix(half, ScalarType::BFloat16, x);
    const std::array<int64_t, 1> dense = {1};
    Tensor sums = given ? given->row_weights : empty_strided(rows_shape, dense, ScalarType::Float, x);
    if (rows > 0) {
        cast::SwigluBackwardProblem problem;
        problem.x = x.data_ptr();
        problem.x_stride = row_stride(x);
        problem.grad = grad.data_ptr();
        problem.grad_stride = row_stride(grad);
        if (row_weights) {
            problem.row_weights = static_cast<const float*>(row_weights->data_ptr());
            problem.weight_stride = row_weights->stride(0);
        }
        problem.grad_x = grad_x.data_ptr();
        problem.grad_x_stride = row_stride(grad_x);
        problem.weighted = weighted.data_ptr();
        problem.weighted_stride = row_stride(weighted);
        problem.grad_row_weights = static_cast<float*>(sums.data_ptr());
        problem.rows = rows;
        problem.cols = hidden;
        check_launch(cast::launch_swiglu_backward(problem, current_stream(x), knobs().pdl), op, "x");
    }
    return {std::move(grad_x), std::move(weighted), std::move(sums)};
}

// Of the transposed values of [rows, cols]: rows that begin at multiples of 16 bytes, as products want them.
MatrixLayout transposed_layout(int64_t rows, int64_t cols) { return {{cols, rows}, {ceil_div(rows, 16) * 16, 1}}; }

// The cast whose results are transposed ones alone.
cast::TransposedCastProblem transposed_problem(const cast::CastProblem& cast) {
    return {cast, cast.out, cast.out_stride, cast.sf, cast.sf_stride};
}

struct TransposedOuts {
    const Tensor& out;
    const Tensor& sf;
    const Tensor& out_t;
    const Tensor& sf_t;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> run_transposed(CastKind kind, const Tensor& x, bool use_ue8m0,
                                                          bool use_packed_ue8m0, const TransposedOuts* given) {
    const char* op = kind == CastKind::kPerToken ? "per_token_cast_to_fp8_with_transpose"
                                                 : "per_block_cast_to_fp8_with_transpose";
    check_input(op, x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, "dimension 0", "dimension 1");
    const int64_t rows = x.size(0), cols = x.size(1);
    const MatrixLayout values = dense_layout(rows, cols);
    const MatrixLayout values_t = transposed_layout(rows, cols);
    const MatrixLayout scales = scale_layout(kind, rows, cols, 128, use_packed_ue8m0);
    const MatrixLayout scales_t = scale_layout(kind, cols, rows, 128, use_packed_ue8m0);
    if (given) {
        check_values_out(op, "out", given->out, x, "the shape of x", values);
        check_scales_out(op, "out_sf", given->sf, x, use_packed_ue8m0, scales);
        check_values_out(op, "out_t", given->out_t, x, "the shape of x.t()", values_t);
        check_scales_out(op, "out_t_sf", given->sf_t, x, use_packed_ue8m0, scales_t);
    }

    const DeviceGuard guard(x.get_device_index());
    const ScalarType sf_dtype = scale_dtype(use_packed_ue8m0);
    Tensor out = given ? given->out : empty_matrix(values, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given ? given->sf : empty_matrix(scales, sf_dtype, x);
    Tensor out_t = given ? given->out_t : empty_matrix(values_t, ScalarType::Float8_e4m3fn, x);
    Tensor sf_t = given ? given->sf_t : empty_matrix(scales_t, sf_dtype, x);
    if (rows > 0 && cols > 0) {
        cast::TransposedCastProblem problem;
        problem.cast =
            cast_problem(x, cols, out, sf, scales.strides[1], 128, scale_format(use_ue8m0, use_packed_ue8m0));
        problem.out_t = out_t.data_ptr();
        problem.out_t_stride = row_stride(out_t);
        problem.sf_t = sf_t.data_ptr();
        problem.sf_t_stride = scales_t.strides[1];
        const auto launch = kind == CastKind::kPerToken ? cast::launch_per_token_cast_with_transpose
                                                        : cast::launch_per_block_cast_with_transpose;
        check_launch(launch(problem, current_stream(x), knobs().pdl), op, "x");
    }
    return {std::move(out), std::move(sf), std::move(out_t), std::move(sf_t)};
}

// `kind` names the cast whose results are returned transposed.
std::tuple<Tensor, Tensor> run_transposed_alone(CastKind kind, const Tensor& x, bool use_ue8m0, bool use_packed_ue8m0,
                                                const Tensor* given_out, const Tensor* given_sf) {
    const bool per_block = kind == CastKind::kPerBlock;
    const char* op = per_block ? "per_block_cast_to_fp8_transposed" : "per_channel_cast_to_fp8_transposed";
    check_input(op, x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, "dimension 0", "dimension 1");
    const int64_t rows = x.size(0), cols = x.size(1);
    const MatrixLayout values = transposed_layout(rows, cols);
    const MatrixLayout scales =
        scale_layout(per_block ? kind : CastKind::kPerToken, cols, rows, 128, use_packed_ue8m0);
    if (given_out) {
        check_values_out(op, "out", *given_out, x, "the shape of x.t()", values);
        check_scales_out(op, "out_sf", *given_sf, x, use_packed_ue8m0, scales);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(values, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given_sf ? *given_sf : empty_matrix(scales, scale_dtype(use_packed_ue8m0), x);
    if (rows == 0 || cols == 0) return {std::move(out), std::move(sf)};
    const cast::TransposedCastProblem problem =
        transposed_problem(cast_problem(x, cols, out, sf, scales.strides[1], 128,
                                        scale_format(use_ue8m0, use_packed_ue8m0)));
    const auto launch =
        per_block ? cast::launch_per_block_cast_transposed : cast::launch_per_channel_cast_transposed;
    check_launch(launch(problem, current_stream(x), knobs().pdl), op, "x");
    return {std::move(out), std::move(sf)};
}

std::tuple<Tensor, Tensor> run_k_grouped(bool k_major, const Tensor& x, const Tensor& ks, const std::string& layout,
                                         bool use_ue8m0, const Tensor* given_out, const Tensor* given_sf) {
    const char* op =
        k_major ? "k_grouped_per_channel_cast_to_fp8_k_major" : "k_grouped_per_channel_cast_to_fp8";
    check_input(op, x, {ScalarType::BFloat16}, "K", "MN");
    check_dtype(op, "ks", ks, {ScalarType::Int});
    check_rank(op, "ks", ks, 1);
    check_device(op, "ks", ks, x, "x");
    const bool is_sizes = layout == "sizes", is_psum = layout == "psum";
    if (!is_sizes && !is_psum && layout != "offsets")
        fail(op, "layout", "value", layout, "sizes, psum or offsets");

    const int64_t k = x.size(0), mn = x.size(1);
    cast::KGroups groups;
    groups.ends = static_cast<const int32_t*>(ks.data_ptr());
    groups.ends_stride = ks.stride(0);
    groups.num_groups = ks.size(0);
    groups.rows = k;
    groups.layout = is_sizes ? GroupLayout::kSizes : is_psum ? GroupLayout::kPsum : GroupLayout::kOffsets;
    groups.alignment = knobs().mk_alignment;
    const int64_t sf_rows = groups.scale_rows();
    const MatrixLayout values = k_major ? dense_layout(mn, 128 * sf_rows) : dense_layout(k, mn);
    const MatrixLayout scales = {{sf_rows, mn}, {align_4(mn), 1}};
    if (given_out) {
        check_values_out(op, "out", *given_out, x, "the shape of the values", values);
        check_scales_out(op, "out_sf", *given_sf, x, false, scales);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_matrix(values, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given_sf ? *given_sf : empty_matrix(scales, ScalarType::Float, x);
    if (mn == 0) return {std::move(out), std::move(sf)};
    const cast::TransposedCastProblem problem =
        transposed_problem(cast_problem(x, mn, out, sf, scales.strides[0], 128, scale_format(use_ue8m0, false)));
    const cudaStream_t stream = current_stream(x);
    check_launch(k_major ? cast::launch_k_grouped_cast_k_major(problem, groups, stream, knobs().pdl)
                         : cast::launch_k_grouped_per_channel_cast(problem.cast, groups, stream, knobs().pdl),
                 op, "x");
    return {std::move(out), std::move(sf)};
}

}  // namespace

std::tuple<Tensor, Tensor> per_token_cast_to_fp4(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run_fp4(x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void per_token_cast_to_fp4_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf) {
    run_fp4(x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

std::tuple<Tensor, Tensor> swiglu_cast_to_fp8(Tensor x, std::optional<Tensor> topk_weights, std::optional<double> clamp,
                                              int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run_swiglu(x, topk_weights, clamp, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void swiglu_cast_to_fp8_out(Tensor x, std::optional<Tensor> topk_weights, std::optional<double> clamp, int64_t gran_k,
                            bool use_ue8m0, bool use_packed_ue8m0, Tensor out, Tensor out_sf) {
    run_swiglu(x, topk_weights, clamp, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward(Tensor x, Tensor grad, std::optional<Tensor> row_weights) {
    return run_swiglu_backward(x, grad, row_weights, nullptr);
}

void swiglu_backward_out(Tensor x, Tensor grad, std::optional<Tensor> row_weights, Tensor out, Tensor out_weighted,
                         Tensor out_row_weights) {
    const SwigluBackwardOuts given = {out, out_weighted, out_row_weights};
    run_swiglu_backward(x, grad, row_weights, &given);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> per_token_cast_to_fp8_with_transpose(Tensor x, bool use_ue8m0,
                                                                                bool use_packed_ue8m0) {
    return run_transposed(CastKind::kPerToken, x, use_ue8m0, use_packed_ue8m0, nullptr);
}

void per_token_cast_to_fp8_with_transpose_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                              Tensor out_sf, Tensor out_t, Tensor out_t_sf) {
    const TransposedOuts given = {out, out_sf, out_t, out_t_sf};
    run_transposed(CastKind::kPerToken, x, use_ue8m0, use_packed_ue8m0, &given);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> per_block_cast_to_fp8_with_transpose(Tensor x, bool use_ue8m0,
                                                                                bool use_packed_ue8m0) {
    return run_transposed(CastKind::kPerBlock, x, use_ue8m0, use_packed_ue8m0, nullptr);
}

void per_block_cast_to_fp8_with_transpose_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                              Tensor out_sf, Tensor out_t, Tensor out_t_sf) {
    const TransposedOuts given = {out, out_sf, out_t, out_t_sf};
    run_transposed(CastKind::kPerBlock, x, use_ue8m0, use_packed_ue8m0, &given);
}

std::tuple<Tensor, Tensor> per_channel_cast_to_fp8_transposed(Tensor x, bool use_ue8m0, bool use_packed_ue8m0) {
    return run_transposed_alone(CastKind::kPerChannel, x, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void per_channel_cast_to_fp8_transposed_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                            Tensor out_sf) {
    run_transposed_alone(CastKind::kPerChannel, x, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

std::tuple<Tensor, Tensor> per_block_cast_to_fp8_transposed(Tensor x, bool use_ue8m0, bool use_packed_ue8m0) {
    return run_transposed_alone(CastKind::kPerBlock, x, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void per_block_cast_to_fp8_transposed_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                          Tensor out_sf) {
    run_transposed_alone(CastKind::kPerBlock, x, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

std::tuple<Tensor, Tensor> k_grouped_per_channel_cast_to_fp8(Tensor x, Tensor ks, std::string layout, bool use_ue8m0) {
    return run_k_grouped(false, x, ks, layout, use_ue8m0, nullptr, nullptr);
}

void k_grouped_per_channel_cast_to_fp8_out(Tensor x, Tensor ks, std::string layout, bool use_ue8m0, Tensor out,
                                           Tensor out_sf) {
    run_k_grouped(false, x, ks, layout, use_ue8m0, &out, &out_sf);
}

std::tuple<Tensor, Tensor> k_grouped_per_channel_cast_to_fp8_k_major(Tensor x, Tensor ks, std::string layout,
                                                                     bool use_ue8m0) {
    return run_k_grouped(true, x, ks, layout, use_ue8m0, nullptr, nullptr);
}

void k_grouped_per_channel_cast_to_fp8_k_major_out(Tensor x, Tensor ks, std::string layout, bool use_ue8m0, Tensor out,
                                                   Tensor out_sf) {
    run_k_grouped(true, x, ks, layout, use_ue8m0, &out, &out_sf);
}

}  // namespace deep_gemm::ops
