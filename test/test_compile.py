"""The operators under PyTorch's tracers: schemas, fakes, opcheck, torch.compile and torch.export, without a guard on any size."""
# ruff: noqa: E501  (schemas are printed as they are)

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import deep_gemm_ops

import mega_cases
import mqa_cases
from common import FP8, LAYOUTS, GemmCase, encode_scales, generator, same_bits
from fp4 import Fp4Case
from grouped import BF16Case, EinsumCase, HeadsCase, KGroupedCase, MaskedCase, MGroupedCase, small_cases

# (rows of each group, N, K)
SIZES_OF_GROUPS = [((130, 0, 70), 144, 272), ((5, 40, 3), 200, 400), ((64, 64), 272, 528), ((300, 2, 0, 7), 136, 144)]

Sample = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_recompilation() -> Iterator[None]:
    """Whatever is compiled here is compiled once: a second compilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def samples(device: str) -> list[Sample]:
    """Calls of every overload, over shapes that meet each branch."""
    ops = torch.ops.deep_gemm
    calls: list[Sample] = []
    for layout, (m, n, k), out_dtype in itertools.product(
        LAYOUTS, [(36, 150, 272), (1, 5, 16), (0, 8, 32), (4, 0, 48), (6, 7, 0)], ["bfloat16", "float32"]
    ):
        for c, out in [("", False), ("bias", False), ("full", True), ("", True)]:
            case = GemmCase(m, n, k, layout, c=c, out=out, out_dtype=out_dtype, device=device)
            arguments, keywords, _, _ = case.build()
            packet = getattr(ops, case.op)
            calls.append((packet.out if out else packet.default, tuple(arguments), keywords))
    for scales, recipe in itertools.product(["e8m0", "packed"], [(1, 1, 32), (128, 128, 128)]):
        arguments, keywords, _, _ = GemmCase(130, 140, 300, "nt", recipe, True, scales, device=device).build()
        calls.append((ops.fp8_gemm_nt.default, tuple(arguments), keywords))
    for layout, out in itertools.product(LAYOUTS, (False, True)):
        b = "fp4" if layout[1] == "t" else "fp8"
        fp4_case = Fp4Case(36, 150, 256, layout, (1, 1, 32), True, out=out, b=b, device=device)
        arguments, keywords, _, _ = fp4_case.build()
        packet = getattr(ops, fp4_case.op)
        calls.append((packet.out if out else packet.default, tuple(arguments), keywords))
    for case in small_cases(device):
        built = case.build()
        packet = getattr(ops, case.op)
        overload = packet.out if built.buffer is not None else packet.default
        calls.append((overload, tuple(built.arguments), built.keywords))

    for kind, (rows, cols) in itertools.product(
        ("per_token", "per_channel", "per_block"), [(512, 272), (33, 272), (1, 1), (130, 5), (0, 7), (7, 0)]
    ):
        packet = getattr(ops, f"{kind}_cast_to_fp8")
        x = torch.randn(rows, cols, generator=generator(0)).bfloat16().to(device)
        for options in ({}, {"gran_k": 32, "use_ue8m0": True}, {"use_packed_ue8m0": True}):
            calls.append((packet.default, (x,), options))
            values, sf = packet(x, **options)
            calls.append((packet.out, (x,), {**options, "out": values, "out_sf": sf}))

    for rows, cols in [(130, 272), (33, 144), (1, 2), (0, 8), (7, 0)]:
        x = torch.randn(rows, cols, generator=generator(0)).bfloat16().to(device)
        weights = torch.ones(rows, device=device)
        ks = torch.tensor([20, 0, 3], dtype=torch.int32, device=device)
        fused: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (ops.swiglu_cast_to_fp8, (x,), {"topk_weights": weights, "clamp": 2.0}),
            (ops.swiglu_cast_to_fp8, (x,), {"gran_k": 32, "use_packed_ue8m0": True}),
            (ops.per_token_cast_to_fp4, (x,), {}),
            (ops.per_token_cast_to_fp4, (x,), {"gran_k": 128, "use_packed_ue8m0": True}),
            (ops.k_grouped_per_channel_cast_to_fp8, (x, ks), {}),
            (ops.k_grouped_per_channel_cast_to_fp8_k_major, (x, ks), {"layout": "offsets", "use_ue8m0": True}),
        ]
        for packet in (
            ops.per_token_cast_to_fp8_with_transpose,
            ops.per_block_cast_to_fp8_with_transpose,
            ops.per_channel_cast_to_fp8_transposed,
            ops.per_block_cast_to_fp8_transposed,
        ):
            fused += [(packet, (x,), {"use_ue8m0": True}), (packet, (x,), {"use_packed_ue8m0": True})]
        for packet, arguments, options in fused:
            calls.append((packet.default, arguments, options))
            outs = dict(zip(("out", "out_sf", "out_t", "out_t_sf"), packet(*arguments, **options)))
            calls.append((packet.out, arguments, {**options, **outs}))

        if cols % 2 == 0:
            half = x[:, : cols // 2]
            for arguments in ((x, half), (x, half, weights)):
                calls.append((ops.swiglu_backward.default, arguments, {}))
                outs = dict(zip(("out", "out_weighted", "out_row_weights"), ops.swiglu_backward(*arguments)))
                calls.append((ops.swiglu_backward.out, arguments, outs))

    for shape in [(8, 7), (5, 7), (1, 1), (0, 3), (3, 0), (2, 5, 7)]:
        exponents = torch.randint(-5, 5, shape, generator=generator(0))
        powers = torch.pow(2.0, exponents.double()).float().to(device)
        for packet in (ops.get_mn_major_tma_aligned_tensor, ops.get_mn_major_tma_aligned_packed_ue8m0_tensor):
            calls.append((packet.default, (powers,), {}))
            calls.append((packet.out, (powers,), {"out": packet(powers)}))
        for kind in ("e8m0", "packed"):
            sf = encode_scales(exponents, kind, len(shape) - 1).to(device)
            calls.append((ops.expand_ue8m0.default, (sf,), {"k_sf": shape[-1]}))
            calls.append(
                (ops.expand_ue8m0.out, (sf,), {"k_sf": shape[-1], "out": ops.expand_ue8m0(sf, k_sf=shape[-1])})
            )
        groups = None if len(shape) == 2 else shape[0]
        for disable in (False, True):
            options = {"num_groups": groups, "disable_ue8m0_cast": disable}
            transform = ops.transform_sf_into_required_layout.default
            calls.append((transform, (powers, shape[-2], shape[-1] * 32, [1, 32]), options))
            calls.append((transform, (powers, shape[-2] * 128, shape[-1] * 128, [128, 128]), options))
        if len(shape) == 2:
            ks = torch.tensor([128, 0, 300], dtype=torch.int32, device=device)
            calls.append((ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor.default, (powers, ks), {}))

    for rows, cols in [(33, 20), (1, 1), (0, 5), (5, 0), (1, 8)]:
        x = torch.randint(0, 127, (rows, cols), generator=generator(0), dtype=torch.uint8).to(device).view(FP8)
        calls.append((ops.transpose_fp8.default, (x,), {}))
        calls.append((ops.transpose_fp8.out, (x,), {"out": torch.empty(cols, rows, dtype=FP8, device=device)}))

    for (m, n, k), splits in itertools.product(
        [(33, 24, 272), (1, 3, 8), (0, 4, 64), (5, 0, 64), (4, 5, 0)], [None, 3]
    ):
        a = torch.randn(m, k, generator=generator(0)).bfloat16().to(device)
        b = torch.randn(n, k, generator=generator(1)).to(device)
        lead = () if splits is None else (splits,)
        outs = {"out": torch.zeros(*lead, m, n, device=device), "out_sqr_sum": torch.zeros(*lead, m, device=device)}
        calls.append((ops.tf32_hc_prenorm_gemm.default, (a, b), {"num_splits": splits}))
        calls.append((ops.tf32_hc_prenorm_gemm.out, (a, b), {"num_splits": splits, **outs}))
    return calls + mqa_cases.samples(device) + mega_cases.samples(device)


def describe(sample: Sample) -> str:
    """One line that names the overload and its arguments."""
    op, arguments, keywords = sample

    def word(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}{list(x.stride())}" if isinstance(x, torch.Tensor) else repr(x)

    words = [word(x) for x in arguments] + [f"{name}={word(x)}" for name, x in keywords.items()]
    return f"torch.ops.{op}({', '.join(words)})"


def overloads() -> list[torch._ops.OpOverload]:
    """All of the library's; those that deep_gemm_ops.nn makes of them, where something imported it, have their own tests."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("deep_gemm::"))
    nn = sys.modules.get("deep_gemm_ops.nn._library")
    made = {schema.partition("(")[0] for schema in nn.schemas} if nn else set()
    names = [name for name in names if name.removeprefix("deep_gemm::") not in made]
    result = []
    for name in names:
        base, _, overload = name.removeprefix("deep_gemm::").partition(".")
        result.append(getattr(getattr(torch.ops.deep_gemm, base), overload or "default"))
    return result


