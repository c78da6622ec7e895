"""Products of FP8 and FP4: values against float64, all that they accept and refuse, under PyTorch's tracers."""
# ruff: noqa: E501  (messages are printed as they are)

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

import deep_gemm_ops
from deep_gemm_ops.fp8_fp4_gemm import expand_fp4

from common import assert_close, encode_scales, error_bar, generator, on_sm100, same_bits
from fp4 import E2M1, FP4_DTYPES, Fp4Case
from gemm_emulation import pack_fp4
from grouped import MaskedCase, MGroupedCase


@pytest.mark.parametrize("recipe", [(1, 1, 32), (1, 1, 128), (1, 128, 128), (128, 1, 32)], ids=str)
@pytest.mark.parametrize(("a", "b"), [("fp8", "fp4"), ("fp4", "fp8"), ("fp4", "fp4"), ("fp8", "fp8")])
def test_values(device: str, a: str, b: str, recipe: tuple[int, int, int]) -> None:
    for (m, n, k), scales in itertools.product([(33, 200, 256), (1, 7, 384)], ("float32", "random", "e8m0", "packed")):
        for c, out, dtype in [("", False, "bfloat16"), ("bias", True, "float32"), ("alias", True, "bfloat16")]:
            case = Fp4Case(m, n, k, "nt", recipe, True, scales, c=c, out=out, out_dtype=dtype, a=a, b=b, device=device)
            dataclasses.replace(case, pad=32, data="normal" if scales == "random" else "integer").run()


@pytest.mark.parametrize(("layout", "a", "b"), [("nn", "fp4", "fp8"), ("tt", "fp8", "fp4"), ("tn", "fp8", "fp8")])
def test_layouts(device: str, layout: str, a: str, b: str) -> None:
    for sf_strides, dtype in itertools.product(("rows", "columns", "scattered"), FP4_DTYPES):
        Fp4Case(70, 90, 256, layout, (1, 1, 32), sf_strides=sf_strides, a=a, b=b, fp4_dtype=dtype, device=device).run()


@pytest.mark.parametrize("k", [2, 30, 34, 126, 130, 200])
def test_ragged_k(device: str, k: int) -> None:
    if on_sm100(device):
        pytest.skip("SM100 takes multiples of 128")
    for recipe in [(1, 1, 32), (1, 1, 128)]:
        Fp4Case(5, 6, k, "nt", recipe, True, a="fp4", device=device).run()
        Fp4Case(5, 6, k, "nt", recipe, True, "packed", device=device).run()


@pytest.mark.parametrize("m", [1, 9, 17, 40, 100, 300])
def test_more_tokens_than_a_tile(device: str, m: int) -> None:
    for scales, k in itertools.product(("random", "packed"), (128, 896)):
        Fp4Case(m, 264, k, "nt", (1, 1, 32), True, scales, pad=32, device=device).run()
        Fp4Case(m, 264, k, "nt", (1, 1, 32), True, data="integer", c="full", device=device).run()


GROUPED_RECIPES = [(1, 1, 32), (1, 1, 128), (1, 128, 128), (128, 1, 32), (1, 1, 128, 32)]


@pytest.mark.parametrize(
    ("recipe", "fp4"),
    # A granularity of B's own is for B in FP4.
    [(r, fp4) for r in GROUPED_RECIPES for fp4 in ("b", "a", "ab") if len(r) == 3 or fp4 != "a"],
    ids=str,
)
def test_grouped_scales(device: str, recipe: tuple[int, ...], fp4: str) -> None:
    ragged = 384 if on_sm100(device) else 416  # SM100 takes multiples of 128
    for scales, k in itertools.product(("random", "e8m0", "packed"), (256, ragged)):
        options: dict[str, Any] = {"device": device, "type": "fp8_fp4", "fp4": fp4, "pad": 32}
        options |= {"recipe": recipe, "pass_recipe": True, "scales": scales, "sf_strides": "scattered"}
        MGroupedCase((100, 0, 31), 150, k, layout="psum", **options).run()
        MaskedCase((3, 0, 40), 40, 150, k, **options).run()


