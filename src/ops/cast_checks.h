// What the casts and the layout operators check alike, and what they do when a launch fails.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "check.h"
#include "stream.h"

namespace deep_gemm::ops {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// MN of 4-byte scales, rounded up to 16 bytes.
inline int64_t align_4(int64_t n) { return ceil_div(n, 4) * 4; }

inline void check_launch(cudaError_t error, const std::string& op, const char* arg) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        fail(op, arg, "architecture", "sm_" + std::to_string(compute_capability()),
             "one that this build was compiled for, sm_90 or sm_100");
    }
    throw std::runtime_error(op + ": launch failed: " + cudaGetErrorString(error));
}

inline void check_shape(const std::string& op, const char* arg, const Tensor& x, const std::string& names,
                        const std::vector<int64_t>& expected) {
    const auto sizes = x.sizes();
    if (std::vector<int64_t>(sizes.begin(), sizes.end()) == expected) return;
    fail(op, arg, "shape", text(std::span(sizes.data(), sizes.size())), names + " = " + text(expected));
}

// Strides matter along dimensions of more than one element, in a tensor of any.
inline void check_exact_strides(const std::string& op, const char* arg, const Tensor& x,
                                const std::vector<int64_t>& expected) {
    if (x.numel() == 0) return;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (x.size(i) != 1 && x.stride(i) != expected[i]) {
            const auto strides = x.strides();
            fail(op, arg, "strides", text(std::span(strides.data(), strides.size())), text(expected),
                 "MN-major, 16-byte aligned");
        }
    }
}

inline void check_gran_k(const std::string& op, int64_t gran_k) {
    if (gran_k != 128 && gran_k != 32) fail(op, "gran_k", "value", gran_k, "128 or 32");
}

// Between rows of a matrix; that of a single row may be anything and is replaced by one that hinders no vector access.
inline int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : ceil_div(x.size(1), 16) * 16; }

}  // namespace deep_gemm::ops
