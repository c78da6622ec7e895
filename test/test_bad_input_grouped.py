"""Every wrong argument of the grouped, BF16, batched and split-head products is refused before any work, with the same
words on the CPU, on CUDA and while tracing."""
# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

import deep_gemm_ops

from common import FP8, cuda_condition
from test_bad_input import Arguments, changed, messages, twice

ops = torch.ops.deep_gemm


@pytest.fixture
def device(device_or_fake: str) -> str:
    """Where the operator gets the wrong arguments; "fake" ones have no memory."""
    return device_or_fake


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def fp8(*shape: int, device: str) -> torch.Tensor:
    return torch.zeros(shape, device=device).to(FP8)


def bf16(*shape: int, device: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def int32(*shape: int, device: str) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def replaced(**values: object) -> Callable[[Arguments], Arguments]:
    return lambda p: {**p, **values}


def m_grouped(device: str) -> Arguments:
    """M = 32, N = 144, K = 272, G = 2."""
    return {
        "a": fp8(32, 272, device=device),
        "sfa": torch.ones(32, 3, device=device),
        "b": fp8(2, 144, 272, device=device),
        "sfb": torch.ones(2, 2, 3, device=device),
        "grouped_layout": int32(32, device=device),
    }


def test_m_grouped_contiguous(device: str) -> None:
    changes = {
        "a of bfloat16": changed(a=lambda p: p["a"].to(torch.bfloat16)),
        "a of rank 3": changed(a=lambda p: p["a"][None]),
        "b of rank 2": changed(b=lambda p: p["b"][0]),
        "sfb of float64": changed(sfb=lambda p: p["sfb"].double()),
        "sfb of rank 2": changed(sfb=lambda p: p["sfb"][0]),
        "layout of int64": changed(grouped_layout=lambda p: p["grouped_layout"].long()),
        "layout of rank 2": changed(grouped_layout=lambda p: p["grouped_layout"][None]),
        "out_dtype": replaced(out_dtype=torch.float16),
        "unknown layout": replaced(layout="sizes"),
        "expected_m": replaced(expected_m=-3),
        "K of b": changed(b=lambda p: p["b"][..., :256]),
        "a strided": changed(a=lambda p: transposed(p["a"])),
        "b strided": changed(b=lambda p: transposed(p["b"])),
        "b with ragged rows": changed(b=lambda p: fp8(2, 144, 280, device=p["b"].device)[..., :272]),
        "b with overlapping groups": changed(b=lambda p: p["b"][:1].expand(2, 144, 272)),
        "an index too few": changed(grouped_layout=lambda p: p["grouped_layout"][:31]),
        "ends for indices": lambda p: {**p, "layout": "offsets"},
        "strided indices": changed(grouped_layout=lambda p: p["grouped_layout"].repeat_interleave(2)[::2]),
        "recipe": replaced(recipe=[1, 128, 64]),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:31]),
        "groups of sfb": changed(sfb=lambda p: p["sfb"][:1]),
        "rows of sfb": changed(sfb=lambda p: p["sfb"][:, :1]),
        "columns of sfb": changed(sfb=lambda p: p["sfb"][..., :2]),
        "sfb against the recipe": replaced(recipe=[1, 1, 128]),
    }
    assert_expected_inline(
        messages(ops.m_grouped_fp8_gemm_nt_contiguous, lambda: m_grouped(device), changes),
        """\
a of bfloat16: m_grouped_fp8_gemm_nt_contiguous: a has dtype bfloat16, expected float8_e4m3fn
a of rank 3: m_grouped_fp8_gemm_nt_contiguous: a has rank 3, expected 2
b of rank 2: m_grouped_fp8_gemm_nt_contiguous: b has rank 2, expected 3
sfb of float64: m_grouped_fp8_gemm_nt_contiguous: sfb has dtype float64, expected float32, float8_e8m0fnu or int32
sfb of rank 2: m_grouped_fp8_gemm_nt_contiguous: sfb has rank 2, expected 3
layout of int64: m_grouped_fp8_gemm_nt_contiguous: grouped_layout has dtype int64, expected int32
layout of rank 2: m_grouped_fp8_gemm_nt_contiguous: grouped_layout has rank 2, expected 1
out_dtype: m_grouped_fp8_gemm_nt_contiguous: out_dtype has value float16, expected bfloat16 or float32
unknown layout: m_grouped_fp8_gemm_nt_contiguous: layout has value sizes, expected indices, psum or offsets
expected_m: m_grouped_fp8_gemm_nt_contiguous: expected_m has value -3, expected an integer of at least 0
K of b: m_grouped_fp8_gemm_nt_contiguous: b has K 256, expected 272 (the K of a)
a strided: m_grouped_fp8_gemm_nt_contiguous: a has inner stride 32, expected 1 (use deep_gemm_ops.to_tma_aligned)
b strided: m_grouped_fp8_gemm_nt_contiguous: b has inner stride 144, expected 1 (use deep_gemm_ops.to_tma_aligned)
b with ragged rows: m_grouped_fp8_gemm_nt_contiguous: b has dimension-1 stride 280 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with overlapping groups: m_grouped_fp8_gemm_nt_contiguous: b has dimension-0 stride 0, expected at least 272 (use deep_gemm_ops.to_tma_aligned)
an index too few: m_grouped_fp8_gemm_nt_contiguous: grouped_layout has shape [31], expected [M] = [32]
ends for indices: m_grouped_fp8_gemm_nt_contiguous: grouped_layout has shape [32], expected [G] = [2]
strided indices: m_grouped_fp8_gemm_nt_contiguous: grouped_layout has inner stride 2, expected 1
recipe: m_grouped_fp8_gemm_nt_contiguous: recipe has value [1, 128, 64], expected [1 or 128, 1 or 128, 128 or 32]
rows of sfa: m_grouped_fp8_gemm_nt_contiguous: sfa has shape [31, 3], expected [M or ceil(M / 128), ceil(K / 128) or ceil(K / 32)] = [32 or 1, 3 or 9]
groups of sfb: m_grouped_fp8_gemm_nt_contiguous: sfb has shape [1, 2, 3], expected [G, N or ceil(N / 128), ceil(K / 128)] = [2, 144 or 2, 3]
rows of sfb: m_grouped_fp8_gemm_nt_contiguous: sfb has shape [2, 1, 3], expected [G, N or ceil(N / 128), ceil(K / 128)] = [2, 144 or 2, 3]
columns of sfb: m_grouped_fp8_gemm_nt_contiguous: sfb has shape [2, 2, 2], expected [G, N or ceil(N / 128), ceil(K / 128)] = [2, 144 or 2, 3]
sfb against the recipe: m_grouped_fp8_gemm_nt_contiguous: sfb has shape [2, 2, 3], expected [G, N, ceil(K / 128)] = [2, 144, 3]""",
    )


