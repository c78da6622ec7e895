import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, kernels

torch = pytest.importorskip("torch")
SEEDS = range(3)


def umma(bug=0, **kw):
    a, b, out = torch.randn(128, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(128, 64)
    maps = [ptx_emulator.tensor_map(t, "bf16", [64, t.shape[0]], swizzle=128) for t in (a, b)]
    kernels("tcgen05", "100a").launch(f"ummaILi{bug}E", 1, 128, [*maps, out], **kw)
    return a.double() @ b.double().T, out


@pytest.mark.parametrize("seed", SEEDS)
def test_mma(seed):
    ref, out = umma(seed=seed)
    assert torch.allclose(out.double(), ref, atol=1e-4)


@pytest.mark.parametrize(
    "bug,kind",
    [
        (1, "tmem_leak"),
        (2, "tcgen05_ld_wait"),
        (3, ("tmem_inflight", "uninit_tmem")),
        (4, "tmem_alloc"),
        (5, "proxy_fence"),
        (6, "tcgen05_fence"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_bugs(bug, kind, seed):
    expect(kind, umma, bug, seed=seed)


def test_data_movement_shapes():
    out = np.zeros((7, 4, 32), np.uint32)
    kernels("tcgen05", "100a").launch("tmem_shapes", 1, 128, [out])
    lane, col = (out // 16) % 32, out % 16
    assert (out // 512 == np.arange(4)[None, :, None]).all()
    t = np.arange(32)
    # Every 16-lane shape covers each (lane, column) exactly once.
    for regs, cols in (([0], 2), ([1, 2], 4), ([3, 4, 5, 6], 8)):
        cells = {(lane[r, 0, i], col[r, 0, i]) for r in regs for i in range(32)}
        assert cells == {(lane, c) for lane in range(16) for c in range(cols)}
    assert (lane[3, 0] == t // 4).all() and (col[3, 0] == 2 * (t % 4)).all() and (lane[5, 0] == t // 4 + 8).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_launch_control(seed):
    owner = np.zeros(40, np.int32)
    kernels("tcgen05", "100a").launch("steal", 40, 64, [owner], num_sms=3, seed=seed)
    assert (owner > 0).all() and len(set(owner.tolist())) < 40


@pytest.mark.parametrize("seed", SEEDS)
def test_cta_pair(seed):
    a, b, out = torch.randn(256, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(256, 64)
    maps = [ptx_emulator.tensor_map(t, "bf16", [64, rows], swizzle=128) for t, rows in ((a, 128), (b, 32))]
    kernels("tcgen05", "100a").launch("umma_pair", 2, 128, [*maps, out], seed=seed)
    assert torch.allclose(out.double(), a.double() @ b.double().T, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_loads_of_a_pair(seed):
    """.cta_group::2: the mbarrier may be in the other CTA of the pair."""
    x, out = np.arange(64, dtype=np.uint32).reshape(8, 8), np.zeros(64, np.uint32)
    args = [ptx_emulator.tensor_map(x, "u32", [8, 4]), out]
    kernels("tcgen05", "100a").launch("pair_loadsILb0E", 2, 32, args, seed=seed)
    assert np.array_equal(out, x.reshape(-1))
    kind = ("mbarrier_tx", "inflight_read", "race", "inflight_at_exit")  # as it falls out
    expect(kind, kernels("tcgen05", "100a").launch, "pair_loadsILb1E", 2, 32, args, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_scaled(seed):
    a, b = (torch.randn(n, 128).to(torch.float8_e4m3fn) for n in (128, 64))
    ea, eb = (torch.randint(120, 134, (n, 4), dtype=torch.uint8) for n in (128, 64))
    out = torch.zeros(128, 64)
    maps = [ptx_emulator.tensor_map(t.view(torch.uint8), "u8", [128, t.shape[0]], swizzle=128) for t in (a, b)]
    kernels("tcgen05", "100a").launch("umma_block_scaled", 1, 128, [*maps, ea, eb, out], seed=seed)
    scaled = [t.double() * torch.exp2(e.double() - 127).repeat_interleave(32, 1) for t, e in ((a, ea), (b, eb))]
    ref = scaled[0] @ scaled[1].T
    assert ((out.double() - ref).abs() <= 1e-5 * ref.abs().max()).all()
