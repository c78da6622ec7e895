"""Happens-before in global memory: what threads of different CTAs and launches (devices) hand to one another.

Every planted fault is reported for any schedule, as the report depends on what orders two accesses, not on their time.
"""

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, module

SEEDS = range(3)

# %cta: of the grid or, for two launches, the parameter; %data, %flag, %more, %back: addresses in global memory, of this
# thread's word of the data, of the next thread's; %first: thread 0.
PROLOGUE = """
.shared .align 128 .b8 buf[256]; .shared .align 8 .b64 bar;
.reg .b32 %t, %cta, %r<4>, %s, %b; .reg .b64 %base, %data, %other, %all, %flag, %back, %d;
.reg .pred %first, %zero, %p, %q;
mov.u32 %t, %tid.x; ld.param.u64 %base, [memory];
ld.param.u32 %cta, [id]; mov.u32 %r0, %ctaid.x; add.u32 %cta, %cta, %r0;
add.u64 %all, %base, 256; mul.wide.u32 %d, %t, 4; add.u64 %data, %all, %d; xor.b32 %r0, %t, 31; mul.wide.u32 %d, %r0, 4;
add.u64 %other, %all, %d; mov.u64 %flag, %base; add.u64 %back, %base, 64;
setp.eq.u32 %first, %t, 0; setp.eq.u32 %zero, %cta, 0; mov.u32 %s, buf; mov.u32 %b, bar; mov.u32 %r3, 1;
@%first mbarrier.init.shared.b64 [%b], 1; @%first fence.mbarrier_init.release.cluster; bar.sync 0;
"""
WAIT_COPY = "W9: mbarrier.try_wait.parity.shared.b64 %q, [%b], 0; @!%q bra W9;"


def poll(load: str, at: str = "%flag", label: str = "P", value: int = 1) -> str:
    return f"{label}: {load} %r1, [{at}]; setp.ne.u32 %q, %r1, {value}; @%q bra {label};"


def program(writes: str, reads: str) -> str:
    """CTA 0 does the one, every other CTA the other."""
    return f"{PROLOGUE} @!%zero bra R; {writes} bra E; R: {reads} E:"


def run(text: str, *, launches: int = 1, threads: int = 32, grid: int = 2, **options):
    memory = np.zeros(256, np.uint32)
    mod = module(text, ".param .u64 memory, .param .u32 id")
    if launches == 1:
        mod.launch("k", grid, threads, [memory, 0], **options)
    else:
        ptx_emulator.run([ptx_emulator.Launch(mod, "k", 1, threads, [memory, i]) for i in range(launches)], **options)
    return memory


STORE, LOAD = "st.global.u32 [%data], %t;", "ld.global.u32 %r2, [%other];"
RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%flag], %r3;", "ld.acquire.gpu.global.u32"
SIGNAL, WAIT = f"bar.sync 0; @%first {RELEASE}", f"{poll(ACQUIRE)} bar.sync 0;"

