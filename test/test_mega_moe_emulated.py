"""The Mega MoE kernels on the PTX emulator, the ranks' side by side, through the host code that a GPU launch takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deep_gemm_ops import _capi, inspect, mega_moe

import ptx_emulator
from common import assert_close, generator, same_bits
from gemm_emulation import units
from mega_cases import MegaCase
from mega_moe_emulation import library_layout, prepare, run_case
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "3"))
BLOCKS = (16, 32, 64, 128)
HALVED = (16, 32, 64)  # beside FP4: the kernels whose tiles can have half the rows


pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are so small that threads which wait for one another cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = [(mma_type, data) for mma_type in ("fp8xfp8", "fp8xfp4") for data in ("normal", "integer")]


@pytest.mark.parametrize(
    ("mma_type", "data", "block_tokens", "tile_rows"),
    [
        *((*kind, height, -1) for kind in [*KINDS, ("bf16xbf16", "normal")] for height in BLOCKS),
        *(("fp8xfp4", "integer", height, 128) for height in HALVED),
    ],
)
def test_every_kernel(mma_type: str, data: str, block_tokens: int, tile_rows: int) -> None:
    """Whole blocks, a ragged one and experts with one token; two kinds of tiles in the ring of stages."""
    options = {"mma_type": mma_type, "data": data, "block_tokens": block_tokens, "tile_rows": tile_rows}
    options |= {"hidden": 384, "intermediate": 256}
    run_case(MegaCase((block_tokens + 3,), num_experts=2, topk=2, **options))
    run_case(MegaCase((2, 1), num_experts=4, topk=1, clamp=0.25, **options))


@pytest.mark.parametrize(
    "case",
    [
        MegaCase((1,), num_experts=1, topk=1, hidden=128, num_sms=1),
        MegaCase((1,), num_experts=8, topk=8, num_sms=5),
        MegaCase((3, 2), hidden=128, intermediate=384, data="integer"),
        MegaCase((2, 3), num_experts=2, topk=1, hidden=4352, data="integer"),  # more K blocks than a chunk of scales
        MegaCase((5,), num_experts=70, topk=6, num_sms=9),  # more experts than a warp has lanes
        MegaCase((2,), num_experts=40, topk=36, num_sms=2),  # more choices than that
        MegaCase((150,), num_experts=3, topk=2, num_sms=3),  # several blocks of an expert
        MegaCase((150,), num_experts=2, topk=1, block_tokens=128, data="integer", num_sms=3),
        *(MegaCase((200,), 2, 2, 384, 256, block_tokens=128, mma_type=t) for t in mega_moe.MMA_TYPES),  # more than half
        MegaCase((33, 7, 20, 1), num_experts=4, topk=3, block_tokens=32, max_tokens=64),
        MegaCase((4, 0, 3, 1, 2, 5, 0, 1), num_experts=16, topk=4, num_sms=1),  # eight ranks
        MegaCase((40, 40), num_experts=2, topk=2, num_sms=24, data="integer"),  # more CTAs than tasks
        MegaCase((3, 2), hidden=128, intermediate=384, data="integer", mma_type="fp8xfp4"),
        MegaCase((70, 9), num_experts=4, topk=2, block_tokens=64, data="integer", mma_type="fp8xfp4"),
        MegaCase((4, 0, 3, 1, 2, 5, 0, 1), num_experts=16, topk=4, num_sms=1, mma_type="fp8xfp4"),
        MegaCase((3, 2), hidden=128, intermediate=384, data="integer", mma_type="fp8xfp4", tile_rows=128),
        MegaCase((1, 0, 40), num_experts=6, topk=2, num_sms=4, mma_type="fp8xfp4"),  # ranks with tiles of both heights
    ],
    ids=lambda case: f"{case.mma_type}-{case.tokens}-{case.num_experts}-{case.topk}-{case.hidden}",
)
def test_shapes(case: MegaCase) -> None:
    run_case(case)


@pytest.mark.parametrize("routing", ["masked", "wild", "same", "none"])
@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
def test_routing(routing: str, mma_type: str) -> None:
    """Choices that are masked or name no expert, one rank's experts with all tokens, and nobody with any."""
    run_case(MegaCase((9, 0, 21), num_experts=6, routing=routing, mma_type=mma_type, calls=2))


