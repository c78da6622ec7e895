"""How the training operators are defined: Python operators of the ``deep_gemm`` namespace, made of its kernels.

They have no CUDA code of their own and no line in ``schemas.inc``. To autograd, activation checkpointing, DTensor and
``torch.compile`` each is one operator, with a derivative, a fake and sharding rules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__: list[str] = []

# What is registered outlives this module, so it is kept on torch.ops, where a second import finds it.
_namespace = torch.ops.deep_gemm
if getattr(_namespace, "_deep_gemm_ops_nn", None) is None:
    _namespace._deep_gemm_ops_nn = torch.library.Library("deep_gemm", "FRAGMENT")
_library: torch.library.Library = _namespace._deep_gemm_ops_nn

#: Every operator defined here, as ``_library.schemas()`` of the package lists the library's.
schemas: list[str] = []
implementations: dict[str, Callable] = {}


def is_registered(name: str) -> bool:
    """Whether an operator of the namespace has an implementation already."""
    return torch._C._dispatch_has_kernel(f"deep_gemm::{name}")


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define an operator: one implementation for CPU and CUDA, a fake, and a derivative.

    Without ``backward``, differentiating the operator raises, where PyTorch alone would drop gradients with a warning:
    operators of a backward pass have no second derivative. Those that write to an argument cannot have one at all.
    """
    name = schema.partition("(")[0]
    schemas.append(schema)
    implementations[name] = implementation
    if is_registered(name):
        return
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"deep_gemm::{name}", fake, lib=_library)

    def refuse(_context: object, *_grads: object) -> None:
        raise RuntimeError(f"{name} is not differentiable: FP8 layers have no second derivative")

    if "!" not in schema:
        derivative = backward or refuse
        torch.library.register_autograd(f"deep_gemm::{name}", derivative, setup_context=setup_context, lib=_library)
