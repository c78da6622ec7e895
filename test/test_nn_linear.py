"""FP8Linear: values and gradients against float64, every way PyTorch trains a layer, and what a drop-in has to keep."""

from __future__ import annotations

import copy
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import deep_gemm_ops
from deep_gemm_ops import reference
from deep_gemm_ops.nn import FP8Linear, FrozenFP8Linear, convert, fp8_linear, freeze

from common import assert_close, error_bar, generator, same_bits

Tensor = torch.Tensor

#: Relative error that two operands of 8 bits leave in a product of normally distributed numbers, measured 0.036.
FP8_ERROR = 0.045


@pytest.fixture(autouse=True)
def _no_recompilation() -> Iterator[None]:
    """Whatever is compiled here is compiled once: a second compilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(device)


def quantised(x: Tensor, kind: str) -> Tensor:
    """``x`` through a cast and back, in float64."""
    values, scales = getattr(reference, f"{kind}_cast_to_fp8")(x.cpu())
    if kind == "per_channel":
        return reference.dequantize(values.t(), scales.t(), 1, 128, torch.float64).t()
    return reference.dequantize(values, scales, 128 if kind == "per_block" else 1, 128, torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "k", "n"), [(130, 256, 384), (37, 200, 70), (1, 5, 3), (257, 130, 129)])
def test_products_are_those_of_the_quantised_operands(
    device: str, tokens: int, k: int, n: int, dtype: torch.dtype
) -> None:
    """Forward, input and weight gradient against float64 products of operands quantised as documented."""
    x = normal(tokens, k, seed=0, dtype=dtype, device=device).requires_grad_()
    weight = normal(n, k, seed=1, dtype=dtype, device=device).requires_grad_()
    bias = normal(n, seed=2, dtype=dtype, device=device).requires_grad_()
    y = fp8_linear(x, weight, bias)
    grad = normal(tokens, n, seed=3, dtype=dtype, device=device)
    y.backward(grad)

    a, b = quantised(x.detach(), "per_token"), quantised(weight.detach(), "per_block")
    expected = a @ b.t() + bias.detach().cpu().double()
    tol = error_bar(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == bias.grad.dtype == dtype
    assert_close(y, expected, tol=tol)
    assert_close(x.grad, quantised(grad, "per_token") @ b, tol=tol)
    assert_close(weight.grad, quantised(grad, "per_channel").t() @ quantised(x.detach(), "per_channel"), tol=tol)
    assert_close(bias.grad, grad.cpu().double().sum(0), tol=tol)


def test_gradients_are_near_those_of_float64(device: str) -> None:
    """A network of three layers and nonlinearities: all gradients within what FP8 costs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 320), nn.GELU(), nn.Linear(320, 160), nn.Tanh(), nn.Linear(160, 48)).to(device)
    exact = copy.deepcopy(model).cpu().double()
    convert(model)
    x = normal(300, 192, seed=0)
    target = normal(300, 48, seed=1)
    F.mse_loss(model(x.to(device)), target.to(device)).backward()
    F.mse_loss(exact(x.double()), target.double()).backward()
    for (name, actual), expected in zip(model.named_parameters(), exact.parameters()):
        # Errors of the layers above add up in the gradients of those below.
        assert 0 < relative(actual.grad, expected.grad) < 2 * FP8_ERROR, name


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 5), (0,), (3, 0)], ids=str)
def test_leading_dimensions(device: str, shape: tuple[int, ...]) -> None:
    x = normal(*shape, 144, seed=0, device=device).requires_grad_()
    layer = FP8Linear(144, 80, device=device)
    y = layer(x)
    assert y.shape == (*shape, 80)
    grad = normal(*shape, 80, seed=1, device=device)
    y.backward(grad)
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == layer.weight.shape
    flat = fp8_linear(x.detach().reshape(-1, 144), layer.weight, layer.bias)
    assert same_bits(y.reshape(-1, 80), flat)
    if x.numel() == 0:
        assert not layer.weight.grad.any()
        assert not layer.bias.grad.any()
    else:
        assert relative(layer.weight.grad, grad.reshape(-1, 80).t() @ x.detach().reshape(-1, 144)) < FP8_ERROR


