"""Experts on several ranks, as 2 and 4 gloo processes on the CPU: equal to one process that holds all tokens.

On a GPU the same layer runs in a group of one NCCL rank, where waiting for the device and capture are tested.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deep_gemm_ops
from deep_gemm_ops.bench import expert_parallel
from deep_gemm_ops.bench.expert_parallel import Layer, Machine, cost, traffic
from deep_gemm_ops.nn import GroupedExperts

from common import ROOT, generator, same_bits
from test_nn_experts import FP8_ERROR, expert_reference, relative

Tensor = torch.Tensor
HAS_FUSED = hasattr(deep_gemm_ops, "fp8_mega_moe")

if not dist.is_available():
    pytest.skip("this PyTorch is built without torch.distributed", allow_module_level=True)

DIM, HIDDEN, EXPERTS, COPIES = 64, 48, 8, 3
#: Tokens of each rank; one has none.
TOKENS = {2: [33, 7], 4: [20, 0, 7, 13]}
#: Rows and the blocks of 128 in which gradients quantise them are the same; sums are added up in another order.
ROUNDING = 1e-5
AMPLE = 99  # rows of a rank for another, at most: 33 tokens of 3 copies


def routing(kind: str, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, EXPERTS, generator=generator(seed)).topk(COPIES).indices
    if kind == "masked":
        ids[::3, 0], ids[1::4, 1] = -1, EXPERTS + 2
    elif kind == "one expert":  # which is the last rank's; all others get nothing
        ids = torch.full_like(ids, EXPERTS - 1)
    elif kind == "nobody":
        ids = torch.full_like(ids, -1)
    return ids, torch.rand(tokens, COPIES, generator=generator(seed + 1))


def inputs(ranks: int, kind: str = "plain", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranks together."""
    tokens = sum(TOKENS[ranks])
    return torch.randn(tokens, DIM, generator=generator(1)).to(dtype), *routing(kind, tokens, 2)


def whole_layer(dtype: torch.dtype = torch.bfloat16) -> GroupedExperts:
    torch.manual_seed(0)
    return GroupedExperts(DIM, HIDDEN, EXPERTS, dtype=dtype)


