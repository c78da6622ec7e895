"""Every wrong argument is refused before any work, with the same words on the CPU, on CUDA and while tracing."""
# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

import deep_gemm_ops

from common import FP8, LAYOUTS, cuda_condition

Arguments = dict[str, Any]

@pytest.fixture
def device(device_or_fake: str) -> str:
    """Where the operator gets the wrong arguments; "fake" ones have no memory."""
    return device_or_fake


def messages(op: Callable, base: Callable[[], Arguments], changes: dict[str, Callable[[Arguments], object]]) -> str:
    """One line for each change of good arguments that spoils them: the error it raises."""
    op(**base())
    lines = []
    for name, change in changes.items():
        arguments = base()
        replaced = change(arguments)
        try:
            op(**(replaced if isinstance(replaced, dict) else arguments))
        except RuntimeError as error:
            lines.append(f"{name}: {str(error).splitlines()[0]}")
        else:
            lines.append(f"{name}: NOT REFUSED")
    return "\n".join(lines)


def changed(**values: Callable[[Arguments], Any]) -> Callable[[Arguments], Arguments]:
    """A change that replaces arguments by functions of all of them."""
    return lambda arguments: {**arguments, **{name: value(arguments) for name, value in values.items()}}


def gemm_arguments(device: str, layout: str = "nt") -> Arguments:
    """M = 32, N = 144, K = 272."""
    a, sfa = torch.zeros(32, 272, device=device), torch.ones(32, 3, device=device)
    b, sfb = torch.zeros(144, 272, device=device), torch.ones(2, 3, device=device)
    if layout[0] == "t":
        a, sfa = a.t().contiguous(), sfa.t().contiguous()
    if layout[1] == "n":
        b, sfb = b.t().contiguous(), sfb.t().contiguous()
    return {"a": a.to(FP8), "sfa": sfa, "b": b.to(FP8), "sfb": sfb}


def twice(x: torch.Tensor) -> torch.Tensor:
    """[x, x] side by side."""
    return x.view(torch.uint8).repeat(1, 2).view(x.dtype)


def other_device(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def test_gemm_operands(device: str) -> None:
    changes = {
        "a of bfloat16": changed(a=lambda p: p["a"].to(torch.bfloat16)),
        "a of another FP8": changed(a=lambda p: p["a"].to(torch.float8_e5m2)),
        "b of int8": changed(b=lambda p: p["b"].view(torch.int8)),
        "a of rank 1": changed(a=lambda p: p["a"][0]),
        "b of rank 3": changed(b=lambda p: p["b"][None]),
        "K of b": changed(b=lambda p: p["b"][:, :256]),
        "a with a strided inner dimension": changed(a=lambda p: p["a"].t().contiguous().t()),
        "b with a strided inner dimension": changed(b=lambda p: twice(p["b"])[:, ::2]),
        "a with ragged rows": changed(a=lambda p: twice(p["a"])[:, :280].contiguous()[:, :272]),
        "b with overlapping rows": changed(b=lambda p: p["b"][:1].expand(144, 272)),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.fp8_gemm_nt, lambda: gemm_arguments(device), changes),
        """\
a of bfloat16: fp8_gemm_nt: a has dtype bfloat16, expected float8_e4m3fn
a of another FP8: fp8_gemm_nt: a has dtype float8_e5m2, expected float8_e4m3fn
b of int8: fp8_gemm_nt: b has dtype int8, expected float8_e4m3fn
a of rank 1: fp8_gemm_nt: a has rank 1, expected 2
b of rank 3: fp8_gemm_nt: b has rank 3, expected 2
K of b: fp8_gemm_nt: b has K 256, expected 272 (the K of a)
a with a strided inner dimension: fp8_gemm_nt: a has inner stride 32, expected 1 (use deep_gemm_ops.to_tma_aligned)
b with a strided inner dimension: fp8_gemm_nt: b has inner stride 2, expected 1 (use deep_gemm_ops.to_tma_aligned)
a with ragged rows: fp8_gemm_nt: a has row stride 280 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with overlapping rows: fp8_gemm_nt: b has row stride 0, expected at least 272 (use deep_gemm_ops.to_tma_aligned)""",
    )


def test_gemm_base_address() -> None:
    """Only real memory has an address."""
    changes = {name: changed(**{name: lambda p, name=name: twice(p[name])[:, 8:280]}) for name in ("a", "b")}
    for device in ["cpu"] + ([] if cuda_condition() else ["cuda"]):
        base = functools.partial(gemm_arguments, device)
        assert_expected_inline(
            messages(torch.ops.deep_gemm.fp8_gemm_nt, base, changes),
            """\
a: fp8_gemm_nt: a has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)
b: fp8_gemm_nt: b has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)""",
        )


