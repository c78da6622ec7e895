"""A call of each operator, and a wrong one, for docs/operators.md: make_operator_docs.py runs them and prints results.

An operator without an entry fails the test of that page.
"""

from __future__ import annotations

#: What the examples share.
SETUP = """\
import torch
import deep_gemm_ops
from deep_gemm_ops import nn as fp8

x = torch.randn(64, 256, dtype=torch.bfloat16)            # tokens
w = torch.randn(128, 256, dtype=torch.bfloat16)           # weights
a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w)
w3 = torch.stack([w, -w])                                 # two experts
b3, sfb3 = torch.stack([b, b]), torch.stack([sfb, sfb])
b4, sfb4 = (torch.stack(x) for x in zip(*map(deep_gemm_ops.per_token_cast_to_fp4, w3)))
ends = torch.tensor([40, 64], dtype=torch.int32)          # 40 tokens for the first, 24 for the second
sizes = torch.tensor([40, 24], dtype=torch.int32)
"""

#: name: (a call, a call that is refused)
EXAMPLES: dict[str, tuple[str, str]] = {
    "fp8_gemm_nt": ("deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb)", "deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb[:, :1])"),
    "fp8_gemm_nn": (
        "deep_gemm_ops.fp8_gemm_nn(a, sfa, b.t().contiguous(), sfb.t(), out_dtype=torch.float32)",
        "deep_gemm_ops.fp8_gemm_nn(a, sfa, b, sfb)",
    ),
    "fp8_gemm_tn": (
        "deep_gemm_ops.fp8_gemm_tn(\n"
        "    *deep_gemm_ops.per_channel_cast_to_fp8(x), *deep_gemm_ops.per_channel_cast_to_fp8(x)\n"
        ")",
        "deep_gemm_ops.fp8_gemm_tn(a.t(), sfa.t(), b.t(), sfb.t())",
    ),
    "fp8_gemm_tt": (
        "deep_gemm_ops.fp8_gemm_tt(a.t().contiguous(), sfa.t(), b, sfb)",
        "deep_gemm_ops.fp8_gemm_tt(a, sfa, b, sfb)",
    ),
    "fp8_fp4_gemm_nt": (
        "deep_gemm_ops.fp8_fp4_gemm_nt(\n"
        "    *deep_gemm_ops.per_token_cast_to_fp8(x, gran_k=32), *deep_gemm_ops.per_token_cast_to_fp4(w)\n"
        ")",
        "deep_gemm_ops.fp8_fp4_gemm_nt(a, sfa, *deep_gemm_ops.per_token_cast_to_fp4(w[:, :128]))",
    ),
    "fp8_fp4_gemm_nn": (
        "deep_gemm_ops.fp8_fp4_gemm_nn(a, sfa, b.t().contiguous(), sfb.t())",
        "deep_gemm_ops.fp8_fp4_gemm_nn(a, sfa, b, sfb)",
    ),
    "fp8_fp4_gemm_tn": (
        "deep_gemm_ops.fp8_fp4_gemm_tn(\n"
        "    *deep_gemm_ops.per_channel_cast_to_fp8(x), *deep_gemm_ops.per_channel_cast_to_fp8(x)\n"
        ")",
        "deep_gemm_ops.fp8_fp4_gemm_tn(a.t(), sfa.t(), b.t(), sfb.t())",
    ),
    "fp8_fp4_gemm_tt": (
        "deep_gemm_ops.fp8_fp4_gemm_tt(a.t().contiguous(), sfa.t(), b, sfb)",
        "deep_gemm_ops.fp8_fp4_gemm_tt(a, sfa, b, sfb)",
    ),
    "fp8_gemm_nt_skip_head_mid": (
        "deep_gemm_ops.fp8_gemm_nt_skip_head_mid(a, sfa, b, sfb, [32, 16, 32])",
        "deep_gemm_ops.fp8_gemm_nt_skip_head_mid(a, sfa, b, sfb, [32, 16, 30])",
    ),
    "bf16_gemm_nt": ("deep_gemm_ops.bf16_gemm_nt(x, w)", "deep_gemm_ops.bf16_gemm_nt(x, w[:, :128])"),
    "bf16_gemm_nn": ("deep_gemm_ops.bf16_gemm_nn(x, w.t().contiguous())", "deep_gemm_ops.bf16_gemm_nn(x, w)"),
    "bf16_gemm_tn": (
        "deep_gemm_ops.bf16_gemm_tn(x.t().contiguous(), w.t().contiguous())",
        "deep_gemm_ops.bf16_gemm_tn(x.t(), w.t())",
    ),
    "bf16_gemm_tt": (
        "deep_gemm_ops.bf16_gemm_tt(x.t().contiguous(), w)",
        "deep_gemm_ops.bf16_gemm_tt(x.float(), w)",
    ),
    "m_grouped_fp8_gemm_nt_contiguous": (
        'deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous(a, sfa, b3, sfb3, ends, layout="offsets")',
        'deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous(a, sfa, b3, sfb3, ends, layout="sizes")',
    ),
    "m_grouped_fp8_gemm_nn_contiguous": (
        "deep_gemm_ops.m_grouped_fp8_gemm_nn_contiguous(\n"
        '    a, sfa, b3.transpose(1, 2).contiguous(), sfb3.transpose(1, 2), ends, layout="offsets"\n'
        ")",
        'deep_gemm_ops.m_grouped_fp8_gemm_nn_contiguous(a, sfa, b3, sfb3, ends, layout="offsets")',
    ),
    "m_grouped_fp8_gemm_nt_masked": (
        "deep_gemm_ops.m_grouped_fp8_gemm_nt_masked(\n"
        "    torch.stack([a, a]), torch.stack([sfa, sfa]), b3, sfb3, sizes, expected_m=32\n"
        ")",
        "deep_gemm_ops.m_grouped_fp8_gemm_nt_masked(a, sfa, b3, sfb3, sizes, expected_m=32)",
    ),
    "m_grouped_fp8_fp4_gemm_nt_contiguous": (
        "deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_contiguous(\n"
        '    *deep_gemm_ops.per_token_cast_to_fp8(x, gran_k=32), b4, sfb4, ends, layout="offsets"\n'
        ")",
        "deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_contiguous(a, sfa, b4, sfb4, ends, recipe=[1, 1, 32])",
    ),
    "m_grouped_fp8_fp4_gemm_nn_contiguous": (
        "deep_gemm_ops.m_grouped_fp8_fp4_gemm_nn_contiguous(\n"
        '    a, sfa, b3.transpose(1, 2).contiguous(), sfb3.transpose(1, 2), ends, layout="offsets"\n'
        ")",
        'deep_gemm_ops.m_grouped_fp8_fp4_gemm_nn_contiguous(a, sfa, b4, sfb4, ends, layout="offsets")',
    ),
    "m_grouped_fp8_fp4_gemm_nt_masked": (
        "deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_masked(\n"
        "    torch.stack([a, a]), torch.stack([sfa, sfa]), b4, sfb4, sizes, expected_m=32\n"
        ")",
        "deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_masked(a, sfa, b4, sfb4, sizes, expected_m=32)",
    ),
    "m_grouped_bf16_gemm_nt_contiguous": (
        'deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w3, ends, layout="offsets")',
        'deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w3, ends.long(), layout="offsets")',
    ),
    "m_grouped_bf16_gemm_nn_contiguous": (
        'deep_gemm_ops.m_grouped_bf16_gemm_nn_contiguous(x, w3.transpose(1, 2).contiguous(), ends, layout="offsets")',
        'deep_gemm_ops.m_grouped_bf16_gemm_nn_contiguous(x, w3, ends, layout="offsets")',
    ),
    "m_grouped_bf16_gemm_nt_masked": (
        "deep_gemm_ops.m_grouped_bf16_gemm_nt_masked(torch.stack([x, x]), w3, sizes, expected_m=32)",
        "deep_gemm_ops.m_grouped_bf16_gemm_nt_masked(torch.stack([x, x, x]), w3, sizes, expected_m=32)",
    ),
    "k_grouped_fp8_gemm_tn_contiguous": (
        "deep_gemm_ops.k_grouped_fp8_gemm_tn_contiguous(\n"
        "    *deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x, sizes),\n"
        "    *deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x, sizes),\n"
        "    sizes,\n"
        ")",
        "deep_gemm_ops.k_grouped_fp8_gemm_tn_contiguous(a, sfa, a, sfa, sizes)",
    ),
    "k_grouped_fp8_gemm_nt_contiguous": (
        "deep_gemm_ops.k_grouped_fp8_gemm_nt_contiguous(\n"
        "    b.flatten(), torch.ones(1, 256), b.flatten(), torch.ones(1, 256), torch.tensor([128], dtype=torch.int32)\n"
        ")",
        "deep_gemm_ops.k_grouped_fp8_gemm_nt_contiguous(a.flatten(), sfa[:8], a.flatten(), sfa[:8], sizes)",
    ),
    "k_grouped_bf16_gemm_tn_contiguous": (
        "deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(x, x, sizes)",
        "deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(x, x[:32], sizes)",
    ),
    "einsum": (
        'deep_gemm_ops.einsum("bhr,hdr->bhd", torch.stack([x, x], 1), w3)',
        'deep_gemm_ops.einsum("ij,jk->ik", x, w)',
    ),
    "fp8_einsum": (
        'deep_gemm_ops.fp8_einsum("bhr,hdr->bhd", torch.stack([a, a], 1), torch.stack([sfa, sfa], 1), b3, sfb3)',
        'deep_gemm_ops.fp8_einsum("bmk,bnk->mn", b3, sfb3, b3, sfb3)',
    ),
    "tf32_hc_prenorm_gemm": (
        "deep_gemm_ops.tf32_hc_prenorm_gemm(x, torch.randn(24, 256))",
        "deep_gemm_ops.tf32_hc_prenorm_gemm(x, w)",
    ),
    "fp8_fp4_mega_moe": (
        "deep_gemm_ops.fp8_fp4_mega_moe(\n"
        "    None,\n"
        "    *deep_gemm_ops.transform_weights_for_mega_moe(\n"
        "        (torch.zeros(2, 256, 128, dtype=torch.uint8), torch.ones(2, 256, 8)),\n"
        "        (torch.zeros(2, 256, 64, dtype=torch.uint8), torch.ones(2, 256, 4)),\n"
        "    ),\n"
        '    deep_gemm_ops.get_symm_buffer_for_mega_moe(None, 2, 64, 1, 256, 128, device="cpu"),\n'
        "    num_tokens=40,\n"
        ")",
        "deep_gemm_ops.fp8_fp4_mega_moe(\n"
        "    None, (w3, w3), (w3, w3),\n"
        '    deep_gemm_ops.get_symm_buffer_for_mega_moe(None, 2, 64, 1, 256, 128, mma_type="fp8xfp8", device="cpu"),\n'
        "    num_tokens=40,\n"
        ")",
    ),
    "fp8_mega_moe": (
        "deep_gemm_ops.fp8_mega_moe(\n"
        "    None,\n"
        "    (torch.zeros(2, 256, 256).to(torch.float8_e4m3fn), torch.ones(2, 2, 2)),\n"
        "    (torch.zeros(2, 256, 128).to(torch.float8_e4m3fn), torch.ones(2, 2, 1)),\n"
        '    deep_gemm_ops.get_symm_buffer_for_mega_moe(None, 2, 64, 1, 256, 128, mma_type="fp8xfp8", device="cpu"),\n'
        "    num_tokens=40,\n"
        ")",
        'deep_gemm_ops.get_symm_buffer_for_mega_moe(None, 2, 64, 1, 256, 100, device="cpu")',
    ),
    "bf16_mega_moe": (
        "deep_gemm_ops.bf16_mega_moe(\n"
        "    None,\n"
        "    *deep_gemm_ops.transform_weights_for_mega_moe(w3.view(2, 256, 128), w3[:, :, :128].contiguous()),\n"
        "    deep_gemm_ops.get_symm_buffer_for_mega_moe(\n"
        '        None, 2, 64, 1, 128, 128, mma_type="bf16xbf16", device="cpu"\n'
        "    ),\n"
        "    num_tokens=40,\n"
        ")",
        "deep_gemm_ops.bf16_mega_moe(\n"
        "    None, w3, w3,\n"
        '    deep_gemm_ops.get_symm_buffer_for_mega_moe(None, 2, 64, 1, 256, 128, device="cpu"),\n'
        "    num_tokens=40,\n"
        ")",
    ),
    "fp8_mqa_logits": (
        "deep_gemm_ops.fp8_mqa_logits(\n"
        "    a.view(64, 8, 32), b.view(-1, 32), torch.ones(1024), torch.randn(64, 8),\n"
        "    torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32),\n"
        ")",
        "deep_gemm_ops.fp8_mqa_logits(\n"
        "    a.view(64, 8, 32), b.view(-1, 64), torch.ones(512), torch.randn(64, 8),\n"
        "    torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32),\n"
        ")",
    ),
    "fp8_fp4_mqa_logits": (
        "deep_gemm_ops.fp8_fp4_mqa_logits(\n"
        "    torch.zeros(64, 8, 16, dtype=torch.uint8), torch.full((64, 8), 127, dtype=torch.int32),\n"
        "    torch.zeros(100, 16, dtype=torch.uint8), torch.full((100,), 127, dtype=torch.int32),\n"
        "    torch.randn(64, 8), torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32),\n"
        ")",
        "deep_gemm_ops.fp8_fp4_mqa_logits(\n"
        "    torch.zeros(64, 8, 16, dtype=torch.uint8), torch.ones(64, 8),\n"
        "    torch.zeros(100, 16, dtype=torch.uint8), torch.full((100,), 127, dtype=torch.int32),\n"
        "    torch.randn(64, 8), torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32),\n"
        ")",
    ),
    "fp8_fp4_paged_mqa_logits": (
        "deep_gemm_ops.fp8_fp4_paged_mqa_logits(\n"
        "    torch.zeros(2, 1, 8, 16, dtype=torch.uint8), torch.full((2, 1, 8), 127, dtype=torch.int32),\n"
        "    torch.zeros(3, 64, 1, 20, dtype=torch.uint8), torch.randn(2, 8), sizes[:, None],\n"
        "    torch.tensor([[0], [2]], dtype=torch.int32),\n"
        "    deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=64, num_sms=4), max_context_len=64,\n"
        ")",
        "deep_gemm_ops.fp8_fp4_paged_mqa_logits(\n"
        "    torch.zeros(2, 1, 8, 16, dtype=torch.uint8), torch.full((2, 1, 8), 127, dtype=torch.int32),\n"
        "    torch.zeros(3, 64, 1, 36, dtype=torch.uint8), torch.randn(2, 8), sizes[:, None],\n"
        "    torch.tensor([[0], [2]], dtype=torch.int32),\n"
        "    deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=64, num_sms=4), max_context_len=64,\n"
        ")",
    ),
    "get_paged_mqa_logits_metadata": (
        "deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=64, num_sms=4)",
        "deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=48, num_sms=4)",
    ),
    "fp8_paged_mqa_logits": (
        "deep_gemm_ops.fp8_paged_mqa_logits(\n"
        "    a[:2].view(2, 1, 8, 32), torch.zeros(3, 64, 1, 36, dtype=torch.uint8), torch.randn(2, 8),\n"
        "    sizes[:, None],\n"
        "    torch.tensor([[0], [2]], dtype=torch.int32),\n"
        "    deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=64, num_sms=4), max_context_len=64,\n"
        ")",
        "deep_gemm_ops.fp8_paged_mqa_logits(\n"
        "    a[:2].view(2, 1, 8, 32), torch.zeros(3, 64, 1, 32, dtype=torch.uint8), torch.randn(2, 8),\n"
        "    sizes[:, None],\n"
        "    torch.tensor([[0], [2]], dtype=torch.int32),\n"
        "    deep_gemm_ops.get_paged_mqa_logits_metadata(sizes, block_kv=64, num_sms=4), max_context_len=64,\n"
        ")",
    ),
    "per_token_cast_to_fp8": (
        "deep_gemm_ops.per_token_cast_to_fp8(x)",
        "deep_gemm_ops.per_token_cast_to_fp8(x, gran_k=64)",
    ),
    "per_channel_cast_to_fp8": (
        "deep_gemm_ops.per_channel_cast_to_fp8(x)",
        "deep_gemm_ops.per_channel_cast_to_fp8(x.double())",
    ),
    "per_block_cast_to_fp8": ("deep_gemm_ops.per_block_cast_to_fp8(w)", "deep_gemm_ops.per_block_cast_to_fp8(w.t())"),
    "per_token_cast_to_fp4": (
        "deep_gemm_ops.per_token_cast_to_fp4(x)",
        "deep_gemm_ops.per_token_cast_to_fp4(x[:, :255].contiguous())",
    ),
    "swiglu_cast_to_fp8": (
        "deep_gemm_ops.swiglu_cast_to_fp8(x, topk_weights=torch.rand(64))",
        "deep_gemm_ops.swiglu_cast_to_fp8(x, topk_weights=torch.rand(8))",
    ),
    "swiglu_backward": (
        "deep_gemm_ops.swiglu_backward(x, x[:, :128], row_weights=torch.rand(64))",
        "deep_gemm_ops.swiglu_backward(x, x)",
    ),
    "per_token_cast_to_fp8_with_transpose": (
        "deep_gemm_ops.per_token_cast_to_fp8_with_transpose(x)",
        "deep_gemm_ops.per_token_cast_to_fp8_with_transpose(x[0])",
    ),
    "per_block_cast_to_fp8_with_transpose": (
        "deep_gemm_ops.per_block_cast_to_fp8_with_transpose(w)",
        "deep_gemm_ops.per_block_cast_to_fp8_with_transpose(w[0])",
    ),
    "per_channel_cast_to_fp8_transposed": (
        "deep_gemm_ops.per_channel_cast_to_fp8_transposed(x)",
        "deep_gemm_ops.per_channel_cast_to_fp8_transposed(x[0])",
    ),
    "per_block_cast_to_fp8_transposed": (
        "deep_gemm_ops.per_block_cast_to_fp8_transposed(w)",
        "deep_gemm_ops.per_block_cast_to_fp8_transposed(w.t())",
    ),
    "k_grouped_per_channel_cast_to_fp8": (
        "deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x, sizes)",
        "deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x.float(), sizes)",
    ),
    "k_grouped_per_channel_cast_to_fp8_k_major": (
        "deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(x, sizes)",
        'deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(x, sizes, layout="indices")',
    ),
    "transpose_fp8": ("deep_gemm_ops.transpose_fp8(a)", "deep_gemm_ops.transpose_fp8(x)"),
    "get_mn_major_tma_aligned_tensor": (
        "deep_gemm_ops.get_mn_major_tma_aligned_tensor(torch.ones(130, 5)).stride()",
        "deep_gemm_ops.get_mn_major_tma_aligned_tensor(torch.ones(5))",
    ),
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": (
        "deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(130, 5))",
        "deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(130, 5).int())",
    ),
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": (
        "deep_gemm_ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(3, 128), sizes * 8)",
        "deep_gemm_ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(3, 128), sizes.long())",
    ),
    "transform_sf_into_required_layout": (
        "deep_gemm_ops.transform_sf_into_required_layout(sfa, 64, 256, [1, 128])",
        "deep_gemm_ops.transform_sf_into_required_layout(sfa, 64, 512, [1, 128])",
    ),
    "expand_ue8m0": (
        "deep_gemm_ops.expand_ue8m0(torch.full((64, 1), 0x7F7F7F7F, dtype=torch.int32), k_sf=4)",
        "deep_gemm_ops.expand_ue8m0(torch.full((64, 1), 0x7F7F7F7F, dtype=torch.int32), k_sf=5)",
    ),
    "fp8_linear": ("fp8.fp8_linear(x, w)", "fp8.fp8_linear(x[:, :128], w)"),
    "fp8_linear_backward": (
        "torch.ops.deep_gemm.fp8_linear_backward(x[:, :128], x, w, torch.bfloat16, torch.float32)",
        "torch.ops.deep_gemm.fp8_linear_backward(x[:8, :128], x, w, torch.bfloat16, torch.float32)",
    ),
    "fp8_linear_backward_accumulate": (
        "torch.ops.deep_gemm.fp8_linear_backward_accumulate(x[:, :128], x, w, torch.zeros(128, 256), torch.bfloat16)",
        "torch.ops.deep_gemm.fp8_linear_backward_accumulate(x, x, w, torch.zeros(128, 256), torch.bfloat16)",
    ),
    "fp8_grouped_linear": ("fp8.fp8_grouped_linear(x, w3, ends)", "fp8.fp8_grouped_linear(x, w3, ends[:1])"),
    "fp8_swiglu_grouped_linear": (
        "fp8.fp8_swiglu_grouped_linear(x, w3[:, :, :128], ends, torch.rand(64))",
        "fp8.fp8_swiglu_grouped_linear(x, w3, ends)",
    ),
    "fp8_grouped_linear_backward": (
        "torch.ops.deep_gemm.fp8_grouped_linear_backward(x[:, :128], x, w3, ends, torch.bfloat16, torch.float32)",
        "torch.ops.deep_gemm.fp8_grouped_linear_backward(x, x, w3, ends, torch.bfloat16, torch.float32)",
    ),
    "fp8_grouped_linear_backward_accumulate": (
        "torch.ops.deep_gemm.fp8_grouped_linear_backward_accumulate(\n"
        "    x[:, :128], x, w3, ends, torch.zeros(2, 128, 256), torch.bfloat16\n"
        ")",
        "torch.ops.deep_gemm.fp8_grouped_linear_backward_accumulate(\n"
        "    x, x, w3, ends, torch.zeros(2, 128, 256), torch.bfloat16\n"
        ")",
    ),
}