def test_schemas() -> None:
    assert_expected_inline(
        "\n".join(str(op._schema) for op in overloads()),
        """\
deep_gemm::bf16_gemm_nn(Tensor a, Tensor b, *, Tensor? c=None, ScalarType out_dtype=15) -> Tensor
deep_gemm::bf16_gemm_nn.out(Tensor a, Tensor b, *, Tensor? c=None, Tensor(d!) out) -> ()
deep_gemm::bf16_gemm_nt(Tensor a, Tensor b, *, Tensor? c=None, ScalarType out_dtype=15) -> Tensor
deep_gemm::bf16_gemm_nt.out(Tensor a, Tensor b, *, Tensor? c=None, Tensor(d!) out) -> ()
deep_gemm::bf16_gemm_tn(Tensor a, Tensor b, *, Tensor? c=None, ScalarType out_dtype=15) -> Tensor
deep_gemm::bf16_gemm_tn.out(Tensor a, Tensor b, *, Tensor? c=None, Tensor(d!) out) -> ()
deep_gemm::bf16_gemm_tt(Tensor a, Tensor b, *, Tensor? c=None, ScalarType out_dtype=15) -> Tensor
deep_gemm::bf16_gemm_tt.out(Tensor a, Tensor b, *, Tensor? c=None, Tensor(d!) out) -> ()
deep_gemm::bf16_mega_moe(Tensor l1, Tensor l2, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000) -> Tensor
deep_gemm::bf16_mega_moe.out(Tensor l1, Tensor l2, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000, Tensor(d!) out) -> ()
deep_gemm::einsum(str expr, Tensor a, Tensor b, *, Tensor? c=None, ScalarType out_dtype=15) -> Tensor
deep_gemm::einsum.out(str expr, Tensor a, Tensor b, *, Tensor? c=None, Tensor(d!) out) -> ()
deep_gemm::expand_ue8m0(Tensor sf, *, SymInt k_sf) -> Tensor
deep_gemm::expand_ue8m0.out(Tensor sf, *, SymInt k_sf, Tensor(d!) out) -> ()
deep_gemm::fp8_einsum(str expr, Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_einsum.out(str expr, Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_gemm_nn(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_fp4_gemm_nn.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_gemm_nt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_fp4_gemm_nt.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_gemm_tn(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_fp4_gemm_tn.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_gemm_tt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_fp4_gemm_tt.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_mega_moe(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000) -> Tensor
deep_gemm::fp8_fp4_mega_moe.out(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_mqa_logits(Tensor q, Tensor? q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor cu_seq_len_k_start, Tensor cu_seq_len_k_end, *, bool clean_logits=True, SymInt max_seqlen_k=0, ScalarType logits_dtype=6) -> Tensor
deep_gemm::fp8_fp4_mqa_logits.out(Tensor q, Tensor? q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor cu_seq_len_k_start, Tensor cu_seq_len_k_end, *, bool clean_logits=True, SymInt max_seqlen_k=0, Tensor(d!) out) -> ()
deep_gemm::fp8_fp4_paged_mqa_logits(Tensor q, Tensor? q_sf, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, Tensor schedule_metadata, SymInt max_context_len, *, bool clean_logits=False, ScalarType logits_dtype=6, Tensor? indices=None) -> Tensor
deep_gemm::fp8_fp4_paged_mqa_logits.out(Tensor q, Tensor? q_sf, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, Tensor schedule_metadata, SymInt max_context_len, *, bool clean_logits=False, Tensor? indices=None, Tensor(d!) out) -> ()
deep_gemm::fp8_gemm_nn(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_gemm_nn.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_gemm_nt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_gemm_nt.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_gemm_nt_skip_head_mid(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int[] head_splits, *, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_gemm_nt_skip_head_mid.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int[] head_splits, *, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_gemm_tn(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_gemm_tn.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_gemm_tt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::fp8_gemm_tt.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, *, Tensor? c=None, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::fp8_mega_moe(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000) -> Tensor
deep_gemm::fp8_mega_moe.out(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor(a!) buffer, int[] buffer_ptrs, int rank, SymInt num_tokens, int num_max_tokens_per_rank, int num_experts, int num_topk, *, Tensor(b!)? cumulative_local_expert_recv_stats=None, float? activation_clamp=None, SymInt? expected_m=None, int timeout_ms=60000, Tensor(d!) out) -> ()
deep_gemm::fp8_mqa_logits(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor cu_seq_len_k_start, Tensor cu_seq_len_k_end, *, bool clean_logits=True, SymInt max_seqlen_k=0, ScalarType logits_dtype=6) -> Tensor
deep_gemm::fp8_mqa_logits.out(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor cu_seq_len_k_start, Tensor cu_seq_len_k_end, *, bool clean_logits=True, SymInt max_seqlen_k=0, Tensor(d!) out) -> ()
deep_gemm::fp8_paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, Tensor schedule_metadata, SymInt max_context_len, *, bool clean_logits=False, ScalarType logits_dtype=6, Tensor? indices=None) -> Tensor
deep_gemm::fp8_paged_mqa_logits.out(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table, Tensor schedule_metadata, SymInt max_context_len, *, bool clean_logits=False, Tensor? indices=None, Tensor(d!) out) -> ()
deep_gemm::get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, Tensor ks, *, int gran_k=128) -> Tensor
deep_gemm::get_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, *, bool round_up=False) -> Tensor
deep_gemm::get_mn_major_tma_aligned_packed_ue8m0_tensor.out(Tensor sf, *, bool round_up=False, Tensor(d!) out) -> ()
deep_gemm::get_mn_major_tma_aligned_tensor(Tensor sf) -> Tensor
deep_gemm::get_mn_major_tma_aligned_tensor.out(Tensor sf, *, Tensor(d!) out) -> ()
deep_gemm::get_paged_mqa_logits_metadata(Tensor context_lens, int block_kv, int num_sms, *, Tensor? indices=None) -> Tensor
deep_gemm::get_paged_mqa_logits_metadata.out(Tensor context_lens, int block_kv, int num_sms, *, Tensor? indices=None, Tensor(d!) out) -> ()
deep_gemm::k_grouped_bf16_gemm_tn_contiguous(Tensor a, Tensor b, Tensor ks, *, Tensor? c=None, ScalarType out_dtype=6, str layout="sizes") -> Tensor
deep_gemm::k_grouped_bf16_gemm_tn_contiguous.out(Tensor a, Tensor b, Tensor ks, *, Tensor? c=None, str layout="sizes", Tensor(d!) out) -> ()
deep_gemm::k_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, *, Tensor? c=None, ScalarType out_dtype=6, str layout="sizes") -> Tensor
deep_gemm::k_grouped_fp8_gemm_nt_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, *, Tensor? c=None, str layout="sizes", Tensor(d!) out) -> ()
deep_gemm::k_grouped_fp8_gemm_tn_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, *, Tensor? c=None, ScalarType out_dtype=6, str layout="sizes") -> Tensor
deep_gemm::k_grouped_fp8_gemm_tn_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, *, Tensor? c=None, str layout="sizes", Tensor(d!) out) -> ()
deep_gemm::k_grouped_per_channel_cast_to_fp8(Tensor x, Tensor ks, *, str layout="sizes", bool use_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::k_grouped_per_channel_cast_to_fp8.out(Tensor x, Tensor ks, *, str layout="sizes", bool use_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::k_grouped_per_channel_cast_to_fp8_k_major(Tensor x, Tensor ks, *, str layout="sizes", bool use_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::k_grouped_per_channel_cast_to_fp8_k_major.out(Tensor x, Tensor ks, *, str layout="sizes", bool use_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::m_grouped_bf16_gemm_nn_contiguous(Tensor a, Tensor b, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_bf16_gemm_nn_contiguous.out(Tensor a, Tensor b, Tensor grouped_layout, *, str layout="indices", SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_bf16_gemm_nt_contiguous(Tensor a, Tensor b, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_bf16_gemm_nt_contiguous.out(Tensor a, Tensor b, Tensor grouped_layout, *, str layout="indices", SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_bf16_gemm_nt_masked(Tensor a, Tensor b, Tensor masked_m, SymInt expected_m, *, ScalarType out_dtype=15) -> Tensor
deep_gemm::m_grouped_bf16_gemm_nt_masked.out(Tensor a, Tensor b, Tensor masked_m, SymInt expected_m, *, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_fp4_gemm_nn_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, int[]? recipe=None, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_fp8_fp4_gemm_nn_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", int[]? recipe=None, SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_fp4_gemm_nt_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, int[]? recipe=None, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_fp8_fp4_gemm_nt_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", int[]? recipe=None, SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_fp4_gemm_nt_masked(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, SymInt expected_m, *, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::m_grouped_fp8_fp4_gemm_nt_masked.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, SymInt expected_m, *, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_gemm_nn_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, int[]? recipe=None, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_fp8_gemm_nn_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", int[]? recipe=None, SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", ScalarType out_dtype=15, int[]? recipe=None, SymInt? expected_m=None) -> Tensor
deep_gemm::m_grouped_fp8_gemm_nt_contiguous.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor grouped_layout, *, str layout="indices", int[]? recipe=None, SymInt? expected_m=None, Tensor(d!) out) -> ()
deep_gemm::m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, SymInt expected_m, *, ScalarType out_dtype=15, int[]? recipe=None) -> Tensor
deep_gemm::m_grouped_fp8_gemm_nt_masked.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, SymInt expected_m, *, int[]? recipe=None, Tensor(d!) out) -> ()
deep_gemm::per_block_cast_to_fp8(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_block_cast_to_fp8.out(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_block_cast_to_fp8_transposed(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_block_cast_to_fp8_transposed.out(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_block_cast_to_fp8_with_transpose(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor, Tensor, Tensor)
deep_gemm::per_block_cast_to_fp8_with_transpose.out(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf, Tensor(f!) out_t, Tensor(g!) out_t_sf) -> ()
deep_gemm::per_channel_cast_to_fp8(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_channel_cast_to_fp8.out(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_channel_cast_to_fp8_transposed(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_channel_cast_to_fp8_transposed.out(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_token_cast_to_fp4(Tensor x, *, int gran_k=32, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_token_cast_to_fp4.out(Tensor x, *, int gran_k=32, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_token_cast_to_fp8(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::per_token_cast_to_fp8.out(Tensor x, *, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::per_token_cast_to_fp8_with_transpose(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor, Tensor, Tensor)
deep_gemm::per_token_cast_to_fp8_with_transpose.out(Tensor x, *, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf, Tensor(f!) out_t, Tensor(g!) out_t_sf) -> ()
deep_gemm::swiglu_backward(Tensor x, Tensor grad, Tensor? row_weights=None) -> (Tensor, Tensor, Tensor)
deep_gemm::swiglu_backward.out(Tensor x, Tensor grad, Tensor? row_weights=None, *, Tensor(d!) out, Tensor(e!) out_weighted, Tensor(f!) out_row_weights) -> ()
deep_gemm::swiglu_cast_to_fp8(Tensor x, *, Tensor? topk_weights=None, float? clamp=None, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False) -> (Tensor, Tensor)
deep_gemm::swiglu_cast_to_fp8.out(Tensor x, *, Tensor? topk_weights=None, float? clamp=None, int gran_k=128, bool use_ue8m0=False, bool use_packed_ue8m0=False, Tensor(d!) out, Tensor(e!) out_sf) -> ()
deep_gemm::tf32_hc_prenorm_gemm(Tensor a, Tensor b, *, int? num_splits=None) -> (Tensor d, Tensor sqr_sum)
deep_gemm::tf32_hc_prenorm_gemm.out(Tensor a, Tensor b, *, int? num_splits=None, Tensor(d!) out, Tensor(e!) out_sqr_sum) -> ()
deep_gemm::transform_sf_into_required_layout(Tensor sf, SymInt mn, SymInt k, int[] recipe, *, SymInt? num_groups=None, bool? is_sfa=None, bool disable_ue8m0_cast=False, bool round_up=False) -> Tensor
deep_gemm::transpose_fp8(Tensor x) -> Tensor
deep_gemm::transpose_fp8.out(Tensor x, *, Tensor(d!) out) -> ()""",
    )