def test_gemm_scales(device: str) -> None:
    changes = {
        "sfa of float64": changed(sfa=lambda p: p["sfa"].double()),
        "sfb of uint8": changed(sfb=lambda p: p["sfb"].to(torch.uint8)),
        "sfa of rank 1": changed(sfa=lambda p: p["sfa"][:, 0]),
        "sfb of rank 0": changed(sfb=lambda p: p["sfb"][0, 0]),
        "rows of sfa": changed(sfa=lambda p: p["sfa"][:31]),
        "columns of sfa": changed(sfa=lambda p: p["sfa"][:, :2]),
        "sfb of another granularity": changed(sfb=lambda p: torch.ones(144, 9, device=p["sfb"].device)),
        "sfb transposed": changed(sfb=lambda p: p["sfb"].t()),
        "packed sfb unpacked": changed(sfb=lambda p: p["sfb"].to(torch.int32)),
        "rows against the recipe": lambda p: {**p, "recipe": [128, 128, 128]},
        "columns against the recipe": lambda p: {**p, "recipe": [1, 128, 32]},
        "sfb against the recipe": lambda p: {**p, "recipe": [1, 1, 128]},
        "packed against the recipe": lambda p: {**p, "recipe": [1, 1, 32], "sfa": p["sfa"].to(torch.int32)},
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.fp8_gemm_nt, lambda: gemm_arguments(device), changes),
        """\
sfa of float64: fp8_gemm_nt: sfa has dtype float64, expected float32, float8_e8m0fnu or int32
sfb of uint8: fp8_gemm_nt: sfb has dtype uint8, expected float32, float8_e8m0fnu or int32
sfa of rank 1: fp8_gemm_nt: sfa has rank 1, expected 2
sfb of rank 0: fp8_gemm_nt: sfb has rank 0, expected 2
rows of sfa: fp8_gemm_nt: sfa has shape [31, 3], expected [M or ceil(M / 128), ceil(K / 128) or ceil(K / 32)] = [32 or 1, 3 or 9]
columns of sfa: fp8_gemm_nt: sfa has shape [32, 2], expected [M or ceil(M / 128), ceil(K / 128) or ceil(K / 32)] = [32 or 1, 3 or 9]
sfb of another granularity: fp8_gemm_nt: sfb has shape [144, 9], expected [N or ceil(N / 128), ceil(K / 128)] = [144 or 2, 3]
sfb transposed: fp8_gemm_nt: sfb has shape [3, 2], expected [N or ceil(N / 128), ceil(K / 128)] = [144 or 2, 3]
packed sfb unpacked: fp8_gemm_nt: sfb has shape [2, 3], expected [N or ceil(N / 128), ceil(K / 512)] = [144 or 2, 1]
rows against the recipe: fp8_gemm_nt: sfa has shape [32, 3], expected [ceil(M / 128), ceil(K / 128)] = [1, 3]
columns against the recipe: fp8_gemm_nt: sfa has shape [32, 3], expected [M, ceil(K / 32)] = [32, 9]
sfb against the recipe: fp8_gemm_nt: sfb has shape [2, 3], expected [N, ceil(K / 128)] = [144, 3]
packed against the recipe: fp8_gemm_nt: sfb has shape [2, 3], expected [N, ceil(K / 32)] = [144, 9]""",
    )


def test_gemm_recipe(device: str) -> None:
    recipes = [[], [1, 128], [1, 64, 128], [0, 128, 128], [1, 128, 64], [1, 128, 128, 1], [-1, 1, 32]]
    changes = {str(recipe): lambda p, recipe=recipe: {**p, "recipe": recipe} for recipe in recipes}

    def packed(p: Arguments) -> Arguments:
        a, b = p["a"][:, :128].contiguous(), p["b"][:, :128].contiguous()
        sfa = torch.ones(32, 1, dtype=torch.int32, device=a.device)
        return {"a": a, "sfa": sfa, "b": b, "sfb": torch.ones(144, 1, dtype=torch.int32, device=a.device)}

    changes["ambiguous"] = packed
    assert_expected_inline(
        messages(torch.ops.deep_gemm.fp8_gemm_nt, lambda: gemm_arguments(device), changes),
        """\
[]: fp8_gemm_nt: recipe has value [], expected [1 or 128, 1 or 128, 128 or 32]
[1, 128]: fp8_gemm_nt: recipe has value [1, 128], expected [1 or 128, 1 or 128, 128 or 32]
[1, 64, 128]: fp8_gemm_nt: recipe has value [1, 64, 128], expected [1 or 128, 1 or 128, 128 or 32]
[0, 128, 128]: fp8_gemm_nt: recipe has value [0, 128, 128], expected [1 or 128, 1 or 128, 128 or 32]
[1, 128, 64]: fp8_gemm_nt: recipe has value [1, 128, 64], expected [1 or 128, 1 or 128, 128 or 32]
[1, 128, 128, 1]: fp8_gemm_nt: recipe has value [1, 128, 128, 1], expected [1 or 128, 1 or 128, 128 or 32]
[-1, 1, 32]: fp8_gemm_nt: recipe has value [-1, 1, 32], expected [1 or 128, 1 or 128, 128 or 32]
ambiguous: fp8_gemm_nt: recipe has value None, expected [gran_m, gran_n, 128] or [gran_m, gran_n, 32] (packed scales fit both here)""",
    )


