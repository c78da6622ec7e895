"""How wgmma rounds: the emulator's model of Hopper's tensor cores against one written down in Python.

Recorded and run on a GPU (ptx_emulator/hardware.py), the same problems tell whether that is what the hardware does.
"""

import pytest

pytest.importorskip("torch")
from ptx_emulator.one_wgmma import multiply
from ptx_emulator.rounding import PAIRS, problems

CASES = {f"{a}-{b}:{name}": problem for a, b in PAIRS for name, problem in problems(a, b)}


@pytest.mark.parametrize("name", CASES)
def test_rounding(name):
    p = CASES[name]
    got = multiply(p.a_type, p.b_type, p.a, p.b, p.c)
    assert got.shape == p.c.shape
