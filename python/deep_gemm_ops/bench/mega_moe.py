"""Mega MoE on one rank beside the same layer made of operators: indexing, grouped products, SwiGLU, addition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import deep_gemm_ops

from .. import _capi, mega_moe
from ..testing import bench as timing
from ..testing.numeric import compare
from . import suites
from .report import OURS

__all__ = ["mega_records", "tuning_records"]

Record = dict[str, Any]

#: The experts of one rank among those of eight.
LOCAL_EXPERTS, EXPERTS, TOPK = 32, 256, 8
#: Of y against a reference in float32 with the same roundings.
TOLERANCE = 2e-2


class Layer(NamedTuple):
    tokens: int
    intermediate: int
    hidden: int = 7168
    is_fp4: bool = False

    @property
    def op(self) -> str:
        return "fp8_fp4_mega_moe" if self.is_fp4 else "fp8_mega_moe"

    @property
    def label(self) -> str:
        weights = " FP4" if self.is_fp4 else ""
        return f"{self.tokens} tokens, {LOCAL_EXPERTS} of {EXPERTS} x {self.intermediate} x {self.hidden}{weights}"


LAYERS = [
    Layer(tokens, intermediate, is_fp4=is_fp4)
    for is_fp4 in (False, True)
    for intermediate in (2048, 3072)
    for tokens in (1, 32, 512, 8192)
]


def mega_records(
    limits: timing.DeviceLimits, *, repeats: int = 20, references: bool = True, quick: bool = False
) -> Iterator[Record]:
    """Check and time each layer: in one kernel, and operator by operator."""
    for layer in LAYERS[1:4:2] if quick else LAYERS:
        problem = _Problem(layer)
        contenders: dict[str, Callable[[int], torch.Tensor]] = {OURS: problem.fused}
        if references:
            contenders[f"{OURS} operators"] = problem.by_operators
        yield _measure(problem, contenders, limits, repeats)


#: What the kernel is tried with instead of its own choices.
TUNING: list[dict[str, int]] = [
    *({"block_tokens": tokens} for tokens in (16, 32, 64, 128)),
    *({"lag": blocks} for blocks in (1, 5, 8, 24, 1000)),
    *({"prefetch_bytes": size} for size in (0, 512, 1536, 2048)),
    {"evict_weights": 1},
    *({"early_bytes": size} for size in (512, 1024)),
    {"early_bytes": 1024, "prefetch_bytes": 1536, "evict_weights": 1},
    {"lag": 7, "prefetch_bytes": 0},
]
#: And where tiles can have half the rows.
TUNING_OF_ROWS: list[dict[str, int]] = [
    {"tile_rows": 128},
    {"tile_rows": 256},
    {"tile_rows": 128, "prefetch_bytes": 2048},
]
#: About 2, 4 and 7 experts have tokens: where whole tiles should become the faster ones.
LAYERS_OF_ROWS = [Layer(tokens, intermediate, is_fp4=True) for intermediate in (2048, 3072) for tokens in (2, 4, 8)]


def tuning_records(limits: timing.DeviceLimits, *, repeats: int = 7, quick: bool = False) -> Iterator[Record]:
    """Time each layer with other choices than the kernel's own."""
    for layer in LAYERS[1:4:2] if quick else LAYERS + LAYERS_OF_ROWS:
        problem = _Problem(layer)
        contenders: dict[str, Callable[[int], torch.Tensor]] = {OURS: problem.fused}
        of_rows = TUNING_OF_ROWS if layer.is_fp4 and layer.tokens <= 512 else []
        for choices in of_rows if layer in LAYERS_OF_ROWS else TUNING + of_rows:
            name = ", ".join(f"{choice} {value}" for choice, value in choices.items())
            contenders[name] = functools.partial(problem.tuned, choices)
        yield _measure(problem, contenders, limits, repeats)


