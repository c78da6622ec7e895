"""tcgen05.mma with block scaling, sub-byte operands and TF32 against definitions written from the PTX ISA (layouts.py).

Random operands and scale factors. A product and a sum over one instruction's K are exact in double for what is drawn
here, so that the result of one rounding per instruction is compared bit for bit.
"""

import numpy as np
import pytest

from ptx_emulator import layouts
from ptx_emulator.testing import expect, module

SFA, SFB = 256, 264  # columns of tensor memory; the accumulator starts at column 0


def kernel(image, columns, mma, ctas, steps, *, scale_at=None, scale_columns=(0, 0), by_copy=True, spoiled=None):
    """Image to shared memory, scale factors to tensor memory, then `steps` of one thread, then D to `out`.

    A step is the increment of both descriptors (or of each) and its instruction descriptor. Scale factors lie at
    scale_at: per four columns 32 rows of 16 bytes, first those of A. They get to tensor memory by tcgen05.cp
    32x128b.warpx4 or tcgen05.st of every warp to its quarter, both of which repeat them in all four quarters; the last
    quarter's copy of the first column is exclusive-ored with `spoiled`.
    """
    group = f"cta_group::{ctas}"
    commit = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster"
    commit += ".b64 [%bar];" if ctas == 1 else ".multicast::cluster.b64 [%bar], 3;"
    sync = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    regs = "{" + ", ".join(f"%c{i}" for i in range(8)) + "}"
    spoil = "" if spoiled is None else f"setp.ge.u32 %p, %t, 96; @%p xor.b32 %c0, %c0, {spoiled};"
    stores = copies = ""
    at = scale_at
    for base, count in zip((SFA, SFB), scale_columns, strict=True):
        for column in range(base, base + count, 4):
            copies += f"""
add.u32 %r0, %s, {at}; shr.u32 %r0, %r0, 4; cvt.u64.u32 %dc, %r0; add.u64 %dc, %dc, {
                layouts.tcgen05_descriptor(0, 128, 128)
            };
add.u32 %r1, %tm, {column}; @%one tcgen05.cp.{group}.32x128b.warpx4 [%r1], %dc;"""
            stores += f"""
and.b32 %r0, %t, 31; shl.b32 %r0, %r0, 4; add.u32 %r0, %r0, %s;
ld.shared.v4.u32 {{%c0, %c1, %c2, %c3}}, [%r0 + {at}]; {spoil}
tcgen05.st.sync.aligned.32x32b.x4.b32 [%q + {column}], {{%c0, %c1, %c2, %c3}};"""
            at += 512
    scales = "[%sfa], [%sfb], " if scale_at is not None else ""
    body = ""
    for i, (advance, idesc) in enumerate(steps):
        of_a, of_b = advance if isinstance(advance, tuple) else (advance, advance)
        body += f"""
mov.u32 %idesc, {idesc}; add.u64 %xa, %da, {of_a}; add.u64 %xb, %db, {of_b};
@%one tcgen05.mma.{group}.{mma} [%tm], %xa, %xb, %idesc, {scales}{"%no" if i == 0 else "%yes"};"""
    loads = ""
    for c in range(0, columns, 8):
        loads += f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {regs}, [%q + {c}]; tcgen05.wait::ld.sync.aligned;\n"
        loads += "".join(f"st.global.u32 [%g + {4 * (c + i)}], %c{i};" for i in range(8))
    return module(
        f"""
.shared .align 1024 .b8 buf[{image}]; .shared .align 8 .b64 done; .shared .align 4 .b32 slot;
.reg .b32 %t, %s, %r<6>, %c<8>, %bar, %tm, %q, %idesc, %rank, %sfa, %sfb;
.reg .b64 %g, %m, %da, %db, %dc, %xa, %xb; .reg .pred %p, %one, %first, %yes, %no, %w0;
mov.u32 %t, %tid.x; mov.u32 %s, buf; mov.u32 %rank, %cluster_ctarank; mov.u32 %bar, done;
ld.param.u64 %m, [data]; ld.param.u64 %g, [out];
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
@!%w0 bra A; tcgen05.alloc.{group}.sync.aligned.shared::cta.b32 [%r0], 512; A:
bar.sync 0; tcgen05.fence::after_thread_sync; ld.shared.u32 %tm, [slot];
shr.u32 %q, %t, 5; shl.b32 %q, %q, 21; add.u32 %q, %q, %tm;
{"" if by_copy else stores + "tcgen05.wait::st.sync.aligned;"}
tcgen05.fence::before_thread_sync; {sync} tcgen05.fence::after_thread_sync;
{copies if by_copy else ""}
add.u32 %sfa, %tm, {SFA}; add.u32 %sfb, %tm, {SFB};
shr.u32 %r1, %s, 4; cvt.u64.u32 %m, %r1;
ld.param.u64 %da, [desc_a]; add.u64 %da, %da, %m; ld.param.u64 %db, [desc_b]; add.u64 %db, %db, %m;
{body} @%one {commit}
W: mbarrier.try_wait.parity.shared.b64 %p, [%bar], 0; @!%p bra W;
tcgen05.fence::after_thread_sync;
mul.lo.u32 %r0, %rank, 128; add.u32 %r0, %r0, %t; mul.lo.u32 %r0, %r0, {4 * columns};
cvt.u64.u32 %m, %r0; add.u64 %g, %g, %m;
{loads}
bar.sync 0; {sync}
@!%w0 bra E; tcgen05.dealloc.{group}.sync.aligned.b32 %tm, 512; E:
""",
        ".param .u64 data, .param .u64 out, .param .u64 desc_a, .param .u64 desc_b",
        target="sm_100a",
    )


