// The stream, device and memory that an operator works with, through PyTorch's stable C interface.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <span>
#include <stdexcept>

// In libtorch_cuda alone: a weak reference lets this library load beside a CPU build of PyTorch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace deep_gemm::ops {

using torch::stable::Tensor;

// The device that this thread's launches go to.
inline int current_device() {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("deep_gemm: no current CUDA device");
    return device;
}

// Makes a device current while it lives. PyTorch's own guard costs an allocation and several calls: only where needed.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        if (current_device() != device) guard_.emplace(device);
    }

private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// PyTorch's current stream on a device.
inline cudaStream_t current_stream(int device) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
        throw std::runtime_error("deep_gemm: PyTorch gives no CUDA stream; is this a CUDA build of PyTorch?");
    }
    return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t current_stream(const Tensor& tensor) { return current_stream(tensor.get_device_index()); }

// An uninitialised tensor on the device of `like`, from PyTorch's allocator. The caller owns it.
inline AtenTensorHandle new_empty_strided(std::span<const int64_t> sizes, std::span<const int64_t> strides,
                                          torch::headeronly::ScalarType dtype, AtenTensorHandle like) {
    int32_t device_type = 0, device_index = 0;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like, &device_index));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                           strides.data(), static_cast<int32_t>(dtype), device_type,
                                                           device_index, &handle));
    return handle;
}

inline Tensor empty_strided(std::span<const int64_t> sizes, std::span<const int64_t> strides,
                            torch::headeronly::ScalarType dtype, const Tensor& like) {
    return Tensor(new_empty_strided(sizes, strides, dtype, like.get()));
}

// Major and minor compute capability of a device, as 90 for sm_90.
inline int compute_capability(int device) {
    constexpr int kMaxDevices = 64;
    static std::atomic<int> capabilities[kMaxDevices];  // written with the same value by whoever is first
    const bool remembered = device < kMaxDevices;
    int capability = remembered ? capabilities[device].load(std::memory_order_relaxed) : 0;
    if (capability == 0) {
        int major = 0, minor = 0;
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
            throw std::runtime_error("deep_gemm: cannot read the compute capability of a CUDA device");
        }
        capability = major * 10 + minor;
        if (remembered) capabilities[device].store(capability, std::memory_order_relaxed);
    }
    return capability;
}

// That of the current device.
inline int compute_capability() { return compute_capability(current_device()); }

}  // namespace deep_gemm::ops
