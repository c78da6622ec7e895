// The kernels for MQA logits, for the host.
#pragma once

namespace deep_gemm::sm100 {

// Of a row of kMqaRows.
const void* mqa_kernel(int row);
const void* mqa_metadata_kernel();

}  // namespace deep_gemm::sm100
