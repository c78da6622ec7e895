// The schedule of paged MQA logits.
#include "../device/mqa_logits_metadata.cuh"
#include "mqa_logits_dispatch.h"

namespace deep_gemm::sm100 {

namespace {

__global__ void __launch_bounds__(kMqaMetadataThreads)
    sm100_mqa_logits_metadata(const __grid_constant__ MqaMetadataParams params) {
    mqa_metadata::run(params);
}

}  // namespace

const void* mqa_metadata_kernel() { return reinterpret_cast<const void*>(&sm100_mqa_logits_metadata); }

}  // namespace deep_gemm::sm100
