"""Single instructions that the SM90 kernels use, against definitions from the PTX ISA."""

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, module

SEEDS = range(3)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [0, 1])
def test_stmatrix(count, trans):
    """ "stmatrix": lane l holds elements (l / 4, 2 (l % 4)) and the next of each matrix; lane 8 j + r has row r."""
    regs = "{" + ", ".join(f"%v{i}" for i in range(count)) + "}"
    mod = module(
        f"""
.shared .align 16 .b8 buf[512]; .reg .b32 %t, %a, %r<3>, %v<4>; .reg .b64 %in, %out, %d;
mov.u32 %t, %tid.x; mov.u32 %a, buf; ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
mul.wide.u32 %d, %t, 16; add.u64 %in, %in, %d; add.u64 %out, %out, %d;
ld.global.v4.u32 {{%v0, %v1, %v2, %v3}}, [%in]; shl.b32 %r0, %t, 4; add.u32 %r1, %a, %r0;
stmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 [%r1], {regs};
bar.warp.sync -1; setp.lt.u32 %p, %t, {8 * count}; @%p ld.shared.v4.u32 {{%v0, %v1, %v2, %v3}}, [%r1];
@%p st.global.v4.u32 [%out], {{%v0, %v1, %v2, %v3}};
""".replace(".reg .b64", ".reg .pred %p; .reg .b64"),
        ".param .u64 in, .param .u64 out",
    )
    fragment = np.arange(256, dtype=np.uint16).reshape(32, 4, 2)  # lane, register, half
    rows = np.zeros((32, 8), np.uint16)
    mod.launch("k", 1, 32, [fragment, rows])
    for j in range(count):
        for lane in range(32):
            for half in range(2):
                r, c = lane // 4, lane % 4 * 2 + half
                r, c = (c, r) if trans else (r, c)
                assert rows[8 * j + r, c] == fragment[lane, j, half]


COPY = """
.shared .align 16 .b8 buf[128]; .reg .b32 %t, %a, %r<3>; .reg .b64 %in, %out, %d; .reg .pred %p;
mov.u32 %t, %tid.x; mov.u32 %a, buf; ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
mul.wide.u32 %d, %t, 4; add.u64 %in, %in, %d; add.u64 %out, %out, %d; shl.b32 %r0, %t, 2; add.u32 %a, %a, %r0;
st.shared.u32 [%a], -1; setp.lt.u32 %p, %t, 10; selp.u32 %r1, 4, 0, %p; selp.u32 %r2, 4, 2, %p;
COPY
cp.async.commit_group; cp.async.wait_group 0;
ld.shared.u32 %r1, [%a]; st.global.u32 [%out], %r1;
"""


@pytest.mark.parametrize(
    "copy,tail",
    [
        ("cp.async.ca.shared.global [%a], [%in], 4;", lambda x: x),
        ("cp.async.ca.shared.global [%a], [%in], 4, %r1;", lambda x: 0),
        ("cp.async.ca.shared.global [%a], [%in], 4, %r2;", lambda x: x & 0xFFFF),
        ("not.pred %p, %p; cp.async.ca.shared.global [%a], [%in], 4, %p;", lambda x: 0),
        ("cp.async.ca.shared.global.L2::128B [%a], [%in], 4, %r1;", lambda x: 0),
    ],
)
def test_cp_async_zero_fill(copy, tail):
    """ "cp.async": bytes past src-size, or all with ignore-src, are zero; the source is not touched then."""
    data, out = np.random.randint(0, 2**32, 32, dtype=np.uint32), np.zeros(32, np.uint32)
    want = np.array([x if i < 10 else tail(int(x)) for i, x in enumerate(data)], np.uint32)
    mod = module(COPY.replace("COPY", copy), ".param .u64 in, .param .u64 out")
    for seed in SEEDS:
        mod.launch("k", 1, 32, [data, out], seed=seed)
        assert np.array_equal(out, want)
    if tail(1) == 0:
        short = [(data.ctypes.data, 40)]
        mod.launch("k", 1, 32, [data.ctypes.data, out], buffers=short)
    else:
        expect("global_bounds", mod.launch, "k", 1, 32, [data.ctypes.data, out], buffers=[(data.ctypes.data, 40)])


