"""Scales between these operators and ``torch.nn.functional.scaled_mm``: the same numbers, laid out in another way.

Both multiply a block of FP8 values with its FP32 scale, and both take one scale per 128 elements of K and per row
(``ScalingType.BlockWise1x128``) or per 128 rows (``BlockWise128x128``). docs/scaled_mm.md has the conventions side by
side.
"""

from __future__ import annotations

import torch

from . import _checks
from ._checks import fail, mn_major_strides, shape_of
from .layout import align, ceil_div

__all__ = ["from_scaled_mm_scales", "to_scaled_mm_scales"]

Tensor = torch.Tensor


def _check(op: str, sf: Tensor, gran_mn: int) -> None:
    _checks.check_dtype(op, "sf", sf, (torch.float32,))
    _checks.check_rank(op, "sf", sf, (2,))
    if gran_mn not in _checks.GRANULARITIES:
        fail(op, "gran_mn", "value", gran_mn, _checks.one_of(_checks.GRANULARITIES))


def _arranged(sf: Tensor, strides: tuple[int, int]) -> Tensor:
    if sf.stride() == strides:
        return sf
    return sf.new_empty_strided(tuple(sf.shape), strides).copy_(sf)


def to_scaled_mm_scales(sf: Tensor, gran_mn: int) -> Tensor:
    """Scales of an operand of ``fp8_gemm_nt`` as ``scaled_mm`` takes them.

    Args:
        sf: float32 ``[ceil(MN / gran_mn), ceil(K / 128)]``, any strides, as the casts return them.
        gran_mn: 1 for ``ScalingType.BlockWise1x128``, 128 for ``ScalingType.BlockWise128x128``.

    Returns:
        For 1: ``[MN, ceil(K / 128)]`` with strides ``(1, MN)``, ``sf`` itself where it lies so already (what casts
        return does for MN a multiple of 4). For 128: ``[ceil(K / 128) rounded up to 4, ceil(MN / 128)]`` with stride 1
        along K, padded with zeros.

    Raises:
        RuntimeError: wrong dtype, rank or ``gran_mn``.
    """
    _check("to_scaled_mm_scales", sf, gran_mn)
    mn, k_blocks = sf.shape
    if gran_mn == 1:
        return _arranged(sf, (1, mn))
    return torch.nn.functional.pad(sf, (0, align(k_blocks, 4) - k_blocks)).contiguous().t()


def from_scaled_mm_scales(sf: Tensor, gran_mn: int, k: int) -> Tensor:
    """The other way: scales as ``scaled_mm`` takes them for ``fp8_gemm_nt``.

    Args:
        sf: float32, what :func:`to_scaled_mm_scales` returns; any strides.
        gran_mn: 1 for ``ScalingType.BlockWise1x128``, 128 for ``ScalingType.BlockWise128x128``.
        k: K of the operand, in elements: ``sf`` alone does not tell where its padding begins.

    Returns:
        ``[ceil(MN / gran_mn), ceil(K / 128)]``, MN-major and TMA-aligned, ``sf`` itself where it lies so already.

    Raises:
        RuntimeError: wrong dtype, rank, shape or ``gran_mn``.
    """
    op = "from_scaled_mm_scales"
    _check(op, sf, gran_mn)
    k_blocks = ceil_div(k, 128)
    rows = shape_of(sf)
    if gran_mn == 1:
        if not rows[1] == _checks.concrete(k_blocks):
            fail(op, "sf", "shape", rows, f"[MN, ceil(K / 128)] = [MN, {k_blocks}]")
    else:
        padded = align(k_blocks, 4)
        if not rows[0] == _checks.concrete(padded):
            fail(op, "sf", "shape", rows, f"[ceil(K / 128) rounded up to 4, ceil(MN / 128)] = [{padded}, ...]")
        sf = sf[:k_blocks].t()
    return _arranged(sf, mn_major_strides(sf.shape))
