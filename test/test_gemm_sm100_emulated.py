"""Every row of the SM100 GEMM table on the PTX emulator: values, memory around them, the same bits for every schedule.

No Blackwell GPU has run these kernels; this is all the evidence there is. DG_EMULATED_SEEDS=50 runs each case with 50
schedules, and 50 random problems for each row, instead of 2. DG_EMULATED_MUTANTS=all mutates every row, not a few.
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

import ptx_emulator
from common import LAYOUTS, ceil_div, generator, ragged, same_bits
from gemm_emulation import cluster_tile, row_ptx
from gemm_sm100_emulation import Sm100Case, rows
from grouped_emulation import GroupedCase
from kgrouped_emulation import KGroupedCase
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
ROWS = rows()
SCALED = [row for row in ROWS if row["scaling"] == "ue8m0"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
    pytest.mark.skipif(_capi.available() and not ROWS, reason="the library was built without kernels for sm_100a"),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
every_scaled_row = pytest.mark.parametrize("row", SCALED, ids=lambda row: row["name"])

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def takes(row: Row, layout: str) -> bool:
    """Whether the tile is wide enough for swizzle spans of an MN-major operand on the instruction's N side."""
    mn_major = layout[0] == "t" if row["swap_ab"] else layout[1] == "n"
    own = (row["block_m"] if row["swap_ab"] else row["block_n"]) // row["row_ctas"]
    return not mn_major or own * (1 if row["scaling"] == "ue8m0" else 2) % 32 == 0


