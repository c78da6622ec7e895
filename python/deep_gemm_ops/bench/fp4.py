"""FP8 by FP4 products beside the same products in FP8 and BF16: dense, contiguous groups and masked ones. Tokens have
scales per 128 of K, as they do for FP8 weights, or, "per 32", those of MXFP8.

All scales of the FP4 weights are one power of two, so that FP8 weights with a scale per block, and BF16 ones, are the
same matrix to the bit, and every contender is checked against one result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..fp8_fp4_gemm import expand_fp4, reference_gemm
from ..grouped_gemm import reference_m_grouped, reference_masked
from ..layout import align, ceil_div
from ..testing.cases import BENCH_M, BENCH_SHAPES
from ..testing.numeric import error_bar
from . import suites
from .products import Call, Problem
from .report import OURS

__all__ = ["problems"]

Tensor = torch.Tensor

#: (groups, rows of each that are expected to count) of masked products, out of MASKED_MAX, and their (N, K).
MASKED = ((32, 8), (32, 64), (8, 512))
MASKED_MAX = 1024
MASKED_SHAPES = ((4096, 7168), (7168, 2048))
#: (groups, rows of each) of contiguous ones.
CONTIGUOUS = ((8, 512), (8, 4096), (32, 128))
RECIPE, RECIPE_32 = [1, 1, 128, 32], [1, 1, 32]
SCALE_CODE = 120  # of every weight: 2^-7


def _tokens(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP8 values with FP32 scales per 128, the same per 32 of K in packed UE8M0, and the values in BF16."""
    x = torch.randn(shape, device=suites.DEVICE, dtype=torch.bfloat16).flatten(0, -2)
    values, scales = torch.ops.deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True)
    exact = (values.float() * scales.repeat_interleave(128, 1)[:, : x.shape[1]]).bfloat16()
    per_32 = scales.repeat_interleave(4, 1).view(*shape[:-1], -1)
    per_32 = torch.ops.deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(per_32)
    return values.view(shape), _mn_major(scales.reshape(*shape[:-1], -1)), per_32, exact.view(shape)


def _mn_major(sf: Tensor) -> Tensor:
    return torch.ops.deep_gemm.get_mn_major_tma_aligned_tensor(sf)


