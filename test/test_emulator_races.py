"""The happens-before check: each planted race is found with any schedule, and the corrected program passes."""

import re

import numpy as np
import pytest

from ptx_emulator.testing import expect, module

SEEDS = range(3)

# %t, %wp, %ln; %mine: address of this thread's word, %other: of the thread with the opposite number;
# %next: of the next lane; %bar: an mbarrier, %bar2: another; %first: lane 0; %w0: warp 0.
PROLOGUE = """
.shared .align 128 .b8 buf[2048]; .shared .align 8 .b64 bars[2];
.reg .b32 %t, %wp, %ln, %mine, %other, %next, %base, %bar, %bar2, %r<8>; .reg .b64 %out, %d<4>;
.reg .pred %first, %w0, %p, %q; .reg .b16 %h;
mov.u32 %t, %tid.x; shr.u32 %wp, %t, 5; and.b32 %ln, %t, 31;
mov.u32 %base, buf; shl.b32 %r0, %t, 2; add.u32 %mine, %base, %r0; xor.b32 %r0, %r0, 252; add.u32 %other, %base, %r0;
xor.b32 %r0, %t, 1; shl.b32 %r0, %r0, 2; add.u32 %next, %base, %r0;
mov.u32 %bar, bars; add.u32 %bar2, %bar, 8;
setp.eq.u32 %first, %ln, 0; setp.eq.u32 %w0, %wp, 0; ld.param.u64 %out, [out];
cvt.u64.u32 %d0, %t; shl.b64 %d0, %d0, 2; add.u64 %d0, %d0, %out; mov.u16 %h, 7;
"""
INIT = """
setp.eq.u32 %p, %t, 0;
@%p mbarrier.init.shared.b64 [%bar], COUNT; @%p mbarrier.init.shared.b64 [%bar2], 1;
@%p fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = "W{n}: mbarrier.try_wait.parity.shared.b64 %q, [{bar}], 0; @!%q bra W{n};"


def wait(bar: str = "%bar", n: int = 0) -> str:
    return WAIT.format(bar=bar, n=n)


# name: (program with SYNC, what SYNC stands for, kinds reported without it, arrivals that the first mbarrier expects)
CASES = {
    "barrier between write and read": (
        "st.shared.u32 [%mine], %t; SYNC ld.shared.u32 %r1, [%other];",
        "bar.sync 0;",
        "race uninit_smem",
        1,
    ),
    "barrier between read and write": (
        "st.shared.u32 [%mine], %t; bar.sync 0; ld.shared.u32 %r1, [%other]; SYNC st.shared.u32 [%mine], 1;",
        "bar.sync 0;",
        "race",
        1,
    ),
    "barrier between two writes": (
        "st.shared.u32 [%mine], %t; SYNC st.shared.u32 [%other], 1;",
        "bar.sync 0;",
        "race",
        1,
    ),
    "warp barrier between lanes": (
        "st.shared.u32 [%mine], %t; SYNC ld.shared.u32 %r1, [%next];",
        "bar.warp.sync -1;",
        "race",
        1,
    ),
    "named barrier, arriving side": (
        """@!%w0 bra C; st.shared.u32 [%mine], 1; SYNC bra E;
        C: bar.sync 2, 64; ld.shared.u32 %r1, [%other]; E:""",
        "bar.arrive 2, 64;",
        "deadlock",
        1,
    ),
    "named barrier, waiting side": (
        """@!%w0 bra C; st.shared.u32 [%mine], 1; bar.arrive 2, 64; bra E;
        C: SYNC ld.shared.u32 %r1, [%other]; E:""",
        "bar.sync 2, 64;",
        "race uninit_smem",
        1,
    ),
    "mbarrier wait before the read": (
        f"""{INIT} @!%w0 bra C; st.shared.u32 [%mine], 1; mbarrier.arrive.shared.b64 _, [%bar]; bra E;
        C: SYNC ld.shared.u32 %r1, [%other]; E:""",
        wait(),
        "race uninit_smem",
        32,
    ),
    "mbarrier wait before the overwrite": (
        f"""st.shared.u32 [%mine], 1; {INIT}
        @!%w0 bra C; ld.shared.u32 %r1, [%other]; mbarrier.arrive.shared.b64 _, [%bar]; bra E;
        C: SYNC st.shared.u32 [%mine], 2; E:""",
        wait(),
        "race",
        32,
    ),
    "one lane arrives for its warp: writes": (
        f"""{INIT} @!%w0 bra C;
        st.shared.u32 [%mine], 1; SYNC @%first mbarrier.arrive.shared.b64 _, [%bar]; bra E;
        C: {wait()} ld.shared.u32 %r1, [%other]; E:""",
        "bar.warp.sync -1;",
        "race uninit_smem",
        1,
    ),
    "one lane arrives for its warp: a word read by all": (
        f"""st.shared.u32 [%mine], 1; {INIT} @!%w0 bra C;
        ld.shared.u32 %r1, [%base + 128]; SYNC @%first mbarrier.arrive.shared.b64 _, [%bar]; bra E;
        C: {wait()} st.shared.u32 [%mine], 1; E:""",
        "bar.warp.sync -1;",
        "race",
        1,
    ),
    "one lane waits for its warp": (
        f"""{INIT} @!%w0 bra C; st.shared.u32 [%mine], 1; mbarrier.arrive.shared.b64 _, [%bar]; bra E;
        C: @!%first bra D; {wait()} D: SYNC ld.shared.u32 %r1, [%other]; E:""",
        "bar.warp.sync -1;",
        "race uninit_smem",
        32,
    ),
    "order passes through a third warp's knowledge": (
        f"""{INIT} @!%w0 bra C; st.shared.u32 [%mine], 1; mbarrier.arrive.shared.b64 _, [%bar]; SYNC bar.sync 3, 64;
        bra E; C: bar.sync 3, 64; ld.shared.u32 %r1, [%other]; E: {wait()}""",
        "st.shared.u32 [%mine], 3;",
        None,
        32,
    ),
    "barrier after mbarrier.init": (
        INIT.replace("bar.sync 0;", "SYNC") + wait("%bar2"),
        "bar.sync 0; @%p mbarrier.arrive.shared.b64 _, [%bar2];",
        "race mbarrier_uninit deadlock",
        1,
    ),
    "cp.async: wait before the barrier": (
        "cp.async.ca.shared.global [%mine], [%d0], 4; SYNC bar.sync 0; ld.shared.u32 %r1, [%other];",
        "cp.async.wait_all;",
        "race inflight_read",
        1,
    ),
    "cp.async: group wait": (
        """cp.async.ca.shared.global [%mine], [%d0], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%mine + 1024], [%d0], 4; cp.async.commit_group;
        SYNC ld.shared.u32 %r1, [%mine]; cp.async.wait_group 0; ld.shared.u32 %r1, [%mine + 1024];""",
        "cp.async.wait_group 1;",
        "race inflight_read",
        1,
    ),
    "cp.async: consumer waits for the mbarrier": (
        f"""{INIT} @!%w0 bra C; cp.async.ca.shared.global [%mine], [%d0], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%bar]; bra E;
        C: SYNC ld.shared.u32 %r1, [%other]; E:""",
        wait(),
        "race inflight_read uninit_smem",
        32,
    ),
    "cp.async: overwrites what was read": (
        f"""st.shared.u32 [%mine], 1; {INIT} @!%w0 bra C;
        SYNC cp.async.ca.shared.global [%mine], [%d0], 4; cp.async.wait_all; bra E;
        C: ld.shared.u32 %r1, [%other]; mbarrier.arrive.shared.b64 _, [%bar]; E:""",
        wait(),
        "race inflight_read",
        32,
    ),
    "cp.async: a later arrive may overtake": (
        f"""{INIT} @!%w0 bra C;
        @%first cp.async.ca.shared.global [%mine], [%d0], 4; @!%first cp.async.ca.shared.global [%mine], [%d0], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%bar]; @!%first bra E;
        cp.async.ca.shared.global [%mine + 1024], [%d0], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%bar2]; bra E;
        C: SYNC ld.shared.u32 %r1, [%other]; E: @%first bra F; bra G; F: {wait("%bar2", 9)} G:""",
        wait(),
        "race inflight_read uninit_smem",
        32,
    ),
    "bulk copy: wait before the read": (
        f"""{INIT} @%p mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
        @%p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%base], [%out], 256, [%bar];
        SYNC ld.shared.u32 %r1, [%other];""",
        wait(),
        "race inflight_read uninit_smem",
        1,
    ),
    "bulk copy: waiting thread tells the others": (
        f"""{INIT} @%p mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
        @%p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%base], [%out], 256, [%bar];
        @!%w0 bra D; {wait()} D: SYNC ld.shared.u32 %r1, [%other];""",
        "bar.sync 0;",
        "race inflight_read uninit_smem",
        1,
    ),
    "bulk store: wait before the overwrite": (
        """st.shared.u32 [%mine], 1; fence.proxy.async; bar.sync 0; setp.eq.u32 %p, %t, 0;
        @%p cp.async.bulk.global.shared::cta.bulk_group [%out], [%base], 256; @%p cp.async.bulk.commit_group;
        SYNC bar.sync 0; st.shared.u32 [%mine], 2; @%p cp.async.bulk.wait_group 0;""",
        "@%p cp.async.bulk.wait_group.read 0;",
        "inflight_overwrite",
        1,
    ),
    "bulk store: barrier after the wait": (
        """st.shared.u32 [%mine], 1; fence.proxy.async; bar.sync 0; setp.eq.u32 %p, %t, 0;
        @%p cp.async.bulk.global.shared::cta.bulk_group [%out], [%base], 256; @%p cp.async.bulk.commit_group;
        @%p cp.async.bulk.wait_group.read 0; SYNC st.shared.u32 [%mine], 2;""",
        "bar.sync 0;",
        "race inflight_overwrite proxy_fence",
        1,
    ),
    "fence before the barrier": (
        """st.shared.u32 [%mine], 1; setp.eq.u32 %p, %t, 0; @%p fence.proxy.async; SYNC bar.sync 0;
        @!%w0 fence.proxy.async;
        @%p cp.async.bulk.global.shared::cta.bulk_group [%out], [%base], 256; @%p cp.async.bulk.commit_group;
        @%p cp.async.bulk.wait_group 0;""",
        "fence.proxy.async;",
        "proxy_fence",
        1,
    ),
    "barrier before the issuer's fence": (
        """st.shared.u32 [%mine], 1; setp.eq.u32 %p, %t, 0; @%p fence.proxy.async; bar.sync 0;
        SYNC @%p cp.async.bulk.global.shared::cta.bulk_group [%out], [%base], 256; @%p cp.async.bulk.commit_group;
        @%p cp.async.bulk.wait_group 0;""",
        "fence.proxy.async;",
        "proxy_fence",
        1,
    ),
    "a relaxed arrive orders nothing": (
        f"""{INIT} @!%w0 bra C;
        st.shared.u32 [%mine], 1; SYNC mbarrier.arrive.relaxed.cluster.shared.b64 _, [%bar]; bra E;
        C: {wait()} ld.shared.u32 %r1, [%other]; E:""",
        "fence.acq_rel.cluster;",
        "race",
        32,
    ),
    # Not races.
    "words of one granule": (
        "st.shared.u32 [%mine], %t; ld.shared.u32 %r1, [%mine]; SYNC st.shared.u32 [%mine], 1;",
        "mov.u32 %r7, 0;",
        None,
        1,
    ),
    "bytes of one word": (
        """add.u32 %r2, %base, %wp; @%first st.shared.u8 [%r2], %h; shl.b32 %r3, %t, 1; add.u32 %r3, %r3, %base;
        st.shared.u16 [%r3 + 256], %h; ld.shared.u16 %h, [%r3 + 256]; SYNC""",
        "st.shared.u16 [%r3 + 256], %h;",
        None,
        1,
    ),
    "every lane writes the same word": (
        "@%w0 st.shared.u32 [%base], 7; SYNC @%w0 ld.shared.u32 %r1, [%base];",
        "mov.u32 %r7, 0;",
        None,
        1,
    ),
    "atomics": (
        """@%w0 st.shared.u32 [%base], 0; bar.sync 0; atom.shared.add.u32 %r1, [%base], 1;
        red.shared.add.u32 [%base], 1; SYNC bar.sync 0; ld.shared.u32 %r1, [%base];""",
        "mov.u32 %r7, 0;",
        None,
        1,
    ),
}


def run(program: str, count: int, **options):
    mod = module(PROLOGUE + program.replace("COUNT", str(count)))
    return mod.launch("k", 1, 64, [np.zeros(256, np.int32)], **options)


@pytest.mark.parametrize("name", CASES)
def test_race(name):
    program, sync, kinds, count = CASES[name]
    for seed in SEEDS:
        run(program.replace("SYNC", sync), count, seed=seed)
        if kinds:
            expect(tuple(kinds.split()), run, program.replace("SYNC", ""), count, seed=seed)
        else:
            run(program.replace("SYNC", ""), count, seed=seed)


CLUSTER = """
.shared .align 16 .b8 buf[256];
.reg .b32 %t, %rank, %peer, %a, %b, %r<3>;
mov.u32 %t, %tid.x; mov.u32 %rank, %cluster_ctarank; xor.b32 %peer, %rank, 1;
mov.u32 %a, buf; shl.b32 %r0, %t, 2; add.u32 %a, %a, %r0; mapa.shared::cluster.u32 %b, %a, %peer;
st.shared.u32 [%a], %t; FIRST
ld.shared::cluster.u32 %r1, [%b]; SECOND
st.shared.u32 [%a], 1; THIRD
st.shared::cluster.u32 [%b], 2;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


