// What an operator asks about a tensor, read once: every question to PyTorch is a call into another library, and the
// checks of a GEMM ask dozens.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <span>

namespace deep_gemm::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct DeleteTensor {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
// A tensor with one owner. torch::stable::Tensor has several, and so an allocation of its own.
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

class TensorInfo {
public:
    // Refers to the tensor, and must not outlive it.
    explicit TensorInfo(AtenTensorHandle handle) : handle_(handle) {
        int64_t *sizes = nullptr, *strides = nullptr;
        int32_t device_type = 0;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
        sizes_ = sizes;
        strides_ = strides;
        is_cuda_ = device_type == aoti_torch_device_type_cuda();
        is_cpu_ = device_type == aoti_torch_device_type_cpu();
        dtype_ = read_dtype();
    }
    explicit TensorInfo(const Tensor& tensor) : TensorInfo(tensor.get()) {}

    AtenTensorHandle get() const { return handle_; }
    int64_t dim() const { return dim_; }
    int64_t size(int64_t i) const { return sizes_[i]; }
    int64_t stride(int64_t i) const { return strides_[i]; }
    std::span<const int64_t> sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
    ScalarType scalar_type() const { return dtype_; }
    int32_t get_device_index() const { return device_index_; }
    bool is_cuda() const { return is_cuda_; }
    bool is_cpu() const { return is_cpu_; }
    void* data_ptr() const {
        void* data = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
        return data;
    }

private:
    // PyTorch's own conversion compares with the code of one type after the other, a call each.
    ScalarType read_dtype() const {
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
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &code));
        for (const Code& known : kCodes) {
            if (known.code == code) return known.dtype;
        }
        return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
    }

    AtenTensorHandle handle_;
    const int64_t* sizes_;
    const int64_t* strides_;
    int64_t dim_;
    ScalarType dtype_;
    int32_t device_index_;
    bool is_cuda_;
    bool is_cpu_;
};

}  // namespace deep_gemm::ops
