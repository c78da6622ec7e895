"""Matrix products with the public module's signatures: pairs of values and scales in, the result written to ``d``.

Arguments that only steer just-in-time compilation (``compiled_dims``) or a conversion that these operators never make
(``disable_ue8m0_cast``) are accepted and ignored. Where the first argument is a tensor and not a pair, a call is one of
``deep_gemm_ops``' own functions and returns its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import deep_gemm_ops

from ._names import offer, works

__all__: list[str] = []

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]

_ops = torch.ops.deep_gemm
_LAYOUTS = ("nt", "nn", "tn", "tt")


def _or_flat(native: str) -> Callable[[Callable], Callable]:
    """The flat form beside the form with pairs."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            if args and isinstance(args[0], Tensor):
                return getattr(deep_gemm_ops, native)(*args, **keywords)
            return function(*args, **keywords)

        return call

    return wrap


def _is_fp4(x: Tensor) -> bool:
    return x.dtype in (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)


def _operator(op: str, a: Pair, b: Pair) -> Any:
    """The overloads of an ``fp8`` operator, or of its FP4 relative where an operand is FP4."""
    if _is_fp4(a[0]) or _is_fp4(b[0]):
        fp4 = op.replace("fp8_", "fp8_fp4_", 1)
        if not works(fp4):
            raise RuntimeError(f"{op}: an operand has dtype {a[0].dtype} or {b[0].dtype}, and there is no {fp4} here")
        op = fp4
    return getattr(_ops, op)


def _recipe(
    recipe: Sequence[int] | None,
    recipe_a: Sequence[int] | None,
    recipe_b: Sequence[int] | None,
    b: Pair,
    n: int,
    n_dim: int,
) -> list[int] | None:
    """``[gran_m, gran_n, gran_k]`` of either way to say it; None where the shapes of the scales say it."""
    if recipe_a is not None and recipe_b is not None:
        if recipe_a[1] != recipe_b[1]:
            if not _is_fp4(b[0]):
                raise RuntimeError(f"recipe_a, recipe_b have gran_k {recipe_a[1]} and {recipe_b[1]}, expected the same")
            return [recipe_a[0], recipe_b[0], recipe_a[1], recipe_b[1]]
        return [recipe_a[0], recipe_b[0], recipe_a[1]]
    if recipe is not None:
        return list(recipe)
    if b[1].dtype == torch.int32:  # packed scales fit several granularities along K: the public default is 128
        return [1, 1 if b[1].shape[n_dim] == n else 128, 128]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Dense


