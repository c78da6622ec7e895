"""``python -m deep_gemm_ops.bench.expert_parallel``: what a layer of experts moves and computes on 8 to 1024 ranks.

A model, not a measurement: bytes on links, bytes of weights and operations of each rank, and the shortest times that
the rates given allow. What ``nn.ExpertParallel`` sends is counted exactly: the tests compare it with what the layer
passes to its all-to-alls, and operations with the products it calls. Tokens choose experts evenly and independently.

Rates are options. The defaults are an H200's: 1250 TFLOPS of grouped FP8 products and 4200 GB/s of copying, both
measured (README), and the datasheet's 450 GB/s of NVLink and 50 GB/s (400 Gbit/s) of network per GPU and direction. An
exchange's own latency has not been measured here: ``--exchange-us`` adds one, by default none.

    torchrun --nproc-per-node 8 -m deep_gemm_ops.bench.expert_parallel --measure

times the layer on the GPUs that there are, beside the model with the links' speed and latency that it has measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..layout import align, ceil_div

__all__ = ["Cost", "Layer", "Machine", "Traffic", "cost", "table", "traffic"]

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Layer:
    """DeepSeek-V3's by default. Tokens are BF16, and so are the results of experts."""

    dim: int = 7168
    hidden_dim: int = 2048
    num_experts: int = 256
    copies: int = 8  # experts of a token

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.dim * self.hidden_dim


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one GPU; links per direction."""

    tflops: float = 1250.0
    memory_gbps: float = 4200.0
    local_gbps: float = 450.0
    remote_gbps: float = 50.0
    local_ranks: int = 8  # that the faster link connects
    exchange_us: float = 0.0  # of an all-to-all of nothing


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to other ranks, by exchange of one forward and backward pass."""

    counts: int
    dispatch: int
    combine: int
    combine_backward: int
    dispatch_backward: int

    @property
    def forward(self) -> int:
        return self.counts + self.dispatch + self.combine

    @property
    def backward(self) -> int:
        return self.combine_backward + self.dispatch_backward


