"""Continuous-batching decode from one CUDA graph: dense, masked-grouped and paged-logits operators, captured once.

A decoder with sparse attention and experts, in the manner of DeepSeek-V3.2, with random weights. A step takes one token
of each of several sequences. In each layer a lightning indexer scores all cached keys of a sequence
(``fp8_paged_mqa_logits`` on blocks of a cache), attention looks at the best of them, and each token visits two experts
(``m_grouped_fp8_gemm_nt_masked``: a fixed room for each expert, counts on the device). Everything else is FP8 linear
layers. Requests come and go: when one is finished another takes its slot, with other blocks and from length 0. So
lengths, block tables and experts' counts differ from one replay to the next, and no kernel is chosen or compiled again.

The same plan of requests runs four times, from an empty cache:

* eagerly: the reference for what follows, which is fed the same tokens;
* from a graph that ``torch.cuda.graph`` captured: the same bits;
* compiled by ``torch.compile(mode="reduce-overhead")``, which captures graphs, too: the same up to rounding;
* with plain PyTorch products of the unquantised weights, in FP32 and without the library: what FP8 costs.

On a machine without a GPU there is nothing to capture. Then the step runs eagerly and compiled on the CPU reference, at
a small size.

    python examples/serve_decode.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from decoder_block import pick_backend, relative
from fp8_linear import pick_device
from terminal import Checks, Progress, print_table
from torch import nn

import deep_gemm_ops
from deep_gemm_ops.nn import FP8Linear, freeze

BLOCK_KEYS = 64  # of a block of the caches
VOCABULARY = 256  # bytes
#: Largest relative difference of all logits: of compiled code, in which a rounding turns out otherwise here and there,
#: and of FP8 from plain FP32.
COMPILED_BAR, FP8_BAR = 0.05, 0.15


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; ``keys`` is how many attention looks at, ``context`` how many a sequence may have."""

    dim: int
    layers: int
    heads: int
    head_dim: int
    index_heads: int
    index_dim: int
    experts: int
    hidden: int
    keys: int
    context: int
    sequences: int
    steps: int


CPU = Config(256, 2, 4, 64, 8, 64, 8, 128, keys=24, context=128, sequences=4, steps=100)
GPU = Config(2048, 4, 16, 128, 64, 128, 64, 1024, keys=512, context=4096, sequences=32, steps=600)
QUICK = dataclasses.replace(CPU, dim=128, heads=2, hidden=64, experts=4, keys=8, steps=70)


