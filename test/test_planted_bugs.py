"""Bugs planted in good kernels: the emulator reports each by its kind, and says where to look.

Most are planted in the text of the library's GEMM kernels, or in the tensor maps that its host code has encoded; those
of tensor memory in `umma` of ptx_emulator/kernels/tcgen05.cu. Each table has a line per bug. What happens when any one
of a kernel's synchronising statements is missing is in test_gemm_emulated.py and test_emulator_mutation.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deep_gemm_ops import _capi

import ptx_emulator
from gemm_emulation import RowCase, cluster_tile, row_ptx
from ptx_emulator import DTYPE, Module, PtxError, mutate
from ptx_emulator.testing import kernel_ptx

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]

Row = dict[str, Any]
Plant = Callable[[str], str]  # of a module with one entry

# ---------------------------------------------------------------------------------------------------------------------
# Ways to plant a bug in PTX. Those that replace text keep the number of each line.


def mutant(kind: str, before: str = "", after: str = "") -> Plant:
    """What `mutate` makes of the first statement of a kind, the last before a pattern, or the first after."""

    def plant(ptx: str) -> str:
        # A wait for the wrong phase is one of the mutants of the wait.
        statement = "mbarrier wait" if kind == "mbarrier phase" else kind
        found = [m for m in mutate.mutants(ptx, kinds=[statement]) if m.kind == kind]
        if before:
            found = [m for m in found if m.line < line_of(ptx, before)][::-1]
        if after:
            found = [m for m in found if m.line >= line_of(ptx, after)]
        return found[0].ptx

    return plant


def replaced(pattern: str, new: str, times: int = 1) -> Plant:
    """The first matches of a pattern, or all with 0, are replaced."""

    def plant(ptx: str) -> str:
        text, count = re.subn(pattern, new, ptx, count=times)
        assert count, f"nothing matches {pattern}"
        return text

    return plant


def line_of(ptx: str, pattern: str) -> int:
    """The line of the first match."""
    return ptx.count("\n", 0, re.search(pattern, ptx).start()) + 1


def expecting(change: int) -> Plant:
    """The producer expects this many bytes more than will come."""
    return replaced(
        r"(mbarrier\.arrive\.expect_tx\.[\w.:]+) _, (\[%r\d+\]), (%r\d+);",
        rf"{{ .reg .b32 count; add.s32 count, \3, {change}; \1 _, \2, count; }}",
    )


def later_wait(ptx: str) -> str:
    """The consumer waits for its wgmmas after it has told the producer that their stage is free, instead of before."""
    wait, free = r"(wgmma\.wait_group\.sync\.aligned 0;)", r"([^$]{0,500}?mbarrier\.arrive[^;]*;[\s}]*\$\w+:)"
    # A branch around the arrive, which one lane executes, names the label behind it.
    return replaced(wait + r"([^$]{0,200}\$\w+;" + free[1:], r"\2 \1")(ptx)


def no_init_fence(ptx: str) -> str:
    """Nothing publishes the mbarriers, not even the cluster barrier that follows."""
    return replaced(r"fence\.mbarrier_init[^;]*;", ";")(ptx).replace("cluster.arrive.release", "cluster.arrive.relaxed")


LOAD = r"cp\.async\.bulk\.tensor\.2d\.shared"
STORE = r"cp\.async\.bulk\.tensor\.2d\.global"
WGMMA = r"wgmma\.mma_async"

# ---------------------------------------------------------------------------------------------------------------------
# Tensor maps that are not what the kernel expects


@dataclasses.dataclass
class Map:
    """What the host asks the encoder for; a bug changes it. Sizes in elements, the innermost dimension first."""

    dtype: int
    dims: Any
    strides: Any  # bytes, of all dimensions but the first
    box: Any
    swizzle: int


_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 4,
)


def encoder(dtype: str, change: Callable[[Map], None]) -> Any:
    """A function like the driver's encoder that first changes maps of one type: u8 for A and B, bf16 for D."""
    encode = _ENCODE(ptx_emulator.encode_tiled_function())

    def changed(result, kind, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill):
        m = Map(kind, dims, strides, box, swizzle)
        if kind == DTYPE[dtype]:
            change(m)
        return encode(result, kind, rank, address, dims, strides, box, steps, interleave, m.swizzle, promotion, fill)

    return _ENCODE(changed)


def no_swizzle(m: Map) -> None:
    m.swizzle = 0


def rows_in_box(change: int) -> Callable[[Map], None]:
    def apply(m: Map) -> None:
        m.box[1] += change

    return apply


def more_rows(m: Map) -> None:
    m.dims[1] += 8


def longer_stride(m: Map) -> None:
    m.strides[0] += 16


# ---------------------------------------------------------------------------------------------------------------------
# The tables


@dataclasses.dataclass(frozen=True)
class Bug:
    """`kinds`: what may be reported, of which the schedule picks one; `instruction`: where; `role`: by whom."""

    name: str
    plant: Any
    kinds: str
    instruction: str
    role: str
    d: str = "tma"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


# Warps of a CTA of the GEMM kernels.
ROLES = {"copy producer": range(1), "scale producer": range(1, 2), "consumer": range(4, 12), "any": range(12)}

