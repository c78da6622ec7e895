"""``deep_gemm_ops.compat``: every caller's form of call, unmodified, and that names tell the truth."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import compat, reference
from deep_gemm_ops.compat import _names

import mqa_cases
from common import ROOT, assert_close, error_bar, generator, same_bits

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]

ops = torch.ops.deep_gemm


@pytest.fixture
def deep_gemm() -> Iterator[ModuleType]:
    """The module as callers get it."""
    compat.install()
    yield importlib.import_module("deep_gemm")
    compat.uninstall()


def normal(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(device)


def tokens(m: int, k: int, device: str, seed: int = 0) -> Pair:
    return ops.per_token_cast_to_fp8(normal(m, k, seed=seed, device=device))


def weights(n: int, k: int, device: str, seed: int = 1) -> Pair:
    return ops.per_block_cast_to_fp8(normal(n, k, seed=seed, device=device))


def expert_weights(groups: int, n: int, k: int, device: str) -> Pair:
    pairs = [weights(n, k, device, seed) for seed in range(groups)]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def empty(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Dense


def test_vllm_dense(deep_gemm: ModuleType, device: str) -> None:
    """Probes with getattr, passes disable_ue8m0_cast always."""
    gemm = getattr(deep_gemm, "fp8_gemm_nt", None)
    a, b, d = tokens(33, 256, device), weights(128, 256, device), empty(33, 128, device=device)
    assert gemm(a, b, d, disable_ue8m0_cast=True) is None
    assert same_bits(d, ops.fp8_gemm_nt(*a, *b))


def test_sglang_dense(deep_gemm: ModuleType, device: str) -> None:
    a, b, d = tokens(33, 256, device), weights(128, 256, device), empty(33, 128, device=device)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert same_bits(d, ops.fp8_gemm_nt(*a, *b))
    x, y, d = normal(9, 64, seed=0, device=device), normal(40, 64, seed=1, device=device), empty(9, 40, device=device)
    deep_gemm.bf16_gemm_nt(x, y, d)
    assert same_bits(d, ops.bf16_gemm_nt(x, y))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_dense_layouts_accumulation_and_recipes(deep_gemm: ModuleType, device: str, layout: str) -> None:
    (a, sfa), (b, sfb) = tokens(48, 256, device), tokens(32, 256, device, seed=1)
    expected = ops.fp8_gemm_nt(a, sfa, b, sfb, recipe=[1, 1, 128], out_dtype=torch.float32)
    if layout[0] == "t":
        a, sfa = a.t().contiguous(), sfa.t()
    if layout[1] == "n":
        b, sfb = b.t().contiguous(), sfb.t()
    for prefix in ("fp8_gemm", "fp8_fp4_gemm"):
        gemm = getattr(deep_gemm, f"{prefix}_{layout}")
        for recipe in ({"recipe": (1, 1, 128)}, {"recipe_a": (1, 128), "recipe_b": (1, 128)}):
            d = torch.ones(48, 32, device=device)
            gemm((a, sfa), (b, sfb), d, c=d, compiled_dims="", **recipe)
            assert_close(d, expected.double() + 1, tol=error_bar(torch.float32))
    x, y = normal(24, 40, seed=0, device=device), normal(16, 40, seed=1, device=device)
    exact = x.double().cpu() @ y.double().cpu().t()
    x, y = x.t().contiguous() if layout[0] == "t" else x, y.t().contiguous() if layout[1] == "n" else y
    for prefix in ("bf16_gemm", "cublaslt_gemm"):
        d = empty(24, 16, device=device)
        getattr(deep_gemm, f"{prefix}_{layout}")(x, y, d)
        assert_close(d, exact, tol=error_bar(torch.bfloat16))
        d = torch.ones(24, 16, device=device)
        getattr(deep_gemm, f"{prefix}_{layout}")(x, y, d, d)
        assert_close(d, exact + 1, tol=error_bar(torch.float32, "bf16"))


def test_transformers_dense_with_packed_scales(deep_gemm: ModuleType, device: str) -> None:
    """Packed UE8M0 activations and weights with an explicit recipe."""
    x, w = normal(20, 256, seed=0, device=device), normal(64, 256, seed=1, device=device)
    qx, sx = deep_gemm.utils.per_token_cast_to_fp8(x, use_ue8m0=True, gran_k=128, use_packed_ue8m0=True)
    qw, sw = deep_gemm.utils.per_token_cast_to_fp8(w, use_ue8m0=True, gran_k=128, use_packed_ue8m0=True)
    d = empty(20, 64, device=device)
    deep_gemm.fp8_fp4_gemm_nt((qx, sx), (qw, sw), d, recipe=(1, 1, 128))
    assert same_bits(d, ops.fp8_gemm_nt(qx, sx, qw, sw, recipe=[1, 1, 128]))
    again = empty(20, 64, device=device)
    deep_gemm.fp8_fp4_gemm_nt((qx, sx), (qw, sw), again)  # 128 is the default granularity of packed scales
    assert same_bits(again, d)


def test_flat_form_returns_its_result(deep_gemm: ModuleType, device: str) -> None:
    a, b = tokens(33, 256, device), weights(128, 256, device)
    expected = ops.fp8_gemm_nt(*a, *b)
    assert same_bits(deep_gemm.fp8_gemm_nt(a[0], a[1], b[0], b[1]), expected)
    out = empty(33, 128, device=device)
    assert deep_gemm.fp8_gemm_nt(*a, *b, out=out) is out
    assert same_bits(out, expected)
    assert deep_gemm.fp8_gemm_nt(*a, *b, out_dtype=torch.float32).dtype == torch.float32


def test_skip_head_mid(deep_gemm: ModuleType, device: str) -> None:
    a, b = tokens(20, 256, device), weights(256, 256, device)
    d = torch.zeros(20, 2 * (96 + 64 + 32), dtype=torch.bfloat16, device=device)
    deep_gemm.fp8_gemm_nt_skip_head_mid(a, b, d, (96, 64, 32), disable_ue8m0_cast=True)
    assert same_bits(d, ops.fp8_gemm_nt_skip_head_mid(*a, *b, [96, 64, 32]))


def test_first_generation_dense(deep_gemm: ModuleType, device: str) -> None:
    a, b, d = tokens(33, 256, device), weights(128, 256, device), empty(33, 128, device=device)
    a = (a[0], deep_gemm.get_col_major_tma_aligned_tensor(a[1]))
    deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, d)
    assert same_bits(d, ops.fp8_gemm_nt(*a, *b))

    a, b = tokens(40, 256, device), tokens(64, 256, device, seed=1)
    expected = ops.fp8_gemm_nt(*a, *b, recipe=[1, 1, 128], out_dtype=torch.float32).double() + 2
    for sfa, sfb in [(a[1], b[1]), (a[1].t().contiguous(), b[1].t().contiguous())]:
        total = torch.full((40, 64), 2.0, device=device)
        deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt((a[0], sfa), (b[0], sfb), total)
        assert_close(total, expected, tol=error_bar(torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Grouped


def indices(device: str) -> Tensor:
    layout = torch.full((384,), -1, dtype=torch.int32, device=device)
    layout[:100], layout[128:250], layout[256:257] = 1, 0, 2
    return layout


def test_grouped_contiguous(deep_gemm: ModuleType, device: str) -> None:
    """vLLM, SGLang and torchao: the same product with their own keywords."""
    a, b, layout = tokens(384, 256, device), expert_weights(3, 128, 256, device), indices(device)
    rows = layout >= 0
    expected = ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, layout)[rows]
    calls = [
        (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, {"disable_ue8m0_cast": True}),
        (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, {}),
        (
            deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous,
            {"recipe_a": (1, 128), "recipe_b": (128, 128), "disable_ue8m0_cast": True},
        ),
        (deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous, {}),
    ]
    for call, keywords in calls:
        d = empty(384, 128, device=device)
        call(a, b, d, layout, **keywords)
        assert same_bits(d[rows], expected)
    d = empty(384, 128, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices=layout)
    assert same_bits(d[rows], expected)
    with pytest.raises(TypeError, match="expected grouped_layout, or m_indices in its place"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d)

    d = empty(384, 128, device=device)
    transposed = (b[0].transpose(1, 2).contiguous(), b[1].transpose(1, 2))
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, transposed, d, layout)
    assert same_bits(d[rows], expected)


def test_grouped_psum(deep_gemm: ModuleType, device: str) -> None:
    """Rows between groups become zero unless that is not asked for."""
    a, b = tokens(384, 256, device), expert_weights(3, 128, 256, device)
    ends = torch.tensor([100, 250, 257], dtype=torch.int32, device=device)
    expected = ops.m_grouped_fp8_gemm_nt_contiguous(*a, *b, ends, layout="psum")
    for zero in (True, False):
        d = empty(384, 128, device=device)
        options = {"use_psum_layout": True, "ensure_zero_padding": zero, "expected_m_for_psum_layout": 100}
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, **options)
        assert same_bits(d[128:250], expected[128:250])
        assert bool((d[100:128] == 0).all()) == zero


def test_grouped_masked(deep_gemm: ModuleType, device: str) -> None:
    b = expert_weights(3, 128, 256, device)
    pairs = [tokens(40, 256, device, seed) for seed in range(3)]
    a = (torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))
    masked_m = torch.tensor([40, 0, 7], dtype=torch.int32, device=device)
    expected = ops.m_grouped_fp8_gemm_nt_masked(*a, *b, masked_m, 16)
    for name, keywords in [
        ("fp8_m_grouped_gemm_nt_masked", {"disable_ue8m0_cast": True}),  # vLLM
        ("fp8_m_grouped_gemm_nt_masked", {"recipe_a": (1, 128), "recipe_b": (128, 128)}),  # SGLang
        ("m_grouped_fp8_gemm_nt_masked", {"max_block_n": 256, "enable_overlap": False, "signal": None}),
        ("m_grouped_fp8_fp4_gemm_nt_masked", {"compiled_dims": "nk"}),
        ("m_grouped_gemm_fp8_fp8_bf16_nt_masked", {}),
    ]:
        d = empty(3, 40, 128, device=device)
        getattr(deep_gemm, name)(a, b, d, masked_m, 16, **keywords)
        for group, count in enumerate([40, 0, 7]):
            assert same_bits(d[group, :count], expected[group, :count])
            assert bool(d[group, count:].isnan().all())
    with pytest.raises(RuntimeError, match="enable_overlap has value True, expected False"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, 16, enable_overlap=True)


def test_fp4_weights(deep_gemm: ModuleType, device: str) -> None:
    """Activations with a scale per 128 of K, FP4 weights with one per 32, packed; dense and of experts."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randint(256, (3, 64, 128), generator=random, dtype=torch.uint8).view(torch.int8).to(device)
    words = torch.randint(0x78, 0x7C, (3, 64, 2 * 4), generator=random).to(torch.uint8).view(torch.int32).to(device)
    a, layout = tokens(384, 256, device), indices(device)
    recipes = {"recipe_a": (1, 128), "recipe_b": (1, 32)}
    d, expected = empty(384, 64, device=device), empty(384, 64, device=device)
    deep_gemm.fp8_fp4_gemm_nt(a, (weights[0], words[0]), d, **recipes)
    ops.fp8_fp4_gemm_nt.out(*a, weights[0], words[0], recipe=[1, 1, 128, 32], out=expected)
    assert same_bits(d, expected)
    with pytest.raises(RuntimeError, match="recipe_a, recipe_b have gran_k 128 and 32, expected the same"):
        deep_gemm.fp8_fp4_gemm_nt(a, a, empty(384, 384, device=device), **recipes)
    rows = layout >= 0
    expected = ops.m_grouped_fp8_fp4_gemm_nt_contiguous(*a, weights, words, layout, recipe=[1, 1, 128, 32])
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, (weights, words), d, layout, **recipes)
    assert same_bits(d[rows], expected[rows])
    masked_m = torch.tensor([5, 128, 0], dtype=torch.int32, device=device)
    a = (a[0].view(3, 128, 256), a[1].reshape(3, 128, 2))
    d = empty(3, 128, 64, device=device)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(a, (weights, words), d, masked_m, 64, **recipes)
    expected = ops.m_grouped_fp8_fp4_gemm_nt_masked(*a, weights, words, masked_m, 64, recipe=[1, 1, 128, 32])
    assert all(same_bits(d[g, :count], expected[g, :count]) for g, count in enumerate([5, 128, 0]))


