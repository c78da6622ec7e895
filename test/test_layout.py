"""Layout operators and helpers, against plain indexing."""

from __future__ import annotations

import itertools

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import layout, reference

from common import FP8, ceil_div, encode_scales, fp8_bytes, generator, like, on_sm100, same_bits

SHAPES = [(1, 1), (4, 4), (5, 3), (7, 9), (128, 1), (130, 57), (33, 5), (0, 3), (3, 0), (0, 0)]


def exponents(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(-40, 40, shape, generator=generator(seed))


def views(x: torch.Tensor, device: str) -> list[torch.Tensor]:
    """The same matrix, or stack of matrices, with several strides."""
    wide = x.repeat_interleave(2, dim=-1)
    transposed = x.transpose(-1, -2).contiguous()
    return [x.to(device), transposed.to(device).transpose(-1, -2), wide.to(device)[..., 1::2]]


def mn_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    aligned = ceil_div(shape[-2], 4) * 4
    return (aligned * shape[-1], 1, aligned) if len(shape) == 3 else (1, aligned)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7), (1, 128, 2), (0, 4, 4), (2, 0, 4)], ids=str)
def test_mn_major(device: str, shape: tuple[int, ...]) -> None:
    sf = torch.randn(shape, generator=generator(0))
    for view in views(sf, device):
        result = deep_gemm_ops.get_mn_major_tma_aligned_tensor(view)
        assert same_bits(result, sf)
        assert result.stride() == mn_major_strides(shape)
        assert result.data_ptr() != view.data_ptr() or result.numel() == 0
        out = like(result, float("nan"))
        assert deep_gemm_ops.get_mn_major_tma_aligned_tensor(view, out=out) is out
        assert same_bits(out, sf)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7), (2, 128, 4), (0, 4, 4), (2, 0, 4)], ids=str)
def test_mn_major_packed(device: str, shape: tuple[int, ...]) -> None:
    powers = exponents(shape)
    expected = encode_scales(powers, "packed", len(shape) - 1)
    for view in views(torch.pow(2.0, powers.double()).float(), device):
        result = deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(view)
        assert same_bits(result, expected)
        assert result.stride() == mn_major_strides(tuple(expected.shape))
        out = like(result, -1)
        assert deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(view, out=out) is out
        assert same_bits(out, expected)


