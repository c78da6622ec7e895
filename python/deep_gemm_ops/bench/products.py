"""Grouped, BF16, batched and split-head products beside the public DeepGEMM, ``torch._grouped_mm`` and cuBLAS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import batched, grouped_gemm
from ..testing import bench as timing
from ..testing.cases import BENCH_SHAPES
from ..testing.numeric import compare, error_bar
from . import suites
from .report import OURS

__all__ = ["problems", "product_record"]

Tensor = torch.Tensor
Call = Callable[[dict[str, Any]], Any]

#: (groups, rows of each) of m-grouped products, and their (N, K).
CONTIGUOUS = ((4, 8192), (8, 4096))
CONTIGUOUS_SHAPES = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
#: (groups, rows that are expected to count in each) of masked products, out of MASKED_MAX.
MASKED = ((32, 192), (6, 1024), (32, 20), (6, 20))
MASKED_MAX = 4096
#: (K of each group, M, N) of k-grouped products of 8 groups.
K_GROUPED = ((4096, 4096, 7168), (4096, 7168, 2048), (4096, 2048, 7168))
#: (b, h, r, d) of batched products: queries and values of multi-head latent attention.
BATCHED = ((128, 128, 512, 128), (4096, 128, 512, 128))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product. ``build`` makes the tensors, ``contenders`` run on them; each returns its result."""

    op: str
    shape: str
    flops: float
    build: Callable[[], dict[str, Any]]
    ours: dict[str, Call]  # the first is what the others are compared with
    others: dict[str, Call]
    expected: Call
    tol: float
    live: Call | None = None  # bool, of the result's elements that are specified


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=suites.DEVICE, dtype=torch.bfloat16)


def _tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = torch.ops.deep_gemm.per_token_cast_to_fp8(x.flatten(0, -2))
    shape = x.shape[:-1]
    if len(shape) == 1:
        return values, scales
    return values.view(x.shape), scales.contiguous().view(*shape, scales.shape[-1])


def _weights(w: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [torch.ops.deep_gemm.per_block_cast_to_fp8(matrix) for matrix in w]
    return torch.stack([values for values, _ in pairs]), torch.stack([scales.contiguous() for _, scales in pairs])


def _public(name: str) -> Any | None:
    return getattr(suites._public_deep_gemm(), name, None)


def _contiguous(groups: int, rows: int, n: int, k: int, fp8: bool) -> Problem:
    m = groups * rows
    kind = "fp8" if fp8 else "bf16"
    op = f"m_grouped_{kind}_gemm_nt_contiguous"
    ops = getattr(torch.ops.deep_gemm, op)

    def build() -> dict[str, Any]:
        a, b = _normal(m, k), _normal(groups, n, k)
        p: dict[str, Any] = {"operands": [*_tokens(a), *_weights(b)] if fp8 else [a, b]}
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=suites.DEVICE) * rows
        p["ends"], p["out"] = ends, torch.empty(m, n, dtype=torch.bfloat16, device=suites.DEVICE)
        p["indices"] = torch.arange(groups, dtype=torch.int32, device=suites.DEVICE).repeat_interleave(rows)
        return p

    def ours(layout: str) -> Call:
        def call(p: dict[str, Any]) -> Tensor:
            ops.out(*p["operands"], p["indices" if layout == "indices" else "ends"], layout=layout, out=p["out"])
            return p["out"]

        return call

    def expected(p: dict[str, Any]) -> Tensor:
        operands = p["operands"] if fp8 else [p["operands"][0], None, p["operands"][1], None]
        result = torch.empty(m, n, device=suites.DEVICE)
        return grouped_gemm.reference_m_grouped(*operands, p["indices"], result)

    others: dict[str, Call] = {}
    public = _public(op)
    if public is not None:

        def deep_gemm(p: dict[str, Any]) -> Tensor:
            if fp8:
                a, sfa, b, sfb = p["operands"]
                public((a, sfa), (b, sfb), p["out"], p["indices"], disable_ue8m0_cast=True)
            else:
                public(*p["operands"], p["out"], p["indices"])
            return p["out"]

        others["deep_gemm"] = deep_gemm
    if not fp8 and hasattr(torch, "_grouped_mm"):
        others["torch._grouped_mm"] = lambda p: torch._grouped_mm(
            p["operands"][0], p["operands"][1].transpose(1, 2), offs=p["ends"]
        )
    mine = {OURS: ours("indices"), f"{OURS} psum": ours("psum"), f"{OURS} offsets": ours("offsets")}
    shape = f"{groups} x {rows}, N {n}, K {k}"
    return Problem(op, shape, 2.0 * m * n * k, build, mine, others, expected, error_bar(torch.bfloat16))