# name: (what CTA 0 does, what the others do, what is reported)
HANDOVERS = {
    "release and acquire": (STORE + SIGNAL, WAIT + LOAD, None),
    "a relaxed store": (STORE + SIGNAL.replace("release.gpu", "relaxed.gpu"), WAIT + LOAD, "race"),
    "a relaxed load": (STORE + SIGNAL, WAIT.replace("acquire.gpu", "relaxed.gpu") + LOAD, "race"),
    "a weak store": (STORE + SIGNAL.replace("release.gpu.", ""), WAIT + LOAD, "race"),
    "fence and relaxed store": (
        STORE + "bar.sync 0; fence.acq_rel.gpu; " + SIGNAL.replace("release.gpu", "relaxed.gpu"),
        WAIT + LOAD,
        None,
    ),
    "membar and volatile store": (
        STORE + "bar.sync 0; membar.gl; " + SIGNAL.replace("release.gpu", "volatile"),
        WAIT + LOAD,
        None,
    ),
    "relaxed load and fence": (
        STORE + SIGNAL,
        WAIT.replace("acquire.gpu", "relaxed.gpu").replace("bar.sync", "fence.acq_rel.gpu; bar.sync") + LOAD,
        None,
    ),
    "fence before what it should publish": (
        "fence.acq_rel.gpu;" + STORE + SIGNAL.replace("release.gpu", "relaxed.gpu"),
        WAIT + LOAD,
        "race",
    ),
    "fence of a CTA": (
        STORE + "bar.sync 0; fence.acq_rel.cta;" + SIGNAL.replace("release.gpu", "relaxed.gpu"),
        WAIT + LOAD,
        "race",
    ),
    "release of a CTA": (STORE + SIGNAL.replace("release.gpu", "release.cta"), WAIT + LOAD, "race"),
    "acquire of a cluster": (STORE + SIGNAL, WAIT.replace("acquire.gpu", "acquire.cluster") + LOAD, "race"),
    "no barrier before the release": (STORE + SIGNAL.replace("bar.sync 0;", ""), WAIT + LOAD, "race"),
    "no barrier behind the acquire": (
        STORE + SIGNAL,
        f"@!%first bra N; {poll(ACQUIRE)} N: " + LOAD,
        "race",
    ),
    "one thread acquires, a barrier": (
        STORE + SIGNAL,
        f"@!%first bra N; {poll(ACQUIRE)} N: bar.sync 0;" + LOAD,
        None,
    ),
    "a word after it was read": (
        STORE + SIGNAL + poll(ACQUIRE, "%back", "Q") + " bar.sync 0; st.global.u32 [%other], %r3;",
        WAIT + LOAD + "bar.sync 0; @%first st.release.gpu.global.u32 [%back], %r3;",
        None,
    ),
    "a word before it was read": (
        STORE + SIGNAL + " st.global.u32 [%other], %r3;",
        WAIT + LOAD + "bar.sync 0; @%first st.release.gpu.global.u32 [%back], %r3;",
        "race",
    ),
    "an atomic between": (
        STORE
        + "bar.sync 0; @%first red.release.gpu.global.add.u32 [%flag], %r3;"
        + "@%first atom.relaxed.gpu.global.add.u32 %r2, [%flag], %r3;",
        poll(ACQUIRE, value=2) + "bar.sync 0;" + LOAD,
        None,
    ),
    "a store that replaces the release": (
        STORE + SIGNAL + "@%first st.relaxed.gpu.global.u32 [%flag], 2;",
        poll(ACQUIRE, value=2) + "bar.sync 0;" + LOAD,
        "race",
    ),
    "atomics": ("atom.global.add.u32 %r2, [%all], %r3;", "red.global.add.u32 [%all], %r3;", None),
    "an atomic and a load": ("atom.global.add.u32 %r2, [%all], %r3;", "ld.global.u32 %r2, [%all];", "race"),
    "halves of one word, one read before the other is written": (
        "@%first ld.global.u16 %r1, [%all]; @%first st.global.u16 [%all], %r3;",
        "@%first ld.global.u16 %r1, [%all + 2]; @%first st.global.u16 [%all + 2], %r3;",
        None,
    ),
    "bytes of one word": (
        "st.global.u8 [%all], %r3;",
        "st.global.u8 [%all + 1], %r3; st.global.u16 [%all + 2], %r3;",
        None,
    ),
}


