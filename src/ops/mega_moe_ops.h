// Mega MoE on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/mega_moe.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../device/mega_moe_params.h"

namespace deep_gemm::ops {

using torch::stable::Tensor;

// fp8_mega_moe and fp8_fp4_mega_moe.
template <MegaMoeType kType>
Tensor scaled_mega_moe(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor buffer, std::vector<int64_t> buffer_ptrs,
                       int64_t rank, int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts,
                       int64_t num_topk, std::optional<Tensor> stats, std::optional<double> activation_clamp,
                       std::optional<int64_t> expected_m, int64_t timeout_ms);
template <MegaMoeType kType>
void scaled_mega_moe_out(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor buffer,
                         std::vector<int64_t> buffer_ptrs, int64_t rank, int64_t num_tokens,
                         int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                         std::optional<Tensor> stats, std::optional<double> activation_clamp,
                         std::optional<int64_t> expected_m, int64_t timeout_ms, Tensor out);

Tensor bf16_mega_moe(Tensor l1, Tensor l2, Tensor buffer, std::vector<int64_t> buffer_ptrs, int64_t rank,
                     int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                     std::optional<Tensor> stats, std::optional<double> activation_clamp,
                     std::optional<int64_t> expected_m, int64_t timeout_ms);
void bf16_mega_moe_out(Tensor l1, Tensor l2, Tensor buffer, std::vector<int64_t> buffer_ptrs, int64_t rank,
                       int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                       std::optional<Tensor> stats, std::optional<double> activation_clamp,
                       std::optional<int64_t> expected_m, int64_t timeout_ms,
                       Tensor out);

}  // namespace deep_gemm::ops
