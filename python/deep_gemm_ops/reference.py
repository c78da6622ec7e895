"""The operators' executable specification, in plain PyTorch: what every kernel has to reproduce.

Read it to know what an operator means. It is also the CPU implementation and the oracle of the tests. A product
is dequantised, multiplied in float32 (float64 with ``exact=True``) and rounded once:

    D = round(C + dequantise(A, SFA) @ dequantise(B, SFB)^T)

Casts and layout operators are specified to the bit. Nothing here checks its arguments beyond what PyTorch does:
the operators do that first (``_checks.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import cast_scale_shape, match_recipe, matrix_dims, mn_major_strides
from .layout import align, ceil_div

__all__ = [
    "FP8_MAX",
    "MIN_AMAX",
    "ceil_to_ue8m0",
    "dequantize",
    "expand_ue8m0",
    "fp8_gemm",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "pack_ue8m0",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_token_cast_to_fp8",
    "scales_to_float32",
    "transform_sf_into_required_layout",
    "transpose_fp8",
    "ue8m0_bytes",
]

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
MIN_AMAX = 1e-4  # keeps scales of all-zero groups away from zero

# ---------------------------------------------------------------------------------------------------------------------
# UE8M0: a byte b stands for 2^(b - 127), 255 for NaN


def ceil_to_ue8m0(sf: torch.Tensor) -> torch.Tensor:
    """Positive normal float32 rounded up to a power of two; Inf and NaN stay."""
    bits = sf.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    rounded = (exponent << 23).view(torch.float32)
    return torch.where(torch.isfinite(sf), rounded, sf)


def ue8m0_bytes(sf: torch.Tensor, *, round_up: bool = False) -> torch.Tensor:
    """float32 to UE8M0 bytes (as int32). What is not a power of two from 2^-127 to 2^127 becomes 255, NaN: a scale is
    never rounded silently. With ``round_up`` it is the least power of two that is not below; NaN for NaN, and for what
    is negative or beyond 2^127."""
    bits = sf.contiguous().view(torch.int32)
    if round_up:
        rounded = torch.where(bits <= 0x00400000, 0, (bits.long() + 0x7FFFFF) >> 23).clamp(max=255)
        return torch.where(bits < 0, 255, rounded).to(torch.int32)
    exponent = bits >> 23  # arithmetic shift: negative for negative numbers
    power_of_two = ((bits & 0x7FFFFF) == 0) & (exponent >= 1) & (exponent <= 254)
    byte = torch.where(power_of_two, exponent, torch.full_like(exponent, 255))
    return torch.where(bits == 0x00400000, torch.zeros_like(byte), byte)  # 2^-127 is a subnormal float32


def pack_ue8m0(bytes_: torch.Tensor) -> torch.Tensor:
    """``[.., X]`` int32 bytes to ``[.., ceil(X / 4)]`` int32 words, first byte lowest, the last word filled with 0."""
    columns = bytes_.shape[-1]
    if columns == 0:
        return bytes_.new_zeros(bytes_.shape)
    padded = torch.nn.functional.pad(bytes_, (0, align(columns, 4) - columns)).to(torch.uint8)
    return padded.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _unpack_ue8m0(words: torch.Tensor, columns: int) -> torch.Tensor:
    # Not contiguous(): that leaves one column as it is, whatever its stride, which view() then refuses.
    words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)[..., :columns].to(torch.int32)


def _ue8m0_to_float32(bytes_: torch.Tensor) -> torch.Tensor:
    bits = bytes_ << 23
    bits = torch.where(bytes_ == 0, torch.full_like(bits, 0x00400000), bits)
    bits = torch.where(bytes_ == 255, torch.full_like(bits, 0x7FC00000), bits)
    return bits.view(torch.float32)


def scales_to_float32(sf: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales of any accepted type as float32 ``[.., MN, columns]``; ``columns`` = ceil(K / gran_k)."""
    if sf.dtype == torch.int32:
        return _ue8m0_to_float32(_unpack_ue8m0(sf, columns))
    if sf.dtype == torch.float8_e8m0fnu:
        return _ue8m0_to_float32(sf.view(torch.uint8).to(torch.int32))
    return sf


