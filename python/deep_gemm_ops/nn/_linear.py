"""``deep_gemm::fp8_linear``: a linear layer's product and its gradients, all in FP8 with FP32 accumulation.

    forward             Y[T, N] = X[T, K] @ W[N, K]^T     X scaled per token, W per 128 x 128 block   (1D-2D)
    input gradient      dX[T, K] = dY[T, N] @ W[N, K]     dY scaled per token, W as above             (1D-2D)
    weight gradient     dW[N, K] = dY^T @ X               both scaled per channel and 128 tokens      (1D-1D)

Each operand is quantised along the dimension that its product sums over, hence twice for X and dY. Nothing quantised is
kept from the forward to the backward pass: what is saved is the input and the weight themselves, as ``nn.Linear``
does, so that activation checkpointing, offloading and FSDP find what they expect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _checks
from ..layout import to_tma_aligned
from . import _library

__all__: list[str] = []

Tensor = torch.Tensor

#: Results of layers: what the kernels write, and FP16, which is rounded from FP32.
LAYER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ops = torch.ops.deep_gemm


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes a result that is wanted in ``dtype``."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """``[..., K]`` as a matrix ``[T, K]`` with dense rows."""
    # Not -1, which is ambiguous where K is 0.
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, C]`` with a scale per row and 128 columns, as a K-major operand."""
    values, scales = _ops.per_token_cast_to_fp8(x)
    return to_tma_aligned(values), scales


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, main_grad: Tensor | None
) -> None:
    for arg, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _checks.check_dtype(op, arg, tensor, _checks.CAST_DTYPES)
            _checks.check_device(op, arg, tensor, x.device, "x")
    if x.dim() < 1:
        _checks.fail(op, "x", "rank", x.dim(), "at least 1")
    _checks.check_rank(op, "weight", weight, (2,))
    k, (n, k_of_weight) = _checks.shape_of(x)[-1], _checks.shape_of(weight)
    if not k == k_of_weight:
        _checks.fail(op, "x", "K", k, k_of_weight, "the K of weight")
    if bias is not None:
        _checks.check_shape(op, "bias", bias, "[N]", [n])
    if out_dtype not in LAYER_DTYPES:
        _checks.fail(op, "out_dtype", "value", out_dtype, _checks.one_of(LAYER_DTYPES))
    if main_grad is not None:
        check_main_grad(op, main_grad, weight)