def test_gemm_result(device: str) -> None:
    changes = {
        "float16": lambda p: {**p, "out_dtype": torch.float16},
        "float64": lambda p: {**p, "out_dtype": torch.float64},
        "c of another dtype": lambda p: {**p, "c": torch.zeros(32, 144, device=p["a"].device)},
        "c of bfloat16 with a float32 result": lambda p: {
            **p,
            "c": torch.zeros(32, 144, dtype=torch.bfloat16, device=p["a"].device),
            "out_dtype": torch.float32,
        },
        "c of another shape": lambda p: {**p, "c": torch.zeros(144, 32, dtype=torch.bfloat16, device=p["a"].device)},
        "c of one row as a matrix": lambda p: {
            **p,
            "c": torch.zeros(1, 144, dtype=torch.bfloat16, device=p["a"].device),
        },
        "c too short": lambda p: {**p, "c": torch.zeros(143, dtype=torch.bfloat16, device=p["a"].device)},
        "c of rank 0": lambda p: {**p, "c": torch.zeros((), dtype=torch.bfloat16, device=p["a"].device)},
        "c transposed": lambda p: {**p, "c": torch.zeros(144, 32, dtype=torch.bfloat16, device=p["a"].device).t()},
        "c strided": lambda p: {**p, "c": torch.zeros(288, dtype=torch.bfloat16, device=p["a"].device)[::2]},
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.fp8_gemm_nt, lambda: gemm_arguments(device), changes),
        """\
float16: fp8_gemm_nt: out_dtype has value float16, expected bfloat16 or float32
float64: fp8_gemm_nt: out_dtype has value float64, expected bfloat16 or float32
c of another dtype: fp8_gemm_nt: c has dtype float32, expected bfloat16 (the dtype of the result)
c of bfloat16 with a float32 result: fp8_gemm_nt: c has dtype bfloat16, expected float32 (the dtype of the result)
c of another shape: fp8_gemm_nt: c has shape [144, 32], expected [M, N] or [N] = [32, 144] or [144]
c of one row as a matrix: fp8_gemm_nt: c has shape [1, 144], expected [M, N] or [N] = [32, 144] or [144]
c too short: fp8_gemm_nt: c has shape [143], expected [M, N] or [N] = [32, 144] or [144]
c of rank 0: fp8_gemm_nt: c has shape [], expected [M, N] or [N] = [32, 144] or [144]
c transposed: fp8_gemm_nt: c has inner stride 32, expected 1
c strided: fp8_gemm_nt: c has inner stride 2, expected 1""",
    )


def test_gemm_out(device: str) -> None:
    def base() -> Arguments:
        return {**gemm_arguments(device), "out": torch.zeros(32, 144, dtype=torch.bfloat16, device=device)}

    changes = {
        "out of float16": changed(out=lambda p: p["out"].half()),
        "out of FP8": changed(out=lambda p: p["out"].to(FP8)),
        "out of another shape": changed(out=lambda p: p["out"].t().contiguous()),
        "out of rank 1": changed(out=lambda p: p["out"].view(-1)),
        "out transposed": changed(out=lambda p: p["out"].t().contiguous().t()),
        "out with overlapping rows": changed(out=lambda p: p["out"][:1].expand(32, 144)),
        "c unlike out": changed(c=lambda p: p["out"].float()),
        "c of another shape": changed(c=lambda p: p["out"][:31]),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.fp8_gemm_nt.out, base, changes),
        """\
out of float16: fp8_gemm_nt: out has dtype float16, expected bfloat16 or float32
out of FP8: fp8_gemm_nt: out has dtype float8_e4m3fn, expected bfloat16 or float32
out of another shape: fp8_gemm_nt: out has shape [144, 32], expected [M, N] = [32, 144]
out of rank 1: fp8_gemm_nt: out has shape [4608], expected [M, N] = [32, 144]
out transposed: fp8_gemm_nt: out has inner stride 32, expected 1
out with overlapping rows: fp8_gemm_nt: out has row stride 0, expected at least 144
c unlike out: fp8_gemm_nt: c has dtype float32, expected bfloat16 (the dtype of the result)
c of another shape: fp8_gemm_nt: c has shape [31, 144], expected [M, N] or [N] = [32, 144] or [144]""",
    )


