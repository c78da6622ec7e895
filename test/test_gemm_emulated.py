"""Every row for dense products on the PTX emulator: values, memory around them, and the same bits for every schedule.

DG_EMULATED_SEEDS=50 runs each case with 50 schedules, and 50 random problems for each row, instead of 2.
DG_EMULATED_MUTANTS=all mutates every row instead of a few.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deep_gemm_ops import _capi

from common import assert_close, ceil_div, error_bar, generator, ragged, same_bits
from gemm_emulation import RowCase, cluster_tile, row_ptx, run_row
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
ROWS = _capi.instances()
DENSE = [row for row in ROWS if row["grouping"] == "dense"]  # test_grouped_emulated.py has the others

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]
every_row = pytest.mark.parametrize("row", DENSE, ids=lambda row: row["name"])

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def k_blocks(row: Row, count: int) -> int:
    """K of ``count`` blocks for each CTA that shares a tile, the last one not full."""
    return count * row["split_k"] * row["block_k"] - row["block_k"] * 91 // 128


def check(case: RowCase, schedules: int = SEEDS) -> None:
    results = [dataclasses.replace(case, seed=seed).run() for seed in range(schedules)]
    for seed, result in enumerate(results):
        assert same_bits(result, results[0]), (
            f"seeds 0 and {seed} give other bits\nreproduce with: {dataclasses.replace(case, seed=seed).repro}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Values


REDO = ["m16n64_swap_splitk4", "m8n128_swap_kwg2", "m32n128_mgrouped_swap"]  # every way to find tiles


@pytest.mark.parametrize("row", REDO)
def test_some_columns_again(row: str) -> None:
    """Only columns of a block of B that is marked are computed; where none is marked, none."""
    case = RowCase(f"sm90_fp8_fp4_ue8m0_{row}", 40, 300, 384, num_sms=8)
    operands, buffer, d, _, expected = case.build()
    marks = torch.zeros(16, dtype=torch.uint8)  # of 3 x 3 blocks
    index, before = case.info["index"], buffer.clone()
    for seed in range(SEEDS):
        run_row(index, *operands, d, gran=case.gran, redo=marks, num_sms=8, seed=seed)
    assert same_bits(buffer, before)
    marks[3 * 1 + 2] = 1
    for seed in range(SEEDS):
        run_row(index, *operands, d, gran=case.gran, redo=marks, num_sms=8, seed=seed)
    assert_close(d[:, 128:256], expected[:, 128:256], tol=error_bar(d.dtype), repro=case.repro)
    d[:, 128:256] = before.as_strided(d.shape, d.stride(), d.storage_offset())[:, 128:256]
    assert same_bits(buffer, before)


@pytest.mark.parametrize("row", ["sm90_fp8_1d2d_m8n64_swap", "sm90_fp8_1d2d_m8n64_swap_kwg2"])
def test_loads_on_their_way(row: str) -> None:
    """With as many CTAs as a GPU has, fewer K blocks are on their way than there are stages, across tiles, too."""
    case = RowCase(row, 3, 64 * 133, 128 * 12, data="integer", num_sms=132)
    assert 8 * 2**20 // (64 * 128 * 132) < min(12, case.info["num_stages"])
    check(case, 2)


@every_row
@pytest.mark.parametrize("c", ["", "full", "bias", "alias"])
@pytest.mark.parametrize("d", ["tma", "direct", "float32"])
def test_outputs(row: Row, d: str, c: str) -> None:
    """Each way to store D with each kind of C, on more than one tile, the last ones ragged. K does not split evenly."""
    m, n = cluster_tile(row)
    k = k_blocks(row, 1) + row["block_k"]
    case = RowCase(row["name"], m + 5, ragged(n, 9, d == "tma"), k, d, c, "integer", 2 * row["cluster_size"])
    check(case, max(1, SEEDS // 2))  # the shapes below give each row more schedules


def several_waves(row: Row) -> RowCase:
    """Nine tiles for two clusters, more K blocks than stages."""
    m, n = cluster_tile(row)
    k = k_blocks(row, row["num_stages"] + 2)
    return RowCase(row["name"], 2 * m + 3, 2 * n + 24, k, num_sms=2 * row["cluster_size"])


def one_cluster(row: Row) -> RowCase:
    """All tiles in one cluster, whose ring of stages goes on from tile to tile."""
    m, n = cluster_tile(row)
    return RowCase(row["name"], m + 1, 2 * n + 1, k_blocks(row, 2), "float32", num_sms=row["cluster_size"])


def one_k_block(row: Row) -> RowCase:
    """Less than a K block: where CTAs share a tile, most have nothing to add."""
    m, n = cluster_tile(row)
    return RowCase(row["name"], m - 1, 2 * n - 7, 37, "direct", "bias")


def fewer_k_blocks_than_parts(row: Row) -> RowCase:
    m, n = cluster_tile(row)
    k = max(1, row["split_k"] - 1) * row["block_k"]
    return RowCase(row["name"], 2 * m, n, k, "float32", "alias", num_sms=row["cluster_size"])


def long_k(row: Row) -> RowCase:
    """Three chunks of scales per tile, for two tiles of a cluster."""
    m, n = cluster_tile(row)
    return RowCase(row["name"], min(m, 200), n + 8, k_blocks(row, 66), num_sms=row["cluster_size"])


def one_element(row: Row) -> RowCase:
    return RowCase(row["name"], 1, 1, 1)


def one_row(row: Row) -> RowCase:
    return RowCase(row["name"], 1, 2 * row["block_n"] + 31, 300, "direct")


def one_column(row: Row) -> RowCase:
    return RowCase(row["name"], 2 * row["block_m"] + 31, 1, 300, "float32", "bias")


def whole_tiles(row: Row) -> RowCase:
    m, n = cluster_tile(row)
    return RowCase(row["name"], m, 2 * n, 2 * row["split_k"] * row["block_k"], data="integer")


def nan_and_inf(row: Row) -> RowCase:
    """They reach the elements that they belong to, and no other. TMA would store beyond these columns."""
    m, n = cluster_tile(row)
    return RowCase(row["name"], m + 7, n + 11, k_blocks(row, 2), data="special")


SHAPES = [
    several_waves,
    one_cluster,
    one_k_block,
    fewer_k_blocks_than_parts,
    long_k,
    one_element,
    one_row,
    one_column,
    whole_tiles,
    nan_and_inf,
]


@every_row
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shapes(row: Row, shape: Callable[[Row], RowCase]) -> None:
    check(shape(row))


@pytest.mark.parametrize("row", [row for row in DENSE if row["scaling"] == "ue8m0"], ids=lambda row: row["name"])
def test_scales_far_apart(row: Row) -> None:
    """Also those that do not fit into the exponents of expanded values next to the largest of their K block."""
    m, n = cluster_tile(row)
    check(RowCase(row["name"], m + 3, n + 9, 2 * row["split_k"] * row["block_k"], "float32", data="far"))


def random_case(row: Row, seed: int) -> RowCase:
    random = generator(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    def size(step: int, most: int) -> int:
        """Up to ``most`` steps, often next to a multiple of one."""
        any_size = int(torch.randint(1, most * step + 1, (1,), generator=random))
        return pick(any_size, max(1, ceil_div(any_size, step) * step + pick(-1, 0, 1)))

    m, n = cluster_tile(row)
    d = pick("tma", "tma", "direct", "float32")
    return RowCase(
        row["name"],
        size(m, 3),
        ragged(0, size(n, 3), d == "tma" and pick(True, True, False)),
        size(row["split_k"] * row["block_k"], pick(1, 4, row["num_stages"] + 3)),
        d=d,
        c=pick("", "full", "bias", "alias"),
        data=pick("normal", "integer", "special"),
        num_sms=row["cluster_size"] * pick(1, 2, 3, 20),
        seed=seed,
    )


@every_row
def test_random_problems(row: Row) -> None:
    for seed in range(SEEDS):
        random_case(row, seed).run()


# ---------------------------------------------------------------------------------------------------------------------
# Synchronisation


def mutated_rows() -> list[Row]:
    """The smallest tile of each kind of kernel: operands, scaling, multicast, reduction, swapped operands, 256 rows."""
    rows = [row for row in ROWS if row["grouping"] != "summed"]
    if os.environ.get("DG_EMULATED_MUTANTS") == "all":
        return rows
    kinds: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: (row["k_warpgroups"], row["block_m"] * row["block_n"])):
        multicast, reduction = row["row_ctas"] * row["col_ctas"] > 1, row["split_k"] > 1
        kind: tuple = (row["scaling"], row["gran_k"], multicast, reduction, row["swap_ab"], row["block_m"] == 256)
        if row["scaling"] == "none" and row["grouping"] == "dense":  # swapped operands and parts change nothing here
            kind = ("bf16", multicast, reduction)
        if row["grouping"] == "k_grouped":  # what differs is the walk, and the end of a group
            kind = (row["grouping"], row["scaling"])
        elif row["grouping"] != "dense":  # what differs is the walk
            kind = (row["grouping"], row["swap_ab"])
        kinds.setdefault(kind, row)
    return list(kinds.values())


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works without this statement, empty where it would not."""
    lines = ptx.splitlines()
    before, after = lines[: mutant.line - 1], lines[mutant.line :]
    if mutant.kind == "mbarrier init fence":
        following = next(line for line in after if "barrier" in line)
        if "barrier.cluster.arrive.release" in following:
            return "the release of the cluster barrier that follows publishes the mbarriers, too"
    if mutant.kind == "mbarrier wait":
        following = next(line for line in after if re.search(r"try_wait|wgmma|\.shared|\.global|\.async", line))
        if "try_wait" in following and "expect_tx" in next(line for line in after if "mbarrier.arrive" in line):
            return "how many loads are on their way is a matter of speed, the wait that follows is for room"
    if mutant.kind == "wgmma fence":
        fences = [i for i, line in enumerate(before) if "wgmma.fence" in line]
        if fences and not any(re.search(r"^\s*(?!mov)\w+\S*\.f32\s+%f", line) for line in before[fences[-1] :]):
            return "since the fence before nothing but the tensor core has written the accumulators"
    if mutant.kind == "warp barrier":
        meets = r"wgmma\.wait_group|bar\.warp\.sync|shfl\.sync|vote\.sync|elect\.sync"
        met = max(i for i, line in enumerate(before) if re.search(meets, line))
        if not any(re.search(r"\b(ld|st|stmatrix)\b.*\.shared", line) for line in before[met:]):
            return "the warp has met, for products, shuffle, vote or election, since it last read what is given back"
        if "st.shared" in before[-1] and any(re.match(r"\s*@%p\d+ bra", line) for line in after[:4]):
            return "what the loop over groups leaves in shared memory is read behind the shuffles and votes that follow"
    return ""


def is_of_columns_anew(ptx: str, mutant: mutate.Mutant) -> bool:
    """The vote on whether there is anything to compute anew, without which there would be no answer either."""
    return "bar.red.or" in ptx.splitlines()[mutant.line - 1]


@pytest.mark.parametrize("row", mutated_rows(), ids=lambda row: row["name"])
def test_missing_synchronisation_is_reported(row: Row) -> None:
    """Each wait, arrive, fence and barrier of a kernel, left out or wrong."""
    ptx, _ = row_ptx(row["index"])
    silent = [
        f"{found}: {mutant}"
        for mutant, found in mutate.survey_row(row["index"])
        if (found == "not reached" and not is_of_columns_anew(ptx, mutant))
        or (found == "unnoticed" and not reason_harmless(ptx, mutant))
    ]
    assert not silent, "\n".join(
        [*silent, f"repeat with: cd test && python -m ptx_emulator.mutate --row {row['index']}"]
    )
