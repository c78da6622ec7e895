"""Products of many groups in one launch: mixture of experts. Importing this module registers their CPU and fake forms.

M-grouped: each group owns rows of A and D and has its own B (forward, input gradient). K-grouped: each group owns a
part of K and has its own D (weight gradient). Sizes of groups stay on the device: the host never waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _checks, knobs, reference
from ._checks import Dim, check_dtype, check_rank, concrete, fail, one_of, shape_of
from ._cpu import _cpu
from ._fakes import _fake
from .fp8_fp4_gemm import expand_fp4
from .layout import ceil_div, group_ranges
from .ops import call_product

__all__ = [
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]

Tensor = torch.Tensor

M_LAYOUTS = ("indices", "psum", "offsets")
#: Of layouts that have a number for each group, which the kernels keep in shared memory.
MAX_GROUPS = 1024
K_LAYOUTS = ("sizes", "psum", "offsets")

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(
    op: str,
    operands: dict[str, Any],
    keywords: dict[str, Any],
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    default_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return call_product(op, getattr(torch.ops.deep_gemm, op), operands, keywords, out_dtype, default_dtype, out)


def m_grouped_fp8_gemm_nt_contiguous(
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
    """``out[i] = (a[i] * sfa[i]) @ (b[g] * sfb[g])^T`` with g the group (expert) that owns row i.

    Args:
        a: float8_e4m3fn ``[M, K]``, the rows of all groups one after the other; inner stride 1, row stride and base
            address multiples of 16 bytes (``deep_gemm_ops.to_tma_aligned`` makes them so). M, N, K and G may be 0, and
            G at most 1024, except with ``"indices"``.
        sfa: scales of ``a``, ``[ceil(M / gran_m), ceil(K / gran_k)]``, of the types that :func:`fp8_gemm_nt` takes, any
            strides.
        b: float8_e4m3fn ``[G, N, K]``; inner stride 1, other strides and base address multiples of 16 bytes.
        sfb: scales of ``b``, ``[G, ceil(N / gran_n), ceil(K / gran_k)]``, any strides.
        grouped_layout: int32, contiguous, on the device of ``a``: which rows belong to which group, see ``layout``.
        layout: what ``grouped_layout`` holds.
            ``"indices"``: ``[M]``, the group of each row, -1 (or anything outside 0 .. G - 1) for padding. A group's
            rows follow each other and start at a multiple of :func:`get_mk_alignment_for_contiguous_layout`, for which
            SM90's kernels want a multiple of 16.
            ``"psum"``: ``[G]``, the row behind each group's last; a group starts at the previous one's end rounded up
            to that alignment.
            ``"offsets"``: ``[G]``, as ``psum`` without any padding between groups (the ``offs`` of
            ``torch._grouped_mm``).
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: ``[gran_m, gran_n, gran_k]``, as for :func:`fp8_gemm_nt`; by default inferred from the scales.
        expected_m: rows of a typical group, a hint for the choice of the kernel. M / G by default.
        out: ``[M, N]``, inner stride 1, any row stride: written and returned. Where K is not 0, rows that belong to no
            group are left alone.

    Returns:
        ``[M, N]``: a fresh contiguous tensor in which rows that belong to no group are zero, or ``out``.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    The host never reads ``grouped_layout``. Contents that break its rules give wrong rows, but touch no memory outside
    the tensors. A captured CUDA graph keeps the alignment it was captured with. Specification:
    ``deep_gemm_ops.grouped_gemm.reference_m_grouped``.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "recipe": recipe, "expected_m": expected_m}
    return _call("m_grouped_fp8_gemm_nt_contiguous", operands, keywords, out_dtype, out)


