// The Mega MoE kernels.
#include "mega_moe_dispatch.h"

#include "mega_moe_kernel.cuh"

namespace deep_gemm::sm90 {

namespace {

template <bool kBF16>
const void* kernel_of(int tokens) {
    return tokens == 16   ? reinterpret_cast<const void*>(&sm90_mega_moe<16, kBF16>)
           : tokens == 32 ? reinterpret_cast<const void*>(&sm90_mega_moe<32, kBF16>)
           : tokens == 64 ? reinterpret_cast<const void*>(&sm90_mega_moe<64, kBF16>)
                          : reinterpret_cast<const void*>(&sm90_mega_moe<128, kBF16>);
}

}  // namespace

const void* mega_moe_kernel(int tokens, bool is_bf16) { return is_bf16 ? kernel_of<true>(tokens) : kernel_of<false>(tokens); }

const void* mega_moe_check_kernel() { return reinterpret_cast<const void*>(&sm90_mega_moe_check); }

}  // namespace deep_gemm::sm90
