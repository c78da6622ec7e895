"""The Mega MoE kernels for SM100 on the PTX emulator: what test_mega_moe_emulated.py does for SM90's.

What both have in common, the protocol between ranks and CTAs, is tried there in more depth.
"""

from __future__ import annotations

import os

import pytest
import test_gemm_sm100_emulated
import test_mega_moe_emulated
import torch

from deep_gemm_ops import _capi, mega_moe

import ptx_emulator
from common import generator, same_bits
from gemm_emulation import units
from mega_cases import MegaCase
from mega_moe_emulation import prepare, run_case
from ptx_emulator import mutate

SEEDS = int(os.environ.get("DG_EMULATED_SEEDS", "2"))
BLOCKS = (16, 32, 64, 128)
TYPES = ("bf16xbf16", "fp8xfp4")

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _capi.instances("sm_100a"), reason="installed without kernels for sm_100a"),
]


def case_of(*arguments: object, **options: object) -> MegaCase:
    return MegaCase(*arguments, arch=100, **options)


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize("mma_type", TYPES)
def test_every_kernel(block_tokens: int, mma_type: str) -> None:
    """A whole block, a ragged one and experts with one token; both linears, in a ring of stages that wraps around."""
    options = {"mma_type": mma_type, "block_tokens": block_tokens, "hidden": 384, "intermediate": 256}
    exact = {**options, "data": "normal" if mma_type == "bf16xbf16" else "integer"}
    run_case(case_of((block_tokens + 3,), num_experts=1, topk=1, **exact))
    run_case(case_of((2, 1), num_experts=4, topk=1, clamp=0.25, **options))


@pytest.mark.parametrize(
    "case",
    [
        case_of((1,), num_experts=1, topk=1, hidden=128, num_sms=1),
        case_of((3, 2), hidden=128, intermediate=384),
        case_of((5,), num_experts=70, topk=6, num_sms=9),  # more experts than a warp has lanes
        case_of((150,), num_experts=2, topk=1, block_tokens=128, num_sms=3),  # several blocks of an expert
        case_of((33, 7, 20, 1), num_experts=4, topk=3, block_tokens=32, max_tokens=64),
        case_of((4, 0, 3, 1, 2, 5, 0, 1), num_experts=16, topk=4, num_sms=1),  # eight ranks
        case_of((40, 40), num_experts=2, topk=2, num_sms=24),  # more CTAs than tasks
        case_of((7, 12), num_experts=4, topk=2, calls=3, num_sms=3),
    ],
    ids=lambda case: f"{case.tokens}-{case.num_experts}-{case.topk}-{case.hidden}",
)
def test_shapes(case: MegaCase) -> None:
    """In FP4's exact arithmetic."""
    changes = {"mma_type": "fp8xfp4", "data": "integer"}
    run_case(MegaCase(**{**vars(case), **changes}))


@pytest.mark.parametrize("routing", ["masked", "wild", "same", "none"])
@pytest.mark.parametrize("mma_type", TYPES)
def test_routing(routing: str, mma_type: str) -> None:
    """Choices that are masked or name no expert, one rank's experts with all tokens, and nobody with any."""
    run_case(case_of((9, 0, 21), num_experts=6, routing=routing, mma_type=mma_type, calls=2))