def test_ranks_without_tokens() -> None:
    for tokens in [(0,), (0, 0), (0, 3), (17, 0)]:
        run_case(MegaCase(tokens, calls=2, max_tokens=20))


def test_every_call_leaves_the_buffers_ready() -> None:
    """Other tokens, choices and kernels, call after call."""
    case = MegaCase((7, 12), num_experts=4, topk=2, data="integer", calls=4, num_sms=3)
    run_case(case)
    run_case(case, block_tokens=[16, 128, 32, 64])
    # FP4's tiles have half the rows, where not a block is too tall for them or there are too many.
    case = MegaCase((7, 12), num_experts=4, topk=2, mma_type="fp8xfp4", calls=4, num_sms=4)
    run_case(case, block_tokens=[64, 16, 128, 32])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_problems(seed: int) -> None:
    random = generator(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    for _ in range(4):
        ranks = pick(1, 2, 2, 3, 4)
        experts = ranks * pick(1, 2, 5)
        mma_type = pick("fp8xfp8", "fp8xfp8", "bf16xbf16", "fp8xfp4")
        run_case(
            MegaCase(
                tuple(pick(0, 1, 3, 17, 40) for _ in range(ranks)),
                num_experts=experts,
                topk=min(experts, pick(1, 2, 4)),
                hidden=pick(128, 256, 384, 512),
                intermediate=pick(128, 256),
                max_tokens=48,
                mma_type=mma_type,
                block_tokens=pick(*BLOCKS),
                tile_rows=pick(128, 256),
                routing=pick("random", "random", "masked", "same"),
                data="normal" if mma_type == "bf16xbf16" else pick("normal", "integer"),
                clamp=pick(None, 0.5),
                num_sms=pick(1, 2, 5),
                calls=pick(1, 2),
                seed=seed,
            )
        )


@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
def test_same_bits_in_every_order(mma_type: str) -> None:
    """Neither the order of anything, nor how many CTAs there are, nor the height of a block or a tile, nor what is
    fetched early changes a result."""
    options = {"num_experts": 4, "topk": 3, "mma_type": mma_type}
    first = run_case(MegaCase((20, 9), **options))
    for seed in range(1, 1 + SEEDS):
        block, num_sms = BLOCKS[seed % len(BLOCKS)], seed % 3 + 1
        with _capi.tune_mega_moe(early_bytes=32 * seed, prefetch_bytes=64, tile_rows=128 if seed % 2 else 256):
            again = run_case(MegaCase((20, 9), seed=seed, block_tokens=block, num_sms=num_sms, **options))
        assert all(same_bits(x, y) for x, y in zip(first, again))


@pytest.mark.parametrize(
    ("mma_type", "block_tokens", "num_sms", "tile_rows"),
    [
        *((mma_type, height, 3, 256) for mma_type in ("fp8xfp8", "fp8xfp4") for height in (16, 128)),
        ("fp8xfp4", 16, 7, 256),
        ("fp8xfp4", 16, 8, 128),  # four tiles of an expert's first linear
        ("fp8xfp8", 16, 8, 256),
    ],
)
def test_weights_are_read_once_for_each_block(mma_type: str, block_tokens: int, num_sms: int, tile_rows: int) -> None:
    """Bytes that the copies fetch: weights and a block of tokens for each tile, and scales for each K block. They tell
    which tiles have half the rows: those of FP4's first linear where there is a CTA for each."""
    sizes = {"hidden": 512, "intermediate": 256, "block_tokens": block_tokens}
    case = MegaCase((16,), num_experts=2, topk=2, mma_type=mma_type, num_sms=num_sms, **sizes)
    run = prepare(case)  # the launches hold no tensors
    total = ptx_emulator.run(run.launches[0][:1], counters=True, num_sms=num_sms).counters["total"]
    weights_of_k = {"first": (512, 512), "second": (512, 256)}  # of an expert: rows, and their K
    # FP4 has a word of scales for each row of weights, and BF16 tokens without any.
    rows = min(block_tokens, 64)  # of a short block
    per_row, tokens = (64 + 4, rows * 256) if case.is_fp4 else (128, rows * 128 + block_tokens * 4)
    expert = sum((k // 128) * (n * per_row + n // tile_rows * tokens) for n, k in weights_of_k.values())
    assert total["bulk_load_bytes"] == case.num_experts * expert


def test_scales_of_fp4_at_their_ends() -> None:
    """The smallest and the largest that UE8M0 has, which leave what they scale finite here, and its NaN."""
    case = MegaCase((5,), num_experts=2, topk=1, hidden=256, intermediate=128, mma_type="fp8xfp4", routing="same")

    def results(code: int) -> torch.Tensor:
        run = prepare(case)
        words = run.weights[0].l2_sf  # [experts, hidden, 1]
        codes = torch.tensor([code, 127, 127, 127], dtype=torch.uint8)
        words[1, 7] = codes.view(torch.int32)
        values = run.weights[0].l2  # row 7: all ones where the scales are 1
        values[1, 7] = 0x22
        for step in zip(*run.launches):
            ptx_emulator.run(step, num_sms=case.num_sms)
        expected = case.expected(run.inputs, run.weights, exact=False)[0]
        others = torch.arange(case.hidden) != 7
        assert_close(run.y[0][:, others], expected[:, others], tol=2.5e-2)
        return torch.stack([run.y[0][:, 7].double(), expected[:, 7]])

    for code in (0, 200):
        actual, expected = results(code)
        assert actual.isfinite().all() and torch.allclose(actual, expected, rtol=0.05)
    assert results(255).isnan().all()


def test_time_outs() -> None:
    """A rank that never comes, one that dies, and CTAs that do not run: messages with the rank and the step."""
    case = MegaCase((3, 2), num_sms=2)

    def last_words(num_sms: int, rank_1_entered: bool) -> str:
        run = prepare(case, timeout_ns=5_000_000)
        if rank_1_entered:
            run.buffers[0].buffer[1024:2048].view(torch.int64)[1] = 1 << 32 | 2
        layer, check = run.launches[0]
        ptx_emulator.run([layer], num_sms=num_sms, budget=20_000_000)
        with pytest.raises(ptx_emulator.PtxError) as error:
            ptx_emulator.run([check])
        assert error.value.kind == "assert"
        return re.search(r"device assertion .*", str(error.value)).group()

    late = "failed at deep_gemm Mega MoE: timed out waiting for rank"
    assert last_words(2, False).startswith(f"device assertion `enter: its inputs are there` {late}:1")
    assert last_words(2, True).startswith(f"device assertion `leave: its results are there` {late}:1")
    assert last_words(1, True).startswith(f"device assertion `route: all its CTAs are running` {late}:0")


@pytest.mark.parametrize(
    "shape", [(1, 256, 8192, 8, 7168, 2048), (8, 256, 4096, 8, 7168, 2048), (3, 6, 5, 2, 128, 384)]
)
@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
def test_layout_of_a_buffer(shape: tuple[int, ...], mma_type: str) -> None:
    """The one that Python makes is the library's."""
    layer = mega_moe.LayerShape(*shape, mma_type)
    assert layer.buffer_layout() == library_layout(layer)


def test_sass() -> None:
    """No kernel uses local memory, and the tensor core's instructions of a K block are not torn apart."""
    library = Path(_capi.library()._name)
    for number, mma_type in enumerate(mega_moe.MMA_TYPES):
        for block_tokens in BLOCKS:
            resources = inspect.kernel_resources(library, f"sm90_mega_moeILi{block_tokens}ELi{number}E")
            assert (resources["stack"], resources["local"]) == (0, 0)
            sass = "\n".join(inspect.kernel_sass(library, resources["function"]))
            # Two parts of 64 rows by 128 bytes of K. Of FP4 128 of K, one part; two where a block has 128 tokens.
            steps = 8
            if block_tokens == 128:  # short blocks have instructions of their own
                steps *= 4 if mma_type == "fp8xfp4" else 2
            assert [sass.count(name) for name in ("GMMA.64x", "LDL", "STL")] == [steps, 0, 0]


@pytest.mark.parametrize("mma_type", mega_moe.MMA_TYPES)
def test_missing_synchronisation_is_reported(mma_type: str) -> None:
    """Each wait, arrive, fence and barrier of a kernel, left out or wrong."""
    name = f"sm90_mega_moeILi32ELi{mega_moe.MMA_TYPES.index(mma_type)}E"
    ((text, entry),) = [(text, e) for text, module in units("sm90_mega_moe") for e in module.entries if name in e]
    text = mutate.extract(text, entry)
    # Enough K blocks to wrap around the stages; tiles of the second linear before those of the first one and behind one
    # another; CTAs that are done early.
    options = {"mma_type": mma_type, "block_tokens": 32}
    cases = [
        MegaCase((40,), 2, 2, 1280, 128, num_sms=2, **options),
        MegaCase((140,), 1, 1, 256, 128, num_sms=1, **options),
        MegaCase((9, 3), 4, 2, 256, 128, num_sms=3, **options),
    ]
    if mma_type == "fp8xfp4":  # tiles of half the rows
        cases.append(MegaCase((40,), 2, 2, 1280, 128, num_sms=3, tile_rows=128, **options))
    if mma_type == "fp8xfp8":  # two chunks of block scales for a tile
        cases.append(MegaCase((3,), 1, 1, 4352, 128, num_sms=1, **options))

    def run(ptx: str) -> None:
        for case in cases:
            run_case(case, {0: ptx_emulator.Module(ptx)}, budget=40_000_000, check_exit=1)

    kinds = None
    if mma_type == "fp8xfp4" and os.environ.get("DG_EMULATED_MUTANTS") != "all":  # where it differs from FP8's kernel
        kinds = ("expected bytes", "wgmma fence", "wgmma commit", "wgmma wait", "mbarrier arrive")
    run(text)  # the kernel itself is right
    silent = [
        f"{found}: {mutant}"
        for mutant, found in mutate.survey(mutate.mutants(text, kinds=kinds), run)
        if found in ("not reached", "unnoticed") and not reason_harmless(text, mutant)
    ]
    assert not silent, "\n".join(silent)


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works on the emulator without this statement, empty where it would not."""
    lines = ptx.splitlines()
    before, statement = lines[: mutant.line - 1], lines[mutant.line - 1]
    behind = [line for line in lines[mutant.line :] if not line.lstrip().startswith(("//", ".loc"))][:40]
    if "fence.proxy.async.global" in statement:
        return "the emulator does not tell the proxies of global memory apart"
    if mutant.kind == "warp barrier":
        if any("red.release.gpu" in line for line in behind[:12]):
            return "it orders global memory alone, which the emulator takes for sequentially consistent"
        if re.match(r"\s*bar\.sync\s+0;", behind[0]) or any("setmaxnreg" in line for line in behind[:5]):
            return "so that a warp reaches what is behind it as one, which the emulator does not ask for"
        meetings = ("wgmma.wait_group", "bar.warp.sync", "bar.sync")
        met = max(i for i, line in enumerate(before) if any(name in line for name in meetings))
        if not any(re.search(r"\bld\b.*\.shared", line) for line in before[met:]):
            return "the warp has met, in wgmma.wait_group too, since it last read what the arrive that follows frees"
    if mutant.kind in ("wgmma commit", "wgmma wait") and "ELi2E" in ptx:
        (at, *_) = (i for i, line in enumerate(lines) if i >= mutant.line - 1 and "wgmma.wait_group" in line)
        if lines[at].endswith(" 1;") and not any("mbarrier.arrive" in line for line in lines[at : at + 40]):
            return "expanded weights have registers of their own in PTX, and no stage is given back behind this wait"
    if mutant.kind == "barrier" and any("atom.shared.or" in line for line in [*before[-40:], *behind]):
        return "what it guards tells which weights to fetch early, which no result depends on"
    if mutant.kind.startswith("mbarrier") and "sm90_mega_moeILi32ELi0E" in ptx:
        tile = [i for i, line in enumerate(behind) if "st.shared.v4" in line]
        taken = [i for i, line in enumerate(behind) if "atom.global.add" in line]
        if tile and taken:
            return "the warp that takes tiles cannot get further ahead than its scales, which it also waits for"
    if re.match(r"\s*bar\.sync\s+0;", statement) and any("setp.ne.s32" in line for line in behind[:12]):
        written = [line for line in before[-40:] if re.search(r"\bst\.global|atom\.global", line)]
        if written and not any(re.search(r"\b(ld|st)\.shared|mbarrier", line) for line in before[-40:]):
            return "it orders global memory alone, in front of a count of the CTAs that one thread makes"
    return ""
