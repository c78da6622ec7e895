"""Test cases that run themselves: a case is a line of text that repeats a failure.

    python test/common.py "GemmCase(m=33, n=200, k=272, layout='nn', device='cuda')"

The expected values come from the case's own construction in float64 (scales are drawn first and encoded afterwards) and
share no code with the library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "python") not in sys.path:
    sys.path.insert(0, str(ROOT / "python"))

from deep_gemm_ops.testing.numeric import assert_close, assert_equal, error_bar  # noqa: E402

LAYOUTS = ("nt", "nn", "tn", "tt")
FP8 = torch.float8_e4m3fn
NAN_BYTE = 0x7F


def cuda_condition() -> str:
    """Empty where the CUDA tests can run, else the device condition that is not met."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major = torch.cuda.get_device_capability()[0]
    return "" if major in (9, 10) else f"there are no kernels for compute capability {major}.x"


def on_sm100(device: str) -> bool:
    """Scales that are no powers of two become NaN there. $HOST_OPS_MAJOR: see test_host_ops.py."""
    if os.environ.get("HOST_OPS_MAJOR") == "10":
        return True
    return device != "cpu" and torch.cuda.get_device_capability(device)[0] == 10


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw_bytes(x: torch.Tensor) -> torch.Tensor:
    """The contents of any tensor as bytes on the CPU, row by row."""
    # A copy, since contiguous() keeps odd strides of dimensions of one element, which view() refuses.
    x = x.detach().cpu().clone(memory_format=torch.contiguous_format)
    return x.reshape(-1).view(torch.uint8)