def test_m_grouped_contiguous_out(device: str) -> None:
    def base() -> Arguments:
        return {**m_grouped(device), "out": bf16(32, 144, device=device)}

    changes = {
        "out of float16": changed(out=lambda p: p["out"].half()),
        "out of another shape": changed(out=lambda p: p["out"].t().contiguous()),
        "out of rank 3": changed(out=lambda p: p["out"][None]),
        "out transposed": changed(out=lambda p: transposed(p["out"])),
        "out with overlapping rows": changed(out=lambda p: p["out"][:1].expand(32, 144)),
    }
    assert_expected_inline(
        messages(ops.m_grouped_fp8_gemm_nt_contiguous.out, base, changes),
        """\
out of float16: m_grouped_fp8_gemm_nt_contiguous: out has dtype float16, expected bfloat16 or float32
out of another shape: m_grouped_fp8_gemm_nt_contiguous: out has shape [144, 32], expected [M, N] = [32, 144]
out of rank 3: m_grouped_fp8_gemm_nt_contiguous: out has shape [1, 32, 144], expected [M, N] = [32, 144]
out transposed: m_grouped_fp8_gemm_nt_contiguous: out has inner stride 32, expected 1
out with overlapping rows: m_grouped_fp8_gemm_nt_contiguous: out has row stride 0, expected at least 144""",
    )


def test_m_grouped_contiguous_nn(device: str) -> None:
    def base() -> Arguments:
        p = m_grouped(device)
        p["b"], p["sfb"] = fp8(2, 272, 144, device=device), torch.ones(2, 3, 2, device=device)
        return {**p, "grouped_layout": int32(2, device=device), "layout": "psum"}

    changes = {
        "K of b": changed(b=lambda p: p["b"][:, :256]),
        "b strided": changed(b=lambda p: transposed(p["b"])),
        "an end too many": changed(grouped_layout=lambda p: int32(3, device=p["a"].device)),
        "sfb": changed(sfb=lambda p: p["sfb"][..., :1]),
    }
    assert_expected_inline(
        messages(ops.m_grouped_fp8_gemm_nn_contiguous, base, changes),
        """\
K of b: m_grouped_fp8_gemm_nn_contiguous: b has K 256, expected 272 (the K of a)
b strided: m_grouped_fp8_gemm_nn_contiguous: b has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
an end too many: m_grouped_fp8_gemm_nn_contiguous: grouped_layout has shape [3], expected [G] = [2]
sfb: m_grouped_fp8_gemm_nn_contiguous: sfb has shape [2, 3, 1], expected [G, ceil(K / 128), N or ceil(N / 128)] = [2, 3, 144 or 2]""",
    )


