// The Mega MoE kernels, for the host.
#pragma once

#include "mega_moe_traits.h"

namespace deep_gemm::sm100 {

// Of a layout without an invalid_reason().
const void* mega_moe_kernel(const MegaMoeLayout& layout);
// Behind each of those.
const void* mega_moe_check_kernel();

}  // namespace deep_gemm::sm100
