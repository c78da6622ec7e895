"""wgmma.mma_async of sm_90a against definitions written from the PTX ISA (ptx_emulator/layouts.py).

Operands are small integers, so that sums are exact in any order and results must agree bit for bit; the same kernels
can run on hardware.
"""

import numpy as np
import pytest

from ptx_emulator import layouts
from ptx_emulator.testing import expect, module

torch = pytest.importorskip("torch")

TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "f16": torch.float16}


def kernel(n, a, b, *, image, scale_d=1, sign_a=1, sign_b=1, mn_a=0, mn_b=0, a_registers=False):
    """One m64nNkK: operands from a shared-memory image, accumulators from and to global memory, [thread, register]."""
    k = 32 if a in ("e4m3", "e5m2") else 16
    acc = "{" + ", ".join(f"%f{i}" for i in range(n // 2)) + "}"
    major = "" if k == 32 else f", {mn_b}" if a_registers else f", {mn_a}, {mn_b}"
    operand_a = "{%a0, %a1, %a2, %a3}" if a_registers else "%da"
    return module(
        f"""
.shared .align 1024 .b8 buf[{image}];
.reg .b32 %t, %s, %r<6>, %a<4>; .reg .b64 %g, %m, %da, %db, %ga; .reg .f32 %f<{n // 2}>; .reg .pred %p, %d;
mov.u32 %t, %tid.x; mov.u32 %s, buf; ld.param.u64 %m, [data]; ld.param.u64 %g, [acc]; ld.param.u64 %ga, [frag];
shl.b32 %r0, %t, 4;
L: setp.lt.u32 %p, %r0, {image};
@!%p bra D;
cvt.u64.u32 %da, %r0; add.u64 %da, %da, %m; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%da];
add.u32 %r5, %s, %r0; st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}}; add.u32 %r0, %r0, 2048; bra L;
D: fence.proxy.async; bar.sync 0;
shr.u32 %r0, %s, 4; cvt.u64.u32 %m, %r0;
ld.param.u64 %da, [desc_a]; add.u64 %da, %da, %m; ld.param.u64 %db, [desc_b]; add.u64 %db, %db, %m;
mul.lo.u32 %r0, %t, {2 * n}; cvt.u64.u32 %m, %r0; add.u64 %g, %g, %m;
shl.b32 %r0, %t, 4; cvt.u64.u32 %m, %r0; add.u64 %ga, %ga, %m;
{"ld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%ga];" if a_registers else ""}
{" ".join(f"ld.global.f32 %f{i}, [%g + {4 * i}];" for i in range(n // 2))}
setp.ne.u32 %d, {scale_d}, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{a}.{b} {acc}, {operand_a}, %db, %d, {sign_a}, {sign_b}{major};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
{" ".join(f"st.global.f32 [%g + {4 * i}], %f{i};" for i in range(n // 2))}
""",
        ".param .u64 data, .param .u64 acc, .param .u64 frag, .param .u64 desc_a, .param .u64 desc_b",
    )


def values(rows, cols, dtype, seed):
    """Integers that each type holds exactly."""
    x = torch.randint(-4, 5, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    return x, x.to(TYPES[dtype]).view(torch.uint8 if dtype[0] == "e" else torch.int16).numpy()


def strides(mn, k, item, span, mn_major):
    """LBO, SBO and size of the densest canonical layout."""
    if mn_major:
        if span == 0:  # SBO along MN, LBO along K
            sbo = 128 * (k // 8)
            return 128, sbo, sbo * (mn * item // 16)
        lbo = span * 8 * (k // 8)
        return lbo, 8 * span, lbo * -(-mn * item // span)
    if span == 0:
        return 128, 128 * (k * item // 16), mn * k * item
    return 16, 8 * span, mn * span


def check(n, a="e4m3", b="e4m3", span=128, span_b=None, *, mn_a=0, mn_b=0, scale_d=1, sign_a=1, sign_b=1, regs=False):
    span_b = span if span_b is None else span_b
    k, item = (32, 1) if a in ("e4m3", "e5m2") else (16, 2)
    fa, ra = values(64, k, a, 1)
    fb, rb = values(n, k, b, 2)
    la, sa, size_a = strides(64, k, item, span, mn_a)
    lb, sb, size_b = strides(n, k, item, span_b, mn_b)
    size_a = -(-size_a // 1024) * 1024
    total = -(-(size_a + size_b) // 1024) * 1024
    image = np.full(total, 0xFF, np.uint8)
    image[:size_a] = layouts.operand_image(ra, span, mn_a, la, sa, size_a)
    image[size_a : size_a + size_b] = layouts.operand_image(rb, span_b, mn_b, lb, sb, size_b)
    desc_a = layouts.wgmma_descriptor(span, la, sa)
    desc_b = layouts.wgmma_descriptor(span_b, lb, sb) + (size_a >> 4)
    row, col = layouts.wgmma_fragment(n)
    c = torch.randint(-8, 9, (64, n), generator=torch.Generator().manual_seed(3)).float()
    acc = np.ascontiguousarray(c.numpy()[row, col])
    fragment = np.ascontiguousarray(ra[layouts.wgmma_fragment_a(k, 8 * item)])
    mod = kernel(
        n, a, b, image=total, scale_d=scale_d, sign_a=sign_a, sign_b=sign_b, mn_a=mn_a, mn_b=mn_b, a_registers=regs
    )
    mod.launch("k", 1, 128, [image, acc, fragment, desc_a, desc_b])
    want = sign_a * sign_b * (fa.double() @ fb.double().T) + (c.double() if scale_d else 0)
    assert np.array_equal(acc, want.float().numpy()[row, col])


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_e4m3_every_width(n):
    check(n)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "a,b", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2"), ("bf16", "bf16"), ("f16", "f16")]
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


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2", "bf16", "f16"])
def test_a_from_registers(dtype):
    for n in (8, 128):
        check(n, dtype, dtype, regs=True)


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