class Layer(nn.Module):
    """Indexer, attention to the keys it has chosen, experts; each with its cache or weights in FP8."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.attention_norm, self.expert_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        self.sizes = [c.heads * c.head_dim, 2 * c.head_dim, c.index_heads * c.index_dim, c.index_dim, c.index_heads]
        self.project = FP8Linear(c.dim, sum(self.sizes), bias=False)
        self.out = FP8Linear(c.heads * c.head_dim, c.dim, bias=False)
        self.router = nn.Linear(c.dim, c.experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(c.experts, 2 * c.hidden, c.dim) / c.dim**0.5)
        self.down = nn.Parameter(torch.randn(c.experts, c.dim, c.hidden) / c.hidden**0.5)
        blocks = c.sequences * c.context // BLOCK_KEYS
        # A block of the indexer's cache holds all its keys and then all their scales.
        index_cache = torch.zeros(blocks, BLOCK_KEYS, 1, c.index_dim + 4, dtype=torch.uint8)
        self.register_buffer("index_cache", index_cache, persistent=False)
        self.register_buffer("cache", torch.zeros(blocks * BLOCK_KEYS, 2, c.head_dim), persistent=False)

    def quantise(self) -> None:
        """Replace the experts' weights by FP8; ``freeze`` does it for the linear layers."""
        for name in ("gate_up", "down"):
            weight = getattr(self, name).detach()
            pairs = [deep_gemm_ops.per_block_cast_to_fp8(w) for w in weight]
            delattr(self, name)
            for suffix, tensors in (("", [v for v, _ in pairs]), ("_scale", [s for _, s in pairs])):
                self.register_buffer(name + suffix, torch.stack(tensors))

    def forward(self, x: torch.Tensor, s: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """``[sequences, dim]`` and how many tokens each expert got."""
        c = self.config
        q, kv, index_q, index_k, index_weights = self.project(self.attention_norm(x)).split(self.sizes, dim=1)
        self.cache.index_copy_(0, s.slot, kv.view(-1, 2, c.head_dim).to(self.cache.dtype))
        scores = self.score(index_q.reshape(-1, c.index_dim), index_k, index_weights.float(), s)
        best, place = scores.topk(c.keys, dim=1)
        blocks = s.block_table.gather(1, place // BLOCK_KEYS).long()
        k, v = self.cache[blocks * BLOCK_KEYS + place % BLOCK_KEYS].unbind(2)
        q = q.view(-1, c.heads, c.head_dim) * c.head_dim**-0.5
        share = (q @ k.transpose(1, 2)).masked_fill((best == -torch.inf)[:, None], -torch.inf).softmax(-1)
        x = x + self.out((share @ v).flatten(1))

        h = self.expert_norm(x)
        weights, ids = self.router(h).softmax(-1).topk(2)
        chosen = ids.flatten()[:, None] == torch.arange(c.experts, device=ids.device)
        counts = chosen.sum(0, dtype=torch.int32)
        row = (chosen.cumsum(0) - 1).gather(1, ids.flatten()[:, None]).view_as(ids)
        # Room for every token at each expert; what lies behind an expert's count is never read.
        rows = h.new_zeros(c.experts, c.sequences, c.dim).index_put((ids, row), h[:, None].expand(-1, 2, -1))
        y = self.experts(rows, counts)[ids, row]
        return x + (y * weights[:, :, None].to(y.dtype)).sum(1), counts

    def score(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, s: Step) -> torch.Tensor:
        """The indexer's scores ``[sequences, context]``, -inf behind a sequence's length; its cache gets ``k``."""
        c = self.config
        q8, q_scale = deep_gemm_ops.per_token_cast_to_fp8(q)
        k8, k_scale = deep_gemm_ops.per_token_cast_to_fp8(k)
        data = torch.cat((k8.view(torch.uint8), k_scale.reshape(-1).view(torch.uint8).view(-1, 4)), dim=1)
        block, key = s.slot // BLOCK_KEYS, s.slot % BLOCK_KEYS
        start = block * BLOCK_KEYS * (c.index_dim + 4)
        values = (start + key * c.index_dim)[:, None] + torch.arange(c.index_dim, device=q.device)
        scales = (start + BLOCK_KEYS * c.index_dim + key * 4)[:, None] + torch.arange(4, device=q.device)
        self.index_cache.view(-1).index_copy_(0, torch.cat((values, scales), dim=1).flatten(), data.flatten())
        q8 = q8.view(-1, 1, c.index_heads, c.index_dim)
        weights = weights * q_scale.reshape(-1, c.index_heads)
        arguments = (s.lengths, s.block_table, s.schedule, c.context)
        return deep_gemm_ops.fp8_paged_mqa_logits(q8, self.index_cache, weights, *arguments, clean_logits=True)

    def experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``[experts, rows, dim]`` to the same; rows behind an expert's count hold anything."""
        shape, expected = rows.shape[:2], 2 * rows.shape[1] // rows.shape[0] + 1
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(rows.flatten(0, 1))
        first = (a.unflatten(0, shape), sfa.unflatten(0, shape), self.gate_up, self.gate_up_scale)
        hidden = deep_gemm_ops.m_grouped_fp8_gemm_nt_masked(*first, counts, expected)
        a, sfa = deep_gemm_ops.swiglu_cast_to_fp8(hidden.flatten(0, 1))
        second = (a.unflatten(0, shape), sfa.unflatten(0, shape), self.down, self.down_scale)
        return deep_gemm_ops.m_grouped_fp8_gemm_nt_masked(*second, counts, expected).to(rows.dtype)


class PlainLayer(Layer):
    """The same of PyTorch's own operations on unquantised weights and keys."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.register_buffer("index_cache", torch.zeros(self.cache.shape[0], c.index_dim), persistent=False)

    def score(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, s: Step) -> torch.Tensor:
        c = self.config
        self.index_cache.index_copy_(0, s.slot, k)
        keys = self.index_cache.view(-1, BLOCK_KEYS, c.index_dim)[s.block_table.long()].flatten(1, 2)
        scores = (F.relu(q.view(-1, c.index_heads, c.index_dim) @ keys.transpose(1, 2)) * weights[:, :, None]).sum(1)
        return scores.masked_fill(torch.arange(c.context, device=q.device) >= s.lengths[:, None], -torch.inf)

    def experts(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down.transpose(1, 2)


@dataclasses.dataclass
class Step:
    """What all layers of a step share; all of it on the device."""

    slot: torch.Tensor  # int64 [sequences]: where in the caches the new token's keys go
    lengths: torch.Tensor  # int32 [sequences], the new token included
    block_table: torch.Tensor  # int32 [sequences, blocks]
    schedule: torch.Tensor


class Decoder(nn.Module):
    """One step of decoding: a token of each sequence to the logits of the next."""

    def __init__(self, c: Config, layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(VOCABULARY, c.dim)
        self.layers = nn.ModuleList(layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, VOCABULARY, bias=False)
        self.num_ctas = max(deep_gemm_ops.get_num_sms(), 1)

    def forward(
        self, tokens: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[sequences, 256]`` and counts ``[layers, experts]``. ``lengths`` are those before this token."""
        block = block_table.gather(1, (lengths // BLOCK_KEYS).long()[:, None]).squeeze(1)
        lengths, slot = lengths + 1, (block * BLOCK_KEYS + lengths % BLOCK_KEYS).long()
        schedule = deep_gemm_ops.get_paged_mqa_logits_metadata(lengths, BLOCK_KEYS, self.num_ctas)
        shared, x, counts = Step(slot, lengths, block_table, schedule), self.embedding(tokens), []
        for layer in self.layers:
            x, count = layer(x, shared)
            counts.append(count)
        return self.head(self.norm(x)).float(), torch.stack(counts)

    def clear(self) -> None:
        """Empty the caches."""
        for layer in self.layers:
            layer.cache.zero_()
            layer.index_cache.zero_()


@dataclasses.dataclass
class Plan:
    """What arrives when, for every step: the scheduler's side of a server, made up beforehand."""

    prompts: torch.Tensor  # int64 [steps, sequences]: the next byte of a prompt, -1 where the model goes on by itself
    lengths: torch.Tensor  # int32 [steps, sequences], before the step
    block_tables: torch.Tensor  # int32 [steps, sequences, blocks]

    @staticmethod
    def make(c: Config, seed: int) -> Plan:
        """Requests of random lengths; a slot's next one gets another slot's former blocks."""
        random = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=random))

        per_sequence = c.context // BLOCK_KEYS
        prompts = torch.full((c.steps, c.sequences), -1)
        lengths = torch.zeros(c.steps, c.sequences, dtype=torch.int32)
        tables = torch.zeros(c.steps, c.sequences, per_sequence, dtype=torch.int32)
        table = torch.randperm(c.sequences * per_sequence, generator=random).view(c.sequences, per_sequence)
        for sequence in range(c.sequences):
            step = 0
            while step < c.steps:
                # The first slot has one long request, whose keys take more than one block.
                total = min(draw(c.steps // 4, c.steps) if sequence else c.steps, c.context)
                prompt = draw(1, max(total // 2, 2))
                for i in range(min(total, c.steps - step)):
                    lengths[step + i, sequence] = i
                    if i < prompt:
                        prompts[step + i, sequence] = draw(0, VOCABULARY)
                step += total
        for step in range(c.steps):
            for sequence in range(c.sequences) if step else ():
                if lengths[step, sequence] == 0:  # a new request: its blocks in another order
                    table[sequence] = table[sequence][torch.randperm(per_sequence, generator=random)]
            tables[step] = table
        return Plan(prompts, lengths, tables)


@dataclasses.dataclass
class Run:
    """What came out, on the CPU."""

    logits: torch.Tensor  # [steps, sequences, 256]
    tokens: torch.Tensor  # [steps, sequences]: what each step was fed
    counts: torch.Tensor  # [steps, layers, experts]
    step_us: float


Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def serve(model: Decoder, function: Function, plan: Plan, tokens: torch.Tensor | None = None) -> Run:
    """Decode the plan with ``function``, one form of ``model``; the host never waits inside the loop.

    ``tokens``: what to feed it, instead of what it chooses.
    """
    model.clear()
    device = model.head.weight.device
    prompts, lengths, tables = (t.to(device) for t in (plan.prompts, plan.lengths, plan.block_tables))
    given = None if tokens is None else tokens.to(device)
    chosen, fed, logits, counts = torch.zeros_like(prompts[0]), [], [], []
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for step in range(len(prompts)):
        fed.append(torch.where(prompts[step] < 0, chosen, prompts[step]) if given is None else given[step])
        step_logits, step_counts = function(fed[-1], lengths[step], tables[step])
        chosen = step_logits.argmax(1)
        # A graph's results lie where the next replay writes its own.
        logits.append(step_logits.clone())
        counts.append(step_counts.clone())
    synchronize()
    us = (time.perf_counter() - start) / len(prompts) * 1e6
    return Run(torch.stack(logits).cpu(), torch.stack(fed).cpu(), torch.stack(counts).cpu(), us)


@torch.no_grad()
def capture(model: Decoder, plan: Plan) -> Function:
    """``model``'s step as a CUDA graph; a call copies its arguments to where the graph reads them, and replays it."""
    device = model.head.weight.device
    inputs = [t[0].to(device).clone() for t in (plan.prompts.clamp(min=0), plan.lengths, plan.block_tables)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(*inputs)  # warm up, outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(*inputs)

    def replay(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for source, target in zip(arguments, inputs):
            target.copy_(source)
        graph.replay()
        return outputs

    return replay


def build(c: Config, device: torch.device, seed: int) -> tuple[Decoder, Decoder]:
    """The model in FP8, and the same weights in FP32 with plain products."""
    models = []
    for layer in (Layer, PlainLayer):
        torch.manual_seed(seed)
        with device:  # weights of this size are drawn and quantised there
            models.append(Decoder(c, layer))
    fp8, plain = models
    if device.type == "cuda":
        fp8 = fp8.bfloat16()
    plain.load_state_dict(fp8.state_dict())
    for module in plain.modules():
        if type(module) is FP8Linear:
            module.__class__ = nn.Linear
    fp8 = freeze(fp8)
    for layer in fp8.layers:
        layer.quantise()
    return fp8.eval(), plain.eval()


def compiled_function(model: Decoder, device: torch.device, backend: str) -> Function:
    """``torch.compile``, which captures graphs of its own on a GPU."""
    if device.type != "cuda":
        return torch.compile(model, fullgraph=True, backend=backend)
    return torch.compile(model, fullgraph=True, mode="reduce-overhead")


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the example. Returns its results; ``results["failures"]`` lists the checks that failed."""
    parser = argparse.ArgumentParser(description="decoding with changing requests from one captured graph")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, help="of decoding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; for tests")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args(argv)

    device, why = pick_device(args.device)
    on_gpu = device.type == "cuda"
    config = QUICK if args.quick else GPU if on_gpu else CPU
    if args.steps:
        config = dataclasses.replace(config, steps=args.steps)
    print(f"Decoding {config.sequences} sequences, {config.layers} layers of {config.experts} experts. {why}.")
    if not on_gpu:
        print("No CUDA graph is captured: the step runs eagerly and compiled.")
    model, plain = build(config, device, args.seed)
    plan, checks, progress = Plan.make(config, args.seed), Checks(), Progress("decoding")

    progress.update(0.0, "eagerly")
    eager = serve(model, model, plan)
    runs = {"eager": eager}
    backend, note = ("inductor", "mode=reduce-overhead") if on_gpu else pick_backend(device)
    if args.quick and not on_gpu:
        backend, note = "aot_eager", "compiled by aot_eager"
    if on_gpu:
        progress.update(0.25, "captured")
        runs["captured"] = serve(model, capture(model, plan), plan, eager.tokens)
        checks.expect(torch.equal(runs["captured"].logits, eager.logits), "the captured graph gives other bits")
    progress.update(0.5, "compiled")
    torch._dynamo.utils.counters.clear()
    function = compiled_function(model, device, backend)
    with torch.no_grad():
        for _ in range(3):  # compile, record, replay
            function(eager.tokens[0].to(device), plan.lengths[0].to(device), plan.block_tables[0].to(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        runs["compiled"] = serve(model, function, plan, eager.tokens)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    checks.expect(skipped == 0, f"torch.compile captured no graph for {skipped} of its functions")
    progress.update(0.75, "with plain products")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    runs["plain FP32"] = serve(plain, plain, plan, eager.tokens)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    progress.close()

    differences = {name: relative(run.logits, eager.logits) for name, run in runs.items()}
    for name, bar in (("compiled", COMPILED_BAR), ("plain FP32", FP8_BAR)):
        checks.expect(differences[name] <= bar, f"{name}: logits differ by {differences[name]:.4f}, allowed {bar}")
    checks.expect(bool(eager.logits.isfinite().all()), "logits are not finite")

    loads = eager.counts.flatten(0, 1)
    started = int((plan.lengths == 0).sum())
    print(
        f"{config.steps} steps, {started} requests, lengths from 1 to {int(plan.lengths.max()) + 1}; an expert got "
        f"{int(loads.min())} to {int(loads.max())} tokens of a step."
    )
    header = ["step", "relative difference from eager"] + (["us per step"] if on_gpu else [])
    rows = [
        [f"compiled ({note})" if name == "compiled" else name, f"{differences[name]:.2e}"]
        + ([f"{run.step_us:.0f}"] if on_gpu else [])
        for name, run in runs.items()
    ]
    print_table(header, rows)
    print(checks.summary("Decoding"))
    outcome = {
        "device": str(device),
        "config": dataclasses.asdict(config),
        "backend": backend,
        "requests": started,
        "loads": [int(loads.min()), int(loads.max())],
        "lengths": [1, int(plan.lengths.max()) + 1],
        "differences": differences,
        "step_us": {name: run.step_us for name, run in runs.items()} if on_gpu else {},
        "failures": checks.failures,
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(outcome, file, indent=1)
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main()["failures"] else 0)
