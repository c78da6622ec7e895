// The kernels of tf32_hc_prenorm_gemm, for the host.
#pragma once

namespace deep_gemm::sm100 {

// Of `rows` (128, 256, up to prenorm_max_rows) and `col_groups` (1 or 2).
const void* prenorm_gemm_kernel(int rows, int col_groups);
const void* prenorm_reduce_kernel();

}  // namespace deep_gemm::sm100