def test_m_grouped_bf16(device: str) -> None:
    def base() -> Arguments:
        return {
            "a": bf16(32, 272, device=device),
            "b": bf16(2, 272, 144, device=device),
            "grouped_layout": int32(2, device=device),
            "layout": "offsets",
        }

    changes = {
        "a of FP8": changed(a=lambda p: p["a"].to(FP8)),
        "b of float16": changed(b=lambda p: p["b"].half()),
        "b strided": changed(b=lambda p: transposed(p["b"])),
        "b with ragged rows": changed(b=lambda p: bf16(2, 272, 148, device=p["a"].device)[..., :144]),
        "b with ragged groups": changed(b=lambda p: p["b"].new_empty_strided((2, 272, 144), (272 * 144 + 4, 144, 1))),
        "b with overlapping rows": changed(b=lambda p: p["b"][:, :1].expand(2, 272, 144)),
        "indices for ends": lambda p: {**p, "layout": "indices"},
    }
    assert_expected_inline(
        messages(ops.m_grouped_bf16_gemm_nn_contiguous, base, changes),
        """\
a of FP8: m_grouped_bf16_gemm_nn_contiguous: a has dtype float8_e4m3fn, expected bfloat16
b of float16: m_grouped_bf16_gemm_nn_contiguous: b has dtype float16, expected bfloat16
b strided: m_grouped_bf16_gemm_nn_contiguous: b has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
b with ragged rows: m_grouped_bf16_gemm_nn_contiguous: b has dimension-1 stride 296 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with ragged groups: m_grouped_bf16_gemm_nn_contiguous: b has dimension-0 stride 78344 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with overlapping rows: m_grouped_bf16_gemm_nn_contiguous: b has dimension-1 stride 0, expected at least 144 (use deep_gemm_ops.to_tma_aligned)
indices for ends: m_grouped_bf16_gemm_nn_contiguous: grouped_layout has shape [2], expected [M] = [32]""",
    )


def masked(device: str) -> Arguments:
    """G = 2, M_max = 32, N = 144, K = 272."""
    return {
        "a": fp8(2, 32, 272, device=device),
        "sfa": torch.ones(2, 32, 3, device=device),
        "b": fp8(2, 144, 272, device=device),
        "sfb": torch.ones(2, 2, 3, device=device),
        "masked_m": int32(2, device=device),
        "expected_m": 4,
    }


def test_masked(device: str) -> None:
    changes = {
        "a of rank 2": changed(a=lambda p: p["a"][0]),
        "sfa of rank 2": changed(sfa=lambda p: p["sfa"][0]),
        "masked_m of int64": changed(masked_m=lambda p: p["masked_m"].long()),
        "masked_m of rank 0": changed(masked_m=lambda p: p["masked_m"][0]),
        "negative expected_m": replaced(expected_m=-1),
        "K of b": changed(b=lambda p: p["b"][..., :256]),
        "G of b": changed(b=lambda p: p["b"][:1]),
        "a with overlapping groups": changed(a=lambda p: p["a"][:1].expand(2, 32, 272)),
        "a count too many": changed(masked_m=lambda p: int32(3, device=p["a"].device)),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:, :31]),
        "groups of sfa": changed(sfa=lambda p: p["sfa"][:1]),
    }
    assert_expected_inline(
        messages(ops.m_grouped_fp8_gemm_nt_masked, lambda: masked(device), changes),
        """\
a of rank 2: m_grouped_fp8_gemm_nt_masked: a has rank 2, expected 3
sfa of rank 2: m_grouped_fp8_gemm_nt_masked: sfa has rank 2, expected 3
masked_m of int64: m_grouped_fp8_gemm_nt_masked: masked_m has dtype int64, expected int32
masked_m of rank 0: m_grouped_fp8_gemm_nt_masked: masked_m has rank 0, expected 1
negative expected_m: m_grouped_fp8_gemm_nt_masked: expected_m has value -1, expected an integer of at least 0
K of b: m_grouped_fp8_gemm_nt_masked: b has K 256, expected 272 (the K of a)
G of b: m_grouped_fp8_gemm_nt_masked: b has G 1, expected 2 (the G of a)
a with overlapping groups: m_grouped_fp8_gemm_nt_masked: a has dimension-0 stride 0, expected at least 272 (use deep_gemm_ops.to_tma_aligned)
a count too many: m_grouped_fp8_gemm_nt_masked: masked_m has shape [3], expected [G] = [2]
rows of sfa: m_grouped_fp8_gemm_nt_masked: sfa has shape [2, 31, 3], expected [G, M_max or ceil(M_max / 128), ceil(K / 128) or ceil(K / 32)] = [2, 32 or 1, 3 or 9]
groups of sfa: m_grouped_fp8_gemm_nt_masked: sfa has shape [1, 32, 3], expected [G, M_max or ceil(M_max / 128), ceil(K / 128) or ceil(K / 32)] = [2, 32 or 1, 3 or 9]""",
    )