PTX_BUGS = [
    # Ordering between threads and the asynchronous proxy.
    Bug("missing proxy fence", mutant("proxy fence"), "proxy_fence", STORE, "consumer"),
    Bug("missing wgmma fence", mutant("wgmma fence"), "wgmma_fence", WGMMA, "consumer"),
    Bug("missing mbarrier init fence", no_init_fence, "mbarrier_init_fence race", LOAD + "|try_wait", "any"),
    # Bytes.
    Bug("expects too few bytes", expecting(-16), "race inflight_read mbarrier_tx", r".", "any"),
    Bug("expects too many bytes", expecting(16), "deadlock", r"try_wait", "consumer"),
    Bug("expects no bytes", mutant("expected bytes"), "race inflight_read uninit_smem mbarrier_tx", r".", "any"),
    # Phases.
    Bug("operands awaited with the wrong phase", mutant("mbarrier phase", before=WGMMA),
        "race inflight_read uninit_smem", r"ld\.shared|wgmma", "consumer"),
    Bug("free stage awaited with the wrong phase", mutant("mbarrier phase", before=LOAD), "deadlock", "try_wait",
        "copy producer"),
    # Overwritten in flight.
    Bug("operand overwritten before it is free", mutant("mbarrier wait", before=LOAD),
        "race inflight_overwrite mbarrier_overflow", LOAD + "|expect_tx", "copy producer"),
    Bug("stage freed before wgmma has read it", later_wait, "race inflight_overwrite", LOAD, "copy producer"),
    Bug("staged result overwritten while TMA reads it", mutant("copy wait"), "inflight_overwrite", "stmatrix",
        "consumer"),
    # The accumulator.
    Bug("accumulator read before its wait", mutant("wgmma wait"), "wgmma_register", r"fma|mul", "consumer"),
    Bug("accumulator read before its commit", mutant("wgmma commit"), "wgmma_register", r"fma|mul", "consumer"),
    # Bounds.
    Bug("load out of shared memory", replaced(r"(ld\.shared\.\w+ %f\d+, \[%r\d+)(?:\+\d+)?\]", r"\1+262144]"),
        "smem_bounds", r"ld\.shared", "consumer"),
    Bug("wgmma operand out of shared memory",
        replaced(r"(wgmma\.mma_async[^;]*\}, )(%rd\d+),", r"or.b64 \2, \2, 16320; \1\2,"),
        "smem_bounds", WGMMA, "consumer"),
    Bug("store past the end of D", replaced(r"(st\.global\.[uf]32 \[%rd\d+)\]", r"\1+16777216]", 0), "global_bounds",
        r"st\.global", "consumer", "float32"),
    # Uninitialised.
    Bug("result not staged", replaced(r"stmatrix[^;]*;", ";"), "uninit_smem", STORE, "consumer"),
    Bug("scales not written", replaced(r"st\.shared\.f32[^;]*;", ";"), "uninit_smem", r"ld\.shared", "consumer"),
    # Deadlock.
    Bug("stage never freed", mutant("mbarrier arrive", after=WGMMA), "deadlock", "try_wait", "copy producer"),
]  # fmt: skip

MAP_BUGS = [
    Bug("operands without swizzle", ("u8", no_swizzle), "wrong result", "", ""),
    Bug("D without swizzle", ("bf16", no_swizzle), "wrong result", "", ""),
    Bug("box with too few rows", ("u8", rows_in_box(-8)), "deadlock", "try_wait", "consumer"),
    Bug("box with too many rows", ("u8", rows_in_box(8)), "race inflight_read inflight_overwrite mbarrier_tx", r".",
        "any"),
    Bug("A and B with too many rows", ("u8", more_rows), "global_bounds", LOAD, "copy producer"),
    Bug("D with too many rows", ("bf16", more_rows), "global_bounds", STORE, "consumer"),
    Bug("operands with a wrong stride", ("u8", longer_stride), "wrong result global_bounds", LOAD, "copy producer"),
]  # fmt: skip


def freed(before: str) -> Plant:
    """Warp 0 frees the tensor memory before a statement, not at the end."""

    def plant(ptx: str) -> str:
        (dealloc,) = re.findall(r"tcgen05\.dealloc[^;]*;", ptx)
        early = f"{{ .reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.lt.u32 p, t, 32; @p {dealloc} bar.sync 0; }} "
        return replaced(f"(?={before})", early)(ptx.replace(dealloc, ";"))

    return plant


TENSOR_MEMORY_BUGS = [
    Bug("tensor memory leaked", mutant("tcgen05 dealloc"), "tmem_leak", r"tcgen05\.alloc", "any"),
    Bug("tensor memory read after it is freed", freed(r"tcgen05\.ld"), "tmem_alloc", r"tcgen05\.ld", "any"),
    Bug(
        "tensor memory freed under a product",
        freed(r"tcgen05\.fence::after"),
        "tmem_alloc tmem_inflight",
        "tcgen05",
        "any",
    ),
    Bug(
        "result read before its commit",
        mutant("mbarrier wait", before=r"tcgen05\.ld"),
        "tmem_inflight uninit_tmem",
        r"tcgen05\.ld",
        "any",
    ),
    Bug("registers used before the load's wait", mutant("tcgen05 wait"), "tcgen05_ld_wait", "st", "any"),
]

