// The kernels of tf32_hc_prenorm_gemm, for the host.
#pragma once

namespace deep_gemm::sm90 {

// Of `rows` (multiples of 64 up to prenorm_max_rows) and `col_groups` (1 or 2).
const void* prenorm_gemm_kernel(int rows, int col_groups);
const void* prenorm_reduce_kernel();

}  // namespace deep_gemm::sm90
