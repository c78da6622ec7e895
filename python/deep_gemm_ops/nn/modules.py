"""Layers. They are ``torch.nn`` modules with the parameters, names and state dicts of the layers they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import deep_gemm_ops

from ._grouped import cast_weights, grouped_product
from ._linear import kernel_dtype
from .functional import autocast_dtype, fp8_grouped_linear, fp8_linear, fp8_swiglu_grouped_linear

__all__ = ["FP8Linear", "FrozenExperts", "FrozenFP8Linear", "GroupedExperts", "convert", "freeze"]


def _main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The tensor that the weight's gradient is to be added to, if there is one."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None:
        weight.grad_added_to_main_grad = True
    return main_grad


class FP8Linear(nn.Linear):
    """``nn.Linear`` whose products, forward and backward, run in FP8 with FP32 accumulation.

    Parameters, their names and initialisation, state dicts, ``to()``, ``deepcopy`` and meta-device construction are
    ``nn.Linear``'s: the weight stays in the dtype it is created in, and every product quantises its operands anew. Any
    sizes are taken; those that are multiples of 16 spare a copy. The gradient rules: :func:`fp8_linear`.

    A weight with an attribute ``main_grad`` (float32, the shape of the weight, contiguous) has its gradient added to
    that instead of ``grad``, by the kernel that computes it. ``grad`` stays None and ``grad_added_to_main_grad`` is
    set on the weight, the names that Megatron-LM's optimisers look for.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` of the dtype of ``x``, or autocast's."""
        return fp8_linear(x, self.weight, self.bias, main_grad=_main_grad(self.weight))


class _Frozen(nn.Module):
    """Buffers of quantised weights, which keep their dtypes whatever ``to(dtype)`` says."""

    _quantised: tuple[str, ...]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        quantised = [getattr(self, name) for name in self._quantised]

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype and any(tensor is x for x in quantised):
                return tensor.to(result.device)
            return result

        return super()._apply(keep_dtype, recurse)


class FrozenFP8Linear(_Frozen):
    """An :class:`FP8Linear` for serving: the weight is quantised once and kept in FP8, half of BF16's memory.

    Results are those of the layer it is made from, to the bit. It is made of the library's operators alone, so programs
    of ``torch.export`` and AOTInductor packages need no Python for it. No gradients.

    Args:
        linear: what to take weight and bias from; it is not changed.

    Buffers ``weight`` (float8_e4m3fn ``[N, K rounded up to 16]``), ``weight_scale`` (float32, one per 128 x 128 block)
    and ``bias``. ``to(dtype)`` changes the bias alone.
    """

    _quantised = ("weight", "weight_scale")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = F.pad(linear.weight.detach(), (0, self._padding))
        values, scales = deep_gemm_ops.per_block_cast_to_fp8(weight)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def _padding(self) -> int:
        return -self.in_features % 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` of the dtype of ``x``, or autocast's."""
        dtype = autocast_dtype(x)
        rows = x.reshape(-1, self.in_features)
        if self._padding:
            rows = F.pad(rows, (0, self._padding))
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(rows)
        result = kernel_dtype(dtype)
        options = {"c": None if self.bias is None else self.bias.to(result), "out_dtype": result}
        y = deep_gemm_ops.fp8_gemm_nt(a, sfa, self.weight, self.weight_scale, recipe=[1, 128, 128], **options)
        return y.to(dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Gather(torch.autograd.Function):
    """Rows ``x[index // copies]``: each row of ``x`` goes to ``copies`` places. Its gradient is a gather, too, and a
    sum in a fixed order, where PyTorch's own would add with atomics in any order.

    ``inverse`` says where each of the ``copies`` of each row has gone. With ``partial``, -1 stands for nowhere in
    ``inverse`` and for a row of zeros in ``index``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, copies: int, partial: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies, ctx.partial = copies, partial
        return _take(x, index // copies if copies > 1 else index, partial)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        grads = _take(grad, inverse, ctx.partial)
        return grads.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grads, None, None, None, None


def _take(x: torch.Tensor, index: torch.Tensor, partial: bool) -> torch.Tensor:
    if not partial:
        return x.index_select(0, index)
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    return x.index_select(0, index.clamp(min=0)).masked_fill((index < 0)[:, None], 0)


def gather(
    x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, copies: int = 1, partial: bool = False
) -> torch.Tensor:
    """:class:`Gather` with its defaults."""
    return Gather.apply(x, index, inverse, copies, partial)


def sort_into_bins(bins: torch.Tensor, num_bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How to sort by bin, stably and without the host.

    Returns:
        The order (what comes first, second, ...), its inverse (where each one goes), and where each bin ends, int32.
    """
    order = bins.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    every = torch.arange(num_bins, device=bins.device, dtype=bins.dtype)
    return order, inverse, torch.searchsorted(bins.index_select(0, order), every, right=True, out_int32=True)


class GroupedExperts(nn.Module):
    """The experts of a mixture-of-experts layer, ``down(silu(gate(x)) * up(x))``, in FP8 forward and backward.

    Tokens are sorted by expert on the device, without padding and without the host knowing how many there are; each
    product is one launch for all experts. The routing weights are applied between the two layers, where they cost
    nothing. Results and gradients are deterministic.

    Parameters may be DTensors: of FSDP2, or for tensor parallelism ``Shard(1)``, so that each rank computes a part of
    the columns of either layer and gathers them. Whole experts on each rank are ``ExpertParallel``.

    Args:
        dim: features of a token.
        hidden_dim: features between the two layers.
        num_experts: how many there are.
        device, dtype: of the parameters ``gate_up [G, 2 * hidden_dim, dim]``, gates first, and ``down [G, dim,
            hidden_dim]``. They start as ``nn.Linear``'s do and may carry a ``main_grad``, see :class:`FP8Linear`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.hidden_dim, self.num_experts = dim, hidden_dim, num_experts
        options = {"device": device, "dtype": dtype}
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim, **options))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **options))
        self.frozen: FrozenExperts | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform between +-1/sqrt(inputs), as ``nn.Linear``."""
        for weight in (self.gate_up, self.down):
            nn.init.uniform_(weight, *self._bounds(weight))

    @staticmethod
    def _bounds(weight: torch.Tensor) -> tuple[float, float]:
        bound = weight.shape[2] ** -0.5 if weight.shape[2] else 0.0
        return -bound, bound

    def forward(self, x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: ``[..., dim]``.
            expert_ids: integers ``[..., k]``, the experts that each token goes to. A negative number, ``num_experts``
                or more stands for none: such an assignment contributes nothing.
            expert_weights: ``[..., k]``, what each expert's output is multiplied with.

        Returns:
            ``[..., dim]`` of the dtype of ``x``, or autocast's.
        """
        copies = expert_ids.shape[-1]
        ids = expert_ids.reshape(-1)
        order, inverse, offsets = sort_into_bins(ids.masked_fill(ids < 0, self.num_experts), self.num_experts)
        row_weights = gather(expert_weights.reshape(-1, 1).float(), order, inverse).squeeze(1)
        y = self.experts(gather(x.reshape(-1, self.dim), order, inverse, copies), offsets, row_weights)
        return gather(y, inverse, order).unflatten(0, (-1, copies)).sum(1).view(*x.shape[:-1], self.dim)

    def experts(
        self, rows: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The experts alone, for tokens that are sorted already (by expert-parallel communication, say).

        Args:
            rows: ``[M, dim]``, expert after expert.
            offsets: int32 ``[num_experts]``, the row behind each expert's last.
            row_weights: float32 ``[M]``, what each row of the result is multiplied with.
        """
        if self.frozen is not None:
            return self.frozen(rows, offsets, row_weights)
        (gate_up, gate_up_grad), (down, down_grad) = (self._factor(weight) for weight in (self.gate_up, self.down))
        plain = not (torch.distributed.is_available() and isinstance(gate_up, torch.distributed.tensor.DTensor))
        if not plain:  # tensor parallelism: rows and offsets are the same on all of its ranks
            from ._sharding import replicated

            rows, offsets = replicated(rows, gate_up), replicated(offsets, gate_up)
            row_weights = None if row_weights is None else replicated(row_weights, gate_up)
        hidden = fp8_grouped_linear(rows, gate_up, offsets, out_dtype=torch.bfloat16, main_grad=gate_up_grad)
        options = {"out_dtype": autocast_dtype(rows), "main_grad": down_grad}
        y = fp8_swiglu_grouped_linear(hidden, down, offsets, row_weights, **options)
        return y if plain else y.full_tensor()

    @staticmethod
    def _factor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the products take for a parameter: the weights, and the tensor their gradient is to be added to."""
        return weight, _main_grad(weight)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}, num_experts={self.num_experts}"


class FrozenExperts(_Frozen):
    """The weights of :class:`GroupedExperts`, quantised once and kept in FP8, and what its ``experts`` does with them.

    Results are the same to the bit, and library operators are all it is made of, as :class:`FrozenFP8Linear` is.

    Args:
        gate_up, down: the weights, see :class:`GroupedExperts`.

    Buffers ``gate_up`` and ``down`` (float8_e4m3fn, K rounded up to 16), ``gate_up_scale`` and ``down_scale`` (float32,
    one per 128 x 128 block of an expert).
    """

    _quantised = ("gate_up", "gate_up_scale", "down", "down_scale")

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            values, scales = cast_weights(weight.detach())
            self.register_buffer(name, _pad_columns(values))
            self.register_buffer(f"{name}_scale", scales.contiguous())

    def forward(
        self, rows: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``GroupedExperts.experts``."""
        values, scales = deep_gemm_ops.per_token_cast_to_fp8(rows)
        hidden = self._product(values, scales, self.gate_up, self.gate_up_scale, offsets, torch.bfloat16)
        values, scales = deep_gemm_ops.swiglu_cast_to_fp8(hidden, topk_weights=row_weights)
        return self._product(values, scales, self.down, self.down_scale, offsets, autocast_dtype(rows))

    @staticmethod
    def _product(
        values: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        offsets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        k = values.shape[1]
        return grouped_product((_pad_columns(values)[:, :k], scales), (weight[..., :k], weight_scale), offsets, dtype)


def _pad_columns(values: torch.Tensor) -> torch.Tensor:
    """FP8 values, contiguous, with zeros up to a multiple of 16 columns, so that kernels can read any part of them."""
    padding = -values.shape[-1] % 16
    return F.pad(values.view(torch.uint8), (0, padding)).view(values.dtype) if padding else values.contiguous()


def convert(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Turn every ``nn.Linear`` of ``model``, itself included, into an :class:`FP8Linear`, in place.

    The modules stay the same objects: parameters, tied weights, hooks, optimizers and references to them keep working.
    Subclasses of ``nn.Linear`` are left alone, since they may compute something else.

    Args:
        model: any module.
        filter_fn: called with each candidate and its name in ``model``; False leaves it as it is. Output heads and
            layers with few rows are usual exceptions.

    Returns:
        ``model``.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, name)):
            module.__class__ = FP8Linear
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Make ``model`` one for serving: no gradients, half of BF16's memory, the same results to the bit.

    Every :class:`FP8Linear` is replaced by a :class:`FrozenFP8Linear`. Every :class:`GroupedExperts` keeps its place
    and has a :class:`FrozenExperts` in ``frozen`` instead of its parameters; in an ``ExpertParallel`` that holds the
    experts of this rank, as plain tensors.

    Returns:
        ``model``, changed in place, or the frozen layer where ``model`` is an FP8Linear itself.
    """
    if isinstance(model, FP8Linear):
        return FrozenFP8Linear(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FP8Linear):
                setattr(module, name, FrozenFP8Linear(child))
        # A subclass that computes something else is left alone.
        if isinstance(module, GroupedExperts) and type(module).experts is GroupedExperts.experts and not module.frozen:
            module.frozen = FrozenExperts(*(module._factor(weight)[0] for weight in (module.gate_up, module.down)))
            module.gate_up = module.down = None
    return model