def test_samples_cover_every_overload() -> None:
    assert {op for op, _, _ in samples("cpu")} == set(overloads())


def layout_of(result: Any) -> list[tuple[Any, ...]]:
    tensors = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    return [(tuple(x.shape), x.stride(), x.dtype, x.device, x.storage_offset()) for x in tensors]


def test_fakes_equal_the_real_results(device: str) -> None:
    """Shapes, dtypes, devices and strides, over every overload."""
    for sample in samples(device):
        op, arguments, keywords = sample
        with FakeTensorMode() as mode:
            fake = lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: B023, E731
            expected = layout_of(op(*map(fake, arguments), **{name: fake(x) for name, x in keywords.items()}))
        assert layout_of(op(*arguments, **keywords)) == expected, describe(sample)


def test_meta_tensors(device: str) -> None:
    for sample in samples(device):
        op, arguments, keywords = sample
        meta = lambda x: (  # noqa: E731
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x
        )
        actual = layout_of(op(*map(meta, arguments), **{name: meta(x) for name, x in keywords.items()}))
        expected = layout_of(op(*arguments, **keywords))
        if op is torch.ops.deep_gemm.transform_sf_into_required_layout.default and device == "cuda":
            continue  # a meta tensor names no architecture
        assert [x[:3] for x in actual] == [x[:3] for x in expected], describe(sample)