def like(x: torch.Tensor, fill: float) -> torch.Tensor:
    """A tensor of the same shape, dtype and strides; torch.empty_like drops the padding between columns."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(fill)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equality of contents, NaN and the sign of zero included, for any dtype."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(raw_bytes(x), raw_bytes(y))


def fp8_bytes(x: torch.Tensor) -> torch.Tensor:
    """FP8 contents as bytes, every NaN as 0x7F (its sign carries no meaning)."""
    codes = raw_bytes(x).view(x.shape)
    return torch.where((codes & 0x7F) == NAN_BYTE, torch.full_like(codes, NAN_BYTE), codes)


def ragged(n: int, extra: int, stored_by_tma: bool) -> int:
    """Columns of D: ``extra`` more than ``n``, or so many that they fill units of 16 bytes where TMA is to store them.

    TMA writes whole units also at the end of a row, so that the library stores other rows in another way.
    """
    return n + (ceil_div(extra, 8) * 8 if stored_by_tma else extra)


def strided(x: torch.Tensor, row_stride: int, device: str, fill: float = math.nan) -> torch.Tensor:
    """A copy of a matrix whose rows lie ``row_stride`` apart in a buffer that is otherwise NaN."""
    rows, cols = x.shape
    buffer = torch.full((rows, row_stride), fill, dtype=torch.float32).to(x.dtype)
    buffer[:, :cols] = x
    return buffer.to(device)[:, :cols]


@contextlib.contextmanager
def forced_row(row: int | None) -> Iterator[None]:
    """Runs with one row of the instance table, whatever selection would prefer."""
    if row is None:
        yield
        return
    from deep_gemm_ops import _capi

    with _capi.force_instance(row):
        yield


def encode_scales(exponents: torch.Tensor, kind: str, k_dim: int) -> torch.Tensor:
    """Powers of two, given by their exponents, as ``float32``, ``e8m0`` or ``packed`` along ``k_dim``."""
    if kind == "float32":
        return torch.pow(2.0, exponents.double()).float()
    codes = (exponents + 127).to(torch.uint8)
    if kind == "e8m0":
        return codes.view(torch.float8_e8m0fnu)
    codes = codes.movedim(k_dim, -1)
    words = torch.zeros(*codes.shape[:-1], ceil_div(codes.shape[-1], 4), dtype=torch.int64)
    for i in range(codes.shape[-1]):
        words[..., i // 4] |= codes[..., i].long() << (8 * (i % 4))
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).movedim(-1, k_dim)


def arrange_scales(sf: torch.Tensor, strides: str, device: str) -> torch.Tensor:
    """The same scales in memory in another way."""
    rows, cols = sf.shape
    if strides == "rows":  # second dimension dense
        return sf.contiguous().to(device)
    if strides == "columns":  # first dimension dense
        return sf.t().contiguous().to(device).t()
    # "scattered": neither is, and what lies between is garbage
    buffer = torch.full((2 * rows + 1, 3 * cols + 2), NAN_BYTE, dtype=torch.uint8)
    buffer = buffer.view(sf.dtype) if sf.element_size() == 1 else torch.full_like(buffer, 77, dtype=sf.dtype)
    if sf.dtype == torch.float32:
        buffer.fill_(math.nan)
    inside = slice(1, 2 * rows + 1, 2), slice(2, 3 * cols + 2, 3)
    buffer[inside] = sf
    return buffer.to(device)[inside]


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """One call of ``fp8_gemm_<layout>``; ``run()`` raises AssertionError with a line that repeats it."""

    m: int
    n: int
    k: int
    layout: str = "nt"
    recipe: tuple[int, int, int] = (1, 128, 128)
    pass_recipe: bool = False
    scales: str = "float32"  # float32, random (float32, no powers of two), e8m0, packed
    sf_strides: str = "columns"  # columns, rows, scattered
    out_dtype: str = "bfloat16"
    c: str = ""  # "", full, bias, strided, alias (c is out)
    out: bool = False  # the .out overload, into a NaN-filled buffer with wider rows
    pad: int = 0  # extra elements between operand rows, NaN in memory
    data: str = "normal"  # normal, integer (exact results), wide (scales over many orders of magnitude)
    device: str = "cpu"
    seed: int = 0
    row: int | None = None

    @property
    def repro(self) -> str:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if value != default[name]}
        values["recipe"] = self.recipe
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f'python test/common.py "GemmCase({arguments})"'

    @property
    def op(self) -> str:
        return f"fp8_gemm_{self.layout}"

    def operand(self, which: str, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(values, scales, their product as float64 ``[MN, K]``); the first two as the layout has them."""
        mn = self.m if which == "a" else self.n
        gran_mn, gran_k = self.recipe[0 if which == "a" else 1], self.recipe[2]
        if self.data == "integer":
            values = torch.randint(-3, 4, (mn, self.k), generator=random).float()
        else:
            values = (torch.randn(mn, self.k, generator=random) * 60).clamp(-448, 448)
        values = values.to(FP8)
        scale_shape = (ceil_div(mn, gran_mn), ceil_div(self.k, gran_k))
        low, high = {"wide": (-20, 20), "integer": (-2, 3)}.get(self.data, (-8, -3))
        exponents = torch.randint(low, high, scale_shape, generator=random)
        sf64 = torch.pow(2.0, exponents.double())
        kind = "float32" if self.scales == "random" and on_sm100(self.device) else self.scales
        if kind == "random":
            sf64 = (sf64 * (1 + torch.rand(scale_shape, generator=random))).float().double()
        rows, groups = torch.arange(mn) // gran_mn, torch.arange(self.k) // gran_k
        dequantised = values.float().double() * sf64[rows][:, groups]

        k_major = self.layout[0] == "n" if which == "a" else self.layout[1] == "t"
        sf = sf64.float() if kind == "random" else encode_scales(exponents, kind, 1)
        if not k_major:
            values, sf = values.t(), sf.t()
        cols = values.shape[1]
        row_stride = ceil_div(cols, 16) * 16 if k_major else cols
        values = strided(values, row_stride + self.pad, self.device)
        return values, arrange_scales(sf, self.sf_strides, self.device), dequantised

    def build(self) -> tuple[list[torch.Tensor], dict[str, object], torch.Tensor, torch.Tensor | None]:
        """(positional arguments, keyword arguments, expected float64 result, the buffer that ``out`` is part of)."""
        random = generator(self.seed)
        a, sfa, a64 = self.operand("a", random)
        b, sfb, b64 = self.operand("b", random)
        expected = a64 @ b64.t()
        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, object] = {"recipe": list(self.recipe)} if self.pass_recipe else {}
        c = None
        if self.c:
            shape = (self.n,) if self.c == "bias" else (self.m, self.n)
            if self.data == "integer":
                c = torch.randint(-9, 10, shape, generator=random).to(dtype)
            else:
                size = float(expected.square().mean().sqrt()) if expected.numel() and self.k else 1.0
                c = (torch.randn(shape, generator=random) * size).to(dtype)
            expected = expected + c.double()
            c = strided(c, self.n + 3, self.device) if self.c == "strided" else c.to(self.device)
        buffer = None
        if self.out or self.c == "alias":
            buffer = torch.full((self.m + 2, self.n + 5), math.nan, dtype=dtype, device=self.device)
            out = buffer[1 : self.m + 1, 2 : self.n + 2]
            if self.c == "alias":
                out.copy_(c)
                c = out
            keywords["out"] = out
        else:
            keywords["out_dtype"] = dtype
        keywords["c"] = c
        return [a, sfa, b, sfb], keywords, expected, buffer

    def run(self) -> torch.Tensor:
        arguments, keywords, expected, buffer = self.build()
        op = getattr(torch.ops.deep_gemm, self.op)
        with forced_row(self.row):
            result = op.out(*arguments, **keywords) if buffer is not None else op(*arguments, **keywords)
        if buffer is not None:
            assert result is None, f"the .out form returned {result}\nreproduce with: {self.repro}"
            result = keywords["out"]
            around = torch.ones_like(buffer, dtype=torch.bool)
            around[1 : self.m + 1, 2 : self.n + 2] = False
            assert bool(buffer[around].isnan().all()), f"wrote outside of out\nreproduce with: {self.repro}"
        dtype = getattr(torch, self.out_dtype)
        assert result.dtype == dtype, f"result has dtype {result.dtype}\nreproduce with: {self.repro}"
        if self.data == "integer":
            assert_equal(result, expected.to(dtype), repro=self.repro)
        else:
            assert_close(result, expected, tol=error_bar(dtype), repro=self.repro)
        return result