def step(
    layer: GroupedExperts, x: Tensor, ids: Tensor, weights: Tensor, call: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """Result, gradients of tokens and routing weights; gradients of both parameters, whole."""
    layer.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = (layer if call is None else call)(x, ids, weights)
    y.float().square().sum().backward()
    grads = [p.grad for p in (layer.gate_up, layer.down)]
    return [
        y.detach(),
        x.grad,
        weights.grad,
        *(g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads),
    ]


def drop(ids: Tensor, tokens: list[int], capacity: int) -> tuple[Tensor, list[int]]:
    """Routing in which what does not fit has no expert, and how much that is on each rank: the rule, spelled out."""
    ids, dropped, begin = ids.clone(), [], 0
    per_rank = EXPERTS // len(tokens)
    for count in tokens:
        mine, lost = ids[begin : begin + count].view(-1), 0
        for rank in range(len(tokens)):
            of_rank = [(int(e), i) for i, e in enumerate(mine) if e // per_rank == rank]
            for _, i in sorted(of_rank)[capacity:]:
                mine[i] = -1
                lost += 1
        dropped.append(lost)
        begin += count
    return ids, dropped


class Counted:
    """Counts the layer's exchanges and their bytes, and how often the host reads from the device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from deep_gemm_ops.nn import expert_parallel as module

        self.exchanges: list[tuple[int, int]] = []  # bytes sent to all ranks, to others
        self.reads = 0
        all_to_all, read = module._all_to_all, module._read

        def counted_all_to_all(x: Tensor, send: Any, receive: Any, group: str, ranks: int) -> Tensor:
            total = x.numel() * x.element_size()
            own = total // ranks if send is None else send[dist.get_rank()] * x[:1].numel() * x.element_size()
            self.exchanges.append((total, total - own))
            return all_to_all(x, send, receive, group, ranks)

        def counted_read(sizes: Tensor) -> list[list[int]]:
            self.reads += 1
            return read(sizes)

        patch.setattr(module, "_all_to_all", counted_all_to_all)
        patch.setattr(module, "_read", counted_read)


class Products(TorchDispatchMode):
    """Counts the operations of grouped layers, and the weights of experts that have rows."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name()
        if name.startswith(("deep_gemm::fp8_grouped_linear", "deep_gemm::fp8_swiglu_grouped_linear")):
            offsets = next(t for t in args if isinstance(t, Tensor) and t.dtype == torch.int32)
            rows = int(offsets[-1])
            if "backward" in name:
                grad, x, weight = args[:3]
                self.operations += 2 * rows * grad.shape[1] * sum(t.shape[-1] for t in (x, weight) if t is not None)
            else:
                self.operations += 2 * rows * args[1][0].numel()
                self.weights += int((offsets.diff(prepend=offsets.new_zeros(1)) > 0).sum()) * args[1][0].numel()
        return func(*args, **(kwargs or {}))


def work(rank: int, ranks: int, folder: str) -> None:
    """What each process does; it writes all its results down."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{ranks}", rank=rank, world_size=ranks)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    from deep_gemm_ops.nn import ExpertParallel, freeze

    mesh = init_device_mesh("cpu", (ranks,))
    begin = sum(TOKENS[ranks][:rank])
    mine = slice(begin, begin + TOKENS[ranks][rank])
    results: dict[str, Any] = {}

    def layer_of(whole: GroupedExperts, **options: Any) -> ExpertParallel:
        return ExpertParallel.from_experts(whole, mesh, **options)

    for kind in ("plain", "masked", "one expert", "nobody"):
        x, ids, weights = (t[mine] for t in inputs(ranks, kind))
        results[f"exact, {kind}"] = step(layer_of(whole_layer()), x, ids, weights)
        ample = layer_of(whole_layer(), capacity=AMPLE)
        results[f"ample, {kind}"] = step(ample, x, ids, weights)
        scarce = layer_of(whole_layer(), capacity=10)
        results[f"scarce, {kind}"] = step(scarce, x, ids, weights)
        results[f"dropped, {kind}"] = [int(ample.num_dropped), int(scarce.num_dropped)]

    x, ids, weights = (t[mine] for t in inputs(ranks))
    layer = layer_of(whole_layer(), fp8_dispatch=True)
    results["FP8 dispatch"] = step(layer, x, ids, weights)
    results["FP8 dispatch, FP32"] = step(
        layer_of(whole_layer(torch.float32), fp8_dispatch=True), x.float(), ids, weights
    )
    results["FP32"] = step(layer_of(whole_layer(torch.float32)), x.float(), ids, weights)
    layer = layer_of(whole_layer(), capacity=AMPLE)

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(layer, *arguments, use_reentrant=False)

    if ranks == 2:
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    results["checkpointed"] = step(layer, x, ids, weights, checkpointed)
    leading = layer(x.unflatten(0, (-1, 1)), ids.unflatten(0, (-1, 1)), weights.unflatten(0, (-1, 1)))
    results["leading dimensions"] = [leading.detach().squeeze(1)]
    with torch.autocast("cpu", torch.bfloat16):
        results["autocast"] = step(layer_of(whole_layer(torch.float32)), x.float(), ids, weights)

    for name, capacity in (("exact", None), ("ample", AMPLE)) if ranks == 2 else ():
        layer = layer_of(whole_layer(), capacity=capacity)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for kind in ("plain", "masked", "one expert"):
                # Other token counts first: the last of them are those that one process is compared with. Zero tokens
                # and one are graphs of their own, as always in torch.compile, so here every rank has some.
                for tokens in (29 + rank, 5):
                    x = torch.randn(tokens, DIM, generator=generator(5 + rank)).bfloat16()
                    ids, weights = routing(kind, tokens, 7 + rank)
                    actual = step(layer, x, ids, weights, compiled)
                    results[f"compiled {name}, {kind}, {tokens == 5}"] = list(zip(actual, step(layer, x, ids, weights)))
        torch._dynamo.reset()

    # Frozen: the weights of this rank in FP8, the same results.
    layer = layer_of(whole_layer(), capacity=AMPLE)
    x, ids, weights = (t[mine] for t in inputs(ranks))
    with torch.no_grad():
        before = layer(x, ids, weights)
        assert list(freeze(layer).state_dict()) == [f"frozen.{name}" for name in layer.frozen._quantised]
        assert layer.frozen.down.shape == (EXPERTS // ranks, DIM, HIDDEN)
        assert same_bits(layer(x, ids, weights), before)

    # The fused kernel of the same layer.
    if HAS_FUSED:
        torch.manual_seed(0)
        layer = freeze(layer_of(GroupedExperts(128, 128, EXPERTS, dtype=torch.bfloat16)))
        _, ids, weights = (t[mine] for t in inputs(ranks))
        x = torch.randn(len(ids), 128, generator=generator(rank)).bfloat16()
        buffer = deep_gemm_ops.get_symm_buffer_for_mega_moe(
            dist.group.WORLD, EXPERTS, max(TOKENS[ranks]), COPIES, 128, 128, mma_type="fp8xfp8", device="cpu"
        )
        quantised = deep_gemm_ops.per_token_cast_to_fp8(x)
        given = (*quantised, ids, weights)
        for target, source in zip((buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights), given):
            target[: len(x)].copy_(source)
        own = layer.frozen
        pairs = ((own.gate_up, own.gate_up_scale), (own.down, own.down_scale))
        fused = deep_gemm_ops.fp8_mega_moe(
            None, *deep_gemm_ops.transform_weights_for_mega_moe(*pairs), buffer, num_tokens=len(x)
        )
        with torch.no_grad():
            results["fused"] = (layer(x, ids, weights), fused)

    # A gradient that is accumulated in place.
    x, ids, weights = (t[mine] for t in inputs(ranks))
    layer = layer_of(whole_layer())
    plain = step(layer, x, ids, weights)
    layer.zero_grad()
    for weight in layer.parameters():
        weight.main_grad = DTensor.from_local(torch.ones_like(weight.to_local(), dtype=torch.float32), mesh, [Shard(0)])
    layer(x, ids, weights).float().square().sum().backward()
    assert all(p.grad is None and p.grad_added_to_main_grad for p in layer.parameters())
    results["main gradient"] = [(p.main_grad.full_tensor() - 1, g) for p, g in zip(layer.parameters(), plain[3:])]

    # Initial weights depend on the seed alone; meta construction; whole state dicts.
    torch.manual_seed(3)
    drawn = ExpertParallel(DIM, HIDDEN, EXPERTS, mesh)
    assert drawn.gate_up.to_local().shape == (EXPERTS // ranks, 2 * HIDDEN, DIM)
    results["drawn"] = [p.full_tensor().detach() for p in drawn.parameters()]
    empty = ExpertParallel(DIM, HIDDEN, EXPERTS, mesh, device="meta", capacity=AMPLE).to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()
    assert all(same_bits(a.to_local(), b.to_local()) for a, b in zip(empty.parameters(), drawn.parameters()))
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(empty, whole_layer(torch.float32).state_dict(), options=options)
    results["loaded whole"] = [p.full_tensor().detach() for p in empty.parameters()]

    # Checkpoints: two ranks write what four read, and one process (in the test).
    layer = layer_of(whole_layer())
    if ranks == 2:
        dcp.save(layer.state_dict(), checkpoint_id=f"{folder}/checkpoint")
    else:
        layer = ExpertParallel(DIM, HIDDEN, EXPERTS, mesh, dtype=torch.bfloat16)
        state = layer.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        results["loaded"] = [p.full_tensor().detach() for p in layer.parameters()]

        # FSDP2 shards each rank's experts over the other dimension; the batch of a row of the mesh is its own.
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "expert"))
        half = grid["expert"].get_local_rank()
        x, ids, weights = inputs(2)
        first = [0, TOKENS[2][0]][half]
        own = slice(first, first + TOKENS[2][half])
        sharded = ExpertParallel.from_experts(whole_layer(torch.float32), grid["expert"])
        fully_shard(sharded, mesh=grid["replicate"])
        assert sharded.gate_up.to_local().shape[0] == EXPERTS // 4
        results["FSDP2"] = step(sharded, x[own].float(), ids[own], weights[own])
        dcp.save(sharded.state_dict(), checkpoint_id=f"{folder}/sharded")
        with torch.no_grad():
            for weight in sharded.parameters():
                weight.zero_()
        state = sharded.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/sharded")
        results["FSDP2, loaded"] = [p.full_tensor().detach() for p in sharded.parameters()]
        sharded.reset_parameters()
        assert all(bool(p.to_local().any()) for p in sharded.parameters())

    # Last, since it changes the module: what travels, and how often the host waits.
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        for name, options in (("exact", {}), ("fp8", {"fp8_dispatch": True}), ("capacity", {"capacity": AMPLE})):
            layer = layer_of(whole_layer(), **options)
            x, ids, weights = (t[mine] for t in inputs(ranks))
            x = x.clone().requires_grad_()
            counted.exchanges.clear()
            counted.reads = 0
            with Products() as products:
                y = layer(x, ids, weights.clone().requires_grad_())
                forward, operations = list(counted.exchanges), products.operations
                y.float().sum().backward()
            results[f"bytes, {name}"] = (forward, counted.exchanges[len(forward) :], counted.reads)
            results[f"operations, {name}"] = (operations, products.operations, products.weights)

    torch.save(results, os.path.join(folder, f"results{ranks}_{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("gloo")
    for ranks in TOKENS:  # in this order: four ranks read what two have written
        torch.multiprocessing.spawn(work, (ranks, str(folder)), nprocs=ranks)
    return folder


@pytest.fixture(params=list(TOKENS))
def results(folder: pathlib.Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of each rank."""
    return [results_of(folder, request.param, rank) for rank in range(request.param)]


def results_of(folder: pathlib.Path, ranks: int, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"results{ranks}_{rank}.pt")


def joined(results: list[dict[str, Any]], name: str) -> list[Tensor]:
    """Tokens' tensors of all ranks behind each other; gradients of weights, which all ranks have alike."""
    of_ranks = [rank[name] for rank in results]
    for other in of_ranks[1:]:
        assert all(same_bits(a, b) for a, b in zip(of_ranks[0][3:], other[3:]))
    return [torch.cat(parts) for parts in list(zip(*of_ranks))[:3]] + of_ranks[0][3:]


@pytest.mark.parametrize("kind", ["plain", "masked", "one expert", "nobody"])
def test_equal_to_one_process(results: list[dict[str, Any]], kind: str) -> None:
    ranks = len(results)
    x, ids, weights = inputs(ranks, kind)
    expected = step(whole_layer(), x, ids, weights)
    for capacity in ("exact", "ample"):
        for a, b in zip(joined(results, f"{capacity}, {kind}"), expected):
            assert a.shape == b.shape
            assert relative(a, b) < ROUNDING if bool(b.any()) else not a.any()
    kept, dropped = drop(ids, TOKENS[ranks], 10)
    assert [rank[f"dropped, {kind}"] for rank in results] == [[0, lost] for lost in dropped]
    for a, b in zip(joined(results, f"scarce, {kind}"), step(whole_layer(), x, kept, weights)):
        assert relative(a, b) < ROUNDING if bool(b.any()) else not a.any()


def test_scarce_capacity_drops_something() -> None:
    """Otherwise the test above would say nothing."""
    for ranks, tokens in TOKENS.items():
        assert sum(drop(inputs(ranks)[1], tokens, 10)[1]) > 0


@pytest.mark.parametrize("name", ["FP32", "FP8 dispatch, FP32", "autocast"])
def test_against_float64(results: list[dict[str, Any]], name: str) -> None:
    """Results, and gradients of tokens, routing weights and both weight tensors."""
    x, ids, weights = inputs(len(results), dtype=torch.bfloat16)
    whole = whole_layer(torch.float32)
    tensors = [t.detach().double().requires_grad_() for t in (x, weights, whole.gate_up, whole.down)]
    exact = expert_reference(tensors[0], tensors[2], tensors[3], ids, tensors[1])
    exact.square().sum().backward()
    for i, (a, b) in enumerate(zip(joined(results, name), [exact, *(t.grad for t in tensors)])):
        # The gradient of the loss is the result itself, which adds its own error to that of each gradient.
        assert 0 < relative(a, b) < (FP8_ERROR if i == 0 else 2 * FP8_ERROR)


def test_fp8_dispatch_changes_no_result(results: list[dict[str, Any]]) -> None:
    """What the first product would have quantised arrives quantised; only ``gate_up`` has another gradient."""
    expected = joined(results, "exact, plain")
    for i, (a, b) in enumerate(zip(joined(results, "FP8 dispatch"), expected)):
        assert 0.01 < relative(a, b) < 0.06 if i == 3 else same_bits(a, b)


def test_checkpointed(results: list[dict[str, Any]]) -> None:
    """Activation checkpointing, compiled on two ranks, and leading dimensions of tokens."""
    expected = joined(results, "exact, plain")
    assert all(relative(a, b) < ROUNDING for a, b in zip(joined(results, "checkpointed"), expected))
    assert same_bits(torch.cat([rank["leading dimensions"][0] for rank in results]), expected[0])


@pytest.mark.skipif(not HAS_FUSED, reason="there is no fp8_mega_moe")
def test_equal_to_the_fused_kernel(results: list[dict[str, Any]]) -> None:
    """Quantised in the same places; an intermediate that is rounded to BF16 in another order changes FP8 roundings."""
    for rank in results:
        ours, fused = rank["fused"]
        assert ours.shape == fused.shape and ours.dtype == fused.dtype
        assert relative(ours, fused) < 1e-3 if len(ours) else True


@pytest.mark.parametrize("name", ["exact", "ample"])
def test_compiled(folder: pathlib.Path, name: str) -> None:
    """One graph for all token counts, all routings and all sizes of what arrives."""
    for rank in (0, 1):
        compiled = {
            key: pairs for key, pairs in results_of(folder, 2, rank).items() if key.startswith(f"compiled {name}")
        }
        assert len(compiled) == 6
        for key, pairs in compiled.items():
            assert all(relative(a, b) < ROUNDING if bool(b.any()) else not a.any() for a, b in pairs), key


def test_main_gradient(results: list[dict[str, Any]]) -> None:
    for rank in results:
        for main, plain in rank["main gradient"]:
            assert relative(main, plain) < 4e-3  # the plain one is rounded to BF16


def test_initial_weights(folder: pathlib.Path) -> None:
    """Those of 2 and of 4 ranks are the same, uniform, and differ from expert to expert."""
    two, four = (results_of(folder, ranks, 0)["drawn"] for ranks in TOKENS)
    for a, b in zip(two, four):
        bound = a.shape[2] ** -0.5
        assert same_bits(a, b)
        assert bound * 0.99 < float(a.abs().max()) <= bound
        assert abs(float(a.std()) - bound / 3**0.5) < 0.02 * bound
        assert len({float(expert[0, 0]) for expert in a}) == EXPERTS


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints(folder: pathlib.Path) -> None:
    """What two ranks have saved, four load, with experts sharded further by FSDP2, too, and so does one process."""
    import torch.distributed.checkpoint as dcp

    expected = list(whole_layer().parameters())
    four = results_of(folder, 4, 3)
    assert all(same_bits(a, b) for a, b in zip(four["loaded"], expected))
    assert all(same_bits(a, b) for a, b in zip(four["FSDP2, loaded"], whole_layer(torch.float32).parameters()))
    assert all(same_bits(a, b) for a, b in zip(four["loaded whole"], whole_layer(torch.float32).parameters()))
    torch.manual_seed(9)
    alone = GroupedExperts(DIM, HIDDEN, EXPERTS, dtype=torch.bfloat16)
    state = alone.state_dict()
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"), no_dist=True)
    alone.load_state_dict(state)
    assert all(same_bits(a, b) for a, b in zip(alone.parameters(), expected))


def test_fsdp2(folder: pathlib.Path) -> None:
    """Both replicas have the same batch, so the mean of their gradients is the gradient."""
    results = [results_of(folder, 4, rank) for rank in (0, 1)]
    x, ids, weights = inputs(2)
    for a, b in zip(joined(results, "FSDP2"), step(whole_layer(torch.float32), x.float(), ids, weights)):
        assert relative(a, b) < ROUNDING


def test_bytes_are_those_of_the_cost_model(results: list[dict[str, Any]]) -> None:
    """Three exchanges forwards and two backwards; the model knows each one's bytes, and so does this count."""
    ranks = len(results)
    ids = inputs(ranks)[1]
    layer = Layer(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, copies=COPIES)
    begin = 0
    for rank, (result, tokens) in enumerate(zip(results, TOKENS[ranks])):
        owner = ids[begin : begin + tokens] // (EXPERTS // ranks)
        begin += tokens
        others = int((owner != rank).sum())
        arriving = sum(
            int((part // (EXPERTS // ranks) == rank).sum())
            for other, part in enumerate(ids.split(TOKENS[ranks]))
            if other != rank
        )
        for name, options in (("exact", {}), ("fp8", {"fp8_dispatch": True}), ("capacity", {"capacity": AMPLE})):
            forward, backward, reads = result[f"bytes, {name}"]
            assert reads == (0 if name == "capacity" else 1)
            model = traffic(layer, ranks, rows_sent=others, rows_received=arriving, **options)
            assert [sent for _, sent in forward] == [model.counts, model.dispatch, model.combine]
            assert [sent for _, sent in backward] == [model.combine_backward, model.dispatch_backward]


@pytest.mark.parametrize("name", ["exact", "fp8", "capacity"])
def test_operations_are_those_of_the_cost_model(results: list[dict[str, Any]], name: str) -> None:
    """Of all ranks together: the model is about an average one."""
    ranks, layer = len(results), Layer(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, copies=COPIES)
    forward, step, weights = (sum(result[f"operations, {name}"][i] for result in results) for i in range(3))
    tokens = sum(TOKENS[ranks]) / ranks
    assert forward == ranks * cost(layer, ranks, tokens).operations
    assert step == ranks * cost(layer, ranks, tokens, training=True).operations
    assert weights == pytest.approx(ranks * cost(layer, ranks, tokens, frozen=True).weight_bytes, rel=1e-3)


def test_cost_model() -> None:
    """Against DeepSeek-V3's numbers, worked out by hand."""
    layer = Layer()
    few, many = cost(layer, 8, 4096), cost(layer, 1024, 4096, training=True)
    assert few.operations == 4096 * 8 * 6 * 7168 * 2048
    assert few.remote_bytes == 0 and few.expert_ranks == 8
    # 7/8 of the rows leave: 7168 BF16 values and 16 bytes around a routing weight, and 7168 values back.
    assert few.local_bytes == 4096 * 8 * 7 / 8 * (7168 * 2 + 16 + 7168 * 2) + 4 * 7 * 33
    fp8 = cost(layer, 8, 4096, fp8_dispatch=True)
    assert few.local_bytes - fp8.local_bytes == 4096 * 7 * (7168 * 2 + 16 - (7168 + 56 * 4 + 16))
    assert cost(layer, 8, 4096, capacity=4096 * 8).local_bytes > 7.9 * few.local_bytes
    # One expert per rank, four replicas; 7 of 255 other ranks are near.
    assert (many.expert_ranks, many.sync_bytes) == (256, 2 * 0.75 * 2 * 3 * 7168 * 2048)
    assert many.remote_bytes / many.local_bytes == pytest.approx(248 / 7)
    assert many.operations == 3 * few.operations
    assert few.fused_us is not None and few.fused_us < few.us and many.fused_us is None
    # One token has eight experts, of which each rank's 32 hold one on average: 1/8 * 1/32 of all weights per rank.
    single = cost(layer, 8, 1 / 8, frozen=True)
    assert single.weight_bytes == pytest.approx(32 * 3 * 7168 * 2048 / 32)
    fast = Machine(remote_gbps=100.0, exchange_us=10.0)
    slow = cost(layer, 64, 128)
    assert cost(layer, 64, 128, machine=fast).links_us == pytest.approx(slow.links_us / 2 + 30, rel=1e-3)
    with pytest.raises(ValueError, match="24 ranks cannot share 256 experts evenly"):
        cost(layer, 24, 1)


def test_cost_model_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/expert_parallel.md shows what the commands in it print."""
    page = (ROOT / "docs" / "expert_parallel.md").read_text()
    blocks = re.findall(r"<!-- python -m deep_gemm_ops.bench.expert_parallel(.*?) -->\n(\|.*?)\n\n", page, re.DOTALL)
    assert len(blocks) >= 3
    for arguments, printed in blocks:
        expert_parallel.main(arguments.split())
        assert capsys.readouterr().out.strip() == printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 7}, "num_experts has value 7, expected a multiple of the 2 ranks of mesh"),
        ({"capacity": 0}, "capacity has value 0, expected at least 1"),
        ({"dims": 2}, "mesh has 2 dimensions, expected 1"),
    ],
)
def test_bad_input(options: dict[str, int], message: str) -> None:
    from deep_gemm_ops.nn import ExpertParallel

    class Mesh:
        ndim, device_type = options.get("dims", 1), "cpu"

        def size(self) -> int:
            return 2

    with pytest.raises(RuntimeError, match=f"ExpertParallel: {message}"):
        ExpertParallel(8, 8, options.get("num_experts", 8), Mesh(), capacity=options.get("capacity"))  # type: ignore


@contextlib.contextmanager
def nccl(folder: pathlib.Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cuda", (1,))
    finally:
        dist.destroy_process_group()


def test_on_a_gpu(cuda: str, tmp_path: pathlib.Path) -> None:
    """A group of one NCCL rank: results, no waiting with a capacity, one graph for every routing, compiled code."""
    from deep_gemm_ops.nn import ExpertParallel

    whole = whole_layer().to(cuda)
    x, ids, weights = (t.to(cuda) for t in inputs(2))
    expected = step(whole, x, ids, weights)
    with nccl(tmp_path) as mesh:
        layer = ExpertParallel.from_experts(whole, mesh, capacity=COPIES * len(x))
        exact = ExpertParallel.from_experts(whole, mesh, fp8_dispatch=True)
        for module in (layer, exact):
            for i, (a, b) in enumerate(zip(step(module, x, ids, weights), expected)):
                assert relative(a, b) < (0.06 if module is exact and i == 3 else 1e-6)
        compiled = torch.compile(layer, fullgraph=True)
        for a, b in zip(step(layer, x, ids, weights, compiled), expected):
            assert relative(a, b) < 1e-2
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, ids, weights).float().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(stream):
                layer(x, ids, weights)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x, ids, weights)
            for kind in ("masked", "one expert", "plain"):
                other = routing(kind, len(x), 11)
                ids.copy_(other[0])
                weights.copy_(other[1])
                graph.replay()
                assert relative(captured, whole(x, ids, weights)) < 1e-6
        del graph


def work_on_gpus(rank: int, ranks: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    from torch.distributed.device_mesh import init_device_mesh

    from deep_gemm_ops.nn import ExpertParallel

    mesh = init_device_mesh("cuda", (ranks,))
    begin = sum(TOKENS[ranks][:rank])
    mine = slice(begin, begin + TOKENS[ranks][rank])
    whole = whole_layer().to("cuda")
    for kind in ("plain", "masked", "one expert"):
        x, ids, weights = (t.to("cuda") for t in inputs(ranks, kind))
        expected = step(whole, x, ids, weights)
        expected[:3] = [t[mine] for t in expected[:3]]
        for options in ({}, {"capacity": AMPLE}, {"fp8_dispatch": True}):
            layer = ExpertParallel.from_experts(whole, mesh, **options)
            actual = step(layer, x[mine], ids[mine], weights[mine])
            for i, (a, b) in enumerate(zip(actual, expected)):
                bar = 0.06 if "fp8_dispatch" in options and i == 3 else ROUNDING
                assert relative(a, b) < bar if bool(b.any()) else not a.any()
    dist.destroy_process_group()


def test_on_several_gpus(several_gpus: int, tmp_path: pathlib.Path) -> None:
    """Over NCCL: equal to one GPU that holds all tokens."""
    torch.multiprocessing.spawn(work_on_gpus, (several_gpus, str(tmp_path)), nprocs=several_gpus)


def test_measuring_on_one_gpu(cuda: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--dim", "256", "--hidden-dim", "128", "--num-experts", "8", "--copies", "2"]
    expert_parallel.main(["--measure", "--tokens", "64", *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 ranks, 64 tokens each.")
    assert len(lines) == 4 + 4 * 3 + 2


def test_deepcopy_keeps_the_mesh(tmp_path: pathlib.Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from deep_gemm_ops.nn import ExpertParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer = ExpertParallel.from_experts(whole_layer(), init_device_mesh("cpu", (1,)))
        twin = copy.deepcopy(layer)
        x, ids, weights = inputs(2)
        assert all(same_bits(a, b) for a, b in zip(step(twin, x, ids, weights), step(layer, x, ids, weights)))
        assert all(same_bits(a, b) for a, b in zip(step(twin, x, ids, weights), step(whole_layer(), x, ids, weights)))
        assert "ranks=1" in repr(layer)
    finally:
        dist.destroy_process_group()
