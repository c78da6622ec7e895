"""fp8_fp4_gemm: values against float64, all that it accepts and refuses, under PyTorch's tracers.

On a GPU these need SM100, which has not been at hand yet: see test_gemm_sm100_emulated.py.
"""
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

from common import same_bits
from fp4 import E2M1, FP4_DTYPES, Fp4Case

SM100 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (10, 0)


@pytest.fixture(params=["cpu", "cuda"] if SM100 else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("recipe", [(1, 1, 32), (1, 1, 128), (1, 128, 128), (128, 1, 32)], ids=str)
@pytest.mark.parametrize(("a", "b"), [("fp8", "fp4"), ("fp4", "fp8"), ("fp4", "fp4"), ("fp8", "fp8")])
def test_values(device: str, a: str, b: str, recipe: tuple[int, int, int]) -> None:
    for (m, n, k), scales in itertools.product([(33, 200, 256), (1, 7, 384)], ("float32", "e8m0", "packed")):
        for c, out, dtype in [("", False, "bfloat16"), ("bias", True, "float32"), ("alias", True, "bfloat16")]:
            case = Fp4Case(m, n, k, "nt", recipe, True, scales, c=c, out=out, out_dtype=dtype, a=a, b=b, device=device)
            dataclasses.replace(case, pad=32, data="integer").run()


@pytest.mark.parametrize(("layout", "a", "b"), [("nn", "fp4", "fp8"), ("tt", "fp8", "fp4"), ("tn", "fp8", "fp8")])
def test_layouts(device: str, layout: str, a: str, b: str) -> None:
    for sf_strides, dtype in itertools.product(("rows", "columns", "scattered"), FP4_DTYPES):
        Fp4Case(70, 90, 256, layout, (1, 1, 32), sf_strides=sf_strides, a=a, b=b, fp4_dtype=dtype, device=device).run()


@pytest.mark.parametrize("k", [2, 30, 34, 126, 130, 200])
def test_ragged_k_on_the_cpu(k: int) -> None:
    for recipe in [(1, 1, 32), (1, 1, 128)]:
        Fp4Case(5, 6, k, "nt", recipe, True, a="fp4").run()
        Fp4Case(5, 6, k, "nt", recipe, True, "packed").run()


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
fp8_gemm: fp8_gemm_nt: b has dtype uint8, expected float8_e4m3fn
requires grad: fp8_fp4_gemm_nt: sfa has requires_grad True, expected False (not differentiable: use torch.no_grad() or sfa.detach())""",
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