def _dense(layout: str) -> None:
    op = f"fp8_gemm_{layout}"
    n_dim = -2 if layout[1] == "t" else -1

    @_or_flat(op)
    def gemm(
        a: Pair,
        b: Pair,
        d: Tensor,
        c: Tensor | None = None,
        recipe: Sequence[int] | None = None,
        recipe_a: Sequence[int] | None = None,
        recipe_b: Sequence[int] | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        grans = _recipe(recipe, recipe_a, recipe_b, b, d.shape[1], n_dim)
        _operator(op, a, b).out(*a, *b, c=c, recipe=grans, out=d)

    gemm.__name__ = gemm.__qualname__ = op
    gemm.__doc__ = f"""``d = c + a @ b`` of two (values, scales) pairs, layout "{layout}": ``deep_gemm_ops.{op}``."""
    offer(op, f"fp8_fp4_gemm_{layout}", needs=op)(gemm)

    bf16 = f"bf16_gemm_{layout}"

    def plain(
        a: Tensor, b: Tensor, d: Tensor | None = None, c: Tensor | None = None, compiled_dims: str = "nk"
    ) -> Tensor | None:
        if d is None:
            return getattr(_ops, bf16)(a, b, c=c)
        getattr(_ops, bf16).out(a, b, c=c, out=d)
        return None

    plain.__name__ = plain.__qualname__ = bf16
    plain.__doc__ = f"""``d = c + a @ b`` of BF16 matrices, layout "{layout}": ``deep_gemm_ops.{bf16}``."""
    offer(bf16, f"cublaslt_gemm_{layout}", needs=bf16)(plain)


for _layout in _LAYOUTS:
    _dense(_layout)


@offer("fp8_gemm_nt_skip_head_mid", needs="fp8_gemm_nt_skip_head_mid")
@_or_flat("fp8_gemm_nt_skip_head_mid")
def fp8_gemm_nt_skip_head_mid(
    a: Pair,
    b: Pair,
    d: Tensor,
    head_splits: Sequence[int],
    recipe: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``d = a @ b^T``, each head's columns around a gap: ``deep_gemm_ops.fp8_gemm_nt_skip_head_mid``."""
    grans = _recipe(recipe, None, None, b, b[0].shape[0], -2)
    _ops.fp8_gemm_nt_skip_head_mid.out(*a, *b, list(head_splits), recipe=grans, out=d)


@offer("gemm_fp8_fp8_bf16_nt", needs="fp8_gemm_nt")
def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: Tensor, disable_ue8m0_cast: bool = False) -> None:
    """First generation's name of ``fp8_gemm_nt``."""
    _ops.fp8_gemm_nt.out(*lhs, *rhs, out=out)


def _mn_first(sf: Tensor, mn: int) -> Tensor:
    """Scales ``[MN, X]`` of scales that may be ``[X, MN]``."""
    return sf if sf.shape[0] == mn else sf.t()


@offer("wgrad_gemm_fp8_fp8_fp32_nt", needs="fp8_gemm_nt")
def wgrad_gemm_fp8_fp8_fp32_nt(lhs: Pair, rhs: Pair, out: Tensor) -> None:
    """First generation: ``out += lhs @ rhs^T``, scales per row of both, ``[MN, ceil(K / 128)]`` or transposed."""
    (a, sfa), (b, sfb) = lhs, rhs
    sfa, sfb = _mn_first(sfa, a.shape[0]), _mn_first(sfb, b.shape[0])
    _ops.fp8_gemm_nt.out(a, sfa, b, sfb, c=out, recipe=[1, 1, 128], out=out)


# ---------------------------------------------------------------------------------------------------------------------
# Grouped along M


def _m_grouped(order: str) -> None:
    op = f"m_grouped_fp8_gemm_{order}_contiguous"
    n_dim = -2 if order == "nt" else -1

    @_or_flat(op)
    def grouped(
        a: Pair,
        b: Pair,
        d: Tensor,
        grouped_layout: Tensor | None = None,
        recipe: Sequence[int] | None = None,
        recipe_a: Sequence[int] | None = None,
        recipe_b: Sequence[int] | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
        use_psum_layout: bool = False,
        ensure_zero_padding: bool = True,
        expected_m_for_psum_layout: int | None = None,
        m_indices: Tensor | None = None,
    ) -> None:
        layout = _prepare(grouped_layout, m_indices, d, use_psum_layout, ensure_zero_padding)
        options = {"layout": "psum" if use_psum_layout else "indices", "expected_m": expected_m_for_psum_layout}
        grans = _recipe(recipe, recipe_a, recipe_b, b, d.shape[1], n_dim)
        _operator(op, a, b).out(*a, *b, layout, recipe=grans, out=d, **options)

    grouped.__name__ = grouped.__qualname__ = op
    grouped.__doc__ = f"""One product for the rows of all experts: ``deep_gemm_ops.{op}``."""
    offer(op, op.replace("fp8", "fp8_fp4"), needs=op)(grouped)

    bf16 = f"m_grouped_bf16_gemm_{order}_contiguous"

    def plain(
        a: Tensor,
        b: Tensor,
        d: Tensor,
        grouped_layout: Tensor | None = None,
        compiled_dims: str = "nk",
        use_psum_layout: bool = False,
        ensure_zero_padding: bool = True,
        expected_m_for_psum_layout: int | None = None,
        m_indices: Tensor | None = None,
    ) -> None:
        layout = _prepare(grouped_layout, m_indices, d, use_psum_layout, ensure_zero_padding)
        options = {"layout": "psum" if use_psum_layout else "indices", "expected_m": expected_m_for_psum_layout}
        getattr(_ops, bf16).out(a, b, layout, out=d, **options)

    plain.__name__ = plain.__qualname__ = bf16
    plain.__doc__ = f"""``{op}`` of BF16 tensors: ``deep_gemm_ops.{bf16}``."""
    offer(bf16, needs=bf16)(plain)


def _prepare(
    grouped_layout: Tensor | None, m_indices: Tensor | None, d: Tensor, use_psum_layout: bool, zero_padding: bool
) -> Tensor:
    if (grouped_layout is None) == (m_indices is None):
        raise TypeError("expected grouped_layout, or m_indices in its place")
    if use_psum_layout and zero_padding:
        d.zero_()  # the operators leave rows between groups alone
    return m_indices if grouped_layout is None else grouped_layout


for _order in ("nt", "nn"):
    _m_grouped(_order)


@offer("m_grouped_gemm_fp8_fp8_bf16_nt_contiguous", needs="m_grouped_fp8_gemm_nt_contiguous")
def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Pair, rhs: Pair, out: Tensor, m_indices: Tensor, disable_ue8m0_cast: bool = False
) -> None:
    """First generation's name of ``m_grouped_fp8_gemm_nt_contiguous``."""
    _ops.m_grouped_fp8_gemm_nt_contiguous.out(*lhs, *rhs, m_indices, out=out)


