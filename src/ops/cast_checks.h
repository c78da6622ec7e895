// What the casts and the layout operators check alike, the layouts of what they return, and what they do when a launch
// fails.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include "../host/cast.h"
#include "../host/knobs.h"
#include "check.h"
#include "stream.h"

namespace deep_gemm::ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// MN of 4-byte scales, rounded up to 16 bytes.
inline int64_t align_4(int64_t n) { return ceil_div(n, 4) * 4; }

inline void check_launch(cudaError_t error, std::string_view op, const char* arg) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        fail(op, arg, "architecture", "sm_" + std::to_string(compute_capability()),
             "one that this build was compiled for, sm_90 or sm_100");
    }
    throw std::runtime_error(std::string(op) + ": launch failed: " + cudaGetErrorString(error));
}

inline bool has_shape(const Tensor& x, std::span<const int64_t> expected) {
    const auto sizes = x.sizes();
    return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
}

[[noreturn]] inline void fail_shape(std::string_view op, const char* arg, const Tensor& x, const std::string& names,
                                    std::span<const int64_t> expected) {
    const auto sizes = x.sizes();
    fail(op, arg, "shape", text(std::span(sizes.data(), sizes.size())), names + " = " + text(expected));
}

inline void check_shape(std::string_view op, const char* arg, const Tensor& x, const char* names,
                        std::span<const int64_t> expected) {
    if (!has_shape(x, expected)) fail_shape(op, arg, x, names, expected);
}

// Strides matter along dimensions of more than one element, in a tensor of any.
inline void check_exact_strides(std::string_view op, const char* arg, const Tensor& x,
                                std::span<const int64_t> expected) {
    if (x.numel() == 0) return;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (x.size(i) != 1 && x.stride(i) != expected[i]) {
            const auto strides = x.strides();
            fail(op, arg, "strides", text(std::span(strides.data(), strides.size())), text(expected),
                 "MN-major, 16-byte aligned");
        }
    }
}

inline void check_gran_k(std::string_view op, int64_t gran_k) {
    if (gran_k != 128 && gran_k != 32) fail(op, "gran_k", "value", gran_k, "128 or 32");
}

// Between rows of a matrix; that of a single row may be anything and is replaced by one that hinders no vector access.
inline int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : ceil_div(x.size(1), 16) * 16; }

// ---------------------------------------------------------------------------------------------------------------------
// Casts

enum class CastKind { kPerToken, kPerChannel, kPerBlock };

// Of a matrix that a cast returns.
struct MatrixLayout {
    std::array<int64_t, 2> shape, strides;
};

inline MatrixLayout dense_layout(int64_t rows, int64_t cols) {
    return {{rows, cols}, {std::max<int64_t>(cols, 1), 1}};
}

// Scales of a cast of [rows, cols]: MN-major, 16-byte aligned.
inline MatrixLayout scale_layout(CastKind kind, int64_t rows, int64_t cols, int64_t gran_k, bool packed) {
    const bool per_channel = kind == CastKind::kPerChannel;
    const int64_t mn = per_channel ? cols : kind == CastKind::kPerBlock ? ceil_div(rows, 128) : rows;
    const int64_t groups = ceil_div(per_channel ? rows : cols, gran_k);
    const int64_t columns = packed ? ceil_div(groups, 4) : groups;
    if (per_channel) return {{columns, mn}, {align_4(mn), 1}};
    return {{mn, columns}, {1, align_4(mn)}};
}

inline cast::InputType input_type(ScalarType dtype) {
    return dtype == ScalarType::BFloat16 ? cast::InputType::kBFloat16
           : dtype == ScalarType::Half   ? cast::InputType::kFloat16
                                         : cast::InputType::kFloat32;
}

inline cast::ScaleFormat scale_format(bool use_ue8m0, bool use_packed_ue8m0) {
    return use_packed_ue8m0 ? cast::ScaleFormat::kUE8M0Packed
           : use_ue8m0      ? cast::ScaleFormat::kUE8M0Float32
                            : cast::ScaleFormat::kFloat32;
}

inline ScalarType scale_dtype(bool packed) { return packed ? ScalarType::Int : ScalarType::Float; }

// A matrix of values that the caller gives to be written.
inline void check_values_out(std::string_view op, const char* arg, const Tensor& out, const Tensor& x,
                             const char* names, const MatrixLayout& layout,
                             std::initializer_list<ScalarType> dtypes = {ScalarType::Float8_e4m3fn}) {
    check_device(op, arg, out, x, "x");
    check_dtype(op, arg, out, dtypes);
    check_shape(op, arg, out, names, layout.shape);
    check_inner_stride(op, arg, out, nullptr);
    check_rows_apart(op, arg, out);
}

inline void check_scales_out(std::string_view op, const char* arg, const Tensor& out, const Tensor& x, bool packed,
                             const MatrixLayout& layout) {
    check_device(op, arg, out, x, "x");
    check_dtype(op, arg, out, {scale_dtype(packed)});
    check_shape(op, arg, out, "the shape of the scales", layout.shape);
    check_exact_strides(op, arg, out, layout.strides);
}

inline Tensor empty_matrix(const MatrixLayout& layout, ScalarType dtype, const Tensor& like) {
    return empty_strided(layout.shape, layout.strides, dtype, like);
}

// A cast of x to rows of `cols` values.
inline cast::CastProblem cast_problem(const Tensor& x, int64_t cols, const Tensor& out, const Tensor& sf,
                                      int64_t sf_stride, int64_t gran_k, cast::ScaleFormat format) {
    cast::CastProblem problem;
    problem.x = x.data_ptr();
    problem.x_type = input_type(x.scalar_type());
    problem.rows = x.size(0);
    problem.cols = cols;
    problem.x_stride = row_stride(x);
    problem.out = out.data_ptr();
    problem.out_stride = row_stride(out);
    problem.sf = sf.data_ptr();
    problem.sf_stride = sf_stride;
    problem.gran_k = static_cast<int>(gran_k);
    problem.sf_format = format;
    problem.num_sms = usable_sms(static_cast<int>(x.get_device_index()));
    return problem;
}

}  // namespace deep_gemm::ops
