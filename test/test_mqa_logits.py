"""The operators for MQA logits: values, ranges, lengths, tables, strides, bad input; on the CPU and where there is one on
a GPU."""
# ruff: noqa: E501  (messages are printed as they are)

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import deep_gemm_ops
from deep_gemm_ops import mqa_logits

from common import FP8, ROOT, assert_close, generator, same_bits
from mqa_cases import (
    dense_arguments,
    expected_dense,
    expected_paged,
    fp4_condition,
    fp4_values,
    make_cache,
    make_fp4,
    paged_arguments,
    samples,
)
from test_bad_input import changed, messages


def assert_logits(actual: torch.Tensor, expected: torch.Tensor, hint: str = "") -> None:
    """Equal to what float64 rounds to, -inf included; integers and powers of two leave no other rounding."""
    want = expected.to(actual.dtype)
    have = actual.cpu()
    assert torch.equal(have, want), f"{int((have != want).sum())} of {have.numel()} differ {hint}"


def inside(expected: torch.Tensor) -> torch.Tensor:
    return expected != -math.inf


@pytest.fixture
def fp4_device(device: str) -> str:
    if reason := fp4_condition(device):
        pytest.skip(reason)
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Dense keys


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(device: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    for tokens, keys in [(1, 1), (5, 63), (33, 700), (70, 129)]:
        arguments = dense_arguments(tokens, keys, heads, dim, device, seed=tokens)
        result = deep_gemm_ops.fp8_mqa_logits(**arguments, logits_dtype=dtype)
        assert result.is_contiguous() and result.dtype == dtype
        assert_logits(result, expected_dense(arguments))


@pytest.mark.parametrize("max_seqlen_k", [1, 100, 1000])
@pytest.mark.parametrize("clean", [False, True])
def test_compressed(device: str, max_seqlen_k: int, clean: bool) -> None:
    arguments = dense_arguments(40, 500, 64, 128, device)
    result = deep_gemm_ops.fp8_mqa_logits(**arguments, max_seqlen_k=max_seqlen_k, clean_logits=clean)
    expected = expected_dense(arguments, max_seqlen_k)
    assert result.shape == (40, max_seqlen_k)
    if not clean:
        result = result.cpu().where(inside(expected), -math.inf)
    assert_logits(result, expected)


@pytest.mark.parametrize("clean", [False, True])
def test_out_keeps_what_is_around(device: str, clean: bool) -> None:
    arguments = dense_arguments(20, 150, 16, 64, device)
    expected = expected_dense(arguments)
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.full((22, 161), 7.0, dtype=dtype, device=device)
        out = buffer[1:21, 3:153]
        assert deep_gemm_ops.fp8_mqa_logits(**arguments, clean_logits=clean, out=out) is out
        assert_logits(out, expected if clean else expected.where(inside(expected), 7.0))
        buffer[1:21, 3:153] = 7
        assert bool((buffer == 7).all())


def test_every_range(device: str) -> None:
    """Empty, whole, reversed, before, behind and over the ends."""
    arguments = dense_arguments(12, 130, 8, 32, device)
    starts = [0, 0, 130, 5, 100, -9, -9, 64, 129, 2**31 - 1, -(2**31), 63]
    ends = [0, 130, 130, 5, 20, -1, 999, 65, 2**31 - 1, 2**31 - 1, 2**31 - 1, 64]
    arguments["cu_seq_len_k_start"] = torch.tensor(starts, dtype=torch.int32, device=device)
    arguments["cu_seq_len_k_end"] = torch.tensor(ends, dtype=torch.int32, device=device)
    for max_seqlen_k in (0, 50):
        result = deep_gemm_ops.fp8_mqa_logits(**arguments, max_seqlen_k=max_seqlen_k)
        assert_logits(result, expected_dense(arguments, max_seqlen_k))


def test_scales_of_every_kind(device: str) -> None:
    """A negative scale turns signs before the ReLU; NaN and Inf reach their key's logits and no other."""
    arguments = dense_arguments(9, 300, 32, 128, device)
    arguments["cu_seq_len_k_start"].zero_()
    arguments["cu_seq_len_k_end"].fill_(300)
    special = [-1.0, math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**70, -(2.0**70), 2.0**-120]
    for i, scale in enumerate(special):
        arguments["kv_sf"][7 + 31 * i] = scale
    result = deep_gemm_ops.fp8_mqa_logits(**arguments).cpu()
    q, kv, kv_sf, weights = (arguments[name].cpu().double() for name in ("q", "kv", "kv_sf", "weights"))
    scores = torch.relu(torch.einsum("ihd,jd->ihj", q, kv) * kv_sf)
    expected = (scores * weights[:, :, None]).sum(1).float()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert bool(result[:, 7 + 31].isnan().all()) and not bool(result[:, 6].isnan().any())


def test_nan_in_operands(device: str) -> None:
    arguments = dense_arguments(6, 100, 16, 64, device)
    arguments["cu_seq_len_k_start"].zero_()
    arguments["cu_seq_len_k_end"].fill_(100)
    clean = deep_gemm_ops.fp8_mqa_logits(**arguments).cpu()
    for name in ("q", "kv"):
        codes = arguments[name].view(torch.uint8)
        codes[(2,) + (0,) * (codes.dim() - 1)] = 0x7F
    arguments["weights"][4, 3] = math.nan
    result = deep_gemm_ops.fp8_mqa_logits(**arguments).cpu()
    expected = torch.zeros(6, 100, dtype=torch.bool)
    expected[2], expected[4], expected[:, 2] = True, True, True
    assert torch.equal(result.isnan(), expected)
    assert torch.equal(result[~expected], clean[~expected])


def test_strides(device: str) -> None:
    """Everything that needs no copy: padded heads, rows of keys and weights, ranges out of a larger tensor."""
    plain = dense_arguments(10, 90, 16, 64, device)
    padded = dict(plain)
    padded["q"] = torch.nn.functional.pad(plain["q"].view(torch.uint8), (0, 16)).view(FP8)[:, :, :64]
    padded["kv"] = torch.nn.functional.pad(plain["kv"].view(torch.uint8), (0, 48)).view(FP8)[:, :64]
    padded["weights"] = torch.nn.functional.pad(plain["weights"], (0, 5), value=math.nan)[:, :16]
    for name in ("cu_seq_len_k_start", "cu_seq_len_k_end"):
        padded[name] = torch.stack([plain[name], plain[name] * 0 - 5], 1)[:, 0]
    result = deep_gemm_ops.fp8_mqa_logits(**padded)
    assert same_bits(result, deep_gemm_ops.fp8_mqa_logits(**plain))


@pytest.mark.parametrize(("tokens", "keys", "width"), [(0, 10, 0), (4, 0, 0), (4, 0, 9), (0, 0, 9)])
def test_empty(device: str, tokens: int, keys: int, width: int) -> None:
    arguments = dense_arguments(tokens, keys, 32, 128, device)
    result = deep_gemm_ops.fp8_mqa_logits(**arguments, max_seqlen_k=width)
    assert result.shape == (tokens, width or keys)
    assert bool((result == -math.inf).all())


def test_random_values(device: str) -> None:
    random = generator(1)
    q = torch.randn(37, 64, 128, generator=random).to(FP8)
    kv, kv_sf = deep_gemm_ops.per_token_cast_to_fp8(torch.randn(1000, 128, generator=random).bfloat16())
    weights = torch.randn(37, 64, generator=random)
    start = torch.zeros(37, dtype=torch.int32)
    end = torch.arange(37, dtype=torch.int32) + 900
    inputs = (q, kv, kv_sf[:, 0].contiguous(), weights, start, end)
    expected, mask = mqa_logits.reference_mqa_logits(*inputs, exact=True)
    result = deep_gemm_ops.fp8_mqa_logits(*(x.to(device) for x in inputs)).cpu()
    # The tensor core of Hopper keeps about 14 bits of a sum.
    tol = 1e-5 if device == "cpu" else 1.5e-3
    assert_close(result.where(mask, 0), expected.where(mask, 0), tol=tol)


# ---------------------------------------------------------------------------------------------------------------------
# A cache of blocks


@pytest.mark.parametrize("block_kv", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_paged(device: str, heads: int, next_n: int, block_kv: int) -> None:
    for dim, per_token in [(128, False), (128, True), (64, True), (32, False)]:
        arguments = paged_arguments(
            [0, 1, 63, 130, 257], next_n, heads, dim, block_kv=block_kv, per_token=per_token, device=device
        )
        result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
        assert_logits(result, expected_paged(arguments, True), f"dim {dim}, per token {per_token}")


def test_lengths_of_sequences_without_cleaning(device: str) -> None:
    """With one length for all tokens of a sequence, each of them gets that many values."""
    arguments = paged_arguments([0, 1, 63, 130], 3, device=device)
    expected = expected_paged(arguments, False)
    out = torch.full(expected.shape, 7.0, device=device)
    deep_gemm_ops.fp8_paged_mqa_logits(**arguments, out=out)
    assert_logits(out, expected.where(inside(expected), 7.0))


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 0, 2], [4, 5, 9], [0, 0, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices(device: str, counts: list[int], dtype: torch.dtype) -> None:
    for heads in (16, 64):
        arguments = paged_arguments([130, 65, 300], heads=heads, counts=counts, device=device)
        result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True, logits_dtype=dtype)
        assert_logits(result, expected_paged(arguments, True))


def test_indices_without_a_row(device: str) -> None:
    arguments = paged_arguments([130, 65, 300], counts=[2, 2, 3], device=device)
    arguments["indices"].copy_(torch.tensor([0, 7, -1, 1, 2**31 - 1, -(2**31), 2]))
    arguments["schedule_metadata"] = deep_gemm_ops.get_paged_mqa_logits_metadata(
        arguments["context_lens"], 64, 7, indices=arguments["indices"]
    )
    result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
    assert_logits(result, expected_paged(arguments, True))


def test_blocks_that_are_not_there(device: str) -> None:
    """Entries out of range stand for zeros; entries behind a length are not followed."""
    arguments = paged_arguments([200, 64, 130], 2, device=device, gap=32)
    table = arguments["block_table"]
    for at, entry in [((0, 1), -1), ((0, 3), table.numel() + 1), ((1, 1), -7), ((2, 0), 2**31 - 1), ((2, 3), -(2**31))]:
        table[at] = entry
    result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
    assert_logits(result, expected_paged(arguments, True))


def test_lengths_beyond_the_table_or_the_result(device: str) -> None:
    for columns in (64, 100, 129, 4000):
        arguments = paged_arguments([10, 200, 128], 2, device=device, max_blocks=2, max_context_len=columns)
        arguments["context_lens"].copy_(torch.tensor([-5, 2**31 - 1, 500]))
        arguments["schedule_metadata"] = deep_gemm_ops.get_paged_mqa_logits_metadata(arguments["context_lens"], 64, 7)
        result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
        assert_logits(result, expected_paged(arguments, True))


def test_paged_strides(device: str) -> None:
    """Blocks further apart, tables of any strides, lengths out of a larger tensor."""
    arguments = paged_arguments([130, 65, 300], 2, per_token=True, device=device, gap=16)
    expected = expected_paged(arguments, True)
    table, lens = arguments["block_table"], arguments["context_lens"]
    arguments["block_table"] = table.t().contiguous().t()
    arguments["context_lens"] = torch.stack([lens, lens * 0 + 999], -1)[..., 0]
    assert arguments["context_lens"].stride() == (4, 2)
    arguments["weights"] = torch.nn.functional.pad(arguments["weights"], (0, 3), value=math.nan)[:, :32]
    arguments["schedule_metadata"] = deep_gemm_ops.get_paged_mqa_logits_metadata(arguments["context_lens"], 64, 3)
    assert_logits(deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True), expected)


