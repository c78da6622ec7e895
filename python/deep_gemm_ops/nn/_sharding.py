"""How DTensor may shard the training operators, as PyTorch's tensor parallelism and FSDP2 need it.

A linear layer splits along tokens, along N (column-parallel) or along K (row-parallel). The rules name, for each split,
how every argument lies and what comes out; DTensor picks the one that moves least. ``Partial`` results are sums that
DTensor reduces where somebody reads them. Layers of experts split along N and, where no SwiGLU joins halves of it, K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__: list[str] = []

_ops = torch.ops.deep_gemm
Rule = tuple[list[Placement | None], list[Placement | None]]


def _given(placement: Placement, argument: Any) -> Placement | None:
    return None if argument is None else placement


@register_sharding(_ops.fp8_linear.default)
def _linear(x: Any, weight: Any, bias: Any, out_dtype: Any = None, main_grad: Any = None) -> list[Rule]:
    last = len(x.shape) - 1

    def rule(y: Placement, of_x: Placement, of_weight: Placement, of_bias: Placement) -> Rule:
        return [y], [of_x, of_weight, _given(of_bias, bias), None, _given(of_weight, main_grad)]

    rules = [
        rule(Replicate(), Replicate(), Replicate(), Replicate()),
        rule(Shard(last), Replicate(), Shard(0), Shard(0)),
        rule(Partial(), Shard(last), Shard(1), Partial()),
    ]
    return rules + [rule(Shard(dim), Shard(dim), Replicate(), Replicate()) for dim in range(last)]


@register_sharding(_ops.fp8_linear_backward.default)
def _linear_backward(grad: Any, x: Any, weight: Any, x_dtype: Any, weight_dtype: Any) -> list[Rule]:
    last = len(grad.shape) - 1

    def rule(dy: Placement, of_x: Placement, of_weight: Placement, dx: Placement, dw: Placement) -> Rule:
        # A gradient that is not wanted is an empty tensor, the same everywhere.
        results = [Replicate() if weight is None else dx, Replicate() if x is None else dw]
        return results, [dy, _given(of_x, x), _given(of_weight, weight), None, None]

    rules = [
        rule(Replicate(), Replicate(), Replicate(), Replicate(), Replicate()),
        rule(Shard(last), Replicate(), Shard(0), Partial(), Shard(0)),
        rule(Replicate(), Shard(last), Shard(1), Shard(last), Shard(1)),
    ]
    return rules + [rule(Shard(dim), Shard(dim), Replicate(), Shard(dim), Partial()) for dim in range(last)]


@register_sharding(_ops.fp8_grouped_linear.default)
def _grouped_linear(x: Any, weight: Any, offsets: Any, out_dtype: Any = None, main_grad: Any = None) -> list[Rule]:
    def rule(y: Placement, of_x: Placement, of_weight: Placement) -> Rule:
        return [y], [of_x, of_weight, Replicate(), None, _given(of_weight, main_grad)]

    return [
        rule(Replicate(), Replicate(), Replicate()),
        rule(Shard(1), Replicate(), Shard(1)),
        rule(Partial(), Shard(1), Shard(2)),
    ]


@register_sharding(_ops.fp8_swiglu_grouped_linear.default)
def _swiglu_grouped_linear(
    x: Any, weight: Any, offsets: Any, row_weights: Any = None, out_dtype: Any = None, main_grad: Any = None
) -> list[Rule]:
    def rule(placement: Placement) -> Rule:
        of_rows = _given(Replicate(), row_weights)
        return [placement], [Replicate(), placement, Replicate(), of_rows, None, _given(placement, main_grad)]

    return [rule(Replicate()), rule(Shard(1))]


@register_sharding(_ops.swiglu_backward.default)
def _swiglu_backward(x: Any, grad: Any, row_weights: Any = None) -> list[Rule]:
    def rule(placement: Placement) -> Rule:
        return [placement] * 3, [placement, placement, _given(placement, row_weights)]

    return [rule(Replicate()), rule(Shard(0))]


@register_sharding(_ops.fp8_grouped_linear_backward.default)
def _grouped_linear_backward(
    grad: Any, x: Any, weight: Any, offsets: Any, x_dtype: Any, weight_dtype: Any
) -> list[Rule]:
    def rule(dy: Placement, of_x: Placement, of_weight: Placement, dx: Placement) -> Rule:
        results = [Replicate() if weight is None else dx, Replicate() if x is None else of_weight]
        return results, [dy, _given(of_x, x), _given(of_weight, weight), Replicate(), None, None]

    return [
        rule(Replicate(), Replicate(), Replicate(), Replicate()),
        rule(Shard(1), Replicate(), Shard(1), Partial()),
        rule(Replicate(), Shard(1), Shard(2), Shard(1)),
    ]


def replicated(tensor: torch.Tensor, like: DTensor) -> DTensor:
    """What every rank has, on the mesh of ``like``."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
