"""``deep_gemm::fp8_grouped_linear`` and ``deep_gemm::fp8_swiglu_grouped_linear``: the linear layers of experts.

Rows are sorted by expert and follow each other without padding; ``offsets`` says on the device where each expert's rows
end, so the host never learns how many there are. With X_g the rows of expert g:

    forward             Y_g = X_g @ W_g^T           one m-grouped product
    input gradient      dX_g = dY_g @ W_g           one m-grouped product
    weight gradient     dW_g = dY_g^T @ X_g         one k-grouped product, scales per 128 rows of an expert

The second layer of an expert takes what the first one returns, gate and up side by side, and quantises their SwiGLU and
the routing weight in one kernel. Rows behind the last expert's are zero in results and in gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _checks
from ..layout import align, to_tma_aligned
from . import _library
from ._linear import LAYER_DTYPES, cast_rows, check_main_grad, kernel_dtype, rows_of

__all__: list[str] = []

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_grouped(
    op: str,
    x: Tensor,
    k: int,
    weight: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    main_grad: Tensor | None,
) -> None:
    """Arguments of a grouped layer; ``k`` is what the columns of ``x`` amount to in the weight's terms."""
    for arg, tensor in (("x", x), ("weight", weight)):
        _checks.check_dtype(op, arg, tensor, _checks.CAST_DTYPES)
    _checks.check_dtype(op, "offsets", offsets, (torch.int32,))
    for arg, tensor, rank in (("x", x, 2), ("weight", weight, 3), ("offsets", offsets, 1)):
        _checks.check_rank(op, arg, tensor, (rank,))
        _checks.check_device(op, arg, tensor, x.device, "x")
    experts, _, k_of_weight = _checks.shape_of(weight)
    if not k == k_of_weight:
        _checks.fail(op, "x", "K", k, k_of_weight, "the K of weight")
    _checks.check_shape(op, "offsets", offsets, "[G]", [experts])
    if out_dtype not in LAYER_DTYPES:
        _checks.fail(op, "out_dtype", "value", out_dtype, _checks.one_of(LAYER_DTYPES))
    if main_grad is not None:
        check_main_grad(op, main_grad, weight)


def check_grouped_backward(op: str, grad: Tensor, x: Tensor | None, weight: Tensor | None, offsets: Tensor) -> None:
    _checks.check_dtype(op, "grad", grad, _checks.CAST_DTYPES)
    _checks.check_rank(op, "grad", grad, (2,))
    tokens, n = _checks.shape_of(grad)
    if x is not None:
        _checks.check_dtype(op, "x", x, _checks.CAST_DTYPES)
        _checks.check_shape(op, "x", x, "[M, K]", [tokens, *_checks.shape_of(x)[1:]])
    if weight is not None:
        experts = _checks.shape_of(offsets)[0]
        _checks.check_shape(op, "weight", weight, "[G, N, K]", [experts, n, *_checks.shape_of(weight)[2:]])


# ---------------------------------------------------------------------------------------------------------------------
# Products


