"""What the compiled kernels are made of: gates on SASS, and on the counters of the PTX emulator.

The figures stand in for a profiler where there is no GPU. A gate that a change of the kernel passes with room to spare
is to be lowered to the new figure. Where one comes from is shown by `python -m deep_gemm_ops.inspect row 3 --sass` and
`cd test && python -m ptx_emulator.profile --row 3`.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deep_gemm_ops import _capi

from gemm_emulation import FP4_FAMILIES, entries
from kernel_sass import kernel_sass
from ptx_emulator.profile import STAGE_BYTES, Role, profile_row

ROWS = _capi.instances()
REGISTER_FILE = 65536

pytestmark = pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library")
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The tile as the tensor core's instruction sees it.


def block_rows(row: Row) -> int:
    return row["block_n"] if row["swap_ab"] else row["block_m"]


def block_cols(row: Row) -> int:
    return row["block_m"] if row["swap_ab"] else row["block_n"]


def consumer_warpgroups(row: Row) -> int:
    return row["num_threads"] // 128 - 1


def row_parts(row: Row) -> int:
    """Parts of 64 rows that a consumer warpgroup has."""
    return block_rows(row) // 64 * row["k_warpgroups"] // consumer_warpgroups(row)


def block_scales(row: Row) -> int:
    """Scales per block of 128 that a tile has along its columns, 0 where each column has its own."""
    if row["scaling"] != "1d2d" or row["swap_ab"]:
        return 0
    return math.ceil((128 - math.gcd(block_cols(row), 128) + block_cols(row)) / 128)


def scale_groups(row: Row) -> int:
    """Parts of a K block with scales of their own; 0 without scales."""
    return row["block_k"] // row["gran_k"] if row["gran_k"] else 0


def fp32_instructions(row: Row) -> float:
    """Of a consumer warp for a K block: the promotion needs no fewer."""
    cols, parts, groups = block_cols(row), row_parts(row), scale_groups(row)
    if block_scales(row):
        # A multiply-add for each element, two products of scales for each block.
        return parts * (cols // 2 + 2 * block_scales(row))
    # Also a product of scales for each element, or for every second one where both rows of a thread have the same.
    instructions = parts * groups * cols // 2 * (1.5 if row["scaling"] == "1d2d" else 2)
    # UE8M0: a maximum and a multiply-add, for 0 and NaN, of each group's scale of two rows; where they are folded into
    # the values, of the K block's, and a product.
    return instructions + (0 if row["scaling"] != "ue8m0" else 6 if groups == 1 else 4 * groups)


def choices_of_scale(row: Row) -> int:
    """Which of two blocks' scales it is, for each granule of columns and both rows of a thread."""
    if block_scales(row) <= 1:
        return 0
    return 2 + 2 * row_parts(row) * block_cols(row) // math.gcd(block_cols(row), 128)


# ---------------------------------------------------------------------------------------------------------------------
# SASS


def sass(kernel: str) -> tuple[dict[str, Any], list[str], collections.Counter[str]]:
    """Resources, instructions, and how often each full mnemonic occurs."""
    return kernel_sass(kernel, "sm_90a")


def count(mnemonics: collections.Counter[str], prefix: str) -> int:
    return sum(times for mnemonic, times in mnemonics.items() if mnemonic.startswith(prefix))


def test_a_kernel_for_each_row() -> None:
    indices = [int(re.search(r"sm90_gemmILi(\d+)E", entry).group(1)) for entry in entries()]
    assert sorted(indices) == [row["index"] for row in ROWS]
    assert len({row["name"] for row in ROWS}) == len(ROWS)


@every_row
def test_tensor_core_instructions(row: Row) -> None:
    """One shape, and one wait for each group of them: ptxas puts more where it has to serialise them.

    With scales a group is what shares one. Without, it is a K block, and a tile ends with a wait for the last one.
    """
    _, _, mnemonics = sass(row["kernel"])
    groups = mnemonics["WARPGROUP.ARRIVE"]
    assert groups > 0
    if row["family"] == "bf16_fp4_gemm":
        # Two groups of half a K block each. Without scales of A one is always on its way, until a tile ends.
        shape = f"HGMMA.64x{block_cols(row)}x16.F32.BF16"
        assert (groups, mnemonics[shape]) == (2, 8)
        assert count(mnemonics, "WARPGROUP.DEPBAR") == (1 if row["gran_k"] == 128 else 3)
    elif row["family"] == "fp8_fp4_gemm":
        # With few columns all of a K block's four have their own accumulators, and with scales of A per 128 one for
        # all: they are one group.
        shape = f"QGMMA.64x{block_cols(row)}x32.F32.E4M3.E4M3"
        assert mnemonics[shape] == groups * (4 if block_cols(row) <= 32 or row["gran_k"] == 128 else 1)
        assert count(mnemonics, "WARPGROUP.DEPBAR") == groups
    elif scale_groups(row):
        shape = f"QGMMA.64x{block_cols(row)}x32.F32.E4M3.E4M3"
        # Of M-grouped tiles a warpgroup may have one part alone.
        assert groups % row_parts(row) == 0 or row["grouping"] == "m_grouped"
        assert mnemonics[shape] == groups * row["gran_k"] // 32
        # With two accumulators a chunk of K blocks ends with the wait for the even or for the odd one.
        assert count(mnemonics, "WARPGROUP.DEPBAR") == groups + row["overlaps_promotion"]
    else:
        shape = f"HGMMA.64x{block_cols(row)}x16.F32.BF16"
        assert mnemonics[shape] == groups * row_parts(row) * row["block_k"] // 16
        assert count(mnemonics, "WARPGROUP.DEPBAR") == groups + 1
    assert {name for name in mnemonics if "GMMA" in name} == {shape}


