"""Experts on several ranks: tokens travel to the rank that owns their expert, and results back.

    1. Sort this rank's assignments (a token and one of its experts) by expert, and so by rank.
    2. Exchange how many there are for each expert: an all-to-all of a few integers.
    3. Dispatch: one all-to-all of rows, each a token and its routing weight.
    4. Sort what has arrived by expert, run the experts, undo the sorting.
    5. Combine: the all-to-all of 3 the other way round, then each token's sum.

Rows of an expert are in the order of ranks and, within a rank, of its tokens: as one process would have them that held
the tokens of all ranks. What belongs to no expert is the last bin of some rank, which keeps every step a permutation.
The gradients take the same two all-to-alls backwards. Everything is a functional collective, so one graph holds it all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import deep_gemm_ops

from ..layout import align, ceil_div
from .functional import autocast_dtype
from .modules import GroupedExperts, gather, sort_into_bins

__all__ = ["ExpertParallel"]

Tensor = torch.Tensor
#: Rows that go to each rank and come from each; None where all are alike.
Splits = list[int] | None


def _all_to_all(x: Tensor, send: Splits, receive: Splits, group: str, ranks: int) -> Tensor:
    if send is None or receive is None:
        send = receive = [x.shape[0] // ranks] * ranks
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), receive, send, group))


def _read(sizes: Tensor) -> list[list[int]]:
    """The one place where the host waits for the device. In a graph the sizes stay symbols."""
    if torch.compiler.is_dynamo_compiling():
        with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
            return sizes.tolist()
    return sizes.tolist()


def _as_bytes(x: Tensor) -> Tensor:
    # Flat in between: a single column may be contiguous with any stride, which view() refuses.
    return x.contiguous().flatten().view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())


def _pack(rows: Tensor, weights: Tensor | None, fp8: bool) -> Tensor:
    """What travels: rows of bytes. In front the row, in FP8 its scales behind it, then the weight."""
    if not fp8 and weights is None:
        return _as_bytes(rows)
    if fp8:
        values, scales = deep_gemm_ops.per_token_cast_to_fp8(rows)
        parts = [values.view(torch.uint8), _as_bytes(scales)]
    else:
        parts = [_as_bytes(rows)]
    if weights is not None:
        parts.append(_as_bytes(weights[:, None]))
    # Every part starts at a multiple of its elements' size, and rows at one of 16 bytes.
    sizes = [align(part.shape[1], 4) for part in parts]
    sizes[-1] += align(sum(sizes), 16) - sum(sizes)
    # pad() copies even where it adds nothing.
    missing = [size - part.shape[1] for part, size in zip(parts, sizes)]
    return torch.cat([F.pad(part, (0, more)) if more else part for part, more in zip(parts, missing)], dim=1)


def _unpack(data: Tensor, like: Tensor, weighted: bool, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """The rows, in the dtype of ``like``, and the weights."""
    columns = like.shape[1]
    size = columns if fp8 else columns * like.element_size()
    rows, end = data[:, :size], align(size, 4)
    if fp8:
        scales = data[:, end : end + 4 * ceil_div(columns, 128)].view(torch.float32)
        end += 4 * ceil_div(columns, 128)
        values = rows.view(torch.float8_e4m3fn).to(torch.bfloat16)  # exact
        if columns % 128 != 0:
            values = F.pad(values, (0, -columns % 128))
        values = values.unflatten(1, (-1, 128))
        # A product in FP32, rounded as it is written.
        rows = torch.empty_like(values, dtype=like.dtype)
        torch.mul(values, scales[:, :, None], out=rows)
        rows = rows.flatten(1)[:, :columns]
    else:
        rows = rows.view(like.dtype)
    return rows, data[:, end : end + 4].view(torch.float32).squeeze(1) if weighted else None


class _Exchange(torch.autograd.Function):
    """Rows and, where given, their weights to the ranks that they belong to; gradients travel back in full width."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor | None,
        send: Splits,
        receive: Splits,
        group: str,
        ranks: int,
        fp8: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.send, ctx.receive, ctx.group, ctx.ranks = send, receive, group, ranks
        data = _all_to_all(_pack(rows, weights, fp8), send, receive, group, ranks)
        return _unpack(data, rows, weights is not None, fp8)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        data = _all_to_all(_pack(grad, grad_weights, False), ctx.receive, ctx.send, ctx.group, ctx.ranks)
        return *_unpack(data, grad, grad_weights is not None, False), None, None, None, None, None


