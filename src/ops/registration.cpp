// Every operator's schema and its CUDA implementation. CPU implementations and fakes are registered from Python.
#include <torch/csrc/stable/library.h>

#include "cast_ops.h"
#include "gemm_ops.h"

namespace {

using namespace deep_gemm::ops;

STABLE_TORCH_LIBRARY(deep_gemm, m) {
#define DG_SCHEMA(schema) m.def(schema);
#include "schemas.inc"
#undef DG_SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(deep_gemm, CUDA, m) {
    m.impl("fp8_gemm_nt", &scaled_gemm<Operands::kFP8, Layout::kNT>);
    m.impl("fp8_gemm_nn", &scaled_gemm<Operands::kFP8, Layout::kNN>);
    m.impl("fp8_gemm_tn", &scaled_gemm<Operands::kFP8, Layout::kTN>);
    m.impl("fp8_gemm_tt", &scaled_gemm<Operands::kFP8, Layout::kTT>);
    m.impl("fp8_gemm_nt.out", &scaled_gemm_out<Operands::kFP8, Layout::kNT>);
    m.impl("fp8_gemm_nn.out", &scaled_gemm_out<Operands::kFP8, Layout::kNN>);
    m.impl("fp8_gemm_tn.out", &scaled_gemm_out<Operands::kFP8, Layout::kTN>);
    m.impl("fp8_gemm_tt.out", &scaled_gemm_out<Operands::kFP8, Layout::kTT>);

    m.impl("fp8_fp4_gemm_nt", &scaled_gemm<Operands::kFP8FP4, Layout::kNT>);
    m.impl("fp8_fp4_gemm_nn", &scaled_gemm<Operands::kFP8FP4, Layout::kNN>);
    m.impl("fp8_fp4_gemm_tn", &scaled_gemm<Operands::kFP8FP4, Layout::kTN>);
    m.impl("fp8_fp4_gemm_tt", &scaled_gemm<Operands::kFP8FP4, Layout::kTT>);
    m.impl("fp8_fp4_gemm_nt.out", &scaled_gemm_out<Operands::kFP8FP4, Layout::kNT>);
    m.impl("fp8_fp4_gemm_nn.out", &scaled_gemm_out<Operands::kFP8FP4, Layout::kNN>);
    m.impl("fp8_fp4_gemm_tn.out", &scaled_gemm_out<Operands::kFP8FP4, Layout::kTN>);
    m.impl("fp8_fp4_gemm_tt.out", &scaled_gemm_out<Operands::kFP8FP4, Layout::kTT>);

    m.impl("per_token_cast_to_fp8", TORCH_BOX(&per_token_cast_to_fp8));
    m.impl("per_token_cast_to_fp8.out", TORCH_BOX(&per_token_cast_to_fp8_out));
    m.impl("per_channel_cast_to_fp8", TORCH_BOX(&per_channel_cast_to_fp8));
    m.impl("per_channel_cast_to_fp8.out", TORCH_BOX(&per_channel_cast_to_fp8_out));
    m.impl("per_block_cast_to_fp8", TORCH_BOX(&per_block_cast_to_fp8));
    m.impl("per_block_cast_to_fp8.out", TORCH_BOX(&per_block_cast_to_fp8_out));
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
