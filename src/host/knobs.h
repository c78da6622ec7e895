// Process-wide settings. Read when work is enqueued: a captured graph keeps the values it was captured with.
#pragma once

#include <atomic>

namespace deep_gemm {

struct Knobs {
    std::atomic<int> num_sms{0};       // 0: all of the device
    std::atomic<int> tc_util{100};     // percent; kept for callers, no SM90 kernel throttles itself
    std::atomic<int> pdl{1};           // programmatic dependent launch
    std::atomic<int> mk_alignment{128};
    std::atomic<int> block_m_multiple_of{1};
    std::atomic<int> block_n_multiple_of{1};
    std::atomic<int> forced_row{-1};   // row of the GEMM table to use, or -1; for tests and tuning
    std::atomic<int> print_configs{-1};  // DG_PRINT_CONFIGS: -1 not read yet
};

Knobs& knobs();

// SMs that work on a device may use: the knob, capped by the device.
int usable_sms(int device);

// DG_PRINT_CONFIGS, read once.
bool print_configs();

}  // namespace deep_gemm
