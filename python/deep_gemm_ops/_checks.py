"""Every argument check, written once for the CPU implementations and the fakes (and repeated in C++ for CUDA).

All messages have one form, ``<op>: <arg> has <what> <value>, expected <value>``, where a helper can repair the argument
followed by `` (use deep_gemm_ops.<helper>)``, and are raised as RuntimeError.

Under tracing, sizes and strides may be symbolic. A check must not specialise them: a guard such as ``K % 16 == 0``
would recompile or be refused by torch.export. So each symbolic value is replaced by its hint, the value it has in the
call that is being traced, which costs no guard; where there is none (data-dependent sizes) it compares equal to
whatever is expected. What tracing cannot see the operator checks when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch

from .layout import TMA_ALIGNMENT_BYTES, align, ceil_div

LAYOUTS = ("nt", "nn", "tn", "tt")
GRANULARITIES = (1, 128)  # of scales along M and N
GRANULARITIES_K = (128, 32)
_SAME_K = tuple((k, k) for k in GRANULARITIES_K)
MIXED_K = (128, 32)  # of A and of B, where that is FP4
OUT_DTYPES = (torch.bfloat16, torch.float32)
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.int32)
#: Two E2M1 values a byte, the low nibble first.
FP4_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
CAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Kernels count rows, columns and K in 32 bits; offsets in 64.
MAX_SIZE = 2**31 - 1


class GemmShape(NamedTuple):
    """Sizes and scale granularities of one product, in ``nt`` terms."""

    m: int
    n: int
    k: int
    gran_m: int
    gran_n: int
    gran_k: int
    gran_k_b: int  # of B's scales; only where B is FP4 it may differ


# ---------------------------------------------------------------------------------------------------------------------
# Values and texts


class _Unknown(int):
    """A size that only the running program knows: every comparison comes out in its favour."""

    def _favourable(self, _other: object) -> bool:
        return True

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _favourable  # type: ignore[assignment]
    __hash__ = int.__hash__

    def _unknown(self, *_others: object) -> _Unknown:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __rfloordiv__ = _unknown
    __mod__ = __rmod__ = __neg__ = _unknown

    def __str__(self) -> str:
        return "?"

    __repr__ = __str__


_UNKNOWN = _Unknown(0)


def concrete(value: int | torch.SymInt) -> int:
    """A plain integer for a size: itself, its hint, or an unknown that no check fails on. Never a guard."""
    if isinstance(value, int):
        return value
    node = getattr(value, "node", None)
    try:
        hint = node.hint if node is not None else None
    except Exception:  # some kinds of symbol raise instead of having no hint
        hint = None
    return hint if isinstance(hint, int) else _UNKNOWN


def shape_of(x: torch.Tensor) -> list[int]:
    return [concrete(size) for size in x.shape]


def strides_of(x: torch.Tensor) -> list[int]:
    return [concrete(stride) for stride in x.stride()]


def text(value: object) -> str:
    """How a value is written in a message, the same in Python and C++."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(text(item) for item in value) + "]"
    return str(value)


