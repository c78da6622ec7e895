"""How the fake and the CPU forms of dense products are registered, the same way for all types of operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _checks, reference
from ._cpu import _cpu
from ._fakes import _fake

__all__: list[str] = []

Tensor = torch.Tensor


def register(op: str, layout: str, check: Callable[..., _checks.GemmShape], product: Callable[..., Tensor]) -> None:
    """Registers ``op`` and ``op.out``.

    Args:
        op: the name.
        layout: "nt", "nn", "tn" or "tt".
        check: the operator's checks: its operands, then ``c``, ``out_dtype``, ``out``, ``recipe`` and ``real``.
        product: the reference: the operands, then ``layout``, ``c``, ``out_dtype`` and ``recipe``, all granularities.
    """

    @_fake(op)
    def fake(
        *operands: Tensor,
        c: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
    ) -> Tensor:
        check(*operands, c=c, out_dtype=out_dtype, out=None, recipe=recipe, real=False)
        a, b = operands[0], operands[len(operands) // 2]  # scales behind each, if there are any
        m, n = a.shape[0 if layout[0] == "n" else 1], b.shape[0 if layout[1] == "t" else 1]
        return a.new_empty((m, n), dtype=out_dtype)

    @_fake(f"{op}.out")
    def fake_out(*operands: Tensor, c: Tensor | None = None, recipe: list[int] | None = None, out: Tensor) -> None:
        check(*operands, c=c, out_dtype=None, out=out, recipe=recipe, real=False)

    @_cpu(op)
    def functional(
        *operands: Tensor,
        c: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        recipe: list[int] | None = None,
    ) -> Tensor:
        shape = check(*operands, c=c, out_dtype=out_dtype, out=None, recipe=recipe, real=True)
        return product(*operands, layout=layout, c=c, out_dtype=out_dtype, recipe=shape[3:])

    @_cpu(f"{op}.out")
    def out_form(*operands: Tensor, c: Tensor | None = None, recipe: list[int] | None = None, out: Tensor) -> None:
        shape = check(*operands, c=c, out_dtype=None, out=out, recipe=recipe, real=True)
        out.copy_(product(*operands, layout=layout, c=c, out_dtype=out.dtype, recipe=shape[3:]))


def _register_fp8(layout: str) -> None:
    op = f"fp8_gemm_{layout}"

    def check(*operands: Tensor, **rest: Any) -> _checks.GemmShape:
        return _checks.check_fp8_gemm(op, layout, *operands, **rest)

    register(op, layout, check, reference.fp8_gemm)


for _layout in _checks.LAYOUTS:
    _register_fp8(_layout)