def check_main_grad(op: str, main_grad: Tensor, weight: Tensor) -> None:
    _checks.check_dtype(op, "main_grad", main_grad, (torch.float32,))
    _checks.check_device(op, "main_grad", main_grad, weight.device, "weight")
    _checks.check_shape(op, "main_grad", main_grad, "the shape of weight", _checks.shape_of(weight))
    if not main_grad.is_contiguous():
        _checks.fail(op, "main_grad", "strides", _checks.strides_of(main_grad), "those of a contiguous tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or x.dtype
    check_linear("fp8_linear", x, weight, bias, dtype, main_grad)
    result = kernel_dtype(dtype)
    a, sfa = cast_rows(rows_of(x))
    b, sfb = _ops.per_block_cast_to_fp8(rows_of(weight))
    c = None if bias is None else bias.to(result)
    y = _ops.fp8_gemm_nt(a, sfa, to_tma_aligned(b), sfb, c=c, out_dtype=result, recipe=[1, 128, 128])
    return y.to(dtype).view(*x.shape[:-1], weight.shape[0])


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or x.dtype
    check_linear("fp8_linear", x, weight, bias, dtype, main_grad)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def check_linear_backward(op: str, grad: Tensor, x: Tensor | None, weight: Tensor | None) -> None:
    _checks.check_dtype(op, "grad", grad, _checks.CAST_DTYPES)
    for arg, tensor in (("x", x), ("weight", weight)):
        if tensor is not None:
            _checks.check_dtype(op, arg, tensor, _checks.CAST_DTYPES)
            _checks.check_device(op, arg, tensor, grad.device, "grad")
    shape = _checks.shape_of(grad)
    if x is not None:
        _checks.check_shape(op, "x", x, "[..., K]", [*shape[:-1], *_checks.shape_of(x)[-1:]])
    if weight is not None:
        _checks.check_shape(op, "weight", weight, "[N, K]", [shape[-1], *_checks.shape_of(weight)[-1:]])


def input_gradient(dy: tuple[Tensor, Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, N] @ [N, K]``. Blocks of 128 x 128 are the same blocks of the transposed weight."""
    b, sfb = _ops.per_block_cast_to_fp8_transposed(rows_of(weight))
    return _ops.fp8_gemm_nt(*dy, b, sfb, out_dtype=kernel_dtype(dtype), recipe=[1, 128, 128]).to(dtype)


def weight_gradient(
    dy: tuple[Tensor, Tensor], x: Tensor, dtype: torch.dtype, main_grad: Tensor | None = None
) -> Tensor | None:
    """``[N, T] @ [T, K]``, added to ``main_grad`` where there is one."""
    b, sfb = _ops.per_channel_cast_to_fp8_transposed(rows_of(x))
    if main_grad is not None:
        _ops.fp8_gemm_nt.out(*dy, b, sfb, c=main_grad, recipe=[1, 1, 128], out=main_grad)
        return None
    return _ops.fp8_gemm_nt(*dy, b, sfb, out_dtype=kernel_dtype(dtype), recipe=[1, 1, 128]).to(dtype)


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    main_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input, where the weight is given, and of the weight, where the input is."""
    rows = rows_of(grad)
    grad_x = grad_weight = None
    if x is None:
        by_row = cast_rows(rows)
    else:
        # One read of the gradient serves both products.
        values, scales, *by_channel = _ops.per_token_cast_to_fp8_with_transpose(rows)
        by_row = to_tma_aligned(values), scales
        grad_weight = weight_gradient((by_channel[0], by_channel[1]), x, weight_dtype, main_grad)
    if weight is not None:
        grad_x = input_gradient(by_row, weight, x_dtype).view(*grad.shape[:-1], weight.shape[1])
    return grad_x, grad_weight


def _linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both gradients of :func:`fp8_linear`, from one read of the output's gradient.

    Args:
        grad: bfloat16, float16 or float32 ``[..., N]``.
        x: the input ``[..., K]``; None where the weight's gradient is not wanted.
        weight: ``[N, K]``; None where the input's gradient is not wanted.
        x_dtype: dtype of the input's gradient.
        weight_dtype: dtype of the weight's gradient, rounded once from FP32.

    Returns:
        The gradients of input and weight; one that is not wanted is an empty tensor.

    Raises:
        RuntimeError: wrong dtype, shape or device.
    """
    check_linear_backward("fp8_linear_backward", grad, x, weight)
    grad_x, grad_weight = _gradients(grad, x, weight, x_dtype, weight_dtype, None)
    return (
        grad.new_empty(0, dtype=x_dtype) if grad_x is None else grad_x,
        grad.new_empty(0, dtype=weight_dtype) if grad_weight is None else grad_weight,
    )


def _linear_backward_fake(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_linear_backward("fp8_linear_backward", grad, x, weight)
    grad_x = 0 if weight is None else (*grad.shape[:-1], weight.shape[1])
    grad_weight = 0 if x is None else (grad.shape[-1], x.shape[-1])
    return grad.new_empty(grad_x, dtype=x_dtype), grad.new_empty(grad_weight, dtype=weight_dtype)


def _linear_backward_accumulate(
    grad: Tensor, x: Tensor, weight: Tensor | None, main_grad: Tensor, x_dtype: torch.dtype
) -> Tensor:
    """:func:`fp8_linear_backward` with the weight's gradient added to ``main_grad``, float32 ``[N, K]``, in place.

    Returns:
        The input's gradient, an empty tensor where it is not wanted (``weight`` is None).
    """
    check_linear_backward("fp8_linear_backward_accumulate", grad, x, weight)
    grad_x, _ = _gradients(grad, x, weight, x_dtype, torch.float32, main_grad)
    return grad.new_empty(0, dtype=x_dtype) if grad_x is None else grad_x


def _linear_backward_accumulate_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, main_grad: Tensor, x_dtype: torch.dtype
) -> Tensor:
    check_linear_backward("fp8_linear_backward_accumulate", grad, x, weight)
    return grad.new_empty(0 if weight is None else (*grad.shape[:-1], weight.shape[1]), dtype=x_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, main_grad = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    # Not saved as an input is: adding to it in several backward passes is what it is for.
    ctx.main_grad = main_grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    # The dispatcher drops trailing arguments that are the default, from this list too.
    needs_bias = bias_dtype is not None and ctx.needs_input_grad[2]
    grad_x = grad_weight = grad_bias = None
    if needs_weight and ctx.main_grad is not None:
        if is_traceable_wrapper_subclass(ctx.main_grad):
            # A DTensor that an operator writes to has to lie as the result does, which only DTensor itself can arrange.
            grad_x, grad_weight = _ops.fp8_linear_backward(grad, x, weight, x_dtype, torch.float32)
            ctx.main_grad.add_(grad_weight)
            grad_weight = None
        else:
            grad_x = _ops.fp8_linear_backward_accumulate(grad, x, weight, ctx.main_grad, x_dtype)
    elif needs_x or needs_weight:
        grad_x, grad_weight = _ops.fp8_linear_backward(grad, x, weight, x_dtype, weight_dtype)
    if needs_bias:
        tokens = list(range(grad.dim() - 1))  # none where x is a vector, and sum([]) means all
        grad_bias = (grad.sum(tokens, dtype=torch.float32) if tokens else grad).to(bias_dtype)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None, None


_library.define(
    "fp8_linear_backward(Tensor grad, Tensor? x, Tensor? weight, ScalarType x_dtype, ScalarType weight_dtype) "
    "-> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
_library.define(
    "fp8_linear_backward_accumulate(Tensor grad, Tensor x, Tensor? weight, Tensor(a!) main_grad, ScalarType x_dtype) "
    "-> Tensor",
    _linear_backward_accumulate,
    _linear_backward_accumulate_fake,
)
_library.define(
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias=None, ScalarType? out_dtype=None, Tensor? main_grad=None) "
    "-> Tensor",
    _linear,
    _linear_fake,
    _setup_context,
    _backward,
)
