// The one place of src/cast that launches a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <utility>

namespace deep_gemm::cast {

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Grids are one-dimensional: the other dimensions end at 65535.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t num_ctas, int num_threads, cudaStream_t stream, bool pdl,
                   Args&&... args) {
    if (num_ctas <= 0) return cudaSuccess;
    if (num_ctas > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(num_ctas));
    config.blockDim = dim3(num_threads);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

}  // namespace deep_gemm::cast
