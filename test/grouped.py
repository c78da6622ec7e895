"""Cases of grouped, BF16 and batched products that run themselves: a case is a line of text that repeats a failure.

    python test/grouped.py "MGroupedCase((100, 0, 1), 200, 272, layout='offsets', device='cuda')"

As in ``common``, expected values come from the case's own construction in float64. What must not matter (rows of
padding, what lies between rows, what a result is written over) is NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import deep_gemm_ops

from common import FP8, assert_close, assert_equal, ceil_div, encode_scales, error_bar, forced_row, generator, on_sm100
from gemm_emulation import E2M1, pack_fp4

BF16 = torch.bfloat16


def embed(x: torch.Tensor, pad: int, device: str, align: int = 1) -> torch.Tensor:
    """A copy whose rows lie apart, in a buffer that is NaN otherwise: row strides are multiples of ``align`` plus
    ``pad`` elements."""
    cols = x.shape[-1]
    fill = math.nan if x.dtype.is_floating_point else 0x77  # FP4 has no NaN
    buffer = torch.full((*x.shape[:-1], ceil_div(cols, align) * align + pad), fill).to(x.dtype)
    buffer[..., :cols] = x
    return buffer.to(device)[..., :cols]


def arrange(sf: torch.Tensor, strides: str, device: str) -> torch.Tensor:
    """The same scales, of any rank, in memory in another way."""
    if strides == "rows":
        return sf.contiguous().to(device)
    if strides == "columns":
        return sf.transpose(-1, -2).contiguous().to(device).transpose(-1, -2)
    buffer = torch.full([2 * size + 1 for size in sf.shape], 0x7F, dtype=torch.uint8)  # "scattered"
    buffer = buffer.view(sf.dtype) if sf.element_size() == 1 else torch.full_like(buffer, 77, dtype=sf.dtype)
    if sf.dtype == torch.float32:
        buffer.fill_(math.nan)
    inside = tuple(slice(1, 2 * size + 1, 2) for size in sf.shape)
    buffer[inside] = sf
    return buffer.to(device)[inside]


@contextlib.contextmanager
def mk_alignment(alignment: int) -> Iterator[None]:
    before = deep_gemm_ops.get_mk_alignment_for_contiguous_layout()
    deep_gemm_ops.set_mk_alignment_for_contiguous_layout(alignment)
    try:
        yield
    finally:
        deep_gemm_ops.set_mk_alignment_for_contiguous_layout(before)


@dataclasses.dataclass
class Built:
    """A call of an operator and what has to come out."""

    arguments: list[Any]
    keywords: dict[str, Any]
    expected: torch.Tensor  # float64
    written: torch.Tensor  # bool, of the result's shape: the elements that are specified
    buffer: torch.Tensor | None = None  # that ``out`` is part of


@dataclasses.dataclass(frozen=True)
class Case:
    """What all of the families have in common."""

    @property
    def op(self) -> str:
        raise NotImplementedError

    def build(self) -> Built:
        raise NotImplementedError

    @property
    def repro(self) -> str:
        default = {
            field.name: field.default for field in dataclasses.fields(self) if field.default is not dataclasses.MISSING
        }
        shown = [
            repr(value) if name not in default else f"{name}={value!r}"
            for name, value in dataclasses.asdict(self).items()
            if name not in default or value != default[name]
        ]
        return f'python test/grouped.py "{type(self).__name__}({", ".join(shown)})"'

    def values(self, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
        """FP8 or BF16 as float32."""
        if self.data == "integer":
            return torch.randint(-3, 4, shape, generator=random).float()
        values = torch.randn(shape, generator=random)
        if self.type == "bf16":
            return values.to(BF16).float()
        return (values * 60).clamp(-448, 448).to(FP8).float()

    def stored_values(
        self, which: str, shape: tuple[int, ...], random: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Operand "a" or "b" of FP8, BF16 or packed FP4, and as float64."""
        if self.type == "fp8_fp4" and which in self.fp4:
            codes = torch.randint(16, shape, generator=random)
            return pack_fp4(codes), E2M1[codes]
        values = self.values(shape, random)
        return values.to(self.dtype), values.double()

    @property
    def dtype(self) -> torch.dtype:
        return BF16 if self.type == "bf16" else FP8

    def scales_of(
        self, shape: tuple[int, ...], random: torch.Generator, k_dim: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales as the operator gets them, and as float64."""
        low, high = (-2, 3) if self.data == "integer" else (-8, -3)
        exponents = torch.randint(low, high, shape, generator=random)
        sf64 = torch.pow(2.0, exponents.double())
        if self.scales == "random" and self.data != "integer" and not on_sm100(self.device):
            sf64 = (sf64 * (1 + torch.rand(shape, generator=random))).float().double()
            return sf64.float(), sf64
        return encode_scales(exponents, "float32" if self.scales == "random" else self.scales, k_dim), sf64

    def out_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN-filled memory, and the part of it that has this shape."""
        buffer = torch.full((*[size + 1 for size in shape[:-1]], shape[-1] + 5), math.nan, dtype=dtype)
        buffer = buffer.to(self.device)
        inside = (*[slice(0, size) for size in shape[:-1]], slice(2, shape[-1] + 2))
        return buffer, buffer[inside]

    def run(self) -> torch.Tensor:
        built = self.build()
        op = getattr(torch.ops.deep_gemm, self.op)
        dtype = getattr(torch, self.out_dtype)
        with forced_row(self.row), mk_alignment(getattr(self, "alignment", 128)):
            if built.buffer is None:
                result = op(*built.arguments, **built.keywords)
                assert result.is_contiguous() or result.numel() == 0
            else:
                nothing = op.out(*built.arguments, **built.keywords)
                assert nothing is None, f"the .out form returned {nothing}\nreproduce with: {self.repro}"
                result = built.keywords["out"]
                around = torch.ones_like(built.buffer, dtype=torch.bool)
                inside = [slice(0, size) for size in result.shape]
                inside[-1] = slice(2, result.shape[-1] + 2)
                around[tuple(inside)] = ~built.written.to(around.device)
                untouched = built.buffer[around].isnan().all()
                assert bool(untouched), f"wrote outside of what is its to write\nreproduce with: {self.repro}"
        assert result.dtype == dtype, f"result has dtype {result.dtype}\nreproduce with: {self.repro}"
        assert result.shape == built.expected.shape, f"{result.shape}\nreproduce with: {self.repro}"
        specified = built.written
        actual = torch.where(specified, result.cpu(), torch.zeros((), dtype=dtype))
        expected = torch.where(specified, built.expected, torch.zeros((), dtype=torch.float64))
        if self.data == "integer":
            assert_equal(actual, expected.to(dtype), repro=self.repro)
        else:
            tol = error_bar(dtype, "bf16" if self.type == "bf16" else "fp8")
            assert_close(actual, expected, tol=tol, repro=self.repro)
        return result


def blocks(sf64: torch.Tensor, gran_mn: int, gran_k: int, mn: int, k: int) -> torch.Tensor:
    """Scales ``[.., MN / gran_mn, K / gran_k]`` for each element."""
    rows, groups = torch.arange(mn) // gran_mn, torch.arange(k) // gran_k
    return sf64[..., rows, :][..., groups]


def poison(x: torch.Tensor, rows: torch.Tensor) -> None:
    """NaN into rows, in place, of a matrix of any type but packed scales and FP4."""
    if x.dtype == torch.uint8:
        x[rows] = 0x77
    elif x.element_size() == 1:
        x.view(torch.uint8)[rows] = 0x7F if x.dtype == FP8 else 0xFF
    elif x.dtype != torch.int32:
        x[rows] = math.nan


@dataclasses.dataclass(frozen=True)
class MGroupedCase(Case):
    """``m_grouped_<type>_gemm_<order>_contiguous``; ``sizes`` are the rows of each group. With the type "fp8_fp4" the
    operands in ``fp4`` are FP4."""

    sizes: tuple[int, ...]
    n: int
    k: int
    order: str = "nt"
    type: str = "fp8"
    layout: str = "indices"
    alignment: int = 128
    tail: int = 0  # rows of padding behind the last group
    recipe: tuple[int, ...] = (1, 128, 128)
    pass_recipe: bool = False
    scales: str = "random"  # random (float32), e8m0, packed
    sf_strides: str = "columns"
    out_dtype: str = "bfloat16"
    out: bool = False
    pad: int = 0
    data: str = "normal"
    expected_m: int | None = None
    device: str = "cpu"
    seed: int = 0
    row: int | None = None
    fp4: str = "b"

    @property
    def op(self) -> str:
        return f"m_grouped_{self.type}_gemm_{self.order}_contiguous"

    def starts(self) -> list[int]:
        step = 1 if self.layout == "offsets" else self.alignment
        result, end = [], 0
        for size in self.sizes:
            result.append(ceil_div(end, step) * step)
            end = result[-1] + size
        return result

    def build(self) -> Built:
        random = generator(self.seed)
        starts = self.starts()
        ends = [start + size for start, size in zip(starts, self.sizes)]
        m = max(ends, default=0) + self.tail
        owner = torch.full((m,), -1, dtype=torch.int32)
        for group, (start, end) in enumerate(zip(starts, ends)):
            owner[start:end] = group
        padding = owner < 0
        groups, (gran_m, gran_n, gran_k), gran_k_b = len(self.sizes), self.recipe[:3], self.recipe[-1]
        a, a64 = self.stored_values("a", (m, self.k), random)
        b, b64 = self.stored_values("b", (groups, self.n, self.k), random)
        sf: list[torch.Tensor] = []
        if self.type != "bf16":
            k_groups = ceil_div(self.k, gran_k)
            sfa, sfa64 = self.scales_of((ceil_div(m, gran_m), k_groups), random)
            sfb, sfb64 = self.scales_of((groups, ceil_div(self.n, gran_n), ceil_div(self.k, gran_k_b)), random)
            a64 = a64 * blocks(sfa64, gran_m, gran_k, m, self.k)
            b64 = b64 * blocks(sfb64, gran_n, gran_k_b, self.n, self.k)
            if gran_m == 1:
                poison(sfa, padding)
            sfb = sfb.transpose(1, 2) if self.order == "nn" else sfb
            sf = [arrange(sfa, self.sf_strides, self.device), arrange(sfb, self.sf_strides, self.device)]
        poison(a, padding)
        b = b.transpose(1, 2) if self.order == "nn" else b
        align = 16 // a.element_size()
        needs_alignment = self.order == "nt" or self.type == "bf16"
        a, b = embed(a, self.pad, self.device, align), embed(b, self.pad, self.device, align if needs_alignment else 1)
        layout = owner if self.layout == "indices" else torch.tensor(ends, dtype=torch.int32)
        expected = torch.zeros(m, self.n, dtype=torch.float64)
        for group, (start, end) in enumerate(zip(starts, ends)):
            expected[start:end] = a64[start:end] @ b64[group].t()

        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, Any] = {"layout": self.layout}
        if self.expected_m is not None:
            keywords["expected_m"] = self.expected_m
        if self.pass_recipe:
            keywords["recipe"] = list(self.recipe)
        operands = [a, sf[0], b, sf[1]] if sf else [a, b]
        written = torch.ones(m, self.n, dtype=torch.bool)
        buffer = None
        if self.out:
            buffer, keywords["out"] = self.out_buffer((m, self.n), dtype)
            if self.k > 0:
                written &= ~padding[:, None]
        else:
            keywords["out_dtype"] = dtype
        return Built([*operands, layout.to(self.device)], keywords, expected, written, buffer)


