// The kernels of tf32_hc_prenorm_gemm.
#include "prenorm_gemm_kernel.cuh"

#include "prenorm_gemm_dispatch.h"

namespace deep_gemm::sm90 {

const void* prenorm_gemm_kernel(int rows, int col_groups) {
    if (col_groups == 1) {
        return rows == 64    ? reinterpret_cast<const void*>(&sm90_prenorm_gemm<64, 1>)
               : rows == 128 ? reinterpret_cast<const void*>(&sm90_prenorm_gemm<128, 1>)
               : rows == 192 ? reinterpret_cast<const void*>(&sm90_prenorm_gemm<192, 1>)
                             : reinterpret_cast<const void*>(&sm90_prenorm_gemm<256, 1>);
    }
    return rows == 64 ? reinterpret_cast<const void*>(&sm90_prenorm_gemm<64, 2>)
                      : reinterpret_cast<const void*>(&sm90_prenorm_gemm<128, 2>);
}

const void* prenorm_reduce_kernel() { return reinterpret_cast<const void*>(&sm90_prenorm_reduce); }

}  // namespace deep_gemm::sm90
