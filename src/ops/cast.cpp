#include "../host/cast.h"

#include <utility>

#include "../host/knobs.h"
#include "cast_checks.h"
#include "cast_ops.h"

namespace deep_gemm::ops {

namespace {

enum class Kind { kPerToken, kPerChannel, kPerBlock };

constexpr const char* kNames[] = {"per_token_cast_to_fp8", "per_channel_cast_to_fp8", "per_block_cast_to_fp8"};

cast::InputType input_type(ScalarType dtype) {
    return dtype == ScalarType::BFloat16 ? cast::InputType::kBFloat16
           : dtype == ScalarType::Half   ? cast::InputType::kFloat16
                                         : cast::InputType::kFloat32;
}

// Shape and strides of the scales, and the stride that is not 1.
struct ScaleLayout {
    std::vector<int64_t> shape, strides;
    int64_t stride;
};

ScaleLayout scale_layout(Kind kind, int64_t rows, int64_t cols, int64_t gran_k, bool packed) {
    const bool per_channel = kind == Kind::kPerChannel;
    const int64_t mn = per_channel ? cols : kind == Kind::kPerBlock ? ceil_div(rows, 128) : rows;
    const int64_t groups = ceil_div(per_channel ? rows : cols, gran_k);
    const int64_t columns = packed ? ceil_div(groups, 4) : groups;
    const int64_t stride = align_4(mn);
    if (per_channel) return {{columns, mn}, {stride, 1}, stride};
    return {{mn, columns}, {1, stride}, stride};
}

// Checks everything, then runs; outputs are allocated here when absent.
std::tuple<Tensor, Tensor> run(Kind kind, const Tensor& x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0,
                               const Tensor* given_out, const Tensor* given_sf) {
    const std::string op = kNames[static_cast<int>(kind)];
    check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
    check_rank(op, "x", x, 2);
    check_size(op, "x", "dimension 0", x.size(0));
    check_size(op, "x", "dimension 1", x.size(1));
    check_inner_stride(op, "x", x, "to_tma_aligned");
    check_gran_k(op, gran_k);

    const int64_t rows = x.size(0), cols = x.size(1);
    const ScaleLayout layout = scale_layout(kind, rows, cols, gran_k, use_packed_ue8m0);
    const ScalarType sf_dtype = use_packed_ue8m0 ? ScalarType::Int : ScalarType::Float;
    if (given_out) {
        check_device(op, "out", *given_out, x, "x");
        check_device(op, "out_sf", *given_sf, x, "x");
        check_dtype(op, "out", *given_out, {ScalarType::Float8_e4m3fn});
        check_dtype(op, "out_sf", *given_sf, {sf_dtype});
        check_shape(op, "out", *given_out, "the shape of x", std::vector<int64_t>{rows, cols});
        check_inner_stride(op, "out", *given_out, nullptr);
        check_rows_apart(op, "out", *given_out);
        check_shape(op, "out_sf", *given_sf, "the shape of the scales", layout.shape);
        check_exact_strides(op, "out_sf", *given_sf, layout.strides);
    }

    const DeviceGuard guard(x.get_device_index());
    const std::vector<int64_t> shape = {rows, cols}, strides = {std::max<int64_t>(cols, 1), 1};
    Tensor out = given_out ? *given_out : empty_strided(shape, strides, ScalarType::Float8_e4m3fn, x);
    Tensor sf = given_sf ? *given_sf : empty_strided(layout.shape, layout.strides, sf_dtype, x);
    if (rows == 0 || cols == 0) return {std::move(out), std::move(sf)};

    cast::CastProblem problem;
    problem.x = x.data_ptr();
    problem.x_type = input_type(x.scalar_type());
    problem.rows = rows;
    problem.cols = cols;
    problem.x_stride = row_stride(x);
    problem.out = out.data_ptr();
    problem.out_stride = row_stride(out);
    problem.sf = sf.data_ptr();
    problem.sf_stride = layout.stride;
    problem.gran_k = static_cast<int>(gran_k);
    problem.sf_format = use_packed_ue8m0 ? cast::ScaleFormat::kUE8M0Packed
                        : use_ue8m0      ? cast::ScaleFormat::kUE8M0Float32
                                         : cast::ScaleFormat::kFloat32;
    const auto launch = kind == Kind::kPerToken     ? cast::launch_per_token_cast
                        : kind == Kind::kPerChannel ? cast::launch_per_channel_cast
                                                    : cast::launch_per_block_cast;
    check_launch(launch(problem, current_stream(x), knobs().pdl), op, "x");
    return {std::move(out), std::move(sf)};
}

Tensor run_transpose(const Tensor& x, const Tensor* given_out) {
    const std::string op = "transpose_fp8";
    check_dtype(op, "x", x, {ScalarType::Float8_e4m3fn});
    check_rank(op, "x", x, 2);
    check_size(op, "x", "dimension 0", x.size(0));
    check_size(op, "x", "dimension 1", x.size(1));
    check_inner_stride(op, "x", x, "to_tma_aligned");
    const int64_t rows = x.size(0), cols = x.size(1);
    const std::vector<int64_t> shape = {cols, rows}, strides = {std::max<int64_t>(rows, 1), 1};
    if (given_out) {
        check_device(op, "out", *given_out, x, "x");
        check_dtype(op, "out", *given_out, {ScalarType::Float8_e4m3fn});
        check_shape(op, "out", *given_out, "the shape of the result", shape);
        check_inner_stride(op, "out", *given_out, nullptr);
        check_rows_apart(op, "out", *given_out);
    }

    const DeviceGuard guard(x.get_device_index());
    Tensor out = given_out ? *given_out : empty_strided(shape, strides, ScalarType::Float8_e4m3fn, x);
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
    return run(Kind::kPerToken, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> per_channel_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run(Kind::kPerChannel, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> per_block_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0) {
    return run(Kind::kPerBlock, x, gran_k, use_ue8m0, use_packed_ue8m0, nullptr, nullptr);
}

void per_token_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf) {
    run(Kind::kPerToken, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

void per_channel_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                 Tensor out_sf) {
    run(Kind::kPerChannel, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

void per_block_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf) {
    run(Kind::kPerBlock, x, gran_k, use_ue8m0, use_packed_ue8m0, &out, &out_sf);
}

Tensor transpose_fp8(Tensor x) { return run_transpose(x, nullptr); }

void transpose_fp8_out(Tensor x, Tensor out) { run_transpose(x, &out); }

}  // namespace deep_gemm::ops
