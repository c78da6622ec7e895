"""Every row for groups along K, and for sums of products, on the PTX emulator: layouts sane and hostile, and the memory
around the tensors.

DG_EMULATED_SEEDS=50 runs each case with 50 schedules instead of 2.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deep_gemm_ops import _capi

from common import ragged, same_bits
from gemm_emulation import cluster_tile
from kgrouped_emulation import KGroupedCase, SummedCase

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
K_GROUPED = [row for row in _capi.instances(None) if row["grouping"] == "k_grouped"]
# FP8 of either order: SM100's.
EITHER = [row for row in K_GROUPED if row["scaling"] == "ue8m0"]
SUMMED = [row for row in _capi.instances(None) if row["grouping"] == "summed"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]
k_grouped = pytest.mark.parametrize("row", K_GROUPED, ids=lambda row: row["name"])
summed = pytest.mark.parametrize("row", SUMMED, ids=lambda row: row["name"])
every_layout = pytest.mark.parametrize("layout", ["sizes", "psum", "offsets"])
every_c = pytest.mark.parametrize("c", ["", "full", "bias", "alias"])

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case: KGroupedCase | SummedCase) -> None:
    results = [dataclasses.replace(case, seed=seed).run() for seed in range(SEEDS)]
    for seed, result in enumerate(results):
        assert same_bits(result, results[0]), (
            f"seeds 0 and {seed} give other bits\nreproduce with: {dataclasses.replace(case, seed=seed).repro}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# K-grouped


@k_grouped
@every_layout
@pytest.mark.parametrize("data", ["integer", "normal"])
def test_layouts(row: Row, layout: str, data: str) -> None:
    """Groups of no element, one, a part of a block, whole blocks, more than there are stages, on one cluster.

    With ``psum`` NaN follows each group in both operands, and in its last block.
    """
    m, n = cluster_tile(row)
    sizes = (0, 70, 1, 2 * row["block_k"], 0, 0, row["block_k"] * (row["num_stages"] + 1) - 5, 129, 0)
    check(KGroupedCase(row["name"], layout, sizes, m + 3, n + 24, 48, 200, data=data, num_sms=row["cluster_size"]))


@pytest.mark.parametrize("row", EITHER, ids=lambda row: row["name"])
@pytest.mark.parametrize(("layout", "data"), [("sizes", "integer"), ("psum", "normal"), ("offsets", "integer")])
def test_operands_as_they_lie(row: Row, layout: str, data: str) -> None:
    """FP8 [K, M]: a group starts anywhere and has blocks of scales of its own, in words that other groups have, too."""
    m, n = cluster_tile(row)
    sizes = (0, 70, 1, 256, 0, 0, 128 * (row["num_stages"] + 1) - 5, 129, 37, 32, 0)
    case = KGroupedCase(row["name"], layout, sizes, m + 3, n + 24, 48, 200, data=data, mn_major=True)
    check(dataclasses.replace(case, num_sms=row["cluster_size"]))
    check(dataclasses.replace(case, c="alias", d="float32 direct", alignment=5, num_sms=6))


@pytest.mark.parametrize("row", EITHER, ids=lambda row: row["name"])
@every_layout
def test_hostile_layouts_of_operands_as_they_lie(row: Row, layout: str) -> None:
    m, n = cluster_tile(row)
    for values in [(300, 200, 100, 0), (2**31 - 1, -(2**31), 2**31 - 1, 5), (1, 2, 3, 2**31 - 1)]:
        check(KGroupedCase(row["name"], layout, (64, 128, 0, 150), m - 1, n + 1, 128, values=values, mn_major=True))


@k_grouped
@every_c
@pytest.mark.parametrize("d", ["tma", "direct", "float32", "float32 direct"])
def test_outputs(row: Row, d: str, c: str) -> None:
    """Each way to store D with each kind of C, which a group of K = 0 gets as it is. M is odd, N where it may be."""
    m, n = cluster_tile(row)
    columns = ragged(n, 13, d in ("tma", "float32"))
    check(KGroupedCase(row["name"], "offsets", (200, 0, 37), m + 1, columns, d=d, c=c, data="integer", num_sms=4))


@k_grouped
@pytest.mark.parametrize(
    "values",
    [
        (300, 200, 100, 0),
        (-1, -(2**31), 2**31 - 1, 5),
        (2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1),
        (2**31 - 100, 64, -64, 2**31 - 100),
        (1, 2, 3, 4),
    ],
)
@every_layout
def test_hostile_layouts(row: Row, layout: str, values: tuple[int, ...]) -> None:
    """Any values, but memory outside of the tensors is neither read nor written, and the walk ends."""
    m, n = cluster_tile(row)
    for d in ("tma", "float32 direct"):
        check(KGroupedCase(row["name"], layout, (64, 128, 0, 150), m - 1, n + 1, 128, d=d, values=values))


# The smallest tiles of each architecture.
SMALL = [
    row for row in K_GROUPED if (row["block_m"], row["block_n"]) in ((64, 64), (128, 128)) and row["row_ctas"] == 1
]
SMALL = [row for row in SMALL if row["block_m"] == (64 if row["arch"] == "sm_90a" else 128)]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row["name"])
def test_more_groups_than_a_launch_takes(row: Row) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = tuple(torch.randint(0, 4, (257,), generator=random).tolist())
    for layout in ("sizes", "psum"):
        case = KGroupedCase(row["name"], layout, sizes, 9, 16, c="alias", d="float32", data="integer", num_sms=50)
        check(case)
        if row in EITHER:
            check(dataclasses.replace(case, mn_major=True))


@k_grouped
def test_one_group(row: Row) -> None:
    """Whole tiles and blocks, and the smallest product."""
    m, n = cluster_tile(row)
    check(KGroupedCase(row["name"], "sizes", (4 * row["block_k"],), 2 * m, n, d="float32"))
    check(KGroupedCase(row["name"], "offsets", (1,), 1, 1, d="float32"))


# ---------------------------------------------------------------------------------------------------------------------
# Summed


@summed
@every_c
@pytest.mark.parametrize("d", ["tma", "direct", "float32"])
def test_summed_outputs(row: Row, d: str, c: str) -> None:
    """Each way to store D with each kind of C; K ends inside a block, and products do not divide evenly among CTAs."""
    m, n = cluster_tile(row)
    check(SummedCase(row["name"], 5, m + 5, ragged(n, 9, d in ("tma", "float32")), 150, d=d, c=c, data="integer"))


@summed
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("groups, k", [(1, 64), (2, 1), (11, 192), (40, 24)])
def test_sums(row: Row, groups: int, k: int, interleaved: bool) -> None:
    m, n = cluster_tile(row)
    case = SummedCase(row["name"], groups, 2 * m - 7, n, k, interleaved, num_sms=row["cluster_size"])
    check(case)
    check(dataclasses.replace(case, m=1, n=2, d="float32", data="integer"))