def test_masked_out(device: str) -> None:
    def base() -> Arguments:
        return {**masked(device), "out": bf16(2, 32, 144, device=device)}

    changes = {
        "out of FP8": changed(out=lambda p: p["out"].to(FP8)),
        "out of rank 2": changed(out=lambda p: p["out"][0]),
        "out of another shape": changed(out=lambda p: p["out"][:, :31]),
        "out transposed": changed(out=lambda p: transposed(p["out"])),
        "out with overlapping rows": changed(out=lambda p: p["out"][:, :1].expand(2, 32, 144)),
        "out with overlapping groups": changed(out=lambda p: p["out"][:1].expand(2, 32, 144)),
        "out with interleaved groups that meet": changed(
            out=lambda p: p["out"].new_empty_strided((2, 32, 144), (144, 144, 1))
        ),
    }
    assert_expected_inline(
        messages(ops.m_grouped_fp8_gemm_nt_masked.out, base, changes),
        """\
out of FP8: m_grouped_fp8_gemm_nt_masked: out has dtype float8_e4m3fn, expected bfloat16 or float32
out of rank 2: m_grouped_fp8_gemm_nt_masked: out has shape [32, 144], expected [G, M_max, N] = [2, 32, 144]
out of another shape: m_grouped_fp8_gemm_nt_masked: out has shape [2, 31, 144], expected [G, M_max, N] = [2, 32, 144]
out transposed: m_grouped_fp8_gemm_nt_masked: out has inner stride 32, expected 1
out with overlapping rows: m_grouped_fp8_gemm_nt_masked: out has dimension-1 stride 0, expected at least 144
out with overlapping groups: m_grouped_fp8_gemm_nt_masked: out has dimension-0 stride 0, expected at least 144
out with interleaved groups that meet: m_grouped_fp8_gemm_nt_masked: out has dimension-1 stride 144, expected at least 288""",
    )


def k_grouped(device: str) -> Arguments:
    """G = 2, K = 272, M = 48, N = 144."""
    return {
        "a": fp8(272, 48, device=device),
        "sfa": torch.ones(3, 48, device=device),
        "b": fp8(272, 144, device=device),
        "sfb": torch.ones(4, 144, device=device),
        "ks": int32(2, device=device),
    }


def test_k_grouped(device: str) -> None:
    changes = {
        "a of bfloat16": changed(a=lambda p: p["a"].to(torch.bfloat16)),
        "a of rank 1": changed(a=lambda p: p["a"].view(-1)),
        "packed scales": changed(sfa=lambda p: p["sfa"].to(torch.int32)),
        "ks of float32": changed(ks=lambda p: p["ks"].float()),
        "ks of rank 2": changed(ks=lambda p: p["ks"][None]),
        "out_dtype": replaced(out_dtype=torch.float64),
        "unknown layout": replaced(layout="indices"),
        "K of b": changed(b=lambda p: p["b"][:271]),
        "b strided": changed(b=lambda p: transposed(p["b"])),
        "strided ks": changed(ks=lambda p: int32(4, device=p["a"].device)[::2]),
        "columns of sfa": changed(sfa=lambda p: p["sfa"][:, :47]),
        "rows of sfb": changed(sfb=lambda p: p["sfb"][:2]),
        "c of another dtype": changed(c=lambda p: bf16(2, 48, 144, device=p["a"].device)),
        "c of another shape": changed(c=lambda p: torch.zeros(48, 144, device=p["a"].device)),
        "c strided": changed(c=lambda p: transposed(torch.zeros(2, 48, 144, device=p["a"].device))),
    }
    assert_expected_inline(
        messages(ops.k_grouped_fp8_gemm_tn_contiguous, lambda: k_grouped(device), changes),
        """\
a of bfloat16: k_grouped_fp8_gemm_tn_contiguous: a has dtype bfloat16, expected float8_e4m3fn
a of rank 1: k_grouped_fp8_gemm_tn_contiguous: a has rank 1, expected 2
packed scales: k_grouped_fp8_gemm_tn_contiguous: sfa has dtype int32, expected float32 or float8_e8m0fnu
ks of float32: k_grouped_fp8_gemm_tn_contiguous: ks has dtype float32, expected int32
ks of rank 2: k_grouped_fp8_gemm_tn_contiguous: ks has rank 2, expected 1
out_dtype: k_grouped_fp8_gemm_tn_contiguous: out_dtype has value float64, expected bfloat16 or float32
unknown layout: k_grouped_fp8_gemm_tn_contiguous: layout has value indices, expected sizes, psum or offsets
K of b: k_grouped_fp8_gemm_tn_contiguous: b has K 271, expected 272 (the K of a)
b strided: k_grouped_fp8_gemm_tn_contiguous: b has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
strided ks: k_grouped_fp8_gemm_tn_contiguous: ks has inner stride 2, expected 1
columns of sfa: k_grouped_fp8_gemm_tn_contiguous: sfa has M 47, expected 48 (the M of a)
rows of sfb: k_grouped_fp8_gemm_tn_contiguous: sfb has rows 2, expected at least ceil(K / 128) = 3
c of another dtype: k_grouped_fp8_gemm_tn_contiguous: c has dtype bfloat16, expected float32 (the dtype of the result)
c of another shape: k_grouped_fp8_gemm_tn_contiguous: c has shape [48, 144], expected [G, M, N] or [N] = [2, 48, 144] or [144]
c strided: k_grouped_fp8_gemm_tn_contiguous: c has inner stride 48, expected 1""",
    )