ARRIVE = """
.shared .align 16 .b8 buf[128]; .shared .align 8 .b64 bar; .reg .b32 %t, %a, %b, %r<3>; .reg .b64 %in, %out, %d;
.reg .pred %p, %q;
mov.u32 %t, %tid.x; mov.u32 %a, buf; mov.u32 %b, bar; ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared.b64 [%b], COUNT; bar.warp.sync -1;
mul.wide.u32 %d, %t, 4; add.u64 %in, %in, %d; add.u64 %out, %out, %d; shl.b32 %r0, %t, 2; add.u32 %a, %a, %r0;
cp.async.ca.shared.global [%a], [%in], 4; cp.async.mbarrier.arriveNOINC.shared.b64 [%b];
EXTRA
W: mbarrier.try_wait.parity.shared.b64 %q, [%b], 0; @!%q bra W;
xor.b32 %a, %a, 124; ld.shared.u32 %r1, [%a]; st.global.u32 [%out], %r1;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async_mbarrier_arrive(seed):
    """With .noinc the arrive is one of those the barrier expects; without, pending rises by one before it."""
    data = np.arange(32, dtype=np.uint32)

    def run(count, noinc, extra=""):
        text = ARRIVE.replace("COUNT", str(count)).replace("NOINC", noinc).replace("EXTRA", extra)
        out = np.zeros(32, np.uint32)
        module(text, ".param .u64 in, .param .u64 out").launch("k", 1, 32, [data, out], seed=seed)
        assert np.array_equal(out, data[::-1])

    run(32, ".noinc")
    run(1, "", "@%p mbarrier.arrive.shared.b64 _, [%b];")
    expect("deadlock", run, 33, ".noinc")
    expect("deadlock", run, 1, "")
    expect(("mbarrier_overflow", "race"), run, 31, ".noinc")


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_multicast_loads(rank, seed):
    """Each CTA of a pair loads half of the tile into both, at the same offsets, and signals both mbarriers."""
    coordinates = "{%zero, %y}" if rank == 2 else "{%zero, %y, %zero}"
    mod = module(
        f"""
.shared .align 128 .b8 buf[1024]; .shared .align 8 .b64 bar; .reg .b32 %t, %a, %b, %y, %zero, %r<4>, %rank;
.reg .b64 %map, %out, %d; .reg .pred %p, %q; .reg .b16 %both;
mov.u32 %t, %tid.x; mov.u32 %a, buf; mov.u32 %b, bar; mov.u32 %rank, %cluster_ctarank;
mov.u32 %zero, 0; mov.u16 %both, 3;
mov.b64 %map, map; cvta.param.u64 %map, %map; ld.param.u64 %out, [out];
prefetch.tensormap [%map];
setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared.b64 [%b], 1; @%p fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
griddepcontrol.wait; griddepcontrol.launch_dependents;
shl.b32 %y, %rank, 2; shl.b32 %r0, %rank, 9; add.u32 %r1, %a, %r0;
@%p mbarrier.arrive.expect_tx.shared.b64 _, [%b], 1024;
@%p cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
  [%r1], [%map, {coordinates}], [%b], %both;
W: mbarrier.try_wait.parity.shared.b64 %q, [%b], 0; @!%q bra W;
shl.b32 %r2, %t, 5; add.u32 %r3, %a, %r2; mul.wide.u32 %d, %t, 32; add.u64 %out, %out, %d;
shl.b32 %r2, %rank, 10; cvt.u64.u32 %d, %r2; add.u64 %out, %out, %d;
.reg .b32 %v<4>;
ld.shared.v4.u32 {{%v0, %v1, %v2, %v3}}, [%r3]; st.global.v4.u32 [%out], {{%v0, %v1, %v2, %v3}};
ld.shared.v4.u32 {{%v0, %v1, %v2, %v3}}, [%r3 + 16]; st.global.v4.u32 [%out + 16], {{%v0, %v1, %v2, %v3}};
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
""".replace("bytes.multicast::cluster\n ", "bytes.multicast::cluster"),
        ".param .align 64 .b8 map[128], .param .u64 out",
    )
    a, out = np.arange(256, dtype=np.int32).reshape(8, 32), np.zeros((2, 8, 32), np.int32)
    source, box = (a, [32, 4]) if rank == 2 else (a[None], [32, 4, 1])
    mod.launch("k", 2, 32, [ptx_emulator.tensor_map(source, "s32", box), out], cluster=2, seed=seed)
    assert (out == a).all()


def test_elect_and_setmaxnreg():
    body = """