def _mn_major(sf: torch.Tensor) -> torch.Tensor:
    """A copy of ``[.., MN, X]`` with stride 1 along MN and the other stride rounded up to 16 bytes."""
    return torch.empty_strided(sf.shape, mn_major_strides(sf.shape), dtype=sf.dtype, device=sf.device).copy_(sf)


# ---------------------------------------------------------------------------------------------------------------------
# GEMM


def dequantize(
    x: torch.Tensor, sf: torch.Tensor, gran_mn: int, gran_k: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``x[i, k] * sf[i // gran_mn, k // gran_k]`` in ``dtype``.

    Args:
        x: float8_e4m3fn ``[MN, K]``, any strides.
        sf: ``[ceil(MN / gran_mn), ceil(K / gran_k)]`` float32 or float8_e8m0fnu, or packed int32.
    """
    mn, k = x.shape
    sf = scales_to_float32(sf, ceil_div(k, gran_k)).to(dtype)
    if gran_mn > 1:
        sf = sf.repeat_interleave(gran_mn, dim=0)[:mn]
    values = x.to(torch.float32).to(dtype)
    whole = k // gran_k
    # In place and group by group: the scales are never expanded along K.
    if whole:
        values[:, : whole * gran_k].unflatten(1, (whole, gran_k)).mul_(sf[:, :whole, None])
    if k > whole * gran_k:
        values[:, whole * gran_k :].mul_(sf[:, whole:])
    return values


def fp8_gemm(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    *,
    layout: str = "nt",
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    recipe: Sequence[int] | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """``C + A @ B^T`` of two FP8 matrices with scales, for every layout, accumulated in one go and rounded once.

    Args:
        a: float8_e4m3fn ``[M, K]``, ``[K, M]`` for layouts that begin with "t".
        sfa: scales of ``a``: float32 or float8_e8m0fnu ``[ceil(M / gran_m), ceil(K / gran_k)]``, or int32 with four
            UE8M0 scales a word, ``[ceil(M / gran_m), ceil(K / gran_k / 4)]``; transposed where ``a`` is. Any strides.
        b: float8_e4m3fn ``[N, K]``, ``[K, N]`` for layouts that end with "n".
        sfb: scales of ``b``, likewise with N.
        c: added, ``[M, N]`` or a row ``[N]``.
        out_dtype: dtype of the result; with ``exact`` float64 is allowed and leaves the product unrounded.
        recipe: ``[gran_m, gran_n, gran_k]``, or with gran_k of both operands ``[gran_m, gran_n, gran_k_a, gran_k_b]``;
            inferred from the shapes of the scales where absent.
        exact: dequantise and multiply in float64 instead of float32.

    Returns:
        ``[M, N]``, contiguous.
    """
    if layout[0] == "t":
        a, sfa = a.t(), sfa.t()
    if layout[1] == "n":
        b, sfb = b.t(), sfb.t()
    (m, k), n = a.shape, b.shape[0]
    dims_a, dims_b = matrix_dims("M", m, k), matrix_dims("N", n, k)
    mixed = recipe is not None and len(recipe) == 4
    gran_m, gran_n, gran_k_a, gran_k_b = match_recipe("fp8_gemm", sfa, dims_a, sfb, dims_b, recipe, mixed)
    dtype = torch.float64 if exact else torch.float32
    product = dequantize(a, sfa, gran_m, gran_k_a, dtype) @ dequantize(b, sfb, gran_n, gran_k_b, dtype).t()
    if c is not None:
        product += c.to(dtype)
    return product.to(out_dtype)


def fp8_gemm_nt(
    a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, **options: object
) -> torch.Tensor:
    """:func:`fp8_gemm` of ``a [M, K]`` and ``b [N, K]``."""
    return fp8_gemm(a, sfa, b, sfb, layout="nt", **options)


def fp8_gemm_nn(
    a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, **options: object
) -> torch.Tensor:
    """:func:`fp8_gemm` of ``a [M, K]`` and ``b [K, N]``."""
    return fp8_gemm(a, sfa, b, sfb, layout="nn", **options)


def fp8_gemm_tn(
    a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, **options: object
) -> torch.Tensor:
    """:func:`fp8_gemm` of ``a [K, M]`` and ``b [K, N]``."""
    return fp8_gemm(a, sfa, b, sfb, layout="tn", **options)


def fp8_gemm_tt(
    a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, **options: object
) -> torch.Tensor:
    """:func:`fp8_gemm` of ``a [K, M]`` and ``b [N, K]``."""
    return fp8_gemm(a, sfa, b, sfb, layout="tt", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Casts


def _cast(
    kind: str, x: torch.Tensor, gran_k: int, use_ue8m0: bool, use_packed_ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each group of ``group_rows`` x ``group_cols`` values: sf = max(amax |x|, 1e-4) / 448.

    NaN and Inf are never hidden: a NaN makes its group's scale and all its values NaN, an Inf its group's scale Inf.
    """
    rows, cols = x.shape
    group_rows = {"per_token": 1, "per_channel": gran_k, "per_block": 128}[kind]
    group_cols = {"per_token": gran_k, "per_channel": 1, "per_block": gran_k}[kind]
    padding = (0, align(cols, group_cols) - cols, 0, align(rows, group_rows) - rows)  # beyond the edge are zeros
    groups = torch.nn.functional.pad(x.to(torch.float32), padding)
    groups = groups.view(ceil_div(rows, group_rows), group_rows, ceil_div(cols, group_cols), group_cols)
    amax = groups.abs().amax(dim=(1, 3)).clamp(min=MIN_AMAX)
    sf = amax / torch.full_like(amax, FP8_MAX)  # on a GPU PyTorch divides by a Python number with its reciprocal
    if use_ue8m0 or use_packed_ue8m0:
        sf = ceil_to_ue8m0(sf)
    values = (groups * (1.0 / sf)[:, None, :, None]).view(rows + padding[3], cols + padding[1])[:rows, :cols]
    values = values.clamp(-FP8_MAX, FP8_MAX)  # saturate first: the conversion alone may give NaN beyond 448
    values = values.where(~values.isnan(), torch.nan)  # one NaN: its sign is an accident of the arithmetic
    if use_packed_ue8m0:
        along_k = sf.t() if kind == "per_channel" else sf
        packed = pack_ue8m0(ue8m0_bytes(along_k))
        sf = packed.t() if kind == "per_channel" else packed
    shape, strides = cast_scale_shape(kind, rows, cols, gran_k, use_packed_ue8m0)
    scales = torch.empty_strided(shape, strides, dtype=sf.dtype, device=x.device).copy_(sf)
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def per_token_cast_to_fp8(
    x: torch.Tensor, *, gran_k: int = 128, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M, K]`` with one scale per row and ``gran_k`` columns: values ``[M, K]``, scales ``[M, ceil(K / gran_k)]``."""
    return _cast("per_token", x, gran_k, use_ue8m0, use_packed_ue8m0)


def per_channel_cast_to_fp8(
    x: torch.Tensor, *, gran_k: int = 128, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[K, MN]`` with one scale per ``gran_k`` rows and column: values ``[K, MN]``, scales ``[ceil(K / gran_k),
    MN]``."""
    return _cast("per_channel", x, gran_k, use_ue8m0, use_packed_ue8m0)


def per_block_cast_to_fp8(
    x: torch.Tensor, *, gran_k: int = 128, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[MN, K]`` with one scale per 128 x ``gran_k`` block: scales ``[ceil(MN / 128), ceil(K / gran_k)]``."""
    return _cast("per_block", x, gran_k, use_ue8m0, use_packed_ue8m0)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def transpose_fp8(x: torch.Tensor) -> torch.Tensor:
    """``[R, C]`` to contiguous ``[C, R]``."""
    return torch.empty((x.shape[1], x.shape[0]), dtype=x.dtype, device=x.device).copy_(x.t())


def get_mn_major_tma_aligned_tensor(sf: torch.Tensor) -> torch.Tensor:
    """float32 ``[MN, X]`` or ``[G, MN, X]``, any strides, to the same values MN-major and TMA-aligned."""
    return _mn_major(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: torch.Tensor, *, round_up: bool = False) -> torch.Tensor:
    """float32 powers of two ``[.., MN, X]`` to packed UE8M0 int32 ``[.., MN, ceil(X / 4)]``, MN-major and
    TMA-aligned; ``round_up`` as of ``ue8m0_bytes``."""
    return _mn_major(pack_ue8m0(ue8m0_bytes(sf, round_up=round_up)))


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, ks: torch.Tensor, *, gran_k: int = 128
) -> torch.Tensor:
    """Scales of K groups laid one after the other, packed so that no word holds scales of two groups.

    Args:
        sf: float32 powers of two ``[S, MN]``; group g holds ``ceil(ks[g] / gran_k)`` of the rows.
        ks: int32 ``[G]``, K of each group. Negative ones count as 0, and rows past S are dropped.

    Returns:
        int32 ``[(S + 3 G) // 4, MN]``, stride 1 along MN; group after group, the bytes and rows left over are 0.
    """
    rows, mn = sf.shape
    words = (rows + 3 * ks.numel()) // 4
    result = torch.empty_strided((words, mn), (align(mn, 4), 1), dtype=torch.int32, device=sf.device).zero_()
    begin, word = 0, 0
    for k in ks.tolist():
        end = min(begin + ceil_div(max(k, 0), gran_k), rows)
        packed = pack_ue8m0(ue8m0_bytes(sf[begin:end].t())).t()
        result[word : word + packed.shape[0]] = packed
        begin, word = end, word + packed.shape[0]
    return result


def expand_ue8m0(sf: torch.Tensor, *, k_sf: int) -> torch.Tensor:
    """float8_e8m0fnu ``[.., MN, k_sf]`` or packed int32 ``[.., MN, ceil(k_sf / 4)]`` to float32 ``[.., MN, k_sf]``,
    MN-major."""
    return _mn_major(scales_to_float32(sf, k_sf))


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
    arch_major: int = 9,
) -> torch.Tensor:
    """Scales as the kernels of an architecture read them without further work; ``arch_major`` is 9 for SM90, 10 for
    SM100.

    Args:
        sf: float32 or float8_e8m0fnu ``[.., ceil(mn / gran_mn), ceil(k / gran_k)]`` or packed int32.
        recipe: ``[gran_m, gran_n, gran_k]`` with ``is_sfa`` telling which of the first two counts, or ``[gran_mn,
            gran_k]``.
        num_groups: size of the leading dimension, None for a matrix.
        disable_ue8m0_cast: keep float32 scales float32 on SM100 as well.
        round_up: as of ``ue8m0_bytes``, where float32 is packed.

    Returns:
        SM90: float32 of the shape of ``sf``, MN-major. SM100: packed int32 ``[.., mn, ceil(k / gran_k / 4)]``,
        MN-major.
    """
    gran_mn, gran_k = (recipe[0 if is_sfa else 1], recipe[2]) if len(recipe) == 3 else (recipe[0], recipe[1])
    if arch_major < 10 or (sf.dtype == torch.float32 and disable_ue8m0_cast):
        return _mn_major(scales_to_float32(sf, ceil_div(k, gran_k)))
    if gran_mn > 1:
        sf = sf.repeat_interleave(gran_mn, dim=-2)[..., :mn, :]
    if sf.dtype == torch.int32:
        return _mn_major(sf)
    is_float = sf.dtype == torch.float32
    bytes_ = ue8m0_bytes(sf, round_up=round_up) if is_float else sf.view(torch.uint8).to(torch.int32)
    return _mn_major(pack_ue8m0(bytes_))
