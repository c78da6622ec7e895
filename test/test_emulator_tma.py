import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, kernels

SEEDS = range(4)


def bulk(bug, n=512, **kw):
    a = np.random.randint(0, 1000, n, dtype=np.int32)
    out = np.zeros(n, np.int32)
    st = kernels("tma").launch(f"bulk_copyILi{bug}E", 1, 128, [a, out, n], smem=n * 4, **kw)
    return a, out, st


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copy(seed):
    a, out, _ = bulk(0, seed=seed)
    assert np.array_equal(out, a + 1)


@pytest.mark.parametrize(
    "bug,kind",
    [
        (1, "deadlock"),
        (2, ("mbarrier_tx", "inflight_read")),
        (3, ("inflight_read", "uninit_smem")),
        (4, "proxy_fence"),
        (5, "mbarrier_uninit"),
        (6, "inflight_overwrite"),
        (7, ("mbarrier_overflow", "mbarrier_tx")),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copy_bugs(bug, kind, seed):
    expect(kind, bulk, bug, seed=seed)


def test_exit_before_store_was_read():
    *_, st = bulk(8)
    assert any("inflight_at_exit" in w for w in st.warnings)
    expect("inflight_at_exit", bulk, 8, check_exit=True)


def test_store_out_of_bounds():
    a, out = np.zeros(512, np.int32), np.zeros(508, np.int32)
    expect("global_bounds", kernels("tma").launch, "bulk_copyILi0E", 1, 128, [a, out, 512], smem=2048)


@pytest.mark.parametrize("sin,sout", [(0, 0), (32, 128), (64, 32), (128, 64)])
@pytest.mark.parametrize("x,y", [(0, 0), (-4, 5), (40, 60)])
@pytest.mark.parametrize("seed", range(2))
def test_box_copy(sin, sout, x, y, seed):
    """A 2-D box through shared memory; out-of-bounds elements read as zero and are not written."""
    rows, cols, box = 70, 52, 8 if 32 in (sin, sout) else 16
    a = np.random.randn(rows, cols).astype(np.float32)
    out = np.full((rows, cols), 9, np.float32)
    maps = [ptx_emulator.tensor_map(t, "f32", [box, 24], swizzle=s) for t, s in ((a, sin), (out, sout))]
    kernels("tma").launch(f"box_copyILi{sin}ELi{sout}ELb0E", 1, 64, [*maps, 24, box * 4, x, y], smem=65536, seed=seed)
    ref = np.full((rows, cols), 9, np.float32)
    win = np.s_[max(y, 0) : max(y + 24, 0), max(x, 0) : max(x + box, 0)]
    ref[win] = a[win]
    assert np.array_equal(out, ref)


def test_a_box_starts_on_a_multiple_of_16_bytes():
    """As an H200 does: from other columns on it stops with an illegal instruction."""
    a = np.zeros((70, 52), np.float32)
    maps = [ptx_emulator.tensor_map(a, "f32", [16, 24])] * 2
    launch = kernels("tma").launch
    launch("box_copyILi0ELi0ELb0E", 1, 64, [*maps, 24, 64, 4, 5], smem=65536)
    expect("misaligned", launch, "box_copyILi0ELi0ELb0E", 1, 64, [*maps, 24, 64, 3, 5], smem=65536)


def test_wrong_swizzle_is_visible():
    a, out = np.random.randn(24, 32).astype(np.float32), np.zeros((24, 32), np.float32)
    maps = [
        ptx_emulator.tensor_map(t, "f32", [16, 24], swizzle=s) for t, s in ((a, 128), (out, 128))
    ]  # the kernel stores 64-byte swizzled
    kernels("tma").launch("box_copyILi128ELi64ELb0E", 1, 64, [*maps, 24, 64, 0, 0], smem=65536)
    assert not np.array_equal(out[:, :16], a[:, :16])


def test_reduce_add():
    a, out = np.random.randn(24, 32).astype(np.float32), np.ones((24, 32), np.float32)
    maps = [ptx_emulator.tensor_map(t, "f32", [32, 24], swizzle=128) for t in (a, out)]
    kernels("tma").launch("box_copyILi128ELi128ELb1E", 1, 64, [*maps, 24, 128, 0, 0], smem=65536)
    assert np.array_equal(out, a + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast(seed):
    a, out = np.random.randint(0, 99, (32, 32), dtype=np.int32), np.zeros((2, 32, 32), np.int32)
    kernels("tma").launch("multicast", 2, 64, [ptx_emulator.tensor_map(a, "s32", [32, 16]), out], seed=seed)
    assert np.array_equal(out, np.stack([a, a]))


@pytest.mark.parametrize("x,y,z", [(0, 0, 0), (4, 2, 1), (-4, -1, 4)])
def test_3d(x, y, z):
    a, out = np.random.randint(1, 99, (5, 6, 12), dtype=np.int32), np.zeros((2, 4, 8), np.int32)
    kernels("tma").launch("load_3d", 1, 64, [ptx_emulator.tensor_map(a, "s32", [8, 4, 2]), out, x, y, z])
    pad = np.zeros((15, 16, 32), np.int32)
    pad[5:10, 5:11, 10:22] = a
    assert np.array_equal(out, pad[5 + z : 7 + z, 5 + y : 9 + y, 10 + x : 18 + x])


def test_replaced_tensor_map():
    base, mat = np.zeros((4, 64), np.int32), np.random.randint(1, 99, (7, 24), dtype=np.int32)
    slot = np.zeros(512, np.uint8)
    slot = slot[-slot.ctypes.data % 128 :][:128]
    out = np.zeros((8, 32), np.int32)
    kernels("tma").launch("replace_map", 1, 64, [ptx_emulator.tensor_map(base, "s32", [32, 8]), slot, mat, 24, 7, out])
    ref = np.zeros((8, 32), np.int32)
    ref[:6, :24] = mat[1:]
    assert np.array_equal(out, ref)


def test_encode_rejects_bad_maps():
    a = np.zeros((8, 6), np.float32)
    expect("tensormap", ptx_emulator.tensor_map, a, "f32", [4, 8])  # stride 24 bytes
    b = np.zeros((8, 64), np.float32)
    expect("tensormap", ptx_emulator.tensor_map, b, "f32", [64, 8], swizzle=128)  # inner box 256 bytes
    expect("tensormap", ptx_emulator.tensor_map, b, "f32", [32, 257])


@pytest.mark.parametrize("seed", SEEDS)
def test_st_async(seed):
    out = np.zeros((2, 32), np.int32)
    kernels("tma").launch("st_async", 2, 32, [out], seed=seed)
    assert np.array_equal(out, np.stack([np.arange(32) + 100, np.arange(32)]))
