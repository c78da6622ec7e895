// The Mega MoE kernels.
#include "mega_moe_dispatch.h"

#include "mega_moe_kernel.cuh"

namespace deep_gemm::sm100 {

namespace {

template <MegaMoeType kOf>
const void* kernel_of(int tokens) {
    constexpr int kType = static_cast<int>(kOf);
    return tokens == 16   ? reinterpret_cast<const void*>(&sm100_mega_moe<16, kType>)
           : tokens == 32 ? reinterpret_cast<const void*>(&sm100_mega_moe<32, kType>)
           : tokens == 64 ? reinterpret_cast<const void*>(&sm100_mega_moe<64, kType>)
                          : reinterpret_cast<const void*>(&sm100_mega_moe<128, kType>);
}

}  // namespace

const void* mega_moe_kernel(const MegaMoeLayout& layout) {
    return layout.is_bf16() ? kernel_of<MegaMoeType::kBF16>(layout.block_tokens)
                            : kernel_of<MegaMoeType::kFP8FP4>(layout.block_tokens);
}

const void* mega_moe_check_kernel() { return reinterpret_cast<const void*>(&sm100_mega_moe_check); }

}  // namespace deep_gemm::sm100
