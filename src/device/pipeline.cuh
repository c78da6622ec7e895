// The position of one role in a ring of shared-memory stages.
#pragma once

#include <cstdint>

#include "ptx_mbarrier.cuh"

namespace deep_gemm {

template <int kNumStages>
struct PipelineState {
    uint32_t stage_idx = 0;
    uint32_t phase = 0;  // flips each time the ring wraps; a consumer waits for `phase`, a producer for `phase ^ 1`

    __device__ __forceinline__ void advance() {
        const bool wraps = stage_idx + 1 == kNumStages;
        stage_idx = wraps ? 0 : stage_idx + 1;
        phase ^= wraps;
    }

    // By any number of stages: for steps that happen once per tile.
    __device__ __forceinline__ void advance_by(uint32_t count) {
        const uint32_t position = stage_idx + count;
        phase ^= position / kNumStages & 1;
        stage_idx = position % kNumStages;
    }

    // By a number of stages that is known and smaller than the ring.
    template <int kCount>
    __device__ __forceinline__ void advance_few() {
        static_assert(kCount < kNumStages);
        if constexpr (kCount == 1) return advance();
        const bool wraps = stage_idx + kCount >= kNumStages;
        stage_idx = wraps ? stage_idx + kCount - kNumStages : stage_idx + kCount;
        phase ^= wraps;
    }
};

// How many stages of a ring are on their way at a time. Were all asked for at once, CTAs would get their shares of memory
// unevenly, and one that starts late would wait behind what the others have asked for.
template <int kNumStages>
class LoadLimit {
public:
    __device__ __forceinline__ explicit LoadLimit(int most) : free_places_(most) {}

    // Before the next stage is asked for.
    __device__ __forceinline__ void wait(ptx::Barrier (&full)[kNumStages]) {
        if (free_places_ > 0) {
            --free_places_;
        } else {
            ptx::mbarrier_wait(full[oldest_.stage_idx], oldest_.phase);
            oldest_.advance();
        }
    }

private:
    PipelineState<kNumStages> oldest_;  // of those that are on their way
    int free_places_;
};

}  // namespace deep_gemm