@offer(
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked",
    needs="m_grouped_fp8_gemm_nt_masked",
)
@_or_flat("m_grouped_fp8_gemm_nt_masked")
def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    enable_overlap: bool = False,
    max_block_n: int = 256,
    signal: Tensor | None = None,
) -> None:
    """The first ``masked_m[g]`` rows of each expert: ``deep_gemm_ops.m_grouped_fp8_gemm_nt_masked``.

    ``enable_overlap`` and ``signal`` belong to a fork whose kernels report progress; asking for it raises.
    """
    if enable_overlap or signal is not None:
        raise RuntimeError("m_grouped_fp8_gemm_nt_masked: enable_overlap has value True, expected False")
    grans = _recipe(recipe, recipe_a, recipe_b, b, d.shape[2], -2)
    _operator("m_grouped_fp8_gemm_nt_masked", a, b).out(*a, *b, masked_m, expected_m, recipe=grans, out=d)


@offer("m_grouped_gemm_fp8_fp8_bf16_nt_masked", needs="m_grouped_fp8_gemm_nt_masked")
def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, out: Tensor, masked_m: Tensor, expected_m: int, disable_ue8m0_cast: bool = False
) -> None:
    """First generation's name of ``m_grouped_fp8_gemm_nt_masked``."""
    _ops.m_grouped_fp8_gemm_nt_masked.out(*lhs, *rhs, masked_m, expected_m, out=out)


@offer("m_grouped_bf16_gemm_nt_masked", "bf16_m_grouped_gemm_nt_masked", needs="m_grouped_bf16_gemm_nt_masked")
def m_grouped_bf16_gemm_nt_masked(
    a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int, compiled_dims: str = "nk"
) -> None:
    """``m_grouped_fp8_gemm_nt_masked`` of BF16 tensors."""
    _ops.m_grouped_bf16_gemm_nt_masked.out(a, b, masked_m, expected_m, out=d)


# ---------------------------------------------------------------------------------------------------------------------
# Grouped along K


def _sizes(
    like: Tensor, ks_cpu: Sequence[int] | None, grouped_layout: Tensor | None, ks: Any, ks_tensor: Tensor | None
) -> Tensor:
    """The groups' sizes on the device: as given, or copied from the host's list."""
    sizes = ks_tensor if grouped_layout is None else grouped_layout
    if sizes is not None:
        return sizes
    host = ks if ks_cpu is None else ks_cpu
    if host is None:
        raise TypeError("expected grouped_layout, or ks_tensor or ks in its place")
    return torch.tensor(list(host), dtype=torch.int32, device=like.device)


def _k_grouped(order: str) -> None:
    op = f"k_grouped_fp8_gemm_{order}_contiguous"

    def scales(sf: Tensor, mn: int) -> Tensor:
        # [rows, MN] in our terms. Operands that are K-major come with [MN, rows]; square ones are taken to be so, too.
        if order == "nt":
            return sf.t() if sf.shape[0] == mn else sf
        return sf if sf.shape[1] == mn else sf.t()

    @_or_flat(op)
    def grouped(
        a: Pair,
        b: Pair,
        d: Tensor,
        ks_cpu: Sequence[int] | None = None,
        grouped_layout: Tensor | None = None,
        c: Tensor | None = None,
        recipe: Sequence[int] = (1, 1, 128),
        compiled_dims: str = "mn",
        use_psum_layout: bool = False,
        ks: Sequence[int] | None = None,
        ks_tensor: Tensor | None = None,
    ) -> None:
        if tuple(recipe) != (1, 1, 128):
            raise RuntimeError(f"{op}: recipe has value {list(recipe)}, expected [1, 1, 128]")
        sizes = _sizes(d, ks_cpu, grouped_layout, ks, ks_tensor)
        values = [x[0].reshape(-1) if order == "nt" else x[0] for x in (a, b)]
        sfa, sfb = scales(a[1], d.shape[1]), scales(b[1], d.shape[2])
        layout = "psum" if use_psum_layout else "sizes"
        getattr(_ops, op).out(values[0], sfa, values[1], sfb, sizes, c=c, layout=layout, out=d)

    grouped.__name__ = grouped.__qualname__ = op
    grouped.__doc__ = f"""``d[g] = c[g] + a_g^T b_g``, weight gradients of all experts: ``deep_gemm_ops.{op}``."""
    offer(op, needs=op)(grouped)


for _order in ("nt", "tn"):
    _k_grouped(_order)


