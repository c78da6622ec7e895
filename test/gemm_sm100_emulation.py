"""Runs rows of the SM100 GEMM table under the PTX emulator, as gemm_emulation.py does for SM90's.

Layouts, element types and the granularity of scales are run-time values of one kernel there: they belong to the case.

    python test/gemm_sm100_emulation.py "Sm100Case('sm100_mx_m128n128', 130, 257, 400, layout='tn', gran_k=32)"
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any, NamedTuple

import torch

from deep_gemm_ops import _capi

import ptx_emulator
from common import FP8, assert_close, assert_equal, ceil_div, error_bar, generator, same_bits, strided
from gemm_emulation import (
    BFLOAT16,
    BUDGET,
    E2M1,
    FLOAT32,
    _Problem,
    _Scales,
    launch,
    pack_fp4,
    prepared,
    row_named,
    shown,
)

FP8_OPERANDS, BF16_OPERANDS = 0, 1  # OperandType


def random_fp4(shape: tuple[int, ...], random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in float64, and as they are packed along the last dimension."""
    codes = torch.randint(0, 16, shape, generator=random)
    return E2M1[codes], pack_fp4(codes)


def pack_scales(codes: torch.Tensor) -> torch.Tensor:
    """UE8M0 codes ``[.., groups, MN]`` as words ``[.., ceil(groups / 4), MN]``.

    Bytes of groups that K does not reach must not matter: NaN.
    """
    *outer, groups, mn = codes.shape
    padded = torch.full((*outer, ceil_div(groups, 4) * 4, mn), 255)
    padded[..., :groups, :] = codes
    padded = padded.view(*outer, -1, 4, mn)
    words = sum(padded[..., byte, :] << 8 * byte for byte in range(4))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def scale_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(codes == 255, math.nan, torch.exp2(codes.double() - 127))


@dataclasses.dataclass(frozen=True)
class Operand:
    """``values`` [MN, K] and ``scales`` [MN, K] in float64; ``stored`` and ``words`` as the kernel reads them."""

    values: torch.Tensor
    scales: torch.Tensor
    stored: torch.Tensor
    words: torch.Tensor | None


