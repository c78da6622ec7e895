"""Missing wgmma.fence and fence.mbarrier_init, by removing them from good PTX."""

import re

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.testing import expect, kernel_ptx, module, run_pipeline

SEEDS = range(4)


@pytest.fixture(scope="module")
def ptx():
    return kernel_ptx("pipeline")


def without(ptx, pattern):
    text, n = re.subn(pattern, "", ptx)
    assert n
    return ptx_emulator.Module(text)


@pytest.mark.parametrize("scaled", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_good(ptx, scaled, seed):
    run_pipeline(ptx_emulator.Module(ptx), scaled, seed=seed)


@pytest.mark.parametrize("scaled", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_wgmma_fence(ptx, scaled, seed):
    mod = without(ptx, r"wgmma\.fence\.sync\.aligned;")
    assert "first wgmma" in expect("wgmma_fence", run_pipeline, mod, scaled, seed=seed)
    run_pipeline(mod, scaled, seed=seed, check_fences=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_accumulator_written_after_the_fence(ptx, seed):
    """One fence before the loop is enough only while no ordinary instruction writes the accumulators."""
    text = re.sub(r"wgmma\.fence\.sync\.aligned;", "", ptx)
    mod = ptx_emulator.Module(re.sub(r"(\tbar(?:rier)?\.sync\s[^;]*0;)", r"\1 wgmma.fence.sync.aligned;", text))
    run_pipeline(mod, 0, seed=seed)
    assert "ordinary instruction" in expect("wgmma_fence", run_pipeline, mod, 1, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mbarrier_init_fence(ptx, seed):
    expect("mbarrier_init_fence", run_pipeline, without(ptx, r"fence\.mbarrier_init\.release\.cluster;"), seed=seed)
    run_pipeline(
        ptx_emulator.Module(ptx.replace("fence.mbarrier_init.release.cluster;", "fence.proxy.async;")), seed=seed
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mbarrier_init_fence_remote(ptx, seed):
    fence, relaxed = r"fence\.mbarrier_init\.release\.cluster;", r"(?<=cluster\.arrive)\.relaxed"
    run = lambda mod: mod.launch("remote_arrive", 2, 32, [np.zeros(32, np.int32)], seed=seed)  # noqa: E731
    run(ptx_emulator.Module(ptx))
    expect("mbarrier_init_fence", run, without(ptx, fence))
    run(without(re.sub(relaxed, ".release", ptx), fence))


@pytest.mark.parametrize(
    "between,second,kind",
    [
        ("", 8, None),
        ("", 16, "wgmma_fence"),
        ("wgmma.fence.sync.aligned;", 16, None),
        ("add.u32 %a0, %a0, 1;", 8, "wgmma_fence"),
        ("add.u32 %a0, %a0, 1; wgmma.fence.sync.aligned;", 8, None),
        ("add.u32 %t, %a0, 1; mov.b32 %a0, %t;", 8, "wgmma_fence"),
        ("mov.b32 %a0, 0;", 8, None),
        ("add.u32 %t, %a0, 1; wgmma.fence.sync.aligned; mov.b32 %a0, %t;", 8, None),
        ("add.f32 %f1, %f1, %f1;", 8, "wgmma_fence"),
        ("add.f32 %f9, %f9, %f9;", 8, None),
    ],
)
def test_registers_between_two_wgmmas(between, second, kind):
    acc = lambda n: "{" + ", ".join(f"%f{i}" for i in range(n // 2)) + "}"  # noqa: E731

    def mma(n):
        return (
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {acc(n)}, {{%a0, %a1, %a2, %a3}}, %d, 1, 1, 1, 0;"  # noqa: E731
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
        )

    mod = module(f"""
.shared .align 128 .b8 buf[1024];
.reg .b32 %r<4>, %a<4>, %t; .reg .b64 %d, %z; .reg .f32 %f<10>;
mov.u32 %r0, %tid.x; mov.u32 %r1, buf;
shl.b32 %r2, %r0, 3; add.u32 %r2, %r2, %r1; mov.b64 %z, 0; st.shared.u64 [%r2], %z;
fence.proxy.async; bar.sync 0;
shr.u32 %r3, %r1, 4; cvt.u64.u32 %d, %r3; or.b64 %d, %d, {128 >> 4 << 16 | 256 >> 4 << 32};
{"".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(10))} {"".join(f"mov.b32 %a{i}, 0;" for i in range(4))}
wgmma.fence.sync.aligned; {mma(8)}
{between} {mma(second)}
""")
    run = lambda: mod.launch("k", 1, 128, [np.zeros(1, np.int32)])  # noqa: E731
    expect(kind, run) if kind else run()
