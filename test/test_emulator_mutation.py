"""Mutants of good kernels: whatever synchronising statement is removed, the emulator notices."""

from collections import Counter

import pytest

import ptx_emulator
from ptx_emulator.mutate import extract, mutants, survey
from ptx_emulator.testing import kernel_ptx, run_pipeline

# kind: how many may go unnoticed. Before the roles part nothing has been shared; accumulators that only wgmma touches
# need one wgmma.fence; an arrive of the unrolled loop's remainder frees a stage that nobody fills.
HARMLESS = {"warp barrier": 1, "wgmma fence": 2, "mbarrier arrive": 1}


@pytest.mark.parametrize("scaled", [0, 1])
def test_pipeline(scaled):
    ptx = kernel_ptx("pipeline")
    entry = ptx_emulator.Module(ptx).find(f"pipelineILb{scaled}E")
    options = {"budget": 10**7, "check_exit": True}
    found = survey(mutants(ptx, entry), lambda text: run_pipeline(ptx_emulator.Module(text), scaled, 11, **options))
    assert len(found) >= 15
    unnoticed = Counter(m.kind for m, kind in found if kind == "unnoticed")
    assert unnoticed <= Counter(HARMLESS), [str(m) for m, kind in found if kind == "unnoticed"]
    assert not [str(m) for m, kind in found if kind == "not reached"]
    # Found by a rule, not by a wrong number.
    assert not [str(m) for m, kind in found if kind == "wrong result"]


def test_extract_keeps_one_entry_and_its_lines():
    ptx = kernel_ptx("pipeline")
    entries = ptx_emulator.Module(ptx).entries
    for entry in entries:
        text = extract(ptx, entry)
        assert ptx_emulator.Module(text).entries == [entry]
        assert text.count("\n") == ptx.count("\n")


def test_a_mutant_is_one_statement_away():
    ptx = kernel_ptx("pipeline")
    lines = ptx.splitlines()
    for m in mutants(ptx):
        changed = [i + 1 for i, (a, b) in enumerate(zip(lines, m.ptx.splitlines(), strict=True)) if a != b]
        assert changed == [m.line], m