@pytest.mark.parametrize("mma_type", TYPES)
def test_ranks_without_tokens(mma_type: str) -> None:
    for tokens in [(0,), (0, 3), (17, 0)]:
        run_case(case_of(tokens, calls=2, max_tokens=20, mma_type=mma_type))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_problems(seed: int) -> None:
    random = generator(100 + seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    for _ in range(4):
        ranks = pick(1, 2, 3, 4)
        experts = ranks * pick(1, 2, 5)
        mma_type = pick(*TYPES)
        run_case(
            case_of(
                tuple(pick(0, 1, 3, 17, 40) for _ in range(ranks)),
                num_experts=experts,
                topk=min(experts, pick(1, 2, 4)),
                hidden=pick(128, 256, 384, 512),
                intermediate=pick(128, 256),
                max_tokens=48,
                mma_type=mma_type,
                block_tokens=pick(*BLOCKS),
                routing=pick("random", "random", "masked", "same"),
                data="normal" if mma_type == "bf16xbf16" else pick("normal", "integer"),
                clamp=pick(None, 0.5),
                num_sms=pick(1, 2, 5),
                calls=pick(1, 2),
                seed=seed,
            )
        )


@pytest.mark.parametrize("mma_type", TYPES)
def test_same_bits_in_every_order(mma_type: str) -> None:
    """Neither the order of anything, nor how many CTAs there are, nor the height of a block changes a result."""
    options = {"num_experts": 4, "topk": 3, "mma_type": mma_type}
    first = run_case(case_of((20, 9), **options))
    for seed in range(1, 1 + SEEDS):
        block, num_sms = BLOCKS[seed % 4], seed % 3 + 1
        again = run_case(case_of((20, 9), seed=seed, block_tokens=block, num_sms=num_sms, **options))
        assert all(same_bits(x, y) for x, y in zip(first, again))


def test_weights_are_read_once_for_each_block() -> None:
    """Bytes that the copies fetch: weights and a block of tokens for each tile, and the scales of both."""
    case = case_of((16,), num_experts=2, topk=2, hidden=512, intermediate=256, num_sms=3, mma_type="fp8xfp4")
    run = prepare(case)  # the launches hold no tensors
    total = ptx_emulator.run(run.launches[0][:1], counters=True, num_sms=3).counters["total"]
    tiles_of_k = {"first": (4, 512), "second": (4, 256)}  # of an expert: tiles of weights, and their K
    per_tile = sum(tiles * (k * (128 // 2 + 16) + k // 128 * (128 + 16) * 4) for tiles, k in tiles_of_k.values())
    assert total["bulk_load_bytes"] == case.num_experts * per_tile


def test_time_outs() -> None:
    """A rank that never comes: SM100's kernels say so, too."""
    case = case_of((3, 2), num_sms=2, mma_type="bf16xbf16")
    run = prepare(case, timeout_ns=5_000_000)
    layer, check = run.launches[0]
    ptx_emulator.run([layer], num_sms=2, budget=20_000_000)
    with pytest.raises(ptx_emulator.PtxError, match="enter: its inputs are there.*timed out waiting for rank:1"):
        ptx_emulator.run([check])


MUTATED = ("fp8xfp4",) if os.environ.get("DG_EMULATED_MUTANTS") != "all" else TYPES


@pytest.mark.parametrize("mma_type", MUTATED)
def test_missing_synchronisation_is_reported(mma_type: str) -> None:
    """Each wait, arrive, fence and barrier of a kernel, left out or wrong. BF16 does without some of FP4's."""
    block = 128 if mma_type == "fp8xfp4" else 32  # its ring has an accumulator less than two tiles take
    name = f"sm100_mega_moeILi{block}ELi{mega_moe.MMA_TYPES.index(mma_type)}E"
    ((text, entry),) = [(text, e) for text, module in units("sm100_mega_moe") for e in module.entries if name in e]
    text = mutate.extract(text, entry)
    # Enough K blocks to wrap around the stages; tiles of the second linear before those of the first one and behind one
    # another; CTAs that are done early.
    options = {"mma_type": mma_type, "block_tokens": block}
    cases = [
        case_of((40,), 2, 2, 768 if block == 128 else 1280, 128, num_sms=2, **options),
        case_of((100,), 1, 1, 256, 128, num_sms=1, **options),
        case_of((9, 3), 4, 2, 256, 128, num_sms=3, **options),
    ]

    def run(ptx: str) -> None:
        for case in cases:
            run_case(case, {0: ptx_emulator.Module(ptx)}, budget=40_000_000, check_exit=1)

    run(text)  # the kernel itself is right
    silent = [
        f"{found}: {mutant}"
        for mutant, found in mutate.survey(mutate.mutants(text), run)
        if found in ("not reached", "unnoticed") and not reason_harmless(text, mutant)
    ]
    assert not silent, "\n".join(silent)


def reason_harmless(ptx: str, mutant: mutate.Mutant) -> str:
    """Why a kernel works on the emulator without this statement, empty where it would not."""
    behind = [line for line in ptx.splitlines()[mutant.line :] if "mbarrier" in line or "tcgen05" in line]
    if mutant.kind == "mbarrier wait" and "tcgen05.fence::after" in behind[0] and "tcgen05.cp" in behind[1]:
        return "the warp that turns scales round has waited for the same stage"
    if mutant.kind == "tcgen05 fence" and "mbarrier.try_wait" in next(x for x in behind if "tcgen05.cp" not in x):
        return "operands come through shared memory, and the accumulator has a fence of its own"
    if mutant.kind == "tcgen05 fence" and "tcgen05.dealloc" in behind[0]:
        return "the emulator does not ask for fences around tcgen05.alloc and tcgen05.dealloc"
    return test_gemm_sm100_emulated.reason_harmless(ptx, mutant) or test_mega_moe_emulated.reason_harmless(ptx, mutant)
