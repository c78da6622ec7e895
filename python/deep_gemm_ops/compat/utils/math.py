"""Sizes and casts with the public module's signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import reference
from ...layout import align, ceil_div
from .._names import offer

__all__ = [
    "align",
    "ceil_div",
    "ceil_to_ue8m0",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
]

Tensor = torch.Tensor

_ops = torch.ops.deep_gemm

offer("align")(align)
offer("ceil_div")(ceil_div)


@offer("ceil_to_ue8m0")
def ceil_to_ue8m0(x: Tensor) -> Tensor:
    """Float32 scales rounded up to powers of two; their sign is dropped."""
    return reference.ceil_to_ue8m0(x.abs())


@offer("pack_ue8m0_to_int")
def pack_ue8m0_to_int(x: Tensor) -> Tensor:
    """Float32 powers of two ``[..., 4 n]`` to int32 ``[..., n]``, the first exponent lowest."""
    if x.dtype != torch.float32 or x.shape[-1] % 4:
        have = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise RuntimeError(f"pack_ue8m0_to_int: x is {have}, expected float32 with a last dimension that 4 divides")
    return reference.pack_ue8m0(reference.ue8m0_bytes(x))


@offer("per_token_cast_to_fp8", needs="per_token_cast_to_fp8")
def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``deep_gemm_ops.per_token_cast_to_fp8``."""
    return _ops.per_token_cast_to_fp8(x, gran_k=gran_k, use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)


@offer("per_channel_cast_to_fp8", needs="per_channel_cast_to_fp8")
def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """``deep_gemm_ops.per_channel_cast_to_fp8``."""
    return _ops.per_channel_cast_to_fp8(x, gran_k=gran_k, use_ue8m0=use_ue8m0)


@offer("per_block_cast_to_fp8", needs="per_block_cast_to_fp8")
def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """``deep_gemm_ops.per_block_cast_to_fp8``."""
    return _ops.per_block_cast_to_fp8(x, gran_k=gran_k, use_ue8m0=use_ue8m0)


@offer("per_custom_dims_cast_to_fp8")
def per_custom_dims_cast_to_fp8(x: Tensor, dims: Sequence[int], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """One scale for each index of the dimensions ``dims``, over all the others: keys of an indexer, say."""
    others = [dim for dim in range(x.dim()) if dim not in {d % x.dim() for d in dims}]
    amax = x.float().abs().amax(dim=others, keepdim=True).clamp(min=reference.MIN_AMAX)
    sf = amax / torch.full_like(amax, reference.FP8_MAX)
    if use_ue8m0:
        sf = reference.ceil_to_ue8m0(sf)
    values = (x.float() * (1.0 / sf)).clamp(-reference.FP8_MAX, reference.FP8_MAX).to(torch.float8_e4m3fn)
    return values, sf.squeeze()


@offer("per_token_cast_to_fp4", needs="per_token_cast_to_fp4")
def per_token_cast_to_fp4(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """``deep_gemm_ops.per_token_cast_to_fp4``."""
    return _ops.per_token_cast_to_fp4(x, gran_k=gran_k, use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)