def test_grouped_bf16(deep_gemm: ModuleType, device: str) -> None:
    a, b, layout = normal(384, 64, seed=0, device=device), normal(3, 48, 64, seed=1, device=device), indices(device)
    rows = layout >= 0
    expected = ops.m_grouped_bf16_gemm_nt_contiguous(a, b, layout)[rows]
    d = empty(384, 48, device=device)
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, d, layout)
    assert same_bits(d[rows], expected)
    d = empty(384, 48, device=device)
    deep_gemm.m_grouped_bf16_gemm_nn_contiguous(a, b.transpose(1, 2).contiguous(), d, layout)
    assert same_bits(d[rows], expected)
    masked_m = torch.tensor([5, 128, 0], dtype=torch.int32, device=device)
    a = a.view(3, 128, 64)
    for name in ("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked"):
        d = empty(3, 128, 48, device=device)
        getattr(deep_gemm, name)(a, b, d, masked_m, 64)
        assert same_bits(d[1], ops.m_grouped_bf16_gemm_nt_masked(a, b, masked_m, 64)[1])
        assert bool(d[2].isnan().all())


def test_k_grouped(deep_gemm: ModuleType, device: str) -> None:
    """Training: rows of both operands by group, sizes as list and as tensor, accumulated into ``d``."""
    sizes = [256, 0, 128]
    (a, sfa), (b, sfb) = (
        ops.per_channel_cast_to_fp8(normal(384, 64, seed=0, device=device)),
        ops.per_channel_cast_to_fp8(normal(384, 96, seed=1, device=device)),
    )
    ks = torch.tensor(sizes, dtype=torch.int32, device=device)
    expected = ops.k_grouped_fp8_gemm_tn_contiguous(a, sfa, b, sfb, ks).double() + 1
    calls = [
        lambda d: deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a, sfa), (b, sfb), d, sizes, ks, c=d),
        lambda d: deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a, sfa), (b, sfb), d, ks=sizes, ks_tensor=ks, c=d),
        lambda d: deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a, sfa.t()), (b, sfb.t()), d, ks_cpu=sizes, c=d),
        lambda d: deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a, sfa), (b, sfb), d, None, ks, d, (1, 1, 128), "mn"),
    ]

    def flat(x: Tensor) -> Tensor:
        parts = x.view(torch.uint8).split(sizes)
        return torch.cat([part.t().reshape(-1) for part in parts]).view(x.dtype)

    flat_a, flat_b = flat(a), flat(b)
    calls += [
        # torchao: flattened operands, scales [MN, rows], the sizes as list and tensor, a separate c
        lambda d: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (flat_a, sfa.t()), (flat_b, sfb.t()), d, sizes, ks, torch.ones_like(d), recipe=(1, 1, 128)
        ),
        lambda d: deep_gemm.k_grouped_wgrad_gemm_fp8_fp8_fp32_nt((flat_a, sfa), (flat_b, sfb), d, sizes),
    ]
    for call in calls:
        d = torch.ones(3, 64, 96, device=device)
        call(d)
        assert_close(d, expected, tol=error_bar(torch.float32))
    with pytest.raises(TypeError, match="expected grouped_layout, or ks_tensor or ks in its place"):
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous((a, sfa), (b, sfb), d)

    x, y = normal(384, 64, seed=0, device=device), normal(384, 96, seed=1, device=device)
    d = torch.zeros(3, 64, 96, device=device)
    deep_gemm.k_grouped_bf16_gemm_tn_contiguous(x, y, d, sizes, ks, c=d)
    assert same_bits(d, ops.k_grouped_bf16_gemm_tn_contiguous(x, y, ks))


