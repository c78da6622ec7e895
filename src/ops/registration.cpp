// Every operator's schema and its CUDA implementation. CPU implementations and fakes are registered from Python.
#include <torch/csrc/stable/library.h>

#include "cast_ops.h"
#include "fused_cast_ops.h"
#include "gemm_ops.h"

namespace {

using namespace deep_gemm::ops;

STABLE_TORCH_LIBRARY(deep_gemm, m) {
#define DG_SCHEMA(schema) m.def(schema);
#include "schemas.inc"
#undef DG_SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(deep_gemm, CUDA, m) {
    m.impl("fp8_gemm_nt", &fp8_gemm<Layout::kNT>);
    m.impl("fp8_gemm_nn", &fp8_gemm<Layout::kNN>);
    m.impl("fp8_gemm_tn", &fp8_gemm<Layout::kTN>);
    m.impl("fp8_gemm_tt", &fp8_gemm<Layout::kTT>);
    m.impl("fp8_gemm_nt.out", &fp8_gemm_out<Layout::kNT>);
    m.impl("fp8_gemm_nn.out", &fp8_gemm_out<Layout::kNN>);
    m.impl("fp8_gemm_tn.out", &fp8_gemm_out<Layout::kTN>);
    m.impl("fp8_gemm_tt.out", &fp8_gemm_out<Layout::kTT>);

    m.impl("fp8_fp4_gemm_nt", &fp8_fp4_gemm<Layout::kNT>);
    m.impl("fp8_fp4_gemm_nn", &fp8_fp4_gemm<Layout::kNN>);
    m.impl("fp8_fp4_gemm_tn", &fp8_fp4_gemm<Layout::kTN>);
    m.impl("fp8_fp4_gemm_tt", &fp8_fp4_gemm<Layout::kTT>);
    m.impl("fp8_fp4_gemm_nt.out", &fp8_fp4_gemm_out<Layout::kNT>);
    m.impl("fp8_fp4_gemm_nn.out", &fp8_fp4_gemm_out<Layout::kNN>);
    m.impl("fp8_fp4_gemm_tn.out", &fp8_fp4_gemm_out<Layout::kTN>);
    m.impl("fp8_fp4_gemm_tt.out", &fp8_fp4_gemm_out<Layout::kTT>);

    m.impl("bf16_gemm_nt", &bf16_gemm<Layout::kNT>);
    m.impl("bf16_gemm_nt.out", &bf16_gemm_out<Layout::kNT>);
    m.impl("bf16_gemm_nn", &bf16_gemm<Layout::kNN>);
    m.impl("bf16_gemm_nn.out", &bf16_gemm_out<Layout::kNN>);
    m.impl("bf16_gemm_tn", &bf16_gemm<Layout::kTN>);
    m.impl("bf16_gemm_tn.out", &bf16_gemm_out<Layout::kTN>);
    m.impl("bf16_gemm_tt", &bf16_gemm<Layout::kTT>);
    m.impl("bf16_gemm_tt.out", &bf16_gemm_out<Layout::kTT>);
    m.impl("fp8_gemm_nt_skip_head_mid", &fp8_gemm_nt_skip_head_mid);
    m.impl("fp8_gemm_nt_skip_head_mid.out", &fp8_gemm_nt_skip_head_mid_out);
    m.impl("m_grouped_fp8_gemm_nt_contiguous", &m_grouped_gemm<true, Layout::kNT>);
    m.impl("m_grouped_fp8_gemm_nt_contiguous.out", &m_grouped_gemm_out<true, Layout::kNT>);
    m.impl("m_grouped_fp8_gemm_nn_contiguous", &m_grouped_gemm<true, Layout::kNN>);
    m.impl("m_grouped_fp8_gemm_nn_contiguous.out", &m_grouped_gemm_out<true, Layout::kNN>);
    m.impl("m_grouped_fp8_gemm_nt_masked", &m_grouped_gemm_masked<true>);
    m.impl("m_grouped_fp8_gemm_nt_masked.out", &m_grouped_gemm_masked_out<true>);
    m.impl("k_grouped_fp8_gemm_tn_contiguous", &k_grouped_gemm<true, Layout::kTN>);
    m.impl("k_grouped_fp8_gemm_tn_contiguous.out", &k_grouped_gemm_out<true, Layout::kTN>);
    m.impl("k_grouped_fp8_gemm_nt_contiguous", &k_grouped_gemm<true, Layout::kNT>);
    m.impl("k_grouped_fp8_gemm_nt_contiguous.out", &k_grouped_gemm_out<true, Layout::kNT>);
    m.impl("m_grouped_bf16_gemm_nt_contiguous", &m_grouped_gemm<false, Layout::kNT>);
    m.impl("m_grouped_bf16_gemm_nt_contiguous.out", &m_grouped_gemm_out<false, Layout::kNT>);
    m.impl("m_grouped_bf16_gemm_nn_contiguous", &m_grouped_gemm<false, Layout::kNN>);
    m.impl("m_grouped_bf16_gemm_nn_contiguous.out", &m_grouped_gemm_out<false, Layout::kNN>);
    m.impl("m_grouped_bf16_gemm_nt_masked", &m_grouped_gemm_masked<false>);
    m.impl("m_grouped_bf16_gemm_nt_masked.out", &m_grouped_gemm_masked_out<false>);
    m.impl("k_grouped_bf16_gemm_tn_contiguous", &k_grouped_gemm<false, Layout::kTN>);
    m.impl("k_grouped_bf16_gemm_tn_contiguous.out", &k_grouped_gemm_out<false, Layout::kTN>);
    m.impl("einsum", &einsum<false>);
    m.impl("fp8_einsum", &einsum<true>);
    m.impl("einsum.out", &einsum_out<false>);
    m.impl("fp8_einsum.out", &einsum_out<true>);

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
    m.impl("per_token_cast_to_fp8_with_transpose", TORCH_BOX(&per_token_cast_to_fp8_with_transpose));
    m.impl("per_token_cast_to_fp8_with_transpose.out", TORCH_BOX(&per_token_cast_to_fp8_with_transpose_out));
    m.impl("per_block_cast_to_fp8_with_transpose", TORCH_BOX(&per_block_cast_to_fp8_with_transpose));
    m.impl("per_block_cast_to_fp8_with_transpose.out", TORCH_BOX(&per_block_cast_to_fp8_with_transpose_out));
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
}

}  // namespace
