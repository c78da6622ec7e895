// Hands encodes and launches to C callbacks, so that a test can emulate what the device would run.
#pragma once

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "launcher.h"

namespace deep_gemm {

// `kernel` is a part of the kernel's mangled name.
using LaunchCallback = int (*)(const char* kernel, int grid, int block, int cluster, int shared_bytes,
                               const void* params, size_t params_bytes);

class CallbackBackend : public Backend {
public:
    CallbackBackend(EncodeTiledFunction encode, LaunchCallback launch) : encode_(encode), launch_(launch) {}
    EncodeTiledFunction encode_tiled() override { return encode_; }
    void launch(const KernelLaunch& launch) override {
        const std::string symbol = launch.symbol(launch.row);
        // A test runs the kernel by its name, the device by its handle: they have to belong together.
        static std::map<const void*, std::string> symbols;
        const auto known = symbols.try_emplace(launch.kernel, symbol).first;
        if (launch.kernel != nullptr && known->second != symbol) {
            throw std::runtime_error("the handles of " + known->second + " and " + symbol + " are the same");
        }
        if (launch_(symbol.c_str(), launch.grid, launch.block, launch.cluster, launch.shared_bytes,
                    launch.params, launch.params_bytes) != 0) {
            throw std::runtime_error("the launch callback failed");
        }
    }

private:
    EncodeTiledFunction encode_;
    LaunchCallback launch_;
};

// Runs `problem(backend)`. Returns 0, or 1 with the message in `error`.
template <class Problem>
int run_on_callbacks(EncodeTiledFunction encode, LaunchCallback launch, char* error, size_t error_size,
                     Problem&& problem) {
    try {
        CallbackBackend backend(encode, launch);
        problem(backend);
        return 0;
    } catch (const std::exception& exception) {
        std::strncpy(error, exception.what(), error_size - 1);
        error[error_size - 1] = '\0';
        return 1;
    }
}

}  // namespace deep_gemm