def test_einsum(deep_gemm: ModuleType, device: str) -> None:
    a, b = normal(8, 3, 64, seed=0, device=device), normal(3, 48, 64, seed=1, device=device)
    d = empty(8, 3, 48, device=device)
    deep_gemm.einsum("bhr,hdr->bhd", a, b, d, use_cublaslt=True)
    assert same_bits(d, ops.einsum("bhr,hdr->bhd", a, b))
    values, scales = ops.per_token_cast_to_fp8(normal(24, 128, seed=0, device=device))
    qa = (values.view(8, 3, 128), scales.reshape(8, 3, 1))
    pairs = [weights(128, 128, device, seed) for seed in range(3)]
    qb = (torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))
    d = empty(8, 3, 128, device=device)
    deep_gemm.fp8_einsum("bhr,hdr->bhd", qa, qb, d)
    assert same_bits(d, ops.fp8_einsum("bhr,hdr->bhd", *qa, *qb, recipe=[1, 128, 128]))


def test_logits(deep_gemm: ModuleType, device: str) -> None:
    """vLLM and SGLang: keys and scales as a pair, queries with or without scales."""
    q = normal(9, 8, 64, seed=0, device=device).to(torch.float8_e4m3fn)
    kv = normal(70, 64, seed=1, device=device).to(torch.float8_e4m3fn)
    kv_sf = torch.rand(70, generator=generator(2)).to(device)
    head_weights = normal(9, 8, seed=3, device=device, dtype=torch.float32)
    start = torch.arange(9, dtype=torch.int32, device=device)
    end = start + 50
    expected = ops.fp8_mqa_logits(q, kv, kv_sf, head_weights, start, end)
    for actual in (
        deep_gemm.fp8_mqa_logits(q, (kv, kv_sf), head_weights, start, end),
        deep_gemm.fp8_mqa_logits(q, (kv, kv_sf), head_weights, start, end, clean_logits=True, max_seqlen_k=0),
        deep_gemm.fp8_fp4_mqa_logits((q, None), (kv, kv_sf), head_weights, start, end, True, 0, torch.float32),
    ):
        assert same_bits(actual, expected)
    if not mqa_cases.fp4_condition(device):
        q, q_sf, kv, kv_sf, *rest = mqa_cases.dense_arguments(device=device, fp4=True).values()
        expected = ops.fp8_fp4_mqa_logits(q, q_sf, kv, kv_sf, *rest)
        assert same_bits(deep_gemm.fp8_fp4_mqa_logits((q.view(torch.int8), q_sf), (kv, kv_sf), *rest), expected)