def test_opcheck(device: str) -> None:
    """test_schema compares tensors before and after the call, which PyTorch cannot do for FP8: it is left out there, and
    test_gemm.test_inputs_are_left_alone and the NaN-filled surroundings of every ``out`` look for the same mistakes."""
    done: dict[torch._ops.OpOverload, int] = {}
    for sample in samples(device):
        op, arguments, keywords = sample
        tensors = [x for x in [*arguments, *keywords.values()] if isinstance(x, torch.Tensor)]
        # opcheck clones its inputs, and clone() closes the gaps between columns that scales have where MN % 4 != 0.
        outs = [keywords[name] for name in ("out", "out_sf", "out_t", "out_t_sf") if name in keywords]
        product = any(word in str(op) for word in ("_gemm_", "einsum"))  # they write to any strides
        padded = not product and any(x.stride() != x.clone().stride() for x in outs)
        done[op] = done.get(op, 0) + (not padded)
        if padded or done[op] > 3:
            continue
        tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        has_fp8 = any(x.dtype in (FP8, torch.float8_e8m0fnu) for x in tensors)
        if not has_fp8 and "cast_to_fp8" not in str(op):
            tests.append("test_schema")
        try:
            torch.library.opcheck(op, arguments, keywords, test_utils=tests)
        except Exception as error:
            raise AssertionError(describe(sample)) from error
    assert {op for op, count in done.items() if count} == set(overloads())


