"""Arguments of the operators for MQA logits, on any device, and what they have to give."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

import deep_gemm_ops
from deep_gemm_ops import _capi

from common import FP8, ceil_div, generator

Arguments = dict[str, Any]


def fp4_condition(device: str) -> str:
    """Empty where FP4 logits have a kernel, or need none."""
    if device == "cpu":
        return ""
    major, _ = torch.cuda.get_device_capability(device)
    kernels = any(row["fp4"] and row["arch"].startswith(f"sm_{major}") for row in _capi.mqa_instances())
    return "" if kernels else f"there are no kernels for FP4 logits for compute capability {major}.x"


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def make_fp4(
    shape: tuple[int, ...], random: torch.Generator, largest: int = 4, spread: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values ``[.., D / 2]`` of magnitudes up to ``E2M1[largest]``, and words ``[..]`` of scales from 2^-spread
    to 2^spread, whose unused bytes are NaN."""
    codes = torch.randint(0, largest + 1, shape, generator=random) | torch.randint(0, 2, shape, generator=random) << 3
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = torch.full((*shape[:-1], 4), 0xFF, dtype=torch.uint8)
    used = shape[-1] // 32
    scales[..., :used] = torch.randint(127 - spread, 128 + spread, scales[..., :used].shape, generator=random)
    return packed, scales.view(torch.int32)[..., 0]


