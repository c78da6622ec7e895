import io

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import kernels, module, run_pipeline

STORE = """
.reg .b64 %o<3>; .reg .b32 %t<2>;
ld.param.u64 %o0, [out];
mov.u32 %t0, %tid.x;
mul.wide.u32 %o1, %t0, 4;
add.s64 %o2, %o0, %o1;
"""
CLASSES = ["tensor", "fp32", "integer", "convert", "move", "shared", "global", "bulk", "barrier", "other"]


def total(mod, out, threads=32, **kw):
    return mod.launch("k", 1, threads, [out], counters=True, **kw).counters["total"]


# Stride between lanes in bytes, access, wavefronts of a full warp, beyond the minimum.
@pytest.mark.parametrize(
    "stride,access,wavefronts,conflicts",
    [
        (4, "u32", 1, 0),
        (0, "u32", 1, 0),
        (8, "u32", 2, 1),
        (128, "u32", 32, 31),
        (132, "u32", 1, 0),
        (2, "u16", 1, 0),
        (8, "u64", 2, 0),
        (16, "u64", 4, 2),
        (16, "v4.u32", 4, 0),
        (32, "v4.u32", 8, 4),
        (128, "v4.u32", 32, 28),
        (144, "v4.u32", 4, 0),
    ],
)
def test_bank_conflicts(stride, access, wavefronts, conflicts):
    scalars = {"u32": "%r3", "u64": "%d", "u16": "%h"}
    stored = scalars.get(access, "{%r3, %r3, %r3, %r3}")
    loaded = scalars.get(access, "{%r4, %r5, %r6, %r7}")
    mod = module(f"""
.shared .align 16 .b8 buf[8192];
.reg .b32 %r<8>; .reg .b64 %d; .reg .b16 %h;
mov.u32 %r0, %tid.x; mov.u32 %r1, buf; mad.lo.u32 %r2, %r0, {stride}, %r1; mov.b64 %d, 0; mov.u32 %r3, 0; mov.u16 %h, 0;
st.shared.{access} [%r2], {stored};
ld.shared.{access} {loaded}, [%r2];
""")
    c = total(mod, np.zeros(1, np.int32))
    for kind in ("load", "store"):
        assert (c[f"smem_{kind}s"], c[f"smem_{kind}_wavefronts"], c[f"smem_{kind}_conflicts"]) == (
            1,
            wavefronts,
            conflicts,
        )
    assert c["shared"] == 2 and c["global"] == 0


