// The FP8 GEMM operators on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace deep_gemm::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Operand orders, first letter A, second B: n is [MN, K] for A and [K, N] for B, t the transpose of that.
enum class Layout { kNT, kNN, kTN, kTT };

template <Layout kLayout>
Tensor fp8_gemm(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, const std::optional<Tensor>& c,
                ScalarType out_dtype, const std::optional<std::vector<int64_t>>& recipe);

template <Layout kLayout>
void fp8_gemm_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                  const std::optional<Tensor>& c, const std::optional<std::vector<int64_t>>& recipe,
                  const Tensor& out);

}  // namespace deep_gemm::ops
