"""Training layers: the forward and backward pass of a layer in FP8 beside PyTorch's in BF16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..nn import FP8Linear, GroupedExperts
from ..testing import bench as timing
from . import suites
from .report import OURS

__all__ = ["BENCH_LAYERS", "layer_record"]

BENCH_LAYERS: tuple[tuple[int, int, int, int], ...] = (
    (8192, 4096, 7168, 0),
    (8192, 7168, 2048, 0),
    (8192, 7168, 16384, 0),
    (8192, 24576, 1536, 0),
    (16384, 2048, 7168, 8),
    (16384, 2048, 7168, 32),
)
"""``(tokens, N, K, experts)``; 0 experts is a linear layer."""


class _PlainExperts(torch.nn.Module):
    """What GroupedExperts computes for sorted tokens, with PyTorch's grouped product in BF16."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = torch.nn.Parameter(gate_up.clone()), torch.nn.Parameter(down.clone())

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        functional = torch.nn.functional
        gate, up = functional.grouped_mm(x, self.gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=1)
        return functional.grouped_mm(functional.silu(gate) * up, self.down.transpose(1, 2), offs=offsets)


def layer_record(
    tokens: int,
    n: int,
    k: int,
    experts: int,
    *,
    limits: timing.DeviceLimits,
    repeats: int = 20,
    references: bool = True,
) -> dict[str, Any]:
    """Check and time a training step's forward and backward pass through one BF16 layer, in FP8 beside PyTorch in BF16.

    ``experts`` 0 is a linear layer ``k`` to ``n``, otherwise so many experts ``k`` to ``n`` and back, tokens spread
    evenly. The casts of weights and activations are part of the time.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": suites.DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(tokens, k, **options).requires_grad_()
    if experts:
        ours = GroupedExperts(k, n, experts, **options)
        plain: torch.nn.Module = _PlainExperts(ours.gate_up.detach(), ours.down.detach())
        offsets = (torch.arange(1, experts + 1, device=suites.DEVICE) * tokens // experts).to(torch.int32)
        forwards = {OURS: lambda: ours.experts(x, offsets), "bf16": lambda: plain(x, offsets)}
        grad, flops = torch.randn(tokens, k, **options), 3 * 2 * tokens * 3 * n * k
    else:
        ours = FP8Linear(k, n, bias=False, **options)
        plain = torch.nn.Linear(k, n, bias=False, **options)
        plain.load_state_dict(ours.state_dict())
        forwards = {OURS: lambda: ours(x), "bf16": lambda: plain(x)}
        grad, flops = torch.randn(tokens, n, **options), 3 * 2 * tokens * n * k
    record: dict[str, Any] = {"tokens": tokens, "n": n, "k": k, "experts": experts, "flops": flops}
    record |= {"times": {}, "failed": {}, "errors": {}}
    inputs = {OURS: (x, *ours.parameters()), "bf16": (x, *plain.parameters())}

    def step(name: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forwards[name](), inputs[name], grad)

    contenders: dict[str, Callable[[int], Any]] = {}
    results: dict[str, tuple[torch.Tensor, ...]] = {}
    for name in ("bf16", OURS) if references else (OURS,):
        try:
            results[name] = step(name)
            contenders[name] = lambda i, name=name: step(name)
        except Exception as why:
            record["failed"][name] = suites._note(f"layer {tokens} {n} {k} {name}", why)
    if OURS in results and "bf16" in results:
        pairs = zip(results[OURS], results["bf16"])
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        record["errors"][OURS] = error
        if not error < 0.1:  # one FP8 layer costs 0.04, two behind each other 0.065
            record["failed"][OURS] = f"a gradient differs from BF16's by {error:.3f}"
            del contenders[OURS]
    floor_us = 20.0 + flops / limits.fp8_tflops * 1e-6
    samples = timing.time_interleaved(
        contenders, calls=max(1, round(1000 / floor_us)), sets=1, l2_bytes=limits.l2_bytes, repeats=repeats
    )
    record["times"] = {name: suites.summary(values) for name, values in samples.items()}
    return record
