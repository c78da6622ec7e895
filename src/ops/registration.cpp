// Every operator's schema and its CUDA implementation. CPU implementations and fakes are registered from Python.
#include <torch/csrc/stable/library.h>

#include "cast_ops.h"
#include "fused_cast_ops.h"
#include "gemm_ops.h"
#include "mega_moe_ops.h"
#include "mqa_logits_ops.h"
#include "prenorm_gemm_ops.h"

namespace {

using namespace deep_gemm::ops;
using deep_gemm::MegaMoeType;

STABLE_TORCH_LIBRARY(deep_gemm, m) {
#define DG_SCHEMA(schema) m.def(schema);
#include "schemas.inc"
#undef DG_SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(deep_gemm, CUDA, m) {
#include "product_impls.inc"

    m.impl("per_token_cast_to_fp8", TORCH_BOX(&per_token_cast_to_fp8));
    m.impl("per_token_cast_to_fp8.out", TORCH_BOX(&per_token_cast_to_fp8_out));
    m.impl("per_channel_cast_to_fp8", TORCH_BOX(&per_channel_cast_to_fp8));
    m.impl("per_channel_cast_to_fp8.out", TORCH_BOX(&per_channel_cast_to_fp8_out));
    m.impl("per_block_cast_to_fp8", TORCH_BOX(&per_block_cast_to_fp8));
    m.impl("per_block_cast_to_fp8.out", TORCH_BOX(&per_block_cast_to_fp8_out));
    m.impl("per_token_cast_to_fp4", TORCH_BOX(&per_token_cast_to_fp4));
    m.impl("per_token_cast_to_fp4.out", TORCH_BOX(&per_token_cast_to_fp4_out));
    m.impl("swiglu_cast_to_fp8", TORCH_BOX(&swiglu_cast_to_fp8));
    m.impl("swiglu_cast_to_fp8.out", TORCH_BOX(&swiglu_cast_to_fp8_out));
    m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
    m.impl("swiglu_backward.out", TORCH_BOX(&swiglu_backward_out));
    m.impl("per_token_cast_to_fp8_with_transpose", TORCH_BOX(&per_token_cast_to_fp8_with_transpose));
    m.impl("per_token_cast_to_fp8_with_transpose.out", TORCH_BOX(&per_token_cast_to_fp8_with_transpose_out));
    m.impl("per_block_cast_to_fp8_with_transpose", TORCH_BOX(&per_block_cast_to_fp8_with_transpose));
    m.impl("per_block_cast_to_fp8_with_transpose.out", TORCH_BOX(&per_block_cast_to_fp8_with_transpose_out));
    m.impl("per_channel_cast_to_fp8_transposed", TORCH_BOX(&per_channel_cast_to_fp8_transposed));
    m.impl("per_channel_cast_to_fp8_transposed.out", TORCH_BOX(&per_channel_cast_to_fp8_transposed_out));
    m.impl("per_block_cast_to_fp8_transposed", TORCH_BOX(&per_block_cast_to_fp8_transposed));
    m.impl("per_block_cast_to_fp8_transposed.out", TORCH_BOX(&per_block_cast_to_fp8_transposed_out));
    m.impl("k_grouped_per_channel_cast_to_fp8", TORCH_BOX(&k_grouped_per_channel_cast_to_fp8));
    m.impl("k_grouped_per_channel_cast_to_fp8.out", TORCH_BOX(&k_grouped_per_channel_cast_to_fp8_out));
    m.impl("k_grouped_per_channel_cast_to_fp8_k_major", TORCH_BOX(&k_grouped_per_channel_cast_to_fp8_k_major));
    m.impl("k_grouped_per_channel_cast_to_fp8_k_major.out", TORCH_BOX(&k_grouped_per_channel_cast_to_fp8_k_major_out));
    m.impl("transpose_fp8", TORCH_BOX(&transpose_fp8));
    m.impl("transpose_fp8.out", TORCH_BOX(&transpose_fp8_out));
    m.impl("get_mn_major_tma_aligned_tensor", TORCH_BOX(&get_mn_major_tma_aligned_tensor));
    m.impl("get_mn_major_tma_aligned_tensor.out", TORCH_BOX(&get_mn_major_tma_aligned_tensor_out));
    m.impl("get_mn_major_tma_aligned_packed_ue8m0_tensor", TORCH_BOX(&get_mn_major_tma_aligned_packed_ue8m0_tensor));
    m.impl("get_mn_major_tma_aligned_packed_ue8m0_tensor.out",
           TORCH_BOX(&get_mn_major_tma_aligned_packed_ue8m0_tensor_out));
    m.impl("get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
           TORCH_BOX(&get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor));
    m.impl("transform_sf_into_required_layout", TORCH_BOX(&transform_sf_into_required_layout));
    m.impl("expand_ue8m0", TORCH_BOX(&expand_ue8m0));
    m.impl("expand_ue8m0.out", TORCH_BOX(&expand_ue8m0_out));

    m.impl("tf32_hc_prenorm_gemm", TORCH_BOX(&tf32_hc_prenorm_gemm));
    m.impl("tf32_hc_prenorm_gemm.out", TORCH_BOX(&tf32_hc_prenorm_gemm_out));
    m.impl("fp8_mqa_logits", TORCH_BOX(&fp8_mqa_logits));
    m.impl("fp8_mqa_logits.out", TORCH_BOX(&fp8_mqa_logits_out));
    m.impl("fp8_fp4_mqa_logits", TORCH_BOX(&fp8_fp4_mqa_logits));
    m.impl("fp8_fp4_mqa_logits.out", TORCH_BOX(&fp8_fp4_mqa_logits_out));
    m.impl("get_paged_mqa_logits_metadata", TORCH_BOX(&get_paged_mqa_logits_metadata));
    m.impl("get_paged_mqa_logits_metadata.out", TORCH_BOX(&get_paged_mqa_logits_metadata_out));
    m.impl("fp8_paged_mqa_logits", TORCH_BOX(&fp8_paged_mqa_logits));
    m.impl("fp8_paged_mqa_logits.out", TORCH_BOX(&fp8_paged_mqa_logits_out));
    m.impl("fp8_fp4_paged_mqa_logits", TORCH_BOX(&fp8_fp4_paged_mqa_logits));
    m.impl("fp8_fp4_paged_mqa_logits.out", TORCH_BOX(&fp8_fp4_paged_mqa_logits_out));
#include "mega_moe_impls.inc"
}

}  // namespace
