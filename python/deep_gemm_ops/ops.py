"""The public functions: ``torch.ops.deep_gemm.*`` with types, defaults, documentation and an ``out=`` keyword.

They add nothing to the operators but two things: ``out=`` picks the overload, and inputs that require grad are
refused, since the raw operators have no derivative and PyTorch would only warn during backward. All raise
RuntimeError, before anything is launched, with the texts ``<op>: <arg> has <what> <value>, expected <value>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "expand_ue8m0",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_token_cast_to_fp8",
    "transform_sf_into_required_layout",
    "transpose_fp8",
]

_ops = torch.ops.deep_gemm


def _refuse_grad(op: str, **tensors: torch.Tensor | None) -> None:
    for arg, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {arg} has requires_grad True, expected False (not differentiable: use torch.no_grad() or "
                f"{arg}.detach())"
            )


def call_product(
    op: str,
    overloads: torch._ops.OpOverloadPacket,
    operands: dict[str, Any],
    keywords: dict[str, Any],
    out_dtype: torch.dtype | None,
    default_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Calls the overload that ``out`` asks for; ``operands`` are the positional arguments, and ``keywords`` those that
    are None are left out."""
    given = {name: value for name, value in keywords.items() if value is not None}
    if torch.is_grad_enabled():
        tensors = {**operands, "c": given.get("c"), "out": out}
        _refuse_grad(op, **{name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)})
    if out is None:
        if out_dtype is not None and out_dtype is not default_dtype:
            given["out_dtype"] = out_dtype
        return overloads.default(*operands.values(), **given)
    _check_out_dtype(op, out_dtype, out)
    overloads.out(*operands.values(), out=out, **given)
    return out


