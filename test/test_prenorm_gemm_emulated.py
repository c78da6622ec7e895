"""The kernels of tf32_hc_prenorm_gemm on the PTX emulator, through the host code that a GPU launch takes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deep_gemm_ops import _capi, inspect

import ptx_emulator
from common import assert_close, ceil_div, generator, same_bits
from gemm_emulation import units
from prenorm_emulation import PrenormCase, prenorm_plan, run_prenorm, special_products
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "3"))
ARCHS = [arch for arch in (90, 100) if _capi.instances(f"sm_{arch}a")]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]


every_arch = pytest.mark.parametrize("arch", ARCHS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launches(case: PrenormCase, **options: int) -> list[tuple[str, ptx_emulator.Stats]]:
    a, b = case.operands()
    lead = () if case.num_splits is None else (case.num_splits,)
    d, sqr_sum = torch.empty(*lead, case.m, case.n), torch.empty(*lead, case.m)
    options |= {"num_sms": case.num_sms, "arch": case.arch}
    return run_prenorm(a, b, d, sqr_sum, num_splits=case.num_splits, **options)


# One for each kernel, by rows of a (up to 64, 128, 192, 256) and of b (up to 32, 64).
KERNELS = [(60, 24), (121, 32), (185, 16), (249, 9), (33, 40), (127, 64)]


@every_arch
@pytest.mark.parametrize(("m", "n"), KERNELS)
@pytest.mark.parametrize("data", ["normal", "integer", "split", "special"])
def test_every_kernel(m: int, n: int, data: str, arch: int) -> None:
    """One tile and a ragged end of K, split internally, into parts, and not at all."""
    for num_splits, num_sms in [(None, 3), (2, 1), (None, 1)]:
        PrenormCase(m, n, 200, num_splits, data, num_sms, arch=arch).run()


@every_arch
@pytest.mark.parametrize(
    "case",
    [
        PrenormCase(1, 1, 1),
        PrenormCase(13, 24, 8),
        PrenormCase(13, 24, 2050),  # more parts than warps of the reduction
        PrenormCase(257, 24, 72, num_sms=4),  # two tiles of 136 rows, the second ends inside
        PrenormCase(520, 3, 130),  # three tiles of 176 rows
        PrenormCase(256, 32, 64 * 9, num_splits=1),  # more blocks of K than stages
        PrenormCase(40, 8, 64 * 18, num_splits=1),
        PrenormCase(64, 64, 64 * 16, num_splits=1),
        PrenormCase(20, 16, 130, num_splits=7),  # parts without a block of K
        PrenormCase(9, 65, 130),  # three column tiles of one, and of two warpgroups
        PrenormCase(130, 150, 72, num_splits=2),
        PrenormCase(9, 0, 100),  # the sums of squares alone
        PrenormCase(300, 0, 100, num_splits=2),
        PrenormCase(2, 5, 64 * 40, num_sms=132),
    ],
    ids=lambda case: f"{case.m}-{case.n}-{case.k}-{case.num_splits}",
)
def test_shapes(case: PrenormCase, arch: int) -> None:
    dataclasses.replace(case, arch=arch).run()


@pytest.mark.skipif(90 not in ARCHS, reason="the library was built without kernels for sm_90a")
@pytest.mark.parametrize(
    ("m", "n", "k", "cluster", "tile_rows"),
    [
        (250, 24, 600, 2, 256),
        (500, 5, 64 * 9, 4, 168),
        (40, 64, 700, 8, 40),
        (127, 1, 500, 4, 64),
        (60, 0, 1000, 8, 64),
        (100, 33, 64 * 3, 8, 24),  # CTAs without a block of K
        (205, 24, 500, 3, 208),  # slices of 70, 70 and 68 rows
        (20, 24, 500, 7, 8),  # slices of 2 and 0 rows
    ],
)
def test_clusters_add_parts_up(m: int, n: int, k: int, cluster: int, tile_rows: int) -> None:
    """Few parts of K need no second kernel: exact, and the same bits in every order."""
    case = PrenormCase(m, n, k, data="integer", num_sms=132, cluster=cluster, tile_rows=tile_rows)
    first = case.run()
    for seed in range(1, SEEDS):
        again = dataclasses.replace(case, seed=seed).run()
        assert all(same_bits(x, y) for x, y in zip(first, again))


@every_arch
def test_nan_and_infinity(arch: int) -> None:
    for a, b, expected in special_products("cpu"):
        results = torch.empty(len(a), len(b)), torch.empty(len(a))
        run_prenorm(a, b, *results, arch=arch)
        for result, want in zip(results, expected):
            assert_close(result, want, tol=2e-5, tile=(1, 1))


@every_arch
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_problems(seed: int, arch: int) -> None:
    random = generator(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    def up_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=random))

    for _ in range(4):
        PrenormCase(
            m=up_to(pick(16, 130, 300)),
            n=up_to(pick(8, 32, 70)),
            k=up_to(pick(64, 500, 1500)),
            num_splits=pick(None, None, 1, up_to(9)),
            data=pick("normal", "integer", "special"),
            num_sms=pick(1, 3, 20),
            seed=seed,
            arch=arch,
        ).run()


@every_arch
def test_same_bits_in_every_order(arch: int) -> None:
    """Neither the order of warps and copies nor the number of parts in flight changes a result."""
    case = PrenormCase(70, 24, 1000, num_sms=5, arch=arch)
    first = case.run()
    for seed in range(1, 1 + SEEDS):
        again = dataclasses.replace(case, seed=seed).run()
        assert all(same_bits(x, y) for x, y in zip(first, again))


@every_arch
def test_nothing_is_read_twice(arch: int) -> None:
    """Bytes of a and b that the copies fetch: a once, b once a tile, and of neither more than whole rows of 8."""
    case = PrenormCase(8 * 60, 24, 64 * 12, num_sms=8, arch=arch)
    (name, stats), *reduction = launches(case, counters=True)
    assert name == f"sm{arch}_prenorm_gemmILi256ELi1E"
    # Four CTAs with a part of K each are a cluster, and need no second kernel.
    assert [name for name, _ in reduction] == ([] if arch == 90 else ["sm100_prenorm_reduce"])
    tiles = 2
    assert stats.counters["total"]["bulk_load_bytes"] == case.k * (2 * case.m + tiles * 4 * case.n)


@every_arch
def test_no_bank_conflicts(arch: int) -> None:
    """Neither where b is split into BF16 values nor where squares are summed."""
    for m, n in KERNELS:
        for _, stats in launches(PrenormCase(m, n, 256, num_sms=2, arch=arch), counters=True):
            total = stats.counters["total"]
            assert not any(value for name, value in total.items() if name.endswith("_conflicts")), (m, n)


@every_arch
def test_the_device_is_filled(arch: int) -> None:
    """Tiles of 256 rows times parts of K: few rows are spread over the SMs by K, many rows are not split."""
    k = 28672
    for m in (1, 13, 64, 300, 1000, 4096, 5000, 8192, 16384):
        plan = prenorm_plan(m, 24, k, 132, arch)
        assert 100 <= ceil_div(m, plan.tile_rows) * plan.num_splits <= 132, (m, plan.tile_rows, plan.num_splits)
    for m, k in [(132 * 256, 28672), (13, 64), (2**30, 64)]:
        assert prenorm_plan(m, 24, k, 132, arch).num_splits == 1


@every_arch
def test_no_more_sms_than_allowed(arch: int) -> None:
    """One CTA walks all tiles of three kinds, its ring going on from tile to tile."""
    for seed in range(SEEDS):
        PrenormCase(300, 70, 200, num_splits=3, num_sms=1, seed=seed, arch=arch).run()


@pytest.mark.skipif(90 not in ARCHS, reason="the library was built without kernels for sm_90a")
def test_sass() -> None:
    """A block of K is four instructions and one wait for them, and no kernel uses local memory."""
    library = Path(_capi.library()._name)
    for rows, col_groups in [(64, 1), (128, 1), (192, 1), (256, 1), (64, 2), (128, 2)]:
        resources = inspect.kernel_resources(library, f"sm90_prenorm_gemmILi{rows}ELi{col_groups}E")
        assert (resources["stack"], resources["local"]) == (0, 0)
        sass = "\n".join(inspect.kernel_sass(library, resources["function"]))
        counts = [sass.count(name) for name in ("HGMMA.64x", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "LDL", "STL")]
        assert counts == [4, 1, 1, 0, 0], (rows, col_groups)


@pytest.mark.skipif(100 not in ARCHS, reason="the library was built without kernels for sm_100a")
def test_sass_of_sm100() -> None:
    """A block of K is four instructions for each 128 rows, and no kernel uses local memory."""
    library = Path(_capi.library()._name)
    for rows, col_groups in [(128, 1), (256, 1), (128, 2)]:
        resources = inspect.kernel_resources(library, f"sm100_prenorm_gemmILi{rows}ELi{col_groups}E")
        assert (resources["stack"], resources["local"]) == (0, 0)
        sass = "\n".join(inspect.kernel_sass(library, resources["function"]))
        counts = [sass.count(name) for name in ("UTCHMMA", "UTCBAR", "LDTM", "LDL", "STL")]
        assert counts == [4 * rows // 128, 2, 2, 0, 0], (rows, col_groups)


def product_unit(entry: str) -> str:
    part = entry[: entry.index("_gemm")]
    ((text, name),) = [(text, e) for text, module in units(part) for e in module.entries if entry in e]
    return mutate.extract(text, name)


@pytest.mark.parametrize(
    ("arch", "rows", "m", "n"),
    [
        (90, 64, 50, 24),
        (90, 128, 100, 70),
        (90, 192, 350, 9),
        (90, 256, 490, 17),
        (100, 128, 100, 70),
        (100, 256, 300, 17),
    ],
)
def test_missing_synchronisation_is_reported(arch: int, rows: int, m: int, n: int) -> None:
    """Each wait, arrive, fence and barrier of the product's kernel, left out or wrong."""
    if arch not in ARCHS:
        pytest.skip(f"the library was built without kernels for sm_{arch}a")
    text = product_unit(f"sm{arch}_prenorm_gemmILi{rows}ELi{1 if n <= 32 else 2}E")
    # Where a tile has all of its rows, there are none to clear, and no fence for that.
    cases = [PrenormCase(m, n, 64 * 18 - 8, 1, "integer", 1), PrenormCase(rows, n, 200, 2, "integer", 1)]
    if arch == 100:  # the sums of squares alone
        cases.append(PrenormCase(m, 0, 64 * 18, 1, "integer", 1))
    else:  # parts that a cluster adds up
        cases.append(PrenormCase(min(m, rows), min(n, 64), 64 * 30, None, "integer", 2, cluster=2))
    cases = [dataclasses.replace(case, arch=arch) for case in cases]

    def run(ptx: str) -> None:
        module = ptx_emulator.Module(ptx)
        for case in cases:
            case.run(module, budget=20_000_000, check_exit=1)

    run(text)  # the kernel itself is right
    silent = [
        f"{found}: {mutant}"
        for mutant, found in mutate.survey(mutate.mutants(text), run)
        if found in ("not reached", "unnoticed") and not reason_harmless(text, mutant)
    ]
    assert not silent, "\n".join(silent)


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works without this statement, empty where it would not."""
    lines = ptx.splitlines()
    before, after = lines[: mutant.line - 1], lines[mutant.line :]
    if mutant.kind == "mbarrier wait":
        following = next(line for line in after if re.search(r"try_wait|tcgen05|\.shared|\.global|\.async", line))
        if "try_wait" in following:
            return "the wait that follows is for warps that have waited for the same stage"
    if mutant.kind == "warp barrier":
        meets = r"wgmma\.wait_group|bar\.warp\.sync"
        met = max((i for i, line in enumerate(before) if re.search(meets, line)), default=0)
        if not any(re.search(r"\b(ld|st)\b.*\.shared", line) for line in before[met:]):
            return "the warp has met, in wgmma.wait_group too, since it last read what the arrive that follows frees"
    if mutant.kind == "cluster arrive" and not any("cluster" in line for line in lines[mutant.line : mutant.line + 3]):
        return "the thread ends here, which the emulator takes for an arrival that publishes what it has written"
    rest = [line for line in after if line and not line.startswith("$")]
    while mutant.kind == "warp barrier" and rest[0].startswith("barrier.cluster.wait"):
        rest.pop(0)
    if mutant.kind in ("warp barrier", "cluster wait") and rest[0] == "ret;":
        return "the thread ends here: it owes the cluster its arrival alone"
    if mutant.kind == "tcgen05 fence":
        # The first two are around the allocation, the last one is in front of the end.
        fences = [i for i, line in enumerate(lines, 1) if "tcgen05.fence" in line]
        if mutant.line in (*fences[:2], fences[-1]):
            return "the emulator does not ask for fences around tcgen05.alloc and tcgen05.dealloc"
    return ""