def test_gemm_devices() -> None:
    """Mixed devices: one of the tensors is on "meta", which needs no hardware."""
    lines = []
    for name in ("a", "sfa", "b", "sfb", "c", "out"):
        with FakeTensorMode():
            arguments = {**gemm_arguments("cpu"), "c": torch.zeros(144), "out": torch.zeros(32, 144)}
            arguments[name] = other_device(arguments[name])
            with pytest.raises(RuntimeError) as error:
                torch.ops.deep_gemm.fp8_gemm_nt.out(**arguments)
            lines.append(f"{name}: {str(error.value).splitlines()[0]}")
    assert_expected_inline(
        "\n".join(lines),
        """\
a: fp8_gemm_nt: b has device cpu, expected meta (the device of a)
sfa: fp8_gemm_nt: sfa has device meta, expected cpu (the device of a)
b: fp8_gemm_nt: b has device meta, expected cpu (the device of a)
sfb: fp8_gemm_nt: sfb has device meta, expected cpu (the device of a)
c: fp8_gemm_nt: c has device meta, expected cpu (the device of a)
out: fp8_gemm_nt: out has device meta, expected cpu (the device of a)""",
    )


def test_gemm_devices_cuda(cuda: str) -> None:
    for name in ("a", "sfa", "b", "sfb", "c", "out"):
        arguments = {
            **gemm_arguments(cuda),
            "c": torch.zeros(144, device=cuda),
            "out": torch.zeros(32, 144, device=cuda),
        }
        arguments[name] = arguments[name].cpu()
        with pytest.raises(
            RuntimeError, match=r"fp8_gemm_nt: \w+ has device c\w+(:0)?, expected c\w+(:0)? \(the device of a\)"
        ):
            torch.ops.deep_gemm.fp8_gemm_nt.out(**arguments)


@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
def test_gemm_layouts(device: str, layout: str) -> None:
    """Messages name sizes in the layout's own order, and MN-major operands need no alignment."""
    changes = {
        "K": changed(b=lambda p: p["b"][:, :256] if layout == "tt" else p["b"][:256]),
        "sfa": changed(sfa=lambda p: p["sfa"][:-1]),
        "sfb": changed(sfb=lambda p: p["sfb"][:, :-1]),
        "a strided": changed(a=lambda p: p["a"].t().contiguous().t()),
        "b strided": changed(b=lambda p: p["b"].t().contiguous().t()),
    }
    lines = messages(
        getattr(torch.ops.deep_gemm, f"fp8_gemm_{layout}"), lambda: gemm_arguments(device, layout), changes
    )
    if layout == "nn":
        assert_expected_inline(
            lines,
            """\
K: fp8_gemm_nn: b has K 256, expected 272 (the K of a)
sfa: fp8_gemm_nn: sfa has shape [31, 3], expected [M or ceil(M / 128), ceil(K / 128) or ceil(K / 32)] = [32 or 1, 3 or 9]
sfb: fp8_gemm_nn: sfb has shape [3, 1], expected [ceil(K / 128), N or ceil(N / 128)] = [3, 144 or 2]
a strided: fp8_gemm_nn: a has inner stride 32, expected 1 (use deep_gemm_ops.to_tma_aligned)
b strided: fp8_gemm_nn: b has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)""",
        )
    elif layout == "tn":
        assert_expected_inline(
            lines,
            """\
K: fp8_gemm_tn: b has K 256, expected 272 (the K of a)
sfa: fp8_gemm_tn: sfa has shape [2, 32], expected [ceil(K / 128) or ceil(K / 32), M or ceil(M / 128)] = [3 or 9, 32 or 1]
sfb: fp8_gemm_tn: sfb has shape [3, 1], expected [ceil(K / 128), N or ceil(N / 128)] = [3, 144 or 2]
a strided: fp8_gemm_tn: a has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
b strided: fp8_gemm_tn: b has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)""",
        )
    else:
        assert_expected_inline(
            lines,
            """\
K: fp8_gemm_tt: b has K 256, expected 272 (the K of a)
sfa: fp8_gemm_tt: sfa has shape [2, 32], expected [ceil(K / 128) or ceil(K / 32), M or ceil(M / 128)] = [3 or 9, 32 or 1]
sfb: fp8_gemm_tt: sfb has shape [2, 2], expected [N or ceil(N / 128), ceil(K / 128)] = [144 or 2, 3]
a strided: fp8_gemm_tt: a has inner stride 272, expected 1 (use deep_gemm_ops.to_tma_aligned)
b strided: fp8_gemm_tt: b has inner stride 144, expected 1 (use deep_gemm_ops.to_tma_aligned)""",
        )