def test_paged_logits(deep_gemm: ModuleType, device: str) -> None:
    q = normal(3, 2, 8, 64, seed=0, device=device).to(torch.float8_e4m3fn)
    values = normal(6, 64, 64, seed=1, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(6, 64, generator=generator(2)).to(device)
    cache = torch.cat([values.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)], dim=1)
    cache = cache.view(6, 64, 1, 68)
    head_weights = normal(6, 8, seed=3, device=device, dtype=torch.float32)
    lengths = torch.tensor([[99, 100], [7, 8], [0, 1]], dtype=torch.int32, device=device)
    table = torch.tensor([[5, 0], [3, 1], [2, 4]], dtype=torch.int32, device=device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 4)
    assert same_bits(schedule, ops.get_paged_mqa_logits_metadata(lengths, 64, 4))
    rest = (cache, head_weights, lengths, table, schedule, 128)
    expected = ops.fp8_paged_mqa_logits(q, *rest, clean_logits=True)
    assert same_bits(deep_gemm.fp8_paged_mqa_logits(q, *rest, clean_logits=True), expected)
    assert same_bits(deep_gemm.fp8_fp4_paged_mqa_logits((q, None), *rest, True), expected)
    if not mqa_cases.fp4_condition(device):
        arguments = mqa_cases.paged_arguments([99, 7], 2, fp4=True, device=device)
        q, q_sf, *rest, indices = arguments.values()
        assert indices is None
        expected = ops.fp8_fp4_paged_mqa_logits(q, q_sf, *rest, clean_logits=True)
        assert same_bits(deep_gemm.fp8_fp4_paged_mqa_logits((q, q_sf), *rest, clean_logits=True), expected)


