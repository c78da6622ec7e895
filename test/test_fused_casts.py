"""Casts that do several things in one read: values from the definition, every overload, compilation, bad input."""
# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from test_casts import expected_cast, packed_bytes, power_of_two_above
from torch.export import Dim, export

import deep_gemm_ops
from deep_gemm_ops import fused_casts
from deep_gemm_ops.layout import group_ranges

from common import FP8, ceil_div, fp8_bytes, generator, like, same_bits
from test_bad_input import changed, messages
from test_bad_input import device as bad_input_device  # noqa: F401

SCALES = ("float32", "ue8m0", "packed")


def options_of(scales: str) -> dict[str, bool]:
    return {"use_ue8m0": scales == "ue8m0", "use_packed_ue8m0": scales == "packed"}


def inputs(rows: int, cols: int, device: str, dtype: torch.dtype = torch.bfloat16, pad: int = 0) -> torch.Tensor:
    """Rows of different magnitude, inside wider rows of NaN."""
    random = generator(rows * 1000 + cols)
    x = torch.randn(rows, cols + pad, generator=random)
    x *= torch.exp2(torch.randint(-8, 4, (rows, 1), generator=random).float())
    x[:, cols:] = math.nan
    return x.to(dtype).to(device)[:, :cols]


def assert_cast(
    values: torch.Tensor, sf: torch.Tensor, x: torch.Tensor, kind: str, scales: str, gran_k: int = 128
) -> None:
    """Values and scales are those of a cast of ``x`` by its definition, MN-major."""
    codes, expected = expected_cast(x, kind, gran_k, scales != "float32")
    assert np.array_equal(fp8_bytes(values).numpy(), codes)
    if scales == "packed":
        words = sf.cpu().clone(memory_format=torch.contiguous_format)
        assert np.array_equal(words.numpy().view(np.uint8), packed_bytes(expected, 1))
    else:
        assert np.array_equal(sf.cpu().numpy(), expected)
    assert sf.stride() == (1, ceil_div(sf.shape[0], 4) * 4)