# ---------------------------------------------------------------------------------------------------------------------
# Tests


def rows() -> list[Row]:
    """The smallest kernel of those with a single CTA, and of those whose CTAs load for one another."""
    plain = [r for r in _capi.instances() if r["scaling"] == "1d2d" and r["split_k"] == 1 and not r["swap_ab"]]
    alone = [r for r in plain if r["cluster_size"] == 1 and r["block_n"] >= 64]
    sharing = [r for r in plain if r["cluster_size"] > 1]
    return [min(kind, key=lambda r: r["block_m"] * r["block_n"]) for kind in (alone, sharing) if kind]


every_row = pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
every_seed = pytest.mark.parametrize("seed", range(2))


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(row: Row, d: str, more_blocks: int = 0) -> RowCase:
    """Ragged tiles, several for each cluster, more K blocks than stages; exact. FP32 leaves by single stores."""
    m, n = cluster_tile(row)
    odd = d == "float32"
    k = (row["num_stages"] + 3 + more_blocks) * row["block_k"] - 112
    return RowCase(row["name"], 2 * m - 8, 2 * n - 8 - odd, k, d, data="integer", num_sms=row["cluster_size"])


def check_report(error: PtxError, bug: Bug, ptx: str, kernel: str) -> None:
    """The kind, and the kernel, CTA, warp, and PTX line with its instruction: of all that wait, in a deadlock."""
    text = str(error)
    assert error.kind in bug.kinds.split(), text
    assert f"kernel {kernel[:120]}" in text
    where = r"CTA \(\d+,\d+,\d+\)"
    at = r"PTX line (?P<line>\d+) `(?P<instruction>[^`]+)`"
    if error.kind == "deadlock":
        found = re.finditer(rf"{where} warp (?P<warp>\d+) lanes .*{at}", text)
    elif error.kind == "tmem_leak":
        found = re.finditer(rf"by warp (?P<warp>\d+) at {at}\n  in {where}", text)
    else:
        found = re.finditer(rf"at {at}, kernel .*, {where} rank \d+, warp (?P<warp>\d+)", text)
    lines = ptx.splitlines()
    places = [(int(m["warp"]), m["instruction"], lines[int(m["line"]) - 1]) for m in found]
    assert places, text
    for _, instruction, line in places:
        assert instruction[:40] in line, f"not at that line: {instruction}\n{text}"
    role = ROLES[bug.role]
    assert any(warp in role and re.search(bug.instruction, instruction) for warp, instruction, _ in places), text


@every_row
def test_without_a_bug(row: Row) -> None:
    for d in ("tma", "float32"):
        case(row, d).run(check_exit=1)


@every_row
@every_seed
@pytest.mark.parametrize("bug", PTX_BUGS, ids=str)
def test_gemm(row: Row, bug: Bug, seed: int) -> None:
    ptx, entry = row_ptx(row["index"])
    planted = bug.plant(ptx)
    assert planted.count("\n") == ptx.count("\n")
    with pytest.raises(PtxError, match="reproduce with") as error:
        # The loop over K blocks is unrolled by 4, and the plant may be in what only some remainders reach.
        for more_blocks in range(4):
            case(row, bug.d, more_blocks).run(Module(planted), seed=seed)
    check_report(error.value, bug, planted, entry)


@every_row
@pytest.mark.parametrize("bug", MAP_BUGS, ids=str)
def test_tensor_maps(row: Row, bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx, entry = row_ptx(row["index"])
    changed = encoder(*bug.plant)
    address = ctypes.cast(changed, ctypes.c_void_p).value
    monkeypatch.setattr(ptx_emulator, "encode_tiled_function", lambda: address)
    if bug.plant == ("u8", more_rows) and row["cluster_size"] == 1:
        # Of operands that no other CTA shares nothing past the end is asked for, whatever the map says of it.
        case(row, bug.d).run(Module(ptx))
        return
    with pytest.raises((PtxError, AssertionError), match="reproduce with") as error:
        case(row, bug.d).run(Module(ptx))
    if isinstance(error.value, PtxError):
        check_report(error.value, bug, ptx, entry)
    else:
        assert "wrong result" in bug.kinds


@every_seed
@pytest.mark.parametrize("bug", TENSOR_MEMORY_BUGS, ids=str)
def test_tensor_memory(bug: Bug, seed: int) -> None:
    text = kernel_ptx("tcgen05", "100a")
    entry = Module(text).find("ummaILi0E")
    planted = bug.plant(mutate.extract(text, entry))
    a, b, out = torch.randn(128, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(128, 64)
    maps = [ptx_emulator.tensor_map(t, "bf16", [64, t.shape[0]], swizzle=128) for t in (a, b)]
    with pytest.raises(PtxError) as error:
        Module(planted).launch(entry, 1, 128, [*maps, out], seed=seed)
    check_report(error.value, bug, planted, entry)