def test_k_grouped_flattened(device: str) -> None:
    def base() -> Arguments:
        return {**k_grouped(device), "a": fp8(256 * 48, device=device), "b": fp8(256 * 144, device=device)}

    changes = {
        "a of rank 3": changed(a=lambda p: p["a"].view(2, 128, 48)),
        "a of rank 2": changed(a=lambda p: p["a"].view(256, 48)),
        "a of another size": changed(a=lambda p: p["a"][:-1]),
        "a for another M": changed(sfa=lambda p: p["sfa"][:, :47]),
        "K of b": changed(b=lambda p: p["b"][: 128 * 144]),
        "a without M": changed(sfa=lambda p: p["sfa"][:, :0]),
        "strided": changed(a=lambda p: twice(p["a"][:, None])[:, 0]),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:1]),
    }
    assert_expected_inline(
        messages(ops.k_grouped_fp8_gemm_nt_contiguous, base, changes),
        """\
a of rank 3: k_grouped_fp8_gemm_nt_contiguous: a has rank 3, expected 1 or 2
a of rank 2: k_grouped_fp8_gemm_nt_contiguous: b has rank 1, expected 2
a of another size: k_grouped_fp8_gemm_nt_contiguous: a has size 12287, expected a multiple of 128 * M = 6144
a for another M: k_grouped_fp8_gemm_nt_contiguous: a has size 12288, expected a multiple of 128 * M = 6016
K of b: k_grouped_fp8_gemm_nt_contiguous: b has K 128, expected 256 (the K of a)
a without M: k_grouped_fp8_gemm_nt_contiguous: a has size 12288, expected 0 (M = 0)
strided: k_grouped_fp8_gemm_nt_contiguous: a has inner stride 2, expected 1
rows of sfa: k_grouped_fp8_gemm_nt_contiguous: sfa has rows 1, expected at least ceil(K / 128) = 2""",
    )


def test_k_grouped_padded(device: str) -> None:
    def base() -> Arguments:
        p = {**k_grouped(device), "a": fp8(48, 384, device=device), "b": fp8(144, 384, device=device)}
        return {**p, "sfb": p["sfb"][:3]}

    changes = {
        "K of b": changed(b=lambda p: p["b"][:, :256]),
        "a strided": changed(a=lambda p: transposed(p["a"])),
        "a with ragged rows": changed(a=lambda p: fp8(48, 392, device=p["a"].device)[:, :384]),
        "columns of sfb": changed(sfb=lambda p: p["sfb"][:, :143]),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:2]),
        "K": changed(a=lambda p: p["a"][:, :320], b=lambda p: p["b"][:, :320]),
    }
    assert_expected_inline(
        messages(ops.k_grouped_fp8_gemm_nt_contiguous, base, changes),
        """\
K of b: k_grouped_fp8_gemm_nt_contiguous: b has K 256, expected 384 (the K of a)
a strided: k_grouped_fp8_gemm_nt_contiguous: a has inner stride 48, expected 1 (use deep_gemm_ops.to_tma_aligned)
a with ragged rows: k_grouped_fp8_gemm_nt_contiguous: a has row stride 392 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
columns of sfb: k_grouped_fp8_gemm_nt_contiguous: sfb has N 143, expected 144 (the N of b)
rows of sfa: k_grouped_fp8_gemm_nt_contiguous: sfa has rows 2, expected K / 128 = 3
K: k_grouped_fp8_gemm_nt_contiguous: sfa has rows 3, expected K / 128 = 2.5""",
    )


def test_k_grouped_out(device: str) -> None:
    def base() -> Arguments:
        return {
            "a": bf16(272, 48, device=device),
            "b": bf16(272, 144, device=device),
            "ks": int32(2, device=device),
            "out": torch.zeros(2, 48, 144, device=device),
        }

    changes = {
        "a of FP8": changed(a=lambda p: p["a"].to(FP8)),
        "a with ragged rows": changed(a=lambda p: bf16(272, 52, device=p["a"].device)[:, :48]),
        "out of another shape": changed(out=lambda p: p["out"][:1]),
        "out with overlapping groups": changed(out=lambda p: p["out"][:1].expand(2, 48, 144)),
        "c unlike out": changed(c=lambda p: p["out"].bfloat16()),
        "c too short": changed(c=lambda p: torch.zeros(143, device=p["a"].device)),
    }
    assert_expected_inline(
        messages(ops.k_grouped_bf16_gemm_tn_contiguous.out, base, changes),
        """\
a of FP8: k_grouped_bf16_gemm_tn_contiguous: a has dtype float8_e4m3fn, expected bfloat16
a with ragged rows: k_grouped_bf16_gemm_tn_contiguous: a has row stride 104 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
out of another shape: k_grouped_bf16_gemm_tn_contiguous: out has shape [1, 48, 144], expected [G, M, N] = [2, 48, 144]
out with overlapping groups: k_grouped_bf16_gemm_tn_contiguous: out has dimension-0 stride 0, expected at least 144
c unlike out: k_grouped_bf16_gemm_tn_contiguous: c has dtype bfloat16, expected float32 (the dtype of the result)
c too short: k_grouped_bf16_gemm_tn_contiguous: c has shape [143], expected [G, M, N] or [N] = [2, 48, 144] or [144]""",
    )