def _check_out_dtype(op: str, out_dtype: torch.dtype | None, out: torch.Tensor) -> None:
    if out_dtype is not None and out.dtype != out_dtype:
        have, want = str(out.dtype).removeprefix("torch."), str(out_dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: out has dtype {have}, expected {want} (out_dtype)")


def _gemm(
    op: str,
    overloads: torch._ops.OpOverloadPacket,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    c: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    recipe: Sequence[int] | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    # Spelt out: this is on the path of every call, and a few microseconds are all that a small product takes.
    if torch.is_grad_enabled() and (
        a.requires_grad
        or sfa.requires_grad
        or b.requires_grad
        or sfb.requires_grad
        or (c is not None and c.requires_grad)
        or (out is not None and out.requires_grad)
    ):
        _refuse_grad(op, a=a, sfa=sfa, b=b, sfb=sfb, c=c, out=out)
    # A keyword costs up to half a microsecond, also with the value that is the default: only those that matter.
    keywords: dict[str, Any] = {}
    if c is not None:
        keywords["c"] = c
    if recipe is not None:
        keywords["recipe"] = recipe
    if out is None:
        if out_dtype is not None and out_dtype is not torch.bfloat16:
            keywords["out_dtype"] = out_dtype
        return overloads.default(a, sfa, b, sfb, **keywords)
    _check_out_dtype(op, out_dtype, out)
    overloads.out(a, sfa, b, sfb, out=out, **keywords)
    return out


def fp8_gemm_nt(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = c + (a * sfa) @ (b * sfb)^T`` for FP8 ``a [M, K]`` and ``b [N, K]``, both K-major; one rounding at the
    end.

    Args:
        a: float8_e4m3fn ``[M, K]``, inner stride 1, row stride and base address multiples of 16 bytes
            (``deep_gemm_ops.to_tma_aligned`` makes them so). M, N and K may be 0; N and M need no alignment.
        sfa: scales of ``a``, one per ``gran_m`` rows and ``gran_k`` columns, any strides: float32 or float8_e8m0fnu
            ``[ceil(M / gran_m), ceil(K / gran_k)]``, or int32 with four UE8M0 scales a word
            ``[ceil(M / gran_m), ceil(K / (4 * gran_k))]``. Kernels read float32 MN-major as the casts return them.
        b: float8_e4m3fn ``[N, K]``, as ``a``.
        sfb: scales of ``b``, as ``sfa`` with N and ``gran_n``.
        c: added to the product, ``[M, N]`` or a row ``[N]``, inner stride 1, of the result's dtype. May be ``out``.
        out_dtype: torch.bfloat16 (default) or torch.float32.
        recipe: ``[gran_m, gran_n, gran_k]`` with gran_m, gran_n in {1, 128} and gran_k in {128, 32}. By default
            inferred from the shapes of the scales; needed only where both scales are packed and 32 < K <= 128.
        out: ``[M, N]``, inner stride 1, any row stride: written and returned.

    Returns:
        ``[M, N]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Accumulates in FP32, promoting every 128 elements of K. On SM100 the tensor core applies the scales, which are UE8M0
    there: float32 ones are converted, and one that is no power of two becomes NaN, and so does what it scales. Kernels
    then read int32 words MN-major. Specification: ``deep_gemm_ops.reference.fp8_gemm``.
    """
    return _gemm("fp8_gemm_nt", _ops.fp8_gemm_nt, a, sfa, b, sfb, c, out_dtype, recipe, out)


def fp8_gemm_nn(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`fp8_gemm_nt` for ``b [K, N]`` with scales ``sfb`` ``[ceil(K / gran_k), ceil(N / gran_n)]``.

    ``b`` needs inner stride 1 but no alignment: on SM90, whose tensor cores read 8-bit operands K-major only, the
    operator transposes it first (:func:`transpose_fp8`). SM100's read it as it lies, if its rows start at multiples of
    16 bytes.
    """
    return _gemm("fp8_gemm_nn", _ops.fp8_gemm_nn, a, sfa, b, sfb, c, out_dtype, recipe, out)


def fp8_gemm_tn(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`fp8_gemm_nt` for ``a [K, M]`` and ``b [K, N]``, scales ``[ceil(K / gran_k), ceil(M or N / gran)]``:
    weight gradients.

    Both need inner stride 1 but no alignment: on SM90 the operator transposes them first (:func:`transpose_fp8`). The
    scales are those of ``per_channel_cast_to_fp8`` as they are.
    """
    return _gemm("fp8_gemm_tn", _ops.fp8_gemm_tn, a, sfa, b, sfb, c, out_dtype, recipe, out)


def fp8_gemm_tt(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`fp8_gemm_nt` for ``a [K, M]`` with scales ``sfa`` ``[ceil(K / gran_k), ceil(M / gran_m)]``; ``b`` is
    ``[N, K]``.

    ``a`` needs inner stride 1 but no alignment: on SM90 the operator transposes it first (:func:`transpose_fp8`).
    """
    return _gemm("fp8_gemm_tt", _ops.fp8_gemm_tt, a, sfa, b, sfb, c, out_dtype, recipe, out)


def _cast(
    op: str,
    overloads: torch._ops.OpOverloadPacket,
    x: torch.Tensor,
    gran_k: int,
    use_ue8m0: bool,
    use_packed_ue8m0: bool,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.requires_grad and torch.is_grad_enabled():
        _refuse_grad(op, x=x)
    keywords: dict[str, Any] = {}  # as in _gemm
    if gran_k != 128:
        keywords["gran_k"] = gran_k
    if use_ue8m0 is not False:
        keywords["use_ue8m0"] = use_ue8m0
    if use_packed_ue8m0 is not False:
        keywords["use_packed_ue8m0"] = use_packed_ue8m0
    if out is None:
        return overloads.default(x, **keywords)
    values, scales = out
    overloads.out(x, out=values, out_sf=scales, **keywords)
    return values, scales


def per_token_cast_to_fp8(
    x: torch.Tensor,
    *,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[M, K]`` to FP8 with one scale per row and ``gran_k`` columns: activations.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``, inner stride 1, any row stride.
        gran_k: 128 or 32, columns per scale.
        use_ue8m0: round scales up to powers of two (they stay float32).
        use_packed_ue8m0: that, and return them as int32, four UE8M0 exponents a word, the first lowest.
        out: ``(values, scales)`` to write, of exactly the shapes, dtypes and scale strides described below.

    Returns:
        ``(values, scales)``: float8_e4m3fn ``[M, K]`` contiguous; float32 ``[M, ceil(K / gran_k)]`` (packed: int32
        ``[M, ceil(K / (4 * gran_k))]``), strides ``(1, M rounded up to 4)``: MN-major, TMA-aligned.

    Raises:
        RuntimeError: wrong dtype, rank, inner stride, ``gran_k``, or ``x`` requires grad.

    ``scale = max(amax |x|, 1e-4) / 448`` and ``value = x * (1 / scale)``, rounded to nearest even, saturating. NaN in
    a group makes its scale and values NaN, Inf its scale Inf. Specification:
    ``deep_gemm_ops.reference.per_token_cast_to_fp8``.
    """
    return _cast("per_token_cast_to_fp8", _ops.per_token_cast_to_fp8, x, gran_k, use_ue8m0, use_packed_ue8m0, out)


def per_channel_cast_to_fp8(
    x: torch.Tensor,
    *,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[K, MN]`` to FP8 with one scale per ``gran_k`` rows and column: operands of :func:`fp8_gemm_tn`.

    As :func:`per_token_cast_to_fp8`, along the other dimension. Scales are ``[ceil(K / gran_k), MN]`` (packed
    ``[ceil(K / (4 * gran_k)), MN]``) with strides ``(MN rounded up to 4, 1)``, MN-major for the transposed operand.

    Traced by torch.export with a dynamic K, the number of scale rows makes PyTorch ask whether it is one: give the
    dimension ``min=129`` (``gran_k`` 128). torch.compile compiles such a graph once for K <= gran_k and once for more.
    """
    return _cast("per_channel_cast_to_fp8", _ops.per_channel_cast_to_fp8, x, gran_k, use_ue8m0, use_packed_ue8m0, out)


def per_block_cast_to_fp8(
    x: torch.Tensor,
    *,
    gran_k: int = 128,
    use_ue8m0: bool = False,
    use_packed_ue8m0: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[MN, K]`` to FP8 with one scale per block of 128 rows and ``gran_k`` columns: weights.

    As :func:`per_token_cast_to_fp8`. Scales are ``[ceil(MN / 128), ceil(K / gran_k)]`` (packed
    ``[ceil(MN / 128), ceil(K / (4 * gran_k))]``) with strides ``(1, ceil(MN / 128) rounded up to 4)``.
    """
    return _cast("per_block_cast_to_fp8", _ops.per_block_cast_to_fp8, x, gran_k, use_ue8m0, use_packed_ue8m0, out)


def transpose_fp8(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """float8_e4m3fn ``[R, C]`` (inner stride 1, any row stride) to ``[C, R]``.

    Args:
        x: the matrix.
        out: ``[C, R]`` to write, inner stride 1, row stride at least R. A row stride that is a multiple of 16 makes
            the result an operand of :func:`fp8_gemm_nt` for any R.

    Returns:
        ``out``, or a fresh contiguous tensor.

    Raises:
        RuntimeError: wrong dtype, rank, inner stride or shape of ``out``.
    """
    if x.requires_grad and torch.is_grad_enabled():
        _refuse_grad("transpose_fp8", x=x)
    if out is None:
        return _ops.transpose_fp8.default(x)
    _ops.transpose_fp8.out(x, out=out)
    return out


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 scales ``[MN, X]`` or ``[G, MN, X]`` with any strides, copied to the layout that kernels read best.

    Returns:
        Same shape, stride 1 along MN, stride ``MN rounded up to 4`` along X (MN-major, TMA-aligned); a fresh tensor, or
        ``out``, which has to have these strides.

    Raises:
        RuntimeError: wrong dtype or rank, or another layout of ``out``.
    """
    if sf.requires_grad and torch.is_grad_enabled():
        _refuse_grad("get_mn_major_tma_aligned_tensor", sf=sf)
    if out is None:
        return _ops.get_mn_major_tma_aligned_tensor.default(sf)
    _ops.get_mn_major_tma_aligned_tensor.out(sf, out=out)
    return out


def get_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, *, round_up: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 scales that are powers of two, ``[MN, X]`` or ``[G, MN, X]``, packed as UE8M0 four to a word along X.

    Args:
        sf: float32, any strides.
        round_up: what is not a power of two becomes the next one, instead of NaN. Values that were divided by the old
            scale then stand for up to twice as much: this is for those that are quantised once more, or for callers who
            know that they lose accuracy. Negative scales, NaN and what is beyond 2^127 stay NaN.
        out: int32 of the result's shape and strides: written and returned.

    Returns:
        int32 ``[.., MN, ceil(X / 4)]``, byte j of word w the biased exponent of scale 4 w + j, bytes left over 0;
        MN-major, TMA-aligned as :func:`get_mn_major_tma_aligned_tensor`. A scale that is no power of two becomes 255,
        UE8M0's NaN, unless ``round_up`` asks for rounding: that is the casts' job (``use_ue8m0``).

    Raises:
        RuntimeError: wrong dtype or rank, or another layout of ``out``.
    """
    if sf.requires_grad and torch.is_grad_enabled():
        _refuse_grad("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf=sf)
    if out is None:
        return _ops.get_mn_major_tma_aligned_packed_ue8m0_tensor.default(sf, round_up=round_up)
    _ops.get_mn_major_tma_aligned_packed_ue8m0_tensor.out(sf, round_up=round_up, out=out)
    return out


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, ks: torch.Tensor, *, gran_k: int = 128
) -> torch.Tensor:
    """Scales of K groups, one group after the other, packed so that no word holds scales of two groups.

    Args:
        sf: float32 powers of two ``[S, MN]``, any strides; group g owns the next ``ceil(ks[g] / gran_k)`` rows.
        ks: int32 ``[G]`` on the device of ``sf``: K of each group. The host does not read it.
        gran_k: 128 or 32.

    Returns:
        int32 ``[(S + 3 * G) // 4, MN]``, strides ``(MN rounded up to 4, 1)``: group g has ``ceil(rows_g / 4)`` word
        rows, directly after those of group g - 1; bytes and rows left over are 0.

    Raises:
        RuntimeError: wrong dtype, rank, device or ``gran_k``.
    """
    if sf.requires_grad and torch.is_grad_enabled():
        _refuse_grad("get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor", sf=sf)
    return _ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor.default(sf, ks, gran_k=gran_k)


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    *,
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    round_up: bool = False,
) -> torch.Tensor:
    """Scales in the form that the GEMM kernels of this device read without further work, prepared once.

    Args:
        sf: float32 or float8_e8m0fnu ``[ceil(mn / gran_mn), ceil(k / gran_k)]``, or packed int32, any strides; with
            ``num_groups`` a leading dimension of that size.
        mn: rows of the operand (M or N).
        k: its K, in elements.
        recipe: ``[gran_m, gran_n, gran_k]`` together with ``is_sfa``, or ``[gran_mn, gran_k]`` without.
        num_groups: size of the leading dimension, None for a matrix.
        is_sfa: whether ``gran_m`` (True) or ``gran_n`` (False) of the recipe counts.
        disable_ue8m0_cast: leave float32 scales float32 on SM100 too.
        round_up: as of :func:`get_mn_major_tma_aligned_packed_ue8m0_tensor`, where float32 is packed.

    Returns:
        A fresh MN-major, TMA-aligned tensor. On SM90 and CPU: float32, UE8M0 expanded. On SM100: packed int32 ``[..,
        mn, ceil(k / (4 * gran_k))]``.

    Raises:
        RuntimeError: wrong dtype, rank, shape or recipe.
    """
    if sf.requires_grad and torch.is_grad_enabled():
        _refuse_grad("transform_sf_into_required_layout", sf=sf)
    return _ops.transform_sf_into_required_layout.default(
        sf,
        mn,
        k,
        recipe,
        num_groups=num_groups,
        is_sfa=is_sfa,
        disable_ue8m0_cast=disable_ue8m0_cast,
        round_up=round_up,
    )


def expand_ue8m0(sf: torch.Tensor, *, k_sf: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """UE8M0 scales as float32.

    Args:
        sf: float8_e8m0fnu ``[.., MN, k_sf]`` or packed int32 ``[.., MN, ceil(k_sf / 4)]``, rank 2 or 3, any strides.
        k_sf: scales along K.
        out: float32 ``[.., MN, k_sf]`` to write, MN-major, TMA-aligned.

    Returns:
        float32 ``[.., MN, k_sf]``, MN-major, TMA-aligned. Byte b gives ``2^(b - 127)``, 255 NaN.

    Raises:
        RuntimeError: wrong dtype, rank or shape.
    """
    if sf.requires_grad and torch.is_grad_enabled():
        _refuse_grad("expand_ue8m0", sf=sf)
    if out is None:
        return _ops.expand_ue8m0.default(sf, k_sf=k_sf)
    _ops.expand_ue8m0.out(sf, k_sf=k_sf, out=out)
    return out
