"""The layers' functions, for those who keep parameters themselves."""

from __future__ import annotations

import torch

from . import _grouped, _linear  # noqa: F401  (importing them registers the operators)

__all__ = ["fp8_grouped_linear", "fp8_linear", "fp8_swiglu_grouped_linear"]

_ops = torch.ops.deep_gemm


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's result: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    # Meta tensors have no autocast, and torch.amp.is_autocast_available breaks graphs in PyTorch 2.11.
    if device != "meta" and torch.is_autocast_enabled(device):
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
    Casts take an amax below 1e-4 for 1e-4, so output gradients keep their precision down to about 1e-8 and vanish below
    1e-10: scale the loss, as for FP16, where a mean over very many tokens makes them so small.
    """
    return _ops.fp8_linear(x, weight, bias, out_dtype or autocast_dtype(x), main_grad)


def fp8_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[i] = x[i] @ weight[g].T`` with g the expert that owns row i, differentiable.

    Args:
        x: bfloat16, float16 or float32 ``[M, K]``, the rows of all experts one after the other.
        weight: bfloat16, float16 or float32 ``[G, N, K]``.
        offsets: int32 ``[G]`` on the device of ``x``: the row behind each expert's last, as ``torch._grouped_mm`` takes
            them. Experts may own no row. The host never reads it.
        out_dtype: bfloat16, float16 or float32; autocast's dtype where autocast is on, else that of ``x``.
        main_grad: float32 ``[G, N, K]``, contiguous: the weight's gradient is added to it in place, and ``weight.grad``
            is not touched.

    Returns:
        ``[M, N]``, contiguous; rows behind the last expert's are zero, and so are their gradients.

    Raises:
        RuntimeError: wrong dtype, shape or device.

    Operands are quantised as in :func:`fp8_linear`; scales of the weight gradient belong to 128 rows of one expert.
    """
    return _ops.fp8_grouped_linear(x, weight, offsets, out_dtype or autocast_dtype(x), main_grad)


def fp8_swiglu_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[i] = (silu(gate[i]) * up[i] * row_weights[i]) @ weight[g].T``, differentiable: an expert's second layer.

    Args:
        x: ``[M, 2 * K]``, gate in the first K columns, up in the others: what one :func:`fp8_grouped_linear` returns.
        weight: ``[G, N, K]``.
        row_weights: float32 ``[M]``, the routing weight of each row; 1 where absent.

    The other arguments and the result are those of :func:`fp8_grouped_linear`. SwiGLU, routing weights and quantisation
    are one kernel (``swiglu_cast_to_fp8``), in float32 between reading ``x`` as bfloat16 and writing FP8.
    """
    return _ops.fp8_swiglu_grouped_linear(x, weight, offsets, row_weights, out_dtype or autocast_dtype(x), main_grad)