def test_hyper_connections(deep_gemm: ModuleType, device: str) -> None:
    a, b = normal(20, 256, seed=0, device=device), normal(24, 256, seed=1, device=device, dtype=torch.float32)
    d, sqr_sum = torch.empty(20, 24, device=device), torch.empty(20, device=device)
    deep_gemm.tf32_hc_prenorm_gemm(a, b, d, sqr_sum, num_splits=None)
    expected = ops.tf32_hc_prenorm_gemm(a, b)
    assert same_bits(d, expected[0])
    assert same_bits(sqr_sum, expected[1])


def test_fp4_cast(deep_gemm: ModuleType, device: str) -> None:
    x = normal(20, 256, seed=0, device=device)
    expected = ops.per_token_cast_to_fp4(x, gran_k=128, use_ue8m0=True)
    for cast in (deep_gemm.per_token_cast_to_fp4, deep_gemm.utils.per_token_cast_to_fp4):
        for actual, other in zip(cast(x, True), expected):
            assert same_bits(actual, other)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts, utilities, settings


def test_layouts(deep_gemm: ModuleType, device: str) -> None:
    sf = torch.pow(2.0, torch.randint(-5, 5, (130, 5), generator=generator(0)).double()).float().to(device)
    expected = ops.get_mn_major_tma_aligned_tensor(sf)
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor  # SGLang

    for call in (get_mn_major_tma_aligned_tensor, deep_gemm.get_col_major_tma_aligned_tensor):
        assert same_bits(call(sf), expected)
        assert call(sf).stride() == expected.stride()
    transform = deep_gemm.transform_sf_into_required_layout
    for call in (
        lambda: transform(sf=sf, mn=130, k=640, recipe=(1, 128, 128), is_sfa=True, disable_ue8m0_cast=True),
        lambda: transform(sf, 130, 640, (1, 128), None, False),
        lambda: transform(sf, 130 * 128, 640, (1, 128, 128)),  # is_sfa defaults to False
    ):
        assert same_bits(call(), expected)
    packed = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
    assert same_bits(packed, ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf))
    ks = torch.tensor([128, 512], dtype=torch.int32, device=device)
    grouped = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf.t().contiguous(), ks, [128, 512])
    assert same_bits(grouped, ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf.t().contiguous(), ks))
    assert deep_gemm.get_tma_aligned_size(130, 4) == 132


