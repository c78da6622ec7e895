#include "knobs.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace deep_gemm {

Knobs& knobs() {
    static Knobs instance;
    return instance;
}

int usable_sms(int device) {
    constexpr int kMaxDevices = 64;
    static std::atomic<int> counts[kMaxDevices];
    int count = device < kMaxDevices ? counts[device].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
        if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
            throw std::runtime_error("deep_gemm: cannot read the number of SMs of a CUDA device");
        }
        if (device < kMaxDevices) counts[device].store(count, std::memory_order_relaxed);
    }
    const int limit = knobs().num_sms.load(std::memory_order_relaxed);
    return limit > 0 ? std::min(limit, count) : count;
}

bool print_configs() {
    int value = knobs().print_configs.load(std::memory_order_relaxed);
    if (value < 0) {
        const char* text = std::getenv("DG_PRINT_CONFIGS");
        value = text != nullptr && *text != '\0' && *text != '0';
        knobs().print_configs.store(value, std::memory_order_relaxed);
    }
    return value != 0;
}

}  // namespace deep_gemm
