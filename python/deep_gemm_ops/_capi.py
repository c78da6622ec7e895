"""The library's C functions: knobs, the table of compiled kernels, selection.

Nothing here touches a GPU. Where no library is installed, :func:`available` is False and the table is empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator
from typing import Any

from ._library import library_path

#: SMs of an H100 or H200 (SXM), for selections made without a device.
DEFAULT_NUM_SMS = 132

#: The enumerators of Grouping (src/host/gemm_row.h) and GroupLayout (src/host/gemm_problem.h), in their order.
GROUPINGS = ("dense", "m_grouped", "k_grouped", "batched", "summed")
GROUP_LAYOUTS = ("none", "indices", "psum", "offsets", "masked", "sizes")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library as ctypes sees it, None where it is not installed."""
    path = library_path()
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.dg_instances.restype = ctypes.c_char_p
    lib.dg_select.restype = ctypes.c_char_p
    lib.dg_select.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 7 + [ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    lib.dg_select.argtypes += [ctypes.c_int] * 7
    for knob in ("num_sms", "tc_util", "pdl", "mk_alignment"):
        getattr(lib, f"dg_set_{knob}").argtypes = [ctypes.c_int]
        getattr(lib, f"dg_set_{knob}").restype = None
    lib.dg_set_block_size_multiple_of.argtypes = [ctypes.c_int, ctypes.c_int]
    lib.dg_set_block_size_multiple_of.restype = None
    lib.dg_force_instance.argtypes = [ctypes.c_int]
    lib.dg_force_instance.restype = None
    lib.dg_mqa_instances.restype = ctypes.c_char_p
    lib.dg_force_mqa_row.argtypes = [ctypes.c_int]
    lib.dg_force_mqa_row.restype = None
    lib.dg_tune_mega_moe.argtypes = [ctypes.c_int] * 6
    lib.dg_tune_mega_moe.restype = None
    return lib


def available() -> bool:
    """Whether the compiled library is installed."""
    return library() is not None


def _require() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise RuntimeError("deep_gemm_ops was installed without its compiled library (DG_SKIP_CUDA_BUILD=1)")
    return lib


@functools.cache
def _instances() -> tuple[dict[str, Any], ...]:
    lib = library()
    return () if lib is None else tuple(json.loads(lib.dg_instances()))


def instances(arch: str | None = "sm_90a") -> list[dict[str, Any]]:
    """The rows of an architecture's table of compiled kernels, in its order; with None of all tables.

    Each is a dict with ``index``, ``name``, ``arch``, ``family`` ("fp8_gemm", "fp8_fp4_gemm", "bf16_fp4_gemm" or
    "bf16_gemm"), ``kernel`` (a part of the mangled kernel name), ``block_m``, ``block_n``, ``block_k``,
    ``swap_ab``, ``row_ctas``, ``col_ctas``, ``cluster_size``, ``split_k``, ``k_warpgroups``, ``overlaps_promotion``
    (two accumulators in each warpgroup), ``a_mn_major``, ``b_mn_major``, ``grouping`` (of GROUPINGS), ``scaling``
    ("1d2d", "1d1d", "ue8m0" or "none"), ``gran_k`` (0 without scales, and on SM100, whose rows take any, and operands
    as they lie), ``num_stages``, ``shared_bytes`` and ``num_threads``. Empty without the library.
    """
    return [dict(row) for row in _instances() if arch is None or row["arch"] == arch]


def select(
    m: int,
    n: int,
    k: int,
    *,
    recipe: tuple[int, int, int] | None = (1, 128, 128),
    float_output: bool = False,
    num_sms: int = DEFAULT_NUM_SMS,
    layout: str = "nt",
    grouping: str = "dense",
    group_layout: str = "none",
    num_groups: int = 1,
    group_alignment: int = 128,
    expected_m: int = 0,
    fp4: str = "",
    packed_sfb: bool = False,
    bf16_tokens: bool = False,
    arch: str = "sm_90a",
) -> dict[str, Any]:
    """The row that a problem selects, and what it beat.

    ``recipe`` is None for BF16, which ``layout`` matters to. ``grouping`` is one of GROUPINGS, ``group_layout`` one
    of GROUP_LAYOUTS; ``m`` is that of a single group where each has its own A. ``fp4`` holds "a" or "b" or both where
    these are FP4; on sm_90a that is "b", gran_k that of A, and ``packed_sfb`` says that B's scales stay UE8M0. Then
    with ``bf16_tokens`` A has become BF16, and has scales only if gran_k is 128.

    Returns a dict with ``row`` (-1 where none fits), ``name`` and ``candidates``: for each row of the table ``index``,
    ``name``, ``cost_us`` (of the cost model, None where the row does not support the problem) and ``reason``.
    """
    groups = (GROUPINGS.index(grouping), GROUP_LAYOUTS.index(group_layout), num_groups, group_alignment, expected_m)
    bf16 = (recipe is None or bf16_tokens, layout[0] == "t", layout[1] == "n")
    other = ("a" in fp4, "b" in fp4, packed_sfb, int(arch[3:].rstrip("a")))
    numbers = (*(recipe or (1, 1, 0)), int(float_output), num_sms, *groups, *bf16, *other)
    return json.loads(_require().dg_select(m, n, k, *numbers))


def mqa_instances() -> list[dict[str, Any]]:
    """The rows of the tables of kernels for MQA logits, in their order.

    Each is a dict with ``index``, ``name``, ``arch``, ``family``, ``kernel``, ``heads``, ``head_dim`` (0 on SM100, its
    rows take any), ``cols``, ``parts``, ``warpgroups``, ``paged``, ``num_stages``, ``shared_bytes`` and
    ``num_threads``. Empty without the library.
    """
    lib = library()
    return [] if lib is None else json.loads(lib.dg_mqa_instances())


def mega_moe_block_tokens(expected_m: int) -> int:
    """Tokens of a block of Mega MoE for experts with so many each."""
    return _require().dg_mega_moe_block_tokens(ctypes.c_int64(expected_m))


@contextlib.contextmanager
def force_mqa_row(index: int) -> Iterator[None]:
    """While the context is open, MQA logits run on row ``index`` of their table, or raise where that does not fit."""
    lib = _require()
    before = lib.dg_get_forced_mqa_row()
    lib.dg_force_mqa_row(index)
    try:
        yield
    finally:
        lib.dg_force_mqa_row(before)


@contextlib.contextmanager
def force_instance(index: int) -> Iterator[None]:
    """While the context is open, every GEMM runs on row ``index`` of the table, or raises where that does not fit."""
    lib = _require()
    before = lib.dg_get_forced_instance()
    lib.dg_force_instance(index)
    try:
        yield
    finally:
        lib.dg_force_instance(before)


@contextlib.contextmanager
def tune_mega_moe(
    block_tokens: int = -1,
    lag: int = -1,
    prefetch_bytes: int = -1,
    evict_weights: int = -1,
    early_bytes: int = -1,
    tile_rows: int = -1,
) -> Iterator[None]:
    """While the context is open, Mega MoE on a GPU takes these instead of what it would choose, where they are not -1:
    tokens of a block (16, 32, 64 or 128), blocks by which the second linear is behind the first, bytes of each row of
    weights that a CTA fetches into L2 while the tokens are sorted, whether L2 is to drop weights first, bytes of each
    row that are fetched while the kernel before this one may still run (SM90; 0 by default), and rows of weights of a
    tile (SM90, FP4 and blocks of at most 64 tokens: 128 or 256)."""
    lib = _require()
    lib.dg_tune_mega_moe(block_tokens, lag, prefetch_bytes, evict_weights, early_bytes, tile_rows)
    try:
        yield
    finally:
        lib.dg_tune_mega_moe(-1, -1, -1, -1, -1, -1)


def get_knob(name: str) -> int:
    """``num_sms``, ``tc_util``, ``pdl``, ``mk_alignment``, ``block_m_multiple_of`` or ``block_n_multiple_of``."""
    return int(getattr(_require(), f"dg_get_{name}")())


def set_knob(name: str, value: int) -> None:
    """Set ``num_sms``, ``tc_util``, ``pdl`` or ``mk_alignment``."""
    getattr(_require(), f"dg_set_{name}")(value)


def set_block_size_multiple_of(m: int, n: int) -> None:
    """Only rows whose tile is a multiple of ``m`` rows and ``n`` columns are selected from now on."""
    _require().dg_set_block_size_multiple_of(m, n)
