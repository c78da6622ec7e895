"""Every row for groups of matrices on the PTX emulator: layouts sane and hostile, padding, and the memory around them.

DG_EMULATED_SEEDS=50 runs each case with 50 schedules instead of 2.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deep_gemm_ops import _capi

from common import ragged, same_bits
from gemm_emulation import cluster_tile, launch, prepared
from grouped_emulation import GroupedCase

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
M_GROUPED = [row for row in _capi.instances(None) if row["grouping"] == "m_grouped"]
BATCHED = [row for row in _capi.instances(None) if row["grouping"] == "batched"]
SM90_TALL_M_GROUPED = [  # FP8
    row for row in M_GROUPED if row["family"] == "fp8_gemm" and not row["swap_ab"] and cluster_tile(row)[0] > 64
]
SM100_M_GROUPED = [row for row in M_GROUPED if row["arch"] == "sm_100a"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]
m_grouped = pytest.mark.parametrize("row", M_GROUPED, ids=lambda row: row["name"])
batched = pytest.mark.parametrize("row", BATCHED, ids=lambda row: row["name"])
every_layout = pytest.mark.parametrize("layout", ["indices", "psum", "offsets", "masked"])

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alignment(row: Row) -> int:
    """Of groups; a tile divides it."""
    return max(128, cluster_tile(row)[0])


def check(case: GroupedCase) -> None:
    results = [dataclasses.replace(case, seed=seed).run() for seed in range(SEEDS)]
    for seed, result in enumerate(results):
        assert same_bits(result, results[0]), (
            f"seeds 0 and {seed} give other bits\nreproduce with: {dataclasses.replace(case, seed=seed).repro}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# M-grouped


@m_grouped
@every_layout
def test_layouts(row: Row, layout: str) -> None:
    """Groups of no row, one, a part of a tile, whole tiles and a bit more, each CTA with several tiles."""
    m, n = cluster_tile(row)
    sizes = (0, m - 3, 1, 2 * m, 0, 0, m + 5, 0)
    shape = (sizes, n + 24, row["block_k"] * (row["num_stages"] + 1) - 91)
    check(GroupedCase(row["name"], layout, *shape, alignment(row), tail=70, data="integer"))


@pytest.mark.parametrize("row", SM90_TALL_M_GROUPED, ids=lambda row: row["name"])
def test_parts_beyond_a_group_are_left_out(row: Row) -> None:
    """64 rows of a tile that have none of the group are neither loaded nor multiplied."""
    tile, n = cluster_tile(row)
    k_blocks, seen = 3, []
    for rows in range(61, tile, 64):
        case = GroupedCase(row["name"], "masked", (rows,), n, k_blocks * row["block_k"], tail=tile)
        case.run()
        problem, inputs, buffer, _, _ = prepared(case)
        total = launch(row["index"], problem, buffer, inputs, num_sms=1, counters=True).counters["total"]
        seen.append((total["bulk_load_bytes"], total["tensor"]))
    wgmmas = 4 * 4  # of four warps for 128 bytes of K
    for fewer, more in itertools.pairwise(seen):
        assert (more[0] - fewer[0], more[1] - fewer[1]) == (k_blocks * 64 * 128, k_blocks * wgmmas)


@m_grouped
@pytest.mark.parametrize(
    "layout, d",
    [("indices", "tma"), ("psum", "tma"), ("psum", "direct"), ("offsets", "float32"), ("masked", "direct")],
)
def test_outputs(row: Row, layout: str, d: str) -> None:
    """Each way to store D, with padding set to zero where there is any. N is odd where it may be."""
    m, n = cluster_tile(row)
    n = ragged(n, 13, d == "tma")
    case = GroupedCase(row["name"], layout, (9, 0, m + 1, m), n, 150, alignment(row), 2 * m + 1, d=d, num_sms=2)
    check(dataclasses.replace(case, zero_padding=layout != "masked"))


@m_grouped
@every_layout
def test_nothing_but_padding(row: Row, layout: str) -> None:
    case = GroupedCase(row["name"], layout, (0,) * 5, row["block_n"] + 1, 130, alignment(row), cluster_tile(row)[0] + 3)
    check(case)
    if layout != "masked":
        check(dataclasses.replace(case, zero_padding=True))


@m_grouped
@pytest.mark.parametrize("layout", ["psum", "offsets", "masked"])
def test_many_groups(row: Row, layout: str) -> None:
    """More groups than tiles, CTAs and lanes of a warp; alignments that no tile divides."""
    sizes = tuple(3 if group in (0, 31, 32, 64) else group % 7 == 5 for group in range(70))
    check(GroupedCase(row["name"], layout, sizes, 40, 100, 24, d="float32", num_sms=5, zero_padding=layout == "psum"))


@m_grouped
def test_padding_between_groups_is_left_alone(row: Row) -> None:
    """Groups end inside a tile, and the next one begins there."""
    check(GroupedCase(row["name"], "psum", (7, 30, 1, 11), row["block_n"], 128, alignment=40, tail=3))


@m_grouped
def test_one_group(row: Row) -> None:
    check(GroupedCase(row["name"], "offsets", (row["block_m"] + 8,), 33, 70, zero_padding=True, tail=1))


@pytest.mark.parametrize("row", SM100_M_GROUPED, ids=lambda row: row["name"])
@pytest.mark.parametrize("layout", ["indices", "psum", "offsets", "masked"])
@pytest.mark.parametrize("b_mn_major", [False, True], ids=["nt", "nn"])
def test_sm100_operands(row: Row, layout: str, b_mn_major: bool) -> None:
    """One kernel reads B in both orders, FP8 and FP4, and scales of both granularities, whose words begin anywhere."""
    m, n = cluster_tile(row)
    case = GroupedCase(row["name"], layout, (5, 0, m + 1, 3, m), n + 8, 3 * 128, alignment(row), 9)
    case = dataclasses.replace(case, b_mn_major=b_mn_major)
    own = (row["block_m"] if row["swap_ab"] else row["block_n"]) // row["row_ctas"]
    if b_mn_major and not row["swap_ab"] and own * (1 if row["scaling"] == "ue8m0" else 2) % 32 != 0:
        with pytest.raises(RuntimeError, match="too few columns for an MN-major operand"):
            case.run()
        return
    check(case)
    if row["scaling"] != "ue8m0":
        return
    check(dataclasses.replace(case, gran_k=32, k=400, d="float32", data="integer"))
    kinds = [("fp4", "fp8")] if b_mn_major else [("fp8", "fp4"), ("fp4", "fp4")]
    for a, b in kinds:
        check(dataclasses.replace(case, a=a, b=b, gran_k=32))
        check(dataclasses.replace(case, a=a, b=b, d="direct", k=128))


HOSTILE = {
    "indices": [(-(2**31),) * 300, (2**31 - 1,) * 300, (3,) * 300, tuple(i * 7 % 5 - 1 for i in range(300))],
    "psum": [(300, 200, 100), (-5, 2**31 - 1, -(2**31)), (1, 1, 10**9), (-1, -1, -1)],
    "offsets": [(300, 200, 100), (-5, 2**31 - 1, -(2**31)), (1, 0, 10**9), (299, 300, 301)],
    "masked": [(2**31 - 1, -1, 300), (-(2**31), 10**6, 301), (300, 300, 300)],
}


@m_grouped
@every_layout
def test_hostile_layouts(row: Row, layout: str) -> None:
    """They may cost values, never memory: the emulator reports any access outside of the tensors."""
    for i, values in enumerate(HOSTILE[layout]):
        sizes = (300, 300, 300) if layout == "masked" else (0, 0, 0)
        case = GroupedCase(row["name"], layout, sizes, 20, 140, alignment(row), values=values, num_sms=4)
        dataclasses.replace(case, tail=0 if layout == "masked" else 300, zero_padding=i % 2 == 0).run()


# ---------------------------------------------------------------------------------------------------------------------
# Batched


@batched
@pytest.mark.parametrize("d", ["tma", "direct", "float32"])
@pytest.mark.parametrize("c, interleaved", [("", False), ("", True), ("full", True), ("bias", False), ("alias", True)])
def test_batches(row: Row, d: str, c: str, interleaved: bool) -> None:
    m, n = cluster_tile(row)
    rows = m - 5 if row["swap_ab"] and row["arch"] == "sm_90a" else m + 5
    n = ragged(n, 9, d == "tma")
    case = GroupedCase(row["name"], "batched", (rows,) * 3, n, 2 * row["block_k"] + 37, d=d, c=c, num_sms=2)
    check(dataclasses.replace(case, interleaved=interleaved, data="integer"))


@batched
@pytest.mark.parametrize(
    "heads, d",
    [
        ((128, 64, 64), "tma"),  # boxes lie in one part of a head
        ((16, 8, 48), "tma"),  # small ones do
        ((6, 2, 4), "tma"),
        ((3, 1, 4), "direct"),
        ((0, 5, 7), "float32"),
        ((6, 2, 0), "direct"),
    ],
)
def test_gaps_between_heads(row: Row, d: str, heads: tuple[int, int, int]) -> None:
    """Columns of the product go around a gap in each head, which keeps what it holds."""
    rows = row["block_m"] - 1 if row["swap_ab"] and row["arch"] == "sm_90a" else row["block_m"] + 3
    n = (heads[0] + heads[2]) * max(2, 200 // (heads[0] + heads[2]))
    check(GroupedCase(row["name"], "batched", (rows,), n, 200, heads=heads, d=d))
