"""Products of batches of matrices, written as the expressions that attention uses. Importing this module registers
their CPU and fake forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from . import _checks, reference
from ._checks import Dim, fail, one_of, shape_of
from ._cpu import _cpu
from ._fakes import _fake
from .ops import call_product

__all__ = ["einsum", "fp8_einsum"]

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Expression:
    """``bhr,hdr->bhd`` taken apart: the dimensions of both operands and of the result, a letter each.

    ``batch`` counts matrices: those of the result, or those that are summed where it has none.
    """

    text: str

    @property
    def dims(self) -> tuple[str, str, str]:
        inputs, out = self.text.split("->")
        a, b = inputs.split(",")
        return a, b, out

    @property
    def batch(self) -> str:
        a, b, out = self.dims
        everywhere = [letter for letter in a if letter in b and letter in out]
        return everywhere[0] if everywhere else "b"

    @property
    def k(self) -> str:
        a, b, out = self.dims
        return next(letter for letter in a if letter in b and letter not in out and letter != self.batch)

    @property
    def m(self) -> str:
        a, b, _ = self.dims
        return next(letter for letter in a if letter not in b)

    @property
    def n(self) -> str:
        a, b, _ = self.dims
        return next(letter for letter in b if letter not in a)

    def matrices(self, x: Tensor, which: str) -> Tensor:
        """A view as ``[batch, MN, K]`` of an operand ("a" or "b") or its scales, as ``[batch, M, N]`` of the result; a
        sum has a result without batch."""
        a, b, out = self.dims
        if which == "out":
            return x.permute([out.index(letter) for letter in (self.batch, self.m, self.n) if letter in out])
        mine, mn = (a, self.m) if which == "a" else (b, self.n)
        return x.permute([mine.index(letter) for letter in (self.batch, mn, self.k)])


EXPRESSIONS = {text: Expression(text) for text in ("bmk,bnk->mn", "bhr,hdr->bhd", "bhd,hdr->bhr")}
FP8_EXPRESSIONS = {text: Expression(text) for text in ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr")}

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def einsum(
    expr: str,
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out = c + torch.einsum(expr, a, b)`` of BF16 tensors, accumulated in FP32, rounded once.

    Args:
        expr: ``"bmk,bnk->mn"`` (the products of all b are summed, in a fixed order), ``"bhr,hdr->bhd"`` or
            ``"bhd,hdr->bhr"``.
        a: bfloat16, inner stride 1, other strides and base address multiples of 16 bytes
            (``deep_gemm_ops.to_tma_aligned`` makes them so). Any dimension may be 0.
        b: bfloat16, as ``a``.
        c: added, of the result's shape or its last dimension's, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        out: the result's shape, inner stride 1, any other strides: written and returned.

    Returns:
        A fresh contiguous tensor, or ``out``.

    Raises:
        RuntimeError: another expression, or an argument of the wrong dtype, rank, shape, strides or device, or that
            requires grad.

    Specification: ``deep_gemm_ops.batched.reference_einsum``.
    """
    operands = {"expr": expr, "a": a, "b": b}
    return call_product("einsum", torch.ops.deep_gemm.einsum, operands, {"c": c}, out_dtype, torch.bfloat16, out)


