// The FP8 GEMM operators on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/ops.py.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace deep_gemm::ops {

// Operand orders, first letter A, second B: n is [MN, K] for A and [K, N] for B, t the transpose of that.
enum class Layout { kNT, kNN, kTN, kTT };

// Boxed: arguments and result are on the stack, in the order of the schema. TORCH_BOX would wrap each tensor in a
// torch::stable::Tensor, an allocation each, and a small GEMM is over in few microseconds.
template <Layout kLayout>
void fp8_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

template <Layout kLayout>
void fp8_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace deep_gemm::ops
