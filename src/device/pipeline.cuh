// The position of one role in a ring of shared-memory stages.
#pragma once

#include <cstdint>

namespace deep_gemm {

template <int kNumStages>
struct PipelineState {
    uint32_t stage_idx = 0;
    uint32_t phase = 0;  // flips each time the ring wraps; a consumer waits for `phase`, a producer for `phase ^ 1`

    __device__ __forceinline__ void advance() {
        stage_idx = stage_idx + 1 == kNumStages ? 0 : stage_idx + 1;
        phase ^= stage_idx == 0;
    }
};

}  // namespace deep_gemm