def test_casts(deep_gemm: ModuleType, device: str) -> None:
    from deep_gemm.utils import math

    x = normal(130, 300, seed=0, device=device)
    for kind in ("per_token", "per_channel", "per_block"):
        cast = getattr(deep_gemm, f"{kind}_cast_to_fp8")
        assert cast is getattr(deep_gemm.utils, f"{kind}_cast_to_fp8") is getattr(math, f"{kind}_cast_to_fp8")
        for actual, expected in zip(cast(x, True), getattr(ops, f"{kind}_cast_to_fp8")(x, use_ue8m0=True)):
            assert same_bits(actual, expected)
    for actual, expected in zip(
        deep_gemm.per_token_cast_to_fp8(x, False, 32, True),
        ops.per_token_cast_to_fp8(x, gran_k=32, use_packed_ue8m0=True),
    ):
        assert same_bits(actual, expected)

    keys = normal(40, 2, 64, seed=0, device=device)
    for dims, shape in [((0,), (40,)), ((0, 1), (40, 2)), ((-1,), (64,))]:
        values, sf = deep_gemm.utils.per_custom_dims_cast_to_fp8(keys, dims, False)
        assert tuple(sf.shape) == shape
        full = sf.view([size if d in {x % 3 for x in dims} else 1 for d, size in enumerate(keys.shape)])
        assert float((values.float() * full - keys.float()).norm() / keys.float().norm()) < 0.05
        assert float((keys.float() / full).abs().max()) == pytest.approx(448, rel=1e-3)
    sf = torch.tensor([0.3, 1.0, 5.0, 2.0], device=device)
    assert deep_gemm.ceil_to_ue8m0(sf).tolist() == [0.5, 1.0, 8.0, 2.0]
    packed = int(deep_gemm.utils.pack_ue8m0_to_int(deep_gemm.ceil_to_ue8m0(sf))) & 0xFFFFFFFF
    assert packed == 126 | 127 << 8 | 130 << 16 | 128 << 24
    assert (deep_gemm.ceil_div(5, 4), deep_gemm.utils.align(5, 4)) == (2, 8)
    assert reference.FP8_MAX == 448


