// What an operator asks about a tensor, read once: every question to PyTorch is a call into another library, and the
// checks of a GEMM ask dozens.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <span>

namespace deep_gemm::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensor::scalar_type() compares with PyTorch's code of one type after the other, a call each.
inline ScalarType dtype_of(const Tensor& x) {
    struct Code {
        int32_t code;
        ScalarType dtype;
    };
    static const Code kCodes[] = {
        {aoti_torch_dtype_float8_e4m3fn(), ScalarType::Float8_e4m3fn},
        {aoti_torch_dtype_float32(), ScalarType::Float},
        {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
        {aoti_torch_dtype_int32(), ScalarType::Int},
        {torch_dtype_float8_e8m0fnu(), ScalarType::Float8_e8m0fnu},
    };
    int32_t code = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
    for (const Code& known : kCodes) {
        if (known.code == code) return known.dtype;
    }
    return x.scalar_type();
}

// Member functions as those of torch::stable::Tensor, which it refers to and must not outlive.
class TensorInfo {
public:
    explicit TensorInfo(const Tensor& x)
        : tensor_(x),
          sizes_(x.sizes().data()),
          strides_(x.strides().data()),
          dim_(x.dim()),
          dtype_(dtype_of(x)),
          device_index_(x.get_device_index()),
          is_cuda_(x.is_cuda()) {}

    const Tensor& tensor() const { return tensor_; }
    int64_t dim() const { return dim_; }
    int64_t size(int64_t i) const { return sizes_[i]; }
    int64_t stride(int64_t i) const { return strides_[i]; }
    std::span<const int64_t> sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
    ScalarType scalar_type() const { return dtype_; }
    int32_t get_device_index() const { return device_index_; }
    bool is_cuda() const { return is_cuda_; }
    bool is_cpu() const { return tensor_.is_cpu(); }
    void* data_ptr() const { return tensor_.data_ptr(); }

private:
    const Tensor& tensor_;
    const int64_t* sizes_;
    const int64_t* strides_;
    int64_t dim_;
    ScalarType dtype_;
    int32_t device_index_;
    bool is_cuda_;
};

}  // namespace deep_gemm::ops
