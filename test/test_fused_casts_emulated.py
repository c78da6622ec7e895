"""Casts that do several things in one read, on the PTX emulator: bits against the reference, and what memory sees."""

from __future__ import annotations

import math

import pytest
import torch

from deep_gemm_ops import fused_casts
from deep_gemm_ops._checks import cast_scale_shape

import cast_emulation as emulation
from cast_emulation import (
    DTYPES,
    FORMATS,
    align,
    assert_memory_bound,
    assert_padding_untouched,
    assert_same,
    bits,
    cast_input,
    ceil_div,
    matrix,
)

pytestmark = pytest.mark.emulated

FP8 = torch.float8_e4m3fn
LAYOUTS = {"psum": 2, "offsets": 3, "sizes": 5}  # GroupLayout in src/host/gemm_problem.h


def problem_of(
    x: torch.Tensor, out: torch.Tensor, sf: torch.Tensor, sf_stride: int, gran_k: int, sf_format: str
) -> emulation.CastProblem:
    return emulation.CastProblem(
        x=x.data_ptr(),
        x_type=DTYPES.index(x.dtype),
        rows=x.shape[0],
        cols=x.shape[1],
        x_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        sf=sf.data_ptr(),
        sf_stride=sf_stride,
        gran_k=gran_k,
        sf_format=FORMATS.index(sf_format),
        num_sms=x.shape[0] % 2,  # 1: few CTAs, which walk over tiles; 0: one for each
    )


def options_of(sf_format: str) -> dict[str, bool]:
    return {"use_ue8m0": sf_format == "ue8m0", "use_packed_ue8m0": sf_format == "packed"}


