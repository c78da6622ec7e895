"""Products with groups along K on rows of the GEMM table under the PTX emulator; see gemm_emulation.py.

python test/kgrouped_emulation.py "KGroupedCase('sm90_fp8_1d1d_m64n64_kgrouped', 'psum', (3, 0, 70), 40, 72)"
python test/kgrouped_emulation.py "SummedCase('sm90_bf16_nt_m128n128_summed', 3, 40, 72, 200)"
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import sys
from typing import Any, NamedTuple

import torch

from deep_gemm_ops._capi import GROUP_LAYOUTS, GROUPINGS

import ptx_emulator
from common import FP8, assert_close, assert_equal, ceil_div, error_bar, generator, same_bits, strided
from gemm_emulation import (
    BF16_OPERANDS,
    BFLOAT16,
    BUDGET,
    FLOAT32,
    _Problem,
    _Scales,
    launch,
    prepared,
    row_named,
    shown,
)
from gemm_sm100_emulation import pack_scales


class Tensors(NamedTuple):
    """Of a case. ``expected``: what D has to be, in float64; None where only memory is looked at."""

    problem: _Problem
    inputs: dict[str, torch.Tensor]
    buffer: torch.Tensor  # holds D
    d: torch.Tensor
    expected: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class _Case(abc.ABC):
    row: str

    def __str__(self) -> str:
        return shown(self)

    @property
    def repro(self) -> str:
        return f'python test/kgrouped_emulation.py "{self}"'

    @property
    def info(self) -> dict[str, Any]:
        return row_named(self.row)

    def _values(self, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
        if self.data == "normal":
            return (torch.randn(shape, generator=random) * 60).clamp(-448, 448)
        return torch.randint(-3, 4, shape, generator=random).float()

    def _result(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN around D [groups, M, N], and D in it."""
        d_type = torch.float32 if self.d.startswith("float32") else torch.bfloat16
        # TMA stores to addresses and strides that are multiples of 16 bytes.
        offset, step = (8, 8) if self.d in ("tma", "float32") else (3, 1)
        stride = ceil_div(offset + self.n + 5, step) * step
        buffer = torch.full((groups, self.m + 2, stride), math.nan, dtype=d_type)
        return buffer, buffer[:, 1 : self.m + 1, offset : offset + self.n]

    def _addend(self, d: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """C, which may be D, and its values in float64."""
        c = torch.randint(-99, 100, d.shape, generator=random).to(d.dtype)
        if self.c == "bias":
            c = c[:, :1]
        values = c.double()
        if self.c == "alias":
            return d.copy_(c), values
        buffer = torch.full((len(c), c.shape[1] + 1, self.n + 3), math.nan, dtype=d.dtype)
        buffer[:, : c.shape[1], : self.n] = c
        return buffer[:, : c.shape[1], : self.n], values

    def _with_result(
        self, problem: _Problem, inputs: dict[str, torch.Tensor], groups: int, expected: torch.Tensor | None
    ) -> Tensors:
        """D and C of a problem."""
        buffer, d = self._result(groups)
        if self.c:
            c, values = self._addend(d, generator(7))
            if expected is not None:
                expected = expected + values
            problem.c, problem.c_group_stride = c.data_ptr(), c.stride(0)
            problem.c_stride = 0 if self.c == "bias" else c.stride(1)
            if self.c != "alias":
                inputs["c"] = c
        problem.d, problem.d_stride, problem.d_group_stride = d.data_ptr(), d.stride(1), d.stride(0)
        problem.d_type = FLOAT32 if d.dtype == torch.float32 else BFLOAT16
        return Tensors(problem, inputs, buffer, d, expected)

    @abc.abstractmethod
    def build(self) -> Tensors: ...

    def run(self, module: ptx_emulator.Module | None = None, **options: int) -> torch.Tensor:
        """Runs the case and returns D; raises AssertionError or PtxError, with a line that repeats it."""
        problem, inputs, buffer, d, expected = prepared(self)
        before = buffer.clone()
        options = {"budget": BUDGET, "seed": self.seed, **options}
        try:
            launch(self.info["index"], problem, buffer, inputs, num_sms=self.num_sms, module=module, **options)
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
        result = d.clone()
        d.zero_()
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside.as_strided(d.shape, d.stride(), d.storage_offset())[:] = True
        assert same_bits(buffer[~inside], before[~inside]), f"wrote outside of D\nreproduce with: {self.repro}"
        for group in range(0 if expected is None else len(d)):
            if self.data == "normal":
                tol = error_bar(d.dtype, "bf16") if d.dtype == torch.float32 else error_bar(d.dtype)
                assert_close(result[group], expected[group], tol=tol, repro=self.repro)
            else:
                assert_equal(result[group], expected[group].to(d.dtype), repro=self.repro)
        return result


@dataclasses.dataclass(frozen=True)
class KGroupedCase(_Case):
    """D[g] = A_g^T B_g (+ C[g]) for groups of ``sizes`` along K, everything that belongs to no group poisoned with NaN.

    ``layout`` is ``sizes``, ``psum`` or ``offsets``. BF16 operands lie [K, M], groups one after the other; of FP8 ones,
    [M, K], each group fills blocks of 128, the last one with zeros, or, ``mn_major``, they lie as BF16 ones. ``tail``
    elements of K follow the last group.
    ``values`` replaces what the layout holds: then only memory is checked. ``d`` is ``tma`` or ``direct`` (BF16, see
    RowCase), ``float32`` or ``float32 direct``; ``c`` and ``data`` are those of RowCase.
    """

    layout: str = "sizes"
    sizes: tuple[int, ...] = (128,)
    m: int = 64
    n: int = 64
    alignment: int = 1
    tail: int = 0
    d: str = "tma"
    c: str = ""
    data: str = "normal"
    mn_major: bool = False
    values: tuple[int, ...] | None = None
    num_sms: int = 3
    seed: int = 0  # of the schedule; the data depends on the rest

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Where each group begins and ends, groups starting on multiples of ``step``."""
        starts = itertools.accumulate((ceil_div(size, step) * step for size in self.sizes), initial=0)
        return [(start, start + size) for start, size in zip(starts, self.sizes)]

    def _layout_values(self) -> list[int]:
        if self.values is not None:
            return list(self.values)
        if self.layout == "sizes":
            return list(self.sizes)
        return [end for _, end in self._places(self.alignment if self.layout == "psum" else 1)]

    def build(self) -> Tensors:
        m, n, groups, is_bf16 = self.m, self.n, len(self.sizes), self.info["scaling"] == "none"
        packed = self.info["scaling"] == "ue8m0"
        as_they_lie = is_bf16 or self.mn_major
        step = 128 if not as_they_lie else self.alignment if self.layout == "psum" else 1
        places = self._places(step)
        k = max(ceil_div(places[-1][1] + self.tail, step) * step, 1)
        # Where each group's scales begin, in blocks of 128.
        blocks = [start // 128 for start, _ in places]
        num_blocks = ceil_div(k, 128)
        if self.mn_major:
            blocks = list(itertools.accumulate((ceil_div(size, 128) for size in self.sizes), initial=0))
            num_blocks = k // 128 + groups
        random = generator(hash((self.sizes, m, n)) % 2**32)
        operands = [self._values((mn, k), random).to(torch.bfloat16 if is_bf16 else FP8) for mn in (m, n)]
        scales = [2.0 ** torch.randint(-2, 3, (num_blocks, mn), generator=random) for mn in (m, n)]
        if self.data == "normal" and not packed:
            scales = [sf * (1 + torch.rand(sf.shape, generator=random)) for sf in scales]

        owned = torch.zeros(k, dtype=torch.bool)
        scaled = torch.zeros(num_blocks, dtype=torch.bool)
        expected = torch.zeros(groups, m, n, dtype=torch.float64)
        for group, (start, end) in enumerate(places):
            owned[start:end] = True
            for i in range(ceil_div(end - start, 128)):
                here = slice(start + 128 * i, min(start + 128 * (i + 1), end))
                product = operands[0][:, here].double() @ operands[1][:, here].double().t()
                if not is_bf16:
                    block = blocks[group] + i
                    scaled[block] = True
                    product *= scales[0][block, :, None].double() * scales[1][block].double()
                expected[group] += product
        for sf in scales:
            sf[~scaled] = math.nan
        if not as_they_lie:
            for _, end in places:
                for x in operands:
                    x.view(torch.uint8)[:, end : ceil_div(end, 128) * 128] = 0
                owned[end : ceil_div(end, 128) * 128] = True
        for x in operands:
            x.view(torch.uint8 if not is_bf16 else torch.int16)[:, ~owned] = 0x7FFF if is_bf16 else 0x7F

        a, b = operands
        if as_they_lie:
            step = 8 if is_bf16 else 16
            a, b = (strided(x.t(), ceil_div(x.shape[0], step) * step + step, "cpu") for x in operands)
        else:
            a, b = (strided(x, ceil_div(k, 16) * 16 + 16, "cpu") for x in operands)
        values = torch.tensor(self._layout_values(), dtype=torch.int32)
        problem = _Problem(
            m=m,
            n=n,
            k=k,
            a=a.data_ptr(),
            b=b.data_ptr(),
            a_stride=a.stride(0),
            b_stride=b.stride(0),
            grouping=GROUPINGS.index("k_grouped"),
            num_groups=groups,
            layout=GROUP_LAYOUTS.index(self.layout),
            group_layout=values.data_ptr(),
            group_alignment=self.alignment,
        )
        inputs = {"a": a, "b": b, "group_layout": values}
        problem.a_mn_major = problem.b_mn_major = as_they_lie
        if is_bf16:
            problem.operands = BF16_OPERANDS
        else:
            if packed:
                scales = [pack_scales(torch.where(sf.isnan(), 255, sf.log2() + 127).long()) for sf in scales]
            fill = -1 if packed else math.nan
            sfa, sfb = (strided(sf, ceil_div(sf.shape[1], 4) * 4 + 4, "cpu", fill) for sf in scales)
            problem.sfa = _Scales(sfa.data_ptr(), 1, sfa.stride(0), 1)
            problem.sfb = _Scales(sfb.data_ptr(), 1, sfb.stride(0), 1)
            problem.gran_k = 128
            inputs |= {"sfa": sfa, "sfb": sfb}
        return self._with_result(problem, inputs, groups, None if self.values is not None else expected)


@dataclasses.dataclass(frozen=True)
class SummedCase(_Case):
    """D = sum of A_g B_g^T over ``groups`` BF16 products (+ C), everything outside of the tensors poisoned with NaN.

    The matrices of an operand lie one after the other, or, ``interleaved``, their rows in turns. ``d``, ``c`` and
    ``data`` are those of RowCase.
    """

    groups: int = 2
    m: int = 64
    n: int = 64
    k: int = 64
    interleaved: bool = False
    d: str = "tma"
    c: str = ""
    data: str = "normal"
    num_sms: int = 8
    seed: int = 0  # of the schedule; the data depends on the rest

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        if self.interleaved:
            x = x.transpose(0, 1)
        outer, rows, cols = x.shape
        buffer = torch.full((outer, rows + 1, ceil_div(cols, 8) * 8 + 8), math.nan, dtype=x.dtype)
        buffer[:, :rows, :cols] = x
        x = buffer[:, :rows, :cols]
        return x.transpose(0, 1) if self.interleaved else x

    def build(self) -> Tensors:
        random = generator(hash((self.groups, self.m, self.n, self.k)) % 2**32)
        a, b = (self._values((self.groups, mn, self.k), random).bfloat16() for mn in (self.m, self.n))
        expected = torch.einsum("bmk,bnk->mn", a.double(), b.double())[None]
        a, b = self._spread(a), self._spread(b)
        problem = _Problem(
            m=self.m,
            n=self.n,
            k=self.k,
            a=a.data_ptr(),
            b=b.data_ptr(),
            a_stride=a.stride(1),
            b_stride=b.stride(1),
            a_group_stride=a.stride(0),
            b_group_stride=b.stride(0),
            operands=BF16_OPERANDS,
            grouping=GROUPINGS.index("summed"),
            num_groups=self.groups,
        )
        return self._with_result(problem, {"a": a, "b": b}, 1, expected)


def main() -> None:
    case = eval(sys.argv[1], {"KGroupedCase": KGroupedCase, "SummedCase": SummedCase})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
