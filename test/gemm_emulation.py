"""Runs rows of the GEMM table under the PTX emulator, through the library's own host code.

`run_row` has the library fill the kernel's parameters for a row, with the emulator's encoder of tensor maps in place of
the driver's, and hands the launch to a callback that runs the kernel's PTX as it was compiled into the library.
`RowCase` is a problem for a row, in one line of text that repeats a failure:

    python test/gemm_emulation.py "RowCase('sm90_fp8_1d2d_m128n128', 130, 257, 400, d='direct', c='alias', seed=3)"
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deep_gemm_ops import _capi
from deep_gemm_ops._capi import GROUP_LAYOUTS, GROUPINGS
from deep_gemm_ops.inspect import find_tool

import ptx_emulator
from common import FP8, arrange_scales, assert_close, assert_equal, ceil_div, error_bar, generator, same_bits, strided
from ptx_emulator import mutate

BFLOAT16, FLOAT32 = 0, 1
FP8_OPERANDS, BF16_OPERANDS = 0, 1
# The value of each E2M1 code.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
# What the names of an architecture's kernels have in common.
KERNELS = {"sm_90a": "sm90_gemm", "sm_100a": "sm100_gemm"}
# Warp instructions before a run is declared endless; the largest case needs a hundredth.
BUDGET = 500_000_000


FP4_FAMILIES = ("fp8_fp4_gemm", "bf16_fp4_gemm")


def order_of_tokens(k: int) -> torch.Tensor:
    """Which values of K BF16 tokens beside FP4 weights have, one after the other (src/cast/bf16_tokens.cu)."""
    i, h, u, t, b = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (4, 2, 2, 4, 2)), indexing="ij"))
    block = 32 * t + 8 * i + 2 * h + u + 4 * b
    return (128 * torch.arange(k // 128)[:, None] + block).flatten()


def k_multiple(row: dict[str, Any]) -> int:
    """K that a row takes: whole pairs of FP4, whole words of their scales."""
    if row["family"] not in FP4_FAMILIES or row["arch"] == "sm_100a":
        return 1
    return 128 if row["scaling"] == "ue8m0" else 2


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, two a byte along the last dimension."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two or NaN as UE8M0, four a word along the last dimension, which holds a multiple of them."""
    codes = torch.where(scales.isnan(), 255, scales.nan_to_num(1).log2() + 127)
    return codes.to(torch.uint8).contiguous().view(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The library's PTX


@functools.cache
def units(part: str = "sm90_gemm") -> list[tuple[str, ptx_emulator.Module]]:
    """The library's PTX, a module for each unit that has ``part`` in its kernels' names.

    $DG_TEST_PTX names a file to take it from instead, to try a kernel without building the library.
    """
    if override := os.environ.get("DG_TEST_PTX"):
        text = Path(override).read_text()
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                find_tool("cuobjdump"),
                "-arch",
                "sm_100a" if part.startswith("sm100") else "sm_90a",
                "-xptx",
                "all",
                _capi.library()._name,
            ]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            text = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))
    # A file may hold several units.
    texts = [".version" + unit for unit in text.split(".version")[1:]]
    return [(unit, ptx_emulator.Module(unit)) for unit in texts if part in unit]


def entries(arch: str = "sm_90a") -> list[str]:
    """Mangled names of all GEMM kernels in the library for an architecture."""
    return [entry for _, module in units(KERNELS[arch]) for entry in module.entries]


@functools.cache
def _find(kernel: str) -> tuple[str, ptx_emulator.Module, str]:
    part = next((part for part in KERNELS.values() if part in kernel), "sm90_gemm")
    found = [(text, module, entry) for text, module in units(part) for entry in module.entries if kernel in entry]
    if len(found) != 1:
        raise KeyError(f"the library has {len(found)} kernels with {kernel!r} in their names")
    return found[0]


def row_ptx(row: int | dict[str, Any]) -> tuple[str, str]:
    """A module with a row's kernel alone, and the kernel's name; `row`: an index in the SM90 table, or any row."""
    text, _, entry = _find((_capi.instances()[row] if isinstance(row, int) else row)["kernel"])
    return mutate.extract(text, entry), entry


# ---------------------------------------------------------------------------------------------------------------------
# A launch through src/host