def test_sizes_beyond_32_bits() -> None:
    """Meta tensors have sizes without memory."""
    lines = []
    huge = 2**31
    for layout in LAYOUTS:
        for m, n, k in [(huge, 16, 16), (16, huge, 16), (16, 16, huge)]:
            a = torch.empty((m, k) if layout[0] == "n" else (k, m), dtype=FP8, device="meta")
            b = torch.empty((n, k) if layout[1] == "t" else (k, n), dtype=FP8, device="meta")
            sf = torch.empty(1, 1, device="meta")
            with pytest.raises(RuntimeError) as error:
                getattr(torch.ops.deep_gemm, f"fp8_gemm_{layout}")(a, sf, b, sf)
            lines.append(str(error.value).splitlines()[0])
    for op in ("per_token_cast_to_fp8", "transpose_fp8"):
        dtype = FP8 if op == "transpose_fp8" else torch.bfloat16
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.deep_gemm, op)(torch.empty(16, huge, dtype=dtype, device="meta"))
        lines.append(str(error.value).splitlines()[0])
    assert_expected_inline(
        "\n".join(lines),
        """\
fp8_gemm_nt: a has M 2147483648, expected at most 2147483647
fp8_gemm_nt: b has N 2147483648, expected at most 2147483647
fp8_gemm_nt: a has K 2147483648, expected at most 2147483647
fp8_gemm_nn: a has M 2147483648, expected at most 2147483647
fp8_gemm_nn: b has N 2147483648, expected at most 2147483647
fp8_gemm_nn: a has K 2147483648, expected at most 2147483647
fp8_gemm_tn: a has M 2147483648, expected at most 2147483647
fp8_gemm_tn: b has N 2147483648, expected at most 2147483647
fp8_gemm_tn: a has K 2147483648, expected at most 2147483647
fp8_gemm_tt: a has M 2147483648, expected at most 2147483647
fp8_gemm_tt: b has N 2147483648, expected at most 2147483647
fp8_gemm_tt: a has K 2147483648, expected at most 2147483647
per_token_cast_to_fp8: x has dimension 1 2147483648, expected at most 2147483647
transpose_fp8: x has dimension 1 2147483648, expected at most 2147483647""",
    )


def test_large_results_are_allowed() -> None:
    """More than 2^31 elements, no dimension beyond 32 bits."""
    a = torch.empty(2**17, 128, dtype=FP8, device="meta")
    sf = torch.empty(2**17, 1, device="meta")
    assert torch.ops.deep_gemm.fp8_gemm_nt(a, sf, a, sf).shape == (2**17, 2**17)


CASTS = ("per_token", "per_channel", "per_block")


@pytest.mark.parametrize("kind", CASTS)
def test_casts(device: str, kind: str) -> None:
    op = f"{kind}_cast_to_fp8"
    changes = {
        "float64": changed(x=lambda p: p["x"].double()),
        "FP8": changed(x=lambda p: p["x"].to(FP8)),
        "rank 1": changed(x=lambda p: p["x"][0]),
        "rank 3": changed(x=lambda p: p["x"][None]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "gran_k 64": lambda p: {**p, "gran_k": 64},
        "gran_k 0": lambda p: {**p, "gran_k": 0},
    }
    lines = messages(
        getattr(torch.ops.deep_gemm, op),
        lambda: {"x": torch.zeros(32, 272, dtype=torch.bfloat16, device=device)},
        changes,
    )
    assert_expected_inline(
        lines.replace(op, "<op>"),
        """\
float64: <op>: x has dtype float64, expected bfloat16, float16 or float32
FP8: <op>: x has dtype float8_e4m3fn, expected bfloat16, float16 or float32
rank 1: <op>: x has rank 1, expected 2
rank 3: <op>: x has rank 3, expected 2
strided: <op>: x has inner stride 32, expected 1 (use deep_gemm_ops.to_tma_aligned)
gran_k 64: <op>: gran_k has value 64, expected 128 or 32
gran_k 0: <op>: gran_k has value 0, expected 128 or 32""",
    )


def test_casts_out(device: str) -> None:
    def base() -> Arguments:
        x = torch.zeros(33, 272, dtype=torch.bfloat16, device=device)
        values = torch.empty(33, 272, dtype=FP8, device=device)
        return {"x": x, "out": values, "out_sf": torch.empty_strided((33, 3), (1, 36), device=device)}

    changes = {
        "out of bfloat16": changed(out=lambda p: p["x"]),
        "out of another shape": changed(out=lambda p: p["out"][:32]),
        "out transposed": changed(out=lambda p: p["out"].t().contiguous().t()),
        "out_sf of bfloat16": changed(out_sf=lambda p: p["out_sf"].bfloat16()),
        "out_sf for packed scales": lambda p: {**p, "use_packed_ue8m0": True},
        "out_sf of another shape": changed(out_sf=lambda p: p["out_sf"][:, :2]),
        "out_sf K-major": changed(out_sf=lambda p: p["out_sf"].contiguous()),
        "out_sf not aligned": changed(out_sf=lambda p: torch.empty_strided((33, 3), (1, 33), device=p["x"].device)),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.per_token_cast_to_fp8.out, base, changes),
        """\
out of bfloat16: per_token_cast_to_fp8: out has dtype bfloat16, expected float8_e4m3fn
out of another shape: per_token_cast_to_fp8: out has shape [32, 272], expected the shape of x = [33, 272]
out transposed: per_token_cast_to_fp8: out has inner stride 33, expected 1
out_sf of bfloat16: per_token_cast_to_fp8: out_sf has dtype bfloat16, expected float32
out_sf for packed scales: per_token_cast_to_fp8: out_sf has dtype float32, expected int32
out_sf of another shape: per_token_cast_to_fp8: out_sf has shape [33, 2], expected the shape of the scales = [33, 3]
out_sf K-major: per_token_cast_to_fp8: out_sf has strides [3, 1], expected [1, 36] (MN-major, 16-byte aligned)
out_sf not aligned: per_token_cast_to_fp8: out_sf has strides [1, 33], expected [1, 36] (MN-major, 16-byte aligned)""",
    )


