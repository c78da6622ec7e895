"""BF16 products of two matrices, in all four layouts. Importing this module registers their CPU and fake forms."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks, _dense
from .ops import call_product

__all__ = ["bf16_gemm_nn", "bf16_gemm_nt", "bf16_gemm_tn", "bf16_gemm_tt"]

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(layout: str, a: Tensor, b: Tensor, c: Tensor | None, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    op = f"bf16_gemm_{layout}"
    return call_product(op, getattr(_ops, op), {"a": a, "b": b}, {"c": c}, dtype, torch.bfloat16, out)


def bf16_gemm_nt(
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out = c + a @ b^T`` for BF16 ``a [M, K]`` and ``b [N, K]``, accumulated in FP32, rounded once.

    Args:
        a: bfloat16 ``[M, K]``, inner stride 1, row stride and base address multiples of 16 bytes
            (``deep_gemm_ops.to_tma_aligned`` makes them so). M, N and K may be 0.
        b: bfloat16 ``[N, K]``, as ``a``.
        c: added to the product, ``[M, N]`` or a row ``[N]``, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        out: ``[M, N]``, inner stride 1, any row stride: written and returned.

    Returns:
        ``[M, N]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    The tensor cores read all four layouts as they lie. Specification: ``deep_gemm_ops.bf16_gemm.reference_gemm``.
    """
    return _call("nt", a, b, c, out_dtype, out)


def bf16_gemm_nn(
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`bf16_gemm_nt` for ``a [M, K]`` and ``b [K, N]``; rows of both start at multiples of 16 bytes."""
    return _call("nn", a, b, c, out_dtype, out)


def bf16_gemm_tn(
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`bf16_gemm_nt` for ``a [K, M]`` and ``b [K, N]``; rows of both start at multiples of 16 bytes."""
    return _call("tn", a, b, c, out_dtype, out)


def bf16_gemm_tt(
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`bf16_gemm_nt` for ``a [K, M]`` and ``b [N, K]``; rows of both start at multiples of 16 bytes."""
    return _call("tt", a, b, c, out_dtype, out)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def reference_gemm(
    a: Tensor,
    b: Tensor,
    *,
    layout: str = "nt",
    c: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    exact: bool = False,
) -> Tensor:
    """``C + A @ B^T`` of two BF16 matrices in float32 (float64 with ``exact``), rounded once; contiguous ``[M, N]``."""
    dtype = torch.float64 if exact else torch.float32
    a, b = (a.t() if layout[0] == "t" else a), (b if layout[1] == "n" else b.t())
    product = a.to(dtype) @ b.to(dtype)
    if c is not None:
        product += c.to(dtype)
    return product.to(out_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations


def _register(layout: str) -> None:
    op = f"bf16_gemm_{layout}"

    def check(a: Tensor, b: Tensor, **rest: Any) -> _checks.GemmShape:
        return _checks.check_gemm(op, torch.bfloat16, layout, a, b, scales=None, **rest)

    def product(a: Tensor, b: Tensor, recipe: tuple[int, ...], **rest: Any) -> Tensor:
        return reference_gemm(a, b, **rest)  # there are no scales

    _dense.register(op, layout, check, product)


for _layout in _checks.LAYOUTS:
    _register(_layout)