.reg .b32 %t, %r<3>; .reg .b64 %out, %d; .reg .pred %p;
mov.u32 %t, %tid.x; ld.param.u64 %out, [out]; mul.wide.u32 %d, %t, 4; add.u64 %out, %out, %d;
setp.lt.u32 %p, %t, 128; @%p bra LOW; setmaxnreg.inc.sync.aligned.u32 MANY; bra GO;
LOW: setmaxnreg.dec.sync.aligned.u32 40;
GO: elect.sync %r0|%p, -1; selp.u32 %r1, 1, 0, %p; st.global.u32 [%out], %r1;
"""
    out = np.zeros(384, np.uint32)
    module(body.replace("MANY", "232")).launch("k", 1, 384, [out])
    assert (out == (np.arange(384) % 32 == 0)).all()
    text = expect("setmaxnreg", module(body.replace("MANY", "240")).launch, "k", 1, 384, [out])
    assert "66560 registers" in text


@pytest.mark.parametrize("seed", SEEDS)
def test_griddepcontrol_wait(seed):
    """What touches global memory comes after a wait: the thread's own, or one that a barrier puts before it."""
    start = """
.shared .align 128 .b8 buf[128]; .reg .b32 %t, %a, %r<2>; .reg .b64 %out, %d, %map; .reg .pred %first, %p;
mov.u32 %t, %tid.x; ld.param.u64 %out, [out]; mul.wide.u32 %d, %t, 4; add.u64 %out, %out, %d;
mov.b64 %map, map; cvta.param.u64 %map, %map; mov.u32 %a, buf; mov.u32 %r1, 0;
setp.lt.u32 %first, %t, 32; setp.eq.u32 %p, %t, 0;
"""

    def run(*body):
        mod = module(start + "\n".join(body), ".param .align 64 .b8 map[128], .param .u64 out")
        out = np.zeros(32, np.int32)
        mod.launch("k", 1, 64, [ptx_emulator.tensor_map(out, "s32", [32]), np.zeros(64, np.int32)], seed=seed)

    wait, barrier = "@%first griddepcontrol.wait;", "bar.sync 0;"
    store, load = "st.global.u32 [%out], %t;", "ld.global.u32 %r0, [%out];"
    bulk = "@%p cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%map, {%r1}], [%a];"
    stage = "shl.b32 %r0, %t, 2; add.u32 %r0, %r0, %a; @%first st.shared.u32 [%r0], 0; fence.proxy.async; bar.sync 0;"
    run(store)  # depends on nobody
    run("griddepcontrol.wait;", load, store)
    run("prefetch.global.L2 [%out];", wait, barrier, load, store)
    for early in (load, store):
        expect("grid_dependency", run, early, wait)
        expect("grid_dependency", run, wait, early)  # the second warp does not wait
    expect("grid_dependency", run, stage, bulk, wait)


@pytest.mark.parametrize("seed", SEEDS)
def test_stores_to_a_peer(seed):
    """mapa and st.shared::cluster; the reader waits for a remote arrive."""
    mod = module("""
.shared .align 16 .b8 buf[128]; .shared .align 8 .b64 bar; .reg .b32 %t, %a, %b, %pa, %pb, %rank, %r<3>;
.reg .b64 %out, %d; .reg .pred %p, %q;
mov.u32 %t, %tid.x; mov.u32 %a, buf; mov.u32 %b, bar; mov.u32 %rank, %cluster_ctarank; ld.param.u64 %out, [out];
setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared.b64 [%b], 32;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
xor.b32 %r0, %rank, 1; mapa.shared::cluster.u32 %pa, %a, %r0; mapa.shared::cluster.u32 %pb, %b, %r0;
shl.b32 %r1, %t, 2; add.u32 %pa, %pa, %r1; shl.b32 %r2, %rank, 8; add.u32 %r2, %r2, %t;
st.shared::cluster.u32 [%pa], %r2; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%pb];
W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %q, [%b], 0; @!%q bra W;
xor.b32 %r1, %r1, 124; add.u32 %a, %a, %r1; ld.shared.u32 %r1, [%a];
shl.b32 %r0, %rank, 5; add.u32 %r0, %r0, %t; mul.wide.u32 %d, %r0, 4; add.u64 %out, %out, %d; st.global.u32 [%out], %r1;
""")
    out = np.zeros((2, 32), np.uint32)
    mod.launch("k", 2, 32, [out], cluster=2, seed=seed)
    assert (out == np.array([[256], [0]]) + np.arange(32)[::-1]).all()