def test_transpose(device: str) -> None:
    def base() -> Arguments:
        return {"x": torch.zeros(20, 48, device=device).to(FP8), "out": torch.empty(48, 20, dtype=FP8, device=device)}

    changes = {
        "bfloat16": changed(x=lambda p: p["x"].to(torch.bfloat16)),
        "rank 3": changed(x=lambda p: p["x"][None]),
        "strided": changed(x=lambda p: p["x"].t().contiguous().t()),
        "out of another dtype": changed(out=lambda p: p["out"].view(torch.uint8)),
        "out not transposed": changed(out=lambda p: p["x"].clone()),
        "out strided": changed(out=lambda p: p["out"].t().contiguous().t()),
        "out with overlapping rows": changed(out=lambda p: p["out"][:1].expand(48, 20)),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.transpose_fp8.out, base, changes),
        """\
bfloat16: transpose_fp8: x has dtype bfloat16, expected float8_e4m3fn
rank 3: transpose_fp8: x has rank 3, expected 2
strided: transpose_fp8: x has inner stride 20, expected 1 (use deep_gemm_ops.to_tma_aligned)
out of another dtype: transpose_fp8: out has dtype uint8, expected float8_e4m3fn
out not transposed: transpose_fp8: out has shape [20, 48], expected the shape of the result = [48, 20]
out strided: transpose_fp8: out has inner stride 48, expected 1
out with overlapping rows: transpose_fp8: out has row stride 0, expected at least 20""",
    )


