"""Grouped and batched products on rows of the GEMM table under the PTX emulator; see gemm_emulation.py.

python test/grouped_emulation.py "GroupedCase('sm90_fp8_1d2d_m64n64_mgrouped', 'psum', (3, 0, 70), 40, 200)"
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from typing import Any, NamedTuple

import torch

from deep_gemm_ops._capi import GROUP_LAYOUTS, GROUPINGS

import ptx_emulator
from common import FP8, assert_close, assert_equal, ceil_div, error_bar, generator, same_bits
from gemm_emulation import (
    BF16_OPERANDS,
    BFLOAT16,
    BUDGET,
    FLOAT32,
    FP4_FAMILIES,
    _Problem,
    _Scales,
    k_multiple,
    launch,
    order_of_tokens,
    prepared,
    row_named,
    shown,
)
from gemm_sm100_emulation import pack_scales, random_fp4


def spread(x: torch.Tensor, inner: int, interleaved: bool = False) -> torch.Tensor:
    """A copy of ``[groups, rows, cols]`` whose rows lie ``inner`` apart, with a row between groups, or the groups' rows
    in turns. Memory in between is NaN, of integers 0x77.
    """
    groups, rows, cols = x.shape
    if interleaved:
        return spread(x.transpose(0, 1), inner).transpose(0, 1)
    bits = torch.full((1,), 0x77, dtype=torch.uint8) if x.dtype == torch.uint8 else torch.full((4,), -1).to(torch.int32)
    fill = bits.view(x.dtype)[0] if not x.dtype.is_floating_point else torch.tensor(math.nan).to(x.dtype)
    buffer = fill.expand(groups, rows + 1, inner).clone()
    buffer[:, :rows, :cols] = x
    return buffer[:, :rows, :cols]


def align(x: int, multiple: int) -> int:
    return ceil_div(x, multiple) * multiple


class GroupedTensors(NamedTuple):
    """Of a GroupedCase. ``expected``: what D has to be, in float64, NaN where it stays as it is."""

    problem: _Problem
    inputs: dict[str, torch.Tensor]
    buffer: torch.Tensor  # holds D
    d: torch.Tensor
    expected: torch.Tensor


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """Groups of ``sizes`` rows on a row of the table. Padding, and all that lies outside of the tensors, is NaN.

    ``layout`` is that of M-grouped products, or ``batched``, whose groups are as many rows as the first of ``sizes``.
    ``tail`` rows follow the last group; masked: they are the rows of each group behind the largest one. ``values``
    replaces what the layout holds: then only memory is checked. ``heads`` are the left, middle and right columns of a
    dense product's heads. ``k`` grows to what the row takes. ``d``, ``c`` and ``data`` are those of RowCase. On SM100
    TMA stores FP32 results, too: ``float32`` are those that it can address, ``float32_direct`` others. There ``a`` and
    ``b`` may be fp4, B K-major or not, and the granularity of scales is the case's, too.
    """

    row: str
    layout: str
    sizes: tuple[int, ...]
    n: int
    k: int
    alignment: int = 128
    tail: int = 0
    zero_padding: bool = False
    interleaved: bool = False
    heads: tuple[int, int, int] | None = None
    d: str = "tma"
    c: str = ""
    data: str = "normal"
    values: tuple[int, ...] | None = None
    num_sms: int = 3
    seed: int = 0  # of the schedule; the data depends on the rest
    a: str = "fp8"
    b: str = "fp8"
    b_mn_major: bool = False
    gran_k: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", align(self.k, k_multiple(self.info)))

    def __str__(self) -> str:
        return shown(self)

    @property
    def repro(self) -> str:
        return f'python test/grouped_emulation.py "{self}"'

    @property
    def info(self) -> dict[str, Any]:
        return row_named(self.row)

    def places(self) -> tuple[int, list[tuple[int, int]]]:
        """Rows of A and D, and where each group begins and ends; in its own matrix where it has one."""
        if self.layout == "batched":
            return self.sizes[0], [(0, self.sizes[0])] * len(self.sizes)
        if self.layout == "masked":
            return max(self.sizes) + self.tail, [(0, size) for size in self.sizes]
        step = 1 if self.layout == "offsets" else self.alignment
        starts = list(itertools.accumulate((align(size, step) for size in self.sizes), initial=0))
        return starts[-1] + self.tail, [(start, start + size) for start, size in zip(starts, self.sizes)]

    def layout_values(self, rows: int, places: list[tuple[int, int]]) -> list[int]:
        if self.values is not None:
            return list(self.values)
        if self.layout == "masked":
            return list(self.sizes)
        if self.layout != "indices":
            return [end for _, end in places]
        owner = [-1] * rows
        for group, (start, end) in enumerate(places):
            owner[start:end] = [group] * (end - start)
        return owner

    def _random(
        self, shape: tuple[int, ...], groups: tuple[int, ...], random: torch.Generator, kind: str, powers: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values as the row takes them and in float64, and scales of shape ``groups``, which are 1 for BF16."""
        if self.info["scaling"] == "none" or kind == "bf16":
            values = torch.randn(shape, generator=random)
            if self.data != "normal":
                values = torch.randint(-3, 4, shape, generator=random)
            stored = values.bfloat16()
            return stored, stored.double(), torch.ones(groups)
        scales = 2.0 ** torch.randint(-2, 3, groups, generator=random)
        if self.data == "normal" and not powers:
            scales = scales * (1 + torch.rand(groups, generator=random))
        if kind == "fp4":
            values, stored = random_fp4(shape, random)
            return stored, values, scales.float()
        values = torch.randint(-3, 4, shape, generator=random).float()
        if self.data == "normal":
            values = (torch.randn(shape, generator=random) * 60).clamp(-448, 448)
        return values.to(FP8), values.to(FP8).double(), scales.float()

    def build(self) -> GroupedTensors:
        info, n, k, groups = self.info, self.n, self.k, len(self.sizes)
        rows, places = self.places()
        own_rows = self.layout in ("masked", "batched")  # each group has its own A and D
        matrices = groups if own_rows else 1
        is_bf16 = info["scaling"] == "none"
        is_sm100 = info["arch"] == "sm_100a"
        b_mn_major = self.b_mn_major if is_sm100 else info["b_mn_major"]
        gran_n = 128 if info["scaling"] == "1d2d" else 1
        gran_k = k if is_bf16 else self.gran_k if is_sm100 else info["gran_k"]
        k_groups = ceil_div(k, gran_k)
        random = generator(hash((self.sizes, n, k)) % 2**32)
        # SM90's rows for FP4 have it in B, whose scales are per 32 of K, and packed where A's are per 128.
        sm90_fp4 = info["family"] in FP4_FAMILIES and not is_sm100
        bf16_tokens = info["family"] == "bf16_fp4_gemm"  # with scales of their own per 128 of K only
        gran_k_b = 32 if sm90_fp4 else gran_k
        is_packed = [info["scaling"] == "ue8m0" and is_sm100, info["scaling"] == "ue8m0"]
        groups_of_b = (groups, ceil_div(n, gran_n), ceil_div(k, gran_k_b))
        kind_of_b = "fp4" if sm90_fp4 else self.b
        kind_of_a = "bf16" if bf16_tokens else self.a
        a, a_values, sfa = self._random(
            (matrices, rows, k), (matrices, k_groups, rows), random, kind_of_a, is_packed[0]
        )
        b, b_values, sfb = self._random((groups, n, k), groups_of_b, random, kind_of_b, is_packed[1])

        d_type = torch.float32 if self.d.startswith("float32") else torch.bfloat16
        # Rows that belong to no group are NaN in A and in D, where they stay so unless they are to be set to zero.
        expected = torch.full((matrices, rows, n), 0.0 if self.zero_padding else math.nan, dtype=torch.float64)
        owned = torch.zeros(matrices, rows, dtype=torch.bool)
        columns = torch.arange(n) // gran_n
        for group, (start, end) in enumerate(places):
            at = (group if own_rows else 0, slice(start, end))
            owned[at] = True
            expected[at] = 0
            for i in range(sfb.shape[2]):
                block = slice(i * gran_k_b, (i + 1) * gran_k_b)
                product = a_values[at][:, block] @ b_values[group, :, block].t()
                scales_of_a = sfa[at[0], i * gran_k_b // gran_k, start:end, None].double()
                expected[at] += product * (scales_of_a * sfb[group, columns, i].double())
        if bf16_tokens:
            a = a[..., order_of_tokens(k)]
        if is_bf16 or bf16_tokens:
            a[~owned] = math.nan
        else:
            a.view(torch.uint8)[~owned] = 0x7F
        sfa.transpose(1, 2)[~owned] = math.nan
        sfa, sfb = (
            pack_scales(torch.where(sf.isnan(), 255, sf.log2() + 127).long()) if packed else sf
            for sf, packed in zip((sfa, sfb.transpose(1, 2)), is_packed)
        )
        sfb = sfb.transpose(1, 2)

        # The product's columns that each column of D holds.
        source = torch.arange(n)
        if self.heads:
            left, mid, right = self.heads
            gap = torch.full((n // (left + right), mid), -1)
            head = source.view(-1, left + right)
            source = torch.cat([head[:, :left], gap, head[:, left:]], 1).flatten()
        offset, step = (8, 8) if self.d == "tma" or (is_sm100 and self.d == "float32") else (3, 1)
        stride = align(offset + len(source) + 5, step)
        if self.interleaved:
            buffer = torch.full((rows + 2, matrices, stride), math.nan, dtype=d_type).transpose(0, 1)
        else:
            buffer = torch.full((matrices, rows + 2, stride), math.nan, dtype=d_type)
        d = buffer[:, 1 : rows + 1, offset : offset + len(source)]
        c = None
        if self.c:
            c = torch.randint(-99, 100, (matrices, rows, n), generator=random).to(d_type)
            if self.c == "bias":
                c = c[:, :1]
            expected += c.double()
            c = d.copy_(c) if self.c == "alias" else spread(c, n + 3)
        expected = torch.where(source >= 0, expected[:, :, source], math.nan)

        # TMA takes rows of FP4 at multiples of 32 bytes.
        item = [2 if x.dtype == torch.uint8 else 1 for x in (a, b)]  # elements of a stored one
        a = spread(a, align(a.shape[2], 16 * item[0]) + 16 * item[0], self.interleaved)
        if b_mn_major:
            b = b.transpose(1, 2)
        b = spread(b, align(b.shape[2], 16 * item[1]) + 16 * item[1], self.interleaved)
        sfa = spread(sfa, align(rows, 4) + 4).transpose(1, 2)
        if gran_n == 1:
            sfb = spread(sfb.transpose(1, 2), align(n, 4) + 4).transpose(1, 2)
        else:
            sfb = spread(sfb, k_groups + 3)
        problem = _Problem(
            m=rows,
            n=n,
            k=k,
            a=a.data_ptr(),
            b=b.data_ptr(),
            a_stride=a.stride(1) * item[0],
            b_stride=b.stride(1) * item[1],
            sfb_is_packed=is_packed[1] and not is_sm100,
            d=d.data_ptr(),
            d_stride=d.stride(1),
            d_type=FLOAT32 if d.dtype == torch.float32 else BFLOAT16,
            num_groups=groups,
            a_group_stride=a.stride(0) * item[0],
            b_group_stride=b.stride(0) * item[1],
            a_is_fp4=item[0] == 2,
            b_is_fp4=item[1] == 2,
            b_mn_major=b_mn_major,
            d_group_stride=d.stride(0),
            grouping=GROUPINGS.index("batched" if self.layout == "batched" else "m_grouped"),
            zero_padding=self.zero_padding,
            group_alignment=self.alignment,
        )
        inputs = {"a": a, "b": b}
        if is_bf16:
            problem.operands = BF16_OPERANDS
        else:
            problem.sfa = _Scales(sfa.data_ptr(), sfa.stride(1), sfa.stride(2), 1, sfa.stride(0))
            problem.sfb = _Scales(sfb.data_ptr(), sfb.stride(1), sfb.stride(2), gran_n, sfb.stride(0))
            problem.gran_k = gran_k
            inputs["sfb"] = sfb
            if bf16_tokens:
                problem.operands = BF16_OPERANDS
            if not (bf16_tokens and gran_k == 32):
                inputs["sfa"] = sfa
        if self.layout != "batched":
            values = torch.tensor(self.layout_values(rows, places), dtype=torch.int32)
            inputs["group_layout"] = values
            problem.layout, problem.group_layout = GROUP_LAYOUTS.index(self.layout), values.data_ptr()
        if self.heads:
            problem.grouping = GROUPINGS.index("dense")
            problem.head_left, problem.head_mid, problem.head_right = self.heads
        if c is not None:
            problem.c, problem.c_group_stride = c.data_ptr(), c.stride(0)
            problem.c_stride = 0 if self.c == "bias" else c.stride(1)
            if self.c != "alias":
                inputs["c"] = c
        return GroupedTensors(problem, inputs, buffer, d, expected)

    def run(self, module: ptx_emulator.Module | None = None, **options: int) -> torch.Tensor:
        """Runs the case and returns D; raises AssertionError or PtxError, with a line that repeats it."""
        problem, inputs, buffer, d, expected = prepared(self)
        before = buffer.clone()
        options = {"budget": BUDGET, "seed": self.seed, **options}
        try:
            launch(self.info["index"], problem, buffer, inputs, num_sms=self.num_sms, module=module, **options)
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
        after, result = buffer.clone(), d.clone()
        touched = torch.zeros_like(buffer, dtype=torch.bool)
        own = touched.as_strided(d.shape, d.stride(), d.storage_offset())
        own[:] = True if self.values is not None else ~expected.isnan()
        assert same_bits(after[~touched], before[~touched]), f"wrote what is not its own\nreproduce with: {self.repro}"
        if self.values is not None:
            return result
        inside = ~expected.isnan()
        for matrix, (actual, wanted) in enumerate(zip(result, expected)):
            actual, wanted = (torch.where(inside[matrix], x, 0) for x in (actual, wanted))
            if self.data == "normal":
                float_tol = error_bar(d.dtype, "bf16") if self.info["scaling"] == "none" else 2e-6
                tol = float_tol if d.dtype == torch.float32 else error_bar(d.dtype)
                assert_close(actual, wanted, tol=tol, repro=self.repro)
            else:
                assert_equal(actual, wanted.to(d.dtype), repro=self.repro)
        return result


def main() -> None:
    case = eval(sys.argv[1], {"GroupedCase": GroupedCase})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
