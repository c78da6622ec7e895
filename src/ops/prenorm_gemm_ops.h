// The product of hyper-connections' pre-norm on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/prenorm_gemm.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace deep_gemm::ops {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> tf32_hc_prenorm_gemm(Tensor a, Tensor b, std::optional<int64_t> num_splits);
void tf32_hc_prenorm_gemm_out(Tensor a, Tensor b, std::optional<int64_t> num_splits, Tensor out, Tensor out_sqr_sum);

}  // namespace deep_gemm::ops