#: Options of casts of activations beside FP4 weights.
PER_32: dict[str, Any] = {"gran_k": 32, "use_packed_ue8m0": True}


def quantised(experts: Iterable[torch.Tensor], is_fp4: bool) -> mega_moe.ScaledWeights:
    """BF16 weights, a matrix for each expert, as grouped products take them, in FP8 or in FP4."""

    def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if is_fp4:
            return deep_gemm_ops.per_token_cast_to_fp4(x, use_packed_ue8m0=True)
        return deep_gemm_ops.per_block_cast_to_fp8(x)

    casts = [cast(matrix) for matrix in experts]
    values = torch.stack([values.view(torch.uint8) for values, _ in casts]).view(casts[0][0].dtype)
    # MN-major, as the casts have them and as products read them.
    return values, torch.stack([scales.t() for _, scales in casts]).transpose(1, 2)


def reference_layer(
    inputs: Sequence[torch.Tensor],
    l1: mega_moe.ScaledWeights,
    l2: mega_moe.ScaledWeights,
    first_expert: int = 0,
) -> torch.Tensor:
    """What these experts add to each token's result, in float32, with the roundings of the kernel.

    ``inputs`` are values of tokens, their scales, the choices and the routing weights.
    """
    x, x_sf, topk_idx, topk_weights = inputs
    y = torch.zeros(x.shape[0], l2[0].shape[1], device=x.device)
    for expert in range(l1[0].shape[0]):  # all at once, its results would take too much memory
        token, choice = (topk_idx == first_expert + expert).nonzero(as_tuple=True)
        idx = topk_idx[token].where(torch.arange(topk_idx.shape[1], device=x.device) == choice[:, None], -1)
        one = (x.view(torch.uint8)[token].view(x.dtype), x_sf[token], idx, topk_weights[token])
        weights = [tensor[expert : expert + 1] for tensor in (*l1, *l2)]
        results = mega_moe.reference_experts(*one, *weights, first_expert=first_expert + expert)
        y.index_add_(0, token, results.float().sum(1))
    return y