def test_bf16_gemm(device: str) -> None:
    def base() -> Arguments:
        return {"a": bf16(272, 32, device=device), "b": bf16(272, 144, device=device)}

    changes = {
        "a of FP8": changed(a=lambda p: p["a"].to(FP8)),
        "b of float32": changed(b=lambda p: p["b"].float()),
        "a of rank 1": changed(a=lambda p: p["a"][0]),
        "K of b": changed(b=lambda p: p["b"][:271]),
        "a strided": changed(a=lambda p: transposed(p["a"])),
        "b with ragged rows": changed(b=lambda p: bf16(272, 148, device=p["a"].device)[:, :144]),
        "b with overlapping rows": changed(b=lambda p: p["b"][:1].expand(272, 144)),
        "out_dtype": replaced(out_dtype=torch.float16),
        "c of another dtype": changed(c=lambda p: torch.zeros(32, 144, device=p["a"].device)),
        "c of another shape": changed(c=lambda p: bf16(144, 32, device=p["a"].device)),
    }
    assert_expected_inline(
        messages(ops.bf16_gemm_tn, base, changes),
        """\
a of FP8: bf16_gemm_tn: a has dtype float8_e4m3fn, expected bfloat16
b of float32: bf16_gemm_tn: b has dtype float32, expected bfloat16
a of rank 1: bf16_gemm_tn: a has rank 1, expected 2
K of b: bf16_gemm_tn: b has K 271, expected 272 (the K of a)
a strided: bf16_gemm_tn: a has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
b with ragged rows: bf16_gemm_tn: b has row stride 296 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with overlapping rows: bf16_gemm_tn: b has row stride 0, expected at least 144 (use deep_gemm_ops.to_tma_aligned)
out_dtype: bf16_gemm_tn: out_dtype has value float16, expected bfloat16 or float32
c of another dtype: bf16_gemm_tn: c has dtype float32, expected bfloat16 (the dtype of the result)
c of another shape: bf16_gemm_tn: c has shape [144, 32], expected [M, N] or [N] = [32, 144] or [144]""",
    )


def test_base_addresses() -> None:
    """Only real memory has an address."""
    lines = []
    for where in ["cpu"] + ([] if cuda_condition() else ["cuda"]):
        shifted = lambda *shape, device=where: bf16(*shape[:-1], shape[-1] + 8, device=device)[..., 4:-4]  # noqa: E731
        calls = {
            "bf16_gemm_nn": {"a": shifted(32, 64), "b": bf16(64, 48, device=where)},
            "m_grouped_bf16_gemm_nt_contiguous": {
                "a": bf16(32, 64, device=where),
                "b": shifted(2, 48, 64),
                "grouped_layout": int32(32, device=where),
            },
            "einsum": {"expr": "bmk,bnk->mn", "a": shifted(2, 32, 64), "b": bf16(2, 48, 64, device=where)},
        }
        for op, arguments in calls.items():
            with pytest.raises(RuntimeError) as error:
                getattr(ops, op)(**arguments)
            lines.append(str(error.value).splitlines()[0])
    assert_expected_inline(
        "\n".join(dict.fromkeys(lines)),
        """\
bf16_gemm_nn: a has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)
m_grouped_bf16_gemm_nt_contiguous: b has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)
einsum: a has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)""",
    )


def test_einsum(device: str) -> None:
    def base() -> Arguments:
        a, b = bf16(32, 2, 272, device=device), bf16(2, 144, 272, device=device)
        return {"expr": "bhr,hdr->bhd", "a": a, "b": b}

    changes = {
        "expression": replaced(expr="bhd,bhr->hdr"),
        "a of FP8": changed(a=lambda p: p["a"].to(FP8)),
        "a of rank 2": changed(a=lambda p: p["a"][0]),
        "h of b": changed(b=lambda p: p["b"][:1]),
        "r of b": changed(b=lambda p: p["b"][..., :256]),
        "a strided": changed(a=lambda p: transposed(p["a"])),
        "a with ragged rows": changed(a=lambda p: bf16(32, 2, 276, device=p["a"].device)[..., :272]),
        "b with overlapping rows": changed(b=lambda p: p["b"][:, :1].expand(2, 144, 272)),
        "out_dtype": replaced(out_dtype=torch.int32),
        "c of another shape": changed(c=lambda p: bf16(2, 32, 144, device=p["a"].device)),
    }
    assert_expected_inline(
        messages(ops.einsum, base, changes),
        """\
expression: einsum: expr has value bhd,bhr->hdr, expected bmk,bnk->mn, bhr,hdr->bhd or bhd,hdr->bhr
a of FP8: einsum: a has dtype float8_e4m3fn, expected bfloat16
a of rank 2: einsum: a has rank 2, expected 3
h of b: einsum: b has h 1, expected 2 (the h of a)
r of b: einsum: b has r 256, expected 272 (the r of a)
a strided: einsum: a has inner stride 2, expected 1 (use deep_gemm_ops.to_tma_aligned)
a with ragged rows: einsum: a has dimension-1 stride 552 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with overlapping rows: einsum: b has dimension-1 stride 0, expected at least 272 (use deep_gemm_ops.to_tma_aligned)
out_dtype: einsum: out_dtype has value int32, expected bfloat16 or float32
c of another shape: einsum: c has shape [2, 32, 144], expected [b, h, d] or [d] = [32, 2, 144] or [144]""",
    )