def fp4_values(packed: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    """``[.., D]`` in float64."""
    codes = packed.view(torch.uint8).long()
    codes = torch.stack([codes % 16, codes // 16], -1).flatten(-2)
    values = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float64)[codes]
    for i in range(values.shape[-1] // 32):
        exponents = (sf.long() >> 8 * i) % 256
        scales = torch.where(exponents == 255, math.nan, 2.0 ** (exponents - 127).double())
        values[..., 32 * i : 32 * i + 32] *= scales[..., None]
    return values


def dense_arguments(
    tokens: int = 5,
    keys: int = 200,
    heads: int = 32,
    dim: int = 128,
    device: str = "cpu",
    seed: int = 0,
    *,
    fp4: bool = False,
) -> Arguments:
    """Ranges that are random, some of them empty or beyond the keys; the results of these values are exact."""
    random = generator(seed)
    low, high = -(keys // 4) - 1, keys + keys // 4 + 2
    if fp4:
        (q, q_sf), (kv, kv_sf) = make_fp4((tokens, heads, dim), random), make_fp4((keys, dim), random)
        values = {"q": q, "q_sf": q_sf, "kv": kv, "kv_sf": kv_sf}
    else:
        values = {
            "q": torch.randint(-3, 4, (tokens, heads, dim), generator=random).to(FP8),
            "kv": torch.randint(-3, 4, (keys, dim), generator=random).to(FP8),
            "kv_sf": 2.0 ** torch.randint(-2, 3, (keys,), generator=random),
        }
    arguments = {
        **values,
        "weights": torch.randint(-2, 3, (tokens, heads), generator=random).float(),
        "cu_seq_len_k_start": torch.randint(low, high, (tokens,), generator=random, dtype=torch.int32),
        "cu_seq_len_k_end": torch.randint(low, high, (tokens,), generator=random, dtype=torch.int32),
    }
    return {name: x.to(device) for name, x in arguments.items()}


def expected_dense(arguments: Arguments, max_seqlen_k: int = 0) -> torch.Tensor:
    """The formula with plain loops over tokens, float64; -inf outside of the ranges."""
    given = {name: x.cpu() for name, x in arguments.items()}
    kv_sf, weights, start, end = list(given.values())[-4:]
    if "q_sf" in given:
        q, kv = fp4_values(given["q"], given["q_sf"]), fp4_values(given["kv"], kv_sf)
        kv_sf = torch.ones(kv.shape[0])
    else:
        q, kv = given["q"], given["kv"]
    keys = kv.shape[0]
    columns = max_seqlen_k or keys
    result = torch.full((q.shape[0], columns), -math.inf, dtype=torch.float64)
    for i in range(q.shape[0]):
        first = min(max(int(start[i]), 0), keys)
        last = min(max(int(end[i]), first), keys)
        products = (q[i].double() @ kv[first:last].double().t()) * kv_sf[first:last].double()
        scores = (products.clamp(min=0) * weights[i, :, None].double()).sum(0)
        at = 0 if max_seqlen_k else first
        count = min(last - first, columns - at)
        result[i, at : at + count] = scores[:count]
    return result


def make_cache(
    blocks: int, block_kv: int, dim: int, random: torch.Generator, gap: int = 0, fp4: bool = False
) -> torch.Tensor:
    """kv_cache with ``gap`` bytes between blocks."""
    if fp4:
        values, scales = make_fp4((blocks, block_kv, dim), random)
    else:
        values = torch.randint(-3, 4, (blocks, block_kv, dim), generator=random).to(FP8)
        scales = 2.0 ** torch.randint(-2, 3, (blocks, block_kv), generator=random)
    columns = values.shape[2]
    flat = torch.full((blocks, block_kv * (columns + 4) + gap), 0x7F, dtype=torch.uint8)
    flat[:, : block_kv * columns] = values.view(torch.uint8).reshape(blocks, -1)
    flat[:, block_kv * columns : block_kv * (columns + 4)] = scales.contiguous().view(torch.uint8)
    shape, strides = (blocks, block_kv, 1, columns + 4), (flat.shape[1], columns + 4, columns + 4, 1)
    return flat.as_strided(shape, strides)


def paged_arguments(
    lens: list[int],
    next_n: int = 1,
    heads: int = 32,
    dim: int = 128,
    *,
    block_kv: int = 64,
    per_token: bool = False,
    counts: list[int] | None = None,
    max_context_len: int | None = None,
    max_blocks: int | None = None,
    num_sms: int = 7,
    gap: int = 0,
    fp4: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """``lens`` of sequences. ``counts`` tokens of each, one after the other, with ``indices``."""
    random = generator(seed)
    sequences = len(lens)
    longest = torch.tensor(lens, dtype=torch.int32)
    indices = None
    batch, context_lens = sequences, longest
    if counts is not None:
        indices = torch.repeat_interleave(torch.arange(sequences), torch.tensor(counts)).to(torch.int32)
        batch, next_n = len(indices), 1
        back = torch.tensor([count - 1 - i for count in counts for i in range(count)], dtype=torch.int32)
        context_lens = (longest[indices.long()] - back)[:, None].contiguous()
    elif per_token:
        context_lens = (torch.rand(sequences, next_n, generator=random) * (longest[:, None] + 1)).to(torch.int32)
    if max_blocks is None:
        max_blocks = max(1, ceil_div(max([*lens, 0]), block_kv))
    cache = make_cache(sequences * max_blocks + 1, block_kv, dim, random, gap, fp4)
    table = torch.randperm(sequences * max_blocks, generator=random).view(sequences, max_blocks).to(torch.int32)
    tokens = batch * next_n
    if fp4:
        q, q_sf = make_fp4((batch, next_n, heads, dim), random)
        queries = {"q": q, "q_sf": q_sf}
    else:
        queries = {"q": torch.randint(-3, 4, (batch, next_n, heads, dim), generator=random).to(FP8)}
    arguments = {
        **queries,
        "kv_cache": cache,
        "weights": torch.randint(-2, 3, (tokens, heads), generator=random).float(),
        "context_lens": context_lens,
        "block_table": table,
    }
    # Not to(): that makes the gaps of the cache go away.
    moved = {name: x if device == "cpu" else like(x, device) for name, x in arguments.items()}
    indices = indices.to(device) if indices is not None else None
    moved["schedule_metadata"] = deep_gemm_ops.get_paged_mqa_logits_metadata(
        moved["context_lens"], block_kv, num_sms, indices=indices
    )
    moved["max_context_len"] = max([*lens, 0]) + 9 if max_context_len is None else max_context_len
    moved["indices"] = indices
    return moved


def like(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy with the same strides on another device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def expected_paged(arguments: Arguments, clean: bool) -> torch.Tensor:
    """The formula with plain loops over tokens and blocks, float64; -inf behind each token's length."""
    q, cache, weights, lens, table = (
        arguments[name].cpu() for name in ("q", "kv_cache", "weights", "context_lens", "block_table")
    )
    indices, columns = arguments["indices"], arguments["max_context_len"]
    q_sf = arguments.get("q_sf")
    (batch, next_n, _, row_bytes), (blocks, block_kv) = q.shape, cache.shape[:2]
    queries = q.double() if q_sf is None else fp4_values(q, q_sf.cpu())
    result = torch.full((batch * next_n, columns), -math.inf, dtype=torch.float64)
    for b in range(batch):
        row = b if indices is None else int(indices[b])
        for t in range(next_n):
            length = int(lens[b, t]) if lens.dim() == 2 else int(lens[b]) - (next_n - 1 - t if clean else 0)
            if not 0 <= row < table.shape[0]:
                length = 0
            length = max(0, min(length, columns, table.shape[1] * block_kv))
            for first in range(0, length, block_kv):
                block, count = int(table[row, first // block_kv]), min(block_kv, length - first)
                at = result[b * next_n + t, first : first + count]
                if not 0 <= block < blocks:
                    at.zero_()
                    continue
                flat = cache[block].as_strided((block_kv * (row_bytes + 4),), (1,))
                rows = flat[: block_kv * row_bytes].view(block_kv, row_bytes)[:count]
                words = flat[block_kv * row_bytes :].clone()
                if q_sf is None:
                    values = rows.view(FP8).double() * words.view(torch.float32)[:count, None]
                else:
                    values = fp4_values(rows, words.view(torch.int32)[:count])
                products = queries[b, t] @ values.t()
                at.copy_((products.clamp(min=0) * weights[b * next_n + t, :, None].double()).sum(0))
    return result


def samples(device: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of every overload, for tests of schemas, fakes and opcheck."""
    ops = torch.ops.deep_gemm
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    types = (False, True) if not fp4_condition(device) else (False,)
    for fp4, (tokens, keys, heads, dim) in itertools.product(
        types, [(5, 200, 32, 128), (1, 1, 8, 32), (0, 7, 16, 64), (3, 0, 64, 128)]
    ):
        packet = ops.fp8_fp4_mqa_logits if fp4 else ops.fp8_mqa_logits
        inputs = tuple(dense_arguments(tokens, keys, heads, dim, device, fp4=fp4).values())
        for options in ({}, {"max_seqlen_k": 40, "clean_logits": False}):
            columns = options.get("max_seqlen_k", 0) or keys
            calls.append((packet.default, inputs, {**options, "clean_logits": True}))
            calls.append((packet.default, inputs, {"logits_dtype": torch.bfloat16, "clean_logits": True}))
            out = torch.zeros(tokens, columns + 3, device=device)[:, :columns]
            calls.append((packet.out, inputs, {**options, "out": out}))
    q, *others = dense_arguments(device=device).values()
    out = torch.zeros(q.shape[0], others[0].shape[0], device=device)
    calls.append((ops.fp8_fp4_mqa_logits.default, (q, None, *others), {}))
    calls.append((ops.fp8_fp4_mqa_logits.out, (q, None, *others), {"out": out}))
    for fp4, keywords in itertools.product(
        types,
        (
            {"lens": [70, 3]},
            {"lens": [130, 0, 64], "next_n": 3, "per_token": True, "block_kv": 32, "gap": 16},
            {"lens": [90, 20], "counts": [2, 5]},
            {"lens": []},
        ),
    ):
        packet = ops.fp8_fp4_paged_mqa_logits if fp4 else ops.fp8_paged_mqa_logits
        arguments = paged_arguments(**keywords, fp4=fp4, device=device)
        indices, lens = arguments.pop("indices"), arguments["context_lens"]
        block_kv = keywords.get("block_kv", 64)
        calls.append((ops.get_paged_mqa_logits_metadata.default, (lens, block_kv, 7), {"indices": indices}))
        out = torch.zeros(8, 2, dtype=torch.int32, device=device)
        calls.append((ops.get_paged_mqa_logits_metadata.out, (lens, block_kv, 7), {"indices": indices, "out": out}))
        inputs = tuple(arguments.values())
        options = {"indices": indices, "clean_logits": True}
        calls.append((packet.default, inputs, {**options, "logits_dtype": torch.bfloat16}))
        shape = (arguments["weights"].shape[0], arguments["max_context_len"])
        calls.append((packet.out, inputs, {**options, "out": torch.zeros(shape, device=device)}))
    arguments = paged_arguments([70, 3], device=device)
    arguments.pop("indices")
    q, *others = arguments.values()
    options = {"clean_logits": True}
    out = torch.zeros(arguments["weights"].shape[0], arguments["max_context_len"], device=device)
    calls.append((ops.fp8_fp4_paged_mqa_logits.default, (q, None, *others), options))
    calls.append((ops.fp8_fp4_paged_mqa_logits.out, (q, None, *others), {**options, "out": out}))
    return calls
