// Argument checks of the CUDA operators, of tensors (X is Tensor or TensorInfo). Texts are those of
// deep_gemm_ops/_checks.py:
//   <op>: <arg> has <what> <value>, expected <value> (<note>)
// They are put together once a check has failed: a call that passes makes no string.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace deep_gemm::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMaxSize = (int64_t{1} << 31) - 1;  // kernels count rows, columns and K in 32 bits

inline std::string text(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Short: return "int16";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Half: return "float16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Bool: return "bool";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Float8_e5m2: return "float8_e5m2";
        case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
        case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
        case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
        case ScalarType::Float8_e8m0fnu: return "float8_e8m0fnu";
        case ScalarType::Float4_e2m1fn_x2: return "float4_e2m1fn_x2";
        default: return "scalar type " + std::to_string(static_cast<int>(dtype));
    }
}

inline std::string text(int64_t value) { return std::to_string(value); }

// As Python writes it.
inline std::string float_text(double value) {
    char digits[32];
    std::string written(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
    if (written.find_first_not_of("-0123456789") == std::string::npos) written += ".0";
    return written;
}

inline std::string text(const std::string& value) { return value; }
inline std::string text(const char* value) { return value; }

inline std::string text(std::span<const int64_t> values) {
    std::string joined = "[";
    for (size_t i = 0; i < values.size(); ++i) joined += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return joined + "]";
}

// "x", "x or y", "x, y or z".
inline std::string one_of(std::initializer_list<std::string> words) {
    std::string joined;
    size_t i = 0;
    for (const std::string& word : words) {
        joined += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + word;
        ++i;
    }
    return joined;
}

template <class Value, class Expected>
[[noreturn]] void fail(std::string_view op, const char* arg, const char* what, const Value& value,
                       const Expected& expected, const std::string& note = "") {
    throw std::runtime_error(std::string(op) + ": " + arg + " has " + what + " " + text(value) + ", expected " +
                             text(expected) + (note.empty() ? "" : " (" + note + ")"));
}

template <class X>
void check_dtype(std::string_view op, const char* arg, const X& x, std::initializer_list<ScalarType> dtypes) {
    const ScalarType dtype = x.scalar_type();
    for (ScalarType accepted : dtypes) {
        if (dtype == accepted) return;
    }
    std::string names;
    size_t i = 0;
    for (ScalarType accepted : dtypes) {
        names += (i == 0 ? "" : i + 1 == dtypes.size() ? " or " : ", ") + text(accepted);
        ++i;
    }
    fail(op, arg, "dtype", text(dtype), names);
}

template <class X>
void check_rank(std::string_view op, const char* arg, const X& x, int64_t rank) {
    if (x.dim() != rank) fail(op, arg, "rank", x.dim(), rank);
}

template <class X>
std::string device_text(const X& x) {
    return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : x.is_cpu() ? "cpu" : "of another kind";
}

template <class X>
void check_device(std::string_view op, const char* arg, const X& x, const X& like, const char* like_arg) {
    if (!x.is_cuda() || x.get_device_index() != like.get_device_index()) {
        fail(op, arg, "device", device_text(x), device_text(like), "the device of " + std::string(like_arg));
    }
}

inline void check_size(std::string_view op, const char* arg, const char* dimension, int64_t size) {
    if (size > kMaxSize) fail(op, arg, dimension, size, "at most " + std::to_string(kMaxSize));
}

template <class X>
void check_shape(std::string_view op, const char* arg, const X& x, const char* names,
                 std::span<const int64_t> expected) {
    const auto sizes = x.sizes();
    if (std::ranges::equal(std::span(sizes.data(), sizes.size()), expected)) return;
    fail(op, arg, "shape", text(std::span(sizes.data(), sizes.size())), std::string(names) + " = " + text(expected));
}

template <class X>
void check_shape(std::string_view op, const char* arg, const X& x, const char* names,
                 std::initializer_list<int64_t> expected) {
    check_shape(op, arg, x, names, std::span(expected.begin(), expected.size()));
}

template <class X>
bool is_empty(const X& x) {
    for (int64_t i = 0; i < x.dim(); ++i) {
        if (x.size(i) == 0) return true;
    }
    return false;
}

// The last dimension is dense (irrelevant where it has one element or the tensor none).
template <class X>
void check_inner_stride(std::string_view op, const char* arg, const X& x, const char* helper) {
    const int64_t last = x.dim() - 1;
    if (x.stride(last) != 1 && x.size(last) > 1 && !is_empty(x)) {
        fail(op, arg, "inner stride", x.stride(last), int64_t{1},
             helper ? "use deep_gemm_ops." + std::string(helper) : "");
    }
}

// How the stride of an outer dimension is called.
template <class X>
std::string stride_name(const X& x, int64_t dimension) {
    return x.dim() == 2 ? "row stride" : "dimension-" + std::to_string(dimension) + " stride";
}

// Rows of a tensor that is written do not overlap.
template <class X>
void check_rows_apart(std::string_view op, const char* arg, const X& x) {
    if (is_empty(x)) return;
    // From the dimension whose elements are closest to the one whose are farthest apart, of two at most.
    const int64_t outer = x.dim() - 1;
    int64_t order[2] = {0, 1};
    if (outer == 2 && x.stride(1) < x.stride(0)) std::swap(order[0], order[1]);
    int64_t extent = x.size(outer);
    for (int64_t i = 0; i < outer; ++i) {
        const int64_t dimension = order[i], size = x.size(dimension), stride = x.stride(dimension);
        if (size <= 1) continue;
        if (stride < extent) {
            fail(op, arg, stride_name(x, dimension).c_str(), stride, "at least " + std::to_string(extent));
        }
        extent += (size - 1) * stride;
    }
}

inline int64_t element_size(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16:
        case ScalarType::Half: return 2;
        case ScalarType::Float:
        case ScalarType::Int: return 4;
        default: return 1;  // of those that pass the checks of dtypes
    }
}

// What TMA reads as it lies: dense rows, 16-byte outer strides and base address, no two rows overlapping.
template <class X>
void check_tma_readable(std::string_view op, const char* arg, const X& x) {
    constexpr int64_t kAlignment = 16;
    check_inner_stride(op, arg, x, "to_tma_aligned");
    if (is_empty(x)) return;
    const char* helper = "use deep_gemm_ops.to_tma_aligned";
    const int64_t last = x.dim() - 1, cols = x.size(last), bytes = element_size(x.scalar_type());
    for (int64_t i = 0; i < last; ++i) {
        if (x.size(i) <= 1) continue;
        const int64_t stride = x.stride(i);
        if (stride * bytes % kAlignment != 0) {
            fail(op, arg, stride_name(x, i).c_str(), std::to_string(stride * bytes) + " bytes",
                 "a multiple of 16 bytes", helper);
        }
        if (stride < cols) {
            fail(op, arg, stride_name(x, i).c_str(), stride, "at least " + std::to_string(cols), helper);
        }
    }
    const int64_t past = reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment;
    if (past != 0) fail(op, arg, "base address", std::to_string(past) + " modulo 16 bytes", int64_t{0}, helper);
}

}  // namespace deep_gemm::ops
