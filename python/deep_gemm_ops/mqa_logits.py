"""Scores of the lightning indexer (weighted-ReLU MQA logits), over dense keys and over the blocks of a cache.

Importing this module registers the CPU and fake forms of its operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ._checks import (
    FP4_DTYPES,
    MAX_SIZE,
    OUT_DTYPES,
    check_device,
    check_dtype,
    check_inner_stride,
    check_rank,
    check_rows_apart,
    check_shape,
    check_tma_readable,
    concrete,
    fail,
    one_of,
    shape_of,
    strides_of,
)
from ._cpu import _cpu
from ._fakes import _fake
from .fp8_fp4_gemm import expand_fp4
from .layout import TMA_ALIGNMENT_BYTES, ceil_div
from .ops import _refuse_grad

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_paged_mqa_logits_metadata",
]

Tensor = torch.Tensor

HEADS = (8, 16, 32, 64)
HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (64, 32)  # keys of a block of the cache
TILE_KEYS = 64  # keys that the schedule counts as one piece of work
ATOM_TOKENS = 4  # neighbouring tokens of a sequence that the schedule counts as one, where `indices` are given
SCALE_BYTES = 4  # of a key: one float32, or four UE8M0
FP4_GRAN_K = 32  # elements of FP4 that share a scale

# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def _call(op: str, arguments: dict[str, Any], keywords: dict[str, Any], dtype: torch.dtype | None, out: Any) -> Tensor:
    overloads = getattr(torch.ops.deep_gemm, op)
    if torch.is_grad_enabled():
        tensors = {name: x for name, x in {**arguments, **keywords, "out": out}.items() if isinstance(x, Tensor)}
        _refuse_grad(op, **tensors)
    if out is None:
        if dtype is not None:
            keywords["logits_dtype"] = dtype
        return overloads.default(*arguments.values(), **keywords)
    if dtype is not None and out.dtype != dtype:
        fail(op, "out", "dtype", out.dtype, dtype, "logits_dtype")
    overloads.out(*arguments.values(), out=out, **keywords)
    return out


def fp8_mqa_logits(
    q: Tensor,
    kv: Tensor,
    kv_sf: Tensor,
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    *,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[i, j] = sum_h relu(q[i, h] . kv[j] * kv_sf[j]) * weights[i, h]`` for ``start[i] <= j < end[i]``.

    Args:
        q: float8_e4m3fn ``[S, H, D]``; H is 8, 16, 32 or 64, D is 32, 64 or 128. Heads lie one after the other, also
            from token to token (as in a contiguous tensor), at a base address and a stride that are multiples of 16
            bytes.
        kv: float8_e4m3fn ``[S_kv, D]``, inner stride 1, row stride and base address multiples of 16 bytes.
        kv_sf: float32 ``[S_kv]``, stride 1, base address a multiple of 16 bytes. Any values: a negative scale turns
            the sign of a product before the ReLU.
        weights: float32 ``[S, H]``, inner stride 1. On Hopper a token with one that is Inf or NaN gets NaN.
        cu_seq_len_k_start: int32 ``[S]``, any stride: the first key of each token. Values outside of 0 to S_kv are
            clamped; the range of a token may be empty.
        cu_seq_len_k_end: int32 ``[S]``, behind the last key of each token, likewise.
        clean_logits: set what lies outside of the ranges to -inf; otherwise it is left alone (in ``out``) or
            unspecified.
        max_seqlen_k: where it is positive the result has that many columns, and row i starts at key ``start[i]``
            (clamped); keys beyond are not computed. While tracing, a symbolic value counts as positive.
        logits_dtype: torch.float32 (default) or torch.bfloat16.
        out: ``[S, S_kv]`` or ``[S, max_seqlen_k]``, inner stride 1, any row stride: written and returned.

    Returns:
        ``[S, S_kv]`` or ``[S, max_seqlen_k]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Products and sums are FP32, rounded once; the scale is applied to the sum of the heads, where that makes no
    difference but to the last bits. Specification: ``deep_gemm_ops.mqa_logits.reference_mqa_logits``.
    """
    arguments = {
        "q": q,
        "kv": kv,
        "kv_sf": kv_sf,
        "weights": weights,
        "cu_seq_len_k_start": cu_seq_len_k_start,
        "cu_seq_len_k_end": cu_seq_len_k_end,
    }
    keywords = {"clean_logits": clean_logits, "max_seqlen_k": max_seqlen_k}
    return _call("fp8_mqa_logits", arguments, keywords, logits_dtype, out)