@pytest.mark.parametrize("num_sms", [1, 2, 3, 132, 1000])
def test_any_number_of_sms(device: str, num_sms: int) -> None:
    arguments = paged_arguments([130, 0, 1000, 64, 65], 2, device=device, num_sms=num_sms)
    assert arguments["schedule_metadata"].shape == (num_sms + 1, 2)
    result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
    assert_logits(result, expected_paged(arguments, True))


def test_schedules_of_other_lengths(device: str) -> None:
    """They cost values, never memory: what is written is right."""
    arguments = paged_arguments([130, 300, 64], 2, device=device)
    expected = expected_paged(arguments, False)
    for schedule in ([[-5, -9]] * 8, [[2**31 - 1] * 2] * 8, [[0, 0]] + [[1, 2]] * 7, [[3, 5], [0, 0]] * 4):
        arguments["schedule_metadata"] = torch.tensor(schedule, dtype=torch.int32, device=device)
        out = torch.full(expected.shape, 7.0, device=device)
        deep_gemm_ops.fp8_paged_mqa_logits(**arguments, out=out)
        out = out.cpu().double()
        assert bool(((out == expected) | (out == 7)).all())


@pytest.mark.parametrize("columns", [0, 5])
def test_paged_empty(device: str, columns: int) -> None:
    for arguments in (
        paged_arguments([], max_context_len=columns, device=device),
        paged_arguments([0, 0], 2, max_context_len=columns, max_blocks=0, device=device),
        paged_arguments([0, 0], 2, max_context_len=columns, device=device),
    ):
        result = deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True)
        assert result.shape == (arguments["weights"].shape[0], columns)
        assert bool((result == -math.inf).all())
    arguments = paged_arguments([70, 3], device=device)
    arguments["kv_cache"] = arguments["kv_cache"][:0]  # without blocks there are no keys
    assert bool((deep_gemm_ops.fp8_paged_mqa_logits(**arguments, clean_logits=True) == -math.inf).all())


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def shares(schedule: torch.Tensor, tiles: list[int]) -> list[int]:
    """Pieces of work of each CTA, by counting through the atoms."""
    flat = [sum(tiles[:first]) + tile for first, tile in schedule.tolist()]
    return [b - a for a, b in zip(flat, flat[1:])]


