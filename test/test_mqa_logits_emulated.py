"""Every kernel for MQA logits on the PTX emulator: values, memory around them, and the same bits for every schedule.

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

from deep_gemm_ops import _capi, mqa_logits

import ptx_emulator
from common import generator, same_bits
from mqa_emulation import DenseCase, PagedCase, check, instances, row_ptx, run_metadata
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
ROWS = instances()

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]

Row = dict[str, Any]

# How FP4 is read does not depend on the number of heads: random problems are enough for those between.
CHOSEN = [row for row in ROWS if not row["fp4"] or row["heads"] in (8, 64)]
dense_row = pytest.mark.parametrize("row", [row for row in CHOSEN if not row["paged"]], ids=lambda row: row["name"])
paged_row = pytest.mark.parametrize("row", [row for row in CHOSEN if row["paged"]], ids=lambda row: row["name"])
any_dense_row = pytest.mark.parametrize("row", [row for row in ROWS if not row["paged"]], ids=lambda row: row["name"])
any_paged_row = pytest.mark.parametrize("row", [row for row in ROWS if row["paged"]], ids=lambda row: row["name"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tile_tokens(row: Row) -> int:
    return row["cols"] * row["parts"] // row["heads"]


# ---------------------------------------------------------------------------------------------------------------------
# Dense keys


def several_groups(row: Row) -> DenseCase:
    """Groups of unlike lengths, the last one not full, shared by three CTAs."""
    return DenseCase(row["name"], 2 * tile_tokens(row) + 1, 500)


def ring_of_stages(row: Row) -> DenseCase:
    """One CTA, more tiles than stages, values that round."""
    keys = 64 * (row["num_stages"] + 5) + 3
    return DenseCase(row["name"], tile_tokens(row), keys, "full", data="normal", num_sms=1)


def odd_ranges(row: Row) -> DenseCase:
    """Empty, reversed and beyond both ends; NaN, Inf and negative ones among scales and values."""
    return DenseCase(row["name"], 2 * tile_tokens(row) + 3, 333, "random", data="special")


def one_tile_each(row: Row) -> DenseCase:
    """Groups of one tile: the other warpgroups give them back unused, and every tile ends a pipeline."""
    return DenseCase(row["name"], tile_tokens(row) * (2 * row["num_stages"] + 5), 40, "full", num_sms=1)


def two_tiles_each(row: Row) -> DenseCase:
    """As many as warpgroups: each goes on to the next group while the other still has this one."""
    return DenseCase(row["name"], tile_tokens(row) * (row["num_stages"] + 5), 100, "full", num_sms=1)


def three_tiles_each(row: Row) -> DenseCase:
    return DenseCase(row["name"], tile_tokens(row) * (row["num_stages"] + 5), 170, "full", num_sms=1)


def many_empty_groups(row: Row) -> DenseCase:
    """More groups than threads, many without a key."""
    return DenseCase(row["name"], tile_tokens(row) * row["num_threads"] + 5, 9, "random", num_sms=2)


def without_cleaning(row: Row) -> DenseCase:
    return DenseCase(row["name"], 2 * tile_tokens(row) + 1, 150, "random", clean=False, logits="bfloat16")


def compressed(row: Row) -> DenseCase:
    """Rows start at the token's first key; some ranges are longer than the result."""
    return DenseCase(row["name"], 3 * tile_tokens(row), 200, "random", compressed=120)


def compressed_without_cleaning(row: Row) -> DenseCase:
    return DenseCase(row["name"], 3 * tile_tokens(row), 200, "random", compressed=300, clean=False, logits="bfloat16")


def no_keys_at_all(row: Row) -> DenseCase:
    return DenseCase(row["name"], 3, 70, "empty")


def last_key(row: Row) -> DenseCase:
    return DenseCase(row["name"], tile_tokens(row) + 1, 77, "last", clean=False)


def one_element(row: Row) -> DenseCase:
    return DenseCase(row["name"], 1, 1, "full")


def rounded_to_bfloat16(row: Row) -> DenseCase:
    return DenseCase(row["name"], 4 * tile_tokens(row), 100, "full", logits="bfloat16", data="normal", num_sms=2)


