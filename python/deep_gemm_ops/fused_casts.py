"""FP4, and casts that do more than one thing in their one read of the input. Importing this module registers their CPU
and fake forms.

SwiGLU and quantisation; rows and the transposed copy that a backward pass reads; groups along K whose sizes stay on the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import _checks, knobs, reference
from ._checks import cast_scale_shape, check_device, check_dtype, check_rank, concrete, fail, one_of, shape_of
from ._cpu import _cpu
from ._fakes import _fake
from .layout import align, group_ranges
from .ops import _refuse_grad

__all__ = [
    "k_grouped_per_channel_cast_to_fp8",
    "k_grouped_per_channel_cast_to_fp8_k_major",
    "per_block_cast_to_fp8_transposed",
    "per_block_cast_to_fp8_with_transpose",
    "per_channel_cast_to_fp8_transposed",
    "per_token_cast_to_fp4",
    "per_token_cast_to_fp8_with_transpose",
    "swiglu_backward",
    "swiglu_cast_to_fp8",
]

Tensor = torch.Tensor

K_LAYOUTS = ("sizes", "psum", "offsets")
TRANSPOSED_KINDS = ("per_token", "per_block")
#: Casts whose transposed results alone an operator returns, and the casts of the transposed matrix which these are.
TRANSPOSED_ALONE = {"per_channel": "per_token", "per_block": "per_block"}

FP4_MAX = 6.0  # the largest float4_e2m1fn
FP4_DTYPES = _checks.FP4_DTYPES
#: The numbers of codes 0 to 7; codes 8 to 15 are their negatives.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(
    op: str, x: Tensor, more: Sequence[Tensor | None], keywords: dict[str, Any], out: Any, names: Sequence[str]
) -> Any:
    """Runs ``op``, or its ``.out`` form into ``out``, whose tensors have ``names``."""
    if x.requires_grad and torch.is_grad_enabled():
        _refuse_grad(op, x=x)
    overloads = getattr(torch.ops.deep_gemm, op)
    if out is None:
        return overloads.default(x, *more, **keywords)
    overloads.out(x, *more, **keywords, **dict(zip(names, out, strict=True)))
    return out


def per_token_cast_to_fp4(
    x: Tensor,
    *,
    gran_k: int = 32,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise ``[M, K]`` to FP4 (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with one scale per row and
    ``gran_k`` columns.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``, K even, inner stride 1, any row stride.
        gran_k: 32 or 128, columns per scale.
        use_ue8m0: round scales up to powers of two (they stay float32).
        use_packed_ue8m0: that, and return them as int32, four UE8M0 exponents a word, the first lowest.
        out: ``(values, scales)`` to write, of the shapes and scale strides described below; values may be uint8, int8
            or float4_e2m1fn_x2.

    Returns:
        ``(values, scales)``: uint8 ``[M, K / 2]`` contiguous, the even column's number in the low half of its byte
        (``values.view(torch.float4_e2m1fn_x2)`` is the same under PyTorch's name for it, which few of its operators
        know); scales as :func:`per_token_cast_to_fp8` gives them.

    Raises:
        RuntimeError: wrong dtype, rank, inner stride, ``gran_k``, an odd K, or ``x`` requires grad.

    ``scale = max(amax |x|, 1e-4) / 6`` and ``value = x * (1 / scale)``, rounded to nearest, ties to the even code. E2M1
    has no NaN and no Inf: NaN in a group makes its scale NaN and its values 6; Inf makes its scale Inf, its own value 6
    and the others 0. Specification: ``deep_gemm_ops.fused_casts.reference_per_token_cast_to_fp4``; back to float32:
    ``reference_dequantize_fp4``.
    """
    keywords = {"gran_k": gran_k, "use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return _call("per_token_cast_to_fp4", x, (), keywords, out, ("out", "out_sf"))


def swiglu_cast_to_fp8(
    x: Tensor,
    *,
    topk_weights: Tensor | None = None,
    clamp: float | None = None,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise ``y = silu(gate) * up * weight`` to FP8 with one scale per row and ``gran_k`` columns: what stands
    between the two linear layers of an expert, in one read.

    Args:
        x: bfloat16 ``[M, 2 * H]``, inner stride 1, any row stride: gate in the first H columns, up in the others.
            ``silu(gate) = gate / (1 + exp(-gate))``.
        topk_weights: float32 ``[M]``, any stride: the routing weight of each row; 1 where absent.
        clamp: a positive number. ``gate`` is then replaced by ``min(gate, clamp)`` (it is not limited from below) and
            ``up`` by ``max(min(up, clamp), -clamp)``, before anything else.
        gran_k: 128 or 32, columns of y per scale.
        use_ue8m0: round scales up to powers of two (they stay float32).
        use_packed_ue8m0: that, and return them as int32, four UE8M0 exponents a word.
        out: ``(values, scales)`` to write, of exactly the shapes, dtypes and scale strides described below.

    Returns:
        ``(values, scales)`` as :func:`per_token_cast_to_fp8` of y gives them: float8_e4m3fn ``[M, H]`` contiguous;
        float32 ``[M, ceil(H / gran_k)]`` (packed: int32 ``[M, ceil(H / (4 * gran_k))]``), MN-major, TMA-aligned.

    Raises:
        RuntimeError: wrong dtype, rank, shape, inner stride, device, ``clamp`` or ``gran_k``, or ``x`` requires grad.

    All arithmetic is float32, each operation rounded once; ``exp`` is a polynomial with a relative error of 1e-5. y is
    not rounded to bfloat16 in between. NaN and Inf show in scales and values as in :func:`per_token_cast_to_fp8`.
    Specification, to the bit: ``deep_gemm_ops.fused_casts.reference_swiglu_cast_to_fp8``.
    """
    keywords: dict[str, Any] = {"topk_weights": topk_weights, "clamp": clamp, "gran_k": gran_k}
    keywords |= {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    if topk_weights is not None and topk_weights.requires_grad and torch.is_grad_enabled():
        _refuse_grad("swiglu_cast_to_fp8", topk_weights=topk_weights)
    return _call("swiglu_cast_to_fp8", x, (), keywords, out, ("out", "out_sf"))


def swiglu_backward(
    x: Tensor, grad: Tensor, row_weights: Tensor | None = None, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``y = silu(gate) * up * weight`` and y itself: what stands between the two products of an expert's
    backward pass, in one read.

    Args:
        x: bfloat16 ``[M, 2 * H]``, inner stride 1, any row stride: gate in the first H columns, up in the others.
        grad: bfloat16 ``[M, H]``, inner stride 1, any row stride: the gradient of y.
        row_weights: float32 ``[M]``, any stride: the routing weight of each row; 1 where absent.
        out: the three results to write, of the shapes and dtypes described below; of the matrices, any row stride.

    Returns:
        ``(grad_x, y, grad_row_weights)``: bfloat16 ``[M, 2 * H]`` and ``[M, H]``, which the gradient of the weight
        behind y is made of, and float32 ``[M]``, the sum of ``grad * silu(gate) * up`` over a row's columns.

    Raises:
        RuntimeError: wrong dtype, rank, shape, inner stride or device, or an input requires grad.

    All arithmetic is float32, each operation rounded once, sums always in the same order; ``silu`` is that of
    :func:`swiglu_cast_to_fp8`. Matrices of 16-byte aligned rows whose H is a multiple of 8 are read fastest.
    Specification, to the bit (but for the bits of a NaN): ``deep_gemm_ops.fused_casts.reference_swiglu_backward``.
    """
    if torch.is_grad_enabled():
        _refuse_grad("swiglu_backward", x=x, grad=grad, row_weights=row_weights)
    return _call("swiglu_backward", x, (grad, row_weights), {}, out, _SWIGLU_BACKWARD_OUTS)


_SWIGLU_BACKWARD_OUTS = ("out", "out_weighted", "out_row_weights")


def per_token_cast_to_fp8_with_transpose(
    x: Tensor,
    *,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise ``[M, K]`` twice in one read: as :func:`per_token_cast_to_fp8` for the forward pass, and transposed,
    with scales along M, for the weight gradient, which sums over tokens.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``, inner stride 1, any row stride.
        use_ue8m0: round scales up to powers of two (they stay float32).
        use_packed_ue8m0: that, and return them as int32, four UE8M0 exponents a word.
        out: ``(values, scales, values_t, scales_t)`` to write: scales of exactly the shapes and strides below, values
            of any row stride. ``values_t`` is written fastest where its rows begin at multiples of 16 bytes.

    Returns:
        ``(values, scales, values_t, scales_t)``. The first two are those of :func:`per_token_cast_to_fp8`. ``values_t``
        is float8_e4m3fn ``[K, M]`` with strides ``(M rounded up to 16, 1)``, an operand of :func:`fp8_gemm_nt` for any
        M; ``scales_t`` float32 ``[K, ceil(M / 128)]`` (packed: int32 ``[K, ceil(M / 512)]``), MN-major, TMA-aligned: a
        scale per 128 tokens. They are those of ``per_token_cast_to_fp8(x.t())``.

    Raises:
        RuntimeError: wrong dtype, rank or inner stride, another layout of ``out``, or ``x`` requires grad.

    Numerics: :func:`per_token_cast_to_fp8`. Specification:
    ``deep_gemm_ops.fused_casts.reference_per_token_cast_to_fp8_with_transpose``.
    """
    keywords = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return _call("per_token_cast_to_fp8_with_transpose", x, (), keywords, out, _TRANSPOSED_OUTS)


def per_block_cast_to_fp8_with_transpose(
    x: Tensor,
    *,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise ``[N, K]`` with a scale per 128 x 128 block, and transpose the result: weights, for the forward pass and
    for the input gradient.

    As :func:`per_token_cast_to_fp8_with_transpose`, with the scales of :func:`per_block_cast_to_fp8`. ``values_t``
    ``[K, N]`` holds the same numbers as ``values``, and ``scales_t`` ``[ceil(K / 128), ceil(N / 128)]`` the same
    scales, MN-major for the transposed matrix; packed: int32 ``[ceil(K / 128), ceil(N / 512)]``.
    """
    keywords = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return _call("per_block_cast_to_fp8_with_transpose", x, (), keywords, out, _TRANSPOSED_OUTS)


_TRANSPOSED_OUTS = ("out", "out_sf", "out_t", "out_t_sf")


def per_channel_cast_to_fp8_transposed(
    x: Tensor,
    *,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The last two results of :func:`per_token_cast_to_fp8_with_transpose` alone: an operand of a weight gradient,
    where nothing reads the values as they lie.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``, inner stride 1, any row stride.
        use_ue8m0: round scales up to powers of two (they stay float32).
        use_packed_ue8m0: that, and return them as int32, four UE8M0 exponents a word.
        out: ``(values, scales)`` to write: scales of exactly the shape and strides below, values of any row stride,
            fastest where rows begin at multiples of 16 bytes.

    Returns:
        ``(values, scales)``: float8_e4m3fn ``[K, M]`` with strides ``(M rounded up to 16, 1)``, an operand of
        :func:`fp8_gemm_nt` for any M; float32 ``[K, ceil(M / 128)]`` (packed: int32 ``[K, ceil(M / 512)]``), MN-major,
        TMA-aligned. They are those of ``per_token_cast_to_fp8(x.t())``.

    Raises:
        RuntimeError: wrong dtype, rank or inner stride, another layout of ``out``, or ``x`` requires grad.

    Numerics: :func:`per_token_cast_to_fp8`. Specification:
    ``deep_gemm_ops.fused_casts.reference_per_channel_cast_to_fp8_transposed``.
    """
    keywords = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return _call("per_channel_cast_to_fp8_transposed", x, (), keywords, out, ("out", "out_sf"))


def per_block_cast_to_fp8_transposed(
    x: Tensor,
    *,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The last two results of :func:`per_block_cast_to_fp8_with_transpose` alone: weights for the input gradient.

    As :func:`per_channel_cast_to_fp8_transposed`, with a scale per 128 x 128 block: of ``[N, K]`` the values ``[K, N]``
    and scales ``[ceil(K / 128), ceil(N / 128)]``; packed: int32 ``[ceil(K / 128), ceil(N / 512)]``.
    """
    keywords = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return _call("per_block_cast_to_fp8_transposed", x, (), keywords, out, ("out", "out_sf"))


def k_grouped_per_channel_cast_to_fp8(
    x: Tensor, ks: Tensor, *, layout: str = "sizes", use_ue8m0: bool = False, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise ``[K, MN]``, the rows of several groups, with one scale per column and 128 rows of a group: an operand
    of ``k_grouped_fp8_gemm_tn_contiguous``.

    Args:
        x: bfloat16 ``[K, MN]``, inner stride 1, any row stride; K is the sum over the groups.
        ks: int32 ``[G]``, any stride, on the device of ``x``: which rows belong to which group. The host does not read
            it.
        layout: what ``ks`` holds. ``"sizes"``: how many rows each group has. ``"offsets"``: where each group ends and
            the next one starts. ``"psum"``: where each group ends; the next one starts there, rounded up to
            :func:`get_mk_alignment_for_contiguous_layout`.
        use_ue8m0: round scales up to powers of two (they stay float32).
        out: ``(values, scales)`` to write, of exactly the shapes, dtypes and scale strides described below.

    Returns:
        ``(values, scales)``: float8_e4m3fn ``[K, MN]`` contiguous, zero in rows that no group owns; float32
        ``[K // 128 + G, MN]``, which is enough for any sizes, strides ``(MN rounded up to 4, 1)``: ``ceil(k_g / 128)``
        rows for group g, group after group, the rest zero.

    Raises:
        RuntimeError: wrong dtype, rank, device, inner stride or ``layout``, or ``x`` requires grad.

    Sizes that point outside of ``x`` are clamped; groups ascend. Specification:
    ``deep_gemm_ops.fused_casts.reference_k_grouped_per_channel_cast_to_fp8``.
    """
    keywords = {"layout": layout, "use_ue8m0": use_ue8m0}
    return _call("k_grouped_per_channel_cast_to_fp8", x, (ks,), keywords, out, ("out", "out_sf"))


def k_grouped_per_channel_cast_to_fp8_k_major(
    x: Tensor, ks: Tensor, *, layout: str = "sizes", use_ue8m0: bool = False, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`k_grouped_per_channel_cast_to_fp8` with the values transposed and each group padded to whole blocks of
    128: what Hopper's kernel reads without a transposition of its own.

    Returns:
        ``(values, scales)``: float8_e4m3fn ``[MN, 128 * R]`` contiguous, R = ``K // 128 + G``, each group from a
        multiple of 128 on, zero where no row of ``x`` is; float32 ``[R, MN]`` as there: row i belongs to columns
        ``128 * i`` to ``128 * i + 127`` of the values.
    """
    keywords = {"layout": layout, "use_ue8m0": use_ue8m0}
    return _call("k_grouped_per_channel_cast_to_fp8_k_major", x, (ks,), keywords, out, ("out", "out_sf"))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and checks


def transposed_layouts(kind: str, rows: int, cols: int, packed: bool) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(shape, strides) of the four results of a cast with a transposed copy. Symbolic sizes stay symbolic."""
    return [
        ((rows, cols), (cols, 1)),
        cast_scale_shape(kind, rows, cols, 128, packed),
        ((cols, rows), (align(rows, 16), 1)),
        cast_scale_shape(kind, cols, rows, 128, packed),
    ]


def k_grouped_layouts(k: int, mn: int, groups: int, k_major: bool) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(shape, strides) of the two results of a K-grouped cast."""
    rows = k // 128 + groups
    values = ((mn, 128 * rows), (128 * rows, 1)) if k_major else ((k, mn), (mn, 1))
    return [values, ((rows, mn), (align(mn, 4), 1))]


def _check_values_out(
    op: str,
    arg: str,
    out: Tensor,
    x: Tensor,
    like: str,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float8_e4m3fn,),
) -> None:
    check_device(op, arg, out, x.device, "x")
    check_dtype(op, arg, out, dtypes)
    _checks.check_shape(op, arg, out, like, shape)
    _checks.check_inner_stride(op, arg, out, None)
    _checks.check_rows_apart(op, arg, out)


def _check_scales_out(
    op: str, arg: str, out: Tensor, x: Tensor, packed: bool, layout: tuple[Sequence[int], Sequence[int]]
) -> None:
    check_device(op, arg, out, x.device, "x")
    check_dtype(op, arg, out, (torch.int32 if packed else torch.float32,))
    _checks.check_shape(op, arg, out, "the shape of the scales", layout[0])
    _checks.check_exact_strides(op, arg, out, layout[1])


def _check_input(op: str, x: Tensor, dtypes: Sequence[torch.dtype], names: Sequence[str]) -> None:
    check_dtype(op, "x", x, dtypes)
    check_rank(op, "x", x, (2,))
    _checks.check_sizes(op, "x", x, names)
    _checks.check_inner_stride(op, "x", x, "to_tma_aligned")


def check_fp4_cast(
    x: Tensor,
    *,
    gran_k: int = 32,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: Tensor | None = None,
    out_sf: Tensor | None = None,
) -> None:
    op = "per_token_cast_to_fp4"
    _check_input(op, x, _checks.CAST_DTYPES, ("M", "K"))
    rows, cols = shape_of(x)
    if not cols % 2 == 0:
        fail(op, "x", "K", cols, "an even number")
    if gran_k not in _checks.GRANULARITIES_K:
        fail(op, "gran_k", "value", gran_k, "128 or 32")
    if out is None or out_sf is None:
        return
    _check_values_out(op, "out", out, x, "[M, K / 2]", [rows, cols // 2], FP4_DTYPES)
    layout = cast_scale_shape("per_token", rows, cols, gran_k, use_packed_ue8m0)
    _check_scales_out(op, "out_sf", out_sf, x, use_packed_ue8m0, layout)


def _check_gate_up(op: str, x: Tensor) -> tuple[Any, Any]:
    """``x = [gate | up]``, of which M and H are returned."""
    _check_input(op, x, (torch.bfloat16,), ("M", "2 * H"))
    rows, cols = shape_of(x)
    if not cols % 2 == 0:
        fail(op, "x", "2 * H", cols, "an even number")
    return rows, cols // 2


def _check_row_weights(op: str, arg: str, weights: Tensor | None, x: Tensor) -> None:
    if weights is None:
        return
    check_device(op, arg, weights, x.device, "x")
    check_dtype(op, arg, weights, (torch.float32,))
    _checks.check_shape(op, arg, weights, "[M]", shape_of(x)[:1])


def check_swiglu_cast(
    x: Tensor,
    *,
    topk_weights: Tensor | None = None,
    clamp: float | None = None,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: Tensor | None = None,
    out_sf: Tensor | None = None,
) -> None:
    op = "swiglu_cast_to_fp8"
    rows, hidden = _check_gate_up(op, x)
    _check_row_weights(op, "topk_weights", topk_weights, x)
    if clamp is not None and not clamp > 0:
        fail(op, "clamp", "value", float(clamp), "a positive number")
    if gran_k not in _checks.GRANULARITIES_K:
        fail(op, "gran_k", "value", gran_k, "128 or 32")
    if out is None or out_sf is None:
        return
    _check_values_out(op, "out", out, x, "[M, H]", [rows, hidden])
    layout = cast_scale_shape("per_token", rows, hidden, gran_k, use_packed_ue8m0)
    _check_scales_out(op, "out_sf", out_sf, x, use_packed_ue8m0, layout)


def check_swiglu_backward(
    x: Tensor,
    grad: Tensor,
    row_weights: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_weighted: Tensor | None = None,
    out_row_weights: Tensor | None = None,
) -> None:
    op = "swiglu_backward"
    rows, hidden = _check_gate_up(op, x)
    half = [rows, hidden]
    check_device(op, "grad", grad, x.device, "x")
    check_dtype(op, "grad", grad, (torch.bfloat16,))
    _checks.check_shape(op, "grad", grad, "[M, H]", half)
    _checks.check_inner_stride(op, "grad", grad, "to_tma_aligned")
    _check_row_weights(op, "row_weights", row_weights, x)
    if out is None or out_weighted is None or out_row_weights is None:
        return
    _check_values_out(op, "out", out, x, "[M, 2 * H]", [rows, 2 * hidden], (torch.bfloat16,))
    _check_values_out(op, "out_weighted", out_weighted, x, "[M, H]", half, (torch.bfloat16,))
    check_device(op, "out_row_weights", out_row_weights, x.device, "x")
    check_dtype(op, "out_row_weights", out_row_weights, (torch.float32,))
    _checks.check_shape(op, "out_row_weights", out_row_weights, "[M]", [rows])
    _checks.check_inner_stride(op, "out_row_weights", out_row_weights, None)


def check_transposed_cast(
    kind: str, x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False, **outs: Tensor
) -> None:
    op = f"{kind}_cast_to_fp8_with_transpose"
    _check_input(op, x, _checks.CAST_DTYPES, ("dimension 0", "dimension 1"))
    if not outs:
        return
    layouts = transposed_layouts(kind, *shape_of(x), use_packed_ue8m0)
    for i, like in ((0, "the shape of x"), (2, "the shape of x.t()")):
        values, scales = _TRANSPOSED_OUTS[i : i + 2]
        _check_values_out(op, values, outs[values], x, like, layouts[i][0])
        _check_scales_out(op, scales, outs[scales], x, use_packed_ue8m0, layouts[i + 1])


def check_transposed_alone_cast(
    kind: str,
    x: Tensor,
    *,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: Tensor | None = None,
    out_sf: Tensor | None = None,
) -> None:
    op = f"{kind}_cast_to_fp8_transposed"
    _check_input(op, x, _checks.CAST_DTYPES, ("dimension 0", "dimension 1"))
    if out is None or out_sf is None:
        return
    values, scales = transposed_layouts(TRANSPOSED_ALONE[kind], *shape_of(x), use_packed_ue8m0)[2:]
    _check_values_out(op, "out", out, x, "the shape of x.t()", values[0])
    _check_scales_out(op, "out_sf", out_sf, x, use_packed_ue8m0, scales)


def check_k_grouped_cast(
    op: str,
    x: Tensor,
    ks: Tensor,
    *,
    k_major: bool,
    layout: str = "sizes",
    use_ue8m0: bool = False,
    out: Tensor | None = None,
    out_sf: Tensor | None = None,
) -> None:
    _check_input(op, x, (torch.bfloat16,), ("K", "MN"))
    check_dtype(op, "ks", ks, (torch.int32,))
    check_rank(op, "ks", ks, (1,))
    check_device(op, "ks", ks, x.device, "x")
    if layout not in K_LAYOUTS:
        fail(op, "layout", "value", layout, one_of(K_LAYOUTS))
    if out is None or out_sf is None:
        return
    values, scales = k_grouped_layouts(*shape_of(x), concrete(ks.shape[0]), k_major)
    _check_values_out(op, "out", out, x, "the shape of the values", values[0])
    _check_scales_out(op, "out_sf", out_sf, x, False, scales)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def fp4_codes(x: Tensor) -> Tensor:
    """float32 to E2M1 codes (uint8): nearest, ties to the even code, saturating; NaN is 6."""
    values = torch.tensor(FP4_VALUES, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs()
    code = torch.bucketize(magnitude, middles)  # how many of them are smaller
    tie = magnitude == middles[code.clamp(max=6)]
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    code = torch.where(x.isnan(), 7, code + 8 * torch.signbit(x))
    return code.to(torch.uint8)


def reference_per_token_cast_to_fp4(
    x: Tensor, *, gran_k: int = 32, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``[M, K]`` to pairs of E2M1 codes ``[M, K / 2]`` with scales ``[M, ceil(K / gran_k)]``."""
    rows, cols = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, align(cols, gran_k) - cols)).unflatten(1, (-1, gran_k))
    amax = groups.abs().amax(2).clamp(min=reference.MIN_AMAX)
    sf = amax / torch.full_like(amax, FP4_MAX)
    if use_ue8m0 or use_packed_ue8m0:
        sf = reference.ceil_to_ue8m0(sf)
    codes = fp4_codes(groups * (1.0 / sf)[:, :, None]).flatten(1)[:, :cols]
    if use_packed_ue8m0:
        sf = reference.pack_ue8m0(reference.ue8m0_bytes(sf))
    layout = cast_scale_shape("per_token", rows, cols, gran_k, use_packed_ue8m0)
    scales = torch.empty_strided(*layout, dtype=sf.dtype, device=x.device).copy_(sf)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def reference_unpack_fp4(values: Tensor) -> Tensor:
    """Pairs of E2M1 codes ``[.., K / 2]`` (uint8, int8 or float4_e2m1fn_x2) to float32 ``[.., K]``."""
    pairs = values.view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).int()
    magnitudes = torch.tensor(FP4_VALUES, device=values.device)[codes & 7]
    return torch.where(codes < 8, magnitudes, -magnitudes)


def reference_dequantize_fp4(
    values: Tensor, sf: Tensor, gran_k: int = 32, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``value[m, k] * sf[m, k // gran_k]`` in ``dtype``, scales of any type that products accept."""
    x = reference_unpack_fp4(values).to(dtype)
    sf = reference.scales_to_float32(sf, -(-x.shape[1] // gran_k)).to(dtype)
    return x * sf.repeat_interleave(gran_k, 1)[:, : x.shape[1]]


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` of finite float32 numbers with a single rounding.

    The product is exact in float64. The sum is rounded to float64 towards an odd last bit, which a second rounding to
    float32 cannot mistake for a tie.
    """
    product = a.double() * b
    c = torch.as_tensor(c, dtype=torch.float64, device=a.device)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits % 2 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def silu(x: Tensor) -> Tensor:
    """``x / (1 + exp(-x))`` of float32 in the operations of the kernels: beyond 86 x, below -86 about 1e-38 * x."""
    return x * sigmoid(x)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` of float32 in the operations of the kernels, each rounded once: exp by a polynomial of
    degree four.

    -x * log2(e) is limited to -125 .. 125: beyond 86 the result is 1, below -86 a number of about 1e-38.
    """
    log2e, span = float.fromhex("0x1.715476p+0"), 250.0
    round_to_integer = float.fromhex("0x1.8p+23") - span / 2
    slope = float(torch.tensor(-log2e, dtype=torch.float32) / span)
    finite = x.where(x.isfinite(), 0.0)
    position = _fma(finite, slope, 0.5).clamp(0.0, 1.0)
    position = position.where(x != -torch.inf, 1.0).where(x != torch.inf, 0.0).where(~x.isnan(), 0.0)
    rounded = _fma(position, span, round_to_integer)
    integer = rounded - round_to_integer
    fraction = _fma(position, span, -integer)
    power = torch.full_like(fraction, float.fromhex("0x1.3a02c4p-7"))
    for coefficient in ("0x1.c9fc46p-5", "0x1.ec0378p-3", "0x1.62e12cp-1", "0x1p0"):
        power = _fma(power, fraction.double(), float.fromhex(coefficient))
    exponential = (power.view(torch.int32) + (rounded.view(torch.int32) << 23)).view(torch.float32)
    return 1.0 / (exponential + 1.0)


def reference_swiglu_cast_to_fp8(
    x: Tensor,
    *,
    topk_weights: Tensor | None = None,
    clamp: float | None = None,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:
    """``per_token_cast_to_fp8(silu(gate) * up * weight)`` for ``x = [gate | up]``, all float32."""
    gate, up = x.float().chunk(2, dim=1)
    if clamp is not None:
        limit = torch.tensor(clamp, dtype=torch.float32, device=x.device)
        gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    y = silu(gate.contiguous()) * up
    if topk_weights is not None:
        y = y * topk_weights[:, None]
    return reference.per_token_cast_to_fp8(y, gran_k=gran_k, use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)


def _row_sums(x: Tensor) -> Tensor:
    """Sums over columns in the order of the kernel: 128 threads take 8 neighbouring columns in turns and add theirs one
    after the other; lanes are joined by a butterfly, then the four warps one after the other."""
    rows, cols = x.shape
    turns = torch.nn.functional.pad(x, (0, align(cols, 1024) - cols)).view(rows, align(cols, 1024) // 1024, 128, 8)
    sums = x.new_zeros(rows, 128)
    for turn in turns.unbind(1):
        for values in turn.unbind(2):
            sums = sums + values
    lanes = sums.view(rows, 4, 32)
    for _ in range(5):
        lanes = lanes[:, :, : lanes.shape[2] // 2] + lanes[:, :, lanes.shape[2] // 2 :]
    first, *others = lanes[:, :, 0].unbind(1)
    for warp in others:
        first = first + warp
    return first


def reference_swiglu_backward(
    x: Tensor, grad: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``silu(gate) * up * weight`` for ``x = [gate | up]``, and that itself, all float32."""
    gate, up = (half.contiguous() for half in x.float().chunk(2, dim=1))
    d = grad.float()
    sig = sigmoid(gate)
    silu_gate = gate * sig
    y = silu_gate * up
    grad_row_weights = _row_sums(d * y)
    if row_weights is not None:
        y, d = y * row_weights[:, None], d * row_weights[:, None]
    slope = sig * (gate * (1.0 - sig) + 1.0)
    grad_x = torch.cat((d * up * slope, d * silu_gate), dim=1)
    return grad_x.bfloat16(), y.bfloat16(), grad_row_weights


def _padded_rows(x: Tensor) -> Tensor:
    """A copy whose rows begin at multiples of 16 elements."""
    rows, cols = x.shape
    return torch.empty_strided((rows, cols), (align(cols, 16), 1), dtype=x.dtype, device=x.device).copy_(x)


def reference_per_token_cast_to_fp8_with_transpose(
    x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The casts of ``x`` and of ``x.t()``."""
    options = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return *reference.per_token_cast_to_fp8(x, **options), *reference_per_channel_cast_to_fp8_transposed(x, **options)


def reference_per_block_cast_to_fp8_with_transpose(
    x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The casts of ``x`` and of ``x.t()``: the same scales and values."""
    options = {"use_ue8m0": use_ue8m0, "use_packed_ue8m0": use_packed_ue8m0}
    return *reference.per_block_cast_to_fp8(x, **options), *reference_per_block_cast_to_fp8_transposed(x, **options)


def reference_per_channel_cast_to_fp8_transposed(
    x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``per_token_cast_to_fp8`` of ``x.t()``."""
    values, sf = reference.per_token_cast_to_fp8(x.t(), use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)
    return _padded_rows(values), sf


def reference_per_block_cast_to_fp8_transposed(
    x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``per_block_cast_to_fp8`` of ``x.t()``."""
    values, sf = reference.per_block_cast_to_fp8(x.t(), use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)
    return _padded_rows(values), sf


def reference_k_grouped_per_channel_cast_to_fp8(
    x: Tensor, ks: Tensor, *, layout: str = "sizes", use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``per_channel_cast_to_fp8`` of each group's rows, scales one group after the other."""
    values_layout, scales_layout = k_grouped_layouts(*x.shape, ks.shape[0], False)
    values = torch.zeros(values_layout[0], dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    scales = torch.empty_strided(*scales_layout, dtype=torch.float32, device=x.device).zero_()
    sf_row = 0
    for begin, end in group_ranges(ks.tolist(), x.shape[0], layout, knobs.get_mk_alignment_for_contiguous_layout()):
        group, sf = reference.per_channel_cast_to_fp8(x[begin:end], use_ue8m0=use_ue8m0)
        values[begin:end] = group
        scales[sf_row : sf_row + sf.shape[0]] = sf
        sf_row += sf.shape[0]
    return values, scales


def reference_k_grouped_per_channel_cast_to_fp8_k_major(
    x: Tensor, ks: Tensor, *, layout: str = "sizes", use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, each group's values transposed to columns that begin at a multiple of 128."""
    values, scales = reference_k_grouped_per_channel_cast_to_fp8(x, ks, layout=layout, use_ue8m0=use_ue8m0)
    shape, _ = k_grouped_layouts(*x.shape, ks.shape[0], True)[0]
    result = torch.zeros(shape, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    column = 0
    for begin, end in group_ranges(ks.tolist(), x.shape[0], layout, knobs.get_mk_alignment_for_contiguous_layout()):
        result[:, column : column + end - begin] = values[begin:end].t()
        column += align(end - begin, 128)
    return result, scales


# ---------------------------------------------------------------------------------------------------------------------
# Fakes and CPU implementations


def _empty(x: Tensor, layout: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype) -> Tensor:
    return x.new_empty_strided(tuple(layout[0]), tuple(layout[1]), dtype=dtype)


def _register(
    op: str,
    check: Callable[..., None],
    empty: Callable[..., tuple[Tensor, ...]],
    cast: Callable[..., tuple[Tensor, ...]],
    outs: Sequence[str] = ("out", "out_sf"),
) -> None:
    """Registers the fakes and the CPU implementations of ``op`` and ``op.out``, whose results are named ``outs``.

    All three functions take the operator's arguments with its defaults, ``check`` those of the ``.out`` form, too.
    """

    @_fake(op)
    def fake(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        check(*inputs, **options)
        return empty(*inputs, **options)

    @_fake(f"{op}.out")
    def fake_out(*inputs: Tensor, **options: Any) -> None:
        check(*inputs, **options)

    @_cpu(op)
    def functional(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        check(*inputs, **options)
        return cast(*inputs, **options)

    @_cpu(f"{op}.out")
    def out_form(*inputs: Tensor, **options: Any) -> None:
        check(*inputs, **options)
        targets = [options.pop(name) for name in outs]
        for target, result in zip(targets, cast(*inputs, **options), strict=True):
            target.view(result.dtype).copy_(result)  # FP4 may be asked for as any dtype of one byte


def _empty_fp4(
    x: Tensor, *, gran_k: int = 32, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    layout = cast_scale_shape("per_token", x.shape[0], x.shape[1], gran_k, use_packed_ue8m0)
    values = x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8)
    return values, _empty(x, layout, torch.int32 if use_packed_ue8m0 else torch.float32)


def _empty_swiglu(
    x: Tensor, *, gran_k: int = 128, use_packed_ue8m0: bool = False, **_options: Any
) -> tuple[Tensor, Tensor]:
    rows, hidden = x.shape[0], x.shape[1] // 2
    layout = cast_scale_shape("per_token", rows, hidden, gran_k, use_packed_ue8m0)
    values = x.new_empty((rows, hidden), dtype=torch.float8_e4m3fn)
    return values, _empty(x, layout, torch.int32 if use_packed_ue8m0 else torch.float32)


def _empty_swiglu_backward(x: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = x.shape[0], x.shape[1] // 2
    return x.new_empty((rows, x.shape[1])), x.new_empty((rows, hidden)), x.new_empty(rows, dtype=torch.float32)


def _empty_transposed(
    kind: str, x: Tensor, *, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[Tensor, ...]:
    layouts = transposed_layouts(kind, x.shape[0], x.shape[1], use_packed_ue8m0)
    dtype = torch.int32 if use_packed_ue8m0 else torch.float32
    values = x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float8_e4m3fn)
    values_t = _empty(x, layouts[2], torch.float8_e4m3fn)
    return values, _empty(x, layouts[1], dtype), values_t, _empty(x, layouts[3], dtype)


def _empty_transposed_alone(kind: str, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return _empty_transposed(TRANSPOSED_ALONE[kind], x, **options)[2:]


def _empty_k_grouped(k_major: bool, x: Tensor, ks: Tensor, **_options: Any) -> tuple[Tensor, Tensor]:
    values, scales = k_grouped_layouts(x.shape[0], x.shape[1], ks.shape[0], k_major)
    return x.new_empty(values[0], dtype=torch.float8_e4m3fn), _empty(x, scales, torch.float32)


_register("per_token_cast_to_fp4", check_fp4_cast, _empty_fp4, reference_per_token_cast_to_fp4)
_register("swiglu_cast_to_fp8", check_swiglu_cast, _empty_swiglu, reference_swiglu_cast_to_fp8)
_register(
    "swiglu_backward",
    check_swiglu_backward,
    _empty_swiglu_backward,
    reference_swiglu_backward,
    _SWIGLU_BACKWARD_OUTS,
)
for _kind in TRANSPOSED_KINDS:
    _register(
        f"{_kind}_cast_to_fp8_with_transpose",
        partial(check_transposed_cast, _kind),
        partial(_empty_transposed, _kind),
        globals()[f"reference_{_kind}_cast_to_fp8_with_transpose"],
        _TRANSPOSED_OUTS,
    )
for _kind in TRANSPOSED_ALONE:
    _register(
        f"{_kind}_cast_to_fp8_transposed",
        partial(check_transposed_alone_cast, _kind),
        partial(_empty_transposed_alone, _kind),
        globals()[f"reference_{_kind}_cast_to_fp8_transposed"],
    )
for _op, _k_major, _cast in (
    ("k_grouped_per_channel_cast_to_fp8", False, reference_k_grouped_per_channel_cast_to_fp8),
    ("k_grouped_per_channel_cast_to_fp8_k_major", True, reference_k_grouped_per_channel_cast_to_fp8_k_major),
):
    _register(_op, partial(check_k_grouped_cast, _op, k_major=_k_major), partial(_empty_k_grouped, _k_major), _cast)
