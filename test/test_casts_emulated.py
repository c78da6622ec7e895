"""The cast and layout kernels on the PTX emulator: bits against the reference, and what memory sees of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deep_gemm_ops import reference
from deep_gemm_ops._checks import cast_scale_shape
from deep_gemm_ops.fp8_fp4_gemm import expand_fp4

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
from gemm_emulation import order_of_tokens

pytestmark = pytest.mark.emulated

KINDS = ["per_token", "per_channel", "per_block"]


def cast(
    kind: str,
    x: torch.Tensor,
    gran_k: int,
    sf_format: str,
    out_stride: int | None = None,
    out_offset: int = 0,
    **options: object,
) -> emulation.Run:
    """Runs the kernel and compares values, scales and padding with the reference."""
    rows, cols = x.shape
    packed = sf_format == "packed"
    shape, strides = cast_scale_shape(kind, rows, cols, gran_k, packed)
    out = matrix((rows, cols), (out_stride or cols, 1), torch.float8_e4m3fn, out_offset)
    sf = matrix(shape, strides, torch.int32 if packed else torch.float32)
    problem = emulation.CastProblem(
        x=x.data_ptr(),
        x_type=DTYPES.index(x.dtype),
        rows=rows,
        cols=cols,
        x_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        sf=sf.data_ptr(),
        sf_stride=strides[0] if kind == "per_channel" else strides[1],
        gran_k=gran_k,
        sf_format=FORMATS.index(sf_format),
    )
    result = emulation.run(f"{kind}_cast", problem, [x], [out, sf], **options)
    function = getattr(reference, f"{kind}_cast_to_fp8")
    values, scales = function(x, gran_k=gran_k, use_ue8m0=sf_format == "ue8m0", use_packed_ue8m0=packed)
    assert_same(out, values)
    assert_same(sf, scales)
    if rows and cols:
        assert_padding_untouched(out)
        assert_padding_untouched(sf)
        nan = bits(out)[out.float().isnan()]
        assert (nan == 0x7F).all(), "NaN is written as 0x7F"
    return result


# Sizes around the tiles (32 x 256, 128 x 128, 128 x 64), odd ones, and ones for which no row is aligned.
SHAPES = [(1, 8), (33, 520), (130, 136), (257, 264), (5, 1), (129, 77), (31, 257), (64, 1111)]


@pytest.mark.parametrize("sf_format", FORMATS)
@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cast(kind: str, dtype: torch.dtype, gran_k: int, sf_format: str) -> None:
    for seed, shape in enumerate(SHAPES):
        cast(kind, cast_input(shape, dtype, seed), gran_k, sf_format, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cast_strides_and_alignment(kind: str, dtype: torch.dtype) -> None:
    wide = cast(kind, cast_input((70, 200), dtype, 1, stride=240), 128, "float32", out_stride=208)
    assert "Lb1E" in wide.kernel
    for change in ({"stride": 201}, {"offset": 1}, {"out_stride": 203}, {"out_offset": 1}):
        out = {k: v for k, v in change.items() if k.startswith("out")}
        into = {k: v for k, v in change.items() if not k.startswith("out")}
        result = cast(kind, cast_input((70, 200), dtype, 2, **into), 32, "ue8m0", **out)
        assert "Lb0E" in result.kernel, f"{change}: 16-byte accesses of unaligned memory"


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_cast_of_nothing_launches_nothing(kind: str, shape: tuple[int, int]) -> None:
    assert cast(kind, torch.empty(shape), 128, "float32").kernel == ""


@pytest.mark.parametrize("sf_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cast_of_extreme_values(kind: str, dtype: torch.dtype, sf_format: str) -> None:
    """NaN, Inf, the largest and smallest numbers, powers of two and their neighbours: none is hidden or flushed."""
    info = torch.finfo(dtype)
    x = cast_input((260, 1024), dtype, 5)
    x[0, 3] = torch.nan
    x[1, 200] = torch.inf
    x[2, 700] = -torch.inf
    x[3, 5], x[3, 6] = torch.inf, torch.nan
    x[140:, 256:384] = 0.0
    x[150, 300] = info.max
    x[140:, 512:640] = info.tiny
    x[140:, 640:768] = 448 * 2.0**-3  # a scale that is a power of two already
    x[140:, 768:896] = torch.nextafter(torch.tensor(448.0 * 2.0**-3), torch.tensor(1e9)).item()
    x[:, 1000:] = info.smallest_normal / 4
    for gran_k in (128, 32):
        cast(kind, x, gran_k, sf_format)
    odd = matrix((260, 1001), (1001, 1), dtype).copy_(x[:, :1001])
    cast(kind, odd, 32, sf_format)


def test_cast_rounds_to_nearest_even() -> None:
    """Every E4M3 value, every midpoint between two of them, and their neighbours in float32."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middle])
    above, below = (torch.nextafter(points, torch.tensor(limit)) for limit in (1e9, -1e9))
    points = torch.cat([points, above, below])
    points = torch.cat([points.clamp(-448, 448), -points.clamp(-448, 448)])
    rows = points[: points.numel() // 31 * 31].view(-1, 31)
    x = torch.cat([rows, torch.full((rows.shape[0], 1), 448.0)], 1)  # so that the scale is 1
    cast("per_token", x, 32, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_cast_on_blackwell(kind: str) -> None:
    for seed, dtype in enumerate(DTYPES):
        for shape in ((130, 264), (33, 77)):
            cast(kind, cast_input(shape, dtype, seed), 128, "float32", arch="100a", seed=seed)
            cast(kind, cast_input(shape, dtype, seed), 32, "packed", arch="100a", seed=seed)


def test_programmatic_dependent_launch_is_asked_for() -> None:
    x = cast_input((8, 128), torch.bfloat16, 0)
    assert cast("per_token", x, 128, "float32", pdl=True).pdl
    assert not cast("per_token", x, 128, "float32").pdl


# ---------------------------------------------------------------------------------------------------------------------
# Transposition


def transpose(
    rows: int,
    cols: int,
    batch: int = 1,
    stride: int = 0,
    out_stride: int = 0,
    offset: int = 0,
    out_offset: int = 0,
    **options: object,
) -> emulation.Run:
    stride, out_stride = stride or cols, out_stride or rows
    x = matrix((batch, rows, cols), (rows * stride, stride, 1), torch.uint8, offset)
    x.copy_(torch.randint(0, 256, x.shape, dtype=torch.uint8))
    out = matrix((batch, cols, rows), (cols * out_stride, out_stride, 1), torch.uint8, out_offset)
    problem = emulation.TransposeProblem(
        x=x.data_ptr(),
        x_stride=stride,
        x_batch_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out_stride,
        out_batch_stride=out.stride(0),
        rows=rows,
        cols=cols,
        batch=batch,
    )
    result = emulation.run("transpose_fp8", problem, [x], [out], **options)
    assert torch.equal(out, x.transpose(1, 2))
    if x.numel():
        assert_padding_untouched(out)
    return result


@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_transpose(arch: str) -> None:
    for seed, (rows, cols) in enumerate([(128, 128), (256, 384), (1, 1), (130, 77), (5, 300), (300, 5), (1200, 144)]):
        transpose(rows, cols, arch=arch, seed=seed)
        transpose(rows, cols, stride=align(cols, 16), out_stride=align(rows, 16), arch=arch, seed=seed)


def test_transpose_batches() -> None:
    transpose(70, 200, batch=3)
    transpose(129, 259, batch=2, stride=272, out_stride=144)
    transpose(16, 0)
    transpose(0, 16)


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("out_offset", range(4))
def test_transpose_of_any_alignment(offset: int, out_offset: int) -> None:
    for rows, cols in ((131, 133), (256, 129), (3, 2), (130, 256)):
        transpose(rows, cols, offset=offset, out_offset=out_offset)
        transpose(rows, cols, stride=align(cols, 4), out_stride=align(rows, 4), offset=offset, out_offset=out_offset)


# ---------------------------------------------------------------------------------------------------------------------
# Scale layouts


def powers_of_two(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(-127, 128, shape, generator=g).double()).float()


def mn_major(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    aligned = align(shape[-2], 4)
    return matrix(shape, (aligned * shape[-1], 1, aligned)[-len(shape) :], dtype)


def arrangements(x: torch.Tensor) -> list[torch.Tensor]:
    """The same [G, MN, X] contents with MN or X contiguous, with gaps, and every other element of a larger one."""
    groups, mn, columns = x.shape
    strides = [(mn * columns, columns, 1), (mn * columns, 1, mn), (mn * (columns + 3), columns + 3, 1)]
    strides += [(align(mn, 4) * columns, 1, align(mn, 4)), (1, groups * columns * 2, groups * 2)]
    return [matrix((groups, mn, columns), s, x.dtype).copy_(x) for s in strides]


def scale_layout(
    src: torch.Tensor,
    k_sf: int,
    dst_type: str,
    repeat: int = 1,
    mn: int = 0,
    k_repeat: int = 1,
    row_counts: torch.Tensor | None = None,
    round_up: bool = False,
    **options: object,
):
    types = {torch.float32: 0, torch.uint8: 1, torch.int32: 2}
    groups, rows, _ = src.shape
    mn = mn or rows
    packed = dst_type == "packed"
    dst = mn_major((groups, mn, ceil_div(k_sf, 4) if packed else k_sf), torch.int32 if packed else torch.float32)
    problem = emulation.ScaleLayoutProblem(
        src=src.data_ptr(),
        src_type=types[src.dtype],
        src_batch_stride=src.stride(0),
        src_mn_stride=src.stride(1),
        src_k_stride=src.stride(2),
        dst=dst.data_ptr(),
        dst_type=2 if packed else 0,
        dst_batch_stride=dst.stride(0),
        dst_k_stride=dst.stride(2),
        batch=groups,
        mn=mn,
        k_sf=k_sf,
        mn_repeat=repeat,
        k_repeat=k_repeat,
        row_counts=None if row_counts is None else row_counts.data_ptr(),
        round_up=round_up,
    )
    inputs = [src] if row_counts is None else [src, row_counts]
    result = emulation.run("scale_layout", problem, inputs, [dst], **options)
    if dst.numel():
        assert_padding_untouched(dst)
    return dst, result


LAYOUT_SHAPES = [(1, 1, 1), (1, 65, 33), (2, 130, 7), (3, 4, 66)]


@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
def test_mn_major(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    for seed, src in enumerate(arrangements(x)):
        assert_same(scale_layout(src, shape[2], "float32", seed=seed)[0], x)


@pytest.mark.parametrize("dst_type", ["float32", "packed"])
def test_rows_that_do_not_count_are_not_moved(dst_type: str) -> None:
    x = powers_of_two((5, 200, 9), 5)
    counts = torch.tensor([0, 1, 64, 65, 1000], dtype=torch.int32)
    expected = x if dst_type == "float32" else reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(x)
    for seed, src in enumerate(arrangements(x)):
        dst, result = scale_layout(src, 9, dst_type, row_counts=counts, seed=seed, counters=True)
        for group, count in enumerate(counts.tolist()):
            assert_same(dst[group, :count], expected[group, :count])
        _, of_all = scale_layout(src, 9, dst_type, seed=seed, counters=True)
        sectors, sectors_of_all = (x.stats.counters["total"]["gmem_store_sectors"] for x in (result, of_all))
        assert sectors < 0.5 * sectors_of_all  # 456 of 1000 rows, in tiles of 64


@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
def test_packing(shape: tuple[int, int, int]) -> None:
    x = powers_of_two(shape, 1)
    odd = [0.0, -0.0, -1.0, 3.0, torch.inf, -torch.inf, torch.nan, 2.0**-128, 1.5 * 2.0**-127, 2.0**-126, 2.0**127]
    where = torch.randperm(x.numel())[: len(odd)]
    x.view(-1)[where] = torch.tensor(odd)[: where.numel()]
    expected = reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(x)
    for seed, src in enumerate(arrangements(x)):
        assert_same(scale_layout(src, shape[2], "packed", seed=seed)[0], expected)


@pytest.mark.parametrize("shape", LAYOUT_SHAPES)
def test_expansion(shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(2)
    e8m0 = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    e8m0.view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)[: e8m0.numel()]
    expected = reference.expand_ue8m0(e8m0.view(torch.float8_e8m0fnu), k_sf=shape[2])
    packed = reference.pack_ue8m0(e8m0.to(torch.int32))
    for seed, src in enumerate(arrangements(e8m0)):
        assert_same(scale_layout(src, shape[2], "float32", seed=seed)[0], expected)
        assert_same(scale_layout(src, shape[2], "packed", seed=seed)[0], packed)
    garbage = packed.clone()
    if shape[2] % 4:
        garbage[..., -1] |= -1 << (8 * (shape[2] % 4))  # bytes after the last scale mean nothing
    for seed, src in enumerate(arrangements(garbage)):
        assert_same(scale_layout(src, shape[2], "float32", seed=seed)[0], expected)
        assert_same(scale_layout(src, shape[2], "packed", seed=seed)[0], packed)


@pytest.mark.parametrize("mn", [1, 128, 300])
def test_block_scales_repeated_for_every_row(mn: int) -> None:
    x = powers_of_two((2, ceil_div(mn, 128), 9), 3)
    rows = x.repeat_interleave(128, 1)[:, :mn]
    expected = reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(rows)
    for src in arrangements(x):
        assert_same(scale_layout(src, 9, "packed", repeat=128, mn=mn)[0], expected)


@pytest.mark.parametrize("k_sf", [1, 4, 7, 30, 131])
def test_scales_repeated_along_k(k_sf: int) -> None:
    """Each of a quarter of them four times, from every type to every type, also for 128 rows at once."""
    x = powers_of_two((2, 3, ceil_div(k_sf, 4)), 4)
    codes = reference.pack_ue8m0((x.double().log2() + 127).to(torch.int32))
    e8m0 = (x.double().log2() + 127).to(torch.uint8)
    for mn in (3, 300):
        rows = x.repeat_interleave(128, 1)[:, :mn] if mn > 3 else x
        expected = rows.repeat_interleave(4, 2)[:, :, :k_sf].contiguous()
        packed = reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(expected)
        options = {"repeat": 128 if mn > 3 else 1, "mn": mn, "k_repeat": 4}
        for contents in (x, e8m0, codes):
            for seed, src in enumerate(arrangements(contents)):
                assert_same(scale_layout(src, k_sf, "float32", seed=seed, **options)[0], expected)
                assert_same(scale_layout(src, k_sf, "packed", seed=seed, **options)[0], packed)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 5, 64), (3, 7, 130), (2, 300, 62)])
def test_fp4_becomes_fp8(shape: tuple[int, int, int]) -> None:
    batch, rows, cols = shape
    stride, out_stride = align(cols // 2, 16) + 16, align(cols, 32) + 32
    x = matrix((batch, rows, cols // 2), (rows * stride + 16, stride, 1), torch.uint8)
    x.copy_(torch.randint(256, x.shape, generator=torch.Generator().manual_seed(cols), dtype=torch.uint8))
    out = matrix((batch, rows, align(cols, 32)), (rows * out_stride, out_stride, 1), torch.float8_e4m3fn)
    problem = emulation.ExpandFp4Problem(
        x=x.data_ptr(),
        x_stride=x.stride(1),
        x_batch_stride=x.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(1),
        out_batch_stride=out.stride(0),
        rows=rows,
        cols=cols,
        batch=batch,
    )
    emulation.run("expand_fp4", problem, [x], [out])
    assert_padding_untouched(out)
    assert_same(out[:, :, :cols].contiguous(), expand_fp4(x))


def fold(
    x: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor | None = None, ends: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, emulation.Run]:
    """[batch, rows, cols] E4M3, the scales of its blocks and which of them are inexact."""
    batch, rows, cols = x.shape[0], x.shape[1], 2 * x.shape[2]
    blocks = (batch, ceil_div(rows, 128), cols // 128)
    words = matrix((batch, cols // 128, rows), (cols // 128 * align(rows, 4), align(rows, 4), 1), torch.int32)
    words.copy_(codes.to(torch.uint8).view(batch, rows, cols // 128, 4).view(torch.int32)[..., 0].transpose(1, 2))
    out = matrix((batch, rows, cols), (rows * (cols + 32), cols + 32, 1), torch.float8_e4m3fn)
    block_sf = matrix(blocks, (blocks[1] * blocks[2], blocks[2], 1), torch.float32)
    count = batch * blocks[1] * blocks[2]
    inexact = matrix((align(count, 16),), (1,), torch.uint8)
    problem = emulation.FoldFp4Problem(
        x=x.data_ptr(),
        x_stride=x.stride(1),
        x_batch_stride=x.stride(0),
        sf=words.data_ptr(),
        sf_stride=words.stride(1),
        sf_batch_stride=words.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(1),
        out_batch_stride=out.stride(0),
        block_sf=block_sf.data_ptr(),
        inexact=inexact.data_ptr(),
        rows=rows,
        cols=cols,
        batch=batch,
        group_layout=None if groups is None else groups.data_ptr(),
        ends=ends,
    )
    inputs = [x, words] + ([] if groups is None else [groups])
    result = emulation.run("fold_fp4", problem, inputs, [out, block_sf, inexact], **options)
    assert (inexact[count:] == 0).all()
    assert_padding_untouched(out)
    return out, block_sf, inexact[:count].view(blocks).bool(), result


def random_fp4(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    batch, rows, cols = shape
    stride = cols // 2 + 16
    x = matrix((batch, rows, cols // 2), (rows * stride + 16, stride, 1), torch.uint8)
    return x.copy_(torch.randint(256, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 130, 384), (1, 300, 256)])
@pytest.mark.parametrize("first", [0, 3, 120, 239])
def test_fp4_is_folded_exactly(shape: tuple[int, int, int], first: int) -> None:
    """Scales up to 2^14 apart: the values are the same, to the bit, and nothing is inexact."""
    random = torch.Generator().manual_seed(first)
    x = random_fp4(shape, first)
    codes = torch.randint(first, first + 15, (*shape[:2], shape[2] // 32), generator=random)
    x[:, ::3, 16:32] = 0x80  # zeros, whatever their scale
    codes[:, ::3, 1] = 254
    out, block_sf, inexact, _ = fold(x, codes)
    assert not inexact.any()
    expected = expand_fp4(x).double() * torch.exp2(codes.double() - 127).repeat_interleave(32, 2)
    of_value = block_sf.repeat_interleave(128, 1)[:, : shape[1]].repeat_interleave(128, 2)
    assert (out.double() * of_value.double() == expected).all()


def test_fp4_that_cannot_be_folded() -> None:
    """Blocks with a scale 2^15 below the largest are told apart, unless its values are zero; NaN stays NaN."""
    x, codes = random_fp4((1, 256, 384), 0), torch.full((1, 256, 12), 100)
    codes[0, 7, 2] = 85  # block (0, 0)
    codes[0, 200, 5], x[0, 200, 80:96] = 85, 0  # (1, 1)
    codes[0, 3, 11] = 255  # (0, 2)
    codes[0, 130, 8], codes[0, 131, 9] = 86, 101  # (1, 2)
    out, _, inexact, _ = fold(x, codes)
    assert inexact[0].tolist() == [[True, False, False], [False, False, True]]
    assert (out[0, 7, 64:96].float() == 0).all()
    nan = out.float().isnan()
    assert nan[0, 3, 352:].all() and nan.sum() == 32


@pytest.mark.parametrize("ends", [False, True])
def test_fp4_of_groups_without_rows_is_left_alone(ends: bool) -> None:
    x, codes = random_fp4((5, 20, 128), 1), torch.full((5, 20, 4), 100)
    codes[:, 0, 0] = 1
    groups = torch.tensor([3, 3, 2, 9, -4] if ends else [3, 0, -1, 7, 0], dtype=torch.int32)
    out, _, inexact, _ = fold(x, codes, groups, ends)
    live = torch.tensor([True, False, False, True, False])
    assert inexact.flatten().tolist() == live.tolist()
    assert (out.view(torch.uint8)[~live] == emulation.POISON).all()


def test_folding_moves_whole_sectors() -> None:
    x = matrix((1, 256, 128), (256 * 128, 128, 1), torch.uint8).fill_(0x53)
    out, _, _, result = fold(x, torch.full((1, 256, 8), 120), counters=True)
    # Four rows of a warp have half a sector of scales. Each of the four blocks writes a scale and a flag.
    assert_memory_bound(result, 256 * 128 + 2 * 256 * 8, out.numel() + 4 * 2 * 32 + 32)


def tokens(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    gran_mn: int = 1,
    packed: bool = False,
    counts: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, emulation.Run]:
    """[batch, rows, cols] BF16 of FP8 with the scales 2^(codes - 127) ``[batch, rows / gran_mn, cols / gran_k]``."""
    batch, rows, cols = x.shape
    out = matrix((batch, rows, cols), (rows * (cols + 16), cols + 16, 1), torch.bfloat16)
    problem = emulation.Bf16TokensProblem(
        x=x.data_ptr(), x_stride=x.stride(1), x_batch_stride=x.stride(0), gran_mn=gran_mn
    )
    inputs = [x]
    if codes is not None:
        sf = codes.to(torch.uint8)
        if packed:
            sf = torch.nn.functional.pad(sf, (0, -codes.shape[2] % 4)).view(torch.int32)
        sf = matrix((batch, sf.shape[2], sf.shape[1]), (3999, sf.shape[1] + 1, 1), sf.dtype).copy_(sf.transpose(1, 2))
        problem.sf, problem.sf_is_packed, problem.gran_k = sf.data_ptr(), packed, cols // codes.shape[2]
        problem.sf_batch_stride, problem.sf_k_stride, problem.sf_mn_stride = sf.stride()
        inputs.append(sf)
    problem.out, problem.out_stride, problem.out_batch_stride = out.data_ptr(), out.stride(1), out.stride(0)
    problem.rows, problem.cols, problem.batch = rows, cols, batch
    if counts is not None:
        inputs.append(counts)
        problem.rows_of_group = counts.data_ptr()
    result = emulation.run("bf16_tokens", problem, inputs, [out], **options)
    assert_padding_untouched(out)
    return out, result


def random_fp8(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    batch, rows, cols = shape
    x = matrix(shape, (rows * (cols + 16), cols + 16, 1), torch.float8_e4m3fn)
    bytes_ = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return x.copy_(bytes_.view(torch.float8_e4m3fn))


@pytest.mark.parametrize(("gran_mn", "gran_k"), [(1, 32), (1, 128), (128, 128), (128, 32), (1, 0)])
def test_tokens_become_bf16(gran_mn: int, gran_k: int) -> None:
    """Exactly, for all scales from 2^-124 on; NaN among values and scales stays NaN."""
    shape = (2, 131, 640)
    x = random_fp8(shape, gran_k)
    order = order_of_tokens(shape[2])
    codes = None
    expected = x.double()
    if gran_k:
        sizes = (2, ceil_div(shape[1], gran_mn), shape[2] // gran_k)
        codes = torch.randint(3, 256, sizes, generator=torch.Generator().manual_seed(gran_mn))
        scales = torch.where(codes == 255, torch.nan, torch.exp2(codes.double() - 127))
        expected = expected * scales.repeat_interleave(gran_mn, 1)[:, : shape[1]].repeat_interleave(gran_k, 2)
    expected = torch.where(expected.abs() > 3.4e38, torch.inf * expected.sign(), expected)
    for packed in (False, True) if gran_k else (False,):
        out, _ = tokens(x, codes, gran_mn, packed)
        assert_same(out.float(), expected[..., order].float())


def test_tokens_that_do_not_count_are_left_alone() -> None:
    counts = torch.tensor([3, 0, -2, 9], dtype=torch.int32)
    x = random_fp8((4, 5, 256), 0)
    out, _ = tokens(x, None, counts=counts)
    for group, count in enumerate((3, 0, 0, 5)):
        assert_same(out[group, :count], x[group, :count].bfloat16()[:, order_of_tokens(256)])
        assert (bits(out[group, count:]).view(torch.uint8) == emulation.POISON).all()


def test_converting_tokens_moves_whole_sectors() -> None:
    x = matrix((1, 64, 512), (64 * 512, 512, 1), torch.float8_e4m3fn).fill_(1.5)
    out, result = tokens(x, torch.full((1, 64, 16), 120), packed=True, counters=True)
    # A token's words of scales are as far apart as those of its neighbours: a sector for each.
    assert_memory_bound(result, 64 * 512 + 64 * 4 * 32, 2 * out.numel())


MANY_GROUPS = [0] * 40 + [700] + [33] * 40


def test_scales_are_rounded_up_where_asked_for() -> None:
    """Every exponent, and bits around powers of two; Inf, NaN and negative ones."""
    exponents = torch.arange(256).repeat_interleave(5) << 23
    bits = torch.cat([exponents + torch.tensor([0, 1, 0x400000, 0x400001, 0x7FFFFF]).repeat(256), -exponents - 1])
    x = bits.to(torch.int32).view(torch.float32).view(1, -1, 10)
    for src in arrangements(x)[:2]:
        expected = reference.pack_ue8m0(reference.ue8m0_bytes(x, round_up=True))
        assert_same(scale_layout(src, 10, "packed", round_up=True)[0], expected)


@pytest.mark.parametrize("sizes", [[128], [0, 512, 1, 0, 1000, 640], [300, -5, 10**9, 4], [], MANY_GROUPS])
@pytest.mark.parametrize("gran_k", [128, 32])
def test_k_grouped_packing(sizes: list[int], gran_k: int) -> None:
    """Groups of any size, none, more than a warp has lanes, and sizes beyond the end of the scales."""
    rows = min(sum(ceil_div(max(k, 0), gran_k) for k in sizes), 60)
    for mn, k_contiguous in ((1, False), (270, False), (33, True)):
        sf = matrix((rows, mn), (1, rows) if k_contiguous else (mn, 1), torch.float32)
        sf.copy_(powers_of_two((rows, mn), mn))
        ks = torch.tensor(sizes, dtype=torch.int32)
        dst = matrix(((rows + 3 * len(sizes)) // 4, mn), (align(mn, 4), 1), torch.int32)
        problem = emulation.GroupedPackProblem(
            src=sf.data_ptr(),
            src_k_stride=sf.stride(0),
            src_mn_stride=sf.stride(1),
            sf_rows=rows,
            mn=mn,
            ks=ks.data_ptr(),
            ks_stride=1,
            num_groups=len(sizes),
            gran_k=gran_k,
            dst=dst.data_ptr(),
            dst_k_stride=dst.stride(0),
            dst_rows=dst.shape[0],
        )
        emulation.run("k_grouped_pack", problem, [sf, ks], [dst])
        expected = reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks, gran_k=gran_k)
        assert_same(dst, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What memory sees: whole sectors, no bank conflicts, one read of the input


@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_casts_move_whole_sectors(kind: str, dtype: torch.dtype, gran_k: int) -> None:
    rows, cols = 256, 512
    x = cast_input((rows, cols), dtype, 0)
    result = cast(kind, x, gran_k, "float32", counters=True)
    scales = {"per_token": rows * cols // gran_k, "per_channel": rows // gran_k * cols, "per_block": 0}[kind]
    blocks = 32 * ceil_div(rows, 128) * (cols // gran_k) if kind == "per_block" else 0  # a sector for each scale
    assert_memory_bound(result, x.numel() * x.element_size(), x.numel() + scales * 4 + blocks)


def test_transposition_moves_whole_sectors() -> None:
    result = transpose(256, 384, batch=2, counters=True)
    assert_memory_bound(result, 2 * 256 * 384, 2 * 256 * 384)
    # Rows that are not a multiple of 16 bytes apart cost partial sectors at tile edges, nothing more.
    result = transpose(256, 384, stride=388, out_stride=257, counters=True)
    assert_memory_bound(result, 256 * 384, 256 * 384, slack=2)


@pytest.mark.parametrize("k_contiguous", [False, True])
def test_scale_layout_moves_whole_sectors(k_contiguous: bool) -> None:
    src = matrix((1, 256, 64), (256 * 64, 64, 1) if k_contiguous else (256 * 64, 1, 256), torch.float32)
    src.copy_(powers_of_two((1, 256, 64), 0))
    _, result = scale_layout(src, 64, "float32", counters=True)
    assert_memory_bound(result, 256 * 64 * 4, 256 * 64 * 4)
    _, result = scale_layout(src, 64, "packed", counters=True)
    assert_memory_bound(result, 256 * 64 * 4, 256 * 64)