def fp8_einsum(
    expr: str,
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
    """``out = c + torch.einsum(expr, a * sfa, b * sfb)`` of FP8 tensors with scales.

    Args:
        expr: ``"bhr,hdr->bhd"``, ``"bhd,hdr->bhr"`` or ``"bhd,bhr->hdr"``: a product for each h.
        a: float8_e4m3fn, inner stride 1. Where the contracted dimension is its last, other strides and base address are
            multiples of 16 bytes; otherwise they may be anything, and on SM90 the operator transposes it first.
        sfa: scales of ``a`` in any strides, in the order of its dimensions: one for each h, each ``gran_k`` along the
            contracted dimension and each ``gran_m`` along the other, ``[b, h, ceil(r / 128)]`` for instance. Of the
            types that :func:`fp8_gemm_nt` takes.
        b: float8_e4m3fn, as ``a``.
        sfb: scales of ``b``, as ``sfa``.
        c: added, of the result's shape or its last dimension's, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: ``[gran_m, gran_n, gran_k]``, as for :func:`fp8_gemm_nt`; by default inferred from the scales.
        out: the result's shape, inner stride 1, any other strides: written and returned.

    Returns:
        A fresh contiguous tensor, or ``out``.

    Raises:
        RuntimeError: another expression, or an argument of the wrong dtype, rank, shape, strides or device, or that
            requires grad.

    Specification: ``deep_gemm_ops.batched.reference_einsum``.
    """
    operands = {"expr": expr, "a": a, "sfa": sfa, "b": b, "sfb": sfb}
    keywords = {"c": c, "recipe": recipe}
    overloads = torch.ops.deep_gemm.fp8_einsum
    return call_product("fp8_einsum", overloads, operands, keywords, out_dtype, torch.bfloat16, out)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_einsum(
    op: str,
    expr: str,
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    *,
    c: Tensor | None,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    recipe: Sequence[int] | None = None,
    real: bool,
) -> tuple[Expression, tuple[int, int, int]]:
    """Check the arguments of ``einsum`` (without scales) and ``fp8_einsum``; returns the expression and the
    granularities."""
    known = EXPRESSIONS if sfa is None else FP8_EXPRESSIONS
    if expr not in known:
        fail(op, "expr", "value", expr, one_of(list(known)))
    expression = known[expr]
    dims_a, dims_b, dims_out = expression.dims
    _checks.check_operands(op, torch.bfloat16 if sfa is None else torch.float8_e4m3fn, a, b, (3, 3))
    if sfa is not None:
        assert sfb is not None
        _checks.check_scales(op, sfa, sfb, (3, 3))
    _checks.check_devices(op, a, b=b, sfa=sfa, sfb=sfb, c=c, out=out)
    _checks.check_out_dtype(op, out_dtype)
    _checks.check_sizes(op, "a", a, dims_a)
    _checks.check_sizes(op, "b", b, dims_b)
    sizes = dict(zip(dims_a, shape_of(a)))
    for letter, size in zip(dims_b, shape_of(b)):
        if not size == sizes.setdefault(letter, size):
            fail(op, "b", letter, size, sizes[letter], f"the {letter} of a")
    # SM90's tensor cores read 16-bit operands in both orders, 8-bit ones K-major only.
    _checks.check_operand_layout(op, "a", a, sfa is None or dims_a[-1] == expression.k, real)
    _checks.check_operand_layout(op, "b", b, sfa is None or dims_b[-1] == expression.k, real)
    grans = (1, 1, 1)
    if sfa is not None:
        assert sfb is not None
        kinds = {expression.k: "k", expression.batch: "group"}
        scale_dims = [
            [Dim(kinds.get(letter, "mn"), letter, sizes[letter]) for letter in dims] for dims in (dims_a, dims_b)
        ]
        grans = _checks.match_recipe(op, sfa, scale_dims[0], sfb, scale_dims[1], recipe)[:3]
    names = f"[{', '.join(dims_out)}]"
    shape = [sizes[letter] for letter in dims_out]
    _checks.check_result(op, names, shape, c=c, out_dtype=out_dtype, out=out)
    return expression, grans


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def reference_einsum(
    expression: Expression,
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    *,
    grans: tuple[int, int, int] = (1, 128, 128),
    c: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    exact: bool = False,
) -> Tensor:
    """``C + einsum(expression, A, B)`` in float32 (float64 with ``exact``), matrix by matrix, rounded once; contiguous.

    The operands are FP8 with scales, or BF16 with None for them.
    """
    dtype = torch.float64 if exact else torch.float32
    gran_m, gran_n, gran_k = grans
    sizes = dict(zip(expression.dims[0] + expression.dims[1], [*a.shape, *b.shape]))
    result = torch.zeros([sizes[letter] for letter in expression.dims[2]], dtype=dtype, device=a.device)
    if c is not None:
        result += c.to(dtype)
    products = expression.matrices(result, "out")
    a, b = expression.matrices(a, "a"), expression.matrices(b, "b")
    if sfa is not None and sfb is not None:
        sfa, sfb = expression.matrices(sfa, "a"), expression.matrices(sfb, "b")
    for i in range(len(a)):
        if sfa is None or sfb is None:
            product = a[i].to(dtype) @ b[i].to(dtype).t()
        else:
            left = reference.dequantize(a[i], sfa[i], gran_m, gran_k, dtype)
            product = left @ reference.dequantize(b[i], sfb[i], gran_n, gran_k, dtype).t()
        (products[i] if products.dim() == 3 else products).add_(product)
    return result.to(out_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations


def _register(op: str, fp8: bool) -> None:
    def with_scales(operands: tuple[Any, ...]) -> tuple[Any, ...]:
        return operands if fp8 else (*operands[:2], None, operands[2], None)

    def run(operands: tuple[Any, ...], c: Tensor | None, dtype: torch.dtype, **rest: Any) -> Tensor:
        expression, grans = check_einsum(op, *operands, c=c, real=True, **rest)
        return reference_einsum(expression, *operands[1:], grans=grans, c=c, out_dtype=dtype)

    @_fake(op)
    def fake(
        *given: Any,
        c: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
    ) -> Tensor:
        _, a, _, b, _ = operands = with_scales(given)
        expression, _ = check_einsum(op, *operands, c=c, out_dtype=out_dtype, out=None, recipe=recipe, real=False)
        dims_a, dims_b, dims_out = expression.dims
        sizes = {**dict(zip(dims_b, b.shape)), **dict(zip(dims_a, a.shape))}
        return a.new_empty([sizes[letter] for letter in dims_out], dtype=out_dtype)

    @_fake(f"{op}.out")
    def fake_out(*given: Any, c: Tensor | None = None, recipe: list[int] | None = None, out: Tensor) -> None:
        check_einsum(op, *with_scales(given), c=c, out_dtype=None, out=out, recipe=recipe, real=False)

    @_cpu(op)
    def functional(
        *given: Any,
        c: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
    ) -> Tensor:
        return run(with_scales(given), c, out_dtype, out_dtype=out_dtype, out=None, recipe=recipe)

    @_cpu(f"{op}.out")
    def out_form(*given: Any, c: Tensor | None = None, recipe: list[int] | None = None, out: Tensor) -> None:
        out.copy_(run(with_scales(given), c, out.dtype, out_dtype=None, out=out, recipe=recipe))


_register("einsum", False)
_register("fp8_einsum", True)
