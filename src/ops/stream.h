// The stream, device and memory that an operator works with, through PyTorch's stable C interface.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <span>
#include <stdexcept>

// In libtorch_cuda alone: a weak reference lets this library load beside a CPU build of PyTorch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace deep_gemm::ops {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// PyTorch's current stream on the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
        throw std::runtime_error("deep_gemm: PyTorch gives no CUDA stream; is this a CUDA build of PyTorch?");
    }
    return static_cast<cudaStream_t>(stream);
}

// An uninitialised tensor on the device of `like`, from PyTorch's allocator.
inline Tensor empty_strided(std::span<const int64_t> sizes, std::span<const int64_t> strides,
                            torch::headeronly::ScalarType dtype, const Tensor& like) {
    int32_t device_type = 0;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    static_cast<int32_t>(dtype), device_type, like.get_device_index(),
                                                    &handle));
    return Tensor(handle);
}

// Major and minor compute capability of the current device, as 90 for sm_90.
inline int compute_capability() {
    constexpr int kMaxDevices = 64;
    static int capabilities[kMaxDevices];  // written with the same value by whoever is first
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("deep_gemm: no current CUDA device");
    if (device < kMaxDevices && capabilities[device] != 0) return capabilities[device];
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (device < kMaxDevices) capabilities[device] = major * 10 + minor;
    return major * 10 + minor;
}

}  // namespace deep_gemm::ops
