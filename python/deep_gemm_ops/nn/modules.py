"""Layers. They are ``torch.nn`` modules with the parameters, names and state dicts of the layers they replace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .functional import fp8_linear

__all__ = ["FP8Linear", "convert"]


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
        main_grad = getattr(self.weight, "main_grad", None)
        if main_grad is not None:
            self.weight.grad_added_to_main_grad = True
        return fp8_linear(x, self.weight, self.bias, main_grad=main_grad)


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