class ExpertParallel(GroupedExperts):
    """:class:`GroupedExperts` whose experts are spread over the ranks of a device mesh, each of which has tokens.

    Calls, parameters and state dicts are those of :class:`GroupedExperts`; parameters are DTensors, ``Shard(0)`` over
    the mesh, which ``torch.distributed.checkpoint`` saves and loads with any number of ranks and FSDP2 shards further
    over another dimension of the same mesh. Each rank calls the layer with its own tokens, and all have to call it.
    Results and gradients are those that one process would compute for the tokens of all ranks, row by row; the
    gradients of weights are for the sum of the ranks' losses. Ranks have to agree on what requires a gradient, since
    the backward pass exchanges, too.

    Args:
        dim, hidden_dim: as for :class:`GroupedExperts`.
        num_experts: of all ranks together, a multiple of their number. Rank r owns ``num_experts / ranks`` from
            ``r * num_experts / ranks`` on.
        mesh: one dimension. Its device is that of the parameters and tokens.
        capacity: None exchanges exactly the rows that there are, for which the host reads 2 * ranks integers in each
            forward pass, the only time it waits. A number makes each rank send that many rows to each other rank: the
            host waits for nothing, and the layer can be captured into a CUDA graph. Assignments that do not fit
            contribute nothing, the last experts' first, and are counted in ``num_dropped``. What always fits is the
            number of tokens times the smaller of k and the experts of a rank.
        fp8_dispatch: tokens travel in FP8 with their scales, half of BF16's bytes. Results stay the same to the bit
            where tokens are BF16, since the first product would quantise them in the same way. The gradient of
            ``gate_up`` sees the quantised tokens. Gradients travel as they are.
        device, dtype: as for :class:`GroupedExperts`; the device is the mesh's, or "meta".

    Attributes:
        num_dropped: int64 scalar on the device: assignments of this rank's last call that did not fit. None without a
            ``capacity``.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        mesh: DeviceMesh,
        *,
        capacity: int | None = None,
        fp8_dispatch: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mesh.ndim != 1:
            raise RuntimeError(f"ExpertParallel: mesh has {mesh.ndim} dimensions, expected 1")
        if num_experts % mesh.size():
            raise RuntimeError(
                f"ExpertParallel: num_experts has value {num_experts}, expected a multiple of the "
                f"{mesh.size()} ranks of mesh"
            )
        if capacity is not None and capacity < 1:
            raise RuntimeError(f"ExpertParallel: capacity has value {capacity}, expected at least 1")
        super().__init__(dim, hidden_dim, num_experts, device="meta", dtype=dtype)
        self.mesh, self.capacity, self.fp8_dispatch = mesh, capacity, fp8_dispatch
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.group = mesh.get_group().group_name
        self.num_local_experts = num_experts // self.ranks
        for name, weight in list(self.named_parameters()):
            local = torch.empty_like(weight[: self.num_local_experts], device=device or mesh.device_type)
            setattr(self, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)))
        dropped = None if capacity is None else torch.zeros((), dtype=torch.int64, device=mesh.device_type)
        self.register_buffer("num_dropped", dropped, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_experts(cls, experts: GroupedExperts, mesh: DeviceMesh, **options: Any) -> ExpertParallel:
        """A layer with each rank's part of ``experts``, which is whole and the same on every rank."""
        sizes = (experts.dim, experts.hidden_dim, experts.num_experts)
        parallel = cls(*sizes, mesh, device="meta", **options)
        for name, weight in experts.named_parameters(recurse=False):
            shard = distribute_tensor(weight.detach(), mesh, [Shard(0)])
            setattr(parallel, name, nn.Parameter(shard, requires_grad=weight.requires_grad))
        return parallel

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform between +-1/sqrt(inputs), as ``nn.Linear``: the same weights for a seed, which all ranks must have
        set alike, whatever their number."""
        for weight in (self.gate_up, self.down):
            if not isinstance(weight, DTensor) or weight.device_mesh != self.mesh:
                nn.init.uniform_(weight, *self._bounds(weight))  # FSDP has sharded it further
                continue
            local, first = weight.to_local(), self.rank * self.num_local_experts
            for expert in range(self.num_experts):
                drawn = local.new_empty(local.shape[1:]).uniform_(*self._bounds(weight))
                if first <= expert < first + self.num_local_experts:
                    local[expert - first].copy_(drawn)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, whichever ranks they are on.

        Args:
            x: ``[..., dim]``, this rank's tokens; any number, none included. They travel in the dtype of ``x``, or
                autocast's.
            expert_ids: integers ``[..., k]``, the experts that each token goes to, numbered over all ranks. A negative
                number, ``num_experts`` or more stands for none.
            expert_weights: ``[..., k]``, what each expert's output is multiplied with.

        Returns:
            ``[..., dim]`` of the dtype of ``x``, or autocast's.
        """
        copies, ids, partial = expert_ids.shape[-1], expert_ids.reshape(-1), self.capacity is not None
        num_local = self.num_local_experts
        bins_per_rank = num_local + 1  # the last one of what belongs to no expert
        nobody = (ids < 0) | (ids >= self.num_experts)
        bins = torch.where(nobody, self.rank * bins_per_rank + num_local, ids + ids // num_local)
        index, slots, ends = sort_into_bins(bins, self.ranks * bins_per_rank)
        counts = ends.diff(prepend=ends.new_zeros(1)).view(self.ranks, bins_per_rank)
        if self.capacity is not None:
            counts, index, slots = self._fit(self.capacity, counts, bins, slots)
            self.num_dropped.copy_(((slots < 0) & ~nobody).sum())
        arriving = _all_to_all(counts, None, None, self.group, self.ranks)
        send = receive = None
        if not partial:
            send, receive = _read(torch.stack((counts.sum(1), arriving.sum(1))))

        rows = gather(x.reshape(-1, self.dim).to(autocast_dtype(x)), index, slots, copies, partial)
        weights = gather(expert_weights.reshape(-1, 1).float(), index, slots, 1, partial).squeeze(1)
        rows, weights = _Exchange.apply(rows, weights, send, receive, self.group, self.ranks, self.fp8_dispatch)

        by_expert, back = _transposition(arriving, rows.shape[0])
        offsets = arriving[:, :num_local].sum(0).cumsum(0).to(torch.int32)
        weights = gather(weights[:, None], by_expert, back).squeeze(1)
        y = gather(self.experts(gather(rows, by_expert, back), offsets, weights), back, by_expert)

        y, _ = _Exchange.apply(y, None, receive, send, self.group, self.ranks, False)
        y = gather(y, slots, index, 1, partial)
        return y.unflatten(0, (-1, copies)).sum(1).view(*x.shape[:-1], self.dim)

    def _fit(self, capacity: int, counts: Tensor, bins: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, and maps between assignments and slots, of which each rank has ``capacity``; -1 stands for none."""
        first = counts.sum(1).cumsum(0) - counts.sum(1)
        ends = F.pad(counts[:, :-1].cumsum(1).clamp(max=capacity), (0, 1), value=capacity)
        rank = bins // counts.shape[1]
        place = places - first[rank]
        slots = torch.where(place < capacity, rank * capacity + place, -1)
        total = self.ranks * capacity
        index = slots.new_full((total + 1,), -1)  # the last one takes what has no slot
        index.scatter_(0, slots.where(slots >= 0, total), torch.arange(slots.shape[0], device=slots.device))
        counts = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).to(torch.int32)
        return counts, index[:total], slots

    @staticmethod
    def _factor(weight: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, main_grad = GroupedExperts._factor(weight)
        if main_grad is None:
            return _local(weight), None
        return _LocalPart.apply(weight) if isinstance(weight, DTensor) else weight, _local(main_grad)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}, capacity={self.capacity}"


class _LocalPart(torch.autograd.Function):
    """``to_local()`` of a weight whose gradient goes to ``main_grad``: it has none, not zeros as in PyTorch 2.11."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return weight.to_local().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> None:
        return None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _transposition(sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order that turns ``total`` rows in blocks of sizes ``[A, B]`` into rows with B first, and its inverse."""

    def move(sizes: Tensor, other: Tensor) -> Tensor:
        ends, other_ends = sizes.flatten().cumsum(0), other.flatten().cumsum(0)
        block = torch.searchsorted(ends, row, right=True)
        other_block = block % sizes.shape[1] * other.shape[1] + block // sizes.shape[1]
        return row - (ends - sizes.flatten())[block] + (other_ends - other.flatten())[other_block]

    row = torch.arange(total, device=sizes.device)
    return move(sizes.t(), sizes), move(sizes, sizes.t())