def m_grouped_fp8_gemm_nn_contiguous(
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
    """:func:`m_grouped_fp8_gemm_nt_contiguous` for ``b [G, K, N]`` with scales ``[G, ceil(K / gran_k), ceil(N /
    gran_n)]``.

    ``b`` needs inner stride 1 but no alignment: on SM90, whose tensor cores read 8-bit operands K-major only, the
    operator transposes it first.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "recipe": recipe, "expected_m": expected_m}
    return _call("m_grouped_fp8_gemm_nn_contiguous", operands, keywords, out_dtype, out)


def m_grouped_fp8_gemm_nt_masked(
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
    """``out[g] = (a[g] * sfa[g]) @ (b[g] * sfb[g])^T`` for the first ``masked_m[g]`` rows of each group: decoding.

    Args:
        a: float8_e4m3fn ``[G, M_max, K]``; inner stride 1, other strides and base address multiples of 16 bytes.
        sfa: scales of ``a``, ``[G, ceil(M_max / gran_m), ceil(K / gran_k)]``, any strides.
        b: float8_e4m3fn ``[G, N, K]``, as ``a``.
        sfb: scales of ``b``, ``[G, ceil(N / gran_n), ceil(K / gran_k)]``, any strides.
        masked_m: int32 ``[G]``, contiguous, on the device of ``a``: the rows of each group that count. May change
            between replays of a captured CUDA graph; the host never reads it.
        expected_m: rows of a typical group, a hint for the choice of the kernel.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: as for :func:`fp8_gemm_nt`.
        out: ``[G, M_max, N]``, inner stride 1: written and returned. Rows from ``masked_m[g]`` on are left alone.

    Returns:
        ``[G, M_max, N]``: a fresh contiguous tensor in which rows from ``masked_m[g]`` on are unspecified, or ``out``.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Specification: ``deep_gemm_ops.grouped_gemm.reference_masked``.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "masked_m": masked_m, "expected_m": expected_m}
    return _call("m_grouped_fp8_gemm_nt_masked", operands, {"recipe": recipe}, out_dtype, out)