DENSE = [
    several_groups,
    ring_of_stages,
    odd_ranges,
    one_tile_each,
    two_tiles_each,
    three_tiles_each,
    many_empty_groups,
    without_cleaning,
    compressed,
    compressed_without_cleaning,
    no_keys_at_all,
    last_key,
    one_element,
    rounded_to_bfloat16,
]


@dense_row
@pytest.mark.parametrize("shape", DENSE, ids=lambda shape: shape.__name__)
def test_dense(row: Row, shape: Callable[[Row], DenseCase]) -> None:
    check(shape(row), SEEDS)


def picker(seed: int) -> Callable[..., Any]:
    random = generator(seed)
    return lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=random))]


@any_dense_row
def test_random_dense_problems(row: Row) -> None:
    for seed in range(SEEDS):
        pick = picker(seed)
        keys = pick(1, 15, 64, 65, 130, 700, 1500)
        DenseCase(
            row["name"],
            pick(1, 2, tile_tokens(row), 2 * tile_tokens(row) + 1, 40),
            keys,
            pick("random", "random", "full", "last"),
            compressed=pick(0, 0, 50, keys + 20),
            clean=pick(False, True),
            logits=pick("float32", "bfloat16"),
            data=pick("normal", "integer", "special"),
            num_sms=pick(1, 2, 5, 20),
            seed=seed,
            dim=pick(32, 64, 128),
        ).run()


# ---------------------------------------------------------------------------------------------------------------------
# A cache of blocks


def one_sequence(row: Row) -> PagedCase:
    return PagedCase(row["name"], (200,))


def lengths_of_every_kind(row: Row) -> PagedCase:
    return PagedCase(row["name"], (0, 1, 65, 300, 0), clean=True)


def two_tokens(row: Row) -> PagedCase:
    return PagedCase(row["name"], (130, 64, 7, 1), next_n=2, clean=True)


def two_tokens_without_cleaning(row: Row) -> PagedCase:
    return PagedCase(row["name"], (130, 64, 7, 1), next_n=2, logits="bfloat16")


def six_tokens_in_small_blocks(row: Row) -> PagedCase:
    """More tokens than a tile of some rows: several passes over the keys."""
    return PagedCase(row["name"], (130, 3, 513), next_n=6, clean=True, block_kv=32)


def lengths_of_tokens(row: Row) -> PagedCase:
    return PagedCase(row["name"], (130, 3, 0, 513), next_n=4, per_token=True, num_ctas=7, data="special")


def tokens_in_a_row(row: Row) -> PagedCase:
    return PagedCase(row["name"], (500, 77, 900), counts=(3, 0, 7), num_ctas=5)


def tokens_in_a_row_in_small_blocks(row: Row) -> PagedCase:
    return PagedCase(row["name"], (300, 77), counts=(4, 9), clean=True, block_kv=32, logits="bfloat16")


def broken_table(row: Row) -> PagedCase:
    """Blocks outside of the cache, at keys that count."""
    return PagedCase(row["name"], (640, 500, 300, 129), table="broken", next_n=2)


def broken_table_of_small_blocks(row: Row) -> PagedCase:
    return PagedCase(row["name"], (640, 500, 300, 129), table="broken", block_kv=32)


def ring_of_blocks(row: Row) -> PagedCase:
    """One CTA, more tiles than stages and than table entries in a warp, values that round."""
    return PagedCase(row["name"], (64 * max(35, row["num_stages"] + 3),), num_ctas=1, data="normal")


def ring_of_small_blocks(row: Row) -> PagedCase:
    return PagedCase(row["name"], (2500, 1300), block_kv=32, num_ctas=2)


def one_tile_each_paged(row: Row) -> PagedCase:
    return PagedCase(row["name"], (40,) * (2 * row["num_stages"] + 3), num_ctas=1)


def no_keys(row: Row) -> PagedCase:
    return PagedCase(row["name"], (0, 0), clean=True)


def lengths_beyond_the_result(row: Row) -> PagedCase:
    return PagedCase(row["name"], (300, 200), max_len=100, clean=True)


def wide_result(row: Row) -> PagedCase:
    """Rows of -inf that several CTAs share."""
    return PagedCase(row["name"], (30, 20), max_len=9000, clean=True, logits="bfloat16")


