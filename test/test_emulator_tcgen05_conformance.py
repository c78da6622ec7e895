"""tcgen05.mma of sm_100a against definitions written from the PTX ISA (ptx_emulator/layouts.py).

Kinds f16 and f8f6f4 of one CTA and of a CTA pair; operands are small integers, results must agree bit for bit.
"""

import numpy as np
import pytest

from ptx_emulator import layouts
from ptx_emulator.testing import expect, module

torch = pytest.importorskip("torch")

TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "f16": torch.float16}


def kernel(image, columns, kind, ctas, *, steps=2):
    """D = steps * A B^T by one thread of the first CTA; then every lane and column of tensor memory to `out`."""
    group = f"cta_group::{ctas}"
    commit = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster"
    commit += ".b64 [%bar];" if ctas == 1 else ".multicast::cluster.b64 [%bar], 3;"
    sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    allocated = max(32, 1 << (columns - 1).bit_length())
    regs = "{" + ", ".join(f"%c{i}" for i in range(8)) + "}"
    mma = "".join(
        f"@%one tcgen05.mma.{group}.kind::{kind} [%tm], %da, %db, %idesc, {'%no' if i == 0 else '%yes'};\n"
        for i in range(steps)
    )
    return module(
        f"""
.shared .align 1024 .b8 buf[{image}]; .shared .align 8 .b64 done; .shared .align 4 .b32 slot;
.reg .b32 %t, %s, %r<6>, %c<8>, %bar, %tm, %idesc, %rank; .reg .b64 %g, %m, %da, %db;
.reg .pred %p, %one, %first, %yes, %no, %w0;
mov.u32 %t, %tid.x; mov.u32 %s, buf; mov.u32 %rank, %cluster_ctarank; mov.u32 %bar, done;
ld.param.u64 %m, [data]; ld.param.u64 %g, [out]; ld.param.u32 %idesc, [idesc];
setp.eq.u32 %first, %t, 0; setp.eq.u32 %p, %rank, 0; and.pred %one, %first, %p;
setp.lt.u32 %w0, %t, 32; setp.eq.u32 %yes, 0, 0; not.pred %no, %yes;
mul.lo.u32 %r0, %rank, {image}; cvt.u64.u32 %da, %r0; add.u64 %m, %m, %da; shl.b32 %r0, %t, 4;
L: setp.lt.u32 %p, %r0, {image};
@!%p bra D;
cvt.u64.u32 %da, %r0; add.u64 %da, %da, %m; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%da];
add.u32 %r5, %s, %r0; st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}}; add.u32 %r0, %r0, 2048; bra L;
D: fence.proxy.async;
@%first mbarrier.init.shared.b64 [%bar], 1; @%first fence.mbarrier_init.release.cluster;
mov.u32 %r0, slot;
@!%w0 bra A; tcgen05.alloc.{group}.sync.aligned.shared::cta.b32 [%r0], {allocated}; A:
bar.sync 0; {sync}
tcgen05.fence::after_thread_sync; ld.shared.u32 %tm, [slot];
shr.u32 %r1, %s, 4; cvt.u64.u32 %m, %r1;
ld.param.u64 %da, [desc_a]; add.u64 %da, %da, %m; ld.param.u64 %db, [desc_b]; add.u64 %db, %db, %m;
{mma} @%one {commit}
W: mbarrier.try_wait.parity.shared.b64 %p, [%bar], 0; @!%p bra W;
tcgen05.fence::after_thread_sync;
mul.lo.u32 %r0, %rank, 128; add.u32 %r0, %r0, %t; mul.lo.u32 %r0, %r0, {4 * columns};
cvt.u64.u32 %m, %r0; add.u64 %g, %g, %m;
shr.u32 %r1, %t, 5; shl.b32 %r1, %r1, 21; add.u32 %r1, %r1, %tm;
{
            "".join(
                f'''tcgen05.ld.sync.aligned.32x32b.x8.b32 {regs}, [%r1 + {c}]; tcgen05.wait::ld.sync.aligned;
'''
                + "".join(f"st.global.u32 [%g + {4 * (c + i)}], %c{i};" for i in range(8))
                for c in range(0, columns, 8)
            )
        }
bar.sync 0; {sync}
@!%w0 bra E; tcgen05.dealloc.{group}.sync.aligned.b32 %tm, {allocated}; E:
""",
        ".param .u64 data, .param .u64 out, .param .u64 desc_a, .param .u64 desc_b, .param .u32 idesc",
        target="sm_100a",
    )


