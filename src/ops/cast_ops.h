// Casts and scale layouts on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace deep_gemm::ops {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0);
std::tuple<Tensor, Tensor> per_channel_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0);
std::tuple<Tensor, Tensor> per_block_cast_to_fp8(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0);

void per_token_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf);
void per_channel_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                 Tensor out_sf);
void per_block_cast_to_fp8_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf);

Tensor transpose_fp8(Tensor x);
void transpose_fp8_out(Tensor x, Tensor out);

Tensor get_mn_major_tma_aligned_tensor(Tensor sf);
void get_mn_major_tma_aligned_tensor_out(Tensor sf, Tensor out);

Tensor get_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, bool round_up);
void get_mn_major_tma_aligned_packed_ue8m0_tensor_out(Tensor sf, bool round_up, Tensor out);

Tensor get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, Tensor ks, int64_t gran_k);

Tensor transform_sf_into_required_layout(Tensor sf, int64_t mn, int64_t k, std::vector<int64_t> recipe,
                                         std::optional<int64_t> num_groups, std::optional<bool> is_sfa,
                                         bool disable_ue8m0_cast, bool round_up);

Tensor expand_ue8m0(Tensor sf, int64_t k_sf);
void expand_ue8m0_out(Tensor sf, int64_t k_sf, Tensor out);

}  // namespace deep_gemm::ops
