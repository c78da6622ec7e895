"""The indexer's MQA logits beside the public package, over the shapes of its own test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import _capi
from .. import mqa_logits as ours
from ..testing import bench as timing
from ..testing.numeric import compare
from . import suites
from .report import OURS

__all__ = ["mqa_records"]

HEAD_DIM = 128
BLOCK_KV = 64
#: Relative error against float32 products: Hopper's tensor core keeps about 14 bits of a sum.
TOLERANCE = 1.5e-3

Record = dict[str, Any]


class Dense(NamedTuple):
    """S tokens against S_kv keys; with ``split`` the two chunks of a context-parallel rank, otherwise the last S."""

    tokens: int
    keys: int
    heads: int = 64
    split: bool = False
    compressed: bool = False
    fp4: bool = False

    @property
    def label(self) -> str:
        kind = ("split" if self.split else "causal") + (", compressed" if self.compressed else "")
        return f"S {self.tokens}, S_kv {self.keys}, H {self.heads}, {kind}" + (", FP4" if self.fp4 else "")


class Paged(NamedTuple):
    """``batch`` sequences of ``next_n`` tokens; lengths from 0.7 to 1.3 of ``keys``."""

    batch: int
    next_n: int
    keys: int
    heads: int = 64
    fp4: bool = False

    @property
    def label(self) -> str:
        label = f"paged, B {self.batch}, next_n {self.next_n}, L {self.keys}, H {self.heads}"
        return label + (", FP4" if self.fp4 else "")


DENSE = [
    *(Dense(s, k, split=split) for s in (2048, 4096) for k in (4096, 8192) for split in (True, False)),
    *(Dense(s, k, compressed=True) for s in (2048, 4096) for k in (4096, 8192)),
    *(Dense(4096, k) for k in (32768, 65536)),
    *(Dense(s, 8192, heads=32) for s in (2048, 4096)),
    *(Dense(4096, k, fp4=True) for k in (8192, 65536)),
]
PAGED = [
    *(Paged(b, n, k) for b, n in ((64, 1), (64, 2), (128, 1)) for k in (4096, 8192, 32768)),
    *(Paged(64, n, 8192, heads=32) for n in (1, 2)),
    Paged(64, 4, 8192),
    *(Paged(64, n, k, fp4=True) for n in (1, 2) for k in (8192, 32768)),
]


def mqa_records(
    limits: timing.DeviceLimits, *, repeats: int = 20, references: bool = True, quick: bool = False
) -> Iterator[Record]:
    """Check and time each problem: ours, every compiled kernel that fits it, and the public package. FP4 where there is
    a kernel for it."""
    arch = _arch(limits)
    fp4 = suites.DEVICE == "cpu" or any(row["fp4"] and row["arch"] == arch for row in _capi.mqa_instances())
    for case in DENSE[1::4] if quick else DENSE:
        if fp4 or not case.fp4:
            yield _measure(case.label, _Dense(case), limits, repeats, references)
    for case in PAGED[1::4] if quick else PAGED:
        if fp4 or not case.fp4:
            yield _measure(case.label, _Paged(case, limits.num_sms), limits, repeats, references)


def _arch(limits: timing.DeviceLimits) -> str:
    return "sm_100a" if limits.major == 10 else "sm_90a"


def _queries(q: torch.Tensor, fp4: bool) -> tuple[torch.Tensor, ...]:
    """FP8, or FP4 and its scales."""
    if not fp4:
        return (q.to(torch.float8_e4m3fn),)
    values, sf = torch.ops.deep_gemm.per_token_cast_to_fp4(q.flatten(0, -2).bfloat16(), use_packed_ue8m0=True)
    return values.view(*q.shape[:-1], -1), sf.reshape(q.shape[:-1])


class _Dense:
    def __init__(self, case: Dense) -> None:
        generator = torch.Generator(suites.DEVICE).manual_seed(0)
        normal = {"device": suites.DEVICE, "generator": generator}
        self.queries = _queries(torch.randn(case.tokens, case.heads, HEAD_DIM, **normal), case.fp4)
        kv = torch.randn(case.keys, HEAD_DIM, **normal)
        if case.fp4:
            kv, kv_sf = _queries(kv, True)
        else:
            kv_sf = kv.abs().amax(1).clamp(min=1e-4) / 448
            kv = (kv / kv_sf[:, None]).to(torch.float8_e4m3fn)
        weights = torch.randn(case.tokens, case.heads, **normal)
        token = torch.arange(case.tokens, device=suites.DEVICE)
        end = token + case.keys - case.tokens
        if case.split:
            chunk, ranks = case.tokens // 2, case.keys // case.tokens
            rank = ranks // 3
            end = torch.where(token < chunk, rank * chunk + token, (2 * ranks - 1 - rank) * chunk + token - chunk)
        end = end.to(torch.int32)
        self.inputs = (*self.queries, kv, kv_sf, weights, torch.zeros_like(end), end)
        self.max_seqlen_k = int(end.max()) if case.compressed else 0
        self.cells = int(end.sum())
        written = self.cells if case.compressed else case.tokens * case.keys
        self.bytes = timing.count_bytes(self.inputs) + 4 * written
        self.flops = 2 * self.cells * case.heads * HEAD_DIM
        self.row = (case.heads, HEAD_DIM, False, case.fp4)
        self.clean = not case.compressed

    def sets(self, count: int) -> None:
        self.operands = [self.inputs] + [tuple(x.clone() for x in self.inputs) for _ in range(count - 1)]

    def call(self, i: int) -> torch.Tensor:
        ops = torch.ops.deep_gemm
        op = ops.fp8_mqa_logits if len(self.queries) == 1 else ops.fp8_fp4_mqa_logits
        return op(*self.operands[i], clean_logits=self.clean, max_seqlen_k=self.max_seqlen_k)

    def public(self, package: Any) -> Callable[[int], torch.Tensor]:
        op = package.fp8_mqa_logits if len(self.queries) == 1 else package.fp8_fp4_mqa_logits

        def call(i: int) -> torch.Tensor:
            *queries, kv, kv_sf, weights, start, end = self.operands[i]
            options = {"clean_logits": self.clean, "max_seqlen_k": self.max_seqlen_k}
            if len(queries) == 1:
                return op(queries[0], (kv, kv_sf), weights, start, end, **options)
            # It knows FP4 as int8.
            pairs = ((queries[0].view(torch.int8), queries[1]), (kv.view(torch.int8), kv_sf))
            return op(*pairs, weights, start, end, **options)

        return call

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, *q_sf = self.queries
        others = self.inputs[len(self.queries) :]
        return ours.reference_mqa_logits(q, *others, q_sf=q_sf[0] if q_sf else None, max_seqlen_k=self.max_seqlen_k)


class _Paged:
    def __init__(self, case: Paged, num_sms: int) -> None:
        self.num_sms = num_sms
        generator = torch.Generator(suites.DEVICE).manual_seed(0)
        on_gpu = {"device": suites.DEVICE, "generator": generator}
        batch, next_n = case.batch, case.next_n
        low, high = int(0.7 * case.keys), int(1.3 * case.keys)
        lens = torch.randint(low, high, (batch, 1), dtype=torch.int32, **on_gpu).expand(batch, next_n).contiguous()
        max_blocks = -(-high // BLOCK_KV)
        blocks = batch * max_blocks
        self.queries = _queries(torch.randn(batch, next_n, case.heads, HEAD_DIM, **on_gpu), case.fp4)
        weights = torch.randn(batch * next_n, case.heads, **on_gpu)
        row_bytes = HEAD_DIM // 2 if case.fp4 else HEAD_DIM
        cache = torch.empty(blocks, BLOCK_KV * (row_bytes + 4), dtype=torch.uint8, device=suites.DEVICE)
        values = cache[:, : BLOCK_KV * row_bytes]
        for part in values.split(4096):  # at once they would take four times the cache
            if case.fp4:
                part.copy_(torch.randint(256, part.shape, dtype=torch.uint8, **on_gpu))
            else:
                part.copy_(torch.randn(part.shape, **on_gpu).to(torch.float8_e4m3fn).view(torch.uint8))
        if case.fp4:
            scales = torch.randint(120, 128, (blocks, BLOCK_KV * 4), dtype=torch.uint8, **on_gpu)
        else:
            scales = torch.rand(blocks, BLOCK_KV, **on_gpu)
        cache[:, BLOCK_KV * row_bytes :] = scales.view(torch.uint8)
        cache = cache.view(blocks, BLOCK_KV, 1, row_bytes + 4)
        table = torch.randperm(blocks, **on_gpu).to(torch.int32).view(batch, max_blocks)
        self.lens = lens
        self.inputs = (*self.queries, cache, weights, lens, table)
        self.width = high
        keys = int(lens[:, 0].sum())
        self.bytes = timing.count_bytes(*self.queries, weights, lens) + keys // BLOCK_KV * 4
        self.bytes += keys * (row_bytes + 4 + 4 * next_n)
        self.flops = 2 * keys * next_n * case.heads * HEAD_DIM
        self.row = (case.heads, HEAD_DIM, True, case.fp4)

    def sets(self, count: int) -> None:
        self.operands = [self.inputs] + [tuple(x.clone() for x in self.inputs) for _ in range(count - 1)]
        self.schedule = torch.ops.deep_gemm.get_paged_mqa_logits_metadata(self.lens, BLOCK_KV, self.num_sms)

    def call(self, i: int) -> torch.Tensor:
        ops = torch.ops.deep_gemm
        op = ops.fp8_paged_mqa_logits if len(self.queries) == 1 else ops.fp8_fp4_paged_mqa_logits
        return op(*self.operands[i], self.schedule, self.width)

    def public(self, package: Any) -> Callable[[int], torch.Tensor]:
        schedule = package.get_paged_mqa_logits_metadata(self.lens, BLOCK_KV, package.get_num_sms())
        if len(self.queries) == 1:
            op = package.fp8_paged_mqa_logits
            return lambda i: op(*self.operands[i], schedule, self.width, clean_logits=False)

        def call(i: int) -> torch.Tensor:
            q, q_sf, *others = self.operands[i]
            pair = (q.view(torch.int8), q_sf)  # it knows FP4 as int8
            return package.fp8_fp4_paged_mqa_logits(pair, *others, schedule, self.width, clean_logits=False)

        return call

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, *q_sf = self.queries
        others = self.inputs[len(self.queries) :]
        return ours.reference_paged_mqa_logits(q, *others, self.width, q_sf=q_sf[0] if q_sf else None)


def _measure(
    label: str, problem: _Dense | _Paged, limits: timing.DeviceLimits, repeats: int, references: bool
) -> Record:
    record: Record = {"op": label, "bytes": problem.bytes, "flops": problem.flops, "times": {}, "failed": {}}
    floor_us = 3.0 + max(problem.flops / limits.fp8_tflops * 1e-6, problem.bytes / limits.copy_gbps * 1e-3)
    calls, count = timing.burst_plan(floor_us, problem.bytes, limits.l2_bytes)
    problem.sets(count)
    heads, dim, paged, fp4 = problem.row
    contenders: dict[str, Callable[[int], torch.Tensor]] = {OURS: problem.call}
    arch = _arch(limits)
    for row in _capi.mqa_instances():
        fits = (row["arch"], row["heads"], row["paged"], row["fp4"]) == (arch, heads, paged, fp4)
        fits = fits and row["head_dim"] in (0, dim)
        if suites.DEVICE == "cuda" and fits:

            def forced(i: int, index: int = row["index"]) -> torch.Tensor:
                with _capi.force_mqa_row(index):
                    return problem.call(i)

            contenders[row["name"]] = forced
    package = suites._public_deep_gemm() if references else None
    if package is not None:
        try:
            contenders["deep_gemm"] = problem.public(package)
        except Exception as why:
            record["failed"]["deep_gemm"] = suites._note(label, why)
    expected, inside = problem.expected()
    for name in list(contenders):
        try:
            result = contenders[name](0)
            verdict = compare(result.where(inside, 0), expected.where(inside, 0), tol=TOLERANCE)
            wrong = "" if verdict.ok else f"wrong result: {verdict.describe()}"
            if not wrong and isinstance(problem, _Dense) and problem.clean and name == OURS:
                cleaned = torch.equal(result == -math.inf, ~inside)
                wrong = "" if cleaned else "wrong result: not -inf outside of the ranges"
        except Exception as why:
            wrong = suites._note(f"{label} {name}", why)
        if wrong:
            record["failed"][name] = wrong
            del contenders[name]
    del expected, inside
    samples = timing.time_interleaved(contenders, calls=calls, sets=count, l2_bytes=limits.l2_bytes, repeats=repeats)
    record["times"] = {name: suites.summary(values) for name, values in samples.items()}
    return record