def test_fakes_set_no_guard() -> None:
    """Traced with every size symbolic, we compare no size: not at trace time, not by a later guard.

    PyTorch itself asks of every result whether it is contiguous, which for a size or stride rounded up leaves a guard on whether
    there is more than one group of rows.
    """
    for sample in samples("cpu"):
        op, arguments, keywords = sample
        tensors = [x for x in [*arguments, *keywords.values()] if isinstance(x, torch.Tensor)]
        if any(size < 2 for x in tensors for size in x.shape):
            continue  # sizes 0 and 1 are never symbolic

        def call(*inputs: torch.Tensor, op: Any = op, arguments: Any = arguments, keywords: Any = keywords) -> Any:
            rest = iter(inputs)
            positional = [next(rest) if isinstance(x, torch.Tensor) else x for x in arguments]
            return op(*positional, **{n: next(rest) if isinstance(x, torch.Tensor) else x for n, x in keywords.items()})

        graph = make_fx(call, tracing_mode="symbolic")(*tensors)
        ours = [guard for guard in graph.shape_env.guards if "_prims_common/" not in str(guard.sloc)]
        assert ours == [], describe(sample)


def test_sizes_that_only_the_run_knows() -> None:
    """Data-dependent sizes, as after nonzero(), pass through."""

    def route(x: torch.Tensor, keep: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> torch.Tensor:
        rows = keep.nonzero().flatten()
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x[rows])
        return deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb)

    x = torch.randn(20, 256, generator=generator(0)).bfloat16()
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(torch.randn(130, 256, generator=generator(1)).bfloat16())
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (20, 3, 1, 0):
            keep = torch.arange(20) < count
            assert same_bits(compiled(x, keep, b, sfb), route(x, keep, b, sfb))