@offer("k_grouped_wgrad_gemm_fp8_fp8_fp32_nt", needs="k_grouped_fp8_gemm_nt_contiguous")
def k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(lhs: Pair, rhs: Pair, out: Tensor, batch_sizes: Sequence[int]) -> None:
    """First generation: ``out[g] += lhs_g @ rhs_g^T``, operands flattened K-major, scales ``[rows, MN]``."""
    sizes = _sizes(out, batch_sizes, None, None, None)
    (a, sfa), (b, sfb) = lhs, rhs
    _ops.k_grouped_fp8_gemm_nt_contiguous.out(a.reshape(-1), sfa, b.reshape(-1), sfb, sizes, c=out, out=out)


@offer("k_grouped_bf16_gemm_tn_contiguous", needs="k_grouped_bf16_gemm_tn_contiguous")
def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks_cpu: Sequence[int] | None = None,
    grouped_layout: Tensor | None = None,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    ks: Sequence[int] | None = None,
    ks_tensor: Tensor | None = None,
) -> None:
    """``k_grouped_fp8_gemm_tn_contiguous`` of BF16 tensors."""
    sizes = _sizes(d, ks_cpu, grouped_layout, ks, ks_tensor)
    _ops.k_grouped_bf16_gemm_tn_contiguous.out(a, b, sizes, c=c, layout="psum" if use_psum_layout else "sizes", out=d)


# ---------------------------------------------------------------------------------------------------------------------
# Einsum, hyper-connections


@offer("einsum", needs="einsum")
def einsum(
    expr: str, a: Tensor, b: Tensor, d: Tensor | None = None, c: Tensor | None = None, use_cublaslt: bool = False
) -> Tensor | None:
    """``d = c + einsum(expr, a, b)`` of BF16 tensors: ``deep_gemm_ops.einsum``."""
    if d is None:
        return _ops.einsum(expr, a, b, c=c)
    _ops.einsum.out(expr, a, b, c=c, out=d)
    return None


@offer("fp8_einsum", needs="fp8_einsum")
def fp8_einsum(
    expr: str, a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: Sequence[int] = (1, 128, 128)
) -> None:
    """``d = c + einsum(expr, a, b)`` of two (values, scales) pairs: ``deep_gemm_ops.fp8_einsum``."""
    _ops.fp8_einsum.out(expr, *a, *b, c=c, recipe=list(recipe), out=d)


@offer("tf32_hc_prenorm_gemm", needs="tf32_hc_prenorm_gemm")
def tf32_hc_prenorm_gemm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None = None) -> None:
    """``d = a @ b^T`` in TF32 and ``sqr_sum = (a^2).sum(1)`` in one pass."""
    _ops.tf32_hc_prenorm_gemm.out(a, b, num_splits=num_splits, out=d, out_sqr_sum=sqr_sum)


# ---------------------------------------------------------------------------------------------------------------------
# Indexer scoring

Query = tuple[Tensor, Tensor | None]


@offer("fp8_mqa_logits", needs="fp8_mqa_logits")
def fp8_mqa_logits(
    q: Tensor,
    kv: Pair,
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weighted-ReLU logits of FP8 queries and keys."""
    options = {"clean_logits": clean_logits, "max_seqlen_k": max_seqlen_k, "logits_dtype": logits_dtype}
    return _ops.fp8_mqa_logits(q, *kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, **options)


@offer("fp8_fp4_mqa_logits", needs="fp8_fp4_mqa_logits")
def fp8_fp4_mqa_logits(
    q: Query,
    kv: Pair,
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``fp8_mqa_logits`` of queries with their scales, FP4 like the keys, or with None, FP8."""
    options = {"clean_logits": clean_logits, "max_seqlen_k": max_seqlen_k, "logits_dtype": logits_dtype}
    return _ops.fp8_fp4_mqa_logits(*q, *kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, **options)


@offer("get_paged_mqa_logits_metadata", needs="get_paged_mqa_logits_metadata")
def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """The schedule of a paged call."""
    return _ops.get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=indices)


@offer("fp8_paged_mqa_logits", needs="fp8_paged_mqa_logits")
def fp8_paged_mqa_logits(
    q: Tensor,
    fused_kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """Weighted-ReLU logits of FP8 queries against a paged cache."""
    options = {"clean_logits": clean_logits, "logits_dtype": logits_dtype, "indices": indices}
    rest = (fused_kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
    return _ops.fp8_paged_mqa_logits(q, *rest, **options)


@offer("fp8_fp4_paged_mqa_logits", needs="fp8_fp4_paged_mqa_logits")
def fp8_fp4_paged_mqa_logits(
    q: Query,
    fused_kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
) -> Tensor:
    """``fp8_paged_mqa_logits`` of queries with their scales, FP4 like the cache, or with None, FP8."""
    options = {"clean_logits": clean_logits, "logits_dtype": logits_dtype, "indices": indices}
    rest = (fused_kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)
    return _ops.fp8_fp4_paged_mqa_logits(*q, *rest, **options)
