// FP4 and fused casts on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/fused_casts.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace deep_gemm::ops {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> per_token_cast_to_fp4(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0);
void per_token_cast_to_fp4_out(Tensor x, int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                               Tensor out_sf);

std::tuple<Tensor, Tensor> swiglu_cast_to_fp8(Tensor x, std::optional<Tensor> topk_weights, std::optional<double> clamp,
                                              int64_t gran_k, bool use_ue8m0, bool use_packed_ue8m0);
void swiglu_cast_to_fp8_out(Tensor x, std::optional<Tensor> topk_weights, std::optional<double> clamp, int64_t gran_k,
                            bool use_ue8m0, bool use_packed_ue8m0, Tensor out, Tensor out_sf);

std::tuple<Tensor, Tensor, Tensor> swiglu_backward(Tensor x, Tensor grad, std::optional<Tensor> row_weights);
void swiglu_backward_out(Tensor x, Tensor grad, std::optional<Tensor> row_weights, Tensor out, Tensor out_weighted,
                         Tensor out_row_weights);

std::tuple<Tensor, Tensor, Tensor, Tensor> per_token_cast_to_fp8_with_transpose(Tensor x, bool use_ue8m0,
                                                                                bool use_packed_ue8m0);
void per_token_cast_to_fp8_with_transpose_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                              Tensor out_sf, Tensor out_t, Tensor out_t_sf);
std::tuple<Tensor, Tensor, Tensor, Tensor> per_block_cast_to_fp8_with_transpose(Tensor x, bool use_ue8m0,
                                                                                bool use_packed_ue8m0);
void per_block_cast_to_fp8_with_transpose_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out,
                                              Tensor out_sf, Tensor out_t, Tensor out_t_sf);

std::tuple<Tensor, Tensor> per_channel_cast_to_fp8_transposed(Tensor x, bool use_ue8m0, bool use_packed_ue8m0);
void per_channel_cast_to_fp8_transposed_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out, Tensor out_sf);
std::tuple<Tensor, Tensor> per_block_cast_to_fp8_transposed(Tensor x, bool use_ue8m0, bool use_packed_ue8m0);
void per_block_cast_to_fp8_transposed_out(Tensor x, bool use_ue8m0, bool use_packed_ue8m0, Tensor out, Tensor out_sf);

std::tuple<Tensor, Tensor> k_grouped_per_channel_cast_to_fp8(Tensor x, Tensor ks, std::string layout, bool use_ue8m0);
void k_grouped_per_channel_cast_to_fp8_out(Tensor x, Tensor ks, std::string layout, bool use_ue8m0, Tensor out,
                                           Tensor out_sf);
std::tuple<Tensor, Tensor> k_grouped_per_channel_cast_to_fp8_k_major(Tensor x, Tensor ks, std::string layout,
                                                                     bool use_ue8m0);
void k_grouped_per_channel_cast_to_fp8_k_major_out(Tensor x, Tensor ks, std::string layout, bool use_ue8m0, Tensor out,
                                                   Tensor out_sf);

}  // namespace deep_gemm::ops
