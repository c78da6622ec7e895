"""Fake implementations: shapes, dtypes and strides exactly as the real operators return them, sizes kept symbolic.

Importing this module registers them for every overload. They check what tracing can see, with the operators' own
messages, and set no guard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import _checks
from .layout import ceil_div

__all__: list[str] = []

Tensor = torch.Tensor


def arch_major(device: torch.device) -> int:
    """Major compute capability that decides a layout: the device's, 9 where there is none to ask (CPU, meta)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 9
    return torch.cuda.get_device_capability(device)[0]


def _fake(name: str) -> Callable[[Callable], Callable]:
    # What is registered outlives this module, so a second import finds it in place.
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"deep_gemm::{name}", "Meta"):
        return lambda function: function
    return torch.library.register_fake(f"deep_gemm::{name}")


def _empty_mn_major(sf: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return sf.new_empty_strided(tuple(shape), _checks.mn_major_strides(shape), dtype=dtype)


def _register_cast(kind: str) -> None:
    op = f"{kind}_cast_to_fp8"

    @_fake(op)
    def functional(
        x: Tensor, *, gran_k: int = 128, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
    ) -> tuple[Tensor, Tensor]:
        _checks.check_cast(op, kind, x, gran_k=gran_k, use_packed_ue8m0=use_packed_ue8m0)
        shape, strides = _checks.cast_scale_shape(kind, x.shape[0], x.shape[1], gran_k, use_packed_ue8m0)
        dtype = torch.int32 if use_packed_ue8m0 else torch.float32
        values = x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float8_e4m3fn)
        return values, x.new_empty_strided(shape, strides, dtype=dtype)

    @_fake(f"{op}.out")
    def out_form(
        x: Tensor,
        *,
        gran_k: int = 128,
        use_ue8m0: bool = False,
        use_packed_ue8m0: bool = False,
        out: Tensor,
        out_sf: Tensor,
    ) -> None:
        _checks.check_cast(op, kind, x, gran_k=gran_k, use_packed_ue8m0=use_packed_ue8m0, out=out, out_sf=out_sf)


for _kind in ("per_token", "per_channel", "per_block"):
    _register_cast(_kind)


@_fake("transpose_fp8")
def _transpose_fp8(x: Tensor) -> Tensor:
    _checks.check_transpose_fp8(x)
    return x.new_empty((x.shape[1], x.shape[0]))


@_fake("transpose_fp8.out")
def _transpose_fp8_out(x: Tensor, *, out: Tensor) -> None:
    _checks.check_transpose_fp8(x, out)


@_fake("get_mn_major_tma_aligned_tensor")
def _mn_major(sf: Tensor) -> Tensor:
    _checks.check_mn_major("get_mn_major_tma_aligned_tensor", sf, packed=False)
    return _empty_mn_major(sf, sf.shape, torch.float32)


@_fake("get_mn_major_tma_aligned_tensor.out")
def _mn_major_out(sf: Tensor, *, out: Tensor) -> None:
    _checks.check_mn_major("get_mn_major_tma_aligned_tensor", sf, packed=False, out=out)


@_fake("get_mn_major_tma_aligned_packed_ue8m0_tensor")
def _mn_major_packed(sf: Tensor, *, round_up: bool = False) -> Tensor:
    _checks.check_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, packed=True)
    return _empty_mn_major(sf, [*sf.shape[:-1], ceil_div(sf.shape[-1], 4)], torch.int32)


@_fake("get_mn_major_tma_aligned_packed_ue8m0_tensor.out")
def _mn_major_packed_out(sf: Tensor, *, round_up: bool = False, out: Tensor) -> None:
    _checks.check_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, packed=True, out=out)


@_fake("get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor")
def _k_grouped_packed(sf: Tensor, ks: Tensor, *, gran_k: int = 128) -> Tensor:
    _checks.check_k_grouped_packed(sf, ks, gran_k)
    rows, mn = sf.shape
    words = (rows + 3 * ks.shape[0]) // 4
    return sf.new_empty_strided((words, mn), (_checks.align(mn, 4), 1), dtype=torch.int32)


@_fake("expand_ue8m0")
def _expand_ue8m0(sf: Tensor, *, k_sf: int) -> Tensor:
    _checks.check_expand_ue8m0(sf, k_sf)
    return _empty_mn_major(sf, [*sf.shape[:-1], k_sf], torch.float32)


@_fake("expand_ue8m0.out")
def _expand_ue8m0_out(sf: Tensor, *, k_sf: int, out: Tensor) -> None:
    _checks.check_expand_ue8m0(sf, k_sf, out)


@_fake("transform_sf_into_required_layout")
def _transform_sf(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: list[int],
    *,
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    round_up: bool = False,
) -> Tensor:
    gran_mn, gran_k = _checks.check_transform_sf(sf, mn, k, recipe, num_groups, is_sfa)
    columns = ceil_div(k, gran_k)
    if arch_major(sf.device) < 10 or (sf.dtype == torch.float32 and disable_ue8m0_cast):
        return _empty_mn_major(sf, [*sf.shape[:-1], columns], torch.float32)
    return _empty_mn_major(sf, [*sf.shape[:-2], mn, ceil_div(columns, 4)], torch.int32)