@every_row
def test_no_local_memory(row: Row) -> None:
    resources, _, mnemonics = sass(row["kernel"])
    assert (resources["stack"], resources["local"]) == (0, 0)
    assert count(mnemonics, "LDL") == count(mnemonics, "STL") == 0


@every_row
def test_registers(row: Row) -> None:
    """At launch as many as the threads can have; what setmaxnreg then asks for fits, or it would wait for ever."""
    resources, lines, _ = sass(row["kernel"])
    changes = [int(number, 16) for number in re.findall(r"USETMAXREG\S* .*?(0x[0-9a-f]+)", "\n".join(lines))]
    if changes:
        assert resources["reg"] == REGISTER_FILE // row["num_threads"] // 8 * 8
        producer, consumer = sorted(changes)
        assert 128 * (producer + consumer * consumer_warpgroups(row)) <= resources["reg"] * row["num_threads"]
    else:
        assert resources["reg"] * row["num_threads"] <= REGISTER_FILE


@pytest.mark.parametrize("row", [row for row in ROWS if row["scaling"] == "1d2d"], ids=lambda row: row["name"])
def test_sass_of_a_k_block(row: Row) -> None:
    """Instructions of a consumer warp, where the loop over K blocks is unrolled: 107 for 64 rows and 128 columns.

    66 of them are FP32 and about 20 run on the uniform datapath. The loops of 1D1D kernels are not unrolled.
    """
    _, lines, _ = sass(row["kernel"])
    parts, cols = row_parts(row), block_cols(row)
    starts = [i for i, line in enumerate(lines) if "WARPGROUP.ARRIVE" in line]
    instructions = min(end - start for start, end in zip(starts, starts[parts:]))
    limit = 41 + 14 * (parts - 1) + fp32_instructions(row) + choices_of_scale(row)
    if row["swap_ab"]:
        limit += cols // 16 + (cols > 32)  # more scales are read
    if row["grouping"] == "m_grouped":
        limit += 4 if row["k_warpgroups"] == 1 else 14  # where a tile's scales start
        if row["swap_ab"]:
            limit += cols // 8 + 2  # scales that start anywhere are read one by one
    if row["k_warpgroups"] > 1:
        limit += 4  # stages are taken two at a time
    if row["overlaps_promotion"] and cols < 32:
        limit += 3  # the two places in the ring are not all in uniform registers
    if row["row_ctas"] * row["col_ctas"] > 1:
        limit += 3 if row["split_k"] == 1 else 6  # which CTAs of the cluster a stage is free for
    assert instructions <= limit, f"python -m deep_gemm_ops.inspect row {row['index']} --sass"


@every_row
def test_bulk_copies(row: Row) -> None:
    """Multicast exactly where CTAs share a panel. Results leave through TMA."""
    _, _, mnemonics = sass(row["kernel"])
    load = "UTMALDG.2D" if row["grouping"] in ("dense", "k_grouped") else "UTMALDG.3D"
    store = "UTMASTG.2D" if row["grouping"] in ("dense", "summed") else "UTMASTG.3D"
    assert (count(mnemonics, f"{load}.MULTICAST") > 0) == (row["row_ctas"] * row["col_ctas"] > 1)
    assert count(mnemonics, load) > 0 and count(mnemonics, store) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Counters


@functools.cache
def roles(index: int) -> dict[str, Role]:
    return {role.name: role for role in profile_row(index, tiles=(2, 4), blocks=(8, 16))[0]}


@every_row
@pytest.mark.emulated
def test_no_bank_conflicts(row: Row) -> None:
    """Neither in the epilogue's stores, nor in loads of scales, nor in the reduction of split K."""
    for role in roles(row["index"]).values():
        for table in (role.per_block, role.per_tile, role.fixed):
            assert not any(value for counter, value in table.items() if counter.endswith("_conflicts")), role


