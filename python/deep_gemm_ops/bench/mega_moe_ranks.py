"""``torchrun --nproc-per-node R -m deep_gemm_ops.bench.mega_moe_ranks``: Mega MoE on R GPUs beside collectives.

Every rank has a GPU of its own, the same number of tokens and as many experts as each of eight ranks has of
DeepSeek-V3's 256: whatever the number of ranks, a rank's products are those of eight. Tokens choose among all experts.

- *kernel*: the fused kernel, its inputs in symmetric memory already. *kernel, own experts*: the same with choices among
  each rank's own experts, which takes no link but still meets the other ranks.
- *layer*: BF16 tokens quantised and written into symmetric memory, then the kernel.
- *exact*: ``nn.ExpertParallel`` in inference: BF16 tokens, which travel in FP8, results in BF16, weights in FP8 or FP4.
  The host reads how many rows there are, and its own time shows.
- *graph*: the same from a CUDA graph, with the smallest capacity that drops nothing, which only a benchmark knows.

All results are checked before they are timed. A sample is a burst of calls between two CUDA events, enqueued while the
stream is held, the L2 evicted, all ranks released by a barrier on the GPUs. Of *exact* it is one call, which the host
enqueues meanwhile. The slowest rank counts, and of the samples the median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_gemm_ops

from .. import mega_moe, reference
from ..nn import ExpertParallel, freeze
from ..testing import bench as timing
from ..testing.numeric import compare
from . import expert_parallel
from .mega_moe import PER_32, TOLERANCE, quantised, reference_layer

Tensor = torch.Tensor
Record = dict[str, Any]

HOLD_US = 5000  # of the stream, while a burst is enqueued


class _FP4Experts(torch.nn.Module):
    """What ``nn.FrozenExperts`` does, with FP4 weights."""

    def __init__(self, gate_up: mega_moe.ScaledWeights, down: mega_moe.ScaledWeights) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, rows: Tensor, offsets: Tensor, row_weights: Tensor) -> Tensor:
        product, options = deep_gemm_ops.m_grouped_fp8_fp4_gemm_nt_contiguous, {"recipe": [1, 1, 32]}
        both = product(
            *deep_gemm_ops.per_token_cast_to_fp8(rows, **PER_32), *self.gate_up, offsets, layout="offsets", **options
        )
        hidden = deep_gemm_ops.swiglu_cast_to_fp8(both, topk_weights=row_weights, **PER_32)
        return product(*hidden, *self.down, offsets, layout="offsets", **options)


class _Ranks:
    """This rank among those of the job: its experts, in FP8 or FP4, and its buffer for any number of tokens."""

    def __init__(self, mesh: Any, layer: expert_parallel.Layer, is_fp4: bool, max_tokens: int) -> None:
        self.mesh, self.layer, self.is_fp4 = mesh, layer, is_fp4
        self.device, self.ranks, self.rank = mesh.device_type, mesh.size(), mesh.get_local_rank()
        self.local_experts = layer.num_experts // self.ranks
        torch.manual_seed(0)
        sizes = (layer.dim, layer.hidden_dim, layer.num_experts)
        self.module = ExpertParallel(*sizes, mesh, dtype=torch.bfloat16, fp8_dispatch=True, capacity=1)
        if is_fp4:
            both = [quantised(w.to_local().detach(), True) for w in (self.module.gate_up, self.module.down)]
            self.module.frozen = _FP4Experts(*both)
            self.module.gate_up = self.module.down = None
        else:
            own = freeze(self.module).frozen
            both = [(own.gate_up, own.gate_up_scale), (own.down, own.down_scale)]
        self.l1, self.l2 = deep_gemm_ops.transform_weights_for_mega_moe(*both)
        sizes = (layer.num_experts, max_tokens, layer.copies, layer.dim, layer.hidden_dim)
        options: dict[str, Any] = {"mma_type": "fp8xfp4" if is_fp4 else "fp8xfp8", "device": self.device}
        self.buffer = deep_gemm_ops.get_symm_buffer_for_mega_moe(mesh.get_group(), *sizes, **options)
        l2_bytes = timing._l2_bytes() if self.device == "cuda" else 1
        self.flush = torch.ones(l2_bytes, dtype=torch.int32, device=self.device)  # four times the L2

    def gather(self, tensor: Tensor) -> Tensor:
        """That of all ranks, one after the other."""
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def most(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each over the ranks."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def sample_us(self, call: Callable[[], Any], calls: int, is_queued: bool) -> float:
        """Of one call on this rank; infinite where the stream ran dry."""
        dist.barrier()
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if is_queued:
            torch.cuda._sleep(HOLD_US * 2000)  # cycles at 2 GHz or less
        torch.max(self.flush)
        if self.ranks > 1:
            self.buffer.handle.barrier(channel=0)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        is_dry = is_queued and begin.query()
        end.synchronize()
        return math.inf if is_dry else begin.elapsed_time(end) * 1e3 / calls

    def times(
        self, contenders: Mapping[str, Callable[[], Any]], calls: int, waits: Sequence[str], repeats: int
    ) -> dict[str, Any]:
        """Contenders in turns; those that ``waits`` names are not enqueued ahead."""
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(-1, repeats):
            for name, call in contenders.items():
                is_queued = name not in waits
                us = self.sample_us(call, calls if is_queued else 1, is_queued)
                if repeat >= 0:
                    samples[name].append(us)
        summaries = {}
        for name, of_rank in samples.items():
            slowest = [us for us in self.most(of_rank) if us < math.inf]
            if len(slowest) < max(1, repeats // 2):
                raise timing.StarvedQueueError(f"{name}: the host needs more than {HOLD_US / 1e3:.0f} ms for a burst")
            summaries[name] = {"median": statistics.median(slowest), "min": min(slowest), "max": max(slowest)}
        return summaries

    def record(self, tokens: int, repeats: int) -> Record:
        """Check and time ``tokens`` tokens on each rank."""
        layer, module, buffer = self.layer, self.module, self.buffer
        random = torch.Generator(self.device).manual_seed(1 + self.rank)
        options: dict[str, Any] = {"generator": random, "device": self.device}
        x = torch.randn(tokens, layer.dim, **options).bfloat16()
        scores = torch.rand(tokens, layer.num_experts, **options)
        weights, ids = scores.topk(layer.copies)
        first = self.rank * self.local_experts
        own_ids = scores[:, first : first + self.local_experts].topk(layer.copies).indices + first
        per_32: dict[str, Any] = PER_32 if self.is_fp4 else {}
        op = deep_gemm_ops.fp8_fp4_mega_moe if self.is_fp4 else deep_gemm_ops.fp8_mega_moe
        y = torch.empty(tokens, layer.dim, dtype=torch.bfloat16, device=self.device)

        def write(ids: Tensor) -> None:
            values, scales = deep_gemm_ops.per_token_cast_to_fp8(x, **per_32)
            buffer.x.view(torch.uint8)[:tokens].copy_(values.view(torch.uint8))
            buffer.x_sf[:tokens].copy_(scales)
            buffer.topk_idx[:tokens].copy_(ids)
            buffer.topk_weights[:tokens].copy_(weights)

        def kernel() -> Tensor:
            return op(y, self.l1, self.l2, buffer, timeout_ms=20_000)

        def whole() -> Tensor:
            write(ids)
            return kernel()

        def exact() -> Tensor:
            module.capacity = None
            return module(x, ids, weights)

        owners = torch.bincount(ids.flatten() // self.local_experts, minlength=self.ranks)
        capacity = int(self.most([float(owners.max())])[0])

        def of_capacity() -> Tensor:
            module.capacity = capacity
            return module(x, ids, weights)

        every_id = self.gather(ids)
        arriving = int((every_id // self.local_experts == self.rank).sum()) - int(owners[self.rank])
        leaving = tokens * layer.copies - int(owners[self.rank])
        sizes = {"rows_sent": leaving, "rows_received": arriving, "fp8_dispatch": True}
        sent = expert_parallel.traffic(layer, self.ranks, **sizes)
        numbers = self.most([sent.dispatch + sent.combine, arriving + int(owners[self.rank])])
        link_bytes, rows = (int(number) for number in numbers)
        record: Record = {"weights": "FP4" if self.is_fp4 else "FP8", "tokens": tokens, "rows": rows}
        record |= {"link_bytes": link_bytes, "capacity": capacity, "errors": {}, "failed": {}, "times": {}}

        def check(name: str, call: Callable[[], Tensor], expected: Tensor) -> bool:
            verdict = compare(call(), expected, tol=TOLERANCE)
            (record["errors"][name], is_wrong) = self.most([verdict.rel_error, not verdict.ok])
            if is_wrong:
                record["failed"][name] = f"wrong result on some rank; on this one: {verdict.describe()}"
            return not is_wrong

        # A burst is to last some 2 ms, at 1000 TFLOPS or at 3 TB/s of weights.
        busy = min(rows, self.local_experts)
        floor_us = 10 + layer.weights_per_expert * max(2 * rows / 1e9, busy / 3e6)
        calls = max(1, min(10, round(2000 / floor_us)))
        write(ids)
        expected = sent_expected = self.expected(x, every_id, weights)
        if self.is_fp4:  # beside which tokens that arrive in FP8, with a scale per 128, are quantised once more
            arriving_x = reference.dequantize(*deep_gemm_ops.per_token_cast_to_fp8(x), 1, 128).bfloat16()
            sent_expected = self.expected(arriving_x, every_id, weights)
        contenders: dict[str, Callable[[], Any]] = {}
        for name, call, right in (
            ("kernel", kernel, expected),
            ("layer", whole, expected),
            ("exact", exact, sent_expected),
            ("graph", of_capacity, sent_expected),
        ):
            if check(name, call, right):
                contenders[name] = call
        if int(module.num_dropped):
            raise RuntimeError(f"{int(module.num_dropped)} rows were dropped with a capacity of {capacity}")
        graph = None
        if "graph" in contenders and self.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = of_capacity()
            del contenders["graph"]
            graph.replay()
            if check("graph", lambda: result, sent_expected):
                contenders["graph"] = graph.replay
        record["times"] = self.times(contenders, calls, ("exact",), repeats)
        contenders.clear()  # a graph that holds NCCL's operations has to go before the group does
        graph = None
        name = "kernel, own experts"
        write(own_ids)
        if check(name, kernel, self.expected(x, self.gather(own_ids), weights)):
            record["times"] |= self.times({name: kernel}, calls, (), repeats)
        for name in ("kernel", "layer"):
            if name in record["times"]:
                record[f"{name} link GB/s"] = link_bytes / record["times"][name]["median"] * 1e-3
        return record

    def expected(self, x: Tensor, every_id: Tensor, weights: Tensor) -> Tensor:
        """This rank's rows of the reference, to which every rank adds what its experts make of all tokens."""
        values, scales = deep_gemm_ops.per_token_cast_to_fp8(self.gather(x), **(PER_32 if self.is_fp4 else {}))
        first = self.rank * self.local_experts
        y = reference_layer((values, scales, every_id, self.gather(weights)), self.l1, self.l2, first)
        dist.all_reduce(y)
        return y[self.rank * x.shape[0] :][: x.shape[0]]


