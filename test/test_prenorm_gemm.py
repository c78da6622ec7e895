"""tf32_hc_prenorm_gemm on the CPU reference and, with the same code, on a GPU: values, layouts, tracing, bad input."""
# ruff: noqa: E501  (the messages are printed as they are)

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

import deep_gemm_ops
from deep_gemm_ops import prenorm_gemm

from common import assert_close, assert_equal, cuda_condition, error_bar, generator, same_bits, strided
from prenorm_emulation import special_products
from test_bad_input import changed, messages, other_device

OP = torch.ops.deep_gemm.tf32_hc_prenorm_gemm
SHAPES = [
    (13, 24, 1000),
    (1, 1, 8),
    (64, 32, 256),
    (130, 7, 2048),
    (257, 24, 520),
    (300, 33, 400),
    (77, 64, 64),
    (40, 150, 328),
]
TF32 = error_bar(torch.float32, "tf32")
SQUARES = 1e-5  # FP32 sums of exact products


def operands(
    m: int, n: int, k: int, device: str, data: str = "normal", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with NaN between them."""
    random = generator(seed)
    if data == "integer":
        a = torch.randint(-3, 4, (m, k), generator=random).float()
        b = torch.randint(-500, 501, (n, k), generator=random).float()  # more than BF16 holds, no more than TF32
    else:
        a, b = torch.randn(m, k, generator=random), torch.randn(n, k, generator=random)
    return strided(a.bfloat16(), -(-k // 8) * 8 + 8, device), strided(b, -(-k // 4) * 4 + 4, device)


def check(
    actual: tuple[torch.Tensor, torch.Tensor], a: torch.Tensor, b: torch.Tensor, num_splits: int | None, repro: str
) -> None:
    expected = prenorm_gemm.reference(a, b, num_splits=num_splits, dtype=torch.float64)
    for result, want, tol in zip(actual, expected, (TF32, SQUARES)):
        assert result.dtype == torch.float32
        assert_close(result, want, tol=tol, repro=repro)


@pytest.mark.parametrize("num_splits", [None, 1, 3, 40])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_values(device: str, m: int, n: int, k: int, num_splits: int | None) -> None:
    a, b = operands(m, n, k, device)
    result = deep_gemm_ops.tf32_hc_prenorm_gemm(a, b, num_splits=num_splits)
    check(result, a, b, num_splits, f"pytest test/test_prenorm_gemm.py -k 'test_values and {m}-{n}-{k}-{num_splits}'")


@pytest.mark.parametrize("num_splits", [None, 2])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact(device: str, m: int, n: int, k: int, num_splits: int | None) -> None:
    """Integers that TF32 holds leave no rounding at all."""
    a, b = operands(m, n, k, device, "integer")
    expected = prenorm_gemm.reference(a, b, num_splits=num_splits, dtype=torch.float64)
    for result, want in zip(OP(a, b, num_splits=num_splits), expected):
        assert_equal(result, want.float())


@pytest.mark.parametrize("num_splits", [None, 3])
def test_parts_add_up(device: str, num_splits: int | None) -> None:
    a, b = operands(100, 24, 1000, device, "integer")
    parts = OP(a, b, num_splits=5)
    for whole, part in zip(OP(a, b), parts):
        assert_equal(part.sum(0), whole)


@pytest.mark.parametrize("num_splits", [None, 3])
def test_out(device: str, num_splits: int | None) -> None:
    """Into rows and parts that lie apart, with NaN between them that stays."""
    m, n, k = 70, 24, 600
    a, b = operands(m, n, k, device)
    lead = () if num_splits is None else (num_splits,)
    buffers = [
        torch.full((*lead, m + 2, n + 5), math.nan, device=device),
        torch.full((*lead, m + 3), math.nan, device=device),
    ]
    out = buffers[0][..., 1 : m + 1, 2 : n + 2], buffers[1][..., 2 : m + 2]
    result = deep_gemm_ops.tf32_hc_prenorm_gemm(a, b, num_splits=num_splits, out=out)
    assert result[0] is out[0] and result[1] is out[1]
    for written, want in zip(out, OP(a, b, num_splits=num_splits)):
        assert same_bits(written, want)
        written.fill_(math.nan)
    assert all(bool(buffer.isnan().all()) for buffer in buffers)


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 24, 64), (5, 0, 64), (5, 24, 0), (0, 0, 0), (1, 0, 0)])
def test_empty(device: str, m: int, n: int, k: int, num_splits: int | None) -> None:
    a, b = operands(m, n, k, device)
    d, sqr_sum = OP(a, b, num_splits=num_splits)
    lead = () if num_splits is None else (num_splits,)
    assert d.shape == (*lead, m, n) and sqr_sum.shape == (*lead, m)
    check((d, sqr_sum), a, b, num_splits, "")
    for x in (d, sqr_sum):
        x.fill_(math.nan)
    OP.out(a, b, num_splits=num_splits, out=d, out_sqr_sum=sqr_sum)
    check((d, sqr_sum), a, b, num_splits, "")


def test_nan_and_infinity(device: str) -> None:
    """As in FP32, element by element."""
    for a, b, expected in special_products(device):
        for result, want in zip(OP(a, b), expected):
            assert_close(result, want, tol=TF32, tile=(1, 1))


def test_wide_range(device: str) -> None:
    """Each row of b at its own size."""
    a, b = operands(50, 24, 512, device)
    b = b * torch.pow(2.0, torch.arange(-60, 60, 5, device=device))[:, None]
    d, _ = OP(a, b)
    expected, _ = prenorm_gemm.reference(a, b, dtype=torch.float64)
    for n in range(24):
        assert_close(d[:, n], expected[:, n], tol=TF32)


def test_long_k(device: str) -> None:
    a, b = operands(13, 24, 28672, device)
    check(deep_gemm_ops.tf32_hc_prenorm_gemm(a, b), a, b, None, "pytest test/test_prenorm_gemm.py -k test_long_k")


def test_inputs_are_left_alone(device: str) -> None:
    a, b = operands(30, 24, 200, device)
    before = a.clone(), b.clone()
    OP(a, b)
    assert same_bits(a, before[0]) and same_bits(b, before[1])


# ---------------------------------------------------------------------------------------------------------------------
# Tracing. Schemas, fakes, meta tensors, opcheck and guards: test_compile.py


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_sizes(device: str, backend: str, num_splits: int | None) -> None:
    def norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        d, sqr_sum = deep_gemm_ops.tf32_hc_prenorm_gemm(a * 2, b, num_splits=num_splits)
        if num_splits is not None:
            d, sqr_sum = d.sum(0), sqr_sum.sum(0)
        return d * (sqr_sum / a.shape[1] + 1e-6).rsqrt()[:, None]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend=backend)
        for m, n, k in [(33, 24, 272), (64, 16, 544), (200, 30, 1040)]:
            a, b = (x.contiguous() for x in operands(m, n, k, device))
            assert_close(compiled(a, b), norm(a, b), tol=1e-6)
    torch._dynamo.reset()


def test_compile_the_out_form(device: str) -> None:
    def step(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, sqr_sum: torch.Tensor) -> None:
        deep_gemm_ops.tf32_hc_prenorm_gemm(a, b, out=(d, sqr_sum))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (9, 33):
        a, b = (x.contiguous() for x in operands(m, 24, 272, device))
        outs = [(torch.zeros(m, 24, device=device), torch.zeros(m, device=device)) for _ in range(2)]
        compiled(a, b, *outs[0])
        step(a, b, *outs[1])
        assert all(same_bits(x, y) for x, y in zip(*outs))
    torch._dynamo.reset()


def test_export_with_dynamic_rows(device: str) -> None:
    class Norm(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return deep_gemm_ops.tf32_hc_prenorm_gemm(a, b)

    a, b = (x.contiguous() for x in operands(200, 24, 272, device))
    program = torch.export.export(Norm(), (a[:20], b), dynamic_shapes=({0: torch.export.Dim("tokens")}, None))
    for m in (2, 33, 200):
        assert all(same_bits(x, y) for x, y in zip(program.module()(a[:m], b), OP(a[:m], b)))


def test_gradients_are_refused(device: str) -> None:
    a, b = operands(4, 3, 64, device)
    b.requires_grad_()
    match = r"tf32_hc_prenorm_gemm: b has requires_grad True, expected False \(not differentiable"
    with pytest.raises(RuntimeError, match=match):
        deep_gemm_ops.tf32_hc_prenorm_gemm(a, b)
    with torch.no_grad():
        deep_gemm_ops.tf32_hc_prenorm_gemm(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def place(device_or_fake: str) -> str:
    """Where the operator gets the wrong arguments."""
    return device_or_fake


def arguments(device: str) -> dict[str, Any]:
    return {"a": torch.zeros(32, 272, dtype=torch.bfloat16, device=device), "b": torch.zeros(24, 272, device=device)}


def test_bad_operands(place: str) -> None:
    changes = {
        "a of float32": changed(a=lambda p: p["a"].float()),
        "b of bfloat16": changed(b=lambda p: p["b"].bfloat16()),
        "a of rank 1": changed(a=lambda p: p["a"][0]),
        "b of rank 3": changed(b=lambda p: p["b"][None]),
        "K of b": changed(b=lambda p: p["b"][:, :256]),
        "a with a strided inner dimension": changed(a=lambda p: p["a"].t().contiguous().t()),
        "b with a strided inner dimension": changed(b=lambda p: p["b"].repeat(1, 2)[:, ::2]),
        "a with ragged rows": changed(a=lambda p: p["a"].repeat(1, 2)[:, :276].contiguous()[:, :272]),
        "b with ragged rows": changed(b=lambda p: p["b"].repeat(1, 2)[:, :274].contiguous()[:, :272]),
        "a with overlapping rows": changed(a=lambda p: p["a"][:1].expand(32, 272)),
        "no parts": lambda p: {**p, "num_splits": 0},
    }
    assert_expected_inline(
        messages(OP, lambda: arguments(place), changes),
        """\
a of float32: tf32_hc_prenorm_gemm: a has dtype float32, expected bfloat16
b of bfloat16: tf32_hc_prenorm_gemm: b has dtype bfloat16, expected float32
a of rank 1: tf32_hc_prenorm_gemm: a has rank 1, expected 2
b of rank 3: tf32_hc_prenorm_gemm: b has rank 3, expected 2
K of b: tf32_hc_prenorm_gemm: b has K 256, expected 272 (the K of a)
a with a strided inner dimension: tf32_hc_prenorm_gemm: a has inner stride 32, expected 1 (use deep_gemm_ops.to_tma_aligned)
b with a strided inner dimension: tf32_hc_prenorm_gemm: b has inner stride 2, expected 1 (use deep_gemm_ops.to_tma_aligned)
a with ragged rows: tf32_hc_prenorm_gemm: a has row stride 552 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
b with ragged rows: tf32_hc_prenorm_gemm: b has row stride 1096 bytes, expected a multiple of 16 bytes (use deep_gemm_ops.to_tma_aligned)
a with overlapping rows: tf32_hc_prenorm_gemm: a has row stride 0, expected at least 272 (use deep_gemm_ops.to_tma_aligned)
no parts: tf32_hc_prenorm_gemm: num_splits has value 0, expected 1 to 2147483647""",
    )


def test_bad_outputs(place: str) -> None:
    def base() -> dict[str, Any]:
        out, sqr_sum = torch.zeros(3, 32, 24, device=place), torch.zeros(3, 32, device=place)
        return {**arguments(place), "num_splits": 3, "out": out, "out_sqr_sum": sqr_sum}

    changes = {
        "out of bfloat16": changed(out=lambda p: p["out"].bfloat16()),
        "sums of float64": changed(out_sqr_sum=lambda p: p["out_sqr_sum"].double()),
        "out without parts": changed(out=lambda p: p["out"][0]),
        "more sums": changed(out_sqr_sum=lambda p: p["out_sqr_sum"].repeat(2, 1)),
        "out transposed": changed(out=lambda p: p["out"].transpose(1, 2).contiguous().transpose(1, 2)),
        "sums transposed": changed(out_sqr_sum=lambda p: p["out_sqr_sum"].t().contiguous().t()),
        "overlapping rows": changed(out=lambda p: p["out"][:, :1].expand(3, 32, 24)),
        "overlapping parts": changed(out=lambda p: p["out"][:1].expand(3, 32, 24)),
        "overlapping sums": changed(out_sqr_sum=lambda p: p["out_sqr_sum"][:1].expand(3, 32)),
        "no parts wanted": lambda p: {**p, "num_splits": None},
    }
    assert_expected_inline(
        messages(OP.out, base, changes),
        """\
out of bfloat16: tf32_hc_prenorm_gemm: out has dtype bfloat16, expected float32
sums of float64: tf32_hc_prenorm_gemm: out_sqr_sum has dtype float64, expected float32
out without parts: tf32_hc_prenorm_gemm: out has shape [32, 24], expected [num_splits, M, N] = [3, 32, 24]
more sums: tf32_hc_prenorm_gemm: out_sqr_sum has shape [6, 32], expected [num_splits, M] = [3, 32]
out transposed: tf32_hc_prenorm_gemm: out has inner stride 32, expected 1
sums transposed: tf32_hc_prenorm_gemm: out_sqr_sum has inner stride 3, expected 1
overlapping rows: tf32_hc_prenorm_gemm: out has row stride 0, expected at least 24
overlapping parts: tf32_hc_prenorm_gemm: out has split stride 0, expected at least 768
overlapping sums: tf32_hc_prenorm_gemm: out_sqr_sum has split stride 0, expected at least 32
no parts wanted: tf32_hc_prenorm_gemm: out has shape [3, 32, 24], expected [M, N] = [32, 24]""",
    )


def test_mixed_devices() -> None:
    """One of the tensors is on "meta", which needs no hardware."""

    def base() -> dict[str, Any]:
        return {**arguments("cpu"), "out": torch.zeros(32, 24), "out_sqr_sum": torch.zeros(32)}

    changes = {name: changed(**{name: lambda p, name=name: other_device(p[name])}) for name in base()}
    assert_expected_inline(
        messages(OP.out, base, changes),
        """\
a: tf32_hc_prenorm_gemm: b has device cpu, expected meta (the device of a)
b: tf32_hc_prenorm_gemm: b has device meta, expected cpu (the device of a)
out: tf32_hc_prenorm_gemm: out has device meta, expected cpu (the device of a)
out_sqr_sum: tf32_hc_prenorm_gemm: out_sqr_sum has device meta, expected cpu (the device of a)""",
    )


def test_mixed_devices_cuda(cuda: str) -> None:
    a, b = operands(32, 24, 272, cuda)
    with pytest.raises(
        RuntimeError, match=r"tf32_hc_prenorm_gemm: b has device cpu, expected cuda:0 \(the device of a\)"
    ):
        OP(a, b.cpu())


def test_bad_base_address() -> None:
    """Only real memory has an address."""
    changes = {name: changed(**{name: lambda p, name=name: p[name].repeat(1, 2)[:, 2:274]}) for name in ("a", "b")}
    for device in ["cpu"] + ([] if cuda_condition() else ["cuda"]):
        assert_expected_inline(
            messages(OP, lambda device=device: arguments(device), changes),
            """\
a: tf32_hc_prenorm_gemm: a has base address 4 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)
b: tf32_hc_prenorm_gemm: b has base address 8 modulo 16 bytes, expected 0 (use deep_gemm_ops.to_tma_aligned)""",
        )


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


@pytest.mark.parametrize(
    ("m", "n", "k"), [(13, 24, 28672), (137, 24, 7168), (4096, 24, 28672), (8192, 24, 7680), (2000, 64, 7168)]
)
def test_model_shapes(cuda: str, m: int, n: int, k: int) -> None:
    """Sizes of real layers, against float64 in pieces of rows."""
    torch.manual_seed(m)
    a, b = torch.randn(m, k, device=cuda).bfloat16(), torch.randn(n, k, device=cuda)
    d, sqr_sum = deep_gemm_ops.tf32_hc_prenorm_gemm(a, b)
    for rows in torch.arange(m).split(1024):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        check(
            (d[piece], sqr_sum[piece]),
            a[piece],
            b,
            None,
            f"pytest test/test_prenorm_gemm.py -k 'test_model_shapes and {m}-{n}-{k}'",
        )


def test_same_bits_every_time(cuda: str) -> None:
    for m, n, k in [(13, 24, 28672), (600, 24, 7168), (300, 64, 4096)]:
        a, b = operands(m, n, k, cuda)
        first = OP(a, b)
        for _ in range(8):
            torch.empty(1 << 24, device=cuda).fill_(math.nan)
            assert all(same_bits(x, y) for x, y in zip(first, OP(a, b)))


def test_capture_and_replay(cuda: str) -> None:
    a, b = (x.contiguous() for x in operands(100, 24, 7168, cuda))
    OP(a, b), OP(a, b, num_splits=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*OP(a, b), *OP(a, b, num_splits=4)]
    for seed in range(3):
        torch.manual_seed(seed)
        a.normal_()
        b.normal_()
        for result in captured:
            result.fill_(math.nan)
        graph.replay()
        for actual, expected in zip(captured, [*OP(a, b), *OP(a, b, num_splits=4)]):
            assert same_bits(actual, expected), seed


def test_dependent_launches_back_to_back(cuda: str) -> None:
    """Each call reads what the one before it wrote: a missing dependency shows as a wrong value."""
    b = torch.eye(64, device=cuda).repeat(1, 128)  # d is the sum of 128 blocks of a
    for seed in range(50):
        torch.manual_seed(seed)
        a = torch.zeros(40, 64 * 128, device=cuda, dtype=torch.bfloat16)
        a[:, :64] = torch.randint(-2, 3, (40, 64), device=cuda)
        for _ in range(4):
            d, _ = OP(a, b)
            a[:, -64:] = d
        assert torch.equal(d, 4 * a[:, :64].float())


def test_calls_that_share_a_workspace(cuda: str) -> None:
    """With nothing in between, the next call's parts go where the last call's were."""
    inputs = [operands(137, 24, 7168, cuda, "integer", seed) for seed in range(3)]
    results = [OP(*inputs[i % 3]) for i in range(60)]
    for i, (d, sqr_sum) in enumerate(results):
        a, b = inputs[i % 3]
        assert_equal(d, a.double() @ b.double().t())
        assert_equal(sqr_sum, a.double().square().sum(1))


def test_stream_and_no_synchronisation(cuda: str) -> None:
    a, b = operands(100, 24, 7168, cuda)
    OP(a, b)
    late = torch.zeros_like(a)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(a)
        result = OP(late, b)
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    check(result, a, b, None, "")


@pytest.mark.parametrize("num_sms", [1, 7, 10_000])
@pytest.mark.parametrize("pdl", [False, True])
def test_knobs_do_not_change_values(cuda: str, num_sms: int, pdl: bool) -> None:
    before = deep_gemm_ops.get_pdl()
    try:
        deep_gemm_ops.set_num_sms(num_sms)
        deep_gemm_ops.set_pdl(pdl)
        for m, n, k in [(13, 24, 2048), (300, 70, 272)]:
            a, b = operands(m, n, k, cuda, "integer")
            for result, want in zip(OP(a, b), prenorm_gemm.reference(a, b, dtype=torch.float64)):
                assert_equal(result, want.float())
    finally:
        deep_gemm_ops.set_num_sms(0)
        deep_gemm_ops.set_pdl(before)


def test_two_devices(two_cuda_devices: tuple[str, str]) -> None:
    for current in (0, 1):
        with torch.cuda.device(current):
            for device in two_cuda_devices:
                a, b = operands(20, 24, 4096, device)
                check(OP(a, b), a, b, None, "")