def test_packing_never_rounds(device: str) -> None:
    """What UE8M0 cannot hold becomes its NaN."""
    inf, nan = float("inf"), float("nan")
    powers = {1.0: 127, 2.0: 128, 0.5: 126, 2.0**127: 254, 2.0**-126: 1, 2.0**-127: 0}
    others = [0.0, -0.0, -1.0, 3.0, 1.0000001, 0.99999994, 2.0**-128, 2.0**-149, inf, -inf, nan]
    sf = torch.tensor([[*powers, *others]], dtype=torch.float32, device=device)
    packed = deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf).cpu()
    codes = [(int(packed[0, i // 4]) >> (8 * (i % 4))) & 0xFF for i in range(sf.shape[1])]
    assert codes == [*powers.values(), *[255] * len(others)]


def test_packing_rounds_up_where_asked_for(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    codes = {1.0: 127, 3.0: 129, 1.0000001: 128, 0.99999994: 127, 2.0**-127: 0, 2.0**-149: 0, 1.5 * 2.0**-127: 1}
    codes |= {0.0: 0, 2.0**127: 254, 1.1 * 2.0**127: 255, -1.0: 255, inf: 255, -inf: 255, nan: 255}
    sf = torch.tensor([[*codes]], dtype=torch.float32, device=device)
    packed = deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, round_up=True)
    words = packed.cpu()
    assert [(int(words[0, i // 4]) >> (8 * (i % 4))) & 0xFF for i in range(len(codes))] == [*codes.values()]
    out = torch.empty_strided(packed.shape, packed.stride(), dtype=torch.int32, device=device)
    deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, round_up=True, out=out)
    assert same_bits(out, packed)
    if device != "cpu" and on_sm100(device):  # where transformed scales are packed
        result = deep_gemm_ops.transform_sf_into_required_layout(sf, 1, 128 * len(codes), [1, 128], round_up=True)
        assert same_bits(result, packed)
    expected = reference.transform_sf_into_required_layout(
        sf.cpu(), 1, 128 * len(codes), [1, 128], round_up=True, arch_major=10
    )
    assert same_bits(expected, packed)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7), (2, 128, 4)], ids=str)
@pytest.mark.parametrize("kind", ["e8m0", "packed"])
def test_expand(device: str, shape: tuple[int, ...], kind: str) -> None:
    powers = exponents(shape)
    expected = torch.pow(2.0, powers.double()).float()
    for view in views(encode_scales(powers, kind, len(shape) - 1), device):
        result = deep_gemm_ops.expand_ue8m0(view, k_sf=shape[-1])
        assert same_bits(result, expected)
        assert result.stride() == mn_major_strides(shape)
        out = like(result, float("nan"))
        assert deep_gemm_ops.expand_ue8m0(view, k_sf=shape[-1], out=out) is out
        assert same_bits(out, expected)


def test_expand_every_code(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    expected = [2.0 ** (code - 127) for code in range(255)]
    for sf in (codes.view(torch.float8_e8m0fnu), codes.view(torch.int32)):
        result = deep_gemm_ops.expand_ue8m0(sf, k_sf=256).cpu()[0]
        assert result[:255].tolist() == expected
        assert bool(result[255].isnan())
    assert torch.equal(
        deep_gemm_ops.expand_ue8m0(codes.view(torch.float8_e8m0fnu), k_sf=256)[0, :255].cpu(),
        codes.cpu().view(torch.float8_e8m0fnu).float()[0, :255],
    )


@pytest.mark.parametrize("gran_k", [128, 32])
@pytest.mark.parametrize("sizes", [[128], [256, 0, 640], [0, 0], [1, 129, 511, 513], [4096, 128, 0, 128], []], ids=str)
def test_k_grouped_packing(device: str, sizes: list[int], gran_k: int) -> None:
    rows_of = [ceil_div(k, gran_k) for k in sizes]
    for mn, spare in itertools.product([1, 4, 130], [0, 3]):
        powers = exponents((sum(rows_of) + spare, mn), seed=mn)
        words = (powers.shape[0] + 3 * len(sizes)) // 4
        expected = torch.zeros(words, mn, dtype=torch.int32)
        row = word = 0
        for rows in rows_of:
            group = encode_scales(powers[row : row + rows], "packed", 0)
            expected[word : word + group.shape[0]] = group
            row, word = row + rows, word + group.shape[0]
        ks = torch.tensor(sizes, dtype=torch.int32, device=device)
        for view in views(torch.pow(2.0, powers.double()).float(), device):
            result = deep_gemm_ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(view, ks, gran_k=gran_k)
            assert same_bits(result, expected), (sizes, gran_k, mn, spare)
            assert result.stride() == (ceil_div(mn, 4) * 4, 1)


@pytest.mark.parametrize("sizes", [[10000], [-5, 256], [128, 2**31 - 1, 128], [-(2**31), 640]], ids=str)
def test_k_grouped_packing_survives_any_sizes(device: str, sizes: list[int]) -> None:
    """Contents on the device cannot be refused: no memory out of range is touched, and what fits is packed."""
    sf = torch.ones(5, 20, device=device)
    ks = torch.tensor(sizes, dtype=torch.int32, device=device)
    result = deep_gemm_ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks)
    assert same_bits(result, reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf.cpu(), ks.cpu()))
    used = [min(max(ceil_div(k, 128), 0), 5) for k in sizes]
    assert int(result.cpu().view(torch.uint8).count_nonzero()) == 20 * min(sum(used), 5)


@pytest.mark.parametrize("kind", ["float32", "e8m0", "packed"])
@pytest.mark.parametrize("gran_mn", [1, 128])
@pytest.mark.parametrize("gran_k", [128, 32])
def test_transform(device: str, kind: str, gran_mn: int, gran_k: int) -> None:
    for (mn, k), groups, disable in itertools.product([(200, 700), (1, 128), (130, 1)], [None, 3], [False, True]):
        shape = (ceil_div(mn, gran_mn), ceil_div(k, gran_k))
        powers = exponents(shape if groups is None else (groups, *shape))
        for view in views(encode_scales(powers, kind, powers.dim() - 1), device):
            options = {"num_groups": groups, "disable_ue8m0_cast": disable}
            results = [
                deep_gemm_ops.transform_sf_into_required_layout(view, mn, k, [gran_mn, gran_k], **options),
                deep_gemm_ops.transform_sf_into_required_layout(
                    view, mn, k, [gran_mn, 1, gran_k], is_sfa=True, **options
                ),
                deep_gemm_ops.transform_sf_into_required_layout(
                    view, mn, k, [1, gran_mn, gran_k], is_sfa=False, **options
                ),
            ]
            sm100 = device == "cuda" and torch.cuda.get_device_capability()[0] == 10
            if sm100 and not (kind == "float32" and disable):
                rows = torch.arange(mn) // gran_mn
                expected = encode_scales(powers.index_select(-2, rows), "packed", powers.dim() - 1)
            else:
                expected = torch.pow(2.0, powers.double()).float()
            for result in results:
                assert same_bits(result, expected)
                assert result.stride() == mn_major_strides(tuple(expected.shape))


@pytest.mark.parametrize("kind", ["float32", "e8m0", "packed"])
@pytest.mark.parametrize("gran_mn", [1, 128])
def test_reference_of_transform_for_sm100(kind: str, gran_mn: int) -> None:
    powers = exponents((ceil_div(200, gran_mn), 6))
    result = reference.transform_sf_into_required_layout(
        encode_scales(powers, kind, 1), 200, 700, [gran_mn, 128], arch_major=10
    )
    assert same_bits(result, encode_scales(powers[torch.arange(200) // gran_mn], "packed", 1))
    assert result.stride() == (1, 200)


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 130])
@pytest.mark.parametrize("cols", [0, 1, 7, 64, 257])
def test_transpose(device: str, rows: int, cols: int) -> None:
    codes = torch.randint(0, 256, (rows, cols + 5), generator=generator(cols), dtype=torch.uint8)
    for x in (codes[:, :cols].contiguous(), codes[:, 3 : cols + 3]):
        x = x.to(device) if x.is_contiguous() else codes.to(device)[:, 3 : cols + 3]
        result = deep_gemm_ops.transpose_fp8(x.view(FP8))
        assert torch.equal(result.view(torch.uint8), x.t())
        assert result.is_contiguous()
        assert result.stride() == torch.empty(cols, rows).stride()
        buffer = torch.full((cols + 1, rows + 4), 0x7F, dtype=torch.uint8, device=device).view(FP8)
        out = buffer[:cols, 1 : rows + 1]
        assert deep_gemm_ops.transpose_fp8(x.view(FP8), out=out) is out
        assert torch.equal(out.view(torch.uint8), x.t())
        assert bool((fp8_bytes(buffer)[cols:] == 0x7F).all())
        assert bool((fp8_bytes(buffer)[:, 0] == 0x7F).all())
        assert bool((fp8_bytes(buffer)[:, rows + 1 :] == 0x7F).all())


def test_to_tma_aligned(device: str) -> None:
    x = torch.randn(33, 130, generator=generator(0)).bfloat16().to(device)
    for dtype in (torch.bfloat16, FP8, torch.float32):
        y = x.to(dtype)
        for view in (y, y[1:, 1:], y.t(), y[:1], y[:0], y[:, :1], y[:, :0], y[:1].expand(33, 130)):
            result = deep_gemm_ops.to_tma_aligned(view)
            assert same_bits(result, view)
            assert result.stride(1) == 1 or result.shape[1] <= 1 or result.numel() == 0
            assert result.shape[0] <= 1 or result.numel() == 0 or result.stride(0) * y.element_size() % 16 == 0
            assert result.numel() == 0 or result.data_ptr() % 16 == 0
            assert deep_gemm_ops.to_tma_aligned(result) is result
    unaligned = torch.zeros(33, 144, device=device).to(FP8)[:, 8:136]  # rows lie well, but begin at 8 modulo 16
    result = deep_gemm_ops.to_tma_aligned(unaligned)
    assert result.data_ptr() % 16 == 0
    assert same_bits(result, unaligned)
    with pytest.raises(RuntimeError, match="row stride 130 bytes"):
        deep_gemm_ops.fp8_gemm_nt(
            x.to(FP8), *[torch.ones(33, 2, device=device)], x.to(FP8), torch.ones(33, 2, device=device)
        )
    fixed = deep_gemm_ops.to_tma_aligned(x.to(FP8))
    sf = torch.ones(33, 2, device=device)
    assert deep_gemm_ops.fp8_gemm_nt(fixed, sf, fixed, sf).shape == (33, 33)


def test_sizes() -> None:
    assert [deep_gemm_ops.get_tma_aligned_size(x, 4) for x in (0, 1, 4, 5, 130)] == [0, 4, 4, 8, 132]
    assert [deep_gemm_ops.get_tma_aligned_size(x, 1) for x in (1, 16, 17)] == [16, 16, 32]
    assert [deep_gemm_ops.get_tma_aligned_size(x, 2) for x in (1, 8, 9)] == [8, 8, 16]
    assert [layout.ceil_div(x, 128) for x in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert [layout.align(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
