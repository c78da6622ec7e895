"""The product of hyper-connections' pre-norm: ``a @ b^T`` and the sums of squares of ``a``'s rows, reading ``a`` once.

Everything of this family: public function, checks, specification, CPU and fake implementation. Importing the module
registers the last two.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._cpu import _cpu
from ._fakes import _fake
from .layout import ceil_div
from .ops import _refuse_grad

__all__ = ["tf32_hc_prenorm_gemm"]

Tensor = torch.Tensor

_OP = "tf32_hc_prenorm_gemm"
_overloads = torch.ops.deep_gemm.tf32_hc_prenorm_gemm
#: Elements of K that the parts of a split are counted in.
BLOCK_K = 64


def tf32_hc_prenorm_gemm(
    a: Tensor, b: Tensor, *, num_splits: int | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``d = a @ b^T`` in TF32 or better and ``sqr_sum[m] = sum_k a[m, k]^2``, reading ``a`` once.

    Args:
        a: bfloat16 ``[M, K]``, inner stride 1, row stride and base address multiples of 16 bytes
            (``deep_gemm_ops.to_tma_aligned`` makes them so). M, N and K may be 0.
        b: float32 ``[N, K]``, as ``a``. Meant for N up to 32. Up to 64 ``a`` is still read once, at less speed; beyond
            that each 64 rows of ``b`` read it again.
        num_splits: split K into so many parts, by whole blocks of 64, and return each part's result: the caller adds
            them up. None adds them here.
        out: ``(d, sqr_sum)`` to write, inner stride 1, other strides any that keep elements apart; returned.

    Returns:
        ``(d, sqr_sum)``, float32 ``[M, N]`` and ``[M]``, or ``[num_splits, M, N]`` and ``[num_splits, M]``: fresh
        contiguous tensors unless ``out`` is given. Part s covers K from ``64 * (s * B // num_splits)`` to
        ``64 * ((s + 1) * B // num_splits)``, B the number of blocks; a part without a block is 0.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides, value or device, or requires grad.

    An element of ``b`` may be rounded to TF32 (11 significant bits). On SM90 it keeps 16, as the sum of two BF16
    values; products are exact, sums FP32. The same inputs give the same bits. Specification:
    ``deep_gemm_ops.prenorm_gemm.reference``.
    """
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        _refuse_grad(_OP, a=a, b=b)
    keywords: dict[str, Any] = {} if num_splits is None else {"num_splits": num_splits}
    if out is None:
        return _overloads.default(a, b, **keywords)
    d, sqr_sum = out
    _overloads.out(a, b, out=d, out_sqr_sum=sqr_sum, **keywords)
    return d, sqr_sum


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_output(arg: str, x: Tensor, names: str, expected: list[int], has_rows: bool) -> None:
    """A result to write to: dense along its last dimension, no two of its elements in one place."""
    _checks.check_dtype(_OP, arg, x, (torch.float32,))
    _checks.check_shape(_OP, arg, x, names, expected)
    shape, strides = _checks.shape_of(x), _checks.strides_of(x)
    if 0 in shape:
        return
    _checks.check_inner_stride(_OP, arg, x, None)
    extent = shape[-1]
    if has_rows:
        if shape[-2] > 1 and not strides[-2] >= extent:
            _checks.fail(_OP, arg, "row stride", strides[-2], f"at least {extent}")
        extent += (shape[-2] - 1) * strides[-2]
    if x.dim() > 1 + has_rows and shape[0] > 1 and not strides[0] >= extent:
        _checks.fail(_OP, arg, "split stride", strides[0], f"at least {extent}")