@pytest.mark.parametrize("missing", [None, "FIRST", "SECOND", "THIRD"])
@pytest.mark.parametrize("seed", SEEDS)
def test_race_between_ctas(missing, seed):
    text = CLUSTER.replace(missing, "") if missing else CLUSTER
    for name in ("FIRST", "SECOND", "THIRD"):
        text = text.replace(name, SYNC)
    launch = lambda: module(text).launch("k", 2, 32, [0], cluster=2, seed=seed)  # noqa: E731
    expect(("race", "uninit_smem"), launch) if missing else launch()


EXIT = """
.shared .align 8 .b64 bar; .reg .b32 %t, %rank, %bar, %peer; .reg .pred %first, %q;
mov.u32 %t, %tid.x; mov.u32 %rank, %cluster_ctarank; mov.u32 %bar, bar; setp.eq.u32 %first, %t, 0;
@%first mbarrier.init.shared.b64 [%bar], 1; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
xor.b32 %peer, %rank, 1; mapa.shared::cluster.u32 %peer, %bar, %peer;
@%first mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%peer];
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_exit_before_a_remote_arrive(seed):
    """A CTA may only exit after it, or the arriving thread, has been synchronised with."""
    launch = lambda end: module(EXIT + end).launch("k", 2, 32, [0], cluster=2, seed=seed)  # noqa: E731
    launch(SYNC)
    launch("W: mbarrier.try_wait.parity.shared.b64 %q, [%bar], 0; @!%q bra W;")
    assert "exit" in expect("dsmem_exited", launch, "")


COPY_EXIT = """
.shared .align 16 .b8 to[16]; .shared .align 16 .b8 from[16]; .shared .align 8 .b64 bar;
.reg .b32 %t, %rank, %bar, %peer, %to, %from; .reg .pred %first, %q;
mov.u32 %t, %tid.x; mov.u32 %rank, %cluster_ctarank; mov.u32 %bar, bar; mov.u32 %to, to; mov.u32 %from, from;
setp.eq.u32 %first, %t, 0; xor.b32 %peer, %rank, 1;
@%first mbarrier.init.shared.b64 [%bar], 1; @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 16;
@%first st.shared.v4.b32 [%from], {%rank, %rank, %rank, %rank}; @%first fence.proxy.async.shared::cta;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
mapa.shared::cluster.u32 %to, %to, %peer; mapa.shared::cluster.u32 %peer, %bar, %peer;
@%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%to], [%from], 16, [%peer];
W: mbarrier.try_wait.parity.shared.b64 %q, [%bar], 0; @!%q bra W;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_exit_before_a_copy_to_another_cta(seed):
    """What a CTA has received does not tell it that its own copy has been read."""
    launch = lambda end: module(COPY_EXIT + end).launch("k", 2, 32, [0], cluster=2, seed=seed)  # noqa: E731
    launch(SYNC)
    expect("dsmem_exited", launch, "")
    expect("dsmem_exited", launch, SYNC.replace("arrive", "arrive.relaxed"))


def test_copies_and_their_arrives_in_every_order():
    program, sync, _, count = CASES["cp.async: a later arrive may overtake"]
    for seed in range(100):
        run(program.replace("SYNC", sync), count, seed=seed)


def test_report_names_both_sides():
    program, _, _, count = CASES["barrier between read and write"]
    text = expect("race", run, program.replace("SYNC", ""), count)
    assert re.search(
        r"the (store|load) at shared offset 0x\w+ of CTA rank 0 is not ordered after the \w+ by warp", text
    )
    assert "st.shared.u32" in text and "ld.shared.u32" in text and "kernel k, CTA (0,0,0)" in text
    run(program.replace("SYNC", ""), count, check_order=False)
