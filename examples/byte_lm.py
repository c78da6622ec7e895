"""A byte-level language model, trained in BF16 for a minute, then served with its linear layers in FP8.

The text is the source code of Python's own standard library: real, on every machine, nothing to download. One file in
twenty, chosen by a hash of its name, is held out. After training, every linear layer of a copy of the model becomes an
``Fp8Linear`` (weights quantised per 128 x 128 block, products by ``torch.ops.deep_gemm.fp8_gemm_nt``), and both
copies are measured on the same held-out bytes. What is checked:

* the model has learnt more than how often each byte occurs;
* the FP8 copy's held-out loss is within 1 % of the BF16 copy's.

A sample from each follows, drawn with the same random numbers.

    python examples/byte_lm.py --help
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence

# OpenMP threads that spin while they wait make small operations ten times slower wherever other work shares the cores.
# Read when PyTorch is loaded.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from fp8_linear import Fp8Linear, pick_device, quantise_linears
from terminal import Checks, Progress
from torch import nn

#: Generated tables, documentation as one string, and tests, which would be half of the text.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3"}
#: Largest relative change of the held-out loss through FP8.
LOSS_BAR = 0.01
#: Fewer steps leave a model that is worse than byte frequencies.
MIN_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of a training step."""

    dim: int
    layers: int
    heads: int
    context: int
    batch: int


#: 192 is no multiple of 128 on purpose: the last scale of each row covers half a block.
CPU = Config(dim=192, layers=4, heads=3, context=128, batch=16)
GPU = Config(dim=768, layers=8, heads=12, context=512, batch=32)
QUICK = Config(dim=96, layers=2, heads=3, context=64, batch=16)


def read_text() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Training bytes, held-out bytes, and how many files each came from."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    training, held_out, counts = bytearray(), bytearray(), [0, 0]
    for name in names:
        if SKIPPED_FOLDERS.isdisjoint(name.split("/")):
            out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
            (held_out if out else training).extend((root / name).read_bytes())
            counts[out] += 1
    if min(len(training), len(held_out)) < 65536:
        raise SystemExit(f"found only {counts[0]} + {counts[1]} source files of the standard library in {root}")
    texts = [torch.frombuffer(data, dtype=torch.uint8) for data in (training, held_out)]
    return texts[0], texts[1], counts[0], counts[1]


class Block(nn.Module):
    """Causal attention with rotary positions, then an MLP with squared ReLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        # A block that starts as the identity trains faster in a short run.
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)

        def rotate(t: torch.Tensor) -> torch.Tensor:
            first, second = t.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(v.dtype)

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.mlp_norm(x))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).square())


class ByteLM(nn.Module):
    """Bytes ``[B, T]`` to logits ``[B, T, 256]`` of the byte that follows each."""

    def __init__(self, config: Config, block: type[Block] = Block) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.dim)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)
        half = config.dim // config.heads // 2
        angle = torch.outer(torch.arange(config.context).float(), 10000.0 ** (-torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embedding(text)
        cos, sin = self.cos[: text.shape[1]], self.sin[: text.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def train(
    model: ByteLM,
    text: torch.Tensor,
    seconds: float,
    steps: int | None,
    seed: int,
    device: torch.device,
    label: str = "training in BF16",
    losses: list[torch.Tensor] | None = None,
) -> tuple[int, float]:
    """Train for ``seconds`` and MIN_STEPS at least, or exactly ``steps``. Returns the steps and the last loss in bits.

    Every step's loss, in nats and still on the device, is appended to ``losses``.
    """
    config = model.config
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    experts = [p for p in model.parameters() if p.ndim == 3]  # of train_fp8.py; Muon takes matrices only
    others = [p for p in model.parameters() if all(p is not other for other in matrices + experts)]
    groups = [{"params": others}, *({"params": [p], "lr": 0.3 / p.shape[2]} for p in experts)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(config.context + 1)
    progress = Progress(label)
    step, bits, start = 0, math.inf, time.monotonic()
    while True:
        # On a busy machine a minute may be a few steps, after which the model would know less than byte frequencies.
        done = step / steps if steps else min(step / MIN_STEPS, (time.monotonic() - start) / seconds)
        if done >= 1:
            break
        # Warm up over 20 steps; over the last 60 % of the run fall to a fiftieth.
        rate = min(1.0, (step + 1) / 20) * max(0.02, min(1.0, (1 - done) / 0.6))
        for group, base in schedules:
            group["lr"] = base * rate
        starts = torch.randint(len(text) - config.context, (config.batch, 1), generator=generator)
        batch = text[starts + window].to(device).long()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        if losses is not None:
            losses.append(loss.detach())
        # Means over many bytes have gradients that are too small for FP8; both optimizers ignore their scale.
        (loss * (config.batch * config.context / 1024)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == 1:
            bits = loss.item() / math.log(2)
        progress.update(done, f"step {step}, {bits:.2f} bits per byte")
    progress.close(f"{step} steps")
    return step, bits


@torch.no_grad()
def held_out_bits(model: ByteLM, text: torch.Tensor, amount: int, device: torch.device, label: str) -> float:
    """Mean loss in bits per byte on about ``amount`` held-out bytes, in windows spread evenly over the text."""
    context = model.config.context
    windows = max(1, min(amount, len(text) - 1) // context)
    starts = torch.linspace(0, len(text) - context - 1, windows, dtype=torch.float64).long()
    total, progress = 0.0, Progress(label)
    for index, chunk in enumerate(starts.split(32)):
        batch = text[chunk[:, None] + torch.arange(context + 1)].to(device).long()
        loss = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += float(loss)
        progress.update((index + 1) * 32 / windows)
    progress.close()
    return total / (windows * context) / math.log(2)


@torch.no_grad()
def generate(model: ByteLM, prompt: bytes, length: int, seed: int, device: torch.device, label: str) -> Iterator[int]:
    """Yield ``length`` bytes that continue ``prompt``, drawn at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor(list(prompt), device=device)
    progress = Progress(label)
    for index in range(length):
        logits = model(text[None, -model.config.context :])[0, -1].float().cpu()
        byte = int(torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator))
        text = torch.cat((text, torch.tensor([byte], device=device)))
        progress.update((index + 1) / length)
        yield byte
    progress.close()


