// MQA logits of the lightning indexer on CUDA tensors. Meaning, shapes and errors: deep_gemm_ops/mqa_logits.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace deep_gemm::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor fp8_mqa_logits(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start, Tensor end, bool clean_logits,
                      int64_t max_seqlen_k, ScalarType logits_dtype);
void fp8_mqa_logits_out(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start, Tensor end, bool clean_logits,
                        int64_t max_seqlen_k, Tensor out);

Tensor fp8_fp4_mqa_logits(Tensor q, std::optional<Tensor> q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start,
                          Tensor end, bool clean_logits, int64_t max_seqlen_k, ScalarType logits_dtype);
void fp8_fp4_mqa_logits_out(Tensor q, std::optional<Tensor> q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start,
                            Tensor end, bool clean_logits, int64_t max_seqlen_k, Tensor out);

Tensor get_paged_mqa_logits_metadata(Tensor context_lens, int64_t block_kv, int64_t num_sms,
                                     std::optional<Tensor> indices);
void get_paged_mqa_logits_metadata_out(Tensor context_lens, int64_t block_kv, int64_t num_sms,
                                       std::optional<Tensor> indices, Tensor out);

Tensor fp8_paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                            Tensor schedule_metadata, int64_t max_context_len, bool clean_logits,
                            ScalarType logits_dtype, std::optional<Tensor> indices);
void fp8_paged_mqa_logits_out(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                              Tensor schedule_metadata, int64_t max_context_len, bool clean_logits,
                              std::optional<Tensor> indices, Tensor out);

Tensor fp8_fp4_paged_mqa_logits(Tensor q, std::optional<Tensor> q_sf, Tensor kv_cache, Tensor weights,
                                Tensor context_lens, Tensor block_table, Tensor schedule_metadata,
                                int64_t max_context_len, bool clean_logits, ScalarType logits_dtype,
                                std::optional<Tensor> indices);
void fp8_fp4_paged_mqa_logits_out(Tensor q, std::optional<Tensor> q_sf, Tensor kv_cache, Tensor weights,
                                  Tensor context_lens, Tensor block_table, Tensor schedule_metadata,
                                  int64_t max_context_len, bool clean_logits, std::optional<Tensor> indices, Tensor out);

}  // namespace deep_gemm::ops