PAGED = [
    one_sequence,
    lengths_of_every_kind,
    two_tokens,
    two_tokens_without_cleaning,
    six_tokens_in_small_blocks,
    lengths_of_tokens,
    tokens_in_a_row,
    tokens_in_a_row_in_small_blocks,
    broken_table,
    broken_table_of_small_blocks,
    ring_of_blocks,
    ring_of_small_blocks,
    one_tile_each_paged,
    no_keys,
    lengths_beyond_the_result,
    wide_result,
]


@paged_row
@pytest.mark.parametrize("shape", PAGED, ids=lambda shape: shape.__name__)
def test_paged(row: Row, shape: Callable[[Row], PagedCase]) -> None:
    check(shape(row), SEEDS)


@any_paged_row
def test_random_paged_problems(row: Row) -> None:
    for seed in range(SEEDS):
        pick = picker(seed)
        lens = tuple(pick(0, 1, 31, 63, 64, 65, 200, 1000) for _ in range(pick(1, 2, 5, 9)))
        counts = tuple(pick(0, 1, 3, 4, 7) for _ in lens) if pick(False, True) else ()
        if sum(counts) == 0:
            counts = ()
        next_n = 1 if counts else pick(1, 2, 3, 4, 5, 6)
        PagedCase(
            row["name"],
            lens,
            next_n=next_n,
            counts=counts,
            per_token=not counts and pick(False, True),
            block_kv=pick(32, 64),
            max_len=pick(0, 0, 90, 1500),
            table=pick("shuffled", "shuffled", "broken"),
            clean=pick(False, True),
            logits=pick("float32", "bfloat16"),
            data=pick("normal", "integer", "special"),
            num_ctas=pick(1, 2, 5, 20),
            seed=seed,
            dim=pick(32, 64, 128),
        ).run()


@pytest.mark.parametrize("row", [row for row in CHOSEN if row["head_dim"] == 0], ids=lambda row: row["name"])
@pytest.mark.parametrize("dim", [32, 64])
def test_any_head_dim(row: Row, dim: int) -> None:
    """Rows of SM100, whose other tests have heads of 128."""
    if row["paged"]:
        for block_kv in (32, 64):
            check(PagedCase(row["name"], (300, 65, 0), next_n=3, block_kv=block_kv, clean=True, dim=dim), SEEDS)
    else:
        check(DenseCase(row["name"], tile_tokens(row) + 1, 300, dim=dim), SEEDS)
        check(DenseCase(row["name"], 2 * tile_tokens(row), 500, "random", data="special", dim=dim), SEEDS)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("arch", sorted({int(row["arch"][3:-1]) for row in ROWS}))
