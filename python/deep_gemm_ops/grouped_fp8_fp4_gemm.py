"""Products of many groups in one launch whose operands are FP8 or packed FP4: mixture of experts with FP4 weights.
Importing this module registers their CPU and fake forms. Checks and specification are those of grouped_gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .grouped_gemm import _register_m_grouped, _register_masked
from .ops import call_product

__all__ = [
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
]

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(
    op: str,
    operands: dict[str, Any],
    keywords: dict[str, Any],
    out_dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    return call_product(op, getattr(_ops, op), operands, keywords, out_dtype, torch.bfloat16, out)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    grouped_layout: Tensor,
    *,
    layout: str = "indices",
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    expected_m: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_fp8_gemm_nt_contiguous` where ``a``, ``b`` or both may be FP4: E2M1 values, two a byte along K,
    the even element in the low nibble.

    Args:
        a: float8_e4m3fn ``[M, K]``, or FP4 as float4_e2m1fn_x2, int8 or uint8 ``[M, K / 2]``. Inner stride 1, row
            stride and base address multiples of 16 bytes; on SM100 those of FP4 multiples of 32 bytes, and K one of
            128.
        sfa: scales of ``a``; K counts elements. MXFP4 has one per row and 32 of K: ``recipe`` ``[1, 1, 32]``.
        b: ``[G, N, K]`` or ``[G, N, K / 2]``, as ``a``.
        sfb: scales of ``b``.
        grouped_layout: which rows belong to which group; this and the other arguments are those of
            :func:`m_grouped_fp8_gemm_nt_contiguous`.

    Returns:
        ``[M, N]``: a fresh contiguous tensor in which rows that belong to no group are zero, or ``out``.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    What SM90 and SM100 make of FP4: :func:`fp8_fp4_gemm_nt`.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "recipe": recipe, "expected_m": expected_m}
    return _call("m_grouped_fp8_fp4_gemm_nt_contiguous", operands, keywords, out_dtype, out)


def m_grouped_fp8_fp4_gemm_nn_contiguous(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    grouped_layout: Tensor,
    *,
    layout: str = "indices",
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    expected_m: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_fp8_fp4_gemm_nt_contiguous` for FP8 ``b [G, K, N]`` with scales ``[G, ceil(K / gran_k), ceil(N /
    gran_n)]``; FP4 ``b`` would have to be K-major."""
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "recipe": recipe, "expected_m": expected_m}
    return _call("m_grouped_fp8_fp4_gemm_nn_contiguous", operands, keywords, out_dtype, out)


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    expected_m: int,
    *,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_fp8_gemm_nt_masked` where ``a [G, M_max, K]``, ``b [G, N, K]`` or both may be FP4 with K / 2
    bytes a row, as for :func:`m_grouped_fp8_fp4_gemm_nt_contiguous`."""
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "masked_m": masked_m, "expected_m": expected_m}
    return _call("m_grouped_fp8_fp4_gemm_nt_masked", operands, {"recipe": recipe}, out_dtype, out)


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations

for _order in ("nt", "nn"):
    _register_m_grouped(f"m_grouped_fp8_fp4_gemm_{_order}_contiguous", True, _order == "nt", or_fp4=True)
_register_masked("m_grouped_fp8_fp4_gemm_nt_masked", True, or_fp4=True)