def cast_weights(weight: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """``[G, N, K]`` with a scale per 128 x 128 block of each expert, or ``transposed``, as ``[G, K, N]``."""
    experts, n, k = weight.shape
    # One call for all experts: no block may reach from one into the next, and zeros change no scale.
    rows, columns = align(n, 128), k if transposed else align(k, 16)
    if (rows, columns) != (n, k):  # F.pad copies in any case
        weight = F.pad(weight, (0, columns - k, 0, rows - n))
    matrix = rows_of(weight)
    if transposed:
        values, scales = _ops.per_block_cast_to_fp8_transposed(matrix)
        values = values.unflatten(1, (experts, rows)).transpose(0, 1)[:, :, :n]
        return values, scales.unflatten(1, (experts, rows // 128)).transpose(0, 1)
    values, scales = _ops.per_block_cast_to_fp8(matrix)
    values = values.view(experts, rows, columns)[:, :n, :k]
    return values, scales.unflatten(0, (experts, rows // 128))


def cast_by_channel(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, N]`` with a scale per column and 128 rows of an expert, transposed as Hopper's kernel reads it."""
    return _ops.k_grouped_per_channel_cast_to_fp8_k_major(rows_of(x.bfloat16()), offsets, layout="offsets")


def grouped_product(
    rows: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    options = {"layout": "offsets", "recipe": [1, 128, 128], "out_dtype": kernel_dtype(dtype)}
    return _ops.m_grouped_fp8_gemm_nt_contiguous(*rows, *weight, offsets, **options).to(dtype)


def _grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None, main_grad: Tensor | None = None
) -> Tensor:
    dtype = out_dtype or x.dtype
    check_grouped("fp8_grouped_linear", x, _checks.shape_of(x)[-1], weight, offsets, dtype, main_grad)
    return grouped_product(cast_rows(rows_of(x)), cast_weights(weight), offsets, dtype)


def _grouped_linear_fake(
    x: Tensor, weight: Tensor, offsets: Tensor, out_dtype: torch.dtype | None = None, main_grad: Tensor | None = None
) -> Tensor:
    dtype = out_dtype or x.dtype
    check_grouped("fp8_grouped_linear", x, _checks.shape_of(x)[-1], weight, offsets, dtype, main_grad)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


def _check_swiglu(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None,
    dtype: torch.dtype,
    main_grad: Tensor | None,
) -> None:
    op = "fp8_swiglu_grouped_linear"
    columns = _checks.shape_of(x)[-1]
    if not columns % 2 == 0:
        _checks.fail(op, "x", "2 * K", columns, "an even number")
    check_grouped(op, x, columns // 2, weight, offsets, dtype, main_grad)
    if row_weights is not None:
        _checks.check_dtype(op, "row_weights", row_weights, (torch.float32,))
        _checks.check_device(op, "row_weights", row_weights, x.device, "x")
        _checks.check_shape(op, "row_weights", row_weights, "[M]", _checks.shape_of(x)[:1])


def _swiglu_grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check_swiglu(x, weight, offsets, row_weights, dtype, main_grad)
    values, scales = _ops.swiglu_cast_to_fp8(rows_of(x.bfloat16()), topk_weights=row_weights)
    return grouped_product((to_tma_aligned(values), scales), cast_weights(weight), offsets, dtype)


def _swiglu_grouped_linear_fake(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    dtype = out_dtype or x.dtype
    _check_swiglu(x, weight, offsets, row_weights, dtype, main_grad)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    main_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    rows = rows_of(grad)
    if weight is not None:
        grad_x = grouped_product(cast_rows(rows), cast_weights(weight, transposed=True), offsets, x_dtype)
    if x is not None:
        operands = (*cast_by_channel(rows, offsets), *cast_by_channel(x, offsets), offsets)
        if main_grad is not None:
            _ops.k_grouped_fp8_gemm_nt_contiguous.out(*operands, c=main_grad, layout="offsets", out=main_grad)
        else:
            options = {"layout": "offsets", "out_dtype": kernel_dtype(weight_dtype)}
            grad_weight = _ops.k_grouped_fp8_gemm_nt_contiguous(*operands, **options).to(weight_dtype)
    return grad_x, grad_weight


def _grouped_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both gradients of :func:`fp8_grouped_linear`.

    Args:
        grad: bfloat16, float16 or float32 ``[M, N]``.
        x: the input ``[M, K]``; None where the weight's gradient is not wanted.
        weight: ``[G, N, K]``; None where the input's gradient is not wanted.
        offsets: int32 ``[G]``, the row behind each expert's last.
        x_dtype: dtype of the input's gradient.
        weight_dtype: dtype of the weight's gradient, rounded once from FP32.

    Returns:
        The gradients of input and weight; one that is not wanted is an empty tensor.

    Raises:
        RuntimeError: wrong dtype, shape or device.
    """
    check_grouped_backward("fp8_grouped_linear_backward", grad, x, weight, offsets)
    grad_x, grad_weight = _gradients(grad, x, weight, offsets, x_dtype, weight_dtype, None)
    return (
        grad.new_empty(0, dtype=x_dtype) if grad_x is None else grad_x,
        grad.new_empty(0, dtype=weight_dtype) if grad_weight is None else grad_weight,
    )


def _grouped_backward_fake(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check_grouped_backward("fp8_grouped_linear_backward", grad, x, weight, offsets)
    grad_x = 0 if weight is None else (grad.shape[0], weight.shape[2])
    grad_weight = 0 if x is None else (offsets.shape[0], grad.shape[1], x.shape[1])
    return grad.new_empty(grad_x, dtype=x_dtype), grad.new_empty(grad_weight, dtype=weight_dtype)


def _grouped_backward_accumulate(
    grad: Tensor, x: Tensor, weight: Tensor | None, offsets: Tensor, main_grad: Tensor, x_dtype: torch.dtype
) -> Tensor:
    """:func:`fp8_grouped_linear_backward` with the weight's gradient added to ``main_grad``, float32 ``[G, N, K]``.

    Returns:
        The input's gradient, an empty tensor where it is not wanted (``weight`` is None).
    """
    check_grouped_backward("fp8_grouped_linear_backward_accumulate", grad, x, weight, offsets)
    grad_x, _ = _gradients(grad, x, weight, offsets, x_dtype, torch.float32, main_grad)
    return grad.new_empty(0, dtype=x_dtype) if grad_x is None else grad_x


def _grouped_backward_accumulate_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, offsets: Tensor, main_grad: Tensor, x_dtype: torch.dtype
) -> Tensor:
    check_grouped_backward("fp8_grouped_linear_backward_accumulate", grad, x, weight, offsets)
    return grad.new_empty(0 if weight is None else (grad.shape[0], weight.shape[2]), dtype=x_dtype)


def _product_gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the product's factors: ``x`` and ``weight`` are None where the other's gradient is not wanted."""
    main_grad = ctx.main_grad
    if x is None and weight is None:
        return None, None
    if x is not None and main_grad is not None and not is_traceable_wrapper_subclass(main_grad):
        grad_x = _ops.fp8_grouped_linear_backward_accumulate(grad, x, weight, offsets, main_grad, x_dtype)
        return grad_x, None
    if main_grad is not None:
        weight_dtype = torch.float32
    grad_x, grad_weight = _ops.fp8_grouped_linear_backward(grad, x, weight, offsets, x_dtype, weight_dtype)
    if x is not None and main_grad is not None:
        main_grad.add_(grad_weight)
        return grad_x, None
    return grad_x, grad_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, _, main_grad = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offsets)
    ctx.dtypes = x.dtype, weight.dtype
    ctx.main_grad = main_grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    x, weight, offsets = ctx.saved_tensors
    grad_x, grad_weight = _product_gradients(ctx, grad, x, weight, offsets, *ctx.dtypes)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None, None


def _swiglu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, row_weights, _, main_grad = inputs
    needs_x = ctx.needs_input_grad[0]
    needs_row_weights = row_weights is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(x, weight if needs_x or needs_row_weights else None, offsets, row_weights)
    ctx.weight_dtype = weight.dtype
    ctx.main_grad = main_grad


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, row_weights = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    needs_row_weights = row_weights is not None and ctx.needs_input_grad[3]
    # The gradient of the activation comes first: of it, one kernel makes the gradients before it and, in the same read
    # of x, the activation itself, which the gradient of the weight is made of.
    both = x.bfloat16().contiguous()
    options = (offsets, torch.bfloat16, ctx.weight_dtype)
    if weight is None:
        grad_hidden = torch.zeros_like(both[:, : both.shape[1] // 2])
    else:
        grad_hidden, _ = _product_gradients(ctx, grad, None, weight, *options)
    grad_x, weighted, grad_row_weights = _ops.swiglu_backward(both, grad_hidden, row_weights)
    grad_weight = None
    if needs_weight:
        _, grad_weight = _product_gradients(ctx, grad, weighted, None, *options)
    grad_x = grad_x.to(x.dtype) if needs_x else None
    grad_row_weights = grad_row_weights if needs_row_weights else None
    return grad_x, grad_weight, None, grad_row_weights, None, None


_library.define(
    "fp8_grouped_linear_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor offsets, ScalarType x_dtype, "
    "ScalarType weight_dtype) -> (Tensor, Tensor)",
    _grouped_backward,
    _grouped_backward_fake,
)
_library.define(
    "fp8_grouped_linear_backward_accumulate(Tensor grad, Tensor x, Tensor? weight, Tensor offsets, "
    "Tensor(a!) main_grad, ScalarType x_dtype) -> Tensor",
    _grouped_backward_accumulate,
    _grouped_backward_accumulate_fake,
)
_library.define(
    "fp8_grouped_linear(Tensor x, Tensor weight, Tensor offsets, ScalarType? out_dtype=None, "
    "Tensor? main_grad=None) -> Tensor",
    _grouped_linear,
    _grouped_linear_fake,
    _setup_context,
    _backward,
)
_library.define(
    "fp8_swiglu_grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? row_weights=None, "
    "ScalarType? out_dtype=None, Tensor? main_grad=None) -> Tensor",
    _swiglu_grouped_linear,
    _swiglu_grouped_linear_fake,
    _swiglu_setup_context,
    _swiglu_backward,
)