@dataclasses.dataclass(frozen=True)
class MaskedCase(Case):
    """``m_grouped_<type>_gemm_nt_masked``; ``counts`` are the rows of each group that count, ``fp4`` as above."""

    counts: tuple[int, ...]
    m_max: int
    n: int
    k: int
    type: str = "fp8"
    recipe: tuple[int, ...] = (1, 128, 128)
    pass_recipe: bool = False
    scales: str = "random"
    sf_strides: str = "columns"
    out_dtype: str = "bfloat16"
    out: bool = False
    pad: int = 0
    data: str = "normal"
    expected_m: int = 16
    device: str = "cpu"
    seed: int = 0
    row: int | None = None
    fp4: str = "b"

    @property
    def op(self) -> str:
        return f"m_grouped_{self.type}_gemm_nt_masked"

    def build(self) -> Built:
        random = generator(self.seed)
        groups, (gran_m, gran_n, gran_k), gran_k_b = len(self.counts), self.recipe[:3], self.recipe[-1]
        a, a64 = self.stored_values("a", (groups, self.m_max, self.k), random)
        b, b64 = self.stored_values("b", (groups, self.n, self.k), random)
        counts = torch.tensor(self.counts, dtype=torch.int32)
        live = torch.arange(self.m_max) < counts[:, None]
        poison(a, ~live)
        sf: list[torch.Tensor] = []
        if self.type != "bf16":
            k_groups = ceil_div(self.k, gran_k)
            sfa, sfa64 = self.scales_of((groups, ceil_div(self.m_max, gran_m), k_groups), random)
            sfb, sfb64 = self.scales_of((groups, ceil_div(self.n, gran_n), ceil_div(self.k, gran_k_b)), random)
            a64 = a64 * blocks(sfa64, gran_m, gran_k, self.m_max, self.k)
            b64 = b64 * blocks(sfb64, gran_n, gran_k_b, self.n, self.k)
            if gran_m == 1:
                poison(sfa, ~live)
            sf = [arrange(sfa, self.sf_strides, self.device), arrange(sfb, self.sf_strides, self.device)]
        align = 16 // a.element_size()
        a, b = (embed(x, self.pad, self.device, align) for x in (a, b))
        expected = a64 @ b64.transpose(1, 2)

        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, Any] = {"recipe": list(self.recipe)} if self.pass_recipe else {}
        buffer = None
        if self.out:
            buffer, keywords["out"] = self.out_buffer((groups, self.m_max, self.n), dtype)
        else:
            keywords["out_dtype"] = dtype
        operands = [a, sf[0], b, sf[1]] if sf else [a, b]
        written = live[:, :, None].expand(groups, self.m_max, self.n)
        return Built([*operands, counts.to(self.device), self.expected_m], keywords, expected, written, buffer)