def codes(rng, rows, k, dtype):
    """Random codes of every value, of e5m2 those with a magnitude of 0 or in 2 ** [-6, 6], so that sums are exact."""
    bits = sum(layouts.FORMATS[dtype][:2]) + 1
    x = rng.integers(0, 1 << bits, (rows, k))
    if dtype == "e4m3":
        return np.where(x & 0x7F == 0x7F, 0x38, x)  # not NaN
    if dtype == "e5m2":
        return np.where((x & 0x7F >= 36) & (x & 0x7F <= 84), x, 0)
    return x


def operand(x, span):
    """LBO, SBO and the image of one CTA's K-major operand."""
    mn, width = x.shape[0], x.shape[1] * x.dtype.itemsize
    lbo, sbo = (128, 8 * width) if span == 0 else (16, 8 * span)
    return lbo, sbo, layouts.operand_image(x, span, False, lbo, sbo, -(-mn * width // 1024) * 1024)


def operand_mn_32(x, _):
    """The same of a 32-bit operand whose MN is contiguous, 128-byte swizzle with 32-byte atomicity."""
    mn, k = x.shape
    lbo, sbo = 128 * k, 512
    image = np.full(lbo * -(-mn // 32), 0xFF, np.uint8)
    row, col = np.indices(x.shape)
    image.view(x.dtype)[layouts.operand_address_mn_32(4 * row, col, lbo, sbo) // 4] = x
    return lbo, sbo, np.pad(image, (0, -image.size % 1024))


def operand_mn_8(x, span):
    """The same of an 8-bit operand whose MN is contiguous: panels of one swizzle span, groups of 8 along K."""
    mn, k = x.shape
    lbo, sbo = span * k, 8 * span
    return lbo, sbo, layouts.operand_image(x, span, True, lbo, sbo, -(-lbo * -(-mn // span) // 1024) * 1024)


OPERANDS = [operand, operand_mn_32, operand_mn_8]  # by `mn` of run()


def run(m, n, ctas, raw_a, raw_b, span, mma, steps, *, words=None, by_copy=True, seed=0, spoiled=None, mn=(0, 0)):
    """D from operands in bytes; words: per CTA, those of the scale factors of A and of B."""
    rows, cols = raw_a.shape[0] // ctas, raw_b.shape[0] // ctas
    images = []
    for c in range(ctas):
        la, sa, ia = OPERANDS[mn[0]](raw_a[c * rows : (c + 1) * rows], span)
        lb, sb, ib = OPERANDS[mn[1]](raw_b[c * cols : (c + 1) * cols], span)
        parts_of = [w[:, i : i + 4] for w in words[c] for i in range(0, w.shape[1], 4)] if words else []
        tail = [w.copy().view(np.uint8).reshape(-1) for w in parts_of]
        images.append(np.concatenate([ia, ib, *tail]))
    image = np.stack(images)
    cta, lane, col = layouts.tcgen05_accumulator(m, n, ctas)
    out = np.zeros((ctas, 128, int(col.max()) + 1), np.float32)
    scale = {}
    if words:
        scale = {"scale_at": ia.size + ib.size, "scale_columns": tuple(w.shape[1] for w in words[0])}
    mod = kernel(image.shape[1], out.shape[2], mma, ctas, steps, by_copy=by_copy, spoiled=spoiled, **scale)
    descs = [
        layouts.tcgen05_descriptor(0 if major == 1 else span, lbo, sbo) | (major == 1) << 61  # layout type 1
        for major, lbo, sbo in ((mn[0], la, sa), (mn[1], lb, sb))
    ]
    descs[1] += ia.size >> 4
    mod.launch("k", ctas, 128, [image, out, *descs], cluster=ctas, seed=seed)
    return out[cta, lane, col]


def rounded_sum(terms):
    """One addition to the accumulator and one rounding per instruction."""
    d = np.zeros_like(terms[0], np.float32)
    with np.errstate(over="ignore"):  # to infinity, as it should
        for t in terms:
            d = (d.astype(np.float64) + t).astype(np.float32)
    return d


def same(got, want):
    assert got.dtype == want.dtype
    assert np.array_equal(got, want, equal_nan=True)


def scaled(
    m,
    n,
    a,
    b,
    ids,
    *,
    ctas=1,
    kind="mxf8f6f4",
    vector="",
    block=32,
    by_copy=True,
    ue8m0=1,
    edit=None,
    spoiled=None,
    seed=0,
    mn=(0, 0),
):
    """A product over len(ids) instructions' K, whose scale factors the pairs `ids` of SF-ids select."""
    rng = np.random.default_rng([m, n, seed])
    packed = kind != "mxf8f6f4"
    k = 64 if packed else 32
    blocks = k // block
    ca, cb = (codes(rng, r, k * len(ids), t) for r, t in ((m, a), (n, b)))
    span = 32 * len(ids)
    # Every byte of the words is a plausible scale factor, so that a wrong one shows.
    low, high = (119, 136) if ue8m0 else (0x28, 0x50)
    columns_a, columns_b = 4, -(-n // 128) * 4
    filler_a = rng.integers(low, high, (ctas, 32, columns_a, 4)).astype(np.uint8)
    filler_b = rng.integers(low, high, (32, columns_b, 4)).astype(np.uint8)
    if edit:
        edit(filler_a, filler_b)

    def scale(filler, row, first):
        code = filler[row[:, None] % 32, row[:, None] // 32, first + np.arange(blocks)[None, :]]
        value = np.ldexp(1.0, code.astype(int) - 127) if ue8m0 else layouts.minifloat(code, "e4m3")
        return np.repeat(np.where(ue8m0 and code == 255, np.nan, value), block, 1), code

    rows = m // ctas
    terms, steps = [], []
    words_a = list(filler_a.view(np.uint32)[..., 0])
    words_b = filler_b.view(np.uint32)[..., 0]
    for i, (ida, idb) in enumerate(ids):
        part = slice(i * k, (i + 1) * k)
        per_cta = [scale(filler_a[c], np.arange(rows), ida) for c in range(ctas)]
        sb, code_b = scale(filler_b, np.arange(n), idb)
        # The placement in words is layouts', not that of this function.
        for c in range(ctas):
            assert np.array_equal(layouts.tcgen05_scale_words(per_cta[c][1], ida, filler_a[c]), words_a[c])
        assert np.array_equal(layouts.tcgen05_scale_words(code_b, idb, filler_b), words_b)
        va = layouts.minifloat(ca[:, part], a) * np.concatenate([s for s, _ in per_cta])
        vb = layouts.minifloat(cb[:, part], b) * sb
        terms.append(va @ vb.T)
        major = {"mn_a": int(mn[0] > 0), "mn_b": int(mn[1] > 0)}
        idesc = layouts.tcgen05_scaled_instruction(m, n, a, b, ida, idb, packed=packed, ue8m0=ue8m0, **major)
        steps.append((tuple(2 * i * (span if transposed else 1) for transposed in mn), idesc))
    words = [(w, words_b) for w in words_a]
    raw_a, raw_b = (layouts.packed_codes(c, t, packed=packed) for c, t in ((ca, a), (cb, b)))
    mma = f"kind::{kind}.block_scale{vector}"
    how = {"words": words, "by_copy": by_copy, "spoiled": spoiled, "seed": seed, "mn": tuple(2 * bool(x) for x in mn)}
    same(run(m, n, ctas, raw_a, raw_b, span, mma, steps, **how), rounded_sum(terms))


@pytest.mark.parametrize("by_copy", [True, False])
@pytest.mark.parametrize("sfa_id", range(4))
def test_scale_factor_ids(sfa_id, by_copy):
    for sfb_id in range(4):
        scaled(128, 40, "e4m3", "e4m3", [(sfa_id, sfb_id)], by_copy=by_copy, seed=sfb_id)


@pytest.mark.parametrize("n", [8, 24, 64, 104, 128, 136, 192, 248, 256])
def test_scaled_widths(n):
    scaled(128, n, "e4m3", "e5m2", [(i, i) for i in range(4)], vector=".scale_vec::1X")


@pytest.mark.parametrize("by_copy", [True, False])
@pytest.mark.parametrize("n", [16, 48, 128, 208, 256])
def test_scaled_pair(n, by_copy):
    scaled(256, n, "e4m3", "e4m3", [(i, 3 - i) for i in range(4)], ctas=2, by_copy=by_copy)


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize(
    "a,b", [("e4m3", "e2m1"), ("e2m1", "e4m3"), ("e2m1", "e2m1"), ("e5m2", "e2m3"), ("e3m2", "e2m1")]
)
def test_scaled_mixed(a, b, ctas):
    scaled(128 * ctas, 64, a, b, [(i, i) for i in range(4)], ctas=ctas, vector=".block32")


@pytest.mark.parametrize("mn", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_scaled_transposed(count, mn):
    """MN-major FP8 with a swizzle of 32, 64 and 128 bytes: 32 of K are 32 rows of the panels."""
    ids = [(i, 3 - i) for i in range(count)]
    for m, n, ctas in ((128, 128, 1), (128, 64 if count < 4 else 256, 1), (256, 256, 2)):
        scaled(m, n, "e4m3", "e4m3", ids, ctas=ctas, mn=mn)


def test_scale_factors_at_their_limits():
    def edit(sfa, sfb):
        sfa[0, :8, 0] = 0  # 2 ** -127
        sfb[:8, 0] = 254  # 2 ** 127
        sfa[0, 8, 1] = 255  # NaN
        sfb[9, 0] = 255

    scaled(128, 64, "e4m3", "e2m1", [(2, 1)], edit=edit)


@pytest.mark.parametrize("sf_id", range(4))
def test_scale_factors_in_every_quarter(sf_id):
    """ "Block Scaling": scale factors need to be duplicated to all 32-lane partitions of tensor memory."""
    scaled_with = {"by_copy": False, "spoiled": 1 << 8 * sf_id}
    report = expect("tmem_scale", scaled, 128, 32, "e4m3", "e4m3", [(sf_id, sf_id)], **scaled_with)
    assert f"byte {sf_id} of column {SFA} " in report
    scaled(128, 32, "e4m3", "e4m3", [(sf_id ^ 1, sf_id ^ 1)], **scaled_with)


FP4 = {"a": "e2m1", "b": "e2m1", "kind": "mxf4nvf4"}


@pytest.mark.parametrize(
    "case",
    [
        {"m": 256, "n": 24, "ctas": 2},
        {"ue8m0": 0},
        {**FP4, "kind": "mxf4", "sf": (1, 0)},
        {**FP4, "vector": ".scale_vec::2X", "sf": (0, 3)},
        {**FP4, "vector": ".scale_vec::2X", "ue8m0": 0},
        {**FP4, "vector": ".scale_vec::4X", "sf": (2, 0)},
        {"bit": 26},
        {**FP4, "bit": 31},
    ],
)
def test_scaled_forms_that_do_not_exist(case):
    """ "Instruction descriptor" and "Valid combinations of scale_vectorsize with types and MMA-Kind"."""
    case = {"m": 128, "n": 32, "a": "e4m3", "b": "e4m3", "kind": "mxf8f6f4", "ctas": 1, "vector": ""} | case
    ids, packed = case.get("sf", (0, 0)), case["kind"] != "mxf8f6f4"
    formats = case["m"], case["n"], case["a"], case["b"]
    idesc = layouts.tcgen05_scaled_instruction(*formats, *ids, packed=packed, ue8m0=case.get("ue8m0", 1))
    idesc |= 1 << case["bit"] if "bit" in case else 0
    zeros = [np.zeros((r, 32), np.uint8) for r in (case["m"], case["n"])]
    words = [(np.zeros((32, 4), np.uint32),) * 2] * case["ctas"]
    mma = f"kind::{case['kind']}.block_scale{case['vector']}"
    expect("idesc", run, case["m"], case["n"], case["ctas"], *zeros, 32, mma, [(0, idesc)], words=words)


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("by_copy", [True, False])
def test_packed_fp4(ctas, by_copy):
    for n in (16, 64, 144, 256):
        first, second = [(0, 0), (2, 2)], [(2, 0), (0, 2)]
        for ids in (first, second):
            scaled(128 * ctas, n, "e2m1", "e2m1", ids, ctas=ctas, kind="mxf4", vector=".scale_vec::2X", by_copy=by_copy)
        options = {"ctas": ctas, "kind": "mxf4nvf4", "by_copy": by_copy}
        scaled(128 * ctas, n, "e2m1", "e2m1", first, vector=".scale_vec::2X", **options)
        for ue8m0 in (0, 1):
            scaled(128 * ctas, n, "e2m1", "e2m1", [(0, 0)], vector=".scale_vec::4X", block=16, ue8m0=ue8m0, **options)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    "a,b", [("e2m1", "e2m1"), ("e2m3", "e4m3"), ("e3m2", "e2m1"), ("e5m2", "e3m2"), ("e4m3", "e2m3")]
)
def test_sub_byte(a, b, span):
    rng = np.random.default_rng(span)
    count = max(span, 32) // 32
    for m, n, ctas in ((64, 24, 1), (128, 80, 1), (256, 64, 2)):
        ca, cb = codes(rng, m, 32 * count, a), codes(rng, n, 32 * count, b)
        va, vb = layouts.minifloat(ca, a), layouts.minifloat(cb, b)
        idesc = layouts.tcgen05_instruction(m, n, a, b)
        raw = layouts.packed_codes(ca, a), layouts.packed_codes(cb, b)
        got = run(m, n, ctas, *raw, span, "kind::f8f6f4", [(2 * i, idesc) for i in range(count)])
        same(got, rounded_sum([va[:, s : s + 32] @ vb[:, s : s + 32].T for s in range(0, 32 * count, 32)]))


def tf32(rng, rows, k):
    """Random TF32 values of 8 exponents, so that sums are exact: 10 fraction bits, the lower 13 bits are zero."""
    fraction, exponent = 1 + rng.integers(0, 1024, (rows, k)) / 1024, rng.integers(-4, 4, (rows, k))
    x = (np.ldexp(fraction, exponent) * rng.choice([-1, 1], (rows, k))).astype(np.float32)
    assert not (x.view(np.uint32) & 0x1FFF).any()
    return x


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_tf32(span):
    rng = np.random.default_rng(span)
    count = max(span, 32) // 32
    for m, n, ctas in ((64, 8, 1), (64, 136, 1), (128, 16, 1), (128, 256, 1), (128, 64, 2), (256, 96, 2)):
        a, b = tf32(rng, m, 8 * count), tf32(rng, n, 8 * count)
        idesc = layouts.tcgen05_instruction(m, n, "tf32", "tf32")
        got = run(m, n, ctas, a, b, span, "kind::tf32", [(2 * i, idesc) for i in range(count)])
        x, y = a.astype(np.float64), b.astype(np.float64)
        same(got, rounded_sum([x[:, s : s + 8] @ y[:, s : s + 8].T for s in range(0, 8 * count, 8)]))


@pytest.mark.parametrize("mn", [(0, 1), (1, 0), (1, 1)])
def test_tf32_transposed(mn):
    rng = np.random.default_rng(7)
    for m, n, ctas in ((64, 40, 1), (128, 128, 1), (256, 128, 2)):
        a, b = tf32(rng, m, 8), tf32(rng, n, 8)
        idesc = layouts.tcgen05_instruction(m, n, "tf32", "tf32", mn_a=mn[0], mn_b=mn[1])
        got = run(m, n, ctas, a, b, 32, "kind::tf32", [(0, idesc)], mn=mn)
        same(got, rounded_sum([a.astype(np.float64) @ b.astype(np.float64).T]))


@pytest.mark.parametrize(
    "kind,a,b,n,mn_a,mn_b",
    [
        ("tf32", "tf32", "tf32", 32, 1, 0),  # of 16-byte atomicity
        ("f8f6f4", "e4m3", "e2m1", 32, 0, 1),
        ("f8f6f4", "e3m2", "e4m3", 32, 1, 0),
        ("f8f6f4", "e4m3", "e4m3", 24, 0, 1),
    ],
)
def test_transpositions_that_do_not_exist(kind, a, b, n, mn_a, mn_b):
    idesc = layouts.tcgen05_instruction(64, n, a, b, mn_a=mn_a, mn_b=mn_b)
    zeros = [np.zeros((r, 32), np.uint8) for r in (64, n)]
    expect("idesc", run, 64, n, 1, *zeros, 32, f"kind::{kind}", [(0, idesc)])