def same_results(
    op: Any, x: torch.Tensor, more: tuple[Any, ...], options: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """What the functional form returns, after the same from the .out form into strided, poisoned memory."""
    results = op(x, *more, **options)
    outs = {}
    for name, result in zip(names, results, strict=True):
        if result.dtype == FP8:
            buffer = torch.full((result.shape[0] + 2, result.shape[1] + 7), math.nan, device=x.device).to(FP8)
            outs[name] = buffer[1 : result.shape[0] + 1, 3 : result.shape[1] + 3]
        else:
            outs[name] = like(result, -1)
    assert op.out(x, *more, **options, **outs) is None
    for name, result in zip(names, results, strict=True):
        assert same_bits(outs[name], result), name
        if result.dtype == FP8:
            inside = outs[name]
            buffer = inside._base
            around = torch.ones(buffer.shape, dtype=torch.bool)
            around[1 : inside.shape[0] + 1, 3 : inside.shape[1] + 3] = False
            assert bool((fp8_bytes(buffer)[around] == 0x7F).all()), "wrote outside of out"
    return results


# ---------------------------------------------------------------------------------------------------------------------
# FP4

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def to_e2m1(x: np.ndarray) -> np.ndarray:
    """float32 to codes: nearest, ties to the even code, saturating; NaN is 6."""
    magnitude = np.abs(x.astype(np.float64))[..., None]
    distance = np.abs(magnitude - FP4_VALUES)
    best = distance == distance.min(-1, keepdims=True)
    best &= (best.sum(-1, keepdims=True) == 1) | (np.arange(8) % 2 == 0)
    code = np.where(magnitude[..., 0] > 6, 7, best.argmax(-1)) | np.where(np.signbit(x), 8, 0)
    return np.where(np.isnan(x), 7, code).astype(np.uint8)


def expected_fp4(x: torch.Tensor, gran_k: int, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, float32 scales) by definition, a group at a time."""
    x32 = x.cpu().float().numpy()
    rows, cols = x32.shape
    scales = np.zeros((rows, ceil_div(cols, gran_k)), np.float32)
    codes = np.zeros((rows, cols), np.uint8)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(*scales.shape):
            group = x32[i, j * gran_k : (j + 1) * gran_k]
            scale = np.maximum(np.abs(group).max(), np.float32(1e-4)) / np.float32(6)
            scales[i, j] = power_of_two_above(scale) if ue8m0 else scale
            codes[i, j * gran_k : (j + 1) * gran_k] = to_e2m1(group * (np.float32(1) / scales[i, j]))
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp4(device: str, dtype: torch.dtype, gran_k: int, scales: str) -> None:
    op = torch.ops.deep_gemm.per_token_cast_to_fp4
    for rows, cols in [(1, 2), (5, 130), (33, 272), (20, 1110)]:
        x = inputs(rows, cols, device, dtype, pad=cols % 3)
        if rows == 20:
            x[3, 5], x[4, 40], x[5, 600] = math.nan, math.inf, -math.inf
            x[6], x[7] = 0.0, -0.0
        options = {"gran_k": gran_k, **options_of(scales)}
        values, sf = op(x, **options)
        codes, expected = expected_fp4(x, gran_k, scales != "float32")
        assert values.dtype == torch.uint8
        assert values.is_contiguous()
        assert np.array_equal(values.cpu().numpy(), codes)
        if scales == "packed":
            words = sf.cpu().clone(memory_format=torch.contiguous_format)
            assert np.array_equal(words.numpy().view(np.uint8), packed_bytes(expected, 1))
        else:
            assert np.array_equal(sf.cpu().numpy(), expected, equal_nan=True)
        for out_dtype in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
            buffer = torch.full((rows, cols // 2 + 3), 0x5A, dtype=torch.uint8, device=device)
            out, out_sf = buffer.view(out_dtype)[:, 1 : cols // 2 + 1], like(sf, -1)
            assert op.out(x, **options, out=out, out_sf=out_sf) is None
            assert torch.equal(buffer[:, 1 : cols // 2 + 1], values)
            assert bool((buffer[:, [0, -2, -1]] == 0x5A).all()), "wrote outside of out"
            assert same_bits(out_sf, sf)


def test_fp4_rounds_to_nearest_even(device: str) -> None:
    """The numbers themselves, the midpoints, and their float32 neighbours."""
    points = torch.tensor(FP4_VALUES, dtype=torch.float32)
    points = torch.cat([points, (points[1:] + points[:-1]) / 2])
    points = torch.cat([points, *(torch.nextafter(points, torch.tensor(limit)) for limit in (1e9, -1e9))])
    points = torch.cat([points.clamp(-6, 6), -points.clamp(-6, 6)])
    rows = torch.nn.functional.pad(points, (0, -points.numel() % 31)).view(-1, 31)
    x = torch.cat([rows, torch.full((rows.shape[0], 1), 6.0)], 1).to(device)  # the scale is 1
    values, sf = deep_gemm_ops.per_token_cast_to_fp4(x)
    assert bool((sf == 1).all())
    codes = to_e2m1(x.cpu().numpy())
    assert np.array_equal(values.cpu().numpy(), codes[:, ::2] | codes[:, 1::2] << 4)


def test_fp4_round_trip(device: str) -> None:
    """Every number survives; any other is off by half a step, a quarter of itself or a quarter of the scale, at most."""
    exact = torch.tensor(np.concatenate([FP4_VALUES, -FP4_VALUES]), dtype=torch.float32).repeat(3, 2).to(device)
    assert torch.equal(fused_casts.reference_dequantize_fp4(*deep_gemm_ops.per_token_cast_to_fp4(exact)), exact)
    x = inputs(40, 512, device)
    for options in ({}, {"use_ue8m0": True}, {"use_packed_ue8m0": True}, {"gran_k": 128}):
        gran_k = options.get("gran_k", 32)
        values, sf = deep_gemm_ops.per_token_cast_to_fp4(x, **options)
        back = fused_casts.reference_dequantize_fp4(values.view(torch.float4_e2m1fn_x2), sf, gran_k, torch.float64)
        scale = fused_casts.reference.scales_to_float32(sf, 512 // gran_k).double().repeat_interleave(gran_k, 1)
        bound = torch.maximum(x.double().abs() / 4, scale / 4) * (1 + 1e-6)
        assert bool(((back - x.double()).abs() <= bound).all())


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU


def test_silu_is_accurate() -> None:
    """Against float64, over all BF16 numbers; what it is beyond +-86 is documented."""
    gates = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    gates = gates[gates.isfinite() & (gates.abs() <= 86)]
    exact = gates.double() / (1 + torch.exp(-gates.double()))
    error = (fused_casts.silu(gates).double() - exact).abs()
    # float32's subnormals are coarser than 1e-5 of themselves.
    assert bool((error <= 1e-5 * exact.abs() + 2.0**-149).all())
    assert torch.equal(fused_casts.silu(torch.tensor([87.0, 1e30, math.inf])), torch.tensor([87.0, 1e30, math.inf]))
    assert bool(fused_casts.silu(torch.tensor([math.nan])).isnan())


def test_fma_rounds_once() -> None:
    """Ties that a rounding to float64 in between would create, in both directions, and random numbers."""
    one = torch.ones(1)
    small = 2.0**-60
    for c, step in itertools.product((1.0, 1 + 2.0**-23), (small, -small)):
        # c + half a step of float32 + (or -) a little: the little decides.
        product = torch.tensor([2.0**-24]) * one
        exact = fused_casts._fma(torch.tensor([1 + step * 2**24], dtype=torch.float64).float(), product, c)
        assert torch.equal(exact, torch.tensor([c + 2.0**-24], dtype=torch.float64).float())
    a = (torch.randn(10_000, generator=generator(0)) * 3).float()
    b, c = torch.randn(10_000, generator=generator(1)), torch.randn(10_000, generator=generator(2))
    exact = [float(np.longdouble(x) * np.longdouble(y) + np.longdouble(z)) for x, y, z in zip(a, b, c)]
    assert torch.equal(fused_casts._fma(a, b, c), torch.tensor(np.array(exact, np.float32)))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("gran_k", [128, 32])
def test_swiglu(device: str, gran_k: int, scales: str) -> None:
    op = torch.ops.deep_gemm.swiglu_cast_to_fp8
    for (rows, hidden), clamp in itertools.product([(1, 1), (5, 129), (33, 272), (70, 256)], [None, 0.75]):
        x = inputs(rows, 2 * hidden, device, pad=hidden % 3)
        weights = torch.rand(rows, generator=generator(1)).to(device)
        options = {"gran_k": gran_k, "clamp": clamp, "topk_weights": weights, **options_of(scales)}
        values, sf = same_results(op, x, (), options, ("out", "out_sf"))
        gate, up = x.cpu().float().chunk(2, 1)
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        y = fused_casts.silu(gate.contiguous()) * up * weights.cpu()[:, None]
        assert_cast(values, sf, y, "per_token", scales, gran_k)


def test_swiglu_against_float64(device: str) -> None:
    """What it is for: the error against the exact function is that of the eight bits."""
    x = inputs(64, 2 * 512, device)
    weights = torch.rand(64, generator=generator(1)).to(device)
    for clamp in (None, 1.5):
        values, sf = deep_gemm_ops.swiglu_cast_to_fp8(x, topk_weights=weights, clamp=clamp)
        gate, up = x.double().chunk(2, 1)
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        exact = torch.nn.functional.silu(gate) * up * weights.double()[:, None]
        scale = sf.double().repeat_interleave(128, 1)[:, :512]
        error = (values.float().double() * scale - exact).abs()
        assert bool((error <= torch.maximum(exact.abs() / 16, scale * 2.0**-10) * (1 + 1e-5)).all())


def test_swiglu_without_weights_is_weight_one(device: str) -> None:
    x = inputs(20, 300, device)
    plain = deep_gemm_ops.swiglu_cast_to_fp8(x)
    ones = deep_gemm_ops.swiglu_cast_to_fp8(x, topk_weights=torch.ones(40, device=device)[::2], clamp=1e30)
    assert all(same_bits(a, b) for a, b in zip(plain, ones))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_swiglu_special_values(device: str, special: float) -> None:
    """NaN and Inf reach scale and values of their own group and of no other."""
    x = inputs(6, 512, device)
    clean_values, clean_sf = deep_gemm_ops.swiglu_cast_to_fp8(x)
    for row, column in ((1, 5), (2, 256 + 200)):
        spoiled = x.clone()
        spoiled[row, column] = special
        values, sf = deep_gemm_ops.swiglu_cast_to_fp8(spoiled)
        group = column % 256 // 128
        if math.isnan(special):
            assert bool(sf[row, group].isnan())
            assert bool((fp8_bytes(values)[row, group * 128 : group * 128 + 128] == 0x7F).all())
        elif special > 0 or column >= 256:  # silu(-inf) is -inf times the smallest sigmoid
            assert bool(sf[row, group].isinf())
        others = torch.ones(6, 2, dtype=torch.bool)
        others[row, group] = False
        assert torch.equal(sf.cpu()[others], clean_sf.cpu()[others])
        others = others.repeat_interleave(128, 1)
        assert torch.equal(fp8_bytes(values)[others], fp8_bytes(clean_values)[others])


def test_swiglu_backward(device: str) -> None:
    """Against float64's autograd: BF16's rounding and no more. Into strided memory: the same bits."""
    for rows, hidden in [(1, 1), (5, 129), (33, 272), (7, 1100)]:
        x, grad = inputs(rows, 2 * hidden, device, pad=hidden % 3), inputs(rows, hidden, device)
        weights = torch.rand(rows, generator=generator(1)).to(device)
        for given in (None, weights):
            wide = x.double().requires_grad_()
            factors = torch.ones_like(weights).double() if given is None else given.double()
            factors.requires_grad_()
            gate, up = wide.chunk(2, 1)
            exact = torch.nn.functional.silu(gate) * up * factors[:, None]
            exact.backward(grad.double())
            results = deep_gemm_ops.swiglu_backward(x, grad, given)
            assert [result.dtype for result in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
            for actual, want in zip(results[:2], (wide.grad, exact.detach())):
                # silu's slope has a zero near -1.28, beside which its terms' errors stay.
                bound = want.abs() * 2.0**-8 + 1e-4 * want.abs().amax(1, keepdim=True)
                assert bool(((actual.double() - want).abs() <= bound).all())
            magnitude = (grad.double() * exact / factors[:, None]).detach().abs().sum(1)
            assert bool(((results[2].double() - factors.grad).abs() <= 1e-4 * magnitude).all())
            buffer = torch.full((rows, 3 * hidden + 5), math.nan, dtype=torch.bfloat16, device=device)
            outs = buffer[:, 1 : 2 * hidden + 1], buffer[:, 2 * hidden + 2 : 3 * hidden + 2], like(results[2], -1)
            assert deep_gemm_ops.swiglu_backward(x, grad, given, out=outs) is outs
            assert all(same_bits(a, b) for a, b in zip(outs, results, strict=True))
            assert bool(buffer[:, [0, 2 * hidden + 1, -1, -2, -3]].isnan().all()), "wrote outside of out"


# ---------------------------------------------------------------------------------------------------------------------
# With a transposed copy


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["per_token", "per_block"])
def test_with_transpose(device: str, kind: str, dtype: torch.dtype, scales: str) -> None:
    op = getattr(torch.ops.deep_gemm, f"{kind}_cast_to_fp8_with_transpose")
    for rows, cols in [(1, 1), (3, 128), (130, 257), (600, 131)]:
        x = inputs(rows, cols, device, dtype, pad=cols % 3)
        names = ("out", "out_sf", "out_t", "out_t_sf")
        values, sf, values_t, sf_t = same_results(op, x, (), options_of(scales), names)
        assert_cast(values, sf, x, kind, scales)
        assert_cast(values_t, sf_t, x.t(), kind, scales)
        assert values_t.stride() == (ceil_div(rows, 16) * 16, 1)
        if kind == "per_block":
            assert same_bits(values_t, values.t())
        alone = "per_channel" if kind == "per_token" else kind
        op_alone = getattr(torch.ops.deep_gemm, f"{alone}_cast_to_fp8_transposed")
        results = same_results(op_alone, x, (), options_of(scales), ("out", "out_sf"))
        for actual, expected in zip(results, (values_t, sf_t), strict=True):
            assert same_bits(actual, expected)
            assert actual.stride() == expected.stride()


def test_transposed_copies_are_operands(device: str) -> None:
    """The weight gradient of a linear layer from the transposed copies, for a number of tokens that nothing divides."""
    x, grad = inputs(301, 272, device), inputs(301, 144, device)
    x_t, x_sf = deep_gemm_ops.per_channel_cast_to_fp8_transposed(x)
    _, _, grad_t, grad_sf = deep_gemm_ops.per_token_cast_to_fp8_with_transpose(grad)
    actual = deep_gemm_ops.fp8_gemm_nt(grad_t, grad_sf, x_t, x_sf, out_dtype=torch.float32)
    a, sfa = deep_gemm_ops.per_channel_cast_to_fp8(grad)
    b, sfb = deep_gemm_ops.per_channel_cast_to_fp8(x)
    assert same_bits(actual, deep_gemm_ops.fp8_gemm_tn(a, sfa, b, sfb, out_dtype=torch.float32))
    exact = grad.double().t() @ x.double()
    assert float((actual.double() - exact).norm() / exact.norm()) < 0.06

    w = inputs(144, 272, device)
    w_t, w_sf = deep_gemm_ops.per_block_cast_to_fp8_transposed(w)
    g, g_sf = deep_gemm_ops.per_token_cast_to_fp8(grad)
    exact = grad.double() @ w.double()
    actual = deep_gemm_ops.fp8_gemm_nt(g, g_sf, deep_gemm_ops.to_tma_aligned(w_t), w_sf)
    assert float((actual.double() - exact).norm() / exact.norm()) < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# K groups


def ends_of(sizes: list[int], layout: str) -> list[int]:
    """``ks`` of groups of these sizes, and the rows they take."""
    if layout == "sizes":
        return sizes
    ends, end = [], 0
    for size in sizes:
        end = (ceil_div(end, 128) * 128 if layout == "psum" else end) + size
        ends.append(end)
    return ends


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("layout", ["sizes", "psum", "offsets"])
def test_k_groups(device: str, layout: str, ue8m0: bool) -> None:
    for sizes, mn, spare in [
        ([300], 40, 0),
        ([128, 0, 5, 130, 1], 77, 0),
        ([0, 0], 8, 140),
        ([], 16, 50),
        ([7] * 50, 24, 3),
    ]:
        ends = ends_of(sizes, layout)
        starts = (
            [0, *itertools.accumulate(sizes)][: len(sizes)]
            if layout != "psum"
            else [e - s for e, s in zip(ends, sizes)]
        )
        rows = max([start + size for start, size in zip(starts, sizes)], default=0) + spare
        x = inputs(rows, mn, device, pad=mn % 2)
        if rows > 131:
            x[130, 3] = math.nan  # in a block that is not full: its padding is zero all the same
        ks = torch.tensor(ends, dtype=torch.int32, device=device)
        options = {"layout": layout, "use_ue8m0": ue8m0}
        ops = torch.ops.deep_gemm
        values, sf = same_results(ops.k_grouped_per_channel_cast_to_fp8, x, (ks,), options, ("out", "out_sf"))
        values_t, sf_t = same_results(
            ops.k_grouped_per_channel_cast_to_fp8_k_major, x, (ks,), options, ("out", "out_sf")
        )
        total = rows // 128 + len(sizes)
        assert values.shape == (rows, mn)
        assert sf.shape == sf_t.shape == (total, mn)
        assert sf.stride() == sf_t.stride() == (ceil_div(mn, 4) * 4, 1)
        assert values_t.shape == (mn, 128 * total)
        assert np.array_equal(sf.cpu().numpy(), sf_t.cpu().numpy(), equal_nan=True)
        expected, expected_sf = np.zeros((rows, mn), np.uint8), np.zeros((total, mn), np.float32)
        expected_t = np.zeros((mn, 128 * total), np.uint8)
        block = 0
        for start, size in zip(starts, sizes):
            codes, group_sf = expected_cast(x[start : start + size], "per_channel", 128, ue8m0)
            expected[start : start + size] = codes
            expected_t[:, 128 * block : 128 * block + size] = codes.T
            expected_sf[block : block + len(group_sf)] = group_sf
            block += len(group_sf)
        assert np.array_equal(fp8_bytes(values).numpy(), expected), sizes
        assert np.array_equal(fp8_bytes(values_t).numpy(), expected_t), sizes
        assert np.array_equal(sf.cpu().numpy(), expected_sf, equal_nan=True), sizes


def test_group_ranges_are_clamped() -> None:
    assert group_ranges([3, -1, 9, 4], 10, "sizes", 128) == [(0, 3), (3, 3), (3, 10), (10, 10)]
    assert group_ranges([3, -1, 9, 14], 10, "offsets", 128) == [(0, 3), (3, 3), (3, 9), (9, 10)]
    assert group_ranges([3, 5, 12, 99], 20, "psum", 4) == [(0, 3), (4, 5), (8, 12), (12, 20)]


@pytest.mark.parametrize("layout", ["sizes", "psum", "offsets"])
def test_k_groups_that_make_no_sense(device: str, layout: str) -> None:
    """Garbage on the device gives the reference's clamped groups and touches nothing else."""
    x = inputs(400, 72, device)
    for ks in ([-5, 1 << 30, 7], [2**31 - 1, -(2**31), 100], [300, 200, 350, 10], [400, 400, 401]):
        of_groups = torch.tensor(ks, dtype=torch.int32, device=device)
        for name in ("k_grouped_per_channel_cast_to_fp8", "k_grouped_per_channel_cast_to_fp8_k_major"):
            actual = getattr(deep_gemm_ops, name)(x, of_groups, layout=layout)
            expected = getattr(fused_casts, f"reference_{name}")(x.cpu(), of_groups.cpu(), layout=layout)
            assert same_bits(actual[1], expected[1])
            assert torch.equal(fp8_bytes(actual[0]), fp8_bytes(expected[0]))


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


def every_cast(x: torch.Tensor, weights: torch.Tensor, ks: torch.Tensor) -> list[torch.Tensor]:
    results = [
        *deep_gemm_ops.per_token_cast_to_fp4(x),
        *deep_gemm_ops.swiglu_backward(x, x[:, : x.shape[1] // 2], weights),
        *deep_gemm_ops.swiglu_cast_to_fp8(x, topk_weights=weights, clamp=2.0),
        *deep_gemm_ops.per_token_cast_to_fp8_with_transpose(x, use_packed_ue8m0=True),
        *deep_gemm_ops.per_block_cast_to_fp8_with_transpose(x),
        *deep_gemm_ops.per_channel_cast_to_fp8_transposed(x),
        *deep_gemm_ops.per_block_cast_to_fp8_transposed(x, use_packed_ue8m0=True),
    ]
    for layout in fused_casts.K_LAYOUTS:
        results += deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x, ks, layout=layout)
        results += deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(x, ks, layout=layout)
    return results


def more_of(name: str, x: torch.Tensor, ks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a cast takes beside ``x``."""
    if name == "swiglu_backward":
        return (x.detach()[:, : x.shape[1] // 2],)
    return (ks,) if name.startswith("k_grouped") else ()


def test_capture_and_replay(cuda: str) -> None:
    """A graph replays on new contents of the same memory, group sizes included; nothing waits for the device."""
    x, weights = inputs(300, 272, cuda), torch.rand(300, device=cuda)
    ks = torch.tensor([100, 0, 200], dtype=torch.int32, device=cuda)
    every_cast(x, weights, ks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = every_cast(x, weights, ks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed, sizes in enumerate([[10, 128, 162], [0, 300, 0], [5, 90, 300]]):
        torch.manual_seed(seed)
        x.normal_()
        weights.uniform_()
        ks.copy_(torch.tensor(sizes, dtype=torch.int32))
        for result in captured:
            result.view(torch.uint8).fill_(0x7F) if result.element_size() == 1 else result.fill_(-1)
        graph.replay()
        for actual, expected in zip(captured, every_cast(x, weights, ks), strict=True):
            assert same_bits(actual, expected), sizes


@pytest.mark.parametrize(("rows", "cols"), [(4096, 7168), (8193, 2056)])
def test_large_matrices_equal_the_reference(cuda: str, rows: int, cols: int) -> None:
    """Many tiles, to the bit, against the reference on the GPU."""
    x, weights = inputs(rows, cols, cuda), torch.rand(rows, device=cuda)
    ks = torch.tensor([rows // 3, 0, rows // 2, 77], dtype=torch.int32, device=cuda)
    for name in fused_casts.__all__:
        more = more_of(name, x, ks)
        options = {"topk_weights": weights} if name == "swiglu_cast_to_fp8" else {}
        actual = getattr(deep_gemm_ops, name)(x, *more, **options)
        expected = getattr(fused_casts, f"reference_{name}")(x, *more, **options)
        assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)), name


# ---------------------------------------------------------------------------------------------------------------------
# Empty matrices, tracers, bad input


def test_empty(device: str) -> None:
    for rows, cols in [(0, 0), (0, 64), (64, 0)]:
        x = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
        values, sf = deep_gemm_ops.per_token_cast_to_fp4(x)
        assert (values.shape, sf.shape) == ((rows, cols // 2), (rows, ceil_div(cols, 32)))
        values, sf = deep_gemm_ops.swiglu_cast_to_fp8(x)
        assert (values.shape, sf.shape) == ((rows, cols // 2), (rows, ceil_div(cols // 2, 128)))
        grad_x, hidden, sums = deep_gemm_ops.swiglu_backward(x, x[:, : cols // 2])
        assert (grad_x.shape, hidden.shape, sums.shape) == ((rows, cols), (rows, cols // 2), (rows,))
        assert not bool(sums.any())
        for kind in ("per_token", "per_block"):
            _, _, values_t, sf_t = getattr(deep_gemm_ops, f"{kind}_cast_to_fp8_with_transpose")(x)
            assert values_t.shape == (cols, rows)
            assert sf_t.shape[1] == ceil_div(rows, 128)
        for kind in fused_casts.TRANSPOSED_ALONE:
            values_t, sf_t = getattr(deep_gemm_ops, f"{kind}_cast_to_fp8_transposed")(x)
            assert (values_t.shape, sf_t.shape[1]) == ((cols, rows), ceil_div(rows, 128))
        ks = torch.zeros(3, dtype=torch.int32, device=device)
        values, sf = deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(x, ks)
        assert (values.shape, sf.shape) == ((rows, cols), (rows // 128 + 3, cols))
        values, sf = deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(x, ks)
        assert values.shape == (cols, 128 * (rows // 128 + 3))
        assert not bool(fp8_bytes(values).any())
        assert not bool(sf.any())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_tokens(device: str, backend: str) -> None:
    """An expert's middle and the operands of its weight gradient, for any number of tokens, compiled once."""
    w, w_sf = deep_gemm_ops.per_block_cast_to_fp8(inputs(96, 272, device))

    def step(x: torch.Tensor, weights: torch.Tensor, ks: torch.Tensor) -> list[torch.Tensor]:
        a, sfa = deep_gemm_ops.swiglu_cast_to_fp8(x * 2, topk_weights=weights, clamp=7.0)
        y = deep_gemm_ops.fp8_gemm_nt(a, sfa, w, w_sf)
        values, sf, values_t, sf_t = deep_gemm_ops.per_token_cast_to_fp8_with_transpose(y)
        grad = deep_gemm_ops.fp8_gemm_nt(values_t, sf_t, values_t, sf_t, out_dtype=torch.float32)
        product = deep_gemm_ops.fp8_gemm_nt(values, sf, values[:0], sf[:0], recipe=[1, 1, 128])
        grouped, group_sf = deep_gemm_ops.k_grouped_per_channel_cast_to_fp8(y, ks)
        padded, padded_sf = deep_gemm_ops.k_grouped_per_channel_cast_to_fp8_k_major(y, ks)
        four, four_sf = deep_gemm_ops.per_token_cast_to_fp4(y)
        block = deep_gemm_ops.per_block_cast_to_fp8_with_transpose(y)
        channel, channel_sf = deep_gemm_ops.per_channel_cast_to_fp8_transposed(y)
        return [
            grad,
            product,
            grouped.float(),
            group_sf * 1,
            padded.float(),
            padded_sf * 1,
            block[2].float(),
            channel.float(),
            channel_sf * 1,
            four + 1,
            four_sf * 1,
        ]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    ks = torch.tensor([5, 0, 100], dtype=torch.int32, device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (130, 161, 300):
            x, weights = inputs(m, 2 * 272, device), torch.rand(m, generator=generator(m)).to(device)
            for actual, expected in zip(compiled(x, weights, ks), step(x, weights, ks), strict=True):
                assert actual.stride() == expected.stride()
                assert same_bits(actual, expected)
    torch._dynamo.reset()


def test_export_with_dynamic_tokens(device: str) -> None:
    class Middle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values, sf = deep_gemm_ops.swiglu_cast_to_fp8(x, clamp=7.0)
            return deep_gemm_ops.fp8_gemm_nt(values, sf, values, sf)

    program = export(Middle(), (inputs(20, 512, device),), dynamic_shapes=({0: Dim("tokens")},))
    for m in (2, 33, 200):
        x = inputs(m, 512, device)
        assert same_bits(program.module()(x), Middle()(x))


def test_gradients_are_refused() -> None:
    x = torch.zeros(4, 128, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.zeros(4, requires_grad=True)
    ks = torch.zeros(1, dtype=torch.int32)
    for name in fused_casts.__all__:
        with pytest.raises(RuntimeError, match=rf"{name}: x has requires_grad True, expected False"):
            getattr(deep_gemm_ops, name)(x, *more_of(name, x, ks))
    with pytest.raises(RuntimeError, match="swiglu_backward: row_weights has requires_grad True"):
        deep_gemm_ops.swiglu_backward(x.detach(), x.detach()[:, :64], weights)
    with pytest.raises(RuntimeError, match="swiglu_cast_to_fp8: topk_weights has requires_grad True"):
        deep_gemm_ops.swiglu_cast_to_fp8(x.detach(), topk_weights=weights)


def test_public_functions_write_to_out(device: str) -> None:
    x, ks = inputs(40, 256, device), torch.tensor([10, 30], dtype=torch.int32, device=device)
    for name in fused_casts.__all__:
        function, more = getattr(deep_gemm_ops, name), more_of(name, x, ks)
        expected = function(x, *more)
        outs = tuple(torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=device) for r in expected)
        assert function(x, *more, out=outs) is outs
        assert all(same_bits(a, b) for a, b in zip(outs, expected))


def test_bad_swiglu(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        return {
            "x": torch.zeros(33, 544, dtype=torch.bfloat16, device=device),
            "topk_weights": torch.ones(33, device=device),
            "out": torch.empty(33, 272, dtype=FP8, device=device),
            "out_sf": torch.empty_strided((33, 3), (1, 36), device=device),
        }

    changes = {
        "float32": changed(x=lambda p: p["x"].float()),
        "rank 1": changed(x=lambda p: p["x"][0]),
        "odd": changed(x=lambda p: p["x"][:, :543]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "weights of bfloat16": changed(topk_weights=lambda p: p["topk_weights"].bfloat16()),
        "weights of another number": changed(topk_weights=lambda p: p["topk_weights"][:32]),
        "weights of rank 2": changed(topk_weights=lambda p: p["topk_weights"][:, None]),
        "clamp 0": lambda p: {**p, "clamp": 0.0},
        "clamp negative": lambda p: {**p, "clamp": -1.5},
        "clamp NaN": lambda p: {**p, "clamp": math.nan},
        "gran_k 64": lambda p: {**p, "gran_k": 64},
        "out of the width of x": changed(out=lambda p: torch.empty(33, 544, dtype=FP8, device=device)),
        "out of uint8": changed(out=lambda p: p["out"].view(torch.uint8)),
        "out transposed": changed(out=lambda p: torch.empty(272, 33, dtype=FP8, device=device).t()),
        "out_sf K-major": changed(out_sf=lambda p: p["out_sf"].contiguous()),
        "out_sf for packed scales": lambda p: {**p, "use_packed_ue8m0": True},
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.swiglu_cast_to_fp8.out, base, changes),
        """\
float32: swiglu_cast_to_fp8: x has dtype float32, expected bfloat16
rank 1: swiglu_cast_to_fp8: x has rank 1, expected 2
odd: swiglu_cast_to_fp8: x has 2 * H 543, expected an even number
strided: swiglu_cast_to_fp8: x has inner stride 33, expected 1 (use deep_gemm_ops.to_tma_aligned)
weights of bfloat16: swiglu_cast_to_fp8: topk_weights has dtype bfloat16, expected float32
weights of another number: swiglu_cast_to_fp8: topk_weights has shape [32], expected [M] = [33]
weights of rank 2: swiglu_cast_to_fp8: topk_weights has shape [33, 1], expected [M] = [33]
clamp 0: swiglu_cast_to_fp8: clamp has value 0.0, expected a positive number
clamp negative: swiglu_cast_to_fp8: clamp has value -1.5, expected a positive number
clamp NaN: swiglu_cast_to_fp8: clamp has value nan, expected a positive number
gran_k 64: swiglu_cast_to_fp8: gran_k has value 64, expected 128 or 32
out of the width of x: swiglu_cast_to_fp8: out has shape [33, 544], expected [M, H] = [33, 272]
out of uint8: swiglu_cast_to_fp8: out has dtype uint8, expected float8_e4m3fn
out transposed: swiglu_cast_to_fp8: out has inner stride 33, expected 1
out_sf K-major: swiglu_cast_to_fp8: out_sf has strides [3, 1], expected [1, 36] (MN-major, 16-byte aligned)
out_sf for packed scales: swiglu_cast_to_fp8: out_sf has dtype float32, expected int32""",
    )


def test_bad_fp4(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        return {
            "x": torch.zeros(33, 272, dtype=torch.bfloat16, device=device),
            "out": torch.empty(33, 136, dtype=torch.uint8, device=device),
            "out_sf": torch.empty_strided((33, 9), (1, 36), device=device),
        }

    changes = {
        "float64": changed(x=lambda p: p["x"].double()),
        "rank 3": changed(x=lambda p: p["x"][None]),
        "odd": changed(x=lambda p: p["x"][:, :271]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "gran_k 16": lambda p: {**p, "gran_k": 16},
        "out of int32": changed(out=lambda p: p["out"].to(torch.int32)),
        "out of the width of x": changed(out=lambda p: torch.empty(33, 272, dtype=torch.uint8, device=device)),
        "out_sf of gran_k 128": changed(out_sf=lambda p: p["out_sf"][:, :3]),
        "out_sf for packed scales": lambda p: {**p, "use_packed_ue8m0": True},
    }
    lines = messages(torch.ops.deep_gemm.per_token_cast_to_fp4.out, base, changes)
    assert_expected_inline(
        lines,
        """\
float64: per_token_cast_to_fp4: x has dtype float64, expected bfloat16, float16 or float32
rank 3: per_token_cast_to_fp4: x has rank 3, expected 2
odd: per_token_cast_to_fp4: x has K 271, expected an even number
strided: per_token_cast_to_fp4: x has inner stride 33, expected 1 (use deep_gemm_ops.to_tma_aligned)
gran_k 16: per_token_cast_to_fp4: gran_k has value 16, expected 128 or 32
out of int32: per_token_cast_to_fp4: out has dtype int32, expected uint8, int8 or float4_e2m1fn_x2
out of the width of x: per_token_cast_to_fp4: out has shape [33, 272], expected [M, K / 2] = [33, 136]
out_sf of gran_k 128: per_token_cast_to_fp4: out_sf has shape [33, 3], expected the shape of the scales = [33, 9]
out_sf for packed scales: per_token_cast_to_fp4: out_sf has dtype float32, expected int32""",
    )


def test_bad_transposed(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        return {
            "x": torch.zeros(33, 272, dtype=torch.bfloat16, device=device),
            "out": torch.empty(33, 272, dtype=FP8, device=device),
            "out_sf": torch.empty_strided((33, 3), (1, 36), device=device),
            "out_t": torch.empty(272, 33, dtype=FP8, device=device),
            "out_t_sf": torch.empty_strided((272, 1), (1, 272), device=device),
        }

    changes = {
        "float64": changed(x=lambda p: p["x"].double()),
        "rank 3": changed(x=lambda p: p["x"][None]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "out of another shape": changed(out=lambda p: p["out"][:32]),
        "out_sf of another shape": changed(out_sf=lambda p: p["out_sf"][:, :2]),
        "out_t not transposed": changed(out_t=lambda p: p["out"].clone()),
        "out_t strided": changed(out_t=lambda p: torch.empty(33, 272, dtype=FP8, device=device).t()),
        "out_t with overlapping rows": changed(out_t=lambda p: p["out_t"][:1].expand(272, 33)),
        "out_t_sf of another shape": changed(out_t_sf=lambda p: p["out_sf"]),
        "out_t_sf of int32": changed(out_t_sf=lambda p: p["out_t_sf"].to(torch.int32)),
    }
    op = torch.ops.deep_gemm.per_token_cast_to_fp8_with_transpose
    assert_expected_inline(
        messages(op.out, base, changes),
        """\
float64: per_token_cast_to_fp8_with_transpose: x has dtype float64, expected bfloat16, float16 or float32
rank 3: per_token_cast_to_fp8_with_transpose: x has rank 3, expected 2
strided: per_token_cast_to_fp8_with_transpose: x has inner stride 33, expected 1 (use deep_gemm_ops.to_tma_aligned)
out of another shape: per_token_cast_to_fp8_with_transpose: out has shape [32, 272], expected the shape of x = [33, 272]
out_sf of another shape: per_token_cast_to_fp8_with_transpose: out_sf has shape [33, 2], expected the shape of the scales = [33, 3]
out_t not transposed: per_token_cast_to_fp8_with_transpose: out_t has shape [33, 272], expected the shape of x.t() = [272, 33]
out_t strided: per_token_cast_to_fp8_with_transpose: out_t has inner stride 272, expected 1
out_t with overlapping rows: per_token_cast_to_fp8_with_transpose: out_t has row stride 0, expected at least 33
out_t_sf of another shape: per_token_cast_to_fp8_with_transpose: out_t_sf has shape [33, 3], expected the shape of the scales = [272, 1]
out_t_sf of int32: per_token_cast_to_fp8_with_transpose: out_t_sf has dtype int32, expected float32""",
    )
    packed = {"packed": lambda p: {**p, "use_packed_ue8m0": True}}

    def arguments() -> dict[str, Any]:
        out_sf, out_t_sf = (torch.empty_strided(s, (1, 4), device=device) for s in ((1, 3), (3, 1)))
        return {**base(), "out_sf": out_sf, "out_t_sf": out_t_sf}

    op = torch.ops.deep_gemm.per_block_cast_to_fp8_with_transpose
    assert_expected_inline(
        messages(op.out, arguments, packed),
        """packed: per_block_cast_to_fp8_with_transpose: out_sf has dtype float32, expected int32""",
    )


def test_bad_transposed_alone(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        return {
            "x": torch.zeros(33, 272, dtype=torch.bfloat16, device=device),
            "out": torch.empty(272, 33, dtype=FP8, device=device),
            "out_sf": torch.empty_strided((272, 1), (1, 272), device=device),
        }

    changes = {
        "float64": changed(x=lambda p: p["x"].double()),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "out not transposed": changed(out=lambda p: torch.empty(33, 272, dtype=FP8, device=device)),
        "out strided": changed(out=lambda p: torch.empty(33, 272, dtype=FP8, device=device).t()),
        "out_sf of x": changed(out_sf=lambda p: torch.empty_strided((33, 3), (1, 36), device=device)),
        "packed": lambda p: {**p, "use_packed_ue8m0": True},
    }
    ops = torch.ops.deep_gemm
    assert_expected_inline(
        messages(ops.per_channel_cast_to_fp8_transposed.out, base, changes),
        """\
float64: per_channel_cast_to_fp8_transposed: x has dtype float64, expected bfloat16, float16 or float32
strided: per_channel_cast_to_fp8_transposed: x has inner stride 33, expected 1 (use deep_gemm_ops.to_tma_aligned)
out not transposed: per_channel_cast_to_fp8_transposed: out has shape [33, 272], expected the shape of x.t() = [272, 33]
out strided: per_channel_cast_to_fp8_transposed: out has inner stride 272, expected 1
out_sf of x: per_channel_cast_to_fp8_transposed: out_sf has shape [33, 3], expected the shape of the scales = [272, 1]
packed: per_channel_cast_to_fp8_transposed: out_sf has dtype float32, expected int32""",
    )
    arguments = lambda: {**base(), "out_sf": torch.empty_strided((3, 1), (1, 4), device=device)}  # noqa: E731
    changes = {"out_sf per channel": changed(out_sf=lambda p: base()["out_sf"])}
    assert_expected_inline(
        messages(ops.per_block_cast_to_fp8_transposed.out, arguments, changes),
        """out_sf per channel: per_block_cast_to_fp8_transposed: out_sf has shape [272, 1], expected the shape of the scales = [3, 1]""",
    )


def test_bad_swiglu_backward(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        matrices = {
            name: torch.zeros(33, n, dtype=torch.bfloat16, device=device) for name, n in (("x", 544), ("out", 544))
        }
        matrices |= {name: matrices["x"][:, :272].contiguous() for name in ("grad", "out_weighted")}
        return matrices | {name: torch.ones(33, device=device) for name in ("row_weights", "out_row_weights")}

    changes = {
        "float32": changed(x=lambda p: p["x"].float()),
        "odd": changed(x=lambda p: p["x"][:, :543]),
        "grad of float32": changed(grad=lambda p: p["grad"].float()),
        "grad as x": changed(grad=lambda p: p["x"]),
        "grad strided": changed(grad=lambda p: p["grad"].t().contiguous().t()),
        "weights of another number": changed(row_weights=lambda p: p["row_weights"][:32]),
        "out narrow": changed(out=lambda p: p["grad"]),
        "out_weighted of float32": changed(out_weighted=lambda p: p["out_weighted"].float()),
        "out_row_weights strided": changed(out_row_weights=lambda p: torch.ones(66, device=device)[::2]),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.swiglu_backward.out, base, changes),
        """\
float32: swiglu_backward: x has dtype float32, expected bfloat16
odd: swiglu_backward: x has 2 * H 543, expected an even number
grad of float32: swiglu_backward: grad has dtype float32, expected bfloat16
grad as x: swiglu_backward: grad has shape [33, 544], expected [M, H] = [33, 272]
grad strided: swiglu_backward: grad has inner stride 33, expected 1 (use deep_gemm_ops.to_tma_aligned)
weights of another number: swiglu_backward: row_weights has shape [32], expected [M] = [33]
out narrow: swiglu_backward: out has shape [33, 272], expected [M, 2 * H] = [33, 544]
out_weighted of float32: swiglu_backward: out_weighted has dtype float32, expected bfloat16
out_row_weights strided: swiglu_backward: out_row_weights has inner stride 2, expected 1""",
    )


def test_bad_k_groups(bad_input_device: str) -> None:  # noqa: F811
    device = bad_input_device

    def base() -> dict[str, Any]:
        return {
            "x": torch.zeros(300, 40, dtype=torch.bfloat16, device=device),
            "ks": torch.zeros(2, dtype=torch.int32, device=device),
            "out": torch.empty(300, 40, dtype=FP8, device=device),
            "out_sf": torch.empty(4, 40, device=device),
        }

    changes = {
        "float32": changed(x=lambda p: p["x"].float()),
        "rank 3": changed(x=lambda p: p["x"][None]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "ks of int64": changed(ks=lambda p: p["ks"].long()),
        "ks of rank 2": changed(ks=lambda p: p["ks"][None]),
        "layout": lambda p: {**p, "layout": "indices"},
        "out of another shape": changed(out=lambda p: p["out"][:299]),
        "out_sf of another number of groups": changed(out_sf=lambda p: p["out_sf"][:3]),
        "out_sf transposed": changed(out_sf=lambda p: torch.empty(40, 4, device=device).t()),
    }
    ops = torch.ops.deep_gemm
    lines = messages(ops.k_grouped_per_channel_cast_to_fp8.out, base, changes)
    assert_expected_inline(
        lines,
        """\
float32: k_grouped_per_channel_cast_to_fp8: x has dtype float32, expected bfloat16
rank 3: k_grouped_per_channel_cast_to_fp8: x has rank 3, expected 2
strided: k_grouped_per_channel_cast_to_fp8: x has inner stride 300, expected 1 (use deep_gemm_ops.to_tma_aligned)
ks of int64: k_grouped_per_channel_cast_to_fp8: ks has dtype int64, expected int32
ks of rank 2: k_grouped_per_channel_cast_to_fp8: ks has rank 2, expected 1
layout: k_grouped_per_channel_cast_to_fp8: layout has value indices, expected sizes, psum or offsets
out of another shape: k_grouped_per_channel_cast_to_fp8: out has shape [299, 40], expected the shape of the values = [300, 40]
out_sf of another number of groups: k_grouped_per_channel_cast_to_fp8: out_sf has shape [3, 40], expected the shape of the scales = [4, 40]
out_sf transposed: k_grouped_per_channel_cast_to_fp8: out_sf has strides [1, 4], expected [40, 1] (MN-major, 16-byte aligned)""",
    )
    arguments = lambda: {**base(), "out": torch.empty(40, 512, dtype=FP8, device=device)}  # noqa: E731
    k_major = {"out not padded": changed(out=lambda p: p["out"][:, :300])}
    op = ops.k_grouped_per_channel_cast_to_fp8_k_major
    assert_expected_inline(
        messages(op.out, arguments, k_major),
        """out not padded: k_grouped_per_channel_cast_to_fp8_k_major: out has shape [40, 300], expected the shape of the values = [40, 512]""",
    )