@every_row
@pytest.mark.emulated
def test_bytes_of_bulk_copies(row: Row) -> None:
    """Each byte of an operand is fetched once by a cluster that shares it; D is written once."""
    groups = scale_groups(row)
    scales = 4 * groups * block_rows(row) * (row["scaling"] == "1d1d" or not row["swap_ab"])
    scales += 4 * groups * block_cols(row) * (row["scaling"] == "1d1d" or row["swap_ab"])
    if row["family"] == "bf16_fp4_gemm" and row["gran_k"] == 32:  # tokens are scaled already
        scales = groups = 0
    if row["scaling"] == "ue8m0":  # a word of four
        scales += 4 * block_rows(row)
    if row["grouping"] == "m_grouped":  # a box of tokens' scales has up to three in front of the tile's
        scales += 16 * groups * (2 if row_parts(row) == 2 and not row["swap_ab"] else 1)
    producer, consumer = roles(row["index"])["copy producer"], roles(row["index"])["consumer"]
    row_bytes = STAGE_BYTES // 2 if row["family"] in FP4_FAMILIES else STAGE_BYTES
    col_bytes = STAGE_BYTES * 2 if row["family"] == "bf16_fp4_gemm" else STAGE_BYTES
    fetched = row_bytes * block_rows(row) // row["col_ctas"] + col_bytes * block_cols(row) // row["row_ctas"]
    delivered = row_bytes * block_rows(row) + col_bytes * block_cols(row)
    assert producer.per_block["bulk_load_bytes"] * len(producer.warps) == fetched + scales
    assert producer.per_block["bulk_delivered_bytes"] * len(producer.warps) == delivered + scales
    # The CTAs that share a tile store a slice each. The mean over the CTAs does not depend on how many do.
    stored = consumer.per_tile["bulk_store_bytes"] * len(consumer.warps)
    assert stored == 2 * row["block_m"] * row["block_n"] / row["split_k"]


# PTX instructions of a consumer warp for a K block that are not FP32: waits, addresses, descriptors, loads of scales.
# By scaling, parts of 64 rows, and groups of K with scales of their own. The first line makes 97.25 with the 66 FP32
# instructions of 128 columns: four products, three instructions around them, six additions for their descriptors, five
# for the next place in the ring, four for addresses there, three loads, five for the barriers, a loop's end in four.
OVERHEAD = {
    ("1d2d", 1, 1): 31.25,
    ("1d2d", 2, 1): 45.25,
    ("1d1d", 1, 1): 52,
    ("1d1d", 2, 1): 83,
    ("1d1d", 1, 4): 121,
    ("none", 1, 0): 44.5,  # CUTLASS's wgmma computes a predicate for each product
    ("none", 2, 0): 63.5,
}


@every_row
@pytest.mark.emulated
def test_instructions_of_a_k_block(row: Row) -> None:
    consumer = roles(row["index"])["consumer"]
    kind = (row["scaling"], row_parts(row), scale_groups(row))
    # A kind that is not listed gets the largest figure until it has its own.
    overhead = OVERHEAD.get(kind, max(OVERHEAD.values())) + choices_of_scale(row)
    if row["overlaps_promotion"]:
        overhead += 4.75  # the place of the block that is promoted, behind that of the next one
    if row["grouping"] == "k_grouped" and row["scaling"] == "none":
        overhead += 24.5  # a group's last elements
    if row["scaling"] == "1d2d" and row["swap_ab"]:
        # More scales are read; those of a group start anywhere, and are read one by one.
        overhead += block_cols(row) // 16 + (block_cols(row) // 8 if row["grouping"] == "m_grouped" else 0)
        overhead += 2 * (block_cols(row) > 32)
    if row["row_ctas"] * row["col_ctas"] > 1:
        overhead += 1 if row["split_k"] == 1 else 3  # which CTAs of the cluster share the panel
    if row["family"] == "bf16_fp4_gemm":
        # Four instructions for each of 32 registers, and a half for the order of their bytes; columns' scales as below.
        loads = block_cols(row) // 4 * (2 if row["grouping"] == "m_grouped" else 1)
        overhead = 227 + (loads if row["gran_k"] == 128 else 0)
    elif row["family"] == "fp8_fp4_gemm":
        # 16 loads of two bytes, five instructions for each to expand them, and the scales of columns: those of groups,
        # which start anywhere, one by one. Folded scales of rows need tables.
        loads = block_cols(row) // 4 * (2 if row["grouping"] == "m_grouped" else 1)
        overhead = 252 + loads if row["gran_k"] == 128 else 208 + 4 * loads
    repro = f"cd test && python -m ptx_emulator.profile --row {row['index']}"
    fp32 = consumer.per_block.get("fp32", 0)
    assert fp32 <= fp32_instructions(row), repro
    # Moves are copies of the totals between versions of the unrolled loop, which ptxas does without.
    assert consumer.instructions() - fp32 - consumer.per_block.get("move", 0) <= overhead, repro
