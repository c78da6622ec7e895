"""A product whose columns are written head by head around a gap. Importing this module registers its CPU and fake
forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _checks, reference
from ._cpu import _cpu
from ._fakes import _fake
from .ops import call_product

__all__ = ["fp8_gemm_nt_skip_head_mid"]

Tensor = torch.Tensor

_OP = "fp8_gemm_nt_skip_head_mid"

# ---------------------------------------------------------------------------------------------------------------------
# Public function


def fp8_gemm_nt_skip_head_mid(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    head_splits: Sequence[int],
    *,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_gemm_nt`, each head's columns written around a gap: what attention fills with rotary embeddings later.

    Args:
        a: float8_e4m3fn ``[M, K]``, as for :func:`fp8_gemm_nt`.
        sfa: scales of ``a``.
        b: float8_e4m3fn ``[N, K]``; N is a multiple of ``left + right``, that many rows for each head.
        sfb: scales of ``b``.
        head_splits: ``[left, mid, right]``. The ``left + right`` columns of a head become ``left`` columns, a gap of
            ``mid`` columns, ``right`` columns.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: as for :func:`fp8_gemm_nt`.
        out: the result's shape, inner stride 1, any row stride: written and returned. Its gaps are left alone.

    Returns:
        ``[M, N / (left + right) * (left + mid + right)]``: a fresh contiguous tensor with zeros in the gaps, or
        ``out``.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Specification: ``deep_gemm_ops.skip_head.place_heads``.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "head_splits": list(head_splits)}
    overloads = torch.ops.deep_gemm.fp8_gemm_nt_skip_head_mid
    return call_product(_OP, overloads, operands, {"recipe": recipe}, out_dtype, torch.bfloat16, out)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def place_heads(product: Tensor, head_splits: Sequence[int], out: Tensor) -> Tensor:
    """Writes each head's columns of ``[M, N]`` to their places in ``out`` and nothing in between."""
    left, mid, right = head_splits
    heads = product.unflatten(1, (-1, left + right)) if product.shape[1] else product.reshape(len(product), 0, 1)
    for head in range(heads.shape[1]):
        begin = head * (left + mid + right)
        out[:, begin : begin + left] = heads[:, head, :left]
        out[:, begin + left + mid : begin + left + mid + right] = heads[:, head, left:]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations


def _check(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, head_splits: Sequence[int], real: bool, **rest: Any
) -> _checks.GemmShape:
    return _checks.check_fp8_gemm(_OP, "nt", a, sfa, b, sfb, c=None, heads=head_splits, real=real, **rest)


def _columns(n: int, head_splits: Sequence[int]) -> int:
    left, mid, right = head_splits
    return n // (left + right) * (left + mid + right)


@_fake(_OP)
def _fake_functional(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    head_splits: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    recipe: list[int] | None = None,
) -> Tensor:
    _check(a, sfa, b, sfb, head_splits, False, out_dtype=out_dtype, out=None, recipe=recipe)
    return a.new_empty((a.shape[0], _columns(b.shape[0], head_splits)), dtype=out_dtype)


@_fake(f"{_OP}.out")
def _fake_out(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    head_splits: list[int],
    *,
    recipe: list[int] | None = None,
    out: Tensor,
) -> None:
    _check(a, sfa, b, sfb, head_splits, False, out_dtype=None, out=out, recipe=recipe)


@_cpu(_OP)
def _functional(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    head_splits: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    recipe: list[int] | None = None,
) -> Tensor:
    shape = _check(a, sfa, b, sfb, head_splits, True, out_dtype=out_dtype, out=None, recipe=recipe)
    product = reference.fp8_gemm(a, sfa, b, sfb, out_dtype=out_dtype, recipe=shape[3:])
    out = product.new_zeros((shape.m, _columns(shape.n, head_splits)))
    return place_heads(product, head_splits, out)


@_cpu(f"{_OP}.out")
def _out_form(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    head_splits: list[int],
    *,
    recipe: list[int] | None = None,
    out: Tensor,
) -> None:
    shape = _check(a, sfa, b, sfb, head_splits, True, out_dtype=None, out=out, recipe=recipe)
    product = reference.fp8_gemm(a, sfa, b, sfb, out_dtype=out.dtype, recipe=shape[3:])
    place_heads(product, head_splits, out)
