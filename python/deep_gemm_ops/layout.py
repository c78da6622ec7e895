"""Sizes and layouts of operands and scale factors: small helpers in plain PyTorch.

The kernels read FP8 operands through the Tensor Memory Accelerator (TMA): base address and row stride have to be
multiples of 16 bytes and the inner dimension dense. ``to_tma_aligned`` turns any matrix into one that is. Scale
factors are best kept MN-major with the other stride rounded up to 16 bytes ("MN-major, TMA-aligned"); the casts
produce them so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["TMA_ALIGNMENT_BYTES", "align", "ceil_div", "get_tma_aligned_size", "group_ranges", "to_tma_aligned"]

#: What base addresses and strides of tensors read through TMA have to be multiples of, in bytes.
TMA_ALIGNMENT_BYTES = 16


def ceil_div(x: int, y: int) -> int:
    """``x / y`` rounded up, for ``x >= 0`` and ``y > 0``. Symbolic integers stay symbolic."""
    return (x + y - 1) // y


def align(x: int, y: int) -> int:
    """``x`` rounded up to a multiple of ``y``. Symbolic integers stay symbolic."""
    return ceil_div(x, y) * y


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """Number of elements that ``x`` elements take when padded to 16 bytes.

    Args:
        x: number of elements.
        element_size: size of one element in bytes, a divisor of 16.

    Raises:
        RuntimeError: ``element_size`` does not divide 16.
    """
    if element_size not in (1, 2, 4, 8, 16):
        raise RuntimeError(f"get_tma_aligned_size: element_size has value {element_size}, expected 1, 2, 4, 8 or 16")
    return align(x, TMA_ALIGNMENT_BYTES // element_size)


def to_tma_aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where TMA can read it, else a copy that it can.

    Args:
        x: ``[R, C]`` or ``[G, R, C]``, any dtype of 1 to 16 bytes, any strides.

    Returns:
        A tensor of the same shape and values with inner stride 1, rows that start at multiples of 16 bytes (the row
        stride may exceed C) and an aligned base address. The padding between rows is uninitialised and never read.

    Raises:
        RuntimeError: ``x`` has another rank.
    """
    if x.dim() not in (2, 3):
        raise RuntimeError(f"to_tma_aligned: x has rank {x.dim()}, expected 2 or 3")
    cols = x.shape[-1]
    dense = x.stride(-1) == 1 or cols <= 1
    rows_fit = all(
        size <= 1 or (stride * x.element_size() % TMA_ALIGNMENT_BYTES == 0 and stride >= cols)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1])
    )
    # A traced tensor has no address; PyTorch's allocators align what they hand out to 16 bytes and more.
    base_fits = torch.compiler.is_compiling() or x.data_ptr() % TMA_ALIGNMENT_BYTES == 0
    if x.numel() == 0 or (dense and rows_fit and base_fits):
        return x
    padded = get_tma_aligned_size(cols, x.element_size())
    return x.new_empty((*x.shape[:-1], padded))[..., :cols].copy_(x)


def group_ranges(ends: Sequence[int], total: int, layout: str, alignment: int) -> list[tuple[int, int]]:
    """[begin, end) of each group among ``total`` rows, from ``sizes``, ``psum`` or ``offsets``. What points outside is
    clamped, so that the ranges ascend and never overlap."""
    ranges, end = [], 0
    for value in ends:
        begin = min(align(end, alignment), total) if layout == "psum" else end
        end = min(max(begin + value if layout == "sizes" else value, begin), total)
        ranges.append((begin, end))
    return ranges
