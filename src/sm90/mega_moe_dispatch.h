// The Mega MoE kernels, for the host.
#pragma once

namespace deep_gemm::sm90 {

// Of blocks of `tokens` (16, 32, 64 or 128).
const void* mega_moe_kernel(int tokens, bool is_bf16);
// Behind each of those.
const void* mega_moe_check_kernel();

}  // namespace deep_gemm::sm90
