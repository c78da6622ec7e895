// The Mega MoE kernels.
#include "mega_moe_dispatch.h"

#include "mega_moe_kernel.cuh"

namespace deep_gemm::sm90 {

namespace {

template <MegaMoeType kType>
const void* kernel_of(int tokens) {
    return tokens == 16   ? reinterpret_cast<const void*>(&sm90_mega_moe<16, static_cast<int>(kType)>)
           : tokens == 32 ? reinterpret_cast<const void*>(&sm90_mega_moe<32, static_cast<int>(kType)>)
           : tokens == 64 ? reinterpret_cast<const void*>(&sm90_mega_moe<64, static_cast<int>(kType)>)
                          : reinterpret_cast<const void*>(&sm90_mega_moe<128, static_cast<int>(kType)>);
}

}  // namespace

const void* mega_moe_kernel(const MegaMoeLayout& layout) {
    switch (layout.type) {
        case MegaMoeType::kFP8: return kernel_of<MegaMoeType::kFP8>(layout.block_tokens);
        case MegaMoeType::kBF16: return kernel_of<MegaMoeType::kBF16>(layout.block_tokens);
        case MegaMoeType::kFP8FP4: return kernel_of<MegaMoeType::kFP8FP4>(layout.block_tokens);
    }
    return nullptr;
}

const void* mega_moe_check_kernel() { return reinterpret_cast<const void*>(&sm90_mega_moe_check); }

}  // namespace deep_gemm::sm90