def test_fp8_einsum(device: str) -> None:
    def base() -> Arguments:
        return {
            "expr": "bhd,hdr->bhr",
            "a": fp8(32, 2, 144, device=device),
            "sfa": torch.ones(32, 2, 2, device=device),
            "b": fp8(2, 144, 272, device=device),
            "sfb": torch.ones(2, 2, 3, device=device),
            "out": bf16(32, 2, 272, device=device),
        }

    changes = {
        "expression": replaced(expr="bmk,bnk->mn"),
        "b of bfloat16": changed(b=lambda p: p["b"].to(torch.bfloat16)),
        "sfa of rank 2": changed(sfa=lambda p: p["sfa"][0]),
        "d of b": changed(b=lambda p: p["b"][:, :128]),
        "b strided": changed(b=lambda p: transposed(p["b"])),
        "h of sfa": changed(sfa=lambda p: p["sfa"][:, :1]),
        "sfb transposed": changed(sfb=lambda p: p["sfb"].transpose(1, 2)),
        "recipe": replaced(recipe=[1, 1, 128]),
        "out of another shape": changed(out=lambda p: p["out"].transpose(0, 1)),
        "out strided": changed(out=lambda p: transposed(p["out"])),
    }
    assert_expected_inline(
        messages(ops.fp8_einsum.out, base, changes),
        """\
expression: fp8_einsum: expr has value bmk,bnk->mn, expected bhr,hdr->bhd, bhd,hdr->bhr or bhd,bhr->hdr
b of bfloat16: fp8_einsum: b has dtype bfloat16, expected float8_e4m3fn
sfa of rank 2: fp8_einsum: sfa has rank 2, expected 3
d of b: fp8_einsum: b has d 128, expected 144 (the d of a)
b strided: fp8_einsum: b has inner stride 144, expected 1 (use deep_gemm_ops.to_tma_aligned)
h of sfa: fp8_einsum: sfa has shape [32, 1, 2], expected [b or ceil(b / 128), h, ceil(d / 128) or ceil(d / 32)] = [32 or 1, 2, 2 or 5]
sfb transposed: fp8_einsum: sfb has shape [2, 3, 2], expected [h, ceil(d / 128), r or ceil(r / 128)] = [2, 2, 272 or 3]
recipe: fp8_einsum: sfb has shape [2, 2, 3], expected [h, ceil(d / 128), r] = [2, 2, 272]
out of another shape: fp8_einsum: out has shape [2, 32, 272], expected [b, h, r] = [32, 2, 272]
out strided: fp8_einsum: out has inner stride 2, expected 1""",
    )


def test_skip_head_mid(device: str) -> None:
    def base() -> Arguments:
        p = m_grouped(device)
        del p["grouped_layout"]
        return {
            **p,
            "b": p["b"][0],
            "sfb": p["sfb"][0],
            "head_splits": [32, 8, 40],
            "out": bf16(32, 160, device=device),
        }

    changes = {
        "two splits": replaced(head_splits=[32, 40]),
        "negative": replaced(head_splits=[32, -8, 40]),
        "empty heads": replaced(head_splits=[0, 8, 0]),
        "N": replaced(head_splits=[32, 8, 32]),
        "too wide": replaced(head_splits=[32, 2**30, 40]),
        "out without gaps": changed(out=lambda p: p["out"][:, :144]),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:31]),
    }
    assert_expected_inline(
        messages(ops.fp8_gemm_nt_skip_head_mid.out, base, changes),
        """\
two splits: fp8_gemm_nt_skip_head_mid: head_splits has value [32, 40], expected [left, mid, right], none negative, with left + right positive
negative: fp8_gemm_nt_skip_head_mid: head_splits has value [32, -8, 40], expected [left, mid, right], none negative, with left + right positive
empty heads: fp8_gemm_nt_skip_head_mid: head_splits has value [0, 8, 0], expected [left, mid, right], none negative, with left + right positive
N: fp8_gemm_nt_skip_head_mid: b has N 144, expected a multiple of left + right = 64
too wide: fp8_gemm_nt_skip_head_mid: head_splits has columns of the result 2147483792, expected at most 2147483647
out without gaps: fp8_gemm_nt_skip_head_mid: out has shape [32, 144], expected [M, N / (left + right) * (left + mid + right)] = [32, 160]
rows of sfa: fp8_gemm_nt_skip_head_mid: sfa has shape [31, 3], expected [M or ceil(M / 128), ceil(K / 128) or ceil(K / 32)] = [32 or 1, 3 or 9]""",
    )