@pytest.mark.parametrize("layout", ["indices", "psum", "offsets"])
def test_grouped_sizes(device: str, layout: str) -> None:
    """Groups of no row, a few, a part of a tile and several; rows of padding, set to zero or left alone."""
    for sizes in [(130, 64, 200), (0, 7, 0, 0, 33, 0), (1, 1, 1), (0, 0), ()]:
        for out, scales, data in [(False, "packed", "normal"), (True, "random", "normal"), (False, "e8m0", "integer")]:
            options: dict[str, Any] = {"out": out, "scales": scales, "data": data, "device": device}
            case = MGroupedCase(sizes, 136, 384, type="fp8_fp4", layout=layout, recipe=(1, 1, 32), tail=70, **options)
            case.run()


def test_grouped_layouts(device: str) -> None:
    """B as [G, K, N] is FP8."""
    for recipe in [(1, 1, 32), (1, 128, 128)]:
        MGroupedCase((40, 3), 56, 256, "nn", "fp8_fp4", recipe=recipe, fp4="a", device=device).run()


@pytest.mark.parametrize("m_max", [1, 20, 192])
def test_masked(device: str, m_max: int) -> None:
    for counts in [(0, 1, m_max), (m_max // 2, m_max, 0)]:
        for out, scales in [(False, "packed"), (True, "random")]:
            options: dict[str, Any] = {"out": out, "scales": scales, "recipe": (1, 1, 32), "device": device}
            MaskedCase(counts, m_max, 136, 256, "fp8_fp4", out_dtype="float32", **options).run()
            MaskedCase(counts, m_max, 136, 256, "fp8_fp4", data="integer", **options).run()


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(("n", "k"), [(0, 128), (40, 0)])
def test_grouped_empty(device: str, n: int, k: int, out: bool) -> None:
    options: dict[str, Any] = {"type": "fp8_fp4", "recipe": (1, 1, 32), "out": out, "device": device}
    MGroupedCase((5, 0, 130), n, k, tail=2, **options).run()
    MaskedCase((0, 3), 5, n, k, **options).run()


@pytest.mark.parametrize("recipe", [(1, 1, 128, 32), (1, 128, 128, 32), (128, 1, 128, 32), (1, 1, 32, 32)], ids=str)
def test_a_granularity_for_each_operand(device: str, recipe: tuple[int, ...]) -> None:
    for a, scales, strides in itertools.product(("fp8", "fp4"), ("random", "e8m0", "packed"), ("columns", "scattered")):
        options: dict[str, Any] = {"scales": scales, "sf_strides": strides, "a": a, "pad": 32, "device": device}
        for m, n, k in [(40, 136, 640), (3, 70, 1664)]:
            Fp4Case(m, n, k, "nt", recipe, True, **options).run()
            Fp4Case(m, n, k, "nt", recipe, False, **options).run()
        if not on_sm100(device):
            Fp4Case(5, 6, 200, "nt", recipe, True, **options).run()


def test_scales_far_apart(device: str) -> None:
    """Of each 128 of K the first 32 have the largest scale, and are zero for half of the rows."""
    case = Fp4Case(9, 96, 512, "nt", (1, 1, 128, 32), True, "packed", device=device)
    (a, sfa, _, _), _, _, _ = case.build()
    random = generator(0)
    codes = torch.randint(16, (96, 4, 4, 32), generator=random)
    codes[::2, :, 0] = 0
    exponents = -torch.randint(8, 40, (96, 4, 4), generator=random)
    exponents[:, :, 0] = 0
    weights = (E2M1[codes] * torch.pow(2.0, exponents.double())[..., None]).flatten(1)
    sfb = encode_scales(exponents.flatten(1), "packed", 1).to(device)
    result = deep_gemm_ops.fp8_fp4_gemm_nt(
        a, sfa, pack_fp4(codes.flatten(1)).to(device), sfb, recipe=case.recipe, out_dtype=torch.float32
    )
    words = sfa.cpu().contiguous().view(torch.uint8).view(9, -1)[:, :4]
    expected = (a.cpu().double().view(9, 4, 128) * torch.exp2(words.double() - 127)[..., None]).flatten(1) @ weights.t()
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert_close(
            result.cpu()[:, rows], expected[:, rows], tol=error_bar(torch.float32), repro="test_scales_far_apart"
        )


def test_empty(device: str) -> None:
    for m, n, k in [(0, 5, 128), (5, 0, 128), (5, 6, 0), (0, 0, 0)]:
        for c, out in [("", False), ("full", False), ("bias", True)]:
            Fp4Case(m, n, k, "nt", (1, 1, 32), True, c=c, out=out, device=device).run()


def test_expansion_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expanded = expand_fp4(codes[None])
    assert expanded.dtype == torch.float8_e4m3fn
    both = torch.stack((E2M1[codes.long() & 15], E2M1[codes.long() >> 4]), 1).flatten()
    assert same_bits(expanded[0].double(), both)


def test_bad_input() -> None:
    a, sfa = torch.zeros(4, 256).to(torch.float8_e4m3fn), torch.ones(4, 8)
    b, sfb = torch.zeros(6, 128, dtype=torch.uint8), torch.ones(6, 8)
    ops = torch.ops.deep_gemm
    packed_a = torch.zeros(128, 4, dtype=torch.uint8)
    calls: dict[str, Callable[[], Any]] = {
        "a of another type": lambda: ops.fp8_fp4_gemm_nt(a.float(), sfa, b, sfb),
        "MN-major FP4": lambda: ops.fp8_fp4_gemm_tt(packed_a, sfa.t(), b, sfb),
        "MN-major FP4 b": lambda: ops.fp8_fp4_gemm_nn(a, sfa, torch.zeros(128, 6, dtype=torch.int8), sfb.t()),
        "K": lambda: ops.fp8_fp4_gemm_nt(a, sfa, b[:, :64], sfb),
        "row stride": lambda: ops.fp8_fp4_gemm_nt(a, sfa, torch.zeros(6, 129, dtype=torch.uint8)[:, :128], sfb),
        "scales": lambda: ops.fp8_fp4_gemm_nt(a, sfa, b, sfb[:, :7]),
        "recipe": lambda: ops.fp8_fp4_gemm_nt(a, sfa, b, sfb, recipe=[1, 1, 32, 128]),
        "recipe of FP8": lambda: ops.fp8_fp4_gemm_nt(a, sfa[:, :2], a, sfa, recipe=[1, 1, 128, 32]),
        "packed scales": lambda: ops.fp8_fp4_gemm_nt(a[:, :128], sfa[:, :1], b[:, :64], sfb[:, :1].int()),
        "fp8_gemm": lambda: ops.fp8_gemm_nt(a, sfa, b, sfb),
        "requires grad": lambda: deep_gemm_ops.fp8_fp4_gemm_nt(a, sfa.clone().requires_grad_(), b, sfb),
    }
    lines = []
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
a of another type: fp8_fp4_gemm_nt: a has dtype float32, expected float8_e4m3fn, uint8, int8 or float4_e2m1fn_x2
MN-major FP4: fp8_fp4_gemm_tt: a has dtype uint8, expected float8_e4m3fn
MN-major FP4 b: fp8_fp4_gemm_nn: b has dtype int8, expected float8_e4m3fn
K: fp8_fp4_gemm_nt: b has K 128, expected 256 (the K of a)
row stride: fp8_fp4_gemm_nt: b has row stride 129 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
scales: fp8_fp4_gemm_nt: sfb has shape [6, 7], expected [N or ceil(N / 128), ceil(K / 32)] = [6 or 1, 8]
recipe: fp8_fp4_gemm_nt: recipe has value [1, 1, 32, 128], expected [1 or 128, 1 or 128, 128 or 32] or [1 or 128, 1 or 128, 128, 32]
recipe of FP8: fp8_fp4_gemm_nt: recipe has value [1, 1, 128, 32], expected [1 or 128, 1 or 128, 128 or 32]
packed scales: fp8_fp4_gemm_nt: recipe has value None, expected [gran_m, gran_n, 128] or [gran_m, gran_n, 128, 32] (packed scales fit both here)
fp8_gemm: fp8_gemm_nt: b has dtype uint8, expected float8_e4m3fn
requires grad: fp8_fp4_gemm_nt: sfa has requires_grad True, expected False (not differentiable: use torch.no_grad() or sfa.detach())""",
    )


def test_grouped_bad_input() -> None:
    a, sfa = torch.zeros(8, 256).to(torch.float8_e4m3fn), torch.ones(8, 8)
    b, sfb, groups = torch.zeros(2, 6, 128, dtype=torch.uint8), torch.ones(2, 6, 8), torch.zeros(8, dtype=torch.int32)
    nt, nn = (getattr(torch.ops.deep_gemm, f"m_grouped_fp8_fp4_gemm_{order}_contiguous") for order in ("nt", "nn"))
    masked = torch.ops.deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked
    calls: dict[str, Callable[[], Any]] = {
        "b of another type": lambda: nt(a, sfa, b.float(), sfb, groups),
        "MN-major FP4": lambda: nn(a, sfa, torch.zeros(2, 256, 3, dtype=torch.uint8), sfb.transpose(1, 2), groups),
        "K": lambda: nt(a, sfa, b[:, :, :64], sfb, groups),
        "base address": lambda: nt(a, sfa, torch.zeros(2, 6, 144, dtype=torch.uint8)[:, :, 8:136], sfb, groups),
        "masked": lambda: masked(a, sfa, b, sfb, groups, 1),
        "fp8": lambda: torch.ops.deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, sfa, b, sfb, groups),
    }
    lines = []
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        lines.append(f"{name}: {error.value}")
    assert_expected_inline(
        "\n".join(lines),
        """\
b of another type: m_grouped_fp8_fp4_gemm_nt_contiguous: b has dtype float32, expected float8_e4m3fn, uint8, int8 or float4_e2m1fn_x2
MN-major FP4: m_grouped_fp8_fp4_gemm_nn_contiguous: b has dtype uint8, expected float8_e4m3fn
K: m_grouped_fp8_fp4_gemm_nt_contiguous: b has K 128, expected 256 (the K of a)
base address: m_grouped_fp8_fp4_gemm_nt_contiguous: b has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)
masked: m_grouped_fp8_fp4_gemm_nt_masked: a has rank 2, expected 3
fp8: m_grouped_fp8_gemm_nt_contiguous: b has dtype uint8, expected float8_e4m3fn""",
    )


def test_fakes_and_opcheck() -> None:
    for (m, n, k), out, dtype in itertools.product([(6, 10, 256), (0, 3, 64), (2, 1, 0)], (False, True), FP4_DTYPES):
        case = Fp4Case(m, n, k, "nt", (1, 1, 32), True, out=out, fp4_dtype=dtype)
        arguments, keywords, _, _ = case.build()
        packet = getattr(torch.ops.deep_gemm, case.op)
        op = packet.out if out else packet.default
        # test_schema compares tensors, which FP8 and FP4 on the CPU cannot be.
        torch.library.opcheck(op, arguments, keywords, test_utils=("test_faketensor", "test_autograd_registration"))
        if out:
            continue
        real = op(*arguments, **keywords)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in arguments]
            fake = op(*fakes, **{name: x for name, x in keywords.items() if name != "c"})
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    grouped: dict[str, Any] = {"type": "fp8_fp4", "recipe": (1, 1, 32)}
    for out in (False, True):
        for grouped_case in (
            MGroupedCase((5, 0, 3), 10, 64, out=out, **grouped),
            MaskedCase((2, 0), 3, 10, 64, out=out, **grouped),
        ):
            built = grouped_case.build()
            packet = getattr(torch.ops.deep_gemm, grouped_case.op)
            utils = ("test_faketensor", "test_autograd_registration")
            torch.library.opcheck(
                packet.out if out else packet.default, tuple(built.arguments), built.keywords, test_utils=utils
            )


def test_compiles_once_for_all_sizes() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def product(a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> torch.Tensor:
        return deep_gemm_ops.fp8_fp4_gemm_nt(a, sfa, b, sfb, recipe=[1, 1, 32]) + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, n, k in [(5, 6, 256), (40, 24, 128), (3, 100, 512)]:
            arguments, _, expected, _ = Fp4Case(m, n, k, "nt", (1, 1, 32), True).build()
            result = product(*arguments)
            assert (result.double() - expected - 1).norm() <= 6e-3 * expected.norm() + math.sqrt(
                expected.numel()
            ) * 0.01