def test_scale_layouts(device: str) -> None:
    ops = torch.ops.deep_gemm

    def sf() -> torch.Tensor:
        return torch.ones(20, 6, device=device)

    same = {
        "float64": changed(sf=lambda p: p["sf"].double()),
        "packed": changed(sf=lambda p: p["sf"].to(torch.int32)),
        "rank 1": changed(sf=lambda p: p["sf"][0]),
        "rank 4": changed(sf=lambda p: p["sf"][None, None]),
    }
    lines = [messages(ops.get_mn_major_tma_aligned_tensor, lambda: {"sf": sf()}, same)]
    lines.append(messages(ops.get_mn_major_tma_aligned_packed_ue8m0_tensor, lambda: {"sf": sf()}, same))
    outs = {
        "out of another dtype": changed(out=lambda p: p["out"].double()),
        "out of another shape": changed(out=lambda p: p["out"][:19]),
        "out K-major": changed(out=lambda p: p["out"].contiguous()),
    }
    out = lambda columns, dtype: torch.empty_strided((20, columns), (1, 20), dtype=dtype, device=device)  # noqa: E731
    lines.append(
        messages(ops.get_mn_major_tma_aligned_tensor.out, lambda: {"sf": sf(), "out": out(6, torch.float32)}, outs)
    )
    lines.append(
        messages(
            ops.get_mn_major_tma_aligned_packed_ue8m0_tensor.out,
            lambda: {"sf": sf(), "out": out(2, torch.int32)},
            outs,
        )
    )
    assert_expected_inline(
        "\n".join(lines),
        """\
float64: get_mn_major_tma_aligned_tensor: sf has dtype float64, expected float32
packed: get_mn_major_tma_aligned_tensor: sf has dtype int32, expected float32
rank 1: get_mn_major_tma_aligned_tensor: sf has rank 1, expected 2 or 3
rank 4: get_mn_major_tma_aligned_tensor: sf has rank 4, expected 2 or 3
float64: get_mn_major_tma_aligned_packed_ue8m0_tensor: sf has dtype float64, expected float32
packed: get_mn_major_tma_aligned_packed_ue8m0_tensor: sf has dtype int32, expected float32
rank 1: get_mn_major_tma_aligned_packed_ue8m0_tensor: sf has rank 1, expected 2 or 3
rank 4: get_mn_major_tma_aligned_packed_ue8m0_tensor: sf has rank 4, expected 2 or 3
out of another dtype: get_mn_major_tma_aligned_tensor: out has dtype float64, expected float32
out of another shape: get_mn_major_tma_aligned_tensor: out has shape [19, 6], expected the shape of the result = [20, 6]
out K-major: get_mn_major_tma_aligned_tensor: out has strides [6, 1], expected [1, 20] (MN-major, 16-byte aligned)
out of another dtype: get_mn_major_tma_aligned_packed_ue8m0_tensor: out has dtype float64, expected int32
out of another shape: get_mn_major_tma_aligned_packed_ue8m0_tensor: out has shape [19, 2], expected the shape of the result = [20, 2]
out K-major: get_mn_major_tma_aligned_packed_ue8m0_tensor: out has strides [2, 1], expected [1, 20] (MN-major, 16-byte aligned)""",
    )


def test_expand_ue8m0(device: str) -> None:
    def base() -> Arguments:
        return {"sf": torch.zeros(20, 2, dtype=torch.int32, device=device), "k_sf": 6}

    changes = {
        "float32": changed(sf=lambda p: p["sf"].float()),
        "rank 1": changed(sf=lambda p: p["sf"][0]),
        "k_sf too large": lambda p: {**p, "k_sf": 9},
        "k_sf too small": lambda p: {**p, "k_sf": 4},
        "k_sf negative": lambda p: {**p, "k_sf": -1},
        "float8_e8m0fnu of another width": changed(
            sf=lambda p: torch.zeros(3, 20, 8, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
        ),
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.expand_ue8m0, base, changes),
        """\
float32: expand_ue8m0: sf has dtype float32, expected float8_e8m0fnu or int32
rank 1: expand_ue8m0: sf has rank 1, expected 2 or 3
k_sf too large: expand_ue8m0: sf has shape [20, 2], expected [MN, ceil(k_sf / 4)] = [20, 3]
k_sf too small: expand_ue8m0: sf has shape [20, 2], expected [MN, ceil(k_sf / 4)] = [20, 1]
k_sf negative: expand_ue8m0: k_sf has value -1, expected 0 to 2147483647
float8_e8m0fnu of another width: expand_ue8m0: sf has shape [3, 20, 8], expected [G, MN, k_sf] = [3, 20, 6]""",
    )


def test_k_grouped_packing(device: str) -> None:
    def base() -> Arguments:
        return {"sf": torch.ones(5, 20, device=device), "ks": torch.zeros(2, dtype=torch.int32, device=device)}

    changes = {
        "sf packed": changed(sf=lambda p: p["sf"].to(torch.int32)),
        "sf of rank 3": changed(sf=lambda p: p["sf"][None]),
        "ks of int64": changed(ks=lambda p: p["ks"].long()),
        "ks of rank 2": changed(ks=lambda p: p["ks"][None]),
        "gran_k 64": lambda p: {**p, "gran_k": 64},
    }
    op = torch.ops.deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    assert_expected_inline(
        messages(op, base, changes),
        """\
sf packed: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: sf has dtype int32, expected float32
sf of rank 3: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: sf has rank 3, expected 2
ks of int64: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: ks has dtype int64, expected int32
ks of rank 2: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: ks has rank 2, expected 1
gran_k 64: get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor: gran_k has value 64, expected 128 or 32""",
    )


