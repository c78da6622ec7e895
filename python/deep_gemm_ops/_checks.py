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
OUT_DTYPES = (torch.bfloat16, torch.float32)
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
    """Rows of a matrix that is written do not overlap."""
    (rows, cols), (row_stride, _) = shape_of(x), strides_of(x)
    if rows > 1 and cols > 0 and not row_stride >= cols:
        fail(op, arg, "row stride", row_stride, f"at least {cols}")


def check_tma_readable(op: str, arg: str, x: torch.Tensor, real: bool) -> None:
    """A matrix that TMA reads as it lies: dense rows, 16-byte row stride and base address."""
    check_inner_stride(op, arg, x)
    (rows, cols), (row_stride, _) = shape_of(x), strides_of(x)
    helper = "use deep_gemm_ops.to_tma_aligned"
    if cols == 0 or rows == 0:
        return
    if rows > 1:
        row_bytes = row_stride * x.element_size()
        if not row_bytes % TMA_ALIGNMENT_BYTES == 0:
            fail(op, arg, "row stride", f"{row_bytes} bytes", f"a multiple of {TMA_ALIGNMENT_BYTES} bytes", helper)
        if not row_stride >= cols:
            fail(op, arg, "row stride", row_stride, f"at least {cols}", helper)
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


def _match_scales(
    op: str,
    arg: str,
    sf: torch.Tensor,
    mn: int,
    k: int,
    name: str,
    k_first: bool,
    grans: Sequence[int],
    grans_k: Sequence[int],
) -> tuple[int, list[int]]:
    """Granularities that explain the shape of ``sf``: (along MN, all that fit along K)."""
    packed = sf.dtype == torch.int32
    shape = shape_of(sf)
    rows, columns = reversed(shape) if k_first else shape
    fit_k = [gran for gran in grans_k if columns == _scale_columns(k, gran, packed)]
    for gran in grans:
        if rows == ceil_div(mn, gran) and fit_k:
            return gran, fit_k
    rows_names = [name if gran == 1 else f"ceil({name} / {gran})" for gran in grans]
    columns_names = [f"ceil(K / {gran * 4 if packed else gran})" for gran in grans_k]
    names = [" or ".join(rows_names), " or ".join(columns_names)]
    sizes = [one_of(list(dict.fromkeys(ceil_div(mn, gran) for gran in grans)))]
    sizes.append(one_of(list(dict.fromkeys(_scale_columns(k, gran, packed) for gran in grans_k))))
    if k_first:
        names.reverse()
        sizes.reverse()
    fail(op, arg, "shape", shape, f"{text(names)} = {text(sizes)}")


def check_recipe(op: str, recipe: Sequence[int] | None) -> None:
    """``recipe`` is [gran_m, gran_n, gran_k] or absent."""
    if recipe is None:
        return
    if len(recipe) != 3 or not all(g in a for g, a in zip(recipe, (GRANULARITIES, GRANULARITIES, GRANULARITIES_K))):
        fail(op, "recipe", "value", list(recipe), "[1 or 128, 1 or 128, 128 or 32]")


def check_fp8_gemm(
    op: str,
    layout: str,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    c: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | None,
    recipe: Sequence[int] | None,
    real: bool,
) -> GemmShape:
    """Check the arguments of ``fp8_gemm_<layout>``; ``real`` is False where tensors have no memory (fakes).

    Returns:
        The sizes and the granularities, given or inferred.
    """
    for arg, operand in (("a", a), ("b", b)):
        check_dtype(op, arg, operand, (torch.float8_e4m3fn,))
        check_rank(op, arg, operand, (2,))
    for arg, scales in (("sfa", sfa), ("sfb", sfb)):
        check_dtype(op, arg, scales, (torch.float32, torch.float8_e8m0fnu, torch.int32))
        check_rank(op, arg, scales, (2,))
    given = {"b": b, "sfa": sfa, "sfb": sfb, "c": c, "out": out}
    for arg, tensor in given.items():
        if tensor is not None:
            check_device(op, arg, tensor, a.device, "a")
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        fail(op, "out_dtype", "value", out_dtype, one_of(OUT_DTYPES))

    a_k_major, b_k_major = layout[0] == "n", layout[1] == "t"
    check_sizes(op, "a", a, ("M", "K") if a_k_major else ("K", "M"))
    check_sizes(op, "b", b, ("N", "K") if b_k_major else ("K", "N"))
    m, k = shape_of(a) if a_k_major else reversed(shape_of(a))
    n, k_of_b = shape_of(b) if b_k_major else reversed(shape_of(b))
    if not k_of_b == k:
        fail(op, "b", "K", k_of_b, k, "the K of a")
    for arg, operand, k_major in (("a", a, a_k_major), ("b", b, b_k_major)):
        if k_major:
            check_tma_readable(op, arg, operand, real)
        else:
            check_inner_stride(op, arg, operand)

    check_recipe(op, recipe)
    grans_m = [recipe[0]] if recipe is not None else GRANULARITIES
    grans_n = [recipe[1]] if recipe is not None else GRANULARITIES
    grans_k = [recipe[2]] if recipe is not None else GRANULARITIES_K
    gran_m, fit_k = _match_scales(op, "sfa", sfa, m, k, "M", not a_k_major, grans_m, grans_k)
    # One granularity along K serves both, so what sfa rules out is no longer on offer.
    gran_n, fit_k = _match_scales(op, "sfb", sfb, n, k, "N", not b_k_major, grans_n, fit_k)
    # Scales of K <= 32 fit both and mean the same; packed words hold up to four scales, so beyond that it makes a
    # difference.
    if len(fit_k) > 1 and sfa.dtype == sfb.dtype == torch.int32 and not isinstance(k, _Unknown) and k > 32:
        expected = "[gran_m, gran_n, 128] or [gran_m, gran_n, 32]"
        fail(op, "recipe", "value", None, expected, "packed scales fit both here")

    result_dtype = out.dtype if out is not None else out_dtype
    if out is not None:
        check_dtype(op, "out", out, OUT_DTYPES)
        check_shape(op, "out", out, "[M, N]", [m, n])
        check_inner_stride(op, "out", out, None)
        check_rows_apart(op, "out", out)
    if c is not None:
        if c.dtype != result_dtype:
            fail(op, "c", "dtype", c.dtype, result_dtype, "the dtype of the result")
        shape = shape_of(c)
        if not (shape == [m, n] or shape == [n]):
            fail(op, "c", "shape", shape, f"[M, N] or [N] = {[m, n]} or {[n]}")
        check_inner_stride(op, "c", c, None)
    return GemmShape(m, n, k, gran_m, gran_n, fit_k[0])


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