def one_of(values: Sequence[object]) -> str:
    """``x``, ``x or y``, ``x, y or z``."""
    words = [text(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def fail(op: str, arg: str, what: str, value: object, expected: object, note: str = "") -> NoReturn:
    raise RuntimeError(f"{op}: {arg} has {what} {text(value)}, expected {text(expected)}{f' ({note})' if note else ''}")


# ---------------------------------------------------------------------------------------------------------------------
# One property of one argument


def check_dtype(op: str, arg: str, x: torch.Tensor, dtypes: Sequence[torch.dtype], note: str = "") -> None:
    if x.dtype not in dtypes:
        fail(op, arg, "dtype", x.dtype, one_of(dtypes), note)


def check_rank(op: str, arg: str, x: torch.Tensor, ranks: Sequence[int]) -> None:
    if x.dim() not in ranks:
        fail(op, arg, "rank", x.dim(), one_of(ranks))


def check_device(op: str, arg: str, x: torch.Tensor, device: torch.device, like: str) -> None:
    if x.device != device:
        fail(op, arg, "device", x.device, device, f"the device of {like}")


def check_sizes(op: str, arg: str, x: torch.Tensor, names: Sequence[str]) -> None:
    """No dimension exceeds what kernels count in 32 bits."""
    for name, size in zip(names, shape_of(x), strict=True):
        if not size <= MAX_SIZE:
            fail(op, arg, name, size, f"at most {MAX_SIZE}")


def check_inner_stride(op: str, arg: str, x: torch.Tensor, helper: str | None = "to_tma_aligned") -> None:
    """The last dimension is dense (irrelevant where it has one element or the tensor none)."""
    shape, strides = shape_of(x), strides_of(x)
    if shape[-1] > 1 and 0 not in shape and not strides[-1] == 1:
        fail(op, arg, "inner stride", strides[-1], 1, f"use deep_gemm_ops.{helper}" if helper else "")


def check_rows_apart(op: str, arg: str, x: torch.Tensor) -> None:
    """Rows of a tensor that is written do not overlap."""
    shape, strides = shape_of(x), strides_of(x)
    if 0 in shape:
        return
    # From the dimension whose elements are closest to the one whose are farthest apart.
    extent = shape[-1]
    for i in sorted(range(x.dim() - 1), key=lambda i: strides[i]):
        if shape[i] > 1:
            if not strides[i] >= extent:
                what = "row stride" if x.dim() == 2 else f"dimension-{i} stride"
                fail(op, arg, what, strides[i], f"at least {extent}")
            extent += (shape[i] - 1) * strides[i]


def check_tma_readable(op: str, arg: str, x: torch.Tensor, real: bool) -> None:
    """What TMA reads as it lies: dense rows, 16-byte outer strides and base address, no two rows overlapping."""
    check_inner_stride(op, arg, x)
    shape, strides = shape_of(x), strides_of(x)
    helper = "use deep_gemm_ops.to_tma_aligned"
    if 0 in shape:
        return
    for i in range(x.dim() - 1):
        if shape[i] > 1:
            what = "row stride" if x.dim() == 2 else f"dimension-{i} stride"
            stride_bytes = strides[i] * x.element_size()
            if not stride_bytes % TMA_ALIGNMENT_BYTES == 0:
                fail(op, arg, what, f"{stride_bytes} bytes", f"a multiple of {TMA_ALIGNMENT_BYTES} bytes", helper)
            if not strides[i] >= shape[-1]:
                fail(op, arg, what, strides[i], f"at least {shape[-1]}", helper)
    if real and x.data_ptr() % TMA_ALIGNMENT_BYTES != 0:
        past = x.data_ptr() % TMA_ALIGNMENT_BYTES
        fail(op, arg, "base address", f"{past} modulo {TMA_ALIGNMENT_BYTES} bytes", 0, helper)


def check_shape(op: str, arg: str, x: torch.Tensor, names: str, expected: Sequence[int]) -> None:
    shape = shape_of(x)
    if not (len(shape) == len(expected) and all(size == want for size, want in zip(shape, expected))):
        fail(op, arg, "shape", shape, f"{names} = {text(list(expected))}")


# ---------------------------------------------------------------------------------------------------------------------
# GEMM


def _scale_columns(k: int, gran_k: int, packed: bool) -> int:
    columns = ceil_div(k, gran_k)
    return ceil_div(columns, 4) if packed else columns


class Dim(NamedTuple):
    """A dimension of an operand, which its scales follow: along M or N and along K they are fewer."""

    kind: str  # "mn", "k", or "group": a scale for each
    name: str
    size: int


def matrix_dims(mn: str, mn_size: int, k_size: int, k_first: bool = False) -> list[Dim]:
    """The dimensions of ``[MN, K]``, or of ``[K, MN]``."""
    dims = [Dim("mn", mn, mn_size), Dim("k", "K", k_size)]
    return dims[::-1] if k_first else dims


def match_scales(
    op: str, arg: str, sf: torch.Tensor, dims: Sequence[Dim], grans: Sequence[int], grans_k: Sequence[int]
) -> tuple[int, list[int]]:
    """Granularities that explain the shape of ``sf``: (along MN, all that fit along K)."""
    packed = sf.dtype == torch.int32
    shape = shape_of(sf)
    found = {"mn": [], "k": []}
    groups_fit = True
    for dim, size in zip(dims, shape, strict=True):
        if dim.kind == "mn":
            found["mn"] = [gran for gran in grans if size == ceil_div(dim.size, gran)]
        elif dim.kind == "k":
            found["k"] = [gran for gran in grans_k if size == _scale_columns(dim.size, gran, packed)]
        elif not size == dim.size:
            groups_fit = False
    if groups_fit and found["mn"] and found["k"]:
        return found["mn"][0], found["k"]

    names, sizes = [], []
    for dim in dims:
        if dim.kind == "mn":
            words = [dim.name if gran == 1 else f"ceil({dim.name} / {gran})" for gran in grans]
            counts = [ceil_div(dim.size, gran) for gran in grans]
        elif dim.kind == "k":
            words = [f"ceil({dim.name} / {gran * 4 if packed else gran})" for gran in grans_k]
            counts = [_scale_columns(dim.size, gran, packed) for gran in grans_k]
        else:
            words, counts = [dim.name], [dim.size]
        names.append(" or ".join(words))
        sizes.append(one_of(list(dict.fromkeys(counts))))
    fail(op, arg, "shape", shape, f"{text(names)} = {text(sizes)}")


def check_recipe(op: str, recipe: Sequence[int] | None, or_mixed: bool = False) -> None:
    """``recipe`` is [gran_m, gran_n, gran_k] or absent; with ``or_mixed`` also [gran_m, gran_n, gran_k_a, gran_k_b]."""
    if recipe is None:
        return
    ks = tuple(recipe[2:])
    fits = (len(ks) == 1 and ks[0] in GRANULARITIES_K) or (or_mixed and ks in (*_SAME_K, MIXED_K))
    if not fits or not all(gran in GRANULARITIES for gran in recipe[:2]):
        expected = "[1 or 128, 1 or 128, 128 or 32]" + (" or [1 or 128, 1 or 128, 128, 32]" if or_mixed else "")
        fail(op, "recipe", "value", list(recipe), expected)


def match_recipe(
    op: str,
    sfa: torch.Tensor,
    dims_a: Sequence[Dim],
    sfb: torch.Tensor,
    dims_b: Sequence[Dim],
    recipe: Sequence[int] | None,
    or_mixed: bool = False,
) -> tuple[int, int, int, int]:
    """The granularities (gran_m, gran_n, gran_k of A, gran_k of B), given or inferred from the shapes of the scales.
    One granularity along K serves both, or with ``or_mixed`` those of MIXED_K."""
    check_recipe(op, recipe, or_mixed)
    grans_m = [recipe[0]] if recipe is not None else GRANULARITIES
    grans_n = [recipe[1]] if recipe is not None else GRANULARITIES
    pairs = [(recipe[2], recipe[-1])] if recipe is not None else [*_SAME_K, *([MIXED_K] if or_mixed else [])]
    gran_m, fit_a = match_scales(op, "sfa", sfa, dims_a, grans_m, list(dict.fromkeys(k for k, _ in pairs)))
    # What sfa rules out is no longer on offer.
    pairs = [pair for pair in pairs if pair[0] in fit_a]
    gran_n, fit_b = match_scales(op, "sfb", sfb, dims_b, grans_n, list(dict.fromkeys(k for _, k in pairs)))
    pairs = [pair for pair in pairs if pair[1] in fit_b]
    # Scales of K <= 32 fit all and mean the same; packed words hold up to four scales, so beyond that it makes a
    # difference.
    k = next(dim.size for dim in dims_a if dim.kind == "k")
    if len(pairs) > 1 and torch.int32 in (sfa.dtype, sfb.dtype) and not isinstance(k, _Unknown) and k > 32:
        names = [", ".join(str(k) for k in (pair if pair == MIXED_K else pair[:1])) for pair in pairs]
        expected = one_of([f"[gran_m, gran_n, {name}]" for name in names])
        fail(op, "recipe", "value", None, expected, f"packed scales fit {'both' if len(pairs) == 2 else 'all'} here")
    return gran_m, gran_n, *pairs[0]


def check_operands(op: str, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, ranks: tuple[int, int]) -> None:
    for arg, operand, rank in (("a", a, ranks[0]), ("b", b, ranks[1])):
        check_dtype(op, arg, operand, (dtype,))
        check_rank(op, arg, operand, (rank,))


def check_scales(
    op: str,
    sfa: torch.Tensor,
    sfb: torch.Tensor,
    ranks: tuple[int, int],
    dtypes: Sequence[torch.dtype] = SCALE_DTYPES,
) -> None:
    for arg, scales, rank in (("sfa", sfa, ranks[0]), ("sfb", sfb, ranks[1])):
        check_dtype(op, arg, scales, dtypes)
        check_rank(op, arg, scales, (rank,))


def check_devices(op: str, a: torch.Tensor, **others: torch.Tensor | None) -> None:
    for arg, tensor in others.items():
        if tensor is not None:
            check_device(op, arg, tensor, a.device, "a")


def check_out_dtype(op: str, out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        fail(op, "out_dtype", "value", out_dtype, one_of(OUT_DTYPES))


def check_operand_layout(op: str, arg: str, x: torch.Tensor, by_tma: bool, real: bool) -> None:
    """An operand that the kernel reads as it lies, or one that is transposed first."""
    if by_tma:
        check_tma_readable(op, arg, x, real)
    else:
        check_inner_stride(op, arg, x)


def check_result(
    op: str,
    names: str,
    shape: Sequence[int],
    *,
    c: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
) -> None:
    """``out`` of this shape, and ``c`` of it or of its last dimension."""
    result_dtype = out.dtype if out is not None else out_dtype
    if out is not None:
        check_dtype(op, "out", out, OUT_DTYPES)
        check_shape(op, "out", out, names, shape)
        check_inner_stride(op, "out", out, None)
        check_rows_apart(op, "out", out)
    if c is not None:
        if c.dtype != result_dtype:
            fail(op, "c", "dtype", c.dtype, result_dtype, "the dtype of the result")
        actual, full, bias = shape_of(c), list(shape), [shape[-1]]
        if not (actual == full or actual == bias):
            bias_name = names[1:-1].split(", ")[-1]
            fail(op, "c", "shape", actual, f"{names} or [{bias_name}] = {text(full)} or {text(bias)}")
        check_inner_stride(op, "c", c, None)


def check_gemm(
    op: str,
    dtype: torch.dtype,
    layout: str,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    c: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
    recipe: Sequence[int] | None,
    real: bool,
    heads: Sequence[int] | None = None,
    or_fp4: bool = False,
) -> GemmShape:
    """Check the arguments of a product of two matrices; ``real`` is False where tensors have no memory (fakes).

    ``scales`` are those of FP8 operands, (sfa, sfb). ``heads`` are [left, mid, right] of columns of the result. With
    ``or_fp4`` K-major operands may be packed FP4.

    Returns:
        The sizes and the granularities, given or inferred.
    """
    a_k_major, b_k_major = layout[0] == "n", layout[1] == "t"
    for arg, operand, k_major in (("a", a, a_k_major), ("b", b, b_k_major)):
        check_dtype(op, arg, operand, (dtype, *FP4_DTYPES) if or_fp4 and k_major else (dtype,))
        check_rank(op, arg, operand, (2,))
    if scales is not None:
        check_scales(op, *scales, (2, 2))
        check_devices(op, a, b=b, sfa=scales[0], sfb=scales[1], c=c, out=out)
    else:
        check_devices(op, a, b=b, c=c, out=out)
    check_out_dtype(op, out_dtype)
    if heads is not None:
        check_head_splits(op, heads)

    check_sizes(op, "a", a, ("M", "K") if a_k_major else ("K", "M"))
    check_sizes(op, "b", b, ("N", "K") if b_k_major else ("K", "N"))
    m, k = shape_of(a) if a_k_major else reversed(shape_of(a))
    n, k_of_b = shape_of(b) if b_k_major else reversed(shape_of(b))
    if a.dtype in FP4_DTYPES:
        k = k + k
    if b.dtype in FP4_DTYPES:
        k_of_b = k_of_b + k_of_b
    if not k_of_b == k:
        fail(op, "b", "K", k_of_b, k, "the K of a")
    # SM90's tensor cores read 16-bit operands in both orders, 8-bit ones K-major only.
    check_operand_layout(op, "a", a, a_k_major or scales is None, real)
    check_operand_layout(op, "b", b, b_k_major or scales is None, real)
    grans = (1, 1, 1, 1)
    if scales is not None:
        dims_a, dims_b = matrix_dims("M", m, k, not a_k_major), matrix_dims("N", n, k, not b_k_major)
        grans = match_recipe(op, scales[0], dims_a, scales[1], dims_b, recipe, b.dtype in FP4_DTYPES)
    if heads is None:
        check_result(op, "[M, N]", [m, n], c=c, out_dtype=out_dtype, out=out)
    else:
        left, mid, right = heads
        if not n % (left + right) == 0:
            fail(op, "b", "N", n, f"a multiple of left + right = {left + right}")
        columns = n // (left + right) * (left + mid + right)
        if not columns <= MAX_SIZE:
            fail(op, "head_splits", "columns of the result", columns, f"at most {MAX_SIZE}")
        names = "[M, N / (left + right) * (left + mid + right)]"
        check_result(op, names, [m, columns], c=None, out_dtype=out_dtype, out=out)
    return GemmShape(m, n, k, *grans)


def check_head_splits(op: str, heads: Sequence[int]) -> None:
    if len(heads) != 3 or not all(0 <= part <= MAX_SIZE for part in heads) or not 0 < heads[0] + heads[2] <= MAX_SIZE:
        fail(op, "head_splits", "value", list(heads), "[left, mid, right], none negative, with left + right positive")


def check_fp8_gemm(
    op: str,
    layout: str,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    **rest: object,
) -> GemmShape:
    """:func:`check_gemm` of ``fp8_gemm_<layout>``."""
    return check_gemm(op, torch.float8_e4m3fn, layout, a, b, scales=(sfa, sfb), **rest)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Casts


def cast_scale_shape(
    kind: str, rows: int, cols: int, gran_k: int, packed: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shape and strides of the scales that a cast of ``[rows, cols]`` returns. Symbolic sizes stay symbolic.

    ``kind`` is "per_token", "per_channel" or "per_block". The scales are MN-major with the other stride rounded up to
    16 bytes; for per_channel MN is the second dimension, since its scales belong to the transposed operand.
    """
    if kind == "per_channel":
        groups = ceil_div(rows, gran_k)
        return (ceil_div(groups, 4) if packed else groups, cols), (align(cols, 4), 1)
    mn = ceil_div(rows, 128) if kind == "per_block" else rows
    groups = ceil_div(cols, gran_k)
    return (mn, ceil_div(groups, 4) if packed else groups), (1, align(mn, 4))


def check_cast(
    op: str,
    kind: str,
    x: torch.Tensor,
    *,
    gran_k: int,
    use_packed_ue8m0: bool,
    out: torch.Tensor | None = None,
    out_sf: torch.Tensor | None = None,
) -> None:
    """Check the arguments of ``<kind>_cast_to_fp8``."""
    check_dtype(op, "x", x, CAST_DTYPES)
    check_rank(op, "x", x, (2,))
    check_sizes(op, "x", x, ("dimension 0", "dimension 1"))
    check_inner_stride(op, "x", x, "to_tma_aligned")
    if gran_k not in GRANULARITIES_K:
        fail(op, "gran_k", "value", gran_k, "128 or 32")
    if out is None or out_sf is None:
        return
    check_device(op, "out", out, x.device, "x")
    check_device(op, "out_sf", out_sf, x.device, "x")
    check_dtype(op, "out", out, (torch.float8_e4m3fn,))
    check_dtype(op, "out_sf", out_sf, (torch.int32 if use_packed_ue8m0 else torch.float32,))
    rows, cols = shape_of(x)
    check_shape(op, "out", out, "the shape of x", [rows, cols])
    check_inner_stride(op, "out", out, None)
    check_rows_apart(op, "out", out)
    shape, strides = cast_scale_shape(kind, rows, cols, gran_k, use_packed_ue8m0)
    check_shape(op, "out_sf", out_sf, "the shape of the scales", shape)
    check_exact_strides(op, "out_sf", out_sf, strides)


def check_exact_strides(op: str, arg: str, x: torch.Tensor, strides: Sequence[int]) -> None:
    """``x`` has these strides, where they matter: along dimensions of more than one element, in a tensor of any."""
    shape, actual = shape_of(x), strides_of(x)
    if 0 in shape:
        return
    if not all(size == 1 or have == want for size, have, want in zip(shape, actual, strides, strict=True)):
        fail(op, arg, "strides", actual, list(strides), "MN-major, 16-byte aligned")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def mn_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an MN-major, TMA-aligned ``[MN, X]`` or ``[G, MN, X]`` tensor of 4-byte elements."""
    mn, columns = shape[-2], shape[-1]
    aligned = align(mn, 4)
    return (aligned * columns, 1, aligned) if len(shape) == 3 else (1, aligned)


def _check_out(
    op: str, out: torch.Tensor | None, x: torch.Tensor, like: str, dtype: torch.dtype, shape: Sequence[int]
) -> bool:
    if out is None:
        return False
    check_device(op, "out", out, x.device, like)
    check_dtype(op, "out", out, (dtype,))
    check_shape(op, "out", out, "the shape of the result", shape)
    return True


def check_transpose_fp8(x: torch.Tensor, out: torch.Tensor | None = None) -> None:
    op = "transpose_fp8"
    check_dtype(op, "x", x, (torch.float8_e4m3fn,))
    check_rank(op, "x", x, (2,))
    check_sizes(op, "x", x, ("dimension 0", "dimension 1"))
    check_inner_stride(op, "x", x)
    rows, cols = shape_of(x)
    if _check_out(op, out, x, "x", torch.float8_e4m3fn, [cols, rows]):
        assert out is not None
        check_inner_stride(op, "out", out, None)
        check_rows_apart(op, "out", out)


def check_mn_major(op: str, sf: torch.Tensor, packed: bool, out: torch.Tensor | None = None) -> None:
    """``get_mn_major_tma_aligned_tensor`` and, with ``packed``, its UE8M0 form."""
    check_dtype(op, "sf", sf, (torch.float32,))
    check_rank(op, "sf", sf, (2, 3))
    check_sizes(op, "sf", sf, ("groups", "MN", "K groups")[-sf.dim() :])
    shape = shape_of(sf)
    if packed:
        shape[-1] = ceil_div(shape[-1], 4)
    if _check_out(op, out, sf, "sf", torch.int32 if packed else torch.float32, shape):
        assert out is not None
        check_exact_strides(op, "out", out, mn_major_strides(shape))


def check_k_grouped_packed(sf: torch.Tensor, ks: torch.Tensor, gran_k: int) -> None:
    op = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor"
    check_dtype(op, "sf", sf, (torch.float32,))
    check_rank(op, "sf", sf, (2,))
    check_dtype(op, "ks", ks, (torch.int32,))
    check_rank(op, "ks", ks, (1,))
    check_device(op, "ks", ks, sf.device, "sf")
    check_sizes(op, "sf", sf, ("K groups", "MN"))
    if gran_k not in GRANULARITIES_K:
        fail(op, "gran_k", "value", gran_k, "128 or 32")


def check_expand_ue8m0(sf: torch.Tensor, k_sf: int, out: torch.Tensor | None = None) -> None:
    op = "expand_ue8m0"
    check_dtype(op, "sf", sf, (torch.float8_e8m0fnu, torch.int32))
    check_rank(op, "sf", sf, (2, 3))
    check_sizes(op, "sf", sf, ("groups", "MN", "K groups")[-sf.dim() :])
    k_sf, shape = concrete(k_sf), shape_of(sf)
    if not 0 <= k_sf <= MAX_SIZE:
        fail(op, "k_sf", "value", k_sf, f"0 to {MAX_SIZE}")
    packed = sf.dtype == torch.int32
    columns = ceil_div(k_sf, 4) if packed else k_sf
    if not shape[-1] == columns:
        lead = "[G, MN, " if len(shape) == 3 else "[MN, "
        names = lead + ("ceil(k_sf / 4)]" if packed else "k_sf]")
        fail(op, "sf", "shape", shape, f"{names} = {text([*shape[:-1], columns])}")
    result = [*shape[:-1], k_sf]
    if _check_out(op, out, sf, "sf", torch.float32, result):
        assert out is not None
        check_exact_strides(op, "out", out, mn_major_strides(result))


def check_transform_sf(
    sf: torch.Tensor, mn: int, k: int, recipe: Sequence[int], num_groups: int | None, is_sfa: bool | None
) -> tuple[int, int]:
    """Arguments of ``transform_sf_into_required_layout``; returns (gran_mn, gran_k)."""
    op = "transform_sf_into_required_layout"
    check_dtype(op, "sf", sf, (torch.float32, torch.float8_e8m0fnu, torch.int32))
    if len(recipe) == 3:
        if is_sfa is None:
            fail(op, "is_sfa", "value", None, "True or False", "the recipe has three entries")
        grans = (recipe[0 if is_sfa else 1], recipe[2])
        allowed = "[1 or 128, 1 or 128, 128 or 32]"
        fits = recipe[0] in GRANULARITIES and recipe[1] in GRANULARITIES
    elif len(recipe) == 2:
        if is_sfa is not None:
            fail(op, "is_sfa", "value", is_sfa, None, "the recipe has two entries")
        grans, allowed = (recipe[0], recipe[1]), "[1 or 128, 128 or 32]"
        fits = recipe[0] in GRANULARITIES
    else:
        fail(op, "recipe", "length", len(recipe), "2 or 3")
    if not (fits and grans[1] in GRANULARITIES_K):
        fail(op, "recipe", "value", list(recipe), allowed)
    mn, k = concrete(mn), concrete(k)
    for arg, value in (("mn", mn), ("k", k)):
        if not 0 <= value <= MAX_SIZE:
            fail(op, arg, "value", value, f"0 to {MAX_SIZE}")
    check_rank(op, "sf", sf, (2,) if num_groups is None else (3,))
    gran_mn, gran_k = grans
    packed = sf.dtype == torch.int32
    rows = ceil_div(mn, gran_mn)
    expected = [rows, _scale_columns(k, gran_k, packed)]
    names = ["mn" if gran_mn == 1 else f"ceil(mn / {gran_mn})", f"ceil(k / {gran_k * 4 if packed else gran_k})"]
    if num_groups is not None:
        expected.insert(0, concrete(num_groups))
        names.insert(0, "num_groups")
    check_shape(op, "sf", sf, text(names), expected)
    return gran_mn, gran_k
