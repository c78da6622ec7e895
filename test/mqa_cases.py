"""Arguments of the operators for MQA logits, on any device, and what they have to give."""

from __future__ import annotations

import math
from typing import Any

import torch

import deep_gemm_ops

from common import FP8, ceil_div, generator

Arguments = dict[str, Any]


def dense_arguments(
    tokens: int = 5, keys: int = 200, heads: int = 32, dim: int = 128, device: str = "cpu", seed: int = 0
) -> Arguments:
    """Ranges that are random, some of them empty or beyond the keys; the results of these values are exact."""
    random = generator(seed)
    low, high = -(keys // 4) - 1, keys + keys // 4 + 2
    arguments = {
        "q": torch.randint(-3, 4, (tokens, heads, dim), generator=random).to(FP8),
        "kv": torch.randint(-3, 4, (keys, dim), generator=random).to(FP8),
        "kv_sf": 2.0 ** torch.randint(-2, 3, (keys,), generator=random),
        "weights": torch.randint(-2, 3, (tokens, heads), generator=random).float(),
        "cu_seq_len_k_start": torch.randint(low, high, (tokens,), generator=random, dtype=torch.int32),
        "cu_seq_len_k_end": torch.randint(low, high, (tokens,), generator=random, dtype=torch.int32),
    }
    return {name: x.to(device) for name, x in arguments.items()}


def expected_dense(arguments: Arguments, max_seqlen_k: int = 0) -> torch.Tensor:
    """The formula with plain loops over tokens, float64; -inf outside of the ranges."""
    q, kv, kv_sf, weights, start, end = (x.cpu() for x in arguments.values())
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
    blocks: int, block_kv: int, dim: int, random: torch.Generator, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kv_cache with ``gap`` bytes between blocks, values, scales)."""
    values = torch.randint(-3, 4, (blocks, block_kv, dim), generator=random).to(FP8)
    scales = 2.0 ** torch.randint(-2, 3, (blocks, block_kv), generator=random)
    flat = torch.full((blocks, block_kv * (dim + 4) + gap), 0x7F, dtype=torch.uint8)
    flat[:, : block_kv * dim] = values.view(torch.uint8).reshape(blocks, -1)
    flat[:, block_kv * dim : block_kv * (dim + 4)] = scales.contiguous().view(torch.uint8)
    shape, strides = (blocks, block_kv, 1, dim + 4), (flat.shape[1], dim + 4, dim + 4, 1)
    return flat.as_strided(shape, strides), values, scales


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
    cache, _, _ = make_cache(sequences * max_blocks + 1, block_kv, dim, random, gap)
    table = torch.randperm(sequences * max_blocks, generator=random).view(sequences, max_blocks).to(torch.int32)
    tokens = batch * next_n
    arguments = {
        "q": torch.randint(-3, 4, (batch, next_n, heads, dim), generator=random).to(FP8),
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
    (batch, next_n, _, dim), (blocks, block_kv) = q.shape, cache.shape[:2]
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
                flat = cache[block].as_strided((block_kv * (dim + 4),), (1,))
                values = flat[: block_kv * dim].view(FP8).view(block_kv, dim)[:count].double()
                scales = flat[block_kv * dim :].clone().view(torch.float32)[:count].double()
                products = (q[b, t].double() @ values.t()) * scales
                at.copy_((products.clamp(min=0) * weights[b * next_n + t, :, None].double()).sum(0))
    return result


def samples(device: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of every overload, for tests of schemas, fakes and opcheck."""
    ops = torch.ops.deep_gemm
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for tokens, keys, heads, dim in [(5, 200, 32, 128), (1, 1, 8, 32), (0, 7, 16, 64), (3, 0, 64, 128)]:
        inputs = tuple(dense_arguments(tokens, keys, heads, dim, device).values())
        for options in ({}, {"max_seqlen_k": 40, "clean_logits": False}):
            columns = options.get("max_seqlen_k", 0) or keys
            calls.append((ops.fp8_mqa_logits.default, inputs, {**options, "clean_logits": True}))
            calls.append((ops.fp8_mqa_logits.default, inputs, {"logits_dtype": torch.bfloat16, "clean_logits": True}))
            out = torch.zeros(tokens, columns + 3, device=device)[:, :columns]
            calls.append((ops.fp8_mqa_logits.out, inputs, {**options, "out": out}))
    for keywords in (
        {"lens": [70, 3]},
        {"lens": [130, 0, 64], "next_n": 3, "per_token": True, "block_kv": 32, "gap": 16},
        {"lens": [90, 20], "counts": [2, 5]},
        {"lens": []},
    ):
        arguments = paged_arguments(**keywords, device=device)
        indices, lens = arguments.pop("indices"), arguments["context_lens"]
        block_kv = keywords.get("block_kv", 64)
        calls.append((ops.get_paged_mqa_logits_metadata.default, (lens, block_kv, 7), {"indices": indices}))
        out = torch.zeros(8, 2, dtype=torch.int32, device=device)
        calls.append((ops.get_paged_mqa_logits_metadata.out, (lens, block_kv, 7), {"indices": indices, "out": out}))
        inputs = tuple(arguments.values())
        options = {"indices": indices, "clean_logits": True}
        calls.append((ops.fp8_paged_mqa_logits.default, inputs, {**options, "logits_dtype": torch.bfloat16}))
        shape = (arguments["weights"].shape[0], arguments["max_context_len"])
        calls.append((ops.fp8_paged_mqa_logits.out, inputs, {**options, "out": torch.zeros(shape, device=device)}))
    return calls
