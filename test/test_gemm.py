"""fp8_gemm_{nt,nn,tn,tt}: values against float64, per tile and overall, over everything the operators accept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import reference

from common import FP8, LAYOUTS, GemmCase, assert_close, error_bar, fp8_bytes, generator, random_gemm_case, same_bits

RECIPES = [(gran_m, gran_n, gran_k) for gran_m in (1, 128) for gran_n in (1, 128) for gran_k in (128, 32)]
FUZZ_CASES = 60


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("scales", ["random", "e8m0", "packed"])
def test_every_recipe_and_scale_type(device: str, layout: str, recipe: tuple[int, int, int], scales: str) -> None:
    for out_dtype in ("bfloat16", "float32"):
        GemmCase(150, 200, 592, layout, recipe, scales=scales, out_dtype=out_dtype, device=device).run()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 7, 64, 65, 130, 257])
def test_ragged_sizes(device: str, layout: str, m: int) -> None:
    for n, k in [(1, 16), (3, 48), (8, 128), (127, 144), (130, 272), (255, 400), (129, 1040)]:
        for recipe in [(1, 128, 128), (1, 1, 128)]:
            GemmCase(m, n, k, layout, recipe, device=device, out=n % 2 == 1, seed=m).run()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 5, 31, 33, 100, 129, 257])
def test_k_that_is_no_multiple_of_16(device: str, layout: str, k: int) -> None:
    """K-major operands have padded rows here; MN-major ones need nothing."""
    for recipe in [(1, 128, 128), (1, 1, 32)]:
        GemmCase(33, 40, k, layout, recipe, device=device).run()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), list(itertools.product((1, 40, 200), (1, 129, 264), (32, 160, 1000))))
def test_exact_integers(device: str, layout: str, m: int, n: int, k: int) -> None:
    """Small integers and power-of-two scales leave no rounding but the last one, so every bit has to match."""
    for recipe, c, out_dtype in [
        ((1, 128, 128), "", "float32"),
        ((1, 1, 32), "full", "float32"),
        ((1, 1, 128), "bias", "bfloat16"),
    ]:
        GemmCase(m, n, k, layout, recipe, True, c=c, out_dtype=out_dtype, data="integer", device=device, seed=k).run()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 40, 64), (40, 0, 64), (0, 0, 0), (40, 48, 0), (0, 48, 0), (1, 1, 0), (1, 1, 1)]
)
def test_empty_sizes(device: str, layout: str, m: int, n: int, k: int) -> None:
    for c, out, out_dtype in itertools.product(["", "full", "bias", "alias"], [False, True], ["bfloat16", "float32"]):
        result = GemmCase(m, n, k, layout, c=c, out=out, out_dtype=out_dtype, device=device).run()
        assert tuple(result.shape) == (m, n)
        if k == 0 and not c:
            assert bool((result == 0).all())


@pytest.mark.parametrize("c", ["full", "bias", "strided", "alias"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulate(device: str, layout: str, c: str, out_dtype: str) -> None:
    for m, n, k in [(1, 33, 256), (100, 130, 400), (17, 64, 128)]:
        for out in (False, True):
            GemmCase(m, n, k, layout, c=c, out=out, out_dtype=out_dtype, device=device).run()


def test_accumulate_rounds_once(device: str) -> None:
    """1 + 2^-8 is halfway between two bfloat16 and 2^-12 more is not: rounding before adding c would lose it."""
    a, b = (torch.zeros(16, 128, device=device) for _ in range(2))
    a[:, 0], b[:, 0] = 1, 2.0**-8
    a[:, 1], b[:, 1] = 1, 2.0**-9
    one = torch.ones(16, 1, device=device)
    c = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    # c + product = 1 + 2^-8 + 2^-9 lies above the midpoint 1 + 2^-8 and rounds up to 1 + 2^-7.
    result = deep_gemm_ops.fp8_gemm_nt(a.to(FP8), one, b.to(FP8), one, c=c)
    assert bool((result == 1 + 2.0**-7).all()), result


@pytest.mark.parametrize("sf_strides", ["columns", "rows", "scattered"])
@pytest.mark.parametrize("scales", ["random", "e8m0", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_strides(device: str, layout: str, scales: str, sf_strides: str) -> None:
    for recipe in [(1, 128, 128), (1, 1, 32)]:
        GemmCase(70, 140, 400, layout, recipe, scales=scales, sf_strides=sf_strides, device=device).run()


def test_scales_broadcast_with_stride_zero(device: str) -> None:
    """One scale for a whole tensor is a view of stride 0."""
    case = GemmCase(33, 65, 384, recipe=(1, 1, 128), device=device)
    (a, sfa, b, sfb), _, _, _ = case.build()
    one = torch.full((), 0.25, device=device)
    result = torch.ops.deep_gemm.fp8_gemm_nt(
        a, one.expand(sfa.shape), b, one.expand(sfb.shape), out_dtype=torch.float32
    )
    expected = a.float().double() @ b.float().double().t() / 16
    assert_close(result, expected, tol=error_bar(torch.float32), repro=case.repro)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", [16, 112])
def test_operands_inside_wider_rows(device: str, layout: str, pad: int) -> None:
    """What lies between the rows is NaN and must not be read into the result."""
    for k in (48, 130, 384):
        GemmCase(35, 77, k, layout, (1, 1, 128), pad=pad, out=True, device=device).run()


def test_scales_of_many_magnitudes(device: str) -> None:
    for recipe in [(1, 128, 128), (1, 1, 128), (1, 1, 32)]:
        GemmCase(130, 150, 600, recipe=recipe, data="wide", scales="e8m0", out_dtype="float32", device=device).run()


def _clean_problem(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = generator(5)
    a = torch.randint(1, 4, (130, 400), generator=random).float().to(FP8).to(device)
    b = torch.randint(1, 4, (140, 400), generator=random).float().to(FP8).to(device)
    return a, torch.ones(130, 4, device=device), b, torch.ones(2, 4, device=device)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_nan_stays_in_its_row_and_column(device: str, out_dtype: torch.dtype) -> None:
    a, sfa, b, sfb = _clean_problem(device)
    clean = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=out_dtype)
    a.view(torch.uint8)[3, 399] = 0x7F
    b.view(torch.uint8)[139, 0] = 0xFF
    result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=out_dtype)
    expected = clean.clone()
    expected[3, :] = math.nan
    expected[:, 139] = math.nan
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_scales(device: str, value: float) -> None:
    a, sfa, b, sfb = _clean_problem(device)
    clean = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)
    sfa[7, 3] = value
    result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)
    expected = clean.clone()
    expected[7, :] = value  # all operands are positive
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    sfa[7, 3] = 1
    sfb[1, 0] = value
    result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)
    expected = clean.clone()
    expected[:, 128:] = value
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_ue8m0_nan_scale(device: str) -> None:
    a, _, b, sfb = _clean_problem(device)
    codes = torch.full((130, 4), 127, dtype=torch.uint8, device=device)
    codes[9, 2] = 255
    for sfa in (codes.view(torch.float8_e8m0fnu), codes.view(torch.int32)):
        result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)
        nan_rows = result.isnan().all(dim=1)
        assert nan_rows.nonzero().flatten().tolist() == [9]
        assert int(result.isnan().sum()) == result.shape[1]


def test_inf_and_nan_in_c(device: str) -> None:
    a, sfa, b, sfb = _clean_problem(device)
    for out_dtype in (torch.bfloat16, torch.float32):
        clean = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=out_dtype)
        c = torch.zeros_like(clean)
        c[0, 0], c[129, 139], c[64, 1] = math.inf, -math.inf, math.nan
        expected = clean.clone()
        expected[0, 0], expected[129, 139], expected[64, 1] = math.inf, -math.inf, math.nan
        result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, c=c, out_dtype=out_dtype)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_float32_overflow_to_bfloat16_is_inf(device: str) -> None:
    a = torch.full((16, 128), 448.0, device=device).to(FP8)
    scale = torch.full((16, 1), 2.0**60, device=device)
    result = torch.ops.deep_gemm.fp8_gemm_nt(a, scale, a, scale)
    assert bool((result == math.inf).all())


def test_inputs_are_left_alone(device: str) -> None:
    for layout in LAYOUTS:
        case = GemmCase(40, 50, 272, layout, c="full", device=device)
        arguments, keywords, _, _ = case.build()
        tensors = [*arguments, keywords["c"]]
        before = [x.clone() for x in tensors]
        getattr(torch.ops.deep_gemm, case.op)(*arguments, **keywords)
        assert all(same_bits(x, y) for x, y in zip(tensors, before))


def test_layouts_agree_bit_for_bit_on_cpu() -> None:
    """They are one computation on differently stored operands."""
    results = []
    for layout in LAYOUTS:
        case = GemmCase(40, 50, 272, layout, (1, 1, 128), out_dtype="float32", data="integer")
        results.append(case.run())
    assert all(same_bits(results[0], result) for result in results[1:])


def test_results_are_contiguous(device: str) -> None:
    for layout in LAYOUTS:
        result = GemmCase(20, 30, 64, layout, device=device).run()
        assert result.stride() == (30, 1)


def test_recipe_is_inferred_as_given(device: str) -> None:
    for recipe in RECIPES:
        for scales in ("random", "packed"):
            case = GemmCase(200, 300, 600, recipe=recipe, scales=scales, device=device)
            (a, sfa, b, sfb), keywords, _, _ = case.build()
            inferred = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32)
            given = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32, recipe=list(recipe))
            assert same_bits(inferred, given), case.repro


def test_mixed_scale_types(device: str) -> None:
    left = GemmCase(70, 140, 400, recipe=(1, 128, 128), scales="packed", device=device)
    right = GemmCase(70, 140, 400, recipe=(1, 128, 128), scales="random", device=device)
    (a, sfa, _, _), _, _, _ = left.build()
    (_, _, b, sfb), _, _, _ = right.build()
    result = torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32)
    a64 = reference.dequantize(a.cpu(), sfa.cpu(), 1, 128, torch.float64)
    b64 = reference.dequantize(b.cpu(), sfb.cpu(), 128, 128, torch.float64)
    assert_close(result, a64 @ b64.t(), tol=error_bar(torch.float32), repro=left.repro)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_the_exact_product(layout: str) -> None:
    """``exact=True`` equals the product that the case computes from its own scales, down to float64 rounding."""
    for recipe, scales in itertools.product(RECIPES, ["random", "e8m0", "packed"]):
        case = GemmCase(130, 150, 300, layout, recipe, True, scales=scales, c="full")
        arguments, keywords, expected, _ = case.build()
        result = reference.fp8_gemm(
            *arguments, layout=layout, c=keywords["c"], recipe=recipe, exact=True, out_dtype=torch.float64
        )
        assert_close(result, expected, tol=1e-14, repro=case.repro)


def test_public_functions_match_the_operators(device: str) -> None:
    for layout in LAYOUTS:
        case = GemmCase(40, 50, 272, layout, (1, 1, 128), c="full", out_dtype="float32", device=device)
        arguments, keywords, _, _ = case.build()
        function, op = getattr(deep_gemm_ops, case.op), getattr(torch.ops.deep_gemm, case.op)
        assert same_bits(function(*arguments, **keywords), op(*arguments, **keywords))
        out = torch.empty(40, 50, device=device)
        assert function(*arguments, c=keywords["c"], out=out) is out
        assert same_bits(out, op(*arguments, **keywords))
        assert function(*arguments).dtype == torch.bfloat16


def test_casts_feed_every_layout(device: str) -> None:
    """The scales of the casts are those that the four layouts expect, as they come."""
    random = generator(3)
    m, n, k = 70, 200, 304
    x = torch.randn(m, k, generator=random).bfloat16().to(device)
    w = torch.randn(n, k, generator=random).bfloat16().to(device)
    expected = x.double() @ w.double().t()
    a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
    at, sfat = deep_gemm_ops.per_channel_cast_to_fp8(x.t().contiguous())
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w)
    bt, sfbt = deep_gemm_ops.per_channel_cast_to_fp8(w.t().contiguous())
    assert torch.equal(fp8_bytes(a).t(), fp8_bytes(at))
    for result in (
        deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb),
        deep_gemm_ops.fp8_gemm_nn(a, sfa, bt, sfbt),
        deep_gemm_ops.fp8_gemm_tn(at, sfat, bt, sfbt),
        deep_gemm_ops.fp8_gemm_tt(at, sfat, b, sfb),
    ):
        error = float((result.double() - expected).norm() / expected.norm())
        assert error < 0.05, error


@pytest.mark.parametrize("seed", range(FUZZ_CASES))
def test_fuzz(device: str, seed: int) -> None:
    random_gemm_case(seed, device).run()


def test_autocast_does_not_reach_inside(device: str) -> None:
    """The operator is opaque: the reference multiplies in FP32 whatever the caller's autocast says."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        GemmCase(65, 130, 272, out_dtype="float32", device=device).run()