def values(rows, cols, dtype, seed):
    x = torch.randint(-4, 5, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    return x, x.to(TYPES[dtype]).view(torch.uint8 if dtype[0] == "e" else torch.int16).numpy()


def strides(mn, k, item, span, mn_major):
    """LBO, SBO and size of the densest canonical layout."""
    if mn_major:
        if span == 0:
            return 128, 128 * (k // 8), 128 * (k // 8) * (mn * item // 16)
        lbo = span * 8 * (k // 8)
        return lbo, 8 * span, lbo * -(-mn * item // span)
    if span == 0:
        return 128, 128 * (k * item // 16), mn * k * item
    return 16, 8 * span, mn * span


def check(m, n, a="bf16", b="bf16", span=128, *, ctas=1, mn_a=0, mn_b=0, negate_a=0, negate_b=0, seed=0):
    k, item = (32, 1) if a[0] == "e" else (16, 2)
    fa, ra = values(m, k, a, 1)
    fb, rb = values(n, k, b, 2)
    rows, cols = m // ctas, n // ctas
    la, sa, size_a = strides(rows, k, item, span, mn_a)
    lb, sb, size_b = strides(cols, k, item, span, mn_b)
    size_a = -(-size_a // 1024) * 1024
    total = -(-(size_a + size_b) // 1024) * 1024
    image = np.full((ctas, total), 0xFF, np.uint8)
    for c in range(ctas):
        part_a, part_b = ra[c * rows : (c + 1) * rows], rb[c * cols : (c + 1) * cols]
        image[c, :size_a] = layouts.operand_image(part_a, span, mn_a, la, sa, size_a)
        image[c, size_a : size_a + size_b] = layouts.operand_image(part_b, span, mn_b, lb, sb, size_b)
    descs = [layouts.tcgen05_descriptor(span, la, sa), layouts.tcgen05_descriptor(span, lb, sb) + (size_a >> 4)]
    idesc = layouts.tcgen05_instruction(m, n, a, b, mn_a=mn_a, mn_b=mn_b, negate_a=negate_a, negate_b=negate_b)
    cta, lane, col = layouts.tcgen05_accumulator(m, n, ctas)
    columns = int(col.max()) + 1
    out = np.zeros((ctas, 128, -(-columns // 8) * 8), np.float32)
    mod = kernel(total, out.shape[2], "f8f6f4" if k == 32 else "f16", ctas)
    # Columns and lanes outside D are read as well, to show that they stay untouched.
    mod.launch("k", ctas, 128, [image, out, *descs, idesc], cluster=ctas, seed=seed, check_uninit_smem=False)
    sign = (-1) ** (negate_a + negate_b)
    assert np.array_equal(out[cta, lane, col], (2 * sign * (fa.double() @ fb.double().T)).float().numpy())
    rest = np.ones(out.shape, bool)
    rest[cta, lane, col] = False
    assert (out[rest].view(np.uint32) == 0xCDCDCDCD).all(), "tensor memory outside D was written"


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_every_width(m, dtype):
    for n in range(16, 257, 16) if m == 128 else range(8, 257, 8):
        if n in (8, 16, 24, 32, 48, 64, 96, 112, 128, 160, 192, 208, 240, 256):
            check(m, n, dtype, dtype)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "a,b", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2"), ("bf16", "bf16"), ("f16", "f16")]
)
def test_k_major_swizzles(a, b, span):
    check(128, 64, a, b, span)
    check(64, 72, a, b, span)


@pytest.mark.parametrize("mn_a,mn_b", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "e4m3", "e5m2"])
def test_mn_major_swizzles(dtype, span, mn_a, mn_b):
    check(128, 128, dtype, dtype, span, mn_a=mn_a, mn_b=mn_b)


@pytest.mark.parametrize("m", [128, 256])
@pytest.mark.parametrize("dtype,mn_a,mn_b", [("bf16", 0, 0), ("bf16", 1, 1), ("e4m3", 0, 0), ("e4m3", 0, 1)])
def test_pair(m, dtype, mn_a, mn_b):
    for n, seed in ((64, 0), (128, 1), (256, 2)):
        check(m, n, dtype, dtype, 64, ctas=2, mn_a=mn_a, mn_b=mn_b, seed=seed)


def test_negation():
    check(128, 32, negate_a=1)
    check(128, 32, "e4m3", "e4m3", negate_a=1, negate_b=1)


@pytest.mark.parametrize("m,n,ctas", [(96, 64, 1), (128, 24, 1), (64, 264, 1), (64, 64, 2)])
def test_shapes_that_do_not_exist(m, n, ctas):
    mod = kernel(16384, 64, "f16", ctas)
    desc = layouts.tcgen05_descriptor(128, 16, 1024)
    idesc = layouts.tcgen05_instruction(m, n & 511, "bf16", "bf16")
    args = [np.zeros((ctas, 16384), np.uint8), np.zeros((ctas, 128, 64), np.float32), desc, desc, idesc]
    expect(("idesc", "tmem_alloc"), mod.launch, "k", ctas, 128, args, cluster=ctas, check_uninit_smem=False)
