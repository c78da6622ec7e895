"""Hand-written PTX: forms that nvcc emits rarely, and load-time errors."""

import numpy as np

from ptx_emulator.testing import expect, module

STORE = """
.reg .b64 %o<3>; .reg .b32 %t<2>;
ld.param.u64 %o0, [out];
mov.u32 %t0, %tid.x;
mul.wide.u32 %o1, %t0, 4;
add.s64 %o2, %o0, %o1;
"""


def test_indexed_branch():
    mod = module(
        STORE
        + """
.reg .b32 %r<4>;
rem.u32 %r0, %t0, 3;
$targets: .branchtargets $a, $b, $c;
brx.idx %r0, $targets;
$a: mov.u32 %r1, 100; bra $done;
$b: mov.u32 %r1, 200; bra $done;
$c: mov.u32 %r1, 300;
$done:
add.u32 %r2, %r1, %t0;
st.global.u32 [%o2], %r2;
"""
    )
    out = np.zeros(32, np.int32)
    mod.launch("k", 1, 32, [out])
    assert out.tolist() == [(i % 3 + 1) * 100 + i for i in range(32)]


def test_initialised_data_and_scopes():
    mod = module(
        STORE
        + """
.reg .b32 %r<4>; .reg .b64 %p<3>; .reg .pred %q;
mov.u64 %p0, table;
mul.wide.u32 %p1, %t0, 4;
add.s64 %p2, %p0, %p1;
ld.const.s32 %r0, [%p2];
{ .reg .b32 %r<4>; mov.u32 %r0, 77; }
{ .reg .pred again; mov.u32 %r1, 0;
  LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 again, %r1, 5; @again bra LOOP; }
{ .reg .pred again; LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 again, %r1, 9; @again bra LOOP; }
add.u32 %r2, %r0, %r1;
st.global.u32 [%o2], %r2;
""",
        decls=".const .align 4 .s32 table[4] = {1, -2, 0x30, 4};\n",
    )
    out = np.zeros(4, np.int32)
    mod.launch("k", 1, 4, [out])
    assert out.tolist() == [10, 7, 57, 13]


def test_carry_chain():
    mod = module(
        STORE
        + """
.reg .b32 %r<4>;
mov.u32 %r0, 0xffffffff;
add.cc.u32 %r1, %r0, %t0;
addc.u32 %r2, 0, 0;
st.global.u32 [%o2], %r2;
"""
    )
    out = np.zeros(4, np.int32)
    mod.launch("k", 1, 4, [out])
    assert out.tolist() == [0, 1, 1, 1]


def test_larger_magnitudes():
    """The larger magnitude with the product of the signs, NaN where either is: floats, pairs of BF16 and FP16."""
    pairs = {"bf16x2": (0xC0004040, 0x40403F80, 0xC0404040), "f16x2": (0xC0004200, 0x42003C00, 0xC2004200)}
    for kind, (x, y, expected) in pairs.items():  # (3, -2) and (1, 3)
        nan = {"bf16x2": 0x7FC07FC0, "f16x2": 0x7E007E00}[kind]
        mod = module(
            STORE
            + f"""
.reg .b32 %r<8>;
mov.b32 %r0, {x}; mov.b32 %r1, {y}; mov.b32 %r2, {nan};
max.NaN.xorsign.abs.{kind} %r3, %r0, %r1;
max.NaN.xorsign.abs.{kind} %r4, %r0, %r2;
max.xorsign.abs.{kind} %r5, %r0, %r2;
max.NaN.xorsign.abs.f32 %r6, 0f7fc00000, 0fbf800000;
st.global.u32 [%o2], %r3;
st.global.u32 [%o2+4], %r4;
st.global.u32 [%o2+8], %r5;
st.global.u32 [%o2+12], %r6;
"""
        )
        out = np.zeros(4, np.uint32)
        mod.launch("k", 1, 1, [out])
        assert out[0] == expected, kind
        exponent = {"bf16x2": 0x7F80, "f16x2": 0x7C00}[kind]
        assert all(half & 0x7FFF > exponent for half in (int(out[1]) & 0xFFFF, int(out[1]) >> 16)), kind
        assert out[2] & 0x7FFF7FFF == x & 0x7FFF7FFF, kind
        assert np.isnan(out[3:].view(np.float32))[0]


def test_unknown_instruction_is_named():
    mod = module(".reg .b32 a; frobnicate.sync.b32 a, a;")
    text = expect("unsupported", mod.launch, "k", 1, 32, [np.zeros(1, np.int32)])
    assert "frobnicate.sync.b32" in text and "line 6" in text


def test_syntax_error_has_a_line():
    text = expect("parse", module, ".reg .b32 a; mov.u32 a a;")
    assert "line" in text


def test_launch_is_validated():
    mod = module("")
    out = np.zeros(1, np.int32)
    expect("launch", mod.launch, "k", 1, 2048, [out])
    expect("launch", mod.launch, "k", 3, 32, [out], cluster=(2, 1, 1))
    expect("launch", mod.launch, "k", 1, 32, [out], smem=300 * 1024)


def test_maybe_uninitialised_registers():
    mod = module(STORE + ".reg .b32 %r<2>; add.u32 %r1, %r0, 1; st.global.u32 [%o2], %r1;")
    mod.launch("k", 1, 32, [np.zeros(32, np.int32)])
    expect("uninit_register", mod.launch, "k", 1, 32, [np.zeros(32, np.int32)], strict_regs=True)
