"""The layers' functions, for those who keep parameters themselves."""

from __future__ import annotations

import torch

from . import _linear  # noqa: F401  (importing it registers the operator)

__all__ = ["fp8_linear"]

_ops = torch.ops.deep_gemm


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's result: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` with FP8 operands, differentiable: ``torch.ops.deep_gemm.fp8_linear``.

    Args:
        x: bfloat16, float16 or float32 ``[..., K]``, quantised with a scale per row and 128 elements.
        weight: bfloat16, float16 or float32 ``[N, K]``, quantised with a scale per 128 x 128 block.
        bias: ``[N]``, added in FP32 before the one rounding.
        out_dtype: bfloat16, float16 or float32; autocast's dtype where autocast is on, else that of ``x``.
        main_grad: float32 ``[N, K]``, contiguous: the weight's gradient is added to it in place, and ``weight.grad``
            is not touched.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        RuntimeError: wrong dtype, shape or device.

    Gradients: of ``x`` with the output gradient quantised per row, of ``weight`` with both factors quantised per column
    and 128 tokens; each in the dtype of its tensor, the weight's rounded once from FP32. There is no second derivative.
    """
    return _ops.fp8_linear(x, weight, bias, out_dtype or autocast_dtype(x), main_grad)