def traffic(
    layer: Layer,
    ranks: int,
    *,
    rows_sent: int,
    rows_received: int,
    fp8_dispatch: bool = False,
    capacity: int | None = None,
) -> Traffic:
    """What ``nn.ExpertParallel`` sends from a rank whose tokens have ``rows_sent`` experts on other ranks, and on which
    ``rows_received`` rows of other ranks arrive."""
    if capacity is not None:
        rows_sent = rows_received = capacity * (ranks - 1)
    full = 2 * layer.dim
    # Rows of bytes: a token, its scales where it is FP8, its routing weight, up to a multiple of 16.
    weighted = align(align(full, 4) + 4, 16)
    quantised = align(align(layer.dim, 4) + 4 * ceil_div(layer.dim, 128) + 4, 16)
    return Traffic(
        counts=4 * (ranks - 1) * (layer.num_experts // ranks + 1),
        dispatch=rows_sent * (quantised if fp8_dispatch else weighted),
        combine=rows_received * full,
        combine_backward=rows_sent * full,
        dispatch_backward=rows_received * weighted,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one rank, a forward pass or a training step; times in microseconds."""

    ranks: int
    expert_ranks: int  # that experts are spread over; more ranks hold replicas
    rows: float  # that an average rank's experts work on
    local_bytes: float
    remote_bytes: float
    sync_bytes: float  # gradients of weights, between replicas
    weight_bytes: float  # read and written in memory
    row_bytes: float  # of tokens and results, moved in memory around the products
    operations: float
    links_us: float
    memory_us: float
    products_us: float
    fused_us: float | None  # the fused kernel, forward; None where a link leaves its domain

    @property
    def us(self) -> float:
        """``nn.ExpertParallel``: one step after the other."""
        return self.links_us + self.memory_us + self.products_us


def cost(
    layer: Layer,
    ranks: int,
    tokens: float,
    *,
    machine: Machine | None = None,
    training: bool = False,
    frozen: bool = False,
    fp8_dispatch: bool = False,
    capacity: int | None = None,
) -> Cost:
    """Model of ``tokens`` tokens on each of ``ranks`` ranks; with more ranks than experts the layer is replicated.

    ``frozen``: weights in FP8, see ``nn.freeze``.
    """
    machine = machine or Machine()
    expert_ranks = min(ranks, layer.num_experts)
    if ranks % expert_ranks or layer.num_experts % expert_ranks:
        raise ValueError(f"{ranks} ranks cannot share {layer.num_experts} experts evenly")
    local_experts, replicas = layer.num_experts // expert_ranks, ranks // expert_ranks
    rows = tokens * layer.copies
    travelling = round(rows * (expert_ranks - 1) / expert_ranks)
    sent = traffic(
        layer,
        expert_ranks,
        rows_sent=travelling,
        rows_received=travelling,
        fp8_dispatch=fp8_dispatch,
        capacity=capacity,
    )
    exchanges, total = (5, sent.forward + sent.backward) if training else (3, sent.forward)
    neighbours = min(machine.local_ranks, expert_ranks) - 1
    local = total * neighbours / max(expert_ranks - 1, 1)
    remote = total - local

    # A product reads the weights of experts that have rows. Unless frozen, the layer casts all its BF16 weights in a
    # forward pass, 2 bytes read and 1 written. The backward pass casts them again, in both orders, and writes their
    # gradients in BF16.
    weights = local_experts * layer.weights_per_expert
    busy = 1 - (1 - layer.copies / layer.num_experts) ** (tokens * expert_ranks)
    weight_bytes = weights * (busy + (0 if frozen else 3) + (4 + busy + 2 if training else 0))
    # Rows are gathered, packed, exchanged, sorted, and sorted back, exchanged, gathered, summed: each once read and
    # once written. Their gradients take the same ways.
    row_bytes = rows * layer.dim * 2 * 8 * 2 * (2 if training else 1)
    operations = 2.0 * rows * layer.weights_per_expert * (3 if training else 1)
    sync_bytes = 2.0 * weights * 2 * (replicas - 1) / replicas if training else 0.0

    # Local and remote links work side by side; gradients of replicas follow.
    links_us = 1e-3 * (max(local / machine.local_gbps, remote / machine.remote_gbps) + sync_bytes / machine.remote_gbps)
    fused_us = None
    if expert_ranks <= machine.local_ranks and not training:
        # FP8 tokens and BF16 results on the links, FP8 weights read once, everything side by side.
        fp8 = traffic(layer, expert_ranks, rows_sent=travelling, rows_received=travelling, fp8_dispatch=True)
        times = (
            1e-3 * (fp8.dispatch + fp8.combine) / machine.local_gbps,
            1e-3 * weights * busy / machine.memory_gbps,
            1e-6 * operations / machine.tflops,
        )
        fused_us = max(times)
    return Cost(
        ranks=ranks,
        expert_ranks=expert_ranks,
        rows=rows,
        local_bytes=local,
        remote_bytes=remote,
        sync_bytes=sync_bytes,
        weight_bytes=weight_bytes,
        row_bytes=row_bytes,
        operations=operations,
        links_us=links_us + exchanges * machine.exchange_us,
        memory_us=1e-3 * (weight_bytes + row_bytes) / machine.memory_gbps,
        products_us=1e-6 * operations / machine.tflops,
        fused_us=fused_us,
    )


def table(costs: Sequence[Cost]) -> str:
    """Markdown, a line for each number of ranks."""
    lines = [
        "| ranks | experts on | local MB | remote MB | replicas MB | weights MB | rows MB | GFLOP | links us "
        "| memory us | products us | sum us | fused us |",
        "|---:" * 13 + "|",
    ]
    for c in costs:
        sizes = (c.local_bytes, c.remote_bytes, c.sync_bytes, c.weight_bytes, c.row_bytes)
        cells = [str(c.ranks), str(c.expert_ranks), *(f"{size / 1e6:.1f}" for size in sizes)]
        cells += [f"{c.operations / 1e9:.1f}"]
        cells += [f"{us:.0f}" for us in (c.links_us, c.memory_us, c.products_us, c.us)]
        cells.append("-" if c.fused_us is None else f"{c.fused_us:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def join_job(device: str) -> Any:
    """A ``DeviceMesh`` of all ranks of the job that torchrun has started, or of a job of one, each with its own GPU."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, value)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Ranks that wait for one that has failed are not to wait long.
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=wait)
    return init_device_mesh(device, (dist.get_world_size(),))


def _time_us(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the slowest rank, which all ranks start together."""
    import torch
    import torch.distributed as dist

    times = []
    for i in range(repeats + 3):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:  # the first ones load kernels and connect ranks
            times.append(start.elapsed_time(end) * 1e3)
    slowest = torch.tensor(times, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def measure(layer: Layer, tokens: int, machine: Machine) -> str:
    """Times on all ranks of this job, each with a GPU and ``tokens`` tokens, beside the model; Markdown."""
    import torch
    import torch.distributed as dist

    from ..nn import ExpertParallel, freeze

    mesh = join_job("cuda")
    ranks = mesh.size()

    def exchange_us(size: int) -> float:
        source = torch.zeros(ranks, size, dtype=torch.uint8, device="cuda")
        return _time_us(lambda: dist.all_to_all_single(torch.empty_like(source), source))

    empty, large = exchange_us(16), 1 << 26
    rates: dict[str, Any] = {"exchange_us": empty}
    if ranks > 1:
        gbps = large * (ranks - 1) * 1e-3 / max(exchange_us(large) - empty, 1e-3)
        rates["local_gbps" if ranks <= machine.local_ranks else "remote_gbps"] = gbps
    machine = dataclasses.replace(machine, **rates)

    random = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(tokens, layer.dim, generator=random, device="cuda").bfloat16()
    scores = torch.rand(tokens, layer.num_experts, generator=random, device="cuda")
    weights, ids = scores.topk(layer.copies)
    lines = [
        f"{ranks} ranks, {tokens} tokens each. " + ", ".join(f"{name} {value:.1f}" for name, value in rates.items())
    ]
    lines += ["", "| | measured us | model us |", "|---|---:|---:|"]
    local = layer.num_experts // ranks
    always_fits = tokens * min(layer.copies, local)
    for name, options in (
        ("exact", {}),
        ("exact, tokens in FP8", {"fp8_dispatch": True}),
        ("capacity of twice the mean", {"capacity": max(2 * tokens * layer.copies // ranks, 1)}),
        ("capacity that always fits", {"capacity": always_fits}),
    ):
        torch.manual_seed(0)
        sizes = (layer.dim, layer.hidden_dim, layer.num_experts)
        module = ExpertParallel(*sizes, mesh, dtype=torch.bfloat16, **options)
        inputs = x.clone().requires_grad_()

        def train(module: ExpertParallel = module, inputs: torch.Tensor = inputs) -> None:
            module(inputs, ids, weights).sum().backward()
            for tensor in (inputs, *module.parameters()):
                tensor.grad = None

        def infer(module: ExpertParallel = module) -> torch.Tensor:
            with torch.no_grad():
                return module(x, ids, weights)

        rows = [
            ("training step", train, {"training": True}),
            ("forward", infer, {}),
            ("frozen", infer, {"frozen": True}),
        ]
        for step, function, kind in rows:
            if step == "frozen":
                freeze(module)
            model = cost(layer, ranks, tokens, machine=machine, **kind, **options)
            lines.append(f"| {name}, {step} | {_time_us(function):.0f} | {model.us:.0f} |")
        if "capacity" in options:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                infer()
            lines.append(f"| {name}, frozen, from a graph | {_time_us(graph.replay):.0f} | {model.us:.0f} |")
            del graph
        del module
    printed = "\n".join(lines) if dist.get_rank() == 0 else ""
    dist.destroy_process_group()
    return printed


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank (default: 4096)")
    parser.add_argument("--training", action="store_true", help="forward and backward pass")
    parser.add_argument("--frozen", action="store_true", help="weights in FP8")
    parser.add_argument("--fp8-dispatch", action="store_true")
    parser.add_argument("--capacity", type=int, help="rows from each rank to each other")
    parser.add_argument("--measure", action="store_true", help="time it on this job's GPUs")
    for kind in (Layer, Machine):
        for field in dataclasses.fields(kind):
            number = type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=number, default=field.default)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    args = parser.parse_args(argv)
    layer, machine = (
        kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})
        for kind in (Layer, Machine)
    )
    if args.measure:
        if printed := measure(layer, args.tokens, machine):  # on the first rank
            print(printed)
        return
    options = {name: getattr(args, name) for name in ("training", "frozen", "fp8_dispatch", "capacity")}
    print(table([cost(layer, ranks, args.tokens, machine=machine, **options) for ranks in args.ranks]))


if __name__ == "__main__":
    main()