@pytest.mark.parametrize("stride,sectors,minimum", [(4, 4, 4), (8, 8, 4), (64, 32, 4), (0, 1, 1)])
def test_global_sectors(stride, sectors, minimum):
    mod = module(f"""
.reg .b32 %r<3>; .reg .b64 %d<3>;
mov.u32 %r0, %tid.x; ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r0, {stride}; add.s64 %d2, %d0, %d1;
st.global.u32 [%d2], %r0; ld.global.u32 %r1, [%d2];
""")
    buf = np.zeros(1024, np.int32)
    buf = buf[-buf.ctypes.data % 128 // 4 :][:512]
    c = total(mod, buf)
    assert (c["gmem_loads"], c["gmem_load_sectors"], c["gmem_load_min_sectors"]) == (1, sectors, minimum)
    assert (c["gmem_stores"], c["gmem_store_sectors"], c["gmem_store_min_sectors"]) == (1, sectors, minimum)


def test_parameters_are_not_global_memory():
    mod = module(
        """
.reg .b64 %a, %o, %d; .reg .b32 %t, %v;
ld.param.u64 %o, [out]; mov.b64 %a, out; mov.u32 %t, %tid.x; and.b32 %t, %t, 1; mul.wide.u32 %d, %t, 4;
add.u64 %a, %a, %d; ld.param.u32 %v, [%a]; st.global.u32 [%o], %v;
"""
    )
    c = total(mod, np.zeros(2, np.int32))
    assert (c["gmem_loads"], c["gmem_load_sectors"], c["gmem_stores"]) == (0, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_divergence_is_canonical(seed):
    """Both sides of a branch count once, a loop as often as its longest lane, whatever the interleaving."""
    mod = module(
        STORE
        + """
.reg .b32 %r<4>; .reg .pred %p, %q;
mov.u32 %r0, 0;
loop: add.u32 %r0, %r0, 1; setp.lt.u32 %p, %r0, %t0; @%p bra loop;
setp.lt.u32 %q, %t0, 7;
@%q bra low;
cvt.rn.f32.u32 %r1, %r0; bra done;
low: cvt.rn.f32.u32 %r1, %r0; cvt.rn.f32.u32 %r1, %r0;
done: st.global.u32 [%o2], %r1;
"""
    )
    c = total(mod, np.zeros(32, np.int32), seed=seed)
    assert c["convert"] == 3 and c["gmem_stores"] == 1 and c["integer"] == 2 + 2 * 31 + 1


def test_pipeline():
    mod, runs, blocks = kernels("pipeline"), [], 9
    for seed in range(4):
        st = run_pipeline(mod, 1, blocks, seed=seed, counters=True)
        runs.append(st.counters)
        for table in (runs[-1]["total"], *runs[-1]["warps"].values(), *runs[-1]["ctas"].values()):
            table.pop("polls")
    assert all(r == runs[0] for r in runs)
    warps, all_ = runs[0]["warps"], runs[0]["total"]
    assert [w["tensor"] for w in warps.values()] == [2 * 4 * blocks] * 4 + [0]
    assert [w["fp32"] for w in warps.values()] == [2 * 32 * blocks] * 4 + [0]
    assert warps[4]["bulk"] == 2 * 2 * blocks and warps[4]["bulk_load_bytes"] == 2 * 16384 * blocks
    # The waits and arrives of the ring, and __syncthreads.
    assert warps[4]["barrier"] == 2 * (2 * blocks + 1) and warps[1]["barrier"] == 2 * (2 * blocks + 2)
    assert all_["bulk_delivered_bytes"] == all_["bulk_load_bytes"] and all_["bulk_store_bytes"] == 2 * 16384
    for w in range(4):
        c = warps[w]
        assert (c["smem_stores"], c["smem_store_wavefronts"], c["smem_store_conflicts"]) == (
            2 * 16,
            2 * 16 * 8,
            2 * 16 * 6,
        )
    assert (
        all(c["bulk_received_bytes"] == 16384 * blocks for c in runs[0]["ctas"].values()) and len(runs[0]["ctas"]) == 2
    )
    assert sum(all_[k] for k in CLASSES) == sum(w[k] for w in warps.values() for k in CLASSES)


def test_multicast_bytes():
    a, out = np.random.randint(0, 99, (32, 32), dtype=np.int32), np.zeros((2, 32, 32), np.int32)
    st = kernels("tma").launch("multicast", 2, 64, [ptx_emulator.tensor_map(a, "s32", [32, 16]), out], counters=True)
    c = st.counters
    assert c["total"]["bulk_load_bytes"] == 4096 and c["total"]["bulk_delivered_bytes"] == 8192
    assert [x["bulk_received_bytes"] for x in c["ctas"].values()] == [4096, 4096]


def test_report():
    st, text = run_pipeline(kernels("pipeline"), counters=True), io.StringIO()
    st.report(file=text)
    lines = text.getvalue().splitlines()
    assert "1-3 each" in lines[0] and lines[0].endswith("total") and any(x.startswith("tensor") for x in lines)
    st.report(by="ctas", file=text)
    with pytest.raises(ValueError):
        run_pipeline(kernels("pipeline")).report()


def test_several_launches():
    mod = module(STORE + "st.global.u32 [%o2], %t0;")
    outs = [np.zeros(64, np.int32), np.zeros(32, np.int32)]
    st = ptx_emulator.run([ptx_emulator.Launch(mod, "k", 1, len(o), [o]) for o in outs], counters=True)
    assert [x["total"]["gmem_stores"] for x in st.launches] == [2, 1] and st.counters["total"]["gmem_stores"] == 3


def test_reduce_and_dsmem_bytes():
    a, out = np.random.randn(24, 32).astype(np.float32), np.ones((24, 32), np.float32)
    maps = [ptx_emulator.tensor_map(t, "f32", [32, 24], swizzle=128) for t in (a, out)]
    c = (
        kernels("tma")
        .launch("box_copyILi128ELi128ELb1E", 1, 64, [*maps, 24, 128, 0, 0], smem=65536, counters=True)
        .counters["total"]
    )
    assert (c["bulk_load_bytes"], c["bulk_reduce_bytes"], c["bulk_store_bytes"]) == (3072, 3072, 0)
    c = kernels("tma").launch("st_async", 2, 32, [np.zeros((2, 32), np.int32)], counters=True).counters["total"]
    assert c["bulk_dsmem_bytes"] == 2 * 32 * 4
