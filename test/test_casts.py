"""Casts to FP8, bit for bit, against an implementation in NumPy that works group by group from the definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import deep_gemm_ops

from common import FP8, ceil_div, fp8_bytes, generator, like, same_bits

KINDS = ("per_token", "per_channel", "per_block")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def e4m3_values() -> np.ndarray:
    """The non-negative finite float8_e4m3fn numbers, by code."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 to codes: nearest, ties to the even code, saturating; NaN is 0x7F."""
    values = e4m3_values()
    middles = (values[:-1] + values[1:]) / 2
    magnitude = np.abs(x.astype(np.float64))
    code = np.searchsorted(middles, magnitude, side="left")
    tie = (code < len(middles)) & (magnitude == middles[np.minimum(code, len(middles) - 1)])
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    code = np.where(np.signbit(x), code | 0x80, code)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def power_of_two_above(x: np.float32) -> np.float32:
    if not np.isfinite(x):
        return x
    mantissa, exponent = math.frexp(float(x))
    return np.float32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def expected_cast(x: torch.Tensor, kind: str, gran_k: int, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes, float32 scales) by definition."""
    x32 = x.detach().cpu().float().numpy()
    group_rows, group_cols = {"per_token": (1, gran_k), "per_channel": (gran_k, 1), "per_block": (128, gran_k)}[kind]
    rows, cols = x32.shape
    scales = np.zeros((ceil_div(rows, group_rows), ceil_div(cols, group_cols)), np.float32)
    codes = np.zeros((rows, cols), np.uint8)
    with np.errstate(all="ignore"):
        for i, j in np.ndindex(*scales.shape):
            block = slice(i * group_rows, (i + 1) * group_rows), slice(j * group_cols, (j + 1) * group_cols)
            group = x32[block]
            scale = np.maximum(np.abs(group).max(), np.float32(1e-4)) / np.float32(448)
            scales[i, j] = power_of_two_above(scale) if ue8m0 else scale
            codes[block] = to_e4m3(group * (np.float32(1) / scales[i, j]))
    return codes, scales


def packed_bytes(scales: np.ndarray, axis: int) -> np.ndarray:
    """UE8M0 codes padded with 0 to a multiple of four along ``axis``."""
    codes = np.array([[int(math.frexp(float(s))[1]) + 126 if np.isfinite(s) else 255 for s in row] for row in scales])
    codes = codes.reshape(scales.shape).astype(np.uint8)
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, -scales.shape[axis] % 4)
    return np.pad(codes, padding)


@dataclasses.dataclass(frozen=True)
class CastCase:
    rows: int
    cols: int
    kind: str = "per_token"
    gran_k: int = 128
    dtype: str = "bfloat16"
    scales: str = "float32"  # float32, ue8m0, packed
    special: str = ""  # "", nan, inf, zero, tiny, huge
    pad: int = 0
    out: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def repro(self) -> str:
        return f'PYTHONPATH=python python test/test_casts.py "{self}"'

    def input(self) -> torch.Tensor:
        random = generator(self.seed)
        x = torch.randn(self.rows, self.cols + self.pad, generator=random)
        x *= torch.pow(2.0, torch.randint(-12, 12, (self.rows, 1), generator=random).float())
        if self.special == "zero":
            x.zero_()
            x[::2] = -0.0
        elif self.special == "tiny":
            x *= 1e-30
        elif self.special == "huge":
            x = x.clamp(-1, 1) * (6e4 if self.dtype == "float16" else 3e38)
        elif self.special in ("nan", "inf") and x.numel():
            places = torch.randint(x[:, : self.cols].numel(), (3,), generator=random)
            for place in places.tolist():
                x[place // self.cols, place % self.cols] = math.nan if self.special == "nan" else -math.inf
        x[:, self.cols :] = math.nan
        return x.to(getattr(torch, self.dtype)).to(self.device)[:, : self.cols]

    def run(self) -> None:
        op = getattr(torch.ops.deep_gemm, f"{self.kind}_cast_to_fp8")
        x = self.input()
        options = {
            "gran_k": self.gran_k,
            "use_ue8m0": self.scales == "ue8m0",
            "use_packed_ue8m0": self.scales == "packed",
        }
        values, sf = op(x, **options)
        if self.out:
            buffer = torch.full((self.rows + 2, self.cols + 7), math.nan, device=self.device).to(FP8)
            out = buffer[1 : self.rows + 1, 3 : self.cols + 3]
            out_sf = like(sf, -1)
            assert op.out(x, **options, out=out, out_sf=out_sf) is None
            assert same_bits(out, values), f"values of .out differ\nreproduce with: {self.repro}"
            assert same_bits(out_sf, sf), f"scales of .out differ\nreproduce with: {self.repro}"
            around = torch.ones(buffer.shape, dtype=torch.bool)
            around[1 : self.rows + 1, 3 : self.cols + 3] = False
            assert bool((fp8_bytes(buffer)[around] == 0x7F).all()), (
                f"wrote outside of out\nreproduce with: {self.repro}"
            )

        codes, scales = expected_cast(x, self.kind, self.gran_k, self.scales != "float32")
        assert values.dtype == FP8
        assert values.is_contiguous()
        wrong = np.argwhere(fp8_bytes(values).numpy() != codes)
        assert len(wrong) == 0, f"{len(wrong)} values differ, first at {wrong[0]}\nreproduce with: {self.repro}"
        k_axis = 0 if self.kind == "per_channel" else 1
        if self.scales == "packed":
            assert sf.dtype == torch.int32
            along_k_last = sf.cpu().movedim(k_axis, 1).clone(memory_format=torch.contiguous_format).numpy()
            empty = np.zeros((along_k_last.shape[0], 4 * along_k_last.shape[1]), np.uint8)
            actual = along_k_last.view(np.uint8) if along_k_last.size else empty
            expected = np.moveaxis(packed_bytes(scales, k_axis), k_axis, 1)
        else:
            assert sf.dtype == torch.float32
            actual, expected = sf.cpu().numpy(), scales
        assert actual.shape == expected.shape, f"{actual.shape} {expected.shape}\nreproduce with: {self.repro}"
        assert np.array_equal(actual, expected, equal_nan=self.scales != "packed"), (
            f"scales differ\nreproduce with: {self.repro}"
        )
        mn = sf.shape[1 - k_axis]
        strides = (ceil_div(mn, 4) * 4, 1) if self.kind == "per_channel" else (1, ceil_div(mn, 4) * 4)
        assert sf.stride() == strides, (
            f"scales have strides {sf.stride()}, expected {strides}\nreproduce with: {self.repro}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("scales", ["float32", "ue8m0", "packed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cast(device: str, kind: str, gran_k: int, scales: str, dtype: str) -> None:
    for rows, cols in [(1, 1), (3, 128), (5, 129), (33, 272), (130, 257), (129, 520)]:
        CastCase(rows, cols, kind, gran_k, dtype, scales, device=device, out=cols % 2 == 1, seed=rows).run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", ["nan", "inf", "zero", "tiny", "huge"])
@pytest.mark.parametrize("scales", ["float32", "ue8m0", "packed"])
def test_special_values(device: str, kind: str, special: str, scales: str) -> None:
    for dtype, gran_k in itertools.product(["bfloat16", "float16", "float32"], [128, 32]):
        CastCase(131, 140, kind, gran_k, dtype, scales, special, device=device).run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [1, 8, 31])
def test_rows_inside_wider_rows(device: str, kind: str, pad: int) -> None:
    for dtype, cols in itertools.product(["bfloat16", "float32"], [96, 131, 256]):
        CastCase(40, cols, kind, dtype=dtype, pad=pad, device=device).run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (0, 64), (64, 0), (0, 1), (1, 0)])
def test_empty(device: str, kind: str, rows: int, cols: int) -> None:
    for scales, gran_k in itertools.product(["float32", "ue8m0", "packed"], [128, 32]):
        CastCase(rows, cols, kind, gran_k, scales=scales, device=device, out=True).run()


@pytest.mark.parametrize("scale", [1.0, 2.0**-5, 3.0])
def test_every_fp8_number_and_every_tie(device: str, scale: float) -> None:
    """Rounding to nearest even: the numbers themselves, the midpoints, and their float32 neighbours."""
    values = e4m3_values().astype(np.float32)
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))])
    points = np.concatenate([points, -points])
    points = points[np.abs(points) <= 448]
    rows = np.zeros((ceil_div(len(points), 127), 128), np.float32)
    rows[:, 127] = 448  # pins the scale to a power of two (or to 3)
    rows[:, :127].flat[: len(points)] = points
    x = torch.from_numpy(rows * np.float32(scale)).to(device)
    codes, scales = expected_cast(x, "per_token", 128, False)
    out, sf = torch.ops.deep_gemm.per_token_cast_to_fp8(x)
    assert np.array_equal(fp8_bytes(out).numpy(), codes)
    assert np.array_equal(sf.cpu().numpy(), scales)
    if scale != 3.0:
        assert np.array_equal(fp8_bytes(out).numpy(), to_e4m3(rows))


def test_numpy_oracle_agrees_with_pytorch_on_finite_numbers() -> None:
    """The oracle of these tests is checked too, by PyTorch's own conversion."""
    x = torch.randn(1 << 16, generator=generator(1)) * torch.pow(2.0, torch.randint(-12, 8, (1 << 16,)).float())
    x = x.clamp(-448, 448)
    assert np.array_equal(to_e4m3(x.numpy()), x.to(FP8).view(torch.uint8).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_round_trip(device: str, kind: str) -> None:
    """A normal number loses at most 1/16 of itself; one that its scale pushes below 2^-6 loses half a step of 2^-9."""
    x = CastCase(130, 272, kind, device=device).input()
    for scales in ("float32", "ue8m0"):
        function = getattr(deep_gemm_ops, f"{kind}_cast_to_fp8")
        values, sf = function(x, use_ue8m0=scales == "ue8m0")
        group = {"per_token": (1, 128), "per_channel": (128, 1), "per_block": (128, 128)}[kind]
        scale = sf.repeat_interleave(group[0], 0)[:130].repeat_interleave(group[1], 1)[:, :272].double()
        error = (values.float().double() * scale - x.double()).abs()
        assert bool((error <= torch.maximum(x.double().abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all())


def test_ue8m0_never_rounds_down(device: str) -> None:
    x = CastCase(200, 256, dtype="float32", device=device).input()
    _, sf = deep_gemm_ops.per_token_cast_to_fp8(x)
    _, rounded = deep_gemm_ops.per_token_cast_to_fp8(x, use_ue8m0=True)
    assert bool((rounded >= sf).all())
    assert bool((rounded < 2 * sf).all())
    assert bool((torch.frexp(rounded).mantissa == 0.5).all())


def test_packed_scales_multiply_like_their_floats(device: str) -> None:
    """One word of packed scales is one column, whose odd strides PyTorch leaves alone."""
    x = torch.randn(70, 512, generator=generator(0)).bfloat16().to(device)
    w = torch.randn(130, 512, generator=generator(1)).bfloat16().to(device)
    a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x, use_ue8m0=True)
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w, use_ue8m0=True)
    packed_a, packed_sfa = deep_gemm_ops.per_token_cast_to_fp8(x, use_packed_ue8m0=True)
    packed_b, packed_sfb = deep_gemm_ops.per_block_cast_to_fp8(w, use_packed_ue8m0=True)
    assert packed_sfa.shape == (70, 1)
    assert same_bits(
        deep_gemm_ops.fp8_gemm_nt(packed_a, packed_sfa, packed_b, packed_sfb),
        deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb),
    )


def test_public_functions_write_to_out(device: str) -> None:
    x = CastCase(40, 256, device=device).input()
    for kind in KINDS:
        function = getattr(deep_gemm_ops, f"{kind}_cast_to_fp8")
        values, sf = function(x)
        out = (torch.empty_like(values), torch.empty_strided(sf.shape, sf.stride(), device=device))
        result = function(x, out=out)
        assert result[0] is out[0]
        assert result[1] is out[1]
        assert same_bits(out[0], values)
        assert same_bits(out[1], sf)


if __name__ == "__main__":
    import sys

    eval(sys.argv[1]).run()
    print("passed")
