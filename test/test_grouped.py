"""Grouped, BF16, batched and split-head products: values against float64, per tile, over everything they accept."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import batched, bf16_gemm, grouped_gemm

from common import FP8, LAYOUTS, assert_close, error_bar, generator, on_sm100, same_bits
from grouped import (
    BF16Case,
    Case,
    EinsumCase,
    HeadsCase,
    KGroupedCase,
    MaskedCase,
    MGroupedCase,
    mk_alignment,
    random_case,
)

FUZZ_CASES = 200
TYPES = ("fp8", "bf16")
M_LAYOUTS = ("indices", "psum", "offsets")
K_LAYOUTS = ("sizes", "psum", "offsets")
# Rows of each group: ordinary, empty ones everywhere, single rows, no rows at all, no group, more groups than tiles.
SIZES = [(130, 64, 200), (0, 100, 0, 0, 33, 0), (1, 1, 1), (0, 0), (), (1, 0, 129, 2, 127, 0, 1, 64, 3, 5, 0, 7)]


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("order", ["nt", "nn"])
@pytest.mark.parametrize("layout", M_LAYOUTS)
def test_m_grouped_sizes(device: str, layout: str, order: str, type_: str) -> None:
    for sizes, out, alignment in itertools.product(SIZES, (False, True), (128, 64, 256)):
        for n, k in [(136, 272), (33, 144)] if order == "nt" or type_ == "fp8" else [(136, 272), (40, 130)]:
            case = MGroupedCase(sizes, n, k, order, type_, layout, alignment, tail=70, out=out, device=device)
            case.run()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("layout", M_LAYOUTS)
def test_m_grouped_exact_integers(device: str, layout: str, type_: str) -> None:
    """No rounding but the last one, so every bit has to match, also of rows at the edges of tiles."""
    for sizes, order, out_dtype in itertools.product(
        [(129, 127, 1, 256), (5, 0, 300)], ("nt", "nn"), ("bfloat16", "float32")
    ):
        MGroupedCase(
            sizes, 200, 400, order, type_, layout, out_dtype=out_dtype, data="integer", tail=3, device=device
        ).run()


@pytest.mark.parametrize("order", ["nt", "nn"])
@pytest.mark.parametrize("recipe", [(1, 128, 128), (1, 1, 128), (128, 128, 128), (1, 1, 32), (128, 1, 32)], ids=str)
def test_m_grouped_scales(device: str, recipe: tuple[int, int, int], order: str) -> None:
    for scales, sf_strides in itertools.product(("random", "e8m0", "packed"), ("rows", "columns", "scattered")):
        case = MGroupedCase((100, 0, 31), 150, 400, order, "fp8", "psum", 128, 0, recipe, True, scales, sf_strides)
        MGroupedCase(**{**case.__dict__, "device": device, "pad": 16}).run()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("layout", M_LAYOUTS)
def test_m_grouped_of_padding_alone(device: str, layout: str, type_: str) -> None:
    """All rows are padding: zero in the functional form, left alone in the other."""
    for out in (False, True):
        MGroupedCase((0, 0, 0), 40, 144, type=type_, layout=layout, tail=300, out=out, device=device).run()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(("n", "k"), [(0, 128), (40, 0), (0, 0)])
def test_m_grouped_empty_dimensions(device: str, n: int, k: int, out: bool, type_: str) -> None:
    for layout, sizes in itertools.product(M_LAYOUTS, [(5, 0, 130), (), (0,)]):
        for order in ("nt", "nn"):
            MGroupedCase(sizes, n, k, order, type_, layout, tail=2, out=out, device=device).run()
    MaskedCase((0, 3), 5, n, k, type_, out=out, device=device).run()
    MaskedCase((), 5, n, k, type_, out=out, device=device).run()
    MaskedCase((0, 0), 0, n, k, type_, out=out, device=device).run()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("m_max", [1, 20, 64, 192, 300])
def test_masked(device: str, m_max: int, type_: str) -> None:
    for counts in [(0, 1, m_max), (m_max,), (0, 0), (m_max // 2, m_max - 1, 0, 1)]:
        for out, out_dtype in itertools.product((False, True), ("bfloat16", "float32")):
            for n, k in [(136, 272), (33, 400)]:
                MaskedCase(counts, m_max, n, k, type_, out=out, out_dtype=out_dtype, device=device).run()
                MaskedCase(
                    counts, m_max, n, k, type_, out=out, out_dtype=out_dtype, data="integer", device=device
                ).run()


@pytest.mark.parametrize("recipe", [(1, 128, 128), (1, 1, 128), (128, 128, 128), (1, 1, 32)], ids=str)
def test_masked_scales(device: str, recipe: tuple[int, int, int]) -> None:
    for scales, sf_strides in itertools.product(("random", "e8m0", "packed"), ("rows", "columns", "scattered")):
        MaskedCase((3, 0, 40), 40, 150, 400, "fp8", recipe, True, scales, sf_strides, pad=16, device=device).run()


@pytest.mark.parametrize(("type_", "order"), [("fp8", "tn"), ("fp8", "nt"), ("fp8", "padded"), ("bf16", "tn")])
@pytest.mark.parametrize("layout", K_LAYOUTS)
def test_k_grouped(device: str, layout: str, type_: str, order: str) -> None:
    sizes = [(256, 128, 384), (0, 128, 0), (0, 0), ()]
    if order != "nt":
        sizes += [(130, 64, 200), (1, 0, 1, 33, 127), (129,)]
    for ks, (m, n) in itertools.product(sizes, [(136, 272), (40, 24)]):
        for c, out_dtype in [("", "float32"), ("full", "bfloat16"), ("bias", "float32"), ("alias", "float32")]:
            case = KGroupedCase(ks, m, n, order, type_, layout, c=c, out_dtype=out_dtype, device=device)
            case.run()
            KGroupedCase(**{**case.__dict__, "out": True, "data": "integer", "seed": 1}).run()


@pytest.mark.parametrize("scales", ["random", "e8m0"])
@pytest.mark.parametrize("order", ["tn", "nt", "padded"])
def test_k_grouped_scales(device: str, order: str, scales: str) -> None:
    for sf_strides, sf_tail in itertools.product(("rows", "columns", "scattered"), (0, 5)):
        for m, n in [(40, 136), (33, 130)]:
            KGroupedCase(
                (256, 0, 128), m, n, order, scales=scales, sf_strides=sf_strides, sf_tail=sf_tail, device=device
            ).run()


@pytest.mark.parametrize("type_", TYPES)
def test_k_grouped_ragged(device: str, type_: str) -> None:
    """Rows behind the last group and odd sizes; FP8 operands need no alignment at all."""
    for layout, tail in itertools.product(K_LAYOUTS, (0, 60)):
        m, n = (37, 51) if type_ == "fp8" else (40, 56)
        KGroupedCase((100, 3, 0, 257), m, n, type=type_, layout=layout, tail=tail, pad=16, device=device).run()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize(("m", "n"), [(0, 40), (40, 0), (0, 0)])
def test_k_grouped_empty_dimensions(device: str, m: int, n: int, type_: str) -> None:
    for c in ("", "full", "alias"):
        KGroupedCase((128, 256), m, n, type=type_, c=c, device=device).run()
        if type_ == "fp8":
            KGroupedCase((128, 256), m, n, "nt", c=c, device=device).run()
            KGroupedCase((128, 256), m, n, "padded", c=c, device=device).run()


EINSUM_SIZES = {"bmk,bnk->mn": (3, 272, 130, 72), "": (33, 144, 3, 272)}


@pytest.mark.parametrize(
    ("type_", "expr"), [("bf16", expr) for expr in batched.EXPRESSIONS] + [("fp8", e) for e in batched.FP8_EXPRESSIONS]
)
def test_einsum(device: str, type_: str, expr: str) -> None:
    sizes = EINSUM_SIZES.get(expr, EINSUM_SIZES[""])
    for c, out_dtype in itertools.product(("", "full", "bias", "alias"), ("bfloat16", "float32")):
        for out, data in [(False, "normal"), (True, "integer")]:
            EinsumCase(expr, sizes, type_, c=c, out_dtype=out_dtype, out=out, data=data, device=device).run()
    for pad in (16, 48):
        EinsumCase(expr, sizes, type_, pad=pad, device=device).run()
    for i in range(4):
        for value in (0, 1):
            changed = list(sizes)
            changed[i] = value
            EinsumCase(expr, tuple(changed), type_, c="full", device=device).run()


@pytest.mark.parametrize("expr", batched.FP8_EXPRESSIONS)
@pytest.mark.parametrize("recipe", [(1, 128, 128), (1, 1, 128), (128, 128, 128), (1, 1, 32)], ids=str)
def test_fp8_einsum_scales(device: str, expr: str, recipe: tuple[int, int, int]) -> None:
    for scales, sf_strides in itertools.product(("random", "e8m0", "packed"), ("rows", "scattered")):
        EinsumCase(expr, (150, 140, 2, 160), "fp8", recipe, True, scales, sf_strides, device=device).run()


def test_einsum_of_permuted_views(device: str) -> None:
    """Only the innermost dimension has to be dense: batches may lie inside, rows outside."""
    random = generator(0)
    a = torch.randn(4, 33, 64, generator=random).bfloat16().to(device).transpose(0, 1)  # [b, h, r] of h-major memory
    b = torch.randn(48, 4, 64, generator=random).bfloat16().to(device).transpose(0, 1)
    out = torch.empty(4, 33, 48, dtype=torch.bfloat16, device=device).transpose(0, 1)
    deep_gemm_ops.einsum("bhr,hdr->bhd", a, b, out=out)
    expected = torch.einsum("bhr,hdr->bhd", a.cpu().double(), b.cpu().double())
    assert_close(out.transpose(0, 1), expected.transpose(0, 1), tol=error_bar(torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_gemm(device: str, layout: str) -> None:
    for m, n, k in [(1, 40, 256), (7, 136, 64), (64, 128, 512), (130, 33, 144), (257, 200, 1032), (33, 8, 100)]:
        for c, out_dtype in itertools.product(("", "full", "bias", "alias"), ("bfloat16", "float32")):
            BF16Case(m, n, k, layout, out_dtype, c, device=device).run()
            BF16Case(m, n, k, layout, out_dtype, c, True, 16, "integer", device=device).run()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 64), (40, 0, 64), (0, 0, 0), (40, 48, 0), (1, 1, 1)])
def test_bf16_gemm_empty_sizes(device: str, layout: str, m: int, n: int, k: int) -> None:
    for c, out in itertools.product(("", "full", "bias", "alias"), (False, True)):
        result = BF16Case(m, n, k, layout, c=c, out=out, device=device).run()
        if k == 0 and not c:
            assert bool((result == 0).all())


def test_bf16_accumulate_rounds_once(device: str) -> None:
    """1 + 2^-8 is halfway between two bfloat16 and 2^-9 more is not: rounding before adding c would lose it."""
    a, b = (torch.zeros(16, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    a[:, :2] = 1
    b[:, 0], b[:, 1] = 2.0**-8, 2.0**-9
    c = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    assert bool((deep_gemm_ops.bf16_gemm_nt(a, b, c=c) == 1 + 2.0**-7).all())


@pytest.mark.parametrize(
    "splits", [(128, 64, 128), (16, 8, 24), (5, 3, 2), (64, 0, 64), (0, 7, 16), (16, 7, 0)], ids=str
)
def test_skip_head_mid(device: str, splits: tuple[int, int, int]) -> None:
    for m, heads, k in [(33, 3, 272), (1, 1, 128), (130, 2, 512), (4, 0, 128), (0, 2, 128), (4, 2, 0)]:
        for out, recipe in itertools.product((False, True), ((1, 128, 128), (1, 1, 128))):
            for out_dtype in ("bfloat16", "float32"):
                HeadsCase(m, heads, splits, k, recipe, out_dtype=out_dtype, out=out, device=device).run()
            HeadsCase(m, heads, splits, k, recipe, out=out, data="integer", device=device).run()


@pytest.mark.parametrize("seed", range(FUZZ_CASES))
def test_fuzz(device: str, seed: int) -> None:
    random_case(seed, device).run()


# ---------------------------------------------------------------------------------------------------------------------
# Layouts that break their rules


def hostile_contents(num_groups: int, rows: int) -> list[list[int]]:
    """Ends or sizes of groups that ascend nowhere, point outside, or are negative."""
    big = 2**31 - 1
    return [
        [-1] * num_groups,
        [big] * num_groups,
        [-(2**31)] * num_groups,
        [rows + 1, 0, rows, -5][:num_groups],
        [big, -(2**31), 3, rows][:num_groups],
        list(range(num_groups, 0, -1)),
    ]


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("layout", M_LAYOUTS)
def test_hostile_m_grouped_layouts(device: str, layout: str, type_: str) -> None:
    """Wrong rows at most: nothing outside of ``out`` is touched, nothing fails."""
    case = MGroupedCase((60, 10, 30, 4), 40, 144, type=type_, layout="offsets", out=True, device=device)
    op, rows = getattr(torch.ops.deep_gemm, case.op), 104
    for contents in hostile_contents(4, rows):
        built = case.build()
        values = contents * (rows // 4) if layout == "indices" else contents
        groups = torch.tensor(values, dtype=torch.int32, device=device)
        built.keywords["layout"] = layout
        op.out(*built.arguments[:-1], groups, **built.keywords)
        around = torch.ones_like(built.buffer, dtype=torch.bool)
        around[:rows, 2:42] = False
        assert bool(built.buffer[around].isnan().all())


@pytest.mark.parametrize("type_", TYPES)
def test_hostile_masks(device: str, type_: str) -> None:
    case = MaskedCase((3, 0, 5, 1), 5, 40, 144, type_, out=True, device=device)
    for contents in hostile_contents(4, 5):
        built = case.build()
        counts = torch.tensor(contents, dtype=torch.int32, device=device)
        *operands, _, expected_m = built.arguments
        getattr(torch.ops.deep_gemm, case.op).out(*operands, counts, expected_m, **built.keywords)
        around = torch.ones_like(built.buffer, dtype=torch.bool)
        around[:4, :5, 2:42] = False
        assert bool(built.buffer[around].isnan().all())
        # Negative counts are none, and larger ones all.
        live = torch.arange(5) < counts.cpu().clamp(0, 5)[:, None]
        written = ~built.keywords["out"].cpu().isnan().all(-1)
        assert not bool((written & ~live).any())


@pytest.mark.parametrize(("type_", "order"), [("fp8", "tn"), ("fp8", "nt"), ("fp8", "padded"), ("bf16", "tn")])
@pytest.mark.parametrize("layout", K_LAYOUTS)
def test_hostile_k_grouped_layouts(device: str, layout: str, type_: str, order: str) -> None:
    case = KGroupedCase((128, 0, 256, 128), 40, 48, order, type_, "offsets", out=True, device=device)
    for contents in hostile_contents(4, 512):
        built = case.build()
        ks = torch.tensor(contents, dtype=torch.int32, device=device)
        built.keywords["layout"] = layout
        getattr(torch.ops.deep_gemm, case.op).out(*built.arguments[:-1], ks, **built.keywords)
        around = torch.ones_like(built.buffer, dtype=torch.bool)
        around[:4, :40, 2:50] = False
        assert bool(built.buffer[around].isnan().all())


def test_neighbours_never_see_padding(device: str) -> None:
    """NaN in rows of padding stays out of every group, in functional results too, which are zero there."""
    for layout in ("indices", "psum"):
        result = MGroupedCase((100, 3, 129), 72, 272, layout=layout, tail=50, device=device).run()
        assert not bool(result.isnan().any())
        assert bool((result[100:128] == 0).all())
        assert bool((result[-50:] == 0).all())


def test_offsets_equal_separate_products(device: str) -> None:
    """Bit for bit what the products of each group give alone on the CPU; on a GPU other kernels run them, within the
    error bar."""
    case = MGroupedCase((37, 0, 100, 1), 72, 272, layout="offsets", out_dtype="float32", device=device)
    a, sfa, b, sfb, ends = case.build().arguments
    result = torch.ops.deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        a, sfa, b, sfb, ends, layout="offsets", out_dtype=torch.float32
    )
    begin = 0
    for group, end in enumerate(ends.tolist()):
        alone = deep_gemm_ops.fp8_gemm_nt(a[begin:end], sfa[begin:end], b[group], sfb[group], out_dtype=torch.float32)
        assert_close(result[begin:end], alone.double(), tol=error_bar(torch.float32))
        begin = end


# ---------------------------------------------------------------------------------------------------------------------
# What holds of all


def every_family(device: str) -> list[Case]:
    return [
        MGroupedCase((100, 0, 31), 72, 272, layout="offsets", device=device),
        MGroupedCase((100, 0, 31), 72, 272, "nn", "bf16", "offsets", device=device),
        MaskedCase((3, 0, 40), 40, 72, 272, device=device),
        KGroupedCase((100, 0, 31), 40, 72, device=device),
        KGroupedCase((128, 0, 256), 40, 72, "nt", device=device),
        KGroupedCase((100, 0, 31), 40, 72, "padded", device=device),
        KGroupedCase((100, 0, 31), 40, 72, type="bf16", device=device),
        *[EinsumCase(expr, EINSUM_SIZES.get(expr, EINSUM_SIZES[""]), device=device) for expr in batched.EXPRESSIONS],
        *[EinsumCase(expr, EINSUM_SIZES[""], "fp8", device=device) for expr in batched.FP8_EXPRESSIONS],
        *[BF16Case(40, 72, 136, layout, device=device) for layout in LAYOUTS],
        HeadsCase(40, 2, (16, 8, 24), 272, device=device),
    ]


def test_inputs_are_left_alone(device: str) -> None:
    for case in every_family(device):
        built = case.build()
        tensors = [x for x in built.arguments if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        getattr(torch.ops.deep_gemm, case.op)(*built.arguments, **built.keywords)
        assert all(same_bits(x, y) for x, y in zip(tensors, before)), case.repro


def test_public_functions_match_the_operators(device: str) -> None:
    for case in every_family(device):
        built = case.build()
        function, op = getattr(deep_gemm_ops, case.op), getattr(torch.ops.deep_gemm, case.op)
        keywords = {name: value for name, value in built.keywords.items() if name != "out_dtype"}
        for out_dtype in (torch.bfloat16, torch.float32):
            expected = op(*built.arguments, **keywords, out_dtype=out_dtype)
            result = function(*built.arguments, **keywords, out_dtype=out_dtype)
            assert result.dtype == out_dtype, case.repro
            if isinstance(case, MaskedCase):
                live = built.written.to(device)
                result, expected = (torch.where(live, x, torch.zeros_like(x)) for x in (result, expected))
            assert same_bits(result, expected), case.repro
            out = torch.zeros_like(expected)
            assert function(*built.arguments, **keywords, out=out) is out
            assert same_bits(out, expected), case.repro
        default = torch.float32 if isinstance(case, KGroupedCase) else torch.bfloat16
        assert function(*built.arguments, **keywords).dtype == default, case.repro


def test_recipes_are_inferred(device: str) -> None:
    for recipe in [(1, 128, 128), (1, 1, 128), (128, 1, 128), (1, 1, 32)]:
        for case in (
            MGroupedCase((100, 0, 131), 172, 272, layout="offsets", recipe=recipe, device=device),
            EinsumCase("bhr,hdr->bhd", (150, 160, 3, 272), "fp8", recipe, device=device),
        ):
            built = case.build()
            op = getattr(torch.ops.deep_gemm, case.op)
            inferred = op(*built.arguments, **built.keywords)
            assert same_bits(inferred, op(*built.arguments, **built.keywords, recipe=list(recipe))), case.repro


def test_references_are_the_exact_products() -> None:
    """``exact=True`` equals the product that a case computes from its own scales, down to float64 rounding."""
    case: Any = MGroupedCase((100, 0, 31), 150, 272, "nn", layout="psum", recipe=(1, 1, 32))
    built = case.build()
    out = torch.zeros(built.expected.shape, dtype=torch.float64)
    options: dict[str, Any] = {"layout": "psum", "b_k_major": False, "grans": case.recipe, "exact": True}
    grouped_gemm.reference_m_grouped(*built.arguments, out, **options)
    assert_close(out, built.expected, tol=1e-14, repro=case.repro)

    case = MaskedCase((3, 0, 40), 40, 72, 272, recipe=(1, 1, 128))
    built = case.build()
    out = torch.zeros(built.expected.shape, dtype=torch.float64)
    grouped_gemm.reference_masked(*built.arguments[:-1], out, grans=case.recipe, exact=True)
    assert_close(out, torch.where(built.written, built.expected, 0.0), tol=1e-14, repro=case.repro)

    case = KGroupedCase((100, 0, 31), 40, 72, c="full")
    built = case.build()
    result = grouped_gemm.reference_k_grouped(
        *built.arguments, c=built.keywords["c"], out_dtype=torch.float64, exact=True
    )
    assert_close(result, built.expected, tol=1e-14, repro=case.repro)

    case = EinsumCase("bhd,bhr->hdr", (150, 40, 2, 72), "fp8", (1, 1, 32))
    built = case.build()
    expr, *operands = built.arguments
    expression = batched.FP8_EXPRESSIONS[expr]
    result = batched.reference_einsum(expression, *operands, grans=case.recipe, out_dtype=torch.float64, exact=True)
    assert_close(result, built.expected, tol=1e-14, repro=case.repro)

    case = BF16Case(40, 72, 136, "tn")
    built = case.build()
    result = bf16_gemm.reference_gemm(*built.arguments, layout="tn", out_dtype=torch.float64, exact=True)
    assert_close(result, built.expected, tol=1e-14, repro=case.repro)


def test_nan_stays_in_its_row_group_and_column(device: str) -> None:
    case = MGroupedCase((40, 30), 72, 272, layout="offsets", data="integer", device=device)
    a, sfa, b, sfb, ends = case.build().arguments
    call = lambda: deep_gemm_ops.m_grouped_fp8_gemm_nt_contiguous(a, sfa, b, sfb, ends, layout="offsets")  # noqa: E731
    expected = call()
    a.view(torch.uint8)[39, 7] = 0x7F
    b.view(torch.uint8)[1, 5, 271] = 0x7F
    expected[39, :] = math.nan
    expected[40:, 5] = math.nan
    torch.testing.assert_close(call(), expected, rtol=0, atol=0, equal_nan=True)


def test_alignment_is_the_knobs(device: str) -> None:
    """The same ends mean other rows under another alignment."""
    ends = torch.tensor([8, 40], dtype=torch.int32, device=device)
    x = torch.randn(48, 64, generator=generator(0)).bfloat16().to(device)
    w = torch.randn(2, 40, 64, generator=generator(1)).bfloat16().to(device)
    for alignment, begin in [(8, 8), (16, 16), (32, 32)]:
        with mk_alignment(alignment):
            result = deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w, ends, layout="psum")
            gradient = deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(x, x, ends, layout="psum")
        expected = torch.zeros(48, 40, dtype=torch.float64)
        expected[:8] = x[:8].cpu().double() @ w[0].cpu().double().t()
        expected[begin:40] = x[begin:40].cpu().double() @ w[1].cpu().double().t()
        assert_close(result, expected, tol=error_bar(torch.bfloat16))
        rows = x[begin:40].cpu().double()
        assert_close(gradient[1], rows.t() @ rows, tol=error_bar(torch.float32, "bf16"))


@pytest.mark.parametrize("layout", K_LAYOUTS)
def test_casts_feed_weight_gradients(device: str, layout: str) -> None:
    """The K-grouped casts' results are operands as they come, and both forms give the same."""
    sizes = torch.tensor([100, 0, 31, 256], dtype=torch.int32)
    ends = sizes.cumsum(0)
    if layout == "psum":
        ends = torch.tensor([100, 128, 159, 512])
    ks = (sizes if layout == "sizes" else ends.to(torch.int32)).to(device)
    rows = int(ends[-1])
    x = torch.randn(rows, 72, generator=generator(0)).bfloat16().to(device)
    grad = torch.randn(rows, 40, generator=generator(1)).bfloat16().to(device)
    options = {"layout": layout, "use_ue8m0": on_sm100(device)}
    casts = [deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(value, ks, **options) for value in (grad, x)]
    result = deep_gemm_ops.k_grouped_fp8_gemm_tn_contiguous(*casts[0], *casts[1], ks, layout=layout)
    casts = [deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(value, ks, **options) for value in (grad, x)]
    padded = deep_gemm_ops.k_grouped_fp8_gemm_nt_contiguous(*casts[0], *casts[1], ks, layout=layout)
    assert_close(padded, result.double(), tol=1e-5)
    for group, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist())):
        expected = grad[end - size : end].double().t() @ x[end - size : end].double()
        error = float((result[group].double() - expected).norm()) / max(float(expected.norm()), 1e-9)
        assert error < 0.06, (group, error)


def test_to_tma_aligned_of_batches(device: str) -> None:
    x = torch.randn(3, 5, 10, device=device)
    aligned = deep_gemm_ops.to_tma_aligned(x)
    assert torch.equal(aligned, x)
    assert aligned.stride() == (60, 12, 1)
    assert deep_gemm_ops.to_tma_aligned(aligned) is aligned
    assert deep_gemm_ops.to_tma_aligned(x.transpose(1, 2)).stride() == (80, 8, 1)
    permuted = torch.randn(5, 3, 12, device=device).transpose(0, 1)
    assert deep_gemm_ops.to_tma_aligned(permuted) is permuted
    assert deep_gemm_ops.to_tma_aligned(aligned[:1].expand(3, 5, 10)).stride() == (60, 12, 1)
    assert deep_gemm_ops.to_tma_aligned(x.to(FP8)).stride() == (80, 16, 1)