@pytest.mark.parametrize("lens", [[1], [0, 0], [64, 65, 0, 5000, 1], [100] * 300, [0] * 2000 + [77] * 1500], ids=len)
@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_schedule_is_even(device: str, lens: list[int], num_sms: int) -> None:
    context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(context_lens, 64, num_sms)
    tiles = [-(-length // 64) for length in lens]
    counts = shares(schedule, tiles)
    assert sum(counts) == sum(tiles) and max(counts) - min(counts) <= 1
    assert schedule[-1].tolist() == [len(lens), 0]
    for first, tile in schedule[:-1].tolist():
        assert (first, tile) == (len(lens), 0) or 0 <= tile < tiles[first]
    out = torch.full_like(schedule, -1)
    assert deep_gemm_ops.get_paged_mqa_logits_metadata(context_lens, 64, num_sms, out=out) is out
    assert same_bits(out, schedule)


def test_schedules_equal_the_reference(device: str) -> None:
    random = generator(0)
    for size in (1, 5, 1023, 1024, 1025, 2500):
        indices = torch.randint(0, 3, (size,), generator=random).cumsum(0).to(torch.int32) // 2
        lens = torch.randint(-10, 700, (size,), generator=random, dtype=torch.int32)
        per_token = torch.randint(-10, 700, (size, 3), generator=random, dtype=torch.int32).t().contiguous().t()
        for context_lens, of_tokens in [(lens, None), (per_token, None), (lens, indices), (lens[:, None], indices)]:
            expected = mqa_logits.reference_metadata(context_lens, 132, of_tokens)
            moved = of_tokens.to(device) if of_tokens is not None else None
            result = deep_gemm_ops.get_paged_mqa_logits_metadata(context_lens.to(device), 64, 132, indices=moved)
            assert same_bits(result, expected), size


# ---------------------------------------------------------------------------------------------------------------------
# FP4


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_fp4(fp4_device: str, heads: int, dim: int) -> None:
    """Every dtype that FP4 may come in, and of the result, with and without compression."""
    dtypes = [(torch.uint8, torch.float32), (torch.int8, torch.bfloat16), (torch.float4_e2m1fn_x2, torch.float32)]
    for (tokens, keys, width), (fp4, dtype) in zip([(1, 1, 0), (33, 300, 0), (40, 129, 50)], dtypes):
        arguments = dense_arguments(tokens, keys, heads, dim, fp4_device, seed=tokens, fp4=True)
        expected = expected_dense(arguments, width)
        arguments["q"], arguments["kv"] = arguments["q"].view(fp4), arguments["kv"].view(fp4)
        result = deep_gemm_ops.fp8_fp4_mqa_logits(**arguments, max_seqlen_k=width, logits_dtype=dtype)
        assert result.is_contiguous() and result.dtype == dtype
        assert_logits(result, expected)
        out = torch.full((tokens, result.shape[1] + 3), 7.0, dtype=dtype, device=fp4_device)
        kept = deep_gemm_ops.fp8_fp4_mqa_logits(**arguments, max_seqlen_k=width, clean_logits=False, out=out[:, 2:-1])
        assert_logits(kept, expected.where(inside(expected), 7.0))
        assert bool((out[:, [0, 1, -1]] == 7).all())


@pytest.mark.parametrize("block_kv", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_fp4_paged(fp4_device: str, heads: int, next_n: int, block_kv: int) -> None:
    for dim, options in [(128, {}), (64, {"per_token": True, "gap": 48}), (32, {"max_blocks": 9})]:
        arguments = paged_arguments(
            [0, 1, 63, 257], next_n, heads, dim, block_kv=block_kv, fp4=True, device=fp4_device, **options
        )
        table = arguments["block_table"]
        table[2, 0], table[3, 1] = -1, 2**31 - 1  # not in the cache: zeros
        result = deep_gemm_ops.fp8_fp4_paged_mqa_logits(**arguments, clean_logits=True)
        assert_logits(result, expected_paged(arguments, True), f"dim {dim}")


def test_fp4_indices(fp4_device: str) -> None:
    for heads, counts in [(64, [4, 5, 9]), (8, [3, 0, 2])]:
        arguments = paged_arguments([130, 65, 300], heads=heads, counts=counts, fp4=True, device=fp4_device)
        result = deep_gemm_ops.fp8_fp4_paged_mqa_logits(**arguments, clean_logits=True, logits_dtype=torch.bfloat16)
        assert_logits(result, expected_paged(arguments, True))


def test_fp4_strides(fp4_device: str) -> None:
    plain = dense_arguments(10, 90, 16, 64, fp4_device, fp4=True)
    padded = dict(plain)
    padded["q"] = torch.nn.functional.pad(plain["q"], (0, 16), value=0x77)[:, :, :32]
    padded["kv"] = torch.nn.functional.pad(plain["kv"], (0, 16), value=0x77)[:, :32]
    padded["q_sf"] = torch.nn.functional.pad(plain["q_sf"], (0, 3), value=-1)[:, :16]
    assert same_bits(deep_gemm_ops.fp8_fp4_mqa_logits(**padded), deep_gemm_ops.fp8_fp4_mqa_logits(**plain))
    paged = paged_arguments([130, 65], 3, 16, fp4=True, device=fp4_device)
    padded = dict(paged, q_sf=torch.nn.functional.pad(paged["q_sf"], (0, 5), value=-1)[..., :16])
    results = [deep_gemm_ops.fp8_fp4_paged_mqa_logits(**each, clean_logits=True) for each in (paged, padded)]
    assert same_bits(*results)


def test_fp4_of_every_value(fp4_device: str) -> None:
    """All codes and many scales, against float64."""
    random = generator(3)
    (q, q_sf), (kv, kv_sf) = make_fp4((20, 64, 128), random, 7, 9), make_fp4((700, 128), random, 7, 9)
    inputs = (q, q_sf, kv, kv_sf, torch.randn(20, 64, generator=random))
    ranges = (torch.zeros(20, dtype=torch.int32), torch.full((20,), 700, dtype=torch.int32))
    scores = torch.einsum("ihd,jd->ihj", fp4_values(q, q_sf), fp4_values(kv, kv_sf)).relu()
    expected = torch.einsum("ihj,ih->ij", scores, inputs[4].double())
    result = deep_gemm_ops.fp8_fp4_mqa_logits(*(x.to(fp4_device) for x in (*inputs, *ranges)))
    assert_close(result.cpu(), expected, tol=1e-5)


def test_fp4_of_casts(fp4_device: str) -> None:
    """What ``per_token_cast_to_fp4`` makes is what the operator takes."""
    random = generator(4)
    q, kv = torch.randn(9 * 8, 128, generator=random).bfloat16(), torch.randn(50, 128, generator=random).bfloat16()
    casts = [deep_gemm_ops.per_token_cast_to_fp4(x.to(fp4_device), use_packed_ue8m0=True) for x in (q, kv)]
    (q4, q_sf), (kv4, kv_sf) = casts
    weights = torch.rand(9, 8, generator=random)
    start = torch.zeros(9, dtype=torch.int32, device=fp4_device)
    inputs = (q4.view(9, 8, 64), q_sf.view(9, 8), kv4, kv_sf.view(50), weights.to(fp4_device), start, start + 50)
    result = deep_gemm_ops.fp8_fp4_mqa_logits(*inputs).cpu().double()
    exact = torch.einsum("ihd,jd->ihj", q.view(9, 8, 128).double(), kv.double()).relu()
    exact = torch.einsum("ihj,ih->ij", exact, weights.double())
    assert (result - exact).norm() < 0.2 * exact.norm()


def test_fp4_extreme_scales(fp4_device: str) -> None:
    """UE8M0's NaN reaches what it scales and nothing else; products may be as large as FP32 holds, and beyond."""
    arguments = dense_arguments(6, 100, 16, 128, fp4_device, fp4=True)
    arguments["cu_seq_len_k_start"].zero_()
    arguments["cu_seq_len_k_end"].fill_(100)
    plain = deep_gemm_ops.fp8_fp4_mqa_logits(**arguments).cpu()
    words = {name: arguments[name].view(torch.uint8).view(*arguments[name].shape, 4) for name in ("q_sf", "kv_sf")}
    words["q_sf"][3, 5, 1] = 0xFF
    words["kv_sf"][70, 2] = 0xFF
    words["kv_sf"][7] = 127 - 90
    words["kv_sf"][8] = 254  # 2^127: products beyond FP32's range, negative ones of which are still nothing
    arguments["kv"][8, 1:] = 0
    words["kv_sf"][9] = 127 + 100
    result = deep_gemm_ops.fp8_fp4_mqa_logits(**arguments).cpu()
    scores = torch.einsum(
        "ihd,jd->ihj", *(fp4_values(arguments[x].cpu(), arguments[f"{x}_sf"].cpu()) for x in ("q", "kv"))
    )
    scores = scores.float().relu()  # FP32 accumulators: too large is Inf
    expected = (scores * arguments["weights"].cpu()[:, :, None]).sum(1)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert bool(result[3].isnan().all()) and bool(result[:, 70].isnan().all())
    kept = torch.ones_like(result, dtype=torch.bool)
    kept[3], kept[:, [7, 8, 9, 70]] = False, False
    assert torch.equal(result[kept], plain[kept]) and not bool(result[kept].isnan().any())


def test_fp8_by_the_name_of_both(device: str) -> None:
    """Without scales of queries they and the keys are FP8."""
    dense, paged = dense_arguments(device=device), paged_arguments([70, 130], 2, device=device)
    expected = deep_gemm_ops.fp8_mqa_logits(**dense)
    assert same_bits(deep_gemm_ops.fp8_fp4_mqa_logits(q_sf=None, **dense), expected)
    expected = deep_gemm_ops.fp8_paged_mqa_logits(**paged, clean_logits=True)
    assert same_bits(deep_gemm_ops.fp8_fp4_paged_mqa_logits(q_sf=None, **paged, clean_logits=True), expected)


@pytest.mark.parametrize(("tokens", "keys", "width"), [(0, 10, 0), (4, 0, 0), (4, 0, 9)])
def test_fp4_empty(device: str, tokens: int, keys: int, width: int) -> None:
    if keys == 0 and width > 0 and fp4_condition(device):
        pytest.skip(fp4_condition(device))
    arguments = dense_arguments(tokens, keys, 32, 128, device, fp4=True)
    result = deep_gemm_ops.fp8_fp4_mqa_logits(**arguments, max_seqlen_k=width)
    assert result.shape == (tokens, width or keys) and bool((result == -math.inf).all())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def plain_dense(device: str) -> dict[str, Any]:
    return {
        "q": torch.zeros(4, 16, 64, device=device).to(FP8),
        "kv": torch.zeros(10, 64, device=device).to(FP8),
        "kv_sf": torch.ones(10, device=device),
        "weights": torch.zeros(4, 16, device=device),
        "cu_seq_len_k_start": torch.zeros(4, dtype=torch.int32, device=device),
        "cu_seq_len_k_end": torch.zeros(4, dtype=torch.int32, device=device),
    }


def test_bad_dense_input(device_or_fake: str) -> None:
    assert_expected_inline(
        messages(
            deep_gemm_ops.fp8_mqa_logits,
            lambda: plain_dense(device_or_fake),
            {
                "dtype of q": changed(q=lambda a: a["q"].float()),
                "rank of q": changed(q=lambda a: a["q"][0]),
                "heads": changed(q=lambda a: a["q"][:, :12]),
                "head_dim": changed(q=lambda a: a["q"][:, :, :48]),
                "strides of q": changed(q=lambda a: a["q"][:, :8]),
                "head_dim of kv": changed(kv=lambda a: a["kv"][:, :32]),
                "stride of kv": changed(kv=lambda a: a["kv"].new_empty(10, 72)[:, :64]),
                "kv_sf": changed(kv_sf=lambda a: a["kv_sf"][:9]),
                "stride of kv_sf": changed(kv_sf=lambda a: a["kv_sf"].new_empty(20)[::2]),
                "weights": changed(weights=lambda a: a["weights"].bfloat16()),
                "shape of weights": changed(weights=lambda a: a["weights"][:, :8]),
                "int64 start": changed(cu_seq_len_k_start=lambda a: a["cu_seq_len_k_start"].long()),
                "short end": changed(cu_seq_len_k_end=lambda a: a["cu_seq_len_k_end"][:3]),
                "max_seqlen_k": changed(max_seqlen_k=lambda a: -1),
                "logits_dtype": changed(logits_dtype=lambda a: torch.float16),
                "shape of out": changed(out=lambda a: a["weights"].new_empty(4, 11)),
                "compressed out": changed(out=lambda a: a["weights"].new_empty(4, 10), max_seqlen_k=lambda a: 5),
                "stride of out": changed(out=lambda a: a["weights"].new_empty(10, 4).t()),
                "dtype of out": changed(
                    out=lambda a: a["weights"].new_empty(4, 10), logits_dtype=lambda a: torch.bfloat16
                ),
            },
        ),
        """\
dtype of q: fp8_mqa_logits: q has dtype float32, expected float8_e4m3fn
rank of q: fp8_mqa_logits: q has rank 2, expected 3
heads: fp8_mqa_logits: q has heads 12, expected 8, 16, 32 or 64
head_dim: fp8_mqa_logits: q has head_dim 48, expected 32, 64 or 128
strides of q: fp8_mqa_logits: q has stride of dimension 0 1024, expected 512 (use q.contiguous())
head_dim of kv: fp8_mqa_logits: kv has head_dim 32, expected 64 (the head_dim of q)
stride of kv: fp8_mqa_logits: kv has row stride 72 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
kv_sf: fp8_mqa_logits: kv_sf has shape [9], expected [S_kv] = [10]
stride of kv_sf: fp8_mqa_logits: kv_sf has inner stride 2, expected 1
weights: fp8_mqa_logits: weights has dtype bfloat16, expected float32
shape of weights: fp8_mqa_logits: weights has shape [4, 8], expected [S, H] = [4, 16]
int64 start: fp8_mqa_logits: cu_seq_len_k_start has dtype int64, expected int32
short end: fp8_mqa_logits: cu_seq_len_k_end has shape [3], expected [S] = [4]
max_seqlen_k: fp8_mqa_logits: max_seqlen_k has value -1, expected 0 to 2147483647
logits_dtype: fp8_mqa_logits: logits_dtype has value float16, expected bfloat16 or float32
shape of out: fp8_mqa_logits: out has shape [4, 11], expected [S, S_kv] = [4, 10]
compressed out: fp8_mqa_logits: out has shape [4, 10], expected [S, max_seqlen_k] = [4, 5]
stride of out: fp8_mqa_logits: out has inner stride 4, expected 1
dtype of out: fp8_mqa_logits: out has dtype float32, expected bfloat16 (logits_dtype)""",
    )


def plain_paged(device: str) -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 3, 16, 64, device=device).to(FP8),
        "kv_cache": torch.zeros(5, 64, 1, 68, dtype=torch.uint8, device=device),
        "weights": torch.zeros(6, 16, device=device),
        "context_lens": torch.zeros(2, 3, dtype=torch.int32, device=device),
        "block_table": torch.zeros(2, 4, dtype=torch.int32, device=device),
        "schedule_metadata": torch.zeros(8, 2, dtype=torch.int32, device=device),
        "max_context_len": 256,
    }


def test_bad_paged_input(device_or_fake: str) -> None:
    assert_expected_inline(
        messages(
            deep_gemm_ops.fp8_paged_mqa_logits,
            lambda: plain_paged(device_or_fake),
            {
                "rank of q": changed(q=lambda a: a["q"][0]),
                "heads": changed(q=lambda a: a["q"][:, :, :12]),
                "strides of q": changed(q=lambda a: a["q"].new_empty(2, 4, 16, 64)[:, :3]),
                "dtype of the cache": changed(kv_cache=lambda a: a["kv_cache"].view(torch.int8)),
                "block_kv": changed(kv_cache=lambda a: a["kv_cache"][:, :16]),
                "columns of the cache": changed(kv_cache=lambda a: a["kv_cache"][..., :64]),
                "a sparse block": changed(kv_cache=lambda a: a["kv_cache"].new_empty(5, 64, 1, 72)[..., :68]),
                "block stride": changed(
                    kv_cache=lambda a: a["kv_cache"].new_empty(5, 4360)[:, :4352].view(5, 64, 1, 68)
                ),
                "weights": changed(weights=lambda a: a["weights"][:2]),
                "int64 lengths": changed(context_lens=lambda a: a["context_lens"].long()),
                "lengths": changed(context_lens=lambda a: a["context_lens"][:, :2]),
                "lengths of sequences": changed(context_lens=lambda a: a["context_lens"].view(-1)),
                "rows of the table": changed(block_table=lambda a: a["block_table"][:1]),
                "dtype of the table": changed(block_table=lambda a: a["block_table"].long()),
                "schedule": changed(schedule_metadata=lambda a: a["schedule_metadata"][:1]),
                "strides of the schedule": changed(
                    schedule_metadata=lambda a: a["schedule_metadata"].new_empty(2, 8).t()
                ),
                "max_context_len": changed(max_context_len=lambda a: -1),
                "indices": changed(indices=lambda a: a["block_table"][:, 0]),
                "dtype of indices": changed(indices=lambda a: a["block_table"][:, 0].long()),
                "out": changed(out=lambda a: a["weights"].new_empty(6, 255)),
            },
        ),
        """\
rank of q: fp8_paged_mqa_logits: q has rank 3, expected 4
heads: fp8_paged_mqa_logits: q has heads 12, expected 8, 16, 32 or 64
strides of q: fp8_paged_mqa_logits: q has stride of dimension 0 4096, expected 3072 (use q.contiguous())
dtype of the cache: fp8_paged_mqa_logits: kv_cache has dtype int8, expected uint8
block_kv: fp8_paged_mqa_logits: kv_cache has block_kv 16, expected 64 or 32
columns of the cache: fp8_paged_mqa_logits: kv_cache has shape [5, 64, 1, 64], expected [blocks, block_kv, 1, D + 4] = [5, 64, 1, 68]
a sparse block: fp8_paged_mqa_logits: kv_cache has strides [4608, 72, 72, 1], expected [any, 68, any, 1] (each block dense)
block stride: fp8_paged_mqa_logits: kv_cache has block stride 4360 bytes, expected a multiple of 16 bytes
weights: fp8_paged_mqa_logits: weights has shape [2, 16], expected [B * next_n, H] = [6, 16]
int64 lengths: fp8_paged_mqa_logits: context_lens has dtype int64, expected int32
lengths: fp8_paged_mqa_logits: context_lens has shape [2, 2], expected [B, next_n] = [2, 3]
lengths of sequences: fp8_paged_mqa_logits: context_lens has shape [6], expected [B] = [2]
rows of the table: fp8_paged_mqa_logits: block_table has rows 1, expected 2 (the B of q)
dtype of the table: fp8_paged_mqa_logits: block_table has dtype int64, expected int32
schedule: fp8_paged_mqa_logits: schedule_metadata has shape [1, 2], expected [num_sms + 1, 2], num_sms from 1 to 65535
strides of the schedule: fp8_paged_mqa_logits: schedule_metadata has strides [1, 8], expected [2, 1]
max_context_len: fp8_paged_mqa_logits: max_context_len has value -1, expected 0 to 2147483647
indices: fp8_paged_mqa_logits: q has next_n 3, expected 1 (with indices)
dtype of indices: fp8_paged_mqa_logits: indices has dtype int64, expected int32
out: fp8_paged_mqa_logits: out has shape [6, 255], expected [B * next_n, max_context_len] = [6, 256]""",
    )


def plain_fp4(device: str) -> dict[str, Any]:
    return {
        "q": torch.zeros(4, 16, 32, dtype=torch.uint8, device=device),
        "q_sf": torch.zeros(4, 16, dtype=torch.int32, device=device),
        "kv": torch.zeros(10, 32, dtype=torch.int8, device=device),
        "kv_sf": torch.zeros(10, dtype=torch.int32, device=device),
        "weights": torch.zeros(4, 16, device=device),
        "cu_seq_len_k_start": torch.zeros(4, dtype=torch.int32, device=device),
        "cu_seq_len_k_end": torch.zeros(4, dtype=torch.int32, device=device),
    }


def test_bad_fp4_input(device_or_fake: str) -> None:
    if reason := fp4_condition(device_or_fake):
        pytest.skip(reason)
    assert_expected_inline(
        messages(
            deep_gemm_ops.fp8_fp4_mqa_logits,
            lambda: plain_fp4(device_or_fake),
            {
                "no scales": changed(q_sf=lambda a: None),
                "FP8": changed(q=lambda a: a["q"].view(FP8)),
                "FP8 keys": changed(kv=lambda a: a["kv"].view(FP8)),
                "head_dim": changed(q=lambda a: a["q"][:, :, :24]),
                "head stride": changed(q=lambda a: a["q"].new_empty(4, 16, 40)[:, :, :32]),
                "head_dim of kv": changed(kv=lambda a: a["kv"][:, :16]),
                "dtype of q_sf": changed(q_sf=lambda a: a["weights"]),
                "rank of q_sf": changed(q_sf=lambda a: a["q_sf"][0]),
                "shape of q_sf": changed(q_sf=lambda a: a["q_sf"][:, :8]),
                "stride of q_sf": changed(q_sf=lambda a: a["q_sf"].new_empty(16, 4).t()),
                "dtype of kv_sf": changed(kv_sf=lambda a: a["kv_sf"].float()),
                "out": changed(out=lambda a: a["weights"].new_empty(4, 11)),
            },
        ),
        """\
no scales: fp8_fp4_mqa_logits: q has dtype uint8, expected float8_e4m3fn
FP8: fp8_fp4_mqa_logits: q has dtype float8_e4m3fn, expected uint8, int8 or float4_e2m1fn_x2
FP8 keys: fp8_fp4_mqa_logits: kv has dtype float8_e4m3fn, expected uint8, int8 or float4_e2m1fn_x2
head_dim: fp8_fp4_mqa_logits: q has head_dim 48, expected 32, 64 or 128
head stride: fp8_fp4_mqa_logits: q has head stride 40 bytes, expected a multiple of 16 bytes (use q.contiguous())
head_dim of kv: fp8_fp4_mqa_logits: kv has head_dim 32, expected 64 (the head_dim of q)
dtype of q_sf: fp8_fp4_mqa_logits: q_sf has dtype float32, expected int32
rank of q_sf: fp8_fp4_mqa_logits: q_sf has rank 1, expected 2
shape of q_sf: fp8_fp4_mqa_logits: q_sf has shape [4, 8], expected [S, H] = [4, 16]
stride of q_sf: fp8_fp4_mqa_logits: q_sf has inner stride 4, expected 1
dtype of kv_sf: fp8_fp4_mqa_logits: kv_sf has dtype float32, expected int32
out: fp8_fp4_mqa_logits: out has shape [4, 11], expected [S, S_kv] = [4, 10]""",
    )


def test_bad_paged_fp4_input(device_or_fake: str) -> None:
    if reason := fp4_condition(device_or_fake):
        pytest.skip(reason)

    def plain() -> dict[str, Any]:
        arguments = plain_paged(device_or_fake)
        arguments["q"] = arguments["q"].new_zeros((2, 3, 16, 32), dtype=torch.uint8)
        arguments["q_sf"] = arguments["q"].new_zeros((2, 3, 16), dtype=torch.int32)
        arguments["kv_cache"] = arguments["q"].new_zeros((5, 64, 1, 36), dtype=torch.uint8)
        return arguments

    assert_expected_inline(
        messages(
            deep_gemm_ops.fp8_fp4_paged_mqa_logits,
            plain,
            {
                "no scales": changed(q_sf=lambda a: None),
                "rank of q_sf": changed(q_sf=lambda a: a["q_sf"][0]),
                "shape of q_sf": changed(q_sf=lambda a: a["q_sf"][:, :2]),
                "strides of q_sf": changed(q_sf=lambda a: a["q_sf"].new_empty(2, 4, 16)[:, :3]),
                "columns of the cache": changed(kv_cache=lambda a: a["kv_cache"].new_empty(5, 64, 1, 68)),
                "block_kv": changed(kv_cache=lambda a: a["kv_cache"][:, :48]),
            },
        ),
        """\
no scales: fp8_fp4_paged_mqa_logits: q has dtype uint8, expected float8_e4m3fn
rank of q_sf: fp8_fp4_paged_mqa_logits: q_sf has rank 2, expected 3
shape of q_sf: fp8_fp4_paged_mqa_logits: q_sf has shape [2, 2, 16], expected [B, next_n, H] = [2, 3, 16]
strides of q_sf: fp8_fp4_paged_mqa_logits: q_sf has stride of dimension 0 64, expected 48 (use q_sf.contiguous())
columns of the cache: fp8_fp4_paged_mqa_logits: kv_cache has shape [5, 64, 1, 68], expected [blocks, block_kv, 1, D / 2 + 4] = [5, 64, 1, 36]
block_kv: fp8_fp4_paged_mqa_logits: kv_cache has block_kv 48, expected 64 or 32""",
    )


def test_bad_schedule_input(device_or_fake: str) -> None:
    def plain() -> dict[str, Any]:
        return {
            "context_lens": torch.zeros(4, 2, dtype=torch.int32, device=device_or_fake),
            "block_kv": 64,
            "num_sms": 8,
        }

    assert_expected_inline(
        messages(
            deep_gemm_ops.get_paged_mqa_logits_metadata,
            plain,
            {
                "int64": changed(context_lens=lambda a: a["context_lens"].long()),
                "rank": changed(context_lens=lambda a: a["context_lens"][None]),
                "block_kv": changed(block_kv=lambda a: 48),
                "num_sms": changed(num_sms=lambda a: 0),
                "indices": changed(indices=lambda a: a["context_lens"][:3, 0]),
                "next_n": changed(indices=lambda a: a["context_lens"][:, 0]),
                "out": changed(out=lambda a: a["context_lens"].new_empty(8, 2)),
                "strides of out": changed(out=lambda a: a["context_lens"].new_empty(2, 9).t()),
            },
        ),
        """\
int64: get_paged_mqa_logits_metadata: context_lens has dtype int64, expected int32
rank: get_paged_mqa_logits_metadata: context_lens has rank 3, expected 1 or 2
block_kv: get_paged_mqa_logits_metadata: block_kv has value 48, expected 64 or 32
num_sms: get_paged_mqa_logits_metadata: num_sms has value 0, expected 1 to 65535
indices: get_paged_mqa_logits_metadata: indices has shape [3], expected [B] = [4]
next_n: get_paged_mqa_logits_metadata: context_lens has next_n 2, expected 1 (with indices)
out: get_paged_mqa_logits_metadata: out has shape [8, 2], expected [num_sms + 1, 2] = [9, 2]
strides of out: get_paged_mqa_logits_metadata: out has strides [1, 9], expected [2, 1]""",
    )


def test_alignment(device: str) -> None:
    arguments = plain_dense(device)
    odd = {
        "q": torch.zeros(4 * 16 * 64 + 8, dtype=torch.uint8, device=device)[8:].view(FP8).view(4, 16, 64),
        "kv": torch.zeros(10 * 64 + 8, dtype=torch.uint8, device=device)[8:].view(FP8).view(10, 64),
        "kv_sf": torch.zeros(11, device=device)[1:],
    }
    for name, x in odd.items():
        with pytest.raises(
            RuntimeError, match=rf"fp8_mqa_logits: {name} has base address \d+ modulo 16 bytes, expected 0"
        ):
            deep_gemm_ops.fp8_mqa_logits(**{**arguments, name: x})
    paged = plain_paged(device)
    flat = torch.zeros(5 * 64 * 68 + 4, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="kv_cache has base address 4 modulo 16 bytes, expected 0"):
        deep_gemm_ops.fp8_paged_mqa_logits(**{**paged, "kv_cache": flat[4:].view(5, 64, 1, 68)})


def test_gradients_are_refused(device: str) -> None:
    arguments = plain_dense(device)
    arguments["weights"].requires_grad_()
    with pytest.raises(RuntimeError, match="fp8_mqa_logits: weights has requires_grad True"):
        deep_gemm_ops.fp8_mqa_logits(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


def test_compile(device: str) -> None:
    """Any number of tokens, keys and columns, in one compilation."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q: torch.Tensor, kv: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return deep_gemm_ops.fp8_mqa_logits(q, kv, *others) + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, keys in [(5, 200), (70, 129), (9, 33)]:
            arguments = dense_arguments(tokens, keys, 32, 128, device)
            assert_logits(step(*arguments.values()) - 1, expected_dense(arguments))


def test_compile_paged(device: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q, cache, weights, lens, table, columns):
        schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(lens, 64, 7)
        return deep_gemm_ops.fp8_paged_mqa_logits(q, cache, weights, lens, table, schedule, columns, clean_logits=True)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lens in ([200, 7, 64], [64, 65, 0, 300, 9], [70] * 6):
            arguments = paged_arguments(lens, 2, device=device)
            names = ("q", "kv_cache", "weights", "context_lens", "block_table", "max_context_len")
            assert_logits(step(*(arguments[name] for name in names)), expected_paged(arguments, True))


def test_compile_fp4(fp4_device: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(*inputs: torch.Tensor) -> torch.Tensor:
        return deep_gemm_ops.fp8_fp4_mqa_logits(*inputs) + 1

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def paged_step(*inputs: Any) -> torch.Tensor:
        return deep_gemm_ops.fp8_fp4_paged_mqa_logits(*inputs, clean_logits=True) + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, lens in [(5, [200, 7, 64]), (70, [64, 65, 0, 300, 9]), (9, [70] * 6)]:
            arguments = dense_arguments(tokens, 3 * tokens, 32, 64, fp4_device, fp4=True)
            assert_logits(step(*arguments.values()) - 1, expected_dense(arguments))
            paged = paged_arguments(lens, 2, fp4=True, device=fp4_device)
            inputs = [x for name, x in paged.items() if name != "indices"]
            assert_logits(paged_step(*inputs) - 1, expected_paged(paged, True))


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


def test_replay_with_other_lengths(cuda: str) -> None:
    """A graph of schedule and logits follows lengths, tables and ranges that change between its replays."""
    lens = [700, 0, 129, 64]
    paged = paged_arguments(lens, 2, 64, device=cuda, max_blocks=12, max_context_len=768, num_sms=132)
    dense = dense_arguments(300, 900, 64, 128, cuda)
    del paged["schedule_metadata"]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(paged["context_lens"], 64, 132)
        scores = deep_gemm_ops.fp8_paged_mqa_logits(**paged, schedule_metadata=schedule, clean_logits=True)
        return scores, deep_gemm_ops.fp8_mqa_logits(**dense)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, new_lens in enumerate(([1, 768, 0, 3], [0, 0, 0, 0], [768] * 4, [63, 64, 65, 5000])):
        paged["context_lens"].copy_(torch.tensor(new_lens))
        paged["block_table"].copy_(paged["block_table"].flip(0))
        ranges = dense_arguments(300, 900, 64, 128, cuda, seed)
        for name in ("cu_seq_len_k_start", "cu_seq_len_k_end"):
            dense[name].copy_(ranges[name])
        for result in captured:
            result.fill_(math.nan)
        graph.replay()
        assert_logits(captured[0], expected_paged(paged, True), str(new_lens))
        assert_logits(captured[1], expected_dense(dense), str(seed))


def test_same_bits_every_time(cuda: str) -> None:
    """Whatever share of the work a CTA has, and with other work in between."""
    torch.manual_seed(0)
    q = torch.randn(1000, 64, 128, device=cuda).to(FP8)
    kv = torch.randn(5000, 128, device=cuda).to(FP8)
    inputs = (q, kv, torch.rand(5000, device=cuda), torch.randn(1000, 64, device=cuda))
    start = torch.zeros(1000, dtype=torch.int32, device=cuda)
    end = torch.arange(1000, dtype=torch.int32, device=cuda) + 4000
    results = []
    try:
        for num_sms in (0, 0, 1, 50, 0):
            deep_gemm_ops.set_num_sms(num_sms)
            results.append(deep_gemm_ops.fp8_mqa_logits(*inputs, start, end))
            torch.empty(1 << 24, device=cuda).fill_(math.nan)
    finally:
        deep_gemm_ops.set_num_sms(0)
    assert all(same_bits(results[0], result) for result in results[1:])
    expected, mask = mqa_logits.reference_mqa_logits(*inputs, start, end)
    assert_close(results[0].where(mask, 0), expected.where(mask, 0), tol=1.5e-3)


def test_long_contexts(cuda: str) -> None:
    """64k keys, odd lengths, against float32 on the GPU."""
    torch.manual_seed(0)
    lens = [65535, 1, 0, 32769, 64001]
    random = generator(0)
    cache = make_cache(4000, 64, 128, random).to(cuda)
    table = torch.randint(0, 4000, (len(lens), 1024), dtype=torch.int32, device=cuda)
    context_lens = torch.tensor(lens, dtype=torch.int32, device=cuda)
    for next_n, heads in [(1, 64), (2, 64), (4, 64), (6, 32)]:
        q = torch.randn(len(lens), next_n, heads, 128, device=cuda).to(FP8)
        weights = torch.randn(len(lens) * next_n, heads, device=cuda)
        schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(context_lens, 64, 132)
        inputs = (q, cache, weights, context_lens, table)
        result = deep_gemm_ops.fp8_paged_mqa_logits(*inputs, schedule, 65536, clean_logits=True)
        expected, mask = mqa_logits.reference_paged_mqa_logits(*inputs, 65536, clean_logits=True)
        assert torch.equal(result == -math.inf, ~mask)
        assert_close(result.where(mask, 0), expected.where(mask, 0), tol=1.5e-3)


def test_replay_of_fp4(cuda: str) -> None:
    """A graph follows lengths that change between its replays."""
    if reason := fp4_condition(cuda):
        pytest.skip(reason)
    lens = [700, 0, 129, 64]
    paged = paged_arguments(lens, 2, 64, fp4=True, device=cuda, max_blocks=12, max_context_len=768, num_sms=132)
    del paged["schedule_metadata"]

    def step() -> torch.Tensor:
        schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(paged["context_lens"], 64, 132)
        return deep_gemm_ops.fp8_fp4_paged_mqa_logits(**paged, schedule_metadata=schedule, clean_logits=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new_lens in ([1, 768, 0, 3], [0, 0, 0, 0], [768] * 4):
        paged["context_lens"].copy_(torch.tensor(new_lens))
        captured.fill_(math.nan)
        graph.replay()
        assert_logits(captured, expected_paged(paged, True), str(new_lens))


def test_fp4_without_a_kernel(cuda: str) -> None:
    if not fp4_condition(cuda):
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match=r"fp8_fp4_mqa_logits: q has architecture sm_\d+, expected .* \(FP4\)"):
        deep_gemm_ops.fp8_fp4_mqa_logits(**dense_arguments(device=cuda, fp4=True))


def test_nothing_waits_for_the_device(cuda: str) -> None:
    dense, paged = dense_arguments(device=cuda), paged_arguments([700, 30], 2, device=cuda)
    calls = [
        lambda: deep_gemm_ops.fp8_mqa_logits(**dense),
        lambda: deep_gemm_ops.get_paged_mqa_logits_metadata(paged["context_lens"], 64, 132),
        lambda: deep_gemm_ops.fp8_paged_mqa_logits(**paged),
    ]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(50_000_000)
        for call in calls:
            call()
        assert not torch.cuda.current_stream().query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_configurations_are_printed_once(cuda: str) -> None:
    code = (
        "import mqa_cases, deep_gemm_ops as d\n"
        "x = mqa_cases.dense_arguments(device='cuda')\n"
        "for _ in range(3): d.fp8_mqa_logits(**x)\n"
    )
    environment = {**os.environ, "DG_PRINT_CONFIGS": "1", "PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'test'}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = [line for line in run.stderr.splitlines() if line.startswith("deep_gemm: MQA logits, 5 tokens")]
    assert len(lines) == 1, run.stderr


def test_samples_run(device: str) -> None:
    for op, arguments, keywords in samples(device):
        op(*arguments, **keywords)