def _weights(*shape: int) -> dict[str, Any]:
    """The same matrices in packed FP4, FP8 and BF16, with their scales."""
    *groups, n, k = shape
    packed = torch.randint(256, (*groups, n, k // 2), device=suites.DEVICE, dtype=torch.uint8)
    fp8, scale = expand_fp4(packed), 2.0 ** (SCALE_CODE - 127)
    words = torch.full((*groups, k // 128, align(n, 4)), SCALE_CODE * 0x01010101, dtype=torch.int32)
    blocks = torch.full((*groups, ceil_div(n, 128), ceil_div(k, 128)), scale, device=suites.DEVICE)
    return {
        "fp4": (packed, words.to(suites.DEVICE)[..., :n].transpose(-1, -2)),
        "fp8": (fp8, blocks),
        "bf16": (fp8.float() * scale).bfloat16(),
    }


def _operands(a: tuple[Tensor, ...], weights: dict[str, Any]) -> dict[str, Any]:
    """Of all contenders, from what ``_tokens`` and ``_weights`` give."""
    values, sfa, sfa_32, exact = a
    return {
        "operands": [values, sfa, *weights["fp4"]],
        "per 32": [values, sfa_32, *weights["fp4"]],
        "fp8": [values, sfa, *weights["fp8"]],
        "bf16": [exact, weights["bf16"]],
    }


def _ours(call: Callable[[dict[str, Any], list[Tensor], list[int]], Tensor]) -> dict[str, Call]:
    return {
        OURS: lambda p: call(p, p["operands"], RECIPE),
        f"{OURS} per 32": lambda p: call(p, p["per 32"], RECIPE_32),
    }


def _dense(m: int, n: int, k: int) -> Problem:
    def build() -> dict[str, Any]:
        p = _operands(_tokens(m, k), _weights(n, k))
        return {**p, "out": torch.empty(m, n, dtype=torch.bfloat16, device=suites.DEVICE)}

    def ours(p: dict[str, Any], operands: list[Tensor], recipe: list[int]) -> Tensor:
        torch.ops.deep_gemm.fp8_fp4_gemm_nt.out(*operands, recipe=recipe, out=p["out"])
        return p["out"]

    def fp8(p: dict[str, Any]) -> Tensor:
        torch.ops.deep_gemm.fp8_gemm_nt.out(*p["fp8"], out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        return reference_gemm(*p["operands"], recipe=RECIPE, out_dtype=torch.float32)

    others: dict[str, Call] = {
        "fp8_gemm_nt": fp8,
        "torch.matmul": lambda p: torch.matmul(p["bf16"][0], p["bf16"][1].t(), out=p["out"]),
    }
    # Means are taken over the records of an operator's name: those of one M.
    op, flops, tol = f"fp8_fp4_gemm_nt, M {m}", 2.0 * m * n * k, error_bar(torch.bfloat16)
    return Problem(op, f"N {n}, K {k}", flops, build, _ours(ours), others, expected, tol)


def _contiguous(groups: int, rows: int, n: int, k: int) -> Problem:
    def build() -> dict[str, Any]:
        p = _operands(_tokens(groups * rows, k), _weights(groups, n, k))
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=suites.DEVICE) * rows
        return {**p, "ends": ends, "out": torch.empty(groups * rows, n, dtype=torch.bfloat16, device=suites.DEVICE)}

    def ours(p: dict[str, Any], operands: list[Tensor], recipe: list[int]) -> Tensor:
        op = torch.ops.deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous.out
        op(*operands, p["ends"], layout="psum", recipe=recipe, out=p["out"])
        return p["out"]

    def fp8(p: dict[str, Any]) -> Tensor:
        op = torch.ops.deep_gemm.m_grouped_fp8_gemm_nt_contiguous.out
        op(*p["fp8"], p["ends"], layout="psum", out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        result = torch.empty_like(p["out"], dtype=torch.float32)
        return reference_m_grouped(*p["operands"], p["ends"], result, layout="psum", grans=RECIPE)

    op, flops = "m_grouped_fp8_fp4_gemm_nt_contiguous", 2.0 * groups * rows * n * k
    shape = f"{groups} x {rows}, N {n}, K {k}"
    others: dict[str, Call] = {"m_grouped_fp8_gemm_nt_contiguous": fp8}
    return Problem(op, shape, flops, build, _ours(ours), others, expected, error_bar(torch.bfloat16))


def _masked(groups: int, rows: int, n: int, k: int) -> Problem:
    # Within 30 % of what is expected.
    counts = torch.randint(int(rows * 0.7), int(rows * 1.3) + 1, (groups,), generator=torch.Generator().manual_seed(0))

    def build() -> dict[str, Any]:
        p = _operands(_tokens(groups, MASKED_MAX, k), _weights(groups, n, k))
        p["masked_m"] = counts.to(suites.DEVICE, torch.int32)
        return {**p, "out": torch.empty(groups, MASKED_MAX, n, dtype=torch.bfloat16, device=suites.DEVICE)}

    def ours(p: dict[str, Any], operands: list[Tensor], recipe: list[int]) -> Tensor:
        op = torch.ops.deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked.out
        op(*operands, p["masked_m"], rows, recipe=recipe, out=p["out"])
        return p["out"]

    def fp8(p: dict[str, Any]) -> Tensor:
        torch.ops.deep_gemm.m_grouped_fp8_gemm_nt_masked.out(*p["fp8"], p["masked_m"], rows, out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        result = torch.zeros_like(p["out"], dtype=torch.float32)
        return reference_masked(*p["operands"], p["masked_m"], result, grans=RECIPE)

    def live(p: dict[str, Any]) -> Tensor:
        return (torch.arange(MASKED_MAX, device=suites.DEVICE) < p["masked_m"][:, None])[:, :, None]

    op, flops = "m_grouped_fp8_fp4_gemm_nt_masked", 2.0 * int(counts.sum()) * n * k
    shape = f"{groups} x {rows}, N {n}, K {k}"
    others: dict[str, Call] = {"m_grouped_fp8_gemm_nt_masked": fp8}
    return Problem(op, shape, flops, build, _ours(ours), others, expected, error_bar(torch.bfloat16), live)


def problems(quick: bool = False) -> Iterator[Problem]:
    """All that is measured; with ``quick`` two shapes and fewer groups."""
    for m in BENCH_M:
        for n, k in BENCH_SHAPES[4:6] if quick else BENCH_SHAPES:
            yield _dense(m, n, k)
    for groups, rows in CONTIGUOUS[:1] if quick else CONTIGUOUS:
        for n, k in MASKED_SHAPES[:1] if quick else MASKED_SHAPES:
            yield _contiguous(groups, rows, n, k)
    for groups, rows in MASKED[:2] if quick else MASKED:
        for n, k in MASKED_SHAPES[:1] if quick else MASKED_SHAPES:
            yield _masked(groups, rows, n, k)
