"""Converters of scales to and from ``torch.nn.functional.scaled_mm``."""

from __future__ import annotations

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops.scaled_mm import from_scaled_mm_scales, to_scaled_mm_scales

from common import assert_close, error_bar, generator, same_bits


@pytest.mark.parametrize(("mn", "k"), [(256, 640), (130, 128), (1, 1000), (7, 512), (0, 256), (5, 0)])
def test_there_and_back(device: str, mn: int, k: int) -> None:
    x = torch.randn(mn, k, generator=generator(0)).to(device)
    _, rows = deep_gemm_ops.per_token_cast_to_fp8(x)
    _, blocks = deep_gemm_ops.per_block_cast_to_fp8(x)
    k_blocks, padded = -(-k // 128), -(-k // 512) * 4
    for sf in (rows, rows.contiguous()):
        theirs = to_scaled_mm_scales(sf, 1)
        assert theirs.shape == (mn, k_blocks)
        assert theirs.stride() == (1, mn)
        ours = from_scaled_mm_scales(theirs, 1, k)
        assert same_bits(ours, rows)
        assert ours.stride() == rows.stride()
    for sf in (blocks, blocks.contiguous()):
        theirs = to_scaled_mm_scales(sf, 128)
        assert theirs.shape == (padded, -(-mn // 128))
        assert theirs.numel() == 0 or theirs.stride(0) == 1
        assert same_bits(theirs[:k_blocks].t(), blocks)
        assert not theirs[k_blocks:].any()
        assert same_bits(from_scaled_mm_scales(theirs, 128, k), blocks)


def test_no_copy_where_layouts_agree(device: str) -> None:
    _, sf = deep_gemm_ops.per_token_cast_to_fp8(torch.randn(128, 512, device=device))
    theirs = to_scaled_mm_scales(sf, 1)
    assert theirs.data_ptr() == sf.data_ptr()
    assert from_scaled_mm_scales(theirs, 1, 512).data_ptr() == sf.data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sf: to_scaled_mm_scales(sf.double(), 1), "to_scaled_mm_scales: sf has dtype float64, expected float32"),
        (lambda sf: to_scaled_mm_scales(sf[0], 1), "to_scaled_mm_scales: sf has rank 1, expected 2"),
        (lambda sf: to_scaled_mm_scales(sf, 32), "to_scaled_mm_scales: gran_mn has value 32, expected 1 or 128"),
        (
            lambda sf: from_scaled_mm_scales(sf, 1, 1000),
            r"sf has shape \[4, 5\], expected \[MN, ceil\(K / 128\)\] = \[MN, 8",
        ),
        (lambda sf: from_scaled_mm_scales(sf, 128, 1000), r"sf has shape \[4, 5\], expected .* = \[8, \.\.\.\]"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(4, 5))


@pytest.mark.parametrize(("m", "n", "k"), [(256, 384, 640), (20, 128, 512), (64, 528, 1152)])
def test_scaled_mm_agrees(cuda: str, m: int, n: int, k: int) -> None:
    """The same product from PyTorch, in every combination that it has."""
    if not hasattr(torch.nn.functional, "scaled_mm") or tuple(map(int, (torch.version.cuda or "0.0").split("."))) < (
        12,
        9,
    ):
        pytest.skip("this PyTorch has no scaled_mm with blockwise scales")
    kinds = torch.nn.functional.ScalingType
    x, w = (torch.randn(size, k, generator=generator(size)).to(cuda) for size in (m, n))
    for gran_a, gran_b in [(1, 128), (1, 1), (128, 1)]:
        casts = {1: deep_gemm_ops.per_token_cast_to_fp8, 128: deep_gemm_ops.per_block_cast_to_fp8}
        kind = {1: kinds.BlockWise1x128, 128: kinds.BlockWise128x128}
        (a, sfa), (b, sfb) = casts[gran_a](x), casts[gran_b](w)
        y = deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb, recipe=[gran_a, gran_b, 128])
        scales = to_scaled_mm_scales(sfa, gran_a), to_scaled_mm_scales(sfb, gran_b)
        theirs = torch.nn.functional.scaled_mm(
            a, b.t(), scales[0], kind[gran_a], scales[1], kind[gran_b], output_dtype=torch.bfloat16
        )
        assert_close(theirs, y.double(), tol=2 * error_bar(torch.bfloat16))
