"""How wgmma rounds on Hopper: the emulator's model against one in Python that agrees with an H200 in every bit."""

import numpy as np
import pytest

pytest.importorskip("torch")
from ptx_emulator.one_wgmma import multiply
from ptx_emulator.rounding import HOPPER, PAIRS, problems, same

CASES = {f"{a}-{b}:{name}": problem for a, b in PAIRS for name, problem in problems(a, b)}


@pytest.mark.parametrize("name", CASES)
def test_rounding(name):
    p = CASES[name]
    got = multiply(p.a_type, p.b_type, p.a, p.b, p.c, hopper_sums=True)
    want = HOPPER[p.a_type](p)
    assert same(want, got).all()


def test_sums_are_exact_without_the_model():
    p = CASES["bf16-bf16:cancellation"]
    exact, modelled = (multiply(p.a_type, p.b_type, p.a, p.b, p.c, hopper_sums=on) for on in (False, True))
    assert not np.array_equal(exact, modelled)