def random_gemm_case(seed: int, device: str, max_mn: int = 300, max_k: int = 700) -> GemmCase:
    """A case drawn from everything that the operators accept."""
    random = generator(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    def size(limit: int) -> int:
        kind = pick("small", "any", "edge")
        if kind == "small":
            return int(torch.randint(0, 18, (1,), generator=random))
        if kind == "edge":
            return max(
                0, min(limit, int(pick(16, 32, 64, 128, 256)) + int(torch.randint(-1, 2, (1,), generator=random)))
            )
        return int(torch.randint(1, limit, (1,), generator=random))

    recipe = (int(pick(1, 1, 128)), int(pick(1, 128)), int(pick(128, 128, 32)))
    scales = str(pick("float32", "random", "e8m0", "packed"))
    data = str(pick("normal", "integer"))
    return GemmCase(
        m=size(max_mn),
        n=size(max_mn),
        k=size(max_k),
        layout=str(pick(*LAYOUTS)),
        recipe=recipe,
        pass_recipe=scales == "packed" or bool(pick(False, True)),
        scales="float32" if data == "integer" and scales == "random" else scales,
        sf_strides=str(pick("columns", "rows", "scattered")),
        out_dtype=str(pick("bfloat16", "float32")),
        c=str(pick("", "", "full", "bias", "strided", "alias")),
        out=bool(pick(False, True)),
        pad=int(pick(0, 0, 16, 48)),
        data=data,
        device=device,
        seed=seed,
    )


def main() -> None:
    warnings.simplefilter("error")
    case = eval(sys.argv[1], {name: value for name, value in globals().items() if name.endswith("Case")})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
