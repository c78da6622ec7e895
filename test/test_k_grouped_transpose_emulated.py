"""The kernel that brings FP8 values of K groups into the form of the k-grouped product, on the PTX emulator."""

from __future__ import annotations

import pytest
import torch

from deep_gemm_ops.layout import group_ranges

import cast_emulation as emulation
from cast_emulation import align, assert_memory_bound, buffer, matrix

pytestmark = pytest.mark.emulated

LAYOUTS = {"psum": 2, "offsets": 3, "sizes": 5}
SIZES = [[300], [128, 256], [0, 130, 0, 1, 127, 0], [5] * 40 + [200] + [0] * 30]


def transpose(
    ks: list[int],
    rows: int,
    mn: int,
    layout: str = "sizes",
    *,
    flat: bool = False,
    stride: int = 0,
    offset: int = 0,
    alignment: int = 128,
    **options: object,
) -> emulation.Run:
    """Runs the kernel on random bytes and compares each group; what lies behind the last one stays poison."""
    random = torch.Generator().manual_seed(rows + mn)
    x = buffer(rows * mn, torch.uint8, offset) if flat else matrix((rows, mn), (stride or mn, 1), torch.uint8, offset)
    x.copy_(torch.randint(0, 256, x.shape, generator=random, dtype=torch.uint8))
    of_groups = buffer(len(ks), torch.int32)
    of_groups.copy_(torch.tensor(ks, dtype=torch.int32))
    columns = 128 * (rows // 128 + len(ks))
    out = matrix((mn, columns), (columns, 1), torch.uint8)
    problem = emulation.GroupedTransposeProblem(
        problem=emulation.KGroupedTransposeProblem(
            x=x.data_ptr(),
            flat=flat,
            x_stride=0 if flat else x.stride(0),
            mn=mn,
            out=out.data_ptr(),
            out_stride=columns,
        ),
        groups=emulation.KGroups(
            ends=of_groups.data_ptr(),
            ends_stride=1,
            num_groups=len(ks),
            rows=rows,
            layout=LAYOUTS[layout],
            alignment=alignment,
        ),
    )
    result = emulation.run("k_grouped_transpose", problem, [x, of_groups], [out], **options)
    column = 0
    for begin, end in group_ranges(ks, rows, layout, alignment):
        size, padded = end - begin, align(end - begin, 128)
        values = x[begin * mn : end * mn].view(mn, size) if flat else x[begin:end].t()
        assert torch.equal(out[:, column : column + size], values), (begin, end)
        assert not out[:, column + size : column + padded].any(), (begin, end)
        column += padded
    assert (out[:, column:] == emulation.POISON).all()
    return result


def ends_of(sizes: list[int], layout: str, alignment: int = 128) -> list[int]:
    if layout == "sizes":
        return sizes
    ends, end = [], 0
    for size in sizes:
        end = (align(end, alignment) if layout == "psum" else end) + size
        ends.append(end)
    return ends


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_transposition(layout: str) -> None:
    for seed, sizes in enumerate(SIZES):
        ks = ends_of(sizes, layout)
        rows = sum(sizes) if layout == "sizes" else ks[-1]
        for spare, mn, stride, offset in ((0, 136, 0, 0), (130, 77, 0, 0), (3, 128, 144, 0), (0, 130, 133, 3)):
            transpose(ks, rows + spare, mn, layout, stride=stride, offset=offset, seed=seed)


def test_other_alignments() -> None:
    for alignment in (8, 64, 256):
        ks = ends_of([100, 0, 31, 129], "psum", alignment)
        transpose(ks, ks[-1], 72, "psum", alignment=alignment)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_flat(layout: str) -> None:
    """Groups that are K-major already; a base address that is no multiple of 16 bytes costs time only."""
    for sizes in ([128], [256, 0, 384], [128] * 35):
        ks = ends_of(sizes, layout)
        for spare, mn, offset in ((0, 136, 0), (128, 77, 0), (0, 33, 5)):
            transpose(ks, sum(sizes) + spare, mn, layout, flat=True, offset=offset)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_contents_that_make_no_sense_are_clamped(layout: str, flat: bool) -> None:
    for ks in ([-5, 1 << 30, 7], [2**31 - 1, -(2**31), 100], [300, 200, 350, 10], [384, 384, 385], [100, 10, 150]):
        transpose(ks, 384, 72, layout, flat=flat)


def test_nothing_to_do() -> None:
    assert transpose([], 128, 72).kernel == ""
    assert transpose([0, 0], 0, 72).kernel == ""
    assert transpose([128], 128, 0).kernel == ""
    transpose([0, 0], 128, 72)


def test_bytes_moved() -> None:
    """Each value is read once and written once, the padding written once; the search for groups comes on top."""
    rows, mn = 512, 256
    for flat in (False, True):
        result = transpose([256, 256], rows, mn, flat=flat, counters=True)
        search = 32 * (mn // 128) * (rows // 128 + 2) * 8  # a sector for each warp of each CTA
        assert_memory_bound(result, rows * mn + search, rows * mn)


def test_pdl_is_passed_on() -> None:
    assert transpose([8], 8, 16, pdl=True).pdl
    assert not transpose([8], 8, 16).pdl