@pytest.mark.parametrize("size", [1, 2, 33, 1023, 1024, 1025, 2100])
def test_schedules(size: int, arch: int) -> None:
    """More sequences than threads, negative lengths, runs of one sequence that cross a round of the kernel."""
    random = generator(size)
    indices = torch.randint(0, 3, (size,), generator=random).cumsum(0).to(torch.int32) // 2
    lens = torch.randint(-10, 700, (size,), generator=random, dtype=torch.int32)
    per_token = torch.randint(-10, 700, (size, 3), generator=random, dtype=torch.int32).t().contiguous().t()
    for context_lens, of_tokens in [
        (lens, None),
        (per_token, None),
        (lens, indices),
        (lens * 0, None),
        (lens[::2], None),
    ]:
        for num_ctas in (1, 5, 132, 1500):
            expected = mqa_logits.reference_metadata(context_lens, num_ctas, of_tokens)
            for seed in range(SEEDS):
                assert same_bits(run_metadata(context_lens, num_ctas, of_tokens, arch, seed=seed), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Synchronisation


def mutated_rows() -> list[Row]:
    """The smallest tile of each kind of kernel."""
    if os.environ.get("DG_EMULATED_MUTANTS") == "all":
        return ROWS
    kinds: dict[tuple, Row] = {}
    for row in sorted(ROWS, key=lambda row: row["cols"] * row["head_dim"]):
        # On SM100 a token of few heads may end anywhere in what is read from tensor memory at once; the same code reads
        # FP4's.
        few_heads = row["arch"] == "sm_100a" and row["heads"] < 64 and not row["fp4"]
        kinds.setdefault((row["arch"], row["paged"], row["fp4"], row["parts"], row["warpgroups"], few_heads), row)
    return list(kinds.values())


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works without this statement, empty where it would not."""
    lines = ptx.splitlines()
    before, after = lines[: mutant.line - 1], lines[mutant.line :]
    if mutant.kind == "warp barrier":
        meets = r"wgmma\.(wait|commit)_group|bar\.warp\.sync|(shfl|vote|redux)\.sync"
        met = max(i for i, line in enumerate(before) if re.search(meets, line))
        if not any(re.search(r"\b(ld|st)\b.*\.shared", line) for line in before[met:]):
            return "the warp has met since it last touched what the arrive that follows frees"
    if mutant.kind == "mbarrier wait":
        steps = r"mbarrier\.|\b(ld|st)\.shared|cp\.async|wgmma|shfl"
        if "mbarrier.try_wait" in next(line for line in after if re.search(steps, line)):
            return "a producer waits for keys to come only so that not too many are on their way"
    if mutant.kind == "tcgen05 fence":
        # The first two are around the allocation, the last one is in front of the end.
        near = [line for line in (*before[-8:], *after[:8]) if re.search(r"tcgen05\.(alloc|dealloc|relinquish)", line)]
        if near:
            return "the emulator does not ask for fences around tcgen05.alloc and tcgen05.dealloc"
    roles = next((i for i, line in enumerate(after) if "setmaxnreg" in line), 0)
    if mutant.kind == "barrier" and any("bar.sync" in line for line in after[:roles]):
        return "another barrier of all threads follows before anybody waits for an mbarrier"
    return ""


@pytest.mark.parametrize("row", mutated_rows(), ids=lambda row: row["name"])
def test_missing_synchronisation_is_reported(row: Row) -> None:
    """Each wait, arrive, fence and barrier of a kernel, left out or wrong."""
    name, tokens, stages, warpgroups = row["name"], tile_tokens(row), row["num_stages"], row["warpgroups"]
    cases: list[DenseCase | PagedCase]
    if row["paged"]:
        lens = (64 * (stages + 7) + 3, 100, 0, 200, 70, 1)
        cases = [
            PagedCase(name, lens, next_n=2, num_ctas=2, clean=True, data="negative"),
            PagedCase(name, (64 * (stages + 7) + 3,) * 3, num_ctas=1, data="negative"),
            PagedCase(name, (64 * 9, 64 * 3), block_kv=32, num_ctas=1, next_n=4, per_token=True, data="negative"),
            PagedCase(name, (40,) * (2 * stages + 3), num_ctas=1, data="negative"),
            PagedCase(name, (64 * 70,), num_ctas=1, block_kv=32, data="negative"),
            PagedCase(name, (64 * warpgroups,) * (stages + 3), num_ctas=1, data="negative"),
        ]
    else:
        cases = [
            DenseCase(name, 4 * tokens + 1, 64 * (stages + 6) + 3, "random", num_sms=2, data="negative"),
            DenseCase(name, 4 * tokens + 1, 64 * (stages + 6) + 3, "full", num_sms=1, data="negative"),
            # Each tile of a warpgroup belongs to another group than the one before.
            DenseCase(name, tokens * (stages + 3), 64 * warpgroups - 10, "full", num_sms=1, data="negative"),
            DenseCase(name, tokens * (2 * stages + 5), 40, "full", num_sms=1, data="negative"),
        ]

    if row["arch"] == "sm_100a":  # which has a second loop for tiles all of whose scales are ordinary
        cases += [dataclasses.replace(case, data="integer") for case in cases]

    def run(text: str) -> None:
        module = ptx_emulator.Module(text)
        for case in cases:
            case.run(module, budget=20_000_000, check_exit=1)

    ptx, entry = row_ptx(row)
    run(ptx)  # the kernel itself is right
    silent = [
        f"{found}: {mutant}"
        for mutant, found in mutate.survey(mutate.mutants(ptx, entry), run)
        if found == "not reached" or (found == "unnoticed" and not reason_harmless(ptx, mutant))
    ]
    assert not silent, "\n".join(silent)
