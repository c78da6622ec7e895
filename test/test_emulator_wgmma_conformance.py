"""wgmma.mma_async of sm_90a against definitions written from the PTX ISA (ptx_emulator/layouts.py).

Operands are small integers, so that sums are exact in any order and results must agree bit for bit; the same kernels
can run on hardware.
"""

import numpy as np
import pytest

from ptx_emulator import layouts
from ptx_emulator.one_wgmma import BYTES, K, kernel, multiply
from ptx_emulator.testing import expect

torch = pytest.importorskip("torch")

TYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
}


def values(rows, cols, dtype, seed):
    """Integers that each type holds exactly."""
    x = torch.randint(-4, 5, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    return x, x.to(TYPES[dtype]).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[BYTES[dtype]]).numpy()


def check(n, a="e4m3", b="e4m3", span=128, span_b=None, *, scale_d=1, sign_a=1, sign_b=1, **options):
    fa, ra = values(64, K[a], a, 1)
    fb, rb = values(n, K[a], b, 2)
    c = torch.randint(-8, 9, (64, n), generator=torch.Generator().manual_seed(3)).float()
    signs = {"scale_d": scale_d, "sign_a": sign_a, "sign_b": sign_b}
    got = multiply(a, b, ra, rb, c.numpy(), span, span_b, **signs, **options)
    want = sign_a * sign_b * (fa.double() @ fb.double().T) + (c.double() if scale_d else 0)
    assert np.array_equal(got, want.float().numpy())


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_e4m3_every_width(n):
    check(n)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "a,b",
    [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2"), ("bf16", "bf16"), ("f16", "f16"), ("tf32", "tf32")],
)
def test_k_major_swizzles(a, b, span):
    for n in (8, 64, 136):
        check(n, a, b, span)


@pytest.mark.parametrize("mn_a,mn_b", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mn_major_swizzles(dtype, span, mn_a, mn_b):
    for n in (64, 192):
        check(n, dtype, dtype, span, mn_a=mn_a, mn_b=mn_b)


def test_operands_may_differ_in_swizzle():
    check(96, span=128, span_b=32)
    check(96, "bf16", "bf16", span=64, span_b=128, mn_b=1)


@pytest.mark.parametrize("dtype", ["e4m3", "bf16"])
def test_scales(dtype):
    check(64, dtype, dtype, scale_d=0)
    check(64, dtype, dtype, sign_a=-1)
    check(64, dtype, dtype, sign_a=-1, sign_b=-1, scale_d=0)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2", "bf16", "f16", "tf32"])
def test_a_from_registers(dtype):
    for n in (8, 128):
        check(n, dtype, dtype, registers=True)


def test_k_advance_inside_the_swizzle_atom():
    """Steps along K of a 128-byte swizzled operand move the start address by 32 bytes."""
    f, raw = values(64, 128, "e4m3", 5)
    image = layouts.operand_image(raw, 128, False, 16, 1024, 8192)
    row, col = layouts.wgmma_fragment(64)
    acc = np.zeros((128, 32), np.float32)
    mod = kernel(64, "e4m3", "e4m3", image=8192)
    for step in range(4):
        desc = layouts.wgmma_descriptor(128, 16, 1024) + 2 * step
        mod.launch("k", 1, 128, [image, acc, image, desc, desc])
    assert np.array_equal(acc, (f @ f.T).numpy()[row, col])


def test_wrong_swizzle_or_stride_is_visible():
    with pytest.raises(AssertionError):
        real = layouts.wgmma_descriptor
        try:
            layouts.wgmma_descriptor = lambda span, lbo, sbo: real(64, lbo, sbo)
            check(64)
        finally:
            layouts.wgmma_descriptor = real
    image = np.zeros(1024, np.uint8)
    mod, desc = kernel(64, "e4m3", "e4m3", image=1024), layouts.wgmma_descriptor(128, 16, 1024)
    expect("smem_bounds", mod.launch, "k", 1, 128, [image, np.zeros((128, 32), np.float32), image, desc, desc])
