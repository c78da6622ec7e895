"""How Hopper's tensor cores round the sums of wgmma: problems that show it, and a model of it.

    cd test && python -m ptx_emulator.rounding CASES.zip DIR

holds models against what a GPU gave: DIR is what `hardware.py run CASES.zip --out DIR --keep rounding` has written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import layouts
from .one_wgmma import BYTES, K

PAIRS = [("e4m3", "e4m3"), ("e5m2", "e5m2"), ("e4m3", "e5m2"), ("bf16", "bf16"), ("f16", "f16"), ("tf32", "tf32")]
_TYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
}
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def encode(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Codes of the nearest finite values that a type has."""
    most = torch.finfo(_TYPES[dtype]).max
    codes = values.clamp(-most, most).to(_TYPES[dtype]).view(_CODES[BYTES[dtype]])
    return (codes & ~0x1FFF if dtype == "tf32" else codes).numpy()


def decode(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Values of codes; of tf32 the 13 low bits do not count."""
    x = torch.from_numpy(codes.copy())
    return (x & ~0x1FFF if dtype == "tf32" else x).view(_TYPES[dtype]).double().numpy()


# ----------------------------------------------------------------------------------------------------- problems ---
@dataclass
class Problem:
    """C + A B^T in one instruction: A [64, K] and B [N, K] as codes, C float32 [64, N]."""

    a_type: str
    b_type: str
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


N = 64


def problems(a_type: str, b_type: str, seed: int = 0) -> Iterator[tuple[str, Problem]]:
    """What tells one way to round from another, for one pair of types."""
    random = torch.Generator().manual_seed(seed)
    k = K[a_type]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def spread(rows: int, bits: int) -> torch.Tensor:
        """Magnitudes over so many powers of two."""
        powers = torch.randint(-bits // 2, bits // 2 + 1, (rows, k), generator=random)
        return (normal(rows, k).sign() + 0.3 * normal(rows, k)) * torch.exp2(powers.float())

    def few(x: torch.Tensor, count: int) -> torch.Tensor:
        """All but `count` elements of each row set to zero."""
        order = torch.rand(x.shape, generator=random).argsort(1)
        return torch.where(order < count, x, 0)

    def problem(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Problem:
        return Problem(a_type, b_type, encode(a, a_type), encode(b, b_type), c.float().numpy())

    zero = torch.zeros(64, N)
    a, b = normal(64, k), normal(N, k)
    yield "normal", problem(a, b, zero)
    yield "normal, added to C", problem(a, b, normal(64, N) * 8)
    yield "normal, added to a large C", problem(a, b, normal(64, N) * 1000)
    yield "normal, added to a small C", problem(a, b, normal(64, N) / 1000)
    a, b = spread(64, 12), spread(N, 12)
    yield "wide", problem(a, b, zero)
    yield (
        "wide, added to C",
        problem(a, b, normal(64, N) * torch.exp2(torch.randint(-20, 20, (64, N), generator=random).float())),
    )
    # Two or three products, anywhere along K: which of them are aligned to one another?
    for count in (1, 2, 3):
        yield f"{count} products", problem(few(a, count), b, zero)
    yield (
        "1 product, added to C",
        problem(few(a, 1), b, normal(64, N) * torch.exp2(torch.randint(-30, 30, (64, N), generator=random).float())),
    )
    # A product and its opposite leave what the others kept next to them.
    first, second = torch.arange(64) % k, torch.arange(64) * 7 % k
    second = torch.where(first == second, (second + 1) % k, second)
    rest = spread(N, 8)
    b = rest.clone()
    a = normal(64, k) / 16
    a[torch.arange(64), first], a[torch.arange(64), second] = 8.0, -8.0
    b = torch.where(torch.rand(N, 1, generator=random) < 0.5, b.abs().amax(1, keepdim=True) * b.sign().abs(), b)
    yield "cancellation", problem(a, b, zero)
    # C and the products cancel: how many bits below C are kept?
    a, b = few(normal(64, k), 2), normal(N, k)
    exact = decode(encode(a, a_type), a_type) @ decode(encode(b, b_type), b_type).T
    yield "cancellation with C", problem(a, b, -torch.from_numpy(exact) * (1 + 2.0**-9))
    if BYTES[a_type] > 1 and a_type != "f16":
        tiny = 2.0**-66
        yield "subnormal results", problem(normal(64, k) * tiny, normal(N, k) * tiny, normal(64, N) * tiny**2)
    yield (
        "overflow of C",
        problem(normal(64, k) * 100, normal(N, k) * 100, torch.full((64, N), 3.4028e38) * normal(64, N).sign()),
    )
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 2.0])
    a, b = normal(64, k), normal(N, k)
    codes_a, codes_b = encode(a, a_type).copy(), encode(b, b_type).copy()
    values = special if a_type != "e4m3" else torch.where(special.isinf(), torch.nan, special)
    codes_a[::2, 0] = values.repeat(4).to(_TYPES[a_type]).view(_CODES[BYTES[a_type]]).numpy()
    values = special if b_type != "e4m3" else torch.where(special.isinf(), torch.nan, special)
    codes_b[::2, 0] = values.repeat(4).to(_TYPES[b_type]).view(_CODES[BYTES[b_type]]).numpy()[::-1]
    c = zero.clone()
    c[:, 5], c[:, 9], c[:, 13] = torch.nan, torch.inf, -torch.inf
    yield "NaN and Inf", Problem(a_type, b_type, codes_a, codes_b, c.numpy())
    yield "negative zero", problem(-torch.zeros(64, k), normal(N, k).abs(), -zero)


# -------------------------------------------------------------------------------------------------------- model ---
@dataclass(frozen=True)
class Model:
    """A sum over `block` products at a time, each with the sum so far.

    Products and sum are aligned to the largest exponent among them, a product's being the sum of its factors'
    (`normalized`: its own, one more where the fractions' product is 2 or more). Of each, `fraction_bits` bits below are
    kept; the total is cut (`down`: rounded down) to so many fraction bits as `result_bits` says.
    """

    fraction_bits: int
    block: int
    result_bits: int = 23
    normalized: bool = False
    down: bool = False
    nearest: bool = False

    def __call__(self, p: Problem) -> np.ndarray:
        a, b = decode(p.a, p.a_type), decode(p.b, p.b_type)
        total = p.c.astype(np.float64)
        with np.errstate(all="ignore"):
            for at in range(0, a.shape[1], self.block):
                part = slice(at, at + self.block)
                total = self._add(total, a[:, None, part], b[None, :, part], p)
        return total.astype(np.float32)

    def _add(self, c: np.ndarray, a: np.ndarray, b: np.ndarray, p: Problem) -> np.ndarray:
        terms = np.concatenate([np.broadcast_to(a * b, (*c.shape, a.shape[2])), c[:, :, None]], 2)
        exponents = np.maximum(np.frexp(terms)[1] - 1, -126)
        if not self.normalized:
            factors = _exponent(a, p.a_type) + _exponent(b, p.b_type)
            exponents[:, :, :-1] = factors
        exponents = np.where(terms == 0, -10000, exponents)
        top = np.maximum(exponents.max(2), -10000)
        unit = np.ldexp(1.0, np.maximum(top - self.fraction_bits, -1000))
        cut = np.floor if self.down else np.trunc
        total = cut(terms / unit[:, :, None]).sum(2) * unit
        keep = np.ldexp(1.0, np.maximum(np.frexp(total)[1] - 1, -126) - self.result_bits)
        rounded = (np.rint if self.nearest else np.trunc)(total / keep) * keep
        special = ~np.isfinite(terms).all(2)
        return np.where(special, terms.sum(2), np.where(total == 0, 0.0, rounded))


def _exponent(x: np.ndarray, dtype: str) -> np.ndarray:
    """The exponent that a factor's code says; of subnormal numbers that of the smallest normal one."""
    least = {"e4m3": -6, "e5m2": -14, "f16": -14, "bf16": -126, "tf32": -126}[dtype]
    return np.maximum(np.frexp(x)[1] - 1, least)


# What an H200 does: of all candidates these alone agree with it in every bit of every problem.
HOPPER = {"e4m3": Model(13, 32, 13), "bf16": Model(25, 16), "f16": Model(25, 16), "tf32": Model(25, 8)}
HOPPER["e5m2"] = HOPPER["e4m3"]


def same(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Where the bits are the same, NaN being NaN."""
    return (want.view(np.uint32) == got.view(np.uint32)) | (np.isnan(want) & np.isnan(got))


# ------------------------------------------------------------------------------------------------------- report ---
def candidates() -> Iterator[Model]:
    for bits, block, result, normalized, down, nearest in itertools.product(
        (12, 13, 14, 22, 23, 24, 25, 26, 27, 28), (4, 8, 16, 32), (13, 23), (False, True), (False, True), (False, True)
    ):
        yield Model(bits, block, result, normalized, down, nearest)


def read(pack: Path, results: Path) -> Iterator[tuple[str, str, Problem, np.ndarray]]:
    """Of each kept case: types, the problem's name, the problem, and what the GPU gave."""
    from .hardware import Pack

    file = Pack(pack)
    outputs = zipfile.ZipFile(results / "outputs.zip")
    names = set(outputs.namelist())
    for index, case in enumerate(file.cases):
        found = case.name.split("::test_rounding[")
        if len(found) < 2:
            continue
        types, name = found[1].rstrip("]").split(":", 1)
        a_type, b_type = types.split("-")
        problem = dict(problems(a_type, b_type))[name]
        number, region = next((i, r) for i, r in enumerate(case.regions) if r.dtype == "float32")
        kept = f"{index}_{number}"
        bits = outputs.read(kept) if kept in names else file.blob(region.after.blob)
        row, col = layouts.wgmma_fragment(N)
        got = np.empty((64, N), np.float32)
        got[row, col] = np.frombuffer(bits, np.float32).reshape(128, N // 2)
        yield types, name, problem, got


def main() -> None:
    by_types: dict[str, list[tuple[str, Problem, np.ndarray]]] = {}
    for types, name, problem, got in read(Path(sys.argv[1]), Path(sys.argv[2])):
        by_types.setdefault(types, []).append((name, problem, got))
    for types, cases in by_types.items():
        k = K[types.split("-")[0]]
        tried = {}
        for model in candidates():
            if model.block <= k and model.fraction_bits >= model.result_bits - 1 - 10 * (k == 32):
                tried[model] = [float(same(model(problem), got).mean()) for _, problem, got in cases]
        best = sorted(tried, key=lambda m: -sum(tried[m]))[:3]
        for model in best:
            shares = dict(zip((name for name, *_ in cases), tried[model]))
            print(f"{types}: {json.dumps(dataclasses.asdict(model))}")
            print("   " + ", ".join(f"{name} {share:.4f}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
