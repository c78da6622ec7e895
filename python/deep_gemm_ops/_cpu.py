"""CPU implementations: the checks of ``_checks.py``, then ``reference.py``. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _checks, reference

__all__: list[str] = []

Tensor = torch.Tensor


def _cpu(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        # What is registered outlives this module, so a second import finds it in place.
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"deep_gemm::{name}", "CPU"):
            # As on CUDA, autograd and autocast see one opaque operator and not the PyTorch operators inside.
            opaque = torch.no_grad()(torch.autocast("cpu", enabled=False)(function))
            torch.library.impl(f"deep_gemm::{name}", "CPU", opaque)
        return function

    return register


def _register_cast(kind: str) -> None:
    op = f"{kind}_cast_to_fp8"
    cast = getattr(reference, op)

    @_cpu(op)
    def functional(
        x: Tensor, *, gran_k: int = 128, use_ue8m0: bool = False, use_packed_ue8m0: bool = False
    ) -> tuple[Tensor, Tensor]:
        _checks.check_cast(op, kind, x, gran_k=gran_k, use_packed_ue8m0=use_packed_ue8m0)
        return cast(x, gran_k=gran_k, use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)

    @_cpu(f"{op}.out")
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
        values, scales = cast(x, gran_k=gran_k, use_ue8m0=use_ue8m0, use_packed_ue8m0=use_packed_ue8m0)
        out.copy_(values)
        out_sf.copy_(scales)


for _kind in ("per_token", "per_channel", "per_block"):
    _register_cast(_kind)


@_cpu("transpose_fp8")
def _transpose_fp8(x: Tensor) -> Tensor:
    _checks.check_transpose_fp8(x)
    return reference.transpose_fp8(x)


@_cpu("transpose_fp8.out")
def _transpose_fp8_out(x: Tensor, *, out: Tensor) -> None:
    _checks.check_transpose_fp8(x, out)
    out.copy_(reference.transpose_fp8(x))


@_cpu("get_mn_major_tma_aligned_tensor")
def _mn_major(sf: Tensor) -> Tensor:
    _checks.check_mn_major("get_mn_major_tma_aligned_tensor", sf, packed=False)
    return reference.get_mn_major_tma_aligned_tensor(sf)


@_cpu("get_mn_major_tma_aligned_tensor.out")
def _mn_major_out(sf: Tensor, *, out: Tensor) -> None:
    _checks.check_mn_major("get_mn_major_tma_aligned_tensor", sf, packed=False, out=out)
    out.copy_(sf)


@_cpu("get_mn_major_tma_aligned_packed_ue8m0_tensor")
def _mn_major_packed(sf: Tensor, *, round_up: bool = False) -> Tensor:
    _checks.check_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, packed=True)
    return reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, round_up=round_up)


@_cpu("get_mn_major_tma_aligned_packed_ue8m0_tensor.out")
def _mn_major_packed_out(sf: Tensor, *, round_up: bool = False, out: Tensor) -> None:
    _checks.check_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, packed=True, out=out)
    out.copy_(reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, round_up=round_up))


@_cpu("get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor")
def _k_grouped_packed(sf: Tensor, ks: Tensor, *, gran_k: int = 128) -> Tensor:
    _checks.check_k_grouped_packed(sf, ks, gran_k)
    return reference.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks, gran_k=gran_k)


@_cpu("expand_ue8m0")
def _expand_ue8m0(sf: Tensor, *, k_sf: int) -> Tensor:
    _checks.check_expand_ue8m0(sf, k_sf)
    return reference.expand_ue8m0(sf, k_sf=k_sf)


@_cpu("expand_ue8m0.out")
def _expand_ue8m0_out(sf: Tensor, *, k_sf: int, out: Tensor) -> None:
    _checks.check_expand_ue8m0(sf, k_sf, out)
    out.copy_(reference.expand_ue8m0(sf, k_sf=k_sf))


@_cpu("transform_sf_into_required_layout")
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
    _checks.check_transform_sf(sf, mn, k, recipe, num_groups, is_sfa)
    return reference.transform_sf_into_required_layout(
        sf,
        mn,
        k,
        recipe,
        num_groups=num_groups,
        is_sfa=is_sfa,
        disable_ue8m0_cast=disable_ue8m0_cast,
        round_up=round_up,
    )
