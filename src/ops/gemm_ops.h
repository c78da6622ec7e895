// Products on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/ops.py, fp8_fp4_gemm.py, bf16_gemm.py, grouped_gemm.py, batched.py,
// skip_head.py.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace deep_gemm::ops {

// Operand orders, first letter A, second B: n is [MN, K] for A and [K, N] for B, t the transpose of that.
enum class Layout { kNT, kNN, kTN, kTT };

// All are boxed: arguments and result are on the stack, in the order of the schema (see Arguments in product.h).
template <Layout kLayout>
void fp8_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <Layout kLayout>
void fp8_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

template <Layout kLayout>
void fp8_fp4_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <Layout kLayout>
void fp8_fp4_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

template <Layout kLayout>
void bf16_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <Layout kLayout>
void bf16_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

void fp8_gemm_nt_skip_head_mid(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void fp8_gemm_nt_skip_head_mid_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// m_grouped_{fp8,fp8_fp4,bf16}_gemm_{nt,nn}_contiguous
template <bool kFP8, Layout kLayout, bool kOrFP4 = false>
void m_grouped_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <bool kFP8, Layout kLayout, bool kOrFP4 = false>
void m_grouped_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// m_grouped_{fp8,fp8_fp4,bf16}_gemm_nt_masked
template <bool kFP8, bool kOrFP4 = false>
void m_grouped_gemm_masked(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <bool kFP8, bool kOrFP4 = false>
void m_grouped_gemm_masked_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// k_grouped_{fp8,bf16}_gemm_{tn,nt}_contiguous
template <bool kFP8, Layout kLayout>
void k_grouped_gemm(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <bool kFP8, Layout kLayout>
void k_grouped_gemm_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// einsum, fp8_einsum
template <bool kFP8>
void einsum(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
template <bool kFP8>
void einsum_out(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace deep_gemm::ops