def byte_entropy(text: torch.Tensor) -> float:
    """Bits per byte of a model that knows only how often each byte occurs."""
    share = torch.bincount(text.int(), minlength=256).double() / len(text)
    return float(-(share * share.clamp(min=1e-12).log2()).sum())


def show(sample: bytes) -> str:
    """A sample as indented text, unprintable bytes escaped."""
    text = sample.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return "\n".join("    | " + line for line in text.split("\n"))


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the example. Returns its results; ``results["failures"]`` lists the checks that failed."""
    parser = argparse.ArgumentParser(description="a byte-level language model trained in BF16 and served in FP8")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time")
    parser.add_argument("--steps", type=int, help="train for this many steps instead, for a result that repeats")
    parser.add_argument("--eval-bytes", type=int, help="held-out bytes to measure on")
    parser.add_argument("--sample-bytes", type=int, help="length of the generated samples")
    parser.add_argument("--dim", type=int, help="width of the model")
    parser.add_argument("--layers", type=int, help="number of blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few dozen steps; for tests")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args(argv)

    device, why = pick_device(args.device)
    config = QUICK if args.quick else GPU if device.type == "cuda" else CPU
    config = dataclasses.replace(config, dim=args.dim or config.dim, layers=args.layers or config.layers)
    if config.dim % (2 * config.heads) or config.dim % 16:
        parser.error(f"--dim: expected a multiple of 16 and of {2 * config.heads}")
    steps = args.steps or (60 if args.quick else None)
    eval_bytes = args.eval_bytes or (8192 if args.quick else 2**20 if device.type == "cuda" else 32768)
    sample_bytes = args.sample_bytes or (32 if args.quick else 240)
    torch.manual_seed(args.seed)

    text, held_out, files, held_out_files = read_text()
    with device:
        model = ByteLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Byte-level language model, {parameters / 1e6:.2f} million parameters. {why}.")
    print(f"Text: {len(text)} bytes of {files} files to train on, {len(held_out)} bytes of {held_out_files} held out.")

    steps_done, training_bits = train(model, text, args.seconds, steps, args.seed, device)
    bf16 = model.eval().to(torch.bfloat16)
    fp8 = quantise_linears(copy.deepcopy(bf16))
    served = sum(isinstance(module, Fp8Linear) for module in fp8.modules())

    loss_bf16 = held_out_bits(bf16, held_out, eval_bytes, device, "held-out loss, BF16")
    loss_fp8 = held_out_bits(fp8, held_out, eval_bytes, device, "held-out loss, FP8")
    difference, entropy = (loss_fp8 - loss_bf16) / loss_bf16, byte_entropy(held_out)
    print(f"Held-out loss, bits per byte, after {steps_done} steps (byte frequencies alone: {entropy:.3f}):")
    change = f"{loss_fp8 - loss_bf16:+.4f} ({difference:+.2%})"
    print(f"    BF16 {loss_bf16:.4f}    FP8 {loss_fp8:.4f}    difference {change}")
    print(f"    {served} linear layers, the output head included, run through torch.ops.deep_gemm.fp8_gemm_nt")

    prompt = b'class Connection:\n    """A network connection.\n    """\n\n    def __init__(self'
    print(f"Samples that continue, with the same random numbers:\n{show(prompt)}")
    samples = {}
    for name, served_model in (("BF16", bf16), ("FP8", fp8)):
        sample = bytes(generate(served_model, prompt, sample_bytes, args.seed, device, f"sample, {name}"))
        samples[name.lower()] = sample.decode("latin-1")
        print(f"  {name}:\n{show(sample)}")

    checks = Checks()
    checks.expect(loss_bf16 < entropy, f"BF16 loss is {loss_bf16:.3f}, expected below the byte entropy {entropy:.3f}")
    checks.expect(
        abs(difference) <= LOSS_BAR, f"FP8 changes the held-out loss by {difference:.3%}, allowed {LOSS_BAR:.0%}"
    )
    print(checks.summary("Byte-level language model"))
    outcome = {
        "device": str(device),
        "config": dataclasses.asdict(config),
        "steps": steps_done,
        "training_bits": training_bits,
        "byte_entropy": entropy,
        "bf16_bits": loss_bf16,
        "fp8_bits": loss_fp8,
        "fp8_layers": served,
        "samples": samples,
        "failures": checks.failures,
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(outcome, file, indent=1)
    return outcome


if __name__ == "__main__":
    sys.exit(1 if main()["failures"] else 0)