class _Scales(ctypes.Structure):
    """ScaleTensor of src/host/gemm_problem.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_mn", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
        ("gran_mn", ctypes.c_int),
        ("stride_group", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):
    """GemmProblem of src/host/gemm_problem.h."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("b_stride", ctypes.c_int64),
        ("sfa", _Scales),
        ("sfb", _Scales),
        ("gran_k", ctypes.c_int),
        ("d", ctypes.c_void_p),
        ("d_stride", ctypes.c_int64),
        ("d_type", ctypes.c_int),
        ("c", ctypes.c_void_p),
        ("c_stride", ctypes.c_int64),
        ("operands", ctypes.c_int),
        ("a_mn_major", ctypes.c_bool),
        ("b_mn_major", ctypes.c_bool),
        ("grouping", ctypes.c_int),
        ("num_groups", ctypes.c_int64),
        ("first_group", ctypes.c_int64),
        ("a_group_stride", ctypes.c_int64),
        ("b_group_stride", ctypes.c_int64),
        ("d_group_stride", ctypes.c_int64),
        ("c_group_stride", ctypes.c_int64),
        ("layout", ctypes.c_int),
        ("group_layout", ctypes.c_void_p),
        ("group_alignment", ctypes.c_int),
        ("expected_m", ctypes.c_int64),
        ("zero_padding", ctypes.c_bool),
        ("head_left", ctypes.c_int),
        ("head_mid", ctypes.c_int),
        ("head_right", ctypes.c_int),
        ("a_is_fp4", ctypes.c_bool),
        ("b_is_fp4", ctypes.c_bool),
        ("sfb_is_packed", ctypes.c_bool),
        ("blocks_to_redo", ctypes.c_void_p),
    ]


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def _region(x: torch.Tensor, name: str, read_only: bool) -> tuple[int, int, str, bool]:
    """The bytes that a tensor's elements span, and no more."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return x.data_ptr(), extent * x.element_size(), name, read_only


def run_row(
    row: int,
    a: torch.Tensor,
    sfa: torch.Tensor | None,
    b: torch.Tensor,
    sfb: torch.Tensor | None,
    d: torch.Tensor,
    *,
    gran: tuple[int, int, int] | None,
    c: torch.Tensor | None = None,
    redo: torch.Tensor | None = None,
    num_sms: int = 132,
    module: ptx_emulator.Module | None = None,
    **options: int,
) -> ptx_emulator.Stats:
    """D = A B^T (+ C) on one row of the table; float32 scales ``[MN / gran, K / gran_k]``, or none.

    A and B are ``[M, K]`` and ``[N, K]``, or transposed where the row takes them MN-major; FP4 ones have bytes of two.
    Operands are read-only to the kernel, and memory between tensors does not exist. ``redo``: which blocks of B are to
    be computed again, and nothing else. ``module`` holds another version of the kernel; ``options`` are those of
    ``Module.launch``.
    """
    info = _capi.instances()[row]
    a_mn_major, b_mn_major = info["a_mn_major"], info["b_mn_major"]
    problem = _Problem(
        m=a.shape[int(a_mn_major)],
        n=b.shape[int(b_mn_major)],
        k=a.shape[int(not a_mn_major)],
        a=a.data_ptr(),
        b=b.data_ptr(),
        a_stride=a.stride(0),
        b_stride=b.stride(0) * (2 if info["family"] in FP4_FAMILIES else 1),
        b_is_fp4=info["family"] in FP4_FAMILIES,
        sfb_is_packed=info["scaling"] == "ue8m0",
        d=d.data_ptr(),
        d_stride=d.stride(0),
        d_type=FLOAT32 if d.dtype == torch.float32 else BFLOAT16,
        c=c.data_ptr() if c is not None else None,
        c_stride=0 if c is None or c.dim() == 1 else c.stride(0),
        operands=BF16_OPERANDS if info["family"].startswith("bf16") else FP8_OPERANDS,
        a_mn_major=a_mn_major,
        b_mn_major=b_mn_major,
        num_groups=1,
        group_alignment=1,
    )
    inputs = {"a": a, "b": b}
    if gran:
        if sfa is not None:
            problem.sfa = _Scales(sfa.data_ptr(), sfa.stride(0), sfa.stride(1), gran[0])
            inputs["sfa"] = sfa
        problem.sfb = _Scales(sfb.data_ptr(), sfb.stride(0), sfb.stride(1), gran[1])
        problem.gran_k = gran[2]
        inputs["sfb"] = sfb
    if c is not None and c.data_ptr() != d.data_ptr():
        inputs["c"] = c
    if redo is not None:
        problem.blocks_to_redo = redo.data_ptr()
        inputs["redo"] = redo
    problem.grouping = GROUPINGS.index(info["grouping"])
    if problem.grouping == GROUPINGS.index("m_grouped"):
        # One group of all rows.
        inputs["group_layout"] = torch.tensor([a.shape[0]], dtype=torch.int32)
        problem.layout, problem.group_layout = GROUP_LAYOUTS.index("offsets"), inputs["group_layout"].data_ptr()
    if problem.grouping == GROUPINGS.index("k_grouped"):
        inputs["group_layout"] = torch.tensor([problem.k], dtype=torch.int32)
        problem.layout, problem.group_layout = GROUP_LAYOUTS.index("sizes"), inputs["group_layout"].data_ptr()
    return launch(row, problem, d, inputs, num_sms=num_sms, module=module, **options)


def launch(
    row: int,
    problem: _Problem,
    d: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    *,
    num_sms: int = 132,
    module: ptx_emulator.Module | None = None,
    **options: int,
) -> ptx_emulator.Stats:
    """Any problem on one row of the table; ``inputs`` are the tensors that it reads."""
    info = _capi.instances(None)[row]
    # What a stage has past the end of M or N is left as it is, but for operands that CTAs share.
    m_ctas, n_ctas = (info[key] for key in (("row_ctas", "col_ctas") if info["swap_ab"] else ("col_ctas", "row_ctas")))
    has_tails = info["arch"] == "sm_90a" and info["grouping"] in ("dense", "batched") and "fp4" not in info["family"]
    skips_m = m_ctas == 1 and not info["a_mn_major"] and problem.m % info["block_m"] != 0
    skips_n = n_ctas == 1 and not info["b_mn_major"] and problem.n % info["block_n"] != 0
    options.setdefault("nan_operands", has_tails and (skips_m or skips_n))
    buffers = [_region(d, "d", False), *(_region(x, name, True) for name, x in inputs.items())]
    result: list[ptx_emulator.Stats] = []
    failure: list[BaseException] = []

    def run(kernel, grid, block, cluster, shared_bytes, params, params_bytes):
        try:
            _, compiled, entry = _find(kernel.decode())
            stats = (module or compiled).launch(
                entry,
                grid=grid,
                block=block,
                cluster=(cluster, 1, 1),
                smem=shared_bytes,
                args=[ctypes.string_at(params, params_bytes)],
                buffers=buffers,
                num_sms=num_sms,
                **options,
            )
            result.append(stats)
            return 0
        except BaseException as error:  # an exception cannot cross the C frames in between
            failure.append(error)
            return 1

    error = ctypes.create_string_buffer(4096)
    status = _capi.library().dg_run_gemm(
        ctypes.byref(problem),
        row,
        num_sms,
        ctypes.c_void_p(ptx_emulator.encode_tiled_function()),
        _LAUNCH(run),
        error,
        ctypes.c_size_t(len(error)),
    )
    if failure:
        raise failure[0]
    if status != 0:
        raise RuntimeError(error.value.decode())
    return result[0]


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def shown(case: Any) -> str:
    """A case as the text that makes it, without what is as by default."""
    values = ((field, getattr(case, field.name)) for field in dataclasses.fields(case))
    arguments = ", ".join(f"{field.name}={value!r}" for field, value in values if value != field.default)
    return f"{type(case).__name__}({arguments})"


def prepared(case: Any) -> Any:
    """``case.build()``. What it holds does not depend on the schedule or on the kernel's text, so that runs that follow
    one another share it; D's buffer is again as it was, and the rest is read-only to kernels.
    """
    built, buffer = _prepared(dataclasses.replace(case, seed=0))
    built.buffer.copy_(buffer)
    return built


@functools.lru_cache(maxsize=8)
def _prepared(case: Any) -> tuple[Any, torch.Tensor]:
    built = case.build()
    return built, built.buffer.clone()


@functools.cache
def row_named(name: str) -> dict[str, Any]:
    """A row of any architecture's table."""
    return next(row for row in _capi.instances(None) if row["name"] == name)