def _check(a: Tensor, b: Tensor, num_splits: int | None, outs: tuple[Tensor, Tensor] | None, real: bool) -> None:
    """``real`` is False where tensors have no memory (fakes)."""
    _checks.check_dtype(_OP, "a", a, (torch.bfloat16,))
    _checks.check_rank(_OP, "a", a, (2,))
    _checks.check_dtype(_OP, "b", b, (torch.float32,))
    _checks.check_rank(_OP, "b", b, (2,))
    _checks.check_device(_OP, "b", b, a.device, "a")
    if outs is not None:
        _checks.check_device(_OP, "out", outs[0], a.device, "a")
        _checks.check_device(_OP, "out_sqr_sum", outs[1], a.device, "a")
    _checks.check_sizes(_OP, "a", a, ("M", "K"))
    _checks.check_sizes(_OP, "b", b, ("N", "K"))
    (m, k), (n, k_of_b) = _checks.shape_of(a), _checks.shape_of(b)
    if not k_of_b == k:
        _checks.fail(_OP, "b", "K", k_of_b, k, "the K of a")
    _checks.check_tma_readable(_OP, "a", a, real)
    _checks.check_tma_readable(_OP, "b", b, real)
    parts = None if num_splits is None else _checks.concrete(num_splits)
    if parts is not None and not 1 <= parts <= _checks.MAX_SIZE:
        _checks.fail(_OP, "num_splits", "value", parts, f"1 to {_checks.MAX_SIZE}")
    if outs is None:
        return
    lead, prefix = ([], "") if parts is None else ([parts], "num_splits, ")
    _check_output("out", outs[0], f"[{prefix}M, N]", [*lead, m, n], True)
    _check_output("out_sqr_sum", outs[1], f"[{prefix}M]", [*lead, m], False)


# ---------------------------------------------------------------------------------------------------------------------
# Specification


def reference(
    a: Tensor, b: Tensor, *, num_splits: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What :func:`tf32_hc_prenorm_gemm` means, computed in ``dtype``: the CPU implementation and the tests' oracle.

    ``b`` is not rounded here. A kernel may round it to TF32, to nearest or towards zero; its relative error (Frobenius)
    is at most 1e-3.
    """
    parts, blocks, k = num_splits or 1, ceil_div(a.shape[1], BLOCK_K), a.shape[1]
    bounds = [min(k, BLOCK_K * (s * blocks // parts)) for s in range(parts + 1)]
    pieces = [(a[:, low:high].to(dtype), b[:, low:high].to(dtype)) for low, high in zip(bounds, bounds[1:])]
    d = torch.stack([x @ y.t() for x, y in pieces])
    sqr_sum = torch.stack([x.square().sum(1) for x, _ in pieces])
    return (d[0], sqr_sum[0]) if num_splits is None else (d, sqr_sum)


# ---------------------------------------------------------------------------------------------------------------------
# Fakes


@_fake(_OP)
def _fake_functional(a: Tensor, b: Tensor, *, num_splits: int | None = None) -> tuple[Tensor, Tensor]:
    _check(a, b, num_splits, None, real=False)
    lead = () if num_splits is None else (num_splits,)
    d = a.new_empty((*lead, a.shape[0], b.shape[0]), dtype=torch.float32)
    return d, a.new_empty((*lead, a.shape[0]), dtype=torch.float32)


@_fake(f"{_OP}.out")
def _fake_out(a: Tensor, b: Tensor, *, num_splits: int | None = None, out: Tensor, out_sqr_sum: Tensor) -> None:
    _check(a, b, num_splits, (out, out_sqr_sum), real=False)


# ---------------------------------------------------------------------------------------------------------------------
# CPU


@_cpu(_OP)
def _cpu_functional(a: Tensor, b: Tensor, *, num_splits: int | None = None) -> tuple[Tensor, Tensor]:
    _check(a, b, num_splits, None, real=True)
    return reference(a, b, num_splits=num_splits)


@_cpu(f"{_OP}.out")
def _cpu_out(a: Tensor, b: Tensor, *, num_splits: int | None = None, out: Tensor, out_sqr_sum: Tensor) -> None:
    _check(a, b, num_splits, (out, out_sqr_sum), real=True)
    d, sqr_sum = reference(a, b, num_splits=num_splits)
    out.copy_(d)
    out_sqr_sum.copy_(sqr_sum)