def k_grouped_fp8_gemm_tn_contiguous(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    ks: Tensor,
    *,
    layout: str = "sizes",
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[g] = c[g] + A_g^T B_g``, A_g and B_g the rows of ``a`` and ``b`` that belong to group g: weight gradients.

    Args:
        a: float8_e4m3fn ``[K, M]``, K the sum over the groups; inner stride 1, any row stride. On SM90 the operator
            transposes both operands first; SM100's kernels read them where they lie if the rows of both start at
            multiples of 16 bytes. M, N, K and G may be 0, and so may the size of any group.
        sfa: scales of ``a``, float32 or float8_e8m0fnu ``[rows, M]``, any strides: one for each 128 rows of a group,
            ``ceil(k_g / 128)`` for group g, group after group. Rows behind the last group's are not used.
        b: float8_e4m3fn ``[K, N]``, as ``a``.
        sfb: scales of ``b``, ``[rows, N]``.
        ks: int32 ``[G]``, contiguous, on the device of ``a``; the host never reads it.
        layout: what ``ks`` holds. ``"sizes"``: how many of the rows each group owns. ``"offsets"``: where each group
            ends and the next one starts. ``"psum"``: where each group ends; the next one starts there, rounded up to
            :func:`get_mk_alignment_for_contiguous_layout`.
        c: added to the products, ``[G, M, N]`` or a row ``[N]``, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.float32 (default) or torch.bfloat16.
        out: ``[G, M, N]``, inner stride 1: written and returned.

    Returns:
        ``[G, M, N]``, a fresh contiguous tensor unless ``out`` is given. An empty group's is ``c``, or zero.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Contents of ``ks`` that point outside of ``a`` are clamped. Specification:
    ``deep_gemm_ops.grouped_gemm.reference_k_grouped``.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "ks": ks}
    keywords = {"layout": layout, "c": c}
    return _call("k_grouped_fp8_gemm_tn_contiguous", operands, keywords, out_dtype, out, torch.float32)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    ks: Tensor,
    *,
    layout: str = "sizes",
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`k_grouped_fp8_gemm_tn_contiguous` of operands that are K-major within each group, in either of two forms.

    Flat: ``a`` is ``[K * M]``, for each group ``[M, k_g]``, contiguous, group after group, and ``b`` ``[K * N]``
    likewise. M and N are those of the scales, ``[rows, M]`` and ``[rows, N]``. Every group's size and start is a
    multiple of 128. On SM90 the operator copies both to the other form first.

    Padded: ``a`` is ``[M, 128 * rows]`` and ``b`` ``[N, 128 * rows]``, each group from a multiple of 128 on with zeros
    behind its end, so that row i of the scales belongs to columns ``128 * i`` to ``128 * i + 127``:
    what :func:`k_grouped_per_channel_cast_to_fp8_k_major` returns, and what SM90's kernel reads as it lies. Groups are
    of any size, and ``ks`` holds what it held for the cast.
    """
    operands = {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "ks": ks}
    keywords = {"layout": layout, "c": c}
    return _call("k_grouped_fp8_gemm_nt_contiguous", operands, keywords, out_dtype, out, torch.float32)


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    grouped_layout: Tensor,
    *,
    layout: str = "indices",
    out_dtype: torch.dtype | None = None,
    expected_m: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_fp8_gemm_nt_contiguous` of bfloat16 ``a [M, K]`` and ``b [G, N, K]``, without scales."""
    operands = {"a": a, "b": b, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "expected_m": expected_m}
    return _call("m_grouped_bf16_gemm_nt_contiguous", operands, keywords, out_dtype, out)


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    grouped_layout: Tensor,
    *,
    layout: str = "indices",
    out_dtype: torch.dtype | None = None,
    expected_m: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_bf16_gemm_nt_contiguous` for ``b [G, K, N]``, which the tensor cores read as it lies: strides
    and base address are multiples of 16 bytes."""
    operands = {"a": a, "b": b, "grouped_layout": grouped_layout}
    keywords = {"layout": layout, "expected_m": expected_m}
    return _call("m_grouped_bf16_gemm_nn_contiguous", operands, keywords, out_dtype, out)


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor,
    b: Tensor,
    masked_m: Tensor,
    expected_m: int,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`m_grouped_fp8_gemm_nt_masked` of bfloat16 ``a [G, M_max, K]`` and ``b [G, N, K]``, without scales."""
    operands = {"a": a, "b": b, "masked_m": masked_m, "expected_m": expected_m}
    return _call("m_grouped_bf16_gemm_nt_masked", operands, {}, out_dtype, out)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor,
    b: Tensor,
    ks: Tensor,
    *,
    layout: str = "sizes",
    c: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`k_grouped_fp8_gemm_tn_contiguous` of bfloat16 ``a [K, M]`` and ``b [K, N]``, without scales.

    The tensor cores read both as they lie: row strides and base addresses are multiples of 16 bytes.
    """
    operands = {"a": a, "b": b, "ks": ks}
    keywords = {"layout": layout, "c": c}
    return _call("k_grouped_bf16_gemm_tn_contiguous", operands, keywords, out_dtype, out, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_start(
    op: str,
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    ranks: tuple[Sequence[int], Sequence[int]],
    scale_ranks: tuple[int, int],
    scale_dtypes: Sequence[torch.dtype],
    groups_arg: str,
    groups: Tensor,
    c: Tensor | None,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    or_fp4: tuple[bool, bool] = (False, False),
) -> None:
    """Dtypes, ranks and devices; ``or_fp4`` says which of ``a`` and ``b`` may be packed FP4."""
    dtype = torch.bfloat16 if sfa is None else torch.float8_e4m3fn
    for i, (arg, operand, accepted) in enumerate((("a", a, ranks[0]), ("b", b, ranks[1]))):
        check_dtype(op, arg, operand, (dtype, *_checks.FP4_DTYPES) if or_fp4[i] else (dtype,))
        check_rank(op, arg, operand, accepted)
    if sfa is not None:
        assert sfb is not None
        _checks.check_scales(op, sfa, sfb, scale_ranks, scale_dtypes)
    check_dtype(op, groups_arg, groups, (torch.int32,))
    check_rank(op, groups_arg, groups, (1,))
    _checks.check_devices(op, a, **{"b": b, "sfa": sfa, "sfb": sfb, groups_arg: groups, "c": c, "out": out})
    _checks.check_out_dtype(op, out_dtype)


def _check_layout(op: str, layout: str, layouts: Sequence[str]) -> None:
    if layout not in layouts:
        fail(op, "layout", "value", layout, one_of(layouts))


def _check_groups(op: str, arg: str, groups: Tensor, names: str, size: int) -> None:
    _checks.check_shape(op, arg, groups, names, [size])
    _checks.check_inner_stride(op, arg, groups, None)


def check_m_grouped(
    op: str,
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    groups: Tensor,
    *,
    b_k_major: bool,
    masked: bool,
    layout: str = "indices",
    expected_m: int | None = None,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    recipe: Sequence[int] | None,
    real: bool,
    or_fp4: bool = False,
) -> _checks.GemmShape:
    """Check the arguments of an m-grouped product, FP8 or (without scales) BF16; of a masked one M is M_max. With
    ``or_fp4`` K-major operands may be packed FP4."""
    groups_arg, m_name = ("masked_m", "M_max") if masked else ("grouped_layout", "M")
    ranks = (3 if masked else 2, 3)
    operand_ranks = ((ranks[0],), (ranks[1],))
    types = (or_fp4, or_fp4 and b_k_major)
    _check_start(
        op, a, sfa, b, sfb, operand_ranks, ranks, _checks.SCALE_DTYPES, groups_arg, groups, None, out_dtype, out, types
    )
    if not masked:
        _check_layout(op, layout, M_LAYOUTS)
    if expected_m is not None and not concrete(expected_m) >= 0:
        fail(op, "expected_m", "value", concrete(expected_m), "an integer of at least 0")
    _checks.check_sizes(op, "a", a, ("G", m_name, "K") if masked else ("M", "K"))
    _checks.check_sizes(op, "b", b, ("G", "N", "K") if b_k_major else ("G", "K", "N"))
    m, k = shape_of(a)[-2:]
    num_groups, n, k_of_b = shape_of(b) if b_k_major else [shape_of(b)[i] for i in (0, 2, 1)]
    if a.dtype in _checks.FP4_DTYPES:
        k = k + k
    if b.dtype in _checks.FP4_DTYPES:
        k_of_b = k_of_b + k_of_b
    if not k_of_b == k:
        fail(op, "b", "K", k_of_b, k, "the K of a")
    if masked and not num_groups == shape_of(a)[0]:
        fail(op, "b", "G", num_groups, shape_of(a)[0], "the G of a")
    _checks.check_operand_layout(op, "a", a, True, real)
    _checks.check_operand_layout(op, "b", b, b_k_major or sfa is None, real)
    per_row = not masked and layout == "indices"
    if not per_row and not num_groups <= MAX_GROUPS:
        fail(op, "b", "G", num_groups, f"at most {MAX_GROUPS}")
    _check_groups(op, groups_arg, groups, "[M]" if per_row else "[G]", m if per_row else num_groups)
    grans = (1, 1, 1, 1)
    if sfa is not None:
        assert sfb is not None
        group = [Dim("group", "G", num_groups)]
        dims_a = (group if masked else []) + _checks.matrix_dims(m_name, m, k)
        dims_b = group + _checks.matrix_dims("N", n, k, not b_k_major)
        grans = _checks.match_recipe(op, sfa, dims_a, sfb, dims_b, recipe, b.dtype in _checks.FP4_DTYPES)
    names, shape = ("[G, M_max, N]", [num_groups, m, n]) if masked else ("[M, N]", [m, n])
    _checks.check_result(op, names, shape, c=None, out_dtype=out_dtype, out=out)
    return _checks.GemmShape(m, n, k, *grans)


def _flat_rows(op: str, arg: str, x: Tensor, name: str, mn: int) -> int | None:
    """K of a flattened operand, None where MN is 0."""
    size = shape_of(x)[0]
    if not mn > 0:
        if not size == 0:
            fail(op, arg, "size", size, f"0 ({name} = 0)")
        return None
    if not size % (mn * 128) == 0:
        fail(op, arg, "size", size, f"a multiple of 128 * {name} = {128 * mn}")
    return size // mn


def check_k_grouped(
    op: str,
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    ks: Tensor,
    *,
    k_major: bool,
    layout: str,
    c: Tensor | None,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    real: bool,
) -> tuple[int, int, int]:
    """Check the arguments of a k-grouped product, FP8 or (without scales) BF16; returns (M, N, K)."""
    flat = k_major and a.dim() == 1
    ranks = ((1, 2), (a.dim(),)) if k_major else ((2,), (2,))
    # Packed scales hold four K groups a word, which would straddle the products' groups.
    scale_dtypes = (torch.float32, torch.float8_e8m0fnu)
    _check_start(op, a, sfa, b, sfb, ranks, (2, 2), scale_dtypes, "ks", ks, c, out_dtype, out)
    _check_layout(op, layout, K_LAYOUTS)
    if flat:
        assert sfa is not None and sfb is not None
        _checks.check_sizes(op, "sfa", sfa, ("rows", "M"))
        _checks.check_sizes(op, "sfb", sfb, ("rows", "N"))
        m, n = shape_of(sfa)[1], shape_of(sfb)[1]
        k, k_of_b = _flat_rows(op, "a", a, "M", m), _flat_rows(op, "b", b, "N", n)
        k = k_of_b if k is None else k
        k = 0 if k is None else k
        k_of_b = k if k_of_b is None else k_of_b
        if not k <= _checks.MAX_SIZE:
            fail(op, "a", "K", k, f"at most {_checks.MAX_SIZE}")
    else:
        _checks.check_sizes(op, "a", a, ("M", "K") if k_major else ("K", "M"))
        _checks.check_sizes(op, "b", b, ("N", "K") if k_major else ("K", "N"))
        k, m = reversed(shape_of(a)) if k_major else shape_of(a)
        k_of_b, n = reversed(shape_of(b)) if k_major else shape_of(b)
    if not k_of_b == k:
        fail(op, "b", "K", k_of_b, k, "the K of a")
    for arg, operand in (("a", a), ("b", b)):
        if flat:
            _checks.check_inner_stride(op, arg, operand, None)
        else:
            _checks.check_operand_layout(op, arg, operand, sfa is None or k_major, real)
    num_groups = shape_of(ks)[0]
    if not num_groups <= MAX_GROUPS:
        fail(op, "ks", "G", num_groups, f"at most {MAX_GROUPS}")
    _check_groups(op, "ks", ks, "[G]", num_groups)
    if sfa is not None:
        assert sfb is not None
        for arg, sf, name, mn in (("sfa", sfa, "M", m), ("sfb", sfb, "N", n)):
            rows, columns = shape_of(sf)
            if not columns == mn:
                fail(op, arg, name, columns, mn, f"the {name} of {arg[-1]}")
            if k_major and not flat:
                if not rows * 128 == k:
                    fail(op, arg, "rows", rows, f"K / 128 = {k / 128:g}")
            # Between groups of "psum" there are rows of a and b without scales.
            elif layout != "psum" and num_groups > 0 and not rows >= ceil_div(k, 128):
                fail(op, arg, "rows", rows, f"at least ceil(K / 128) = {ceil_div(k, 128)}")
    _checks.check_result(op, "[G, M, N]", [num_groups, m, n], c=c, out_dtype=out_dtype, out=out)
    return m, n, k


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def _values(x: Tensor, sf: Tensor | None, grans: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if sf is None:
        return x.to(dtype)
    return reference.dequantize(expand_fp4(x) if x.dtype in _checks.FP4_DTYPES else x, sf, *grans, dtype)


def reference_m_grouped(
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    grouped_layout: Tensor,
    out: Tensor,
    *,
    layout: str = "indices",
    alignment: int = 128,
    b_k_major: bool = True,
    grans: Sequence[int] = (1, 128, 128),
    exact: bool = False,
) -> Tensor:
    """Writes ``A_g @ B_g^T`` to the rows of each group of ``out [M, N]``, which is returned, and no others.

    Args:
        a: ``[M, K]``; ``b``: ``[G, N, K]``, or ``[G, K, N]``: FP8 (K-major also packed FP4) with scales, or BF16 with
            None for them.
        grouped_layout: ``[M]`` or ``[G]``, see :func:`m_grouped_fp8_gemm_nt_contiguous`.
        alignment: rows that a group's start is a multiple of in the layout "psum".
        grans: (gran_m, gran_n, gran_k), or with those of both operands (gran_m, gran_n, gran_k_a, gran_k_b).
        exact: dequantise and multiply in float64 instead of float32.
    """
    dtype = torch.float64 if exact else torch.float32
    gran_m, gran_n, gran_k, gran_k_b = *grans[:3], grans[-1]
    rows = _values(a, sfa, (gran_m, gran_k), dtype)
    if layout == "indices":
        owned = [(grouped_layout == group).nonzero()[:, 0] for group in range(len(b))]
    else:
        ranges = group_ranges(grouped_layout.tolist(), len(a), layout, alignment)
        owned = [torch.arange(begin, end, device=a.device) for begin, end in ranges]
    for group, where in enumerate(owned):
        if len(where) == 0:
            continue
        weight, scales = b[group], None if sfb is None else sfb[group]
        if not b_k_major:
            weight, scales = weight.t(), None if scales is None else scales.t()
        out[where] = (rows[where] @ _values(weight, scales, (gran_n, gran_k_b), dtype).t()).to(out.dtype)
    return out


def reference_masked(
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    masked_m: Tensor,
    out: Tensor,
    *,
    grans: Sequence[int] = (1, 128, 128),
    exact: bool = False,
) -> Tensor:
    """Writes ``A_g @ B_g^T`` to the first ``masked_m[g]`` rows of each ``out[g]`` and no others; returns ``out``.

    ``a`` is ``[G, M_max, K]``, ``b`` ``[G, N, K]``, ``out`` ``[G, M_max, N]``; the rest as for
    :func:`reference_m_grouped`.
    """
    dtype = torch.float64 if exact else torch.float32
    gran_m, gran_n, gran_k, gran_k_b = *grans[:3], grans[-1]
    for group, count in enumerate(masked_m.tolist()):
        count = min(max(count, 0), a.shape[1])
        sfa_g, sfb_g = (None if sf is None else sf[group] for sf in (sfa, sfb))
        rows = _values(a[group], sfa_g, (gran_m, gran_k), dtype)[:count]
        out[group, :count] = (rows @ _values(b[group], sfb_g, (gran_n, gran_k_b), dtype).t()).to(out.dtype)
    return out


def reference_k_grouped(
    a: Tensor,
    sfa: Tensor | None,
    b: Tensor,
    sfb: Tensor | None,
    ks: Tensor,
    *,
    layout: str = "sizes",
    alignment: int = 128,
    k_major: bool = False,
    c: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    exact: bool = False,
) -> Tensor:
    """``C_g + A_g^T @ B_g`` for each group, contiguous ``[G, M, N]``.

    Args:
        a: ``[K, M]``; ``b``: ``[K, N]``: FP8 with scales ``[rows, M]`` and ``[rows, N]``, or BF16 with None for them.
            ``k_major``: ``[K * M]`` and ``[K * N]``, each group K-major, or ``[M, 128 * rows]`` and ``[N, 128 * rows]``
            with each group from a multiple of 128 on.
        ks: ``[G]``, see :func:`k_grouped_fp8_gemm_tn_contiguous`.
        alignment: what a group's start is a multiple of in the layout "psum".
        c: ``[G, M, N]`` or ``[N]``.
        exact: dequantise and multiply in float64 instead of float32.
    """
    dtype = torch.float64 if exact else torch.float32
    flat, padded = k_major and a.dim() == 1, k_major and a.dim() == 2
    sizes = [x.shape[-1] if sf is None else sf.shape[1] for x, sf in ((a, sfa), (b, sfb))]
    k = a.shape[-1] if padded else max(x.shape[0] // max(mn, 1) if flat else x.shape[0] for x, mn in zip((a, b), sizes))
    products = torch.zeros(len(ks), *sizes, dtype=dtype, device=a.device)
    if c is not None:
        products += c.to(dtype)
    sf_row = 0
    for group, (begin, end) in enumerate(group_ranges(ks.tolist(), k, layout, alignment)):
        sf_rows = ceil_div(end - begin, 128)
        if padded:
            begin, end = min(128 * sf_row, k), min(128 * sf_row + end - begin, k)
        factors = []
        for x, sf, mn in zip((a, b), (sfa, sfb), sizes):
            if flat:
                x = x[begin * mn : end * mn].view(mn, end - begin)
            else:
                x = x[:, begin:end] if padded else x[begin:end].t()
            if sf is not None:
                sf = reference.scales_to_float32(sf[sf_row : sf_row + ceil_div(end - begin, 128)], mn)
                # Rows of scales that are not there are zero, as the hardware reads them.
                sf = torch.nn.functional.pad(sf, (0, 0, 0, ceil_div(end - begin, 128) - len(sf))).t()
            factors.append(_values(x, sf, (1, 128), dtype))
        products[group] += factors[0] @ factors[1].t()
        sf_row += sf_rows
    return products.to(out_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Fake and CPU implementations


def _with_scales(operands: tuple[Any, ...], fp8: bool) -> tuple[Any, ...]:
    """(a, sfa, b, sfb, groups, ...) of either family."""
    return operands if fp8 else (operands[0], None, operands[1], None, *operands[2:])


def _register_m_grouped(op: str, fp8: bool, b_k_major: bool, or_fp4: bool = False) -> None:
    def check(operands: tuple[Any, ...], real: bool, **rest: Any) -> _checks.GemmShape:
        return check_m_grouped(op, *operands, b_k_major=b_k_major, masked=False, real=real, or_fp4=or_fp4, **rest)

    def write(operands: tuple[Any, ...], shape: _checks.GemmShape, layout: str, out: Tensor) -> Tensor:
        alignment = knobs.get_mk_alignment_for_contiguous_layout()
        options = {"layout": layout, "alignment": alignment, "b_k_major": b_k_major, "grans": shape[3:]}
        if shape.k == 0:
            return out.zero_()
        return reference_m_grouped(*operands, out, **options)

    @_fake(op)
    def fake(
        *given: Any,
        layout: str = "indices",
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
        expected_m: int | None = None,
    ) -> Tensor:
        operands = _with_scales(given, fp8)
        rest = {"out_dtype": out_dtype, "out": None, "recipe": recipe}
        check(operands, False, layout=layout, expected_m=expected_m, **rest)
        a, b = operands[0], operands[2]
        return a.new_empty((a.shape[0], b.shape[1 if b_k_major else 2]), dtype=out_dtype)

    @_fake(f"{op}.out")
    def fake_out(
        *given: Any,
        layout: str = "indices",
        recipe: list[int] | None = None,
        expected_m: int | None = None,
        out: Tensor,
    ) -> None:
        rest = {"out_dtype": None, "out": out, "recipe": recipe}
        check(_with_scales(given, fp8), False, layout=layout, expected_m=expected_m, **rest)

    @_cpu(op)
    def functional(
        *given: Any,
        layout: str = "indices",
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
        expected_m: int | None = None,
    ) -> Tensor:
        operands = _with_scales(given, fp8)
        rest = {"out_dtype": out_dtype, "out": None, "recipe": recipe}
        shape = check(operands, True, layout=layout, expected_m=expected_m, **rest)
        return write(operands, shape, layout, operands[0].new_zeros((shape.m, shape.n), dtype=out_dtype))

    @_cpu(f"{op}.out")
    def out_form(
        *given: Any,
        layout: str = "indices",
        recipe: list[int] | None = None,
        expected_m: int | None = None,
        out: Tensor,
    ) -> None:
        operands = _with_scales(given, fp8)
        rest = {"out_dtype": None, "out": out, "recipe": recipe}
        write(operands, check(operands, True, layout=layout, expected_m=expected_m, **rest), layout, out)


def _register_masked(op: str, fp8: bool, or_fp4: bool = False) -> None:
    def check(operands: tuple[Any, ...], real: bool, **rest: Any) -> _checks.GemmShape:
        *tensors, expected_m = operands
        options = {"b_k_major": True, "masked": True, "expected_m": expected_m, "or_fp4": or_fp4}
        return check_m_grouped(op, *tensors, real=real, **options, **rest)

    @_fake(op)
    def fake(*given: Any, out_dtype: torch.dtype = torch.bfloat16, recipe: list[int] | None = None) -> Tensor:
        operands = _with_scales(given, fp8)
        check(operands, False, out_dtype=out_dtype, out=None, recipe=recipe)
        a, b = operands[0], operands[2]
        return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype)

    @_fake(f"{op}.out")
    def fake_out(*given: Any, recipe: list[int] | None = None, out: Tensor) -> None:
        check(_with_scales(given, fp8), False, out_dtype=None, out=out, recipe=recipe)

    @_cpu(op)
    def functional(*given: Any, out_dtype: torch.dtype = torch.bfloat16, recipe: list[int] | None = None) -> Tensor:
        operands = _with_scales(given, fp8)
        shape = check(operands, True, out_dtype=out_dtype, out=None, recipe=recipe)
        out = operands[0].new_zeros((len(operands[0]), shape.m, shape.n), dtype=out_dtype)
        return reference_masked(*operands[:-1], out, grans=shape[3:])

    @_cpu(f"{op}.out")
    def out_form(*given: Any, recipe: list[int] | None = None, out: Tensor) -> None:
        operands = _with_scales(given, fp8)
        shape = check(operands, True, out_dtype=None, out=out, recipe=recipe)
        reference_masked(*operands[:-1], out, grans=shape[3:])


def _register_k_grouped(op: str, fp8: bool, k_major: bool) -> None:
    def check(operands: tuple[Any, ...], real: bool, **rest: Any) -> tuple[int, int, int]:
        return check_k_grouped(op, *operands, k_major=k_major, real=real, **rest)

    def product(operands: tuple[Any, ...], layout: str, c: Tensor | None, dtype: torch.dtype) -> Tensor:
        alignment = knobs.get_mk_alignment_for_contiguous_layout()
        options = {"layout": layout, "alignment": alignment, "k_major": k_major}
        return reference_k_grouped(*operands, c=c, out_dtype=dtype, **options)

    @_fake(op)
    def fake(
        *given: Any, c: Tensor | None = None, out_dtype: torch.dtype = torch.float32, layout: str = "sizes"
    ) -> Tensor:
        a, sfa, b, sfb, ks = operands = _with_scales(given, fp8)
        check(operands, False, layout=layout, c=c, out_dtype=out_dtype, out=None)
        m, n = (sfa if k_major else a).shape[1], (sfb if k_major else b).shape[1]
        return a.new_empty((ks.shape[0], m, n), dtype=out_dtype)

    @_fake(f"{op}.out")
    def fake_out(*given: Any, c: Tensor | None = None, layout: str = "sizes", out: Tensor) -> None:
        check(_with_scales(given, fp8), False, layout=layout, c=c, out_dtype=None, out=out)

    @_cpu(op)
    def functional(
        *given: Any, c: Tensor | None = None, out_dtype: torch.dtype = torch.float32, layout: str = "sizes"
    ) -> Tensor:
        operands = _with_scales(given, fp8)
        check(operands, True, layout=layout, c=c, out_dtype=out_dtype, out=None)
        return product(operands, layout, c, out_dtype)

    @_cpu(f"{op}.out")
    def out_form(*given: Any, c: Tensor | None = None, layout: str = "sizes", out: Tensor) -> None:
        operands = _with_scales(given, fp8)
        check(operands, True, layout=layout, c=c, out_dtype=None, out=out)
        out.copy_(product(operands, layout, c, out.dtype))


for _type, _is_fp8 in (("fp8", True), ("bf16", False)):
    for _order in ("nt", "nn"):
        _register_m_grouped(f"m_grouped_{_type}_gemm_{_order}_contiguous", _is_fp8, _order == "nt")
    _register_masked(f"m_grouped_{_type}_gemm_nt_masked", _is_fp8)
    _register_k_grouped(f"k_grouped_{_type}_gemm_tn_contiguous", _is_fp8, False)
_register_k_grouped("k_grouped_fp8_gemm_nt_contiguous", True, True)