def test_strides_of_inputs_and_gradients(device: str) -> None:
    """Transposed, sliced and expanded tensors, as autograd and attention produce them."""
    layer = FP8Linear(96, 64, device=device)
    whole = normal(64, 5, 200, seed=0, device=device)
    for x in (whole.permute(2, 1, 0)[..., :1].expand(-1, -1, 96), whole[:, :, 8:104], whole[:, :, ::2][..., :96]):
        dense = x.contiguous().requires_grad_()
        x = x.detach().requires_grad_()
        assert same_bits(layer(x), layer(dense))
        layer(x).sum().backward()  # an expanded gradient, all strides 0
        layer(dense).backward(torch.ones(*x.shape[:-1], 64, device=device))
        assert same_bits(x.grad, dense.grad)


@pytest.mark.parametrize("needs", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)][1:], ids=str)
def test_any_subset_of_gradients(device: str, needs: tuple[int, int, int]) -> None:
    tensors = [normal(*shape, seed=i, device=device) for i, shape in enumerate([(50, 96), (40, 96), (40,)])]
    grad = normal(50, 40, seed=3, device=device)
    every = [t.clone().requires_grad_() for t in tensors]
    fp8_linear(*every).backward(grad)
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip(tensors, needs)]
    fp8_linear(*some).backward(grad)
    for mine, other, need in zip(some, every, needs):
        assert (mine.grad is not None) == bool(need)
        assert not need or same_bits(mine.grad, other.grad)


def test_only_what_the_backward_pass_needs_is_saved() -> None:
    """A frozen weight keeps no input alive, and an input without gradient no weight."""
    for needs_x, needs_weight in [(True, False), (False, True), (True, True)]:
        x, weight = normal(9, 32, seed=0).requires_grad_(needs_x), normal(8, 32, seed=1).requires_grad_(needs_weight)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            fp8_linear(x, weight)
        expected = [t for t, need in ((x, needs_weight), (weight, needs_x)) if need]
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]


def test_inference_mode(device: str) -> None:
    layer = FP8Linear(96, 64, device=device)
    x = normal(9, 96, seed=0, device=device)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    assert same_bits(y, layer(x).detach())


@pytest.mark.parametrize(("size", "limit"), [(1.0, FP8_ERROR), (1e-4, FP8_ERROR), (1e-8, FP8_ERROR), (1e-9, 0.2)])
def test_small_gradients(device: str, size: float, limit: float) -> None:
    """Down to 1e-8 the floor of the scales costs nothing; below, scaling the loss is the remedy."""
    x = normal(256, 256, seed=0, device=device).requires_grad_()
    weight = normal(128, 256, seed=1, device=device).requires_grad_()
    grad = size * normal(256, 128, seed=2, device=device)
    fp8_linear(x, weight).backward(grad)
    expected = grad.double() @ weight.detach().double(), grad.double().t() @ x.detach().double()
    for actual, exact in zip((x.grad, weight.grad), expected):
        assert relative(actual, exact) < limit
        assert size >= 1e-8 or relative(actual, exact) > FP8_ERROR