def _masked(groups: int, rows: int, n: int, k: int, fp8: bool) -> Problem:
    op = f"m_grouped_{'fp8' if fp8 else 'bf16'}_gemm_nt_masked"
    ops = getattr(torch.ops.deep_gemm, op)
    # Within 30 % of what is expected.
    counts = torch.randint(int(rows * 0.7), int(rows * 1.3) + 1, (groups,), generator=torch.Generator().manual_seed(0))

    def build() -> dict[str, Any]:
        a, b = _normal(groups, MASKED_MAX, k), _normal(groups, n, k)
        return {
            "operands": [*_tokens(a), *_weights(b)] if fp8 else [a, b],
            "masked_m": counts.to(suites.DEVICE, torch.int32),
            "out": torch.empty(groups, MASKED_MAX, n, dtype=torch.bfloat16, device=suites.DEVICE),
        }

    def ours(p: dict[str, Any]) -> Tensor:
        ops.out(*p["operands"], p["masked_m"], rows, out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        operands = p["operands"] if fp8 else [p["operands"][0], None, p["operands"][1], None]
        return grouped_gemm.reference_masked(*operands, p["masked_m"], torch.zeros_like(p["out"], dtype=torch.float32))

    others: dict[str, Call] = {}
    public = _public(op)
    if public is not None:

        def deep_gemm(p: dict[str, Any]) -> Tensor:
            if fp8:
                a, sfa, b, sfb = p["operands"]
                public((a, sfa), (b, sfb), p["out"], p["masked_m"], rows, disable_ue8m0_cast=True)
            else:
                public(*p["operands"], p["out"], p["masked_m"], rows)
            return p["out"]

        others["deep_gemm"] = deep_gemm

    def live(p: dict[str, Any]) -> Tensor:
        return (torch.arange(MASKED_MAX, device=suites.DEVICE) < p["masked_m"][:, None])[:, :, None]

    shape, flops = f"{groups} x {rows}, N {n}, K {k}", 2.0 * int(counts.sum()) * n * k
    return Problem(op, shape, flops, build, {OURS: ours}, others, expected, error_bar(torch.bfloat16), live)


def _k_grouped(groups: int, k: int, m: int, n: int, fp8: bool) -> Problem:
    total = groups * k
    op = f"k_grouped_{'fp8' if fp8 else 'bf16'}_gemm_tn_contiguous"

    def build() -> dict[str, Any]:
        a, b = _normal(total, m), _normal(total, n)
        ks = torch.full((groups,), k, dtype=torch.int32, device=suites.DEVICE)
        p: dict[str, Any] = {"operands": [a, b], "ks": ks, "ends": ks.cumsum(0).to(torch.int32)}
        p["out"] = torch.zeros(groups, m, n, device=suites.DEVICE)
        p["c"] = torch.zeros_like(p["out"])
        if fp8:
            ops = torch.ops.deep_gemm
            casts = [ops.k_grouped_per_channel_cast_to_fp8(x, ks) for x in (a, b)]
            p["operands"] = [*casts[0], *casts[1]]
            casts = [ops.k_grouped_per_channel_cast_to_fp8_k_major(x, ks) for x in (a, b)]
            p["padded"] = [*casts[0], *casts[1]]
        return p

    def ours(p: dict[str, Any]) -> Tensor:
        getattr(torch.ops.deep_gemm, op).out(*p["operands"], p["ks"], out=p["out"])
        return p["out"]

    def padded(p: dict[str, Any]) -> Tensor:
        torch.ops.deep_gemm.k_grouped_fp8_gemm_nt_contiguous.out(*p["padded"], p["ks"], out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        operands = p["operands"] if fp8 else [p["operands"][0], None, p["operands"][1], None]
        return grouped_gemm.reference_k_grouped(*operands, p["ks"])

    others: dict[str, Call] = {}
    public = _public(op)
    if public is not None:

        def deep_gemm(p: dict[str, Any]) -> Tensor:
            sizes = [k] * groups
            if fp8:
                a, sfa, b, sfb = p["operands"]
                blocks = groups * k // 128
                public((a, sfa[:blocks]), (b, sfb[:blocks]), p["out"], sizes, p["ks"], p["c"])
            else:
                public(*p["operands"], p["out"], sizes, p["ks"], p["c"])
            return p["out"]

        others["deep_gemm"] = deep_gemm
    if not fp8 and hasattr(torch, "_grouped_mm"):
        others["torch._grouped_mm"] = lambda p: torch._grouped_mm(
            p["operands"][0].t(), p["operands"][1], offs=p["ends"]
        )
    mine = {OURS: padded, f"{OURS} transposing": ours} if fp8 else {OURS: ours}
    shape = f"{groups} x K {k}, M {m}, N {n}"
    # torch._grouped_mm writes BF16, so that is what all have to be as good as.
    return Problem(op, shape, 2.0 * total * m * n, build, mine, others, expected, error_bar(torch.bfloat16))


def _bf16(m: int, n: int, k: int) -> Problem:
    def build() -> dict[str, Any]:
        out = torch.empty(m, n, dtype=torch.bfloat16, device=suites.DEVICE)
        return {"operands": [_normal(m, k), _normal(n, k)], "out": out}

    def ours(p: dict[str, Any]) -> Tensor:
        torch.ops.deep_gemm.bf16_gemm_nt.out(*p["operands"], out=p["out"])
        return p["out"]

    def matmul(p: dict[str, Any]) -> Tensor:
        return torch.matmul(p["operands"][0], p["operands"][1].t(), out=p["out"])

    others: dict[str, Call] = {"torch.matmul": matmul}
    public = _public("bf16_gemm_nt")
    if public is not None:

        def deep_gemm(p: dict[str, Any]) -> Tensor:
            public(*p["operands"], p["out"])
            return p["out"]

        others["deep_gemm"] = deep_gemm
    expected = lambda p: p["operands"][0].float() @ p["operands"][1].float().t()  # noqa: E731
    tol = error_bar(torch.bfloat16)
    return Problem("bf16_gemm_nt", f"{m}, {n}, {k}", 2.0 * m * n * k, build, {OURS: ours}, others, expected, tol)


def _batched(b: int, h: int, r: int, d: int, fp8: bool) -> Problem:
    op = "fp8_einsum" if fp8 else "einsum"
    expr = "bhr,hdr->bhd"

    def build() -> dict[str, Any]:
        x, w = _normal(b, h, r), _normal(h, d, r)
        p: dict[str, Any] = {"operands": [*_tokens(x), *_weights(w)] if fp8 else [x, w]}
        p["bf16"], p["out"] = [x, w], torch.empty(b, h, d, dtype=torch.bfloat16, device=suites.DEVICE)
        return p

    def ours(p: dict[str, Any]) -> Tensor:
        getattr(torch.ops.deep_gemm, op).out(expr, *p["operands"], out=p["out"])
        return p["out"]

    def expected(p: dict[str, Any]) -> Tensor:
        operands = p["operands"] if fp8 else [p["operands"][0], None, p["operands"][1], None]
        known = batched.FP8_EXPRESSIONS if fp8 else batched.EXPRESSIONS
        return batched.reference_einsum(known[expr], *operands, out_dtype=torch.float32)

    others: dict[str, Call] = {}
    if not fp8:
        others["torch.einsum"] = lambda p: torch.einsum(expr, *p["operands"])
    public = _public(op)
    if public is not None:

        def deep_gemm(p: dict[str, Any]) -> Tensor:
            x = p["operands"]
            public(expr, *([(x[0], x[1]), (x[2], x[3])] if fp8 else x), p["out"])
            return p["out"]

        others["deep_gemm"] = deep_gemm
    shape, flops = f"{expr} b {b}, h {h}, r {r}, d {d}", 2.0 * b * h * r * d
    return Problem(op, shape, flops, build, {OURS: ours}, others, expected, error_bar(torch.bfloat16))


def problems(quick: bool = False) -> Iterator[Problem]:
    """All that is measured; with ``quick`` one of each kind."""
    for fp8 in (True, False):
        for groups, rows in CONTIGUOUS[:1] if quick else CONTIGUOUS:
            for n, k in CONTIGUOUS_SHAPES[3:] if quick else CONTIGUOUS_SHAPES:
                yield _contiguous(groups, rows, n, k, fp8)
        for groups, rows in MASKED[3:] if quick else MASKED:
            for n, k in CONTIGUOUS_SHAPES[3:] if quick else CONTIGUOUS_SHAPES[:2]:
                yield _masked(groups, rows, n, k, fp8)
        for k, m, n in K_GROUPED[2:] if quick else K_GROUPED:
            yield _k_grouped(8, k, m, n, fp8)
        for b, h, r, d in BATCHED[:1] if quick else BATCHED:
            yield _batched(b, h, r, d, fp8)
    for m in (128, 4096):
        for n, k in BENCH_SHAPES[5:6] if quick else BENCH_SHAPES:
            yield _bf16(m, n, k)


def product_record(
    problem: Problem,
    *,
    limits: timing.DeviceLimits,
    repeats: int = 20,
    references: bool = True,
) -> dict[str, Any]:
    """Check and time one product beside its references."""
    torch.manual_seed(0)
    first = problem.build()
    record: dict[str, Any] = {"op": problem.op, "shape": problem.shape, "flops": problem.flops}
    record |= {"times": {}, "failed": {}, "errors": {}}
    record["bytes"] = timing.count_bytes(first["operands"], first["out"])
    expected = problem.expected(first)
    calls: dict[str, Call] = {}
    for name, call in {**problem.ours, **(problem.others if references else {})}.items():
        try:
            result = call(first)
            wanted = expected
            if problem.live is not None:
                live = problem.live(first)
                result = torch.where(live, result, torch.zeros_like(result))
            verdict = compare(result, wanted, tol=problem.tol, tile=(128, 128))
        except Exception as why:
            record["failed"][name] = suites._note(f"{problem.op} {problem.shape} {name}", why)
            continue
        record["errors"][name] = verdict.rel_error
        if verdict.ok:
            calls[name] = call
        else:
            record["failed"][name] = f"wrong result: {verdict.describe()}"
    del expected
    peak = limits.fp8_tflops * (1 if "fp8" in problem.op else 0.5)
    floor_us = 2.0 + max(problem.flops / peak * 1e-6, 0.0)
    count, sets = timing.burst_plan(floor_us, record["bytes"], limits.l2_bytes)
    tensors = [first] + [_copy(first) for _ in range(sets - 1)]
    samples = timing.time_interleaved(
        {name: lambda i, call=call: call(tensors[i]) for name, call in calls.items()},
        calls=count,
        sets=sets,
        l2_bytes=limits.l2_bytes,
        repeats=repeats,
    )
    record["times"] = {name: suites.summary(values) for name, values in samples.items()}
    return record


def _copy(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    if isinstance(x, dict):
        return {name: _copy(value) for name, value in x.items()}
    return [_copy(value) for value in x] if isinstance(x, Sequence) else x
