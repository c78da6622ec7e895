"""One wgmma.mma_async of sm_90a on operands given as matrices, laid out by the definitions of `layouts`."""

from __future__ import annotations

import functools

import numpy as np

from . import Module, layouts

K = {"e4m3": 32, "e5m2": 32, "bf16": 16, "f16": 16, "tf32": 8}
BYTES = {"e4m3": 1, "e5m2": 1, "bf16": 2, "f16": 2, "tf32": 4}


@functools.cache
def kernel(
    n: int, a: str, b: str, *, image: int, scale_d=1, sign_a=1, sign_b=1, mn_a=0, mn_b=0, a_registers=False
) -> Module:
    """One m64nNkK: operands from a shared-memory image, accumulators from and to global memory, [thread, register]."""
    acc = "{" + ", ".join(f"%f{i}" for i in range(n // 2)) + "}"
    major = "" if BYTES[a] != 2 else f", {mn_b}" if a_registers else f", {mn_a}, {mn_b}"
    operand_a = "{%a0, %a1, %a2, %a3}" if a_registers else "%da"
    return Module(
        f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 data, .param .u64 acc, .param .u64 frag, .param .u64 desc_a, .param .u64 desc_b)
{{
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
wgmma.mma_async.sync.aligned.m64n{n}k{K[a]}.f32.{a}.{b} {acc}, {operand_a}, %db, %d, {sign_a}, {sign_b}{major};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
{" ".join(f"st.global.f32 [%g + {4 * i}], %f{i};" for i in range(n // 2))}
ret;
}}
"""
    )


def strides(mn: int, k: int, item: int, span: int, mn_major: int) -> tuple[int, int, int]:
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


def multiply(
    a: str,
    b: str,
    raw_a: np.ndarray,
    raw_b: np.ndarray,
    c: np.ndarray,
    span: int = 128,
    span_b: int | None = None,
    *,
    mn_a=0,
    mn_b=0,
    scale_d=1,
    sign_a=1,
    sign_b=1,
    registers=False,
    **options: int,
) -> np.ndarray:
    """C + A B^T as float32 [64, N]; A [64, K] and B [N, K] are the operands' codes, of the size that the types have."""
    span_b = span if span_b is None else span_b
    k, item, n = K[a], BYTES[a], len(raw_b)
    assert raw_a.shape == (64, k) and raw_b.shape == (n, k) and raw_a.itemsize == raw_b.itemsize == item
    la, sa, size_a = strides(64, k, item, span, mn_a)
    lb, sb, size_b = strides(n, k, item, span_b, mn_b)
    size_a = -(-size_a // 1024) * 1024
    total = -(-(size_a + size_b) // 1024) * 1024
    image = np.full(total, 0xFF, np.uint8)
    image[:size_a] = layouts.operand_image(raw_a, span, mn_a, la, sa, size_a)
    image[size_a : size_a + size_b] = layouts.operand_image(raw_b, span_b, mn_b, lb, sb, size_b)
    desc_a = layouts.wgmma_descriptor(span, la, sa)
    desc_b = layouts.wgmma_descriptor(span_b, lb, sb) + (size_a >> 4)
    row, col = layouts.wgmma_fragment(n)
    acc = np.ascontiguousarray(c.astype(np.float32)[row, col])
    fragment = np.ascontiguousarray(raw_a[layouts.wgmma_fragment_a(k, 8 * item)])
    mod = kernel(
        n, a, b, image=total, scale_d=scale_d, sign_a=sign_a, sign_b=sign_b, mn_a=mn_a, mn_b=mn_b, a_registers=registers
    )
    mod.launch("k", 1, 128, [image, acc, fragment, desc_a, desc_b], **options)
    out = np.empty((64, n), np.float32)
    out[row, col] = acc
    return out
