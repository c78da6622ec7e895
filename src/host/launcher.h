// The one place where GEMM kernels are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "tensor_map.h"

namespace deep_gemm {

struct KernelLaunch {
    const void* kernel;      // host handle
    std::string (*name)(int row);
    std::string (*symbol)(int row);  // a part of its mangled name
    int row;                 // in its table
    int grid;
    int block;
    int cluster;
    int shared_bytes;
    const void* params;      // the kernel's only parameter
    size_t params_bytes;
    bool pdl;
};

// What runs a problem once it has become a launch: the device, or a test that records or emulates it.
class Backend {
public:
    virtual ~Backend() = default;
    virtual EncodeTiledFunction encode_tiled() = 0;
    virtual void launch(const KernelLaunch& launch) = 0;
    // Clusters of a launch that run at the same time on all of the device, at most `limit`.
    virtual int resident_clusters(const KernelLaunch&, int limit) { return limit; }
};

// Enqueues on a stream of a device, which must be the current one.
class DeviceBackend : public Backend {
public:
    DeviceBackend(int device, cudaStream_t stream) : device_(device), stream_(stream) {}
    EncodeTiledFunction encode_tiled() override { return driver_encode_tiled(); }
    void launch(const KernelLaunch& launch) override;
    int resident_clusters(const KernelLaunch& launch, int limit) override;

private:
    int device_;
    cudaStream_t stream_;
};

}  // namespace deep_gemm
