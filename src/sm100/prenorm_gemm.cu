// The kernels of tf32_hc_prenorm_gemm.
#include "prenorm_gemm_kernel.cuh"

#include "prenorm_gemm_dispatch.h"

namespace deep_gemm::sm100 {

const void* prenorm_gemm_kernel(int rows, int col_groups) {
    if (col_groups == 2) return reinterpret_cast<const void*>(&sm100_prenorm_gemm<128, 2>);
    return rows == 128 ? reinterpret_cast<const void*>(&sm100_prenorm_gemm<128, 1>)
                       : reinterpret_cast<const void*>(&sm100_prenorm_gemm<256, 1>);
}

const void* prenorm_reduce_kernel() { return reinterpret_cast<const void*>(&sm100_prenorm_reduce); }

}  // namespace deep_gemm::sm100
