#include "launcher.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace deep_gemm {

namespace {

void check(cudaError_t error, const KernelLaunch& launch, const char* what) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    throw std::runtime_error("deep_gemm: " + std::string(what) + " of " + launch.name(launch.row) +
                             " failed: " + cudaGetErrorString(error));
}

// Above 48 KB a kernel has to be told its limit once per device; asking again costs half a microsecond.
void allow_shared_memory(const KernelLaunch& launch, int device) {
    constexpr int kSlots = 1024;  // kernels that share one only ask more often
    constexpr int kMaxDevices = 64;
    static std::atomic<const void*> done[kMaxDevices][kSlots];
    std::atomic<const void*>* const slot =
        device < kMaxDevices ? &done[device][reinterpret_cast<uintptr_t>(launch.kernel) / 16 % kSlots] : nullptr;
    if (slot != nullptr && slot->load(std::memory_order_acquire) == launch.kernel) return;
    check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes), launch,
          "setting the shared memory size");
    if (slot != nullptr) slot->store(launch.kernel, std::memory_order_release);
}

}  // namespace

void DeviceBackend::launch(const KernelLaunch& launch) {
    allow_shared_memory(launch, device_);

    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (launch.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
        ++count;
    }
    if (launch.pdl) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count].val.programmaticStreamSerializationAllowed = 1;
        ++count;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.grid);
    config.blockDim = dim3(launch.block);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    void* arguments[] = {const_cast<void*>(launch.params)};
    check(cudaLaunchKernelExC(&config, launch.kernel, arguments), launch, "launch");
}

int DeviceBackend::resident_clusters(const KernelLaunch& launch, int limit) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int>, int> known;
    std::lock_guard lock(mutex);
    const auto [entry, is_new] = known.try_emplace({device_, launch.kernel, launch.cluster}, 0);
    if (is_new) {
        allow_shared_memory(launch, device_);
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(launch.cluster);
        config.blockDim = dim3(launch.block);
        config.dynamicSmemBytes = launch.shared_bytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        // Where the runtime cannot say there is none, and nobody will use clusters.
        if (cudaOccupancyMaxActiveClusters(&entry->second, launch.kernel, &config) != cudaSuccess) {
            (void)cudaGetLastError();
            entry->second = 0;
        }
    }
    return std::min(entry->second, limit);
}

}  // namespace deep_gemm