class Sm100Tensors(NamedTuple):
    """Of an Sm100Case. ``expected``: what D has to be, in float64."""

    a: Operand
    b: Operand
    buffer: torch.Tensor  # holds D
    d: torch.Tensor
    c: torch.Tensor | None
    expected: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sm100Case:
    """A problem for a row of the SM100 table, everything outside of its tensors poisoned with NaN.

    ``layout`` is nt, nn, tn or tt; ``a`` and ``b`` are fp8 or fp4 (not of BF16 rows). ``d``, ``c`` and ``data`` as in
    RowCase, but TMA stores FP32 results, too: ``float32`` are those that it can address, ``float32_direct`` others.
    """

    row: str
    m: int
    n: int
    k: int
    layout: str = "nt"
    a: str = "fp8"
    b: str = "fp8"
    gran_k: int = 128
    d: str = "tma"
    c: str = ""
    data: str = "normal"
    num_sms: int = 8
    seed: int = 0  # of the schedule; the data depends on the rest

    def __str__(self) -> str:
        return shown(self)

    @property
    def repro(self) -> str:
        return f'python test/gemm_sm100_emulation.py "{self}"'

    @property
    def info(self) -> dict[str, Any]:
        return row_named(self.row)

    @property
    def is_bf16(self) -> bool:
        return self.info["scaling"] == "none"

    def _operand(self, mn: int, kind: str, mn_major: bool, random: torch.Generator) -> Operand:
        if self.is_bf16:
            kind = "bf16"
        if kind == "fp4":
            values, stored = random_fp4((mn, self.k), random)
            # TMA takes rows of FP4 at multiples of 32 bytes.
            stored = strided(stored, ceil_div(self.k // 2, 32) * 32 + 32, "cpu", 0x77)
        else:
            if self.data == "normal":
                values = torch.randn(mn, self.k, generator=random)
                values = values if kind == "bf16" else (values * 60).clamp(-448, 448)
            else:
                values = torch.randint(-3, 4, (mn, self.k), generator=random).float()
            if self.data == "special":
                values.view(-1)[torch.randint(mn * self.k, (3,), generator=random)] = math.nan
                if kind == "bf16":
                    values.view(-1)[torch.randint(mn * self.k, (3,), generator=random)] = math.inf
            stored = values.to(torch.bfloat16 if kind == "bf16" else FP8)
            values = stored.double()
            if mn_major:
                stored = stored.t()
            stored = strided(stored, ceil_div(stored.shape[1], 16) * 16 + 16, "cpu")
        if kind == "bf16":
            return Operand(values, torch.ones_like(values), stored, None)
        groups = ceil_div(self.k, self.gran_k)
        codes = torch.randint(125, 130, (mn, groups), generator=random)
        if self.data == "special":
            codes.view(-1)[torch.randint(mn * groups, (3,), generator=random)] = 255
        words = strided(pack_scales(codes.t()), ceil_div(mn, 4) * 4 + 4, "cpu", -1).t()
        scales = scale_values(codes).repeat_interleave(self.gran_k, 1)[:, : self.k]
        return Operand(values, scales, stored, words)

    def build(self) -> Sm100Tensors:
        random = generator(hash((self.m, self.n, self.k)) % 2**32)
        a = self._operand(self.m, self.a, self.layout[0] == "t", random)
        b = self._operand(self.n, self.b, self.layout[1] == "n", random)
        expected = (a.values * a.scales) @ (b.values * b.scales).t()
        dtype = torch.float32 if "float32" in self.d else torch.bfloat16
        # TMA stores to addresses and strides that are multiples of 16 bytes.
        offset, step = (8, 8) if self.d in ("tma", "float32") else (3, 1)
        stride = ceil_div(offset + self.n + 5, step) * step
        buffer = torch.full((self.m + 2, stride), math.nan, dtype=dtype)
        d = buffer[1 : self.m + 1, offset : offset + self.n]
        c = None
        if self.c:
            c = torch.randint(-99, 100, (self.n,) if self.c == "bias" else (self.m, self.n), generator=random).to(dtype)
            expected = expected + c.double()
            if self.c == "full":
                c = strided(c, self.n + 3, "cpu")
            if self.c == "alias":
                c = d.copy_(c)
        return Sm100Tensors(a, b, buffer, d, c, expected)

    def run(self, module: ptx_emulator.Module | None = None, **options: int) -> torch.Tensor:
        """Runs the case and returns D; raises AssertionError or PtxError, with a line that repeats it."""
        a, b, buffer, d, c, expected = prepared(self)
        scale = [
            _Scales() if x.words is None else _Scales(x.words.data_ptr(), x.words.stride(0), x.words.stride(1), 1)
            for x in (a, b)
        ]
        item = [2 if x.stored.dtype == torch.uint8 else 1 for x in (a, b)]  # elements of a stored one
        problem = _Problem(
            m=self.m,
            n=self.n,
            k=self.k,
            a=a.stored.data_ptr(),
            b=b.stored.data_ptr(),
            a_stride=a.stored.stride(0) * item[0],
            b_stride=b.stored.stride(0) * item[1],
            sfa=scale[0],
            sfb=scale[1],
            gran_k=self.gran_k,
            d=d.data_ptr(),
            d_stride=d.stride(0),
            d_type=FLOAT32 if d.dtype == torch.float32 else BFLOAT16,
            c=c.data_ptr() if c is not None else None,
            c_stride=0 if c is None or c.dim() == 1 else c.stride(0),
            operands=BF16_OPERANDS if self.is_bf16 else FP8_OPERANDS,
            a_mn_major=self.layout[0] == "t",
            b_mn_major=self.layout[1] == "n",
            num_groups=1,
            a_is_fp4=item[0] == 2,
            b_is_fp4=item[1] == 2,
        )
        inputs = {"a": a.stored, "sfa": a.words, "b": b.stored, "sfb": b.words, "c": c if c is not d else None}
        inputs = {name: x for name, x in inputs.items() if x is not None}
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1 : self.m + 1, d.storage_offset() % buffer.shape[1] :][:, : self.n] = False
        before = buffer[outside]
        options = {"budget": BUDGET, "seed": self.seed, "num_sms": self.num_sms, **options}
        try:
            launch(self.info["index"], problem, d, inputs, module=module, **options)
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
        assert same_bits(buffer[outside], before), f"wrote outside of D\nreproduce with: {self.repro}"
        if self.data == "normal":
            # The emulator's tensor core is exact, so FP32 sums are all that rounds.
            assert_close(d, expected, tol=2e-6 if d.dtype == torch.float32 else error_bar(d.dtype), repro=self.repro)
        else:
            assert_equal(d, expected.to(d.dtype), repro=self.repro)
        return d.clone()


@functools.cache
def rows() -> list[dict[str, Any]]:
    """Those of dense products."""
    return [row for row in _capi.instances("sm_100a") if row["grouping"] == "dense"]


def main() -> None:
    case = eval(sys.argv[1], {"Sm100Case": Sm100Case})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
