"""A byte-level language model trained twice from the same seed, in BF16 and in FP8: the same loss, shown as a plot.

Two architectures: ``dense``, the transformer of ``byte_lm.py``, and ``moe``, the same with eight experts in place of
each MLP, of which every token visits two. In FP8 every linear layer inside the blocks, routers apart, is an
``FP8Linear``, and experts are ``GroupedExperts``: forward, input and weight gradients run on the ``deep_gemm``
operators. In BF16 they are PyTorch's own, under autocast. Text, batches, initial weights, optimizers and learning rates
are the same. The text is the source code of Python's standard library, see ``byte_lm.py``.

What is checked: the model has learnt more than how often each byte occurs, and FP8's final losses, on the last tenth of
the training steps and on held-out text, are within 1 % of BF16's. At size ``tiny`` it is 2 %: after sixty steps the
loss still falls by half a per cent a step, and two runs that round differently are a few steps apart.

    python examples/train_fp8.py --help
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from html import escape

import torch
import torch.nn.functional as F
from byte_lm import QUICK, Block, ByteLM, Config, byte_entropy, held_out_bits, read_text, train
from fp8_linear import pick_device
from terminal import Checks, print_table
from torch import nn

from deep_gemm_ops.nn import FP8Linear, GroupedExperts, convert

EXPERTS, EXPERTS_PER_TOKEN = 8, 2
#: (model, training steps, largest relative change of a loss through FP8): for tests, for a CPU, for a GPU.
SIZES = {
    "tiny": (QUICK, 60, 0.02),
    "small": (Config(dim=192, layers=4, heads=3, context=128, batch=16), 300, 0.01),
    "gpu": (Config(dim=1024, layers=8, heads=16, context=1024, batch=16), 600, 0.01),  # reads the text once
}


class PlainExperts(GroupedExperts):
    """The same experts with PyTorch's grouped product in BF16."""

    def experts(
        self, rows: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        gate_up, down = (weight.bfloat16().transpose(1, 2) for weight in (self.gate_up, self.down))
        gate, up = F.grouped_mm(rows.bfloat16(), gate_up, offs=offsets).chunk(2, dim=1)
        hidden = F.silu(gate) * up
        if row_weights is not None:
            hidden = hidden * row_weights[:, None].to(hidden.dtype)
        return F.grouped_mm(hidden, down, offs=offsets)


class ExpertBlock(Block):
    """A block whose MLP is a mixture of experts; a token's two experts have about the MLP's arithmetic together."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.up, self.down
        self.router = nn.Linear(config.dim, EXPERTS, bias=False)
        # Three matrices per expert stand for two: 2 * 3 * (4 / 3) = 2 * 4.
        self.experts = PlainExperts(config.dim, 4 * config.dim // 3 // 16 * 16, EXPERTS)
        nn.init.zeros_(self.experts.down)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).float().sigmoid()
        weights, ids = scores.topk(EXPERTS_PER_TOKEN, dim=-1)
        return self.experts(x, ids, weights / weights.sum(-1, keepdim=True))


def to_fp8(model: ByteLM) -> ByteLM:
    """Turn a model's blocks to FP8, in place. The head stays, and routers, whose few outputs decide a lot."""
    convert(model, lambda _, name: name.startswith("blocks.") and not name.endswith(".router"))
    for module in model.modules():
        if type(module) is PlainExperts:
            module.__class__ = GroupedExperts
    return model


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` in all."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def plot(results: dict[str, dict], title: str) -> str:
    """Loss curves as an SVG: a panel for each architecture, BF16 below FP8."""
    width, panel, left, top, colors = 860, 260, 56, 40, {"bf16": "#4269d0", "fp8": "#ff725c"}
    height = top + panel * len(results) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="20" font-size="13">{escape(title)}</text>',
    ]
    for index, (name, result) in enumerate(results.items()):
        window = max(1, len(result["bf16"]["bits"]) // 50)
        curves = {kind: smooth(result[kind]["bits"], window) for kind in colors}
        low = math.floor(min(map(min, curves.values())))
        high = math.ceil(max(map(max, curves.values())))
        y0, y1 = top + panel * index + 24, top + panel * (index + 1) - 30
        x1, steps = width - 16, len(curves["bf16"])
        out.append(f'<text x="{left}" y="{y0 - 8}">{escape(name)}: training loss, bits per byte</text>')
        for mark in range(low, high + 1):
            y = y1 - (y1 - y0) * (mark - low) / (high - low)
            out.append(f'<line x1="{left}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>')
        for line, (kind, color) in enumerate(colors.items()):
            curve = curves[kind]
            points = " ".join(
                f"{left + (x1 - left) * i / max(1, steps - 1):.1f},{y1 - (y1 - y0) * (value - low) / (high - low):.1f}"
                for i, value in enumerate(curve)
            )
            dash = ' stroke-dasharray="5 4"' if kind == "fp8" else ""
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"{dash}/>')
            text = f"{kind.upper()}: {result[kind]['final_bits']:.4f}, held out {result[kind]['held_out_bits']:.4f}"
            y = y0 + 16 + 16 * line
            out.append(f'<text x="{x1 - 8}" y="{y}" text-anchor="end" fill="{color}">{escape(text)}</text>')
        out.append(f'<text x="{left}" y="{y1 + 16}">step 0</text>')
        out.append(f'<text x="{x1}" y="{y1 + 16}" text-anchor="end">step {steps}</text>')
    return "\n".join(out) + "\n</svg>\n"


def run(
    model: ByteLM, label: str, args: argparse.Namespace, steps: int, texts: Sequence[torch.Tensor], device: torch.device
) -> dict:
    """Train one model; returns its losses and time."""
    losses: list[torch.Tensor] = []
    start = time.monotonic()
    train(model, texts[0], math.inf, steps, args.seed, device, f"training, {label}", losses)
    seconds = time.monotonic() - start
    bits = [float(loss) / math.log(2) for loss in losses]
    model.eval()
    with torch.autocast(device.type, torch.bfloat16):
        held_out = held_out_bits(model, texts[1], args.eval_bytes, device, f"held-out loss, {label}")
    last = bits[-max(1, steps // 10) :]
    return {"bits": bits, "final_bits": sum(last) / len(last), "held_out_bits": held_out, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the example. Returns its results; ``results["failures"]`` lists the checks that failed."""
    parser = argparse.ArgumentParser(description="a byte-level language model trained in BF16 and in FP8")
    parser.add_argument("--size", choices=SIZES, help="model and number of steps (default: gpu on a GPU, else small)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", choices=("dense", "moe"), help="one of the two architectures")
    parser.add_argument("--steps", type=int, help="training steps, instead of the size's")
    parser.add_argument("--eval-bytes", type=int, default=65536, help="held-out bytes to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of both models")
    parser.add_argument("--plot", help="write the loss curves to this SVG file")
    parser.add_argument("--json", help="also write the results, every step's loss included, to this file")
    args = parser.parse_args(argv)

    device, why = pick_device(args.device)
    config, steps, bar = SIZES[args.size or ("gpu" if device.type == "cuda" else "small")]
    steps = args.steps or steps
    text, held_out, *_ = read_text()
    entropy = byte_entropy(held_out)
    print(f"Byte-level language models, {steps} steps of {config.batch * config.context} bytes. {why}.")

    checks, results = Checks(), {}
    for name, block in (("dense", Block), ("moe", ExpertBlock)):
        if args.only in (None, name):
            torch.manual_seed(args.seed)
            with device:
                bf16 = ByteLM(config, block)
            fp8 = to_fp8(copy.deepcopy(bf16))
            counts = [sum(isinstance(module, kind) for module in fp8.modules()) for kind in (FP8Linear, GroupedExperts)]
            result = {"parameters": sum(p.numel() for p in fp8.parameters()), "fp8_modules": sum(counts)}
            print(
                f"{name}: {result['parameters'] / 1e6:.2f} million parameters; {counts[0]} FP8Linear, {counts[1]} MoE"
            )
            for kind, model in (("bf16", bf16), ("fp8", fp8)):
                if args.compile:
                    for layer in model.blocks:
                        layer.compile(fullgraph=True)
                result[kind] = run(model, f"{name}, {kind.upper()}", args, steps, (text, held_out), device)
            results[name] = result

    rows = []
    for name, result in results.items():
        for what in ("final_bits", "held_out_bits"):
            bf16_bits, fp8_bits = result["bf16"][what], result["fp8"][what]
            change = fp8_bits / bf16_bits - 1
            words = "training, last tenth" if what == "final_bits" else "held out"
            rows.append([name, words, f"{bf16_bits:.4f}", f"{fp8_bits:.4f}", f"{change:+.2%}"])
            checks.expect(abs(change) <= bar, f"{name}: FP8 changes the {words} loss by {change:+.2%}")
        checks.expect(
            result["bf16"]["held_out_bits"] < entropy,
            f"{name}: BF16 loss is {result['bf16']['held_out_bits']:.3f}, expected below the entropy {entropy:.3f}",
        )
    print(f"Loss in bits per byte (byte frequencies alone: {entropy:.3f}):")
    print_table(["model", "loss", "BF16", "FP8", "difference"], rows)
    if device.type == "cuda":
        for name, result in results.items():
            print(f"{name}: BF16 {result['bf16']['seconds']:.0f} s, FP8 {result['fp8']['seconds']:.0f} s")
    print(checks.summary("Training in FP8"))
    outcome = {
        "device": str(device),
        "config": dataclasses.asdict(config),
        "steps": steps,
        "byte_entropy": entropy,
        "results": results,
        "failures": checks.failures,
    }
    if args.plot:
        with open(args.plot, "w") as file:
            file.write(plot(results, f"BF16 and FP8 from the same seed, {steps} steps, {device}"))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(outcome, file)
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main()["failures"] else 0)
