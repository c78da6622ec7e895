"""A DeepSeek-V3 decoder block with FP8 projections, compiled once for every batch.

The block is multi-head latent attention and a SwiGLU MLP of the shared expert's width. Its seven projections have
DeepSeek-V3's shapes (``--scale 1``; divided on a CPU) and random BF16 weights. They are quantised by
``per_block_cast_to_fp8``, activations by ``per_token_cast_to_fp8``, and the block runs inside
``torch.compile(fullgraph=True, dynamic=True)`` on batches of several sequences packed without padding, as a serving
engine does. What is checked, for every batch:

* nothing is compiled again after the first batch;
* each layer's output, as the compiled graph computed it, against the float64 product of its dequantised operands;
* each layer's output against the unquantised BF16 layer.

On a GPU each layer is also timed against ``torch.matmul`` in BF16, from a CUDA graph.

    python examples/decoder_block.py --help
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fp8_linear import dequantise, pick_device, quantise_linears
from terminal import Checks, Progress, print_table
from torch import nn

import deep_gemm_ops  # noqa: F401  (importing it registers torch.ops.deep_gemm)
from deep_gemm_ops.testing import compare, error_bar

#: Largest relative difference between an FP8 layer and its BF16 original. E4M3 has three mantissa bits: rounding adds
#: about 2.6 % of noise to each operand, 3.7 % to their product.
QUANTISATION_BAR = 0.05
#: The same for the whole block, where the noise of several layers adds up and random attention scores amplify it.
BLOCK_BAR = 0.15

Trace = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> its input [T, K] and its output [T, N]


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Sizes of the block; the defaults are DeepSeek-V3's."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dim: int = 128  # of a head's query and key: the part without position
    rope_dim: int = 64  # and the part with it
    v_dim: int = 128
    mlp: int = 2048

    @staticmethod
    def scaled(divisor: int) -> BlockShape:
        """Hidden size, heads and MLP divided by ``divisor``; latent ranks and head sizes stay as they are."""
        if divisor not in (1, 2, 4, 8, 16):
            raise ValueError(f"scale is {divisor}, expected 1, 2, 4, 8 or 16")
        full = BlockShape()
        return BlockShape(hidden=full.hidden // divisor, heads=full.heads // divisor, mlp=full.mlp // divisor)


class DecoderBlock(nn.Module):
    """Multi-head latent attention and an MLP, both with residuals, on packed sequences."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        s = self.shape = shape
        self.input_norm = nn.RMSNorm(s.hidden)
        self.q_a = nn.Linear(s.hidden, s.q_rank, bias=False)
        self.q_norm = nn.RMSNorm(s.q_rank)
        self.q_b = nn.Linear(s.q_rank, s.heads * (s.nope_dim + s.rope_dim), bias=False)
        self.kv_a = nn.Linear(s.hidden, s.kv_rank + s.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(s.kv_rank)
        self.kv_b = nn.Linear(s.kv_rank, s.heads * (s.nope_dim + s.v_dim), bias=False)
        self.o_proj = nn.Linear(s.heads * s.v_dim, s.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(s.hidden)
        self.gate_up = nn.Linear(s.hidden, 2 * s.mlp, bias=False)
        self.down = nn.Linear(s.mlp, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, position: torch.Tensor, sequence: torch.Tensor) -> tuple[torch.Tensor, Trace]:
        """Run ``T`` packed tokens.

        Args:
            x: ``[T, hidden]`` BF16.
            position: ``[T]`` position of each token in its sequence.
            sequence: ``[T]`` which sequence a token belongs to; tokens of other sequences are not attended to.
        Returns:
            ``[T, hidden]`` BF16, and what went in and came out of each projection.
        """
        s, tokens = self.shape, x.shape[0]
        trace: Trace = {}

        def project(name: str, value: torch.Tensor) -> torch.Tensor:
            result = getattr(self, name)(value)
            trace[name] = (value, result)
            return result

        normed = self.input_norm(x)
        q = project("q_b", self.q_norm(project("q_a", normed)))
        q_nope, q_rope = q.view(tokens, s.heads, -1).split([s.nope_dim, s.rope_dim], -1)
        latent, k_rope = project("kv_a", normed).split([s.kv_rank, s.rope_dim], -1)
        kv = project("kv_b", self.kv_norm(latent))
        k_nope, v = kv.view(tokens, s.heads, -1).split([s.nope_dim, s.v_dim], -1)

        k_rope = rotate(k_rope[:, None], position).expand(-1, s.heads, -1)  # one for all heads
        q = torch.cat((q_nope, rotate(q_rope, position)), -1).transpose(0, 1)
        k = torch.cat((k_nope, k_rope), -1).transpose(0, 1)
        visible = (sequence[:, None] == sequence) & (position[:, None] >= position)
        # Written out: scaled_dot_product_attention looks at sizes to choose a kernel, which may tie a graph to them.
        scores = (q * (s.nope_dim + s.rope_dim) ** -0.5) @ k.transpose(1, 2)
        share = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
        attended = share.to(v.dtype) @ v.transpose(0, 1)
        x = x + project("o_proj", attended.transpose(0, 1).reshape(tokens, -1))

        gate, up = project("gate_up", self.mlp_norm(x)).chunk(2, -1)
        return x + project("down", F.silu(gate) * up), trace


LAYERS = ("q_a", "q_b", "kv_a", "kv_b", "o_proj", "gate_up", "down")


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[T, heads, rope_dim]``."""
    half = x.shape[-1] // 2
    frequency = torch.arange(half, device=x.device, dtype=torch.float32).mul(-math.log(10000.0) / half).exp()
    angle = (position[:, None].float() * frequency)[:, None]
    first, second = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def make_block(shape: BlockShape, device: torch.device, seed: int) -> DecoderBlock:
    """A BF16 block with random weights whose output rows differ in size, as those of trained layers do."""
    with torch.device("meta"):
        block = DecoderBlock(shape).to(torch.bfloat16)
    block = block.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for module in block.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5, generator=generator)
            rows = torch.empty(module.out_features, 1, device=device).normal_(std=0.5, generator=generator).exp_()
            module.weight.mul_(rows)
    return block


def make_batch(
    tokens: int, shape: BlockShape, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tokens`` tokens of sequences of uneven length: the arguments of :class:`DecoderBlock`."""
    generator = torch.Generator().manual_seed(seed * 1000003 + tokens)
    ends = torch.randperm(tokens - 1, generator=generator)[: tokens // 24] + 1 if tokens > 1 else torch.empty(0)
    starts = torch.cat((torch.zeros(1), ends.float())).sort().values.long()
    index = torch.arange(tokens)
    sequence = torch.searchsorted(starts, index, right=True) - 1
    position = index - starts[sequence]
    x = torch.randn(tokens, shape.hidden, generator=generator)
    return x.bfloat16().to(device), position.to(device), sequence.to(device)


def pick_backend(device: torch.device) -> tuple[str, str]:
    """``inductor`` where it works; it needs a C++ compiler and Python's headers. Otherwise ``aot_eager``, and why."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        torch._dynamo.reset()
        return "aot_eager", f"Inductor does not work here ({type(error).__name__}), compiled by aot_eager instead"
    return "inductor", "compiled by Inductor"


@dataclasses.dataclass
class LayerResult:
    """Worst figures of one layer over all batches."""

    name: str
    n: int
    k: int
    error: float = 0.0  # relative Frobenius error against the float64 product of the dequantised operands
    tile_error: float = 0.0  # the same of the worst 64 x 64 tile
    bf16_difference: float = 0.0  # relative difference from the unquantised BF16 layer


def check_layers(
    results: dict[str, LayerResult], trace: Trace, bf16: DecoderBlock, fp8: nn.Module, checks: Checks
) -> None:
    """Check every layer of one batch and fold what was found into ``results``."""
    for name, (x, y) in trace.items():
        layer, original, result = getattr(fp8, name), getattr(bf16, name), results[name]
        operand = dequantise(*torch.ops.deep_gemm.per_token_cast_to_fp8(x), gran_mn=1)
        expected = operand @ dequantise(layer.weight, layer.weight_sf, gran_mn=128).T
        found = compare(y, expected, tol=error_bar(y.dtype))
        checks.expect(found.ok, f"{name} with {x.shape[0]} tokens: {found.describe()}")
        difference = relative(y, original(x))
        checks.expect(
            difference <= QUANTISATION_BAR,
            f"{name} with {x.shape[0]} tokens differs from BF16 by {difference:.4f}, allowed {QUANTISATION_BAR}",
        )
        result.error = max(result.error, found.rel_error)
        result.tile_error = max(result.tile_error, found.worst_tile_error)
        result.bf16_difference = max(result.bf16_difference, difference)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius difference."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def time_graph(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds of one call: all ``calls`` in one CUDA graph, which is replayed between two events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (replays * len(calls))


Timing = dict[str, float | str | int]


def time_layer(name: str, tokens: int, bf16: DecoderBlock, fp8: nn.Module) -> Timing:
    """Time one layer on ``tokens`` tokens: the cast, the FP8 product, and the BF16 product it replaces."""
    layer, original = getattr(fp8, name), getattr(bf16, name)
    n, k = layer.weight.shape
    # Enough copies of the weight that none is still in the L2 cache when its turn comes again.
    copies = max(4, math.ceil(2**28 / layer.weight.numel()))
    x = torch.randn(tokens, k, device=layer.weight.device, dtype=torch.bfloat16)
    y = torch.empty(tokens, n, device=x.device, dtype=torch.bfloat16)
    a, sfa = torch.ops.deep_gemm.per_token_cast_to_fp8(x)
    weights = [layer.weight.clone() for _ in range(copies)]
    fp8_us = time_graph(
        [lambda w=w: torch.ops.deep_gemm.fp8_gemm_nt.out(a, sfa, w, layer.weight_sf, out=y) for w in weights]
    )
    weights = [original.weight.clone().t() for _ in range(copies)]
    bf16_us = time_graph([lambda w=w: torch.matmul(x, w, out=y) for w in weights])
    cast_us = time_graph([lambda: torch.ops.deep_gemm.per_token_cast_to_fp8(x)] * 20)
    return {"layer": name, "tokens": tokens, "n": n, "k": k, "cast_us": cast_us, "fp8_us": fp8_us, "bf16_us": bf16_us}


def time_layers(bf16: DecoderBlock, fp8: nn.Module, token_counts: Sequence[int]) -> list[Timing]:
    """Time each layer at each token count."""
    timings, progress = [], Progress("timing")
    for tokens in token_counts:
        for name in LAYERS:
            timings.append(time_layer(name, tokens, bf16, fp8))
            progress.update(len(timings) / (len(token_counts) * len(LAYERS)), f"{name}, {tokens} tokens")
    progress.close()
    return timings


def print_timings(timings: Sequence[Timing]) -> None:
    """Print what :func:`time_layers` measured."""
    rows = []
    for t in timings:
        flops = 2.0 * t["tokens"] * t["n"] * t["k"]
        rows.append(
            [
                str(t["layer"]),
                str(t["tokens"]),
                f"{t['n']} x {t['k']}",
                f"{t['cast_us']:.1f}",
                f"{t['fp8_us']:.1f}",
                f"{t['bf16_us']:.1f}",
                f"{flops / t['fp8_us'] / 1e6:.0f}",
                f"{t['bf16_us'] / t['fp8_us']:.2f}",
                f"{t['bf16_us'] / (t['fp8_us'] + t['cast_us']):.2f}",
            ]
        )
    header = ["layer", "tokens", "N x K", "cast us", "FP8 us", "BF16 us", "FP8 TFLOPS", "BF16/FP8", "with the cast"]
    print_table(header, rows)


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the example. Returns its results; ``results["failures"]`` lists the checks that failed."""
    parser = argparse.ArgumentParser(description="DeepSeek-V3's decoder block with FP8 projections under torch.compile")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scale", type=int, help="divide hidden size, heads and MLP (default: 1 on a GPU, 4 on a CPU)")
    parser.add_argument("--tokens", type=int, nargs="+", help="batches to run, in tokens, two or more each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, no timing; for tests")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args(argv)

    device, why = pick_device(args.device)
    on_gpu = device.type == "cuda"
    scale = args.scale or (16 if args.quick else 1 if on_gpu else 4)
    token_counts = args.tokens or ([19, 40, 6] if args.quick else [128, 64, 1000, 4096] if on_gpu else [64, 33, 7, 128])
    if min(token_counts) < 2:
        # PyTorch compiles a size of one separately, whatever runs inside; that is no property of these operators.
        parser.error("--tokens: expected two or more in each batch")
    shape = BlockShape.scaled(scale)
    print(f"Decoder block, hidden {shape.hidden}, {shape.heads} heads. {why}.")

    bf16 = make_block(shape, device, args.seed)
    fp8 = quantise_linears(copy.deepcopy(bf16))
    results = {name: LayerResult(name, *getattr(bf16, name).weight.shape) for name in LAYERS}
    checks = Checks()
    backend, backend_note = pick_backend(device)
    compiled = torch.compile(fp8, fullgraph=True, dynamic=True, backend=backend)

    block_difference = 0.0
    progress = Progress("running")
    with torch.no_grad():
        progress.update(0.0, "compiling")
        compiled(*make_batch(token_counts[0], shape, device, args.seed))
        # From here on a compilation is an error, so that finishing the loop proves there was none.
        with torch.compiler.set_stance("fail_on_recompile"):
            for index, tokens in enumerate(token_counts):
                progress.update((index + 0.5) / len(token_counts), f"{tokens} tokens")
                batch = make_batch(tokens, shape, device, args.seed + 1)
                y, trace = compiled(*batch)
                check_layers(results, trace, bf16, fp8, checks)
                block_difference = max(block_difference, relative(y, bf16(*batch)[0]))
        progress.close()
    checks.expect(
        block_difference <= BLOCK_BAR, f"the block differs from BF16 by {block_difference:.4f}, allowed {BLOCK_BAR}"
    )

    listed = ", ".join(map(str, token_counts))
    print(f"One graph ({backend_note}), batches of {listed} tokens: no recompilation.")
    rows = [
        [r.name, f"{r.n} x {r.k}", f"{r.error:.2e}", f"{r.tile_error:.2e}", f"{r.bf16_difference:.4f}"]
        for r in results.values()
    ]
    print_table(["layer", "N x K", "error (float64)", "worst tile", "vs BF16 layer"], rows)
    print(f"The whole block differs from the BF16 block by {block_difference:.4f} (relative, worst batch).")

    timings = []
    if on_gpu and not args.quick:
        with torch.no_grad():
            timings = time_layers(bf16, fp8, sorted(token_counts))
        print_timings(timings)
    print(checks.summary("Decoder block"))
    outcome = {
        "device": str(device),
        "backend": backend,
        "shape": dataclasses.asdict(shape),
        "tokens": token_counts,
        "layers": [dataclasses.asdict(result) for result in results.values()],
        "block_difference": block_difference,
        "timings": timings,
        "failures": checks.failures,
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(outcome, file, indent=1)
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main()["failures"] else 0)