def test_settings(deep_gemm: ModuleType) -> None:
    """Those that mean something are the package's own; those of a compiler are accepted."""
    before = deep_gemm_ops.get_mk_alignment_for_contiguous_layout()
    try:
        deep_gemm.set_mk_alignment_for_contiguous_layout(64)
        assert deep_gemm.get_m_alignment_for_contiguous_layout() == 64
        assert deep_gemm.get_k_alignment_for_contiguous_layout() == 64
        assert deep_gemm_ops.get_mk_alignment_for_contiguous_layout() == 64
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(before)
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(100) % 32 == 0
    assert deep_gemm.get_num_sms is deep_gemm_ops.get_num_sms
    for call in (
        lambda: deep_gemm.init("/nowhere", None),
        lambda: deep_gemm.set_ignore_compile_dims(True),
        lambda: deep_gemm.set_compile_mode(1),
        lambda: deep_gemm.use_deterministic_algorithms(True),
    ):
        assert call() is None
    assert deep_gemm.get_compile_mode() == 0


def test_testing(deep_gemm: ModuleType) -> None:
    from deep_gemm import calc_diff
    from deep_gemm.testing import bench, bench_kineto, count_bytes, get_arch_major

    x = torch.randn(8, 8)
    assert float(calc_diff(x, x)) == pytest.approx(0, abs=1e-12)
    assert count_bytes(x, (x, x)) == 3 * 256
    assert get_arch_major() in (9, 10, 12)
    assert callable(bench)
    assert bench_kineto is deep_gemm_ops.testing.bench_kineto


def test_bench(deep_gemm: ModuleType, cuda: str) -> None:
    x = torch.ones(2**24, device=cuda)
    seconds = deep_gemm.testing.bench(lambda: x.mul_(1), high_precision=True)
    assert 1e-6 < seconds < 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names_follow_the_operators(deep_gemm: ModuleType) -> None:
    """A name whose operator is not there is not there, and appears when the operator does."""
    name = "name_of_a_test"
    try:
        _names.offer(name, needs="operator_of_a_test")(lambda: "called")
        assert not hasattr(deep_gemm, name)
        assert name not in dir(deep_gemm)
        with pytest.raises(AttributeError, match="there is no kernel for operator_of_a_test here"):
            getattr(deep_gemm, name)
        library = torch.library.Library("deep_gemm", "FRAGMENT")
        try:
            library.define("operator_of_a_test() -> ()")
            assert not hasattr(deep_gemm, name)
            library.impl("operator_of_a_test", lambda: None, "CUDA" if torch.cuda.device_count() else "CPU")
            assert getattr(deep_gemm, name)() == "called"
            assert name in dir(deep_gemm)
        finally:
            library._destroy()
    finally:
        _names.ENTRIES.pop(name, None)
    assert not hasattr(deep_gemm, "no_such_name")


