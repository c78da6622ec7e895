"""The layers on several devices, as two gloo processes on the CPU: tensor parallelism with DTensor, and FSDP2."""

from __future__ import annotations

import copy
import os
import pathlib
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common import same_bits

Tensor = torch.Tensor
Results = dict[str, list[Tensor]]

if not dist.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)


class Block(nn.Module):
    """A norm, a gated MLP with biases, a residual: column-, column- and row-parallel layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.gate = nn.Linear(128, 256)
        self.up = nn.Linear(128, 256, bias=False)
        self.down = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def build() -> tuple[nn.Module, Tensor]:
    from deep_gemm_ops.nn import convert

    torch.manual_seed(0)
    return convert(Block()), torch.randn(2, 66, 128)


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Result, gradient of the input and all parameters' gradients, as plain whole tensors."""
    from torch.distributed.tensor import DTensor

    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.float().square().sum().backward()
    tensors = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def work(rank: int, folder: str) -> None:
    """What each of the two processes does; the first writes all results down."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    from deep_gemm_ops.nn import GroupedExperts

    mesh = init_device_mesh("cpu", (2,))
    model, x = build()
    results: Results = {"one process": step(model, x)}
    model.zero_grad()

    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    tensor_parallel = parallelize_module(copy.deepcopy(model), mesh, plan)
    assert isinstance(tensor_parallel.gate.weight, DTensor)
    results["tensor parallel"] = step(tensor_parallel, x)
    tensor_parallel.zero_grad()
    compiled = torch.compile(tensor_parallel, fullgraph=True, backend="aot_eager")
    results["tensor parallel, compiled"] = step(tensor_parallel, x, compiled)
    with torch.no_grad():
        results["tensor parallel, no gradients"] = [tensor_parallel(x)]

    # Activations split along the sequence between the layers, gathered in front of the column-parallel ones.
    along_sequence = parallelize_module(
        copy.deepcopy(model),
        mesh,
        {
            "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "gate": ColwiseParallel(input_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        },
    )
    results["sequence parallel"] = step(along_sequence, x)

    # Without any plan: weights whole, tokens split, so that weight gradients are partial sums.
    layer = copy.deepcopy(model.down)
    tokens = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    results["layer"] = step(layer, tokens)
    layer = copy.deepcopy(model.down)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
    split = distribute_tensor(tokens, mesh, [Shard(0)])
    results["layer, tokens split"] = step(layer, split)
    layer.weight.main_grad = distribute_tensor(torch.zeros(128, 256), mesh, [Replicate()])
    layer.zero_grad()
    layer(split).sum().backward()
    assert layer.weight.grad is None
    results["layer, main gradient"] = [layer.weight.main_grad.full_tensor()]

    for name, policy in [
        ("FSDP2", MixedPrecisionPolicy()),
        ("FSDP2, BF16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
    ]:
        sharded = copy.deepcopy(model)
        for child in (sharded.gate, sharded.up, sharded.down):
            fully_shard(child, mesh=mesh, mp_policy=policy)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        assert isinstance(sharded.gate.weight, DTensor)
        results[name] = step(sharded, x)

    torch.manual_seed(0)
    experts = GroupedExperts(64, 48, 4)
    ids, weights = torch.rand(20, 4).topk(2).indices, torch.rand(20, 2)
    rows = torch.randn(20, 64)
    results["experts"] = step(experts, rows, lambda x: experts(x, ids, weights))
    experts.zero_grad()
    results["experts, FSDP2"] = step(fully_shard(experts, mesh=mesh), rows, lambda x: experts(x, ids, weights))

    torch.manual_seed(0)
    experts = GroupedExperts(256, 128, 4)
    ids, weights = torch.rand(40, 4).topk(2).indices, torch.rand(40, 2)
    rows = torch.randn(40, 256)
    results["wide experts"] = step(experts, rows, lambda x: experts(x, ids, weights))
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(1)])))
    results["wide experts, columns split"] = step(experts, rows, lambda x: experts(x, ids, weights))
    assert experts.down.grad.placements == (Shard(1),)
    experts.zero_grad()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    results["wide experts, columns split, compiled"] = step(experts, rows, lambda x: compiled(x, ids, weights))
    main_grads = [distribute_tensor(torch.zeros(p.shape), mesh, [Shard(1)]) for p in experts.parameters()]
    experts.zero_grad()
    for parameter, main_grad in zip(experts.parameters(), main_grads):
        parameter.main_grad = main_grad
    experts(rows, ids, weights).float().square().sum().backward()
    assert all(p.grad is None for p in experts.parameters())
    results["wide experts, main gradients"] = [main_grad.full_tensor() for main_grad in main_grads]

    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: pathlib.Path = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results.pt")


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "name", ["tensor parallel", "tensor parallel, compiled", "tensor parallel, no gradients", "sequence parallel"]
)
def test_tensor_parallel(results: Results, name: str) -> None:
    """Splits along multiples of 128 quantise as one process does; only sums are taken in another order, which flips a
    rounding here and there and costs far less than the 0.036 of FP8 itself."""
    actual, expected = results[name], results["one process"]
    assert len(actual) == (1 if "no gradients" in name else len(expected))
    for a, b in zip(actual, expected):
        assert error(a, b) < 2e-3


def test_tokens_split(results: Results) -> None:
    for a, b in zip(results["layer, tokens split"], results["layer"]):
        # Weight gradients have scales per 128 tokens: 64 tokens in two processes are quantised in two groups.
        assert error(a, b) < 0.045
    assert same_bits(results["layer, tokens split"][0], results["layer"][0])


def test_main_gradient(results: Results) -> None:
    """All rows of the gradient of a sum are alike: the sum of the tokens, which FP8 holds closely."""
    tokens = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    (main_grad,) = results["layer, main gradient"]
    assert error(main_grad, tokens.sum(0).expand(128, 256)) < 0.045


@pytest.mark.parametrize("name", ["", ", compiled"])
def test_tensor_parallel_experts(results: Results, name: str) -> None:
    """Columns in multiples of 128 quantise as one process does. The gradient between the layers is a sum of two BF16
    tensors, whose rounding turns some FP8 roundings around: 0.014, where FP8 itself costs 0.06."""
    actual, expected = results[f"wide experts, columns split{name}"], results["wide experts"]
    assert error(actual[0], expected[0]) < 1e-6
    for a, b in zip(actual[1:], expected[1:]):
        assert error(a, b) < 0.025


def test_tensor_parallel_experts_main_gradients(results: Results) -> None:
    for a, b in zip(results["wide experts, main gradients"], results["wide experts, columns split"][2:]):
        assert error(a, b) < 1e-6


def test_fsdp2(results: Results) -> None:
    """Both processes hold the same batch, so the mean of their gradients is the gradient: to the bit in FP32."""
    for a, b in zip(results["FSDP2"], results["one process"]):
        assert error(a, b) < 1e-6
    for a, b in zip(results["experts, FSDP2"], results["experts"]):
        assert error(a, b) < 1e-6
    for a, b in zip(results["FSDP2, BF16"], results["one process"]):
        assert 0 < error(a, b) < 0.045