def table(run: Record) -> str:
    """Markdown."""
    names = ("kernel", "kernel, own experts", "layer", "exact", "graph")
    units = "microseconds, MB that leave a rank by links, the kernel's GB/s"
    lines = [f"{run['ranks']} ranks, {run['device']}: {units}", ""]
    lines += ["| weights | tokens | " + " | ".join(names) + " | link MB | GB/s | exact / layer | graph / layer |"]
    lines += ["|---|" + "---:|" * (len(names) + 5)]
    for record in run["records"]:
        us = {name: record["times"].get(name, {}).get("median", math.nan) for name in names}
        cells = [record["weights"], str(record["tokens"]), *(f"{us[name]:.1f}" for name in names)]
        cells += [f"{record['link_bytes'] / 1e6:.2f}", f"{record['link_bytes'] / us['kernel'] * 1e-3:.0f}"]
        cells += [f"{us[name] / us['layer']:.2f}" for name in ("exact", "graph")]
        lines.append(f"| {' | '.join(cells)} |")
        lines += [f"{name}: {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the records on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32, 512, 8192], help="of each rank")
    parser.add_argument("--weights", choices=("FP8", "FP4"), nargs="*", default=["FP8", "FP4"])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--local-experts", type=int, default=32, help="of each rank")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each measurement")
    parser.add_argument("--cpu", action="store_true", help="the reference, over gloo; its times mean nothing")
    args = parser.parse_args(argv)
    mesh = expert_parallel.join_job("cpu" if args.cpu else "cuda")
    layer = expert_parallel.Layer(args.hidden, args.intermediate, mesh.size() * args.local_experts, args.topk)
    run: Record = {"date": datetime.date.today().isoformat(), "ranks": mesh.size(), "layer": vars(layer)}
    run |= {"device": "CPU" if args.cpu else torch.cuda.get_device_name(), "torch": torch.__version__, "records": []}
    is_first = mesh.get_local_rank() == 0
    with torch.no_grad():
        for weights in args.weights:
            ranks = _Ranks(mesh, layer, weights == "FP4", max(args.tokens))
            for tokens in args.tokens:
                run["records"].append(ranks.record(tokens, args.repeats))
                if is_first and args.json:
                    args.json.write_text(json.dumps(run, indent=1))
            dist.barrier()
            ranks.buffer.destroy()
            del ranks
            torch.cuda.empty_cache()  # symmetric memory comes from elsewhere
    if is_first:
        print(table(run), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
