"""Products of two matrices each of which is FP8 or packed FP4, with scales. Importing this module registers their CPU
and fake forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _checks, _dense, reference
from .fused_casts import FP4_VALUES
from .ops import call_product

__all__ = ["fp8_fp4_gemm_nn", "fp8_fp4_gemm_nt", "fp8_fp4_gemm_tn", "fp8_fp4_gemm_tt"]

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(
    layout: str,
    operands: dict[str, Tensor],
    c: Tensor | None,
    dtype: torch.dtype | None,
    recipe: Sequence[int] | None,
    out: Tensor | None,
) -> Tensor:
    op = f"fp8_fp4_gemm_{layout}"
    return call_product(op, getattr(_ops, op), operands, {"c": c, "recipe": recipe}, dtype, torch.bfloat16, out)


def fp8_fp4_gemm_nt(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_gemm_nt` where ``a``, ``b`` or both may be FP4: E2M1 values, two a byte along K, the even element in
    the low nibble.

    Args:
        a: float8_e4m3fn ``[M, K]``, or FP4 as float4_e2m1fn_x2, int8 or uint8 ``[M, K / 2]``. Inner stride 1, row
            stride and base address multiples of 16 bytes; on SM100 those of FP4 multiples of 32 bytes, and K one of
            128.
        sfa: scales of ``a`` as :func:`fp8_gemm_nt` takes them; K counts elements. MXFP4 has one per row and 32 of K:
            ``recipe`` ``[1, 1, 32]``.
        b: ``[N, K]`` or ``[N, K / 2]``, as ``a``.
        sfb: scales of ``b``.
        c: added to the product, ``[M, N]`` or a row ``[N]``, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: ``[gran_m, gran_n, gran_k]`` with gran_m, gran_n in {1, 128} and gran_k in {128, 32}, inferred where
            absent. With FP4 ``b`` also ``[gran_m, gran_n, 128, 32]``: scales of ``a`` per 128 of K, of ``b`` per 32.
        out: ``[M, N]``, inner stride 1, any row stride: written and returned.

    Returns:
        ``[M, N]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    SM100 multiplies FP4. Scales that are float32 must be powers of two there: its tensor core reads UE8M0, and a scale
    that is none becomes NaN, and so does what it scales.

    SM90 multiplies FP8 or BF16. FP4 ``b`` with scales per 32 of K, FP32 or UE8M0, is expanded inside the kernel, so
    that its bytes from memory are half those of FP8. UE8M0 scales, where K is a multiple of 128, stay so, and are
    what to pass: then ``a`` may first become BF16 in memory (``2 M K`` bytes; fastest where its scales are UE8M0,
    too), or, with many tokens and scales of ``a`` per 128, ``b`` may become FP8 (``N K`` bytes). Any other FP4
    operand is first expanded to FP8 in memory, by one small kernel. All of this is exact.
    Specification: ``deep_gemm_ops.fp8_fp4_gemm.reference_gemm``.
    """
    return _call("nt", {"a": a, "sfa": sfa, "b": b, "sfb": sfb}, c, out_dtype, recipe, out)


def fp8_fp4_gemm_nn(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_fp4_gemm_nt` for FP8 ``b [K, N]`` with scales ``[ceil(K / gran_k), ceil(N / gran_n)]``; FP4 ``b``
    would have to be K-major."""
    return _call("nn", {"a": a, "sfa": sfa, "b": b, "sfb": sfb}, c, out_dtype, recipe, out)


def fp8_fp4_gemm_tn(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_gemm_tn`: neither operand is K-major, so neither can be FP4."""
    return _call("tn", {"a": a, "sfa": sfa, "b": b, "sfb": sfb}, c, out_dtype, recipe, out)


def fp8_fp4_gemm_tt(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_fp4_gemm_nt` for FP8 ``a [K, M]`` with scales ``[ceil(K / gran_k), ceil(M / gran_m)]``; FP4 ``a``
    would have to be K-major."""
    return _call("tt", {"a": a, "sfa": sfa, "b": b, "sfb": sfb}, c, out_dtype, recipe, out)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def expand_fp4(x: Tensor) -> Tensor:
    """``[.., K / 2]`` packed FP4 as float8_e4m3fn ``[.., K]``, whose values include all of FP4's; FP8 as it is."""
    if x.dtype == torch.float8_e4m3fn:
        return x
    codes = x.view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), device=x.device)
    return values[codes.long()].to(torch.float8_e4m3fn)


def reference_gemm(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, **options: Any) -> Tensor:
    """``reference.fp8_gemm`` of the same values in FP8."""
    return reference.fp8_gemm(expand_fp4(a), sfa, expand_fp4(b), sfb, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations


def _register(layout: str) -> None:
    op = f"fp8_fp4_gemm_{layout}"

    def check(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, **rest: Any) -> _checks.GemmShape:
        return _checks.check_gemm(op, torch.float8_e4m3fn, layout, a, b, scales=(sfa, sfb), or_fp4=True, **rest)

    _dense.register(op, layout, check, reference_gemm)


for _layout in _checks.LAYOUTS:
    _register(_layout)