def test_transform_sf(device: str) -> None:
    def base() -> Arguments:
        return {"sf": torch.ones(2, 6, device=device), "mn": 200, "k": 700, "recipe": [128, 128]}

    changes = {
        "float16": changed(sf=lambda p: p["sf"].half()),
        "one entry": lambda p: {**p, "recipe": [128]},
        "two entries with is_sfa": lambda p: {**p, "is_sfa": True},
        "three entries without is_sfa": lambda p: {**p, "recipe": [1, 128, 128]},
        "unknown granularity": lambda p: {**p, "recipe": [64, 128]},
        "unknown gran_k": lambda p: {**p, "recipe": [1, 128, 64], "is_sfa": False},
        "negative mn": lambda p: {**p, "mn": -1},
        "negative k": lambda p: {**p, "k": -1},
        "other rows": lambda p: {**p, "recipe": [1, 128, 128], "is_sfa": True},
        "other columns": lambda p: {**p, "k": 900},
        "packed": changed(sf=lambda p: p["sf"].to(torch.int32)),
        "groups without num_groups": changed(sf=lambda p: p["sf"][None]),
        "num_groups without groups": lambda p: {**p, "num_groups": 1},
        "another num_groups": lambda p: {**p, "sf": p["sf"][None], "num_groups": 2},
    }
    assert_expected_inline(
        messages(torch.ops.deep_gemm.transform_sf_into_required_layout, base, changes),
        """\
float16: transform_sf_into_required_layout: sf has dtype float16, expected float32, float8_e8m0fnu or int32
one entry: transform_sf_into_required_layout: recipe has length 1, expected 2 or 3
two entries with is_sfa: transform_sf_into_required_layout: is_sfa has value True, expected None (the recipe has two entries)
three entries without is_sfa: transform_sf_into_required_layout: is_sfa has value None, expected True or False (the recipe has three entries)
unknown granularity: transform_sf_into_required_layout: recipe has value [64, 128], expected [1 or 128, 128 or 32]
unknown gran_k: transform_sf_into_required_layout: recipe has value [1, 128, 64], expected [1 or 128, 1 or 128, 128 or 32]
negative mn: transform_sf_into_required_layout: mn has value -1, expected 0 to 2147483647
negative k: transform_sf_into_required_layout: k has value -1, expected 0 to 2147483647
other rows: transform_sf_into_required_layout: sf has shape [2, 6], expected [mn, ceil(k / 128)] = [200, 6]
other columns: transform_sf_into_required_layout: sf has shape [2, 6], expected [ceil(mn / 128), ceil(k / 128)] = [2, 8]
packed: transform_sf_into_required_layout: sf has shape [2, 6], expected [ceil(mn / 128), ceil(k / 512)] = [2, 2]
groups without num_groups: transform_sf_into_required_layout: sf has rank 3, expected 2
num_groups without groups: transform_sf_into_required_layout: sf has rank 2, expected 3
another num_groups: transform_sf_into_required_layout: sf has shape [1, 2, 6], expected [num_groups, ceil(mn / 128), ceil(k / 128)] = [2, 2, 6]""",
    )


def test_python_functions() -> None:
    """What only the Python functions add."""
    arguments = gemm_arguments("cpu")
    lines = []

    def refused(function: Callable, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(RuntimeError) as error:
            function(*args, **kwargs)
        lines.append(str(error.value))

    refused(deep_gemm_ops.fp8_gemm_nt, **arguments, out=torch.zeros(32, 144), out_dtype=torch.bfloat16)
    refused(deep_gemm_ops.fp8_gemm_nt, **arguments, c=torch.zeros(144, dtype=torch.bfloat16, requires_grad=True))
    refused(deep_gemm_ops.per_token_cast_to_fp8, torch.zeros(4, 128, requires_grad=True))
    refused(deep_gemm_ops.get_tma_aligned_size, 5, 3)
    refused(deep_gemm_ops.to_tma_aligned, torch.zeros(4))
    with torch.no_grad():
        deep_gemm_ops.per_token_cast_to_fp8(torch.zeros(4, 128, requires_grad=True))
    assert_expected_inline(
        "\n".join(lines),
        """\
fp8_gemm_nt: out has dtype float32, expected bfloat16 (out_dtype)
fp8_gemm_nt: c has requires_grad True, expected False (not differentiable: use torch.no_grad() or c.detach())
per_token_cast_to_fp8: x has requires_grad True, expected False (not differentiable: use torch.no_grad() or x.detach())
get_tma_aligned_size: element_size has value 3, expected 1, 2, 4, 8 or 16
to_tma_aligned: x has rank 1, expected 2 or 3""",
    )


def test_tracing_reports_the_same_words() -> None:
    """torch.compile raises its own error type, with the operator's message inside, at the call that is wrong."""
    arguments = gemm_arguments("cpu")
    arguments["sfb"] = arguments["sfb"][:1]
    compiled = torch.compile(lambda p: torch.ops.deep_gemm.fp8_gemm_nt(**p), fullgraph=True, backend="eager")
    with pytest.raises(
        Exception, match=r"fp8_gemm_nt: sfb has shape \[1, 3\], expected \[N or ceil\(N / 128\), ceil\(K / 128\)\]"
    ):
        compiled(arguments)
