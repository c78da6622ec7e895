import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, kernels, module

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


# Warp 0 allocates and frees, warp 1 stores, warp 5, which reaches the same lanes, loads.
SHARED_COLUMNS = """
.shared .align 16 .b8 at[16]; .reg .b32 %t, %wp, %s, %a, %v, %r<3>; .reg .b64 %out, %d; .reg .pred %w0, %w1, %w5;
mov.u32 %t, %tid.x; shr.u32 %wp, %t, 5; mov.u32 %s, at; ld.param.u64 %out, [out];
setp.eq.u32 %w0, %wp, 0; setp.eq.u32 %w1, %wp, 1; setp.eq.u32 %w5, %wp, 5;
@!%w0 bra A; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s], 32; A: bar.sync 0; ld.shared.u32 %a, [%s];
@!%w1 bra B; tcgen05.st.sync.aligned.32x32b.x1.b32 [%a], {%t}; tcgen05.wait::st.sync.aligned; BEFORE B:
BARRIER
@!%w5 bra C; AFTER tcgen05.ld.sync.aligned.32x32b.x1.b32 {%v}, [%a]; tcgen05.wait::ld.sync.aligned;
mul.wide.u32 %d, %t, 4; add.u64 %d, %d, %out; st.global.u32 [%d], %v; C:
LAST
@!%w0 bra D; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %a, 32;
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; D:
"""
PARTS = {
    "BEFORE": "tcgen05.fence::before_thread_sync;",
    "BARRIER": "bar.sync 0;",
    "AFTER": "tcgen05.fence::after_thread_sync;",
    "LAST": "bar.sync 0;",
}


@pytest.mark.parametrize("missing", [None, *PARTS])
@pytest.mark.parametrize("seed", SEEDS)
def test_order_between_the_warps_that_use_a_column(missing, seed):
    """What one warp has stored another loads, and a third frees, with any schedule."""
    text = SHARED_COLUMNS
    for name, part in PARTS.items():
        text = text.replace(name, "" if name == missing else part)
    out = np.zeros(192, np.uint32)
    launch = lambda: module(text, target="sm_100a").launch("k", 1, 192, [out], seed=seed)  # noqa: E731
    if missing:
        kinds = ("race", "tmem_alloc", "uninit_tmem") if missing == "LAST" else ("tcgen05_fence", "uninit_tmem")
        expect(kinds, launch)
    else:
        launch()
        assert (out[160:] == np.arange(32, 64)).all()