@dataclasses.dataclass(frozen=True)
class KGroupedCase(Case):
    """``k_grouped_<type>_gemm_<order>_contiguous``; ``sizes`` are the K of each group."""

    sizes: tuple[int, ...]
    m: int
    n: int
    order: str = "tn"  # tn, nt (flat), padded (nt)
    type: str = "fp8"
    layout: str = "sizes"
    alignment: int = 128
    tail: int = 0  # rows behind the last group
    scales: str = "random"  # random (float32), e8m0
    sf_strides: str = "rows"
    sf_tail: int = 0  # rows of scales behind the last group's
    out_dtype: str = "float32"
    c: str = ""  # "", full, bias, alias
    out: bool = False
    pad: int = 0
    data: str = "normal"
    device: str = "cpu"
    seed: int = 0
    row: int | None = None

    @property
    def op(self) -> str:
        return f"k_grouped_{self.type}_gemm_{'tn' if self.order == 'tn' else 'nt'}_contiguous"

    def build(self) -> Built:
        random = generator(self.seed)
        step = self.alignment if self.layout == "psum" else 1
        starts, end = [], 0
        for size in self.sizes:
            starts.append(ceil_div(end, step) * step)
            end = starts[-1] + size
        ends = [start + size for start, size in zip(starts, self.sizes)]
        k, groups = max(ends, default=0) + self.tail, len(self.sizes)
        owned = torch.zeros(k, dtype=torch.bool)
        for start, end in zip(starts, ends):
            owned[start:end] = True
        operands, factors = [], []
        for mn in (self.m, self.n):
            x = self.values((k, mn), random)
            x64 = x.double()
            x = x.to(self.dtype)
            poison(x, ~owned)
            sf = None
            if self.type == "fp8":
                rows = sum(ceil_div(size, 128) for size in self.sizes)
                sf, sf64 = self.scales_of((rows, mn), random, 0)
                row = 0
                for start, size in zip(starts, self.sizes):
                    of_row = row + torch.arange(size) // 128
                    x64[start : start + size] *= sf64[of_row]
                    row += ceil_div(size, 128)
                enough = k // 128 + groups if self.order == "padded" else ceil_div(k, 128)
                tail = max(0, enough - rows) + (0 if self.order == "padded" else self.sf_tail)
                behind = torch.arange(rows + tail) >= rows
                padded = torch.empty((rows + tail, mn), dtype=sf.dtype)
                padded[:rows] = sf
                poison(padded, behind)
                sf = arrange(padded, self.sf_strides, self.device)
            if self.order == "padded":
                columns = torch.zeros(mn, 128 * (k // 128 + groups)).to(self.dtype)
                column = 0
                for start, end in zip(starts, ends):
                    columns[:, column : column + end - start] = x[start:end].t()
                    column += ceil_div(end - start, 128) * 128
                x = embed(columns, self.pad, self.device)
            elif self.order == "nt":
                parts = [x[start:end].t().reshape(-1) for start, end in zip(starts, ends)]
                x = torch.cat([*parts, x.new_empty(0)]).to(self.device)
            else:
                x = embed(x, self.pad, self.device, 8 if self.type == "bf16" else 1)
            operands += [x] if sf is None else [x, sf]
            factors.append(x64)
        expected = torch.zeros(groups, self.m, self.n, dtype=torch.float64)
        for group, (start, end) in enumerate(zip(starts, ends)):
            expected[group] = factors[0][start:end].t() @ factors[1][start:end]
        ks = torch.tensor(self.sizes if self.layout == "sizes" else ends, dtype=torch.int32)

        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, Any] = {"layout": self.layout}
        c = None
        if self.c:
            shape = (self.n,) if self.c == "bias" else (groups, self.m, self.n)
            c = torch.randint(-9, 10, shape, generator=random).to(dtype)
            expected = expected + c.double()
            c = c.to(self.device)
        buffer = None
        if self.out or self.c == "alias":
            buffer, out = self.out_buffer((groups, self.m, self.n), dtype)
            if self.c == "alias":
                c = out.copy_(c)
            keywords["out"] = out
        else:
            keywords["out_dtype"] = dtype
        keywords["c"] = c
        written = torch.ones(expected.shape, dtype=torch.bool)
        return Built([*operands, ks.to(self.device)], keywords, expected, written, buffer)


@dataclasses.dataclass(frozen=True)
class EinsumCase(Case):
    """``einsum`` or ``fp8_einsum``; ``sizes`` are those of the letters of ``expr`` in the order of the alphabet."""

    expr: str
    sizes: tuple[int, int, int, int] | tuple[int, int, int]
    type: str = "bf16"
    recipe: tuple[int, ...] = (1, 128, 128)
    pass_recipe: bool = False
    scales: str = "random"
    sf_strides: str = "rows"
    out_dtype: str = "bfloat16"
    c: str = ""  # "", full, bias, alias
    out: bool = False
    pad: int = 0
    data: str = "normal"
    device: str = "cpu"
    seed: int = 0
    row: int | None = None

    @property
    def op(self) -> str:
        return "fp8_einsum" if self.type == "fp8" else "einsum"

    def build(self) -> Built:
        random = generator(self.seed)
        inputs, out_dims = self.expr.split("->")
        letters = sorted(set(inputs) - {","})
        size_of = dict(zip(letters, self.sizes))
        contracted = {"bmk,bnk->mn": "k", "bhr,hdr->bhd": "r", "bhd,hdr->bhr": "d", "bhd,bhr->hdr": "b"}[self.expr]
        batch = "b" if "m" in letters else "h"
        operands, factors = [], []
        for dims, gran_mn in zip(inputs.split(","), self.recipe):
            shape = tuple(size_of[letter] for letter in dims)
            x = self.values(shape, random)
            x64 = x.double()
            x = x.to(self.dtype)
            tma = self.type == "bf16" or dims[-1] == contracted
            operands.append(embed(x, self.pad, self.device, 16 // x.element_size() if tma else 1))
            if self.type == "fp8":
                gran = {contracted: self.recipe[2], batch: 1}
                sf_shape = tuple(ceil_div(size_of[letter], gran.get(letter, gran_mn)) for letter in dims)
                sf, sf64 = self.scales_of(sf_shape, random, dims.index(contracted))
                for dim, letter in enumerate(dims):
                    sf64 = sf64.index_select(dim, torch.arange(size_of[letter]) // gran.get(letter, gran_mn))
                x64 = x64 * sf64
                operands.append(arrange(sf, self.sf_strides, self.device))
            factors.append(x64)
        expected = torch.einsum(self.expr, *factors)
        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, Any] = {"recipe": list(self.recipe)} if self.pass_recipe else {}
        c = None
        if self.c:
            shape = tuple(expected.shape[-1:] if self.c == "bias" else expected.shape)
            c = torch.randint(-9, 10, shape, generator=random).to(dtype)
            expected = expected + c.double()
            c = c.to(self.device)
        buffer = None
        if self.out or self.c == "alias":
            buffer, out = self.out_buffer(tuple(expected.shape), dtype)
            if self.c == "alias":
                c = out.copy_(c)
            keywords["out"] = out
        else:
            keywords["out_dtype"] = dtype
        keywords["c"] = c
        written = torch.ones(expected.shape, dtype=torch.bool)
        return Built([self.expr, *operands], keywords, expected, written, buffer)


@dataclasses.dataclass(frozen=True)
class BF16Case(Case):
    """``bf16_gemm_<layout>``."""

    m: int
    n: int
    k: int
    layout: str = "nt"
    out_dtype: str = "bfloat16"
    c: str = ""  # "", full, bias, alias
    out: bool = False
    pad: int = 0
    data: str = "normal"
    device: str = "cpu"
    seed: int = 0
    row: int | None = None
    type: str = "bf16"

    @property
    def op(self) -> str:
        return f"bf16_gemm_{self.layout}"

    def build(self) -> Built:
        random = generator(self.seed)
        a, b = self.values((self.m, self.k), random), self.values((self.n, self.k), random)
        expected = a.double() @ b.double().t()
        a, b = (a.t() if self.layout[0] == "t" else a), (b.t() if self.layout[1] == "n" else b)
        operands = [embed(x.to(BF16), self.pad, self.device, 8) for x in (a, b)]
        dtype = getattr(torch, self.out_dtype)
        keywords: dict[str, Any] = {}
        c = None
        if self.c:
            c = torch.randint(-9, 10, (self.n,) if self.c == "bias" else (self.m, self.n), generator=random).to(dtype)
            expected = expected + c.double()
            c = c.to(self.device)
        buffer = None
        if self.out or self.c == "alias":
            buffer, out = self.out_buffer((self.m, self.n), dtype)
            if self.c == "alias":
                c = out.copy_(c)
            keywords["out"] = out
        else:
            keywords["out_dtype"] = dtype
        keywords["c"] = c
        written = torch.ones(expected.shape, dtype=torch.bool)
        return Built(operands, keywords, expected, written, buffer)


@dataclasses.dataclass(frozen=True)
class HeadsCase(Case):
    """``fp8_gemm_nt_skip_head_mid``."""

    m: int
    heads: int
    splits: tuple[int, int, int]
    k: int
    recipe: tuple[int, ...] = (1, 128, 128)
    scales: str = "random"
    out_dtype: str = "bfloat16"
    out: bool = False
    data: str = "normal"
    device: str = "cpu"
    seed: int = 0
    row: int | None = None
    type: str = "fp8"

    @property
    def op(self) -> str:
        return "fp8_gemm_nt_skip_head_mid"

    def build(self) -> Built:
        random = generator(self.seed)
        left, mid, right = self.splits
        n, k_groups = self.heads * (left + right), ceil_div(self.k, self.recipe[2])
        operands, factors = [], []
        for mn, gran in ((self.m, self.recipe[0]), (n, self.recipe[1])):
            x = self.values((mn, self.k), random)
            sf, sf64 = self.scales_of((ceil_div(mn, gran), k_groups), random)
            factors.append(x.double() * blocks(sf64, gran, self.recipe[2], mn, self.k))
            operands += [embed(x.to(FP8), 0, self.device, 16), arrange(sf, "columns", self.device)]
        product = factors[0] @ factors[1].t()
        columns = [
            torch.cat([torch.full((left,), 1), torch.full((mid,), 0), torch.full((right,), 1)]).bool()
            for _ in range(self.heads)
        ]
        inside = torch.cat([*columns, torch.zeros(0, dtype=torch.bool)])
        expected = torch.zeros(self.m, len(inside), dtype=torch.float64)
        expected[:, inside] = product
        dtype = getattr(torch, self.out_dtype)
        written = torch.ones(expected.shape, dtype=torch.bool)
        if self.out:
            buffer, out = self.out_buffer(tuple(expected.shape), dtype)
            keywords: dict[str, Any] = {"out": out}
            written[:] = inside
        else:
            buffer, keywords = None, {"out_dtype": dtype}
        return Built([*operands, list(self.splits)], keywords, expected, written, buffer)


def random_case(seed: int, device: str, max_mn: int = 200, max_k: int = 400) -> Case:
    """A case of any family, drawn from everything that the operators accept."""
    random = generator(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    def size(limit: int) -> int:
        edge = pick(0, 1, 16, 64, 128, 129) if pick(True, False) else int(torch.randint(limit, (1,), generator=random))
        return min(edge, limit)

    common: dict[str, Any] = {"device": device, "seed": seed, "data": pick("normal", "integer")}
    common |= {"out": pick(True, False), "out_dtype": pick("bfloat16", "float32")}
    recipe = (pick(1, 1, 128), pick(1, 128), pick(128, 128, 32))
    scales = pick("random", "e8m0", "packed")
    fp8 = {"recipe": recipe, "pass_recipe": True, "scales": scales, "sf_strides": pick("rows", "columns", "scattered")}
    counts = tuple(size(max_mn) for _ in range(pick(0, 1, 3, 6)))
    kind, type_ = pick("m", "masked", "k", "einsum", "bf16", "heads"), pick("fp8", "bf16")
    scaled = fp8 if type_ == "fp8" else {}
    c = pick("", "full", "bias", "alias")
    if kind == "m":
        common |= {"type": type_, "order": pick("nt", "nn"), "layout": pick("indices", "psum", "offsets")}
        options = {"alignment": pick(128, 64, 16, 256), "tail": pick(0, 0, 5, 130), "pad": pick(0, 16)}
        return MGroupedCase(counts, size(max_mn), size(max_k), **common, **options, **scaled)
    if kind == "masked":
        m_max = max([*counts, size(max_mn)])
        return MaskedCase(counts, m_max, size(max_mn), size(max_k), type=type_, **common, **scaled)
    if kind == "k":
        order = pick("tn", "nt", "padded") if type_ == "fp8" else "tn"
        layout = pick("sizes", "offsets", "psum")
        if order == "nt":
            counts = tuple(ceil_div(count, 128) * 128 for count in counts)
        else:
            common |= {"tail": pick(0, 0, 9), "pad": pick(0, 16)}
        if type_ == "fp8":
            common |= {"scales": pick("random", "e8m0"), "sf_strides": fp8["sf_strides"], "sf_tail": pick(0, 3)}
        return KGroupedCase(counts, size(max_mn), size(max_mn), order=order, type=type_, layout=layout, c=c, **common)
    if kind == "einsum":
        expressions = {
            "fp8": ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr"),
            "bf16": ("bhr,hdr->bhd", "bhd,hdr->bhr", "bmk,bnk->mn"),
        }
        expr = pick(*expressions[type_])
        sizes = [size(max_mn) for _ in range(4)]
        sizes[0 if "m" in expr else 2] = pick(0, 1, 3, 5)  # the batch
        return EinsumCase(expr, tuple(sizes), type=type_, c=c, pad=pick(0, 16), **common, **scaled)
    if kind == "bf16":
        return BF16Case(size(max_mn), size(max_mn), size(max_k), pick("nt", "nn", "tn", "tt"), c=c, **common)
    splits = (pick(0, 8, 128), pick(0, 5, 64), pick(1, 16, 128))
    return HeadsCase(size(max_mn), pick(0, 1, 3), splits, size(max_k), (recipe[0], recipe[1], 128), **common)


def small_cases(device: str) -> list[Case]:
    """A few calls of every overload of every family, over shapes that meet each branch."""
    cases: list[Case] = []
    common = {"device": device}
    for type_, out, out_dtype in itertools.product(("fp8", "bf16"), (False, True), ("bfloat16", "float32")):
        common = {"device": device, "type": type_, "out": out, "out_dtype": out_dtype}
        # Every row of a functional masked result is specified: opcheck compares them all.
        for order, layout in itertools.product(("nt", "nn"), ("indices", "psum", "offsets")):
            cases.append(MGroupedCase((36, 0, 5), 40, 272, order=order, layout=layout, alignment=128, **common))
        cases.append(MGroupedCase((4, 4), 16, 48, layout="offsets", expected_m=4, **common))
        cases.append(MaskedCase((36, 36, 36), 36, 24, 272, **common))
        for layout in ("sizes", "psum", "offsets"):
            cases.append(KGroupedCase((130, 0, 5), 24, 40, layout=layout, c="full" if out else "", **common))
        if type_ == "fp8":
            cases.append(KGroupedCase((128, 0, 256), 24, 40, order="nt", c="bias", **common))
            cases.append(KGroupedCase((130, 0, 5), 24, 40, order="padded", layout="offsets", **common))
        expressions = ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr" if type_ == "fp8" else "bmk,bnk->mn")
        for expr in expressions:
            cases.append(EinsumCase(expr, (6, 32, 3, 48) if "h" in expr else (3, 48, 6, 32), c="full", **common))
        if type_ == "bf16":
            for layout in ("nt", "nn", "tn", "tt"):
                cases.append(BF16Case(48, 40, 72, layout, c="bias" if out else "", **common))
        else:
            cases.append(HeadsCase(6, 2, (16, 8, 24), 272, **common))
    for out, fp4 in itertools.product((False, True), ("b", "a")):
        options: dict[str, Any] = {"device": device, "type": "fp8_fp4", "out": out, "fp4": fp4, "recipe": (1, 1, 32)}
        for order in ("nt", "nn") if fp4 == "a" else ("nt",):
            cases.append(MGroupedCase((36, 0, 5), 40, 256, order=order, **options))
        cases.append(MaskedCase((36, 36, 36), 36, 24, 256, **options))
    return cases


def main() -> None:
    warnings.simplefilter("error")
    case = eval(sys.argv[1], {name: value for name, value in globals().items() if name.endswith("Case")})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