def assert_results(actual: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    """Values and scales, padding untouched, NaN as 0x7F."""
    for x, want in zip(actual, expected, strict=True):
        assert_same(x, want)
        if x.numel():
            assert_padding_untouched(x)
        if x.dtype == FP8:
            assert (bits(x)[x.float().isnan()] == 0x7F).all(), "NaN is written as 0x7F"


def spoil(x: torch.Tensor) -> torch.Tensor:
    """NaN, Inf, zeros and extreme numbers in some groups."""
    rows, cols = x.shape
    x[0, 0] = math.nan
    x[rows // 2, cols // 3] = math.inf
    x[rows // 3, cols - 1] = -math.inf
    x[rows - 1, :] = 0.0
    x[rows // 4, : cols // 2] = torch.finfo(x.dtype).max
    x[:, cols // 4] = torch.finfo(x.dtype).smallest_normal
    return x


# ---------------------------------------------------------------------------------------------------------------------
# FP4


def fp4(
    x: torch.Tensor,
    gran_k: int,
    sf_format: str,
    out_stride: int | None = None,
    out_offset: int = 0,
    **options: object,
) -> emulation.Run:
    rows, cols = x.shape
    shape, strides = cast_scale_shape("per_token", rows, cols, gran_k, sf_format == "packed")
    out = matrix((rows, cols // 2), (out_stride or cols // 2, 1), torch.uint8, out_offset)
    sf = matrix(shape, strides, torch.int32 if sf_format == "packed" else torch.float32)
    problem = problem_of(x, out, sf, strides[1], gran_k, sf_format)
    result = emulation.run("per_token_cast_fp4", problem, [x], [out, sf], **options)
    expected = fused_casts.reference_per_token_cast_to_fp4(x, gran_k=gran_k, **options_of(sf_format))
    assert_results([out, sf], expected)
    return result


@pytest.mark.parametrize("sf_format", FORMATS)
@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4(dtype: torch.dtype, gran_k: int, sf_format: str) -> None:
    for seed, shape in enumerate([(1, 8), (34, 520), (5, 2), (31, 258), (101, 1112)]):
        result = fp4(cast_input(shape, dtype, seed), gran_k, sf_format, seed=seed)
        assert ("pipelined" in result.kernel) == (shape[1] % 8 == 0)
    fp4(spoil(cast_input((40, 264), dtype, 7)), gran_k, sf_format)
    fp4(spoil(cast_input((40, 262), dtype, 8)), gran_k, sf_format)


def test_fp4_strides_and_alignment() -> None:
    x = cast_input((40, 200), torch.bfloat16, 1, stride=240)
    assert "pipelined" in fp4(x, 32, "float32", out_stride=104).kernel
    for change in ({"stride": 201}, {"offset": 1}, {"out_stride": 103}, {"out_offset": 1}):
        out = {k: v for k, v in change.items() if k.startswith("out")}
        into = {k: v for k, v in change.items() if not k.startswith("out")}
        result = fp4(cast_input((40, 200), torch.bfloat16, 2, **into), 32, "ue8m0", **out)
        assert "Lb0E" in result.kernel, f"{change}: wide accesses of unaligned memory"


def test_fp4_rounds_to_nearest_even() -> None:
    """Every E2M1 number, every midpoint between two of them, and their neighbours in float32."""
    values = torch.tensor(fused_casts.FP4_VALUES)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, *(torch.nextafter(points, torch.tensor(limit)) for limit in (1e9, -1e9))])
    points = torch.cat([points.clamp(-6, 6), -points.clamp(-6, 6)])
    rows = torch.nn.functional.pad(points, (0, -points.numel() % 31)).view(-1, 31)
    x = torch.cat([rows, torch.full((rows.shape[0], 1), 6.0)], 1)  # so that the scale is 1
    fp4(x, 32, "float32")
    fp4(matrix(x.shape, (33, 1), torch.float32).copy_(x), 32, "float32")


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu(
    x: torch.Tensor,
    gran_k: int,
    sf_format: str,
    weights: torch.Tensor | None = None,
    clamp: float | None = None,
    out_stride: int | None = None,
    out_offset: int = 0,
    **options: object,
) -> emulation.Run:
    rows, hidden = x.shape[0], x.shape[1] // 2
    shape, strides = cast_scale_shape("per_token", rows, hidden, gran_k, sf_format == "packed")
    out = matrix((rows, hidden), (out_stride or hidden, 1), FP8, out_offset)
    sf = matrix(shape, strides, torch.int32 if sf_format == "packed" else torch.float32)
    cast = problem_of(x, out, sf, strides[1], gran_k, sf_format)
    cast.cols = hidden
    problem = emulation.SwigluProblem(cast=cast, clamped=clamp is not None, clamp=clamp or 0.0)
    inputs = [x]
    if weights is not None:
        problem.topk_weights, problem.weight_stride = weights.data_ptr(), weights.stride(0)
        inputs.append(weights)
    result = emulation.run("swiglu_cast", problem, inputs, [out, sf], **options)
    expected = fused_casts.reference_swiglu_cast_to_fp8(
        x, topk_weights=weights, clamp=clamp, gran_k=gran_k, **options_of(sf_format)
    )
    assert_results([out, sf], expected)
    return result


def swiglu_input(rows: int, hidden: int, seed: int, stride: int = 0, offset: int = 0) -> torch.Tensor:
    """Gates from the flat ends of the sigmoid to its middle."""
    x = matrix((rows, 2 * hidden), (stride or 2 * hidden, 1), torch.bfloat16, offset)
    random = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-6, 6, (rows, 1), generator=random).float())
    return x.copy_(torch.randn(rows, 2 * hidden, generator=random) * spread)


def some_weights(rows: int, seed: int, stride: int = 1) -> torch.Tensor:
    weights = matrix((rows,), (stride,), torch.float32)
    return weights.copy_(torch.rand(rows, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("sf_format", FORMATS)
@pytest.mark.parametrize("gran_k", [128, 32])
def test_swiglu(gran_k: int, sf_format: str) -> None:
    for seed, (rows, hidden) in enumerate([(1, 8), (34, 520), (5, 1), (31, 257), (133, 520)]):
        x, weights = swiglu_input(rows, hidden, seed), some_weights(rows, seed, 1 + seed % 2)
        result = swiglu(x, gran_k, sf_format, weights, 2.5 if seed % 2 else None, seed=seed)
        assert ("pipelined" in result.kernel) == (hidden % 8 == 0)


def test_swiglu_strides_and_alignment() -> None:
    assert "pipelined" in swiglu(swiglu_input(40, 200, 1, stride=440), 128, "float32", out_stride=208).kernel
    for change in ({"stride": 401}, {"offset": 1}, {"out_stride": 203}, {"out_offset": 1}):
        out = {k: v for k, v in change.items() if k.startswith("out")}
        into = {k: v for k, v in change.items() if not k.startswith("out")}
        result = swiglu(swiglu_input(40, 200, 2, **into), 32, "ue8m0", some_weights(40, 2), 7.0, **out)
        assert "Lb0E" in result.kernel, f"{change}: 16-byte accesses of unaligned memory"


def test_swiglu_of_every_gate() -> None:
    """Each of the 65536 BF16 numbers, NaN and Inf included, with a row of its own so that none hides behind another."""
    gates = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = matrix((1 << 13, 16), (16, 1), torch.bfloat16)
    x[:, :8].copy_(gates.view(1 << 13, 8))
    x[:, 8:] = 1.0
    x[1::2, 8:] = -3.0
    swiglu(x, 128, "float32")
    swiglu(x, 128, "float32", clamp=10.0)


@pytest.mark.parametrize("clamp", [None, 1.0])
def test_swiglu_of_extreme_values(clamp: float | None) -> None:
    x = spoil(swiglu_input(70, 264, 3))
    weights = some_weights(70, 4)
    weights[5], weights[6], weights[7], weights[8] = math.nan, math.inf, 0.0, -1.0
    swiglu(x, 128, "float32", weights, clamp)
    swiglu(matrix((70, 262), (263, 1), torch.bfloat16).copy_(x[:, :262]), 32, "packed", weights, clamp)


def swiglu_backward(
    x: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor | None = None,
    strides: tuple[int, int] = (0, 0),
    offsets: tuple[int, int] = (0, 0),
    **options: object,
) -> emulation.Run:
    rows, hidden = grad.shape
    grad_x = matrix((rows, 2 * hidden), (strides[0] or 2 * hidden, 1), torch.bfloat16, offsets[0])
    weighted = matrix((rows, hidden), (strides[1] or hidden, 1), torch.bfloat16, offsets[1])
    sums = matrix((rows,), (1,), torch.float32)
    problem = emulation.SwigluBackwardProblem(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        grad=grad.data_ptr(),
        grad_stride=grad.stride(0),
        grad_x=grad_x.data_ptr(),
        grad_x_stride=grad_x.stride(0),
        weighted=weighted.data_ptr(),
        weighted_stride=weighted.stride(0),
        grad_row_weights=sums.data_ptr(),
        rows=rows,
        cols=hidden,
    )
    inputs = [x, grad]
    if weights is not None:
        problem.row_weights, problem.weight_stride = weights.data_ptr(), weights.stride(0)
        inputs.append(weights)
    outs = [grad_x, weighted, sums]
    result = emulation.run("swiglu_backward", problem, inputs, outs, **options)
    assert_results(outs, fused_casts.reference_swiglu_backward(x, grad, row_weights=weights))
    return result


def test_swiglu_backward() -> None:
    """Odd and ragged widths, several turns of a CTA, strides and offsets that allow no 16-byte accesses."""
    for seed, (rows, hidden) in enumerate([(1, 8), (5, 1), (9, 257), (4, 1032), (3, 2200), (2, 1025)]):
        x, grad = swiglu_input(rows, hidden, seed), cast_input((rows, hidden), torch.bfloat16, seed)
        weights = some_weights(rows, seed, 1 + seed % 2) if seed % 3 else None
        result = swiglu_backward(x, grad, weights, seed=seed)
        assert ("Lb1E" in result.kernel) == (hidden % 8 == 0)
    grad = cast_input((6, 200), torch.bfloat16, 1, stride=208)
    aligned = swiglu_backward(swiglu_input(6, 200, 1, stride=440), grad, strides=(408, 216))
    assert "Lb1E" in aligned.kernel
    x = swiglu_input(6, 200, 2)
    runs = [
        swiglu_backward(swiglu_input(6, 200, 2, stride=401), grad),
        swiglu_backward(swiglu_input(6, 200, 2, offset=1), grad),
        swiglu_backward(x, cast_input((6, 200), torch.bfloat16, 3, stride=201)),
        swiglu_backward(x, grad, strides=(401, 0)),
        swiglu_backward(x, grad, offsets=(0, 1)),
    ]
    assert all("Lb0E" in run.kernel for run in runs), "16-byte accesses of unaligned memory"


def test_swiglu_backward_of_extreme_values() -> None:
    x, grad = spoil(swiglu_input(70, 264, 3)), spoil(cast_input((70, 264), torch.bfloat16, 5))
    weights = some_weights(70, 4)
    weights[5], weights[6], weights[7], weights[8] = math.nan, math.inf, 0.0, -1.0
    swiglu_backward(x, grad, weights)
    swiglu_backward(x, grad, arch="100a")


# ---------------------------------------------------------------------------------------------------------------------
# With a transposed copy


def with_transpose(
    kind: str,
    x: torch.Tensor,
    sf_format: str,
    out_t_stride: int | None = None,
    out_t_offset: int = 0,
    **options: object,
) -> emulation.Run:
    packed = sf_format == "packed"
    layouts = fused_casts.transposed_layouts(kind, *x.shape, packed)
    sf_dtype = torch.int32 if packed else torch.float32
    out, sf = matrix(*layouts[0], FP8), matrix(*layouts[1], sf_dtype)
    out_t = matrix(layouts[2][0], (out_t_stride or layouts[2][1][0], 1), FP8, out_t_offset)
    sf_t = matrix(*layouts[3], sf_dtype)
    problem = emulation.TransposedCastProblem(
        cast=problem_of(x, out, sf, sf.stride(1), 128, sf_format),
        out_t=out_t.data_ptr(),
        out_t_stride=out_t.stride(0),
        sf_t=sf_t.data_ptr(),
        sf_t_stride=layouts[3][1][1],
    )
    problem.cast.sf_stride = layouts[1][1][1]
    outs = [out, sf, out_t, sf_t]
    result = emulation.run(f"{kind}_cast_with_transpose", problem, [x], outs, **options)
    function = getattr(fused_casts, f"reference_{kind}_cast_to_fp8_with_transpose")
    assert_results(outs, function(x, **options_of(sf_format)))
    return result


def transposed_alone(
    kind: str, x: torch.Tensor, sf_format: str, out_stride: int | None = None, out_offset: int = 0, **options: object
) -> emulation.Run:
    packed = sf_format == "packed"
    values, scales = fused_casts.transposed_layouts(fused_casts.TRANSPOSED_ALONE[kind], *x.shape, packed)[2:]
    out = matrix(values[0], (out_stride or values[1][0], 1), FP8, out_offset)
    sf = matrix(*scales, torch.int32 if packed else torch.float32)
    cast = problem_of(x, out, sf, 0, 128, sf_format)
    cast.out = cast.sf = 1  # an access there would fail, and its alignment has no say
    problem = emulation.TransposedCastProblem(
        cast=cast, out_t=out.data_ptr(), out_t_stride=out.stride(0), sf_t=sf.data_ptr(), sf_t_stride=scales[1][1]
    )
    result = emulation.run(f"{kind}_cast_transposed", problem, [x], [out, sf], **options)
    function = getattr(fused_casts, f"reference_{kind}_cast_to_fp8_transposed")
    assert_results([out, sf], function(x, **options_of(sf_format)))
    return result


KINDS = ["per_token", "per_block"]
SHAPES = [(1, 8), (130, 264), (257, 520), (5, 1), (129, 77), (600, 131)]


@pytest.mark.parametrize("sf_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_transpose(kind: str, dtype: torch.dtype, sf_format: str) -> None:
    for seed, shape in enumerate(SHAPES):
        result = with_transpose(kind, cast_input(shape, dtype, seed), sf_format, seed=seed)
        assert ("Lb1E" in result.kernel) == (shape[1] % 8 == 0)
    with_transpose(kind, spoil(cast_input((300, 264), dtype, 9)), sf_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", fused_casts.TRANSPOSED_ALONE)
def test_transposed_alone(kind: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        result = transposed_alone(kind, cast_input(shape, dtype, seed), FORMATS[seed % len(FORMATS)], seed=seed)
        assert ("Lb1E" in result.kernel) == (shape[1] % 8 == 0)
    for sf_format in FORMATS:
        transposed_alone(kind, spoil(cast_input((300, 264), dtype, 9)), sf_format)


@pytest.mark.parametrize("kind", fused_casts.TRANSPOSED_ALONE)
def test_transposed_alone_strides_and_alignment(kind: str) -> None:
    for change in ({"stride": 201}, {"offset": 1}, {"out_stride": 71}, {"out_offset": 1}):
        out = {k: v for k, v in change.items() if k.startswith("out")}
        into = {k: v for k, v in change.items() if not k.startswith("out")}
        result = transposed_alone(kind, cast_input((70, 200), torch.bfloat16, 2, **into), "float32", **out)
        assert "Lb0E" in result.kernel, f"{change}: 16-byte accesses of unaligned memory"
    x = cast_input((70, 200), torch.bfloat16, 2, stride=208)
    assert "Lb1E" in transposed_alone(kind, x, "float32", out_stride=96).kernel
    for shape in ((0, 16), (16, 0)):
        assert transposed_alone(kind, torch.empty(shape), "float32").kernel == ""


@pytest.mark.parametrize("kind", KINDS)
def test_with_transpose_strides_and_alignment(kind: str) -> None:
    for change in ({"stride": 201}, {"offset": 1}, {"out_t_stride": 71}, {"out_t_offset": 1}):
        out = {k: v for k, v in change.items() if k.startswith("out")}
        into = {k: v for k, v in change.items() if not k.startswith("out")}
        result = with_transpose(kind, cast_input((70, 200), torch.bfloat16, 2, **into), "float32", **out)
        assert "Lb0E" in result.kernel, f"{change}: 16-byte accesses of unaligned memory"
    assert "Lb1E" in with_transpose(kind, cast_input((70, 200), torch.bfloat16, 2, stride=208), "float32").kernel


@pytest.mark.parametrize("kind", KINDS)
def test_with_transpose_of_nothing_launches_nothing(kind: str) -> None:
    for shape in ((0, 16), (16, 0), (0, 0)):
        assert with_transpose(kind, torch.empty(shape), "float32").kernel == ""


# ---------------------------------------------------------------------------------------------------------------------
# K groups


def k_grouped(
    x: torch.Tensor,
    ks: list[int],
    layout: str = "sizes",
    sf_format: str = "float32",
    k_major: bool = False,
    ks_stride: int = 1,
    **options: object,
) -> emulation.Run:
    values, scales = fused_casts.k_grouped_layouts(*x.shape, len(ks), k_major)
    out, sf = matrix(*values, FP8), matrix(*scales, torch.float32)
    of_groups = matrix((len(ks),), (ks_stride,), torch.int32)
    of_groups.copy_(torch.tensor(ks, dtype=torch.int32))
    cast = problem_of(x, out, sf, scales[1][0], 128, sf_format)
    cast.num_sms = 1
    problem = emulation.GroupedProblem(
        problem=emulation.TransposedCastProblem(
            cast=cast, out_t=out.data_ptr(), out_t_stride=values[1][0], sf_t=sf.data_ptr(), sf_t_stride=scales[1][0]
        ),
        groups=emulation.KGroups(
            ends=of_groups.data_ptr(),
            ends_stride=ks_stride,
            num_groups=len(ks),
            rows=x.shape[0],
            layout=LAYOUTS[layout],
            alignment=128,
        ),
    )
    function = "k_grouped_cast_k_major" if k_major else "k_grouped_cast"
    result = emulation.run(function, problem, [x, of_groups], [out, sf], **options)
    name = "k_grouped_per_channel_cast_to_fp8" + ("_k_major" if k_major else "")
    expected = getattr(fused_casts, f"reference_{name}")(x, of_groups, layout=layout, use_ue8m0=sf_format == "ue8m0")
    assert_results([out, sf], expected)
    return result


def ends_of(sizes: list[int], alignment: int) -> list[int]:
    ends, end = [], 0
    for size in sizes:
        end = align(end, alignment) + size
        ends.append(end)
    return ends


SIZES = [
    [300],
    [128, 256],
    [0, 130, 0, 1, 127, 0],
    [5] * 40 + [200] + [0] * 30,  # more groups than lanes
]


@pytest.mark.parametrize("k_major", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_k_groups(layout: str, k_major: bool) -> None:
    for seed, sizes in enumerate(SIZES):
        ends = ends_of(sizes, 128 if layout == "psum" else 1)
        for spare, cols in ((0, 136), (130, 77)):  # rows behind the last group; no aligned rows
            x = cast_input((ends[-1] + spare, cols), torch.bfloat16, seed)
            ks = sizes if layout == "sizes" else ends
            k_grouped(x, ks, layout, "ue8m0" if seed % 2 else "float32", k_major, 1 + seed % 2, seed=seed)


@pytest.mark.parametrize("k_major", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_k_groups_that_make_no_sense_are_clamped(layout: str, k_major: bool) -> None:
    x = cast_input((400, 72), torch.bfloat16, 0)
    for ks in ([-5, 1 << 30, 7], [2**31 - 1, -(2**31), 100], [300, 200, 350, 10], [400, 400, 401], [100, 10, 150]):
        k_grouped(x, ks, layout, k_major=k_major)


@pytest.mark.parametrize("k_major", [False, True])
def test_k_groups_of_nothing(k_major: bool) -> None:
    """No rows: only zeros to write. No columns, or no rows and no groups: nothing."""
    k_grouped(torch.empty(0, 72, dtype=torch.bfloat16), [0, 0], k_major=k_major)
    k_grouped(torch.empty(0, 72, dtype=torch.bfloat16), [3], k_major=k_major)
    k_grouped(cast_input((200, 72), torch.bfloat16, 0), [0, 0, 0], k_major=k_major)
    assert k_grouped(torch.empty(16, 0, dtype=torch.bfloat16), [16], k_major=k_major).kernel == ""
    assert k_grouped(torch.empty(0, 16, dtype=torch.bfloat16), [], k_major=k_major).kernel == ""
    k_grouped(cast_input((100, 72), torch.bfloat16, 0), [], k_major=k_major)


@pytest.mark.parametrize("k_major", [False, True])
def test_k_groups_of_extreme_values(k_major: bool) -> None:
    """Padding is zero also in columns whose scale is NaN or Inf."""
    x = spoil(cast_input((300, 264), torch.bfloat16, 1))
    x[140, 7] = math.nan
    k_grouped(x, [130, 50, 120], k_major=k_major)


# ---------------------------------------------------------------------------------------------------------------------
# Both architectures, launches, memory


def test_on_blackwell() -> None:
    for rows, cols in ((130, 264), (33, 77)):
        x = cast_input((rows, 2 * cols), torch.bfloat16, 0)
        swiglu(x, 128, "float32", some_weights(rows, 0), 3.0, arch="100a")
        swiglu(x, 32, "packed", arch="100a")
        for dtype in DTYPES:
            even = cast_input((rows, cols // 2 * 2), dtype, 0)
            fp4(even, 32, "float32", arch="100a")
            fp4(even, 128, "packed", arch="100a")
            for kind in KINDS:
                with_transpose(kind, cast_input((rows, cols), dtype, 1), "packed", arch="100a")
            for kind in fused_casts.TRANSPOSED_ALONE:
                transposed_alone(kind, cast_input((rows, cols), dtype, 1), "packed", arch="100a")
        for k_major in (False, True):
            k_grouped(cast_input((rows, cols), torch.bfloat16, 2), [3, rows - 10], k_major=k_major, arch="100a")


def test_programmatic_dependent_launch_is_asked_for() -> None:
    x = cast_input((8, 128), torch.bfloat16, 0)
    for pdl in (False, True):
        runs = [
            swiglu(x, 128, "float32", pdl=pdl),
            swiglu_backward(x, x[:, :64], pdl=pdl),
            k_grouped(x, [8], pdl=pdl),
            k_grouped(x, [8], k_major=True, pdl=pdl),
        ]
        runs.append(fp4(x, 32, "float32", pdl=pdl))
        runs += [with_transpose(kind, x, "float32", pdl=pdl) for kind in KINDS]
        runs += [transposed_alone(kind, x, "float32", pdl=pdl) for kind in fused_casts.TRANSPOSED_ALONE]
        assert all(run.pdl == pdl for run in runs)


def test_whole_sectors() -> None:
    """One read of the input; whole sectors in both directions; no bank conflicts."""
    rows, cols = 256, 512
    x = cast_input((rows, 2 * cols), torch.bfloat16, 0)
    result = swiglu(x, 128, "float32", counters=True)
    assert_memory_bound(result, x.numel() * 2, rows * cols + rows * cols // 128 * 4)
    result = swiglu_backward(x, cast_input((rows, cols), torch.bfloat16, 1), counters=True)
    assert_memory_bound(result, rows * cols * 6, rows * cols * 6 + rows * 32)  # a sector for each sum
    for dtype in DTYPES:
        x = cast_input((rows, cols), dtype, 0)
        read = x.numel() * x.element_size()
        written = x.numel() // 2 + x.numel() // 32 * 4
        assert_memory_bound(fp4(x, 32, "float32", counters=True), read, written)
        assert_memory_bound(
            with_transpose("per_token", x, "float32", counters=True), read, 2 * x.numel() + 2 * x.numel() // 128 * 4
        )
        blocks = 2 * 32 * ceil_div(rows, 128) * (cols // 128)  # a sector for each scale
        assert_memory_bound(with_transpose("per_block", x, "float32", counters=True), read, 2 * x.numel() + blocks)
        written = x.numel() + x.numel() // 128 * 4
        assert_memory_bound(transposed_alone("per_channel", x, "float32", counters=True), read, written)
        written = x.numel() + blocks // 2
        assert_memory_bound(transposed_alone("per_block", x, "float32", counters=True), read, written)
    x = cast_input((rows, cols), torch.bfloat16, 0)
    scales = (rows // 128 + 2) * cols * 4
    search = 2 * 32 * 8 * 8 * (4 + 2)  # every warp of every block reads the sizes
    assert_memory_bound(k_grouped(x, [128, 128], counters=True), x.numel() * 2 + search, x.numel() + scales)
    assert_memory_bound(
        k_grouped(x, [128, 128], k_major=True, counters=True), x.numel() * 2 + search, (rows + 256) * cols + scales
    )