def fp8_fp4_mqa_logits(
    q: Tensor,
    q_sf: Tensor | None,
    kv: Tensor,
    kv_sf: Tensor,
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    *,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_mqa_logits` of FP4 queries and keys, each 32 of whose elements have a scale:
    ``out[i, j] = sum_h relu(sum_d q[i, h, d] q_sf[i, h, d / 32] kv[j, d] kv_sf[j, d / 32]) * weights[i, h]``
    for ``start[i] <= j < end[i]``.

    Args:
        q: E2M1 values, two a byte along D, the even element in the low nibble: float4_e2m1fn_x2, int8 or uint8
            ``[S, H, D / 2]``. H is 8, 16, 32 or 64, D is 32, 64 or 128. Heads lie one after the other, also from token
            to token (as in a contiguous tensor), at a base address and a stride that are multiples of 16 bytes.
        q_sf: int32 ``[S, H]``, inner stride 1, the UE8M0 scales of a head in one word: the one of elements 32 i on in
            byte i, the lowest first; bytes beyond D / 32 are not used. :func:`per_token_cast_to_fp4` with
            ``use_packed_ue8m0`` makes both. None where queries and keys are FP8: then this is :func:`fp8_mqa_logits`,
            with its dtypes.
        kv: FP4 as ``q``, ``[S_kv, D / 2]``, inner stride 1, row stride and base address multiples of 16 bytes.
        kv_sf: int32 ``[S_kv]``, as ``q_sf``, stride 1, base address a multiple of 16 bytes.
        weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype, out: as of
            :func:`fp8_mqa_logits`.

    Returns:
        ``[S, S_kv]`` or ``[S, max_seqlen_k]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad; FP4 and an
            architecture without a kernel for it.

    A scale that is UE8M0's NaN makes the logits NaN that it scales. Products of FP4 are exact; sums are FP32, rounded
    once. Specification: ``deep_gemm_ops.mqa_logits.reference_mqa_logits``.
    """
    arguments = {
        "q": q,
        "q_sf": q_sf,
        "kv": kv,
        "kv_sf": kv_sf,
        "weights": weights,
        "cu_seq_len_k_start": cu_seq_len_k_start,
        "cu_seq_len_k_end": cu_seq_len_k_end,
    }
    keywords = {"clean_logits": clean_logits, "max_seqlen_k": max_seqlen_k}
    return _call("fp8_fp4_mqa_logits", arguments, keywords, logits_dtype, out)


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, *, indices: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The schedule of :func:`fp8_paged_mqa_logits`: an even share of all keys for each of ``num_sms`` CTAs.

    It is computed on the device, and no value is looked at on the host: in a CUDA graph it follows the lengths of each
    replay. It holds for every number of heads and of layers until the lengths change.

    Args:
        context_lens: int32 ``[B]`` or ``[B, next_n]``, any strides. Negative lengths count as 0.
        block_kv: keys of a block of the cache, 64 or 32.
        num_sms: CTAs that the kernel will be launched with, usually ``get_num_sms()``.
        indices: int32 ``[B]``, the sequence of each token, where sequences have different numbers of tokens; the
            tokens of a sequence should be neighbours. ``next_n`` is 1 then.
        out: int32 ``[num_sms + 1, 2]``, contiguous: written and returned.

    Returns:
        int32 ``[num_sms + 1, 2]``. Entry c says where CTA c starts: a row of ``context_lens``, and a piece of 64 keys
        of it; the last entry is where the last one ends.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, value or device.
    """
    arguments = {"context_lens": context_lens, "block_kv": block_kv, "num_sms": num_sms}
    return _call("get_paged_mqa_logits_metadata", arguments, {"indices": indices}, None, out)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_metadata: Tensor,
    max_context_len: int,
    *,
    clean_logits: bool = False,
    logits_dtype: torch.dtype | None = None,
    indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[b * next_n + t, j] = sum_h relu(q[b, t, h] . kv[j] * kv_sf[j]) * weights[b * next_n + t, h]`` for each key
    j of the sequence, whose keys lie in the blocks of a cache.

    Args:
        q: float8_e4m3fn ``[B, next_n, H, D]``; H is 8, 16, 32 or 64, D is 32, 64 or 128. Heads lie one after the other
            (as in a contiguous tensor), at a base address and a stride that are multiples of 16 bytes.
        kv_cache: uint8 ``[blocks, block_kv, 1, D + 4]``, block_kv 64 or 32. A block is dense and holds the FP8 values
            of all its keys, ``[block_kv, D]``, and then all their float32 scales. Blocks may lie further apart; their
            stride and the base address are multiples of 16 bytes.
        weights: float32 ``[B * next_n, H]``, inner stride 1. On Hopper a token with one that is Inf or NaN gets NaN.
        context_lens: int32, any strides. ``[B, next_n]``: the number of keys of each token. ``[B]``: that of each
            sequence's last token; the token before sees one key less, and so on. What lies between the two is set to
            -inf with ``clean_logits`` and holds values without it. Lengths are clamped to what ``block_table`` and
            ``max_context_len`` hold, from below to 0.
        block_table: int32 ``[B, max_blocks]``, any strides: block ``block_table[b, k]`` holds the keys from
            ``k * block_kv`` on. A number outside of the cache stands for a block of zeros, whose logits are 0. What
            lies behind a length is not followed.
        schedule_metadata: int32 ``[num_sms + 1, 2]`` of :func:`get_paged_mqa_logits_metadata` for these lengths,
            contiguous. With that of others some logits are not written, and no foreign memory is touched.
        max_context_len: columns of the result.
        clean_logits: set what lies behind a token's length to -inf; otherwise it is left alone (in ``out``) or
            unspecified.
        logits_dtype: torch.float32 (default) or torch.bfloat16.
        indices: int32 ``[B]``, any stride: the row of ``block_table`` of each token, where sequences have different
            numbers of tokens. ``next_n`` is 1, ``context_lens`` counts the keys of each token, and ``block_table`` may
            have any number of rows; a token whose row it lacks has no keys.
        out: ``[B * next_n, max_context_len]``, inner stride 1, any row stride: written and returned.

    Returns:
        ``[B * next_n, max_context_len]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad.

    Specification: ``deep_gemm_ops.mqa_logits.reference_paged_mqa_logits``.
    """
    arguments = {
        "q": q,
        "kv_cache": kv_cache,
        "weights": weights,
        "context_lens": context_lens,
        "block_table": block_table,
        "schedule_metadata": schedule_metadata,
        "max_context_len": max_context_len,
    }
    keywords = {"clean_logits": clean_logits, "indices": indices}
    return _call("fp8_paged_mqa_logits", arguments, keywords, logits_dtype, out)


def fp8_fp4_paged_mqa_logits(
    q: Tensor,
    q_sf: Tensor | None,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_metadata: Tensor,
    max_context_len: int,
    *,
    clean_logits: bool = False,
    logits_dtype: torch.dtype | None = None,
    indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_paged_mqa_logits` of FP4 queries and keys, each 32 of whose elements have a scale: the sum of
    :func:`fp8_fp4_mqa_logits`.

    Args:
        q: FP4 as of :func:`fp8_fp4_mqa_logits`, ``[B, next_n, H, D / 2]``. Heads lie one after the other (as in a
            contiguous tensor), at a base address and a stride that are multiples of 16 bytes.
        q_sf: int32 ``[B, next_n, H]``, the UE8M0 scales of a head in one word; inner stride 1, tokens equally far from
            each other. None where queries and keys are FP8: then this is :func:`fp8_paged_mqa_logits`, with its dtypes.
        kv_cache: uint8 ``[blocks, block_kv, 1, D / 2 + 4]``, block_kv 64 or 32. A block is dense and holds the FP4
            values of all its keys, ``[block_kv, D / 2]``, and then for each of them a word of scales. Blocks may lie
            further apart; their stride and the base address are multiples of 16 bytes.
        weights, context_lens, block_table, schedule_metadata, max_context_len, clean_logits, logits_dtype, indices,
            out: as of :func:`fp8_paged_mqa_logits`.

    Returns:
        ``[B * next_n, max_context_len]``, a fresh contiguous tensor unless ``out`` is given.

    Raises:
        RuntimeError: an argument has the wrong dtype, rank, shape, strides or device, or requires grad; FP4 and an
            architecture without a kernel for it.

    Specification: ``deep_gemm_ops.mqa_logits.reference_paged_mqa_logits``.
    """
    arguments = {
        "q": q,
        "q_sf": q_sf,
        "kv_cache": kv_cache,
        "weights": weights,
        "context_lens": context_lens,
        "block_table": block_table,
        "schedule_metadata": schedule_metadata,
        "max_context_len": max_context_len,
    }
    keywords = {"clean_logits": clean_logits, "indices": indices}
    return _call("fp8_fp4_paged_mqa_logits", arguments, keywords, logits_dtype, out)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _value_dtypes(q_sf: Tensor | None) -> tuple[torch.dtype, ...]:
    """Of queries and keys."""
    return FP4_DTYPES if q_sf is not None else (torch.float8_e4m3fn,)


def _check_heads(op: str, q: Tensor, q_sf: Tensor | None, real: bool) -> tuple[int, int, int]:
    """q ``[.., H, D]``, or FP4 ``[.., H, D / 2]``, is a matrix with a row for each head of each token; returns
    (tokens, H, D)."""
    shape, strides = shape_of(q), strides_of(q)
    heads, row_bytes = shape[-2:]
    dim = row_bytes if q_sf is None else row_bytes + row_bytes
    if not any(heads == allowed for allowed in HEADS):
        fail(op, "q", "heads", heads, one_of(HEADS))
    if not any(dim == allowed for allowed in HEAD_DIMS):
        fail(op, "q", "head_dim", dim, one_of(HEAD_DIMS))
    tokens = 1
    for size in shape[:-2]:
        tokens = tokens * size
    if not tokens * heads <= MAX_SIZE:
        fail(op, "q", "number of heads", tokens * heads, f"at most {MAX_SIZE}")
    if 0 in shape:
        return tokens, heads, dim
    helper = "use q.contiguous()"
    if not strides[-1] == 1:
        fail(op, "q", "inner stride", strides[-1], 1, helper)
    row_stride = strides[-2]
    if not row_stride % TMA_ALIGNMENT_BYTES == 0:
        fail(op, "q", "head stride", f"{row_stride} bytes", f"a multiple of {TMA_ALIGNMENT_BYTES} bytes", helper)
    if not row_stride >= row_bytes:
        fail(op, "q", "head stride", row_stride, f"at least {row_bytes}", helper)
    expected = row_stride * heads
    for i in range(q.dim() - 3, -1, -1):
        if shape[i] > 1 and not strides[i] == expected:
            fail(op, "q", f"stride of dimension {i}", strides[i], expected, helper)
        expected = expected * shape[i]
    if real and q.data_ptr() % TMA_ALIGNMENT_BYTES != 0:
        past = q.data_ptr() % TMA_ALIGNMENT_BYTES
        fail(op, "q", "base address", f"{past} modulo {TMA_ALIGNMENT_BYTES} bytes", 0, "use q.clone()")
    return tokens, heads, dim


def _check_query_scales(op: str, q: Tensor, q_sf: Tensor) -> None:
    """``[.., H]``, a row of words for each token."""
    names = "[S, H]" if q.dim() == 3 else "[B, next_n, H]"
    check_shape(op, "q_sf", q_sf, names, shape_of(q)[:-1])
    shape, strides = shape_of(q_sf), strides_of(q_sf)
    if 0 in shape:
        return
    if not strides[-1] == 1:
        fail(op, "q_sf", "inner stride", strides[-1], 1)
    if q.dim() == 4 and shape[0] > 1 and shape[1] > 1 and not strides[0] == strides[1] * shape[1]:
        fail(op, "q_sf", "stride of dimension 0", strides[0], strides[1] * shape[1], "use q_sf.contiguous()")


def _check_columns(op: str, name: str, columns: int) -> int:
    columns = concrete(columns)
    if not (columns >= 0 and columns <= MAX_SIZE):
        fail(op, name, "value", columns, f"0 to {MAX_SIZE}")
    return columns


def _check_out(op: str, out: Tensor | None, logits_dtype: torch.dtype | None, names: str, shape: list[int]) -> None:
    if out is None:
        if logits_dtype not in OUT_DTYPES:
            fail(op, "logits_dtype", "value", logits_dtype, one_of(OUT_DTYPES))
        return
    check_dtype(op, "out", out, OUT_DTYPES)
    check_shape(op, "out", out, names, shape)
    check_inner_stride(op, "out", out, None)
    check_rows_apart(op, "out", out)


def _check_pairs(op: str, arg: str, schedule: Tensor) -> None:
    strides = strides_of(schedule)
    if not (strides[0] == 2 and strides[1] == 1):
        fail(op, arg, "strides", strides, [2, 1])


def check_mqa_logits(
    op: str,
    q: Tensor,
    q_sf: Tensor | None,
    kv: Tensor,
    kv_sf: Tensor,
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype | None,
    out: Tensor | None,
    real: bool,
) -> None:
    """Check the arguments of ``fp8_mqa_logits``, without ``q_sf``, or ``fp8_fp4_mqa_logits``; ``real`` is False where
    tensors have no memory (fakes)."""
    values, integers = _value_dtypes(q_sf), (torch.int32,)
    inputs = {
        "q": (q, values, 3),
        "q_sf": (q_sf, integers, 2),
        "kv": (kv, values, 2),
        "kv_sf": (kv_sf, (torch.float32,) if q_sf is None else integers, 1),
        "weights": (weights, (torch.float32,), 2),
        "cu_seq_len_k_start": (start, integers, 1),
        "cu_seq_len_k_end": (end, integers, 1),
    }
    for arg, (tensor, dtypes, rank) in inputs.items():
        if tensor is not None:
            check_dtype(op, arg, tensor, dtypes)
            check_rank(op, arg, tensor, (rank,))
    for arg, tensor in [*((arg, given[0]) for arg, given in inputs.items()), ("out", out)]:
        if tensor is not None:
            check_device(op, arg, tensor, q.device, "q")
    tokens, heads, dim = _check_heads(op, q, q_sf, real)
    if q_sf is not None:
        _check_query_scales(op, q, q_sf)
    keys, dim_of_kv = shape_of(kv)
    if q_sf is not None:
        dim_of_kv = dim_of_kv + dim_of_kv
    if not keys <= MAX_SIZE:
        fail(op, "kv", "S_kv", keys, f"at most {MAX_SIZE}")
    if not dim_of_kv == dim:
        fail(op, "kv", "head_dim", dim_of_kv, dim, "the head_dim of q")
    check_tma_readable(op, "kv", kv, real)
    check_shape(op, "kv_sf", kv_sf, "[S_kv]", [keys])
    check_inner_stride(op, "kv_sf", kv_sf, None)
    if real and keys > 0 and kv_sf.data_ptr() % TMA_ALIGNMENT_BYTES != 0:
        past = kv_sf.data_ptr() % TMA_ALIGNMENT_BYTES
        fail(op, "kv_sf", "base address", f"{past} modulo {TMA_ALIGNMENT_BYTES} bytes", 0, "use kv_sf.clone()")
    check_shape(op, "weights", weights, "[S, H]", [tokens, heads])
    check_inner_stride(op, "weights", weights, None)
    check_shape(op, "cu_seq_len_k_start", start, "[S]", [tokens])
    check_shape(op, "cu_seq_len_k_end", end, "[S]", [tokens])
    compressed = not isinstance(max_seqlen_k, int) or max_seqlen_k != 0
    columns = _check_columns(op, "max_seqlen_k", max_seqlen_k)
    names = "[S, max_seqlen_k]" if compressed else "[S, S_kv]"
    _check_out(op, out, logits_dtype, names, [tokens, columns if compressed else keys])


def check_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None, out: Tensor | None
) -> None:
    """Check the arguments of ``get_paged_mqa_logits_metadata``."""
    op = "get_paged_mqa_logits_metadata"
    check_dtype(op, "context_lens", context_lens, (torch.int32,))
    check_rank(op, "context_lens", context_lens, (1, 2))
    if block_kv not in BLOCK_SIZES:
        fail(op, "block_kv", "value", block_kv, one_of(BLOCK_SIZES))
    if not 1 <= num_sms <= 65535:
        fail(op, "num_sms", "value", num_sms, "1 to 65535")
    shape = shape_of(context_lens)
    if not shape[0] <= MAX_SIZE:
        fail(op, "context_lens", "B", shape[0], f"at most {MAX_SIZE}")
    if indices is not None:
        check_dtype(op, "indices", indices, (torch.int32,))
        check_rank(op, "indices", indices, (1,))
        check_device(op, "indices", indices, context_lens.device, "context_lens")
        check_shape(op, "indices", indices, "[B]", [shape[0]])
        if context_lens.dim() == 2 and not shape[1] == 1:
            fail(op, "context_lens", "next_n", shape[1], 1, "with indices")
    if out is not None:
        check_device(op, "out", out, context_lens.device, "context_lens")
        check_dtype(op, "out", out, (torch.int32,))
        check_shape(op, "out", out, "[num_sms + 1, 2]", [num_sms + 1, 2])
        _check_pairs(op, "out", out)


def check_paged_mqa_logits(
    op: str,
    q: Tensor,
    q_sf: Tensor | None,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_metadata: Tensor,
    max_context_len: int,
    *,
    logits_dtype: torch.dtype | None,
    indices: Tensor | None = None,
    out: Tensor | None,
    real: bool,
) -> None:
    """Check the arguments of ``fp8_paged_mqa_logits``, without ``q_sf``, or ``fp8_fp4_paged_mqa_logits``; ``real`` is
    False where tensors have no memory (fakes)."""
    integers = (torch.int32,)
    inputs = {
        "q": (q, _value_dtypes(q_sf), (4,)),
        "q_sf": (q_sf, integers, (3,)),
        "kv_cache": (kv_cache, (torch.uint8,), (4,)),
        "weights": (weights, (torch.float32,), (2,)),
        "context_lens": (context_lens, integers, (1, 2)),
        "block_table": (block_table, integers, (2,)),
        "schedule_metadata": (schedule_metadata, integers, (2,)),
        "indices": (indices, integers, (1,)),
    }
    for arg, (tensor, dtypes, ranks) in inputs.items():
        if tensor is not None:
            check_dtype(op, arg, tensor, dtypes)
            check_rank(op, arg, tensor, ranks)
    for arg, tensor in [*((arg, given[0]) for arg, given in inputs.items()), ("out", out)]:
        if tensor is not None:
            check_device(op, arg, tensor, q.device, "q")
    tokens, heads, dim = _check_heads(op, q, q_sf, real)
    if q_sf is not None:
        _check_query_scales(op, q, q_sf)
    batch, next_n = shape_of(q)[:2]
    blocks, block_kv, heads_of_kv, columns_of_kv = shape_of(kv_cache)
    if not any(block_kv == allowed for allowed in BLOCK_SIZES):
        fail(op, "kv_cache", "block_kv", block_kv, one_of(BLOCK_SIZES))
    columns, names = (dim, "D + 4") if q_sf is None else (dim // 2, "D / 2 + 4")
    expected = [blocks, block_kv, 1, columns + SCALE_BYTES]
    check_shape(op, "kv_cache", kv_cache, f"[blocks, block_kv, 1, {names}]", expected)
    if not blocks <= MAX_SIZE:
        fail(op, "kv_cache", "blocks", blocks, f"at most {MAX_SIZE}")
    if not blocks == 0:
        block_stride, key_stride, _, inner_stride = strides_of(kv_cache)
        if not (inner_stride == 1 and key_stride == columns_of_kv):
            want = f"[any, {columns_of_kv}, any, 1]"
            fail(op, "kv_cache", "strides", strides_of(kv_cache), want, "each block dense")
        if not blocks == 1:
            if not block_stride % TMA_ALIGNMENT_BYTES == 0:
                fail(op, "kv_cache", "block stride", f"{block_stride} bytes", "a multiple of 16 bytes")
            if not block_stride >= block_kv * columns_of_kv:
                fail(op, "kv_cache", "block stride", block_stride, f"at least {block_kv * columns_of_kv}")
        if real and kv_cache.data_ptr() % TMA_ALIGNMENT_BYTES != 0:
            past = kv_cache.data_ptr() % TMA_ALIGNMENT_BYTES
            fail(op, "kv_cache", "base address", f"{past} modulo {TMA_ALIGNMENT_BYTES} bytes", 0)
    check_shape(op, "weights", weights, "[B * next_n, H]", [tokens, heads])
    check_inner_stride(op, "weights", weights, None)
    if context_lens.dim() == 1:
        check_shape(op, "context_lens", context_lens, "[B]", [batch])
    else:
        check_shape(op, "context_lens", context_lens, "[B, next_n]", [batch, next_n])
    rows, max_blocks = shape_of(block_table)
    if indices is None and not rows == batch:
        fail(op, "block_table", "rows", rows, batch, "the B of q")
    if not (rows <= MAX_SIZE and max_blocks <= MAX_SIZE):
        fail(op, "block_table", "shape", [rows, max_blocks], f"at most {MAX_SIZE} each")
    entries, two = shape_of(schedule_metadata)
    if not (entries >= 2 and entries <= 65536 and two == 2):
        fail(op, "schedule_metadata", "shape", [entries, two], "[num_sms + 1, 2], num_sms from 1 to 65535")
    _check_pairs(op, "schedule_metadata", schedule_metadata)
    if indices is not None:
        check_shape(op, "indices", indices, "[B]", [batch])
        if not next_n == 1:
            fail(op, "q", "next_n", next_n, 1, "with indices")
    columns = _check_columns(op, "max_context_len", max_context_len)
    _check_out(op, out, logits_dtype, "[B * next_n, max_context_len]", [tokens, columns])


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def dequantize_fp4(x: Tensor, sf: Tensor, dtype: torch.dtype) -> Tensor:
    """``[.., D / 2]`` packed FP4 with words of UE8M0 scales ``[..]``, as ``[.., D]``."""
    values = expand_fp4(x).to(torch.float32).to(dtype)
    codes = sf.contiguous().view(torch.uint8).view(*sf.shape, 4)[..., : values.shape[-1] // FP4_GRAN_K]
    scales = codes.view(torch.float8_e8m0fnu).to(torch.float32).to(dtype)
    return values * scales.repeat_interleave(FP4_GRAN_K, -1)


def _scores(q: Tensor, q_sf: Tensor | None, keys: Tensor, sf: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``[tokens, keys]`` of q ``[tokens, H, D]`` and keys ``[keys, D]``, or both FP4."""
    if q_sf is None:
        products = torch.einsum("ihd,jd->ihj", q.to(torch.float32).to(dtype), keys.to(torch.float32).to(dtype))
        products = products * sf.to(dtype)
    else:
        products = torch.einsum("ihd,jd->ihj", dequantize_fp4(q, q_sf, dtype), dequantize_fp4(keys, sf, dtype))
    return torch.einsum("ihj,ih->ij", products.relu(), weights.to(dtype))


def reference_mqa_logits(
    q: Tensor,
    kv: Tensor,
    kv_sf: Tensor,
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    q_sf: Tensor | None = None,
    max_seqlen_k: int = 0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """What ``fp8_mqa_logits`` computes, or with ``q_sf`` ``fp8_fp4_mqa_logits``, and where.

    Args:
        exact: in float64 instead of float32.

    Returns:
        Logits ``[S, S_kv]`` or ``[S, max_seqlen_k]``, and the mask of those that lie in the ranges; the others are
        -inf.
    """
    tokens, keys = q.shape[0], kv.shape[0]
    dtype = torch.float64 if exact else torch.float32
    start = start.long().clamp(0, keys)
    length = (end.long().clamp(0, keys) - start).clamp(min=0)
    columns = torch.arange(max_seqlen_k or keys, device=q.device)
    first = start[:, None] if max_seqlen_k else torch.zeros_like(start)[:, None]
    key = first + columns
    inside = (key >= start[:, None]) & (key < (start + length)[:, None])
    logits = torch.full(key.shape, -math.inf, dtype=dtype, device=q.device)
    chunk = max(1, 2**24 // max(1, keys * q.shape[1]))  # tokens at once: the products take memory
    for i in range(0, tokens if keys else 0, chunk):
        rows = slice(i, i + chunk)
        scores = _scores(q[rows], None if q_sf is None else q_sf[rows], kv, kv_sf, weights[rows], dtype)
        logits[rows] = scores.gather(1, key[rows].clamp(max=keys - 1)).where(inside[rows], -math.inf)
    return logits, inside


def reference_metadata(context_lens: Tensor, num_sms: int, indices: Tensor | None = None) -> Tensor:
    """``get_paged_mqa_logits_metadata`` in plain loops."""
    lens = context_lens.amax(1).tolist() if context_lens.dim() == 2 and context_lens.shape[1] else context_lens.tolist()
    lens = [length if isinstance(length, int) else 0 for length in lens]
    sequences = list(range(len(lens))) if indices is None else indices.tolist()
    atoms: list[tuple[int, int]] = []  # (first row of context_lens, pieces of 64 keys)
    i = 0
    while i < len(lens):
        last = i + 1
        if indices is not None:
            while last < len(lens) and last < i + ATOM_TOKENS and sequences[last] == sequences[i]:
                last += 1
        atoms.append((i, ceil_div(max(0, *lens[i:last]), TILE_KEYS)))
        i = last
    total = sum(tiles for _, tiles in atoms)
    schedule = torch.tensor([[len(lens), 0]] * (num_sms + 1), dtype=torch.int32)
    for sm in range(num_sms if total else 0):
        tile = total * sm // num_sms
        for first, tiles in atoms:
            if tile < tiles:
                schedule[sm] = torch.tensor([first, tile])
                break
            tile -= tiles
    return schedule.to(context_lens.device)


def reference_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    q_sf: Tensor | None = None,
    clean_logits: bool = False,
    indices: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """What ``fp8_paged_mqa_logits`` computes, or with ``q_sf`` ``fp8_fp4_paged_mqa_logits``, and where: logits ``[B *
    next_n, max_context_len]`` and the mask of those that are written; the others are -inf."""
    batch, next_n, _, row_bytes = q.shape
    blocks, block_kv = kv_cache.shape[:2]
    tokens = batch * next_n
    max_blocks = block_table.shape[1] if blocks else 0
    sequences = torch.arange(batch, device=q.device) if indices is None else indices.long()
    sequences = sequences.repeat_interleave(next_n)
    lens = context_lens.long()
    if lens.dim() == 2:
        lens = lens.reshape(-1)
    else:
        behind = torch.arange(next_n - 1, -1, -1, device=q.device).repeat(batch) if clean_logits else 0
        lens = lens.clamp(min=0).repeat_interleave(next_n) - behind
    lens = lens.clamp(0, min(max_context_len, max_blocks * block_kv))
    lens = lens.where((sequences >= 0) & (sequences < block_table.shape[0]), 0)

    inside = torch.arange(max_context_len, device=q.device) < lens[:, None]
    dtype = torch.float64 if exact else torch.float32
    logits = torch.full((tokens, max_context_len), -math.inf, dtype=dtype, device=q.device)
    # One block of zeros more, for the entries that are not in the cache.
    flat = torch.zeros(blocks + 1, block_kv * (row_bytes + SCALE_BYTES), dtype=torch.uint8, device=q.device)
    flat[:blocks].view(kv_cache.shape).copy_(kv_cache)
    values = flat[:, : block_kv * row_bytes].view(-1, block_kv, row_bytes)
    scales = flat[:, block_kv * row_bytes :].clone().view(torch.float32 if q_sf is None else torch.int32)
    for token, (sequence, length) in enumerate(zip(sequences.tolist(), lens.tolist())):
        if length == 0:
            continue
        entries = block_table[sequence, : ceil_div(length, block_kv)].long()
        entries = entries.where((entries >= 0) & (entries < blocks), blocks)
        keys = values[entries].view(q.dtype).view(-1, row_bytes)[:length]
        at = token // next_n, token % next_n
        query_sf = None if q_sf is None else q_sf[at][None]
        sf = scales[entries].view(-1)[:length]
        logits[token, :length] = _scores(q[at][None], query_sf, keys, sf, weights[token : token + 1], dtype)[0]
    return logits, inside


# ---------------------------------------------------------------------------------------------------------------------
# Fake implementations


def _register_logits(
    op: str,
    check: Callable[..., None],
    columns: Callable[..., int],
    reference: Callable[..., tuple[Tensor, Tensor]],
    clean_by_default: bool,
) -> None:
    """Registers the fakes and the CPU implementations of ``op`` and ``op.out``.

    ``columns`` and ``reference`` take the inputs, and the options that are not about the result's form.
    """

    @_fake(op)
    def fake(
        *inputs: Any, clean_logits: bool = clean_by_default, logits_dtype: torch.dtype = torch.float32, **options: Any
    ) -> Tensor:
        check(*inputs, **options, logits_dtype=logits_dtype, out=None, real=False)
        q = inputs[0]
        return q.new_empty((math.prod(q.shape[:-2]), columns(*inputs, **options)), dtype=logits_dtype)

    @_fake(f"{op}.out")
    def fake_out(*inputs: Any, clean_logits: bool = clean_by_default, out: Tensor, **options: Any) -> None:
        check(*inputs, **options, logits_dtype=None, out=out, real=False)

    @_cpu(op)
    def functional(
        *inputs: Any, clean_logits: bool = clean_by_default, logits_dtype: torch.dtype = torch.float32, **options: Any
    ) -> Tensor:
        check(*inputs, **options, logits_dtype=logits_dtype, out=None, real=True)
        return reference(*inputs, clean_logits=clean_logits, **options)[0].to(logits_dtype)

    @_cpu(f"{op}.out")
    def out_form(*inputs: Any, clean_logits: bool = clean_by_default, out: Tensor, **options: Any) -> None:
        check(*inputs, **options, logits_dtype=None, out=out, real=True)
        logits, inside = reference(*inputs, clean_logits=clean_logits, **options)
        # What is outside of the ranges becomes -inf or is left alone.
        out.copy_(logits if clean_logits else logits.where(inside, out.to(logits.dtype)))


def _check_dense(*inputs: Any, **options: Any) -> None:
    q, *others = inputs
    check_mqa_logits("fp8_mqa_logits", q, None, *others, **options)


def _check_dense_fp4(*inputs: Any, **options: Any) -> None:
    check_mqa_logits("fp8_fp4_mqa_logits", *inputs, **options)


def _dense(*inputs: Tensor, clean_logits: bool, **options: Any) -> tuple[Tensor, Tensor]:
    return reference_mqa_logits(*inputs, **options)


def _dense_fp4(q: Tensor, q_sf: Tensor | None, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return _dense(q, *others, q_sf=q_sf, **options)


def _dense_columns(*inputs: Tensor, max_seqlen_k: int = 0) -> int:
    # Asking a symbolic value whether it is 0 would be a guard.
    kv = inputs[-5]
    return kv.shape[0] if isinstance(max_seqlen_k, int) and max_seqlen_k == 0 else max_seqlen_k


def _check_paged(*inputs: Any, **options: Any) -> None:
    q, *others = inputs
    check_paged_mqa_logits("fp8_paged_mqa_logits", q, None, *others, **options)


def _check_paged_fp4(*inputs: Any, **options: Any) -> None:
    check_paged_mqa_logits("fp8_fp4_paged_mqa_logits", *inputs, **options)


def _paged(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    *others, _schedule, max_context_len = inputs
    return reference_paged_mqa_logits(*others, max_context_len, **options)


def _paged_fp4(q: Tensor, q_sf: Tensor | None, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _paged(q, *others, q_sf=q_sf, **options)


def _paged_columns(*inputs: Any, indices: Tensor | None = None) -> int:
    return inputs[-1]


_register_logits("fp8_mqa_logits", _check_dense, _dense_columns, _dense, True)
_register_logits("fp8_fp4_mqa_logits", _check_dense_fp4, _dense_columns, _dense_fp4, True)
_register_logits("fp8_paged_mqa_logits", _check_paged, _paged_columns, _paged, False)
_register_logits("fp8_fp4_paged_mqa_logits", _check_paged_fp4, _paged_columns, _paged_fp4, False)


@_fake("get_paged_mqa_logits_metadata")
def _fake_metadata(context_lens: Tensor, block_kv: int, num_sms: int, *, indices: Tensor | None = None) -> Tensor:
    check_metadata(context_lens, block_kv, num_sms, indices, None)
    return context_lens.new_empty((num_sms + 1, 2))


@_fake("get_paged_mqa_logits_metadata.out")
def _fake_metadata_out(
    context_lens: Tensor, block_kv: int, num_sms: int, *, indices: Tensor | None = None, out: Tensor
) -> None:
    check_metadata(context_lens, block_kv, num_sms, indices, out)


@_cpu("get_paged_mqa_logits_metadata")
def _metadata(context_lens: Tensor, block_kv: int, num_sms: int, *, indices: Tensor | None = None) -> Tensor:
    check_metadata(context_lens, block_kv, num_sms, indices, None)
    return reference_metadata(context_lens, num_sms, indices)


@_cpu("get_paged_mqa_logits_metadata.out")
def _metadata_out(
    context_lens: Tensor, block_kv: int, num_sms: int, *, indices: Tensor | None = None, out: Tensor
) -> None:
    check_metadata(context_lens, block_kv, num_sms, indices, out)
    out.copy_(reference_metadata(context_lens, num_sms, indices))