def test_names_on_gpus(deep_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU only CUDA kernels count, and only those of its architecture once PyTorch knows it."""
    has_cuda_kernel = True
    original = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: has_cuda_kernel if key == "CUDA" else original(name, key),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(_names._capi, "instances", lambda arch: [{"arch": "sm_90a"}])
    assert hasattr(deep_gemm, "fp8_gemm_nt")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capability, there in (((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        for name in ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_masked", "einsum"):
            assert hasattr(deep_gemm, name) == there
        assert hasattr(deep_gemm, "per_token_cast_to_fp8")
        assert hasattr(deep_gemm, "transform_sf_into_required_layout")
    has_cuda_kernel = False
    assert not hasattr(deep_gemm, "fp8_gemm_nt")
    assert not hasattr(deep_gemm, "per_token_cast_to_fp8")
    assert hasattr(deep_gemm, "ceil_div")


def test_every_name_is_one_of_an_operator_that_there_is() -> None:
    """A misspelt operator would hide its names forever."""
    registered = {name.removeprefix("deep_gemm::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    for name, entry in _names.ENTRIES.items():
        assert set(entry.needs) <= registered, name


def test_star_import_and_dir(deep_gemm: ModuleType) -> None:
    scope: dict[str, object] = {}
    exec("from deep_gemm import *", scope)
    assert {"fp8_gemm_nt", "m_grouped_fp8_gemm_nt_masked", "utils"} <= set(scope)
    assert set(dir(deep_gemm)) <= set(scope) | {"__all__"}


def test_install(deep_gemm: ModuleType) -> None:
    assert importlib.util.find_spec("deep_gemm") is not None  # how vLLM asks whether the package is there
    assert deep_gemm is compat
    assert importlib.import_module("deep_gemm.utils.math") is compat.utils.math
    assert importlib.import_module("deep_gemm.jit") is compat.jit
    assert compat.install() is compat
    assert tuple(int(part) for part in deep_gemm.__version__.split(".")) >= (2, 5, 0)
    compat.uninstall()
    assert "deep_gemm" not in sys.modules
    other = ModuleType("deep_gemm")
    sys.modules["deep_gemm"] = other
    try:
        with pytest.raises(RuntimeError, match="another deep_gemm is imported already"):
            compat.install()
    finally:
        del sys.modules["deep_gemm"]


def test_importing_does_not_initialise_cuda() -> None:
    """A process may import, ask for names and fork."""
    code = (
        "import torch, deep_gemm_ops.compat as c; m = c.install(); import deep_gemm; "
        "hasattr(deep_gemm, 'fp8_gemm_nt'); dir(deep_gemm); assert not torch.cuda.is_initialized(); print('fine')"
    )
    path = str(pathlib.Path(deep_gemm_ops.__file__).parent.parent)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.stdout == "fine\n", run.stderr


def test_compiles(deep_gemm: ModuleType, device: str) -> None:
    """The mutating form passes through functionalisation, as code that is compiled around it needs."""
    a, b = tokens(33, 256, device), weights(128, 256, device)

    def layer(x: Tensor, sfx: Tensor) -> Tensor:
        d = torch.empty(x.shape[0], 128, dtype=torch.bfloat16, device=device)
        deep_gemm.fp8_gemm_nt((x, sfx), b, d, disable_ue8m0_cast=True)
        return d * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert same_bits(compiled(*a), layer(*a))


def test_the_table_of_callers_names_what_there_is() -> None:
    """Every name in docs/compat.md is offered, and every offered name is in docs/compat.md."""
    text = (ROOT / "docs" / "compat.md").read_text()
    named = set(re.findall(r"`(?:deep_gemm\.)?(?:utils\.|testing\.)?(?:layout\.|math\.)?(\w+)(?:\([^`]*\))?`", text))
    missing = sorted(name for name in _names.ENTRIES if name not in named)
    assert not missing, missing
    for name in re.findall(r"`deep_gemm\.(\w+)[`(]", text):
        assert name in _names.ENTRIES or name in ("jit", "testing", "utils"), name


def test_signatures_start_as_the_public_ones() -> None:
    """Positional callers depend on the order."""
    expected = {
        "fp8_gemm_nt": "a b d c recipe recipe_a recipe_b compiled_dims disable_ue8m0_cast",
        "bf16_gemm_nt": "a b d c compiled_dims",
        "fp8_gemm_nt_skip_head_mid": "a b d head_splits recipe compiled_dims disable_ue8m0_cast",
        "m_grouped_fp8_gemm_nt_contiguous": "a b d grouped_layout recipe recipe_a recipe_b compiled_dims "
        "disable_ue8m0_cast use_psum_layout ensure_zero_padding expected_m_for_psum_layout",
        "m_grouped_bf16_gemm_nt_contiguous": "a b d grouped_layout compiled_dims use_psum_layout ensure_zero_padding "
        "expected_m_for_psum_layout",
        "m_grouped_fp8_gemm_nt_masked": "a b d masked_m expected_m recipe recipe_a recipe_b compiled_dims "
        "disable_ue8m0_cast",
        "k_grouped_fp8_gemm_tn_contiguous": "a b d ks_cpu grouped_layout c recipe compiled_dims use_psum_layout",
        "k_grouped_bf16_gemm_tn_contiguous": "a b d ks_cpu grouped_layout c compiled_dims use_psum_layout",
        "fp8_fp4_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k logits_dtype",
        "fp8_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k",
        "fp8_fp4_paged_mqa_logits": "q fused_kv_cache weights context_lens block_table schedule_meta max_context_len "
        "clean_logits logits_dtype indices",
        "get_paged_mqa_logits_metadata": "context_lens block_kv num_sms indices",
        "einsum": "expr a b d c use_cublaslt",
        "fp8_einsum": "expr a b d c recipe",
        "tf32_hc_prenorm_gemm": "a b d sqr_sum num_splits",
        "transform_sf_into_required_layout": "sf mn k recipe num_groups is_sfa disable_ue8m0_cast psum_layout",
    }
    for name, order in expected.items():
        actual = list(inspect.signature(_names.ENTRIES[name].value).parameters)
        assert actual[: len(order.split())] == order.split(), name