@pytest.mark.parametrize("name", HANDOVERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_handover(name, seed):
    writes, reads, kind = HANDOVERS[name]
    launch = lambda: run(program(writes, reads), seed=seed)  # noqa: E731
    expect(kind, launch) if kind else launch()


COPY = (
    """@%first mbarrier.arrive.expect_tx.shared.b64 _, [%b], 128;
@%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%all], 128, [%b];"""
    + WAIT_COPY
)
FENCE = "fence.proxy.async.global;"
COPY_BACK = """shl.b32 %r2, %t, 2; add.u32 %r2, %r2, %s; st.shared.u32 [%r2], %t; fence.proxy.async; bar.sync 0;
@%first cp.async.bulk.global.shared::cta.bulk_group [%all], [%s], 128; @%first cp.async.bulk.commit_group;"""
DONE = "@%first cp.async.bulk.wait_group 0;"

COPIES = {
    "a bulk load behind a fence of the reader": (STORE + SIGNAL, WAIT + FENCE + COPY, None),
    "a bulk load behind a fence of the writer": (STORE + FENCE + SIGNAL, WAIT + COPY, None),
    "a bulk load without a fence": (STORE + SIGNAL, WAIT + COPY, "proxy_fence"),
    "a bulk load behind a fence for shared memory": (
        STORE + SIGNAL,
        WAIT + FENCE.replace("global", "shared::cta") + COPY,
        "proxy_fence",
    ),
    "a fence before the store": (FENCE + STORE + SIGNAL, WAIT + COPY, "proxy_fence"),
    "a fence before the acquire": (STORE + SIGNAL, FENCE + WAIT + COPY, "proxy_fence"),
    "a bulk load before the acquire": (STORE + FENCE + SIGNAL, COPY + WAIT, "race"),
    "a bulk load that is overwritten": (
        STORE + FENCE + SIGNAL + STORE,
        WAIT + COPY,
        "race",
    ),
    "a bulk load that has ended": (
        STORE + FENCE + SIGNAL + poll(ACQUIRE, "%back", "Q") + "bar.sync 0;" + STORE,
        WAIT + COPY + "bar.sync 0; @%first st.release.gpu.global.u32 [%back], %r3;",
        None,
    ),
    "a bulk load that has not been waited for": (
        STORE + FENCE + SIGNAL + poll(ACQUIRE, "%back", "Q") + "bar.sync 0;" + STORE,
        WAIT + COPY.replace(WAIT_COPY, "") + "bar.sync 0; @%first st.release.gpu.global.u32 [%back], %r3;" + WAIT_COPY,
        "race",
    ),
    "a bulk store": (COPY_BACK + DONE + SIGNAL, WAIT + LOAD, None),
    "a bulk store that has been read only": (
        COPY_BACK + DONE.replace(" 0", ".read 0") + SIGNAL + DONE,
        WAIT + LOAD,
        "race",
    ),
    "a bulk store, read by a bulk load": (COPY_BACK + DONE + SIGNAL, WAIT + COPY, None),
    "bulk reductions": (
        COPY_BACK.replace(
            "cp.async.bulk.global.shared::cta.bulk_group", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32"
        )
        + DONE,
        COPY_BACK.replace(
            "cp.async.bulk.global.shared::cta.bulk_group", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32"
        )
        + DONE,
        None,
    ),
    "bulk stores to one place": (COPY_BACK + DONE, COPY_BACK + DONE, "race"),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_copies(name, seed):
    writes, reads, kind = COPIES[name]
    launch = lambda: run(program(writes, reads), seed=seed)  # noqa: E731
    expect(kind, launch) if kind else launch()


@pytest.mark.parametrize("release,acquire,ok", [("sys", "sys", True), ("gpu", "sys", False), ("sys", "gpu", False)])
@pytest.mark.parametrize("seed", SEEDS)
def test_between_launches_only_the_system_scope_counts(release, acquire, ok, seed):
    text = program(
        STORE + SIGNAL.replace("release.gpu", f"release.{release}"),
        WAIT.replace("acquire.gpu", f"acquire.{acquire}") + LOAD,
    )
    launch = lambda: run(text, launches=2, seed=seed)  # noqa: E731
    launch() if ok else expect("race", launch)


ARRIVE = "atom.acq_rel.gpu.global.add.u32 %r2, [%flag], %r3;"
GRID_BARRIER = f"""{PROLOGUE} mul.wide.u32 %d, %cta, 4; add.u64 %data, %all, %d; @%first st.global.u32 [%data], %cta;
BEFORE @!%first bra N; {ARRIVE} {poll(ACQUIRE, value=4)} N: AFTER
rem.u32 %r0, %t, 4; mul.wide.u32 %d, %r0, 4; add.u64 %data, %all, %d; ld.global.u32 %r2, [%data];"""


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_barrier(seed):
    """One thread of each CTA arrives and polls; the other threads learn by a barrier of the CTA."""
    text = GRID_BARRIER.replace("BEFORE", "bar.sync 0;").replace("AFTER", "bar.sync 0;")
    run(text, grid=4, threads=64, seed=seed)
    expect("race", run, GRID_BARRIER.replace("BEFORE", "").replace("AFTER", ""), grid=4, threads=64, seed=seed)
    relaxed = text.replace("atom.acq_rel", "atom.relaxed")
    expect("race", run, relaxed, grid=4, threads=64, seed=seed)


def test_report_names_both_sides():
    writes, reads, _ = HANDOVERS["a relaxed load"]
    report = expect("race", run, program(writes, reads))
    assert "the load at global address" in report and "(array0[256], byte" in report
    assert (
        "st.global.u32" in report and "of CTA (0,0,0) of launch 0 lane" in report and "kernel k, CTA (1,0,0)" in report
    )
    run(program(writes, reads), check_order=False)