def linear(x: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
    return torch.relu(deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb, c=bias) * 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_rows(device: str, backend: str) -> None:
    x = torch.randn(300, 272, generator=generator(0)).bfloat16().to(device)
    w = torch.randn(150, 272, generator=generator(1)).bfloat16().to(device)
    bias = torch.randn(150, generator=generator(2)).bfloat16().to(device)
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w)
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=backend)
    for m in (7, 16, 33, 128, 129, 300):
        assert same_bits(compiled(x[:m], b, sfb, bias), linear(x[:m], b, sfb, bias)), m


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_with_every_size_dynamic(device: str, layout: str) -> None:
    def product(a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> torch.Tensor:
        return getattr(torch.ops.deep_gemm, f"fp8_gemm_{layout}")(a, sfa, b, sfb, out_dtype=torch.float32)

    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, n, k in [(33, 150, 272), (64, 400, 544), (200, 300, 1040), (130, 257, 384)]:
        arguments, _, _, _ = GemmCase(m, n, k, layout, (1, 128, 128), device=device).build()
        assert same_bits(compiled(*arguments), product(*arguments)), (m, n, k)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_experts_with_dynamic_rows(device: str, backend: str) -> None:
    """Forward and weight gradient of experts, whose sizes only the device knows: one graph, compiled once."""
    groups, n, k = 4, 48, 272
    w = torch.randn(groups, n, k, generator=generator(1)).bfloat16().to(device)
    pairs = [deep_gemm_ops.per_block_cast_to_fp8(w[group]) for group in range(groups)]
    b, sfb = torch.stack([values for values, _ in pairs]), torch.stack([scales for _, scales in pairs])

    def experts(x: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
        y = deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous(
            a, sfa, b, sfb, ends, layout="offsets", expected_m=x.shape[0] // groups
        )
        gradient = deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(y, x, ends, layout="offsets")
        return torch.relu(y), gradient

    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=backend)
    for counts in [(10, 0, 33, 7), (1, 1, 1, 2), (0, 300, 0, 0), (64, 64, 64, 64)]:
        ends = torch.tensor(counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        x = torch.randn(sum(counts), k, generator=generator(0)).bfloat16().to(device)
        for actual, expected in zip(compiled(x, ends), experts(x, ends)):
            assert same_bits(actual, expected), counts


def test_compile_every_family_with_every_size_dynamic(device: str) -> None:
    """Each compiled once, for tensors of any sizes."""
    families: list[list[Any]] = [
        [MGroupedCase(sizes, n, k, order, kind, "offsets", device=device) for sizes, n, k in SIZES_OF_GROUPS]
        for order, kind in itertools.product(("nt", "nn"), ("fp8", "bf16"))
    ]
    families += [
        [MaskedCase(sizes, 300, n, k, kind, out=True, expected_m=n, device=device) for sizes, n, k in SIZES_OF_GROUPS]
        for kind in ("fp8", "bf16")
    ]
    families += [
        [KGroupedCase(sizes, k, n, type=kind, c="full", device=device) for sizes, n, k in SIZES_OF_GROUPS]
        for kind in ("fp8", "bf16")
    ]
    families.append([KGroupedCase((128 * i, 256), 40 + i, 72 + i, "nt", device=device) for i in range(2, 5)])
    for expr in ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr"):
        sizes = [(130 + 8 * i, 144 * i, i, 272 + 16 * i) for i in range(2, 5)]
        families.append([EinsumCase(expr, size, "fp8", device=device) for size in sizes])
    families.append([EinsumCase("bmk,bnk->mn", (i, 72 * i, 40 + i, 48 + i), device=device) for i in range(2, 5)])
    families.append([BF16Case(40 * i, 72 * i, 64 * i, "tn", c="bias", device=device) for i in range(2, 5)])
    families.append([HeadsCase(40 + i, i + 1, (16, 8, 24), 144 + 16 * i, device=device) for i in range(3, 6)])
    for cases in families:
        torch._dynamo.reset()
        overloads = getattr(torch.ops.deep_gemm, cases[0].op)
        op = overloads.out if cases[0].build().buffer is not None else overloads.default
        compiled = torch.compile(
            lambda *arguments, op=op, **keywords: op(*arguments, **keywords),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for case in cases:
            results = []
            for function in (op, compiled):
                built = case.build()
                if built.buffer is not None:  # Dynamo wants a dense one
                    built.keywords["out"] = torch.zeros_like(built.keywords["out"]).contiguous()
                # Sizes that happen to be equal in the first call must not have to be equal in the others.
                with torch.fx.experimental._config.patch(use_duck_shape=False):
                    result = function(*built.arguments, **built.keywords)
                results.append(built.keywords["out"] if result is None else result)
            assert same_bits(*results), case.repro


def test_export_experts_with_dynamic_rows(device: str) -> None:
    class Experts(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w, ends, layout="offsets")

    w = torch.randn(3, 40, 64, generator=generator(1)).bfloat16().to(device)
    x = torch.randn(100, 64, generator=generator(0)).bfloat16().to(device)
    ends = torch.tensor([30, 30, 50], dtype=torch.int32, device=device)
    program = export(Experts(), (x[:50], w, ends), dynamic_shapes=({0: Dim("tokens")}, None, None))
    for counts in [(2, 0, 3), (100, 0, 0), (0, 40, 40)]:
        ends = torch.tensor(counts, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        rows = x[: sum(counts)]
        assert same_bits(program.module()(rows, w, ends), Experts()(rows, w, ends))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "deep_gemm" in target] == [
        "deep_gemm.m_grouped_bf16_gemm_nt_contiguous.default"
    ]


@pytest.mark.parametrize("kind", ["per_token", "per_channel", "per_block"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_keeps_the_strides_of_scales(device: str, kind: str, backend: str) -> None:
    function = getattr(deep_gemm_ops, f"{kind}_cast_to_fp8")

    def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return function(x * 2)

    compiled = torch.compile(cast, fullgraph=True, dynamic=True, backend=backend)
    # Scales that leave the graph make PyTorch ask whether they are dense, that is, whether MN % 4 == 0; inside it does not.
    for rows, cols in [(133, 274), (170, 402), (301, 642)]:
        x = torch.randn(rows, cols, generator=generator(0)).bfloat16().to(device)
        for actual, expected in zip(compiled(x), cast(x)):
            assert same_bits(actual, expected)
            assert actual.stride() == expected.stride()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_the_out_form(device: str, backend: str) -> None:
    """Functionalisation accepts ``.out -> ()``, also where ``c`` is ``out`` itself."""

    def accumulate(x: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, total: torch.Tensor) -> None:
        a = torch.empty_like(x, dtype=FP8)
        sfa = torch.empty_strided((x.shape[0], 3), (1, (x.shape[0] + 3) // 4 * 4), dtype=torch.float32, device=x.device)
        deep_gemm_ops.per_token_cast_to_fp8(x, out=(a, sfa))
        deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb, c=total, out=total)

    x = torch.randn(100, 272, generator=generator(0)).bfloat16().to(device)
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(torch.randn(150, 272, generator=generator(1)).bfloat16().to(device))
    compiled = torch.compile(accumulate, fullgraph=True, dynamic=True, backend=backend)
    for m in (9, 33, 100):
        start = torch.randn(m, 150, generator=generator(2)).to(device)
        actual, expected = start.clone(), start.clone()
        compiled(x[:m], b, sfb, actual)
        accumulate(x[:m], b, sfb, expected)
        assert same_bits(actual, expected)
        assert not same_bits(actual, start)


class Linear(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        weight = torch.randn(150, 272, generator=generator(1)).bfloat16().to(device)
        values, scales = deep_gemm_ops.per_block_cast_to_fp8(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
        return deep_gemm_ops.fp8_gemm_nt(a, sfa, self.weight, self.scales)


def test_export_with_dynamic_rows(device: str) -> None:
    model = Linear(device)
    x = torch.randn(200, 272, generator=generator(0)).bfloat16().to(device)
    program = export(model, (x[:20],), dynamic_shapes=({0: Dim("tokens")},))
    for m in (2, 20, 33, 200):
        assert same_bits(program.module()(x[:m]), model(x[:m]))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert_expected_inline(
        "\n".join(target for target in targets if "deep_gemm" in target),
        """\
deep_gemm.per_token_cast_to_fp8.default
deep_gemm.fp8_gemm_nt.default""",
    )


def test_export_weight_gradient_with_dynamic_tokens(device: str) -> None:
    """K is the dynamic size here, and the scales' rows follow it. PyTorch wants to know whether they are one or more."""

    class WeightGradient(torch.nn.Module):
        def forward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            a, sfa = deep_gemm_ops.per_channel_cast_to_fp8(grad)
            b, sfb = deep_gemm_ops.per_channel_cast_to_fp8(x)
            return deep_gemm_ops.fp8_gemm_tn(a, sfa, b, sfb, out_dtype=torch.float32)

    model = WeightGradient()
    grad = torch.randn(300, 48, generator=generator(0)).bfloat16().to(device)
    x = torch.randn(300, 80, generator=generator(1)).bfloat16().to(device)
    tokens = Dim("tokens", min=129)
    program = export(model, (grad[:150], x[:150]), dynamic_shapes=({0: tokens}, {0: tokens}))
    for k in (129, 150, 256, 300):
        assert same_bits(program.module()(grad[:k], x[:k]), model(grad[:k], x[:k]))


def test_export_with_independent_scales(device: str) -> None:
    """Scales that come from outside keep their own dynamic sizes: nothing ties them at trace time."""

    class Product(torch.nn.Module):
        def forward(self, a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> torch.Tensor:
            return torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)

    arguments, _, _, _ = GemmCase(33, 150, 272, device=device).build()
    shapes = ({0: Dim("m")}, {0: Dim("m_of_scales")}, {0: Dim("n")}, {0: Dim("n_blocks")})
    program = export(Product(), tuple(arguments), dynamic_shapes=shapes)
    for m, n in [(33, 150), (70, 300), (2, 1000)]:
        arguments, _, _, _ = GemmCase(m, n, 272, device=device).build()
        assert same_bits(program.module()(*arguments), Product()(*arguments))


def test_wrong_sizes_while_tracing(device: str) -> None:
    """Static sizes are refused at trace time; dynamic ones at the latest when the operator runs."""
    arguments, _, _, _ = GemmCase(33, 150, 272, device=device).build()
    a, sfa, b, sfb = arguments
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(torch.ops.deep_gemm.fp8_gemm_nt, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with pytest.raises(Exception, match=r"fp8_gemm_nt: sfb has shape \[1, 3\], expected \[N or ceil"):
            compiled(a, sfa, b, sfb[:1])
    compiled = torch.compile(
        lambda a, sfa, b, sfb: torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    compiled(a, sfa, b, sfb)
    with (
        torch._dynamo.config.patch(error_on_recompile=False),
        pytest.raises(Exception, match=r"fp8_gemm_nt: sfa has shape \[31, 3\], expected \[M or ceil"),
    ):
        compiled(a, sfa[:31], b, sfb)


def gradient_calls(device: str) -> list[tuple[str, Callable[[], object]]]:
    arguments, _, _, _ = GemmCase(33, 150, 272, out_dtype="float32", device=device).build()
    c = torch.zeros(150, device=device, requires_grad=True)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    sf = torch.ones(4, 4, device=device, requires_grad=True)
    return [
        ("c", lambda: deep_gemm_ops.fp8_gemm_nt(*arguments, c=c, out_dtype=torch.float32)),
        ("x", lambda: deep_gemm_ops.per_token_cast_to_fp8(x)),
        ("sf", lambda: deep_gemm_ops.get_mn_major_tma_aligned_tensor(sf)),
    ]


def test_gradients_are_refused_alike(device: str) -> None:
    """The public functions have no derivative and say so, eagerly and while compiling, instead of dropping gradients."""
    for arg, call in gradient_calls(device):
        match = rf"{arg} has requires_grad True, expected False \(not differentiable"
        with pytest.raises(RuntimeError, match=match):
            call()
        with pytest.raises(Exception, match=match):
            torch.compile(call, fullgraph=True, backend="aot_eager")()
        torch._dynamo.reset()
        with torch.no_grad():
            eager = call()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
        for x, y in zip(
            eager if isinstance(eager, tuple) else [eager], compiled if isinstance(compiled, tuple) else [compiled]
        ):
            assert same_bits(x, y)
            assert not x.requires_grad
            assert not y.requires_grad


def test_raw_operators_warn_in_backward(device: str) -> None:
    """Below the public functions PyTorch's own rule holds: no gradient, and a warning that says so."""
    x = torch.randn(4, 128, device=device, requires_grad=True)

    def scales(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.deep_gemm.per_token_cast_to_fp8(x)[1]

    for function in (scales, torch.compile(scales, fullgraph=True, backend="aot_eager")):
        with pytest.warns(UserWarning, match="deep_gemm::per_token_cast_to_fp8: an autograd kernel was not registered"):
            function(x).sum().backward()
        assert x.grad is None