class _Problem:
    """One rank's inputs and weights; choices of other ranks' experts are masked, about seven of eight."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        generator = torch.Generator(suites.DEVICE).manual_seed(0)
        on_gpu: dict[str, Any] = {"device": suites.DEVICE, "generator": generator}
        tokens, hidden, intermediate = layer.tokens, layer.hidden, layer.intermediate
        choices = torch.rand(tokens, EXPERTS, **on_gpu).topk(TOPK, dim=1).indices
        choices[0, 0] = 0  # some work, however few tokens there are
        choices[0, 1:] = choices[0, 1:].clamp(min=LOCAL_EXPERTS)
        self.topk_idx = choices.where(choices < LOCAL_EXPERTS, -1)
        self.topk_weights = torch.rand(tokens, TOPK, **on_gpu)
        self.per_32 = PER_32 if layer.is_fp4 else {}
        x = torch.randn(tokens, hidden, **on_gpu).bfloat16()
        self.x, self.x_sf = deep_gemm_ops.per_token_cast_to_fp8(x, **self.per_32)

        def weights(rows: int, cols: int) -> mega_moe.ScaledWeights:
            experts = ((torch.randn(rows, cols, **on_gpu) * cols**-0.5).bfloat16() for _ in range(LOCAL_EXPERTS))
            return quantised(experts, layer.is_fp4)

        self.plain = (weights(2 * intermediate, hidden), weights(hidden, intermediate))
        self.l1, self.l2 = deep_gemm_ops.transform_weights_for_mega_moe(*self.plain)
        sizes = (LOCAL_EXPERTS, tokens, TOPK, hidden, intermediate)
        options = {"mma_type": "fp8xfp4" if layer.is_fp4 else "fp8xfp8", "device": suites.DEVICE}
        self.buffer = deep_gemm_ops.get_symm_buffer_for_mega_moe(None, *sizes, **options)
        self.y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=suites.DEVICE)
        self.buffer.x.view(torch.uint8).copy_(self.x.view(torch.uint8))
        self.buffer.x_sf.copy_(self.x_sf)
        self.buffer.topk_idx.copy_(self.topk_idx)
        self.buffer.topk_weights.copy_(self.topk_weights)
        self.rows = int((self.topk_idx >= 0).sum())
        self.mean = -(-self.rows // LOCAL_EXPERTS)
        used = int(self.topk_idx[self.topk_idx >= 0].unique().numel())
        self.flops = 2 * self.rows * 3 * hidden * intermediate
        of_weights = 3 * hidden * intermediate  # elements of an expert
        bytes_of_weights = of_weights // 2 + of_weights // 32 if layer.is_fp4 else of_weights
        self.bytes = used * bytes_of_weights + self.rows * (3 * hidden + 2 * intermediate)

    def fused(self, i: int) -> torch.Tensor:
        op = getattr(deep_gemm_ops, self.layer.op)
        return op(self.y, self.l1, self.l2, self.buffer, expected_m=self.mean)

    def tuned(self, choices: dict[str, int], i: int) -> torch.Tensor:
        with _capi.tune_mega_moe(**choices):
            return self.fused(i)

    def by_operators(self, i: int) -> torch.Tensor:
        """How many rows there are is known here, which saves these operators from padding to the worst case."""
        flat = self.topk_idx.flatten()
        order = flat.where(flat >= 0, LOCAL_EXPERTS).argsort(stable=True)[: self.rows]
        tokens = order // TOPK
        experts = torch.arange(LOCAL_EXPERTS, device=flat.device)
        ends = (flat[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
        x = self.x.view(torch.uint8).index_select(0, tokens).view(self.x.dtype)
        options: dict[str, Any] = {"layout": "offsets", "expected_m": self.mean}
        product = deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous
        if self.layer.is_fp4:
            product, options["recipe"] = deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_contiguous, [1, 1, 32]
        both = product(x, self.x_sf.index_select(0, tokens), *self.plain[0], ends, **options)
        factors = self.topk_weights.flatten().index_select(0, order)
        h, h_sf = deep_gemm_ops.swiglu_cast_to_fp8(both, topk_weights=factors, **self.per_32)
        results = product(h, h_sf, *self.plain[1], ends, **options)
        return torch.zeros_like(self.y).index_add_(0, tokens, results)

    def expected(self) -> torch.Tensor:
        return reference_layer((self.x, self.x_sf, self.topk_idx, self.topk_weights), self.l1, self.l2)


def _measure(
    problem: _Problem,
    contenders: dict[str, Callable[[int], torch.Tensor]],
    limits: timing.DeviceLimits,
    repeats: int,
) -> Record:
    layer = problem.layer
    record: Record = {"op": layer.op, "shape": layer.label, "bytes": problem.bytes, "flops": problem.flops}
    record |= {"times": {}, "failed": {}, "errors": {}}
    floor_us = 10.0 + max(problem.flops / limits.fp8_tflops * 1e-6, problem.bytes / limits.copy_gbps * 1e-3)
    expected = problem.expected()
    for name in list(contenders):
        try:
            verdict = compare(contenders[name](0), expected, tol=TOLERANCE)
            record["errors"][name] = verdict.rel_error
            wrong = "" if verdict.ok else f"wrong result: {verdict.describe()}"
        except Exception as why:
            wrong = suites._note(f"{layer.label} {name}", why)
        if wrong:
            record["failed"][name] = wrong
            del contenders[name]
    # A stream takes about a thousand launches before the host has to wait, and a layer of operators is some twenty.
    calls = min(max(1, round(1000 / floor_us)), 25)
    samples = timing.time_interleaved(contenders, calls=calls, sets=1, l2_bytes=limits.l2_bytes, repeats=repeats)
    record["times"] = {name: suites.summary(values) for name, values in samples.items()}
    return record