def check(case: Sm100Case) -> None:
    results = [dataclasses.replace(case, seed=seed).run() for seed in range(SEEDS)]
    for seed, result in enumerate(results):
        assert same_bits(result, results[0]), (
            f"seeds 0 and {seed} give other bits\nreproduce with: {dataclasses.replace(case, seed=seed).repro}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Values


@every_row
@pytest.mark.parametrize("c", ["", "full", "bias", "alias"])
@pytest.mark.parametrize("d", ["tma", "direct", "float32", "float32_direct"])
def test_outputs(row: Row, d: str, c: str) -> None:
    """Each way to store D with each kind of C, on more than one tile, the last ones ragged."""
    m, n = cluster_tile(row)
    sms = 2 * row["cluster_size"]
    n = ragged(n, 9, d in ("tma", "float32"))
    check(Sm100Case(row["name"], m + 5, n, 2 * row["block_k"] - 91 + 64, d=d, c=c, data="integer", num_sms=sms))


@every_row
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(row: Row, layout: str) -> None:
    """The tensor core reads both operands as they lie; NaN reaches the elements that it belongs to, and no other."""
    m, n = cluster_tile(row)
    case = Sm100Case(row["name"], m + 7, n + 11, 3 * row["block_k"] - 17, layout, data="special")
    if takes(row, layout):
        check(case)
    else:
        with pytest.raises(RuntimeError, match="too few columns for an MN-major operand"):
            case.run()


@every_scaled_row
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("a,b", [("fp8", "fp4"), ("fp4", "fp8"), ("fp4", "fp4")])
def test_fp4(row: Row, a: str, b: str, gran_k: int) -> None:
    m, n = cluster_tile(row)
    check(Sm100Case(row["name"], m + 3, n + 5, 3 * 128, a=a, b=b, gran_k=gran_k))
    # The FP8 operand may be MN-major; FP4 is K-major only.
    layout = ("n" if a == "fp4" else "t") + ("t" if b == "fp4" else "n")
    if takes(row, layout):
        check(Sm100Case(row["name"], m + 3, n + 5, 128, layout, a, b, gran_k, d="float32", data="integer"))


@every_scaled_row
@pytest.mark.parametrize("k", [1, 31, 33, 64, 97, 127, 129, 400, 511, 513, 640])
def test_scales_of_ragged_k(row: Row, k: int) -> None:
    """Bytes of scale words that belong to no K are NaN."""
    m, n = min(cluster_tile(row)[0], 40), min(cluster_tile(row)[1], 60)
    for gran_k in (32, 128):
        check(Sm100Case(row["name"], m, n, k, gran_k=gran_k, data="special"))


def several_waves(row: Row) -> Sm100Case:
    """Nine tiles for two CTAs or pairs, more K blocks than stages: the ring goes on from tile to tile."""
    m, n = cluster_tile(row)
    k = row["split_k"] * (row["num_stages"] + 2) * row["block_k"] - 27
    return Sm100Case(row["name"], 2 * m + 3, 2 * n + 24, k, gran_k=32, num_sms=2 * row["cluster_size"])


def one_cluster(row: Row) -> Sm100Case:
    """All tiles in one, whose accumulators take turns."""
    m, n = cluster_tile(row)
    return Sm100Case(row["name"], m + 1, 3 * n + 4, row["block_k"] + 5, d="float32", num_sms=row["cluster_size"])


def one_element(row: Row) -> Sm100Case:
    return Sm100Case(row["name"], 1, 1, 1)


def one_row(row: Row) -> Sm100Case:
    return Sm100Case(row["name"], 1, 2 * row["block_n"] + 31, 300, d="direct")


def one_column(row: Row) -> Sm100Case:
    return Sm100Case(row["name"], 2 * row["block_m"] + 31, 1, 300, d="float32", c="bias")


def fewer_k_blocks_than_parts(row: Row) -> Sm100Case:
    """Where CTAs share a tile, one has nothing to add."""
    m, n = cluster_tile(row)
    k = max(1, row["split_k"] - 1) * row["block_k"]
    return Sm100Case(row["name"], 2 * m, n, k, d="float32", c="alias", num_sms=row["cluster_size"])


def uneven_parts(row: Row) -> Sm100Case:
    """Parts of K that begin in the middle of a word of scales."""
    m, n = cluster_tile(row)
    k = (5 * row["split_k"] + 2) * row["block_k"] - 3
    return Sm100Case(row["name"], m + 1, n + 3, k, d="direct", num_sms=2 * row["cluster_size"])


def whole_tiles(row: Row) -> Sm100Case:
    m, n = cluster_tile(row)
    return Sm100Case(row["name"], m, 2 * n, 4 * row["block_k"], data="integer")


def long_k(row: Row) -> Sm100Case:
    """Words of scales, each for four K blocks, many times around their ring."""
    m, n = cluster_tile(row)
    k = 4 * (row["num_stages"] + 2) * row["block_k"] - 77
    return Sm100Case(row["name"], min(m, 50), n + 8, k, num_sms=row["cluster_size"])


SHAPES = [
    several_waves,
    one_cluster,
    one_element,
    one_row,
    one_column,
    fewer_k_blocks_than_parts,
    uneven_parts,
    whole_tiles,
    long_k,
]


@every_row
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shapes(row: Row, shape: Callable[[Row], Sm100Case]) -> None:
    check(shape(row))


def random_case(row: Row, seed: int) -> Sm100Case:
    random = generator(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    def size(step: int, most: int) -> int:
        """Up to ``most`` steps, often next to a multiple of one."""
        any_size = int(torch.randint(1, most * step + 1, (1,), generator=random))
        return pick(any_size, max(1, ceil_div(any_size, step) * step + pick(-1, 0, 1)))

    m, n = cluster_tile(row)
    k = size(row["split_k"] * row["block_k"], pick(1, 4, row["num_stages"] + 3))
    kinds = {"a": "fp8", "b": "fp8"}
    layout = pick(*(layout for layout in LAYOUTS if takes(row, layout)))
    if row["scaling"] == "ue8m0":
        kinds = {
            "a": pick("fp8", "fp4") if layout[0] == "n" else "fp8",
            "b": pick("fp8", "fp4") if layout[1] == "t" else "fp8",
        }
        if "fp4" in kinds.values():
            k = ceil_div(k, 128) * 128
    return Sm100Case(
        row["name"],
        size(m, 3),
        size(n, 3),
        k,
        layout,
        **kinds,
        gran_k=pick(32, 128),
        d=pick("tma", "direct", "float32", "float32_direct"),
        c=pick("", "", "full", "bias", "alias"),
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
    """The smallest tile of each kind of kernel: scaled or not, pairs, swapped operands, reduction, groups.

    Of pairs with groups, which take longest, the scaled ones: the others do less.
    """
    every = _capi.instances("sm_100a")
    if os.environ.get("DG_EMULATED_MUTANTS") == "all":
        return every
    kinds: dict[tuple, Row] = {}
    for row in sorted(every, key=lambda row: (row["scaling"] == "none", row["block_m"] * row["block_n"])):
        # Batched and summed kernels synchronise as dense ones do.
        groups = row["grouping"] if row["grouping"].endswith("_grouped") else ""
        scaling = row["scaling"] if not groups or row["row_ctas"] == 1 else ""
        kinds.setdefault((scaling, row["row_ctas"], row["swap_ab"], row["split_k"] > 1, groups), row)
    return list(kinds.values())


def cases_with_groups(row: Row) -> list[GroupedCase | KGroupedCase]:
    """Several tiles for each CTA, some with nothing to multiply, more K blocks than stages, each way to store."""
    m, n = cluster_tile(row)
    k = (row["num_stages"] + 3) * row["block_k"] - 27
    if row["grouping"] == "k_grouped":
        sizes = (k, 0, 70, 3, 2 * row["block_k"], 200)
        case = KGroupedCase(row["name"], "psum", sizes, m + 3, n + 24, 48, 70, num_sms=row["cluster_size"])
        ways = [("tma", ""), ("float32", "alias"), ("float32", ""), ("direct", "bias"), ("float32 direct", "full")]
        each = [dataclasses.replace(case, d=d, c=c, data="integer") for d, c in ways]
        if row["scaling"] == "ue8m0":
            each += [dataclasses.replace(each[0], mn_major=True), dataclasses.replace(each[2], mn_major=True)]
        return each
    sizes = (0, m - 3, 1, m + 5, 2 * m)
    case = GroupedCase(row["name"], "offsets", sizes, n + 24, k, data="integer", num_sms=row["cluster_size"])
    psum = dataclasses.replace(case, layout="psum", k=150, zero_padding=True, tail=m, d="direct")
    # Many tiles of padding: whoever gives back their slots of the queue has nothing else to wait for.
    indices = dataclasses.replace(psum, layout="indices", alignment=max(128, m), tail=12 * m, d="float32")
    floats = dataclasses.replace(case, d="float32", k=150)
    # More tiles than slots of the queue, of more groups than a warp holds at once.
    many = GroupedCase(row["name"], "masked", tuple(i % 3 for i in range(70)), 40, 100, num_sms=row["cluster_size"])
    words = dataclasses.replace(case, gran_k=32)
    return [case, words, psum, indices, floats, many, dataclasses.replace(many, d="float32_direct")]


def cases(row: Row) -> list[Sm100Case | GroupedCase | KGroupedCase]:
    """Ragged tiles, several for each CTA, more K blocks than stages, each way to store."""
    if row["grouping"].endswith("_grouped"):
        return cases_with_groups(row)
    m, n = cluster_tile(row)
    k = row["split_k"] * (row["num_stages"] + 3) * row["block_k"]
    case = Sm100Case(row["name"], 3 * m - 8, 2 * n - 8, k - 27, data="integer", num_sms=row["cluster_size"])
    few = dataclasses.replace(case, k=2 * row["split_k"] * row["block_k"], gran_k=32)
    others = [("direct", "bias"), ("float32", ""), ("float32_direct", "full")]
    return [case, *(dataclasses.replace(few, d=d, c=c) for d, c in others)]


def survey_row(row: Row) -> list[tuple[mutate.Mutant, str]]:
    def run(text: str) -> None:
        module = ptx_emulator.Module(text)
        for case in cases(row):
            case.run(module, budget=20_000_000, check_exit=1)

    ptx, entry = row_ptx(row)
    run(ptx)  # the kernel itself is right
    return mutate.survey(mutate.mutants(ptx, entry), run)


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works without this statement, empty where it would not."""
    lines = ptx.splitlines()
    before, after = lines[: mutant.line - 1], lines[mutant.line :]
    if mutant.kind == "mbarrier init fence":
        following = next(line for line in after if "barrier" in line)
        if "barrier.cluster.arrive.release" in following:
            return "the release of the cluster barrier that follows publishes the mbarriers, too"
    if mutant.kind == "warp barrier":
        meets = r"tcgen05\.wait::ld|bar\.warp\.sync|shfl\.sync|vote\.sync"
        met = max(i for i, line in enumerate(before) if re.search(meets, line))
        if not any(re.search(r"\b(ld|st)\b.*\.shared", line) for line in before[met:]):
            return "the warp has met in tcgen05.wait::ld, a shuffle or a vote, and has not touched shared memory since"
        if "st.shared" in before[-1] and any(re.match(r"\s*@%p\d+ bra", line) for line in after[:6]):
            return "what the loop over groups leaves in shared memory is read behind the shuffles and votes that follow"
        following = [line for line in after if re.search(r"tcgen05|fence\.proxy", line)]
        if any("mbarrier.arrive" in line for line in after[:12]):
            if "fence::after" in following[0] and "tcgen05.ld" in following[1]:
                return "since it read the slot that it gives back, the warp has met to give back an accumulator"
            if any("redux.sync" in line for line in after[:50]):
                return "lanes meet in redux.sync once they have read a slot"
    if mutant.kind == "tcgen05 fence":
        # The first two are around the allocation, the last one is in front of the end.
        fences = [i for i, line in enumerate(lines, 1) if "tcgen05.fence" in line]
        if mutant.line in (*fences[:2], fences[-1]):
            return "the emulator does not ask for fences around tcgen05.alloc and tcgen05.dealloc"
    return ""


@pytest.mark.parametrize("row", mutated_rows(), ids=lambda row: row["name"])
def test_missing_synchronisation_is_reported(row: Row) -> None:
    """Each wait, arrive, fence and barrier of a kernel, left out or wrong."""
    ptx, _ = row_ptx(row)
    silent = [
        f"{found}: {mutant}"
        for mutant, found in survey_row(row)
        if found == "not reached" or (found == "unnoticed" and not reason_harmless(ptx, mutant))
    ]
    assert not silent, "\n".join(silent)