def cluster_tile(row: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of D that a cluster computes at once."""
    along_rows, along_cols = row["row_ctas"], row["col_ctas"]
    if row["swap_ab"]:
        along_rows, along_cols = along_cols, along_rows
    return row["block_m"] * along_rows, row["block_n"] * along_cols


class RowTensors(NamedTuple):
    """Of a RowCase. ``expected``: what D has to be, in float64."""

    operands: list[torch.Tensor | None]  # a, sfa, b, sfb
    buffer: torch.Tensor  # holds D
    d: torch.Tensor
    c: torch.Tensor | None
    expected: torch.Tensor


@dataclasses.dataclass(frozen=True)
class RowCase:
    """A problem for a row of the table, everything outside of its tensors poisoned with NaN.

    ``d`` is ``tma`` (BF16 that TMA can store), ``direct`` (BF16 that it cannot: the first element and the rows lie
    anywhere) or ``float32``; ``c`` is empty, ``full``, ``bias`` or ``alias`` (it is D). ``data`` is ``normal``,
    ``integer`` (results are exact) or ``special`` (integers, with NaN among the values and NaN and Inf among FP8's
    scales), or of FP4 rows ``far`` (normal, with UE8M0 scales far apart). ``k`` grows to what the row takes.
    """

    row: str
    m: int
    n: int
    k: int
    d: str = "tma"
    c: str = ""
    data: str = "normal"
    num_sms: int = 8
    seed: int = 0  # of the schedule; the data depends on the rest

    def __post_init__(self) -> None:
        step = k_multiple(self.info)
        object.__setattr__(self, "k", ceil_div(self.k, step) * step)

    def __str__(self) -> str:
        return shown(self)

    @property
    def repro(self) -> str:
        return f'python test/gemm_emulation.py "{self}"'

    @property
    def info(self) -> dict[str, Any]:
        return row_named(self.row)

    @property
    def gran(self) -> tuple[int, int, int] | None:
        """Of the scales; None where there are none."""
        if self.info["scaling"] == "none":
            return None
        return (1, 128 if self.info["scaling"] == "1d2d" else 1, self.info["gran_k"])

    def _values(self, mn: int, random: torch.Generator) -> torch.Tensor:
        if self.data in ("normal", "far"):
            return (torch.randn(mn, self.k, generator=random) * 60).clamp(-448, 448)
        values = torch.randint(-3, 4, (mn, self.k), generator=random).float()
        if self.data == "special":
            values.view(-1)[torch.randint(mn * self.k, (3,), generator=random)] = math.nan
        return values

    def _scales(
        self, mn: int, gran_mn: int, gran_k: int, random: torch.Generator, powers: bool = False
    ) -> torch.Tensor:
        groups = ceil_div(self.k, gran_k)
        scales = 2.0 ** torch.randint(-2, 3, (ceil_div(mn, gran_mn), groups), generator=random)
        if self.data in ("normal", "far") and not powers:
            scales = scales * (1 + torch.rand(scales.shape, generator=random))
        if self.data == "special":
            at = torch.randint(scales.numel(), (3,), generator=random)
            if gran_mn == 1:  # a scale per block would leave little that is finite
                scales.view(-1)[at] = math.nan if powers else torch.tensor([math.nan, math.inf, -math.inf])
        if self.data == "far" and powers:
            # Of each row's four scales the largest is one, and the others are hardly in reach of it, or far away.
            scales = 2.0 ** -torch.randint(9, 30, scales.shape, generator=random)
            scales[:, ::4] = 1
            scales[::3] *= 2**20
        return scales.float()

    def _bf16_operands(self, random: torch.Generator) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """[a, None, b, None] as the row takes them, and their product."""
        a, b = (self._values(mn, random).bfloat16() for mn in (self.m, self.n))
        expected = a.double() @ b.double().t()
        stored = [a.t() if self.info["a_mn_major"] else a, b.t() if self.info["b_mn_major"] else b]
        a, b = (strided(x, ceil_div(x.shape[1], 8) * 8 + 8, "cpu") for x in stored)
        return [a, None, b, None], expected

    def _fp8_operands(self, random: torch.Generator) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """[a, sfa, b, sfb], and their product."""
        gran_m, gran_n, gran_k = self.gran
        is_fp4, is_packed = self.info["family"] in FP4_FAMILIES, self.info["scaling"] == "ue8m0"
        is_bf16 = self.info["family"] == "bf16_fp4_gemm"
        gran_k_b = 32 if is_fp4 else gran_k
        a = self._values(self.m, random).to(torch.bfloat16 if is_bf16 else FP8)
        sfa = self._scales(self.m, gran_m, gran_k, random)
        if is_bf16 and gran_k == 32:
            sfa.fill_(1)
        if gran_k_b != gran_k:  # sums over several of B's scales: infinite parts of one have no sign
            sfa[sfa.isinf()] = math.nan
        if is_fp4:
            codes = torch.randint(16, (self.n, self.k), generator=random)
            if self.data == "far":  # of some rows, only values with small scales are left
                codes.view(self.n, -1, 4, 32)[::2, :, 0] = 0
            b = E2M1[codes]
        else:
            b = self._values(self.n, random).to(FP8)
        sfb = self._scales(self.n, gran_n, gran_k_b, random, is_packed)

        expected = torch.zeros(self.m, self.n, dtype=torch.float64)
        rows = torch.arange(self.n) // gran_n
        for group in range(sfb.shape[1]):
            block = slice(group * gran_k_b, (group + 1) * gran_k_b)
            product = a[:, block].double() @ b[:, block].double().t()
            scales_of_a = sfa[:, group * gran_k_b // gran_k, None]
            expected += product * (scales_of_a.double() * sfb[rows, group].double())

        if is_packed:
            sfb = pack_ue8m0(sfb)
        if is_bf16:
            a = a[:, order_of_tokens(self.k)]
        a = strided(a, ceil_div(self.k, 16) * 16 + 16, "cpu")
        if is_fp4:
            b = strided(pack_fp4(codes), ceil_div(self.k, 32) * 16 + 16, "cpu", 0x77)
        else:
            b = strided(b, a.stride(0), "cpu")
        # Scales per row lie as TMA reads them, those per block anywhere.
        sfa, sfb = (
            strided(sf.t(), ceil_div(len(sf), 4) * 4 + 4, "cpu", -1 if sf.dtype == torch.int32 else math.nan).t()
            if granularity == 1
            else arrange_scales(sf, "scattered", "cpu")
            for sf, granularity in ((sfa, gran_m), (sfb, gran_n))
        )
        return [a, None if is_bf16 and gran_k == 32 else sfa, b, sfb], expected

    def build(self) -> RowTensors:
        random = generator(hash((self.m, self.n, self.k)) % 2**32)
        operands, expected = self._fp8_operands(random) if self.gran else self._bf16_operands(random)

        dtype = torch.float32 if self.d == "float32" else torch.bfloat16
        # TMA stores to addresses and strides that are multiples of 16 bytes.
        offset, step = (8, 8) if self.d == "tma" else (3, 1)
        stride = ceil_div(offset + self.n + 5, step) * step
        buffer = torch.full((self.m + 2, stride), math.nan, dtype=dtype)
        d = buffer[1 : self.m + 1, offset : offset + self.n]
        c = None
        if self.c:
            c = torch.randint(-99, 100, (self.n,) if self.c == "bias" else (self.m, self.n), generator=random).to(dtype)
            expected += c.double()
            if self.c == "full":
                c = strided(c, self.n + 3, "cpu")
            if self.c == "alias":
                c = d.copy_(c)
        return RowTensors(operands, buffer, d, c, expected)

    def run(self, module: ptx_emulator.Module | None = None, **options: int) -> torch.Tensor:
        """Runs the case and returns D; raises AssertionError or PtxError, with a line that repeats it."""
        operands, buffer, d, c, expected = prepared(self)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1 : self.m + 1, d.storage_offset() % buffer.shape[1] :][:, : self.n] = False
        before = buffer[outside]
        options = {"budget": BUDGET, "seed": self.seed, **options}
        try:
            run_row(
                self.info["index"],
                *operands,
                d,
                gran=self.gran,
                c=c,
                num_sms=self.num_sms,
                module=module,
                **options,
            )
        except ptx_emulator.PtxError as error:
            raise ptx_emulator.PtxError(error.kind, f"{error}\nreproduce with: {self.repro}") from None
        assert same_bits(buffer[outside], before), f"wrote outside of D\nreproduce with: {self.repro}"
        if self.data in ("normal", "far"):
            # The emulator's tensor core is exact, so FP32 sums are all that rounds: of 128 products in FP8, 16 in BF16.
            float_tol = error_bar(d.dtype, "bf16") if self.info["family"].startswith("bf16") else 2e-6
            assert_close(d, expected, tol=float_tol if self.d == "float32" else error_bar(d.dtype), repro=self.repro)
        else:
            assert_equal(d, expected.to(d.dtype), repro=self.repro)
        return d.clone()


def main() -> None:
    case = eval(sys.argv[1], {"RowCase": RowCase})
    case.run()
    print(f"passed: {case}")


if __name__ == "__main__":
    main()
