// The kernels for MQA logits.
#include "mqa_logits_dispatch.h"
#include "mqa_logits_kernel.cuh"

namespace deep_gemm::sm100 {

namespace {

template <int... kRow>
const void* find(int row, std::integer_sequence<int, kRow...>) {
    static const void* const kKernels[] = {
        reinterpret_cast<const void*>(
            &sm100_mqa_logits<kMqaRows[kRow].heads, kMqaRows[kRow].paged, kMqaRows[kRow].fp4>)...};
    return kKernels[row];
}

}  // namespace

const void* mqa_kernel(int row) {
    return find(row, std::make_integer_sequence<int, sizeof(kMqaRows) / sizeof(kMqaRows[0])>());
}

}  // namespace deep_gemm::sm100
