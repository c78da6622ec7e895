import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import layouts
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
@pytest.mark.parametrize("x,y", [(0, 0), (4, 5), (40, 60)])
@pytest.mark.parametrize("seed", range(2))
def test_box_copy(sin, sout, x, y, seed):
    """A 2-D box through shared memory; out-of-bounds elements read as zero and are not written."""
    rows, cols, box = 70, 52, 8 if 32 in (sin, sout) else 16
    a = np.random.randn(rows, cols).astype(np.float32)
    out = np.full((rows, cols), 9, np.float32)
    maps = [ptx_emulator.tensor_map(t, "f32", [box, 24], swizzle=s) for t, s in ((a, sin), (out, sout))]
    kernels("tma").launch(f"box_copyILi{sin}ELi{sout}ELb0E", 1, 64, [*maps, 24, box * 4, x, y], smem=65536, seed=seed)
    ref = np.full((rows, cols), 9, np.float32)
    win = np.s_[y : y + 24, x : x + box]
    ref[win] = a[win]
    assert np.array_equal(out, ref)


def patterned(size, fill=0x5A):
    """Bytes at a multiple of 256."""
    raw = np.full(size + 256, fill, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:size]


def matrix_map(memory, dtype, item, rows, cols, pitch, box, swizzle):
    shape = [cols, rows], [pitch], box
    return ptx_emulator.encode_tiled(dtype, 2, memory, *shape, swizzle=swizzle)


@pytest.mark.parametrize("dtype,item", [("u8", 1), ("bf16", 2), ("f32", 4)])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("x,y", [(0, 0), (-16, -2), (16, 3), (-48, 0)])
def test_box_in_shared_memory(dtype, item, swizzle, x, y):
    """Elements beyond the matrix are zero, to the element; the padding behind its rows is not read."""
    width = swizzle or 64
    memory, out = patterned(7 * 128), patterned(8 * width, 0)
    memory[:] = np.random.randint(1, 99, memory.size)
    cols = 53 // item
    box = [width // item, 8]
    args = [matrix_map(memory, dtype, item, 7, cols, 128, box, swizzle), out, out.size // 16, out.size, x // item, y]
    kernels("tma").launch("load_raw", 1, 32, args, smem=out.size)
    padded = np.zeros((7 + 20, cols * item + 400), np.uint8)
    padded[10:17, 200 : 200 + cols * item] = memory.reshape(7, 128)[:, : cols * item]
    want = padded[10 + y : 18 + y, 200 + x : 200 + x + width]
    at = layouts.swizzled(np.arange(out.size), swizzle)
    assert np.array_equal(out[at].reshape(8, width), want)


@pytest.mark.parametrize("swizzle,inner", [(32, 16), (64, 16), (64, 32), (64, 48), (128, 16), (128, 64), (128, 96)])
def test_boxes_narrower_than_the_swizzle(swizzle, inner):
    """Their rows lie as far apart as the swizzle spans; what completes is counted without the padding."""
    memory, out = patterned(8 * 256), patterned(8 * swizzle, 0)
    memory[:] = np.random.randint(1, 99, memory.size)
    args = [matrix_map(memory, "s32", 4, 8, 64, 256, [inner // 4, 8], swizzle), out, out.size // 16, 8 * inner, 0, 0]
    kernels("tma").launch("load_raw", 1, 32, args, smem=out.size)
    row, byte = np.arange(8)[:, None], np.arange(inner)[None]
    image = out[layouts.swizzled(row * swizzle + byte, swizzle)]
    assert np.array_equal(image, memory.reshape(8, 256)[:, :inner])


@pytest.mark.parametrize("dtype,item", [("u8", 1), ("bf16", 2), ("f32", 4)])
@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize("cols", [1, 5, 8, 13, 16])
def test_stores_fill_units_of_16_bytes(dtype, item, swizzle, cols):
    """As an H200 does: where a row ends inside of 16 bytes, the rest of them is written too; rows are left out."""
    memory, image = patterned(5 * 128), patterned(8 * 128)
    image[:] = np.random.randint(1, 99, image.size)
    before = memory.copy().reshape(5, 128)
    args = [matrix_map(memory, dtype, item, 4, cols, 128, [128 // item, 8], swizzle), image, image.size // 16, 0, 0, 0]
    kernels("tma").launch("store_raw", 1, 32, args, smem=image.size, buffers=[memory])
    end = -(-cols * item // 16) * 16
    want = before.copy()
    want[:4, :end] = image[layouts.swizzled(np.arange(image.size), swizzle)].reshape(8, 128)[:4, :end]
    assert np.array_equal(memory.reshape(5, 128), want)
    tight = patterned(3 * 128 + cols * item)
    args[0] = matrix_map(tight, dtype, item, 4, cols, 128, [128 // item, 8], swizzle)
    if cols * item % 16:
        expect("global_bounds", kernels("tma").launch, "store_raw", 1, 32, args, smem=image.size)
    else:
        kernels("tma").launch("store_raw", 1, 32, args, smem=image.size)


@pytest.mark.parametrize("x,y", [(-4, 0), (0, -1)])
def test_a_store_does_not_start_before_the_tensor(x, y):
    """As an H200 does: it stops with an illegal instruction."""
    memory, image = patterned(5 * 128), patterned(8 * 128)
    args = [matrix_map(memory, "f32", 4, 4, 20, 128, [32, 8], 0), image, image.size // 16, 0, x, y]
    expect("tma_coordinate", kernels("tma").launch, "store_raw", 1, 32, args, smem=image.size)


def test_a_box_starts_on_a_multiple_of_16_bytes():
    """As an H200 does: from other columns on it stops with an illegal instruction."""
    a = np.zeros((70, 52), np.float32)
    maps = [ptx_emulator.tensor_map(a, "f32", [16, 24])] * 2
    launch = kernels("tma").launch
    launch("box_copyILi0ELi0ELb0E", 1, 64, [*maps, 24, 64, 4, 5], smem=65536)
    expect("misaligned", launch, "box_copyILi0ELi0ELb0E", 1, 64, [*maps, 24, 64, 3, 5], smem=65536)


def test_wrong_swizzle_is_visible():
    a, out = np.random.randn(24, 32).astype(np.float32), np.zeros((24, 32), np.float32)
    # The kernel stores 64-byte swizzled.
    maps = [ptx_emulator.tensor_map(t, "f32", [32, 24], swizzle=128) for t in (a, out)]
    kernels("tma").launch("box_copyILi128ELi64ELb0E", 1, 64, [*maps, 24, 128, 0, 0], smem=65536)
    assert not np.array_equal(out, a) and np.array_equal(np.sort(out, None), np.sort(a, None))


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