def test_devices() -> None:
    """Mixed devices: one of the tensors is on "meta", which needs no hardware."""
    lines = []
    calls = [
        (ops.m_grouped_fp8_gemm_nt_contiguous, m_grouped, "grouped_layout"),
        (ops.m_grouped_fp8_gemm_nt_masked, masked, "masked_m"),
        (ops.k_grouped_fp8_gemm_tn_contiguous, k_grouped, "sfb"),
        (ops.k_grouped_fp8_gemm_tn_contiguous, k_grouped, "ks"),
    ]
    for op, base, name in calls:
        with FakeTensorMode():
            arguments = base("cpu")
            arguments[name] = torch.empty(arguments[name].shape, dtype=arguments[name].dtype, device="meta")
            with pytest.raises(RuntimeError) as error:
                op(**arguments)
            lines.append(str(error.value).splitlines()[0])
    assert_expected_inline(
        "\n".join(lines),
        """\
m_grouped_fp8_gemm_nt_contiguous: grouped_layout has device meta, expected cpu (the device of a)
m_grouped_fp8_gemm_nt_masked: masked_m has device meta, expected cpu (the device of a)
k_grouped_fp8_gemm_tn_contiguous: sfb has device meta, expected cpu (the device of a)
k_grouped_fp8_gemm_tn_contiguous: ks has device meta, expected cpu (the device of a)""",
    )


def test_sizes_beyond_32_bits_and_many_groups() -> None:
    """Meta tensors have sizes without memory."""
    huge, lines = 2**31, []
    sf = torch.empty(1, 1, device="meta")
    calls = [
        lambda: ops.bf16_gemm_nt(bf16(huge, 8, device="meta"), bf16(8, 8, device="meta")),
        lambda: ops.m_grouped_bf16_gemm_nn_contiguous(
            bf16(8, 8, device="meta"), bf16(2, 8, huge, device="meta"), int32(8, device="meta")
        ),
        lambda: ops.m_grouped_bf16_gemm_nt_masked(
            bf16(2, huge, 8, device="meta"), bf16(2, 8, 8, device="meta"), int32(2, device="meta"), 1
        ),
        lambda: ops.k_grouped_bf16_gemm_tn_contiguous(
            bf16(huge, 8, device="meta"), bf16(huge, 8, device="meta"), int32(2, device="meta")
        ),
        lambda: ops.k_grouped_fp8_gemm_nt_contiguous(
            torch.empty(huge, dtype=FP8, device="meta"), sf, torch.empty(huge, dtype=FP8, device="meta"), sf,
            int32(2, device="meta"),
        ),
        lambda: ops.einsum("bmk,bnk->mn", bf16(huge, 8, 8, device="meta"), bf16(huge, 8, 8, device="meta")),
        lambda: ops.m_grouped_bf16_gemm_nt_contiguous(
            bf16(8, 8, device="meta"), bf16(1025, 8, 8, device="meta"), int32(1025, device="meta"), layout="offsets"
        ),
        lambda: ops.k_grouped_bf16_gemm_tn_contiguous(
            bf16(8, 8, device="meta"), bf16(8, 8, device="meta"), int32(1025, device="meta")
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError) as error:
            call()
        lines.append(str(error.value).splitlines()[0])
    assert_expected_inline(
        "\n".join(lines),
        """\
bf16_gemm_nt: a has M 2147483648, expected at most 2147483647
m_grouped_bf16_gemm_nn_contiguous: b has N 2147483648, expected at most 2147483647
m_grouped_bf16_gemm_nt_masked: a has M_max 2147483648, expected at most 2147483647
k_grouped_bf16_gemm_tn_contiguous: a has K 2147483648, expected at most 2147483647
k_grouped_fp8_gemm_nt_contiguous: a has K 2147483648, expected at most 2147483647
einsum: a has b 2147483648, expected at most 2147483647
m_grouped_bf16_gemm_nt_contiguous: b has G 1025, expected at most 1024
k_grouped_bf16_gemm_tn_contiguous: ks has G 1025, expected at most 1024""",
    )


def gradients(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.zeros(32, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    w = torch.zeros(2, 48, 64, dtype=torch.bfloat16, device=device)
    yield "a", lambda: deep_gemm_ops.bf16_gemm_nt(x, w[0])
    yield "a", lambda: deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w, int32(32, device=device))
    yield "a", lambda: deep_gemm_ops.m_grouped_bf16_gemm_nt_masked(x[None], w[:1], int32(1, device=device), 32)
    yield "b", lambda: deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(w[0, :32], x, int32(1, device=device))
    yield "c", lambda: deep_gemm_ops.einsum("bmk,bnk->mn", w, w[..., :64], c=x[0, :48], out_dtype=torch.bfloat16)


def test_gradients_are_refused(device: str) -> None:
    for arg, call in gradients(device):
        with pytest.raises(RuntimeError, match=rf"{arg} has requires_grad True, expected False \(not differentiable"):
            call()
        with torch.no_grad():
            call()


def test_out_dtype_of_public_functions() -> None:
    arguments = [bf16(32, 64, device="cpu"), bf16(48, 64, device="cpu")]
    with pytest.raises(RuntimeError) as error:
        deep_gemm_ops.bf16_gemm_nt(*arguments, out=torch.zeros(32, 48), out_dtype=torch.bfloat16)
    assert_expected_inline(str(error.value), """bf16_gemm_nt: out has dtype float32, expected bfloat16 (out_dtype)""")
