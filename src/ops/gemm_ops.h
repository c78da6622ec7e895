// The GEMM operators with scales on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/ops.py and fp8_fp4_gemm.py.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace deep_gemm::ops {

// Operand orders, first letter A, second B: n is [MN, K] for A and [K, N] for B, t the transpose of that.
enum class Layout { kNT, kNN, kTN, kTT };

// kFP8FP4: each operand is FP8 or FP4.
enum class Operands { kFP8, kFP8FP4 };

// Boxed: arguments and result are on the stack, in the order of the schema. TORCH_BOX would wrap each tensor in a
// torch::stable::Tensor, an allocation each, and a small GEMM is over in few microseconds.
template <Operands kOperands, Layout kLayout>
void scaled_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

template <Operands kOperands, Layout kLayout>
void scaled_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace deep_gemm::ops