def test_no_second_derivative() -> None:
    x, weight = normal(9, 32, seed=0).requires_grad_(), normal(8, 32, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(fp8_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fp8_linear_backward is not differentiable: FP8 layers have no second"):
        first.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# The main gradient


def test_main_gradient(device: str) -> None:
    """The weight's gradients of several micro-batches, a weight used twice included, add up in one FP32 tensor."""
    layer = FP8Linear(96, 64, device=device, dtype=torch.bfloat16)
    layer.weight.main_grad = torch.ones(64, 96, device=device)
    expected = torch.ones(64, 96, dtype=torch.float64)
    for seed in range(3):
        x = normal(70, 96, seed=seed, dtype=torch.bfloat16, device=device).requires_grad_()
        (layer(x) + layer(2 * x)).sum().backward()
        grad = quantised(torch.ones(70, 64), "per_channel").t()
        for part in (x.detach(), 2 * x.detach()):
            expected += grad @ quantised(part, "per_channel")
    assert layer.weight.grad is None
    assert layer.weight.grad_added_to_main_grad is True
    assert layer.bias.grad is not None
    assert_close(layer.weight.main_grad, expected, tol=error_bar(torch.float32))

    other = FP8Linear(96, 64, device=device, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    y = x.detach().clone().requires_grad_()
    (other(y) + other(2 * y)).sum().backward()
    assert same_bits(x.grad, y.grad)


def test_main_gradient_under_compile(device: str) -> None:
    layer = FP8Linear(96, 64, device=device)
    layer.weight.main_grad = torch.zeros(64, 96, device=device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (33, 5, 200):
        x = normal(tokens, 96, seed=tokens, device=device)
        layer.weight.main_grad.zero_()
        layer(x).square().sum().backward()
        expected = layer.weight.main_grad.clone()
        layer.weight.main_grad.zero_()
        compiled(x).square().sum().backward()
        assert same_bits(layer.weight.main_grad, expected)
        assert expected.any()
        assert layer.weight.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Autocast, compilation, checkpointing


class Mixed(nn.Module):
    """FP8 layers between ordinary ones, a residual, a shared input and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(96)
        self.up = nn.Linear(96, 200)
        self.gate = nn.Linear(96, 200, bias=False)
        self.plain = nn.Linear(200, 72)
        self.down = nn.Linear(72, 96)
        convert(self, lambda _, name: name != "plain")

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = self.norm(x)
            x = x + self.down(self.plain(F.silu(self.gate(h)) * self.up(h)))
        return x


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor] | None, x: Tensor) -> list[Tensor]:
    """Result and all gradients of a step of ``call``, which has the parameters of ``model``."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def test_autocast(device: str) -> None:
    """FP32 weights and input, BF16 result; gradients come back in FP32."""
    layer = FP8Linear(96, 64, device=device)
    x = normal(50, 96, seed=0, device=device).requires_grad_()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    assert same_bits(y, fp8_linear(x, layer.weight, layer.bias, out_dtype=torch.bfloat16))
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(("backend", "amp"), [("aot_eager", False), ("inductor", True)])
def test_compile_with_dynamic_tokens(device: str, backend: str, amp: bool) -> None:
    torch.manual_seed(0)
    model = Mixed().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (40, 7, 130, 300):
        x = normal(2, tokens, 96, seed=tokens, device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            expected = gradients(model, None, x)
            actual = gradients(model, compiled, x)
        for a, b in zip(actual, expected):
            assert a.dtype == b.dtype
            # Compiled, the operations between the layers round less often, and FP8 amplifies what that changes.
            assert relative(a, b) < (1e-6 if backend == "aot_eager" else FP8_ERROR)


@pytest.mark.parametrize("compile_it", [False, True])
def test_activation_checkpointing(device: str, compile_it: bool) -> None:
    torch.manual_seed(0)
    model = Mixed().to(device)
    x = normal(33, 96, seed=0, device=device)
    expected = gradients(model, None, x)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    call = torch.compile(checkpointed, fullgraph=True, backend="aot_eager") if compile_it else checkpointed
    for a, b in zip(gradients(model, call, x), expected):
        assert relative(a, b) < 1e-6


def test_selective_checkpointing_sees_the_operator() -> None:
    """A policy can name the layer's product, so that it is kept and all else recomputed."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = []

    def policy(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
        if op is torch.ops.deep_gemm.fp8_linear.default:
            products.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    model, x = Mixed(), normal(33, 96, seed=0)
    expected = gradients(model, None, x)
    actual = gradients(
        model,
        lambda x: checkpoint(
            model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        ),
        x,
    )
    assert products.count(False) == 6
    for a, b in zip(actual, expected):
        assert same_bits(a, b)


def test_opcheck(device: str) -> None:
    x = normal(2, 20, 96, seed=0, device=device).requires_grad_()
    weight = normal(40, 96, seed=1, device=device).requires_grad_()
    bias = normal(40, seed=2, device=device).requires_grad_()
    grad = normal(2, 20, 40, seed=3, device=device)
    total = torch.zeros(40, 96, device=device)
    ops = torch.ops.deep_gemm
    fp32 = torch.float32
    for op, arguments in [
        (ops.fp8_linear.default, (x, weight, bias)),
        (ops.fp8_linear.default, (x, weight, None, torch.bfloat16)),
        (ops.fp8_linear.default, (x.detach(), weight)),
        (ops.fp8_linear_backward.default, (grad, x.detach(), weight.detach(), fp32, torch.bfloat16)),
        (ops.fp8_linear_backward.default, (grad, None, weight.detach(), fp32, fp32)),
        (ops.fp8_linear_backward.default, (grad, x.detach(), None, fp32, fp32)),
        (ops.fp8_linear_backward_accumulate.default, (grad, x.detach(), weight.detach(), total, fp32)),
        (ops.fp8_linear_backward_accumulate.default, (grad, x.detach(), None, total, fp32)),
    ]:
        torch.library.opcheck(op, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# A drop-in for nn.Linear


def test_state_dict_both_ways() -> None:
    plain, layer = nn.Linear(48, 32), FP8Linear(48, 32)
    assert list(plain.state_dict()) == list(layer.state_dict())
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert same_bits(layer.weight, plain.weight)
    nn.init.ones_(layer.weight)
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert bool((plain.weight == 1).all())
    torch.manual_seed(5)
    first = nn.Linear(48, 32)
    torch.manual_seed(5)
    assert same_bits(FP8Linear(48, 32).weight, first.weight)


def test_convert_keeps_modules_parameters_and_hooks() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))
            self.head = nn.Linear(32, 16)
            self.attention = nn.MultiheadAttention(32, 4)
            self.body[2].weight = self.body[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Tied()
    parameters, first = list(model.parameters()), model.body[0]
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("hook"))
    seen: list[str] = []
    assert convert(model, lambda module, name: seen.append(name) or module.out_features > 16) is model
    assert seen == ["body.0", "body.2", "head"]  # not the projection inside MultiheadAttention, which is a subclass
    assert [type(m) for m in (model.body[0], model.body[2], model.head)] == [FP8Linear, FP8Linear, nn.Linear]
    assert model.body[0] is first
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    model(torch.randn(4, 32)).sum().backward()
    assert calls == ["hook"]
    assert type(convert(nn.Linear(8, 8))) is FP8Linear


def test_copies_devices_and_dtypes(device: str) -> None:
    layer = FP8Linear(40, 24)
    twin = copy.deepcopy(layer).to(device=device, dtype=torch.bfloat16)
    assert twin.weight.dtype == torch.bfloat16
    assert twin(normal(3, 40, seed=0, dtype=torch.bfloat16, device=device)).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = FP8Linear(40, 24)
        assert empty(torch.empty(5, 40)).shape == (5, 24)
    empty.to_empty(device=device)
    empty.load_state_dict(layer.state_dict())
    assert relative(empty(normal(5, 40, seed=0, device=device)), layer(normal(5, 40, seed=0))) < 1e-3
    assert repr(layer) == "FP8Linear(in_features=40, out_features=24, bias=True)"


@pytest.mark.parametrize(("k", "n", "bias"), [(144, 80, True), (70, 50, False)])
def test_frozen_layers_compute_the_same(device: str, k: int, n: int, bias: bool) -> None:
    layer = FP8Linear(k, n, bias=bias, device=device)
    frozen = freeze(layer)
    assert isinstance(frozen, FrozenFP8Linear)
    x = normal(2, 9, k, seed=0, device=device)
    with torch.no_grad():
        assert same_bits(frozen(x), layer(x))
        assert same_bits(frozen(x[:, :0]), layer(x[:, :0]))
        half = x.bfloat16()
        assert same_bits(frozen(half), layer(half))
        moved = copy.deepcopy(frozen).to(torch.bfloat16).to(device)
        assert moved.weight.dtype == torch.float8_e4m3fn
        assert moved.weight_scale.dtype == torch.float32
        assert not bias or moved.bias.dtype == torch.bfloat16
        other = freeze(FP8Linear(k, n, bias=bias, device=device))
        other.load_state_dict(frozen.state_dict())
        assert same_bits(other(x), frozen(x))
    with pytest.raises(RuntimeError, match="per_token_cast_to_fp8: x has requires_grad True"):
        frozen(x.requires_grad_())


def test_frozen_models_need_no_python(device: str) -> None:
    """An exported program of a frozen model holds the library's operators and PyTorch's, none made in Python."""
    model = freeze(convert(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Sequential(nn.Linear(96, 40))))).to(device)
    assert [type(m) for m in model.modules()].count(FrozenFP8Linear) == 2
    x = normal(20, 64, seed=0, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
        assert same_bits(program.module()(x[:7]), model(x[:7]))
    ours = {str(node.target) for node in program.graph.nodes if "deep_gemm" in str(node.target)}
    assert ours == {"deep_gemm.per_token_cast_to_fp8.default", "deep_gemm.fp8_gemm_nt.default"}


def test_an_optimizer_learns(device: str) -> None:
    """Regression onto a fixed linear map: FP8 gradients bring the loss down by a factor of fifty."""
    torch.manual_seed(0)
    model = FP8Linear(64, 32, device=device)
    x, target = normal(256, 64, seed=0, device=device), normal(64, 32, seed=1, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), x @ target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 5)}, r"fp8_linear: x has K 5, expected 8 \(the K of weight\)"),
        ({"x": torch.ones(4, 8, dtype=torch.float64)}, "fp8_linear: x has dtype float64, expected bfloat16, float16"),
        ({"x": torch.tensor(1.0)}, "fp8_linear: x has rank 0, expected at least 1"),
        ({"weight": torch.ones(8)}, "fp8_linear: weight has rank 1, expected 2"),
        ({"weight": torch.ones(3, 8, dtype=torch.int32)}, "fp8_linear: weight has dtype int32, expected bfloat16"),
        ({"bias": torch.ones(4)}, r"fp8_linear: bias has shape \[4\], expected \[N\] = \[3\]"),
        ({"bias": torch.ones(3, device="meta")}, r"fp8_linear: bias has device meta, expected cpu \(the device of x\)"),
        ({"out_dtype": torch.int8}, "fp8_linear: out_dtype has value int8, expected bfloat16, float16 or float32"),
        ({"main_grad": torch.ones(3, 8).bfloat16()}, "fp8_linear: main_grad has dtype bfloat16, expected float32"),
        ({"main_grad": torch.ones(8, 3)}, r"fp8_linear: main_grad has shape \[8, 3\], expected the shape of weight = "),
        ({"main_grad": torch.ones(8, 3).t()}, r"fp8_linear: main_grad has strides \[1, 3\], expected those of a cont"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(4, 8), "weight": torch.ones(3, 8), "bias": None, "out_dtype": None, "main_grad": None}
    x, weight, bias, out_dtype, main_grad = {**arguments, **change}.values()
    with pytest.raises(RuntimeError, match=message):
        fp8_linear(x, weight, bias, out_dtype=out_dtype, main_grad=main_grad)


def test_submodules_are_imported_when_used() -> None:
    code = (
        "import sys, deep_gemm_ops; assert not any('deep_gemm_ops.nn' in name for name in sys.modules); "
        "print(deep_gemm_ops.nn.FP8Linear(8, 4), deep_gemm_ops.compat.fp8_gemm_nt.__name__); deep_gemm_ops.no_such_name"
    )
    path = str(pathlib.Path(deep_gemm_ops.__file__).parent.parent)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.stdout == "FP8Linear(in_features=8, out_features=4, bias=True) fp8_gemm_nt\n"
    assert run.stderr.endswith("AttributeError: module 'deep_gemm_ops' has no attribute 'no_such_name'\n")


# ---------------------------------------------------------------------------------------------------------------------
# Only on a GPU


def test_no_host_synchronisation_and_capture(cuda: str) -> None:
    """A training step waits for nothing and can be captured; the replay gives the step's bits."""
    torch.manual_seed(0)
    model = Mixed().to(cuda).bfloat16()
    x = normal(130, 96, seed=0, dtype=torch.bfloat16, device=cuda)
    expected = gradients(model, None, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, None, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    model.zero_grad()
    still = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(still).float().square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    still.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(still)
        y.float().square().sum().backward()
    graph.replay()
    for a, b in zip([y, still.grad, *(p.grad for p in model.parameters())], expected):
        assert same_bits(a, b)


def test_the_library_runs_the_products(cuda: str) -> None:
    """On a GPU no product falls back to PyTorch's own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, op: torch._ops.OpOverload, types: object, args=(), kwargs=None) -> object:  # noqa: ANN001
            self.names.add(str(op))
            return op(*args, **(kwargs or {}))

    layer = FP8Linear(96, 64, device=cuda)
    with Names() as mode:
        layer(normal(10, 96, seed=0, device=cuda)).sum().backward()
    assert {"deep_gemm.fp8_linear.default", "deep_gemm.fp8_linear_backward.default"} <= mode.names
    assert not any(name.startswith(("aten.mm", "aten.addmm", "aten.matmul")) for name in mode.names)
    assert deep_gemm_ops.get_num_sms() > 0
